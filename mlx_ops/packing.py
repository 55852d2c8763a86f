"""Several examples in a row: little padding, attention that stays inside an example, logits where targets are alone.

A column sees those before it of its own example, by a block-diagonal causal mask. Positions run on through the row:
under a rotary embedding only their differences count, so that an example computes what it computes alone. A model of
which that is not true is found by trying, and refused.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_ops.forward import project
from mlx_ops.microbatches import bucketed
from mlx_ops.pairs import Pair
from mlx_ops.row_cache import refusal

PROBE = (Pair((1, 2, 3), (4, 5, 6)), Pair((7, 8), (9, 10, 11, 12)))
TOLERANCE = {mx.bfloat16: 0.2, mx.float16: 0.05}
"""Nats that rounding may put between an example alone and packed; 0.01 in float32, which matrix units may cut short."""


@dataclass(frozen=True)
class PackedRows:
    """Token ids of several examples a row. An example's last token is predicted, never an input: it has no column."""

    inputs: mx.array  # (R, L) padded on the right
    segments: mx.array  # (R, L) which example of its row a column belongs to, from 1; 0 for padding
    places: mx.array  # (N,) the columns, counted through all rows, whose next token is trained
    targets: mx.array  # (N,) those next tokens
    counts: mx.array  # (N,) 0 for padding
    lengths: mx.array  # (R, L) tokens of the column's example, 1 for padding


class PackedCache:
    """What a layer asks of a cache: the rows begin here, and who may see whom."""

    offset = 0

    def __init__(self, segments: mx.array) -> None:
        columns = mx.arange(segments.shape[1])
        self._mask = (segments[:, :, None] == segments[:, None, :]) & (columns[:, None] >= columns[None, :])

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        return keys, values

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> mx.array:
        del N, return_array
        assert window_size is None, "refusal() names models with windows"
        return self._mask[:, None]


def packed_logits(model: nn.Module, rows: PackedRows) -> mx.array:
    """The logits (N, V) that predict the trained tokens."""
    owner: Any = model
    cache = PackedCache(rows.segments)
    hidden = owner.model(rows.inputs, cache=[cache] * len(owner.layers))
    return project(model, mx.take(hidden.reshape(-1, hidden.shape[-1]), rows.places, axis=0))


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Which examples share a row of `capacity` columns: the longest first, each into the row that it fills best.

    Best-fit decreasing; ties go to the earlier example and the earlier row. One that is longer has a row of its own.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for example in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
        fitting = [row for row in range(len(rows)) if room[row] >= lengths[example]]
        if fitting:
            best = min(fitting, key=room.__getitem__)
        else:
            best = len(rows)
            rows.append([])
            room.append(capacity)
        rows[best].append(example)
        room[best] -= lengths[example]
    return rows


def packed_parts(pairs: Sequence[Pair], capacity: int, token_budget: int, bucket: int = 1) -> list[PackedRows]:
    """The pairs in rows of at most `capacity` columns, as microbatches of at most `token_budget` columns or one row.

    Those limits are of columns before they are padded to a multiple of `bucket`.
    """
    columns = [len(pair) - 1 for pair in pairs]
    packed = [[pairs[place] for place in row] for row in pack(columns, capacity)]
    packed.sort(key=_width, reverse=True)
    parts: list[list[list[Pair]]] = []
    for row in packed:
        if parts and (len(parts[-1]) + 1) * _width(parts[-1][0]) <= token_budget:
            parts[-1].append(row)
        else:
            parts.append([row])
    return [packed_rows(part, bucket) for part in parts]


def packed_rows(rows: Sequence[Sequence[Pair]], bucket: int = 1) -> PackedRows:
    """Rows of pairs as arrays, as wide as the longest, padded to a multiple of `bucket` columns."""
    width = bucketed(max(_width(row) for row in rows), bucket)
    inputs, segments = (np.zeros((len(rows), width), np.int32) for _ in range(2))
    lengths = np.ones((len(rows), width), np.int32)
    places: list[int] = []
    targets: list[int] = []
    for place, row in enumerate(rows):
        start = 0
        for number, pair in enumerate(row, start=1):
            own = slice(start, start + len(pair) - 1)
            inputs[place, own] = (*pair.prompt, *pair.target[:-1])
            segments[place, own], lengths[place, own] = number, len(pair)
            first = place * width + start + len(pair.prompt) - 1
            places += [first + column for column, trained in enumerate(pair.trained) if trained]
            targets += [token for token, trained in zip(pair.target, pair.trained, strict=True) if trained]
            start = own.stop
    # With a bucket, the number of targets is one of some sixteen for each shape of the inputs.
    count = bucketed(len(places), bucketed(-(-inputs.size // 16), bucket)) if bucket > 1 else len(places)
    columns, wanted, counts = (_filled(values, count) for values in (places, targets, [1] * len(places)))
    return PackedRows(mx.array(inputs), mx.array(segments), columns, wanted, counts, mx.array(lengths))


def _filled(values: Sequence[int], count: int) -> mx.array:
    return mx.array(np.pad(np.array(values, np.int32), (0, count - len(values))))


def require_packable(model: nn.Module) -> None:
    """`ValueError` where the model computes another thing packed than alone, or has no trunk to ask."""
    reason = refusal(model) or _headless(model) or _difference(model)
    if reason is not None:
        raise ValueError(f"packing: {reason}; set packing: false")


def _headless(model: Any) -> str | None:
    trunk = model.model if "model" in model else None
    if trunk is not None and ("lm_head" in model or "embed_tokens" in trunk):
        return None
    return f"{type(model).__module__} has no trunk `model` under an `lm_head` or a tied `embed_tokens`"


def _difference(model: Any) -> str | None:
    alone = [model(mx.array([[*pair.prompt, *pair.target[:-1]]]))[0, len(pair.prompt) - 1 :] for pair in PROBE]
    packed = packed_logits(model, packed_rows([PROBE]))
    both = (x.astype(mx.float32) for x in (mx.concatenate(alone), packed))
    apart = [nn.log_softmax(x, axis=-1) for x in both]
    difference = float(mx.abs(apart[0] - apart[1]).max())
    if difference <= TOLERANCE.get(packed.dtype, 0.01):
        return None
    return (
        f"{type(model).__module__} gives tokens of packed examples log-probabilities up to {difference:.2g} nats off: "
        "its positions are not relative, its layers look across examples, or it changes logits after the head"
    )


def _width(row: Sequence[Pair]) -> int:
    return sum(len(pair) - 1 for pair in row)
