"""Thousands of steps of a tiny GRPO with rotation: `python -m tests.faults.long [STEPS]`.

Memory, the checkpoints' disk and the time of a step must be at the end what they were at the start. The learning rate
is so low that completions keep their length. The last lines are the table.
"""

import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import mlx_ops as mlx_ops  # before MLX, which binds its BLAS when it is imported

# isort: split
import mlx.core as mx

from configs.schema import ExperimentConfig
from pipeline.job import Job
from pipeline.monitoring import open_reporter
from pipeline.resources import DeviceSettings
from pipeline.sinks import RunInfo
from pipeline.train import train_stage
from tests.faults.bench import prepare

STATM = Path("/proc/self/statm")
WARM_UP = 200
"""Steps before memory is compared."""
SLOW_START = 20
"""Steps before times are compared."""


@dataclass
class Course:
    """What was measured after each step."""

    folder: Path
    resident: list[float] = field(default_factory=list)
    active: list[float] = field(default_factory=list)
    disk: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    lengths: list[float] = field(default_factory=list)

    def note(self, step: int, metrics: Mapping[str, float]) -> None:
        self.resident.append(resident())
        self.active.append(mx.get_active_memory() / 1e6)
        files = (self.folder / "run" / "checkpoints").rglob("*")
        self.disk.append(sum(file.stat().st_size for file in files if file.is_file()) / 1e6)
        self.seconds.append(metrics["seconds/step"])
        self.lengths.append(metrics["completion_length"])


def resident() -> float:
    """Megabytes of memory that this process holds."""
    command = ["ps", "-o", "rss=", "-p", str(os.getpid())]
    if STATM.is_file():
        return int(STATM.read_text(encoding="utf-8").split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout) / 1e3


def run(folder: Path, experiment: ExperimentConfig) -> Course:
    """The whole training in this process, reported as ever."""
    assert experiment.grpo is not None
    course = Course(folder)
    info = RunInfo("tiny", "grpo", "long", folder / "run", experiment.grpo.steps)
    with open_reporter(info, experiment.monitoring) as reporter:

        def both(step: int, metrics: Mapping[str, float]) -> None:
            course.note(step, metrics)
            reporter(step, metrics)

        job = Job(experiment, folder / "dataset", folder / "start", folder / "run", DeviceSettings(device="cpu"), both)
        train_stage(job, "grpo")
    return course


def growth(values: Sequence[float], warm_up: int, window: int) -> float:
    """How much more the last `window` steps took than those after the warm-up, as a share: medians."""
    return statistics.median(values[-window:]) / statistics.median(values[warm_up : warm_up + window]) - 1


def main(steps: int) -> None:
    """The table, and an error where something grew."""
    settings = {
        "steps": steps,
        "learning_rate": 1e-6,
        "prompts_per_step": 4,
        "dynamic_sampling": 0,
        "sampling": {"max_tokens": 16},
        "checkpoint": {"save_every": 20, "keep_last": 2, "keep_every": None},
    }
    with tempfile.TemporaryDirectory() as temporary:
        course = run(Path(temporary), prepare(Path(temporary), grpo=settings))
    print("\n| | after the warm-up | last 200 steps | growth |\n|---|---|---|---|")
    limits = {"resident": 0.05, "active": 0.05, "disk": 0.01, "seconds": 0.1, "lengths": 0.05}
    for name, limit in limits.items():
        values, warm_up = getattr(course, name), SLOW_START if name == "seconds" else WARM_UP
        early, late = statistics.median(values[warm_up : warm_up + 200]), statistics.median(values[-200:])
        grown = growth(values, warm_up, 200)
        print(f"| {name} | {early:.4g} | {late:.4g} | {grown:+.1%} |")
        assert grown <= limit, f"{name} grew by {grown:.1%}"
    print(f"steps: {steps}; most resident after the warm-up {max(course.resident[WARM_UP:]):.0f} MB")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 2000)
