"""YAML as its readers expect it: `off` and `1e-6` are what they look like, and a key that stands twice is an error.

PyYAML follows YAML 1.1, where `off` is a boolean, `1e-6` a string, `1:30` ninety and `2024-01-01` a date. Here the
scalars are those of YAML 1.2's core schema, and what comes out is what JSON can hold.
"""

import math
import re
from pathlib import Path
from typing import Any

import yaml

MAX_DEPTH = 64
MAX_VALUES = 100_000
"""An alias may stand for many values, so a short file can mean an endless one."""

FAULTS = (ValueError, LookupError, AttributeError, TypeError)
"""What PyYAML's constructors raise for text that they can't read: an explicit tag runs them on any text."""


class StrictLoader(yaml.SafeLoader):
    """The safe loader with YAML 1.2's scalars and without doubled keys."""

    yaml_implicit_resolvers = {  # noqa: RUF012 (PyYAML's own class attribute)
        first: [pair for pair in pairs if pair[0].rpartition(":")[2] in ("null", "merge")]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"the key {key.value!r} stands twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except FAULTS as error:
            problem = f"{type(error).__name__}: {error}"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark) from error


SCALARS = {
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": (r"[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F]+)", "-+0123456789"),
    "float": (
        r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|\.[0-9]+(?:[eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+)"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
    ),
}
for _kind, (_pattern, _first) in SCALARS.items():
    StrictLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(f"(?:{_pattern})$"), list(_first))


def parse_yaml(text: str) -> Any:
    """The value of a YAML text: dicts, lists, strings, finite numbers, booleans and None, none of them shared.

    `ValueError` says what is wrong and where: the line of what is not YAML, the field of what JSON can't hold.
    """
    try:
        loader = StrictLoader(text)
        value = loader.get_single_data()
    except yaml.YAMLError as error:
        raise ValueError(f"not readable as YAML: {_one_paragraph(error)}") from error
    except RecursionError as error:
        raise ValueError("not readable as YAML: nested too deeply") from error
    return _plain(value, (), [MAX_VALUES])


def read_mapping(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. `ValueError` names the file, and the line or field."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        data = parse_yaml(path.read_bytes().decode("utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path}: expected a mapping of settings, got {type(data).__name__}")
    return data


def _one_paragraph(error: yaml.YAMLError) -> str:
    return re.sub(r"\s*\n\s*", "; ", str(error).replace('in "<unicode string>", ', "at "))


def _plain(value: Any, place: tuple[str, ...], budget: list[int]) -> Any:
    budget[0] -= 1
    where = ".".join(place) or "(whole file)"
    if len(place) > MAX_DEPTH or budget[0] < 0:
        raise ValueError(f"{'.'.join(place[:8])}: more than {MAX_DEPTH} levels or {MAX_VALUES} values")
    if isinstance(value, dict):
        return {_key(key, where): _plain(item, (*place, str(key)), budget) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item, (*place, str(number)), budget) for number, item in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where}: expected a finite number, got {value}")
    if isinstance(value, str):
        _key(value, where)
    elif not isinstance(value, int | float | None):
        raise ValueError(f"{where}: expected text, a number, a list or a mapping, got {type(value).__name__} {value!r}")
    return value


def _key(key: Any, where: str) -> str:
    if not isinstance(key, str):
        raise ValueError(f"{where}: expected a name as key, got {key!r}; put it in quotes")
    if any("\ud800" <= character <= "\udfff" for character in key):
        raise ValueError(f"{where}: {key!r} holds half a surrogate pair")
    return key
