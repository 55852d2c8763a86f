"""What a training needs before it begins: bytes of memory by part, against what the device has.

An estimate: the batch that is configured, every prompt and completion as long as the settings allow. Left out: what the
allocator keeps in its cache, and programs beside this one.
"""

from dataclasses import dataclass
from typing import Any

import mlx.nn as nn

from configs.schema import LoraAdapter, OptimizerConfig, PolicyConfig, PPOConfig, SFTConfig, TrainingConfig
from mlx_ops.checkpoint import gigabytes, tree_bytes
from mlx_ops.generation import MEMORY_SHARE
from mlx_ops.microbatches import BUCKET, MICROBATCH_SHARE, microbatch_token_bytes
from mlx_ops.row_cache import refusal, token_bytes

MOMENTS = {"adamw": 2, "lion": 1, "adafactor": 1}
"""Copies of the trained weights that an optimizer keeps, at most."""
MAX_TOKEN_BUDGET = 16_384
"""More padded tokens at once than this gain no speed and delay a cancel."""


@dataclass(frozen=True)
class Footprint:
    """Bytes by part."""

    weights: int
    optimizer: int
    reference: int
    critic: int
    gradients: int
    """Two of them while the microbatches of an update add up."""
    keys_and_values: int
    """Of all rows of a rollout, or of as many as are drawn at once."""
    token_budget: int
    """Padded tokens of a microbatch."""
    microbatch: int
    """Logits and activations."""

    @property
    def standing(self) -> int:
        return self.weights + self.optimizer + self.reference + self.critic

    @property
    def peak(self) -> int:
        """Of rollout or update, whichever is more."""
        return self.standing + max(self.keys_and_values, self.gradients + self.microbatch)

    def __str__(self) -> str:
        parts = ("weights", "optimizer", "reference", "critic", "gradients", "keys_and_values", "microbatch")
        sizes = {name.replace("_", " "): getattr(self, name) for name in parts}
        return ", ".join(f"{name} {gigabytes(size)}" for name, size in sizes.items() if size)


def estimate(model: nn.Module, settings: dict[str, Any], config: TrainingConfig, memory: int) -> Footprint:
    """What training a loaded model needs; `settings` are those of its `config.json`."""
    trained = tree_bytes(model.trainable_parameters())
    standing = {
        "weights": tree_bytes(model.parameters()),
        "optimizer": trained * MOMENTS[config.optimizer.kind],
        "reference": trained if isinstance(config, PolicyConfig) and config.kl_coef > 0 else 0,
        "critic": _critic(config, trained),
        "gradients": 2 * trained,
    }
    a_token = microbatch_token_bytes(
        vocabulary=int(settings.get("vocab_size", 32_000)),
        hidden=int(settings.get("hidden_size", 1024)),
        layers=len(getattr(model, "layers", ())),
        checkpointed=config.gradient_checkpointing,
    )
    free = memory - sum(standing.values())
    budget = config.tokens_per_microbatch or min(
        MAX_TOKEN_BUDGET, max(BUCKET, int(min(MICROBATCH_SHARE * memory, free) / a_token))
    )
    return Footprint(
        **standing,
        keys_and_values=_keys_and_values(model, config, memory),
        token_budget=budget,
        # A microbatch is one row at least.
        microbatch=max(budget, longest(config)) * a_token,
    )


def require_memory(found: Footprint, config: TrainingConfig, memory: int, section: str) -> None:
    """`ValueError` with the parts and the fields to change, where they don't fit."""
    if found.peak <= memory:
        return
    raise ValueError(
        f"{section}: needs about {gigabytes(found.peak)} of memory ({found}), and {gigabytes(memory)} may be filled; "
        f"change {', or '.join(_remedies(found, config, section))}"
    )


def longest(config: TrainingConfig) -> int:
    """The tokens of the longest row that the settings allow."""
    if isinstance(config, SFTConfig):
        return config.max_length
    assert isinstance(config, PolicyConfig)
    return config.max_prompt_tokens + config.sampling.max_tokens


def _critic(config: TrainingConfig, trained: int) -> int:
    if not isinstance(config, PPOConfig) or config.critic.kind == "head":
        return 0
    own: OptimizerConfig = config.critic.optimizer
    # The trunk's own weights, their gradients beside those of the policy, their moments.
    return trained * (3 + MOMENTS[own.kind])


def _keys_and_values(model: Any, config: TrainingConfig, memory: int) -> int:
    if not isinstance(config, PolicyConfig) or refusal(model) is not None:
        return 0
    rows = config.prompts_per_step * getattr(config, "group_size", 1)
    return min(rows * longest(config) * token_bytes(model), int(MEMORY_SHARE * memory))


def _remedies(found: Footprint, config: TrainingConfig, section: str) -> list[str]:
    fields = []
    if found.keys_and_values > found.gradients + found.microbatch:
        group = "completions_per_prompt" if isinstance(config, PPOConfig) else "group_size"
        fields += [f"{section}.prompts_per_step", f"{section}.{group}", f"{section}.sampling.max_tokens"]
    elif isinstance(config, PolicyConfig):
        fields += [f"{section}.sampling.max_tokens"]
    else:
        fields += [f"{section}.max_length"]
    if config.tokens_per_microbatch is not None:
        fields.append(f"{section}.tokens_per_microbatch")
    if not config.gradient_checkpointing:
        fields.append(f"{section}.gradient_checkpointing: true")
    if not isinstance(config.adapter, LoraAdapter):
        fields.append(f"{section}.adapter: {{kind: lora}}")
    return [*fields, "model.path (a smaller or a quantised model)"]
