"""The last rows of a rollout on a CPU: there MLX spends more on a step's many small operations than on their numbers,
and a compiled step has fewer of them, and computes what layers share once.

Left out: more rows, whose operations are long enough, and GPUs (CUDA has `fused_decode`; Metal was not measured).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import mlx.core as mx

from mlx_ops.backend import prepare
from mlx_ops.exponential import softmax
from mlx_ops.fused_decode import Draw
from mlx_ops.holding import Held, SharedPrompts

FEW = 16
"""Rows up to which a model of 12 M parameters gains by it; a smaller one would gain up to 32."""
COLUMNS = 64
"""Buffers grow by so many columns: each growth is another trace, each column too many costs its softmax."""


@dataclass(frozen=True)
class FixedCache:
    """One layer's keys and values (B, H, C, D) for one step of a trace; the new column goes to place `at`."""

    buffers: list[mx.array]
    at: mx.array  # (1,)
    offset: mx.array  # (B,) the rows' positions
    mask: mx.array  # (B, 1, 1, C)

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> mx.array:  # noqa: ARG002
        assert (N, window_size) == (1, None), "a step is one token of full attention"
        return self.mask

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        for place, new in enumerate((keys, values)):
            self.buffers[place] = mx.slice_update(self.buffers[place], new, self.at, axes=(2,))
        return self.buffers[0], self.buffers[1]

    def attend(self, queries: mx.array, keys: mx.array, values: mx.array, *, scale: float, mask: Any) -> mx.array:
        """Attention (B, heads, 1, D)."""
        rows, heads, _, size = queries.shape
        queries = (queries * scale).reshape(rows, keys.shape[1], -1, size)
        scores = mx.where(mask, queries @ keys.swapaxes(-1, -2), -mx.inf)
        return (softmax(scores) @ values).reshape(rows, heads, 1, -1)


class CompiledRows(Held):
    """Each row's prompt and own columns side by side in buffers of fixed length, for a compiled step."""

    slack: ClassVar[float] = 0.5

    def __init__(self, held: SharedPrompts) -> None:
        """Take the rows over from `held`, which have drawn some tokens."""
        first, self._step = held.caches[0], None
        layout, own = first.layout, first.own
        self._columns = layout.columns + own.index
        index, begins = mx.array(layout.index), mx.array(own.padding)
        # Columns that are no row's own stand before each prompt and between it and what was drawn.
        drawn = (mx.arange(own.index)[None] >= begins[:, None])[:, None, None]
        self._shown = mx.concatenate([layout.visible(), drawn], axis=-1)
        self._offset = mx.broadcast_to(mx.array(first.offset), index.shape)
        self._layers = [_side_by_side(cache.prompt.state, cache.own, index) for cache in held.caches]

    def step(self, draw: Draw, tokens: mx.array, u: mx.array) -> tuple[mx.array, mx.array]:
        if self._step is None:
            self._step = _compiled(draw)
        if self._columns == self._shown.shape[-1]:
            self._grow()
        at = mx.array([self._columns])
        tokens, logprobs, self._offset, self._layers = self._step(
            tokens, u, at, self._offset, self._shown, self._layers
        )
        self._columns += 1
        return tokens, logprobs

    def keep(self, alive: Sequence[int], left: int) -> None:
        del left
        rows = mx.array(list(alive))
        self._offset, self._shown = self._offset[rows], self._shown[rows]
        self._layers = [[buffer[rows] for buffer in layer] for layer in self._layers]

    def join(self, prompts: Sequence[Sequence[int]], index: Sequence[int], left: int) -> None:
        del prompts, index, left
        raise AssertionError("rows are taken over when none waits")

    def _grow(self) -> None:
        more = COLUMNS - self._columns % COLUMNS
        self._shown = mx.pad(self._shown, [(0, 0)] * 3 + [(0, more)], constant_values=True)
        self._layers = [[mx.pad(buffer, [(0, 0), (0, 0), (0, more), (0, 0)]) for buffer in x] for x in self._layers]


def compiled(held: Held, rows: int) -> Held:
    """`held`, or the same few rows behind a compiled step where that is cheaper."""
    if rows > FEW or not isinstance(held, SharedPrompts) or not prepare().compiles:
        return held
    return CompiledRows(held)


def _side_by_side(prompt: list[mx.array], own: Any, index: mx.array) -> list[mx.array]:
    drawn = [array[:, :, : own.index] for array in own.state]
    if not prompt:  # of one token
        return drawn
    return [mx.concatenate([mx.take(a, index, axis=0), b], axis=2) for a, b in zip(prompt, drawn, strict=True)]


def _compiled(draw: Draw) -> Any:
    """The step, traced once a shape. The model's weights are constants of the trace: make a new one after an update."""

    def step(tokens: mx.array, u: mx.array, at: mx.array, offset: mx.array, shown: mx.array, layers: Any) -> Any:
        mask = mx.logical_and(shown, mx.arange(shown.shape[-1]) <= at)
        caches = [FixedCache(list(buffers), at, offset, mask) for buffers in layers]
        tokens, logprobs = draw(tokens, u, caches)
        return tokens, logprobs, offset + 1, [cache.buffers for cache in caches]

    return mx.compile(step)
