"""What an asset's page shows: numbers that the UI plots over time, curves, samples, where the files are, what made it.

No label is called `path`: Dagster's own would take its place.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dagster as dg

from pipeline.plots import curves
from pipeline.provenance import collect
from pipeline.resources import project_root

if TYPE_CHECKING:
    from pipeline.data.store import DatasetSummary

Metadata = dict[str, Any]

CURVES = {
    "reward_curve": ("reward",),
    "length_curve": ("completion_length", "completion_length_max"),
    "loss_curve": ("loss", "validation_loss"),
    "kl_curve": ("kl",),
    "entropy_curve": ("entropy",),
}
SAMPLE_COLUMNS = ("step", "reward", "prompt", "completion", "answer", "tokens", "truncated")
EXAMPLE_COLUMNS = ("id", "prompt", "target", "answer")
MAX_TEXT = 1000
"""Characters of one cell: metadata goes into the run database."""


def training_metadata(rows: Sequence[Mapping[str, Any]], samples: Sequence[Mapping[str, Any]]) -> Metadata:
    """Of a trained model: its last numbers, its curves, some completions with their rewards."""
    parts = sorted({name for row in rows for name in row if name.startswith("reward/")})
    plots = {label: curves(rows, names, label.replace("_", " ")) for label, names in CURVES.items()}
    plots["reward_parts_curve"] = curves(rows, parts, "reward parts") if len(parts) > 1 else None
    return {
        **(final_numbers(rows[-1]) if rows else {}),
        **{label: plot for label, plot in plots.items() if plot is not None},
        "samples": table(samples, SAMPLE_COLUMNS),
    }


def final_numbers(row: Mapping[str, Any]) -> Metadata:
    """The finite numbers of a step, each a label that the UI plots over materialisations."""
    numbers = {name: value for name, value in row.items() if isinstance(value, int | float) and name != "time"}
    return {name: float(value) for name, value in numbers.items() if math.isfinite(value)}


def dataset_metadata(summary: "DatasetSummary") -> Metadata:
    """Of a dataset: its counts, what was set aside and why, the first examples."""
    return {
        "dagster/row_count": summary.train + summary.test,
        "train": summary.train,
        "test": summary.test,
        "rejected": summary.rejected,
        "rejected_because": dg.MetadataValue.json(dict(summary.reasons)),
        "sources": dg.MetadataValue.json(dict(summary.sources)),
        "characters": dg.MetadataValue.json(dict(summary.lengths)),
        "examples": table(summary.samples, EXAMPLE_COLUMNS),
    }


def table(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dg.TableMetadataValue:
    """Rows as a table of short texts; an empty one has its columns too."""
    columns = [dg.TableColumn(name, "string") for name in names]
    records = [dg.TableRecord({name: _cell(row.get(name)) for name in names}) for row in rows]
    return dg.MetadataValue.table(records, schema=dg.TableSchema(columns))


def _cell(value: Any) -> str:
    if value is None:
        return ""
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text if len(text) <= MAX_TEXT else text[: MAX_TEXT - 1] + "…"


def made_by(device: str | None = None) -> Metadata:
    """Commit, versions and machine."""
    return {"provenance": dg.MetadataValue.json(collect(project_root(), device).model_dump(mode="json"))}


def folder(label: str, path: Path) -> Metadata:
    return {label: dg.MetadataValue.path(str(path))}
