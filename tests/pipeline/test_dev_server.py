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

from configs.loader import merge
from pipeline.sinks import read_metrics
from tests.conftest import TINY

ROOT = Path(__file__).parents[2]
LONG = {"grpo": {"steps": 100_000, "checkpoint": {"save_every": 100_000}}}
"""Ends only when somebody ends it; no checkpoint but the one that a cancel writes."""
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
        with urllib.request.urlopen(request, timeout=60) as response:
            answer = json.load(response)
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

    def finish(self, run: str, seconds: float = 120) -> str:
        return eventually(
            lambda: found if (found := self.status(run)) in ("SUCCESS", "FAILURE", "CANCELED") else None, seconds
        )

    def run_dir(self, experiment: str, root_run: str) -> Path:
        return self.artifacts / experiment / "grpo" / root_run[:8]

    def steps(self, experiment: str, root_run: str) -> list[int]:
        return [row["step"] for row in read_metrics(self.run_dir(experiment, root_run))]


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
    (folder / "long.yaml").write_text(yaml.safe_dump(merge(TINY, LONG)))
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
        eventually(lambda: answers(found), 120)
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


MODELS = [
    "dataset/sums",
    "tiny/base_model",
    "tiny/sft_model",
    "tiny/grpo_checkpoint",
    "tiny/grpo_held_out",
    "leaderboard",
]
IN_PROCESS = {"execution": {"config": {"in_process": {}}}}


def test_a_group_is_materialised_over_graphql(server):
    run = server.launch("tiny", MODELS, IN_PROCESS)
    assert server.finish(run) == "SUCCESS"
    query = """query($k: AssetKeyInput!) { assetNodeOrError(assetKey: $k) { ... on AssetNode {
        staleStatus assetMaterializations(limit: 1) { metadataEntries { label __typename } } } } }"""
    node = server.ask(query, {"k": {"path": ["tiny", "grpo_checkpoint"]}})["assetNodeOrError"]
    (event,) = node["assetMaterializations"]
    shown = {entry["label"]: entry["__typename"] for entry in event["metadataEntries"]}
    assert node["staleStatus"] == "FRESH"
    assert shown["reward_curve"] == "MarkdownMetadataEntry"
    assert shown["reward"] == "FloatMetadataEntry"
    assert shown["samples"] == "TableMetadataEntry"


def test_a_typo_in_the_launchpad_is_refused(server):
    config = {"ops": {"tiny__grpo_checkpoint": {"config": {"stepz": 1}}}}
    with pytest.raises(AssertionError, match=r'unexpected config entry \\?"stepz'):
        server.launch("tiny", ["tiny/grpo_checkpoint"], config)


@pytest.mark.parametrize("executor", ["multiprocess", "in_process"])
def test_a_cancelled_training_leaves_a_checkpoint_and_a_re_execution_goes_on_from_it(server, executor):
    config: dict[str, Any] = {"execution": {"config": {executor: {}}}}
    upstream = ["dataset/sums", "long/base_model", "long/sft_model"]
    assert server.finish(server.launch("long", upstream, IN_PROCESS)) == "SUCCESS"
    run = server.launch("long", ["long/grpo_checkpoint"], config)
    eventually(lambda: len(server.steps("long", run)) >= 3, 120)
    server.cancel(run)
    assert server.finish(run) == "CANCELED"
    reached = server.steps("long", run)
    (checkpoint,) = (server.run_dir("long", run) / "checkpoints").glob("step_*")
    assert int(checkpoint.name.removeprefix("step_")) == reached[-1]

    second = server.go_on(run)
    eventually(lambda: len(server.steps("long", run)) >= len(reached) + 2, 120)
    server.cancel(second)
    assert server.finish(second) == "CANCELED"
    after = server.steps("long", run)
    assert after[: len(reached)] == reached
    assert after == list(range(1, len(after) + 1))
