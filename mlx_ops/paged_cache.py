"""A key-value cache of pages: blocks of a pool that rows take, share and give back.

Row b's token i lies in block `tables[b][i // size]`, slot `i % size`. The full blocks of a prompt are held once for
all rows that continue it; what was begun is copied, so a block that is written has one holder. Nothing else is copied
when a row joins or leaves. Fetching gathers a layer's pages into one array, which is gone when the layer is done:
what lasts is the pool. Left out: swapping pages out, and reading pages in a kernel.
"""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_ops.row_cache import RowCache, refusal

PAGE = 16
"""Tokens of a block."""
QUANTIZED_GROUP = 32
"""Numbers that share a scale in 8-bit pages."""


class BlockPool:
    """Which blocks are free, and how many tables hold each of the others."""

    def __init__(self, blocks: int = 0) -> None:
        self.holders = [0] * blocks
        self._free = list(range(blocks))[::-1]

    @property
    def free(self) -> int:
        return len(self._free)

    def take(self) -> int:
        """A block of one holder; the pool grows by half where none is free."""
        if not self._free:
            size = len(self.holders)
            more = max(64, size // 2)
            self.holders += [0] * more
            self._free = list(range(size, size + more))[::-1]
        block = self._free.pop()
        self.holders[block] = 1
        return block

    def share(self, block: int) -> int:
        """One more holder of a block that is held."""
        assert self.holders[block] > 0, f"block {block} is free"
        self.holders[block] += 1
        return block

    def give_back(self, block: int) -> None:
        """One holder less; the last one frees the block."""
        assert self.holders[block] > 0, f"block {block} is free"
        self.holders[block] -= 1
        if not self.holders[block]:
            self._free.append(block)


class Pages:
    """The rows of all layers: their blocks and lengths. Layers advance together, and the first to come reserves."""

    def __init__(self, size: int = PAGE) -> None:
        self.size = size
        self.pool = BlockPool()
        self.tables: list[list[int]] = []
        self.lengths: list[int] = []

    def join(self, length: int = 0, shared: Sequence[int] = ()) -> int:
        """A new row of so many tokens, the first of them in `shared` full blocks; gives its slot."""
        assert len(shared) * self.size <= length
        self.tables.append([self.pool.share(block) for block in shared])
        self.lengths.append(0)
        self.reserve(len(self.tables) - 1, length)
        return len(self.tables) - 1

    def reserve(self, row: int, length: int) -> None:
        """Blocks for the first `length` tokens of a row."""
        table = self.tables[row]
        while len(table) * self.size < length:
            table.append(self.pool.take())
        self.lengths[row] = max(self.lengths[row], length)

    def keep(self, rows: Sequence[int]) -> None:
        """Only these rows, in this order; the others' blocks go back."""
        for row in set(range(len(self.tables))) - set(rows):
            for block in self.tables[row]:
                self.pool.give_back(block)
        self.tables = [self.tables[row] for row in rows]
        self.lengths = [self.lengths[row] for row in rows]

    def places(self, starts: Sequence[int], count: int) -> tuple[mx.array, mx.array]:
        """The blocks and slots (B, count) of tokens starts[b] to starts[b] + count - 1."""
        tokens = np.array(starts)[:, None] + np.arange(count)
        blocks = np.take_along_axis(self._padded(), tokens // self.size, axis=1)
        return mx.array(blocks.astype(np.int32)), mx.array((tokens % self.size).astype(np.int32))

    def table(self) -> mx.array:
        """(B, blocks of the longest row); rows with fewer repeat some block, which the mask hides."""
        return mx.array(self._padded())

    def _padded(self) -> np.ndarray:
        widest = max(len(table) for table in self.tables)
        return np.array([table + [0] * (widest - len(table)) for table in self.tables], dtype=np.int32)


class PagedKVCache:
    """One layer's pages, with the surface of mlx-lm's caches. Rows join through `Pages`, or by the first update."""

    def __init__(self, pages: Pages, *, bits: int | None = None) -> None:
        self.pages = pages
        self.written: list[int] = []
        """Tokens of each row that this layer holds; the layers before it may be one step ahead."""
        self._quantized = bits
        self._keys: list[mx.array] = []  # (blocks, H, size, …): numbers, or packed numbers, scales and biases
        self._values: list[mx.array] = []

    @property
    def offset(self) -> int | mx.array:
        """The position of the next token: one number where all rows have the same."""
        return self.written[0] if len(set(self.written)) == 1 else mx.array(self.written) if self.written else 0

    @property
    def state(self) -> list[mx.array]:
        return [*self._keys, *self._values]

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.state)

    def size(self) -> int:
        return max(self.written, default=0)

    def empty(self) -> bool:
        return not self.written

    def is_trimmable(self) -> bool:
        return False

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append (B, H, n, D) to every row, and give all columns (B, H, S, D); a shorter row's last ones aren't its
        own."""
        rows, _, count, _ = keys.shape
        while len(self.pages.tables) < rows:
            self.pages.join()
        self.written += [0] * (rows - len(self.written))
        for row, start in enumerate(self.written):
            self.pages.reserve(row, start + count)
        places = self.pages.places(self.written, count)
        self.written = [start + count for start in self.written]
        self._keys, self._values = self._put(self._keys, keys, places), self._put(self._values, values, places)
        return self._get(self._keys, keys.dtype), self._get(self._values, values.dtype)

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> mx.array | str | None:
        """The mask of the next N tokens over the columns that `update_and_fetch` will give."""
        if window_size is not None:
            raise ValueError("pages serve full attention; this layer has a window")
        ends = [start + N for start in self.written] or [N]
        if len(set(ends)) == 1 and not return_array:
            return None if N == 1 else "causal"
        queries = mx.array(ends)[:, None] - N + mx.arange(N)[None]
        return (mx.arange(max(ends))[None, None] <= queries[..., None])[:, None]

    def load(self, tokens: RowCache, row: int) -> list[mx.array]:
        """A row of another cache as whole pages (blocks, H, size, …) for `store`, keys then values."""
        start = tokens.padding[row]
        pages = []
        for held in tokens.state:
            own = held[row, :, start : tokens.index]  # (H, n, D)
            padded = mx.pad(own, [(0, 0), (0, -own.shape[1] % self.pages.size), (0, 0)])
            pages.append(padded.reshape(own.shape[0], -1, self.pages.size, own.shape[2]).swapaxes(0, 1))
        return pages

    def store(self, pages: Sequence[mx.array], first: int, blocks: Sequence[int]) -> None:
        """Write the loaded pages from number `first` on into these blocks."""
        if blocks and pages:
            ids = mx.array(list(blocks))
            keys, values = (page[first : first + len(blocks)] for page in pages)
            self._keys, self._values = self._fill(self._keys, keys, ids), self._fill(self._values, values, ids)

    def _encode(self, x: mx.array) -> list[mx.array]:
        if self._quantized is None:
            return [x]
        return list(mx.quantize(x, group_size=QUANTIZED_GROUP, bits=self._quantized))

    def _fill(self, held: list[mx.array], pages: mx.array, ids: mx.array) -> list[mx.array]:
        parts = self._encode(pages)
        held = self._room(held, parts)
        for place, part in zip(held, parts, strict=True):
            place[ids] = part
        return held

    def _put(self, held: list[mx.array], new: mx.array, places: tuple[mx.array, mx.array]) -> list[mx.array]:
        blocks, slots = places
        parts = self._encode(new.swapaxes(1, 2))  # (B, n, H, …)
        held = self._room(held, [part.swapaxes(1, 2) for part in parts])
        for place, part in zip(held, parts, strict=True):
            place[blocks, :, slots] = part
        return held

    def _room(self, held: list[mx.array], parts: Sequence[mx.array]) -> list[mx.array]:
        """The pool's arrays at the pool's present size."""
        blocks = len(self.pages.pool.holders)
        if held and held[0].shape[0] >= blocks:
            return held
        grown = []
        for place, part in enumerate(parts):
            have = held[place].shape[0] if held else 0
            fresh = mx.zeros((blocks - have, part.shape[1], self.pages.size, part.shape[3]), part.dtype)
            grown.append(mx.concatenate([held[place], fresh]) if held else fresh)
        return grown

    def _get(self, held: list[mx.array], dtype: mx.Dtype) -> mx.array:
        columns, table = max(self.written), self.pages.table()
        parts = [mx.take(array, table, axis=0).swapaxes(1, 2) for array in held]  # (B, H, blocks, size, …)
        parts = [part.reshape(*part.shape[:2], -1, part.shape[4]) for part in parts]
        if self._quantized is None:
            return parts[0][..., :columns, :]
        whole = mx.dequantize(*parts, group_size=QUANTIZED_GROUP, bits=self._quantized)
        return whole.astype(dtype)[..., :columns, :]


def paged_cache(model: nn.Module, *, bits: int | None = None, size: int = PAGE) -> list[PagedKVCache]:
    """A paged cache for each layer. `ValueError`, with the reason, for a model that pages can't serve."""
    reason = refusal(model)
    if reason is not None:
        raise ValueError(f"pages serve full attention only: {reason}")
    pages = Pages(size)
    layers: Any = model.layers
    return [PagedKVCache(pages, bits=bits) for _ in layers]
