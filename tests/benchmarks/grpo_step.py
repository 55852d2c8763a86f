"""One GRPO step, rollout and update timed apart, on random rewards that no model can fake.

    python -m tests.benchmarks.grpo_step --model DIR -P 4 -G 8 -T 64 --steps 3 --beta 0 [--force-length]

LoRA of rank 8 on every block, temperature 1, no truncation. `--force-length` takes the end tokens away, so that every
completion has T tokens. The first step is left out where there are more: it compiles. The last line is one JSON
object; speeds are of the best step. CPU seconds are user and system time of the whole process.
"""

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import mlx_ops as mlx_ops  # before MLX, which binds its BLAS when it is imported

# isort: split
import mlx.core as mx

from configs.schema import GRPOConfig, LoraAdapter, PromptConfig
from mlx_ops.backend import prepare
from mlx_ops.grpo import GRPOTrainer
from mlx_ops.model import Policy, add_adapter, load_policy
from mlx_ops.optimizers import make_optimizer
from mlx_ops.policy import PolicyBatch
from mlx_ops.rollout import Group, Sampler, make_tasks
from rewards.base import BaseReward, Example
from rewards.composer import RewardComposer

TOKEN_BUDGET = 16_384


class DigitShare(BaseReward):
    """The share of digits in a completion: varies in every group."""

    def __call__(self, prompts: Sequence[str], completions: Sequence[str], **columns: object) -> list[float]:
        return [sum(map(str.isdigit, text)) / max(len(text), 1) for text in completions]


class Clock:
    """Wall and CPU seconds of a block."""

    def __enter__(self) -> "Clock":
        self._wall, self._cpu = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self.wall, self.cpu = time.perf_counter() - self._wall, time.process_time() - self._cpu


def main(arguments: argparse.Namespace) -> None:
    """Run the steps and print their figures."""
    backend = prepare()
    policy = load_policy(arguments.model, None if backend.is_gpu else mx.float32)
    add_adapter(policy.model, LoraAdapter(rank=8, scale=10.0), seed=0)
    config = GRPOConfig(
        steps=arguments.steps,
        learning_rate=1e-4,
        prompts_per_step=arguments.P,
        group_size=arguments.G,
        kl_coef=arguments.beta,
        sampling={"max_tokens": arguments.T},  # pyright: ignore[reportArgumentType]
    )
    trainer = make_trainer(policy, config, force_length=arguments.force_length)
    figures = [step(trainer, number) for number in range(arguments.steps)]
    kept = figures[1:] or figures
    best = {
        "rollout_tok_s_wall": round(max(row["rollout_tok_s_wall"] for row in kept), 1),
        "rollout_tok_per_cpu_s": round(max(row["rollout_tok_per_cpu_s"] for row in kept), 1),
        "update_s_wall": round(min(row["update_s_wall"] for row in kept), 4),
        "update_cpu_s": round(min(row["update_cpu_s"] for row in kept), 4),
        "peak_memory_gb": round(mx.get_peak_memory() / 1e9, 4),
        "loss": kept[-1]["loss"],
    }
    print(json.dumps(best))


def make_trainer(policy: Policy, config: GRPOConfig, *, force_length: bool) -> GRPOTrainer:
    """A GRPO trainer on questions of sums."""
    examples = [
        Example(f"{a}-{b}", f"What is {a} + {b}?", answer=str(a + b)) for a in range(2, 12) for b in range(2, 12)
    ]
    prompt = PromptConfig(chat=policy.tokenizer.has_chat_template)
    tasks, _ = make_tasks(examples, prompt, policy.tokenizer, config.max_prompt_tokens)
    judge = RewardComposer({"digits": (DigitShare(), 1.0)})
    sampler = Sampler(
        policy=policy,
        tasks=tasks,
        take=lambda position, count: [(position + place) % len(tasks) for place in range(count)],
        sampling=config.sampling,
        group_size=config.group_size,
        judge=judge,
        seed=0,
    )
    return GRPOTrainer(
        policy.model,
        make_optimizer(config.optimizer, config.learning_rate, config.steps),
        config,
        draw=endless(sampler) if force_length else sampler,
        weights=judge.weights,
        token_budget=TOKEN_BUDGET,
        seed=0,
        keep=lambda rows: None,
    )


def endless(sampler: Sampler) -> Sampler:
    """The sampler of a model without end tokens."""
    return replace(sampler, policy=Endless(sampler.policy.model, sampler.policy.tokenizer, sampler.policy.path))


class Endless(Policy):
    """A policy that nothing stops."""

    @property
    def eos(self) -> frozenset[int]:
        return frozenset()


def step(trainer: GRPOTrainer, number: int) -> dict[str, float]:
    """One rollout and one update; scoring the reference counts as update."""
    drawn: list[tuple[list[Group], dict[str, float]]] = []
    draw, position = trainer.draw, trainer.position
    with Clock() as rollout:
        drawn.append(draw(position, trainer.config.prompts_per_step))
    trainer.draw = lambda position, prompts: drawn[0]
    with Clock() as update:
        minibatches, _ = trainer.collect(number)
        batches: list[Sequence[PolicyBatch]] = list(minibatches)
        metrics = [trainer.update(batch) for batch in batches]
    trainer.draw = draw
    tokens = sum(len(row.completion.tokens) for group in drawn[0][0] for row in group)
    return {
        "rollout_tok_s_wall": tokens / rollout.wall,
        "rollout_tok_per_cpu_s": tokens / rollout.cpu,
        "update_s_wall": update.wall,
        "update_cpu_s": update.cpu,
        "loss": metrics[-1]["loss"] if metrics else 0.0,
    }


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--model", type=Path, required=True)
    made.add_argument("-P", type=int, default=4, help="prompts a step")
    made.add_argument("-G", type=int, default=8, help="completions a prompt")
    made.add_argument("-T", type=int, default=64, help="new tokens a completion, at most")
    made.add_argument("--steps", type=int, default=3)
    made.add_argument("--beta", type=float, default=0.0, help="weight of the KL to the reference")
    made.add_argument("--force-length", action="store_true", help="no end tokens: every completion has T tokens")
    return made


if __name__ == "__main__":
    main(parser().parse_args())
