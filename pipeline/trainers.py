"""A stage's trainer, made of its job: data, rollouts and rewards, and what looks at the model between steps."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from configs.schema import (
    GRPOConfig,
    PluginPolicyConfig,
    PolicyConfig,
    PPOConfig,
    SamplingConfig,
    SFTConfig,
    TrainingConfig,
)
from mlx_ops.generation import generate
from mlx_ops.model import Policy
from mlx_ops.optimizers import make_optimizer
from mlx_ops.prompts import completion_text
from mlx_ops.rollout import Sampler, Task, judge, make_tasks
from mlx_ops.sft import SFTTrainer, make_pairs
from mlx_ops.trainer import BaseTrainer, Metrics
from mlx_ops.watchdog import Watchdog
from pipeline.algorithms import algorithm_of
from pipeline.data.samplers import Shuffled, make_sampler
from pipeline.data.store import read_examples
from pipeline.job import Job
from pipeline.samples import SampleFiles
from rewards.base import Example
from rewards.composer import RewardComposer

Reinforcement = GRPOConfig | PPOConfig | PluginPolicyConfig


@dataclass(frozen=True)
class Parts:
    """A stage's trainer and what looks at the model between steps."""

    trainer: BaseTrainer[Any]
    evaluate: Callable[[int], Metrics]
    watchdog: Watchdog | None


def build(job: Job, policy: Policy, config: TrainingConfig, samples: SampleFiles, token_budget: int) -> Parts:
    """What trains this policy under these settings, in microbatches of so many padded tokens."""
    if isinstance(config, SFTConfig):
        return _build_sft(job, policy, config, token_budget)
    assert isinstance(config, Reinforcement)
    return _build_policy(job, policy, config, samples, token_budget)


def _build_sft(job: Job, policy: Policy, config: SFTConfig, token_budget: int) -> Parts:
    experiment = job.experiment
    train, validation = (
        make_pairs(read_examples(job.dataset_dir, split), experiment.prompt, policy.tokenizer, config)[0]
        for split in ("train", "test")
    )
    trainer = SFTTrainer(
        policy.model,
        make_optimizer(config.optimizer, config.learning_rate, config.steps),
        config,
        pairs=train,
        validation=validation,
        take=Shuffled(len(train), experiment.seed).take,
        token_budget=token_budget,
        seed=experiment.seed,
        ranks=job.ranks,
    )
    return Parts(trainer, trainer.validate, None)


def _build_policy(job: Job, policy: Policy, config: Reinforcement, samples: SampleFiles, token_budget: int) -> Parts:
    sampler = make_rollouts(job, policy, config, config.group_size)
    trainer = algorithm_of(config)(
        policy.model,
        make_optimizer(config.optimizer, config.learning_rate, config.policy_updates),
        config,
        draw=sampler,
        weights=sampler.judge.weights,
        token_budget=token_budget,
        seed=job.experiment.seed,
        keep=samples.write if job.ranks.is_writer else lambda _: None,
        ranks=job.ranks,
    )
    return Parts(trainer, held_out_reward(job, sampler, config), Watchdog(config.watchdog))


def make_rollouts(job: Job, policy: Policy, config: PolicyConfig, group_size: int) -> Sampler:
    """The rollouts of a policy on the training examples, judged by the experiment's rewards."""
    experiment = job.experiment
    examples = read_examples(job.dataset_dir, "train")
    composer = RewardComposer.from_config(experiment.rewards)
    composer.validate(examples)
    tasks, _ = make_tasks(examples, experiment.prompt, policy.tokenizer, config.max_prompt_tokens)
    return Sampler(
        policy=policy,
        tasks=tasks,
        take=make_sampler(config.order, [task.example for task in tasks], experiment.seed).take,
        sampling=config.sampling,
        group_size=group_size,
        judge=composer,
        seed=experiment.seed,
        ranks=job.ranks,
    )


def held_out_reward(job: Job, sampler: Sampler, config: PolicyConfig) -> Callable[[int], Metrics]:
    """Now and then the mean reward of greedy completions of held-out examples, as `eval_reward`."""
    examples: Sequence[Example] = read_examples(job.dataset_dir, "test") if config.eval_every else []
    policy, greedy = sampler.policy, SamplingConfig(temperature=0.0, max_tokens=config.sampling.max_tokens)

    def earned(tasks: Sequence[Task]) -> list[float]:
        if not tasks:
            return []
        drawn = generate(
            policy.model, [task.tokens for task in tasks], sampling=greedy, seeds=[0] * len(tasks), eos=policy.eos
        )
        texts = [completion_text(completion.tokens, policy.tokenizer, policy.eos) for completion in drawn]
        scores = judge(sampler.judge, [task.example for task in tasks], texts, drawn, greedy.max_tokens)
        return [score.total for score in scores if score.total is not None]

    def evaluate(step: int) -> Metrics:
        if config.eval_every is None or step % config.eval_every or not examples:
            return {}
        tasks, _ = make_tasks(
            examples[: config.eval_examples], job.experiment.prompt, policy.tokenizer, config.max_prompt_tokens
        )
        totals = sampler.ranks.gather(earned(sampler.ranks.share(tasks)))
        return {"eval_reward": sum(totals) / len(totals)} if totals else {}

    return evaluate
