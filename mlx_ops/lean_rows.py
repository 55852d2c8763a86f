"""Rows of a rollout on a CPU, behind one compiled step that is traced once a shape in the life of the process.

A step meets few shapes: numbers of rows and columns are rounded up, ended rows filling the rest. A prompt is held once
for its rows where reading it again for each would cost more than the operations that this saves; else it stands before
each row's own columns.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import groupby
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_ops import lean_weights
from mlx_ops.backend import prepare
from mlx_ops.batching import Tree
from mlx_ops.held import Held, prefill
from mlx_ops.lean_blocks import HIDDEN, Rows, blank, logits, stretch
from mlx_ops.lean_weights import FOR_A_CPU, Blocks, read, unlike, weight_type
from mlx_ops.microbatches import bucketed
from mlx_ops.sampling import Sampler

COLUMNS = 32
"""Buffers are multiples of so many columns: each growth is another trace, each column too many costs its softmax."""
SHARING = 4 << 20
"""Bytes of prompts a step, read again for each row, that cost what attending to prompts apart costs: 0.3 ms."""
SLACK = 1.25
"""So many times the live rows are held rather than to hold prompts again for fewer rows each."""


class LeanRows(Held):
    """Each row's keys and values in a buffer of its own, each prompt's beside them or in them."""

    def __init__(
        self,
        model: Any,
        prompts: Sequence[Sequence[int]],
        index: Sequence[int],
        left: int,
        known: tuple[Blocks, Tree] | None = None,
    ) -> None:
        """`known` is what `read` gave of the model, where other rows have it."""
        self._model = model
        self._blocks, self._weights = read(model, FOR_A_CPU) if known is None else known
        mx.eval(self._weights)
        held = prefill(model, prompts)
        columns, counts = held[0].index, [len(list(rows)) for _, rows in groupby(index)]
        self._used, own = 0, blank(self._blocks, len(index), bucketed(min(left, COLUMNS), COLUMNS))
        self._layers = [[own] for _ in held]
        self._positions = columns - mx.array(held[0].padding)[mx.array(list(index))]
        self._group = counts[0]
        if columns:
            after = blank(self._blocks, len(prompts), bucketed(columns, COLUMNS) - columns)
            shown = mx.arange(columns)[None] >= mx.array(held[0].padding)[:, None]
            for layer, cache in zip(self._layers, held, strict=True):
                both = mx.concatenate([array.swapaxes(0, 1) for array in cache.state])
                layer.append(mx.concatenate([stretch(both, shown), after], axis=2))
            if not self._shares(len(index), self._group if len(set(counts)) == 1 else 1):
                self._merge(mx.array(list(index)))

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for layer in self._layers for array in layer)

    @property
    def _rows(self) -> int:
        return self._layers[0][0].shape[1]

    @property
    def _prompts(self) -> mx.array | None:
        """A layer's prompts where they are held apart."""
        return self._layers[0][1] if len(self._layers[0]) > 1 else None

    def step(self, sampler: Sampler, tokens: mx.array, u: mx.array) -> tuple[mx.array, mx.array]:
        if self._used == self._layers[0][0].shape[2]:
            self._layers = [[_grown(own), *rest] for own, *rest in self._layers]
        take, where = _compiled(self._blocks, sampler), [self._positions, mx.array([self._used])]
        tokens, logprobs, self._positions, self._layers = take(self._weights, tokens, u, where, self._layers)
        self._used += 1
        return tokens, logprobs

    def fit(self, alive: Sequence[int]) -> list[int]:
        """The live rows and as many ended ones as make it a shape that is met again."""
        held = self._rows
        kept = self._in_groups(alive) if self._prompts is not None else None
        if kept is None:
            ended = sorted(set(range(held)) - set(alive))
            kept = sorted([*alive, *ended[: _rounded(len(alive)) - len(alive)]])
        return kept if len(kept) < held else list(range(held))

    def keep(self, alive: Sequence[int], left: int) -> None:
        del left
        rows, group = mx.array(list(alive)), self._group
        if self._prompts is not None:
            counts = [len(list(rows)) for _, rows in groupby(alive, key=lambda slot: slot // group)]
            width = next((w for w in _halves(group) if all(count % w == 0 for count in counts)), 1)
            if self._shares(len(alive), width):
                self._group, prompts = width, mx.array([slot // group for slot in alive[::width]])
                self._layers = [[own, *(part[:, prompts] for part in rest)] for own, *rest in self._layers]
            else:
                self._merge(mx.arange(self._rows) // group)
        self._positions = self._positions[rows]
        self._layers = [[own[:, rows], *rest] for own, *rest in self._layers]
        self._drop()

    def join(self, prompts: Sequence[Sequence[int]], index: Sequence[int], left: int) -> None:
        more = LeanRows(self._model, prompts, index, left, (self._blocks, self._weights))
        for held in (self, more):
            if held._prompts is not None:
                held._merge(mx.arange(held._rows) // held._group)
        used = max(self._used, more._used)
        for held in (self, more):
            held._extend(used - held._used, bucketed(used + 1, COLUMNS) - used)
        self._positions = mx.concatenate([self._positions, more._positions])
        pairs = zip(self._layers, more._layers, strict=True)
        self._layers = [[mx.concatenate([one[0], other[0]], axis=1)] for one, other in pairs]

    def _shares(self, rows: int, group: int) -> bool:
        """Whether so many rows hold each prompt once for `group` of them."""
        assert self._prompts is not None
        column = 8 * self._blocks.kv_heads * self._blocks.size * len(self._layers)
        return (rows - rows // group) * self._prompts.shape[2] * column >= SHARING

    def _in_groups(self, alive: Sequence[int]) -> list[int] | None:
        """Live and ended rows, even in number for each prompt; None where prompts don't stay apart."""
        for width in _halves(self._group):
            kept: list[int] = []
            for group, rows in groupby(alive, key=lambda slot: slot // self._group):
                live = list(rows)
                first = group * self._group
                ended = sorted(set(range(first, first + self._group)) - set(live))
                kept += sorted([*live, *ended[: -len(live) % width]])
            if len(kept) <= SLACK * len(alive):
                return kept if self._shares(len(kept), width) else None
        return None

    def _merge(self, index: mx.array) -> None:
        """Put prompts `index[b]` before the own columns of each row b."""
        columns = self._layers[0][1].shape[2]
        self._layers = [[mx.concatenate([prompts[:, index], own], axis=2)] for own, prompts in self._layers]
        self._used, self._group = self._used + columns, 1

    def _extend(self, before: int, after: int) -> None:
        """So many hidden columns before and behind those in use."""
        left, right = (blank(self._blocks, self._rows, columns) for columns in (before, after))
        used, self._used = self._used, self._used + before
        self._layers = [[mx.concatenate([left, own[:, :, :used], right], axis=2), *rest] for own, *rest in self._layers]

    def _drop(self) -> None:
        """Leave out the columns before those of any row: where rows come and go, they would add up."""
        shown = (self._layers[0][0][0, :, :, -1] != HIDDEN).any(axis=0)
        first = int(np.array(shown).argmax()) // COLUMNS * COLUMNS
        if first:
            self._used -= first
            self._layers = [[own[:, :, first:], *rest] for own, *rest in self._layers]


def refusal(model: Any) -> str | None:
    """Why these rows can't serve a model, or None where they can; each kind of model is compared once a process."""
    if prepare().kind != "cpu" or not prepare().compiles:
        return "the step is for a CPU with a compiler"
    reason = lean_weights.refusal(model)
    if reason is not None:
        return reason
    if weight_type(model) != mx.float32:
        return f"its weights are {weight_type(model)}"
    return unlike(model, _one_by_one)


def _one_by_one(model: Any, tokens: mx.array) -> mx.array:
    """The logits behind each of these tokens, read one after the other."""
    blocks, weights = read(model, FOR_A_CPU)
    layers, found = [[blank(blocks, 1, len(tokens))] for _ in weights["layers"]], []
    for place in range(len(tokens)):
        rows = Rows(mx.array([place]), mx.array([place]))
        out, layers = logits(blocks, weights, tokens[place : place + 1], rows, layers)
        found.append(out)
    return mx.concatenate(found)


@cache
def _compiled(blocks: Blocks, sampler: Sampler) -> Callable[..., Any]:
    def step(weights: Tree, tokens: mx.array, u: mx.array, where: list[mx.array], layers: list[list[mx.array]]) -> Any:
        out, layers = logits(blocks, weights, tokens, Rows(*where), layers)
        return *sampler(out, u), where[0] + 1, layers

    return mx.compile(step)


def _grown(own: mx.array) -> mx.array:
    """A full stretch (2H, B, C, D + 1) with hidden columns more: copies of others, for only `take` copies fast."""
    pages, (heads, rows, columns, size) = own.shape[2] // COLUMNS, own.shape
    index = np.arange(heads * rows)[:, None] * pages + np.minimum(np.arange(pages + 1), pages - 1)
    longer = own.reshape(-1, COLUMNS, size)[mx.array(index)].reshape(heads, rows, columns + COLUMNS, size)
    longer[: heads // 2, :, columns:, -1] = HIDDEN
    return longer


def _halves(group: int) -> Iterator[int]:
    """The group, its half, …, while they are whole and more than one row."""
    while group > 1:
        yield group
        group = group // 2 if group % 2 == 0 else 1


def _rounded(rows: int) -> int:
    """The next of 1, 2, …, 8, 10, 12, 14, 16, 20, …: four sizes to each power of two."""
    return bucketed(rows, max(1, (1 << (rows.bit_length() - 1)) // 4))
