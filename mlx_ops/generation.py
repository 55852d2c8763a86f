"""The rollout engine: P·G rows decoded in one batch, the prompt of a group run once, finished rows dropped."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from configs.schema import SamplingConfig
from mlx_ops.batching import Completion
from mlx_ops.holding import hold
from mlx_ops.sampling import Sampler, make_sampler, uniforms

CHECK_EVERY = 8
"""Decode steps between two looks at what was drawn; a row's overrun is trimmed, so results don't depend on it."""

Progress = Callable[[int, int], None]
"""(rows finished so far, tokens drawn so far)."""


class Stop(Protocol):
    """When a row ends other than by an end token."""

    def end(self, tokens: Sequence[int], start: int) -> int | None:
        """How many of `tokens` the row keeps, more than `start`; None where it goes on. `start` tokens were seen before."""
        ...


@dataclass(frozen=True)
class StopStrings:
    """Ends a row with the token that completes one of `strings`; cutting the text is the caller's."""

    decode: Callable[[Sequence[int]], str]
    strings: tuple[str, ...]

    def end(self, tokens: Sequence[int], start: int) -> int | None:
        # A string has at most as many tokens as bytes; the matching tail is decoded alone.
        first = max(0, start - max(len(string.encode()) for string in self.strings))
        if not self._met(tokens[first:]):
            return None
        return next(end for end in range(start + 1, len(tokens) + 1) if self._met(tokens[first:end]))

    def _met(self, tokens: Sequence[int]) -> bool:
        text = self.decode(tokens)
        return any(string in text for string in self.strings)


@dataclass
class _Row:
    """One completion in the making."""

    place: int
    """Its place in the result."""
    prompt: int
    seed: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    ended: bool = False


def generate(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    sampling: SamplingConfig,
    seeds: Sequence[int],
    eos: frozenset[int],
    group_size: int = 1,
    stop: Stop | None = None,
    max_rows: int | None = None,
    progress: Progress | None = None,
) -> list[Completion]:
    """`group_size` completions of each prompt, in group order; row b is drawn from `seeds[b]` alone.

    An end token is kept, with its log-probability. At most `max_rows` rows are held at once; None holds all.
    """
    if len(seeds) != len(prompts) * group_size:
        raise ValueError(
            f"seeds: {len(seeds)} for {len(prompts)} prompts x {group_size} completions; one a row is needed"
        )
    if any(len(prompt) == 0 for prompt in prompts):
        raise ValueError("a prompt without tokens gives nothing to continue; begin it with a start token")
    rows = [_Row(place, place // group_size, seed) for place, seed in enumerate(seeds)]
    engine = _Engine(model, prompts, make_sampler(sampling), sampling.max_tokens, eos, stop, progress)
    width = max_rows or len(rows)
    for start in range(0, len(rows), width):
        engine.run(rows[start : start + width])
    return [Completion(tuple(row.tokens), tuple(row.logprobs), not row.ended) for row in rows]


@dataclass
class _Engine:
    model: Any
    prompts: Sequence[Sequence[int]]
    sampler: Sampler
    max_tokens: int
    eos: frozenset[int]
    stop: Stop | None
    progress: Progress | None
    finished: int = 0
    drawn: int = 0

    def run(self, rows: list[_Row]) -> None:
        """Draw all of `rows` as one batch that shrinks."""
        used = sorted({row.prompt for row in rows})
        place = {prompt: number for number, prompt in enumerate(used)}
        prompts = [self.prompts[prompt] for prompt in used]
        held = hold(self.model, prompts, [place[row.prompt] for row in rows], self.max_tokens)
        tokens = mx.array([self.prompts[row.prompt][-1] for row in rows])
        step = 0
        while rows:
            count = min(CHECK_EVERY, self.max_tokens - step)
            tokens, block, logprobs = self._decode(held.caches, tokens, rows, step, count)
            step += count
            alive = [slot for slot, row in enumerate(rows) if self._extend(row, block[:, slot], logprobs[:, slot])]
            self._report(len(rows) - len(alive))
            if alive and len(alive) < len(rows):
                held.keep(alive, self.max_tokens - step)
                tokens = tokens[mx.array(alive)]
            rows = [rows[slot] for slot in alive]

    def _decode(
        self, caches: list[Any], tokens: mx.array, rows: list[_Row], step: int, count: int
    ) -> tuple[mx.array, np.ndarray, np.ndarray]:
        """`count` steps of every row: the last tokens, then all tokens and log-probabilities (count, B) on the host."""
        draws = mx.array(uniforms([row.seed for row in rows], step, count))
        block, logprobs = [], []
        for t in range(count):
            logits = self.model(tokens[:, None], cache=caches)[:, -1]
            tokens, logprob = self.sampler(logits, draws[t])
            mx.async_eval(tokens, logprob)
            block.append(tokens)
            logprobs.append(logprob)
        return tokens, np.array(mx.stack(block)), np.array(mx.stack(logprobs))

    def _extend(self, row: _Row, tokens: np.ndarray, logprobs: np.ndarray) -> bool:
        """Add the tokens up to the row's end; whether it goes on."""
        start = len(row.tokens)
        drawn = tokens.tolist()
        end = next((place + 1 for place, token in enumerate(drawn) if token in self.eos), None)
        row.tokens += drawn[:end]
        row.ended = end is not None
        if self.stop is not None:
            kept = self.stop.end(row.tokens, start)
            if kept is not None:
                del row.tokens[kept:]
                row.ended = True
        row.logprobs += logprobs[: len(row.tokens) - start].tolist()
        self.drawn += len(row.tokens) - start
        return not row.ended and len(row.tokens) < self.max_tokens

    def _report(self, finished: int) -> None:
        self.finished += finished
        if self.progress is not None:
            self.progress(self.finished, self.drawn)
