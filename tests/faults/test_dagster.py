"""What nights do to a `dagster dev`: processes killed, the server stopped, its database locked, the clock at two.

Left out of `make test`, part of `make faults`; the shorter ones are in `tests/pipeline/test_dev_server.py`.
"""

import os
import signal
import sqlite3
import time
from collections.abc import Iterator
from typing import Any

import pytest

from configs.loader import merge
from pipeline.lock import owned
from tests.conftest import TINY
from tests.pipeline.dev_server import (
    GRPO,
    IN_PROCESS,
    PATIENCE,
    SELECTOR,
    UP_TO_GRPO,
    Server,
    alive,
    dev,
    eventually,
    parent_of,
    training,
)

pytestmark = [pytest.mark.dev_server, pytest.mark.slow]

# The repository's numbers are 60 and 30; waiting for them would test no more.
QUICK = {"run_monitoring": {"free_slots_after_run_end_seconds": 5, "poll_interval_seconds": 2}}
EVERY_MINUTE = {"nightly": {"cron": "* * * * *", "timezone": "Europe/Berlin", "benchmarks": ["held_out"]}}
SAVING: dict[str, Any] = {"checkpoint": {"save_every": 10}}


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    experiments = {"tiny": merge(TINY, EVERY_MINUTE), "empty": merge(TINY, EVERY_MINUTE)}
    with dev(tmp_path_factory.mktemp("dev"), QUICK, experiments) as found:
        run = found.launch("tiny", UP_TO_GRPO, IN_PROCESS)
        assert found.finish(run) == "SUCCESS"
        yield found


@pytest.mark.parametrize("executor", ["multiprocess", "in_process"])
def test_when_the_runs_process_is_killed_no_orphan_trains_no_slot_is_taken_and_a_new_run_goes_on(server, executor):
    run = server.launch("tiny", [GRPO], training(executor, steps=1200, **SAVING))
    server.trains(run, 25)
    trainer = server.trainer(run)
    killed = parent_of(trainer) if executor == "multiprocess" else trainer
    started = time.monotonic()
    os.kill(killed, signal.SIGKILL)
    eventually(lambda: not alive(trainer), 30)
    print(f"{executor}: the orphan was gone after {time.monotonic() - started:.1f} s")
    assert server.finish(run) == "FAILURE"
    retry = server.retry_of(run)
    assert server.finish(retry) == "SUCCESS"
    print(f"{executor}: the retry had succeeded after {time.monotonic() - started:.1f} s")
    assert server.steps(run) == list(range(1, 1201))
    eventually(lambda: server.slots() == [], PATIENCE)


def test_a_directory_in_which_somebody_trains_is_refused_with_the_owners_name(server):
    run = server.launch("tiny", [GRPO], training(steps=100_000, **SAVING))
    server.trains(run)
    server.cancelled_in(run)
    with owned(server.run_dir(run), "by hand"):
        second = server.go_on(run)
        assert server.finish(second) == "FAILURE"
    assert f"run by hand (process {os.getpid()} on " in server.messages(second)


def test_a_locked_database_of_dagster_does_not_stop_a_training(server):
    run = server.launch("tiny", [GRPO], training(steps=4000, checkpoint={"save_every": 100_000}))
    server.trains(run)
    databases = [server.home / "history" / "runs" / name for name in (f"{run}.db", "index.db")]
    held = [sqlite3.connect(database, isolation_level=None) for database in databases]
    for connection in held:
        connection.execute("BEGIN EXCLUSIVE")
    before = server.steps(run)[-1]
    try:
        eventually(lambda: server.steps(run)[-1] > before + 45, 120)  # past an observation, which can't be written
        time.sleep(20)
        during = server.steps(run)[-1]
    finally:
        for connection in held:
            connection.execute("ROLLBACK")
            connection.close()
    eventually(lambda: server.steps(run)[-1] > during, PATIENCE)
    assert server.status(run) == "STARTED"
    server.cancelled_in(run)
    assert "no observation, Dagster's database fails" in (server.run_dir(run) / "debug.log").read_text()


def test_a_nightly_schedule_ticks_in_the_daemon_and_an_unchanged_checkpoint_is_evaluated_again(server):
    mutation = """mutation($s: ScheduleSelector!) { startSchedule(scheduleSelector: $s) { __typename
        ... on ScheduleStateResult { scheduleState { status } } } }"""
    for experiment in ("tiny", "empty"):
        selector = SELECTOR | {"scheduleName": f"{experiment}_nightly"}
        assert server.ask(mutation, {"s": selector})["startSchedule"]["scheduleState"]["status"] == "RUNNING"

    runs = eventually(lambda: found if len(found := nightly_runs(server)) >= 2 else None, PATIENCE)
    for run in runs[:2]:
        assert server.finish(run) == "SUCCESS"
        assert "tiny/grpo_held_out" in materialised(server, run)
    assert len({tick["key"] for tick in ticks(server, "tiny") if tick["status"] == "SUCCESS"}) >= 2
    skipped = [tick for tick in ticks(server, "empty") if tick["status"] == "SKIPPED"]
    assert skipped
    assert all("empty has no checkpoint yet" in (tick["reason"] or "") for tick in skipped)


def nightly_runs(server: Server) -> list[str]:
    query = "query($t: [ExecutionTag!]) { runsOrError(filter: {tags: $t}) { ... on Runs { results { runId } } } }"
    tags = [{"key": "nightly", "value": "tiny"}]
    return [run["runId"] for run in server.ask(query, {"t": tags})["runsOrError"]["results"]]


def materialised(server: Server, run: str) -> set[str]:
    query = (
        """query($r: ID!) { runOrError(runId: $r) { ... on Run { assetMaterializations { assetKey { path } } } } }"""
    )
    made = server.ask(query, {"r": run})["runOrError"]["assetMaterializations"]
    return {"/".join(each["assetKey"]["path"]) for each in made}


def ticks(server: Server, experiment: str) -> list[dict[str, str | None]]:
    query = """query($s: ScheduleSelector!) { scheduleOrError(scheduleSelector: $s) { ... on Schedule {
        scheduleState { ticks { status skipReason runKeys } } } } }"""
    selector = SELECTOR | {"scheduleName": f"{experiment}_nightly"}
    found = server.ask(query, {"s": selector})["scheduleOrError"]["scheduleState"]["ticks"]
    return [{"status": t["status"], "reason": t["skipReason"], "key": "".join(t["runKeys"]) or None} for t in found]


def test_a_training_outlives_its_dagster_dev_and_the_next_one_can_cancel_it(tmp_path):
    with dev(tmp_path) as first:
        run = first.launch("tiny", UP_TO_GRPO, training(steps=100_000, checkpoint={"save_every": 100_000}))
        first.trains(run)
    reached = first.steps(run)[-1]
    eventually(lambda: first.steps(run)[-1] > reached, 60)
    with dev(tmp_path) as second:
        assert second.status(run) == "STARTED"
        second.cancelled_in(run)
        assert second.steps(run) == list(range(1, len(second.steps(run)) + 1))
        assert list((second.run_dir(run) / "checkpoints").glob("step_*"))
