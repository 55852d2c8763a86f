"""The reward for programs that pass their tests, assembled and judged as the benchmarks of programs are."""

import ast
import builtins
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

from rewards import programs
from rewards.base import BaseReward, Example, RewardRegistry
from rewards.columns import column
from rewards.sandbox import Job, JudgeOptions, Verdict, refuse_sandbox_errors

SHOWN = 5


class CodeTestsOptions(JudgeOptions):
    tests: str = "tests"
    """Column with the tests: asserts, or a function `check(candidate)`, as a text or a list of texts."""
    setup: str | None = None
    """Column with what stands before the tests, such as imports; a text or a list of texts."""
    entry_point: str | None = None
    """Column with the function's name; None takes the function that the tests call."""
    solution: str | None = None
    """Column with a solution: each must pass its own tests before training begins."""
    score: Literal["all", "share"] = "all"
    """`all`: 1 where every test holds, else 0. `share`: the share of the asserts that hold."""


@RewardRegistry.register("code_tests")
class CodeTests(BaseReward):
    """How many of the example's tests the completion's program passes, 0 to 1.

    `RuntimeError` where no sandbox works, or it failed twice: that is nobody's score.
    """

    Options: ClassVar = CodeTestsOptions
    version: ClassVar[str] = programs.ASSEMBLER_VERSION
    options: CodeTestsOptions

    def __call__(self, prompts: Sequence[str], completions: Sequence[str], **columns: Sequence[Any]) -> list[float]:
        names = [self.options.tests, *filter(None, (self.options.setup, self.options.entry_point))]
        cells = zip(*(column(columns, name) for name in names), strict=True)
        rows = [dict(zip(names, row, strict=True)) for row in cells]
        ids = columns.get("id", range(len(prompts)))
        jobs = [self._job(*row) for row in zip(ids, prompts, completions, rows, strict=True)]
        verdicts = self._verdicts(jobs)
        return [self._score(verdict, example) for verdict, example in zip(verdicts, ids, strict=True)]

    def validate(self, examples: Sequence[Example]) -> None:
        """Read every test, let the sandbox prove itself, and run the solutions where `solution` names them.

        `ValueError` names the examples whose tests can't be read, or that their own solution fails.
        """
        solution = self.options.solution
        jobs = [
            self._job(example.id, example.prompt, _text(example.columns.get(solution or "")), example.columns)
            for example in examples
        ]
        with self.options.judge() as judge:
            if not self.options.unsafe_no_sandbox:
                judge.self_test()
        verdicts = zip(examples, self._verdicts(jobs) if solution else [], strict=False)
        failed = [f"{example.id!r}: {verdict.detail}" for example, verdict in verdicts if verdict.status != "passed"]
        if failed:
            raise ValueError(
                f"{len(failed)} of {len(jobs)} solutions (column {solution!r}) fail their own tests, such as "
                + "; ".join(failed[:SHOWN])
            )

    def _job(self, example: Any, prompt: str, completion: str, row: Mapping[str, Any]) -> Job:
        """What is to run for a completion. `ValueError` names an example whose tests can't be used."""
        options = self.options
        try:
            test = "\n".join(filter(None, (_text(row.get(name or "")) for name in (options.setup, options.tests))))
            name = called_function(test) if options.entry_point is None else _text(row.get(options.entry_point))
            test = "\n\n".join(filter(None, (programs.helpers(prompt, name), test)))
        except ValueError as error:
            raise ValueError(f"example {example!r}: {error}") from error
        return Job(programs.assemble(prompt, completion, name), test, name, every_assert=options.score == "share")

    def _verdicts(self, jobs: Sequence[Job]) -> list[Verdict]:
        with self.options.judge() as judge:
            verdicts = judge.check_all(jobs)
        refuse_sandbox_errors(verdicts)
        return verdicts

    def _score(self, verdict: Verdict, example: Any) -> float:
        if verdict.kind == "broken_test":
            raise ValueError(f"example {example!r}: {verdict.detail}")
        return verdict.share


def _text(cell: Any) -> str:
    """A column's text; a list is its texts, one below the other."""
    parts = cell if isinstance(cell, list | tuple) else [cell]
    if not all(part is None or isinstance(part, str) for part in parts):
        raise ValueError(f"expected a text or a list of texts, got {cell!r}")
    return "\n".join(part for part in parts if part)


def called_function(test: str) -> str:
    """The function that a test's asserts call, outermost, most often: not one of its own, nor a builtin if another is.

    `ValueError` for a test that is not Python, calls no function, or calls whatever it is handed.
    """
    try:
        nodes = list(ast.walk(ast.parse(test)))
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"its tests are not Python: {error}") from error
    own = {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)}
    own |= {alias.asname or alias.name for node in nodes if isinstance(node, ast.ImportFrom) for alias in node.names}
    if "check" in own:
        raise ValueError("its test defines check(candidate); name the column of the function's name in `entry_point`")
    for passed_over in (own | set(dir(builtins)), own):
        asserts = [node.test for node in nodes if isinstance(node, ast.Assert)]
        called = [next((name for name in _calls(node) if name not in passed_over), None) for node in asserts]
        if found := Counter(filter(None, called)).most_common(1):
            return found[0][0]
    raise ValueError("its asserts call no function of the program")


def _calls(node: ast.AST) -> Iterator[str]:
    """Names of the functions that are called, the outer ones first."""
    for inner in ast.walk(node):
        if isinstance(inner, ast.Call) and isinstance(inner.func, ast.Name):
            yield inner.func.id
