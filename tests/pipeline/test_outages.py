"""W&B and the hub out of reach, as a closed port: the training goes on, or ends before it begins with what to do."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from configs.schema import MonitoringConfig, PretrainedModel
from pipeline import sinks
from pipeline.hub import locate
from pipeline.monitoring import open_reporter
from pipeline.samples import SampleFiles
from pipeline.sinks import RunInfo, read_metrics
from tests.conftest import free_port

ROOT = Path(__file__).parents[2]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
ASK_THE_HUB = """
from configs.schema import PretrainedModel
from pipeline.hub import locate

try:
    print("found", locate(PretrainedModel(kind="pretrained", path="somebody/something", revision=None)))
except FileNotFoundError as error:
    print("refused", error)
"""


def test_a_model_folder_that_is_not_there_is_named_with_its_field():
    with pytest.raises(FileNotFoundError, match=r"model.path: no such folder: \./nowhere"):
        locate(PretrainedModel(path="./nowhere"))


@pytest.fixture
def no_wandb(tmp_path, monkeypatch) -> str:
    """A W&B server that is not there, and a key for it."""
    address = f"http://127.0.0.1:{free_port()}"
    for name, value in (("BASE_URL", address), ("API_KEY", "0" * 40)):
        monkeypatch.setenv(f"WANDB_{name}", value)
    monkeypatch.setenv("HOME", str(tmp_path))
    return address


def info(directory: Path) -> RunInfo:
    return RunInfo(experiment="tiny", stage="grpo", run="abcd1234", directory=directory, steps=2)


def test_without_wandbs_server_a_training_is_recorded_offline_and_says_how_to_sync(
    tmp_path, no_wandb, caplog, monkeypatch
):
    monkeypatch.setattr(sinks, "INIT_SECONDS", 3.0)
    with open_reporter(info(tmp_path), MonitoringConfig(wandb="online")) as report:
        report(1, {"loss": 0.5})
        report(2, {"loss": 0.25})
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]
    assert len(list(tmp_path.glob("wandb/offline-run-*/run-tiny-grpo-abcd1234.wandb"))) == 1
    assert f"offline; `wandb sync {tmp_path}/wandb/*` later" in caplog.text


def test_samples_and_the_checkpoint_go_to_wandb_where_they_are_asked_for(tmp_path, no_wandb):
    SampleFiles(tmp_path / "samples").write(
        [{"step": 2, "reward": r, "rewards": {"a": r}, "prompt": "2 + 2?", "completion": str(r)} for r in (0.0, 1.0)]
    )
    checkpoint = tmp_path / "published" / "step_000002"
    checkpoint.mkdir(parents=True)
    (checkpoint / "weights").write_text("W")
    with open_reporter(info(tmp_path), MonitoringConfig(wandb="offline", wandb_checkpoints=True)) as report:
        report(1, {"reward": 0.5})
        report(2, {"reward": 0.5})
        report.published(checkpoint)
    (table,) = tmp_path.glob("wandb/offline-run-*/files/media/table/samples_*.table.json")
    assert "2 + 2?" in table.read_text()
    (written,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    deadline = time.monotonic() + 20  # W&B's own process writes behind
    while b"tiny-grpo" not in written.read_bytes() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert b"step_000002" in written.read_bytes()


@pytest.mark.parametrize("cached", [True, False], ids=["in the cache", "nowhere"])
def test_without_the_hub_the_cache_serves_else_the_error_names_the_field(tmp_path, cached):
    if cached:
        model = tmp_path / "hub" / "models--somebody--something"
        (model / "snapshots" / COMMIT).mkdir(parents=True)
        (model / "snapshots" / COMMIT / "config.json").write_text("{}")
        (model / "refs").mkdir()
        (model / "refs" / "main").write_text(COMMIT)
    environment = os.environ | {"HF_ENDPOINT": f"http://127.0.0.1:{free_port()}", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", ASK_THE_HUB],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    expected = "found" if cached else "refused model.path: 'somebody/something' is no local folder, not in the cache"
    assert done.stdout.startswith(expected)
