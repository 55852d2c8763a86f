"""A real `dagster dev`: a group is materialised, a training is cancelled, killed and gone on with.

What takes minutes (other processes killed, the server stopped, nights) is in `tests/faults/test_dagster.py`.
"""

import os
import signal
from collections.abc import Iterator

import pytest

from tests.pipeline.dev_server import GRPO, IN_PROCESS, UP_TO_GRPO, Server, dev, training

CANCEL_SECONDS = 30
"""On a machine that does nothing else it takes two."""

pytestmark = pytest.mark.dev_server


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    with dev(tmp_path_factory.mktemp("dev")) as found:
        yield found


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
    assert shown["curves"] == "MarkdownMetadataEntry"
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
        server.launch("tiny", [GRPO], training(**settings))
    assert words in str(refusal.value)


@pytest.mark.parametrize("executor", ["multiprocess", "in_process"])
def test_a_cancelled_training_leaves_a_checkpoint_and_a_re_execution_goes_on_from_it(server, group, executor):
    endless = training(executor, steps=100_000, checkpoint={"save_every": 100_000})
    run = server.launch("tiny", [GRPO], endless)
    server.trains(run)
    assert server.cancelled_in(run) < CANCEL_SECONDS
    reached = server.steps(run)
    (checkpoint,) = (server.run_dir(run) / "checkpoints").glob("step_*")
    assert int(checkpoint.name.removeprefix("step_")) == reached[-1]

    second = server.go_on(run)
    server.trains(run, len(reached) + 1)
    server.cancelled_in(second)
    after = server.steps(run)
    assert after[: len(reached)] == reached
    assert after == list(range(1, len(after) + 1))


def test_a_step_that_is_killed_is_retried_and_goes_on_from_its_checkpoint(server, group):
    run = server.launch("tiny", [GRPO], training(steps=150, checkpoint={"save_every": 10}))
    server.trains(run, 25)
    killed = server.trainer(run)
    os.kill(killed, signal.SIGKILL)
    server.trains(run, 30)
    assert server.finish(run) == "SUCCESS"
    assert server.steps(run) == list(range(1, 151))
    assert "re-execution (attempt # 2)" in server.messages(run)
