"""What GRPO and PPO share: rollouts as rows, rows as microbatches, teacher-forced scores, the reference.

P prompts, G completions each, B = P·G rows in group order, T completion tokens.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_ops.batching import Rollout, TokenRows, pad_floats, token_rows
from mlx_ops.forward import PreparedRows, prepare_rows, score
from mlx_ops.losses import aggregation_weights
from mlx_ops.microbatches import bucketed, plan
from mlx_ops.model import snapshot

Floats = Sequence[float] | np.ndarray
PROBE_STRIDE = 8
"""The entropy is measured on an eighth of the tokens: on all of them it costs 6 to 11 % of an update on a CPU."""


@dataclass(frozen=True)
class Row:
    """One rollout as an update sees it."""

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    sampler_logprobs: Floats  # T
    advantages: Floats  # T, one a token
    counts: bool
    """Stands in the loss; a completion that was cut may be left out of it."""
    old_logprobs: Floats | None = None  # T
    ref_logprobs: Floats | None = None  # T
    old_values: Floats | None = None  # T
    returns: Floats | None = None  # T
    place: int = 0
    """Which rollout of its step it is."""


@dataclass(frozen=True)
class PolicyBatch:
    """What a policy-gradient loss needs of B rollouts."""

    rows: PreparedRows
    completion_mask: mx.array  # (B, T) 1 where a sampled token counts
    weights: mx.array  # (B, T) share of each token in the loss of the whole optimizer step
    advantages: mx.array  # (B, T)
    sampler_logprobs: mx.array  # (B, T) of the distribution that was sampled
    old_logprobs: mx.array | None  # (B, T) under the policy that sampled, teacher-forced; None: this is that policy
    ref_logprobs: mx.array | None  # (B, T) under the frozen reference
    old_values: mx.array | None  # (B, T) the critic's estimates before the update
    returns: mx.array | None  # (B, T)
    places: mx.array  # (B,) which rollout of its step each row is
    probes: mx.array  # (N,) completion tokens, as places in the flattened (B, T), where the entropy is measured
    kl_coef: mx.array | None = None  # () for a trainer that steers it
    trains_policy: bool = True


@dataclass(frozen=True)
class StepTotals:
    """Denominators of one optimizer step, over all of its rows, those without signal too."""

    tokens: int
    rows: int


def make_row(rollout: Rollout, advantages: Floats, *, mask_truncated: bool, place: int = 0) -> Row:
    """A judged rollout as a row; `advantages` holds one number a token."""
    completion = rollout.completion
    counts = not (mask_truncated and completion.truncated)
    return Row(rollout.prompt_tokens, completion.tokens, completion.logprobs, advantages, counts, place=place)


def totals(rows: Sequence[Row]) -> StepTotals:
    """The denominators of an optimizer step over these rows."""
    return StepTotals(max(sum(len(row.tokens) for row in rows if row.counts), 1), max(len(rows), 1))


def microbatches(
    rows: Sequence[Row],
    totals: StepTotals,
    *,
    aggregation: Literal["token_mean", "sequence_mean", "dr_grpo"],
    max_tokens: int,
    token_budget: int,
    bucket: int = 1,
) -> list[PolicyBatch]:
    """The rows cut by a budget of padded tokens; the losses of the parts add up to that of the whole.

    Prompts and completions are padded to multiples of `bucket`.
    """
    return [
        _policy_batch([rows[index] for index in part], totals, aggregation, max_tokens, bucket)
        for part in _cut(rows, token_budget, bucket)
    ]


def _cut(rows: Sequence[Row], token_budget: int, bucket: int = 1) -> list[list[int]]:
    prompts, index = _distinct(rows)
    widths = [bucketed(len(prompt), bucket) for prompt in prompts]
    return plan(widths, index, [len(row.tokens) for row in rows], token_budget=token_budget)


def _distinct(rows: Sequence[Row]) -> tuple[list[tuple[int, ...]], list[int]]:
    """The different prompts in order of appearance, and which of them each row continues."""
    places: dict[tuple[int, ...], int] = {}
    index = [places.setdefault(row.prompt, len(places)) for row in rows]
    return list(places), index


def as_token_rows(rows: Sequence[Row], bucket: int = 1) -> TokenRows:
    prompts, index = _distinct(rows)
    return token_rows(prompts, [row.tokens for row in rows], index, bucket=bucket)


def _policy_batch(rows: Sequence[Row], step: StepTotals, aggregation: str, max_tokens: int, bucket: int) -> PolicyBatch:
    tokens = as_token_rows(rows, bucket)
    mask = tokens.completion_mask * mx.array([[float(row.counts)] for row in rows])
    weights = aggregation_weights(
        mask,
        aggregation,  # pyright: ignore[reportArgumentType]
        total_tokens=step.tokens,
        total_rows=step.rows,
        max_length=max_tokens,
    )

    def padded(pick: Callable[[Row], Floats | None]) -> mx.array | None:
        columns = [pick(row) for row in rows]
        kept = [column for column in columns if column is not None]
        return pad_floats(kept, mask.shape[1]) if len(kept) == len(rows) else None

    return PolicyBatch(
        prepare_rows(tokens),
        mask,
        weights,
        pad_floats([row.advantages for row in rows], mask.shape[1]),
        pad_floats([row.sampler_logprobs for row in rows], mask.shape[1]),
        padded(lambda row: row.old_logprobs),
        padded(lambda row: row.ref_logprobs),
        padded(lambda row: row.old_values),
        padded(lambda row: row.returns),
        mx.array([row.place for row in rows]),
        _probes(tokens.completion_lengths, mask.shape[1]),
    )


def _probes(lengths: Sequence[int], width: int) -> mx.array:
    """Completion tokens evenly spaced across the rows; the number of rows and the longest's bucket say how many."""
    places = np.concatenate([row * width + np.arange(length) for row, length in enumerate(lengths)])
    count = len(lengths) * bucketed(width) // PROBE_STRIDE
    return mx.array(places[np.arange(count) * len(places) // count].astype(np.int32))


def score_rows(model: nn.Module, rows: Sequence[Row], *, temperature: float, token_budget: int) -> list[np.ndarray]:
    """The log-probabilities of each row's tokens under the model, teacher-forced, in float32 and in the rows' order."""

    def logprobs(batch: TokenRows) -> mx.array:
        return score(model, batch, temperature=temperature)[0]

    return evaluate_rows(logprobs, rows, token_budget)


def evaluate_rows(
    function: Callable[[TokenRows], mx.array], rows: Sequence[Row], token_budget: int
) -> list[np.ndarray]:
    """One number (or vector) a completion token, (B, T, …) at a time, without a gradient, at each row's own length."""
    results: dict[int, np.ndarray] = {}
    for part in _cut(rows, token_budget):
        values = np.array(function(as_token_rows([rows[index] for index in part])))
        results |= {index: values[place, : len(rows[index].tokens)] for place, index in enumerate(part)}
    return [results[index] for index in range(len(rows))]


class Reference:
    """The frozen start of the policy: its trainable weights as they were, swapped in while it scores.

    With adapters these are the adapters at their start, which add exactly nothing: the reference is the base model. For
    a full model they are a frozen copy, shared with the policy until its weights move.
    """

    def __init__(self, model: nn.Module) -> None:
        self.weights = snapshot(model)

    def refresh(self, model: nn.Module) -> None:
        """Make the policy as it stands the reference."""
        self.weights = snapshot(model)

    @contextmanager
    def in_place_of(self, model: nn.Module) -> Iterator[None]:
        """The model computes as the reference inside the block."""
        current = snapshot(model)
        model.update(self.weights)
        try:
            yield
        finally:
            model.update(current)


def split(count: int, parts: int, order: np.random.Generator) -> list[list[int]]:
    """0 … count - 1 (groups or rows) shuffled and cut into at most `parts` minibatches, as even as can be."""
    shuffled = order.permutation(count)
    return [part.tolist() for part in np.array_split(shuffled, parts) if part.size]
