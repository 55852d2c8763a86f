"""Sampling strategies: closures made once, so that the token loop has no `if`.

A draw of row b at its step t is a function of the row's seed and t alone, whatever its batch mates, slot or rank. Left out:
repetition penalties, and any strategy that looks at earlier tokens.
"""

from collections.abc import Callable, Sequence

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from configs.schema import SamplingConfig
from mlx_ops.logprobs import at_least_float32

Sampler = Callable[[mx.array, mx.array], tuple[mx.array, mx.array]]
"""(logits (B, V), uniforms (B, 2)) -> (tokens (B,), logprobs (B,) float32 under the distribution that was drawn from)."""

BLOCK = 128
"""Tokens of a block in the two-level draw; most vocabularies divide by it, and then nothing is padded."""


def uniforms(seeds: Sequence[int], start: int, count: int) -> NDArray[np.float32]:
    """(count, B, 2) numbers in [0, 1): those of steps start to start + count - 1 of rows with these seeds.

    A counter through SplitMix64's finaliser (Steele, Lea and Flood 2014), so any step of any row stands alone.
    """
    rows = _mixed(np.array([seed & 0xFFFFFFFFFFFFFFFF for seed in seeds], dtype=np.uint64))
    steps = np.arange(start, start + count, dtype=np.uint64)
    bits = _mixed(rows[None, :] + steps[:, None])
    halves = np.stack([bits >> np.uint64(40), (bits >> np.uint64(8)) & np.uint64(0xFFFFFF)], axis=-1)
    # 24 bits fill a float32's mantissa: 1.0 can't come out by rounding.
    return halves.astype(np.float32) * np.float32(2.0**-24)


def make_sampler(config: SamplingConfig) -> Sampler:
    """Temperature, then top-k, top-p and min-p on the tempered distribution; the log-probabilities are those of what remains.

    Temperature 0 is greedy; its log-probabilities are the model's own, at temperature 1.
    """
    if config.temperature == 0:
        return _greedy
    if not config.truncates:
        return lambda logits, u: draw(_tempered(logits, config.temperature), u)
    return lambda logits, u: draw(_truncated(_tempered(logits, config.temperature), config), u)


def draw(logits: mx.array, u: mx.array) -> tuple[mx.array, mx.array]:
    """One token a row from softmax(logits) by inversion, and its log-probability: both from one pass of exp.

    The first uniform picks a block of tokens, the second a token in it, so float32's rounding stays relative to a block's mass.
    """
    rows, vocabulary = logits.shape
    top = logits.max(axis=-1, keepdims=True)
    weights = mx.exp(logits - top)
    blocks = mx.pad(weights, [(0, 0), (0, -vocabulary % BLOCK)]).reshape(rows, -1, BLOCK)
    masses = blocks.sum(axis=-1)
    block = _invert(masses, u[:, :1])
    inner = mx.take_along_axis(blocks, block[:, :, None], axis=1).squeeze(1)
    tokens = block * BLOCK + _invert(inner, u[:, 1:])
    chosen = mx.take_along_axis(logits, tokens, axis=-1)
    logprobs = chosen - top - mx.log(masses.sum(axis=-1, keepdims=True))
    return tokens.squeeze(-1), logprobs.squeeze(-1)


def _invert(weights: mx.array, u: mx.array) -> mx.array:
    """The first index (B, 1) whose cumulated weight exceeds u of the whole; never one of weight 0."""
    cumulated = mx.cumsum(weights, axis=-1)
    index = (cumulated <= u * cumulated[:, -1:]).sum(axis=-1, keepdims=True)
    # u * whole may round up to the whole: the last index with weight stands in.
    last = mx.argmax(cumulated, axis=-1, keepdims=True)
    return mx.minimum(index, last)


def _greedy(logits: mx.array, u: mx.array) -> tuple[mx.array, mx.array]:
    del u
    logits = at_least_float32(logits)
    tokens = mx.argmax(logits, axis=-1)
    chosen = mx.take_along_axis(logits, tokens[:, None], axis=-1).squeeze(-1)
    return tokens, chosen - mx.logsumexp(logits, axis=-1)


def _tempered(logits: mx.array, temperature: float) -> mx.array:
    logits = at_least_float32(logits)
    return logits if temperature == 1.0 else logits * (1 / temperature)


def _truncated(logits: mx.array, config: SamplingConfig) -> mx.array:
    """`logits` with -inf where top-k, then top-p, then min-p leave a token out."""
    vocabulary = logits.shape[-1]
    if 0 < config.top_k < vocabulary:
        floor = mx.topk(logits, config.top_k, axis=-1).min(axis=-1, keepdims=True)
        logits = mx.where(logits < floor, -mx.inf, logits)
    if config.top_p < 1:
        logits = mx.where(logits < _nucleus_floor(logits, config.top_p), -mx.inf, logits)
    if config.min_p > 0:
        floor = logits.max(axis=-1, keepdims=True) + float(np.log(config.min_p))
        logits = mx.where(logits < floor, -mx.inf, logits)
    return logits


def _nucleus_floor(logits: mx.array, top_p: float) -> mx.array:
    """The smallest logit (B, 1) of the smallest set of tokens whose probability reaches `top_p` (arXiv:1904.09751)."""
    falling = -mx.sort(-logits, axis=-1)
    probabilities = mx.softmax(falling, axis=-1)
    before = mx.cumsum(probabilities, axis=-1) - probabilities
    return mx.where(before < top_p, falling, mx.inf).min(axis=-1, keepdims=True)


def _mixed(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finaliser after its golden-ratio step."""
    with np.errstate(over="ignore"):
        x = x * np.uint64(0x9E3779B97F4A7C15) + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))
