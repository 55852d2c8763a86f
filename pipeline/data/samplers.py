"""The order of examples: a sampler is a pure function of its seed and the position, so a position is all that resumes.

Position p is the p-th example that training asks for, from 0 and over all epochs.
"""

import math
from abc import ABC, abstractmethod
from bisect import bisect
from collections.abc import Sequence
from itertools import accumulate
from typing import Literal

from pipeline.data.draws import permutation, uniform
from rewards.base import Example

Order = Literal["sequential", "shuffled", "weighted", "by_length"]


class Sampler(ABC):
    """Indices of examples, by position."""

    def __init__(self, count: int, seed: int = 0) -> None:
        if count < 1:
            raise ValueError("no examples to sample from")
        self.count, self.seed = count, seed

    @abstractmethod
    def index(self, position: int) -> int:
        """The example at this position."""

    def take(self, position: int, count: int) -> list[int]:
        """The `count` examples from this position on."""
        return [self.index(place) for place in range(position, position + count)]


class Sequential(Sampler):
    """The order of the file, again and again."""

    def index(self, position: int) -> int:
        return position % self.count


class _Epochs(Sampler):
    """Each example once an epoch."""

    def __init__(self, count: int, seed: int = 0) -> None:
        super().__init__(count, seed)
        self._last: tuple[int, list[int]] = (0, self.order(0))

    @abstractmethod
    def order(self, epoch: int) -> list[int]:
        """The indices of an epoch."""

    def index(self, position: int) -> int:
        epoch, place = divmod(position, self.count)
        if epoch != self._last[0]:
            self._last = (epoch, self.order(epoch))
        return self._last[1][place]


class Shuffled(_Epochs):
    """Each example once an epoch, in another order each epoch."""

    def order(self, epoch: int) -> list[int]:
        return permutation(self.count, "shuffled", self.seed, epoch)


class Weighted(Sampler):
    """Examples drawn with replacement, in proportion to their weights."""

    def __init__(self, weights: Sequence[float], seed: int = 0) -> None:
        super().__init__(len(weights), seed)
        if not all(math.isfinite(weight) and weight >= 0 for weight in weights) or not any(weights):
            raise ValueError("weights must be finite, not negative, and not all 0")
        self._shares = list(accumulate(weights))

    def index(self, position: int) -> int:
        point = uniform("weighted", self.seed, position) * self._shares[-1]
        # Rounding may take the point up to the whole.
        return bisect(self._shares, point, hi=self.count - 1)


class ByLength(_Epochs):
    """Each example once an epoch, in buckets of near lengths; the buckets come in another order each epoch.

    With a bucket of the size of a batch, a batch pads little. An epoch's last bucket is the one that is not full.
    """

    def __init__(self, lengths: Sequence[int], seed: int = 0, *, bucket: int = 32) -> None:
        self._lengths, self._bucket = tuple(lengths), bucket
        super().__init__(len(lengths), seed)

    def order(self, epoch: int) -> list[int]:
        # Sorted from a shuffled order: equal lengths meet in other buckets each epoch.
        shuffled = permutation(self.count, "by_length", self.seed, epoch)
        near = sorted(shuffled, key=self._lengths.__getitem__)
        buckets = [near[start : start + self._bucket] for start in range(0, self.count, self._bucket)]
        full = self.count // self._bucket
        places = [*permutation(full, "buckets", self.seed, epoch), *range(full, len(buckets))]
        return [index for place in places for index in buckets[place]]


def make_sampler(order: Order, examples: Sequence[Example], seed: int, *, bucket: int = 32) -> Sampler:
    """The sampler of this order over the examples. `ValueError` names the example without a usable `weight`."""
    match order:
        case "sequential":
            return Sequential(len(examples), seed)
        case "shuffled":
            return Shuffled(len(examples), seed)
        case "weighted":
            return Weighted([_weight(example) for example in examples], seed)
        case "by_length":
            return ByLength([_length(example) for example in examples], seed, bucket=bucket)


def _length(example: Example) -> int:
    return len(example.prompt) + len(example.target or "")


def _weight(example: Example) -> float:
    weight = example.columns.get("weight")
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < math.inf:
        raise ValueError(f"example {example.id!r}: order: weighted needs a column weight of at least 0, got {weight!r}")
    return float(weight)
