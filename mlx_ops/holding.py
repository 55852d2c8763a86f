"""How the rollout engine holds keys and values: which caches serve a model, made by one prefill a prompt."""

from collections.abc import Sequence
from typing import Any, Literal, Protocol

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

from mlx_ops.paged_cache import paged_cache
from mlx_ops.row_cache import GROWTH, RowCache, refusal, takes_row_masks
from mlx_ops.shared_prompt import GroupLayout, SharedPromptCache, route_attention

Kind = Literal["shared", "rows", "paged", "paged8", "library"]
PREFILL_COLUMNS = 512
"""Columns of a prompt that run at once."""


class Held(Protocol):
    """The caches of rows in the making, one a layer."""

    caches: list[Any]

    def keep(self, alive: Sequence[int], left: int) -> None:
        """Only these rows (slots, in order), with room for `left` more tokens."""
        ...

    def join(self, prompts: Sequence[Sequence[int]], index: Sequence[int], left: int) -> None:
        """More rows behind these, continuing new prompts."""
        ...


def choose(model: Any) -> Kind:
    """The kind that serves the model best on the default device."""
    if refusal(model) is not None:
        return "library"
    # A GPU's fused attention beats the split one's many small kernels.
    on_cpu = mx.default_device() == mx.Device(mx.cpu)
    return "shared" if on_cpu and route_attention(model) and takes_row_masks(model) else "rows"


def hold(kind: Kind, model: Any, prompts: Sequence[Sequence[int]], index: Sequence[int], left: int) -> Held:
    """Run each prompt but for its last token once; the rows continue prompts `index` and may draw `left` tokens."""
    if kind == "library":
        return LibraryRows(model, prompts, index)
    reason = refusal(model)
    if reason is not None:
        raise ValueError(f"cache {kind!r}: {reason}; use 'library'")
    if kind in ("paged", "paged8"):
        return PagedRows(model, prompts, index, bits=8 if kind == "paged8" else None)
    if kind == "shared" and not route_attention(model):
        raise ValueError(f"cache 'shared': {type(model).__module__} computes its own attention; use 'rows' or 'paged'")
    return (SharedPrompts if kind == "shared" else ExpandedRows)(model, prompts, index, left)


def prefill(model: Any, prompts: Sequence[Sequence[int]]) -> list[RowCache]:
    """Caches (P rows, padded on the left) of all but the prompts' last tokens."""
    lengths = [len(prompt) - 1 for prompt in prompts]
    columns = max(lengths)
    tokens = np.zeros((len(prompts), columns), dtype=np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, columns - lengths[row] :] = prompt[:-1]
    caches = [RowCache([columns - length for length in lengths], columns) for _ in model.layers]
    for start in range(0, columns, PREFILL_COLUMNS):
        model(mx.array(tokens[:, start : start + PREFILL_COLUMNS]), cache=caches)
        mx.eval([cache.state for cache in caches])
    return caches


class SharedPrompts:
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


class ExpandedRows:
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


class PagedRows:
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


class LibraryRows:
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
