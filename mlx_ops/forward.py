"""The teacher-forced forward pass, with the prompt run once for all its rows.

A row's logits stand where its completion tokens are predicted: the last prompt token and all completion tokens but the last are
the inputs. They attend to the prompt's keys and values, through which gradients flow back to the prompt's pass. A model that
this can't serve runs prompt and completion of every row.
"""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_ops.batching import TokenRows
from mlx_ops.logprobs import entropy as token_entropy
from mlx_ops.logprobs import token_logprobs
from mlx_ops.row_cache import causal_mask, refusal

Run = Callable[..., mx.array]


class PromptCache:
    """The keys and values of P prompts' columns, as one layer computes them."""

    def __init__(self, left_padding: mx.array | None) -> None:
        self.keys: Any = None
        self.values: Any = None
        self._padding = left_padding

    @property
    def offset(self) -> int | mx.array:
        return 0 if self._padding is None else -self._padding

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        self.keys, self.values = keys, values
        return keys, values

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> mx.array | str | None:
        del window_size
        if self._padding is None and not return_array:
            return "causal"
        padding = mx.zeros((1,), mx.int32) if self._padding is None else self._padding
        return causal_mask(0, N, padding)


class ContinuedCache:
    """One layer's cache of rows that continue prompts: their new columns behind the prompts' keys and values."""

    def __init__(self, prompt: PromptCache, rows: "_Rows") -> None:
        self._keys, self._values = rows.expand(prompt.keys), rows.expand(prompt.values)
        self._rows = rows

    @property
    def offset(self) -> int | mx.array:
        return self._rows.offset

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        if self._keys is None:
            return keys, values
        return mx.concatenate([self._keys, keys], axis=2), mx.concatenate([self._values, values], axis=2)

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> mx.array | str | None:
        del window_size
        if self._rows.padding is None and not return_array:
            return None if N == 1 else "causal"
        padding = mx.zeros((1,), mx.int32) if self._rows.padding is None else self._rows.padding
        return causal_mask(self._rows.columns, N, padding)


class _Rows:
    """How B rows lie over P prompts."""

    def __init__(self, rows: TokenRows) -> None:
        self.columns = rows.prompt_tokens.shape[1] - 1
        self.index = rows.prompt_index
        padding = [self.columns + 1 - length for length in rows.prompt_lengths]
        self.prompt_padding = mx.array(padding) if any(padding) else None
        self.padding = mx.array([padding[prompt] for prompt in self.index]) if any(padding) else None
        self.offset = self.columns if self.padding is None else self.columns - self.padding
        prompts = len(padding)
        uniform = len(self.index) % prompts == 0
        self._group = len(self.index) // prompts if uniform else 0
        if self._group and self.index != tuple(prompt for prompt in range(prompts) for _ in range(self._group)):
            self._group = 0

    def expand(self, prompt: mx.array | None) -> mx.array | None:
        """(P, H, N - 1, D) to the rows' (B, H, N - 1, D)."""
        if prompt is None or self._group == 1:
            return prompt
        return mx.repeat(prompt, self._group, axis=0) if self._group else mx.take(prompt, mx.array(self.index), axis=0)


def score(
    model: nn.Module, rows: TokenRows, *, temperature: float = 1.0, entropy: bool = False
) -> tuple[mx.array, mx.array | None]:
    """Log-probabilities (B, T) in float32 of the completion tokens under softmax(logits / temperature), and on request the entropies.

    Padding holds garbage: mask it.
    """
    logits = completion_logits(model, rows)
    logprobs = token_logprobs(logits, rows.completion_tokens, temperature=temperature)
    return logprobs, token_entropy(logits, temperature=temperature) if entropy else None


def completion_logits(model: nn.Module, rows: TokenRows) -> mx.array:
    """The logits (B, T, V) that predict the completion tokens."""
    return _run(model, model, rows)


def completion_hidden(model: nn.Module, rows: TokenRows) -> mx.array:
    """The trunk's output (B, T, D) where the completion tokens are predicted; `project` makes it logits."""
    return _run(model, _trunk(model), rows)


def project(model: nn.Module, hidden: mx.array) -> mx.array:
    """The logits (…, V) of hidden states: by `lm_head`, or by the embedding where that is tied."""
    owner: Any = model
    if "lm_head" in owner:
        return owner.lm_head(hidden)
    return _trunk(owner).embed_tokens.as_linear(hidden)


def _trunk(model: Any) -> Any:
    if "model" not in model:
        raise ValueError(
            f"{type(model).__module__} has no `model`: a value head needs mlx-lm's usual trunk under a head"
        )
    return model.model


def _run(model: Any, run: Run, rows: TokenRows) -> mx.array:
    return _shared(model, run, rows) if refusal(model) is None else _unshared(run, rows)


def _shared(model: Any, run: Run, rows: TokenRows) -> mx.array:
    layout = _Rows(rows)
    prompts = [PromptCache(layout.prompt_padding) for _ in model.layers]
    if layout.columns:
        run(rows.prompt_tokens[:, :-1], cache=prompts)
    last = mx.take(rows.prompt_tokens[:, -1:], mx.array(layout.index), axis=0)
    inputs = mx.concatenate([last, rows.completion_tokens[:, :-1]], axis=1)
    return run(inputs, cache=[ContinuedCache(prompt, layout) for prompt in prompts])


def _unshared(run: Run, rows: TokenRows) -> mx.array:
    """Every row's prompt and completion, padded on the right; then the completion's columns."""
    width = rows.completion_tokens.shape[1]
    longest = max(rows.prompt_lengths)
    starts = mx.array([rows.prompt_lengths[prompt] for prompt in rows.prompt_index])[:, None]
    both = mx.concatenate(
        [mx.take(rows.prompt_tokens, mx.array(rows.prompt_index), axis=0), rows.completion_tokens], axis=1
    )
    columns = mx.minimum(mx.arange(longest + width)[None] + longest - starts, longest + width - 1)
    out = run(mx.take_along_axis(both, columns, axis=1)[:, :-1])
    wanted = starts - 1 + mx.arange(width)[None]
    return mx.take_along_axis(out, wanted[..., None], axis=1)
