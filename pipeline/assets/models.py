"""The models of an experiment: `base_model`, `sft_model`, `grpo_checkpoint`, `ppo_checkpoint`, `rl_checkpoint`."""

from collections.abc import Callable, Mapping
from typing import Any

import dagster as dg

from configs.loader import digest
from configs.schema import ScratchModel
from pipeline.catalog import Entry
from pipeline.guard import long_work
from pipeline.keys import DEVICE_POOL, dataset_key, model_key, start_stage
from pipeline.labels import labels
from pipeline.launchpad import config_mapping
from pipeline.metadata import folder, made_by
from pipeline.ops import train
from pipeline.refs import CheckpointRef, DatasetRef
from pipeline.resources import MlxResource, RunStore
from pipeline.versions import base_version, stage_version

DESCRIPTIONS = {
    "sft": "The model after supervised fine-tuning on the dataset's targets.",
    "grpo": "The policy after group-relative policy optimisation.",
    "ppo": "The policy after proximal policy optimisation.",
    "rl": "The policy after reinforcement learning by the algorithm of a plugin.",
}


def base_asset(entry: Entry) -> dg.AssetsDefinition:
    """The model before any training. Only one made from scratch needs the dataset: its tokenizer is trained on it."""
    if isinstance(entry.experiment.model, ScratchModel):

        @_base(entry, {"dataset": dg.AssetIn(dataset_key(entry.experiment.dataset.name))})
        def scratch(
            context: dg.AssetExecutionContext, dataset: DatasetRef, runs: RunStore, mlx: MlxResource
        ) -> dg.MaterializeResult[CheckpointRef]:
            return _make_base(entry, dataset, context, runs, mlx)

        return scratch

    @_base(entry, {})
    def pretrained(
        context: dg.AssetExecutionContext, runs: RunStore, mlx: MlxResource
    ) -> dg.MaterializeResult[CheckpointRef]:
        return _make_base(entry, None, context, runs, mlx)

    return pretrained


def _base(entry: Entry, ins: Mapping[str, dg.AssetIn]) -> Callable[[Callable[..., Any]], dg.AssetsDefinition]:
    return dg.asset(
        key=model_key(entry.experiment.name, "base"),
        ins=ins,
        kinds={"mlx", entry.experiment.model.kind},
        pool=DEVICE_POOL,
        code_version=base_version(entry.experiment),
        **labels(entry, "base", "The model that training starts from.", entry.experiment.model),
    )


def _make_base(
    entry: Entry, dataset: DatasetRef | None, context: dg.AssetExecutionContext, runs: RunStore, mlx: MlxResource
) -> dg.MaterializeResult[CheckpointRef]:
    mlx.prepare()  # before anything imports MLX
    from pipeline.train import make_base

    experiment = mlx.apply(entry.experiment)
    directory = runs.run_dir(experiment.name, "base", context.run)
    with long_work("nothing was written"):
        made = make_base(experiment, None if dataset is None else runs.locate(dataset.path), directory, mlx.settings)
    ref = CheckpointRef(
        path=runs.relative(made.checkpoint),
        stage="base",
        step=0,
        config_digest=digest(experiment.model),
        sha256=made.sha256,
    )
    metadata = {**folder("checkpoint_dir", made.checkpoint), **made_by()}
    return dg.MaterializeResult(value=ref, metadata=metadata, data_version=dg.DataVersion(ref.sha256))


def trained_asset(entry: Entry, stage: str) -> dg.AssetsDefinition:
    """The model of a training stage: a graph around the one training op, with the file's settings as defaults."""
    experiment = entry.experiment
    ins = {
        "start": dg.AssetIn(model_key(experiment.name, start_stage(experiment, stage))),
        "dataset": dg.AssetIn(dataset_key(experiment.dataset.name)),
    }

    @dg.graph_asset(
        key=model_key(experiment.name, stage),
        ins=ins,
        kinds={"mlx", stage},
        config=config_mapping(entry, stage),
        code_version=stage_version(entry, stage),
        **labels(entry, stage, DESCRIPTIONS[stage], getattr(experiment, stage)),
    )
    def trained(start: CheckpointRef, dataset: DatasetRef) -> CheckpointRef:
        return train(start, dataset)

    return trained
