"""GSM8K (arXiv:2110.14168): grade-school word problems with one number for an answer.

Three scores of the same completions stand side by side: `robust` reads an answer as a careful reader would, `strict`
and `flexible` are lm-eval's filters. Where a completion was cut at the token limit, `robust` takes an answer only from
a finished line with a marker: what stands last in a cut text is an intermediate value, or half a number.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import ClassVar, Literal

from pydantic import BaseModel, NonNegativeInt, PositiveInt, model_validator

from configs.schema import EvaluationConfig, PromptConfig, Strict
from pipeline.evaluation.base import (
    BaseEvaluator,
    EvaluatorRegistry,
    Grade,
    ItemResult,
    Output,
    Problem,
    existing_file,
    mean_scores,
)
from pipeline.evaluation.gsm8k_questions import Question, question_of, questions_in, worked_solution
from pipeline.evaluation.report import DatasetInfo, ExtractionInfo
from pipeline.evaluation.rows import Rows, read_rows
from pipeline.evaluation.statistics import maj_at_k, pass_at_k
from pipeline.evaluation.worked_examples import WORKED_EXAMPLES
from rewards import lm_eval
from rewards.answers import (
    EXTRACTOR_VERSION,
    comparable,
    extract_answer,
    is_correct,
)
from rewards.base import Example

Protocol = Literal["completion_5shot", "cot_8shot", "cot_8shot_own", "zero_shot_chat", "experiment"]
SHOTS = 5
LM_EVAL_TRAIN_SHA256 = "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465"
"""Of the 7,473 lines of grade-school-math's train.jsonl, with which the few-shot draw is lm-eval's."""
LM_EVAL_MAX_TOKENS = 256
COT_STRICT = r"The answer is (\-?[0-9\.\,]+)."
COT_STOP_STRINGS = ("Q:", "</s>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{prompt}\n\nThink step by step. Write the final answer on a line of its own at the end, in the form\n#### <number>"
)


class GSM8KOptions(Strict):
    protocol: Protocol = "zero_shot_chat"
    """How the model is asked; `docs/evaluation.md` describes each."""
    path: str | None = None
    """GSM8K's test file, JSON lines of question and answer, or `openai/gsm8k`; None is the experiment's test split."""
    train_path: str | None = None
    """Where completion_5shot draws its examples from, as `path`; None is the experiment's train split."""
    shots_path: str | None = None
    """The worked examples of cot_8shot: JSON lines of question and target."""
    few_shot_seed: NonNegativeInt = 1234
    headline: Literal["robust", "strict", "flexible"] = "robust"
    k: tuple[PositiveInt, ...] | None = None
    """Which maj@k and pass@k to report; None takes the number of samples, where there are several."""

    @model_validator(mode="after")
    def _shots(self) -> "GSM8KOptions":
        if (self.protocol == "cot_8shot") != (self.shots_path is not None):
            raise ValueError(
                "shots_path: goes with protocol: cot_8shot, which needs the examples of arXiv:2201.11903 as a file; "
                "cot_8shot_own has examples of its own"
            )
        return self


@EvaluatorRegistry.register("gsm8k")
class GSM8K(BaseEvaluator):
    """Word problems, one number each."""

    Options: ClassVar[type[BaseModel]] = GSM8KOptions
    version: ClassVar[str] = "1"
    options: GSM8KOptions

    @classmethod
    def check(cls, options: GSM8KOptions, evaluation: EvaluationConfig) -> None:
        too_many = [k for k in options.k or () if k > evaluation.samples]
        if too_many:
            raise ValueError(
                f"options of evaluation {evaluation.key!r}: k: {too_many} of {evaluation.samples} samples; "
                "raise samples"
            )

    def prepare(self) -> None:
        for name, rows in (("path", self._test_rows), ("train_path", self._train_rows)):
            if rows is not None:
                rows.check(f"{self.where}: options.{name}")
        if self.options.shots_path is not None:
            existing_file(self.options.shots_path, f"{self.where}: options.shots_path")

    @property
    def _test_rows(self) -> Rows | None:
        return None if self.options.path is None else Rows(self.options.path, "main", "test")

    @property
    def _train_rows(self) -> Rows | None:
        return None if self.options.train_path is None else Rows(self.options.train_path, "main", "train")

    # ---- what is asked ----

    def problems(self) -> list[Problem]:
        questions = self._questions()
        ask = {
            "completion_5shot": self._completion_5shot,
            "cot_8shot": self._chain_of_thought,
            "cot_8shot_own": self._chain_of_thought,
            "zero_shot_chat": lambda found: self._zero_shot(found, PromptConfig(template=CHAT_TEMPLATE)),
            "experiment": lambda found: self._zero_shot(found, self.context.prompt),
        }
        return list(ask[self.options.protocol](questions))

    def _questions(self) -> list[Question]:
        if self._test_rows is not None:
            return questions_in(self._test_rows)
        if not self.context.test:
            raise ValueError(
                f"evaluation {self.evaluation.key!r}: options.path: the experiment's dataset has no test split"
            )
        return [question_of(example, example.answer or example.target) for example in self.context.test]

    def _completion_5shot(self, questions: Sequence[Question]) -> Iterator[Problem]:
        pool = self._pool()
        # One generator for all items, in their order: an item's examples depend on how many items came before it.
        random = Random(self.options.few_shot_seed)
        for question in questions:
            shots = random.sample(pool, SHOTS)
            text = "".join(f"Question: {shot.text}\nAnswer: {shot.solution}\n\n" for shot in shots)
            yield self._raw(question, f"{text}Question: {question.text}\nAnswer:", tuple(shot.id for shot in shots))

    def _pool(self) -> list[Question]:
        if self._train_rows is not None:
            return questions_in(self._train_rows)
        pool = [question_of(example, worked_solution(example)) for example in self.context.train]
        if len(pool) < SHOTS:
            raise ValueError(
                f"{self.where}: options.train_path: completion_5shot draws {SHOTS} worked examples, and the "
                f"experiment's dataset has {len(pool)}"
            )
        return pool

    def _chain_of_thought(self, questions: Sequence[Question]) -> Iterator[Problem]:
        shots = self._shots()
        text = "".join(f"Q: {question}\nA: {solution}\n\n" for question, solution in shots)
        ids = tuple(f"shot/{place}" for place in range(len(shots)))
        for question in questions:
            yield self._raw(question, f"{text}Q: {question.text}\nA:", ids)

    def _shots(self) -> list[tuple[str, str]]:
        if self.options.shots_path is None:
            return list(WORKED_EXAMPLES)
        rows = read_rows(Path(self.options.shots_path).expanduser(), ("question", "target"))
        return [(str(row["question"]), str(row["target"])) for row in rows]

    def _raw(self, question: Question, text: str, shots: tuple[str, ...]) -> Problem:
        prompt = PromptConfig(chat=False)
        return Problem(
            Example(question.id, text), prompt, question.gold, few_shot_ids=shots, data={"question": question.text}
        )

    def _zero_shot(self, questions: Sequence[Question], prompt: PromptConfig) -> Iterator[Problem]:
        for question in questions:
            yield Problem(Example(question.id, question.text), prompt, question.gold, data={"question": question.text})

    # ---- what it is worth ----

    def grade(self, problem: Problem, outputs: Sequence[Output]) -> ItemResult:
        gold, question = problem.reference or "", problem.question
        grades = tuple(self._grade_one(output, gold, question) for output in outputs)
        found = [grade.extracted["robust"] for grade in grades]
        votes = [None if value is None else comparable(value, question) for value in found]
        right = [grade.scores["robust"] == 1 for grade in grades]
        several = {}
        for k in self._ks:
            several[f"maj@{k}"] = maj_at_k(votes, right, k)
            several[f"pass@{k}"] = pass_at_k(len(right), sum(right), k)
        return ItemResult(mean_scores(grades) | several, grades)

    def _grade_one(self, output: Output, gold: str, question: str) -> Grade:
        found, strict = extract_answer(output.text, truncated=output.truncated), self._strict(output.text)
        right = is_correct(output.text, gold, question=question, truncated=output.truncated)
        scores = {
            "robust": float(right),
            "strict": float(self._strict_correct(output.text, strict, gold)),
            "flexible": float(is_correct(output.text, gold, "lm_eval_flexible")),
            "unparseable": float(found.value is None),
        }
        extracted = {
            "robust": found.value,
            "strict": strict,
            "flexible": extract_answer(output.text, "lm_eval_flexible").value,
        }
        status = "graded" if found.value is not None else "unparseable"
        return Grade(scores, extracted, status, found.reason)

    @property
    def _is_cot(self) -> bool:
        return self.options.protocol in ("cot_8shot", "cot_8shot_own")

    def _strict(self, text: str) -> str | None:
        if not self._is_cot:
            return extract_answer(text, "lm_eval_strict").value
        found = re.search(COT_STRICT, text)
        return found[1] if found else None

    def _strict_correct(self, text: str, strict: str | None, gold: str) -> bool:
        if not self._is_cot:
            return is_correct(text, gold, "lm_eval_strict")
        # Both strict filters catch the same characters, so one exact match serves them.
        return strict is not None and is_correct(f"#### {strict}", gold, "lm_eval_strict")

    @property
    def _ks(self) -> tuple[int, ...]:
        if self.options.k is not None:
            return self.options.k
        return (self.evaluation.samples,) if self.evaluation.samples > 1 else ()

    # ---- what the report says ----

    @property
    def metric(self) -> str:
        return self.options.headline

    @property
    def protocol(self) -> str:
        return self.options.protocol

    @property
    def stop(self) -> tuple[str, ...]:
        if self._is_cot:
            return COT_STOP_STRINGS
        return lm_eval.STOP_STRINGS if self.options.protocol == "completion_5shot" else ()

    @property
    def few_shot_seed(self) -> int | None:
        return self.options.few_shot_seed if self.options.protocol == "completion_5shot" else None

    @property
    def extraction(self) -> ExtractionInfo:
        rules = {
            "robust": "rewards.answers robust",
            "strict": COT_STRICT if self._is_cot else lm_eval.FILTERS["lm_eval_strict"][0],
            "flexible": lm_eval.FILTERS["lm_eval_flexible"][0],
        }
        return ExtractionInfo(name="rewards.answers", version=EXTRACTOR_VERSION, rules=rules)

    @property
    def notes(self) -> tuple[str, ...]:
        if self.options.protocol not in ("completion_5shot", "cot_8shot"):
            return ()
        sampling = self.evaluation.sampling
        facts = {
            f"lm-eval is greedy; this run has temperature {sampling.temperature:g}.": sampling.temperature > 0,
            f"lm-eval stops at {LM_EVAL_MAX_TOKENS} tokens unless told otherwise; this run at {sampling.max_tokens}.": (
                sampling.max_tokens != LM_EVAL_MAX_TOKENS
            ),
            "The few-shot examples are not lm-eval's: they come from another train file, or with another seed.": (
                self.options.protocol == "completion_5shot" and not self._draws_as_lm_eval()
            ),
        }
        return tuple(note for note, applies in facts.items() if applies)

    def _draws_as_lm_eval(self) -> bool:
        rows = self._train_rows
        known = rows is not None and (rows.revision is not None or rows.sha256() == LM_EVAL_TRAIN_SHA256)
        return known and self.options.few_shot_seed == 1234

    def dataset(self) -> DatasetInfo:
        rows = self._test_rows
        if rows is None:
            return self.context.dataset
        return DatasetInfo(name="gsm8k", revision=rows.revision, sha256=rows.sha256(), split="test")
