"""A section of an experiment as Dagster configuration: its values are the launchpad's defaults, a typo is refused.

Dagster checks names and types. Ranges and rules across fields are pydantic's: what was changed at launch is laid over
the file's section and validated as if it stood in the file.
"""

import types
from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import dagster as dg
from pydantic import BaseModel, ValidationError

from configs.loader import describe, merge
from configs.schema import ExperimentConfig
from pipeline.catalog import Entry

SCALARS: dict[type, Any] = {bool: dg.Bool, int: dg.Int, float: dg.Float, str: dg.String}


def section_fields(section: BaseModel) -> dict[str, dg.Field]:
    """A Dagster field for each setting of a section; fixed tags (`kind: full`) have none."""
    fields = {}
    for name, info in type(section).model_fields.items():
        value = getattr(section, name)
        kind = _config_type(type(section), name, info.annotation, value)
        if kind is not None:
            fields[name] = _field(kind, value, info.description)
    return fields


def _field(kind: Any, value: Any, description: str | None) -> dg.Field:
    if isinstance(kind, dg.Shape):  # its own fields have the defaults
        return dg.Field(kind, description=description)
    return dg.Field(kind, default_value=_plain(value), is_required=False, description=description)


def _config_type(owner: type[BaseModel], name: str, annotation: Any, value: Any) -> Any:
    if get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    if get_origin(annotation) in (Union, types.UnionType):
        return _union_type(owner, name, annotation, value)
    if isinstance(value, BaseModel):
        fields = section_fields(value)
        return dg.Shape(fields) if fields else None
    if get_origin(annotation) is Literal:
        choices = get_args(annotation)
        return _enum(f"{owner.__name__}_{name}", choices) if len(choices) > 1 else None
    if get_origin(annotation) is tuple:
        return dg.Array(_config_type(owner, name, get_args(annotation)[0], None))
    if annotation in SCALARS:
        return SCALARS[annotation]
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return dg.Shape(section_fields(annotation()))
    return dg.Permissive()


def _union_type(owner: type[BaseModel], name: str, annotation: Any, value: Any) -> Any:
    """Of `X | None`, or of alternatives, where the file has chosen one."""
    members = get_args(annotation)
    if type(None) not in members:
        return _config_type(owner, name, type(value), value)
    (member,) = (each for each in members if each is not type(None))
    return dg.Noneable(_config_type(owner, name, member, value))


@cache
def _enum(name: str, choices: tuple[str, ...]) -> dg.Enum:
    return dg.Enum(name, [dg.EnumValue(choice) for choice in choices])


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return {name: _plain(getattr(value, name)) for name in section_fields(value)}
    return list(value) if isinstance(value, tuple) else value


def overridden(entry: Entry, stage: str, settings: Mapping[str, Any]) -> ExperimentConfig:
    """The experiment with a stage's settings as they were at launch.

    `DagsterInvalidConfigError` names the settings that are refused.
    """
    section = getattr(entry.experiment, stage)
    changed = _changes(_plain(section), settings)
    data = entry.experiment.model_dump(mode="json", exclude_unset=True)
    try:
        return ExperimentConfig.model_validate(merge(data, {stage: changed}))
    except ValidationError as error:
        message = describe(error, f"{entry.experiment.name}, settings at launch")
        raise dg.DagsterInvalidConfigError(message, [], dict(settings)) from None


def _changes(defaults: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """What differs from the file. A rule that looks at which fields were set must not see every default as set."""
    changed: dict[str, Any] = {}
    for name, value in settings.items():
        before = defaults[name]
        if isinstance(value, Mapping) and isinstance(before, Mapping):
            below = _changes(before, value)
            if below:
                changed[name] = below
        elif value != before:
            changed[name] = value
    return changed


def config_mapping(entry: Entry, stage: str) -> dg.ConfigMapping:
    """Binds the training op to an experiment's stage."""

    def bind(settings: Mapping[str, Any]) -> dict[str, Any]:
        experiment = overridden(entry, stage, settings)
        config = {
            "stage": stage,
            "experiment": experiment.model_dump_json(exclude_unset=True),
            "source": str(entry.source),
        }
        return {"train": {"config": config}}

    return dg.ConfigMapping(config_fn=bind, config_schema=section_fields(getattr(entry.experiment, stage)))
