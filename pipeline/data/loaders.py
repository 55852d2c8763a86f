"""Where rows come from: JSONL files, Hugging Face datasets, reasoning-gym, and what plugins register.

A loader gives a row, or says why there is none; it never stops for a bad row. What makes a row usable as an example is
decided in `pipeline.data.preprocessing`.
"""

import gzip
import json
import zlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, ClassVar, NoReturn

from pydantic import BaseModel, ValidationError

from configs.atomic import sha256
from configs.loader import describe
from configs.registry import PluginFault, Registry
from configs.schema import HuggingFaceSource, JsonlSource, PluginSource, ReasoningGymSource, Source
from rewards.base import NoOptions

MAX_LINE_BYTES = 64 * 2**20
EXCERPT_CHARACTERS = 120
MAX_DEPTH = 64
"""Lists and objects inside each other. How deep Python could follow depends on who calls it."""


@dataclass(frozen=True)
class Record:
    """A row of a source, by column."""

    values: Mapping[str, Any]
    file: str = ""
    line: int = 0
    """From 1; 0 for a loader that has no lines, and is numbered by position."""


@dataclass(frozen=True)
class Rejected:
    """A row that can't be used."""

    file: str
    line: int
    reason: str
    """A few words, the same for every row with this fault: they are counted."""
    detail: str
    excerpt: str


class BaseLoader(ABC):
    """A source of rows. Register it: `@LoaderRegistry.register("name")`.

    `Options` is the pydantic model of its settings; the instance holds them as `self.options`.
    """

    Options: ClassVar[type[BaseModel]] = NoOptions

    def __init__(self, options: Any = None) -> None:
        self.options = self.Options() if options is None else options

    @property
    @abstractmethod
    def name(self) -> str:
        """What messages call the source: a file, a hub id."""

    @abstractmethod
    def rows(self) -> Iterator[Record | Rejected]:
        """The rows in a fixed order. `ValueError` where the source as a whole can't be read."""

    def provenance(self) -> dict[str, str | int]:
        """What says which data this was, for the dataset's manifest; the same for the same data."""
        return {}


LoaderRegistry: Registry[BaseLoader] = Registry("loader")


def make_loader(source: Source) -> BaseLoader:
    """The loader of a source. `ValueError` for one that is not registered, and for options that its model refuses."""
    name = source.name if isinstance(source, PluginSource) else source.kind
    if name not in LoaderRegistry:
        raise ValueError(f"name: unknown loader {name!r}; registered: {LoaderRegistry.names()}")
    cls = LoaderRegistry[name]
    if not isinstance(source, PluginSource):
        return cls(source)
    try:
        options = cls.Options.model_validate(source.options)
    except ValidationError as error:
        raise ValueError(describe(error, f"options of loader {name!r}", source.options)) from error
    return _PluginLoader(cls(options), name)


def excerpt(row: bytes | str | Mapping[str, Any]) -> str:
    """The first characters of a row, on one line."""
    if isinstance(row, Mapping):
        row = repr(dict(row))
    text = row[: 4 * EXCERPT_CHARACTERS].decode(errors="replace") if isinstance(row, bytes) else row
    printable = "".join(c if c.isprintable() else " " for c in text[: EXCERPT_CHARACTERS + 1]).strip()
    return printable if len(printable) <= EXCERPT_CHARACTERS else printable[: EXCERPT_CHARACTERS - 1] + "…"


# ---- JSONL ---------------------------------------------------------------------------------------------------------


@LoaderRegistry.register("jsonl")
class JsonlLoader(BaseLoader):
    """One JSON object a line, in a `.jsonl` or a `.jsonl.gz`; empty lines are passed over."""

    Options: ClassVar = JsonlSource
    options: JsonlSource

    @property
    def name(self) -> str:
        return self.options.path

    def rows(self) -> Iterator[Record | Rejected]:
        path = self._path()
        try:
            with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as stream:
                yield from self._lines(stream)
        except OSError as error:
            raise ValueError(f"{self.name}: can't be read: {error}") from error

    def provenance(self) -> dict[str, str | int]:
        return {"sha256": sha256(self._path())}

    def _path(self) -> Path:
        path = local_path(self.options.path)
        if not path.is_file():
            raise ValueError(f"{self.name}: {'a folder, not a file' if path.is_dir() else 'no such file'}")
        return path

    def _lines(self, stream: IO[bytes] | gzip.GzipFile) -> Iterator[Record | Rejected]:
        number = 0
        while True:
            number += 1
            try:
                raw = stream.readline(MAX_LINE_BYTES)
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                # Not a bad row: nobody knows how many rows are missing.
                raise ValueError(f"{self.name}: line {number}: gzip damaged or cut short: {error}") from error
            if not raw:
                return
            if len(raw) == MAX_LINE_BYTES and not raw.endswith(b"\n"):
                yield Rejected(self.name, number, "line too long", f"over {MAX_LINE_BYTES} bytes", excerpt(raw))
                while raw and not raw.endswith(b"\n"):
                    raw = stream.readline(MAX_LINE_BYTES)
            elif raw.strip():
                yield parse_line(raw, self.name, number)


def parse_line(raw: bytes, file: str, number: int) -> Record | Rejected:
    """The row in one line of JSONL."""
    try:
        text = raw.removeprefix(b"\xef\xbb\xbf").decode("utf-8")
    except UnicodeDecodeError as error:
        return Rejected(file, number, "not UTF-8", f"byte {error.start + 1} of the line: {error.reason}", excerpt(raw))
    try:
        values = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_refuse_doubled)
        _refuse_depth(values)
    except (ValueError, RecursionError) as error:
        ending = "" if raw.endswith(b"\n") else "; the file ends in this line: cut short?"
        return Rejected(file, number, "malformed JSON", f"{error}{ending}", excerpt(text))
    if not isinstance(values, dict):
        return Rejected(file, number, "not an object", f"expected {{…}}, got a {type(values).__name__}", excerpt(text))
    return Record(values, file, number)


def local_path(text: str) -> Path:
    """The path that a setting names. `ValueError` for one that no file can have."""
    try:
        path = Path(text).expanduser()
        path.exists()
    # RuntimeError: the home of somebody who isn't here.
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"{text[:EXCERPT_CHARACTERS]}: no such file: {error}") from error
    return path


def _refuse_doubled(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        doubled = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {doubled!r} stands twice")
    return values


def _refuse_depth(values: Any) -> None:
    layer = [values]
    for _ in range(MAX_DEPTH):
        layer = [
            item
            for value in layer
            if isinstance(value, dict | list)
            for item in (value.values() if isinstance(value, dict) else value)
        ]
    if layer:
        raise ValueError(f"more than {MAX_DEPTH} levels of lists and objects")


def _refuse_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


# ---- Hugging Face --------------------------------------------------------------------------------------------------


@LoaderRegistry.register("huggingface")
class HuggingFaceLoader(BaseLoader):
    """A dataset of the hub at a pinned revision, or a local folder; code in a dataset is never run."""

    Options: ClassVar = HuggingFaceSource
    options: HuggingFaceSource

    @property
    def name(self) -> str:
        subset = f"/{self.options.subset}" if self.options.subset else ""
        return f"{self.options.path}{subset}[{self.options.split}]"

    def rows(self) -> Iterator[Record | Rejected]:
        rows, number = iter(self._dataset()), 0
        while True:
            number += 1
            # Whatever a codec of images or sound says to a damaged file.
            with PluginFault(ValueError, f"{self.name}: row {number} can't be read"):
                values = next(rows, None)
            if values is None:
                return
            yield Record(values, self.name, number)

    def provenance(self) -> dict[str, str | int]:
        return {"revision": self.options.revision} if self.options.revision else {}

    def _dataset(self) -> Any:
        path = self.options.path
        local = path.startswith((".", "/", "~"))
        if local and not local_path(path).exists():
            raise ValueError(f"{self.name}: no such file or folder")
        import datasets
        from datasets.exceptions import DatasetsError

        try:
            return datasets.load_dataset(
                str(local_path(path)) if local else path,
                self.options.subset,
                split=self.options.split,
                revision=self.options.revision,
            )
        # RuntimeError: the dataset is a script, which `datasets` refuses to run.
        except (DatasetsError, OSError, ValueError, RuntimeError) as error:
            cause = f": {error.__cause__}" if error.__cause__ else ""
            raise ValueError(f"{self.name}: can't be loaded: {type(error).__name__}: {error}{cause}") from error


# ---- generated and plugged in --------------------------------------------------------------------------------------


@LoaderRegistry.register("reasoning_gym")
class ReasoningGymLoader(BaseLoader):
    """Tasks of reasoning-gym, generated; see `pipeline.data.reasoning` for the columns."""

    Options: ClassVar = ReasoningGymSource
    options: ReasoningGymSource

    @property
    def name(self) -> str:
        return f"reasoning_gym[{', '.join(task.name for task in self.options.tasks)}]"

    def rows(self) -> Iterator[Record | Rejected]:
        from pipeline.data.reasoning import generate

        for number, values in enumerate(generate(self.options), start=1):
            yield Record(values, self.name, number)

    def provenance(self) -> dict[str, str | int]:
        from importlib.metadata import version

        return {"reasoning-gym": version("reasoning-gym")}


class _PluginLoader(BaseLoader):
    """A plugin's loader, whose faults name it and whose rows are numbered."""

    def __init__(self, loader: BaseLoader, plugin: str) -> None:
        super().__init__()
        self._loader, self._plugin = loader, plugin

    @property
    def name(self) -> str:
        return self._loader.name

    def rows(self) -> Iterator[Record | Rejected]:
        with PluginFault(ValueError, f"{self.name}: loader {self._plugin!r} failed"):
            rows = iter(self._loader.rows())
        number = 0
        while True:
            number += 1
            with PluginFault(ValueError, f"{self.name}: loader {self._plugin!r} failed at row {number}"):
                row = next(rows, None)
            if row is None:
                return
            if not isinstance(row, Record | Rejected):
                raise ValueError(f"{self.name}: loader {self._plugin!r} gave a {type(row).__name__}; expected a Record")
            yield replace(row, file=row.file or self.name, line=row.line or number)

    def provenance(self) -> dict[str, str | int]:
        return self._loader.provenance()
