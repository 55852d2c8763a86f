import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import dagster as dg
import pytest

from pipeline.guard import long_work

ORPHAN = """
import multiprocessing, os, sys, time
from pathlib import Path
import dagster as dg
from pipeline.guard import long_work

def work(folder):
    (folder / "pid").write_text(str(os.getpid()))
    try:
        with long_work("a checkpoint"):
            time.sleep(60)
    except dg.Failure as error:
        (folder / "end").write_text(error.description)

if __name__ == "__main__":
    process = multiprocessing.get_context("spawn").Process(target=work, args=(Path(sys.argv[1]),))
    process.start()
    process.join()
"""


@pytest.mark.parametrize(
    "error", [dg.DagsterExecutionInterruptedError(), KeyboardInterrupt()], ids=["a cancel", "Ctrl-C"]
)
def test_an_interrupt_is_a_failure_that_is_not_retried(error):
    with pytest.raises(dg.Failure) as failure, long_work("the checkpoint of step 3 is kept"):
        raise error
    assert not failure.value.allow_retries
    assert failure.value.description == "interrupted; the checkpoint of step 3 is kept"


@pytest.mark.parametrize(
    ("error", "words"),
    [(ValueError("grpo.steps: 0"), "grpo.steps: 0"), (KeyError("unknown reward 'x'"), "unknown reward 'x'")],
    ids=["a setting", "a name"],
)
def test_a_mistake_is_said_in_its_own_words_and_not_tried_again(error, words):
    with pytest.raises(dg.Failure) as failure, long_work("nothing"):
        raise error
    assert not failure.value.allow_retries
    assert failure.value.description == words


def test_what_may_pass_is_left_to_the_retry_policy():
    with pytest.raises(RuntimeError, match="the GPU timed out"), long_work("nothing"):
        raise RuntimeError("the GPU timed out")


def wait_for(path: Path, seconds: float) -> str:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if path.is_file() and path.read_text():
            return path.read_text()
        time.sleep(0.1)
    pytest.fail(f"no {path.name} after {seconds} s")


def test_an_orphan_stops_when_its_parent_is_killed(tmp_path):
    script = tmp_path / "orphan.py"
    script.write_text(ORPHAN)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    parent = subprocess.Popen([sys.executable, str(script), str(tmp_path)], env=environment)
    try:
        wait_for(tmp_path / "pid", 30)
        time.sleep(0.5)
        parent.send_signal(signal.SIGKILL)
        assert wait_for(tmp_path / "end", 15) == "interrupted; a checkpoint"
    finally:
        parent.kill()
        parent.wait()
