"""`docs/metrics.md` names what trainings report, and nothing else."""

import re
from pathlib import Path
from typing import Any

import pytest

from configs.loader import merge
from configs.schema import ExperimentConfig
from pipeline.data.store import build_dataset
from pipeline.job import Job
from pipeline.resources import DeviceSettings
from pipeline.train import make_base, train_stage
from tests.conftest import TINY

PAGE = Path(__file__).parents[1] / "docs" / "metrics.md"
CPU = DeviceSettings(device="cpu")
POLICY = {
    "steps": 2,
    "learning_rate": 0.001,
    "sampling": {"max_tokens": 8},
    "kl_coef": 0.1,
    "entropy_coef": 0.01,
    "eval_every": 1,
    "eval_examples": 2,
}
STAGES = {
    "sft": {"steps": 2, "batch_size": 4, "validation_every": 1},
    "grpo": {**POLICY, "prompts_per_step": 2, "group_size": 4, "minibatches": 2, "dynamic_sampling": 1},
    "ppo": {**POLICY, "prompts_per_step": 8, "kl_target": 0.1, "kl_in": "loss"},
}


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """The names of every metric of a stage of each kind, with all that can be reported turned on."""
    folder = tmp_path_factory.mktemp("metrics")
    rewards = [{"name": "repetition", "options": {"ngram": 1}}]
    experiment = ExperimentConfig.model_validate(merge(TINY, {**STAGES, "name": "tiny", "rewards": rewards}))
    build_dataset(experiment.dataset, folder / "dataset")
    make_base(experiment, folder / "dataset", folder / "base", CPU)
    names: set[str] = set()

    def report(step: int, metrics: Any) -> None:
        names.update(name.replace("repetition", "<name>") for name in metrics)

    for stage in ("sft", "grpo", "ppo"):
        train_stage(Job(experiment, folder / "dataset", folder / "base", folder / stage, CPU, report), stage)
    return names


def test_every_metric_is_documented_and_every_documented_one_is_reported(reported):
    documented = re.findall(r"^\| `([^`]+)` \|", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert len(documented) == len(set(documented))
    assert set(documented) == reported
