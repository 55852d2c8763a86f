"""Supervised fine-tuning on prompt and target: the loss stands on the target only.

Each optimizer step is one draw of `batch_size` examples, cut into microbatches by length, or packed into rows. Its
loss is the mean over the target tokens of the whole step, however it was cut.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.optimizers import Optimizer

from configs.schema import PromptConfig, SFTConfig
from mlx_ops.batching import pad_floats, token_rows
from mlx_ops.distributed import ALONE, Ranks
from mlx_ops.forward import PreparedRows, completion_logits, prepare_rows, unshared_because
from mlx_ops.logprobs import masked_mean, token_logprobs
from mlx_ops.losses import dft_loss, nll_loss
from mlx_ops.microbatches import bucketed, plan
from mlx_ops.neftune import embedding_of, noisy_embeddings
from mlx_ops.packing import PackedRows, packed_logits, packed_parts, require_packable
from mlx_ops.pairs import Pair, make_pair
from mlx_ops.rollout import Take
from mlx_ops.trainer import BaseTrainer, Limits, Metrics
from rewards.base import Example

LOSSES = {"nll": nll_loss, "dft": dft_loss}


@dataclass(frozen=True)
class SFTBatch:
    """The pairs of one microbatch: a row each, or packed."""

    rows: PreparedRows | PackedRows
    targets: mx.array  # (B, T), packed (N,)
    weights: mx.array  # like targets, 1 / tokens of the whole step where a token is imitated
    lengths: mx.array  # (B, 1) tokens of each row's example, packed (R, L) of each column's
    columns: int  # inputs that are run, padding included


class SFTTrainer(BaseTrainer[SFTBatch]):
    """Imitates the targets of `pairs`, in the order that `take` gives."""

    compilable = True

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
        ranks: Ranks = ALONE,
    ) -> None:
        limits = Limits(config.optimizer.max_grad_norm, config.max_nonfinite_steps)
        super().__init__(model, optimizer, seed=seed, limits=limits, ranks=ranks)
        self.compiled = self.compiled and config.compile_update
        self.config, self.pairs, self.take, self.token_budget = config, pairs, take, token_budget
        self.validation = validation[: config.validation_examples]
        # Asked once a process, by running the model: in the first step that would use up random numbers of its dropout.
        unshared_because(model)
        if config.packing:
            require_packable(model)
        if config.neftune_alpha:
            embedding_of(model)

    def collect(self, step: int) -> tuple[list[list[SFTBatch]], Metrics]:
        # Dropout acts, and layers with kernels of their own take the path that has a gradient.
        self.model.train()
        size = self.config.batch_size
        pairs = [self.pairs[index] for index in self.take(step * size, size)]
        batches = self._batches(pairs)
        columns = self.ranks.gather([batch.columns for batch in batches])
        return [batches], {
            "tokens_trained": float(sum(sum(pair.trained) for pair in pairs)),
            "padded_share": 1 - sum(len(pair) - 1 for pair in pairs) / sum(columns),
        }

    def loss(self, model: nn.Module, batch: SFTBatch) -> tuple[mx.array, Mapping[str, mx.array]]:
        with self._noise(model, batch):
            logprobs, metrics = imitation(model, batch)
        loss, _ = LOSSES[self.config.loss](logprobs, batch.weights)
        return loss, metrics

    def validate(self, step: int) -> Metrics:
        """The negative log-likelihood of held-out targets, every so many steps; without noise or dropout."""
        every = self.config.validation_every
        if every is None or step % every or not self.validation:
            return {}
        self.model.eval()
        found = []
        for batch in self._batches(self.validation):
            logprobs, metrics = imitation(self.model, batch)
            accuracy = metrics["token_accuracy"] * batch.weights.sum()
            found.append((float(nll_loss(logprobs, batch.weights)[0]), float(accuracy)))
        losses, accuracies = zip(*self.ranks.gather(found), strict=True)
        return {"validation_loss": sum(losses), "validation_accuracy": sum(accuracies)}

    def _noise(self, model: nn.Module, batch: SFTBatch) -> AbstractContextManager[None]:
        alpha = self.config.neftune_alpha
        return noisy_embeddings(model, alpha, batch.lengths) if alpha else nullcontext()

    def _batches(self, pairs: Sequence[Pair]) -> list[SFTBatch]:
        """This rank's share of the pairs of a step, weighted as parts of the whole."""
        own, trained = self.ranks.share(pairs, [len(pair) for pair in pairs]), _trained(pairs)
        if self.config.packing:
            return packed_batches(own, self.token_budget, self.config.max_length, trained=trained, bucket=self.bucket)
        return sft_batches(own, self.token_budget, trained=trained, bucket=self.bucket)


def imitation(model: nn.Module, batch: SFTBatch) -> tuple[mx.array, dict[str, mx.array]]:
    """The float32 log-probabilities of the targets; how many there are, and which share greedy decoding would give."""
    rows = batch.rows
    logits = packed_logits(model, rows) if isinstance(rows, PackedRows) else completion_logits(model, rows)
    trained = batch.weights > 0
    right = mx.argmax(mx.stop_gradient(logits), axis=-1) == batch.targets
    metrics = {"tokens": trained.sum(), "token_accuracy": masked_mean(right.astype(mx.float32), trained)}
    return token_logprobs(logits, batch.targets), metrics


def sft_batches(
    pairs: Sequence[Pair], token_budget: int, *, trained: int | None = None, bucket: int = 1
) -> list[SFTBatch]:
    """The pairs as microbatches, a row each, whose losses add up to the mean over all imitated tokens.

    `trained` is the number of those where the pairs are only a share of the step's. Prompts and targets are padded to
    multiples of `bucket`.
    """
    tokens = trained or _trained(pairs)
    lengths = [bucketed(len(pair.prompt), bucket) for pair in pairs], [len(pair.target) for pair in pairs]
    parts = plan(lengths[0], list(range(len(pairs))), lengths[1], token_budget=token_budget)
    return [_side_by_side([pairs[index] for index in part], tokens, bucket) for part in parts]


def packed_batches(
    pairs: Sequence[Pair], token_budget: int, capacity: int, *, trained: int | None = None, bucket: int = 1
) -> list[SFTBatch]:
    """As `sft_batches`, with several pairs in rows of at most `capacity` columns."""
    weight = 1 / (trained or _trained(pairs))
    return [
        SFTBatch(rows, rows.targets, rows.counts * weight, rows.lengths, rows.inputs.size)
        for rows in packed_parts(pairs, capacity, token_budget, bucket)
    ]


def _side_by_side(pairs: Sequence[Pair], tokens: int, bucket: int) -> SFTBatch:
    rows = prepare_rows(token_rows([pair.prompt for pair in pairs], [pair.target for pair in pairs], bucket=bucket))
    width = rows.completion_tokens.shape[1]
    weights = pad_floats([pair.trained for pair in pairs], width) / tokens
    lengths = mx.array([[len(pair)] for pair in pairs])
    columns = len(pairs) * (rows.prompt_tokens.shape[1] - 1 + width)
    return SFTBatch(rows, rows.completion_tokens, weights, lengths, columns)


def _trained(pairs: Sequence[Pair]) -> int:
    return sum(sum(pair.trained) for pair in pairs)


def make_pairs(
    examples: Sequence[Example], prompt: PromptConfig, tokenizer: Any, config: SFTConfig
) -> tuple[list[Pair], int]:
    """The examples that have a demonstration and fit, as tokens, and how many were left out. `ValueError` for none."""
    pairs = [pair for example in examples if (pair := make_pair(example, prompt, tokenizer, config.loss_on))]
    kept = [pair for pair in pairs if len(pair.prompt) <= config.max_prompt_tokens and len(pair) <= config.max_length]
    if not kept:
        raise ValueError(
            f"sft: no target of {len(examples)} examples ({len(pairs)} have one) fits max_prompt_tokens "
            f"{config.max_prompt_tokens} and max_length {config.max_length}"
        )
    return kept, len(examples) - len(kept)
