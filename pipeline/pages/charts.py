"""Small charts as numbers for a template: lines over steps with legible axes. No picture library, no script."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.progress import tokens_per_second

WIDTH, HEIGHT = 320, 170
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 8, 22
MAX_POINTS = 160

Point = tuple[float, float]

PANELS: dict[str, tuple[str, ...]] = {
    "reward": ("reward",),
    "held-out reward": ("eval_reward",),
    "loss": ("loss", "validation_loss"),
    "completion length": ("completion_length", "completion_length_max"),
    "entropy": ("entropy",),
    "KL to the reference": ("kl",),
    "share of groups": ("solved_none", "solved_some", "solved_all"),
    "share cut at the token limit": ("truncated",),
    "gradient norm": ("grad_norm",),
    "learning rate": ("learning_rate",),
    "tokens a second": ("tokens/s",),
}
"""Title to the metrics of `docs/metrics.md` in it; a panel whose metrics are absent or 0 throughout is left out."""


@dataclass(frozen=True)
class Tick:
    at: float
    label: str


@dataclass(frozen=True)
class Line:
    name: str
    points: str
    """`x,y x,y …` within the picture."""
    last: str
    """The last value, as words."""


@dataclass(frozen=True)
class Chart:
    title: str
    lines: tuple[Line, ...]
    across: tuple[Tick, ...]
    up: tuple[Tick, ...]


def charts(rows: Sequence[Mapping[str, Any]]) -> list[Chart]:
    """The panels that a training's metrics fill."""
    rows = [{**row, "tokens/s": tokens_per_second({k: v for k, v in row.items() if v is not None})} for row in rows]
    parts = sorted({name for row in rows for name in row if name.startswith("reward/")})
    panels = PANELS if len(parts) < 2 else {"reward": PANELS["reward"], "reward by part": tuple(parts)} | PANELS
    made = [chart(title, {name: series(rows, name) for name in names}) for title, names in panels.items()]
    return [one for one in made if one is not None]


def series(rows: Iterable[Mapping[str, Any]], name: str) -> list[Point]:
    """A metric over its steps, without what is missing or not finite."""
    found = [(float(row["step"]), float(row[name])) for row in rows if row.get(name) is not None]
    return [point for point in found if math.isfinite(point[1])]


def chart(title: str, named: Mapping[str, Sequence[Point]]) -> Chart | None:
    """Lines in one picture; None where there is nothing to see."""
    drawn = {name: thinned(points) for name, points in named.items() if len(points) > 1}
    flat = [point for points in drawn.values() for point in points]
    if not any(y for _, y in flat):
        return None
    across, up = ticks(*_ends(x for x, _ in flat)), ticks(*_ends(y for _, y in flat))
    x_low, x_high = _ends(x for x, _ in flat)
    y_low, y_high = _ends([*(y for _, y in flat), *up])

    def x_at(x: float) -> float:
        return round(LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT), 1)

    def y_at(y: float) -> float:
        return round(HEIGHT - BOTTOM - (y - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM), 1)

    lines = tuple(
        Line(name, " ".join(f"{x_at(x)},{y_at(y)}" for x, y in points), number(points[-1][1]))
        for name, points in drawn.items()
    )
    return Chart(
        title,
        lines,
        tuple(Tick(x_at(x), number(x)) for x in across if x_low <= x <= x_high),
        tuple(Tick(y_at(y), number(y)) for y in up),
    )


def _ends(values: Iterable[float]) -> tuple[float, float]:
    """The least and the greatest, apart where all are equal."""
    seen = list(values)
    low, high = min(seen), max(seen)
    return (low, high) if high > low else (low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2)


def ticks(low: float, high: float) -> list[float]:
    """Round numbers, 1, 2 or 5 times a power of ten apart, from at or below `low` to at or above `high`."""
    rough = (high - low) / 4
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def number(value: float) -> str:
    """Short: `1,200`, `0.25`, `5e-05`."""
    if value and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.3g}"
    return f"{value:,.0f}" if value == int(value) else f"{value:,.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def thinned(points: Sequence[Point]) -> list[Point]:
    """At most MAX_POINTS: the means of as many neighbours as it takes."""
    width = math.ceil(len(points) / MAX_POINTS)
    groups = [points[start : start + width] for start in range(0, len(points), width)]
    return [(group[-1][0], sum(y for _, y in group) / len(group)) for group in groups]
