"""Experiments to Dagster definitions: for each a group of assets with its name as key prefix, its checks and a job."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import dagster as dg

from pipeline.assets.datasets import dataset_asset
from pipeline.assets.leaderboard import leaderboard_asset
from pipeline.assets.models import base_asset, trained_asset
from pipeline.assets.reports import report_asset
from pipeline.catalog import Entry
from pipeline.checks import checkpoint_checks, dataset_checks
from pipeline.io_manager import reference_io_manager
from pipeline.keys import LEADERBOARD, dataset_key, model_key, report_keys
from pipeline.resources import MlxResource, RunStore
from pipeline.schedules import nightly_schedule
from pipeline.sensors import alert_sensors

if TYPE_CHECKING:
    from dagster._core.definitions.unresolved_asset_job_definition import UnresolvedAssetJobDefinition


def build_definitions(entries: Sequence[Entry], artifacts: str = "artifacts") -> dg.Definitions:
    """Everything that the experiments make. Nothing is computed, and no heavy package is imported."""
    datasets = {entry.experiment.dataset.name: entry for entry in entries}
    reports = [key for entry in entries for key in report_keys(entry.experiment)]
    schedules = [nightly_schedule(entry) for entry in entries]
    return dg.Definitions(
        assets=[
            *(dataset_asset(entry) for entry in datasets.values()),
            *(asset for entry in entries for asset in experiment_assets(entry)),
            leaderboard_asset(reports),
        ],
        asset_checks=[
            *(dataset_checks(entry.experiment.dataset) for entry in datasets.values()),
            *(checkpoint_checks(entry, stage) for entry in entries for stage in entry.experiment.stages[1:]),
        ],
        jobs=[experiment_job(entry) for entry in entries],
        schedules=[schedule for schedule in schedules if schedule is not None],
        sensors=alert_sensors([entry.experiment for entry in entries]),
        resources={"runs": RunStore(root=artifacts), "mlx": MlxResource(), "io_manager": reference_io_manager},
    )


def experiment_assets(entry: Entry) -> list[dg.AssetsDefinition]:
    """The models of an experiment and their reports."""
    experiment = entry.experiment
    return [
        base_asset(entry),
        *(trained_asset(entry, stage) for stage in experiment.stages[1:]),
        *(
            report_asset(entry, stage, evaluation)
            for stage in experiment.stages
            for evaluation in experiment.evaluations
        ),
    ]


def experiment_job(entry: Entry) -> "UnresolvedAssetJobDefinition":
    """The job of an experiment, named like it: its dataset, models and reports, and the leaderboard."""
    experiment = entry.experiment
    keys = [
        dataset_key(experiment.dataset.name),
        *(model_key(experiment.name, stage) for stage in experiment.stages),
        *report_keys(experiment),
        LEADERBOARD,
    ]
    return dg.define_asset_job(
        experiment.name,
        selection=dg.AssetSelection.assets(*keys),
        description=experiment.description or f"Everything of {experiment.name}, from data to scores.",
    )
