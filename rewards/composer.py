"""Several rewards as one number a completion, with the parts kept."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from numbers import Real
from typing import Any, cast

from pydantic import ValidationError

from configs.loader import describe
from configs.registry import PluginFault
from configs.schema import RewardConfig
from rewards.base import BaseReward, Example, RewardRegistry

LIMIT = 10.0
"""Scores outside [-LIMIT, LIMIT] are refused: they come from a bug more often than from a meaning."""


@dataclass(frozen=True)
class Score:
    """What one completion earned."""

    total: float | None
    """The weighted sum of the parts; `None` where no weighted part was scored."""
    parts: Mapping[str, float | None]
    """Each reward's own number, unweighted; weight 0 makes it a metric."""


class RewardComposer:
    """Calls every reward on a batch and adds the weighted scores up."""

    def __init__(self, rewards: Mapping[str, tuple[BaseReward, float]]) -> None:
        self._rewards = dict(rewards)

    @classmethod
    def from_config(cls, configs: Sequence[RewardConfig]) -> "RewardComposer":
        """`KeyError` for a name that is not registered, `ValueError` for options that its model refuses."""
        return cls({config.name: (build_reward(config), config.weight) for config in configs})

    @property
    def weights(self) -> dict[str, float]:
        return {name: weight for name, (_, weight) in self._rewards.items()}

    def validate(self, examples: Sequence[Example]) -> None:
        """Let every reward look at the references it will judge against; `ValueError` names reward and example."""
        for name, (reward, _) in self._rewards.items():
            with PluginFault(ValueError, f"reward {name!r} refuses the dataset"):
                reward.validate(examples)

    def __call__(
        self, prompts: Sequence[str], completions: Sequence[str], columns: Mapping[str, Sequence[Any]]
    ) -> list[Score]:
        """One `Score` a completion. `ValueError` names the reward and the example that it could not score."""
        batch = _Batch(prompts, completions, columns)
        parts = {name: batch.judged(name, reward) for name, (reward, _) in self._rewards.items()}
        return [self._score({name: parts[name][row] for name in parts}) for row in range(len(completions))]

    def _score(self, parts: Mapping[str, float | None]) -> Score:
        weighted = [
            self._rewards[name][1] * part for name, part in parts.items() if part is not None and self._rewards[name][1]
        ]
        return Score(sum(weighted) if weighted else None, parts)


def build_reward(config: RewardConfig) -> BaseReward:
    """The registered reward with its options validated by its own model."""
    cls = RewardRegistry[config.name]
    try:
        return cls(cls.Options.model_validate(config.options))
    except ValidationError as error:
        raise ValueError(describe(error, f"options of reward {config.name!r}", config.options)) from error


@dataclass(frozen=True)
class _Batch:
    prompts: Sequence[str]
    completions: Sequence[str]
    columns: Mapping[str, Sequence[Any]]

    def __post_init__(self) -> None:
        lengths = {name: len(column) for name, column in self.columns.items()} | {"prompts": len(self.prompts)}
        wrong = {name: length for name, length in lengths.items() if length != len(self.completions)}
        if wrong:
            raise ValueError(f"{len(self.completions)} completions, but {wrong}; expected one of each a completion")

    @property
    def ids(self) -> Sequence[Any]:
        return self.columns.get("id", range(len(self.completions)))

    def judged(self, name: str, reward: BaseReward) -> list[float | None]:
        with PluginFault(ValueError, lambda: f"reward {name!r} failed{self._culprit(reward)}"):
            scores = reward(self.prompts, self.completions, **self.columns)
        return _checked(name, scores, self.ids)

    def _culprit(self, reward: BaseReward) -> str:
        """The first example that fails by itself: a reward is stateless, so it may be asked again."""
        for row, example in enumerate(self.ids):
            alone = {name: [column[row]] for name, column in self.columns.items()}
            with suppress(Exception):
                reward([self.prompts[row]], [self.completions[row]], **alone)
                continue
            return f" on example {example!r}"
        return ""


def _checked(name: str, scores: Any, ids: Sequence[Any]) -> list[float | None]:
    if not isinstance(scores, Iterable) or isinstance(scores, str | Mapping):
        raise ValueError(f"reward {name!r} returned {type(scores).__name__}; expected a list of one score a completion")
    scores = list(scores)
    if len(scores) != len(ids):
        raise ValueError(f"reward {name!r} returned {len(scores)} scores for {len(ids)} completions")
    for score, example in zip(scores, ids, strict=True):
        if score is not None and not _is_score(score):
            raise ValueError(
                f"reward {name!r} gave example {example!r} {score!r}; expected a number in [-{LIMIT:g}, {LIMIT:g}]"
            )
    # + 0.0: no negative zero in reports.
    return [None if score is None else float(score) + 0.0 for score in scores]


def _is_score(score: Any) -> bool:
    # Compared, not converted: nan is refused, and an int too large for a float does no harm.
    return isinstance(score, Real) and -LIMIT <= cast(Any, score) <= LIMIT
