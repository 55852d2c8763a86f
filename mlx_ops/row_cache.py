"""Key-value caches with mlx-lm's surface, for rows that advance together.

They serve layers with full attention; `refusal` says why a model has others. A row's columns stand right-aligned:
padding, its prompt, what was drawn.
"""

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import KVCache, make_prompt_cache

GROWTH = 256
"""Columns that are reserved at once for what is to be drawn."""


_TAKES_ROW_MASKS: dict[type, bool] = {}


def refusal(model: nn.Module) -> str | None:
    """Why these caches can't serve the model, or None where they can."""
    others = sorted({type(layer).__name__ for layer in make_prompt_cache(model) if type(layer) is not KVCache})
    return f"{type(model).__module__} keeps {', '.join(others)}, not a plain KVCache in every layer" if others else None


def takes_row_masks(model: Any) -> bool:
    """Whether the model's attention can hide other columns from each row, which rows of different length need."""
    kind = type(model)
    if kind not in _TAKES_ROW_MASKS:
        _TAKES_ROW_MASKS[kind] = False
        # Shapes clash while the graph is built; nothing is computed. Eleven rows are no model's number of heads.
        with suppress(ValueError):
            model(mx.zeros((11, 2), mx.int32), cache=[RowCache([1] + [0] * 10) for _ in model.layers])
            _TAKES_ROW_MASKS[kind] = True
    return _TAKES_ROW_MASKS[kind]


HeadShape = tuple[int, int, mx.Dtype]
"""(Heads, their size, their type)."""


def head_shapes(model: Any) -> list[tuple[HeadShape, HeadShape]]:
    """Each layer's keys and values. Nothing is computed."""
    caches = [RowCache([0], 1) for _ in model.layers]
    model(mx.zeros((1, 1), mx.int32), cache=caches)
    shapes = [[(array.shape[1], array.shape[3], array.dtype) for array in cache.state] for cache in caches]
    return [(keys, values) for keys, values in shapes]


def token_bytes(model: Any) -> int:
    """Bytes of keys and values of one token in all layers."""
    return sum(heads * size * dtype.size for layer in head_shapes(model) for heads, size, dtype in layer)


def causal_mask(start: int, count: int, padding: mx.array) -> mx.array:
    """(B, 1, count, start + count) True where query column start + i may see key column j.

    A padding column sees itself: a softmax over nothing is nan, which would leak through a zero weight.
    """
    queries = mx.arange(start, start + count)[:, None]
    keys = mx.arange(start + count)[None, :]
    own = keys[None] >= padding[:, None, None]
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
        self.padded = mx.array(self.padding) if any(padding) else None

    @property
    def offset(self) -> int | mx.array:
        """The position of the next token: one number where no row is padded, else one a row."""
        return self.index if self.padded is None else self.index - self.padded

    @property
    def state(self) -> list[mx.array]:
        return [] if self.keys is None else [self.keys, self.values]

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.state)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append (B, H, n, D) and give all columns so far."""
        start, self.index = self.index, self.index + keys.shape[2]
        if self.keys is None or self.index > self.keys.shape[2]:
            columns = max(self._capacity, self.index + (GROWTH if start else 0))
            self.keys = placed(self.keys, keys, 0, start, columns)
            self.values = placed(self.values, values, 0, start, columns)
        self.keys[..., start : self.index, :] = keys
        self.values[..., start : self.index, :] = values
        return self.keys[..., : self.index, :], self.values[..., : self.index, :]

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> mx.array | str | None:
        """The mask of the next N tokens: none is needed for one token of unpadded rows."""
        assert window_size is None, "refusal() names models with windows"
        if self.padded is None and not return_array:
            return None if N == 1 else "causal"
        return causal_mask(self.index, N, mx.zeros((1,), mx.int32) if self.padded is None else self.padded)

    def keep(self, rows: mx.array, padding: Sequence[int], left: int) -> None:
        """Only these rows, with room for `left` more columns; columns that pad all of them are dropped."""
        drop = min(padding)
        columns = slice(drop, self.index)
        self.index -= drop
        self._capacity = self.index + min(left, GROWTH)
        self._pad([width - drop for width in padding])
        if self.keys is not None:
            kept = [mx.take(held[..., columns, :], rows, axis=0) for held in self.state]
            self.keys, self.values = (placed(held, held, 0, self.index, self._capacity) for held in kept)

    def join(self, other: "RowCache", left: int) -> None:
        """Rows of another cache behind these, with room for `left` more columns."""
        index = max(self.index, other.index)
        self._capacity = index + min(left, GROWTH)
        shifts = [(cache, index - cache.index) for cache in (self, other)]
        padding = [width + shift for cache, shift in shifts for width in cache.padding]
        known = self.state or other.state
        if known:
            parts = [_shifted(cache, shift, self._capacity, known) for cache, shift in shifts]
            self.keys, self.values = (mx.concatenate(list(pair), axis=0) for pair in zip(*parts, strict=True))
        self.index = index
        self._pad(padding)


def _shifted(cache: RowCache, shift: int, columns: int, like: Sequence[mx.array]) -> list[mx.array]:
    """A cache's arrays, `shift` columns further right in buffers of `columns`; `like` has the shape where it is
    empty."""
    held = cache.state or [mx.zeros((len(cache.padding), *array.shape[1:]), array.dtype) for array in like]
    return [placed(array, array, shift, cache.index, columns) for array in held]


def placed(held: Any, like: mx.array, start: int, used: int, columns: int) -> mx.array:
    """A buffer of so many columns that holds the first `used` of `held` from `start` on."""
    rows, heads, _, width = like.shape
    buffer = mx.zeros((rows, heads, columns, width), like.dtype)
    if used:
        buffer[..., start : start + used, :] = held[..., :used, :]
    return buffer
