"""Rewards over held-out examples, asked as in training: the experiment's own, or any reward over any dataset."""

from collections.abc import Sequence
from functools import cached_property
from typing import ClassVar, Literal

from pydantic import BaseModel

from configs.loader import digest
from configs.schema import DatasetConfig, RewardConfig, Strict
from pipeline.data.preprocessing import prepare
from pipeline.evaluation.base import (
    BaseEvaluator,
    EvaluatorRegistry,
    Grade,
    ItemResult,
    Output,
    Problem,
    mean_scores,
)
from pipeline.evaluation.report import DatasetInfo, ExtractionInfo, sha256_of
from rewards.base import Example, RewardRegistry
from rewards.composer import RewardComposer, Score

ACCURACY, REWARD = "accuracy", "reward"
CLOSE = 1e-6


class HeldOutOptions(Strict):
    metric: Literal["accuracy", "reward"] = "accuracy"
    """The headline: the share of completions that the deciding reward calls right, or the mean total reward."""
    decided_by: str | None = None
    """The deciding reward; None takes the first one with a weight other than 0, as training does."""
    threshold: float = 1.0
    """A completion is right where the deciding reward is at least this."""
    rewards: tuple[RewardConfig, ...] = ()
    """Judge by these instead of the experiment's."""
    dataset: DatasetConfig | None = None
    """Take the test split of this dataset instead of the experiment's."""


@EvaluatorRegistry.register("held_out")
class HeldOut(BaseEvaluator):
    """Any dataset under any rewards.

    Scores: `accuracy`, `reward` (the weighted total), and `reward/<name>` for each part.
    """

    Options: ClassVar[type[BaseModel]] = HeldOutOptions
    options: HeldOutOptions

    @property
    def not_shares(self) -> frozenset[str]:
        return frozenset({REWARD, *(f"reward/{config.name}" for config in self._rewards)})

    @property
    def metric(self) -> str:
        return self.options.metric

    @property
    def protocol(self) -> str:
        return "experiment"

    @property
    def extraction(self) -> ExtractionInfo:
        rules = {config.name: f"{digest(config)} v{RewardRegistry[config.name].version}" for config in self._rewards}
        accuracy = f"{self._decider} >= {self.options.threshold:g}"
        return ExtractionInfo(name="rewards", version=self.version, rules={**rules, ACCURACY: accuracy})

    def prepare(self) -> None:
        names = [config.name for config in self._rewards]
        if not names:
            raise ValueError(
                f"{self.where}: held_out judges by the experiment's rewards; it has none, and options.rewards neither"
            )
        if self._decider not in names:
            raise ValueError(f"{self.where}: options.decided_by: no reward {self._decider!r}; there are {names}")
        RewardComposer.from_config(self._rewards).validate(self._examples)

    @property
    def _rewards(self) -> tuple[RewardConfig, ...]:
        return self.options.rewards or self.context.rewards

    @cached_property
    def _examples(self) -> Sequence[Example]:
        return self.context.test if self.options.dataset is None else prepare(self.options.dataset).test

    def dataset(self) -> DatasetInfo:
        config = self.options.dataset
        if config is None:
            return self.context.dataset
        rows = [[example.id, example.prompt, example.answer] for example in self._examples]
        source = config.test or config.train
        revision = getattr(source, "revision", None)
        return DatasetInfo(name=config.name, revision=revision, sha256=sha256_of(rows), split="test")

    @property
    def _decider(self) -> str:
        rewards = self._rewards
        first = next((config.name for config in rewards if config.weight), rewards[0].name)
        return self.options.decided_by or first

    def problems(self) -> list[Problem]:
        return [Problem(example, self.context.prompt, example.answer) for example in self._examples]

    def grade_all(self, problems: Sequence[Problem], outputs: Sequence[Sequence[Output]]) -> list[ItemResult]:
        """All completions at once, as rewards like it. A reward that raises is broken, and stops the evaluation."""
        from mlx_ops.batching import Completion
        from mlx_ops.rollout import judge

        rows = [(problem, output) for problem, samples in zip(problems, outputs, strict=True) for output in samples]
        scores = judge(
            RewardComposer.from_config(self._rewards),
            [problem.example for problem, _ in rows],
            [output.text for _, output in rows],
            [Completion(output.tokens, (), output.truncated) for _, output in rows],
            self.evaluation.sampling.max_tokens,
        )
        left = iter(scores)
        return [self._result([self._grade(next(left)) for _ in samples]) for samples in outputs]

    def grade(self, problem: Problem, outputs: Sequence[Output]) -> ItemResult:
        return self.grade_all([problem], [outputs])[0]

    def _grade(self, score: Score) -> Grade:
        decided = score.parts[self._decider]
        right = None if decided is None else float(decided >= self.options.threshold - CLOSE)
        parts = {f"reward/{name}": part for name, part in score.parts.items()}
        return Grade({ACCURACY: right, REWARD: score.total, **parts})

    def _result(self, grades: Sequence[Grade]) -> ItemResult:
        return ItemResult(mean_scores(grades), tuple(grades))
