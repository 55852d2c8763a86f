"""GSM8K's questions and solutions, out of its own files or out of an experiment's dataset."""

from dataclasses import dataclass
from typing import Any

from pipeline.evaluation.rows import Rows
from rewards.answers import canonical_gold, gsm8k_gold
from rewards.base import Example


@dataclass(frozen=True)
class Question:
    """A word problem with its solution."""

    id: str
    text: str
    solution: str

    @property
    def gold(self) -> str:
        """The answer as it is written: `2,125`. `ValueError` where it is no number."""
        if "####" in self.solution:
            return gsm8k_gold(self.solution)
        canonical_gold(self.solution)
        return self.solution.strip()


def questions_in(rows: Rows) -> list[Question]:
    """GSM8K's rows, named `test/0`, `test/1`, …"""
    found = enumerate(rows.read(("question", "answer")))
    return [Question(f"{rows.split}/{place}", str(row["question"]), str(row["answer"])) for place, row in found]


def question_of(example: Example, solution: str | None) -> Question:
    """An example as a question; `ValueError` for one without a solution."""
    if solution is None:
        raise ValueError(f"example {example.id!r}: has no answer; set dataset.fields.answer")
    return Question(example.id, example.prompt, solution)


def worked_solution(example: Example) -> str:
    """The solution of a training example that is worked out, as the few-shot prompt shows it."""
    candidates: list[Any] = [example.target, example.answer, example.columns.get("answer")]
    for text in candidates:
        if isinstance(text, str) and "####" in text:
            return text
    raise ValueError(f"example {example.id!r}: completion_5shot shows worked solutions that end in '#### number'")
