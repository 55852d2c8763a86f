"""The reward for a completion that is built as asked: `<think>…</think><answer>…</answer>` and nothing around it."""

import re
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar

from pydantic import Field, model_validator

from configs.schema import Strict
from rewards.base import BaseReward, RewardRegistry

TagName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_-]*$")]


class FormatOptions(Strict):
    tags: Annotated[tuple[TagName, ...], Field(min_length=1)] = ("think", "answer")
    """The blocks that make up the whole completion, in order, each exactly once and not empty."""
    opened: bool = False
    """The prompt already ends with the first opening tag, so the completion starts inside it."""
    correct: float = 1.0
    incorrect: float = 0.0

    @model_validator(mode="after")
    def _distinct(self) -> "FormatOptions":
        if len(set(self.tags)) != len(self.tags):
            raise ValueError(f"tags: a name twice in {[*self.tags]}")
        return self


@RewardRegistry.register("format")
class Format(BaseReward):
    """`correct` where the completion is the tagged blocks and nothing else, else `incorrect`; so is a truncated one."""

    Options: ClassVar = FormatOptions
    options: FormatOptions

    def __call__(self, prompts: Sequence[str], completions: Sequence[str], **columns: Sequence[Any]) -> list[float]:
        truncated = columns.get("truncated", [False] * len(completions))
        return [
            self.options.correct if not cut and self.fits(completion) else self.options.incorrect
            for completion, cut in zip(completions, truncated, strict=True)
        ]

    def fits(self, completion: str) -> bool:
        """Whether the text is exactly the blocks, with only white space around them."""
        tags = self.options.tags
        text = f"<{tags[0]}>{completion}" if self.options.opened else completion
        pieces = re.split(f"(</?(?:{'|'.join(map(re.escape, tags))})>)", text)
        found, between = pieces[1::2], pieces[0::2]
        expected = [tag for name in tags for tag in (f"<{name}>", f"</{name}>")]
        blank = [not piece.strip() for piece in between]
        return found == expected and all(blank[0::2]) and not any(blank[1::2])
