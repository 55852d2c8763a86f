"""Full disks and flipped bytes, a few of each; `make faults` does many."""

import pytest

from mlx_ops.checkpoint import CheckpointStore
from tests.faults import disk, flips
from tests.faults.bench import finish, prepare


def test_a_disk_that_is_full_in_a_save_loses_nothing(tmp_path):
    try:
        counts = disk.check(tmp_path, 3)
    except OSError as error:
        pytest.skip(str(error))
    assert counts.total() == 3


def test_a_flipped_byte_is_named_wherever_it_is_and_the_checkpoint_before_is_taken(tmp_path):
    experiment = prepare(tmp_path, ppo={"steps": 6, "checkpoint": {"best_metric": "reward"}})
    finish(tmp_path, "ppo")
    assert experiment.ppo is not None
    counts = flips.check(CheckpointStore(tmp_path / "run" / "checkpoints", experiment.ppo.checkpoint), 36)
    assert {"manifest.json", "state.json", "model.safetensors", "best.json", "latest.json"} <= counts.keys()
