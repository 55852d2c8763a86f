"""Decoding over prompts that are held once: a row attends to its prompt's keys and values, then to its own.

mlx-lm's models fetch one array of keys from a cache and hand it to `scaled_dot_product_attention`. `route_attention` lets a cache
that has `attend` answer instead. The rows of a group then meet their prompt in one matrix product, and no prompt is copied.
"""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models import base

from mlx_ops.row_cache import RowCache

_NAME = "scaled_dot_product_attention"


def route_attention(model: nn.Module) -> int:
    """Let caches with `attend` compute the attention of this model; gives how many of its layers call it.

    It replaces a name in the module that defines the layer, for this process; other caches see what they saw before.
    """
    callers = [kind.__call__ for kind in (type(module) for module in model.modules()) if _NAME in _names(kind)]
    for call in callers:
        if call.__globals__.get(_NAME) is base.scaled_dot_product_attention:
            call.__globals__[_NAME] = attention
    return sum(call.__globals__.get(_NAME) is attention for call in callers)


def _names(kind: type) -> tuple[str, ...]:
    return getattr(getattr(kind.__call__, "__code__", None), "co_names", ())


def attention(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    cache: Any,
    scale: float,
    mask: Any,
    sinks: mx.array | None = None,
) -> mx.array:
    """mlx-lm's attention, except where the cache computes its own."""
    if not hasattr(cache, "attend"):
        return base.scaled_dot_product_attention(queries, keys, values, cache, scale, mask, sinks)
    if sinks is not None:
        raise ValueError("attention sinks and shared prompts don't go together; use RowCache")
    return cache.attend(queries, keys, values, scale=scale, mask=mask)


class GroupLayout:
    """Which prompt each row continues, and the masks that follow. Rows of a prompt stand beside each other."""

    def __init__(self, padding: Sequence[int], columns: int, index: Sequence[int]) -> None:
        self.padding = tuple(padding)
        self.columns = columns
        self.index = tuple(index)
        counts = np.bincount(self.index, minlength=len(padding))
        self.width = int(counts.max())
        self._uniform = bool((counts == self.width).all())
        place = np.concatenate([np.arange(count) for count in counts])
        slots = np.zeros((len(counts), self.width), dtype=np.int32)
        slots[list(self.index), place] = np.arange(len(self.index))
        self._slots = mx.array(slots.reshape(-1))
        self._rows = mx.array((np.array(self.index) * self.width + place).astype(np.int32))
        self.offsets: int | mx.array = columns
        self.mask: mx.array | None = None  # (B, 1, 1, columns)
        if any(padding):
            left = mx.array([self.padding[prompt] for prompt in self.index])
            self.offsets = columns - left
            self.mask = (mx.arange(columns)[None] >= left[:, None])[:, None, None]

    def gather(self, rows: mx.array) -> mx.array:
        """(B, H, R, D) to (P, H, width * R, D); a group smaller than the widest is filled up with some row."""
        _, heads, repeats, size = rows.shape
        rows = rows if self._uniform else mx.take(rows, self._slots, axis=0)
        return rows.reshape(-1, self.width, heads, repeats, size).swapaxes(1, 2).reshape(-1, heads, self.width * repeats, size)

    def scatter(self, groups: mx.array, repeats: int) -> mx.array:
        """(P, H, width * R, D) back to (B, H, R, D)."""
        _, heads, _, size = groups.shape
        rows = groups.reshape(-1, heads, self.width, repeats, size).swapaxes(1, 2).reshape(-1, heads, repeats, size)
        return rows if self._uniform else mx.take(rows, self._rows, axis=0)


class SharedPromptCache:
    """One layer's keys and values: each prompt's once, and the rows' own."""

    def __init__(self, prompt: RowCache, layout: GroupLayout, left: int) -> None:
        self.prompt = prompt
        self.layout = layout
        self.own = RowCache([0] * len(layout.index), left)

    @property
    def offset(self) -> int | mx.array:
        return self.layout.offsets + self.own.index

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append (B, H, 1, D) and give the rows' own columns; `attend` adds the prompts'."""
        return self.own.update_and_fetch(keys, values)

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> mx.array | None:
        """The mask over the prompts' columns, where any is padded; the rows' own columns are all visible."""
        assert N == 1 and window_size is None, "a step is one token of full attention"
        return self.layout.mask

    def attend(self, queries: mx.array, keys: mx.array, values: mx.array, *, scale: float, mask: Any) -> mx.array:
        """Attention (B, heads, 1, D) over prompt and own columns under one softmax."""
        rows, heads, _, size = queries.shape
        repeats = heads // keys.shape[1]
        queries = (queries * scale).reshape(rows, keys.shape[1], repeats, size)
        scores = queries @ keys.swapaxes(-1, -2)
        columns, layout = self.layout.columns, self.layout
        if columns:
            shared = layout.scatter(layout.gather(queries) @ self.prompt.keys.swapaxes(-1, -2), repeats)
            shared = shared if mask is None else mx.where(mask, shared, -mx.inf)
            scores = mx.concatenate([shared, scores], axis=-1)
        weights = mx.softmax(scores, axis=-1, precise=True)
        out = weights[..., columns:] @ values
        if columns:
            out = out + layout.scatter(layout.gather(weights[..., :columns]) @ self.prompt.values, repeats)
        return out.reshape(rows, heads, 1, -1)
