"""The rollouts that a training kept, for a terminal. Model text is shown with its control characters made visible."""

import json
from collections.abc import Iterator
from pathlib import Path
from textwrap import indent
from typing import TYPE_CHECKING, Any, get_args

from configs.schema import TrainedStage

if TYPE_CHECKING:
    from rich.console import Group

MAX_TEXT = 1200


def find_samples(root: Path, experiment: str, stage: str | None, step: int | None) -> Path:
    """The Parquet file of a step of the newest run of a stage; the last stage and step that have one where absent.

    `ValueError` says what there is.
    """
    stages = get_args(TrainedStage) if stage is None else (stage,)
    files = [file for name in stages for file in (root / experiment / name).glob("*/samples/step_*.parquet")]
    if not files:
        raise ValueError(f"no samples under {root / experiment / (stage or '*')}: nothing was trained by rollouts yet")
    newest = max(files, key=lambda file: file.stat().st_mtime)
    if step is None:
        return newest
    file = newest.with_name(f"step_{step:06d}.parquet")
    if not file.is_file():
        steps = sorted(int(other.stem.removeprefix("step_")) for other in newest.parent.glob("step_*.parquet"))
        raise ValueError(f"no samples of step {step} in {newest.parent}; there are steps {steps[0]} to {steps[-1]}")
    return file


def show_groups(file: Path, groups: int, completions: int) -> "Group":
    """The first groups of a step, each its prompt once and its completions from the best to the worst reward."""
    import pandas as pd
    from rich.console import Group
    from rich.text import Text

    rows = pd.read_parquet(file)
    shown: list[Any] = [Text(str(file), style="dim")]
    for _, group in list(rows.groupby("prompt", sort=False))[:groups]:
        ordered = group.sort_values("reward", ascending=False, kind="stable").to_dict("records")
        shown += _group([{str(key): value for key, value in row.items()} for row in ordered], completions)
    return Group(*shown)


def _group(rows: list[dict[str, Any]], completions: int) -> Iterator[Any]:
    from rich.rule import Rule
    from rich.text import Text

    mean = sum(row["reward"] for row in rows) / len(rows)
    yield Rule(f"{len(rows)} completions, mean reward {mean:.3g}", align="left")
    yield Text(visible(str(rows[0]["prompt"])), style="bold")
    yield Text(f"reference: {visible(str(rows[0]['answer']))}", style="dim")
    for row in spread(rows, completions):
        parts = " · ".join(f"{name} {_number(score)}" for name, score in json.loads(row["rewards"]).items())
        cut = ", cut" if row["truncated"] else ""
        words = f"reward {_number(row['reward'])} · advantage {_number(row['advantage'])} · {row['tokens']} tokens{cut}"
        yield Text(f"\n{words} ({parts})", style="cyan")
        yield Text(indent(visible(str(row["completion"])), "  "))


def spread(rows: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """So many of the rows, evenly from the first to the last."""
    if len(rows) <= count:
        return rows
    return [rows[round(place * (len(rows) - 1) / max(count - 1, 1))] for place in range(count)]


def _number(value: float | None) -> str:
    return "not scored" if value is None or value != value else f"{value:.3g}"


def visible(text: str) -> str:
    """The text with escapes for what a terminal would obey or hide: control characters, marks of direction."""
    capped = text if len(text) <= MAX_TEXT else text[:MAX_TEXT] + " …"
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in capped)
