"""The reward for a completion that matches a pattern."""

import re
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from pydantic import field_validator

from configs.schema import Strict
from rewards.base import BaseReward, RewardRegistry


class RegexOptions(Strict):
    pattern: str
    """A regular expression of Python's `re`; `.` stops at a line's end unless it begins with `(?s)`.

    Nested repetitions such as `(a+)+b` take exponential time on some texts: the model writes the text.
    """
    where: Literal["anywhere", "start", "whole"] = "anywhere"
    """The part of the completion that must match."""
    matched: float = 1.0
    unmatched: float = 0.0

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        try:
            re.compile(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"not a regular expression: {error}") from error
        return pattern


@RewardRegistry.register("regex")
class Regex(BaseReward):
    """`matched` where the completion matches `pattern`, else `unmatched`."""

    Options: ClassVar = RegexOptions
    options: RegexOptions

    def __call__(self, prompts: Sequence[str], completions: Sequence[str], **columns: Sequence[Any]) -> list[float]:
        pattern = re.compile(self.options.pattern)
        match = {"anywhere": pattern.search, "start": pattern.match, "whole": pattern.fullmatch}[self.options.where]
        return [self.options.matched if match(text) else self.options.unmatched for text in completions]
