"""Sampling strategies: closures made once, so that the token loop has no `if`.

A draw of row b at its step t is a function of the row's seed and t alone, whatever its batch mates, slot or rank.
Left out: repetition penalties, and any strategy that looks at earlier tokens.
"""

from collections.abc import Callable, Sequence
from functools import cache

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from configs.schema import SamplingConfig
from mlx_ops.exponential import exp
from mlx_ops.logprobs import at_least_float32

Sampler = Callable[[mx.array, mx.array], tuple[mx.array, mx.array]]
"""(logits (B, V), uniforms (B, 2)) -> (tokens (B,), logprobs (B,) float32, of the distribution that was drawn from)."""

BLOCK = 128
"""Tokens of a block in the two-level draw; most vocabularies divide by it, and then nothing is padded."""
ONE_LEVEL = 2048
"""Vocabularies up to this are drawn in one level."""


def uniforms(seeds: Sequence[int], starts: Sequence[int], count: int) -> NDArray[np.float32]:
    """(count, B, 2) numbers in [0, 1): those of the `count` steps from `starts[b]` on of the row with `seeds[b]`.

    A counter through SplitMix64's finaliser (Steele, Lea and Flood, OOPSLA 2014), so any step of any row stands alone.
    """
    rows = _mixed(np.array([seed & 0xFFFFFFFFFFFFFFFF for seed in seeds], dtype=np.uint64))
    steps = np.array(starts, dtype=np.uint64)[None] + np.arange(count, dtype=np.uint64)[:, None]
    bits = _mixed(rows[None] + steps)
    halves = np.stack([bits >> np.uint64(40), (bits >> np.uint64(8)) & np.uint64(0xFFFFFF)], axis=-1)
    # 24 bits fill a float32's mantissa: 1.0 can't come out by rounding.
    return halves.astype(np.float32) * np.float32(2.0**-24)


def make_sampler(config: SamplingConfig) -> Sampler:
    """Temperature, then top-k, top-p and min-p on the tempered distribution; log-probabilities are of what remains.

    Temperature 0 is greedy; its log-probabilities are the model's own, at temperature 1. Equal strategies are one
    closure, which compiled steps are kept by.
    """
    return _sampler(config.temperature, config.top_k, config.top_p, config.min_p)


@cache
def _sampler(temperature: float, top_k: int, top_p: float, min_p: float) -> Sampler:
    if temperature == 0:
        return _greedy
    if (top_k, top_p, min_p) == (0, 1, 0):
        return lambda logits, u: draw(_tempered(logits, temperature), u)
    return lambda logits, u: draw(_truncated(_tempered(logits, temperature), top_k, top_p, min_p), u)


def draw(logits: mx.array, u: mx.array) -> tuple[mx.array, mx.array]:
    """One token a row from softmax(logits) by inversion, and its log-probability: both from one pass of exp.

    A large vocabulary is drawn in two levels, a block of tokens and a token in it, each with a uniform of its own:
    float32's rounding then stays relative to a block's mass.
    """
    top = logits.max(axis=-1, keepdims=True)
    weights = exp(logits, top)
    if logits.shape[-1] <= ONE_LEVEL:
        tokens, mass = _invert(weights, u[:, :1]), weights.sum(axis=-1, keepdims=True)
    else:
        tokens, mass = _two_levels(weights, u)
    logprobs = mx.take_along_axis(logits, tokens, axis=-1) - top - mx.log(mass)
    return tokens.squeeze(-1), logprobs.squeeze(-1)


def _two_levels(weights: mx.array, u: mx.array) -> tuple[mx.array, mx.array]:
    """The tokens (B, 1) and each row's sum of weights (B, 1)."""
    rows, vocabulary = weights.shape
    ragged = -vocabulary % BLOCK
    blocks = (mx.pad(weights, [(0, 0), (0, ragged)]) if ragged else weights).reshape(rows, -1, BLOCK)
    masses = blocks.sum(axis=-1)
    block = _invert(masses, u[:, :1])
    within = mx.take_along_axis(blocks, block[:, :, None], axis=1).squeeze(1)
    return block * BLOCK + _invert(within, u[:, 1:]), masses.sum(axis=-1, keepdims=True)


def _invert(weights: mx.array, u: mx.array) -> mx.array:
    """The first index (B, 1) whose cumulated weight exceeds u of the whole; never one of weight 0."""
    # A parallel sum need not grow monotonously, so entries without weight are taken out rather than trusted.
    cumulated = mx.where(weights > 0, mx.cumsum(weights, axis=-1), 0)
    return mx.argmax(cumulated > u * cumulated.max(axis=-1, keepdims=True), axis=-1, keepdims=True)


def _greedy(logits: mx.array, u: mx.array) -> tuple[mx.array, mx.array]:
    del u
    logits = at_least_float32(logits)
    tokens = mx.argmax(logits, axis=-1)
    chosen = mx.take_along_axis(logits, tokens[:, None], axis=-1).squeeze(-1)
    return tokens, chosen - mx.logsumexp(logits, axis=-1)


def _tempered(logits: mx.array, temperature: float) -> mx.array:
    logits = at_least_float32(logits)
    return logits if temperature == 1.0 else logits * (1 / temperature)


def _truncated(logits: mx.array, top_k: int, top_p: float, min_p: float) -> mx.array:
    """`logits` with -inf where top-k, then top-p, then min-p leave a token out."""
    vocabulary = logits.shape[-1]
    if 0 < top_k < vocabulary:
        floor = mx.topk(logits, top_k, axis=-1).min(axis=-1, keepdims=True)
        logits = mx.where(logits < floor, -mx.inf, logits)
    if top_p < 1:
        logits = mx.where(logits < _nucleus_floor(logits, top_p), -mx.inf, logits)
    if min_p > 0:
        floor = logits.max(axis=-1, keepdims=True) + float(np.log(min_p))
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
