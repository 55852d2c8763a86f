"""The usual decoder block for one token of each row, in few operations: a decode step on a CPU.

There MLX spends more on handing a small operation to its thread, some 6 µs, than on its numbers, and mlx-lm's block is
80 operations a layer. Here it is half of them: queries, keys and values are one product, their rotation is another,
and residuals are added in the products. B rows, H key-value heads, R query heads to each, D numbers a head, C columns.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, reduce
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_ops.batching import Tree
from mlx_ops.exponential import exp, silu
from mlx_ops.lean_weights import Blocks


@dataclass(frozen=True)
class Stretch:
    """Columns that rows attend to: P times C, each for B / P rows that stand beside each other."""

    keys: mx.array  # (H, P, C, D)
    values: mx.array  # (H, P, C, D)
    shown: mx.array  # (P, C) True where a column is there for its rows


@dataclass(frozen=True)
class Rows:
    """Where B rows stand in a step."""

    positions: mx.array  # (B,) of their tokens
    column: mx.array  # (1,) of the rows' own buffers, where the tokens' keys and values go
    shown: mx.array  # (B, C) True where an own column is the row's, this one among them
    prompts: mx.array | None  # (P, N) the same of the prompts', None where each row has its prompt in its own columns


def logits(blocks: Blocks, weights: Tree, tokens: mx.array, rows: Rows, layers: list[list[mx.array]]) -> Any:
    """The logits (B, V) behind these tokens (B,), and the layers' buffers with their keys and values.

    A layer is the rows' own buffer (2H, B, C, D), keys then values, and the prompts' keys and values (H, P, N, D) where
    prompts are held apart.
    """
    turns = _turns(blocks, rows.positions)
    hidden, after = weights["embedding"][tokens], []
    for layer, held in zip(weights["layers"], layers, strict=True):
        hidden, own = _attended(blocks, layer, hidden, turns, rows, held)
        hidden = _fed_forward(blocks, layer, hidden)
        after.append([own, *held[1:]])
    return _times(mx.fast.rms_norm(hidden, weights["norm"], blocks.eps), weights["head"]), after


def _attended(
    blocks: Blocks, layer: Tree, hidden: mx.array, turns: tuple[mx.array, mx.array], rows: Rows, held: list[mx.array]
) -> tuple[mx.array, mx.array]:
    """The hidden states (B, hidden) with attention added, and the rows' buffer with a column more."""
    count, heads = hidden.shape[0], blocks.kv_heads
    qkv = _times(mx.fast.rms_norm(hidden, layer["input_norm"], blocks.eps), layer["qkv"])
    turned = _turned(blocks, qkv.reshape(count, blocks.all_heads, blocks.size), layer, turns)
    queries = turned[: blocks.heads].reshape(heads, -1, count, blocks.size).swapaxes(1, 2)
    own = mx.slice_update(held[0], turned[blocks.heads :, :, None], rows.column, axes=(2,))
    stretches = [Stretch(own[:heads], own[heads:], rows.shown)]
    if rows.prompts is not None:
        stretches.append(Stretch(held[1], held[2], rows.prompts))
    out = attend(queries, stretches).swapaxes(0, 1).reshape(count, -1)
    return _times(out, layer["out"], hidden), own


def attend(queries: mx.array, stretches: Sequence[Stretch]) -> mx.array:
    """Attention (H, B, R, D) of scaled queries (H, B, R, D) under one softmax over all stretches."""
    ends, size = (*queries.shape[:3], 1), queries.shape[-1]
    scores = []
    for part in stretches:
        together = queries.reshape(*part.keys.shape[:2], -1, size)
        scores.append(mx.where(part.shown[None, :, None], together @ part.keys.swapaxes(-1, -2), -mx.inf))
    top = reduce(mx.maximum, [score.max(axis=-1, keepdims=True).reshape(ends) for score in scores])
    weights = [exp(score, top.reshape(*score.shape[:3], 1)) for score in scores]
    masses = [weight.sum(axis=-1, keepdims=True).reshape(ends) for weight in weights]
    outs = [(weight @ part.values).reshape(queries.shape) for weight, part in zip(weights, stretches, strict=True)]
    return reduce(mx.add, outs) / reduce(mx.add, masses)


def _fed_forward(blocks: Blocks, layer: Tree, hidden: mx.array) -> mx.array:
    x = mx.fast.rms_norm(hidden, layer["mlp_norm"], blocks.eps)
    return _times(silu(_times(x, layer["gate"])) * _times(x, layer["up"]), layer["down"], hidden)


def _times(x: mx.array, linear: dict[str, mx.array], added: mx.array | None = None) -> mx.array:
    """x (B, in) through a linear layer, on top of what is `added` (B, out)."""
    if added is None:
        return mx.addmm(linear["bias"], x, linear["weight"]) if "bias" in linear else x @ linear["weight"]
    out = mx.addmm(added, x, linear["weight"])
    return out + linear["bias"] if "bias" in linear else out


def _turned(blocks: Blocks, x: mx.array, layer: Tree, turns: tuple[mx.array, mx.array]) -> mx.array:
    """Queries, keys and values (B, heads, D) as (heads, B, D): rotated, queries scaled too, values as they were."""
    if blocks.normed:
        known = mx.arange(blocks.all_heads)[:, None] < blocks.heads + blocks.kv_heads
        spread = mx.rsqrt(mx.square(x).mean(axis=-1, keepdims=True) + blocks.eps)
        x = x * mx.where(known, spread, 1.0) * layer["head_norms"]
    partners = (x.reshape(-1, blocks.size) @ _partner(blocks)).reshape(x.shape)
    return x.swapaxes(0, 1) * turns[0] + partners.swapaxes(0, 1) * turns[1]


def _turns(blocks: Blocks, positions: mx.array) -> tuple[mx.array, mx.array]:
    """What each number (heads, B, D) and its partner are multiplied with at these positions (B,)."""
    angles = (positions * blocks.stretch)[:, None] * _frequencies(blocks)
    counts = (blocks.heads, blocks.kv_heads, blocks.kv_heads)
    gain, plain = (
        mx.array(np.repeat(np.array(values, np.float32), counts)[:, None, None])
        for values in ((blocks.scale, 1, 0), (0, 0, 1))
    )
    return mx.cos(angles) * gain + plain, mx.sin(angles) * gain


@cache
def _frequencies(blocks: Blocks) -> mx.array:
    """(D,) radians a position, as `mx.fast.rope` computes them; 0 where nothing is rotated."""
    half = blocks.dims // 2
    rates = mx.exp(mx.arange(half, dtype=mx.float32) * (-math.log(blocks.base) / half))
    pairs = mx.repeat(rates, 2) if blocks.traditional else mx.concatenate([rates, rates])
    made = mx.pad(pairs, (0, blocks.size - blocks.dims))
    mx.eval(made)
    return made


@cache
def _partner(blocks: Blocks) -> mx.array:
    """(D, D): x @ it is, in each place of a rotated pair, the other number with the sign of its sine."""
    first = np.arange(0, blocks.dims, 2) if blocks.traditional else np.arange(blocks.dims // 2)
    second = first + (1 if blocks.traditional else blocks.dims // 2)
    signs = np.zeros((blocks.size, blocks.size), np.float32)
    signs[second, first], signs[first, second] = -1, 1
    made = mx.array(signs)
    mx.eval(made)
    return made
