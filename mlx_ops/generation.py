"""The rollout engine: P·G rows in one batch, a group's prompt run once, finished rows dropped, waiting ones
admitted."""

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from configs.schema import SamplingConfig
from mlx_ops.backend import one_blas_thread, prepare
from mlx_ops.batching import Completion
from mlx_ops.held import Held
from mlx_ops.holding import Kind, choose, hold
from mlx_ops.row_cache import refusal, takes_row_masks, token_bytes
from mlx_ops.sampling import Sampler, make_sampler, uniforms

CHECK_EVERY = 8
"""Decode steps between two looks at what was drawn; a row's overrun is trimmed, so results don't depend on it."""
ADMISSION = 0.25
"""Share of the width that must be free before waiting rows are admitted: each admission copies the caches."""
NARROW = 5_000_000
"""A step of a model of fewer parameters has no matrix product that two cores would do sooner than one."""
FEW = 16
"""Nor has a step of fewer rows: it reads more than it multiplies."""
MEMORY_SHARE = 0.5
"""Share of the device's memory that keys and values may fill."""

Progress = Callable[[int, int], None]
"""(rows finished so far, tokens drawn so far)."""


class Stop(Protocol):
    """When a row ends other than by an end token."""

    def __call__(self, row: int, tokens: Sequence[int], seen: int) -> int | None:
        """How many of its tokens a row keeps, more than the `seen` of before; None where it goes on."""
        ...


@dataclass(frozen=True)
class StopStrings:
    """Ends a row with the token that completes one of `strings`; cutting the text is the caller's."""

    decode: Callable[[Sequence[int]], str]
    strings: tuple[str, ...]

    def __call__(self, row: int, tokens: Sequence[int], seen: int) -> int | None:  # noqa: ARG002
        # A string has at most as many tokens as bytes, so a tail of the tokens seen is enough.
        first = max(0, seen - max(len(string.encode()) for string in self.strings))
        if not self._met(tokens[first:]):
            return None
        return next(end for end in range(seen + 1, len(tokens) + 1) if self._met(tokens[first:end]))

    def _met(self, tokens: Sequence[int]) -> bool:
        text = self.decode(tokens)
        return any(string in text for string in self.strings)


@dataclass
class _Row:
    """One completion in the making."""

    place: int
    prompt: int
    seed: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    ended: bool = False
    done: bool = False


def generate(  # noqa: PLR0913 (the engine's whole surface)
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
    cache: Kind | None = None,
) -> list[Completion]:
    """`group_size` completions of each prompt, in group order; row b is drawn from `seeds[b]` alone.

    An end token is kept, with its log-probability. At most `max_rows` rows are held at once, and waiting ones are
    admitted as others end; None takes as many as memory allows. `cache` is chosen by the model and the device where
    it is None.
    """
    if len(seeds) != len(prompts) * group_size:
        raise ValueError(
            f"seeds: {len(seeds)} for {len(prompts)} prompts x {group_size} completions; one a row is needed"
        )
    if not all(prompts):
        raise ValueError("a prompt without tokens gives nothing to continue; begin it with a start token")
    rows = [_Row(place, place // group_size, seed) for place, seed in enumerate(seeds)]
    kind, width = _plan(model, prompts, group_size, sampling.max_tokens, max_rows, cache)
    engine = _Engine(
        model, prompts, make_sampler(sampling), sampling.max_tokens, eos, stop, progress, kind, is_narrow(model)
    )
    # Without masks for each row, rows beside each other must have one length: those of one prompt, begun together.
    together = [rows] if takes_row_masks(model) or kind == "library" else _slices(rows, group_size, width)
    for part in together:
        engine.run(deque(part), min(width, len(part)))
    return [Completion(tuple(row.tokens), tuple(row.logprobs), not row.ended) for row in rows]


def is_narrow(model: nn.Module) -> bool:
    """Whether one core does the model's matrix products as soon as two."""
    leaves: Any = tree_flatten(model.parameters())
    return sum(array.size for _, array in leaves) < NARROW


def cores(narrow: bool, tokens: int) -> AbstractContextManager[None]:
    """Where a model reads so many tokens at once: matrix products on as many cores as do them soonest."""
    return one_blas_thread() if narrow or tokens < FEW else nullcontext()


def _slices(rows: list[_Row], group_size: int, width: int) -> list[list[_Row]]:
    groups = [rows[start : start + group_size] for start in range(0, len(rows), group_size)]
    return [group[start : start + width] for group in groups for start in range(0, group_size, width)]


def _plan(
    model: Any,
    prompts: Sequence[Sequence[int]],
    group_size: int,
    max_tokens: int,
    max_rows: int | None,
    cache: Kind | None,
) -> tuple[Kind, int]:
    """The kind of cache, and how many rows at once: pages instead of whole rows where only they hold all of them."""
    kind = choose(model) if cache is None else cache
    rows = len(prompts) * group_size
    if max_rows is not None or refusal(model) is not None:
        return kind, max_rows or rows
    tokens = MEMORY_SHARE * prepare().memory_bytes / token_bytes(model)
    longest = max(len(prompt) for prompt in prompts)
    whole, shared = int(tokens / (longest + max_tokens)), int(tokens / (longest / group_size + max_tokens))
    if cache is None and kind in ("rows", "lean") and whole < rows and shared > whole:
        kind = "paged"
    return kind, max(1, whole if kind in ("rows", "lean") else shared)


@dataclass
class _Engine:
    model: Any
    prompts: Sequence[Sequence[int]]
    sampler: Sampler
    max_tokens: int
    eos: frozenset[int]
    stop: Stop | None
    progress: Progress | None
    kind: Kind
    narrow: bool
    finished: int = 0
    drawn: int = 0

    def run(self, waiting: deque[_Row], width: int) -> None:
        """Draw all rows, at most `width` at once."""
        active: list[_Row] = []
        held: Held | None = None
        tokens = mx.zeros((0,), mx.uint32)  # as argmax gives them: another type is another trace
        while active or waiting:
            if waiting and len(active) <= (1 - ADMISSION) * width:
                new = [waiting.popleft() for _ in range(min(width - len(active), len(waiting)))]
                held = self._admit(held if active else None, new)
                tokens = mx.concatenate([tokens, mx.array([self.prompts[row.prompt][-1] for row in new], mx.uint32)])
                active += new
            assert held is not None
            tokens = self._decode(held, tokens, active)
            alive = [slot for slot, row in enumerate(active) if not row.done]
            room = bool(waiting) and len(alive) <= (1 - ADMISSION) * width
            kept = alive if room or not alive else held.fit(alive)
            if len(kept) < len(active):
                active, tokens = [active[slot] for slot in kept], tokens[mx.array(kept, dtype=mx.int32)]
                if active:
                    held.keep(kept, self._left(active))

    def _admit(self, held: Held | None, rows: Sequence[_Row]) -> Held:
        """Rows with the caches of their prompts, beside those that are held."""
        used = sorted({row.prompt for row in rows})
        place = {prompt: number for number, prompt in enumerate(used)}
        prompts, index = [self.prompts[prompt] for prompt in used], [place[row.prompt] for row in rows]
        with cores(self.narrow, sum(map(len, prompts))):
            if held is None:
                return hold(self.kind, self.model, prompts, index, self.max_tokens)
            held.join(prompts, index, self.max_tokens)
        return held

    def _left(self, rows: Sequence[_Row]) -> int:
        return self.max_tokens - min(len(row.tokens) for row in rows if not row.done)

    def _decode(self, held: Held, tokens: mx.array, rows: list[_Row]) -> mx.array:
        """Extend every row by some steps; the last tokens."""
        count = min(CHECK_EVERY, self._left(rows))
        draws = mx.array(uniforms([row.seed for row in rows], [len(row.tokens) for row in rows], count))
        block, logprobs = [], []
        with cores(self.narrow, len(rows)):
            for t in range(count):
                tokens, logprob = held.step(self.sampler, tokens, draws[t])
                mx.async_eval(tokens, logprob)
                block.append(tokens)
                logprobs.append(logprob)
            drawn, scores = (np.array(mx.stack(steps)).T for steps in (block, logprobs))  # (B, steps)
        ends = np.isin(drawn, list(self.eos))
        kept = np.where(ends.any(axis=1), ends.argmax(axis=1) + 1, count)
        live = [row for row in rows if not row.done]
        for row, *columns, end in zip(rows, drawn.tolist(), scores.tolist(), kept.tolist(), strict=True):
            if not row.done:
                self._extend(row, *(column[:end] for column in columns))
        self._report(sum(row.done for row in live))
        return tokens

    def _extend(self, row: _Row, tokens: list[int], logprobs: list[float]) -> None:
        """Add tokens up to the row's end; of them only the last may be an end token."""
        seen = len(row.tokens)
        row.tokens += tokens[: self.max_tokens - seen]
        row.ended = row.tokens[-1] in self.eos
        if self.stop is not None:
            kept = self.stop(row.place, row.tokens, seen)
            if kept is not None:
                del row.tokens[kept:]
                row.ended = True
        row.logprobs += logprobs[: len(row.tokens) - seen]
        self.drawn += len(row.tokens) - seen
        row.done = row.ended or len(row.tokens) == self.max_tokens

    def _report(self, finished: int) -> None:
        self.finished += finished
        if self.progress is not None:
            self.progress(self.finished, self.drawn)
