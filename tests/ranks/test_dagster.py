"""Dagster starts the ranks, follows them, passes a cancel on and names a rank that is lost."""

import os
import signal
import socket
import threading
import time
from pathlib import Path

import dagster as dg
import pytest
import yaml

from configs.loader import merge
from pipeline.catalog import load_catalog
from pipeline.factory import build_definitions
from pipeline.io_manager import read_ref
from pipeline.keys import model_key
from pipeline.launch import launch_command
from pipeline.refs import CheckpointRef
from pipeline.resources import Launch
from pipeline.sinks import read_metrics
from tests.conftest import TINY
from tests.ranks.test_ranks import launches  # noqa: F401 (skips where mlx.launch starts nothing)

TWO = {"resources": {"mlx": {"config": {"device": "cpu", "launch": {"processes": 2}}}}}
LONG = {"steps": 5000, "checkpoint": {"save_every": 10_000}}


@pytest.fixture
def job(tmp_path):
    """Runs an experiment of SFT alone on two ranks; its definitions, and where its artifacts are."""

    def made(**sft):
        folder = tmp_path / "experiments"
        folder.mkdir()
        data = {name: value for name, value in merge(TINY, {"sft": sft, "evaluations": []}).items() if name != "grpo"}
        (folder / "tiny.yaml").write_text(yaml.safe_dump(data), encoding="utf-8")
        definitions = build_definitions(load_catalog(folder), str(tmp_path / "artifacts"))
        return definitions.resolve_job_def("tiny"), tmp_path / "artifacts"

    return made


def test_a_training_on_two_ranks_leaves_a_checkpoint_and_its_metrics(job):
    definition, artifacts = job()
    with dg.instance_for_test() as instance:
        result = definition.execute_in_process(instance=instance, run_config=TWO)
        assert result.success
        run = artifacts / "tiny" / "sft" / result.run_id[:8]
        assert [row["step"] for row in read_metrics(run)] == [1, 2, 3, 4]
        assert read_ref(artifacts, model_key("tiny", "sft"), CheckpointRef).step == 4
        seen = instance.fetch_observations(model_key("tiny", "sft"), limit=10)
        assert len(seen.records) == 4


def soon(artifacts: Path, act):
    """Calls `act` with the ranks' process ids, once the training has reported three steps."""

    def watch():
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            for order in artifacts.glob("tiny/sft/*/order.json"):
                if len(read_metrics(order.parent)) >= 3:
                    act(ranks_of(order))
                    return
            time.sleep(0.05)

    threading.Thread(target=watch, daemon=True).start()


def ranks_of(order: Path) -> list[int]:
    """The processes that train what an order says, rank 0 first."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
            if str(order).encode() in words and b"pipeline.worker" in words and b"--backend" not in words:
                environ = (folder / "environ").read_bytes().split(b"\0")
                found[next(word for word in environ if word.startswith(b"MLX_RANK="))] = int(folder.name)
        except (OSError, StopIteration):
            continue
    return [found[rank] for rank in sorted(found)]


@pytest.mark.skipif(not Path("/proc/self/environ").is_file(), reason="finds the ranks in /proc")
def test_a_lost_rank_ends_the_run_by_name_with_a_checkpoint(job):
    definition, artifacts = job(**LONG)
    killed = []
    soon(artifacts, lambda pids: (os.kill(pids[1], signal.SIGKILL), killed.append(time.monotonic())))
    result = definition.execute_in_process(run_config=TWO, raise_on_error=False)
    assert not result.success
    assert time.monotonic() - killed[0] < 30
    (failure,) = [event for event in result.all_events if event.is_step_failure]
    assert f"rank 1 on {socket.gethostname()} was lost" in str(failure.step_failure_data.error_display_string)
    assert checkpoints(artifacts) == [last_row(artifacts)]


@pytest.mark.skipif(not Path("/proc/self/environ").is_file(), reason="finds the ranks in /proc")
def test_a_cancel_reaches_every_rank_and_leaves_the_last_completed_step(job):
    definition, artifacts = job(**LONG)
    reached = []
    soon(artifacts, lambda pids: (reached.extend(pids), os.kill(os.getpid(), signal.SIGINT)))
    result = definition.execute_in_process(run_config=TWO, raise_on_error=False)
    assert not result.success
    assert checkpoints(artifacts) == [last_row(artifacts)]
    assert len(reached) == 2
    for pid in reached:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def checkpoints(artifacts):
    return [int(path.name.removeprefix("step_")) for path in artifacts.glob("tiny/sft/*/checkpoints/step_*")]


def last_row(artifacts):
    (run,) = (path.parent for path in artifacts.glob("tiny/sft/*/order.json"))
    return read_metrics(run)[-1]["step"]


def test_several_machines_are_written_into_a_host_file_that_begins_with_this_one(tmp_path):
    launch = Launch(processes=1, hosts=["10.0.0.1", "10.0.0.2"])
    command = launch_command(launch, tmp_path, ["train"])
    assert command[-4:] == ["--hostfile", str(tmp_path / "hosts.json"), "--", "train"]
    assert yaml.safe_load((tmp_path / "hosts.json").read_text(encoding="utf-8")) == [
        {"ssh": "127.0.0.1", "ips": ["10.0.0.1"]},
        {"ssh": "10.0.0.2", "ips": ["10.0.0.2"]},
    ]


def test_a_host_file_that_begins_elsewhere_is_refused(tmp_path):
    hosts = tmp_path / "hosts.json"
    hosts.write_text('[{"ssh": "mac2", "ips": ["10.0.0.2"]}]', encoding="utf-8")
    with pytest.raises(ValueError, match="first host is this machine"):
        launch_command(Launch(hostfile=str(hosts)), tmp_path, ["train"])
