"""Tasks of reasoning-gym as rows, with worked solutions for arithmetic chains.

A row has the columns `question`, `answer` (text, or None where any answer may be right), `target` (what SFT imitates),
`expression` (such as `24 + 7 - 13`, where the task has one), `task`, and `entry`: what the task's verifier needs.

Some tasks depend on the order of Python's sets, which changes from process to process. The rows are therefore made in a
process of their own (`python -m pipeline.data.reasoning`), whose hash seed is fixed.
"""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from decimal import Context, Decimal
from difflib import get_close_matches
from itertools import accumulate
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, Literal

from configs.registry import PluginFault
from configs.schema import ReasoningGymSource, ReasoningGymTask
from pipeline.data.draws import uniform
from pipeline.data.json_values import as_json

Style = Literal["answer", "steps", "last line"]
SOLVED = ("chain_sum", "decimal_chain_sum", "products")
"""Tasks with worked solutions: one level of operators, worked from left to right."""
REFUSED = {"codeio": "it runs code out of its data in this process", "composite": "list its tasks here instead"}

# Exact for any number of digits that a task makes.
EXACT = Context(prec=10_000)
OPERATORS: Mapping[str, Callable[[Decimal, Decimal], Decimal]] = {
    "+": EXACT.add,
    "-": EXACT.subtract,
    "*": EXACT.multiply,
}


def generate(source: ReasoningGymSource) -> Iterator[dict[str, Any]]:
    """The rows of a source: a function of its settings, the same in every process. `ValueError` names the task."""
    root = str(Path(__file__).parents[2])
    path = os.pathsep.join(part for part in (root, os.environ.get("PYTHONPATH")) if part)
    command = [sys.executable, "-W", "ignore", "-m", __spec__.name]
    with TemporaryFile("w+") as settings, TemporaryFile("w+") as errors:
        settings.write(source.model_dump_json())
        settings.seek(0)
        process = subprocess.Popen(
            command,
            stdin=settings,
            stdout=subprocess.PIPE,
            stderr=errors,
            encoding="utf-8",
            env={**os.environ, "PYTHONHASHSEED": "0", "PYTHONPATH": path, "PYTHONIOENCODING": "utf-8"},
        )
        with process:
            try:
                yield from _rows(process)
            finally:
                process.kill()
        if process.returncode != 0:
            errors.seek(0)
            raise ValueError(
                f"reasoning_gym: generating ended with status {process.returncode}: {errors.read()[-500:]}"
            )


def _rows(process: "subprocess.Popen[str]") -> Iterator[dict[str, Any]]:
    assert process.stdout is not None
    for line in process.stdout:
        row = json.loads(line)
        if "error" in row:
            raise ValueError(row["error"])
        yield row
    process.wait()


def main() -> None:
    """Settings on the standard input, a row a line on the standard output; a last line `{"error": …}` for a fault."""
    source = ReasoningGymSource.model_validate_json(sys.stdin.read())
    output, sys.stdout = sys.stdout, sys.stderr
    try:
        for row in make_rows(source):
            print(json.dumps(row, ensure_ascii=False), file=output)
    except ValueError as error:
        print(json.dumps({"error": str(error)}), file=output)
    output.flush()


def make_rows(source: ReasoningGymSource) -> Iterator[dict[str, Any]]:
    """The rows, made in this process."""
    makers = [_task_rows(source, place, task) for place, task in enumerate(source.tasks)]
    shares = list(accumulate(task.weight for task in source.tasks))
    for number in range(source.size):
        point = uniform(source.seed, "task", number) * shares[-1]
        yield next(makers[next(place for place, share in enumerate(shares) if point < share)])


def _task_rows(source: ReasoningGymSource, place: int, task: ReasoningGymTask) -> Iterator[dict[str, Any]]:
    where = f"reasoning_gym: tasks.{place}"
    if source.solution == "steps" and task.name not in SOLVED:
        raise ValueError(f"{where}.name: no worked solutions for {task.name!r}; solution: steps knows {list(SOLVED)}")
    # Each task draws from seeds far from each other's and from those of the next source seed.
    seed = int(uniform(source.seed, place, task.name) * 2**31)
    dataset = _dataset(task, seed, source.size, where)

    def style(number: int) -> Style:
        if source.solution == "answer":
            return "answer"
        return "steps" if uniform(source.seed, "worked", place, number) < source.steps_share else "last line"

    return (_row(dataset, number, task, style(number), where) for number in range(source.size))


def _dataset(task: ReasoningGymTask, seed: int, size: int, where: str) -> Any:
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    if task.name in REFUSED:
        raise ValueError(f"{where}.name: {task.name!r} is not offered: {REFUSED[task.name]}")
    if task.name not in DATASETS:
        near = get_close_matches(task.name, DATASETS, n=5) or sorted(DATASETS)
        raise ValueError(f"{where}.name: reasoning-gym has no task {task.name!r}; it has {', '.join(near)}")
    known = {field.name for field in dataclasses.fields(DATASETS[task.name][1])} - {"seed", "size"}
    if task.options.keys() - known:
        unknown = sorted(task.options.keys() - known)
        raise ValueError(f"{where}.options: {task.name!r} has no option {unknown}; it has {sorted(known)}")
    with PluginFault(ValueError, f"{where}.options: {task.name!r} refuses {task.options}"):
        return reasoning_gym.create_dataset(task.name, **task.options, seed=seed, size=size)


def _row(dataset: Any, number: int, task: ReasoningGymTask, style: Style, where: str) -> dict[str, Any]:
    with PluginFault(ValueError, f"{where}: {task.name!r} fails to make example {number} with {task.options}"):
        made = dataset[number]
        entry = {part: as_json(made[part], part) for part in ("question", "answer", "metadata")}
        expression = entry["metadata"].get("expression")
        target = _target(expression, entry["answer"], style)
    row = {"question": entry["question"], "answer": entry["answer"], "target": target, "task": task.name}
    if isinstance(expression, str):
        row["expression"] = expression
    # A verifier may depend on the options that its task was made with.
    return row | {"entry": entry | {"options": task.options}}


def _target(expression: str, answer: str, style: Style) -> str:
    if style == "answer":
        return answer
    return worked_solution(expression, answer) if style == "steps" else f"#### {answer}"


def worked_solution(expression: str, answer: str) -> str:
    """The steps of `24 + 7 - 13` from left to right, one a line, and `#### 18`.

    `ValueError` where they end at another number than the answer.
    """
    first, *rest = expression.split()
    total, lines = Decimal(first), []
    for operator, term in zip(rest[::2], rest[1::2], strict=True):
        # plus: no negative zero.
        result = EXACT.plus(OPERATORS[operator](total, Decimal(term)))
        lines.append(f"{total:f} {operator} {term} = {result:f}")
        total = result
    if total != Decimal(answer):
        raise ValueError(f"the steps of {expression!r} end at {total:f}, and the answer is {answer!r}")
    return "\n".join([*lines, f"#### {answer}"])


if __name__ == "__main__":
    main()
