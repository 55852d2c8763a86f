"""Which name each asset has in the graph, said once."""

from collections.abc import Sequence

import dagster as dg

from configs.schema import ExperimentConfig

MODEL_ASSETS: dict[str, str] = {
    "base": "base_model",
    "sft": "sft_model",
    "grpo": "grpo_checkpoint",
    "ppo": "ppo_checkpoint",
    "rl": "rl_checkpoint",
}
"""The asset of each stage's model."""
LEADERBOARD = dg.AssetKey(["leaderboard"])
DATASETS_GROUP = "datasets"
RESERVED = frozenset({"assets", "dataset", DATASETS_GROUP, "default", "leaderboard"})
"""Names that an experiment can't have: groups, key prefixes and folders that are something else."""
DEVICE_POOL = "mlx_device"
"""Whatever holds a model on the device runs in this pool, one at a time."""


def dataset_key(name: str) -> dg.AssetKey:
    return dg.AssetKey(["dataset", name])


def model_key(experiment: str, stage: str) -> dg.AssetKey:
    return dg.AssetKey([experiment, MODEL_ASSETS[stage]])


def report_key(experiment: str, stage: str, evaluation: str) -> dg.AssetKey:
    return dg.AssetKey([experiment, f"{stage}_{evaluation}"])


def start_stage(experiment: ExperimentConfig, stage: str) -> str:
    """The stage whose model `stage` starts from: reinforcement learning starts from SFT where there is one."""
    return "sft" if stage in ("grpo", "ppo", "rl") and experiment.sft is not None else "base"


def report_keys(experiment: ExperimentConfig, stages: Sequence[str] | None = None) -> list[dg.AssetKey]:
    """The reports of the stages (all of them where absent), stage by stage."""
    return [
        report_key(experiment.name, stage, evaluation.key)
        for stage in stages or experiment.stages
        for evaluation in experiment.evaluations
    ]
