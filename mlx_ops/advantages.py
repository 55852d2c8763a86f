"""Advantages: from the rewards of groups (one number a rollout, on the host) and from token rewards and values (B, T).

Group statistics are NumPy float64. The B = P * G rollouts stand in group order, row p * G + g for completion g of
prompt p. A reward that is nan (or None) was not scored: it stays out of every statistic and its advantage is 0. Left
out: pass@k, MaxRL, optimal token baselines, ReMax.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import mlx.core as mx
import numpy as np
from numpy.typing import ArrayLike, NDArray

from mlx_ops.logprobs import KLEstimator, float_mask, kl_estimate, masked, masked_whiten

Floats = NDArray[np.float64]
Rewards = ArrayLike | Sequence[float | None]
"""One number a rollout, (B,)."""
RewardTable = ArrayLike | Sequence[Sequence[float | None]]
"""K numbers a rollout, (B, K)."""
Scale = Literal["group", "batch", "none"]

CONSTANT_TOLERANCE = 1e-6
"""Rewards no further apart than this (times the largest, above 1) are equal: float32 rounding is no signal."""


def reward_array(rewards: Rewards | RewardTable) -> Floats:
    """Rewards in float64, with nan for None."""
    return np.asarray(rewards, dtype=np.float64)


def as_column(values: ArrayLike) -> mx.array:
    """One number a rollout, (B,), as (B, 1) float32 for the losses."""
    return mx.array(np.asarray(values, dtype=np.float32)[:, None])


def constant_groups(rewards: Rewards, group_size: int, *, tolerance: float = CONSTANT_TOLERANCE) -> NDArray[np.bool_]:
    """For each of the P groups, whether its scored rewards are all the same (also where fewer than two were scored)."""
    groups = _grouped(rewards, group_size)
    spread = np.nanmax(groups, axis=1, initial=-np.inf) - np.nanmin(groups, axis=1, initial=np.inf)
    magnitude = np.nanmax(np.abs(groups), axis=1, initial=1.0)
    return spread <= tolerance * magnitude


def group_advantages(rewards: Rewards, group_size: int, *, scale: Scale = "group", eps: float = 1e-4) -> Floats:
    """GRPO's advantage (arXiv:2402.03300), (B,): the reward minus its group's mean, over (std + eps).

    ``scale``: the group's unbiased std, that of all rewards (``batch``, arXiv:2508.08221), or ``none`` (Dr. GRPO,
    arXiv:2503.20783). A constant group gives exactly 0.
    """
    groups = _grouped(rewards, group_size)
    centred = _centred(groups, group_size)
    if scale == "group":
        centred /= _std(groups, axis=1)[:, None] + eps
    elif scale == "batch":
        centred /= _std(groups.reshape(1, -1), axis=1) + eps
    return _scored_only(centred.reshape(-1))


def leave_one_out_advantages(
    rewards: Rewards, group_size: int, *, scale: Literal["batch", "none"] = "none", eps: float = 1e-4
) -> Floats:
    """RLOO (arXiv:2402.14740), (B,): the reward minus the mean of the others of its group.

    ``scale="batch"`` normalises over the batch.
    """
    groups = _grouped(rewards, group_size)
    scored = (~np.isnan(groups)).sum(axis=1, keepdims=True)
    advantages = (_centred(groups, group_size) * scored / np.maximum(scored - 1, 1)).reshape(-1)
    return _scored_only(advantages if scale == "none" else _normalized(advantages, eps))


def length_weighted_advantages(rewards: Rewards, lengths: ArrayLike, group_size: int) -> Floats:
    """OPO (arXiv:2505.23585), (B,): the reward minus its group's mean weighted by completion length (B,)."""
    groups = _grouped(rewards, group_size)
    weights = np.where(np.isnan(groups), 0.0, _grouped(lengths, group_size))
    baseline = np.nansum(weights * groups, axis=1) / np.maximum(weights.sum(axis=1), 1.0)
    centred = groups - baseline[:, None]
    centred[constant_groups(rewards, group_size)] = 0.0
    return _scored_only(centred.reshape(-1))


def total_rewards(rewards: RewardTable, weights: ArrayLike) -> Floats:
    """The weighted sum (B,) of rewards (B, K), unscored ones left out; nan where none that weighs was scored."""
    rewards, weights = reward_array(rewards), reward_array(weights)
    unscored = np.isnan(rewards[:, weights != 0]).all(axis=1)
    return np.where(unscored, np.nan, np.nansum(rewards * weights, axis=1))


def multi_reward_advantages(
    rewards: RewardTable,
    weights: ArrayLike,
    group_size: int,
    *,
    order: Literal["sum_then_normalize", "normalize_then_sum"] = "sum_then_normalize",
    scale: Scale = "group",
    eps: float = 1e-4,
) -> Floats:
    """Advantages (B,) from several rewards (B, K) and their weights (K,).

    ``normalize_then_sum`` is GDPO (arXiv:2601.05242): each reward's group advantage, their weighted sum, normalised
    over the batch.
    """
    totals = total_rewards(rewards, weights)
    if order == "sum_then_normalize":
        return group_advantages(totals, group_size, scale=scale, eps=eps)
    columns = reward_array(rewards).T
    parts = np.stack([group_advantages(column, group_size, eps=eps) for column in columns], axis=1)
    summed = np.where(np.isnan(totals), np.nan, parts @ reward_array(weights))
    # Every group sums to 0, so the batch's mean is 0: subtracting its rounding error would move constant groups off 0.
    return _scored_only(summed / (_std(summed, axis=0) + eps))


def _scored_only(advantages: Floats) -> Floats:
    return np.where(np.isnan(advantages), 0.0, advantages)


def _grouped(values: Rewards, group_size: int) -> Floats:
    flat = reward_array(values)
    if flat.ndim != 1 or flat.size % group_size:
        raise ValueError(f"expected (B,) with B a multiple of the group size {group_size}, got shape {flat.shape}")
    return flat.reshape(-1, group_size)


def _centred(groups: Floats, group_size: int) -> Floats:
    scored = ~np.isnan(groups)
    mean = np.nansum(groups, axis=1) / np.maximum(scored.sum(axis=1), 1)
    centred = groups - mean[:, None]
    # The mean of equal numbers may miss them by a bit, and a division by the std would make that a full-size advantage.
    centred[constant_groups(groups.reshape(-1), group_size)] = 0.0
    return centred


def _std(values: Floats, axis: int) -> Floats:
    """The unbiased std over scored entries; 0 for fewer than two."""
    count = (~np.isnan(values)).sum(axis=axis, keepdims=True)
    mean = np.nansum(values, axis=axis, keepdims=True) / np.maximum(count, 1)
    squares = np.nansum((values - mean) ** 2, axis=axis, keepdims=True)
    return np.sqrt(squares / np.maximum(count - 1, 1)).squeeze(axis)


def _normalized(values: Floats, eps: float) -> Floats:
    if constant_groups(values, values.size).all():
        return np.where(np.isnan(values), np.nan, 0.0)
    return (values - np.nanmean(values)) / (_std(values, axis=0) + eps)


def token_rewards(
    scores: mx.array, completion_mask: mx.array, *, token_kl: mx.array | None = None, kl_coef: float = 0.0
) -> mx.array:
    """Rewards (B, T): -kl_coef * token_kl at every counted token, plus the score (B, 1) at the last one."""
    length = completion_mask.shape[-1]
    positions = mx.arange(1, length + 1) * completion_mask.astype(mx.int32)
    last = (positions == positions.max(axis=-1, keepdims=True)) & (positions > 0)
    rewards = mx.where(last, scores, mx.zeros_like(scores))
    return rewards if token_kl is None else rewards - kl_coef * masked(token_kl, completion_mask)


def kl_in_reward(
    scores: mx.array,
    old_logprobs: mx.array,
    ref_logprobs: mx.array,
    completion_mask: mx.array,
    *,
    kl_coef: float,
    estimator: KLEstimator = "k1",
) -> mx.array:
    """Token rewards (B, T) with the KL to the reference taken off at every token (arXiv:1909.08593, eq. 2)."""
    token_kl = kl_estimate(old_logprobs, ref_logprobs, estimator=estimator)
    return token_rewards(scores, completion_mask, token_kl=token_kl, kl_coef=kl_coef)


def rewards_to_go(rewards: mx.array, completion_mask: mx.array, *, gamma: float = 1.0) -> mx.array:
    """The discounted sum (B, T) of the rewards from each counted token on; holes in the mask cost no discount."""
    zeros = mx.zeros_like(rewards)
    return gae(rewards, zeros, completion_mask, gamma=gamma, gae_lambda=1.0)[0]


def gae(
    rewards: mx.array, values: mx.array, completion_mask: mx.array, *, gamma: float = 1.0, gae_lambda: float = 0.95
) -> tuple[mx.array, mx.array]:
    """Generalised advantage estimates (arXiv:1506.02438, eq. 16) and returns A + V, both (B, T), 0 outside the mask.

    ``values[t]`` is of the state before token t. Where the mask is 0 (padding, tool output) value and advantage of
    the next counted token are carried through, so that a hole is no step.
    """
    mask = float_mask(completion_mask)
    rewards, values = masked(rewards, mask), masked(values, mask)
    next_values = _shifted(_suffix_sums(values, 1 - mask), 1)
    deltas = masked(rewards + gamma * next_values - values, mask)
    decay = mask * (gamma * gae_lambda) + (1 - mask)
    advantages = masked(_suffix_sums(deltas, decay), mask)
    return advantages, advantages + values


def _suffix_sums(x: mx.array, decay: mx.array) -> mx.array:
    """s (B, T) with s[t] = x[t] + decay[t] * s[t + 1], by doubling: log2(T) operations in a row instead of T."""
    step = 1
    while step < x.shape[1]:
        x = x + decay * _shifted(x, step)
        decay = decay * _shifted(decay, step)
        step *= 2
    return x


def _shifted(x: mx.array, steps: int) -> mx.array:
    """Column t + steps at t, 0 past the end."""
    return mx.pad(x[:, steps:], [(0, 0), (0, steps)])


def reinforce_plus_plus(
    rewards: mx.array, completion_mask: mx.array, *, gamma: float = 1.0
) -> tuple[mx.array, mx.array]:
    """REINFORCE++ (arXiv:2501.03262): rewards-to-go whitened over the batch's tokens, and the rewards-to-go."""
    returns = rewards_to_go(rewards, completion_mask, gamma=gamma)
    return masked_whiten(returns, completion_mask), returns


def reinforce_plus_plus_baseline(rewards: Rewards, completion_mask: mx.array, group_size: int) -> mx.array:
    """REINFORCE++ with a baseline (B, T): R - the group's mean on each token, whitened over the batch's tokens."""
    mask = float_mask(completion_mask)
    centred = mx.array(group_advantages(rewards, group_size, scale="none")[:, None], dtype=mask.dtype)
    return masked_whiten(mx.broadcast_to(centred, mask.shape), mask)


@dataclass(frozen=True)
class AdaptiveKL:
    """A KL coefficient that follows a target (arXiv:1909.08593, §2.2)."""

    coef: float
    target: float = 0.1
    horizon: int = 10_000

    def update(self, kl: float, *, samples: int) -> "AdaptiveKL":
        """The controller after ``samples`` rollouts of mean KL ``kl``; the relative error is held within 20 %."""
        error = min(max(kl / self.target - 1.0, -0.2), 0.2)
        return replace(self, coef=self.coef * (1.0 + error * samples / self.horizon))
