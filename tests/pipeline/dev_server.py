"""A real `dagster dev` for tests, spoken to as the UI does: over GraphQL."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from configs.loader import merge
from pipeline.lock import FILE, Owner
from pipeline.sinks import read_metrics
from tests.conftest import TINY, free_port

ROOT = Path(__file__).parents[2]
PATIENCE = 300
"""Seconds for what takes ten on a machine that does nothing else."""
SELECTOR = {"repositoryName": "__repository__", "repositoryLocationName": "pipeline.definitions"}
GRPO = "tiny/grpo_checkpoint"
UP_TO_GRPO = ["dataset/sums", "tiny/base_model", "tiny/sft_model", GRPO]
IN_PROCESS = {"execution": {"config": {"in_process": {}}}}
ENDED = ("SUCCESS", "FAILURE", "CANCELED")


def training(executor: str = "multiprocess", **settings: Any) -> dict[str, Any]:
    """Run configuration of a GRPO training."""
    return {"execution": {"config": {executor: {}}}, "ops": {"tiny__grpo_checkpoint": {"config": settings}}}


@dataclass(frozen=True)
class Server:
    """A running `dagster dev` and what it works on."""

    port: int
    home: Path
    artifacts: Path

    def ask(self, query: str, variables: Mapping[str, Any] | None = None) -> dict[str, Any]:
        body = json.dumps({"query": query, "variables": dict(variables or {})}).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}/graphql", body, headers)
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                answer = json.load(response)
        except urllib.error.HTTPError as error:  # what user code raised comes with a status of 500
            answer = json.load(error)
        assert "errors" not in answer, answer["errors"]
        return answer["data"]

    def answers(self) -> bool:
        try:
            return bool(self.ask("{ assetNodes { id } }")["assetNodes"])
        except (urllib.error.URLError, OSError):
            return False

    def launch(self, job: str, assets: Sequence[str], config: Mapping[str, Any] | None = None) -> str:
        """The run id of a job over some of its assets."""
        query = """mutation($p: ExecutionParams!) { launchRun(executionParams: $p) {
            __typename ... on LaunchRunSuccess { run { runId } } ... on PythonError { message }
            ... on RunConfigValidationInvalid { errors { message } } } }"""
        selection = [{"path": asset.split("/")} for asset in assets]
        selector = SELECTOR | {"jobName": job, "assetSelection": selection}
        answer = self.ask(query, {"p": {"selector": selector, "runConfigData": config or {}}})["launchRun"]
        assert answer["__typename"] == "LaunchRunSuccess", answer
        return answer["run"]["runId"]

    def check(self, job: str, asset: str, name: str) -> str:
        """The run id of one check alone."""
        query = """mutation($p: ExecutionParams!) { launchRun(executionParams: $p) {
            __typename ... on LaunchRunSuccess { run { runId } } ... on PythonError { message } } }"""
        checks = [{"assetKey": {"path": asset.split("/")}, "name": name}]
        selector = SELECTOR | {"jobName": job, "assetSelection": [], "assetCheckSelection": checks}
        answer = self.ask(query, {"p": {"selector": selector, "runConfigData": {}}})["launchRun"]
        assert answer["__typename"] == "LaunchRunSuccess", answer
        return answer["run"]["runId"]

    def cancel(self, run: str) -> None:
        query = "mutation($r: String!) { terminateRun(runId: $r) { __typename } }"
        assert self.ask(query, {"r": run})["terminateRun"]["__typename"] == "TerminateRunSuccess"

    def go_on(self, run: str) -> str:
        """The run id of a re-execution from the failure."""
        query = """mutation($p: ReexecutionParams!) { launchRunReexecution(reexecutionParams: $p) {
            __typename ... on LaunchRunSuccess { run { runId } } ... on PythonError { message } } }"""
        parameters = {"parentRunId": run, "strategy": "FROM_FAILURE"}
        answer = self.ask(query, {"p": parameters})["launchRunReexecution"]
        assert answer["__typename"] == "LaunchRunSuccess", answer
        return answer["run"]["runId"]

    def status(self, run: str) -> str:
        query = "query($r: ID!) { runOrError(runId: $r) { ... on Run { status } } }"
        return self.ask(query, {"r": run})["runOrError"]["status"]

    def finish(self, run: str, seconds: float = PATIENCE) -> str:
        return eventually(lambda: found if (found := self.status(run)) in ENDED else None, seconds)

    def cancelled_in(self, run: str) -> float:
        """Seconds from the click to CANCELED."""
        started = time.monotonic()
        self.cancel(run)
        assert self.finish(run) == "CANCELED"
        return time.monotonic() - started

    def retry_of(self, run: str) -> str:
        """The run that Dagster starts itself after a run's process has died."""
        query = (
            """query($t: [ExecutionTag!]) { runsOrError(filter: {tags: $t}) { ... on Runs { results { runId } } } }"""
        )
        tags = [{"key": "dagster/parent_run_id", "value": run}]
        found = eventually(lambda: self.ask(query, {"t": tags})["runsOrError"]["results"], PATIENCE)
        return found[0]["runId"]

    def messages(self, run: str) -> str:
        """What the run's log says, errors with their causes."""
        query = """query($r: ID!) { logsForRun(runId: $r) { ... on EventConnection { events {
            ... on MessageEvent { message } ... on ExecutionStepFailureEvent { error { message cause { message } } }
        } } } }"""
        return json.dumps(self.ask(query, {"r": run})["logsForRun"]["events"])

    def slots(self) -> list[str]:
        """The runs that hold a slot of the device's pool."""
        query = '{ instance { concurrencyLimit(concurrencyKey: "mlx_device") { claimedSlots { runId } } } }'
        limit = self.ask(query)["instance"]["concurrencyLimit"]
        return [slot["runId"] for slot in limit["claimedSlots"]]

    def run_dir(self, root_run: str) -> Path:
        return self.artifacts / "tiny" / "grpo" / root_run[:8]

    def steps(self, root_run: str) -> list[int]:
        return [row["step"] for row in read_metrics(self.run_dir(root_run))]

    def trains(self, root_run: str, beyond: int = 3) -> None:
        """Wait until a training has passed a step."""
        eventually(lambda: len(self.steps(root_run)) > beyond, PATIENCE)

    def trainer(self, root_run: str) -> int:
        """The process that trains: the step's, or with the in_process executor the run's."""
        return Owner.model_validate_json((self.run_dir(root_run) / FILE).read_text()).pid


def parent_of(pid: int) -> int:
    return int(subprocess.run(["ps", "-o", "ppid=", "-p", str(pid)], capture_output=True, text=True, check=True).stdout)


def alive(pid: int) -> bool:
    done = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False)
    return done.returncode == 0 and not done.stdout.startswith("Z")


def eventually(look: Callable[[], Any], seconds: float) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := look():
            return found
        time.sleep(0.3)
    pytest.fail(f"not within {seconds} s")


def make_home(folder: Path, changes: Mapping[str, Any] | None = None) -> Path:
    """A DAGSTER_HOME with the repository's settings, but for folders: those are relative to the current one."""
    instance = yaml.safe_load((ROOT / "dagster.yaml").read_text())
    for part in ("storage", "local_artifact_storage", "compute_logs"):
        del instance[part]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "dagster.yaml").write_text(yaml.safe_dump(merge(instance, changes or {})))
    return folder


@contextmanager
def dev(
    folder: Path, changes: Mapping[str, Any] | None = None, experiments: Mapping[str, Any] | None = None
) -> Iterator[Server]:
    """`dagster dev` over `folder` (experiments, home and artifacts in it), with changes of the instance's settings."""
    written = folder / "experiments"
    written.mkdir(parents=True, exist_ok=True)
    for name, experiment in (experiments or {"tiny": TINY}).items():
        (written / f"{name}.yaml").write_text(yaml.safe_dump(experiment))
    server = Server(free_port(), make_home(folder / "home", changes), folder / "artifacts")
    environment = {
        "DAGSTER_HOME": str(server.home),
        "MLX_RL_EXPERIMENTS": str(written),
        "MLX_RL_ARTIFACTS": str(server.artifacts),
        "OPENBLAS_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "dagster", "dev", "-p", str(server.port), "-w", "workspace.yaml"]
    with (server.home / "server.log").open("a") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, env=os.environ | environment, stdout=log, stderr=subprocess.STDOUT
        )
        try:
            eventually(server.answers, PATIENCE)
            yield server
        finally:
            stop(process)


def stop(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGINT)  # the parent alone: it ends its own children
    try:
        process.wait(60)
    except subprocess.TimeoutExpired:
        process.kill()
