"""Losses to minimise: policy surrogates, value loss, NLL; and the aggregation that KL and entropy terms share.

A policy loss is ``sum(weights * loss per token)``: ``aggregation_weights`` puts the denominators of the whole
optimizer step into the weights, so that the losses (and gradients) of its micro-batches add up to those of the whole,
however it was split. Shapes: (B, T) on completion tokens, right-padded; advantages (B, 1) or (B, T). Every loss also
returns detached metrics, means over the counted tokens it was given. Left out: VESPO, LUSPO, DPPO, Clip-Cov.
"""

from typing import Literal, get_args

import mlx.core as mx

from mlx_ops.logprobs import LOG_RATIO_LIMIT, float_mask, masked, masked_extent, masked_mean, masked_variance, row_mean

Metrics = dict[str, mx.array]
Aggregation = Literal["token_mean", "sequence_mean", "dr_grpo", "sequence_sum", "token_sum"]
RatioLevel = Literal["token", "sequence"]
Number = float | mx.array


def aggregation_weights(
    completion_mask: mx.array,
    mode: Aggregation,
    *,
    total_tokens: Number | None = None,
    total_rows: Number | None = None,
    max_length: int | None = None,
) -> mx.array:
    """Weights (B, T) w with loss = sum(w * per-token loss), 0 outside the mask.

    token_mean: 1 / tokens (DAPO). sequence_mean: 1 / (row's tokens * rows) (GRPO). dr_grpo: 1 / (rows * max_length).
    sequence_sum: 1 / rows. token_sum: 1. ``total_tokens`` and ``total_rows`` are those of the whole optimizer step;
    left out, this batch is the whole step.
    """
    mask = float_mask(completion_mask)
    rows = mask.shape[0] if total_rows is None else total_rows
    if mode == "token_mean":
        return mask / mx.maximum(mask.sum() if total_tokens is None else total_tokens, 1)
    if mode == "sequence_mean":
        return mask / (mx.maximum(mask.sum(axis=-1, keepdims=True), 1) * mx.maximum(rows, 1))
    if mode == "dr_grpo":
        if max_length is None:
            raise ValueError("dr_grpo divides by a constant: give max_length, the cap on completion tokens")
        return mask / (mx.maximum(rows, 1) * max_length)
    if mode == "sequence_sum":
        return mask / mx.maximum(rows, 1)
    if mode == "token_sum":
        return mask
    raise NotImplementedError(f"aggregation {mode!r}; offered: {get_args(Aggregation)}")


def weighted_sum(per_token: mx.array, weights: mx.array) -> mx.array:
    """sum(weights * per_token), blind to whatever stands where the weight is 0."""
    return (masked(per_token, weights != 0) * weights).sum()


def without_truncated(completion_mask: mx.array, truncated: mx.array) -> mx.array:
    """Overlong filtering (DAPO, arXiv:2503.14476): the mask with rows emptied where ``truncated`` (B, 1) is 1."""
    return mx.where(truncated.astype(mx.bool_), mx.zeros_like(completion_mask), completion_mask)


def clipped_policy_loss(
    logprobs: mx.array,
    old_logprobs: mx.array,
    advantages: mx.array,
    completion_mask: mx.array,
    weights: mx.array,
    *,
    clip_range: tuple[float, float] = (0.2, 0.2),
    dual_clip: float | None = None,
    ratio_level: RatioLevel = "token",
    correction: mx.array | None = None,
) -> tuple[mx.array, Metrics]:
    """PPO's clipped surrogate (arXiv:1707.06347, eq. 7), the ratio clipped to [1 - low, 1 + high] of ``clip_range``.

    ``dual_clip`` c > 1 bounds the loss of a bad token at c |A| (arXiv:1912.09729). ``ratio_level="sequence"`` is
    GSPO's ratio (arXiv:2507.18071): the geometric mean over the row, each token with its own gradient. ``correction``
    (B, 1) or (B, T) multiplies the term: sampler correction, off-policy mask.
    """
    log_ratio = policy_log_ratio(logprobs, old_logprobs, completion_mask, level=ratio_level)
    ratio = mx.exp(log_ratio)
    low, high = 1 - clip_range[0], 1 + clip_range[1]
    per_token = mx.maximum(-advantages * ratio, -advantages * mx.clip(ratio, low, high))
    if dual_clip is not None:
        per_token = mx.where(advantages < 0, mx.minimum(per_token, -advantages * dual_clip), per_token)
    metrics = _clip_metrics(ratio, advantages, completion_mask, bounds=(low, high), dual_clip=dual_clip)
    metrics |= ratio_metrics(logprobs, old_logprobs, completion_mask)
    return weighted_sum(_corrected(per_token, correction), weights), metrics


def cispo_policy_loss(
    logprobs: mx.array,
    old_logprobs: mx.array,
    advantages: mx.array,
    completion_mask: mx.array,
    weights: mx.array,
    *,
    ratio_bounds: tuple[float, float] = (0.0, 5.0),
    correction: mx.array | None = None,
) -> tuple[mx.array, Metrics]:
    """CISPO (arXiv:2506.13585): -sg(ratio held within ``ratio_bounds``) A log p; every token keeps a gradient."""
    ratio = mx.exp(policy_log_ratio(logprobs, old_logprobs, completion_mask))
    held = mx.stop_gradient(mx.clip(ratio, *ratio_bounds))
    metrics = _clip_metrics(ratio, advantages, completion_mask, bounds=ratio_bounds, dual_clip=None)
    metrics |= ratio_metrics(logprobs, old_logprobs, completion_mask)
    return weighted_sum(_corrected(-held * advantages * logprobs, correction), weights), metrics


def sapo_policy_loss(
    logprobs: mx.array,
    old_logprobs: mx.array,
    advantages: mx.array,
    completion_mask: mx.array,
    weights: mx.array,
    *,
    temperatures: tuple[float, float] = (1.0, 1.05),
    correction: mx.array | None = None,
) -> tuple[mx.array, Metrics]:
    """SAPO (arXiv:2511.20347): -A (4 / tau) sigmoid(tau (ratio - 1)); ``temperatures`` are tau for A > 0 and else."""
    ratio = mx.exp(policy_log_ratio(logprobs, old_logprobs, completion_mask))
    positive, other = (mx.array(value, dtype=ratio.dtype) for value in temperatures)
    tau = mx.where(advantages > 0, positive, other)
    per_token = -advantages * (4 / tau) * mx.sigmoid(tau * (ratio - 1))
    metrics = ratio_metrics(logprobs, old_logprobs, completion_mask)
    return weighted_sum(_corrected(per_token, correction), weights), metrics


def plain_policy_loss(
    logprobs: mx.array,
    old_logprobs: mx.array,
    advantages: mx.array,
    completion_mask: mx.array,
    weights: mx.array,
    *,
    correction: mx.array | None = None,
) -> tuple[mx.array, Metrics]:
    """REINFORCE's -A log p, without a ratio; ``old_logprobs`` serve the metrics only."""
    per_token = _corrected(-advantages * logprobs, correction)
    return weighted_sum(per_token, weights), ratio_metrics(logprobs, old_logprobs, completion_mask)


def geometric_policy_loss(
    logprobs: mx.array,
    old_logprobs: mx.array,
    advantages: mx.array,
    completion_mask: mx.array,
    weights: mx.array,
    *,
    clip_range: tuple[float, float] = (0.4, 0.4),
    correction: mx.array | None = None,
) -> tuple[mx.array, Metrics]:
    """GMPO (arXiv:2507.20673): -A times the geometric mean of the row's ratios, each clipped in log space."""
    log_ratio = policy_log_ratio(logprobs, old_logprobs, completion_mask)
    clipped = mx.clip(log_ratio, -clip_range[0], clip_range[1])
    sign = mx.sign(advantages)
    pessimistic = sign * mx.minimum(sign * log_ratio, sign * clipped)
    ratio = mx.exp(row_mean(pessimistic, completion_mask))
    row_advantages = row_mean(mx.broadcast_to(advantages, log_ratio.shape), completion_mask)
    per_token = mx.broadcast_to(-row_advantages * ratio, log_ratio.shape)
    metrics = ratio_metrics(logprobs, old_logprobs, completion_mask)
    return weighted_sum(_corrected(per_token, correction), weights), metrics


def policy_log_ratio(
    logprobs: mx.array, old_logprobs: mx.array, completion_mask: mx.array, *, level: RatioLevel = "token"
) -> mx.array:
    """log(policy / old policy), (B, T), 0 outside the mask and held within +-20.

    At the sequence level every token of a row has the row's mean, and the gradient of its own log-probability alone:
    with one advantage a row this is the gradient of GSPO, and it stays right with one a token.
    """
    # Mask before exp: padding holds garbage, and inf * 0 is nan.
    log_ratio = masked(logprobs - old_logprobs, completion_mask)
    if level == "sequence":
        own = masked(logprobs - mx.stop_gradient(logprobs), completion_mask)
        log_ratio = mx.stop_gradient(row_mean(log_ratio, completion_mask)) + own
    return mx.clip(log_ratio, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


def clipped_value_loss(
    values: mx.array,
    old_values: mx.array,
    returns: mx.array,
    completion_mask: mx.array,
    weights: mx.array,
    *,
    clip_range: float | None = 0.2,
) -> tuple[mx.array, Metrics]:
    """Half the squared error to the returns: the larger of the values' and of that of values held near the old ones."""
    unclipped = masked(values - returns, completion_mask) ** 2
    if clip_range is None:
        return 0.5 * weighted_sum(unclipped, weights), {"value_clip_fraction": mx.array(0.0)}
    held = mx.clip(values, old_values - clip_range, old_values + clip_range)
    clipped = masked(held - returns, completion_mask) ** 2
    fraction = _fraction(mx.stop_gradient(clipped > unclipped), completion_mask)
    return 0.5 * weighted_sum(mx.maximum(unclipped, clipped), weights), {"value_clip_fraction": fraction}


def nll_loss(logprobs: mx.array, weights: mx.array) -> tuple[mx.array, Metrics]:
    """The negative log-likelihood -sum(w log p); with token_mean weights, the mean over the step's tokens."""
    return weighted_sum(-logprobs, weights), {}


def dft_loss(logprobs: mx.array, weights: mx.array) -> tuple[mx.array, Metrics]:
    """Dynamic fine-tuning (arXiv:2508.05629): -sum(w sg(p) log p)."""
    probabilities = mx.stop_gradient(mx.exp(mx.minimum(logprobs, 0.0)))
    return weighted_sum(-probabilities * logprobs, weights), {}


def _corrected(per_token: mx.array, correction: mx.array | None) -> mx.array:
    return per_token if correction is None else per_token * mx.stop_gradient(correction)


def _fraction(condition: mx.array, mask: mx.array) -> mx.array:
    return masked_mean(mx.broadcast_to(float_mask(condition), mask.shape), mask)


def _clip_metrics(
    ratio: mx.array,
    advantages: mx.array,
    completion_mask: mx.array,
    *,
    bounds: tuple[float, float],
    dual_clip: float | None,
) -> Metrics:
    """Shares of counted tokens where the clip is active: low side (A < 0), high side (A > 0), either, dual clip."""
    low = (ratio < bounds[0]) & (advantages < 0)
    high = (ratio > bounds[1]) & (advantages > 0)
    dual = (advantages < 0) & (ratio > (float("inf") if dual_clip is None else dual_clip))
    shares = {"": low | high, "_low": low, "_high": high, "_dual": dual}
    return {f"clip_fraction{side}": _fraction(share, completion_mask) for side, share in shares.items()}


def ratio_metrics(logprobs: mx.array, old_logprobs: mx.array, completion_mask: mx.array) -> Metrics:
    """Token ratio min, mean, max, and the KL(old || policy) estimates k1 = old - policy and k3 = r - 1 - log r."""
    log_ratio = mx.stop_gradient(policy_log_ratio(logprobs, old_logprobs, completion_mask))
    ratio = mx.exp(log_ratio)
    return masked_extent("ratio", ratio, completion_mask) | {
        "approx_kl_k1": masked_mean(-log_ratio, completion_mask),
        "approx_kl_k3": masked_mean(ratio - 1 - log_ratio, completion_mask),
    }


def value_metrics(values: mx.array, returns: mx.array, completion_mask: mx.array) -> Metrics:
    """Mean, min and max of values and returns, and explained_variance = 1 - Var(returns - values) / Var(returns)."""
    residual = masked_variance(returns - values, completion_mask)
    metrics = {"explained_variance": 1 - residual / (masked_variance(returns, completion_mask) + 1e-5)}
    for name, x in {"value": values, "return": returns}.items():
        metrics |= masked_extent(name, x, completion_mask)
    return {name: mx.stop_gradient(value) for name, value in metrics.items()}
