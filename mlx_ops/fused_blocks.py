"""The usual decoder block for one token of each row, in few kernels: a decode step on CUDA.

There the host hands over kernels more slowly than the device is done with them, and mlx-lm's block is 16 a layer. Here
it is 8: queries, keys and values are one product, gate and up another, residuals are added in the products, and the
rotation is `append_and_attend`'s.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import mlx.core as mx

from mlx_ops import lean_weights
from mlx_ops.batching import Tree
from mlx_ops.exponential import swiglu
from mlx_ops.fused_decode import Heads, Places, append_and_attend
from mlx_ops.lean_weights import FOR_A_GPU, Blocks, rates, read, times, unlike, weight_type
from mlx_ops.sampling import Sampler


def refusal(model: Any) -> str | None:
    """Why these blocks aren't the model's, or None where they are."""
    return lean_weights.refusal(model) or unlike(model, _one_by_one)


def logits(
    blocks: Blocks, weights: Tree, tokens: mx.array, places: Places, layers: Sequence[Sequence[mx.array]]
) -> mx.array:
    """The logits (B, V) behind these tokens (B,), whose keys and values are appended to the layers' buffers."""
    hidden, frequencies = weights["embedding"][tokens], _frequencies(blocks)
    heads = Heads(blocks.heads, blocks.kv_heads, blocks.size, blocks.scale, blocks.dims, blocks.traditional)
    for layer, buffers in zip(weights["layers"], layers, strict=True):
        x = times(mx.fast.rms_norm(hidden, layer["input_norm"], blocks.eps), layer["qkv"])
        x = _normed(blocks, x, layer["head_norms"]) if blocks.normed else x
        hidden = times(append_and_attend(heads, [x], buffers, places, frequencies), layer["out"], hidden)
        x = times(mx.fast.rms_norm(hidden, layer["mlp_norm"], blocks.eps), layer["gate_up"])
        half = x.shape[-1] // 2
        hidden = times(swiglu(x[:, :half], x[:, half:]), layer["down"], hidden)
    return times(mx.fast.rms_norm(hidden, weights["norm"], blocks.eps), weights["head"])


@cache
def compiled_blocks(blocks: Blocks, sampler: Sampler) -> Callable[..., tuple[mx.array, mx.array, mx.array]]:
    """`fused_decode.compiled_step` with the weights before its arguments: traced once a shape in a process's life."""

    def step(
        weights: Tree, tokens: mx.array, u: mx.array, where: list[mx.array], layers: list[list[mx.array]]
    ) -> tuple[mx.array, mx.array, mx.array]:
        places = Places(*where)
        return *sampler(logits(blocks, weights, tokens, places, layers), u), places.written + 1

    return mx.compile(step)


def _normed(blocks: Blocks, x: mx.array, norms: mx.array) -> mx.array:
    """Rows (B, heads D) with queries and keys normed."""
    heads = x.reshape(len(x), blocks.all_heads, blocks.size)
    known = blocks.heads + blocks.kv_heads
    normed = mx.fast.rms_norm(heads[:, :known], None, blocks.eps) * norms
    return mx.concatenate([normed, heads[:, known:]], axis=1).reshape(x.shape)


@cache
def _frequencies(blocks: Blocks) -> mx.array:
    """(dims / 2,) radians a position."""
    made = rates(blocks) * blocks.stretch
    mx.eval(made)
    return made


def _one_by_one(model: Any, tokens: mx.array) -> mx.array:
    """The logits behind each of these tokens, read one after the other."""
    blocks, weights = read(model, FOR_A_GPU)
    shape = (1, blocks.kv_heads, len(tokens), blocks.size)
    layers = [[mx.zeros(shape, weight_type(model)) for _ in range(4)] for _ in weights["layers"]]
    mx.eval(layers)
    found, none = [], mx.zeros((1,), mx.int32)
    for place in range(len(tokens)):
        places = Places(none, none, none, mx.array([place], mx.int32))
        found.append(logits(blocks, weights, tokens[place : place + 1], places, layers))
        mx.eval(found)
    return mx.concatenate(found)
