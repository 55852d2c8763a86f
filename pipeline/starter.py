"""A first experiment file, commented, from a few answers; what it says loads, and its job runs."""

import gzip
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from jinja2 import Environment, PackageLoader, StrictUndefined

from configs.atomic import write_text

Algorithm = Literal["grpo", "ppo", "sft"]
GUESSES = {
    "prompt": ("prompt", "question", "problem", "instruction", "input", "query"),
    "answer": ("answer", "solution", "label", "output"),
    "target": ("target", "completion", "response", "worked", "rationale"),
}
"""What columns are often called."""
MATHS = "{prompt}\nReason step by step, and end with a line '#### ' and the number."
SCRATCH = "scratch"


@dataclass(frozen=True)
class Answers:
    """What a first experiment needs to know."""

    name: str
    data: str
    """A `.jsonl` file, or a task of reasoning-gym."""
    model: str
    """A hub id, a folder, or `scratch`."""
    algorithm: Algorithm
    reward: str
    prompt: str | None = None
    answer: str | None = None
    target: str | None = None
    """Columns of the file; guessed from their names where absent."""


def write_experiment(answers: Answers, folder: Path) -> Path:
    """Write `<name>.yaml` into the folder; its path. `ValueError` says what can't be had, and nothing is written."""
    from pipeline.catalog import load_entry

    file = folder / f"{answers.name}.yaml"
    if file.exists():
        raise ValueError(f"{file} exists; choose another name")
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    write_text(file, render(answers))
    try:
        load_entry(file)
    except ValueError:
        file.unlink()
        raise
    return file


def render(answers: Answers) -> str:
    """The experiment as text."""
    scratch = answers.model == SCRATCH
    data = _data(answers)
    sft = scratch or answers.algorithm == "sft"
    if sft and not data["target"]:
        raise ValueError(f"{answers.data}: no column to imitate (target), which sft and a model from scratch need")
    environment = Environment(
        loader=PackageLoader("pipeline"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["scalar"] = lambda value: json.dumps(value, ensure_ascii=False)  # JSON is YAML
    return environment.get_template("experiment.yaml").render(
        name=answers.name,
        description=f"{answers.algorithm} on {Path(answers.data).name}.",
        data=data,
        scratch=scratch,
        model=answers.model,
        template=MATHS if answers.reward == "numeric_answer" else "{prompt}",
        sft=sft,
        algorithm=answers.algorithm,
        reward=answers.reward,
    )


def _data(answers: Answers) -> dict[str, Any]:
    if not answers.data.endswith((".jsonl", ".jsonl.gz")):
        worked = answers.data == "chain_sum"
        fields = ["prompt: expression", "target: target", "answer: answer"] if worked else ["answer: answer"]
        target = "target" if worked else None
        return {"kind": "task", "task": answers.data, "worked": worked, "fields": fields, "target": target}
    columns = read_columns(Path(answers.data))
    chosen = {
        part: getattr(answers, part) or next((name for name in names if name in columns), None)
        for part, names in GUESSES.items()
    }
    absent = [name for name in chosen.values() if name is not None and name not in columns]
    if absent or chosen["prompt"] is None:
        raise ValueError(
            f"{answers.data}: {f'no column {absent[0]!r}' if absent else 'no column looks like the question'}; "
            f"there are {list(columns)}; say which with --prompt, --answer and --target"
        )
    fields = [f"{part}: {json.dumps(name)}" for part, name in chosen.items() if name is not None]
    return {"kind": "jsonl", "path": answers.data, "fields": fields, "target": chosen["target"]}


def read_columns(file: Path) -> Sequence[str]:
    """The columns of the first row of a JSON-lines file. `ValueError` where it has none."""
    try:
        with gzip.open(file, "rt") if file.suffix == ".gz" else file.open(encoding="utf-8") as stream:
            first = next((line for line in islice(stream, 100) if line.strip()), "")
        row = json.loads(first)
    except (OSError, EOFError, ValueError) as error:
        raise ValueError(f"{file}: no readable JSON lines: {error}") from error
    if not isinstance(row, dict) or not row:
        raise ValueError(f"{file}: line 1: expected an object of columns, got {first.strip()[:80]}")
    return list(row)
