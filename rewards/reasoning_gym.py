"""The reward of reasoning-gym's own verifiers, one for each of its tasks.

The verifiers run in this process. Those that evaluate the model's answer see only what `rewards.verifier_guard` lets
pass.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from typing import Any, ClassVar, Literal

from configs.schema import Strict
from rewards.base import BaseReward, Example, RewardRegistry
from rewards.columns import column
from rewards.verifier_guard import check_entry, may_verify

Verifier = Callable[[str | None, dict[str, Any]], float]

BOARDS = ("arc_agi", "rearc")
"""Tasks whose verifier compares boards as tuples, which JSON made lists of."""
CHECKED_ENTRIES = 50
"""Entries of each task whose own answer is verified before training."""


class ReasoningGymOptions(Strict):
    answer: Literal["auto", "tag", "hash", "whole"] = "auto"
    """Where the answer stands: in the last `<answer>…</answer>`, behind the last `####`, or it is the whole completion.

    `auto` takes the first of these that is there. Thinking up to `</think>` is left out in any case.
    """
    partial: bool = True
    """Keep the verifier's marks between 0 and 1; without, only full marks count."""


@RewardRegistry.register("reasoning_gym")
class ReasoningGym(BaseReward):
    """What the verifier of the example's task gives the answer, from 0 to 1; reads the columns `task` and `entry`."""

    Options: ClassVar = ReasoningGymOptions
    options: ReasoningGymOptions

    def __call__(self, prompts: Sequence[str], completions: Sequence[str], **columns: Sequence[Any]) -> list[float]:
        ids = columns.get("id", range(len(prompts)))
        rows = zip(completions, column(columns, "task"), column(columns, "entry"), ids, strict=True)
        return [self._score(completion, Judged.of(task, entry, example)) for completion, task, entry, example in rows]

    def validate(self, examples: Sequence[Example]) -> None:
        """`ValueError` for an example without task and entry, and for a task whose verifier refuses its own answers."""
        tasks: dict[str, list[Judged]] = {}
        for example in examples:
            judged = Judged.of(example.columns.get("task"), example.columns.get("entry"), example.id)
            tasks.setdefault(judged.task, []).append(judged)
        for known in tasks.values():
            _check_references(known[:CHECKED_ENTRIES])

    def _score(self, completion: str, judged: "Judged") -> float:
        answer = stated_answer(completion, self.options.answer)
        if not answer or not may_verify(judged.task, answer):
            return 0.0
        score = judged.score(answer)
        return score if self.options.partial else float(score == 1)


class Judged:
    """An entry with the verifier of its task."""

    def __init__(self, task: str, entry: Mapping[str, Any], example: Any) -> None:
        self.task, self.example = task, example
        self._verify = _verifier(task, json.dumps(entry.get("options") or {}, sort_keys=True))
        self._entry = {**entry, "metadata": _tuples(entry["metadata"])} if task in BOARDS else dict(entry)

    @classmethod
    def of(cls, task: Any, entry: Any, example: Any) -> "Judged":
        """`ValueError` names the example whose task or entry is not what the loader `reasoning_gym` makes."""
        try:
            if (
                not isinstance(task, str)
                or not isinstance(entry, Mapping)
                or not entry.keys() >= {"answer", "metadata"}
            ):
                raise ValueError(f"expected the columns task and entry of a reasoning_gym dataset, got {task!r}")
            check_entry(task, entry)
            return cls(task, entry, example)
        except (ValueError, KeyError, TypeError, AssertionError) as error:
            raise ValueError(f"example {example!r}: {error}") from error

    @property
    def reference(self) -> str | None:
        return self._entry["answer"]

    def score(self, answer: str) -> float:
        """From 0 to 1. `ValueError` where the verifier can't read the entry's own answer either."""
        score = self._attempt(answer)
        if score is None and self._attempt(self.reference or "") is None:
            raise ValueError(f"example {self.example!r}: the verifier of {self.task!r} fails on the entry's own answer")
        return 0.0 if score is None else score

    def _attempt(self, answer: str) -> float | None:
        # A good part of the verifiers raise, each its own exception, for text that they can't parse.
        with suppress(Exception):
            return float(self._verify(answer, self._entry))
        return None


def _check_references(known: Sequence[Judged]) -> None:
    answered = [judged for judged in known if judged.reference is not None]
    scores = [judged.score(str(judged.reference)) for judged in answered]
    if answered and not any(scores):
        raise ValueError(f"example {answered[0].example!r}: the verifier of {answered[0].task!r} refuses every answer")


@lru_cache(maxsize=256)
def _verifier(task: str, options: str) -> Verifier:
    import reasoning_gym

    return reasoning_gym.create_dataset(task, **json.loads(options)).score_answer


def _tuples(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _tuples(item) for name, item in value.items()}
    return tuple(_tuples(item) for item in value) if isinstance(value, list | tuple) else value


def stated_answer(completion: str, where: Literal["auto", "tag", "hash", "whole"]) -> str | None:
    """The answer that a completion states in the given place, stripped; `None` where there is none."""
    text = completion.rpartition("</think>")[2]
    if "<think>" in text:
        return None
    if where == "whole":
        return text.strip()
    found = {"tag": _tagged(text), "hash": _after_hash(text)}
    if where == "auto":
        return next((answer for answer in found.values() if answer is not None), text.strip())
    return found[where]


def _tagged(text: str) -> str | None:
    _, opening, rest = text.rpartition("<answer>")
    answer, closing, _ = rest.partition("</answer>")
    return answer.strip() if opening and closing else None


def _after_hash(text: str) -> str | None:
    _, marker, rest = text.rpartition("####")
    return rest.strip().partition("\n")[0].strip() if marker else None
