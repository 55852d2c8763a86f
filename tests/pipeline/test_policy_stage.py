"""Reinforcement learning from a start model to a published checkpoint: what is written, and what stops a run."""

import json
import logging
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import pandas as pd
import pytest

from configs.loader import merge
from configs.schema import ExperimentConfig
from pipeline.data.store import build_dataset
from pipeline.job import Job, Trained
from pipeline.resources import DeviceSettings
from pipeline.train import make_base, train_stage
from tests.conftest import TINY

CPU = DeviceSettings(device="cpu")
PPO = {
    "steps": 4,
    "learning_rate": 1e-3,
    "prompts_per_step": 8,
    "sampling": {"max_tokens": 6},
    "checkpoint": {"save_every": 2},
}


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset and an untrained model."""
    folder = tmp_path_factory.mktemp("begun")
    config = experiment()
    build_dataset(config.dataset, folder / "dataset")
    make_base(config, folder / "dataset", folder / "base", CPU)
    return folder


def experiment(**changes: Any) -> ExperimentConfig:
    return ExperimentConfig.model_validate(merge(TINY, {"name": "tiny", "ppo": PPO, **changes}))


def train(begun: Path, run: Path, stage: Any, config: ExperimentConfig) -> tuple[Trained, list[dict[str, float]]]:
    rows: list[dict[str, float]] = []

    def report(step: int, metrics: Any) -> None:
        rows.append({"step": step, **metrics})

    return train_stage(Job(config, begun / "dataset", begun / "base", run, CPU, report), stage), rows


def names(file: Path) -> set[str]:
    return set(cast(dict[str, mx.array], mx.load(str(file))))


@pytest.mark.parametrize("kind", ["head", "separate"])
def test_what_is_published_is_the_policy_and_the_critic_stays_in_the_checkpoint(begun, tmp_path, kind):
    trained, rows = train(begun, tmp_path, "ppo", experiment(ppo={**PPO, "critic": {"kind": kind}}))
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    base = names(begun / "base" / "model" / "model.safetensors")
    assert names(trained.checkpoint / "model" / "model.safetensors") == base
    critic = names(tmp_path / "checkpoints" / "step_000004" / "trainer.safetensors")
    prefix = "critic." if kind == "head" else "critic.head."
    assert {f"{prefix}weight", f"{prefix}bias"} <= critic
    assert any(name.startswith("critic_optimizer.") for name in critic)


def test_samples_hold_the_whole_group_with_what_its_numbers_were(begun, tmp_path):
    train(begun, tmp_path, "grpo", experiment(rewards=[{"name": "regex", "options": {"pattern": "[a-e]"}}]))
    rows = pd.read_parquet(tmp_path / "samples" / "step_000002.parquet").to_dict("records")
    assert [row["policy_version"] for row in rows] == [1] * 8
    trained = [row for row in rows if row["advantage"] != 0]
    assert len(trained) >= 4
    # None becomes nan in a column of numbers: a group that was not trained on has none.
    assert [row["logprob_difference"] < 1e-4 for row in rows] == [row["advantage"] != 0 for row in rows]
    assert all(json.loads(row["rewards"]) == {"regex": row["reward"]} for row in rows)


HOPELESS = {"rewards": [{"name": "regex", "options": {"pattern": "never, ever, in eight tokens"}}]}


def watched(**watchdog: Any) -> ExperimentConfig:
    return experiment(**HOPELESS, grpo={"steps": 5, "watchdog": {"patience": 2, **watchdog}})


def test_a_run_that_does_not_learn_is_warned_of(begun, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="pipeline.train"):
        _, rows = train(begun, tmp_path, "grpo", watched())
    told = [record.getMessage() for record in caplog.records if "constant_groups" in record.getMessage()]
    assert [message.split(":")[0] for message in told] == ["step 2", "step 4"]
    assert "every group's rewards are equal" in told[0]
    assert len(rows) == 5


def test_it_is_stopped_where_the_settings_say_so_and_stays_so_until_they_dont(begun, tmp_path):
    with pytest.raises(ValueError, match=r"stopped after step 2, as watchdog\.stop says: constant_groups for 2 steps"):
        train(begun, tmp_path, "grpo", watched(stop=True))
    assert (tmp_path / "checkpoints" / "step_000002").is_dir()
    # The watchdog's counts were saved: a resumed run doesn't get its patience anew.
    with pytest.raises(ValueError, match=r"stopped after step 3.*constant_groups for 3 steps"):
        train(begun, tmp_path, "grpo", watched(stop=True))
    trained, rows = train(begun, tmp_path, "grpo", watched())
    assert [row["step"] for row in rows] == [4, 5]
    assert trained.step == 5
