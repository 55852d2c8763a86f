"""GRPO and its family: group-relative advantages, a clipped surrogate, no critic.

One step: P prompts × G completions are drawn and judged; groups without signal are left out of the computation (their
advantages are exactly 0, so that changes no gradient); the rest is updated on in minibatches of whole groups.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.optimizers import Optimizer

from configs.schema import GRPOConfig
from mlx_ops.advantages import (
    constant_groups,
    group_advantages,
    leave_one_out_advantages,
    length_weighted_advantages,
    multi_reward_advantages,
    reinforce_plus_plus_baseline,
)
from mlx_ops.batching import pad_floats
from mlx_ops.corrections import sampler_correction, sampler_metrics
from mlx_ops.forward import score
from mlx_ops.logprobs import kl_penalty, masked_mean
from mlx_ops.losses import cispo_policy_loss, clipped_policy_loss, plain_policy_loss, sapo_policy_loss, weighted_sum
from mlx_ops.policy import (
    PolicyBatch,
    Reference,
    Row,
    make_row,
    microbatches,
    split_groups,
    totals,
    with_old_logprobs,
)
from mlx_ops.rollout import Group, rollout_metrics, sample_rows
from mlx_ops.trainer import BaseTrainer, Limits, Metrics

Draw = Callable[[int, int], tuple[list[Group], dict[str, float]]]
KeepSamples = Callable[[list[Mapping[str, Any]]], None]


@dataclass(frozen=True)
class Judged:
    """The groups of a step and what was counted on the way."""

    groups: list[Group]
    signal: np.ndarray  # P, whether the group's advantages can differ from 0
    metrics: Metrics


class GRPOTrainer(BaseTrainer[PolicyBatch]):
    """Trains on groups that `draw` gives it; `keep` receives the judged samples of each step."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        config: GRPOConfig,
        *,
        draw: Draw,
        weights: Mapping[str, float],
        token_budget: int,
        seed: int,
        keep: KeepSamples,
    ) -> None:
        limits = Limits(config.optimizer.max_grad_norm, config.max_nonfinite_steps)
        super().__init__(model, optimizer, seed=seed, limits=limits)
        self.config, self.draw, self.weights, self.keep = config, draw, weights, keep
        self.token_budget = token_budget
        self.position = 0
        self.reference = Reference(model) if config.kl_coef > 0 else None

    def state(self) -> dict[str, Any]:
        return {**super().state(), "position": self.position}

    def restore(self, step: int, state: Mapping[str, Any]) -> None:
        super().restore(step, state)
        self.position = int(state["position"])

    def collect(self, step: int) -> tuple[Iterable[Sequence[PolicyBatch]], Metrics]:
        judged = self._draw_groups()
        metrics = judged.metrics | rollout_metrics(judged.groups, self._task_reward)
        advantages = self._advantages(judged.groups)
        self.keep(sample_rows(judged.groups, [float(row[0]) for row in advantages], step + 1))
        rows = self._rows(judged.groups, advantages)
        live = [index for index, signal in enumerate(judged.signal) if signal or self._moves_without_signal]
        scored, seconds = self._score({index: rows[index] for index in live})
        return self._minibatches(rows, scored, step), metrics | seconds

    def loss(self, model: nn.Module, batch: PolicyBatch) -> tuple[mx.array, Mapping[str, mx.array]]:
        config = self.config
        logprobs, entropy = score(
            model, batch.rows, temperature=config.sampling.temperature, entropy=config.entropy_coef > 0
        )
        old = mx.stop_gradient(logprobs) if batch.old_logprobs is None else batch.old_logprobs
        loss, metrics = policy_loss(logprobs, old, batch, config)
        metrics |= sampler_metrics(old, batch.sampler_logprobs, batch.completion_mask)
        if batch.ref_logprobs is not None:
            kl = kl_penalty(logprobs, batch.ref_logprobs, old, batch.completion_mask, estimator=config.kl_estimator)
            loss = loss + config.kl_coef * weighted_sum(kl, batch.weights)
            metrics["kl"] = mx.stop_gradient(masked_mean(kl, batch.completion_mask))
        if entropy is not None:
            loss = loss - config.entropy_coef * weighted_sum(entropy, batch.weights)
            metrics["entropy"] = mx.stop_gradient(masked_mean(entropy, batch.completion_mask))
        metrics["tokens"] = batch.completion_mask.sum()
        return loss, metrics

    @property
    def _task_reward(self) -> str:
        """The first reward that counts: the raw task metric, which groups are filtered on."""
        return next(name for name, weight in self.weights.items() if weight)

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
        groups, seconds = self.draw(self.position, prompts)
        self.position += prompts
        return groups, self._has_signal(groups), seconds

    def _has_signal(self, groups: Sequence[Group]) -> np.ndarray:
        size = self.config.group_size
        signal = ~constant_groups(_totals(groups), size)
        if self.config.dynamic_sampling:
            # A shaped reward varies even in groups that all fail: only the task reward says what can be learnt.
            signal &= ~constant_groups(_part(groups, self._task_reward), size)
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
            flat = leave_one_out_advantages(rewards, size)
        elif config.advantage == "opo":
            flat = length_weighted_advantages(rewards, lengths, size)
        elif config.advantage == "reinforce_plus_plus_baseline":
            mask = pad_floats([[1.0] * length for length in lengths], max(lengths))
            whitened = np.array(reinforce_plus_plus_baseline(rewards, mask, size))
            return [row[:length] for row, length in zip(whitened, lengths, strict=True)]
        else:
            flat = group_advantages(rewards, size, scale=config.scale_advantages)
        return [np.full(length, value) for value, length in zip(flat, lengths, strict=True)]

    def _rows(self, groups: Sequence[Group], advantages: Sequence[np.ndarray]) -> list[list[Row]]:
        flat = iter(advantages)
        return [[make_row(r, next(flat), mask_truncated=self.config.mask_truncated) for r in g] for g in groups]

    def _score(self, live: Mapping[int, Sequence[Row]]) -> tuple[dict[int, list[Row]], Metrics]:
        """The rows of the groups that are trained on, with the old policy's and the reference's log-probabilities."""
        started = time.perf_counter()
        rows = [row for group in live.values() for row in group]
        if not rows:
            return {}, {"seconds/old_logprobs": 0.0, "seconds/ref_logprobs": 0.0}
        rows = with_old_logprobs(self.model, rows, self.config, self.token_budget)
        scored = time.perf_counter()
        if self.reference is not None:
            rows = self.reference.score(self.model, rows, self.config, self.token_budget)
        seconds = {
            "seconds/old_logprobs": scored - started,
            "seconds/ref_logprobs": time.perf_counter() - scored,
        }
        flat = iter(rows)
        return {index: [next(flat) for _ in group] for index, group in live.items()}, seconds

    def _minibatches(
        self, rows: Sequence[Sequence[Row]], scored: Mapping[int, Sequence[Row]], step: int
    ) -> list[list[PolicyBatch]]:
        config, order = self.config, np.random.default_rng([self.seed, step])
        found = []
        for _ in range(config.epochs):
            for part in split_groups(len(rows), config.minibatches, order):
                live = [row for index in part if index in scored for row in scored[index]]
                # Adam would make full steps of the rounding noise of a gradient that is zero.
                if any(row.counts for row in live):
                    everything = [row for index in part for row in rows[index]]
                    found.append(
                        microbatches(
                            live,
                            totals(everything),
                            aggregation=config.aggregation,
                            max_tokens=config.sampling.max_tokens,
                            token_budget=self.token_budget,
                        )
                    )
        return found


def policy_loss(
    logprobs: mx.array, old: mx.array, batch: PolicyBatch, config: GRPOConfig
) -> tuple[mx.array, dict[str, mx.array]]:
    """The configured surrogate over one microbatch, with the sampler's correction in it."""
    correction = None
    if config.importance_correction is not None:
        wanted = config.importance_correction
        correction = sampler_correction(
            old,
            batch.sampler_logprobs,
            batch.completion_mask,
            level=wanted.level,
            mode=wanted.mode,
            bounds=(wanted.low, wanted.high),
        )
    arrays = (logprobs, old, batch.advantages, batch.completion_mask, batch.weights)
    high = config.clip_range if config.clip_range_high is None else config.clip_range_high
    if config.loss == "cispo":
        return cispo_policy_loss(*arrays, ratio_bounds=(0.0, 1 + high), correction=correction)
    if config.loss == "sapo":
        return sapo_policy_loss(*arrays, correction=correction)
    if config.loss == "reinforce":
        return plain_policy_loss(*arrays, correction=correction)
    return clipped_policy_loss(
        *arrays,
        clip_range=(config.clip_range, high),
        dual_clip=config.dual_clip,
        ratio_level=config.ratio_level,
        correction=correction,
    )


def _totals(groups: Sequence[Group]) -> np.ndarray:
    return np.array([np.nan if r.score.total is None else r.score.total for group in groups for r in group])


def _part(groups: Sequence[Group], name: str) -> np.ndarray:
    return np.array([np.nan if (v := r.score.parts[name]) is None else v for group in groups for r in group])
