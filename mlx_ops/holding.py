"""How the rollout engine holds keys and values: which caches serve a model, made by one prefill a prompt."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache

from mlx_ops import fused_blocks
from mlx_ops.backend import prepare
from mlx_ops.fused_decode import compiled_step, serves
from mlx_ops.held import PREFILL_COLUMNS, Held, prefill
from mlx_ops.lean_rows import LeanRows
from mlx_ops.lean_rows import refusal as lean_refusal
from mlx_ops.lean_weights import FOR_A_GPU, read
from mlx_ops.microbatches import bucketed
from mlx_ops.paged_cache import paged_cache
from mlx_ops.row_cache import GROWTH, RowCache, head_shapes, placed, refusal, takes_row_masks
from mlx_ops.sampling import Sampler
from mlx_ops.shared_prompt import GroupLayout, SharedPromptCache, route_attention

Kind = Literal["lean", "shared", "rows", "paged", "paged8", "library", "fused"]
PROMPT_BUCKET = 64
"""Fused buffers of prompts are padded to multiples of this, so that a compiled step meets few shapes."""


def choose(model: Any) -> Kind:
    """The kind that serves the model best on the default device."""
    if refusal(model) is not None:
        return "library"
    if fused_refusal(model) is None:
        return "fused"
    if lean_refusal(model) is None:
        return "lean"
    # A GPU's fused attention beats the split one's many small kernels.
    on_cpu = mx.default_device() == mx.Device(mx.cpu)
    return "shared" if on_cpu and route_attention(model) and takes_row_masks(model) else "rows"


def fused_refusal(model: Any) -> str | None:
    """Why the kernel can't serve a model that has no other `refusal`, or None where it can."""
    if prepare().kind != "cuda":
        return "the kernel is CUDA's, and this is another device"
    if not (route_attention(model) and takes_row_masks(model)):
        return f"{type(model).__module__} computes its own attention"
    odd = sorted({str(key) for key, value in head_shapes(model) if key != value or not serves(key[1], key[2])})
    return f"{type(model).__module__} has heads of {', '.join(odd)}" if odd else None


def hold(kind: Kind, model: Any, prompts: Sequence[Sequence[int]], index: Sequence[int], left: int) -> Held:
    """Run each prompt but for its last token once; the rows continue prompts `index` and may draw `left` tokens."""
    if kind == "library":
        return LibraryRows(model, prompts, index)
    reason = refusal(model)
    if reason is not None:
        raise ValueError(f"cache {kind!r}: {reason}; use 'library'")
    if kind in ("paged", "paged8"):
        return PagedRows(model, prompts, index, bits=8 if kind == "paged8" else None)
    if kind in ("fused", "lean"):
        reason = fused_refusal(model) if kind == "fused" else lean_refusal(model)
        if reason is not None:
            raise ValueError(f"cache {kind!r}: {reason}; use 'rows'")
        return (FusedRows if kind == "fused" else LeanRows)(model, prompts, index, left)
    if kind == "shared" and not route_attention(model):
        raise ValueError(f"cache 'shared': {type(model).__module__} computes its own attention; use 'rows' or 'paged'")
    return (SharedPrompts if kind == "shared" else ExpandedRows)(model, prompts, index, left)


class SharedPrompts(Held):
    """Each prompt once, and the rows' own columns: least memory, and fastest on a CPU."""

    def __init__(self, model: Any, prompts: Sequence[Sequence[int]], index: Sequence[int], left: int) -> None:
        self._model = model
        held = prefill(model, prompts)
        layout = GroupLayout(held[0].padding, held[0].index, index)
        self.caches = [
            SharedPromptCache(prompt, RowCache([0] * len(index), min(left, GROWTH)), layout) for prompt in held
        ]

    def keep(self, alive: Sequence[int], left: int) -> None:
        old, own = self.caches[0].layout, self.caches[0].own.padding
        index = [old.index[slot] for slot in alive]
        used = sorted(set(index))
        padding = [old.padding[prompt] for prompt in used]
        rows, prompts = mx.array(list(alive)), mx.array(used)
        for cache in self.caches:
            cache.own.keep(rows, [own[slot] for slot in alive], left)
            if len(used) < len(old.padding):
                cache.prompt.keep(prompts, padding, 0)
        place = {prompt: number for number, prompt in enumerate(used)}
        self._lay_out([place[prompt] for prompt in index])

    def join(self, prompts: Sequence[Sequence[int]], index: Sequence[int], left: int) -> None:
        more = SharedPrompts(self._model, prompts, index, 0)
        before = self.caches[0].layout
        for cache, other in zip(self.caches, more.caches, strict=True):
            cache.own.join(other.own, left)
            cache.prompt.join(other.prompt, 0)
        self._lay_out([*before.index, *(len(before.padding) + prompt for prompt in index)])

    def _lay_out(self, index: Sequence[int]) -> None:
        prompt = self.caches[0].prompt
        layout = GroupLayout(prompt.padding, prompt.index, index)
        for cache in self.caches:
            cache.layout = layout


class ExpandedRows(Held):
    """Each row's prompt and own columns side by side, for the fused attention of a GPU."""

    def __init__(self, model: Any, prompts: Sequence[Sequence[int]], index: Sequence[int], left: int) -> None:
        self._model = model
        self.caches = prefill(model, prompts)
        self.keep(index, left)

    def keep(self, alive: Sequence[int], left: int) -> None:
        rows = mx.array(list(alive))
        padding = [self.caches[0].padding[slot] for slot in alive]
        for cache in self.caches:
            cache.keep(rows, padding, left)

    def join(self, prompts: Sequence[Sequence[int]], index: Sequence[int], left: int) -> None:
        more = ExpandedRows(self._model, prompts, index, 0)
        for cache, other in zip(self.caches, more.caches, strict=True):
            cache.join(other, left)


class FusedRows(Held):
    """Each prompt once, and for each row buffers of all that it may draw, for CUDA's kernel and compiled step."""

    def __init__(self, model: Any, prompts: Sequence[Sequence[int]], index: Sequence[int], left: int) -> None:
        self._model, self._index = model, list(index)
        held = prefill(model, prompts)
        columns = bucketed(max(held[0].index, 1), PROMPT_BUCKET)
        self._spans = [(padding, held[0].index) for padding in held[0].padding]
        self._step: Any = None
        self._written = mx.zeros((len(index),), mx.int32)
        self._layers: list[list[mx.array]] = []
        for prompt, shapes in zip(held, head_shapes(model), strict=True):
            own = [mx.zeros((len(index), heads, left, size), dtype) for heads, size, dtype in shapes]
            none = [mx.zeros((len(prompts), heads, columns, size), dtype) for heads, size, dtype in shapes]
            shared = [placed(array, array, 0, prompt.index, columns) for array in prompt.state]
            self._layers.append([*(shared or none), *own])
        self._lay_out()

    def step(self, sampler: Sampler, tokens: mx.array, u: mx.array) -> tuple[mx.array, mx.array]:
        take, where = self._take(sampler), [*self._where, self._written]
        tokens, logprobs, self._written = take(tokens, u, where, self._layers)
        return tokens, logprobs

    def _take(self, sampler: Sampler) -> Callable[..., tuple[mx.array, mx.array, mx.array]]:
        """The step, in few kernels where the model's blocks are the usual ones."""
        if self._step is None and fused_blocks.refusal(self._model) is None:
            blocks, weights = read(self._model, FOR_A_GPU)
            mx.eval(weights)
            self._step = partial(fused_blocks.compiled_blocks(blocks, sampler), weights)
        self._step = self._step or compiled_step(self._model, sampler)
        return self._step

    def fit(self, alive: Sequence[int]) -> list[int]:
        """All of them, until half have ended: another number of rows is another trace."""
        held = len(self._index)
        return list(alive if len(alive) <= held // 2 else range(held))

    def keep(self, alive: Sequence[int], left: int) -> None:
        del left
        index = [self._index[slot] for slot in alive]
        used = sorted(set(index))
        rows, prompts = mx.array(list(alive)), mx.array(used)
        kept = [prompts, prompts, rows, rows]
        self._layers = [[mx.take(a, i, axis=0) for a, i in zip(layer, kept, strict=True)] for layer in self._layers]
        self._written = self._written[rows]
        self._index = [used.index(prompt) for prompt in index]
        self._spans = [self._spans[prompt] for prompt in used]
        self._lay_out()

    def join(self, prompts: Sequence[Sequence[int]], index: Sequence[int], left: int) -> None:
        more = FusedRows(self._model, prompts, index, left)
        layers = zip(self._layers, more._layers, strict=True)
        self._layers = [[_stacked(a, b) for a, b in zip(*both, strict=True)] for both in layers]
        self._written = mx.concatenate([self._written, more._written])
        self._index += [len(self._spans) + prompt for prompt in index]
        self._spans += more._spans
        self._lay_out()

    def _lay_out(self) -> None:
        first, last = zip(*(self._spans[prompt] for prompt in self._index), strict=True)
        self._where = [mx.array(numbers, mx.int32) for numbers in (self._index, first, last)]
        # The kernel writes into the rows' buffers, so each must be whole, and nobody else's.
        mx.eval(self._layers, self._written)


def _stacked(first: mx.array, second: mx.array) -> mx.array:
    """(B, H, C, D) on (B', H, C', D), padded on the right to the longer columns."""
    columns = max(first.shape[2], second.shape[2])
    return mx.concatenate([placed(array, array, 0, array.shape[2], columns) for array in (first, second)])


class PagedRows(Held):
    """Pages: rows share their prompt's full blocks, and hold no column that they have not drawn."""

    def __init__(self, model: Any, prompts: Sequence[Sequence[int]], index: Sequence[int], *, bits: int | None) -> None:
        self._model = model
        self.caches = paged_cache(model, bits=bits)
        self.join(prompts, index, 0)

    def keep(self, alive: Sequence[int], left: int) -> None:
        del left
        self.caches[0].pages.keep(alive)
        for cache in self.caches:
            cache.written = [cache.written[slot] for slot in alive]

    def join(self, prompts: Sequence[Sequence[int]], index: Sequence[int], left: int) -> None:
        del left
        held = prefill(self._model, prompts)
        for prompt in range(len(prompts)):
            self._join_group(held, prompt, sum(place == prompt for place in index))
        mx.eval([cache.state for cache in self.caches])

    def _join_group(self, held: Sequence[RowCache], prompt: int, rows: int) -> None:
        pages = self.caches[0].pages
        length = held[0].index - held[0].padding[prompt]
        full = length // pages.size
        first = pages.tables[pages.join(length)]
        begun = [first[full:]] + [pages.tables[pages.join(length, first[:full])][full:] for _ in range(rows - 1)]
        for cache, source in zip(self.caches, held, strict=True):
            loaded = cache.load(source, prompt)
            cache.store(loaded, 0, first[:full])
            for blocks in begun:
                cache.store(loaded, full, blocks)
            cache.written += [length] * rows


class LibraryRows(Held):
    """mlx-lm's own batched caches, for models with windows or recurrent state; every prompt runs alone."""

    def __init__(self, model: Any, prompts: Sequence[Sequence[int]], index: Sequence[int]) -> None:
        self._model = model
        prefilled = [_prefilled(model, prompt[:-1]) for prompt in prompts]
        layers = zip(*(prefilled[prompt] for prompt in index), strict=True)
        self.caches: list[Any] = [layer[0].merge(list(layer)) for layer in layers]

    def keep(self, alive: Sequence[int], left: int) -> None:
        del left
        for cache in self.caches:
            cache.filter(mx.array(list(alive)))

    def join(self, prompts: Sequence[Sequence[int]], index: Sequence[int], left: int) -> None:
        del left
        more = LibraryRows(self._model, prompts, index)
        for cache, other in zip(self.caches, more.caches, strict=True):
            cache.extend(other)


def _prefilled(model: Any, tokens: Sequence[int]) -> list[Any]:
    caches = make_prompt_cache(model)
    for start in range(0, len(tokens), PREFILL_COLUMNS):
        model(mx.array([tokens[start : start + PREFILL_COLUMNS]]), cache=caches)
        mx.eval([cache.state for cache in caches])
    return caches
