"""Two models on the same problems: what the difference is, and the sentence that one may write about it.

A difference is called established where the exact McNemar test gives p < 0.05 and the paired bootstrap's 95% interval
leaves zero out; where problems have scores between 0 and 1, the interval alone decides. One comparison is meant: among
twenty comparisons of equal models, one is expected to look established.
"""

from collections.abc import Sequence
from pathlib import Path

from configs.schema import Strict
from pipeline.evaluation.report import EvaluationReport, Item, Metric, differences
from pipeline.evaluation.report_files import read_items, read_report
from pipeline.evaluation.statistics import mcnemar, paired_bootstrap

ALPHA = 0.05


class Comparison(Strict):
    """The second model against the first, problem by problem."""

    metric: str
    share: bool
    """Scores lie between 0 and 1 by nature."""
    n: int
    first: str
    """`experiment/stage at step`."""
    second: str
    first_score: float
    second_score: float
    difference: float
    """Second minus first."""
    low: float
    high: float
    """The paired bootstrap's 95% interval of the difference."""
    gained: int
    """Problems that the second scores higher on."""
    lost: int
    p_value: float | None
    """McNemar's, exact and two-sided; None where scores are not all 0 or 1."""
    established: bool

    def sentence(self) -> str:
        """What may be said of the two, with n, interval and test."""
        times, digits, unit = (100, 1, " points") if self.share else (1, 3, "")
        change, low, high = (f"{times * x:+.{digits}f}" for x in (self.difference, self.low, self.high))
        test = "" if self.p_value is None else f", McNemar p = {self.p_value:.2g}"
        return (
            f"On the same {self.n} problems, {self.second} has {self.metric} {self._score(self.second_score)} against "
            f"{self._score(self.first_score)} of {self.first}: {change}{unit} (95% interval [{low}, {high}]{test}; "
            f"{self.gained} problems gained, {self.lost} lost). {self._verdict()}"
        )

    def _verdict(self) -> str:
        if self.established:
            direction = "higher" if self.difference > 0 else "lower"
            return f"The difference is established: {self.second} scores {direction}."
        return "A difference is not shown; that is no proof that there is none."

    def _score(self, score: float) -> str:
        return f"{score:.1%}" if self.share else f"{score:.3f}"


def compare_reports(first: Path, second: Path, metric: str | None = None) -> Comparison:
    """The comparison of two report folders by a metric, the headline where absent.

    `ValueError` where they may not be compared, with every condition that differs.
    """
    return compare(read_report(first), read_items(first), read_report(second), read_items(second), metric)


def compare(
    first: EvaluationReport,
    first_items: Sequence[Item],
    second: EvaluationReport,
    second_items: Sequence[Item],
    metric: str | None = None,
) -> Comparison:
    """As `compare_reports`, of reports in memory."""
    reasons = differences(first, second)
    if reasons or first.comparability != second.comparability:
        reasons = reasons or ["their hashes were made by different versions of this program"]
        raise ValueError("these reports may not be compared:\n  " + "\n  ".join(reasons))
    name = metric or first.task.metric
    theirs = {item.id: item.scores.get(name) for item in second_items}
    pairs = [(item.scores.get(name), theirs.get(item.id)) for item in first_items]
    both = [(a, b) for a, b in pairs if a is not None and b is not None]
    if not both:
        raise ValueError(f"no problem has a value for {name!r} in both reports")
    return _compared(label(first), label(second), first.metric(name), both)


def _compared(first: str, second: str, metric: Metric, pairs: Sequence[tuple[float, float]]) -> Comparison:
    before, after = [a for a, _ in pairs], [b for _, b in pairs]
    low, high = paired_bootstrap(before, after)
    gained, lost = sum(b > a for a, b in pairs), sum(b < a for a, b in pairs)
    binary = all(value in (0, 1) for value in (*before, *after))
    p_value = mcnemar(gained, lost) if binary else None
    return Comparison(
        metric=metric.name,
        share=metric.share,
        n=len(pairs),
        first=first,
        second=second,
        first_score=sum(before) / len(before),
        second_score=sum(after) / len(after),
        difference=(sum(after) - sum(before)) / len(pairs),
        low=low,
        high=high,
        gained=gained,
        lost=lost,
        p_value=p_value,
        established=not low <= 0 <= high and (p_value is None or p_value < ALPHA),
    )


def label(report: EvaluationReport) -> str:
    """`quickstart/grpo at step 200`."""
    return f"{report.experiment}/{report.model.stage} at step {report.model.step}"


def changed_items(
    first: Sequence[Item], second: Sequence[Item], metric: str
) -> tuple[list[tuple[Item, Item]], list[tuple[Item, Item]]]:
    """The problems that the second model scores higher on, and those that it scores lower on, each as both saw it."""
    before = {item.id: item for item in first}
    gained: list[tuple[Item, Item]] = []
    lost: list[tuple[Item, Item]] = []
    for after in second:
        old, new = before[after.id].scores.get(metric) if after.id in before else None, after.scores.get(metric)
        if old is not None and new is not None and old != new:
            (gained if new > old else lost).append((before[after.id], after))
    return gained, lost
