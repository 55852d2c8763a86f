"""A hand-made policy and examples for trainer tests: letters as tokens, no disk, no tokenizer training."""

from collections.abc import Sequence
from typing import Any

import mlx.nn as nn
import numpy as np
from mlx.optimizers import SGD, Optimizer

from configs.schema import GRPOConfig, PolicyConfig, PPOConfig
from mlx_ops.algorithm import PolicyTrainer
from mlx_ops.batching import Completion, Rollout
from mlx_ops.rollout import Group
from rewards.base import Example
from rewards.composer import Score

VOCABULARY = 64


def rollout(
    tokens: Sequence[int],
    reward: float | None,
    *,
    prompt: Sequence[int] = (1, 2, 3),
    logprobs: Sequence[float] | None = None,
    truncated: bool = False,
) -> Rollout:
    """One judged completion; the sampler's log-probabilities are 0 unless given."""
    given = [0.0] * len(tokens) if logprobs is None else list(logprobs)
    completion = Completion(tuple(tokens), tuple(given), truncated)
    example = Example("-".join(map(str, prompt)), "prompt", answer="1")
    return Rollout(example, tuple(prompt), completion, "text", Score(reward, {"task": reward}))


def groups(seed: int = 0, *, prompts: int = 4, size: int = 4, longest: int = 7) -> list[Group]:
    """Groups of random completions with mixed rewards, prompts and completions of unequal length."""
    draw = np.random.default_rng(seed)
    made = []
    for _ in range(prompts):
        prompt = draw.integers(1, VOCABULARY, draw.integers(2, 6)).tolist()
        made.append(
            [
                rollout(
                    draw.integers(1, VOCABULARY, draw.integers(1, longest + 1)).tolist(),
                    float(row % 2) + 0.1 * row,
                    prompt=prompt,
                )
                for row in range(size)
            ]
        )
    return made


def grpo_config(**changes: Any) -> GRPOConfig:
    """Four prompts of four completions, SGD-like sizes."""
    fields = {
        "prompts_per_step": 4,
        "group_size": 4,
        "learning_rate": 1e-3,
        "sampling": {"max_tokens": 8},
        "aggregation": "token_mean",
    }
    return GRPOConfig.model_validate(fields | changes)


def ppo_config(**changes: Any) -> PPOConfig:
    """Sixteen prompts of one completion, SGD-like sizes."""
    fields: dict[str, Any] = {
        "prompts_per_step": 4,
        "completions_per_prompt": 4,
        "learning_rate": 1e-3,
        "sampling": {"max_tokens": 8},
        "epochs": 1,
        "minibatches": 1,
    }
    return PPOConfig.model_validate(fields | changes)


def make_trainer(
    cls: type[PolicyTrainer[Any]],
    model: nn.Module,
    config: PolicyConfig,
    drawn: Sequence[Group],
    *,
    optimizer: Optimizer | None = None,
    budget: int = 10_000,
    seed: int = 0,
    **more: Any,
) -> Any:
    """A trainer that is given `drawn` again and again; its samples are in `kept`."""
    kept: list[Any] = []
    trainer = cls(
        model,
        optimizer or SGD(learning_rate=config.learning_rate),
        config,
        draw=lambda position, prompts: (list(drawn[:prompts]), {"seconds/generate": 0.0}),
        weights={"task": 1.0},
        token_budget=budget,
        seed=seed,
        keep=kept.extend,
        **more,
    )
    trainer.kept = kept  # type: ignore[attr-defined]
    # What a GPU compiles it pads; tests count without.
    trainer.compiled = False
    return trainer
