"""A benchmark's rows: a file of JSON lines, gzipped or not, or of one JSON list; or a dataset of the hub."""

import gzip
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.atomic import sha256
from pipeline.evaluation.report import sha256_of

HUB: Mapping[str, str] = {
    "openai/gsm8k": "e53f048856ff4f594e959d75785d2c2d37b678ee",
    "google-research-datasets/mbpp": "4bb6404fdc6cacfda99d4ac4205087b89d32030c",
}
"""Datasets of the Hugging Face hub that an option may name instead of a file, and the commit that is read."""


@dataclass(frozen=True)
class Rows:
    """Where a benchmark's rows come from: `place` is a file or a name of `HUB`."""

    place: str
    subset: str
    """Of the hub's dataset, and its `split`; a file has neither."""
    split: str

    @property
    def revision(self) -> str | None:
        return HUB.get(self.place)

    @property
    def file(self) -> Path:
        return Path(self.place).expanduser()

    def check(self, where: str) -> None:
        """`ValueError` that begins with `where` for a file that isn't there."""
        if self.revision is None and not self.file.is_file():
            raise ValueError(f"{where}: no such file: {self.file.absolute()} (datasets of the hub: {', '.join(HUB)})")

    def read(self, fields: Iterable[str]) -> list[dict[str, Any]]:
        """The rows, each with `fields`. `ValueError` for what can't be read."""
        return read_rows(self.file, fields) if self.revision is None else self._hub_rows(tuple(fields))

    def sha256(self) -> str:
        """Of the file, or of the rows."""
        return sha256(self.file) if self.revision is None else sha256_of(self._hub_rows(()))

    def _hub_rows(self, fields: tuple[str, ...]) -> list[dict[str, Any]]:
        from configs.schema import HuggingFaceSource
        from pipeline.data.loaders import HuggingFaceLoader, Record

        source = HuggingFaceSource(path=self.place, subset=self.subset, split=self.split, revision=self.revision)
        found = [row for row in HuggingFaceLoader(source).rows() if isinstance(row, Record)]
        return [_checked(f"{row.file}: row {row.line}", dict(row.values), fields) for row in found]


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
