"""Decoding on CUDA: in each layer one kernel appends a row's key and value, and attends to its prompt and its own
columns; a whole step, sampler included, is compiled.

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
float query[Q][VECTOR], out[Q][VECTOR], top[Q], mass[Q];
const size_t own_head = static_cast<size_t>(row) * HEADS + head;
const T* own_queries = queries + (own_head * PARTS + piece) * Q * D + part * VECTOR;
for (int r = 0; r < Q; r++) {
  top[r] = -1e30f;
  mass[r] = 0.0f;
  for (int i = 0; i < VECTOR; i++) {
    query[r][i] = 1.44269504f * scale[0] * static_cast<float>(own_queries[r * D + i]);
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
attend(keys + own_head * D, values + own_head * D, 0, 1);
if (piece == 0 && written[row] < OWN && threadIdx.x < 2 * LANES) {
  const bool is_key = threadIdx.x < LANES;
  T* place = const_cast<T*>(is_key ? own_keys : own_values) + (own_head * OWN + written[row]) * D + part * VECTOR;
  const T* fresh = (is_key ? keys : values) + own_head * D + part * VECTOR;
  *reinterpret_cast<uint4*>(place) = *reinterpret_cast<const uint4*>(fresh);
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
WHERE = ["prompt", "first", "last", "written", "scale"]


@cache
def _kernel() -> Any:
    return mx.fast.cuda_kernel(
        name="append_and_attend", input_names=INPUTS + WHERE, output_names=["attended"], source=SOURCE
    )


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
        """Attention (B, heads, 1, D) over a row's prompt, its own columns and the new one, which is appended."""
        assert mask is None
        (rows, heads, _, size), kv_heads, where = queries.shape, keys.shape[1], self.places
        places, group = (where.prompt, where.first, where.last, where.written), heads // kv_heads
        at_once = max(count for count in range(1, HEADS_AT_ONCE + 1) if group % count == 0)
        numbers = {"D": size, "HEADS": kv_heads, "Q": at_once, "PARTS": group // at_once, "WARPS": WARPS}
        lengths = {"PROMPT": self.buffers[0].shape[2], "OWN": self.buffers[2].shape[2]}
        return _kernel()(
            inputs=[queries, keys, values, *self.buffers, *places, mx.array([scale])],
            template=[("T", queries.dtype), *(numbers | lengths).items()],
            grid=(32 * WARPS * heads // at_once, rows, 1),
            threadgroup=(32 * WARPS, 1, 1),
            output_shapes=[queries.shape],
            output_dtypes=[queries.dtype],
        )[0]


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
