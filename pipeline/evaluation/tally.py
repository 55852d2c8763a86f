"""From verdicts to numbers: means over problems, counts, and the lines of `items.jsonl`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.evaluation.base import BaseEvaluator, Grade, ItemResult, Output, Problem
from pipeline.evaluation.contamination import Contamination, contamination
from pipeline.evaluation.drawing import Drawing
from pipeline.evaluation.report import Counts, Item, Metric, Sample, TokenCounts, sha256_of
from pipeline.evaluation.statistics import estimate

ERROR_CHARACTERS = 500
TRUNCATED = "truncated"


@dataclass(frozen=True)
class Finished:
    """An evaluation whose completions are drawn and graded."""

    policy: Any
    evaluator: BaseEvaluator
    problems: list[Problem]
    available: int
    """Problems before the limit."""
    drawing: Drawing
    results: list[ItemResult]

    def metrics(self) -> tuple[Metric, ...]:
        """Means over problems, the headline first, and the share of completions that were cut."""
        values = {
            name: [v for result in self.results if (v := self._value(result, name)) is not None] for name in self._names
        }
        if not values[self.evaluator.metric]:
            raise ValueError(f"{self.evaluator.where}: no problem has a score for {self.evaluator.metric!r}")
        cut = [_cut(samples) for samples in self.drawing.outputs]
        found = [
            _metric(name, scores, share=name not in self.evaluator.not_shares)
            for name, scores in values.items()
            if scores
        ]
        return (*found, _metric(TRUNCATED, cut, share=True))

    @property
    def _names(self) -> list[str]:
        scored = (name for result in self.results for name in result.scores)
        return list(dict.fromkeys([self.evaluator.metric, *scored]))

    def _value(self, result: ItemResult, name: str) -> float | None:
        """A problem that could not be graded is wrong; a mean reward has no value that says so."""
        if result.error is None:
            return result.scores.get(name)
        return None if name in self.evaluator.not_shares else 0.0

    def counts(self) -> Counts:
        status = [grade.status for result in self.results for grade in result.grades]
        headline = self.evaluator.metric
        return Counts(
            problems=len(self.problems),
            completions=len(self.drawing.rows),
            truncated=sum(output.truncated for output in self.drawing.rows),
            unparseable=status.count("unparseable"),
            timed_out=status.count("timeout"),
            crashed=status.count("crashed"),
            unjudged=status.count("unjudged"),
            failed_problems=sum(result.error is not None for result in self.results),
            unscored=sum(self._value(result, headline) is None for result in self.results),
        )

    def tokens(self) -> TokenCounts:
        lengths = [len(output.tokens) for output in self.drawing.rows]
        return TokenCounts(
            prompt=sum(len(prompt) for prompt in self.drawing.prompts),
            completion=sum(lengths),
            mean_completion=sum(lengths) / len(lengths),
        )

    def contamination(self) -> Contamination | None:
        """None where the context has no training examples."""
        train = self.evaluator.context.train
        items = [(problem.id, problem.question) for problem in self.problems]
        return contamination((example.prompt for example in train), items) if train else None

    def items(self) -> list[Item]:
        """The lines of `items.jsonl`, in the benchmark's order."""
        return [self._item(place, problem) for place, problem in enumerate(self.problems)]

    def _item(self, place: int, problem: Problem) -> Item:
        prompt, result = self.drawing.prompts[place], self.results[place]
        outputs = self.drawing.outputs[place]
        text = self.policy.tokenizer.decode(list(prompt))
        grades = result.grades or tuple(Grade({}, error=result.error) for _ in outputs)
        return Item(
            id=problem.id,
            prompt=text,
            prompt_sha256=sha256_of(text),
            prompt_tokens=len(prompt),
            few_shot_ids=problem.few_shot_ids,
            reference=problem.reference,
            scores={name: self._value(result, name) for name in self._names} | {TRUNCATED: _cut(outputs)},
            error=_capped(result.error),
            samples=tuple(_sample(output, grade) for output, grade in zip(outputs, grades, strict=True)),
        )


def _cut(outputs: Sequence[Output]) -> float:
    return sum(output.truncated for output in outputs) / len(outputs)


def _metric(name: str, values: Sequence[float], share: bool) -> Metric:
    found = estimate(values, share=share)
    return Metric(
        name=name,
        share=share,
        score=found.score,
        stderr=found.stderr,
        low=found.low,
        high=found.high,
        interval=found.method,
        n=found.n,
    )


def _sample(output: Output, grade: Grade) -> Sample:
    return Sample(
        text=output.text,
        finish=output.finish,
        tokens=len(output.tokens),
        status=grade.status,
        extracted=dict(grade.extracted),
        scores=dict(grade.scores),
        error=_capped(grade.error),
        seconds=grade.seconds,
    )


def _capped(text: str | None) -> str | None:
    return text if text is None or len(text) <= ERROR_CHARACTERS else text[:ERROR_CHARACTERS] + " …"
