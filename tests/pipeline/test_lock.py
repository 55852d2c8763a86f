import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.lock import FILE, STALE_SECONDS, InUseError, Owner, owned

HOLDER = """
import sys, time
from pathlib import Path
from pipeline.lock import owned

with owned(Path(sys.argv[1]), "first"):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_two_processes_cannot_hold_a_directory_and_the_second_is_told_who_does(tmp_path, holder):
    with pytest.raises(InUseError) as refusal, owned(tmp_path, "second", patience=0.3):
        pass
    assert f"run first (process {holder.pid} on {socket.gethostname()}, since " in str(refusal.value)
    assert str(tmp_path) in str(refusal.value)


def test_the_lock_of_a_killed_process_is_free_at_once(tmp_path, holder):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert '"first"' in (tmp_path / FILE).read_text()  # nobody has cleaned up
    with owned(tmp_path, "second", patience=0):
        assert Owner.model_validate_json((tmp_path / FILE).read_text()).run == "second"
    assert (tmp_path / FILE).read_text() == ""


def test_the_next_waits_for_one_that_is_about_to_end(tmp_path, holder):
    started = time.monotonic()
    killer = subprocess.Popen(["sh", "-c", f"sleep 1; kill -9 {holder.pid}"])
    with owned(tmp_path, "second", patience=20):
        assert 0.5 < time.monotonic() - started < 15
    killer.wait()


@pytest.mark.parametrize(("age", "held"), [(0.0, True), (STALE_SECONDS + 5, False)], ids=["alive", "gone"])
def test_on_a_shared_folder_another_hosts_heartbeat_is_what_counts(tmp_path, age, held):
    owner = Owner(host="studio.local", pid=7, run="theirs", since="2026-11-23T00:00:00+00:00")
    (tmp_path / FILE).write_text(owner.model_dump_json())
    beat = time.time() - age
    os.utime(tmp_path / FILE, (beat, beat))
    if held:
        with pytest.raises(InUseError, match=r"run theirs \(process 7 on studio\.local"), owned(tmp_path, "x", 0):
            pass
        assert '"theirs"' in (tmp_path / FILE).read_text()
    else:
        with owned(tmp_path, "x", 0):
            pass


def test_a_file_that_a_crash_cut_short_is_nobodys(tmp_path):
    (tmp_path / FILE).write_text('{"host": "stud')
    with owned(tmp_path, "x", 0):
        pass
