"""The settings as a Markdown page, from the schema itself: every section, its fields, limits, defaults, meanings."""

import json
from collections.abc import Iterator
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from configs.schema import ExperimentConfig

HEAD = """# Configuration

Made from the schema by `mlx-rl schema --markdown -o docs/configuration.md`; a test keeps it so.
"""


def markdown() -> str:
    """The page: a table for each section, in the order in which an experiment names them."""
    return HEAD + "".join(_section(model) for model in sections())


def sections() -> list[type[BaseModel]]:
    """`ExperimentConfig` and every model that it holds."""
    found: dict[type[BaseModel], None] = {}
    waiting: list[type[BaseModel]] = [ExperimentConfig]
    while waiting:
        model = waiting.pop(0)
        if model not in found:
            found[model] = None
            waiting += [part for field in model.model_fields.values() for part in _models(field.annotation)]
    return list(found)


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _models(part)


def _section(model: type[BaseModel]) -> str:
    about = (model.__doc__ or "").strip().splitlines()
    rows = [
        f"| `{name}` | {_type(field)} | {_default(field)} | {_cell(field.description or '')} |"
        for name, field in model.model_fields.items()
    ]
    words = f"{about[0]}\n\n" if about and about[0] else ""
    return (
        f"\n## {model.__name__}\n\n{words}| field | type | default | meaning |\n|---|---|---|---|\n"
        + "\n".join(rows)
        + "\n"
    )


def _type(field: FieldInfo) -> str:
    limits = [
        f"{sign} {getattr(part, key)}"
        for part in field.metadata
        for key, sign in LIMITS.items()
        if getattr(part, key, None) is not None
    ]
    return _cell(", ".join([_words(field.annotation), *limits]))


LIMITS = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}


def _words(annotation: Any) -> str:
    origin, parts = get_origin(annotation), get_args(annotation)
    if annotation is NoneType:
        return "null"
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in parts)
    if origin is Annotated:
        return _words(parts[0])
    if origin in (Union, UnionType):
        return " or ".join(_words(part) for part in parts)
    if origin in (tuple, list):
        return f"list of {_words(parts[0])}"
    if origin is dict:
        return "mapping"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return f"[{annotation.__name__}](#{annotation.__name__.lower()})"
    return getattr(annotation, "__name__", str(annotation))


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        changed = value.model_dump(mode="json", exclude_defaults=True)
        return f"`{_cell(json.dumps(changed))}`" if changed else "its own"
    return f"`{_cell(json.dumps(value))}`"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
