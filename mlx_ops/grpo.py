"""GRPO and its family: group-relative advantages, a clipped surrogate, no critic.

One step: P prompts × G completions are drawn and judged; groups without signal are left out of the computation (their
advantages are exactly 0, so that changes no gradient); the rest is updated on in minibatches of whole groups.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from configs.schema import GRPOConfig
from mlx_ops.advantages import (
    as_column,
    constant_groups,
    group_advantages,
    leave_one_out_advantages,
    length_weighted_advantages,
    multi_reward_advantages,
    reinforce_plus_plus,
    reinforce_plus_plus_baseline,
    token_rewards,
)
from mlx_ops.algorithm import AlgorithmRegistry, PolicyTrainer
from mlx_ops.batching import Rollout, pad_floats
from mlx_ops.forward import completion_logits
from mlx_ops.losses import cispo_policy_loss, plain_policy_loss, sapo_policy_loss
from mlx_ops.policy import PolicyBatch, Row, make_row, split, totals
from mlx_ops.policy_loss import clip_bounds, clip_surrogate, correction, full_loss
from mlx_ops.rollout import Group, rollout_metrics, sample_rows
from mlx_ops.trainer import Metrics


@dataclass(frozen=True)
class Judged:
    """The groups of a step and what was counted on the way."""

    groups: list[Group]
    signal: np.ndarray  # P, whether the group's advantages can differ from 0
    metrics: Metrics


@AlgorithmRegistry.register("grpo")
class GRPOTrainer(PolicyTrainer[GRPOConfig]):
    """Trains on groups of completions of the same prompt."""

    compilable = True

    def collect(self, step: int) -> tuple[Iterable[Sequence[PolicyBatch]], Metrics]:
        judged = self._draw_groups()
        metrics = rollout_metrics(judged.groups, self.task_reward) | judged.metrics
        advantages = self._kept(self._advantages(judged.groups), judged.signal)
        rows = self._rows(judged.groups, advantages)
        live = {index: group for index, group in enumerate(rows) if self._moves_without_signal or _moves(group)}
        flat, seconds = self.scored([row for group in live.values() for row in group], old=self._needs_old)
        scored = iter(flat)
        live = {index: [next(scored) for _ in group] for index, group in live.items()}
        samples = sample_rows(judged.groups, [float(row[0]) for row in advantages], step + 1)
        return self.played(self._minibatches(rows, live, step), samples, step), metrics | seconds

    def loss(self, model: nn.Module, batch: PolicyBatch) -> tuple[mx.array, Mapping[str, mx.array]]:
        def surrogate(logprobs: mx.array, old: mx.array, batch: PolicyBatch) -> tuple[mx.array, dict[str, mx.array]]:
            return grpo_surrogate(logprobs, old, batch, self.config)

        return full_loss(
            completion_logits(model, batch.rows), batch, self.config, surrogate, kl_coef=self.config.kl_coef
        )

    @property
    def _needs_old(self) -> bool:
        """More than one update of a rollout: the policy that sampled is not the one that is updated."""
        return self.config.updates_per_step > 1

    @property
    def _moves_without_signal(self) -> bool:
        return self.config.kl_coef > 0 or self.config.entropy_coef > 0

    def _draw_groups(self) -> Judged:
        """A step's groups; with dynamic sampling, further rounds replace those without signal (arXiv:2503.14476)."""
        config = self.config
        groups, signal, seconds = self._draw(config.prompts_per_step)
        replaced = rounds = 0
        while rounds < config.dynamic_sampling and not signal.all():
            missing = int((~signal).sum())
            more, more_signal, more_seconds = self._draw(missing)
            slots = np.flatnonzero(~signal)
            for slot, group, useful in zip(slots, more, more_signal, strict=True):
                if useful:
                    groups[slot], signal[slot] = group, True
                    replaced += 1
            seconds = {name: seconds[name] + more_seconds[name] for name in seconds}
            rounds += 1
        counts = {
            "groups_without_signal": float((~signal).mean()),
            "groups_replaced": float(replaced),
            "sampling_rounds": float(1 + rounds),
        }
        return Judged(groups, signal, seconds | counts)

    def _draw(self, prompts: int) -> tuple[list[Group], np.ndarray, Metrics]:
        groups, seconds = self.rollouts(prompts)
        drawn = sum(len(rollout.completion.tokens) for group in groups for rollout in group)
        return groups, self._has_signal(groups), seconds | {"tokens_generated": float(drawn)}

    def _has_signal(self, groups: Sequence[Group]) -> np.ndarray:
        size = self.config.group_size
        signal = ~constant_groups(_totals(groups), size)
        if self.config.dynamic_sampling:
            # A shaped reward varies even in groups that all fail: only the task reward says what can be learnt.
            signal &= ~constant_groups(_part(groups, self.task_reward), size)
        return signal

    def _advantages(self, groups: Sequence[Group]) -> list[np.ndarray]:
        """One advantage a token for each of the B rows."""
        config = self.config
        size, rewards = config.group_size, _totals(groups)
        lengths = [len(row.completion.tokens) for group in groups for row in group]
        if config.reward_aggregation == "normalize_then_sum":
            parts = np.stack([_part(groups, name) for name in self.weights], axis=1)
            flat = multi_reward_advantages(
                parts, list(self.weights.values()), size, order="normalize_then_sum", scale=config.scale_advantages
            )
        elif config.advantage == "leave_one_out":
            flat = leave_one_out_advantages(
                rewards, size, scale="batch" if config.scale_advantages == "batch" else "none"
            )
        elif config.advantage == "opo":
            flat = length_weighted_advantages(rewards, lengths, size)
        elif config.advantage in ("reinforce_plus_plus", "reinforce_plus_plus_baseline"):
            whitened = whitened_over_tokens(rewards, lengths, size, baseline=config.advantage.endswith("_baseline"))
            return [row[:length] for row, length in zip(whitened, lengths, strict=True)]
        else:
            flat = group_advantages(rewards, size, scale=config.scale_advantages)
        return [np.full(length, value) for value, length in zip(flat, lengths, strict=True)]

    def _kept(self, advantages: list[np.ndarray], signal: np.ndarray) -> list[np.ndarray]:
        """The advantages, 0 in groups that dynamic sampling wanted to replace and couldn't."""
        if not self.config.dynamic_sampling:
            return advantages
        return [own * float(signal[place // self.config.group_size]) for place, own in enumerate(advantages)]

    def _rows(self, groups: Sequence[Group], advantages: Sequence[np.ndarray]) -> list[list[Row]]:
        flat = enumerate(advantages)

        def row(rollout: Rollout) -> Row:
            place, own = next(flat)
            return make_row(rollout, own, mask_truncated=self.config.mask_truncated, place=place)

        return [[row(rollout) for rollout in group] for group in groups]

    def _minibatches(
        self, rows: Sequence[Sequence[Row]], scored: Mapping[int, Sequence[Row]], step: int
    ) -> list[list[PolicyBatch]]:
        config, order = self.config, np.random.default_rng([self.seed, step])
        found = []
        for _ in range(config.epochs):
            for part in split(len(rows), config.minibatches, order):
                live = [row for index in part if index in scored for row in scored[index]]
                # Adam would make full steps of the rounding noise of a gradient that is zero.
                if any(row.counts for row in live):
                    everything = [row for index in part for row in rows[index]]
                    found.append(self.minibatch(live, totals(everything)))
        return found


def grpo_surrogate(
    logprobs: mx.array, old: mx.array, batch: PolicyBatch, config: GRPOConfig
) -> tuple[mx.array, dict[str, mx.array]]:
    """The surrogate that `loss` and `ratio_level` name, with the sampler's correction in it."""
    if config.loss == "clip":
        return clip_surrogate(logprobs, old, batch, config, config.ratio_level)
    arrays = (logprobs, old, batch.advantages, batch.completion_mask, batch.weights)
    weights = correction(logprobs, old, batch, config)
    if config.loss == "cispo":
        return cispo_policy_loss(*arrays, ratio_bounds=(0.0, 1 + clip_bounds(config)[1]), correction=weights)
    if config.loss == "sapo":
        return sapo_policy_loss(*arrays, correction=weights)
    return plain_policy_loss(*arrays, correction=weights)


def whitened_over_tokens(rewards: np.ndarray, lengths: Sequence[int], size: int, *, baseline: bool) -> np.ndarray:
    """REINFORCE++'s advantages (B, T), with or without its group baseline; 0 without a score, and if all are equal."""
    scored = ~np.isnan(rewards)
    if constant_groups(rewards, len(rewards)).all():
        return np.zeros((len(rewards), max(lengths)))
    mask = pad_floats([[float(known)] * length for known, length in zip(scored, lengths, strict=True)], max(lengths))
    if baseline:
        return np.array(reinforce_plus_plus_baseline(rewards, mask, size))
    return np.array(reinforce_plus_plus(token_rewards(as_column(np.where(scored, rewards, 0.0)), mask), mask)[0])


def _moves(group: Sequence[Row]) -> bool:
    return any(np.any(row.advantages) for row in group)


def _totals(groups: Sequence[Group]) -> np.ndarray:
    return np.array([np.nan if r.score.total is None else r.score.total for group in groups for r in group])


def _part(groups: Sequence[Group], name: str) -> np.ndarray:
    return np.array([np.nan if (v := r.score.parts[name]) is None else v for group in groups for r in group])
