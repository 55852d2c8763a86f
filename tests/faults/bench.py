"""What the fault tests share: a tiny dataset and start model, a reference run, and how two runs are compared."""

import json
import shutil
import signal
import time
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from multiprocessing.context import ForkServerContext, ForkServerProcess
from multiprocessing.forkserver import ensure_running
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from configs.loader import merge
from configs.schema import ExperimentConfig
from mlx_ops.checkpoint import CheckpointStore
from pipeline.data.store import build_dataset
from pipeline.resources import DeviceSettings
from pipeline.train import make_base
from tests.conftest import TINY
from tests.faults.run import main

MEASURED = ("seconds", "tokens_per_second", "peak_memory", "memory")
"""Parts of metric names whose numbers are measurements of the machine, not of the run."""

POLICY: dict[str, Any] = {
    "steps": 24,
    "learning_rate": 0.001,
    "prompts_per_step": 2,
    "sampling": {"max_tokens": 8},
    "checkpoint": {"save_every": 3, "keep_last": 2},
}
CHANGES: dict[str, Any] = {
    "name": "tiny",
    "sft": {"steps": 24, "adapter": {"kind": "lora", "rank": 2, "dropout": 0.1}, "checkpoint": {"save_every": 3}},
    "grpo": {**POLICY, "group_size": 4, "minibatches": 2, "clip_range": 0.2, "kl_coef": 0.01, "dynamic_sampling": 1},
    "ppo": {**POLICY, "completions_per_prompt": 4, "kl_coef": 0.01},
    # A reward that varies in every group, so that each step moves the weights.
    "rewards": [{"name": "repetition", "options": {"ngram": 1}}],
}


def prepare(folder: Path, **changes: Any) -> ExperimentConfig:
    """A dataset, an untrained model and the experiment's settings, with changes laid over them, in `folder`."""
    experiment = ExperimentConfig.model_validate(merge(merge(TINY, CHANGES), changes))
    folder.mkdir(parents=True, exist_ok=True)
    build_dataset(experiment.dataset, folder / "dataset")
    make_base(experiment, folder / "dataset", folder / "start", DeviceSettings(device="cpu"))
    (folder / "experiment.json").write_text(experiment.model_dump_json(exclude_unset=True), encoding="utf-8")
    return experiment


def copy_of(folder: Path, target: Path) -> Path:
    """The same beginnings, for another run."""
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns("run"))
    return target


@cache
def server() -> ForkServerContext:
    """A process that has imported everything once, and is forked for each training: that starts in milliseconds."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["tests.faults.run"])
    with pytest.MonkeyPatch.context() as patch:
        for name in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS"):
            patch.setenv(name, "1")
        ensure_running()
    return context


def start(folder: Path, stage: str) -> ForkServerProcess:
    """The training as a process of its own, with one thread for its linear algebra."""
    (folder / "ready").unlink(missing_ok=True)
    process = server().Process(target=main, args=(folder, stage))
    process.start()
    return process


def finish(folder: Path, stage: str) -> float:
    """Run to the end, and the seconds from its first work on; `AssertionError` with the log where it fails."""
    process = start(folder, stage)
    began = _ready(folder, process)
    process.join(timeout=300)
    assert process.exitcode == 0, (folder / "log.txt").read_text(encoding="utf-8")[-3000:]
    return time.monotonic() - began


def kill_after(folder: Path, stage: str, seconds: float, phase: str = "") -> str:
    """SIGKILL so long after its first work, and then in this phase; the phase that it was in, "" where it had ended."""
    process = start(folder, stage)
    deadline = _ready(folder, process) + seconds
    while process.is_alive() and (time.monotonic() < deadline or phase not in phase_of(folder)):
        time.sleep(0.0002)
    process.kill()
    process.join()
    return phase_of(folder) if process.exitcode == -signal.SIGKILL else ""


def phase_of(folder: Path) -> str:
    """What the process does, or did when it was killed: a letter of `PHASES`."""
    return (folder / "phase").read_text(encoding="utf-8")


def _ready(folder: Path, process: ForkServerProcess) -> float:
    """When the process began to train."""
    while not (folder / "ready").exists() and process.is_alive():
        time.sleep(0.001)
    return time.monotonic()


@dataclass(frozen=True)
class Outcome:
    """What a run left, without what was measured of the machine."""

    weights: dict[str, np.ndarray]
    rows: list[dict[str, float]]
    samples: list[str]


def outcome(folder: Path, experiment: ExperimentConfig, stage: str) -> Outcome:
    """The last checkpoint's arrays, the metrics' rows and the names of the sample files."""
    config = getattr(experiment, stage).checkpoint
    saved = CheckpointStore(folder / "run" / "checkpoints", config).chosen()
    arrays: dict[str, np.ndarray] = {}
    for file in sorted(saved.path.rglob("*.safetensors")):
        loaded = mx.load(str(file))
        assert isinstance(loaded, dict)
        arrays |= {f"{file.name}/{name}": np.array(array) for name, array in loaded.items()}
    lines = (folder / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [_unmeasured(json.loads(line)) for line in lines]
    return Outcome(arrays, rows, sorted(file.name for file in (folder / "run" / "samples").glob("step_*")))


def _unmeasured(row: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in row.items() if not any(part in name for part in (*MEASURED, "time"))}


def assert_equal(got: Outcome, expected: Outcome) -> None:
    """The same weights and optimizer state bit for bit, the same rows once each, the same sample files."""
    assert got.weights.keys() == expected.weights.keys()
    for name, array in expected.weights.items():
        assert np.array_equal(got.weights[name], array), name
    assert [row["step"] for row in got.rows] == [row["step"] for row in expected.rows]
    assert got.rows == expected.rows
    assert got.samples == expected.samples
