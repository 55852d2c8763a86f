"""NEFTune (arXiv:2310.05914): uniform noise on the input embeddings while training."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn


class NoisyEmbedding(nn.Module):
    """An embedding with noise on its vectors, U(-1, 1) · alpha / sqrt(length · width), but not where it is the head."""

    def __init__(self, embedding: nn.Module, alpha: float, lengths: mx.array) -> None:
        super().__init__()
        self.embedding = embedding
        self._alpha, self._lengths = alpha, lengths

    def __call__(self, tokens: mx.array) -> mx.array:
        vectors = self.embedding(tokens)
        noise = mx.random.uniform(-1.0, 1.0, vectors.shape)
        scale = self._alpha * mx.rsqrt(self._lengths[..., None] * float(vectors.shape[-1]))
        return vectors + (noise * scale).astype(vectors.dtype)

    def as_linear(self, hidden: mx.array) -> mx.array:
        owner: Any = self.embedding
        return owner.as_linear(hidden)


@contextmanager
def noisy_embeddings(model: nn.Module, alpha: float, lengths: mx.array) -> Iterator[None]:
    """Within, the model's embedding adds noise, drawn from `mx.random`.

    `lengths` are the tokens of the examples that the inputs belong to: (B, 1) one a row, or (B, L) one a column.
    """
    owner, name = embedding_of(model)
    embedding = owner[name]
    owner[name] = NoisyEmbedding(embedding, alpha, lengths)
    try:
        yield
    finally:
        owner[name] = embedding


def embedding_of(model: nn.Module) -> tuple[nn.Module, str]:
    """The module that holds the model's one embedding, and its name there. `ValueError` for more than one, or none."""
    found = [
        (owner, name)
        for owner in model.modules()
        for name, child in owner.children().items()
        if isinstance(child, nn.Embedding | nn.QuantizedEmbedding)
    ]
    if len(found) != 1:
        names = sorted(name for _, name in found)
        raise ValueError(
            f"neftune_alpha: {type(model).__module__} has {len(found)} embeddings {names}, so where the noise belongs "
            "is not clear; set neftune_alpha: 0"
        )
    return found[0]
