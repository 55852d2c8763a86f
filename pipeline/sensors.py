"""Failed runs and scores that fell, said once where somebody looks: the daemon's log, a webhook, W&B's alerts."""

import json
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import dagster as dg

from configs.schema import ExperimentConfig
from pipeline.verdicts import SCORE_KEPT

WEBHOOK_SECONDS = 10


@dataclass(frozen=True)
class News:
    """What happened, in one line; also the JSON that a webhook gets."""

    kind: Literal["failure", "regression"]
    job: str
    run_id: str
    text: str


def alert_sensors(experiments: Sequence[ExperimentConfig]) -> list[dg.SensorDefinition]:
    """Of a code location: one for runs that fail, one for runs that end well with a lower score."""

    @dg.run_failure_sensor(
        name="failed_runs",
        default_status=dg.DefaultSensorStatus.RUNNING,
        description="Reports each failed run to the daemon's log and to where its experiment's `alerts` say.",
    )
    def failed_runs(context: dg.RunFailureSensorContext) -> None:
        tell(context, experiments, failure(context.dagster_run, context.failure_event.message or ""))

    @dg.run_status_sensor(
        run_status=dg.DagsterRunStatus.SUCCESS,
        name="regressions",
        default_status=dg.DefaultSensorStatus.RUNNING,
        description="Reports scores that are significantly below the last report's, as failed runs are.",
    )
    def regressions(context: dg.RunStatusSensorContext) -> None:
        for news in fallen_scores(context.instance, context.dagster_run):
            tell(context, experiments, news)

    return [failed_runs, regressions]


def failure(run: dg.DagsterRun, message: str) -> News:
    return News("failure", run.job_name, run.run_id, f"{run.job_name}: run {run.run_id} failed: {message}")


def fallen_scores(instance: dg.DagsterInstance, run: dg.DagsterRun) -> Iterator[News]:
    """The reports of a run whose score is significantly below the one before."""
    for entry in instance.all_logs(run.run_id, of_type=dg.DagsterEventType.ASSET_CHECK_EVALUATION):
        check = None if entry.dagster_event is None else entry.dagster_event.asset_check_evaluation_data
        if check is not None and check.check_name == SCORE_KEPT and not check.passed:
            text = f"{check.asset_key.to_user_string()}: the score fell: {check.description}"
            yield News("regression", run.job_name, run.run_id, text)


def tell(context: dg.RunStatusSensorContext, experiments: Sequence[ExperimentConfig], news: News) -> None:
    """The log always; the rest as the run's experiments want it. What can't be reached is a line in the log."""
    context.log.error(news.text)
    concerned = concerning(experiments, context.dagster_run)
    for webhook in sorted({each.monitoring.alerts.webhook for each in concerned} - {None}, key=str):
        try:
            post(address(str(webhook)), news)
        except (OSError, ValueError) as error:
            context.log.warning(f"webhook {webhook}: {error}")
    for experiment in concerned:
        if experiment.monitoring.alerts.wandb:
            wandb_alert(context, experiment, news)


def concerning(experiments: Sequence[ExperimentConfig], run: dg.DagsterRun) -> list[ExperimentConfig]:
    """The experiments that a run worked on: by its job's name, or by the assets it was asked for."""
    prefixes = {key.path[0] for key in run.asset_selection or ()} | {run.job_name}
    return [experiment for experiment in experiments if experiment.name in prefixes]


def address(webhook: str) -> str:
    """The address itself, or what the named environment variable holds; `ValueError` where that isn't set."""
    if webhook.startswith("http"):
        return webhook
    value = dg.EnvVar(webhook).get_value()
    if not value:
        raise ValueError("this environment variable is not set for the code location")
    return value


def post(url: str, news: News) -> None:
    """Send the news as JSON. `OSError` where nobody takes it."""
    body = json.dumps(asdict(news)).encode()
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    urllib.request.urlopen(request, timeout=WEBHOOK_SECONDS).close()


def wandb_alert(context: dg.RunStatusSensorContext, experiment: ExperimentConfig, news: News) -> None:
    """An alert needs a run to belong to: a short one in the experiment's group."""
    import wandb

    try:
        with wandb.init(
            project=experiment.monitoring.wandb_project,
            group=experiment.name,
            job_type="alert",
            settings=wandb.Settings(silent=True, init_timeout=WEBHOOK_SECONDS),
        ) as run:
            run.alert(title=f"{experiment.name}: {news.kind}", text=news.text)
    except (OSError, wandb.Error) as error:
        context.log.warning(f"W&B alert: {error}")
