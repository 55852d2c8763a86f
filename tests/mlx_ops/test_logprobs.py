import math

import mlx.core as mx
import numpy as np
import pytest

from mlx_ops.logprobs import (
    entropy,
    kl_estimate,
    kl_penalty,
    masked_mean,
    masked_variance,
    masked_whiten,
    token_logprobs,
)

QUARTERS = mx.array([[[0.0, math.log(3.0)]]])
"""Probabilities 1/4 and 3/4."""


def test_a_log_probability_is_that_of_the_chosen_token():
    assert token_logprobs(QUARTERS, mx.array([[0]])).item() == pytest.approx(math.log(0.25))
    assert token_logprobs(QUARTERS, mx.array([[1]])).item() == pytest.approx(math.log(0.75))


def test_the_temperature_flattens_the_distribution():
    # At T = 1/2 the odds of 3 become 9.
    assert token_logprobs(QUARTERS, mx.array([[1]]), temperature=0.5).item() == pytest.approx(math.log(0.9))


def test_the_gradient_of_a_log_probability_is_one_hot_minus_the_softmax():
    gradient = mx.grad(lambda z: token_logprobs(z, mx.array([[0]])).sum())(QUARTERS)
    np.testing.assert_allclose(np.array(gradient), [[[0.75, -0.75]]], rtol=1e-6)


def test_large_logits_do_not_overflow():
    assert token_logprobs(QUARTERS + 1e4, mx.array([[0]])).item() == pytest.approx(math.log(0.25), abs=2e-3)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
def test_half_precision_logits_are_summed_in_float32(dtype):
    # A thousand equal logits: in bfloat16 the log of their number would be 6.90625.
    logprobs = token_logprobs(mx.zeros((1, 1, 1000), dtype=dtype), mx.array([[7]]))
    assert logprobs.dtype == mx.float32
    assert logprobs.item() == pytest.approx(-math.log(1000), rel=1e-6)


def test_entropy_is_exact():
    assert entropy(mx.zeros((1, 8))).item() == pytest.approx(math.log(8))
    assert entropy(QUARTERS).item() == pytest.approx(0.25 * math.log(4) + 0.75 * math.log(4 / 3))
    assert entropy(QUARTERS, temperature=0.5).item() == pytest.approx(0.1 * math.log(10) + 0.9 * math.log(10 / 9))


def test_what_stands_outside_the_mask_does_not_count():
    x, mask = mx.array([[1.0, 3.0, math.nan], [math.inf, 8.0, -math.inf]]), mx.array([[1, 1, 0], [0, 1, 0]])
    assert masked_mean(x, mask).item() == 4.0
    assert masked_mean(x, mask, axis=-1).tolist() == [2.0, 8.0]
    assert masked_variance(x, mask).item() == 13.0  # (9 + 1 + 16) / 2


def test_an_empty_mask_gives_zero():
    assert masked_mean(mx.array([[5.0]]), mx.array([[0]])).item() == 0.0
    assert masked_whiten(mx.array([[5.0]]), mx.array([[0]])).tolist() == [[0.0]]


def test_whitening_uses_the_unbiased_variance_and_can_keep_the_mean():
    x, mask = mx.array([[1.0, 3.0, 9.0]]), mx.array([[1, 1, 0]])
    half = 1 / math.sqrt(2)
    np.testing.assert_allclose(np.array(masked_whiten(x, mask)), [[-half, half, 0]], rtol=1e-6)
    np.testing.assert_allclose(
        np.array(masked_whiten(x, mask, shift="keep_mean")), [[2 - half, 2 + half, 0]], rtol=1e-6
    )


@pytest.mark.parametrize(
    ("estimator", "expected"), [("k1", -math.log(2)), ("k2", math.log(2) ** 2 / 2), ("k3", 1 - math.log(2))]
)
def test_the_estimators_of_the_kl(estimator, expected):
    # The reference finds the token twice as likely as the policy.
    kl = kl_estimate(mx.array(-1.0 - math.log(2)), mx.array(-1.0), estimator=estimator)
    assert kl.item() == pytest.approx(expected, rel=1e-5)


def test_a_huge_k3_is_capped_and_then_has_no_gradient_of_its_own():
    value, slope = mx.value_and_grad(lambda x: kl_estimate(x, mx.array(0.0), estimator="k3"))(mx.array(-5.0))
    assert (value.item(), slope.item()) == (10.0, 0.0)


POLICY, OLD, REFERENCE = mx.array([0.2, -1.0, 0.7]), mx.array([0.5, 0.1, -0.3]), mx.array([-0.4, 0.9, 0.3])


def _log_softmax(logits: mx.array) -> mx.array:
    return logits - mx.logsumexp(logits)


def _expected_penalty(logits: mx.array, old: mx.array, **options) -> mx.array:
    """The mean penalty over every token that ``old`` may sample."""
    old_logprobs, ref_logprobs = _log_softmax(old), _log_softmax(REFERENCE)
    penalty = kl_penalty(_log_softmax(logits), ref_logprobs, old_logprobs, mx.ones_like(old), **options)
    return (mx.stop_gradient(mx.exp(old_logprobs)) * penalty).sum()


def _exact_kl(logits: mx.array) -> mx.array:
    return (mx.exp(_log_softmax(logits)) * (_log_softmax(logits) - _log_softmax(REFERENCE))).sum()


@pytest.mark.parametrize("old", [OLD, POLICY], ids=["off policy", "on policy"])
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_the_unbiased_penalty_has_the_gradient_of_the_kl_in_expectation(old, estimator):
    gradient = mx.grad(lambda z: _expected_penalty(z, old, estimator=estimator))(POLICY)
    np.testing.assert_allclose(np.array(gradient), np.array(mx.grad(_exact_kl)(POLICY)), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_the_naive_penalty_has_not(estimator):
    gradient = mx.grad(lambda z: _expected_penalty(z, POLICY, estimator=estimator, gradient="naive"))(POLICY)
    assert not np.allclose(np.array(gradient), np.array(mx.grad(_exact_kl)(POLICY)), rtol=0.05, atol=1e-3)


def test_k3_times_the_ratio_has_the_value_of_the_kl_in_expectation():
    assert _expected_penalty(POLICY, OLD).item() == pytest.approx(_exact_kl(POLICY).item(), rel=1e-4)


@pytest.mark.parametrize("gradient", ["unbiased", "naive"])
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_the_penalty_and_its_gradient_stay_finite_at_extreme_inputs_and_blind_to_padding(estimator, gradient):
    logprobs = mx.array([[-1e3, -1e-3, -80.0, math.nan]])
    ref_logprobs = mx.array([[-1e-3, -1e3, -2.0, math.inf]])
    old_logprobs, mask = mx.array([[-1e-3, -1e3, -80.0, math.nan]]), mx.array([[1, 1, 1, 0]])

    def total(x):
        return kl_penalty(x, ref_logprobs, old_logprobs, mask, estimator=estimator, gradient=gradient).sum()

    value, slope = mx.value_and_grad(total)(logprobs)
    assert mx.isfinite(value).item()
    assert mx.isfinite(slope).all().item()
    assert slope[0, 3].item() == 0.0


def test_an_unknown_estimator_is_refused():
    with pytest.raises(NotImplementedError, match="k1, k2, k3"):
        kl_estimate(mx.array(0.0), mx.array(0.0), estimator="abs")  # pyright: ignore[reportArgumentType]
