"""Failed runs, said once where somebody looks: the daemon's log."""

import dagster as dg


@dg.run_failure_sensor(
    name="failed_runs",
    default_status=dg.DefaultSensorStatus.RUNNING,
    description="Writes each failed run to the daemon's log.",
)
def failed_runs(context: dg.RunFailureSensorContext) -> None:
    context.log.error(failure_words(context.dagster_run, context.failure_event.message or ""))


def failure_words(run: dg.DagsterRun, message: str) -> str:
    """One line: job, run and reason."""
    return f"{run.job_name}: run {run.run_id} failed: {message}"
