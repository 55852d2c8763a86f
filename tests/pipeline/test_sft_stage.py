"""SFT from a file of chats to a published checkpoint."""

import json
from pathlib import Path
from typing import Any

import pytest

from configs.atomic import sha256
from configs.loader import load_experiment
from configs.schema import ExperimentConfig
from pipeline.data.store import build_dataset
from pipeline.resources import DeviceSettings
from pipeline.train import Job, Trained, make_base, train_stage

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


def chat(number: int) -> dict[str, Any]:
    """Two questions; the answers can be learned by heart but not guessed."""
    turns = [
        ("user", f"Word {number}?"),
        ("assistant", f"w{number * 7919 % 97}"),
        ("user", "Again?"),
        ("assistant", f"x{number * 104729 % 89}"),
    ]
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


@pytest.fixture
def experiment(write_experiment, tmp_path: Path) -> ExperimentConfig:
    rows = tmp_path / "chats.jsonl"
    rows.write_text("\n".join(json.dumps(chat(number)) for number in range(60)), encoding="utf-8")
    source = {"kind": "jsonl", "path": str(rows)}
    path = write_experiment(
        dataset={"name": "chats", "train": source, "fields": {"messages": "messages"}, "deduplicate": False},
        sft=SFT,
        grpo=None,
        rewards=[],
        evaluations=[],
    )
    text = path.read_text(encoding="utf-8")
    assert "reasoning_gym" not in text, "the test's source has replaced the tiny experiment's"
    return load_experiment(path)


def train(
    experiment: ExperimentConfig, folder: Path, run: str, **changes: Any
) -> tuple[Trained, list[dict[str, float]]]:
    """SFT in the run's folder, over a dataset and a base model that are made once."""
    if not (folder / "dataset").exists():
        build_dataset(experiment.dataset, folder / "dataset")
        make_base(experiment, folder / "dataset", folder / "base", CPU)
    assert experiment.sft is not None
    experiment = experiment.model_copy(update={"sft": experiment.sft.model_copy(update=changes)})
    rows: list[dict[str, float]] = []

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
