"""What benchmarks of programs share: n samples a problem, run against hidden tests in the sandbox, unbiased pass@k."""

import platform
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import asdict
from typing import ClassVar, Literal

from pydantic import BaseModel, PositiveInt

from configs.schema import EvaluationConfig
from pipeline.evaluation.base import GRADING_FAULTS, BaseEvaluator, Grade, ItemResult, Output, Problem, mean_scores
from pipeline.evaluation.report import ExecutorInfo, ExtractionInfo, Status
from pipeline.evaluation.statistics import pass_at_k
from rewards.programs import ASSEMBLER_VERSION
from rewards.sandbox import Job, Judge, JudgeOptions, Verdict, refuse_sandbox_errors

PASSED = "passed"


class ProgramOptions(JudgeOptions):
    k: tuple[PositiveInt, ...] = (1,)
    """Which pass@k to report; the first is the headline."""
    extraction: Literal["robust", "plain"] = "robust"
    """`robust` makes a program of a completion of any shape; `plain` joins prompt and completion, as the origin."""


class ProgramEvaluator(BaseEvaluator):
    """A benchmark whose completions are programs. Write `problems`, `program` and `test`."""

    Options: ClassVar[type[BaseModel]] = ProgramOptions
    _executor: ExecutorInfo | None = None

    @abstractmethod
    def program(self, problem: Problem, output: Output) -> str:
        """The program that a completion stands for."""

    @abstractmethod
    def test(self, problem: Problem) -> tuple[str, str]:
        """The hidden test and the name that it calls."""

    @classmethod
    def check(cls, options: ProgramOptions, evaluation: EvaluationConfig) -> None:
        if max(options.k, default=0) > evaluation.samples:
            raise ValueError(
                f"options of evaluation {evaluation.key!r}: k: pass@{max(options.k)} needs at least that many samples, "
                f"got samples: {evaluation.samples}"
            )
        if not options.k:
            raise ValueError(f"options of evaluation {evaluation.key!r}: k: name at least one, such as [1]")

    def prepare(self) -> None:
        """Finds a sandbox and lets it prove itself, before anything is generated."""
        with self.options.judge() as judge:
            if not self.options.unsafe_no_sandbox:
                judge.self_test()

    def grade_all(self, problems: Sequence[Problem], outputs: Sequence[Sequence[Output]]) -> list[ItemResult]:
        jobs = [self._jobs(problem, samples) for problem, samples in zip(problems, outputs, strict=True)]
        verdicts = self._run([job for found in jobs if not isinstance(found, str) for job in found])
        return [
            ItemResult({}, (), found)
            if isinstance(found, str)
            else self._result([self._grade(verdicts[job]) for job in found])
            for found in jobs
        ]

    def grade(self, problem: Problem, outputs: Sequence[Output]) -> ItemResult:
        return self.grade_all([problem], [outputs])[0]

    def _jobs(self, problem: Problem, samples: Sequence[Output]) -> list[Job] | str:
        """What is to run, or why the problem can't be graded."""
        try:
            return [Job(self.program(problem, output), *self.test(problem)) for output in samples]
        except GRADING_FAULTS as error:
            return f"{type(error).__name__}: {error}"

    def _run(self, jobs: list[Job]) -> dict[Job, Verdict]:
        """The verdict on each job. `RuntimeError` where the sandbox failed, which is nobody's score."""
        with self.options.judge() as judge:
            self._executor = self._executor_info(judge)
            verdicts = judge.check_all(jobs)
        refuse_sandbox_errors(verdicts)
        return dict(zip(jobs, verdicts, strict=True))

    def _executor_info(self, judge: Judge) -> ExecutorInfo:
        python = ".".join(platform.python_version_tuple()[:2])
        return ExecutorInfo(backend=judge.backend, python=python, limits=asdict(judge.limits))

    def _grade(self, verdict: Verdict) -> Grade:
        passed = verdict.status == "passed"
        return Grade(
            {PASSED: float(passed)},
            status=_status(verdict),
            error=None if passed else verdict.detail,
            seconds=round(verdict.seconds, 3),
        )

    def _result(self, grades: Sequence[Grade]) -> ItemResult:
        right = sum(grade.scores[PASSED] == 1 for grade in grades)
        several = {f"pass@{k}": pass_at_k(len(grades), right, k) for k in self.options.k}
        return ItemResult(several | mean_scores(grades), tuple(grades))

    @property
    def metric(self) -> str:
        return f"pass@{self.options.k[0]}"

    @property
    def executor(self) -> ExecutorInfo | None:
        return self._executor

    @property
    def extraction(self) -> ExtractionInfo:
        rule = "rewards.programs.assemble" if self.options.extraction == "robust" else "prompt + completion"
        return ExtractionInfo(name=self.options.extraction, version=ASSEMBLER_VERSION, rules={PASSED: rule})


def _status(verdict: Verdict) -> Status:
    """A program that is no Python is `unparseable`; one that took its interpreter with it has `crashed`."""
    match verdict.kind:
        case "timeout" | "unparseable" | "crashed":
            return verdict.kind
        case "broken_test":
            return "unjudged"
    return "graded"
