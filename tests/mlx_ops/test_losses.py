import math
from functools import partial

import mlx.core as mx
import numpy as np
import pytest

from mlx_ops.corrections import off_policy_mask, rejection_mask, sampler_correction, sampler_metrics
from mlx_ops.losses import (
    aggregation_weights,
    cispo_policy_loss,
    clipped_policy_loss,
    clipped_value_loss,
    dft_loss,
    geometric_policy_loss,
    nll_loss,
    plain_policy_loss,
    sapo_policy_loss,
    value_metrics,
    weighted_sum,
    without_truncated,
)

POLICY_LOSSES = {
    "clip": clipped_policy_loss,
    "dual clip": partial(clipped_policy_loss, dual_clip=3.0),
    "gspo": partial(clipped_policy_loss, ratio_level="sequence"),
    "cispo": cispo_policy_loss,
    "sapo": sapo_policy_loss,
    "plain": plain_policy_loss,
    "geometric": geometric_policy_loss,
}
MODES = ["token_mean", "sequence_mean", "dr_grpo"]
MASK = mx.array([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 0]])
ADVANTAGES = mx.array([[1.0], [-0.5], [2.0], [-1.5]])

every_policy_loss = pytest.mark.parametrize("loss", POLICY_LOSSES.values(), ids=POLICY_LOSSES)


def some_logprobs(spread: float = 0.3) -> tuple[mx.array, mx.array]:
    rng = np.random.default_rng(5)
    old = -rng.exponential(size=MASK.shape)
    return mx.array((old + spread * rng.normal(size=MASK.shape)).astype(np.float32)), mx.array(old.astype(np.float32))


def value_and_gradient(loss, logprobs, old, advantages=ADVANTAGES, mask=MASK, weights=None):
    weights = aggregation_weights(mask, "token_mean") if weights is None else weights
    value, gradient = mx.value_and_grad(lambda x: loss(x, old, advantages, mask, weights)[0])(logprobs)
    return value.item(), np.array(gradient)


@pytest.mark.parametrize(
    ("advantage", "log_ratio", "expected", "slope"),
    [
        (1.0, 2.0, -1.28, 0.0),
        (1.0, -2.0, -math.exp(-2), -math.exp(-2)),
        (-1.0, 2.0, math.exp(2), math.exp(2)),
        (-1.0, -2.0, 0.8, 0.0),
    ],
    ids=["a gain is clipped high", "a lost gain is not", "a harm is not", "an undone harm is clipped low"],
)
def test_the_clip_is_one_sided(advantage, log_ratio, expected, slope):
    one = mx.array([[1.0]])
    loss = partial(clipped_policy_loss, clip_range=(0.2, 0.28))
    value, gradient = value_and_gradient(loss, log_ratio * one, 0 * one, advantage * one, one)
    assert value == pytest.approx(expected, rel=1e-5)
    assert gradient.item() == pytest.approx(slope, rel=1e-5)


def test_the_dual_clip_bounds_a_harm_and_its_gradient():
    one = mx.array([[1.0]])
    value, gradient = value_and_gradient(POLICY_LOSSES["dual clip"], 2 * one, 0 * one, -one, one)
    assert value == pytest.approx(3.0)
    assert gradient.item() == 0.0


@every_policy_loss
def test_on_policy_every_loss_has_the_gradient_of_reinforce(loss):
    logprobs, _ = some_logprobs()
    weights = aggregation_weights(MASK, "sequence_mean")
    _, gradient = value_and_gradient(loss, logprobs, logprobs, weights=weights)
    np.testing.assert_allclose(gradient, np.array(-ADVANTAGES * weights), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["clip", "dual clip", "gspo", "geometric"])
def test_on_policy_a_surrogate_is_minus_the_mean_advantage(name):
    logprobs, _ = some_logprobs()
    value, _ = value_and_gradient(POLICY_LOSSES[name], logprobs, logprobs)
    # 1 four times, -0.5 twice, 2 once, -1.5 three times, over ten tokens.
    assert value == pytest.approx(-(4 - 1 + 2 - 4.5) / 10, rel=1e-5)


@every_policy_loss
def test_a_step_along_the_gradient_raises_what_was_better_than_expected(loss):
    _, gradient = value_and_gradient(loss, *some_logprobs(0.05))
    counted, sign = np.array(MASK) == 1, np.sign(np.array(ADVANTAGES))
    assert ((-gradient * sign)[counted] > 0).all()


@every_policy_loss
@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e30])
def test_nothing_in_padding_reaches_value_or_gradient(loss, garbage):
    logprobs, old = some_logprobs()
    clean = value_and_gradient(loss, logprobs, old)
    dirty = [mx.where(MASK > 0, x, mx.array(bad)) for x, bad in ((logprobs, garbage), (old, -garbage))]
    value, gradient = value_and_gradient(loss, *dirty)
    assert value == clean[0]
    np.testing.assert_array_equal(gradient, clean[1])


@every_policy_loss
def test_extreme_log_probabilities_give_finite_gradients_and_metrics(loss):
    logprobs, old = mx.array([[-1e4, -1e-4], [-1e-4, -1e4]]), mx.array([[-1e-4, -1e4], [-1e4, -1e-4]])
    mask, advantages = mx.ones((2, 2)), mx.array([[1.0], [-1.0]])
    value, gradient = value_and_gradient(loss, logprobs, old, advantages, mask)
    assert math.isfinite(value)
    assert np.isfinite(gradient).all()
    assert all(mx.isfinite(x).item() for x in loss(logprobs, old, advantages, mask, mask)[1].values())


@every_policy_loss
def test_a_batch_without_a_counted_token_has_loss_and_gradient_zero(loss):
    logprobs, old = some_logprobs()
    value, gradient = value_and_gradient(loss, logprobs, old, mask=mx.zeros(MASK.shape))
    assert value == 0.0
    assert not gradient.any()


@every_policy_loss
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [1, 2, 3])
def test_micro_batches_add_up_to_the_whole_step(loss, mode, size):
    logprobs, old = some_logprobs()
    weigh = partial(aggregation_weights, mode=mode, total_tokens=10, total_rows=4, max_length=6)
    whole = value_and_gradient(loss, logprobs, old, weights=weigh(MASK))
    rows = [slice(start, start + size) for start in range(0, 4, size)]
    parts = [value_and_gradient(loss, logprobs[r], old[r], ADVANTAGES[r], MASK[r], weigh(MASK[r])) for r in rows]
    assert sum(value for value, _ in parts) == pytest.approx(whole[0], rel=1e-5, abs=1e-6)
    np.testing.assert_allclose(np.concatenate([gradient for _, gradient in parts]), whole[1], rtol=1e-5, atol=1e-8)


def test_the_aggregations_weigh_as_they_say():
    mask = mx.array([[1, 1, 1], [1, 0, 0], [0, 0, 0]])
    rows = {
        "token_mean": [1 / 4, 1 / 4],
        "sequence_mean": [1 / 9, 1 / 3],
        "dr_grpo": [1 / 15, 1 / 15],
        "sequence_sum": [1 / 3, 1 / 3],
        "token_sum": [1, 1],
    }
    for mode, (first, second) in rows.items():
        weights = aggregation_weights(mask, mode, max_length=5)  # pyright: ignore[reportArgumentType]
        np.testing.assert_allclose(np.array(weights), [[first] * 3, [second, 0, 0], [0, 0, 0]], rtol=1e-6)


def test_dr_grpo_wants_its_constant_and_unknown_aggregations_are_refused():
    with pytest.raises(ValueError, match="max_length"):
        aggregation_weights(MASK, "dr_grpo")
    with pytest.raises(NotImplementedError, match="token_mean"):
        aggregation_weights(MASK, "mean")  # pyright: ignore[reportArgumentType]


def test_truncated_rows_leave_the_mask():
    mask = without_truncated(mx.array([[1, 1], [1, 0]]), mx.array([[True], [False]]))
    assert mask.tolist() == [[0, 0], [1, 0]]


def test_a_correction_multiplies_the_term_and_has_no_gradient_of_its_own():
    logprobs, old = some_logprobs()
    plain = value_and_gradient(clipped_policy_loss, logprobs, old)

    def corrected(x, *inputs):
        return clipped_policy_loss(x, *inputs, correction=3 * mx.exp(x - mx.stop_gradient(x)))

    value, gradient = value_and_gradient(corrected, logprobs, old)
    assert value == pytest.approx(3 * plain[0], rel=1e-5)
    np.testing.assert_allclose(gradient, 3 * plain[1], rtol=1e-5)


def test_the_clip_metrics_count_tokens_by_side():
    # Ratios 4, 2, 1/2 with A > 0 and 1/2, 4 with A < 0.
    old, mask = mx.zeros((2, 3)), mx.array([[1, 1, 1], [1, 1, 0]])
    logprobs = mx.log(mx.array([[4.0, 2.0, 0.5], [0.5, 4.0, 9.0]]))
    _, metrics = clipped_policy_loss(logprobs, old, mx.array([[1.0], [-1.0]]), mask, mask, dual_clip=3.0)
    values = {name: float(np.array(value)) for name, value in metrics.items()}
    assert values["clip_fraction_high"] == pytest.approx(2 / 5)
    assert values["clip_fraction_low"] == pytest.approx(1 / 5)
    assert values["clip_fraction"] == pytest.approx(3 / 5)
    assert values["clip_fraction_dual"] == pytest.approx(1 / 5)
    assert (values["ratio_min"], values["ratio_max"]) == pytest.approx((0.5, 4.0))
    assert values["ratio_mean"] == pytest.approx(11 / 5)
    assert values["approx_kl_k1"] == pytest.approx(-3 * math.log(2) / 5, rel=1e-5)
    assert values["approx_kl_k3"] == pytest.approx((6 - 3 * math.log(2)) / 5, rel=1e-5)


def test_the_value_loss_takes_the_larger_of_two_errors():
    old, returns, mask = mx.array([[0.0, 0.0, 5.0]]), mx.array([[1.0, 1.0, math.nan]]), mx.array([[1, 1, 0]])
    values, weights = mx.array([[0.5, -0.5, 9.0]]), mx.array([[0.5, 0.5, 0.0]])
    # 0.5 is held at 0.2: error 0.8 instead of 0.5. -0.5 is held at -0.2, but its own error 1.5 is larger.
    loss, metrics = clipped_value_loss(values, old, returns, mask, weights, clip_range=0.2)
    assert loss.item() == pytest.approx(0.25 * (0.8**2 + 1.5**2))
    assert metrics["value_clip_fraction"].item() == pytest.approx(0.5)
    slope = mx.grad(lambda x: clipped_value_loss(x, old, returns, mask, weights)[0])(values)
    np.testing.assert_allclose(np.array(slope), [[0.0, -0.75, 0.0]], rtol=1e-6)
    loss, _ = clipped_value_loss(values, old, returns, mask, weights, clip_range=None)
    assert loss.item() == pytest.approx(0.25 * (0.5**2 + 1.5**2))


def test_explained_variance_is_one_for_the_returns_and_zero_for_a_constant():
    returns, mask = mx.array([[1.0, 5.0, 99.0]]), mx.array([[1, 1, 0]])
    exact = value_metrics(returns, returns, mask)
    assert exact["explained_variance"].item() == pytest.approx(1.0)
    assert exact["return_max"].item() == 5.0
    assert value_metrics(0 * returns + 3, returns, mask)["explained_variance"].item() == pytest.approx(0.0, abs=1e-5)


def test_nll_and_dft_by_hand():
    logprobs, weights = mx.log(mx.array([[0.5, 0.25, 0.1]])), mx.array([[0.5, 0.5, 0.0]])
    assert nll_loss(logprobs, weights)[0].item() == pytest.approx(1.5 * math.log(2))
    assert dft_loss(logprobs, weights)[0].item() == pytest.approx(0.5 * math.log(2))
    gradient = mx.grad(lambda x: dft_loss(x, weights)[0])(logprobs)
    np.testing.assert_allclose(np.array(gradient), [[-0.25, -0.125, 0.0]], rtol=1e-6)


OLD = mx.log(mx.array([[0.5, 0.5, 0.5], [0.5, 0.25, 1.0]]))
SAMPLER = mx.log(mx.array([[0.125, 1.0, 0.5], [1.0, 0.25, 0.5]]))
TWO_ROWS = mx.array([[1, 1, 1], [1, 1, 0]])
"""Trainer over sampler: 4, 1/2, 1 (product 2) and 1/2, 1 (product 1/2)."""


@pytest.mark.parametrize(
    ("level", "mode", "bounds", "expected"),
    [
        ("token", "truncate", (None, 3.0), [[3, 0.5, 1], [0.5, 1, 0]]),
        ("token", "truncate", (0.75, 3.0), [[3, 0.75, 1], [0.75, 1, 0]]),
        ("token", "mask", (0.75, 3.0), [[0, 0, 1], [0, 1, 0]]),
        ("sequence", "truncate", (None, 1.5), [[1.5] * 3, [0.5, 0.5, 0]]),
        ("sequence", "mask", (None, 1.5), [[0] * 3, [0.5, 0.5, 0]]),
    ],
)
def test_the_sampler_correction_by_level_and_mode(level, mode, bounds, expected):
    weights = sampler_correction(OLD, SAMPLER, TWO_ROWS, level=level, mode=mode, bounds=bounds)
    np.testing.assert_allclose(np.array(weights), expected, rtol=1e-5)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_a_log_probability_that_is_nan_weighs_one(level):
    sampler = mx.array([[math.nan, math.log(0.25)]])
    weights = sampler_correction(mx.log(mx.array([[0.5, 0.5]])), sampler, mx.ones((1, 2)), level=level, mode="truncate")
    np.testing.assert_allclose(np.array(weights), [[1, 2]] if level == "token" else [[2, 2]], rtol=1e-5)


def test_only_bad_rows_far_from_the_sampler_are_dropped():
    sampler = OLD + mx.array([[0.3], [0.3]])
    mask = off_policy_mask(OLD, sampler, mx.array([[1.0], [-1.0]]), TWO_ROWS, threshold=0.2)
    assert mask.tolist() == [[1.0], [0.0]]
    assert off_policy_mask(OLD, sampler, mx.array([[-1.0], [-1.0]]), TWO_ROWS, threshold=0.4).tolist() == [[1.0], [1.0]]


@pytest.mark.parametrize(
    ("level", "estimator", "bounds", "expected"),
    [
        ("token", "k1", (None, 3.0), [[0, 1, 1], [1, 1, 0]]),
        ("sequence_sum", "k1", (0.4, 1.9), [[1, 1, 1], [0, 0, 0]]),
        ("sequence_mean", "k1", (0.9, 1.6), [[0, 0, 0], [1, 1, 0]]),
        ("sequence_max", "k2", (None, 0.3), [[0, 0, 0], [1, 1, 0]]),
    ],
)
def test_rejection_by_level_and_estimator(level, estimator, bounds, expected):
    # Sampler over trainer: 1/4, 2, 1: product 1/2, geometric mean 0.79; and 2, 1: 2 and 1.41. (log 2)^2 / 2 = 0.24.
    mask = rejection_mask(OLD, SAMPLER, TWO_ROWS, level=level, estimator=estimator, bounds=bounds)
    assert mask.tolist() == expected


def test_the_sampler_gap_is_measured_on_counted_tokens():
    metrics = sampler_metrics(OLD, SAMPLER, TWO_ROWS)
    assert metrics["sampler_gap_mean"].item() == pytest.approx(4 * math.log(2) / 5, rel=1e-5)
    assert metrics["sampler_gap_max"].item() == pytest.approx(2 * math.log(2), rel=1e-5)
    assert metrics["sampler_gap_factor"].item() == pytest.approx((4 + 2 + 1 + 2 + 1) / 5, rel=1e-5)


def test_a_weighted_sum_is_blind_where_the_weight_is_zero():
    assert weighted_sum(mx.array([[2.0, math.nan]]), mx.array([[0.5, 0.0]])).item() == 1.0
