"""What an evaluator is: problems out of data, and verdicts on completions. Drawing and counting are `run.py`'s."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from pydantic import BaseModel, ValidationError

from configs.loader import describe
from configs.registry import Registry
from configs.schema import EvaluationConfig, PromptConfig, RewardConfig
from pipeline.evaluation.report import DatasetInfo, ExecutorInfo, ExtractionInfo, Finish, Status
from pipeline.provenance import Provenance
from rewards.base import Example, NoOptions

GRADING_FAULTS = (ValueError, ArithmeticError, LookupError, TypeError, RecursionError)
"""What a grader may trip over in one problem. Such a problem counts as wrong, and its error is kept."""


NO_DATASET = DatasetInfo(name="none", split="test")


@dataclass(frozen=True)
class EvaluationContext:
    """What surrounds an evaluation: whose model it is, its data, and what the report says about both."""

    experiment: str
    stage: str
    seed: int
    prompt: PromptConfig
    """How the experiment's examples become text."""
    checkpoint: str
    """The checkpoint's folder as reports name it."""
    checkpoint_sha256: str
    step: int = 0
    run_id: str | None = None
    adapter_sha256: str | None = None
    dataset: DatasetInfo = NO_DATASET
    """Of the experiment; its `split` is what `test` was taken from."""
    test: Sequence[Example] = ()
    train: Sequence[Example] = ()
    """For few-shot examples, and for the contamination check."""
    rewards: tuple[RewardConfig, ...] = ()
    provenance: Provenance | None = None


@dataclass(frozen=True)
class Problem:
    """One item, and how it becomes tokens: its example rendered by `prompt`, then `prefix`, the answer's beginning."""

    example: Example
    prompt: PromptConfig
    reference: str | None = None
    prefix: str = ""
    few_shot_ids: tuple[str, ...] = ()
    data: Mapping[str, Any] = field(default_factory=dict)
    """What the grader needs besides, such as tests."""

    @property
    def id(self) -> str:
        return self.example.id

    @property
    def question(self) -> str:
        """What is asked, without what the protocol puts around it: `data["question"]`, else the example's prompt."""
        return self.data.get("question", self.example.prompt)


@dataclass(frozen=True)
class Output:
    """One completion as a grader sees it."""

    text: str
    """Without the end token, cut before the first stop string."""
    finish: Finish
    tokens: tuple[int, ...]

    @property
    def truncated(self) -> bool:
        return self.finish == "length"


@dataclass(frozen=True)
class Grade:
    """The verdict on one completion."""

    scores: Mapping[str, float | None]
    """By metric; `None` was not scored."""
    extracted: Mapping[str, str | None] = field(default_factory=dict)
    status: Status = "graded"
    error: str | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class ItemResult:
    """The verdict on one problem."""

    scores: Mapping[str, float | None]
    """By metric; the report's scores are the means of these over problems."""
    grades: tuple[Grade, ...]
    """One a completion; empty for a problem that could not be graded."""
    error: str | None = None


class BaseEvaluator(ABC):
    """One benchmark. Register it with `@EvaluatorRegistry.register("name")`; write `problems` and `grade`.

    `Options` is the pydantic model of its settings; the instance holds them as `self.options`.
    """

    Options: ClassVar[type[BaseModel]] = NoOptions
    version: ClassVar[str] = "1"
    """Change it whenever the same completion could get another score."""

    def __init__(self, options: Any, evaluation: EvaluationConfig, context: EvaluationContext) -> None:
        self.options = options
        self.evaluation = evaluation
        self.context = context

    @abstractmethod
    def problems(self) -> list[Problem]:
        """All items, in the benchmark's order; the runner takes the first `limit`."""

    @abstractmethod
    def grade(self, problem: Problem, outputs: Sequence[Output]) -> ItemResult:
        """The verdict on the samples of one problem. One of `GRADING_FAULTS` makes it a failed problem."""

    @property
    def where(self) -> str:
        """How errors begin."""
        return f"evaluation {self.evaluation.key!r}"

    @property
    @abstractmethod
    def metric(self) -> str:
        """The headline metric: a name among the scores."""

    @property
    def not_shares(self) -> frozenset[str]:
        """Metrics that may leave 0 to 1, such as a mean reward."""
        return frozenset()

    @property
    def protocol(self) -> str:
        """The name of the way of asking."""
        return "default"

    @property
    def stop(self) -> tuple[str, ...]:
        """Texts that end a completion."""
        return ()

    @property
    def notes(self) -> tuple[str, ...]:
        """Where this run differs from the protocol's origin."""
        return ()

    @property
    def few_shot_seed(self) -> int | None:
        return None

    @property
    def extraction(self) -> ExtractionInfo | None:
        """How answers are found, as far as it decides scores."""
        return None

    @property
    def executor(self) -> ExecutorInfo | None:
        """What ran the programs; asked after grading."""
        return None

    def dataset(self) -> DatasetInfo:
        """Where the items come from; the experiment's dataset unless overridden."""
        return self.context.dataset

    @classmethod  # noqa: B027 (most need nothing)
    def check(cls, options: Any, evaluation: EvaluationConfig) -> None:
        """What settings alone can tell: `ValueError` for what can't work, long before any model is loaded."""

    def prepare(self) -> None:  # noqa: B027 (most need nothing)
        """Called before anything is generated: raise here what would otherwise fail after an hour of generating."""

    def grade_all(self, problems: Sequence[Problem], outputs: Sequence[Sequence[Output]]) -> list[ItemResult]:
        """The verdicts on all problems; override it where grading is better done at once."""
        return [self.grade_safely(problem, samples) for problem, samples in zip(problems, outputs, strict=True)]

    def grade_safely(self, problem: Problem, outputs: Sequence[Output]) -> ItemResult:
        """`grade`, with a problem that can't be graded recorded as failed."""
        try:
            return self.grade(problem, outputs)
        except GRADING_FAULTS as error:
            return ItemResult({}, (), f"{type(error).__name__}: {error}")


EvaluatorRegistry: Registry[BaseEvaluator] = Registry("evaluator")


def mean_scores(grades: Sequence[Grade]) -> dict[str, float | None]:
    """Each metric's mean over a problem's samples; those not scored are left out, and None is none scored."""
    names = dict.fromkeys(name for grade in grades for name in grade.scores)
    values = {name: [v for grade in grades if (v := grade.scores.get(name)) is not None] for name in names}
    return {name: sum(scored) / len(scored) if scored else None for name, scored in values.items()}


def parse_options(evaluation: EvaluationConfig) -> tuple[type[BaseEvaluator], Any]:
    """The evaluator's class and its validated options. `ValueError` names the benchmark and the field."""
    if evaluation.benchmark not in EvaluatorRegistry:
        raise ValueError(f"unknown benchmark {evaluation.benchmark!r}; registered: {EvaluatorRegistry.names()}")
    cls = EvaluatorRegistry[evaluation.benchmark]
    try:
        options = cls.Options.model_validate(evaluation.options)
    except ValidationError as error:
        raise ValueError(describe(error, f"options of evaluation {evaluation.key!r}")) from error
    cls.check(options, evaluation)
    return cls, options


def existing_file(path: str, field_name: str) -> Path:
    """The file behind an option. `ValueError` names the option and the place that was looked at."""
    file = Path(path).expanduser()
    if not file.is_file():
        raise ValueError(f"{field_name}: no such file: {file.absolute()}")
    return file
