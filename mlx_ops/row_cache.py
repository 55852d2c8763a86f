"""Key-value caches with mlx-lm's surface, for rows that continue shared prompts.

They serve layers with full attention; `refusal` says why a model has others. Columns hold prompt tokens, padded on the left, then
the tokens that were drawn.
"""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import KVCache, make_prompt_cache

GROWTH = 256
"""Columns that are reserved at once for what is to be drawn."""


def refusal(model: nn.Module) -> str | None:
    """Why these caches can't serve the model, or None where they can."""
    others = sorted({type(layer).__name__ for layer in make_prompt_cache(model) if type(layer) is not KVCache})
    return f"{type(model).__module__} keeps {', '.join(others)}, not a plain KVCache in every layer" if others else None


def causal_mask(start: int, count: int, left_padding: mx.array) -> mx.array:
    """(B, 1, count, start + count) True where query column start + i may see key column j.

    A padding column sees itself: a softmax over nothing is nan, which would leak through a zero weight.
    """
    queries = mx.arange(start, start + count)[:, None]
    keys = mx.arange(start + count)[None, :]
    own = keys[None] >= left_padding[:, None, None]
    return (((keys <= queries)[None] & own) | (keys == queries)[None])[:, None]


class RowCache:
    """One layer's keys and values of rows side by side; the first `padding[b]` columns are not row b's own."""

    def __init__(self, padding: Sequence[int], capacity: int = 0) -> None:
        self.keys: Any = None  # (B, H, capacity, D)
        self.values: Any = None
        self.index = 0
        self._capacity = capacity
        self._pad(padding)

    def _pad(self, padding: Sequence[int]) -> None:
        self.padding = tuple(padding)
        self._left = mx.array(self.padding) if any(padding) else None

    @property
    def offset(self) -> int | mx.array:
        """The position of the next token: one number where no row is padded, else one a row."""
        return self.index if self._left is None else self.index - self._left

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append (B, H, n, D) and give all columns so far."""
        start, self.index = self.index, self.index + keys.shape[2]
        if self.keys is None or self.index > self.keys.shape[2]:
            columns = max(self._capacity, self.index + (GROWTH if start else 0))
            self.keys, self.values = _placed(self.keys, keys, start, columns), _placed(self.values, values, start, columns)
        self.keys[..., start : self.index, :] = keys
        self.values[..., start : self.index, :] = values
        return self.keys[..., : self.index, :], self.values[..., : self.index, :]

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> mx.array | str | None:
        """The mask of the next N tokens: none is needed for one token of unpadded rows."""
        assert window_size is None, "refusal() names models with windows"
        if self._left is None and not return_array:
            return None if N == 1 else "causal"
        return causal_mask(self.index, N, mx.zeros((1,), mx.int32) if self._left is None else self._left)

    @property
    def state(self) -> list[mx.array]:
        return [] if self.keys is None else [self.keys, self.values]

    def keep(self, rows: mx.array, padding: Sequence[int], left: int) -> None:
        """Only these rows, with room for `left` more columns; columns that pad all of them are dropped."""
        drop = min(padding)
        columns = slice(drop, self.index)
        self.index -= drop
        self._capacity = self.index + min(left, GROWTH)
        self._pad([width - drop for width in padding])
        if self.keys is not None:
            self.keys, self.values = (
                _placed(kept, kept, self.index, self._capacity)
                for kept in (mx.take(held[..., columns, :], rows, axis=0) for held in (self.keys, self.values))
            )


def _placed(held: Any, like: mx.array, used: int, columns: int) -> mx.array:
    """A buffer of so many columns that begins with the first `used` of `held`."""
    rows, heads, _, width = like.shape
    buffer = mx.zeros((rows, heads, columns, width), like.dtype)
    if used:
        buffer[..., :used, :] = held[..., :used, :]
    return buffer
