"""An evaluation from policy to report: problems, completions, verdicts, means, files."""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from configs.schema import EvaluationConfig
from pipeline.evaluation import gsm8k, held_out, humaneval, mbpp
from pipeline.evaluation.base import (
    BaseEvaluator,
    EvaluationContext,
    EvaluatorRegistry,
    Grade,
    ItemResult,
    Output,
    Problem,
    parse_options,
)
from pipeline.evaluation.contamination import Contamination, contamination
from pipeline.evaluation.drawing import Drawing, Generate, HasModel, Progress, draw
from pipeline.evaluation.report import (
    Counts,
    DatasetInfo,
    EvaluationReport,
    GenerationInfo,
    Item,
    Metric,
    ModelInfo,
    PromptInfo,
    Sample,
    TaskInfo,
    Timing,
    TokenCounts,
    comparability,
    sha256_of,
)
from pipeline.evaluation.report_files import write_report
from pipeline.evaluation.statistics import estimate

BUILT_IN = (gsm8k.GSM8K, held_out.HeldOut, humaneval.HumanEval, mbpp.MBPP)
ERROR_CHARACTERS = 500
MANY_TRUNCATED = 0.05
MANY_UNPARSEABLE = 0.10

__all__ = ["BUILT_IN", "EvaluationContext", "EvaluatorRegistry", "check_evaluation", "evaluate"]


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
    progress: Progress | None = None,
) -> EvaluationReport:
    """Put the benchmark to the policy, and the report into `directory`.

    `generate` is `mlx_ops.generation.generate` where absent. `ValueError` for settings or data that can't work,
    `RuntimeError` where the sandbox fails or no problem could be graded.
    """
    check_evaluation(evaluation)
    cls, options = parse_options(evaluation)
    evaluator = cls(options, evaluation, context)
    evaluator.prepare()
    everything = _distinct(evaluator.problems(), evaluation.key)
    clock = _Clock.start()
    chosen = everything[: evaluation.limit]
    drawing = _draw(policy, evaluator, chosen, generate, progress)
    clock.drawn()
    results = _grade(evaluator, chosen, drawing.outputs)
    clock.graded()
    run = _Run(policy, evaluator, chosen, len(everything), drawing, results)
    report = run.report(clock)
    write_report(report, run.items(), directory)
    return report


def _distinct(problems: list[Problem], key: str) -> list[Problem]:
    if not problems:
        raise ValueError(f"evaluation {key!r}: its dataset has no items")
    ids = [problem.id for problem in problems]
    if len(set(ids)) < len(ids):
        twice = next(item for place, item in enumerate(ids) if item in ids[:place])
        raise ValueError(f"evaluation {key!r}: two items have the id {twice!r}")
    return problems


def _draw(
    policy: HasModel,
    evaluator: BaseEvaluator,
    problems: Sequence[Problem],
    generate: Generate | None,
    progress: Progress | None,
) -> Drawing:
    if generate is None:
        from mlx_ops.generation import generate as engine

        generate = engine
    seed, stop = evaluator.context.seed, evaluator.stop
    return draw(policy, problems, evaluator.evaluation, seed=seed, stop=stop, generate=generate, progress=progress)


def _grade(
    evaluator: BaseEvaluator, problems: Sequence[Problem], outputs: Sequence[Sequence[Output]]
) -> list[ItemResult]:
    results = evaluator.grade_all(problems, outputs)
    if len(results) != len(problems):
        raise ValueError(f"{type(evaluator).__name__} graded {len(results)} of {len(problems)} problems")
    if all(result.error for result in results):
        raise RuntimeError(f"evaluation {evaluator.evaluation.key!r}: no problem could be graded: {results[0].error}")
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


@dataclass(frozen=True)
class _Run:
    """A finished evaluation, about to become a report."""

    policy: Any
    evaluator: BaseEvaluator
    problems: list[Problem]
    available: int
    drawing: Drawing
    results: list[ItemResult]

    def report(self, clock: _Clock) -> EvaluationReport:
        evaluator, context, config = self.evaluator, self.evaluator.context, self.evaluator.evaluation
        metrics, counts, overlap = self._metrics(), self._counts(), self._contamination()
        unhashed = EvaluationReport(
            experiment=context.experiment,
            name=config.key,
            task=self._task(),
            dataset=self._dataset(),
            model=_model_info(self.policy.path, context),
            prompt=_prompt_info(self.problems, self.policy, evaluator.few_shot_seed),
            generation=GenerationInfo(
                **config.sampling.model_dump(),
                seed=context.seed,
                samples=config.samples,
                stop=evaluator.stop,
                batch_size=config.batch_size,
            ),
            extraction=evaluator.extraction,
            executor=evaluator.executor,
            metrics=metrics,
            counts=counts,
            tokens=self._tokens(),
            contamination=overlap,
            task_sha256=task_sha256(self.problems),
            comparability="",
            warnings=tuple(self._warnings(metrics, counts, overlap)),
            provenance=context.provenance,
            timing=clock.timing(sum(len(output.tokens) for output in self.drawing.rows)),
        )
        return unhashed.model_copy(update={"comparability": comparability(unhashed)})

    def items(self) -> list[Item]:
        """The lines of `items.jsonl`, in the benchmark's order."""
        rows = zip(self.problems, self.drawing.prompts, self.drawing.outputs, self.results, strict=True)
        return [_item(*row, self._scores(row[-1]), self.policy.tokenizer) for row in rows]

    def _scores(self, result: ItemResult) -> dict[str, float | None]:
        return {name: self._value(result, name) for name in self._names()}

    def _names(self) -> list[str]:
        """The headline first, then the other metrics in the order of the scores."""
        return list(
            dict.fromkeys([self.evaluator.metric, *(name for result in self.results for name in result.scores)])
        )

    def _task(self) -> TaskInfo:
        evaluator = self.evaluator
        return TaskInfo(
            name=evaluator.evaluation.benchmark,
            version=evaluator.version,
            protocol=evaluator.protocol,
            metric=evaluator.metric,
            notes=evaluator.notes,
        )

    def _dataset(self) -> DatasetInfo:
        limited = len(self.problems) < self.available
        update = {
            "available": self.available,
            "items": len(self.problems),
            "limit": self.evaluator.evaluation.limit,
            "item_ids": tuple(problem.id for problem in self.problems) if limited else None,
        }
        return self.evaluator.dataset().model_copy(update=update)

    def _metrics(self) -> tuple[Metric, ...]:
        """Means over problems, and the share of completions that were cut."""
        headline, names = self.evaluator.metric, self._names()
        values = {
            name: [v for result in self.results if (v := self._value(result, name)) is not None] for name in names
        }
        if not values[headline]:
            raise ValueError(f"evaluation {self.evaluator.evaluation.key!r}: no problem has a score for {headline!r}")
        cut = [sum(output.truncated for output in samples) / len(samples) for samples in self.drawing.outputs]
        shares = {name: name not in self.evaluator.not_shares for name in names} | {"truncated": True}
        return tuple(_metric(name, v, shares[name]) for name, v in (values | {"truncated": cut}).items() if v)

    def _value(self, result: ItemResult, name: str) -> float | None:
        """A problem that could not be graded is wrong; a mean reward has no value that says so."""
        if result.error is None:
            return result.scores.get(name)
        return None if name in self.evaluator.not_shares else 0.0

    def _counts(self) -> Counts:
        grades = [grade for result in self.results for grade in result.grades]
        status = [grade.status for grade in grades]
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

    def _tokens(self) -> TokenCounts:
        lengths = [len(output.tokens) for output in self.drawing.rows]
        return TokenCounts(
            prompt=sum(len(prompt) for prompt in self.drawing.prompts),
            completion=sum(lengths),
            mean_completion=sum(lengths) / len(lengths),
        )

    def _contamination(self) -> Contamination | None:
        train = self.evaluator.context.train
        items = [(problem.id, problem.example.prompt) for problem in self.problems]
        return contamination((example.prompt for example in train), items) if train else None

    def _warnings(self, metrics: Sequence[Metric], counts: Counts, overlap: Contamination | None) -> list[str]:
        sampling = self.evaluator.evaluation.sampling
        warnings = []
        if counts.truncated > MANY_TRUNCATED * counts.completions:
            warnings.append(
                f"{counts.truncated / counts.completions:.1%} of the completions were cut at {sampling.max_tokens} tokens; "
                "what they would have said counts as wrong. Raise sampling.max_tokens to tell."
            )
        if counts.unparseable > MANY_UNPARSEABLE * counts.completions:
            warnings.append(
                f"No answer was found in {counts.unparseable / counts.completions:.1%} of the completions: "
                "look at some in items.jsonl before blaming the model."
            )
        if counts.failed_problems:
            warnings.append(f"{counts.failed_problems} problems could not be graded and count as wrong.")
        if counts.unscored:
            warnings.append(f"{counts.unscored} problems have no score and are not in the mean.")
        if len(self.problems) < self.available:
            warnings.append(f"Only {len(self.problems)} of {self.available} items were put to the model.")
        if overlap is not None and overlap.exact:
            warnings.append(f"{overlap.exact} items are training prompts word for word.")
        return warnings + self._length_warnings(sampling.max_tokens)

    def _length_warnings(self, max_tokens: int) -> list[str]:
        window = _model_settings(self.policy.path).get("max_position_embeddings")
        longest = max(len(prompt) for prompt in self.drawing.prompts) + max_tokens
        if not isinstance(window, int) or longest <= window:
            return []
        return [f"A prompt and {max_tokens} new tokens make {longest}; the model was made for {window} positions."]


def task_sha256(problems: Sequence[Problem]) -> str:
    """Over what is asked and what is expected, whatever the chat template and the model."""
    return sha256_of(
        [
            [
                problem.id,
                problem.example.prompt,
                [dict(message) for message in problem.example.messages or ()],
                problem.prompt.template,
                problem.prefix,
                problem.reference,
            ]
            for problem in problems
        ]
    )


def _metric(name: str, values: Sequence[float], share: bool) -> Metric:
    found = estimate(values, share=share)
    return Metric(
        name=name,
        score=found.score,
        stderr=found.stderr,
        low=found.low,
        high=found.high,
        interval=found.method,
        n=found.n,
    )


def _model_info(path: Path, context: EvaluationContext) -> ModelInfo:
    settings = _model_settings(path)
    dtype = context.dtype or settings.get("torch_dtype") or settings.get("dtype")
    return ModelInfo(
        path=context.checkpoint,
        sha256=context.checkpoint_sha256,
        adapter_sha256=context.adapter_sha256,
        stage=context.stage,
        step=context.step,
        run_id=context.run_id,
        dtype=dtype,
        quantization=settings.get("quantization"),
    )


def _model_settings(path: Path) -> dict[str, Any]:
    file = path / "config.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _prompt_info(problems: Sequence[Problem], policy: Any, few_shot_seed: int | None) -> PromptInfo:
    first = problems[0]
    chat = any(problem.prompt.chat or problem.example.messages is not None for problem in problems)
    shots = {problem.few_shot_ids for problem in problems}
    file = policy.path / "tokenizer.json"
    return PromptInfo(
        chat=chat,
        chat_template_sha256=sha256_of(policy.tokenizer.chat_template) if chat else None,
        chat_template_args=first.prompt.chat_template_args,
        tokenizer_sha256=sha256_of(file.read_text(encoding="utf-8")) if file.is_file() else None,
        system=_system_prompt(first),
        template=first.prompt.template,
        multi_turn=any(_turns(problem) > 1 for problem in problems),
        few_shot=len(first.few_shot_ids),
        few_shot_ids=first.few_shot_ids if len(shots) == 1 else None,
        few_shot_seed=few_shot_seed,
    )


def _system_prompt(problem: Problem) -> str | None:
    written = [message["content"] for message in problem.example.messages or () if message["role"] == "system"]
    return problem.prompt.system or (written[0] if written else None)


def _turns(problem: Problem) -> int:
    return sum(message["role"] != "system" for message in problem.example.messages or ())


def _item(
    problem: Problem,
    prompt: Sequence[int],
    outputs: Sequence[Output],
    result: ItemResult,
    scores: dict[str, float | None],
    tokenizer: Any,
) -> Item:
    text = tokenizer.decode(list(prompt))
    grades = result.grades or tuple(Grade({}, error=result.error) for _ in outputs)
    return Item(
        id=problem.id,
        prompt=text,
        prompt_sha256=sha256_of(text),
        prompt_tokens=len(prompt),
        few_shot_ids=problem.few_shot_ids,
        reference=problem.reference,
        scores=scores,
        error=_capped(result.error),
        samples=tuple(_sample(output, grade) for output, grade in zip(outputs, grades, strict=True)),
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
