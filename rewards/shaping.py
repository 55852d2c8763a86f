"""Penalties on the form of a completion: its length, and how often it repeats itself."""

from collections.abc import Hashable, Sequence


def soft_overlong_penalty(length: int, *, max_length: int, cache: int) -> float:
    """Soft overlong punishment (DAPO, arXiv:2503.14476, eq. 13), from 0 to -1.

    0 up to max_length - cache, then linearly down to -1 at max_length, and -1 beyond.
    """
    if not 0 <= cache <= max_length:
        raise ValueError(f"cache must be within 0 and max_length {max_length}, got {cache}")
    over = length - (max_length - cache)
    return 0.0 if over <= 0 else -min(over / max(cache, 1), 1.0)


def repetition_penalty(items: Sequence[Hashable], *, ngram: int, max_penalty: float) -> float:
    """max_penalty (at most 0) times the share of n-grams, of words or token ids, that occurred before."""
    if max_penalty > 0:
        raise ValueError(f"max_penalty must not be positive, got {max_penalty}")
    ngrams = list(zip(*(items[start:] for start in range(ngram)), strict=False))
    if not ngrams:
        return 0.0
    return max_penalty * (1 - len(set(ngrams)) / len(ngrams))
