"""Log-probabilities, entropy, KL estimates, and the masked statistics they share.

Arrays stand on completion tokens, (B, T), right-padded; a mask is 1 where a sampled token counts. Half precision is
promoted to float32, float64 stays. Nothing here chunks over tokens: who holds large logits calls these on slices.
"""

from typing import Literal

import mlx.core as mx

KLEstimator = Literal["k1", "k2", "k3"]
KLGradient = Literal["unbiased", "naive"]

LOG_RATIO_LIMIT = 20.0
"""Log-ratios are held within this before exp: e^20 is far outside any clip range and finite in float32."""
K3_LIMIT = 10.0
"""Largest k3 value reported; beyond it one token would drown the mean."""


def at_least_float32(x: mx.array) -> mx.array:
    """``x`` in float32, or in float64 where it already is."""
    return x if x.dtype in (mx.float32, mx.float64) else x.astype(mx.float32)


def float_mask(mask: mx.array) -> mx.array:
    """A mask of any type in float32, or in float64 where it already is."""
    return mask if mask.dtype == mx.float64 else mask.astype(mx.float32)


def token_logprobs(logits: mx.array, tokens: mx.array, *, temperature: float = 1.0) -> mx.array:
    """The log-probability (..., T) of each of ``tokens`` (..., T) under ``logits`` (..., T, V) / temperature.

    A gather minus a logsumexp, so that no second array of the vocabulary's size is made.
    """
    scaled = _scaled(logits, temperature)
    chosen = mx.take_along_axis(scaled, tokens[..., None], axis=-1).squeeze(-1)
    return chosen - mx.logsumexp(scaled, axis=-1)


def entropy(logits: mx.array, *, temperature: float = 1.0) -> mx.array:
    """The exact entropy (..., T), in nats, of softmax(logits / temperature); logits must be finite."""
    scaled = _scaled(logits, temperature)
    log_normalizer = mx.logsumexp(scaled, axis=-1, keepdims=True)
    return log_normalizer.squeeze(-1) - (mx.exp(scaled - log_normalizer) * scaled).sum(axis=-1)


def _scaled(logits: mx.array, temperature: float) -> mx.array:
    logits = at_least_float32(logits)
    return logits if temperature == 1.0 else logits / temperature


def masked(x: mx.array, mask: mx.array) -> mx.array:
    """``x`` where the mask is 1 and exactly 0 elsewhere, whatever (inf and nan too) stood there."""
    return mx.where(mask.astype(mx.bool_), x, mx.zeros_like(x))


def masked_sum(x: mx.array, mask: mx.array, axis: int | None = None) -> mx.array:
    """The sum of ``x`` over the mask."""
    return masked(x, mask).sum(axis=axis)


def masked_mean(x: mx.array, mask: mx.array, axis: int | None = None) -> mx.array:
    """The mean of ``x`` over the mask; 0 where the mask is empty."""
    return masked_sum(x, mask, axis) / mx.maximum(mask.sum(axis=axis), 1).astype(x.dtype)


def row_mean(x: mx.array, mask: mx.array) -> mx.array:
    """The mean (B, 1) of each row over its mask."""
    return masked_mean(x, mask, axis=-1)[:, None]


def masked_extent(name: str, x: mx.array, mask: mx.array) -> dict[str, mx.array]:
    """``name``_min, _mean and _max of ``x`` over the mask; 0 where it is empty."""
    counted, mean = mask.astype(mx.bool_), masked_mean(x, mask)
    filled = mx.where(counted, x, mean)
    return {f"{name}_min": filled.min(), f"{name}_mean": mean, f"{name}_max": filled.max()}


def masked_variance(x: mx.array, mask: mx.array) -> mx.array:
    """The unbiased (n - 1) variance of ``x`` over the mask; 0 for fewer than two entries."""
    centred = x - masked_mean(x, mask)
    return masked_sum(centred * centred, mask) / mx.maximum(mask.sum() - 1, 1).astype(x.dtype)


def masked_whiten(x: mx.array, mask: mx.array, *, shift: Literal["zero_mean", "keep_mean"] = "zero_mean") -> mx.array:
    """``x`` scaled to unit variance over the whole mask, 0 outside it.

    ``keep_mean`` puts the mean back, as for rewards whose sign must survive.
    """
    mean = masked_mean(x, mask)
    whitened = (x - mean) * mx.rsqrt(masked_variance(x, mask) + 1e-8)
    return masked(whitened if shift == "zero_mean" else whitened + mean, mask)


def kl_estimate(logprobs: mx.array, ref_logprobs: mx.array, *, estimator: KLEstimator) -> mx.array:
    """Schulman's estimate of KL(policy || reference) at each sampled token, from x = ref - policy.

    k1 = -x, k2 = x^2 / 2, k3 = e^x - x - 1 (never negative). k3 is guarded: x within +-20, the value at most 10.
    """
    x = ref_logprobs - logprobs
    if estimator == "k1":
        return -x
    if estimator == "k2":
        return 0.5 * x * x
    if estimator == "k3":
        # The clip before exp keeps the gradient finite: a clip of the value alone leaves 0 * inf.
        x = mx.clip(x, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
        return mx.minimum(mx.exp(x) - x - 1, K3_LIMIT)
    raise NotImplementedError(f"KL estimator {estimator!r}; offered: k1, k2, k3")


def kl_penalty(
    logprobs: mx.array,
    ref_logprobs: mx.array,
    old_logprobs: mx.array | None,
    completion_mask: mx.array,
    *,
    estimator: KLEstimator = "k3",
    gradient: KLGradient = "unbiased",
) -> mx.array:
    """KL(policy || reference) at each counted token (B, T), 0 elsewhere, to be added to a loss.

    ``naive`` differentiates the estimate itself, which is not the gradient of the KL: k1's is 1, k3's is 1 - e^x.
    ``unbiased`` has the gradient r (logprobs - ref_logprobs), r = exp(logprobs - old_logprobs), which is that of k3
    times a differentiable ratio (DeepSeek-V3.2, arXiv:2512.02556) and cannot overflow this way. Its value is r times
    the estimate. Without ``old_logprobs`` r is 1: with one update a rollout they are the same.
    """
    # Mask first: where padding holds inf, 0 times its slope would be nan.
    logprobs, ref_logprobs = masked(logprobs, completion_mask), masked(ref_logprobs, completion_mask)
    value = kl_estimate(logprobs, ref_logprobs, estimator=estimator)
    if gradient == "naive":
        return value
    log_ratio = mx.zeros_like(logprobs) if old_logprobs is None else logprobs - masked(old_logprobs, completion_mask)
    ratio = mx.stop_gradient(mx.exp(mx.clip(log_ratio, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)))
    slope = mx.stop_gradient(logprobs - ref_logprobs)
    # Straight through: the value is the estimate's, the gradient comes from a term that is exactly 0.
    return ratio * (mx.stop_gradient(value) + slope * (logprobs - mx.stop_gradient(logprobs)))
