"""SFT from a file of chats to a published checkpoint."""

import json
from pathlib import Path
from typing import Any

import pytest

from configs.atomic import sha256
from configs.schema import ExperimentConfig
from pipeline.data.store import build_dataset
from pipeline.job import Job, Trained
from pipeline.resources import DeviceSettings
from pipeline.train import make_base, train_stage
from tests.conftest import TINY

CPU = DeviceSettings(device="cpu")
SFT = {
    "steps": 8,
    "batch_size": 8,
    "learning_rate": 0.02,
    "loss_on": "assistant",
    "packing": True,
    "neftune_alpha": 5.0,
    "validation_every": 1,
    "max_length": 256,
    "checkpoint": {"save_every": 4, "best_metric": "validation_loss", "best_mode": "min"},
}


def chats(path: Path, answer: str) -> dict[str, str]:
    """A file of chats in which the assistant gives this answer twice."""
    asked = [f"Word {number}?" for number in range(40)]
    turns = [[("user", word), ("assistant", answer), ("user", "Again?"), ("assistant", answer)] for word in asked]
    rows = [{"messages": [{"role": role, "content": content} for role, content in chat]} for chat in turns]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return {"kind": "jsonl", "path": str(path)}


@pytest.fixture
def experiment(tmp_path: Path) -> ExperimentConfig:
    """Its held-out chats answer otherwise: knowing the form of an answer helps there, being sure of it does not."""
    train, test = chats(tmp_path / "train.jsonl", "yes"), chats(tmp_path / "test.jsonl", "no")
    dataset = {"name": "chats", "train": train, "test": test, "fields": {"messages": "messages"}, "deduplicate": False}
    return ExperimentConfig.model_validate({"name": "chats", "model": TINY["model"], "dataset": dataset, "sft": SFT})


Rows = list[dict[str, float]]


def train(experiment: ExperimentConfig, folder: Path, run: str, **changes: Any) -> tuple[Trained, Rows]:
    """SFT in the run's folder, over a dataset and a base model that are made once."""
    if not (folder / "dataset").exists():
        build_dataset(experiment.dataset, folder / "dataset")
        make_base(experiment, folder / "dataset", folder / "base", CPU)
    assert experiment.sft is not None
    experiment = experiment.model_copy(update={"sft": experiment.sft.model_copy(update=changes)})
    rows: Rows = []

    def report(step: int, metrics: Any) -> None:
        rows.append({"step": float(step), **metrics})

    return train_stage(Job(experiment, folder / "dataset", folder / "base", folder / run, CPU, report), "sft"), rows


def test_the_step_with_the_least_validation_loss_is_published(experiment, tmp_path):
    trained, rows = train(experiment, tmp_path, "run")
    losses = [row["validation_loss"] for row in rows]
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert trained.step == 1 + losses.index(min(losses)) < len(losses)
    assert trained.checkpoint.name == f"step_{trained.step:06d}"


def test_a_run_that_goes_on_draws_the_noise_that_it_would_have_drawn(experiment, tmp_path):
    last = experiment.sft.checkpoint.model_copy(update={"best_metric": None})
    whole, _ = train(experiment, tmp_path, "whole", steps=3, checkpoint=last)
    train(experiment, tmp_path, "parts", steps=2, checkpoint=last)
    resumed, rows = train(experiment, tmp_path, "parts", steps=3, checkpoint=last)
    assert [row["step"] for row in rows] == [3]
    weights = [sha256(trained.checkpoint / "model" / "model.safetensors") for trained in (whole, resumed)]
    assert weights[0] == weights[1]
