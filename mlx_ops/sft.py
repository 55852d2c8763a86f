"""Supervised fine-tuning on prompt and target: the loss stands on the target only.

Each optimizer step is one draw of `batch_size` examples, cut by length into microbatches; its loss is the sum of the
negative log-likelihoods over the tokens of the whole step.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.optimizers import Optimizer

from configs.schema import PromptConfig, SFTConfig
from mlx_ops.batching import TokenRows, token_rows
from mlx_ops.forward import score
from mlx_ops.losses import aggregation_weights, nll_loss
from mlx_ops.microbatches import plan
from mlx_ops.prompts import prompt_tokens, target_tokens
from mlx_ops.rollout import Take
from mlx_ops.trainer import BaseTrainer, Limits, Metrics
from rewards.base import Example


@dataclass(frozen=True)
class Pair:
    """A prompt and what follows it, as tokens; the end token included."""

    prompt: tuple[int, ...]
    target: tuple[int, ...]


@dataclass(frozen=True)
class SFTBatch:
    """B pairs of one microbatch."""

    rows: TokenRows
    weights: mx.array  # (B, T) 1 / tokens of the whole step where a target token stands


class SFTTrainer(BaseTrainer[SFTBatch]):
    """Imitates the targets of `pairs`, in the order that `take` gives."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        config: SFTConfig,
        *,
        pairs: Sequence[Pair],
        validation: Sequence[Pair],
        take: Take,
        token_budget: int,
        seed: int,
    ) -> None:
        limits = Limits(config.optimizer.max_grad_norm, config.max_nonfinite_steps)
        super().__init__(model, optimizer, seed=seed, limits=limits)
        self.config, self.pairs, self.take, self.token_budget = config, pairs, take, token_budget
        self.validation = validation[: config.validation_examples]

    def collect(self, step: int) -> tuple[list[list[SFTBatch]], Metrics]:
        size = self.config.batch_size
        pairs = [self.pairs[index] for index in self.take(step * size, size)]
        batch = sft_batches(pairs, self.token_budget)
        return [batch], {"tokens_trained": float(sum(len(pair.target) for pair in pairs))}

    def loss(self, model: nn.Module, batch: SFTBatch) -> tuple[mx.array, Mapping[str, mx.array]]:
        logprobs, _ = score(model, batch.rows)
        loss, metrics = nll_loss(logprobs, batch.weights)
        return loss, {**metrics, "tokens": (batch.weights > 0).sum()}

    def validate(self, step: int) -> Metrics:
        """The loss on held-out pairs after `step` steps, now and then."""
        every = self.config.validation_every
        if every is None or step % every or not self.validation:
            return {}
        parts = [float(self.loss(self.model, batch)[0]) for batch in sft_batches(self.validation, self.token_budget)]
        return {"validation_loss": sum(parts)}


def sft_batches(pairs: Sequence[Pair], token_budget: int) -> list[SFTBatch]:
    """The pairs as microbatches whose losses add up to the mean over all target tokens."""
    tokens = sum(len(pair.target) for pair in pairs)
    lengths = [len(pair.prompt) for pair in pairs], [len(pair.target) for pair in pairs]
    parts = plan(lengths[0], list(range(len(pairs))), lengths[1], token_budget=token_budget)
    return [_sft_batch([pairs[index] for index in part], tokens) for part in parts]


def _sft_batch(pairs: Sequence[Pair], tokens: int) -> SFTBatch:
    rows = token_rows([pair.prompt for pair in pairs], [pair.target for pair in pairs])
    return SFTBatch(rows, aggregation_weights(rows.completion_mask, "token_mean", total_tokens=tokens))


def make_pairs(
    examples: Sequence[Example], prompt: PromptConfig, tokenizer: Any, config: SFTConfig
) -> tuple[list[Pair], int]:
    """The examples that have a target and fit, as tokens, and how many were left out. `ValueError` for none."""
    pairs = [
        Pair(tuple(prompt_tokens(example, prompt, tokenizer)), tuple(target_tokens(example.target, tokenizer)))
        for example in examples
        if example.target is not None
    ]
    kept = [
        pair
        for pair in pairs
        if len(pair.prompt) <= config.max_prompt_tokens and len(pair.prompt) + len(pair.target) <= config.max_length
    ]
    if not kept:
        raise ValueError(
            f"sft: no target of {len(examples)} examples ({len(pairs)} have one) fits max_prompt_tokens "
            f"{config.max_prompt_tokens} and max_length {config.max_length}"
        )
    return kept, len(examples) - len(kept)
