"""Every report in one list, ranked only among those that may be compared."""

import json
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from pydantic import TypeAdapter, ValidationError

from configs.atomic import write_json
from configs.loader import describe
from configs.schema import Stage, Strict
from pipeline.evaluation.report import EvaluationReport

if TYPE_CHECKING:
    from rich.console import Group

STAGES: tuple[str, ...] = get_args(Stage)
HEADER = ("rank", "experiment", "stage", "score", "95% interval", "n", "checkpoint")


class Row(Strict):
    """One report's headline."""

    experiment: str
    stage: str
    benchmark: str
    """The evaluation's name in its experiment."""
    metric: str
    score: float
    n: int
    low: float
    high: float
    checkpoint: str
    comparability: str

    @property
    def key(self) -> tuple[str, str, str]:
        """A newer report of the same takes the place of an older one."""
        return self.experiment, self.benchmark, self.stage


ROWS = TypeAdapter(list[Row])


def row_of(report: EvaluationReport) -> Row:
    head = report.headline
    return Row(
        experiment=report.experiment,
        stage=report.model.stage,
        benchmark=report.name,
        metric=head.name,
        score=head.score,
        n=head.n,
        low=head.low,
        high=head.high,
        checkpoint=report.model.path,
        comparability=report.comparability,
    )


def update_leaderboard(reports: Iterable[EvaluationReport], path: Path) -> list[Row]:
    """Put the reports into the leaderboard at `path`, in place of older ones of the same; all rows, in a stable order.

    `ValueError` for a file there that is no leaderboard: it is not overwritten.
    """
    rows = {row.key: row for row in read_leaderboard(path)} | {row.key: row for row in map(row_of, reports)}
    ordered = sorted(rows.values(), key=_place)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, [row.model_dump(mode="json") for row in ordered])
    return ordered


def read_leaderboard(path: Path) -> list[Row]:
    """The rows of a leaderboard file; none where there is no file."""
    if not path.is_file():
        return []
    try:
        return ROWS.validate_python(json.loads(path.read_bytes()))
    except ValidationError as error:
        raise ValueError(describe(error, path)) from error
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error


def _place(row: Row) -> tuple[str, str, int, str]:
    return row.experiment, row.benchmark, STAGES.index(row.stage) if row.stage in STAGES else len(STAGES), row.stage


# ---- rankings ------------------------------------------------------------------------------------------------------


def rankings(rows: Iterable[Row]) -> tuple[list[list[Row]], list[Row]]:
    """Groups of comparable rows, best first, and apart from them the rows that nothing may be compared with."""
    ordered = sorted(rows, key=lambda row: (row.benchmark, row.metric, row.comparability))
    groups = [list(group) for _, group in groupby(ordered, key=lambda row: (row.metric, row.comparability))]
    ranked = [sorted(group, key=lambda row: (-row.score, *_place(row))) for group in groups if len(group) > 1]
    return ranked, [group[0] for group in groups if len(group) == 1]


def _lines(group: Sequence[Row], ranked: bool) -> list[tuple[str, ...]]:
    """Equal scores share a rank."""
    scores = [row.score for row in group]
    return [
        (
            str(1 + scores.index(row.score)) if ranked else "",
            row.experiment,
            row.stage,
            _number(row, row.score),
            f"{_number(row, row.low)} – {_number(row, row.high)}",
            str(row.n),
            row.checkpoint,
        )
        for row in group
    ]


def _number(row: Row, value: float) -> str:
    return f"{value:.1%}" if row.low >= 0 and row.high <= 1 else f"{value:.3f}"


def _titled(rows: Iterable[Row]) -> list[tuple[str, list[tuple[str, ...]]]]:
    ranked, alone = rankings(rows)
    tables = [(f"{group[0].benchmark}: {group[0].metric}", _lines(group, ranked=True)) for group in ranked]
    if alone:
        lines = [
            (row.benchmark + ": " + row.metric, *line[1:])
            for row, line in zip(alone, _lines(alone, ranked=False), strict=True)
        ]
        tables.append(("Not comparable with any other", lines))
    return tables


def render_markdown(rows: Iterable[Row]) -> str:
    """The leaderboard as Markdown: a table for each group that may be compared, the rest apart and unranked."""
    parts = []
    for title, lines in _titled(rows):
        table = [_columns(lines), tuple("---" for _ in HEADER), *lines]
        parts.append(f"## {title}\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in table))
    return "\n\n".join(parts) + "\n" if parts else "No reports yet.\n"


def render_table(rows: Iterable[Row]) -> "Group":
    """The leaderboard for a terminal, by Rich."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    tables = []
    for title, lines in _titled(rows):
        table = Table(*_columns(lines), title=title, title_justify="left")
        for line in lines:
            table.add_row(*map(Text, line))
        tables.append(table)
    return Group(*tables) if tables else Group(Text("No reports yet."))


def _columns(lines: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    """Rows that are not ranked say what they measure in the first column."""
    return HEADER if lines and lines[0][0].isdigit() else ("benchmark", *HEADER[1:])
