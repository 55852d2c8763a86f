"""Decoding on CUDA: in each layer one kernel rotates a row's queries and key, appends key and value, and attends to the
row's prompt and its own columns; a whole step, sampler included, is compiled.

Where a row stands is in arrays, and buffers are as long as they will ever be, so that a step is traced once a number of
rows. The kernel reads a key-value head once for up to `HEADS_AT_ONCE` query heads, and prompts are held once.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import mlx.core as mx

from mlx_ops.sampling import Sampler

HEADS_AT_ONCE = 8
"""Query heads of a block at most: their sums live in registers."""
WARPS = 2
"""Measured on an H100: 4 are 15 to 30 % slower, for 8 columns at once already hide the latency of memory."""

# The buffers of a row's own columns are written in place, which no other operation of MLX does: `own_keys` and
# `own_values` must be contiguous and held by nobody else. A later step reads what an earlier one wrote; it comes after
# it because its queries descend from that step's tokens.
SOURCE = """
constexpr int VECTOR = 16 / sizeof(T);      // numbers a thread loads at once
constexpr int LANES = D / VECTOR;           // threads that share a column
constexpr int COLUMNS = 32 / LANES;         // columns of a warp at once
constexpr int STATES = WARPS * COLUMNS;     // running softmaxes, merged at the end
const int head = blockIdx.x / PARTS, piece = blockIdx.x % PARTS, row = blockIdx.y;
const int warp = threadIdx.x / 32, part = threadIdx.x % LANES, state = threadIdx.x / LANES;
__shared__ float merged[STATES][Q][D + 2];
__shared__ float turned[Q][D];
__shared__ alignas(16) T fresh[2][D];       // the new key and value
float query[Q][VECTOR], out[Q][VECTOR], top[Q], mass[Q];
const size_t own_head = static_cast<size_t>(row) * HEADS + head;
const T* own_queries = queries + static_cast<size_t>(row) * QUERY_ROW + (head * PARTS + piece) * Q * D;
const T* own_key = keys + static_cast<size_t>(row) * KEY_ROW + KEYS_AT + head * D;
const T* own_value = values + static_cast<size_t>(row) * KEY_ROW + VALUES_AT + head * D;
for (int place = threadIdx.x; place < (Q + 1) * D; place += WARPS * 32) {
  const int r = place / D, i = place % D;
  const T* x = r < Q ? own_queries + r * D : own_key;
  float number = static_cast<float>(x[i]);
  if (i < DIMS) {
    const bool leads = TRADITIONAL ? i % 2 == 0 : i < DIMS / 2;
    const int apart = TRADITIONAL ? 1 : DIMS / 2, pair = TRADITIONAL ? i / 2 : i % (DIMS / 2);
    const float angle = static_cast<float>(last[row] - first[row] + written[row]) * frequencies[pair];
    const float partner = static_cast<float>(leads ? x[i + apart] : x[i - apart]);
    number = number * cosf(angle) + (leads ? -partner : partner) * sinf(angle);
  }
  if (r < Q) {
    turned[r][i] = static_cast<float>(static_cast<T>(number));
  } else {
    fresh[0][i] = static_cast<T>(number);
    fresh[1][i] = own_value[i];
  }
}
__syncthreads();
for (int r = 0; r < Q; r++) {
  top[r] = -1e30f;
  mass[r] = 0.0f;
  for (int i = 0; i < VECTOR; i++) {
    query[r][i] = 1.44269504f * scale[0] * turned[r][part * VECTOR + i];
    out[r][i] = 0.0f;
  }
}
auto attend = [&](const T* keys, const T* values, int first, int last) {
  for (int base = first + warp * COLUMNS; base < last; base += STATES) {
    const int column = base + state % COLUMNS;
    const bool live = column < last;
    uint4 key_bits = make_uint4(0, 0, 0, 0), value_bits = key_bits;
    if (live) {
      key_bits = *reinterpret_cast<const uint4*>(keys + static_cast<size_t>(column) * D + part * VECTOR);
      value_bits = *reinterpret_cast<const uint4*>(values + static_cast<size_t>(column) * D + part * VECTOR);
    }
    const T* key = reinterpret_cast<const T*>(&key_bits);
    const T* value = reinterpret_cast<const T*>(&value_bits);
    float score[Q];
    #pragma unroll
    for (int r = 0; r < Q; r++) {
      score[r] = 0.0f;
      #pragma unroll
      for (int i = 0; i < VECTOR; i++) score[r] += query[r][i] * static_cast<float>(key[i]);
    }
    #pragma unroll
    for (int r = 0; r < Q; r++)
      #pragma unroll
      for (int s = LANES / 2; s > 0; s /= 2) score[r] += __shfl_xor_sync(0xffffffff, score[r], s);
    if (!live) continue;
    #pragma unroll
    for (int r = 0; r < Q; r++) {
      const float higher = fmaxf(top[r], score[r]);
      const float shrink = exp2f(top[r] - higher), weight = exp2f(score[r] - higher);
      top[r] = higher;
      mass[r] = mass[r] * shrink + weight;
      #pragma unroll
      for (int i = 0; i < VECTOR; i++) out[r][i] = out[r][i] * shrink + weight * static_cast<float>(value[i]);
    }
  }
};
const size_t shared_head = (static_cast<size_t>(prompt[row]) * HEADS + head) * PROMPT * D;
attend(prompt_keys + shared_head, prompt_values + shared_head, first[row], last[row]);
attend(own_keys + own_head * OWN * D, own_values + own_head * OWN * D, 0, min(written[row], OWN));
attend(fresh[0], fresh[1], 0, 1);
if (piece == 0 && written[row] < OWN && threadIdx.x < 2 * LANES) {
  const bool is_key = threadIdx.x < LANES;
  T* place = const_cast<T*>(is_key ? own_keys : own_values) + (own_head * OWN + written[row]) * D + part * VECTOR;
  *reinterpret_cast<uint4*>(place) = *reinterpret_cast<const uint4*>(fresh[is_key ? 0 : 1] + part * VECTOR);
}
for (int r = 0; r < Q; r++) {
  if (part == 0) {
    merged[state][r][D] = top[r];
    merged[state][r][D + 1] = mass[r];
  }
  for (int i = 0; i < VECTOR; i++) merged[state][r][part * VECTOR + i] = out[r][i];
}
__syncthreads();
for (int place = threadIdx.x; place < Q * D; place += WARPS * 32) {
  const int r = place / D, i = place % D;
  float best = -1e30f, sum = 0.0f, all = 0.0f;
  for (int s = 0; s < STATES; s++) best = fmaxf(best, merged[s][r][D]);
  for (int s = 0; s < STATES; s++) {
    const float weight = exp2f(merged[s][r][D] - best);
    sum += weight * merged[s][r][i];
    all += weight * merged[s][r][D + 1];
  }
  attended[(own_head * PARTS + piece) * Q * D + place] = static_cast<T>(sum / all);
}
"""
INPUTS = ["queries", "keys", "values", "prompt_keys", "prompt_values", "own_keys", "own_values"]
WHERE = ["prompt", "first", "last", "written", "scale", "frequencies"]


@cache
def _kernel() -> Any:
    names = {"name": "append_and_attend", "input_names": INPUTS + WHERE, "output_names": ["attended"]}
    # A copy of a buffer would take the writes; and queries, keys and values may be parts of longer rows.
    return mx.fast.cuda_kernel(**names, source=SOURCE, ensure_row_contiguous=False)


def serves(size: int, dtype: mx.Dtype) -> bool:
    """Whether the kernel can take heads of this size: a power of two of 16-byte loads, at most a warp's."""
    lanes, rest = divmod(size * dtype.size, 16)
    return rest == 0 and 1 <= lanes <= 32 and lanes & (lanes - 1) == 0


@dataclass(frozen=True)
class Places:
    """Where each of B rows stands, in int32: its prompt, that prompt's columns, and how many of its own it has."""

    prompt: mx.array
    first: mx.array
    last: mx.array
    written: mx.array


@dataclass(frozen=True)
class Heads:
    """Query and key-value heads of D numbers, and how they are rotated."""

    queries: int
    keys: int
    size: int
    scale: float
    dims: int = 0
    """So many of a head's first numbers are rotated in pairs."""
    traditional: bool = False
    """A pair's numbers stand beside each other, not `dims` / 2 apart."""


def append_and_attend(
    heads: Heads, rows: list[mx.array], buffers: Sequence[mx.array], places: Places, frequencies: mx.array
) -> mx.array:
    """Attention (B, heads D) over a row's prompt, its own columns and the new one, which is appended.

    `rows` are queries, keys and values, (B, heads D) each, whole, or all of them beside each other in one array.
    `frequencies` (dims / 2,) are radians a position, float32.
    """
    queries, keys, values = rows * 3 if len(rows) == 1 else rows
    width, kept = heads.queries * heads.size, heads.keys * heads.size
    first, second = (width, width + kept) if len(rows) == 1 else (0, 0)
    spans = {"QUERY_ROW": queries.shape[1], "KEY_ROW": keys.shape[1], "KEYS_AT": first, "VALUES_AT": second}
    group = heads.queries // heads.keys
    at_once = max(count for count in range(1, HEADS_AT_ONCE + 1) if group % count == 0)
    numbers = {"D": heads.size, "HEADS": heads.keys, "Q": at_once, "PARTS": group // at_once, "WARPS": WARPS}
    lengths = {"PROMPT": buffers[0].shape[2], "OWN": buffers[2].shape[2]}
    rotation = {"DIMS": heads.dims, "TRADITIONAL": heads.traditional}
    where = (places.prompt, places.first, places.last, places.written, mx.array([heads.scale]), frequencies)
    return _kernel()(
        inputs=[queries, keys, values, *buffers, *where],
        template=[("T", queries.dtype), *(numbers | spans | lengths | rotation).items()],
        grid=(32 * WARPS * heads.queries // at_once, queries.shape[0], 1),
        threadgroup=(32 * WARPS, 1, 1),
        output_shapes=[(queries.shape[0], width)],
        output_dtypes=[queries.dtype],
    )[0]


@dataclass(frozen=True)
class FusedCache:
    """One layer's keys and values for one step: each prompt's once, (P, H, N, D), and the rows' own, (B, H, C, D)."""

    places: Places
    buffers: Sequence[mx.array]  # keys and values of the prompts, keys and values of the rows

    @property
    def offset(self) -> mx.array:
        return self.places.last - self.places.first + self.places.written

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """The new column alone; `attend` appends it."""
        return keys, values

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> None:
        assert (N, return_array, window_size) == (1, False, None), "a step is one token of full attention"

    def attend(self, queries: mx.array, keys: mx.array, values: mx.array, *, scale: float, mask: Any) -> mx.array:
        """Attention (B, heads, 1, D) of what is rotated already."""
        assert mask is None
        heads = Heads(queries.shape[1], keys.shape[1], queries.shape[3], scale)
        rows = [mx.contiguous(array).reshape(len(array), -1) for array in (queries, keys, values)]
        return append_and_attend(heads, rows, self.buffers, self.places, mx.zeros((1,))).reshape(queries.shape)


def compiled_step(model: Any, sampler: Sampler) -> Callable[..., tuple[mx.array, mx.array, mx.array]]:
    """(tokens, uniforms, places, layers of four buffers) -> (tokens, logprobs, columns written), traced once a shape.

    The model's weights are constants of the trace: make a new one after an update.
    """

    def step(
        tokens: mx.array, u: mx.array, where: list[mx.array], layers: list[list[mx.array]]
    ) -> tuple[mx.array, mx.array, mx.array]:
        places = Places(*where)
        caches = [FusedCache(places, buffers) for buffers in layers]
        tokens, logprobs = sampler(model(tokens[:, None], cache=caches)[:, -1], u)
        return tokens, logprobs, places.written + 1

    return mx.compile(step)
