import mlx.core as mx
import pytest
from mlx.optimizers import AdamW
from mlx.utils import tree_unflatten

from configs.atomic import read_sealed
from configs.schema import CheckpointConfig
from mlx_ops.checkpoint import CheckpointStore, load, restore_optimizer
from tests.mlx_ops.tiny import leaves, tiny_model


def store(tmp_path, **changes):
    return CheckpointStore(tmp_path / "checkpoints", CheckpointConfig(**changes))


def save(checkpoints, step, *, optimizer=None, **metrics):
    return checkpoints.save(
        step,
        write_weights=lambda folder: mx.save_safetensors(str(folder / "w.safetensors"), {"w": mx.array([float(step)])}),
        weight_bytes=4,
        optimizer=optimizer or AdamW(learning_rate=0.1),
        state={"trainer": {"position": 7 * step}},
        metrics=metrics,
    )


def test_rotation_keeps_the_last_every_nth_and_the_best(tmp_path):
    checkpoints = store(tmp_path, keep_last=2, keep_every=4, best_metric="reward")
    rewards = [0.1, 0.9, 0.3, 0.2, 0.5, 0.4, 0.4]
    for step, reward in enumerate(rewards, start=1):
        save(checkpoints, step, reward=reward)
    assert checkpoints.steps() == [2, 4, 6, 7]
    assert read_sealed(checkpoints.root / "latest.json") == {"step": 7, "checkpoint": "step_000007"}
    assert read_sealed(checkpoints.root / "best.json") == {
        "metric": "reward",
        "value": 0.9,
        "step": 2,
        "checkpoint": "step_000002",
    }
    assert checkpoints.chosen().step == 2


def test_the_best_of_a_loss_is_the_smallest_and_the_first_of_equals_stays(tmp_path):
    checkpoints = store(tmp_path, best_metric="loss", best_mode="min")
    for step, loss in enumerate([0.5, 0.2, 0.2], start=1):
        save(checkpoints, step, loss=loss)
    assert checkpoints.chosen().step == 2


def test_without_a_best_metric_the_newest_is_chosen(tmp_path):
    checkpoints = store(tmp_path)
    save(checkpoints, 1, reward=1.0)
    save(checkpoints, 2, reward=0.0)
    assert checkpoints.chosen().step == 2


def test_a_checkpoint_with_a_flipped_byte_is_passed_over_and_named(tmp_path):
    checkpoints = store(tmp_path)
    save(checkpoints, 1)
    path = save(checkpoints, 2) / "w.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    newest, skipped = checkpoints.newest()
    assert newest is not None
    assert newest.step == 1
    assert newest.state["trainer"] == {"position": 7}
    assert len(skipped) == 1
    assert "step_000002/w.safetensors: not what was written" in skipped[0]
    with pytest.raises(ValueError, match="not what was written"):
        load(path.parent)


def test_an_unfinished_folder_is_no_checkpoint_and_is_swept_up(tmp_path):
    checkpoints = store(tmp_path)
    left = checkpoints.root / ".step_000009.123.tmp"
    left.mkdir(parents=True)
    assert checkpoints.newest() == (None, [])
    save(checkpoints, 1)
    assert not left.exists()
    assert checkpoints.steps() == [1]


def test_a_restored_optimizer_goes_on_bit_for_bit(tmp_path):
    models = [tiny_model(), tiny_model()]
    optimizers = [AdamW(learning_rate=lambda step: 0.01 / (1 + step)) for _ in models]

    def update(model, optimizer, seed):
        keys = mx.random.split(mx.random.key(seed), len(leaves(model.parameters())))
        grads = [
            (n, mx.random.normal(a.shape, key=k)) for (n, a), k in zip(leaves(model.parameters()), keys, strict=True)
        ]
        optimizer.update(model, tree_unflatten(grads))
        mx.eval(model.parameters(), optimizer.state)

    for seed in range(3):
        update(models[0], optimizers[0], seed)
    for seed in range(2):
        update(models[1], optimizers[1], seed)
    path = save(store(tmp_path), 2, optimizer=optimizers[1])
    fresh = AdamW(learning_rate=lambda step: 0.01 / (1 + step))
    restore_optimizer(fresh, path)
    update(models[1], fresh, 2)
    for (name, one), (_, other) in zip(leaves(models[0].parameters()), leaves(models[1].parameters()), strict=True):
        assert mx.array_equal(one, other), name
