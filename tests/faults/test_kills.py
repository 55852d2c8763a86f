"""A training that is killed at a random moment and started again ends exactly like one that was never killed.

`python -m tests.faults.kills` does as many kills as it is asked to, each from the beginning.
"""

import random

import pytest

from tests.faults.bench import assert_equal, copy_of, finish, kill_after, outcome, prepare


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults") / "begun"
    return folder, prepare(folder)


@pytest.mark.parametrize(("stage", "kills"), [("grpo", 8), ("ppo", 8), ("sft", 4)])
def test_a_run_that_was_killed_again_and_again_ends_like_one_that_never_was(begun, tmp_path, stage, kills):
    folder, experiment = begun
    whole = copy_of(folder, tmp_path / "whole")
    seconds = finish(whole, stage)
    expected = outcome(whole, experiment, stage)
    assert [row["step"] for row in expected.rows] == list(range(1, 25))

    moments = random.Random(f"{stage} kills")
    killed = copy_of(folder, tmp_path / "killed")
    hits = [kill_after(killed, stage, moments.uniform(0.02, 0.3) * seconds) for _ in range(kills)]
    finish(killed, stage)
    assert sum(map(bool, hits)) >= kills // 2, "most runs ended before they were killed"
    assert_equal(outcome(killed, experiment, stage), expected)


def test_a_run_that_was_killed_in_a_save_and_in_a_report_ends_like_one_that_never_was(begun, tmp_path):
    folder, experiment = begun
    whole, killed = copy_of(folder, tmp_path / "whole"), copy_of(folder, tmp_path / "killed")
    finish(whole, "grpo")
    for phase in "sr":
        kill_after(killed, "grpo", 0.0, phase)
    finish(killed, "grpo")
    assert_equal(outcome(killed, experiment, "grpo"), outcome(whole, experiment, "grpo"))
