"""The teacher-forced forward pass, with the prompt run once for all its rows.

A row's logits stand where its completion tokens are predicted: the last prompt token and all completion tokens but
the last are the inputs. They attend to the prompt's keys and values, through which gradients flow back into the
prompt's pass. A model that this can't serve (see `row_cache.refusal`) runs prompt and completion of every row.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_ops.batching import TokenRows
from mlx_ops.logprobs import entropy as token_entropy
from mlx_ops.logprobs import token_logprobs
from mlx_ops.row_cache import causal_mask, refusal, takes_row_masks

Run = Callable[..., mx.array]


@dataclass(frozen=True)
class PreparedRows:
    """`TokenRows` with all that varies in arrays, so that a compiled step is traced once a shape."""

    prompt_tokens: mx.array  # (P, N) padded on the left
    prompt_padding: mx.array | None  # (P,) None where no prompt is padded
    spread: mx.array | None  # (B, P) 1 where the row continues the prompt; None where rows continue them in even runs
    completion_tokens: mx.array  # (B, T) padded on the right
    completion_mask: mx.array  # (B, T) 1 where a token belongs to the completion

    @property
    def group(self) -> int:
        """Rows of each prompt, where even."""
        return self.completion_tokens.shape[0] // self.prompt_tokens.shape[0]


Rows = TokenRows | PreparedRows


def prepare_rows(rows: TokenRows) -> PreparedRows:
    """The arrays of a forward pass over these rows."""
    prompts, columns = rows.prompt_tokens.shape
    padding = columns - np.array(rows.prompt_lengths, dtype=np.int32)
    index = np.array(rows.prompt_index)
    even = len(index) % prompts == 0 and bool((index == np.arange(len(index)) // (len(index) // prompts)).all())
    spread = None if even else mx.array((index[:, None] == np.arange(prompts)).astype(np.float32))
    padded = mx.array(padding) if padding.any() else None
    return PreparedRows(rows.prompt_tokens, padded, spread, rows.completion_tokens, rows.completion_mask)


def score(
    model: nn.Module, rows: Rows, *, temperature: float = 1.0, entropy: bool = False
) -> tuple[mx.array, mx.array | None]:
    """Log-probabilities (B, T), float32, of completion tokens under softmax(logits / temperature); entropies on
    request.

    Padding holds garbage: mask it.
    """
    logits = completion_logits(model, rows)
    logprobs = token_logprobs(logits, rows.completion_tokens, temperature=temperature)
    return logprobs, token_entropy(logits, temperature=temperature) if entropy else None


def completion_logits(model: nn.Module, rows: Rows) -> mx.array:
    """The logits (B, T, V) that predict the completion tokens."""
    return _run(model, model, rows)


def completion_hidden(model: nn.Module, rows: Rows) -> mx.array:
    """The trunk's output (B, T, D) where the completion tokens are predicted; `project` makes it logits."""
    return _run(model, _trunk(model), rows)


def project(model: nn.Module, hidden: mx.array) -> mx.array:
    """The logits (…, V) of hidden states: by `lm_head`, or by the embedding where the two are tied."""
    owner: Any = model
    return owner.lm_head(hidden) if "lm_head" in owner else _trunk(owner).embed_tokens.as_linear(hidden)


def check_projection(model: nn.Module) -> None:
    """`ValueError` where `project` of the trunk isn't what the model computes, as with scaled or capped logits."""
    tokens = mx.array([[1, 2, 3]])
    difference = mx.abs(project(model, _trunk(model)(tokens)) - _called(model)(tokens)).max()
    if float(difference) > 1e-3:
        raise ValueError(
            f"{type(model).__module__} changes its logits after the head; a value head on its trunk isn't offered"
        )


def _called(model: nn.Module) -> Any:
    return model


def _trunk(model: nn.Module) -> Any:
    if "model" not in model:
        raise ValueError(
            f"{type(model).__module__} has no `model`: a value head needs mlx-lm's usual trunk under a head"
        )
    return model["model"]


def _run(model: nn.Module, run: Any, rows: Rows) -> mx.array:
    rows = prepare_rows(rows) if isinstance(rows, TokenRows) else rows
    return _shared(model, run, rows) if unshared_because(model) is None else _unshared(run, rows)


def unshared_because(model: nn.Module) -> str | None:
    """Why every row of this model runs its own prompt, or None where a prompt runs once."""
    layers: Any = model.layers
    if "grad_checkpoint" in getattr(type(layers[0]).__call__, "__qualname__", ""):
        return "mlx-lm's grad_checkpoint keeps the prompts' keys and values out of the gradient; use checkpoint_layers"
    if refusal(model) is None and not takes_row_masks(model):
        return f"{type(model).__module__} computes an attention of its own, which takes no mask for each row"
    return refusal(model)


def _shared(model: Any, run: Run, rows: PreparedRows) -> mx.array:
    prompts = [_PromptCache(rows.prompt_padding) for _ in model.layers]
    columns = rows.prompt_tokens.shape[1] - 1
    if columns:
        run(rows.prompt_tokens[:, :-1], cache=prompts)
    inputs = mx.concatenate([_spread(rows, rows.prompt_tokens[:, -1:]), rows.completion_tokens[:, :-1]], axis=1)
    padding = None if rows.prompt_padding is None else _spread(rows, rows.prompt_padding)
    layout = _Continued(rows, columns, padding)
    return run(inputs, cache=[_ContinuedCache(layout, prompt.given() if columns else []) for prompt in prompts])


def _spread(rows: PreparedRows, per_prompt: mx.array) -> mx.array:
    """(P, …) to (B, …), each row its prompt's. A product with 0s and 1s is exact, and its gradient needs no scatter."""
    if rows.spread is None:
        return per_prompt if rows.group == 1 else mx.repeat(per_prompt, rows.group, axis=0)
    if not mx.issubdtype(per_prompt.dtype, mx.floating):
        return mx.take(per_prompt, mx.argmax(rows.spread, axis=1), axis=0)
    flat = rows.spread.astype(per_prompt.dtype) @ per_prompt.reshape(per_prompt.shape[0], -1)
    return flat.reshape(-1, *per_prompt.shape[1:])


def _mask(start: int, count: int, padding: mx.array | None, return_array: bool) -> mx.array | str | None:
    if padding is None and not return_array:
        return None if count == 1 else "causal"
    return causal_mask(start, count, mx.zeros((1,), mx.int32) if padding is None else padding)


class _PromptCache:
    """The keys and values of the prompts' columns, as one layer computes them."""

    def __init__(self, padding: mx.array | None) -> None:
        self.keys: Any = None  # (P, H, N - 1, D)
        self.values: Any = None
        self._padding = padding

    @property
    def offset(self) -> int | mx.array:
        return 0 if self._padding is None else -self._padding

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        self.keys, self.values = keys, values
        return keys, values

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> mx.array | str | None:
        assert window_size is None, "refusal() names models with windows"
        return _mask(0, N, self._padding, return_array)

    def taken(self) -> list[mx.array]:
        return []

    def replaced(self, taken: list[mx.array]) -> "_PromptCache":
        del taken
        return _PromptCache(self._padding)

    def given(self) -> list[mx.array]:
        return [self.keys, self.values]

    def receive(self, given: list[mx.array]) -> None:
        self.keys, self.values = given


class _ContinuedCache:
    """One layer's cache of rows that continue prompts: their columns behind the prompts' keys and values."""

    def __init__(self, layout: "_Continued", prompt: list[mx.array]) -> None:
        self._layout, self._prompt = layout, prompt

    @property
    def offset(self) -> int | mx.array:
        return self._layout.columns if self._layout.padding is None else self._layout.columns - self._layout.padding

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        if not self._prompt:
            return keys, values
        old_keys, old_values = (_spread(self._layout.rows, held) for held in self._prompt)
        return mx.concatenate([old_keys, keys], axis=2), mx.concatenate([old_values, values], axis=2)

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> mx.array | str | None:
        assert window_size is None, "refusal() names models with windows"
        return _mask(self._layout.columns, N, self._layout.padding, return_array)

    def taken(self) -> list[mx.array]:
        return self._prompt

    def replaced(self, taken: list[mx.array]) -> "_ContinuedCache":
        return _ContinuedCache(self._layout, taken)

    def given(self) -> list[mx.array]:
        return []

    def receive(self, given: list[mx.array]) -> None:
        assert not given


@dataclass(frozen=True)
class _Continued:
    """What all layers of a continued pass share."""

    rows: PreparedRows
    columns: int
    padding: mx.array | None  # (B,)


def _unshared(run: Run, rows: PreparedRows) -> mx.array:
    """Every row's prompt and completion, padded on the right; then the completion's columns."""
    longest, width = rows.prompt_tokens.shape[1], rows.completion_tokens.shape[1]
    padding = mx.zeros((rows.prompt_tokens.shape[0],), mx.int32) if rows.prompt_padding is None else rows.prompt_padding
    padding = _spread(rows, padding)[:, None]
    both = mx.concatenate([_spread(rows, rows.prompt_tokens), rows.completion_tokens], axis=1)
    columns = mx.minimum(mx.arange(longest + width - 1)[None] + padding, longest + width - 1)
    out = run(mx.take_along_axis(both, columns, axis=1))
    wanted = longest - 1 - padding + mx.arange(width)[None]
    return mx.take_along_axis(out, wanted[..., None], axis=1)
