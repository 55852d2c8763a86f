"""A dataset on disk: `train.jsonl`, `test.jsonl`, `rejected.jsonl` and `manifest.json` in one folder.

The folder appears whole or not at all, and the same settings over the same data give the same bytes. Readers compare
what they parse with the manifest's sha256.
"""

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256 as hash_of
from pathlib import Path
from typing import Any, Literal

from configs.atomic import MANIFEST, new_directory, read_manifest, sha256
from configs.loader import digest
from configs.registry import load_plugins
from configs.schema import DatasetConfig
from pipeline.data.preprocessing import Prepared, prepare
from rewards.base import Example

Split = Literal["train", "test"]

FORMAT = 1
SAMPLES = 5


@dataclass(frozen=True)
class DatasetSummary:
    """What one wants to see of a dataset."""

    path: Path
    sha256: str
    """Of the manifest, which holds the sha256 of each file."""
    files: Mapping[str, str]
    """Name to sha256."""
    train: int
    test: int
    rejected: int
    """Rows that were set aside, duplicates too."""
    reasons: Mapping[str, int]
    """Of these, how many for which reason."""
    sources: Mapping[str, Mapping[str, Any]]
    """By split: the source's name, its rows, and what says which data it was."""
    lengths: Mapping[str, Mapping[str, float]]
    """Characters of prompts and targets, by split: min, mean, median, p95, max."""
    samples: Sequence[Mapping[str, Any]]
    """The first rows of train, as they stand in the file."""


def build_dataset(
    config: DatasetConfig, directory: Path, *, plugins: Sequence[str] = (), plugins_root: Path | None = None
) -> DatasetSummary:
    """Prepare a dataset and write it to `directory`, in the place of what stood there.

    `plugins` are imported first, files relative to `plugins_root` (the current folder where absent); a caller that has
    imported them already leaves both out. `ImportError` names a plugin, `ValueError` the source and its first bad rows;
    nothing is written then.
    """
    load_plugins(plugins, plugins_root or Path.cwd())
    prepared = prepare(config)
    extra: dict[str, Any] = {}
    with new_directory(directory, extra) as folder:
        _write_lines(folder / "train.jsonl", map(_as_row, prepared.train))
        _write_lines(folder / "test.jsonl", map(_as_row, prepared.test))
        _write_lines(folder / "rejected.jsonl", map(asdict, prepared.rejected))
        extra |= _about(config, prepared)
    return read_summary(directory)


def read_summary(directory: Path) -> DatasetSummary:
    """The summary of a dataset that was built, from its manifest. `ValueError` where there is none."""
    manifest = read_manifest(directory)
    if manifest.get("format") != FORMAT:
        raise ValueError(
            f"{directory / MANIFEST}: format {manifest.get('format')!r} is not that of a dataset; build anew"
        )
    samples = [json.loads(line) for line in _read_verified(directory, "train.jsonl", manifest).splitlines()[:SAMPLES]]
    return DatasetSummary(
        path=directory,
        sha256=sha256(directory / MANIFEST),
        files={name: about["sha256"] for name, about in manifest["files"].items()},
        samples=samples,
        **{name: manifest[name] for name in ("train", "test", "rejected", "reasons", "sources", "lengths")},
    )


def read_examples(directory: Path, split: Split, sha256: str | None = None) -> list[Example]:
    """The examples of a split, in the order of the file.

    `sha256` is the manifest's, as a `DatasetRef` has it. `ValueError` names the file that is missing, or not what was
    written.
    """
    text = (directory / MANIFEST).read_bytes() if (directory / MANIFEST).is_file() else b""
    if sha256 is not None and hash_of(text).hexdigest() != sha256:
        raise ValueError(
            f"{directory / MANIFEST}: missing, or not the one of sha256 {sha256[:12]}…; build the dataset anew"
        )
    rows = _read_verified(directory, f"{split}.jsonl", read_manifest(directory)).split(b"\n")
    return [_as_example(json.loads(row)) for row in rows if row]


def _read_verified(directory: Path, name: str, manifest: Mapping[str, Any]) -> bytes:
    path = directory / name
    if name not in manifest["files"] or not path.is_file():
        raise ValueError(f"{path}: missing; build the dataset anew")
    # What is hashed is what is parsed, whatever happens to the file meanwhile.
    content = path.read_bytes()
    if hash_of(content).hexdigest() != manifest["files"][name]["sha256"]:
        raise ValueError(f"{path}: not what was written when the dataset was built; build it anew")
    return content


def _write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as stream:
        for row in rows:
            stream.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")


def _as_row(example: Example) -> dict[str, Any]:
    return {name: value for name, value in vars(example).items() if value is not None}


def _as_example(row: dict[str, Any]) -> Example:
    messages = row.pop("messages", None)
    return Example(**row, messages=None if messages is None else tuple(messages))


def _about(config: DatasetConfig, prepared: Prepared) -> dict[str, Any]:
    splits = {"train": prepared.train, "test": prepared.test}
    return {
        "format": FORMAT,
        "dataset": config.name,
        "config": config.model_dump(mode="json"),
        "config_digest": digest(config),
        **{split: len(examples) for split, examples in splits.items()},
        "rejected": len(prepared.rejected),
        "reasons": prepared.reasons,
        "sources": prepared.sources,
        "lengths": {
            f"{split}.{part}": length_statistics(texts)
            for split, examples in splits.items()
            for part in ("prompt", "target")
            if (texts := [text for example in examples if (text := getattr(example, part)) is not None])
        },
    }


def length_statistics(texts: Sequence[str]) -> dict[str, float]:
    """Characters of at least one text: min, mean, median, p95 (nearest rank), max."""
    lengths = sorted(len(text) for text in texts)
    return {
        "min": lengths[0],
        "mean": round(statistics.fmean(lengths), 2),
        "median": statistics.median(lengths),
        "p95": lengths[-(-95 * len(lengths) // 100) - 1],
        "max": lengths[-1],
    }
