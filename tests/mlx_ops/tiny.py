"""Small random models for tests."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import llama, qwen2, qwen3

ARCHITECTURES = {"llama": llama, "qwen2": qwen2, "qwen3": qwen3}


def tiny_model(architecture: str = "llama", *, seed: int = 0, scale: float = 3.0, **changes: Any) -> nn.Module:
    """A random model in float32: 2 layers, width 32, 4 heads on 2 key-value heads, 64 tokens; `scale` sharpens its logits."""
    module = ARCHITECTURES[architecture]
    fields = dict(
        model_type=architecture,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        rms_norm_eps=1e-5,
        vocab_size=64,
        max_position_embeddings=4096,
        rope_theta=10000.0,
        tie_word_embeddings=True,
    )
    mx.random.seed(seed)
    model = module.Model(module.ModelArgs.from_dict(fields | changes))
    model.model.embed_tokens.weight = model.model.embed_tokens.weight * scale
    mx.eval(model.parameters())
    return model
