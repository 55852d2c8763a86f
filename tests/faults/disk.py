"""A small disk that is full at a random byte of a save: `python -m tests.faults.disk [TIMES]`, as root, on Linux.

The run must stop with the figures, its last checkpoint must verify, and once there is room it must end like a run on a
large disk.
"""

import random
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from configs.schema import CheckpointConfig, ExperimentConfig, TrainingConfig
from mlx_ops.checkpoint import CheckpointStore
from mlx_ops.model import Policy
from pipeline.job import Job
from pipeline.resources import DeviceSettings
from pipeline.train import save_weights, train_stage
from tests.faults.bench import Outcome, assert_equal, copy_of, outcome, prepare

SIZE_MB = 8
BYTES = 170_000
"""A little more than a checkpoint takes."""
STAGE = "grpo"


@contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """A file system of its own. `OSError` where this process may not mount one."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={SIZE_MB}m", "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"a tmpfs can't be mounted: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def train(folder: Path, experiment: ExperimentConfig, report: Callable[..., None]) -> None:
    """In this process, with the metrics' file and the console."""
    from pipeline.monitoring import open_reporter
    from pipeline.sinks import RunInfo

    info = RunInfo("tiny", STAGE, "faults", folder / "run", getattr(experiment, STAGE).steps)
    with open_reporter(info, experiment.monitoring) as reporter:

        def both(step: int, metrics: Any) -> None:
            report(step)
            reporter(step, metrics)

        job = Job(experiment, folder / "dataset", folder / "start", folder / "run", DeviceSettings(device="cpu"), both)
        train_stage(job, STAGE)


def fill(disk: Path, leave: int) -> None:
    """Leave so many bytes free."""
    (disk / "ballast").write_bytes(bytes(max(shutil.disk_usage(disk).free - leave, 0)))


def filled(begun: Path, disk: Path, experiment: ExperimentConfig, expected: Outcome, chance: random.Random) -> str:
    """One run whose disk is full at a random byte of a save, or just before it; what was said, without its numbers."""
    folder, store = copy_of(begun, disk / "work"), CheckpointStore(disk / "work/run/checkpoints", CheckpointConfig())
    place, leave = chance.choice([3, 6, 9]), chance.randrange(BYTES)
    said = "nothing: it fitted"
    with pytest.MonkeyPatch.context() as patch:
        if chance.random() < 0.8:
            # Another program takes the room after it was looked for.
            patch.setattr("pipeline.train.save_weights", _filling(disk, store, place, leave))
            report = _ignore
        else:
            report = lambda step: fill(disk, leave) if step == place else None  # noqa: E731
        try:
            train(folder, experiment, report)
        except OSError as error:
            said = str(error)
            assert re.search(r"\d (MB|GB) are free; make room and start again: the run goes on from", said), said
    saved, skipped = store.newest()
    assert skipped == []
    assert (saved.step if saved else 0) >= place - 3, "a checkpoint is lost"
    (disk / "ballast").unlink()
    train(folder, experiment, _ignore)
    assert_equal(outcome(folder, experiment, STAGE), expected)
    shutil.rmtree(folder)
    return re.sub(r"[\d.]+ (GB|MB)|\d+|'.*'", "…", said)


def _filling(disk: Path, store: CheckpointStore, place: int, leave: int) -> Callable[..., None]:
    def save(policy: Policy, config: TrainingConfig, target: Path) -> None:
        if target.name.startswith(f".{store.path(place).name}."):
            fill(disk, leave)
        save_weights(policy, config, target)

    return save


def _ignore(step: int) -> None:
    pass


def check(folder: Path, times: int) -> Counter[str]:
    """So many full disks; how often what was said."""
    begun = folder / "begun"
    experiment = prepare(begun, grpo={"steps": 12})
    whole = copy_of(begun, folder / "whole")
    train(whole, experiment, _ignore)
    expected, chance = outcome(whole, experiment, STAGE), random.Random(0)
    with small_disk(folder / "disk") as disk:
        return Counter(filled(begun, disk, experiment, expected, chance) for _ in range(times))


def main(times: int) -> None:
    """The table of what was said."""
    with tempfile.TemporaryDirectory() as temporary:
        counts = check(Path(temporary), times)
    for said, count in counts.most_common():
        print(f"| {count} | {said} |")
    print(f"{times} disks, nothing lost, all of the runs ended like one on a large disk")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 50)
