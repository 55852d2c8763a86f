"""From rollouts to a policy that has learned, in seconds: a random model, a task of one prompt token, no tokenizer."""

from typing import Any

import pytest
from mlx.optimizers import AdamW

from configs.schema import GRPOConfig, PolicyConfig, PPOConfig, SamplingConfig
from mlx_ops.algorithm import PolicyTrainer
from mlx_ops.generation import generate
from mlx_ops.grpo import GRPOTrainer
from mlx_ops.ppo import PPOTrainer
from mlx_ops.rollout import Group, row_seed
from tests.mlx_ops.bench import rollout
from tests.mlx_ops.tiny import tiny_model

CLASSES = 4
SAMPLING = SamplingConfig(max_tokens=6)


def drawing(model: Any, group_size: int):
    """Rollouts for prompts 1 to 4; the reward is the share of tokens that equal the prompt modulo 4."""

    def draw(position: int, prompts: int) -> tuple[list[Group], dict[str, float]]:
        asked = [[1 + (position + place) % CLASSES] for place in range(prompts)]
        seeds = [row_seed(0, position + place, row) for place in range(prompts) for row in range(group_size)]
        drawn = generate(model, asked, sampling=SAMPLING, seeds=seeds, eos=frozenset(), group_size=group_size)
        judged = [
            rollout(
                completion.tokens,
                sum(token % CLASSES == prompt[0] % CLASSES for token in completion.tokens) / len(completion.tokens),
                prompt=prompt,
                logprobs=completion.logprobs,
                truncated=completion.truncated,
            )
            for completion, prompt in zip(drawn, [p for p in asked for _ in range(group_size)], strict=True)
        ]
        return [judged[place * group_size :][:group_size] for place in range(prompts)], {"seconds/generate": 0.1}

    return draw


def learn(cls: type[PolicyTrainer[Any]], config: PolicyConfig, group_size: int) -> list[dict[str, float]]:
    model, rows = tiny_model(sharpness=1.0, tie_word_embeddings=True), []
    trainer = cls(
        model,
        AdamW(learning_rate=config.learning_rate),
        config,
        draw=drawing(model, group_size),
        weights={"task": 1.0},
        token_budget=10_000,
        seed=0,
        keep=lambda samples: None,
    )
    trainer.fit(config.steps, report=lambda step, metrics: rows.append(dict(metrics)), save=lambda *_: None)
    return rows


COMMON: dict[str, Any] = {"sampling": SAMPLING.model_dump(), "prompts_per_step": 8}


@pytest.mark.parametrize(
    ("cls", "config"),
    [
        (GRPOTrainer, GRPOConfig(preset="grpo", steps=20, learning_rate=1e-2, group_size=8, **COMMON)),  # pyright: ignore
        (PPOTrainer, PPOConfig(steps=20, learning_rate=1e-3, completions_per_prompt=8, **COMMON)),
    ],
    ids=["grpo", "ppo"],
)
def test_from_random_weights_to_a_solved_task(cls, config):
    rows = learn(cls, config, 8)
    assert rows[0]["reward"] < 0.3
    assert min(row["reward"] for row in rows[-4:]) > 0.8
