"""One short training in a process of its own, to be killed.

Its folder holds `dataset/`, `start/` and `experiment.json`; the run goes to `run/`. What it is doing stands in the file
`phase`, one letter of `PHASES`: a SIGKILL leaves it there.
"""

import os
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

from configs.schema import ExperimentConfig, MonitoringConfig
from mlx_ops.algorithm import PolicyTrainer
from mlx_ops.checkpoint import CheckpointStore
from mlx_ops.rollout import Sampler
from mlx_ops.trainer import BaseTrainer
from pipeline.job import Job
from pipeline.monitoring import Reporter, open_reporter
from pipeline.resources import DeviceSettings
from pipeline.samples import SampleFiles
from pipeline.sinks import RunInfo
from pipeline.train import train_stage

PHASES = {"o": "other", "g": "rollout", "u": "update", "r": "report", "s": "save"}
MARKED = (
    (Sampler, "__call__", "g"),
    (PolicyTrainer, "scored", "u"),
    (BaseTrainer, "update", "u"),
    (SampleFiles, "write", "r"),
    (Reporter, "__call__", "r"),
    (CheckpointStore, "save", "s"),
)


def main(folder: Path, stage: str) -> None:
    """Train the stage, or go on with it; what it prints goes to `log.txt`."""
    log = os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(log, stream.fileno())
    mark_phases(os.open(folder / "phase", os.O_WRONLY | os.O_CREAT))
    experiment = ExperimentConfig.model_validate_json((folder / "experiment.json").read_bytes())
    run_dir = folder / "run"
    info = RunInfo(
        experiment=experiment.name,
        stage=stage,
        run="faults",
        directory=run_dir,
        steps=getattr(experiment, stage).steps,
        settings=experiment.model_dump(mode="json"),
    )
    with open_reporter(info, MonitoringConfig()) as reporter:
        (folder / "ready").touch()
        job = Job(experiment, folder / "dataset", folder / "start", run_dir, DeviceSettings(device="cpu"), reporter)
        train_stage(job, stage)  # pyright: ignore[reportArgumentType]


def mark_phases(file: int) -> None:
    """Have each phase say when it begins and ends."""
    now = ["o"]

    def enter(phase: str) -> None:
        now[0] = phase
        os.pwrite(file, phase.encode(), 0)

    for owner, name, phase in MARKED:
        setattr(owner, name, _marked(getattr(owner, name), phase, now, enter))
    enter("o")


def _marked(method: Callable[..., Any], phase: str, now: list[str], enter: Callable[[str], None]) -> Callable[..., Any]:
    @wraps(method)
    def marked(*args: Any, **kwargs: Any) -> Any:
        before = now[0]
        enter(phase)
        try:
            return method(*args, **kwargs)
        finally:
            enter(before)

    return marked
