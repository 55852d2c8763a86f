"""One training: what goes into it and what comes out."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.schema import ExperimentConfig
from mlx_ops.distributed import ALONE, Ranks
from pipeline.resources import DeviceSettings


@dataclass(frozen=True)
class Job:
    """One training: what, from where, to where, on what."""

    experiment: ExperimentConfig
    dataset_dir: Path
    start_dir: Path
    """The checkpoint it starts from; its `model/` is loaded."""
    run_dir: Path
    device: DeviceSettings
    report: Callable[[int, Mapping[str, float]], None]
    ranks: Ranks = ALONE


@dataclass(frozen=True)
class Trained:
    """A model that a stage left."""

    checkpoint: Path
    """Holds `model/`, and `adapter/` where one was trained."""
    step: int
    sha256: str
    """Of the checkpoint's manifest."""
    samples: list[dict[str, Any]]
    """Completions of the last step, the best and the worst rewards."""
