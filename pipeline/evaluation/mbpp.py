"""MBPP (arXiv:2108.07732): short Python functions from a sentence, with three asserts to show what is meant.

The data is Google's, under CC-BY-4.0 (the repository that holds it: Apache-2.0).
"""

import ast
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from pydantic import BaseModel

from configs.schema import PromptConfig
from pipeline.evaluation.base import EvaluatorRegistry, Output, Problem
from pipeline.evaluation.programs import ProgramEvaluator, ProgramOptions
from pipeline.evaluation.report import DatasetInfo
from pipeline.evaluation.rows import Rows
from rewards import programs
from rewards.base import Example

SHOT_IDS = (2, 3, 4)
"""The tasks that the paper shows as examples."""
TEST_IDS = range(11, 511)
"""The tasks that the paper tests on."""
DONE = "[DONE]"
TASK = (
    "You are an expert Python programmer, and here is your task: {text} "
    "Your code should pass these tests:\n\n{tests}\n[BEGIN]\n"
)
"""The paper's prompt."""
CHAT = "{text}\n\nYour code should pass these tests:\n\n```python\n{tests}\n```\n\nAnswer with the Python code alone."


class MBPPOptions(ProgramOptions):
    path: str
    """mbpp.jsonl, sanitized-mbpp.json, or `google-research-datasets/mbpp`."""
    protocol: Literal["completion_3shot", "chat"] = "completion_3shot"
    """How the model is asked; `docs/evaluation.md` describes each."""
    split: Literal["test", "all"] = "test"
    """Tasks 11 to 510, or all of them."""


@EvaluatorRegistry.register("mbpp")
class MBPP(ProgramEvaluator):
    """Short functions with three asserts each."""

    Options: ClassVar[type[BaseModel]] = MBPPOptions
    version: ClassVar[str] = "1"
    options: MBPPOptions

    def prepare(self) -> None:
        self._rows.check(f"{self.where}: options.path")
        super().prepare()

    def problems(self) -> list[Problem]:
        rows = self._rows.read(("task_id", "code", "test_list"))
        chosen = [row for row in rows if self.options.split == "all" or row["task_id"] in TEST_IDS]
        if self.options.protocol == "chat":
            return [self._chat(row) for row in chosen]
        shots = [row for row in rows if row["task_id"] in SHOT_IDS]
        if len(shots) < len(SHOT_IDS):
            raise ValueError(
                f"{self.options.path}: completion_3shot shows tasks {SHOT_IDS}, and not all of them are there"
            )
        return [self._completion(row, shots) for row in chosen]

    def _completion(self, row: Mapping[str, Any], shots: Sequence[Mapping[str, Any]]) -> Problem:
        shown = "".join(_task(shot) + shot["code"] + f"\n{DONE}\n\n" for shot in shots)
        ids = tuple(str(shot["task_id"]) for shot in shots)
        example = Example(str(row["task_id"]), shown + _task(row))
        return Problem(example, PromptConfig(chat=False), row["code"], few_shot_ids=ids, data=row)

    def _chat(self, row: Mapping[str, Any]) -> Problem:
        text = CHAT.replace("{text}", _text(row)).replace("{tests}", "\n".join(row["test_list"]))
        return Problem(Example(str(row["task_id"]), text), PromptConfig(), row["code"], data=row)

    def program(self, problem: Problem, output: Output) -> str:
        if self.options.extraction == "plain":
            return output.text
        return programs.assemble("", output.text, entry_point(problem.data))

    def test(self, problem: Problem) -> tuple[str, str]:
        row = problem.data
        setup = [*row.get("test_imports", ()), row.get("test_setup_code", "")]
        return "\n".join([*filter(None, setup), *row["test_list"]]), entry_point(row)

    @property
    def _rows(self) -> Rows:
        return Rows(self.options.path, "full", "prompt+test+validation+train")

    @property
    def protocol(self) -> str:
        return self.options.protocol

    @property
    def stop(self) -> tuple[str, ...]:
        return (DONE,) if self.options.protocol == "completion_3shot" else ()

    def dataset(self) -> DatasetInfo:
        rows = self._rows
        name = rows.file.name.partition(".")[0]
        return DatasetInfo(name=name, revision=rows.revision, sha256=rows.sha256(), split=self.options.split)


def _text(row: Mapping[str, Any]) -> str:
    """The sanitized file calls it `prompt`."""
    return row["text"] if "text" in row else row["prompt"]


def _task(row: Mapping[str, Any]) -> str:
    return TASK.replace("{text}", _text(row)).replace("{tests}", "\n".join(row["test_list"]))


def entry_point(row: Mapping[str, Any]) -> str:
    """The function that the asserts call: of the reference's own, the one that they name most often.

    `ValueError` where they call none of it.
    """
    defined = [node.name for node in ast.parse(row["code"]).body if isinstance(node, ast.FunctionDef)]
    called = [
        node.func.id
        for test in row["test_list"]
        for node in ast.walk(ast.parse(test))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    ]
    found = max(defined, key=called.count, default=None)
    if found is None or found not in called:
        raise ValueError(f"task {row['task_id']}: its tests call no function of its reference; they call {called}")
    return found
