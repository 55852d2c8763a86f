"""Asset checks: what would be wrong without an error. An asset's checks share one step, and so one process."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import dagster as dg

from configs.schema import DatasetConfig
from pipeline.catalog import Entry
from pipeline.keys import DEVICE_POOL, dataset_key, model_key
from pipeline.refs import CheckpointRef, DatasetRef
from pipeline.resources import MlxResource, RunStore
from pipeline.sinks import METRICS, read_metrics

if TYPE_CHECKING:
    from rewards.base import Example

WARN = dg.AssetCheckSeverity.WARN


def dataset_checks(config: DatasetConfig) -> dg.AssetChecksDefinition:
    """Blocking: the splits have examples, and no question is on both sides."""
    key = dataset_key(config.name)
    specs = [
        dg.AssetCheckSpec("not_empty", asset=key, blocking=True, description="Both splits have examples."),
        dg.AssetCheckSpec("no_overlap", asset=key, blocking=True, description="No question is in train and test."),
    ]

    @dg.multi_asset_check(
        name=f"dataset__{config.name}_checks", specs=specs, ins={"dataset": dg.AssetIn(key)}, can_subset=True
    )
    def checks(
        context: dg.AssetCheckExecutionContext, dataset: DatasetRef, runs: RunStore
    ) -> Iterator[dg.AssetCheckResult]:
        from pipeline.data.store import read_examples

        folder = runs.locate(dataset.path)
        train, test = (read_examples(folder, split, dataset.sha256) for split in ("train", "test"))
        wants_test = config.test is not None or config.held_out > 0
        yield from selected(context, split_results(key, train, test, wants_test=wants_test))

    return checks


def selected(
    context: dg.AssetCheckExecutionContext, results: Iterable[dg.AssetCheckResult]
) -> Iterator[dg.AssetCheckResult]:
    """The results that this run was asked for: one check can be run alone from the UI."""
    names = {key.name for key in context.selected_asset_check_keys}
    return (result for result in results if result.check_name in names)


def split_results(
    key: dg.AssetKey, train: Sequence["Example"], test: Sequence["Example"], *, wants_test: bool
) -> Iterator[dg.AssetCheckResult]:
    """What the splits of a dataset are like."""
    yield dg.AssetCheckResult(
        asset_key=key,
        check_name="not_empty",
        passed=bool(train) and (bool(test) or not wants_test),
        metadata={"train": len(train), "test": len(test)},
    )
    shared = overlap(train, test)
    yield dg.AssetCheckResult(
        asset_key=key,
        check_name="no_overlap",
        passed=not shared,
        metadata={"shared": len(shared), "first": shared[:5]},
    )


def overlap(train: Sequence["Example"], test: Sequence["Example"]) -> list[str]:
    """The ids of test examples whose question, spaces and case aside, is in train too."""
    seen = {_question(example) for example in train}
    return [example.id for example in test if _question(example) in seen]


def _question(example: "Example") -> str:
    turns = [message["content"] for message in example.messages or ()]
    return " ".join("\n".join(turns or [example.prompt]).lower().split())


def checkpoint_checks(entry: Entry, stage: str) -> dg.AssetChecksDefinition:
    """Blocking: it reloads and its weights are finite. Warnings, for policies: the reward varied and rose."""
    name = entry.experiment.name
    key = model_key(name, stage)
    specs = [dg.AssetCheckSpec("reloads_finite", asset=key, blocking=True, description="It loads; weights are finite.")]
    if stage != "sft":
        specs += [
            dg.AssetCheckSpec("reward_varied", asset=key, description="Some group's rewards differed."),
            dg.AssetCheckSpec("reward_improved", asset=key, description="The last quarter beats the first."),
        ]

    @dg.multi_asset_check(
        name=f"{key.to_python_identifier()}_checks",
        specs=specs,
        ins={"checkpoint": dg.AssetIn(key)},
        pool=DEVICE_POOL,
        can_subset=True,
    )
    def checks(
        context: dg.AssetCheckExecutionContext, checkpoint: CheckpointRef, runs: RunStore, mlx: MlxResource
    ) -> Iterator[dg.AssetCheckResult]:
        folder = runs.locate(checkpoint.path)
        fault = weights_fault(folder, mlx)
        yield from selected(
            context,
            [
                dg.AssetCheckResult(
                    asset_key=key, check_name="reloads_finite", passed=fault is None, description=fault
                ),
                *reward_results(key, training_rows(folder)),
            ],
        )

    return checks


def weights_fault(checkpoint: Path, mlx: MlxResource) -> str | None:
    """What is wrong with a checkpoint on disk: a file that isn't what was written, no model, a weight not finite."""
    from configs.atomic import verify

    mlx.prepare()
    from mlx_ops.model import finite, load_policy

    try:
        verify(checkpoint)
        policy = load_policy(checkpoint / "model")
    except (ValueError, FileNotFoundError) as error:
        return str(error)
    return None if finite(policy.model) else f"{checkpoint}: a weight is not finite"


def training_rows(checkpoint: Path) -> list[dict[str, Any]]:
    """The metrics of the run that a checkpoint comes from; none where its folder was moved away from them."""
    folders = [folder for folder in checkpoint.parents[:3] if (folder / METRICS).is_file()]
    return read_metrics(folders[0]) if folders else []


def reward_results(key: dg.AssetKey, rows: Sequence[Mapping[str, Any]]) -> Iterator[dg.AssetCheckResult]:
    """What the rewards of a training were like; rows without rewards count as rewards that never moved."""
    varied = any((row.get("reward_std") or 0.0) > 0 for row in rows)
    yield dg.AssetCheckResult(
        asset_key=key,
        check_name="reward_varied",
        passed=varied,
        severity=WARN,
        description=None if varied else "every group's rewards were equal: nothing was learned from them",
    )
    early, late = quarters([row["reward"] for row in rows if row.get("reward") is not None])
    yield dg.AssetCheckResult(
        asset_key=key,
        check_name="reward_improved",
        passed=late > early,
        severity=WARN,
        metadata={"first_quarter": early, "last_quarter": late},
    )


def quarters(values: Sequence[float]) -> tuple[float, float]:
    """The means of the first and of the last quarter of some values; zeros where there are none."""
    size = max(1, len(values) // 4)
    return (fmean(values[:size]), fmean(values[-size:])) if values else (0.0, 0.0)
