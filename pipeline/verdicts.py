"""A new report beside the ones that people compare it with: the last of the same asset, and the start model's."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dagster as dg

from pipeline.io_manager import find_ref
from pipeline.metadata import table
from pipeline.plots import intervals
from pipeline.refs import ReportRef
from pipeline.resources import RunStore

if TYPE_CHECKING:
    from pipeline.evaluation.compare import Comparison

SCORE_KEPT = "score_kept"
"""The check that fails where a score is significantly below the last report's."""
MAX_CHANGED = 8
"""Problems shown, of those gained and of those lost."""
ANSWER_COLUMNS = ("id", "prompt", "reference", "before", "after", "score before", "score after")


def earlier(runs: RunStore, key: dg.AssetKey, directory: Path) -> Path | None:
    """The folder of an asset's current report, if it is another than `directory` and still there."""
    ref = find_ref(runs.directory, key, ReportRef)
    folder = None if ref is None else runs.locate(ref.path)
    return folder if folder is not None and folder.is_dir() and folder.resolve() != directory.resolve() else None


def score_kept(key: dg.AssetKey, before: Path | None, after: Path) -> dg.AssetCheckResult:
    """A warning where the paired test says that the score fell since the last report."""
    found = "there is no earlier report" if before is None else paired(before, after)
    fell = not isinstance(found, str) and found.established and found.difference < 0
    numbers = {} if isinstance(found, str) else _numbers(found)
    return dg.AssetCheckResult(
        asset_key=key,
        check_name=SCORE_KEPT,
        passed=not fell,
        severity=dg.AssetCheckSeverity.WARN,
        description=found if isinstance(found, str) else found.sentence(),
        metadata=numbers,
    )


def paired(before: Path, after: Path) -> "Comparison | str":
    """The comparison of two report folders, or why they may not be compared."""
    from pipeline.evaluation.compare import compare_reports

    try:
        return compare_reports(before, after)
    except ValueError as error:
        return str(error)


def _numbers(found: "Comparison") -> dict[str, Any]:
    numbers = {"before": found.first_score, "after": found.second_score, "low": found.low, "high": found.high}
    return numbers | {"gained": found.gained, "lost": found.lost, "n": found.n}


def comparison_metadata(after: Path, others: Mapping[str, Path | None]) -> dict[str, Any]:
    """Of a report's page: its score beside the others', what the paired test says, and which answers changed.

    `others` maps words (`last report`, `sft`) to report folders; those that are absent or differ in more than the model
    are left out.
    """
    there = {name: folder for name, folder in others.items() if folder is not None}
    found = {name: paired(folder, after) for name, folder in there.items()}
    comparable = {name: verdict for name, verdict in found.items() if not isinstance(verdict, str)}
    if not comparable:
        return {}
    metadata: dict[str, Any] = {"scores": _score_plot(after, {name: there[name] for name in comparable})}
    for name, verdict in comparable.items():
        label = name.replace(" ", "_")
        metadata[f"against_{label}"] = dg.MetadataValue.md(verdict.sentence())
        metadata[f"change_since_{label}"] = verdict.difference
        metadata[f"answers_changed_since_{label}"] = table(changed(there[name], after), ANSWER_COLUMNS)
    return metadata


def _score_plot(after: Path, others: Mapping[str, Path]) -> dg.MarkdownMetadataValue:
    from pipeline.evaluation.report_files import read_report

    heads = {name: read_report(folder).headline for name, folder in {"this": after, **others}.items()}
    scores = {name: (head.score, head.low, head.high) for name, head in heads.items()}
    return intervals(scores, f"{heads['this'].name}, 95% intervals")


def changed(before: Path, after: Path) -> list[dict[str, Any]]:
    """The same prompts with the answers of both, where their scores differ: first those gained, then those lost."""
    from pipeline.evaluation.compare import changed_items
    from pipeline.evaluation.report_files import read_items, read_report

    metric = read_report(after).task.metric
    gained, lost = changed_items(read_items(before), read_items(after), metric)
    return [
        {
            "id": new.id,
            "prompt": new.prompt,
            "reference": new.reference,
            "before": old.text,
            "after": new.text,
            "score before": old.scores[metric],
            "score after": new.scores[metric],
        }
        for old, new in gained[:MAX_CHANGED] + lost[:MAX_CHANGED]
    ]
