"""The reward for a right number, judged by the grader that the GSM8K benchmark uses."""

from collections.abc import Sequence
from typing import Any, ClassVar

from pydantic import model_validator

from configs.schema import Strict
from rewards.answers import EXTRACTOR_VERSION, RULES, Mode, canonical_gold, is_correct
from rewards.base import BaseReward, Example, RewardRegistry
from rewards.columns import column, gold


class NumericAnswerOptions(Strict):
    mode: Mode = "robust"
    """`robust` reads any clear statement of one number; the others are lm-eval's two filters for GSM8K."""
    rules: tuple[str, ...] | None = None
    """With `robust`, pay only for answers that stand there: `hash` for `#### 72`, … (all of them where absent)."""
    correct: float = 1.0
    incorrect: float = 0.0

    @model_validator(mode="after")
    def _known_rules(self) -> "NumericAnswerOptions":
        if self.rules is None:
            return self
        if self.mode != "robust":
            raise ValueError(f"rules: have no effect with mode: {self.mode}; leave them out")
        if not self.rules or set(self.rules) - set(RULES):
            raise ValueError(f"rules: expected some of {[*RULES]}, got {[*self.rules]}")
        return self


@RewardRegistry.register("numeric_answer")
class NumericAnswer(BaseReward):
    """`correct` where the completion's final answer is the number in the example's answer, else `incorrect`.

    The answer may be a GSM8K solution that ends in `#### 72`.
    """

    Options: ClassVar = NumericAnswerOptions
    version: ClassVar[str] = EXTRACTOR_VERSION
    options: NumericAnswerOptions

    def __call__(self, prompts: Sequence[str], completions: Sequence[str], **columns: Sequence[Any]) -> list[float]:
        ids = columns.get("id", range(len(prompts)))
        cut = columns.get("truncated", [False] * len(prompts))
        rows = zip(prompts, completions, column(columns, "answer"), ids, cut, strict=True)
        return [self._score(text, gold(example, answer), prompt, cut) for prompt, text, answer, example, cut in rows]

    def validate(self, examples: Sequence[Example]) -> None:
        """`ValueError` for an answer that is not exactly one number."""
        for example in examples:
            number = gold(example.id, example.answer)
            try:
                canonical_gold(number)
            except ValueError as error:
                raise ValueError(f"example {example.id!r}: {error}") from error

    def _score(self, completion: str, number: str, question: str, truncated: bool) -> float:
        mode, rules = self.options.mode, self.options.rules
        right = is_correct(completion, number, mode, question=question, rules=rules, truncated=truncated)
        return self.options.correct if right else self.options.incorrect
