"""The loss of a policy on a microbatch: a surrogate, the KL penalty, the entropy bonus, and what is measured with them.

The parts are `policy_loss`, `kl_loss` and `entropy_loss` among the metrics, and add up to the loss.
"""

from collections.abc import Callable

import mlx.core as mx

from configs.schema import PolicyConfig
from mlx_ops.corrections import off_policy_mask, sampler_correction, sampler_metrics
from mlx_ops.logprobs import entropy, kl_estimate, kl_penalty, masked, masked_mean, token_logprobs
from mlx_ops.losses import RatioLevel, clipped_policy_loss, weighted_sum
from mlx_ops.policy import PolicyBatch

Metrics = dict[str, mx.array]
Surrogate = Callable[[mx.array, mx.array, PolicyBatch], tuple[mx.array, Metrics]]
"""(logprobs (B, T), old_logprobs (B, T), batch) -> loss, metrics."""

ROW_GAP = "rows/logprob_difference"


def full_loss(
    logits: mx.array, batch: PolicyBatch, config: PolicyConfig, surrogate: Surrogate, *, kl_coef: float | mx.array
) -> tuple[mx.array, Metrics]:
    """The surrogate with its penalties, from logits (B, T, V); `kl_coef` 0 measures the KL alone."""
    temperature, mask = config.sampling.temperature, batch.completion_mask
    logprobs = token_logprobs(logits, batch.rows.completion_tokens, temperature=temperature)
    old = mx.stop_gradient(logprobs) if batch.old_logprobs is None else batch.old_logprobs
    loss, metrics = surrogate(logprobs, old, batch)
    metrics |= {"policy_loss": mx.stop_gradient(loss), "tokens": mask.sum(), ROW_GAP: row_gaps(old, batch)}
    metrics |= sampler_metrics(old, batch.sampler_logprobs, mask)
    if batch.ref_logprobs is not None:
        penalty = kl_penalty(logprobs, batch.ref_logprobs, old, mask, estimator=config.kl_estimator)
        metrics |= _kl_metrics(logprobs, batch.ref_logprobs, penalty, mask)
        # An array has no value in a trace.
        if isinstance(kl_coef, mx.array) or kl_coef:
            share = kl_coef * weighted_sum(penalty, batch.weights)
            metrics["kl_loss"] = mx.stop_gradient(share)
            loss = loss + share
    if config.entropy_coef:
        entropies = entropy(logits, temperature=temperature)
        share = -config.entropy_coef * weighted_sum(entropies, batch.weights)
        metrics |= {"entropy_loss": mx.stop_gradient(share), "entropy": mx.stop_gradient(masked_mean(entropies, mask))}
        loss = loss + share
    else:
        metrics["entropy"] = probed_entropy(mx.stop_gradient(logits), batch, temperature)
    return loss, metrics


def probed_entropy(logits: mx.array, batch: PolicyBatch, temperature: float) -> mx.array:
    """The mean of the exact entropies at the batch's probes."""
    flat = logits.reshape(-1, logits.shape[-1])
    return entropy(mx.take(flat, batch.probes, axis=0), temperature=temperature).mean()


def row_gaps(old: mx.array, batch: PolicyBatch) -> mx.array:
    """The mean (B,) of |trainer - sampler| log-probability over each row's completion."""
    mask = batch.rows.completion_mask
    return masked_mean(mx.abs(masked(mx.stop_gradient(old) - batch.sampler_logprobs, mask)), mask, axis=-1)


def _kl_metrics(logprobs: mx.array, ref_logprobs: mx.array, penalty: mx.array, mask: mx.array) -> Metrics:
    estimates = {f"kl_{name}": kl_estimate(logprobs, ref_logprobs, estimator=name) for name in ("k1", "k3")}
    return {name: mx.stop_gradient(masked_mean(value, mask)) for name, value in (estimates | {"kl": penalty}).items()}


def correction(logprobs: mx.array, old: mx.array, batch: PolicyBatch, config: PolicyConfig) -> mx.array | None:
    """The configured weights (B, T) or (B, 1) for what was drawn from another distribution than the one trained."""
    wanted, threshold, mask = config.importance_correction, config.off_policy_threshold, batch.completion_mask
    weights = None
    if wanted is not None:
        bounds = (wanted.low, wanted.high)
        weights = sampler_correction(
            old, batch.sampler_logprobs, mask, level=wanted.level, mode=wanted.mode, bounds=bounds
        )
    if threshold is None:
        return weights
    kept = off_policy_mask(logprobs, batch.sampler_logprobs, batch.advantages, mask, threshold=threshold)
    return kept if weights is None else weights * kept


def clip_bounds(config: PolicyConfig) -> tuple[float, float]:
    """How far below and above 1 the ratio may move."""
    return config.clip_range, config.clip_range if config.clip_range_high is None else config.clip_range_high


def clip_surrogate(
    logprobs: mx.array, old: mx.array, batch: PolicyBatch, config: PolicyConfig, ratio_level: RatioLevel = "token"
) -> tuple[mx.array, Metrics]:
    """PPO's clipped surrogate, with the sampler's correction in it."""
    return clipped_policy_loss(
        *(logprobs, old, batch.advantages, batch.completion_mask, batch.weights),
        clip_range=clip_bounds(config),
        dual_clip=config.dual_clip,
        ratio_level=ratio_level,
        correction=correction(logprobs, old, batch, config),
    )
