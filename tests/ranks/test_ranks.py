"""Two ranks on the loopback train what one trains; a lost one ends the run, and what was reached goes on on one."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest

from mlx_ops.distributed import Ranks
from tests.conftest import free_port
from tests.ranks.bench import (
    LAUNCH,
    STAGES,
    final_weights,
    furthest,
    gradients,
    log_of,
    prepare,
    rows,
    set_steps,
    start,
    wait_for_step,
)
from tests.ranks.run import train

MEASURED = ("seconds", "tokens_per_second", "memory", "time", "padded_share", "entropy")
"""Parts of the names of metrics that are the machine's, or (as where the entropy is probed) the cutting's."""


@pytest.fixture(scope="module", autouse=True)
def launches():
    """`mlx.launch` can start two ranks that find each other, or these tests are skipped."""
    if not LAUNCH.is_file():
        pytest.skip(f"there is no {LAUNCH}")
    code = "import mlx.core as mx; print('ranks', mx.distributed.init(strict=True, backend='ring').size())"
    started = subprocess.Popen(
        [str(LAUNCH), "--backend", "ring", "-n", "2", "-p", str(free_port()), "--", sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        output, _ = started.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        started.kill()
        pytest.skip("mlx.launch starts no ranks here within a minute")
    if "ranks 2" not in output:
        pytest.skip(f"mlx.launch starts no ranks here: {output[-300:]}")


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The same trainings on one rank and on two."""
    one, two = tmp_path_factory.mktemp("ranks") / "one", tmp_path_factory.mktemp("ranks") / "two"
    shutil.copytree(prepare(one), two)
    for stage in STAGES:
        train(one, stage, Ranks())
    start(two, STAGES).wait(timeout=300)
    return one, two


@pytest.mark.parametrize("stage", STAGES)
def test_gradients_and_final_weights_of_two_ranks_are_those_of_one(pair, stage):
    one, two = pair
    assert (two / f"{stage}_gradients").is_dir(), log_of(two)
    assert furthest(gradients(one, stage), gradients(two, stage)) < 1e-5
    assert furthest(final_weights(one, stage), final_weights(two, stage)) < 1e-5


@pytest.mark.parametrize("stage", STAGES)
def test_every_rank_has_the_same_gradients_bit_for_bit(pair, stage):
    _, two = pair
    assert furthest(gradients(two, stage, rank=0), gradients(two, stage, rank=1)) == 0.0


@pytest.mark.parametrize("stage", STAGES)
def test_the_metrics_of_two_ranks_are_those_of_the_whole_batch(pair, stage):
    for mine, theirs in zip(*(numbers(folder, stage) for folder in pair), strict=True):
        assert mine.keys() == theirs.keys()
        for name, number in mine.items():
            assert theirs[name] == pytest.approx(number, rel=1e-3, abs=1e-4), name


def numbers(folder, stage):
    lines = (folder / stage / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{k: v for k, v in json.loads(line).items() if not any(part in k for part in MEASURED)} for line in lines]


@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_rank_ends_the_run_with_a_checkpoint_that_one_rank_goes_on_from(tmp_path, killed):
    folder = prepare(tmp_path, steps=2000)
    process = start(folder, ["grpo"])
    wait_for_step(folder, "grpo", 3, process)
    os.kill(int((folder / f"rank_{killed}").read_text(encoding="utf-8")), signal.SIGKILL)
    began = time.monotonic()
    process.wait(timeout=60)
    assert time.monotonic() - began < 30
    assert f"rank {killed} on {socket.gethostname()} was lost" in log_of(folder)
    reached = rows(folder, "grpo")
    (checkpoint,) = (folder / "grpo" / "checkpoints").glob("step_*")
    assert int(checkpoint.name.removeprefix("step_")) in (reached, reached + 1)
    set_steps(folder, reached + 3)
    train(folder, "grpo", Ranks())
    assert rows(folder, "grpo") == reached + 3


def test_an_interrupt_reaches_every_rank_and_leaves_the_last_completed_step(tmp_path):
    folder = prepare(tmp_path, steps=2000)
    process = start(folder, ["ppo"])
    wait_for_step(folder, "ppo", 2, process)
    pids = [int((folder / f"rank_{rank}").read_text(encoding="utf-8")) for rank in (0, 1)]
    os.kill(pids[0], signal.SIGINT)
    process.wait(timeout=60)
    assert [(folder / "ppo" / "checkpoints" / f"step_{rows(folder, 'ppo'):06d}").is_dir()] == [True]
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
