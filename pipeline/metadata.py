"""What an asset's page shows: numbers that the UI plots over time, curves, samples, where the files are, what made it.

No label is called `path`: Dagster's own would take its place.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dagster as dg

from pipeline.plots import Panels, curves
from pipeline.provenance import collect
from pipeline.resources import project_root

if TYPE_CHECKING:
    from pipeline.data.store import DatasetSummary

Metadata = dict[str, Any]

PANELS: Panels = {
    "reward": lambda name: name in ("reward", "eval_reward") or name.startswith("reward/"),
    "tokens a completion": lambda name: name in ("completion_length", "completion_length_max"),
    "KL": lambda name: name in ("kl", "approx_kl_k3"),
    "entropy": lambda name: name == "entropy",
    "loss": lambda name: name in ("loss", "validation_loss", "value_loss"),
    "norm of the gradient": lambda name: name == "grad_norm",
}
SAMPLE_COLUMNS = ("step", "reward", "prompt", "completion", "answer", "tokens", "truncated")
EXAMPLE_COLUMNS = ("id", "prompt", "target", "answer")
MAX_TEXT = 1000
"""Characters of one cell: metadata goes into the run database."""


def training_metadata(rows: Sequence[Mapping[str, Any]], samples: Sequence[Mapping[str, Any]]) -> Metadata:
    """Of a trained model: its last numbers, its curves, the completions of the best and the worst rewards."""
    plot = curves(rows, PANELS, "curves")
    return {
        **({} if plot is None else {"curves": plot}),
        "samples": table(samples, SAMPLE_COLUMNS),
        **(final_numbers(rows[-1]) if rows else {}),
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
