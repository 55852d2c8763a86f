"""An evaluation from policy to report: problems, completions, verdicts, means, files."""

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from configs.schema import EvaluationConfig
from pipeline.evaluation import gsm8k, held_out, humaneval, mbpp
from pipeline.evaluation.assembly import report_of
from pipeline.evaluation.base import (
    BaseEvaluator,
    EvaluationContext,
    EvaluatorRegistry,
    ItemResult,
    Output,
    Problem,
    parse_options,
)
from pipeline.evaluation.drawing import Drawing, Generate, Progress, draw
from pipeline.evaluation.report import EvaluationReport, Timing
from pipeline.evaluation.report_files import write_report
from pipeline.evaluation.tally import Finished

BUILT_IN = (gsm8k.GSM8K, held_out.HeldOut, humaneval.HumanEval, mbpp.MBPP)

ShowProgress = Callable[[str, int], AbstractContextManager[Progress]]
"""Of an evaluation's name and its rows: what is told of the rows while they are drawn; `pipeline.progress.drawing`."""

__all__ = ["BUILT_IN", "EvaluationContext", "EvaluatorRegistry", "ShowProgress", "check_evaluation", "evaluate"]


def check_evaluation(evaluation: EvaluationConfig) -> None:
    """What settings alone can tell. `ValueError` names the benchmark, and the option that is refused."""
    parse_options(evaluation)
    if evaluation.samples > 1 and evaluation.sampling.temperature == 0:
        raise ValueError(
            f"evaluation {evaluation.key!r}: {evaluation.samples} samples at temperature 0 are all the same; "
            "set sampling.temperature (0.6 is usual), or samples: 1"
        )


def evaluate(
    policy: Any,
    evaluation: EvaluationConfig,
    *,
    context: EvaluationContext,
    directory: Path,
    generate: Generate | None = None,
    progress: ShowProgress | None = None,
) -> EvaluationReport:
    """Put the benchmark to the policy, and the report into `directory`.

    `policy` has `model`, `tokenizer` and `path`; `generate` is `mlx_ops.generation.generate` where absent. `ValueError`
    for settings or data that can't work, `RuntimeError` where the sandbox fails or no problem could be graded.
    """
    check_evaluation(evaluation)
    cls, options = parse_options(evaluation)
    evaluator = cls(options, evaluation, context)
    evaluator.prepare()
    everything = evaluator.problems()
    _check_problems(everything, evaluator)
    clock, chosen = _Clock.start(), everything[: evaluation.limit]
    drawing = _draw(policy, evaluator, chosen, generate, progress)
    clock.drawn()
    results = _grade(evaluator, chosen, drawing.outputs)
    clock.graded()
    finished = Finished(policy, evaluator, chosen, len(everything), drawing, results)
    report = report_of(finished, clock.timing(finished.tokens().completion))
    write_report(report, finished.items(), directory)
    return report


def _check_problems(problems: Sequence[Problem], evaluator: BaseEvaluator) -> None:
    if not problems:
        raise ValueError(f"{evaluator.where}: its dataset has no items")
    seen: set[str] = set()
    for problem in problems:
        if problem.id in seen:
            raise ValueError(f"{evaluator.where}: two items have the id {problem.id!r}")
        seen.add(problem.id)


def _draw(
    policy: Any,
    evaluator: BaseEvaluator,
    problems: Sequence[Problem],
    generate: Generate | None,
    progress: ShowProgress | None,
) -> Drawing:
    if generate is None:
        from mlx_ops.generation import generate as engine

        generate = engine
    config, seed, stop = evaluator.evaluation, evaluator.context.seed, evaluator.stop
    showing = nullcontext() if progress is None else progress(config.key, len(problems) * config.samples)
    with showing as told:
        return draw(policy, problems, config, seed=seed, stop=stop, generate=generate, progress=told)


def _grade(
    evaluator: BaseEvaluator, problems: Sequence[Problem], outputs: Sequence[Sequence[Output]]
) -> list[ItemResult]:
    results = evaluator.grade_all(problems, outputs)
    if len(results) != len(problems):
        raise ValueError(f"{type(evaluator).__name__} graded {len(results)} of {len(problems)} problems")
    if all(result.error is not None for result in results):
        raise RuntimeError(f"{evaluator.where}: no problem could be graded: {results[0].error}")
    return results


@dataclass
class _Clock:
    """When an evaluation began, had drawn and had graded."""

    started: str
    begin: float
    after_draw: float = 0.0
    after_grade: float = 0.0

    @classmethod
    def start(cls) -> "_Clock":
        return cls(_now(), time.perf_counter())

    def drawn(self) -> None:
        self.after_draw = time.perf_counter()

    def graded(self) -> None:
        self.after_grade = time.perf_counter()

    def timing(self, tokens: int) -> Timing:
        generation = self.after_draw - self.begin
        return Timing(
            started=self.started,
            ended=_now(),
            seconds=round(time.perf_counter() - self.begin, 3),
            generation_seconds=round(generation, 3),
            grading_seconds=round(self.after_grade - self.after_draw, 3),
            tokens_per_second=round(tokens / max(generation, 1e-9), 1),
        )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
