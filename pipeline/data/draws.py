"""Random numbers that are a function of their place: the same on every machine, in any order, after any resume."""

import hashlib
import random


def uniform(*place: int | str) -> float:
    """A number in [0, 1) for this place."""
    # The top 53 bits of the hash: as many as a float holds.
    return (int.from_bytes(_digest(place)[:8], "big") >> 11) / 2**53


def permutation(count: int, *place: int | str) -> list[int]:
    """The numbers below `count` in an order for this place."""
    numbers = list(range(count))
    random.Random(_digest(place)).shuffle(numbers)
    return numbers


def _digest(place: tuple[int | str, ...]) -> bytes:
    return hashlib.sha256("\0".join(str(part) for part in place).encode()).digest()
