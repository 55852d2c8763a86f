"""The penalty for completions that say the same again."""

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar

from pydantic import Field, PositiveInt

from configs.schema import Strict
from rewards.base import BaseReward, RewardRegistry
from rewards.shaping import repetition_penalty


class RepetitionOptions(Strict):
    ngram: PositiveInt = 3
    """Words in a row that count as a repetition where they occurred before."""
    max_penalty: Annotated[float, Field(lt=0)] = -1.0
    """The score of endless repetition."""


@RewardRegistry.register("repetition")
class Repetition(BaseReward):
    """`max_penalty` times the share of the completion's n-grams of words that occurred before; case is ignored."""

    Options: ClassVar = RepetitionOptions
    options: RepetitionOptions

    def __call__(self, prompts: Sequence[str], completions: Sequence[str], **columns: Sequence[Any]) -> list[float]:
        return [
            repetition_penalty(text.casefold().split(), ngram=self.options.ngram, max_penalty=self.options.max_penalty)
            for text in completions
        ]
