"""Examples become groups of judged rollouts; tokens become text here and nowhere else."""

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from configs.schema import PromptConfig, SamplingConfig
from mlx_ops.batching import Completion, Rollout
from mlx_ops.distributed import ALONE, Ranks
from mlx_ops.generation import generate
from mlx_ops.model import Policy
from mlx_ops.prompts import completion_text, prompt_tokens
from rewards.base import Example
from rewards.composer import RewardComposer, Score

Group = list[Rollout]
Take = Callable[[int, int], Sequence[int]]
"""The indices of `count` examples from `position` on, in the configured order."""


@dataclass(frozen=True)
class Task:
    """An example with its prompt's tokens."""

    example: Example
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Sampler:
    """Draws groups of judged completions from the policy as it stands."""

    policy: Policy
    tasks: Sequence[Task]
    take: Take
    sampling: SamplingConfig
    group_size: int
    judge: RewardComposer
    seed: int
    ranks: Ranks = ALONE

    def __call__(self, position: int, prompts: int) -> tuple[list[Group], dict[str, float]]:
        """P groups of G rollouts for the examples from `position` on, and the seconds it took to draw and to judge.

        A row's draw is a function of the seed, the position and the row: the same in any batch, at any number of ranks
        and after any resume. Each rank draws and judges its share of the groups; the seconds are those of the slowest.
        """
        tasks = [self.tasks[index] for index in self.take(position, prompts)]
        own = self.ranks.share(range(prompts))
        started = time.perf_counter()
        completions = self._draw([tasks[place] for place in own], [position + place for place in own])
        drawn = time.perf_counter()
        judged = self._judge(self._a_row_each([tasks[place] for place in own]), completions)
        times = self.ranks.gather([(drawn - started, time.perf_counter() - drawn)])
        drawing, judging = (max(column) for column in zip(*times, strict=True))
        seconds = {"seconds/generate": drawing, "seconds/reward": judging}
        rollouts = self._of_all_ranks(self._a_row_each(tasks), judged)
        size = self.group_size
        return [rollouts[start : start + size] for start in range(0, len(rollouts), size)], seconds

    def _draw(self, tasks: Sequence[Task], positions: Sequence[int]) -> list[Completion]:
        if not tasks:
            return []
        seeds = [row_seed(self.seed, position, row) for position in positions for row in range(self.group_size)]
        return generate(
            self.policy.model,
            [task.tokens for task in tasks],
            sampling=self.sampling,
            seeds=seeds,
            eos=self.policy.eos,
            group_size=self.group_size,
        )

    def _a_row_each(self, tasks: Sequence[Task]) -> list[Task]:
        return [task for task in tasks for _ in range(self.group_size)]

    def _of_all_ranks(self, tasks: Sequence[Task], own: Sequence[Rollout]) -> list[Rollout]:
        plain = [
            (r.completion.tokens, r.completion.logprobs, r.completion.truncated, r.text, r.score.total, r.score.parts)
            for r in own
        ]
        rows = zip(tasks, self.ranks.gather(plain), strict=True)
        return [
            Rollout(
                *(task.example, task.tokens, Completion(tuple(tokens), tuple(logprobs), truncated)),
                *(text, Score(total, parts)),
            )
            for task, (tokens, logprobs, truncated, text, total, parts) in rows
        ]

    def _judge(self, tasks: Sequence[Task], completions: Sequence[Completion]) -> list[Rollout]:
        if not tasks:
            return []
        texts = [completion_text(c.tokens, self.policy.tokenizer, self.policy.eos) for c in completions]
        examples = [task.example for task in tasks]
        scores = judge(self.judge, examples, texts, completions, self.sampling.max_tokens)
        rows = zip(tasks, completions, texts, scores, strict=True)
        return [Rollout(task.example, task.tokens, drawn, text, score) for task, drawn, text, score in rows]


def judge(
    composer: RewardComposer,
    examples: Sequence[Example],
    texts: Sequence[str],
    completions: Sequence[Completion],
    max_tokens: int,
) -> list[Score]:
    """The scores of completions, each reward seeing every column of the dataset."""
    names = sorted(set(chain.from_iterable(example.columns for example in examples)))
    columns: dict[str, Sequence[Any]] = {name: [example.columns.get(name) for example in examples] for name in names}
    columns |= {
        "id": [example.id for example in examples],
        "answer": [example.answer for example in examples],
        "truncated": [completion.truncated for completion in completions],
        "completion_length": [len(completion.tokens) for completion in completions],
        "max_completion_length": [max_tokens] * len(completions),
    }
    return composer([example.prompt for example in examples], texts, columns)


def make_tasks(
    examples: Sequence[Example], prompt: PromptConfig, tokenizer: Any, max_prompt_tokens: int
) -> tuple[list[Task], int]:
    """The examples whose prompts are short enough, as tasks, and how many were left out. `ValueError` for none."""
    tasks = [Task(example, tuple(prompt_tokens(example, prompt, tokenizer))) for example in examples]
    kept = [task for task in tasks if len(task.tokens) <= max_prompt_tokens]
    if not kept:
        raise ValueError(f"max_prompt_tokens: {max_prompt_tokens} leaves none of {len(tasks)} examples")
    return kept, len(tasks) - len(kept)


def row_seed(seed: int, *place: int | str) -> int:
    """A 32-bit seed for one row of one place in the run."""
    text = ":".join(str(part) for part in (seed, *place))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "big")


def rollout_metrics(groups: Sequence[Group], task_reward: str) -> dict[str, float]:
    """Rewards, lengths and solved groups of a step; `docs/metrics.md` has the formulas."""
    rows = [rollout for group in groups for rollout in group]
    totals = np.array([np.nan if row.score.total is None else row.score.total for row in rows])
    lengths = np.array([len(row.completion.tokens) for row in rows])
    truncated = np.array([row.completion.truncated for row in rows])
    metrics = {
        "reward": _nanmean(totals),
        "reward_std": float(np.mean([_std(group) for group in (groups if len(groups[0]) > 1 else [rows])])),
        **_extent("completion_length", lengths),
        **_extent("completion_length_terminated", lengths[~truncated]),
        "truncated": float(truncated.mean()),
        "tokens_generated": float(lengths.sum()),
        "sampler_entropy": -sum(sum(row.completion.logprobs) for row in rows) / float(lengths.sum()),
    }
    return metrics | _parts(rows) | _solved(groups, task_reward)


def _extent(name: str, values: np.ndarray) -> dict[str, float]:
    """Mean, `_min` and `_max`; nothing of nothing."""
    if not values.size:
        return {}
    return {name: float(values.mean()), f"{name}_min": float(values.min()), f"{name}_max": float(values.max())}


def _parts(rows: Sequence[Rollout]) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for name in rows[0].score.parts:
        values = np.array([np.nan if (v := row.score.parts[name]) is None else v for row in rows])
        metrics[f"reward/{name}"] = _nanmean(values)
        metrics[f"reward_std/{name}"] = float(np.nanstd(values)) if np.isfinite(values).any() else 0.0
        metrics[f"unscored/{name}"] = float(np.isnan(values).mean())
    return metrics


def _solved(groups: Sequence[Group], task_reward: str) -> dict[str, float]:
    """Shares of groups with no, some and only completions that reach the highest task reward of the step."""
    parts = [[row.score.parts[task_reward] or 0.0 for row in group] for group in groups]
    best = max(max(values) for values in parts)
    hits = [sum(value >= best for value in values) / len(values) if best > 0 else 0.0 for values in parts]
    total = len(hits)
    return {
        "solved_none": sum(hit == 0 for hit in hits) / total,
        "solved_some": sum(0 < hit < 1 for hit in hits) / total,
        "solved_all": sum(hit == 1 for hit in hits) / total,
    }


def _std(rows: Sequence[Rollout]) -> float:
    values = [row.score.total for row in rows if row.score.total is not None]
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def _nanmean(values: np.ndarray) -> float:
    return float(np.nanmean(values)) if np.isfinite(values).any() else 0.0


def sample_rows(groups: Sequence[Group], advantages: Sequence[float], step: int) -> list[Mapping[str, Any]]:
    """The rollouts as records, for `samples/*.parquet` and the tables that people read."""
    rows = [rollout for group in groups for rollout in group]
    return [
        {
            "step": step,
            "policy_version": step - 1,
            "example": row.example.id,
            "prompt": row.example.prompt,
            "completion": row.text,
            "answer": row.example.answer,
            "reward": row.score.total,
            "rewards": dict(row.score.parts),
            "advantage": float(advantage),
            "tokens": len(row.completion.tokens),
            "truncated": row.completion.truncated,
            "sampler_logprob": float(sum(row.completion.logprobs)),
        }
        for row, advantage in zip(rows, advantages, strict=True)
    ]
