"""Nightly evaluation: each experiment's newest checkpoint, at the time that its `nightly` section says.

A plain schedule and no automation condition: an unchanged checkpoint is evaluated again.
"""

import dagster as dg
from dagster._utils.schedules import is_valid_cron_string

from configs.schema import ExperimentConfig, NightlyConfig
from pipeline.catalog import Entry
from pipeline.keys import LEADERBOARD, model_key, report_key


def nightly_schedule(entry: Entry) -> dg.ScheduleDefinition | None:
    """The schedule of an experiment; `None` for one without a `nightly` section."""
    experiment, nightly = entry.experiment, entry.experiment.nightly
    if nightly is None:
        return None
    if not is_valid_cron_string(nightly.cron):
        raise ValueError(f"{entry.source}: nightly.cron: {nightly.cron!r} is no cron line such as '0 2 * * *'")
    every_report = [
        report_key(experiment.name, stage, name) for stage in experiment.stages for name in names(experiment)
    ]

    @dg.schedule(
        name=f"{experiment.name}_nightly",
        target=dg.AssetSelection.assets(*every_report, LEADERBOARD),
        cron_schedule=nightly.cron,
        execution_timezone=nightly.timezone,
        description=f"Evaluates the newest checkpoint of {experiment.name}.",
    )
    def nightly_evaluation(context: dg.ScheduleEvaluationContext) -> dg.RunRequest | dg.SkipReason:
        stage = newest_stage(context.instance, experiment)
        if stage is None:
            return dg.SkipReason(f"{experiment.name} has no checkpoint yet; run `dagster job execute` on it first")
        reports = [report_key(experiment.name, stage, name) for name in names(experiment)]
        day = context.scheduled_execution_time.strftime("%Y-%m-%d-%H%M")
        return dg.RunRequest(
            run_key=f"{experiment.name}-nightly-{day}",
            asset_selection=[*reports, LEADERBOARD],
            tags={"nightly": experiment.name, "stage": stage},
        )

    return nightly_evaluation


def names(experiment: ExperimentConfig) -> list[str]:
    """The evaluations that run at night."""
    chosen = (experiment.nightly or NightlyConfig()).benchmarks
    return [evaluation.key for evaluation in experiment.evaluations if chosen is None or evaluation.key in chosen]


def newest_stage(instance: dg.DagsterInstance, experiment: ExperimentConfig) -> str | None:
    """The trained stage (or the base model, where nothing is trained) that was materialised last."""
    stages = experiment.stages[1:] or experiment.stages
    events = {stage: instance.get_latest_materialization_event(model_key(experiment.name, stage)) for stage in stages}
    times = {stage: event.timestamp for stage, event in events.items() if event is not None}
    return max(times, key=lambda stage: times[stage]) if times else None
