"""The penalty for completions that come near the token limit."""

from collections.abc import Sequence
from typing import Any, ClassVar

from pydantic import PositiveInt, model_validator

from configs.schema import Strict
from rewards.base import BaseReward, RewardRegistry
from rewards.columns import column
from rewards.shaping import soft_overlong_penalty


class LengthOptions(Strict):
    cache: PositiveInt
    """Tokens before the limit in which the penalty grows from 0 to -1."""
    max_length: PositiveInt | None = None
    """The limit in tokens; the one that completions are sampled with where absent."""

    @model_validator(mode="after")
    def _cache_fits(self) -> "LengthOptions":
        if self.max_length is not None and self.cache > self.max_length:
            raise ValueError(f"cache: {self.cache} is more than max_length {self.max_length}")
        return self


@RewardRegistry.register("length")
class Length(BaseReward):
    """DAPO's soft overlong punishment (arXiv:2503.14476, eq. 13): 0 for short completions, -1 at the limit."""

    Options: ClassVar = LengthOptions
    options: LengthOptions

    def __call__(self, prompts: Sequence[str], completions: Sequence[str], **columns: Sequence[Any]) -> list[float]:
        lengths = column(columns, "completion_length")
        limits = [self.options.max_length or limit for limit in column(columns, "max_completion_length")]
        return [
            soft_overlong_penalty(length, max_length=limit, cache=self.options.cache)
            for length, limit in zip(lengths, limits, strict=True)
        ]
