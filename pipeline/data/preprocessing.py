"""Both splits of a dataset out of its sources: read, deduplicated, split by a hash of the question.

Left out: near duplicates (other wording or case) are not found.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any

from configs.schema import DatasetConfig, Source
from pipeline.data.draws import uniform
from pipeline.data.examples import Columns, SetAside, columns_of, prompt_key, read_example
from pipeline.data.loaders import BaseLoader, Record, Rejected, excerpt, make_loader
from rewards.base import Example

SHOWN_ROWS = 5

DUPLICATE = "duplicate"
DUPLICATE_OF_TEST = "duplicate of a test question"


@dataclass(frozen=True)
class Prepared:
    """The splits of a dataset, and what was left out of them."""

    train: tuple[Example, ...]
    test: tuple[Example, ...]
    rejected: tuple[Rejected, ...]
    sources: Mapping[str, Mapping[str, Any]]
    """By split: which data was read, and how many rows of it."""

    @property
    def reasons(self) -> dict[str, int]:
        """How many rows were set aside for which reason."""
        return dict(sorted(Counter(row.reason for row in self.rejected).items()))


@dataclass(frozen=True)
class Usable:
    """An example, and the row that it came from."""

    example: Example
    key: str
    record: Record = field(repr=False)

    def set_aside(self, reason: str, other: "Usable") -> Rejected:
        detail = f"same prompt as {other.record.file}:{other.record.line}"
        return Rejected(self.record.file, self.record.line, reason, detail, excerpt(self.example.prompt))


def prepare(config: DatasetConfig) -> Prepared:
    """Both splits of a dataset.

    A question is never on both sides: one that the test set has is taken out of train, whatever `deduplicate` says.
    `ValueError` names a source that can't be read, has too many bad rows, or leaves nothing.
    """
    rows, rejected, sources = read_source(config.train, config, "train")
    if config.test is None:
        train = [row for row in rows if uniform("split", row.key) >= config.held_out]
        test = [row for row in rows if uniform("split", row.key) < config.held_out]
    else:
        train = rows
        test, bad, other = read_source(config.test, config, "test")
        rejected, sources = rejected + bad, sources | other
    if config.deduplicate:
        train, doubled = without_duplicates(train)
        test, doubled_test = without_duplicates(test)
        rejected = rejected + doubled + doubled_test
    train, leaked = without(train, test)
    _refuse_empty(config, train, test)
    kept_train, kept_test = train[: config.limit], test[: config.limit]
    examples = unique_ids([row.example for row in [*kept_train, *kept_test]])
    return Prepared(
        tuple(examples[: len(kept_train)]), tuple(examples[len(kept_train) :]), tuple(rejected + leaked), sources
    )


def read_source(
    source: Source, config: DatasetConfig, split: str
) -> tuple[list[Usable], list[Rejected], dict[str, dict[str, Any]]]:
    """The usable rows of a source, its bad ones, and what it was.

    `ValueError` for a source that can't be read or is empty, and above `max_bad_rows` for its first bad rows.
    """
    try:
        loader = make_loader(source)
        provenance = loader.provenance()
        read = list(_read(loader, columns_of(config.fields, source), config))
        if loader.provenance() != provenance:
            raise ValueError(f"{loader.name}: changed while it was read; start again once it is whole")
    except ValueError as error:
        raise ValueError(f"dataset {config.name!r}: {split}: {error}") from error
    usable = [row for row in read if isinstance(row, Usable)]
    bad = [row for row in read if isinstance(row, Rejected)]
    _refuse_bad(bad, len(read), f"dataset {config.name!r}: {split}: {loader.name}", config.max_bad_rows)
    return usable, bad, {split: {"source": loader.name, "rows": len(read), **provenance}}


def _read(loader: BaseLoader, columns: Columns, config: DatasetConfig) -> Iterator[Usable | Rejected]:
    for row in loader.rows():
        if isinstance(row, Rejected):
            yield row
            continue
        try:
            example = read_example(row.values, columns, config.max_prompt_chars)
        except SetAside as fault:
            yield Rejected(row.file, row.line, fault.reason, fault.detail, excerpt(row.values))
        else:
            yield Usable(example, prompt_key(example), replace(row, values={}))


def _refuse_bad(bad: Sequence[Rejected], total: int, where: str, allowed: float) -> None:
    if not total:
        raise ValueError(f"{where}: no rows")
    if len(bad) / total <= allowed and len(bad) < total:
        return
    counts = ", ".join(f"{count} {reason}" for reason, count in Counter(row.reason for row in bad).most_common())
    shown = [f"  line {row.line}: {row.reason}: {row.detail}: {row.excerpt}" for row in bad[:SHOWN_ROWS]]
    raise ValueError(
        f"{where}: {len(bad)} of {total} rows can't be used ({counts}); "
        f"max_bad_rows allows {allowed:.2%}\n" + "\n".join(shown)
    )


def _refuse_empty(config: DatasetConfig, train: Sequence[Usable], test: Sequence[Usable]) -> None:
    name = f"dataset {config.name!r}"
    if not train:
        raise ValueError(
            f"{name}: no example is left for train, and {len(test)} for test; "
            "held_out is too large, or every question of train is in test"
        )
    if not test and config.test is None and config.held_out > 0:
        raise ValueError(
            f"{name}: held_out: {config.held_out} of {len(train)} examples left none for test; raise it, "
            "or set it to 0 for a dataset without a test split"
        )


# ---- the whole dataset ---------------------------------------------------------------------------------------------


def without_duplicates(rows: Sequence[Usable]) -> tuple[list[Usable], list[Rejected]]:
    """The first row of each prompt, and the others."""
    first: dict[str, Usable] = {}
    for row in rows:
        first.setdefault(row.key, row)
    return list(first.values()), [row.set_aside(DUPLICATE, first[row.key]) for row in rows if first[row.key] is not row]


def without(train: Sequence[Usable], test: Sequence[Usable]) -> tuple[list[Usable], list[Rejected]]:
    """The rows of train whose prompt the test set has not, and the others."""
    held_out = {row.key: row for row in test}
    leaked = [row.set_aside(DUPLICATE_OF_TEST, held_out[row.key]) for row in train if row.key in held_out]
    return [row for row in train if row.key not in held_out], leaked


def overlapping(train: Sequence[Example], test: Sequence[Example]) -> list[str]:
    """Ids of the examples of train whose prompt the test set has too: none, in a dataset that was prepared here."""
    held_out = {prompt_key(example) for example in test}
    return [example.id for example in train if prompt_key(example) in held_out]


def unique_ids(examples: Sequence[Example]) -> list[Example]:
    """The examples with `-2`, `-3`, … behind ids that occurred before."""
    taken = {example.id for example in examples}
    numbers: dict[str, Iterator[int]] = {}
    return [_renamed(example, numbers, taken) for example in examples]


def _renamed(example: Example, numbers: dict[str, Iterator[int]], taken: set[str]) -> Example:
    if example.id not in numbers:
        numbers[example.id] = count(2)
        return example
    name = next(name for number in numbers[example.id] if (name := f"{example.id}-{number}") not in taken)
    taken.add(name)
    return replace(example, id=name)
