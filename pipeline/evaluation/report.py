"""What an evaluation says: a number, what it takes to make it again, and what must agree before it may be compared."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Literal

from configs.schema import Strict
from pipeline.evaluation.contamination import Contamination
from pipeline.evaluation.statistics import IntervalMethod
from pipeline.provenance import Provenance

SCHEMA_VERSION = 1

Finish = Literal["end", "stop", "length"]
"""A completion ended by itself, at a stop string of the protocol, or was cut at the token limit."""
Status = Literal["graded", "unparseable", "timeout", "crashed", "unjudged"]
"""`unparseable`: has no answer or program. `timeout`, `crashed`: its program's end. `unjudged`: its test is broken."""


class Metric(Strict):
    name: str
    share: bool
    """Between 0 and 1 by nature."""
    score: float
    """Mean over problems."""
    stderr: float | None
    low: float
    high: float
    """The 95% interval."""
    interval: IntervalMethod
    n: int
    """Problems in the denominator."""


class TaskInfo(Strict):
    name: str
    version: str
    """Changes whenever the same completion could get another score."""
    protocol: str
    metric: str
    """The headline: what the leaderboard ranks by."""
    notes: tuple[str, ...] = ()
    """Where the run differs from the protocol's origin."""


class DatasetInfo(Strict):
    name: str
    revision: str | None = None
    sha256: str | None = None
    split: str
    available: int = 0
    """Items before the limit."""
    items: int = 0
    limit: int | None = None
    item_ids: tuple[str, ...] | None = None
    """Which items, where a limit left some out."""


class ModelInfo(Strict):
    path: str
    """The checkpoint's folder."""
    sha256: str
    adapter_sha256: str | None = None
    stage: str
    step: int
    run_id: str | None = None
    """The run that trained it."""
    dtype: str | None = None
    quantization: dict[str, Any] | None = None


class PromptInfo(Strict):
    chat: bool
    """The tokenizer's chat template was applied."""
    chat_template_sha256: str | None
    chat_template_args: dict[str, str | bool | int]
    tokenizer_sha256: str | None
    system: str | None
    template: str
    multi_turn: bool
    """Earlier turns stand before the last message."""
    few_shot: int
    few_shot_ids: tuple[str, ...] | None
    """The same for each item; None where each item has its own, which then stand in `items.jsonl`."""
    few_shot_seed: int | None


class GenerationInfo(Strict):
    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    seed: int
    samples: int
    stop: tuple[str, ...]
    batch_size: int


class ExtractionInfo(Strict):
    name: str
    version: str
    rules: dict[str, str]
    """Metric to what finds its answer: a regular expression, or the name of a rule."""


class ExecutorInfo(Strict):
    """What ran the programs."""

    backend: str
    python: str
    limits: dict[str, float | int | str | None]


class Counts(Strict):
    problems: int
    completions: int
    truncated: int
    """Completions cut at the token limit."""
    unparseable: int
    timed_out: int
    crashed: int
    unjudged: int
    """Completions whose test can't be judged, whatever they say; they count as wrong."""
    sandbox_error: int = 0
    """Always 0: the sandbox failing stops the evaluation, and is no score."""
    failed_problems: int
    """Problems that could not be graded; they count as wrong."""
    unscored: int
    """Problems without a value for the headline metric; they are in no denominator."""


class TokenCounts(Strict):
    prompt: int
    completion: int
    mean_completion: float


class Timing(Strict):
    """The only part that differs between two runs of one seed."""

    started: str
    """UTC, ISO 8601."""
    ended: str
    seconds: float
    generation_seconds: float
    grading_seconds: float
    tokens_per_second: float


class EvaluationReport(Strict):
    schema_version: Literal[1] = SCHEMA_VERSION
    experiment: str
    name: str
    """The evaluation's name in its experiment."""
    task: TaskInfo
    dataset: DatasetInfo
    model: ModelInfo
    prompt: PromptInfo
    generation: GenerationInfo
    extraction: ExtractionInfo | None
    executor: ExecutorInfo | None
    metrics: tuple[Metric, ...]
    counts: Counts
    tokens: TokenCounts
    contamination: Contamination | None
    task_sha256: str
    """Over id, prompt and reference of every item."""
    comparability: str
    warnings: tuple[str, ...]
    provenance: Provenance | None
    timing: Timing

    @property
    def headline(self) -> Metric:
        return self.metric(self.task.metric)

    def metric(self, name: str) -> Metric:
        """`KeyError` lists the metrics there are."""
        for metric in self.metrics:
            if metric.name == name:
                return metric
        raise KeyError(f"{self.experiment} {self.name}: no metric {name!r}; there are {[m.name for m in self.metrics]}")


class Sample(Strict):
    """One completion, judged."""

    text: str
    """As it was drawn, cut at the first stop string."""
    finish: Finish
    tokens: int
    status: Status
    extracted: dict[str, str | None]
    """Metric to the answer found."""
    scores: dict[str, float | None]
    error: str | None
    seconds: float | None
    """What grading took, where programs ran."""


class Item(Strict):
    """A line of `items.jsonl`."""

    id: str
    prompt: str
    """Exactly what the model saw, special tokens included."""
    prompt_sha256: str
    prompt_tokens: int
    few_shot_ids: tuple[str, ...]
    reference: str | None
    scores: dict[str, float | None]
    error: str | None
    """Why the problem could not be graded."""
    samples: tuple[Sample, ...]

    @property
    def text(self) -> str:
        """What is shown of it: its first completion, or why there is none."""
        return self.samples[0].text if self.samples else self.error or ""


# ---- what may be compared ------------------------------------------------------------------------------------------


def conditions(report: EvaluationReport) -> dict[str, Any]:
    """All that must agree before two scores may be compared, by field.

    Not among it: the model and where it ran, the seed, the batch size, the sandbox's backend.
    """
    return {
        "task": report.task.model_dump(mode="json", exclude={"notes"}),
        "items": {"sha256": report.task_sha256, "n": report.dataset.items},
        "prompt": report.prompt.model_dump(mode="json", exclude={"tokenizer_sha256"}),
        "generation": report.generation.model_dump(mode="json", exclude={"seed", "batch_size"}),
        "extraction": None if report.extraction is None else report.extraction.model_dump(mode="json"),
        "executor": None if report.executor is None else report.executor.model_dump(mode="json", exclude={"backend"}),
    }


def comparability(report: EvaluationReport) -> str:
    """A hash of `conditions`: 16 hexadecimal digits of sha256."""
    return sha256_of(conditions(report))[:16]


def differences(first: EvaluationReport, second: EvaluationReport) -> list[str]:
    """What keeps two reports from being compared: `generation.max_tokens: 256 against 512`."""
    return _differences(conditions(first), conditions(second), "")


def _differences(first: Any, second: Any, path: str) -> list[str]:
    if first == second:
        return []
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        dot = path + "." if path else ""
        keys = sorted(first.keys() | second.keys())
        return [line for key in keys for line in _differences(first.get(key), second.get(key), dot + key)]
    return [f"{path}: {first!r} against {second!r}"]


def sha256_of(value: Any) -> str:
    """Of a text, or of a JSON value whatever the order of its keys."""
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
