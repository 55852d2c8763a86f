"""Corrections for a sampler whose probabilities are not the trainer's: importance weights, masks, metrics.

Weights and (B, 1) masks go into a policy loss as its ``correction``; a completion mask goes before
``aggregation_weights``. Everything here is detached. Log-probabilities are those of the sampled tokens, (B, T).
"""

import math
from typing import Literal

import mlx.core as mx

from mlx_ops.logprobs import LOG_RATIO_LIMIT, KLEstimator, float_mask, masked, masked_mean, row_mean


def sampler_correction(
    old_logprobs: mx.array,
    sampler_logprobs: mx.array,
    completion_mask: mx.array,
    *,
    level: Literal["token", "sequence"],
    mode: Literal["truncate", "mask"],
    bounds: tuple[float | None, float | None] = (None, 3.0),
) -> mx.array:
    """Importance weights (B, T) of the trainer's policy over the sampler's, detached, 0 outside the completion mask.

    At the sequence level the ratio is the product over the row. ``truncate`` holds a weight within the bounds,
    ``mask`` sets it to 0 outside them. A token whose log-probability is nan on either side weighs 1 (adds nothing to
    its row).
    """
    log_ratio = _log_ratio(old_logprobs, sampler_logprobs, completion_mask)
    if level == "sequence":
        log_ratio = mx.broadcast_to(log_ratio.sum(axis=-1, keepdims=True), log_ratio.shape)
    ratio = mx.exp(mx.clip(log_ratio, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT))
    low = 0.0 if bounds[0] is None else bounds[0]
    high = float("inf") if bounds[1] is None else bounds[1]
    weights = mx.clip(ratio, low, high) if mode == "truncate" else masked(ratio, (ratio >= low) & (ratio <= high))
    return masked(weights, completion_mask)


def off_policy_mask(
    logprobs: mx.array, sampler_logprobs: mx.array, advantages: mx.array, completion_mask: mx.array, *, threshold: float
) -> mx.array:
    """(B, 1), 0 for rows with a mean A < 0 whose mean of sampler - policy exceeds the threshold (DeepSeek-V3.2)."""
    drift = row_mean(mx.stop_gradient(sampler_logprobs - logprobs), completion_mask)
    mean = row_mean(mx.broadcast_to(advantages, logprobs.shape), completion_mask)
    dropped = (mean < 0) & (drift > threshold)
    return 1 - float_mask(dropped)


def rejection_mask(
    old_logprobs: mx.array,
    sampler_logprobs: mx.array,
    completion_mask: mx.array,
    *,
    level: Literal["token", "sequence_sum", "sequence_mean", "sequence_max"],
    estimator: KLEstimator,
    bounds: tuple[float | None, float],
) -> mx.array:
    """The completion mask (B, T) without the tokens, or rows, whose sampler-to-trainer divergence leaves the bounds.

    k1 is judged as a ratio: its exponential must lie within the bounds (low None: 1 / high). k2 and k3 must not
    exceed high. ``sequence_mean`` is the gate for long rows; a sum grows with length.
    """
    log_ratio = _log_ratio(old_logprobs, sampler_logprobs, completion_mask)
    divergence = _divergence(log_ratio, estimator)
    if level == "sequence_sum":
        divergence = divergence.sum(axis=-1, keepdims=True)
    elif level == "sequence_mean":
        divergence = row_mean(divergence, completion_mask)
    elif level == "sequence_max":
        divergence = divergence.max(axis=-1, keepdims=True)
    low, high = bounds
    if estimator == "k1":
        low, high = -math.log(high) if low is None else math.log(low), math.log(high)
        kept = (divergence >= low) & (divergence <= high)
    else:
        kept = divergence <= high
    return mx.where(kept, completion_mask, mx.zeros_like(completion_mask))


def _log_ratio(old_logprobs: mx.array, sampler_logprobs: mx.array, completion_mask: mx.array) -> mx.array:
    """log(trainer / sampler), detached, held within +-20; 0 outside the mask and where either side is nan."""
    difference = mx.stop_gradient(old_logprobs - sampler_logprobs)
    log_ratio = masked(difference, completion_mask * (difference == difference))
    return mx.clip(log_ratio, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


def _divergence(log_ratio: mx.array, estimator: KLEstimator) -> mx.array:
    """KL(sampler || trainer) per token; unlike the penalty's k3 not capped, since large is what is looked for."""
    estimates = {"k1": -log_ratio, "k2": 0.5 * log_ratio * log_ratio, "k3": mx.exp(log_ratio) - 1 - log_ratio}
    return estimates[estimator]


def sampler_metrics(
    old_logprobs: mx.array, sampler_logprobs: mx.array, completion_mask: mx.array
) -> dict[str, mx.array]:
    """Mean and largest |trainer - sampler| log-probability difference of counted tokens, and the mean of exp of it."""
    gap = mx.abs(_log_ratio(old_logprobs, sampler_logprobs, completion_mask))
    return {
        "sampler_gap_mean": masked_mean(gap, completion_mask),
        "sampler_gap_max": gap.max(),
        "sampler_gap_factor": masked_mean(mx.exp(gap), completion_mask),
    }
