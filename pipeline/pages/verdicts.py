"""Which reports are set against each other, what may be said of them, and the problems that make the difference."""

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.evaluation.compare import Comparison, changed_items, compare
from pipeline.evaluation.report import Item
from pipeline.evaluation.report_files import read_items
from pipeline.pages.gather import Found

CHANGED = 3
"""Problems that are shown of those gained, and of those lost."""


@dataclass(frozen=True)
class Change:
    """A problem that one model solves better than the other."""

    gained: bool
    prompt: str
    reference: str
    before: str
    after: str


@dataclass(frozen=True)
class Verdict:
    """A later stage against the one that it started from."""

    benchmark: str
    first: str
    second: str
    words: str
    """The sentence one may write, or why there is none."""
    comparison: Comparison | None
    changes: tuple[Change, ...]


def verdicts(reports: Sequence[Found]) -> list[Verdict]:
    """Of each benchmark, every stage against its start: `sft` against `base`, reinforcement learning against `sft`."""
    found = []
    for after in reports:
        stages = {one.report.model.stage: one for one in reports if one.report.name == after.report.name}
        before = _start(stages, after.report.model.stage)
        if before is not None:
            found.append(verdict(before, after))
    return found


def _start(stages: dict[str, Found], stage: str) -> Found | None:
    if stage == "base":
        return None
    return stages.get("base") if stage == "sft" else stages.get("sft") or stages.get("base")


def verdict(before: Found, after: Found) -> Verdict:
    """What two reports say of each other; two that may not be compared say why."""
    try:
        items = read_items(before.folder), read_items(after.folder)
        comparison = compare(before.report, items[0], after.report, items[1])
        words = comparison.sentence()
        changes = changes_between(*items, after.report.task.metric)
    except ValueError as error:
        comparison, words, changes = None, str(error), ()
    one, other = before.report.model.stage, after.report.model.stage
    return Verdict(after.report.name, one, other, words, comparison, changes)


def changes_between(before: Sequence[Item], after: Sequence[Item], metric: str) -> tuple[Change, ...]:
    """The first few problems gained, then the first few lost, with both models' completions."""
    gained, lost = changed_items(before, after, metric)
    return tuple(
        Change(kind, new.prompt, new.reference or "", old.text, new.text)
        for kind, pairs in ((True, gained), (False, lost))
        for old, new in pairs[:CHANGED]
    )
