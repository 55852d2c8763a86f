"""On CUDA the kernel itself; elsewhere what it should compute, one row after the other, in its place."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_ops import fused_blocks
from mlx_ops.fused_decode import Heads, Places
from mlx_ops.holding import FusedRows, hold
from tests.mlx_ops.test_lean_rows import USUAL, Gelu, advance, tokens_of
from tests.mlx_ops.tiny import tiny_model

ON_CUDA = mx.cuda.is_available()
CLOSE = 2e-3 if ON_CUDA else 2e-4  # a GPU may multiply float32 in TF32


def turned(heads: Heads, x: np.ndarray, position: int, frequencies: np.ndarray) -> np.ndarray:
    """Heads (H, D) at a position."""
    out, half = x.copy(), heads.dims // 2
    for pair in range(half):
        one, other = (2 * pair, 2 * pair + 1) if heads.traditional else (pair, pair + half)
        sine, cosine = np.sin(position * frequencies[pair]), np.cos(position * frequencies[pair])
        out[:, one] = x[:, one] * cosine - x[:, other] * sine
        out[:, other] = x[:, other] * cosine + x[:, one] * sine
    return out


def by_hand(
    heads: Heads, rows: list[mx.array], buffers: list[mx.array], places: Places, frequencies: mx.array
) -> mx.array:
    """`append_and_attend` of queries, keys and values beside each other."""
    (packed,), shape, out = rows, (-1, heads.size), []
    where = zip(*(np.array(part) for part in (places.prompt, places.first, places.last, places.written)), strict=True)
    for row, (prompt, first, last, written) in enumerate(where):
        parts = np.split(np.array(packed[row]).reshape(shape), [heads.queries, heads.queries + heads.keys])
        queries, key = (turned(heads, part, last - first + written, np.array(frequencies)) for part in parts[:2])
        for buffer, fresh in zip(buffers[2:], (key, parts[2]), strict=True):
            buffer[row, :, int(written)] = mx.array(fresh)
        keys, values = (
            np.concatenate([np.array(shared[prompt, :, first:last]), np.array(own[row, :, : written + 1])], axis=1)
            for shared, own in zip(buffers[:2], buffers[2:], strict=True)
        )
        group = heads.queries // heads.keys
        scores = heads.scale * np.einsum("hrd,hcd->hrc", queries.reshape(heads.keys, group, heads.size), keys)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        out.append(np.einsum("hrc,hcd->hrd", weights, values).reshape(-1))
    return mx.array(np.stack(out)).astype(packed.dtype)


@pytest.fixture(autouse=True)
def _in_the_kernels_place(monkeypatch):
    if not ON_CUDA:
        monkeypatch.setattr(fused_blocks, "append_and_attend", by_hand)
        monkeypatch.setattr(mx, "compile", lambda step: step)
        fused_blocks.compiled_blocks.cache_clear()
    yield
    fused_blocks.compiled_blocks.cache_clear()


@pytest.mark.parametrize("model", USUAL)
def test_rows_draw_what_they_draw_with_the_model_itself(model: Callable[[], Any]):
    model = model()
    assert fused_blocks.refusal(model) is None
    prompts, index, seeds = tokens_of([9, 3, 14]), [0, 0, 1, 2, 2], [0, 1, 2, 3, 4]
    last = mx.array([prompts[place][-1] for place in index], mx.uint32)
    held = FusedRows(model, prompts, index, 20)
    found, expected = (advance(rows, last, seeds, 0, 12) for rows in (held, hold("rows", model, prompts, index, 20)))
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_allclose(found[1], expected[1], atol=CLOSE)


def test_another_activation_is_found():
    model: Any = tiny_model()
    for layer in model.model.layers:
        layer.mlp = Gelu(layer.mlp)
    assert "computes something else" in str(fused_blocks.refusal(model))


def test_roundings_of_half_precision_are_close_enough():
    model: Any = tiny_model()
    model.set_dtype(mx.float16)
    assert fused_blocks.refusal(model) is None
