"""What the tests of several ranks share: a tiny experiment, its start on several ranks, how far two runs are apart."""

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np

from configs.loader import merge
from configs.schema import ExperimentConfig
from pipeline.data.store import build_dataset
from pipeline.launch import launched
from pipeline.resources import DeviceSettings
from pipeline.train import make_base
from tests.conftest import TINY, free_port

ROOT = Path(__file__).parents[2]
LAUNCH = Path(sys.executable).with_name("mlx.launch")
THREADS = {"OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
STAGES = ("sft", "grpo", "ppo")
POLICY = {
    "steps": 4,
    "learning_rate": 1e-3,
    # Three prompts on two ranks: the shares are not even.
    "prompts_per_step": 3,
    "sampling": {"max_tokens": 8},
    "kl_coef": 0.01,
    "minibatches": 2,
    # Only the last step is saved, so that another checkpoint is one that an interrupt left.
    "checkpoint": {"save_every": 10_000},
}
CHANGES = {
    "name": "tiny",
    "sft": {"steps": 4, "batch_size": 5, "learning_rate": 1e-3, "validation_every": 2},
    "grpo": {**POLICY, "group_size": 4, "clip_range": 0.2, "scale_advantages": "batch", "dynamic_sampling": 1},
    "ppo": {**POLICY, "completions_per_prompt": 2, "epochs": 2, "whiten_advantages": True, "kl_target": 0.1},
    # A reward that varies in every group, so that each step moves the weights.
    "rewards": [{"name": "repetition", "options": {"ngram": 1}}],
}


def prepare(folder: Path, steps: int = 4) -> Path:
    """A dataset, an untrained model and the experiment's settings in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    experiment = set_steps(folder, steps)
    build_dataset(experiment.dataset, folder / "dataset")
    make_base(experiment, folder / "dataset", folder / "start", DeviceSettings(device="cpu"))
    return folder


def set_steps(folder: Path, steps: int) -> ExperimentConfig:
    """Write the experiment's settings with so many steps a stage."""
    changes = merge(CHANGES, {stage: {"steps": steps} for stage in STAGES})
    experiment = ExperimentConfig.model_validate(merge(TINY, changes))
    (folder / "experiment.json").write_text(experiment.model_dump_json(exclude_unset=True), encoding="utf-8")
    return experiment


def start(folder: Path, stages: Sequence[str], ranks: int = 2) -> subprocess.Popen[bytes]:
    """The trainings on so many ranks of this machine."""
    launch = [str(LAUNCH), "--backend", "ring", "-n", str(ranks), "-p", str(free_port()), "--"]
    with (folder / "log.txt").open("ab") as log:
        return launched(
            [*launch, sys.executable, "-m", "tests.ranks.run", str(folder), *stages],
            cwd=ROOT,
            env={**os.environ, **THREADS},
            stdout=log,
            stderr=log,
        )


def log_of(folder: Path) -> str:
    return (folder / "log.txt").read_text(encoding="utf-8")[-4000:]


def rows(folder: Path, stage: str) -> int:
    """How many steps have been reported."""
    path = folder / stage / "metrics.jsonl"
    return len(path.read_text(encoding="utf-8").splitlines()) if path.is_file() else 0


def wait_for_step(folder: Path, stage: str, step: int, process: subprocess.Popen[bytes]) -> None:
    """Until so many steps are reported; `AssertionError` with the log where the run ends before."""
    while rows(folder, stage) < step:
        assert process.poll() is None, log_of(folder)
        time.sleep(0.02)


def gradients(folder: Path, stage: str, rank: int = 0) -> dict[str, np.ndarray]:
    """Of every update, as a rank has them after the sum."""
    return _arrays(sorted((folder / f"{stage}_gradients").glob(f"*_{rank}.safetensors")))


def final_weights(folder: Path, stage: str) -> dict[str, np.ndarray]:
    """Of the last checkpoint, with PPO's critic."""
    last = max((folder / stage / "checkpoints").glob("step_*"))
    return _arrays([*(last / "model").glob("*.safetensors"), *last.glob("trainer.safetensors")])


def _arrays(files: Sequence[Path]) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    for file in files:
        loaded = mx.load(str(file))
        assert isinstance(loaded, dict)
        found |= {f"{file.stem.split('_')[0]}/{name}": np.array(array) for name, array in loaded.items()}
    return found


def furthest(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> float:
    """The largest difference of any two numbers of the same name."""
    assert one
    assert one.keys() == other.keys()
    return max(float(np.abs(array - other[name]).max()) for name, array in one.items())
