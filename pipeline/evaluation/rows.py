"""Benchmark files: JSON lines, gzipped or not, or one JSON list."""

import gzip
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any


def read_rows(file: Path, fields: Iterable[str]) -> list[dict[str, Any]]:
    """The objects in a file, each with `fields`. `ValueError` names the file, the line and what is missing."""
    try:
        content = file.read_bytes()
        text = (gzip.decompress(content) if file.suffix == ".gz" else content).decode("utf-8")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: not readable: {error}") from error
    rows = [_checked(place, row, tuple(fields)) for place, row in _parsed(text, file)]
    if not rows:
        raise ValueError(f"{file}: no rows")
    return rows


def _parsed(text: str, file: Path) -> Iterator[tuple[str, Any]]:
    if text.lstrip().startswith("["):
        yield from ((f"{file}: row {number}", row) for number, row in enumerate(_json(text, str(file)), start=1))
        return
    # Not splitlines: a text may hold other line separators, such as U+2028, unescaped.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield f"{file}:{number}", _json(line, f"{file}:{number}")


def _json(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{place}: not JSON: {error}") from error


def _checked(place: str, row: Any, fields: tuple[str, ...]) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise ValueError(f"{place}: expected an object, got {type(row).__name__}")
    missing = [field for field in fields if field not in row]
    if missing:
        raise ValueError(f"{place}: has no {', '.join(missing)}; it has {sorted(row)}")
    return row
