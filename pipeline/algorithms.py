"""Which class a section of an experiment trains with."""

from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from configs.loader import describe
from configs.schema import GRPOConfig, PluginPolicyConfig, PPOConfig

if TYPE_CHECKING:
    from mlx_ops.algorithm import PolicyTrainer


def algorithm_of(config: GRPOConfig | PPOConfig | PluginPolicyConfig) -> "type[PolicyTrainer[Any]]":
    """The registered class; `ValueError` where no plugin has registered it, or where it refuses its options."""
    import mlx_ops.grpo
    import mlx_ops.ppo  # noqa: F401 (both register themselves)
    from mlx_ops.algorithm import AlgorithmRegistry, options_of

    if config.algorithm not in AlgorithmRegistry:
        raise ValueError(f"algorithm: unknown {config.algorithm!r}; registered: {AlgorithmRegistry.names()}")
    cls = AlgorithmRegistry[config.algorithm]
    try:
        cls.Options.model_validate(options_of(config))
    except ValidationError as error:
        raise ValueError(describe(error, f"options: of algorithm {config.algorithm!r}", options_of(config))) from error
    return cls
