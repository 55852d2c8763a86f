"""Failed runs and fallen scores reach the log and a webhook: a real HTTP server on loopback, real runs."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import dagster as dg
import pytest

from configs.loader import merge
from configs.schema import ExperimentConfig
from pipeline.sensors import alert_sensors, concerning
from pipeline.verdicts import SCORE_KEPT
from tests.conftest import TINY, free_port

ENDS = (dg.DagsterEventType.RUN_SUCCESS, dg.DagsterEventType.RUN_FAILURE)


@pytest.fixture
def inbox() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """An address, and what was posted to it."""
    letters: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            letters.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/hook", letters
    server.shutdown()
    thread.join()
    server.server_close()


def experiment(webhook: str, name: str = "tiny") -> ExperimentConfig:
    return ExperimentConfig.model_validate(merge(TINY, {"name": name, "monitoring": {"alerts": {"webhook": webhook}}}))


@dg.asset(key=["tiny", "grpo_held_out"], check_specs=[dg.AssetCheckSpec(SCORE_KEPT, asset=["tiny", "grpo_held_out"])])
def fell():
    verdict = dg.AssetCheckResult(
        passed=False, check_name=SCORE_KEPT, severity=dg.AssetCheckSeverity.WARN, description="90% to 40%"
    )
    return dg.MaterializeResult(check_results=[verdict])


@dg.asset(key=["tiny", "grpo_checkpoint"])
def breaks():
    raise dg.Failure("out of memory", allow_retries=False)


def after(asset: dg.AssetsDefinition, sensor: dg.SensorDefinition, caplog: pytest.LogCaptureFixture) -> str:
    """What the sensor logs once a run of the asset has ended."""
    job = dg.Definitions([asset], jobs=[dg.define_asset_job("tiny", [asset])]).resolve_job_def("tiny")
    with dg.instance_for_test() as instance:
        result = job.execute_in_process(instance=instance, raise_on_error=False)
        event = next(event for event in result.all_events if event.event_type in ENDS)
        context = dg.build_run_status_sensor_context(
            sensor_name=sensor.name, dagster_event=event, dagster_instance=instance, dagster_run=result.dagster_run
        )
        context = context.for_run_failure() if sensor.name == "failed_runs" else context
        context.log.addHandler(caplog.handler)  # Dagster's loggers pass nothing on
        sensor(context)
    return caplog.text


def test_a_failed_run_is_one_line_in_the_log_and_in_the_webhook(inbox, caplog):
    address, letters = inbox
    failed_runs, _ = alert_sensors([experiment(address), experiment(address + "/other", "other")])
    logged = after(breaks, failed_runs, caplog)
    (letter,) = letters
    assert letter["kind"] == "failure"
    assert letter["text"].startswith(f"tiny: run {letter['run_id']} failed: ")
    assert letter["text"] in logged


def test_a_fallen_score_is_told_with_the_verdict_and_a_run_that_kept_it_is_not_news(inbox, caplog):
    address, letters = inbox
    _, regressions = alert_sensors([experiment(address)])
    after(fell, regressions, caplog)
    assert [(letter["kind"], letter["text"]) for letter in letters] == [
        ("regression", "tiny/grpo_held_out: the score fell: 90% to 40%")
    ]

    @dg.asset(key=["tiny", "sft_held_out"])
    def fine() -> None: ...

    after(fine, regressions, caplog)
    assert len(letters) == 1


@pytest.mark.parametrize(
    ("webhook", "words"),
    [
        ("UNSET_HOOK", "UNSET_HOOK: this environment variable is not set"),
        (f"http://127.0.0.1:{free_port()}", "refused"),
    ],
    ids=["an unset variable", "nobody there"],
)
def test_a_webhook_that_fails_is_a_line_in_the_log_and_not_the_end_of_the_sensor(webhook, words, caplog):
    failed_runs, _ = alert_sensors([experiment(webhook)])
    logged = after(breaks, failed_runs, caplog)
    assert words in logged
    assert "failed:" in logged


def test_a_secret_address_comes_from_the_environment_and_is_not_logged(inbox, caplog, monkeypatch):
    address, letters = inbox
    monkeypatch.setenv("TEAM_HOOK", address + "?token=s3cret")
    failed_runs, _ = alert_sensors([experiment("TEAM_HOOK")])
    assert "s3cret" not in after(breaks, failed_runs, caplog)
    assert len(letters) == 1


def test_a_run_concerns_the_experiment_of_its_job_or_of_its_assets():
    one, two = experiment("HOOK", "one"), experiment("HOOK", "two")
    by_job = dg.DagsterRun(job_name="one")
    by_asset = dg.DagsterRun(job_name="__ASSET_JOB", asset_selection=frozenset({dg.AssetKey(["two", "sft_model"])}))
    assert concerning([one, two], by_job) == [one]
    assert concerning([one, two], by_asset) == [two]


@pytest.mark.parametrize("webhook", ["ftp://x", "slack", "https://"])
def test_a_webhook_is_an_address_or_the_name_of_a_variable(webhook):
    with pytest.raises(ValueError, match="webhook"):
        experiment(webhook)
