"""Decoding over prompts that are held once: a row attends to its prompt's keys and values, then to its own.

mlx-lm's models fetch one array of keys from a cache and hand it to `scaled_dot_product_attention`. `route_attention`
lets a cache that has `attend` answer instead. The rows of a group then meet their prompt in one matrix product, and
no prompt is copied.
"""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models import base

from mlx_ops.exponential import softmax
from mlx_ops.row_cache import RowCache, causal_mask

_NAME = "scaled_dot_product_attention"


def route_attention(model: nn.Module) -> bool:
    """Let caches with `attend` compute the attention of this model; whether every layer calls it.

    It replaces a name in the modules that define the layers, for this process; other caches see what they saw before.
    """
    layers: Any = model.layers
    callers = [[call for call in map(_call, layer.modules()) if _NAME in call.__code__.co_names] for layer in layers]
    for call in (call for calls in callers for call in calls):
        if call.__globals__.get(_NAME) is base.scaled_dot_product_attention:
            call.__globals__[_NAME] = attention
    return all(len(calls) == 1 and calls[0].__globals__.get(_NAME) is attention for calls in callers)


def _call(module: nn.Module) -> Any:
    return type(module).__call__


def attention(
    queries: mx.array, keys: mx.array, values: mx.array, cache: Any, scale: float, mask: Any, sinks: Any = None
) -> mx.array:
    """mlx-lm's attention, except where the cache computes its own."""
    if not hasattr(cache, "attend"):
        return base.scaled_dot_product_attention(queries, keys, values, cache, scale, mask, sinks)
    if sinks is not None:
        raise ValueError("attention sinks and shared prompts don't go together; generate with cache='rows'")
    return cache.attend(queries, keys, values, scale=scale, mask=mask)


class GroupLayout:
    """Which prompt each row continues, and what follows of it. Rows of a prompt stand beside each other."""

    def __init__(self, padding: Sequence[int], columns: int, index: Sequence[int]) -> None:
        self.padding = tuple(padding)
        self.columns = columns
        self.index = tuple(index)
        counts = np.bincount(self.index, minlength=len(padding))
        place = np.concatenate([np.arange(count) for count in counts])
        self._width = int(counts.max())
        self._even = bool((counts == self._width).all())
        slots = np.zeros((len(counts), self._width), dtype=np.int32)
        slots[list(self.index), place] = np.arange(len(self.index))
        self._slots = mx.array(slots.reshape(-1))
        self._rows = mx.array((np.array(self.index) * self._width + place).astype(np.int32))
        self.padded = mx.array([self.padding[prompt] for prompt in self.index]) if any(padding) else None

    @property
    def offset(self) -> int | mx.array:
        """The position behind each row's prompt."""
        return self.columns if self.padded is None else self.columns - self.padded

    def visible(self) -> mx.array:
        """(B, 1, 1, columns) True where a column is the row's prompt."""
        padding = mx.zeros((len(self.index),), mx.int32) if self.padded is None else self.padded
        return (mx.arange(self.columns)[None] >= padding[:, None])[:, None, None]

    def gather(self, rows: mx.array) -> mx.array:
        """(B, H, R, D) to (P, H, width * R, D); a group smaller than the widest is filled up with some row."""
        _, heads, repeats, size = rows.shape
        rows = rows if self._even else mx.take(rows, self._slots, axis=0)
        groups = rows.reshape(-1, self._width, heads, repeats, size).swapaxes(1, 2)
        return groups.reshape(-1, heads, self._width * repeats, size)

    def scatter(self, groups: mx.array, repeats: int) -> mx.array:
        """(P, H, width * R, D) back to (B, H, R, D)."""
        _, heads, _, size = groups.shape
        rows = groups.reshape(-1, heads, self._width, repeats, size).swapaxes(1, 2).reshape(-1, heads, repeats, size)
        return rows if self._even else mx.take(rows, self._rows, axis=0)


class SharedPromptCache:
    """One layer's keys and values: each prompt's once, and the rows' own."""

    def __init__(self, prompt: RowCache, own: RowCache, layout: GroupLayout) -> None:
        self.prompt, self.own, self.layout = prompt, own, layout

    @property
    def offset(self) -> int | mx.array:
        return self.layout.offset + self.own.offset

    @property
    def state(self) -> list[mx.array]:
        return [*self.prompt.state, *self.own.state]

    @property
    def nbytes(self) -> int:
        return self.prompt.nbytes + self.own.nbytes

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append (B, H, 1, D) and give the rows' own columns; `attend` adds the prompts'."""
        return self.own.update_and_fetch(keys, values)

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> mx.array | None:
        """The mask over the prompts' and the own columns, where any is padded."""
        assert (N, window_size) == (1, None), "a step is one token of full attention"
        if self.layout.padded is None and self.own.padded is None and not return_array:
            return None
        padding = mx.zeros((len(self.own.padding),), mx.int32) if self.own.padded is None else self.own.padded
        return mx.concatenate([self.layout.visible(), causal_mask(self.own.index, 1, padding)], axis=-1)

    def attend(self, queries: mx.array, keys: mx.array, values: mx.array, *, scale: float, mask: Any) -> mx.array:
        """Attention (B, heads, 1, D) over prompt and own columns under one softmax."""
        rows, heads, _, size = queries.shape
        repeats = heads // keys.shape[1]
        queries = (queries * scale).reshape(rows, keys.shape[1], repeats, size)
        scores, columns, layout = queries @ keys.swapaxes(-1, -2), self.layout.columns, self.layout
        if columns:
            prompt = layout.scatter(layout.gather(queries) @ self.prompt.keys.swapaxes(-1, -2), repeats)
            scores = mx.concatenate([prompt, scores], axis=-1)
        scores = scores if mask is None else mx.where(mask, scores, -mx.inf)
        weights = softmax(scores)
        out = weights[..., columns:] @ values
        if columns:
            out = out + layout.scatter(layout.gather(weights[..., :columns]) @ self.prompt.values, repeats)
        return out.reshape(rows, heads, 1, -1)
