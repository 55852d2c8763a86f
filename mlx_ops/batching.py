"""Rollouts and the padded batches made of them: the one place of padding and masks.

P prompts, G completions each, B = P·G rows in group order, N prompt tokens, T completion tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_ops.microbatches import bucketed
from rewards.base import Example
from rewards.composer import Score

Tree = dict[str, Any]
"""Nested dicts and lists of arrays: a module's parameters or gradients."""


@dataclass(frozen=True)
class Completion:
    """What the sampler drew for one row, as exact token ids."""

    tokens: tuple[int, ...]
    """With the end token where the model gave one."""
    logprobs: tuple[float, ...]
    """Of each token under the distribution that was sampled (temperature and truncation applied)."""
    truncated: bool
    """Cut at the token limit, without an end token."""


@dataclass(frozen=True)
class Rollout:
    """One completion, judged."""

    example: Example
    prompt_tokens: tuple[int, ...]
    completion: Completion
    text: str
    """The completion's text, without the end token."""
    score: Score


@dataclass(frozen=True)
class TokenRows:
    """Token ids of B completions over P prompts. A prompt stands here once, whatever the number of its rows."""

    prompt_tokens: mx.array  # (P, N) padded on the left
    prompt_lengths: tuple[int, ...]  # P
    prompt_index: tuple[int, ...]  # B, which prompt a row continues
    completion_tokens: mx.array  # (B, T) padded on the right
    completion_lengths: tuple[int, ...]  # B

    @property
    def completion_mask(self) -> mx.array:
        """(B, T) 1 where a token belongs to the completion."""
        positions = mx.arange(self.completion_tokens.shape[1])
        return (positions[None, :] < mx.array(self.completion_lengths)[:, None]).astype(mx.float32)


def token_rows(
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    prompt_index: Sequence[int] | None = None,
    *,
    bucket: int = 1,
) -> TokenRows:
    """Pad prompts on the left and completions on the right, each to a multiple of `bucket` columns.

    `prompt_index` is 0, 1, 2, … where absent. Only the prompts that a row uses are kept.
    """
    index = list(range(len(completions))) if prompt_index is None else list(prompt_index)
    used = sorted(set(index))
    position = {prompt: place for place, prompt in enumerate(used)}
    kept = [prompts[prompt] for prompt in used]
    before, after = (bucketed(max(len(row) for row in rows), bucket) for rows in (kept, completions))
    return TokenRows(
        mx.array(_padded(kept, before, left=True)),
        tuple(len(row) for row in kept),
        tuple(position[prompt] for prompt in index),
        mx.array(_padded(completions, after, left=False)),
        tuple(len(row) for row in completions),
    )


def pad_floats(rows: Sequence[Sequence[float] | np.ndarray], columns: int) -> mx.array:
    """(B, columns) float32, zeros on the right."""
    padded = np.zeros((len(rows), columns), dtype=np.float32)
    for place, row in enumerate(rows):
        padded[place, : len(row)] = row
    return mx.array(padded)


def _padded(rows: Sequence[Sequence[int]], columns: int, *, left: bool) -> np.ndarray:
    padded = np.zeros((len(rows), columns), dtype=np.int32)
    for place, row in enumerate(rows):
        padded[place, columns - len(row) if left else 0 : columns if left else len(row)] = row
    return padded
