"""Small plots that Dagster's UI shows: PNG in Markdown, of at most 40 KB because they go into its database."""

import base64
import io
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import dagster as dg

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_BYTES = 40_000
POINTS = (100, 50, 25)
"""A line is thinned to so many; to fewer where the picture would be too large."""
COLOURS = 48
COLUMNS = 2

Row = Mapping[str, object]
Panels = Mapping[str, Callable[[str], bool]]
"""A panel's title, and which metrics it shows."""


def curves(rows: Sequence[Row], panels: Panels, title: str) -> dg.MarkdownMetadataValue | None:
    """Metrics of `metrics.jsonl` rows over their steps, panel by panel; `None` where no row has any of them.

    What is 0 throughout, or the same as a line before it (the only part of a reward), is left out.
    """
    names = list(dict.fromkeys(name for row in rows for name in row))
    series = {
        panel: _distinct({name: _points(rows, name) for name in names if shows(name)})
        for panel, shows in panels.items()
    }
    drawn = {panel: lines for panel, lines in series.items() if lines}
    if not drawn:
        return None
    pictures = (_draw_curves(drawn, most) for most in POINTS)
    png = next((png for png in pictures if len(png) <= MAX_BYTES), None)
    return None if png is None else markdown(png, title)


def _distinct(series: Mapping[str, list[tuple[float, float]]]) -> dict[str, list[tuple[float, float]]]:
    kept: dict[str, list[tuple[float, float]]] = {}
    for name, points in series.items():
        if any(value for _, value in points) and points not in kept.values():
            kept[name] = points
    return kept


def _points(rows: Sequence[Row], name: str) -> list[tuple[float, float]]:
    points = [(float(str(row["step"])), float(str(row[name]))) for row in rows if row.get(name) is not None]
    return [point for point in points if math.isfinite(point[1])]


def _draw_curves(panels: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]], most: int) -> bytes:
    lines = math.ceil(len(panels) / COLUMNS)
    figure, places = _figure(lines, min(len(panels), COLUMNS), height=1.7 * lines)
    for (title, series), axes in zip(panels.items(), places, strict=False):
        for name, points in series.items():
            thin = _thinned(points, most)
            axes.plot(*zip(*thin, strict=True), label=name, linewidth=1.2, marker="." if len(thin) < 20 else None)
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("step", fontsize=7, labelpad=1)
        if len(series) > 1:
            axes.legend(fontsize=6)
    for unused in places[len(panels) :]:
        unused.set_axis_off()
    return _png(figure)


def intervals(scores: Mapping[str, tuple[float, float, float]], title: str) -> dg.MarkdownMetadataValue:
    """Scores with their intervals (score, low, high) under each other, the first on top."""
    figure, (axes,) = _figure(1, 1, height=0.6 + 0.3 * len(scores))
    for place, (score, low, high) in enumerate(scores.values()):
        axes.plot([low, high], [-place, -place], linewidth=2, color="tab:gray")
        axes.plot([score], [-place], marker="o", color="tab:blue")
    axes.set_yticks([-place for place in range(len(scores))], list(scores))
    axes.margins(y=0.5 / len(scores))
    axes.set_title(title, fontsize=9)
    return markdown(_png(figure), title)


def _figure(lines: int, columns: int, height: float) -> "tuple[Figure, list[Axes]]":
    # Figure without pyplot: no window system, no global state.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.4 * columns if columns > 1 else 4.8, height), dpi=80, layout="constrained")
    places = list(figure.subplots(lines, columns, squeeze=False).flat)
    for axes in places:
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.3)
    return figure, places


def _png(figure: "Figure") -> bytes:
    from PIL import Image

    drawn, small = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png")
    # Few colours make it a third as large.
    Image.open(drawn).convert("RGB").quantize(COLOURS).save(small, format="png", optimize=True)
    return small.getvalue()


def _thinned(points: Sequence[tuple[float, float]], most: int) -> list[tuple[float, float]]:
    """At most so many points: means of as many steps as it takes."""
    width = math.ceil(len(points) / most)
    groups = [points[start : start + width] for start in range(0, len(points), width)]
    return [(group[-1][0], sum(value for _, value in group) / len(group)) for group in groups]


def markdown(png: bytes, title: str) -> dg.MarkdownMetadataValue:
    return dg.MetadataValue.md(f"![{title}](data:image/png;base64,{base64.b64encode(png).decode()})")
