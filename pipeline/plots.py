"""Small plots that Dagster's UI shows: PNG in Markdown, under 50 KB because they go into its database."""

import base64
import io
import math
from collections.abc import Mapping, Sequence

import dagster as dg

MAX_BYTES = 50_000
MAX_POINTS = 400


def curves(rows: Sequence[Mapping[str, object]], names: Sequence[str], title: str) -> dg.MarkdownMetadataValue | None:
    """The named metrics of `metrics.jsonl` rows over their steps; `None` where no row has any of them."""
    series = {name: points for name in names if (points := _points(rows, name))}
    return markdown(draw(series, title), title) if series else None


def _points(rows: Sequence[Mapping[str, object]], name: str) -> list[tuple[float, float]]:
    points = [(float(str(row["step"])), float(str(row[name]))) for row in rows if row.get(name) is not None]
    return [point for point in points if math.isfinite(point[1])]


def draw(series: Mapping[str, Sequence[tuple[float, float]]], title: str) -> bytes:
    """A PNG of some series of (step, value)."""
    # Figure without pyplot: no window system, no global state.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.8, 2.4), dpi=80, layout="constrained")
    axes = figure.add_subplot()
    for name, points in series.items():
        thin = _thinned(points)
        axes.plot(*zip(*thin, strict=True), label=name, linewidth=1.2, marker="." if len(thin) < 20 else None)
    axes.set_title(title, fontsize=9)
    axes.set_xlabel("step", fontsize=8)
    axes.tick_params(labelsize=7)
    axes.grid(alpha=0.3)
    if len(series) > 1:
        axes.legend(fontsize=7)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most MAX_POINTS: means of as many steps as it takes."""
    width = math.ceil(len(points) / MAX_POINTS)
    groups = [points[start : start + width] for start in range(0, len(points), width)]
    return [(group[-1][0], sum(value for _, value in group) / len(group)) for group in groups]


def markdown(png: bytes, title: str) -> dg.MarkdownMetadataValue:
    """`ValueError` for a picture that would bloat the run database."""
    encoded = base64.b64encode(png).decode()
    if len(encoded) > MAX_BYTES:
        raise ValueError(f"plot {title!r}: {len(encoded)} bytes of base64, at most {MAX_BYTES}")
    return dg.MetadataValue.md(f"![{title}](data:image/png;base64,{encoded})")
