"""A real `dagster dev`, spoken to as the UI does: a group is materialised, a training is cancelled and gone on with."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.sinks import read_metrics
from tests.conftest import TINY

ROOT = Path(__file__).parents[2]
ENDLESS = {"tiny__grpo_checkpoint": {"config": {"steps": 100_000, "checkpoint": {"save_every": 100_000}}}}
"""Ends only when somebody ends it; no checkpoint but the one that a cancel writes."""
IN_PROCESS = {"execution": {"config": {"in_process": {}}}}
UP_TO_GRPO = ["dataset/sums", "tiny/base_model", "tiny/sft_model", "tiny/grpo_checkpoint"]
PATIENCE = 300
"""Seconds for what takes ten on a machine that does nothing else."""
SELECTOR = {"repositoryName": "__repository__", "repositoryLocationName": "pipeline.definitions"}

pytestmark = pytest.mark.dev_server


@dataclass(frozen=True)
class Server:
    """A running `dagster dev` and what it works on."""

    port: int
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

    def launch(self, job: str, assets: list[str], config: Mapping[str, Any] | None = None) -> str:
        """The run id of a job over some of its assets."""
        query = """mutation($p: ExecutionParams!) { launchRun(executionParams: $p) {
            __typename ... on LaunchRunSuccess { run { runId } } ... on PythonError { message }
            ... on RunConfigValidationInvalid { errors { message } } } }"""
        selection = [{"path": asset.split("/")} for asset in assets]
        selector = SELECTOR | {"jobName": job, "assetSelection": selection, "assetCheckSelection": []}
        answer = self.ask(query, {"p": {"selector": selector, "runConfigData": config or {}}})["launchRun"]
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
        return self.ask("query($r: ID!) { runOrError(runId: $r) { ... on Run { status } } }", {"r": run})["runOrError"][
            "status"
        ]

    def finish(self, run: str, seconds: float = PATIENCE) -> str:
        return eventually(
            lambda: found if (found := self.status(run)) in ("SUCCESS", "FAILURE", "CANCELED") else None, seconds
        )

    def run_dir(self, root_run: str) -> Path:
        return self.artifacts / "tiny" / "grpo" / root_run[:8]

    def steps(self, root_run: str) -> list[int]:
        return [row["step"] for row in read_metrics(self.run_dir(root_run))]


def eventually(look: Callable[[], Any], seconds: float) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := look():
            return found
        time.sleep(0.3)
    pytest.fail(f"not within {seconds} s")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("experiments")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    home, artifacts = tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("artifacts")
    instance = yaml.safe_load((ROOT / "dagster.yaml").read_text())
    for part in ("storage", "local_artifact_storage", "compute_logs"):
        del instance[part]  # those of the repository are relative to the current folder
    (home / "dagster.yaml").write_text(yaml.safe_dump(instance))
    environment = {
        "DAGSTER_HOME": str(home),
        "MLX_RL_EXPERIMENTS": str(folder),
        "MLX_RL_ARTIFACTS": str(artifacts),
        "OPENBLAS_NUM_THREADS": "1",
    }
    found = Server(free_port(), artifacts)
    log = (home / "server.log").open("w")
    command = [sys.executable, "-m", "dagster", "dev", "-p", str(found.port), "-w", "workspace.yaml"]
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ | environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        eventually(lambda: answers(found), PATIENCE)
        yield found
    finally:
        process.send_signal(signal.SIGINT)  # the parent alone: it ends its own children
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
        log.close()


def answers(server: Server) -> bool:
    try:
        return bool(server.ask("{ assetNodes { id } }")["assetNodes"])
    except (urllib.error.URLError, OSError):
        return False


@pytest.fixture(scope="module")
def group(server) -> str:
    """The run that materialised the group."""
    run = server.launch("tiny", [*UP_TO_GRPO, "tiny/grpo_held_out", "leaderboard"], IN_PROCESS)
    assert server.finish(run) == "SUCCESS"
    return run


def test_a_group_is_materialised_over_graphql(server, group):
    query = """query($k: AssetKeyInput!) { assetNodeOrError(assetKey: $k) { ... on AssetNode { staleStatus
        assetMaterializations(limit: 1) { runId metadataEntries { label __typename } } } } }"""
    node = server.ask(query, {"k": {"path": ["tiny", "grpo_checkpoint"]}})["assetNodeOrError"]
    (event,) = node["assetMaterializations"]
    shown = {entry["label"]: entry["__typename"] for entry in event["metadataEntries"]}
    assert (event["runId"], node["staleStatus"]) == (group, "FRESH")
    assert shown["reward_curve"] == "MarkdownMetadataEntry"
    assert shown["reward"] == "FloatMetadataEntry"
    assert shown["samples"] == "TableMetadataEntry"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"stepz": 1}, "unexpected config entry"),
        ({"learning_rate": -1.0}, "grpo.learning_rate: Input should be greater"),
    ],
    ids=["a typo", "a value"],
)
def test_what_the_launchpad_refuses_is_named(server, settings, words):
    with pytest.raises(AssertionError) as refusal:
        server.launch("tiny", ["tiny/grpo_checkpoint"], {"ops": {"tiny__grpo_checkpoint": {"config": settings}}})
    assert words in str(refusal.value)


@pytest.mark.parametrize("executor", ["multiprocess", "in_process"])
def test_a_cancelled_training_leaves_a_checkpoint_and_a_re_execution_goes_on_from_it(server, group, executor):
    config = {"execution": {"config": {executor: {}}}, "ops": ENDLESS}
    run = server.launch("tiny", ["tiny/grpo_checkpoint"], config)
    eventually(lambda: len(server.steps(run)) >= 3, PATIENCE)
    server.cancel(run)
    assert server.finish(run) == "CANCELED"
    reached = server.steps(run)
    (checkpoint,) = (server.run_dir(run) / "checkpoints").glob("step_*")
    assert int(checkpoint.name.removeprefix("step_")) == reached[-1]

    second = server.go_on(run)
    eventually(lambda: len(server.steps(run)) >= len(reached) + 2, PATIENCE)
    server.cancel(second)
    assert server.finish(second) == "CANCELED"
    after = server.steps(run)
    assert after[: len(reached)] == reached
    assert after == list(range(1, len(after) + 1))
