"""The reward for a completion that is a JSON value of a given shape.

A part of JSON Schema, without a dependency: `$ref`, `oneOf`, `not`, `if`, `format` and pattern properties are left out,
and a schema that uses what is left out is refused.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator

from configs.schema import Fraction, Strict
from rewards.base import BaseReward, RewardRegistry

Schema = Mapping[str, Any]

TYPES: Mapping[str, Callable[[Any], bool]] = {
    "object": lambda value: isinstance(value, dict),
    "array": lambda value: isinstance(value, list),
    "string": lambda value: isinstance(value, str),
    "boolean": lambda value: isinstance(value, bool),
    "null": lambda value: value is None,
    "number": lambda value: isinstance(value, int | float) and not isinstance(value, bool),
    "integer": lambda value: isinstance(value, int | float) and not isinstance(value, bool) and value == value // 1,
}
LIMITS: Mapping[str, tuple[str, Callable[[Any, Any], bool]]] = {
    "minimum": ("number", lambda value, limit: value >= limit),
    "maximum": ("number", lambda value, limit: value <= limit),
    "exclusiveMinimum": ("number", lambda value, limit: value > limit),
    "exclusiveMaximum": ("number", lambda value, limit: value < limit),
    "minLength": ("string", lambda value, limit: len(value) >= limit),
    "maxLength": ("string", lambda value, limit: len(value) <= limit),
    "minItems": ("array", lambda value, limit: len(value) >= limit),
    "maxItems": ("array", lambda value, limit: len(value) <= limit),
}
"""keyword -> the type that it limits, and whether a value of that type is within the limit."""
OTHERS = ("type", "enum", "const", "pattern", "properties", "required", "additionalProperties", "items", "anyOf")
ANNOTATIONS = ("$schema", "$id", "title", "description", "default", "examples")


class JsonSchemaOptions(Strict):
    json_schema: Annotated[dict[str, Any], Field(alias="schema")]
    """The JSON schema, as YAML."""
    where: Literal["whole", "fence"] = "whole"
    """The whole completion is JSON, or its last fenced code block is."""
    valid: float = 1.0
    parsed: Fraction = 0.0
    """For JSON that the schema refuses."""
    invalid: float = 0.0
    """For text that is no JSON."""

    @field_validator("json_schema")
    @classmethod
    def _supported(cls, schema: dict[str, Any]) -> dict[str, Any]:
        check_schema(schema)
        return schema


@RewardRegistry.register("json_schema")
class JsonSchema(BaseReward):
    """`valid` where the completion is JSON that the schema accepts, else `parsed` or `invalid`."""

    Options: ClassVar = JsonSchemaOptions
    options: JsonSchemaOptions

    def __call__(self, prompts: Sequence[str], completions: Sequence[str], **columns: Sequence[Any]) -> list[float]:
        return [self._score(completion) for completion in completions]

    def _score(self, completion: str) -> float:
        try:
            value = json.loads(self._payload(completion), parse_constant=_refuse)
            return self.options.valid if accepts(self.options.json_schema, value) else self.options.parsed
        # Python's parser stops at its own depth and at 4300 digits: such text counts as no JSON.
        except (ValueError, RecursionError):
            return self.options.invalid

    def _payload(self, completion: str) -> str:
        if self.options.where == "whole":
            return completion
        blocks = re.findall(r"^```[^\n]*\n(.*?)^```", completion, re.DOTALL | re.MULTILINE)
        return blocks[-1] if blocks else ""


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")


def accepts(schema: Schema, value: Any) -> bool:
    """Whether the value has the schema's shape; a keyword says nothing about values of another type than its own."""
    if not schema:
        return True
    if not _limits_accept(schema, value):
        return False
    if "type" in schema and not any(TYPES[name](value) for name in _type_names(schema)):
        return False
    if "enum" in schema and not any(_equal(value, item) for item in schema["enum"]):
        return False
    if "const" in schema and not _equal(value, schema["const"]):
        return False
    if "anyOf" in schema and not any(accepts(option, value) for option in schema["anyOf"]):
        return False
    if isinstance(value, dict):
        return _object_accepts(schema, value)
    return not isinstance(value, list) or all(accepts(schema.get("items", {}), item) for item in value)


def _limits_accept(schema: Schema, value: Any) -> bool:
    if isinstance(value, str) and "pattern" in schema and not re.search(schema["pattern"], value):
        return False
    used = [(*LIMITS[keyword], limit) for keyword, limit in schema.items() if keyword in LIMITS]
    return all(within(value, limit) for kind, within, limit in used if TYPES[kind](value))


def _object_accepts(schema: Schema, value: Mapping[str, Any]) -> bool:
    properties = schema.get("properties", {})
    if set(schema.get("required", ())) - value.keys():
        return False
    if schema.get("additionalProperties", True) is False and value.keys() - properties.keys():
        return False
    return all(accepts(properties.get(name, {}), item) for name, item in value.items())


def _equal(value: Any, expected: Any) -> bool:
    """Equal as JSON: 1 and 1.0 are, 1 and true are not."""
    return json.dumps(_canonical(value), sort_keys=True) == json.dumps(_canonical(expected), sort_keys=True)


def _canonical(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _canonical(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_canonical(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _type_names(schema: Schema) -> list[str]:
    return [schema["type"]] if isinstance(schema["type"], str) else list(schema["type"])


def check_schema(schema: Any, where: str = "schema") -> None:
    """`ValueError` names the place of a keyword that is unknown here, or has a value that means nothing."""
    if not isinstance(schema, Mapping):
        raise ValueError(f"{where}: expected a mapping, got {schema!r}")
    for keyword, value in schema.items():
        if keyword not in LIMITS and keyword not in OTHERS and keyword not in ANNOTATIONS:
            raise ValueError(f"{where}.{keyword}: not supported; there are {sorted([*LIMITS, *OTHERS])}")
        if keyword in LIMITS and not TYPES["number"](value):
            raise ValueError(f"{where}.{keyword}: expected a number, got {value!r}")
        if keyword in EXPECTED and not EXPECTED[keyword][1](value):
            raise ValueError(f"{where}.{keyword}: expected {EXPECTED[keyword][0]}, got {value!r}")
    for place, inner in _inner_schemas(schema):
        check_schema(inner, f"{where}.{place}")


def _inner_schemas(schema: Schema) -> Iterator[tuple[str, Any]]:
    yield from ((f"properties.{name}", inner) for name, inner in schema.get("properties", {}).items())
    yield from ((f"anyOf.{number}", inner) for number, inner in enumerate(schema.get("anyOf", ())))
    if "items" in schema:
        yield "items", schema["items"]


def _is_pattern(value: Any) -> bool:
    try:
        return isinstance(value, str) and re.compile(value) is not None
    except re.error:
        return False


def _is_type(value: Any) -> bool:
    names = value if isinstance(value, list) else [value]
    return bool(names) and all(isinstance(name, str) and name in TYPES for name in names)


EXPECTED: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    "type": (f"one or a list of {[*TYPES]}", _is_type),
    "enum": ("a list", TYPES["array"]),
    "pattern": ("a regular expression", _is_pattern),
    "properties": ("a mapping of names to schemas", TYPES["object"]),
    "required": ("a list of names", lambda value: TYPES["array"](value) and all(isinstance(n, str) for n in value)),
    "additionalProperties": ("true or false", TYPES["boolean"]),
    "anyOf": ("a list of schemas", lambda value: TYPES["array"](value) and bool(value)),
}
