"""Two models on the same problems: what the difference is, and the sentence that one may write about it.

A difference is called established where the exact McNemar test gives p < 0.05 and the paired bootstrap's 95% interval leaves
zero out; where problems have scores between 0 and 1, the interval alone decides. One comparison is meant: among twenty
comparisons of equal models, one is expected to look established.
"""

from collections.abc import Sequence
from pathlib import Path

from configs.schema import Strict
from pipeline.evaluation.report import EvaluationReport, Item, differences
from pipeline.evaluation.report_files import read_items, read_report
from pipeline.evaluation.statistics import mcnemar, paired_bootstrap

ALPHA = 0.05


class Comparison(Strict):
    """The second model against the first, problem by problem."""

    metric: str
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
        share = self._is_share
        change = f"{100 * self.difference:+.1f} points" if share else f"{self.difference:+.3f}"
        interval = (
            f"[{100 * self.low:+.1f}, {100 * self.high:+.1f}]" if share else f"[{self.low:+.3f}, {self.high:+.3f}]"
        )
        test = "" if self.p_value is None else f", McNemar p = {self.p_value:.2g}"
        return (
            f"On the same {self.n} problems, {self.second} has {self.metric} {self._score(self.second_score)} against "
            f"{self._score(self.first_score)} of {self.first}: {change} (95% interval {interval}{test}; {self.gained} "
            f"problems gained, {self.lost} lost). {self._verdict()}"
        )

    def _verdict(self) -> str:
        if self.established:
            return f"{self.second} is {'better' if self.difference > 0 else 'worse'}."
        return "A difference is not shown; that is no proof that there is none."

    @property
    def _is_share(self) -> bool:
        return all(0 <= score <= 1 for score in (self.first_score, self.second_score))

    def _score(self, score: float) -> str:
        return f"{score:.1%}" if self._is_share else f"{score:.3f}"


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
    if first.comparability != second.comparability:
        reasons = differences(first, second) or ["the reports' hashes were made by different versions"]
        raise ValueError("these reports may not be compared:\n  " + "\n  ".join(reasons))
    name = metric or first.task.metric
    first.metric(name)
    theirs = {item.id: item.scores.get(name) for item in second_items}
    pairs = [(item.scores.get(name), theirs.get(item.id)) for item in first_items]
    both = [(a, b) for a, b in pairs if a is not None and b is not None]
    if not both:
        raise ValueError(f"no problem has a value for {name!r} in both reports")
    return _compared(first, second, name, both)


def _compared(
    first: EvaluationReport, second: EvaluationReport, name: str, pairs: Sequence[tuple[float, float]]
) -> Comparison:
    before, after = [a for a, _ in pairs], [b for _, b in pairs]
    low, high = paired_bootstrap(before, after)
    gained, lost = sum(b > a for a, b in pairs), sum(b < a for a, b in pairs)
    binary = all(value in (0, 1) for value in (*before, *after))
    p_value = mcnemar(gained, lost) if binary else None
    return Comparison(
        metric=name,
        n=len(pairs),
        first=label(first),
        second=label(second),
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
