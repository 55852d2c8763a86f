"""The usual decoder block for one token of each row, in few operations: a decode step on a CPU.

There MLX spends more on handing a small operation to its thread, some 6 µs, than on its numbers, and mlx-lm's block is
80 operations a layer. Here it is half of them: queries, keys and values are one product, their rotation is another,
and residuals are added in the products. B rows, H key-value heads, R query heads to each, D numbers a head, C columns.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, reduce
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_ops.batching import Tree
from mlx_ops.exponential import SHORT, exp, swiglu
from mlx_ops.lean_weights import Blocks, rates, times

HIDDEN = -1e30
"""What a column that nobody may attend to adds to its scores."""


@dataclass(frozen=True)
class Rows:
    """Where B rows stand in a step."""

    positions: mx.array  # (B,) of their tokens
    column: mx.array  # (1,) of the rows' own buffers, where the tokens' keys and values go


def logits(blocks: Blocks, weights: Tree, tokens: mx.array, rows: Rows, layers: list[list[mx.array]]) -> Any:
    """The logits (B, V) behind these tokens (B,), and the layers' buffers with their keys and values.

    A layer is the rows' own stretch of columns, and the prompts' where prompts are held apart.
    """
    turns = _turns(blocks, rows.positions)
    hidden, after = weights["embedding"][tokens], []
    for layer, held in zip(weights["layers"], layers, strict=True):
        hidden, own = _attended(blocks, layer, hidden, turns, rows.column, held)
        hidden = _fed_forward(blocks, layer, hidden)
        after.append([own, *held[1:]])
    return _joined(times(mx.fast.rms_norm(hidden, weights["norm"], blocks.eps), weights["head"])), after


def blank(blocks: Blocks, rows: int, columns: int) -> mx.array:
    """A stretch (2H, rows, columns, D + 1) of hidden columns."""
    return stretch(mx.zeros((2 * blocks.kv_heads, rows, columns, blocks.size)), mx.zeros((rows, columns), mx.bool_))


def stretch(held: mx.array, shown: mx.array) -> mx.array:
    """Keys, then values (2H, B, C, D), and where they are shown (B, C), as (2H, B, C, D + 1).

    So the products mask and sum: a key's last number, times the 1 that ends each query, hides its column or
    doesn't; a value's last number is 1, of which its weights make their sum.
    """
    ends = mx.stack([mx.where(shown, 0.0, HIDDEN), mx.ones(shown.shape)])
    ends = mx.repeat(ends[..., None], held.shape[0] // 2, axis=0)
    return mx.concatenate([held, ends], axis=-1)


def _attended(
    blocks: Blocks,
    layer: Tree,
    hidden: mx.array,
    turns: tuple[mx.array, mx.array, mx.array],
    column: mx.array,
    held: list[mx.array],
) -> tuple[mx.array, mx.array]:
    """The hidden states (B, hidden) with attention added, and the rows' own stretch with a column more."""
    count, heads = hidden.shape[0], blocks.kv_heads
    turned = _turned(blocks, _normed(blocks, hidden), layer, turns)
    queries = turned[: blocks.heads].reshape(heads, -1, count, blocks.size + 1).swapaxes(1, 2)
    own = mx.slice_update(held[0], turned[blocks.heads :, :, None], column, axes=(2,))
    out = attend(queries, [own, *held[1:]]).swapaxes(0, 1)
    out = (out[..., :-1] / out[..., -1:]).reshape(count, -1)
    return times(out, layer["out"], hidden), own


def attend(queries: mx.array, stretches: Sequence[mx.array]) -> mx.array:
    """What scaled queries (H, B, R, D + 1) sum of the values, and of their weights, under one softmax.

    A stretch (2H, P, C, D + 1) serves B / P rows that stand beside each other.
    """
    ends, heads = (*queries.shape[:3], 1), queries.shape[0]
    scores = []
    for part in stretches:
        together = queries.reshape(heads, part.shape[1], -1, queries.shape[-1])
        scores.append(together @ part[:heads].swapaxes(-1, -2))
    top = reduce(mx.maximum, [score.max(axis=-1, keepdims=True).reshape(ends) for score in scores])
    weights = [exp(score, top.reshape(*score.shape[:3], 1)) for score in scores]
    pairs = zip(weights, stretches, strict=True)
    return reduce(mx.add, [(weight @ part[heads:]).reshape(queries.shape) for weight, part in pairs])


def _fed_forward(blocks: Blocks, layer: Tree, hidden: mx.array) -> mx.array:
    panels = times(_normed(blocks, hidden), layer["gate_up"])
    half = len(panels) // 2
    return times(_joined(swiglu(panels[:half], panels[half:])), layer["down"], hidden)


def _joined(panels: mx.array) -> mx.array:
    """(P, B, columns) as (B, P columns)."""
    return panels.swapaxes(0, 1).reshape(panels.shape[1], -1)


def _normed(blocks: Blocks, hidden: mx.array) -> mx.array:
    """RMSNorm of (B, hidden) but for its weights, which are in the matrices."""
    if hidden.size < SHORT:
        return mx.fast.rms_norm(hidden, None, blocks.eps)
    # Fused into the product, the root would be taken for each number; another axis keeps it apart.
    return hidden * mx.rsqrt(mx.square(hidden).sum(axis=-1) / hidden.shape[-1] + blocks.eps)[:, None]


def _turned(blocks: Blocks, x: mx.array, layer: Tree, turns: tuple[mx.array, mx.array, mx.array]) -> mx.array:
    """Queries, keys and values (heads, B, D + 1): normed, rotated, queries scaled too, values as they were."""
    x = times(x, layer["qkv"])
    if blocks.normed:
        known = mx.arange(blocks.all_heads)[:, None, None] < blocks.heads + blocks.kv_heads
        spread = mx.rsqrt(mx.square(x).sum(axis=-1, keepdims=True) / blocks.size + blocks.eps)
        x = x * mx.where(known, spread, 1.0) * layer["head_norms"]
    plain, across, ends = turns
    return x * plain + (x.flatten(0, 1) @ _partner(blocks)).reshape(x.shape) * across + ends


def _turns(blocks: Blocks, positions: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """What each number (heads, B, D + 1) and its partner are multiplied with at these positions (B,), and what it ends.

    All three are whole: g++ makes vectors of a loop only where nothing in it is broadcast.
    """
    angles = (positions * blocks.stretch)[:, None] * _frequencies(blocks)
    counts = (blocks.heads, blocks.kv_heads, blocks.kv_heads)
    gain, plain, last = (
        mx.array(np.repeat(np.array(values, np.float32), counts)[:, None, None])
        for values in ((blocks.scale, 1, 0), (0, 0, 1), (1, 0, 1))
    )
    cosines, sines = mx.cos(angles)[None] * gain + plain, mx.sin(angles)[None] * gain
    ends = mx.where(mx.arange(blocks.size + 1) == blocks.size, last, 0.0)
    return cosines, sines, mx.contiguous(mx.broadcast_to(ends, cosines.shape))


@cache
def _frequencies(blocks: Blocks) -> mx.array:
    """(D + 1,) radians a position; 0 where nothing is rotated."""
    half = rates(blocks)
    pairs = mx.repeat(half, 2) if blocks.traditional else mx.concatenate([half, half])
    made = mx.pad(pairs, (0, blocks.size + 1 - blocks.dims))
    mx.eval(made)
    return made


@cache
def _partner(blocks: Blocks) -> mx.array:
    """(D + 1, D + 1): x @ it is, in each place of a rotated pair, the other number with the sign of its sine."""
    first = np.arange(0, blocks.dims, 2) if blocks.traditional else np.arange(blocks.dims // 2)
    second = first + (1 if blocks.traditional else blocks.dims // 2)
    signs = np.zeros((blocks.size + 1, blocks.size + 1), np.float32)
    signs[second, first], signs[first, second] = -1, 1
    made = mx.array(signs)
    mx.eval(made)
    return made
