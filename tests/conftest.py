"""What tests of several packages share: a tiny experiment on disk."""

import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

# On CUDA, MLX multiplies float32 with 10 bits of mantissa unless told not to; tests compare to 1e-5.
os.environ.setdefault("MLX_ENABLE_TF32", "0")

import mlx_ops as mlx_ops  # first of all: MLX binds its BLAS when it is imported
from configs.loader import merge

TINY: dict[str, Any] = {
    "dataset": {
        "name": "sums",
        "train": {
            "kind": "reasoning_gym",
            "size": 60,
            "tasks": [{"name": "chain_sum", "options": {"max_terms": 2, "max_digits": 1}}],
        },
        "held_out": 0.2,
    },
    "model": {
        "kind": "scratch",
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    },
    "sft": {"steps": 4, "batch_size": 4, "learning_rate": 0.01, "validation_every": None},
    "grpo": {
        "steps": 3,
        "learning_rate": 0.001,
        "prompts_per_step": 2,
        "group_size": 4,
        "sampling": {"max_tokens": 8},
        "checkpoint": {"save_every": 2},
    },
    "rewards": [{"name": "numeric_answer"}, {"name": "format", "weight": 0.0}],
    "evaluations": [{"benchmark": "held_out", "limit": 4, "sampling": {"temperature": 0.0, "max_tokens": 8}}],
}
"""Runs from data to leaderboard in seconds, and learns nothing."""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


WriteExperiment = Callable[..., Path]


@pytest.fixture
def write_experiment(tmp_path: Path) -> WriteExperiment:
    """Writes the tiny experiment, with changes laid over it, into the folder `experiments` of the test."""

    def write(name: str = "tiny", /, **changes: Any) -> Path:
        folder = tmp_path / "experiments"
        folder.mkdir(exist_ok=True)
        path = folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(merge(TINY, changes)), encoding="utf-8")
        return path

    return write


# A shell's background jobs ignore it, and so would every process that the tests start, and some interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
