"""A finished evaluation becomes its report: scores, conditions, provenance, and what a reader should beware of."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pipeline.evaluation.base import EvaluationContext, Problem
from pipeline.evaluation.contamination import Contamination
from pipeline.evaluation.report import (
    Counts,
    DatasetInfo,
    EvaluationReport,
    GenerationInfo,
    ModelInfo,
    PromptInfo,
    TaskInfo,
    Timing,
    comparability,
    sha256_of,
)
from pipeline.evaluation.tally import Finished

MANY_TRUNCATED = 0.05
MANY_UNPARSEABLE = 0.10


def report_of(run: Finished, timing: Timing) -> EvaluationReport:
    """The report, with its hash of what must agree."""
    evaluator, context, config = run.evaluator, run.evaluator.context, run.evaluator.evaluation
    counts, overlap = run.counts(), run.contamination()
    report = EvaluationReport(
        experiment=context.experiment,
        name=config.key,
        task=_task_info(run),
        dataset=_dataset_info(run),
        model=_model_info(run.policy, context),
        prompt=_prompt_info(run.problems, run.policy, evaluator.few_shot_seed),
        generation=_generation_info(run),
        extraction=evaluator.extraction,
        executor=evaluator.executor,
        metrics=run.metrics(),
        counts=counts,
        tokens=run.tokens(),
        contamination=overlap,
        task_sha256=task_sha256(run.problems),
        comparability="",
        warnings=tuple(_warnings(run, counts, overlap)),
        provenance=context.provenance,
        timing=timing,
    )
    return report.model_copy(update={"comparability": comparability(report)})


def task_sha256(problems: Sequence[Problem]) -> str:
    """Over what is asked and what is expected, whatever the chat template and the model."""
    return sha256_of([_asked(problem) for problem in problems])


def _asked(problem: Problem) -> list[Any]:
    from mlx_ops.prompts import prompt_text

    messages = [dict(message) for message in problem.example.messages or ()]
    return [problem.id, prompt_text(problem.example, problem.prompt), messages, problem.prefix, problem.reference]


def _task_info(run: Finished) -> TaskInfo:
    evaluator = run.evaluator
    return TaskInfo(
        name=evaluator.evaluation.benchmark,
        version=evaluator.version,
        protocol=evaluator.protocol,
        metric=evaluator.metric,
        notes=evaluator.notes,
    )


def _dataset_info(run: Finished) -> DatasetInfo:
    chosen = tuple(problem.id for problem in run.problems)
    update = {
        "available": run.available,
        "items": len(chosen),
        "limit": run.evaluator.evaluation.limit,
        "item_ids": chosen if len(chosen) < run.available else None,
    }
    return run.evaluator.dataset().model_copy(update=update)


def _model_info(policy: Any, context: EvaluationContext) -> ModelInfo:
    settings = _model_settings(policy.path)
    return ModelInfo(
        path=context.checkpoint,
        sha256=context.checkpoint_sha256,
        adapter_sha256=context.adapter_sha256,
        stage=context.stage,
        step=context.step,
        run_id=context.run_id,
        dtype=_dtype(policy.model),
        quantization=settings.get("quantization"),
    )


def _dtype(model: Any) -> str | None:
    """Of most floating-point weights as they were computed with; None for what is no MLX model."""
    import mlx.core as mx
    import mlx.nn as nn
    from mlx.utils import tree_flatten

    if not isinstance(model, nn.Module):
        return None
    sizes: Counter[str] = Counter()
    for _, array in tree_flatten(model.parameters()):
        if isinstance(array, mx.array) and mx.issubdtype(array.dtype, mx.floating):
            sizes[str(array.dtype).removeprefix("mlx.core.")] += array.size
    return sizes.most_common(1)[0][0] if sizes else None


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
    return written[0] if written else problem.prompt.system


def _turns(problem: Problem) -> int:
    return sum(message["role"] != "system" for message in problem.example.messages or ())


def _generation_info(run: Finished) -> GenerationInfo:
    config = run.evaluator.evaluation
    sampling = config.sampling
    return GenerationInfo(
        max_tokens=sampling.max_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        seed=run.evaluator.context.seed,
        samples=config.samples,
        stop=run.evaluator.stop,
        batch_size=config.batch_size,
    )


def _warnings(run: Finished, counts: Counts, overlap: Contamination | None) -> Iterator[str]:
    limit = run.evaluator.evaluation.sampling.max_tokens
    if counts.truncated > MANY_TRUNCATED * counts.completions:
        yield (
            f"{counts.truncated / counts.completions:.1%} of the completions were cut at {limit} tokens; what they "
            "would have said counts as wrong. Raise sampling.max_tokens to tell."
        )
    if counts.unparseable > MANY_UNPARSEABLE * counts.completions:
        yield (
            f"No answer was found in {counts.unparseable / counts.completions:.1%} of the completions: look at some in "
            "items.jsonl before blaming the model."
        )
    if counts.failed_problems:
        yield f"{counts.failed_problems} problems could not be graded and count as wrong."
    if counts.unjudged:
        yield f"{counts.unjudged} completions met a test that can't be judged, and count as wrong."
    if counts.unscored:
        yield f"{counts.unscored} problems have no score and are not in the mean."
    if len(run.problems) < run.available:
        yield f"Only {len(run.problems)} of {run.available} items were put to the model."
    if overlap is not None and overlap.exact:
        yield f"{overlap.exact} items are training prompts word for word."
    yield from _window_warning(run, limit)


def _window_warning(run: Finished, max_tokens: int) -> Iterator[str]:
    window = _model_settings(run.policy.path).get("max_position_embeddings")
    longest = max(len(prompt) for prompt in run.drawing.prompts) + max_tokens
    if isinstance(window, int) and longest > window:
        yield f"A prompt and {max_tokens} new tokens make {longest}; the model was made for {window} positions."
