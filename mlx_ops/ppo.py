"""PPO (arXiv:1707.06347) with a critic and generalised advantage estimates (arXiv:1506.02438).

One step: completions are drawn and judged; log-probabilities and values are computed once; the score, less the KL to
the reference, becomes a reward for each token, and with the values an advantage for each; then several epochs of
minibatches of rows. A completion without a score is left out. Left out of PPO: reward scaling, length-adaptive lambda.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from time import perf_counter
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.optimizers import Optimizer

from configs.schema import PPOConfig
from mlx_ops.advantages import AdaptiveKL, constant_groups, gae, kl_in_reward, token_rewards
from mlx_ops.algorithm import AlgorithmRegistry, PolicyTrainer, named, tree_below
from mlx_ops.batching import TokenRows, Tree, pad_floats
from mlx_ops.critic import ActorCritic, actor_critic
from mlx_ops.logprobs import kl_estimate, masked_mean, masked_whiten, token_logprobs
from mlx_ops.losses import clipped_value_loss, value_metrics
from mlx_ops.optimizers import ClippedStep, Move, global_norm, make_optimizer
from mlx_ops.policy import PolicyBatch, Row, StepTotals, make_row, split, totals
from mlx_ops.policy_loss import clip_surrogate, full_loss
from mlx_ops.rollout import Group, rollout_metrics, sample_rows
from mlx_ops.trainer import Metrics, mean_of

CRITIC, CRITIC_OPTIMIZER = "critic.", "critic_optimizer."


@AlgorithmRegistry.register("ppo")
class PPOTrainer(PolicyTrainer[PPOConfig]):
    """Trains a policy and, with an optimizer of its own, a critic that says what a token is worth."""

    compilable = True

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        config: PPOConfig,
        *,
        critic_optimizer: Optimizer | None = None,
        **given: Any,
    ) -> None:
        super().__init__(model, optimizer, config, **given)
        self.actor_critic = actor_critic(model, config.critic.kind)
        self.model = self.actor_critic
        updates = config.steps * config.updates_per_step
        own = make_optimizer(config.critic.optimizer, config.critic.learning_rate, updates)
        self.critic_optimizer = own if critic_optimizer is None else critic_optimizer
        self.critic_step = ClippedStep(self.critic_optimizer, config.critic.optimizer.max_grad_norm)
        self.kl = AdaptiveKL(config.kl_coef, config.kl_target or 1.0, config.kl_horizon)
        self.trains_policy = True
        self.seen: list[Metrics] = []
        """What the microbatches of the latest update measured."""

    def state(self) -> dict[str, Any]:
        return {**super().state(), "kl_coef": self.kl.coef}

    def arrays(self) -> dict[str, mx.array]:
        critic = named(CRITIC, self.actor_critic.critic.trainable_parameters())
        return super().arrays() | critic | named(CRITIC_OPTIMIZER, self.critic_optimizer.state)

    def restore(self, step: int, state: Mapping[str, Any], arrays: Mapping[str, mx.array]) -> None:
        super().restore(step, state, arrays)
        self.kl = replace(self.kl, coef=float(state["kl_coef"]))
        self.actor_critic.critic.update(tree_below(arrays, CRITIC))
        self.critic_optimizer.state = tree_below(arrays, CRITIC_OPTIMIZER)

    def collect(self, step: int) -> tuple[Iterator[Sequence[PolicyBatch]], Metrics]:
        config = self.config
        self.trains_policy = step >= config.critic.warmup_steps
        groups, metrics = self.rollouts(config.prompts_per_step)
        metrics |= rollout_metrics(groups, self.task_reward)
        metrics |= {"kl_coef": self.kl.coef, "critic_learning_rate": float(self.critic_optimizer.learning_rate)}
        scored = [rollout.score.total for group in groups for rollout in group]
        scores = {place: score for place, score in enumerate(scored) if score is not None}
        rows = self._rows(groups, scores)
        if rows:
            rows, seconds = self._valued(rows)
            rows, found = with_targets(rows, list(scores.values()), config, kl_coef=self.kl.coef)
            metrics |= seconds | found
            self._steer(found, len(rows))
        means = {row.place: float(np.mean(row.advantages)) for row in rows}
        samples = sample_rows(groups, [means.get(place, 0.0) for place in range(len(scored))], step + 1)
        return self.played(self._minibatches(rows, step, metrics), samples, step), metrics

    def _rows(self, groups: Sequence[Group], scores: Mapping[int, float]) -> list[Row]:
        """The completions that have a score, as rows without targets."""
        cut = self.config.mask_truncated
        rollouts = enumerate(rollout for group in groups for rollout in group)
        return [make_row(each, (), mask_truncated=cut, place=place) for place, each in rollouts if place in scores]

    def loss(self, model: nn.Module, batch: PolicyBatch) -> tuple[mx.array, Mapping[str, mx.array]]:
        config = self.config
        assert isinstance(model, ActorCritic)
        assert batch.old_values is not None
        assert batch.returns is not None
        logits, values = model.logits_and_values(batch.rows, trains_policy=batch.trains_policy)
        surrogate = partial(clip_surrogate, config=config)
        kl_coef = 0.0 if batch.kl_coef is None else batch.kl_coef
        loss, metrics = full_loss(logits, batch, config, surrogate, kl_coef=kl_coef)
        value_loss, extra = clipped_value_loss(
            *(values, batch.old_values, batch.returns, batch.completion_mask, batch.weights),
            clip_range=config.critic.value_clip_range,
        )
        metrics |= extra | {"value_loss": mx.stop_gradient(value_loss)}
        weight = config.critic.coef if config.critic.kind == "head" else 1.0
        return (loss if batch.trains_policy else 0.0) + weight * value_loss, metrics

    def minibatch(self, rows: Sequence[Row], totals: StepTotals) -> list[PolicyBatch]:
        """The rows, with what steers this step's loss: a compiled loss sees no change of the trainer's own."""
        kl_coef = mx.array(self.kl.coef) if self.config.kl_in == "loss" else None
        found = super().minibatch(rows, totals)
        return [replace(batch, kl_coef=kl_coef, trains_policy=self.trains_policy) for batch in found]

    def observe(self, batch: PolicyBatch, extra: Mapping[str, mx.array]) -> None:
        super().observe(batch, extra)
        self.seen.append({name: float(extra[name]) for name in ("approx_kl_k3", "tokens")})

    def norms(self, grads: Tree) -> dict[str, mx.array]:
        return {"grad_norm": global_norm(grads["policy"]), "critic_grad_norm": global_norm(grads["critic"])}

    def moves(self, grads: Tree, norms: Mapping[str, mx.array]) -> list[Move]:
        """A step of each optimizer on gradients clipped apart; while the critic warms up, of its own alone."""
        policy, critic = self.actor_critic.policy, self.actor_critic.critic
        found = [self.critic_step(critic, grads["critic"], norms["critic_grad_norm"])]
        if self.trains_policy:
            found.append(self.optimizer_step(policy, grads["policy"], norms["grad_norm"]))
        return found

    def _valued(self, rows: Sequence[Row]) -> tuple[list[Row], Metrics]:
        """The rows with values, and with log-probabilities of the policy and the reference where they are needed."""
        started = perf_counter()
        config = self.config
        measures_kl = self.reference is not None and (config.kl_in == "reward" or config.kl_target is not None)
        needs_old = config.updates_per_step > 1 or measures_kl
        shared = needs_old and config.critic.kind == "head"
        if shared:
            found = self.evaluated(rows, self._logprobs_and_values)
            valued = [replace(r, old_logprobs=f[:, 0], old_values=f[:, 1]) for r, f in zip(rows, found, strict=True)]
        else:
            found = self.evaluated(rows, self.actor_critic.estimate)
            valued = [replace(row, old_values=values) for row, values in zip(rows, found, strict=True)]
        seconds = {"seconds/values": perf_counter() - started}
        valued, more = self.scored(valued, old=needs_old and not shared)
        return valued, seconds | more

    def _logprobs_and_values(self, rows: TokenRows) -> mx.array:
        """(B, T, 2) from one forward pass of the shared trunk."""
        logits, values = self.actor_critic.logits_and_values(rows)
        temperature = self.config.sampling.temperature
        return mx.stack([token_logprobs(logits, rows.completion_tokens, temperature=temperature), values], axis=-1)

    def _steer(self, found: Metrics, rollouts: int) -> None:
        """Move the KL coefficient for the next rollout."""
        if self.config.kl_target is not None:
            self.kl = self.kl.update(found["rollout_kl"], samples=rollouts)

    def _minibatches(self, rows: Sequence[Row], step: int, metrics: Metrics) -> Iterator[Sequence[PolicyBatch]]:
        """Minibatches of rows, epoch by epoch, until the policy has moved as far as it may; counts the epochs."""
        order, limit = np.random.default_rng([self.seed, step]), self.config.max_approx_kl
        metrics["epochs"] = 0.0
        for _ in range(self.config.epochs):
            for part in split(len(rows), self.config.minibatches, order):
                chosen = [rows[index] for index in part]
                if any(row.counts for row in chosen):
                    self.seen.clear()
                    yield self.minibatch(chosen, totals(chosen))
            metrics["epochs"] += 1.0
            seen = [] if limit is None else self.ranks.gather(self.seen)
            if limit is not None and seen and mean_of(seen)["approx_kl_k3"] > limit:
                return


def with_targets(
    rows: Sequence[Row], scores: Sequence[float], config: PPOConfig, *, kl_coef: float
) -> tuple[list[Row], Metrics]:
    """The rows with advantages and returns, from their values and one score each; metrics of these.

    The score stands at a completion's last token, whether it ended there or was cut.
    """
    width = max(len(row.tokens) for row in rows)

    def padded(columns: Sequence[Any]) -> mx.array:
        return pad_floats(columns, width)

    mask = padded([np.ones(len(row.tokens)) for row in rows])
    counted = mask * mx.array([[float(row.counts)] for row in rows])
    values = padded([row.old_values for row in rows])
    last = mx.array([[score] for score in scores])
    rewards, metrics = token_rewards(last, mask), {}
    if rows[0].ref_logprobs is not None and rows[0].old_logprobs is not None:
        old, ref = padded([row.old_logprobs for row in rows]), padded([row.ref_logprobs for row in rows])
        kl = masked_mean(kl_estimate(old, ref, estimator=config.kl_estimator), mask, axis=-1).mean()
        metrics["rollout_kl"] = kl
        if config.kl_in == "reward":
            rewards = kl_in_reward(last, old, ref, mask, kl_coef=kl_coef, estimator=config.kl_estimator)
    advantages, returns = gae(rewards, values, mask, gamma=config.gamma, gae_lambda=config.gae_lambda)
    metrics |= value_metrics(values, returns, counted)
    if config.whiten_advantages:
        advantages = whitened(advantages, counted)
    parts = zip(rows, np.array(advantages), np.array(returns), strict=True)
    targeted = [replace(row, advantages=a[: len(row.tokens)], returns=r[: len(row.tokens)]) for row, a, r in parts]
    return targeted, {name: float(number) for name, number in metrics.items()}


def whitened(advantages: mx.array, mask: mx.array) -> mx.array:
    """Mean 0 and variance 1 over the mask; exactly 0 where they are all the same, which would blow rounding up."""
    chosen = np.array(advantages)[np.array(mask) > 0]
    if not chosen.size or constant_groups(chosen, chosen.size).all():
        return mx.zeros_like(advantages)
    return masked_whiten(advantages, mask)
