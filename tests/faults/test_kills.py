"""A training that is killed at a random moment and started again ends exactly like one that was never killed.

The number of kills a stage is 10 here; `python -m tests.faults.kills` does as many as it is asked to.
"""

import random

import pytest

from tests.faults.bench import assert_equal, copy_of, finish, kill_after, outcome, prepare

KILLS = 10


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults") / "begun"
    return folder, prepare(folder)


@pytest.mark.parametrize("stage", ["grpo", "ppo"])
def test_a_run_that_was_killed_again_and_again_ends_like_one_that_never_was(begun, tmp_path, stage):
    folder, experiment = begun
    whole = copy_of(folder, tmp_path / "whole")
    seconds = finish(whole, stage)
    expected = outcome(whole, experiment, stage)
    assert [row["step"] for row in expected.rows] == list(range(1, 25))

    moments = random.Random(f"{stage} kills")
    killed = copy_of(folder, tmp_path / "killed")
    hits = sum(kill_after(killed, stage, moments.uniform(0.02, 0.3) * seconds) for _ in range(KILLS))
    finish(killed, stage)
    assert hits >= KILLS // 2, "most runs ended before they were killed"
    assert_equal(outcome(killed, experiment, stage), expected)
