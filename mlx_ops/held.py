"""What the rollout engine asks of the caches of rows in the making, and the prompts' pass that they begin with."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_ops.row_cache import RowCache
from mlx_ops.sampling import Sampler

PREFILL_COLUMNS = 512
"""Columns of a prompt that run at once."""


class Held(ABC):
    """The caches of rows in the making, one a layer."""

    caches: list[Any]
    _model: Any

    @property
    def nbytes(self) -> int:
        """What keys and values fill."""
        return sum(cache.nbytes for cache in self.caches)

    def step(self, sampler: Sampler, tokens: mx.array, u: mx.array) -> tuple[mx.array, mx.array]:
        """Append these tokens; the next ones and their log-probabilities."""
        return sampler(self._model(tokens[:, None], cache=self.caches)[:, -1], u)

    def fit(self, alive: Sequence[int]) -> list[int]:
        """The slots worth keeping where these rows are left; some of them may be of rows that have ended."""
        return list(alive)

    @abstractmethod
    def keep(self, alive: Sequence[int], left: int) -> None:
        """Only these rows (slots, in order), with room for `left` more tokens."""

    @abstractmethod
    def join(self, prompts: Sequence[Sequence[int]], index: Sequence[int], left: int) -> None:
        """More rows behind these, continuing new prompts."""


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
