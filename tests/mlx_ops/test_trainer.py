import math
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.optimizers import SGD

from configs.schema import OptimizerConfig
from mlx_ops.optimizers import global_norm, make_schedule
from mlx_ops.trainer import BaseTrainer, Limits, mean_of, named_arrays, rates, whole_of


class Toy(BaseTrainer[float]):
    """Moves one weight towards each batch's number."""

    def collect(self, step):
        return [[float(step)], [float(step) + 1]], {"reward": float(step)}

    def loss(self, model, batch):
        return mx.sum(cast(mx.array, model.weight)) * batch, {"tokens": mx.array(batch + 1), "seen": mx.array(batch)}


def toy():
    model = nn.Linear(1, 1, bias=False)
    model.weight = mx.zeros((1, 1))
    return Toy(model, SGD(learning_rate=1.0), seed=0, limits=Limits(max_grad_norm=100.0))


def test_a_step_reports_once_all_its_updates_and_saves_after_that():
    rows, order = [], []

    def report(step, metrics):
        rows.append((step, dict(metrics)))
        order.append("report")

    trainer = toy()
    trainer.fit(
        2,
        report=report,
        save=lambda step, metrics: order.append(f"save {step}"),
        evaluate=lambda step: {"evaluated": float(step)},
    )
    assert [step for step, _ in rows] == [1, 2]
    # Step 2 had batches 1 and 2 with 2 and 3 tokens: (2 * 1 + 3 * 2) / 5.
    assert rows[1][1]["seen"] == pytest.approx(8 / 5)
    assert rows[1][1]["reward"] == 1.0
    assert rows[1][1]["evaluated"] == 2.0
    assert order == ["report", "save 1", "report", "save 2"]
    # SGD at rate 1 on a slope of the batch's number: 0 + 1 + 1 + 2.
    assert float(cast(mx.array, trainer.model.weight)) == pytest.approx(-4.0, rel=1e-4)


def test_an_interrupt_while_collecting_leaves_the_last_completed_step():
    trainer = toy()
    collect = trainer.collect

    def interrupted(step):
        if step == 1:
            raise KeyboardInterrupt
        return collect(step)

    trainer.collect = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(3, report=lambda step, metrics: None, save=lambda step, metrics: None)
    assert (trainer.completed, trainer.resting) == (1, True)


def test_updates_and_reports_happen_inside_the_shield():
    depth, seen = [0], []

    @contextmanager
    def shield():
        depth[0] += 1
        yield
        depth[0] -= 1

    trainer = toy()
    update = trainer.update
    trainer.update = lambda batch: (seen.append(depth[0]), update(batch))[1]  # type: ignore[method-assign]
    trainer.fit(1, report=lambda step, metrics: seen.append(depth[0]), save=lambda *_: None, shield=shield)
    assert seen == [1, 1, 1]


def test_means_are_weighted_by_tokens_extremes_are_extremes_and_seconds_add_up():
    rows = [
        {"tokens": 1.0, "kl": 1.0, "ratio_max": 3.0, "ratio_min": 0.5, "seconds/update": 1.0},
        {"tokens": 3.0, "kl": 2.0, "ratio_max": 2.0, "ratio_min": 0.1, "seconds/update": 1.0},
    ]
    assert mean_of(rows) == {"tokens": 4.0, "kl": 1.75, "ratio_max": 3.0, "ratio_min": 0.1, "seconds/update": 2.0}


def test_shares_of_the_loss_add_up_over_microbatches_and_average_over_updates():
    parts = [{"tokens": 1.0, "value_loss": 0.5, "kl": 1.0}, {"tokens": 3.0, "value_loss": 0.25, "kl": 2.0}]
    assert whole_of(parts) == {"tokens": 4.0, "value_loss": 0.75, "kl": 1.75}
    assert mean_of([{"tokens": 1.0, "value_loss": 1.0}, {"tokens": 1.0, "value_loss": 2.0}])["value_loss"] == 1.5


def test_rates_are_tokens_over_the_seconds_of_their_own_part():
    metrics = {"tokens_generated": 600.0, "seconds/generate": 3.0, "tokens": 500.0, "seconds/update": 2.0}
    assert rates(metrics) == {"tokens_per_second/generate": 200.0, "tokens_per_second/update": 250.0}
    assert rates({"tokens_generated": 600.0, "seconds/generate": 0.0, "seconds/update": 2.0}) == {}


def test_a_step_says_how_long_its_parts_took_and_how_much_memory():
    rows = []
    trainer = toy()
    trainer.fit(
        2,
        report=lambda step, metrics: rows.append(dict(metrics)),
        save=lambda step, metrics: time.sleep(0.05),
        evaluate=lambda step: time.sleep(0.02) or {},
    )
    assert rows[0]["seconds/save"] == 0
    assert rows[1]["seconds/save"] >= 0.05
    assert all(0.02 <= row["seconds/evaluate"] <= row["seconds/step"] for row in rows)
    assert all(row["peak_memory_gb"] > 0 and row["updates"] == 2 for row in rows)


def test_the_norm_is_over_all_gradients_and_survives_half_precision():
    # 300^2 overflows float16.
    assert float(global_norm({"a": mx.array([300.0], mx.float16), "b": [mx.array([400.0])]})) == pytest.approx(500.0)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]),
        ("linear", [0.25, 0.5, 0.75, 1.0, 0.775, 0.1]),
        ("cosine", [0.25, 0.5, 0.75, 1.0, 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4)), 0.1]),
    ],
)
def test_schedules_warm_up_then_fall_to_their_floor(schedule, expected):
    config = OptimizerConfig(schedule=schedule, warmup_steps=3, final_fraction=0.1)
    rate = make_schedule(config, 1.0, updates=11)
    got = [float(rate(mx.array(step))) for step in (0, 1, 2, 3, 5, 11)]
    assert got == pytest.approx(expected, rel=1e-6)


def test_an_interrupt_that_waited_for_an_update_meets_a_reported_step():
    """The shield lets go where `completed`, the weights and the report agree."""
    trainer, reported, seen = toy(), [], []

    @contextmanager
    def shield():
        yield
        seen.append((trainer.completed, trainer.resting, len(reported)))

    trainer.fit(2, report=lambda step, metrics: reported.append(step), save=lambda *_: None, shield=shield)
    assert seen == [(1, True, 1), (2, True, 2)]


def test_an_update_that_is_not_finite_is_skipped_and_its_batch_handed_over():
    trainer, kept = toy(), {}
    trainer.fit(1, report=lambda *_: None, save=lambda *_: None)
    before = float(cast(mx.array, cast(nn.Linear, trainer.model).weight).sum())
    trainer.inspect = lambda name, arrays: kept.update({name: arrays})
    found = trainer.update([float("nan")])
    assert found["skipped_updates"] == 1
    assert float(cast(mx.array, cast(nn.Linear, trainer.model).weight).sum()) == before
    assert list(kept) == ["step_000002_1"]
    with pytest.raises(FloatingPointError, match="3 updates in a row"):
        [trainer.update([float("nan")]) for _ in range(2)]


def test_the_arrays_of_nested_batches_are_named():
    @dataclass(frozen=True)
    class Inner:
        tokens: mx.array
        count: int

    @dataclass(frozen=True)
    class Outer:
        rows: Inner
        weights: mx.array | None

    named = named_arrays([Outer(Inner(mx.array([1]), 3), None), Outer(Inner(mx.array([2]), 3), mx.array([4.0]))])
    assert {name: array.tolist() for name, array in named.items()} == {
        "batch.0.rows.tokens": [1],
        "batch.1.rows.tokens": [2],
        "batch.1.weights": [4.0],
    }
