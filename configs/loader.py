"""YAML to `ExperimentConfig`: inheritance, dotted overrides, errors that name file and field, a digest per section."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from configs.schema import ExperimentConfig
from configs.strict_yaml import parse_yaml, read_mapping

EXPERIMENTS = Path(__file__).parent / "experiments"


def load_experiment(path: str | Path, overrides: Sequence[str] = ()) -> ExperimentConfig:
    """The experiment of a YAML file, with `section.field=value` overrides laid over it.

    `extends: other.yaml` starts from another file of the same folder, but for its name. `ValueError` names the file,
    each field's path, what was got and what was expected.
    """
    path = Path(path)
    data = read_yaml(path)
    data.setdefault("name", path.stem)
    for override in overrides:
        apply_override(data, override, path)
    try:
        return ExperimentConfig.model_validate(data)
    except ValidationError as error:
        raise ValueError(describe(error, path, data)) from error


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file, merged over the file that it `extends`. `ValueError` names the file and the line."""
    return _read_extended(path, ())


def _read_extended(path: Path, children: tuple[str, ...]) -> dict[str, Any]:
    data = read_mapping(path)
    parent = data.pop("extends", None)
    if parent is None:
        return data
    if not isinstance(parent, str) or parent in ("", "..") or Path(parent).name != parent:
        raise ValueError(f"{path}: extends: expected the name of another file in this folder, got {parent!r}")
    chain = (*children, path.name)
    if parent in chain:
        raise ValueError(f"{path}: extends: {' extends '.join((*chain, parent))}, which never ends")
    try:
        base = _read_extended(path.with_name(parent), chain)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: extends: {error}") from error
    base.pop("name", None)
    return merge(base, data)


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` laid over `base`, mapping by mapping; anything else is replaced whole."""
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        merged[key] = merge(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged


def apply_override(data: dict[str, Any], override: str, path: Path) -> None:
    """Set `a.b.0.c=value` in place; the value is read as YAML. `ValueError` where there is no such place."""
    dotted, equals, text = override.partition("=")
    if not equals or not dotted:
        raise ValueError(f"{path}: override {override!r}: expected section.field=value")
    try:
        value = parse_yaml(text)
        _set(data, dotted.split("."), value)
    except ValueError as error:
        raise ValueError(f"{path}: override {override!r}: {error}") from error


def _set(place: Any, keys: Sequence[str], value: Any) -> None:
    key, *rest = keys
    if isinstance(place, list) and key.isascii() and key.isdigit() and int(key) < len(place):
        index: Any = int(key)
    elif isinstance(place, dict):
        index = key
    else:
        raise ValueError(f"{key!r} has no place in {_short(place)}")
    if not rest:
        place[index] = value
        return
    if isinstance(place, dict) and place.get(index) is None:
        place[index] = {}
    _set(place[index], rest, value)


def describe(error: ValidationError, path: Path | str, data: Any = None) -> str:
    """One line a fault: the field's path, what is wrong, what was got.

    With the `data` that was refused, paths are those of the file, without the tags of pydantic's unions.
    """
    lines = [f"{path}: {error.error_count()} setting(s) refused"]
    for fault in error.errors(include_url=False):
        field = ".".join(_path_in_file(fault["loc"], data)) or "(whole file)"
        message = fault["msg"].removeprefix("Value error, ")
        if fault["type"] == "extra_forbidden":
            message = "unknown key (misspelt?)"
        got = fault["input"]
        shown = "" if isinstance(got, dict | BaseModel) else f" (got {_short(got)})"
        lines.append(f"  {field}: {message}{shown}")
    return "\n".join(lines)


def _path_in_file(location: Sequence[str | int], data: Any) -> list[str]:
    parts: list[str] = []
    place = data
    for number, part in enumerate(location, start=1):
        if isinstance(place, dict) and part not in place and number < len(location):
            continue  # a union's tag
        parts.append(str(part) if str(part).isprintable() and part != "" else repr(part))
        place = _inside(place, part)
    return parts


def _inside(place: Any, part: str | int) -> Any:
    if isinstance(place, list) and isinstance(part, int):
        return place[part]
    return place.get(part) if isinstance(place, dict) else None


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def digest(*parts: BaseModel | Mapping[str, Any] | Sequence[Any] | str | int | None) -> str:
    """A hash of settings, equal for equal values whatever their order in the file: 16 hexadecimal digits of sha256."""
    plain = [_plain(part) for part in parts]
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:16]


def _plain(part: Any) -> Any:
    if isinstance(part, BaseModel):
        return part.model_dump(mode="json")
    if isinstance(part, Mapping):
        return {key: _plain(value) for key, value in part.items()}
    if isinstance(part, list | tuple):
        return [_plain(item) for item in part]
    return part


def changed_fields(old: Mapping[str, Any], new: BaseModel) -> list[str]:
    """Dotted paths that differ between a dumped section and `new`, but for those that may change on resume."""
    return sorted(_differences(old, new.model_dump(mode="json"), _changeable(type(new)), ""))


def _changeable(model: type[BaseModel], prefix: str = "") -> set[str]:
    paths: set[str] = set()
    for name, info in model.model_fields.items():
        if isinstance(info.json_schema_extra, dict) and info.json_schema_extra.get("may_change_on_resume"):
            paths.add(prefix + name)
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            paths |= _changeable(info.annotation, f"{prefix}{name}.")
    return paths


def _differences(old: Any, new: Any, free: set[str], path: str) -> list[str]:
    if path in free or old == new:
        return []
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        dot = path + "." if path else ""
        keys = sorted(old.keys() | new.keys())
        return [d for key in keys for d in _differences(old.get(key), new.get(key), free, dot + key)]
    return [path]
