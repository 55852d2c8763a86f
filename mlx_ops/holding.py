"""How the rollout engine holds the keys and values of its rows: which caches serve a model, made by one prefill a prompt."""

from collections.abc import Sequence
from typing import Any, Protocol

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

from mlx_ops.row_cache import GROWTH, RowCache, refusal
from mlx_ops.shared_prompt import GroupLayout, SharedPromptCache, route_attention

PREFILL_COLUMNS = 512
"""Columns of a prompt that run at once."""


class Held(Protocol):
    """The caches of rows in the making, one a layer."""

    @property
    def caches(self) -> list[Any]: ...

    def keep(self, alive: Sequence[int], left: int) -> None:
        """Only these rows (slots, in order), with room for `left` more tokens."""
        ...


def hold(model: Any, prompts: Sequence[Sequence[int]], index: Sequence[int], left: int) -> Held:
    """Run each prompt but for its last token once; caches for rows that continue prompts `index`, in order of their prompt."""
    if refusal(model) is not None:
        return LibraryRows(model, prompts, index)
    if mx.default_device() == mx.Device(mx.cpu) and route_attention(model) >= len(model.layers):
        return SharedPrompts(model, prompts, index, left)
    return ExpandedRows(model, prompts, index, left)


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
        held = prefill(model, prompts)
        layout = GroupLayout(held[0].padding, held[0].index, index)
        self.caches = [SharedPromptCache(prompt, layout, min(left, GROWTH)) for prompt in held]

    def keep(self, alive: Sequence[int], left: int) -> None:
        old = self.caches[0].layout
        index = [old.index[slot] for slot in alive]
        used = sorted(set(index))
        padding = [old.padding[prompt] for prompt in used]
        place = {prompt: number for number, prompt in enumerate(used)}
        rows, prompts = mx.array(list(alive)), mx.array(used)
        layout = GroupLayout([width - min(padding) for width in padding], old.columns - min(padding), [place[p] for p in index])
        for cache in self.caches:
            cache.own.keep(rows, [0] * len(index), left)
            if len(used) < len(old.padding):
                cache.prompt.keep(prompts, padding, 0)
            cache.layout = layout


class ExpandedRows:
    """Each row's prompt and own columns side by side, for the fused attention of a GPU."""

    def __init__(self, model: Any, prompts: Sequence[Sequence[int]], index: Sequence[int], left: int) -> None:
        self.caches = prefill(model, prompts)
        self.keep(index, left)

    def keep(self, alive: Sequence[int], left: int) -> None:
        rows = mx.array(list(alive))
        padding = [self.caches[0].padding[slot] for slot in alive]
        for cache in self.caches:
            cache.keep(rows, padding, left)


class LibraryRows:
    """mlx-lm's own batched caches, for models with windows or recurrent state; every prompt runs alone."""

    def __init__(self, model: Any, prompts: Sequence[Sequence[int]], index: Sequence[int]) -> None:
        prefilled = [_prefilled(model, prompt[:-1]) for prompt in prompts]
        layers = zip(*(prefilled[prompt] for prompt in index), strict=True)
        self.caches = [layer[0].merge(list(layer)) for layer in layers]

    def keep(self, alive: Sequence[int], left: int) -> None:
        del left
        for cache in self.caches:
            cache.filter(mx.array(list(alive)))


def _prefilled(model: Any, tokens: Sequence[int]) -> list[Any]:
    caches = make_prompt_cache(model)
    for start in range(0, len(tokens), PREFILL_COLUMNS):
        model(mx.array([tokens[start : start + PREFILL_COLUMNS]]), cache=caches)
        mx.eval([cache.state for cache in caches])
    return caches
