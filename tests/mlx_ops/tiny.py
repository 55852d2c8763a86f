"""Small random models for tests."""

from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models import gemma2, llama, qwen2, qwen3

ARCHITECTURES: dict[str, Any] = {"gemma2": gemma2, "llama": llama, "qwen2": qwen2, "qwen3": qwen3}


def tiny_model(architecture: str = "llama", *, seed: int = 0, sharpness: float = 3.0, **changes: Any) -> nn.Module:
    """A random float32 model of 2 layers, width 32, 4 heads on 2 key-value heads, 64 tokens.

    Its layers' matrices are scaled by `sharpness`: what a token sees before it then changes what it predicts.
    """
    module = ARCHITECTURES[architecture]
    fields = {
        "model_type": architecture,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "rms_norm_eps": 1e-5,
        "vocab_size": 64,
        "max_position_embeddings": 4096,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
    }
    mx.random.seed(seed)
    model = module.Model(module.ModelArgs.from_dict(fields | changes))
    layers = model.model.layers
    for part in layers:
        part.update(tree_map(lambda weight: weight * sharpness if weight.ndim == 2 else weight, part.parameters()))
    if "lm_head" in model:
        model.lm_head.weight = model.lm_head.weight * sharpness
    mx.eval(model.parameters())
    return model


def leaves(tree: Any) -> list[tuple[str, mx.array]]:
    """The arrays of a parameter tree with their dotted names."""
    return cast(list[tuple[str, mx.array]], tree_flatten(tree))
