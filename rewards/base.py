"""What a reward is: text and dataset columns in, one number a completion out.

A reward sees no token ids and no arrays. It is stateless: the same arguments give the same scores, in any order.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict

from configs.registry import Registry


@dataclass(frozen=True)
class Example:
    """One task. `prompt` is the user's text; `messages`, where given, is the whole chat instead."""

    id: str
    prompt: str
    messages: tuple[Mapping[str, str], ...] | None = None
    target: str | None = None
    """What SFT imitates; `None` where the dataset has no demonstration."""
    answer: str | None = None
    """The reference answer that a reward compares with."""
    columns: Mapping[str, Any] = field(default_factory=dict)
    """Every other column of the dataset, as JSON values."""


class NoOptions(BaseModel):
    """Options of a plugin that has none: any key is refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class BaseReward(ABC):
    """One way to score completions. Register it: `@RewardRegistry.register("name")`.

    `Options` is the pydantic model of its settings; the instance holds them as `self.options`.
    """

    Options: ClassVar[type[BaseModel]] = NoOptions
    version: ClassVar[str] = "1"
    """Change it whenever the same completion could get another score: reports are compared only where it agrees."""

    def __init__(self, options: Any = None) -> None:
        self.options = self.Options() if options is None else options

    @abstractmethod
    def __call__(
        self, prompts: Sequence[str], completions: Sequence[str], **columns: Sequence[Any]
    ) -> Sequence[float | None]:
        """One score a completion, or `None` for "not scored".

        `columns` holds each dataset column as a list beside the completions, and `id`, `answer`, `truncated` (the
        completion was cut at the token limit), `completion_length` and `max_completion_length` (tokens).
        An exception means that the reward or its data is broken, and stops the run.
        """

    def validate(self, examples: Sequence[Example]) -> None:  # noqa: B027 (a reward that needs nothing checks nothing)
        """Called once before training. `ValueError` with the example's id where a reference can't be judged against."""


RewardRegistry: Registry[BaseReward] = Registry("reward")
