"""One rank of short trainings, with the gradient of every update kept: `python -m tests.ranks.run FOLDER STAGE…`.

FOLDER holds `dataset/`, `start/` and `experiment.json`; a run goes to FOLDER/STAGE, its gradients to
FOLDER/STAGE_gradients. Started by `mlx.launch` it is one of several ranks, by hand it is alone.
"""

import os
import sys
import traceback
from pathlib import Path
from typing import Any

import mlx_ops as mlx_ops  # first of all: MLX binds its BLAS when it is imported

# isort: split
import mlx.core as mx

from configs.schema import ExperimentConfig
from mlx_ops.backend import prepare
from mlx_ops.distributed import Ranks
from pipeline.job import Job
from pipeline.ranks import joined
from pipeline.resources import DeviceSettings
from pipeline.sinks import JsonLines
from pipeline.train import fit_stage
from tests.mlx_ops.tiny import leaves


def train(folder: Path, stage: Any, ranks: Ranks) -> None:
    """Train the stage, or go on with it."""
    experiment = ExperimentConfig.model_validate_json((folder / "experiment.json").read_bytes())
    sum_of, found = type(ranks).sum, []

    def recorded(tree: Any) -> Any:
        found.append(sum_of(ranks, tree))
        return found[-1]

    ranks.sum = recorded  # type: ignore[method-assign]
    report = JsonLines(folder / stage / "metrics.jsonl").report if ranks.is_writer else lambda step, metrics: None
    cpu = DeviceSettings(device="cpu")
    fit_stage(Job(experiment, folder / "dataset", folder / "start", folder / stage, cpu, report, ranks), stage)
    gradients = folder / f"{stage}_gradients"
    gradients.mkdir(exist_ok=True)
    for update, (_, gradient) in enumerate(found):
        mx.save_safetensors(str(gradients / f"{update:04d}_{ranks.rank}.safetensors"), dict(leaves(gradient)))


def main(folder: Path, *stages: str) -> None:
    """The stages one after the other."""
    prepare("cpu")
    with joined(os.environ) as ranks:
        (folder / f"rank_{ranks.rank}").write_text(str(os.getpid()), encoding="utf-8")
        for stage in stages:
            train(folder, stage, ranks)


if __name__ == "__main__":
    status = 1
    try:
        main(Path(sys.argv[1]), *sys.argv[2:])
        status = 0
    finally:
        if status:
            traceback.print_exc()
        sys.stderr.flush()
        # A collective that waits for a lost rank would keep the interpreter from ending.
        os._exit(status)
