"""One row becomes one example, or is set aside for a reason that can be counted.

Cleaning never changes what a text says: Unicode to NFC, line ends to `\\n`, control characters out, white space off the
ends.
"""

import hashlib
import json
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from configs.schema import FieldsConfig, Source
from pipeline.data.json_values import as_json
from pipeline.data.loaders import excerpt
from rewards.base import Example

RESERVED = {"id", "answer", "truncated", "completion_length", "max_completion_length", "prompts", "completions"}
"""Names that a reward is handed beside the dataset's columns; a column of such a name becomes `source_<name>`."""


class SetAside(Exception):
    """This row can't be used: `reason` is counted, `detail` is shown."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class Columns:
    """Which column is which part of an example; a part that is not `required` may be absent."""

    prompt: str
    id: str | None = None
    messages: str | None = None
    target: str = "target"
    answer: str = "answer"
    required: frozenset[str] = frozenset()


def columns_of(fields: FieldsConfig, source: Source) -> Columns:
    """The settings' columns. Target and answer default to the columns of these names, where the source has them."""
    generated = source.kind == "reasoning_gym"
    return Columns(
        prompt="question" if generated and fields.prompt == "prompt" else fields.prompt,
        id=fields.id,
        messages=fields.messages,
        target=fields.target or "target",
        answer=fields.answer or "answer",
        required=frozenset(part for part in ("target", "answer") if getattr(fields, part) is not None),
    )


def read_example(values: Mapping[str, Any], columns: Columns, max_prompt_chars: int) -> Example:
    """The example in a row; raises `SetAside`."""
    values = _json_row(values)
    messages, last = _chat(values, columns)
    prompt = _prompt(values, columns) if messages is None else messages[-1]["content"]
    size = len(prompt) if messages is None else sum(len(message["content"]) for message in messages)
    if size > max_prompt_chars:
        raise SetAside("too long", f"{size} characters; max_prompt_chars is {max_prompt_chars}")
    target = _part(values, columns, "target")
    if last is not None and target is not None:
        raise SetAside("two targets", f"the chat ends with the assistant, and there is a column {columns.target!r}")
    example = Example("", prompt, messages, target or last, _part(values, columns, "answer"))
    example = replace(example, columns=_other_columns(values, columns, example))
    return replace(example, id=_id(values, columns) or prompt_key(example)[:16])


def _json_row(values: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(values, Mapping):
        raise SetAside("not an object", f"expected columns by name, got a {type(values).__name__}")
    try:
        return {as_json(str(name), "a name"): as_json(value, str(name)) for name, value in values.items()}
    except (ValueError, RecursionError) as error:
        raise SetAside("value not JSON", str(error)) from error


def _prompt(values: Mapping[str, Any], columns: Columns) -> str:
    prompt = values.get(columns.prompt)
    if prompt is None:
        raise SetAside("prompt missing", f"no column {columns.prompt!r}; there are {sorted(values)}")
    if not isinstance(prompt, str):
        raise SetAside("prompt not text", f"column {columns.prompt!r} holds {excerpt(repr(prompt))}")
    prompt = clean(prompt)
    if not prompt:
        raise SetAside("prompt empty", f"column {columns.prompt!r}")
    return prompt


def _chat(values: Mapping[str, Any], columns: Columns) -> tuple[tuple[dict[str, str], ...] | None, str | None]:
    """The chat that is the prompt, and the assistant's last turn where the chat ends with one."""
    if columns.messages is None:
        return None, None
    turns = values.get(columns.messages)
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise SetAside("prompt missing", f"column {columns.messages!r} holds no list of messages")
    messages = [_message(turn, f"{columns.messages}.{number}") for number, turn in enumerate(turns)]
    last = messages.pop()["content"] if messages and messages[-1]["role"] == "assistant" else None
    if not messages or not messages[-1]["content"]:
        raise SetAside("prompt empty", f"column {columns.messages!r} has no message to answer")
    return tuple(messages), last


def _message(turn: Mapping[str, Any], where: str) -> dict[str, str]:
    message = {name: value for name, value in turn.items() if value is not None}
    if not message.keys() >= {"role", "content"} or not all(isinstance(value, str) for value in message.values()):
        raise SetAside("prompt not text", f"{where}: expected role and content as text, got {excerpt(repr(turn))}")
    return {name: clean(value) for name, value in message.items()}


def _part(values: Mapping[str, Any], columns: Columns, part: str) -> str | None:
    """The target or the answer; a number is as good as its text."""
    name = columns.target if part == "target" else columns.answer
    value = values.get(name)
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    text = _clean_end(value) if isinstance(value, str) else ""
    text = text if part == "target" else text.strip()
    if not text and part in columns.required:
        raise SetAside(f"no {part}", f"column {name!r} holds {excerpt(repr(value))}; there are {sorted(values)}")
    return text or None


def _id(values: Mapping[str, Any], columns: Columns) -> str | None:
    if columns.id is None:
        return None
    value = values.get(columns.id)
    if not isinstance(value, str | int) or isinstance(value, bool) or not clean(str(value)):
        raise SetAside("no id", f"column {columns.id!r} holds {excerpt(repr(value))}")
    return clean(str(value))


def _other_columns(values: Mapping[str, Any], columns: Columns, example: Example) -> dict[str, Any]:
    used = {columns.messages, columns.id} if example.messages is not None else {columns.prompt, columns.id}
    used |= {columns.target} if example.target is not None else set()
    used |= {columns.answer} if example.answer is not None else set()
    kept = {name: value for name, value in values.items() if name not in used}
    return {f"source_{name}" if name in RESERVED else name: value for name, value in kept.items()}


# ---- text ----------------------------------------------------------------------------------------------------------

LINE_ENDS = re.compile("\r\n?|[\x0b\x0c\x1c-\x1e\x85\u2028\u2029]")
CONTROL = re.compile("[\x00-\x08\x0e-\x1b\x1f\x7f-\x84\x86-\x9f\ufeff]")


def clean(text: str) -> str:
    """The text in NFC with `\\n` at line ends, without control characters and outer white space; tabs stay."""
    return _clean_end(text).strip()


def _clean_end(text: str) -> str:
    """As `clean`, but the first line keeps its indentation."""
    return unicodedata.normalize("NFC", CONTROL.sub("", LINE_ENDS.sub("\n", text))).strip("\n").rstrip()


def prompt_key(example: Example) -> str:
    """What makes two prompts the same: a sha256 of the text with white space evened out (of every turn, for a chat)."""
    turns = [example.prompt] if example.messages is None else [f"{m['role']}: {m['content']}" for m in example.messages]
    text = json.dumps([" ".join(turn.split()) for turn in turns])
    return hashlib.sha256(text.encode()).hexdigest()
