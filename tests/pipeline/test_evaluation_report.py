import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from configs.schema import PromptConfig
from mlx_ops.model import train_tokenizer
from pipeline.evaluation.assembly import task_sha256
from pipeline.evaluation.base import Problem
from pipeline.evaluation.compare import compare, compare_reports
from pipeline.evaluation.contamination import contamination
from pipeline.evaluation.leaderboard import (
    rankings,
    read_leaderboard,
    render_markdown,
    render_table,
    update_leaderboard,
)
from pipeline.evaluation.report import (
    Counts,
    DatasetInfo,
    EvaluationReport,
    ExtractionInfo,
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
)
from pipeline.evaluation.report_files import read_items, read_report, write_report
from pipeline.evaluation.report_page import markdown
from pipeline.evaluation.run import evaluate
from pipeline.evaluation.statistics import estimate
from pipeline.provenance import collect, git_state
from rewards.base import Example
from tests.pipeline.evaluating import config, context, speak, speaker, sums

ROOT = Path(__file__).parents[2]


def report_and_items(
    scores: Sequence[float], stage: str = "grpo", experiment: str = "trial", **changes: Any
) -> tuple[EvaluationReport, list[Item]]:
    """A report of one metric over problems with these scores."""
    found = estimate(scores)
    metric = Metric(
        name="accuracy",
        share=True,
        score=found.score,
        stderr=found.stderr,
        low=found.low,
        high=found.high,
        interval=found.method,
        n=found.n,
    )
    report = EvaluationReport(
        experiment=experiment,
        name="sums",
        task=TaskInfo(name="held_out", version="1", protocol="experiment", metric="accuracy"),
        dataset=DatasetInfo(name="sums", split="test", available=len(scores), items=len(scores)),
        model=ModelInfo(path=f"{experiment}/{stage}", sha256="0" * 64, stage=stage, step=7),
        prompt=PromptInfo(
            chat=True,
            chat_template_sha256="a" * 64,
            chat_template_args={},
            tokenizer_sha256="b" * 64,
            system=None,
            template="{prompt}",
            multi_turn=False,
            few_shot=0,
            few_shot_ids=(),
            few_shot_seed=None,
        ),
        generation=GenerationInfo(
            max_tokens=64, temperature=0, top_p=1, top_k=0, min_p=0, seed=0, samples=1, stop=("Q:",), batch_size=8
        ),
        extraction=ExtractionInfo(name="rewards", version="1", rules={"accuracy": "exact"}),
        executor=None,
        metrics=(metric,),
        counts=Counts(
            problems=len(scores),
            completions=len(scores),
            truncated=0,
            unparseable=0,
            timed_out=0,
            crashed=0,
            unjudged=0,
            failed_problems=0,
            unscored=0,
        ),
        tokens=TokenCounts(prompt=10, completion=20, mean_completion=2.0),
        contamination=None,
        task_sha256="c" * 64,
        comparability="",
        warnings=(),
        provenance=None,
        timing=Timing(
            started="2026-01-01T00:00:00+00:00",
            ended="2026-01-01T00:00:01+00:00",
            seconds=1,
            generation_seconds=0.5,
            grading_seconds=0.5,
            tokens_per_second=40,
        ),
    )
    for field, change in changes.items():
        report = report.model_copy(update={field: getattr(report, field).model_copy(update=change)})
    report = report.model_copy(update={"comparability": comparability(report)})
    return report, [item(f"p{place}", score) for place, score in enumerate(scores)]


def item(name: str, score: float | None, text: str = "7") -> Item:
    sample = Sample(
        text=text, finish="end", tokens=2, status="graded", extracted={}, scores={}, error=None, seconds=0.25
    )
    return Item(
        id=name,
        prompt="What?",
        prompt_sha256="d" * 64,
        prompt_tokens=3,
        few_shot_ids=(),
        reference="7",
        scores={"accuracy": score},
        error=None,
        samples=(sample,),
    )


# ---- what must agree -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("task", {"version": "2"}),
        ("task", {"protocol": "chat"}),
        ("task", {"metric": "reward"}),
        ("dataset", {"items": 3}),
        ("prompt", {"chat_template_sha256": "e" * 64}),
        ("prompt", {"system": "Think."}),
        ("prompt", {"chat_template_args": {"enable_thinking": False}}),
        ("prompt", {"few_shot_seed": 123}),
        ("generation", {"max_tokens": 65}),
        ("generation", {"temperature": 0.5}),
        ("generation", {"stop": ()}),
        ("generation", {"samples": 2}),
        ("extraction", {"version": "2"}),
        ("extraction", {"rules": {"accuracy": "other"}}),
    ],
)
def test_a_changed_condition_changes_the_hash(field, change):
    assert report_and_items([1, 0])[0].comparability != report_and_items([1, 0], **{field: change})[0].comparability


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("model", {"step": 8, "path": "elsewhere", "dtype": "bfloat16"}),
        ("prompt", {"tokenizer_sha256": "f" * 64}),
        ("generation", {"seed": 1, "batch_size": 16}),
        ("timing", {"seconds": 9}),
        ("task", {"notes": ("slow",)}),
    ],
)
def test_what_may_differ_leaves_the_hash_alone(field, change):
    assert report_and_items([1, 0])[0].comparability == report_and_items([1, 0], **{field: change})[0].comparability


@pytest.mark.parametrize(
    "change",
    [
        Problem(Example("a", "2 + 2"), PromptConfig(), reference="4", prefix="So"),
        Problem(Example("a", "2 + 2"), PromptConfig(template="Q {prompt}"), reference="4"),
        Problem(Example("a", "2 + 3"), PromptConfig(), reference="4"),
        Problem(Example("a", "2 + 2"), PromptConfig(), reference="5"),
        Problem(Example("b", "2 + 2"), PromptConfig(), reference="4"),
        Problem(Example("a", "2 + 2", ({"role": "user", "content": "2 + 2"},)), PromptConfig(), reference="4"),
    ],
    ids=["prefix", "template", "prompt", "reference", "id", "messages"],
)
def test_a_changed_item_changes_the_task_hash(change):
    same = [Problem(Example("a", "2 + 2"), PromptConfig(), reference="4") for _ in range(2)]
    assert task_sha256(same[:1]) == task_sha256(same[1:]) != task_sha256([change])


def test_a_changed_chat_template_makes_reports_incomparable(tmp_path):
    def run(name: str, template: str) -> EvaluationReport:
        policy = speaker("3", tmp_path)
        other = type(policy.tokenizer)(train_tokenizer(["What is 3 + 4?"], 300))
        other._tokenizer.chat_template = template
        policy = type(policy)(policy.model, other, tmp_path)
        run_config = config("gsm8k", options={"protocol": "experiment"})
        return evaluate(policy, run_config, context=context(sums(2)), directory=tmp_path / name, generate=speak)

    one = run("a", "{{ messages[0]['content'] }}")
    assert run("b", "{{ messages[0]['content'] }}").comparability == one.comparability
    assert run("c", "{{ messages[0]['content'] }} ").comparability != one.comparability
    with pytest.raises(ValueError, match=r"may not be compared:\n  prompt.chat_template_sha256: '\w+' against '\w+'"):
        compare_reports(tmp_path / "a", tmp_path / "c")


# ---- on disk -------------------------------------------------------------------------------------------------------


def test_what_was_written_is_read_back(tmp_path):
    report, items = report_and_items([1, 0.5])
    items.append(item("p2", None, text="a\u2028line\x85 and a \x00 and 😀"))
    write_report(report, items, tmp_path / "r")
    assert read_report(tmp_path / "r") == report
    assert read_items(tmp_path / "r") == items
    assert sorted(file.name for file in (tmp_path / "r").iterdir()) == [
        "items.jsonl",
        "manifest.json",
        "report.json",
        "report.md",
    ]


def test_a_report_that_is_half_there_is_named(tmp_path):
    write_report(*report_and_items([1, 0]), tmp_path / "r")
    file = tmp_path / "r" / "items.jsonl"
    file.write_text(file.read_text(encoding="utf-8")[:-20], encoding="utf-8")
    with pytest.raises(ValueError, match=r"items.jsonl:2: 1 setting\(s\) refused"):
        read_items(tmp_path / "r")
    (tmp_path / "r" / "report.json").write_text('{"schema_version": 9}', encoding="utf-8")
    with pytest.raises(ValueError, match=r"report.json: .*\n(  .*\n)*  schema_version: Input should be 1"):
        read_report(tmp_path / "r")
    with pytest.raises(ValueError, match="no readable report"):
        read_report(tmp_path / "missing")


def test_a_failed_write_leaves_the_old_report(tmp_path):
    write_report(*report_and_items([1, 0]), tmp_path / "r")
    before = (tmp_path / "r" / "report.json").read_bytes()
    report, items = report_and_items([0, 0])
    broken = report.model_copy(update={"metrics": ()})
    with pytest.raises(KeyError, match="no metric 'accuracy'"):
        write_report(broken, items, tmp_path / "r")
    assert (tmp_path / "r" / "report.json").read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["r"]


def test_the_page_shows_score_interval_and_an_example_of_either_kind():
    report, items = report_and_items([1, 1, 1, 0])
    page = markdown(report.model_copy(update={"warnings": ("Only 4 of 9 items.",)}), items)
    assert "**accuracy 75.0% [30.1, 95.4]** on 4 problems" in page
    assert "> Only 4 of 9 items." in page
    assert "### Wrong: p3" in page
    assert "### Right: p0" in page


# ---- comparison ----------------------------------------------------------------------------------------------------


def test_a_comparison_is_paired_by_problem():
    before, after = [0.0] * 12 + [1.0] * 20, [1.0] * 10 + [0.0] * 2 + [1.0] * 19 + [0.0]
    first, first_items = report_and_items(before, "sft")
    second, second_items = report_and_items(after, "grpo")
    found = compare(first, first_items, second, second_items[::-1])
    # 10 gained, 1 lost of 32: McNemar 2 * (1 + 11) / 2048.
    assert (found.gained, found.lost, found.n) == (10, 1, 32)
    assert found.p_value == pytest.approx(24 / 2048)
    assert found.difference == pytest.approx(9 / 32)
    assert found.low > 0
    sentence = found.sentence()
    assert (
        "On the same 32 problems, trial/grpo at step 7 has accuracy 90.6% against 62.5% of trial/sft at step 7"
        in sentence
    )
    assert "+28.1 points (95% interval [" in sentence
    assert sentence.endswith("McNemar p = 0.012; 10 problems gained, 1 lost). " + found.sentence().rpartition("). ")[2])
    assert sentence.endswith("The difference is established: trial/grpo at step 7 scores higher.")


def test_a_comparison_the_other_way_round_has_the_other_sign():
    first, first_items = report_and_items([0.0] * 10 + [1.0] * 5, "sft")
    second, second_items = report_and_items([1.0] * 15, "grpo")
    found = compare(second, second_items, first, first_items)
    assert (found.difference, found.gained, found.lost) == (pytest.approx(-10 / 15), 0, 10)
    assert found.sentence().endswith("trial/sft at step 7 scores lower.")


def test_a_small_difference_is_not_called_one():
    first, first_items = report_and_items([0.0, 0.0, 0.0, 1.0, 1.0, 1.0], "sft")
    second, second_items = report_and_items([1.0, 1.0, 0.0, 1.0, 1.0, 1.0], "grpo")
    found = compare(first, first_items, second, second_items)
    assert found.p_value == 0.5
    assert not found.established
    assert found.sentence().endswith("A difference is not shown; that is no proof that there is none.")


def test_five_problems_are_too_few_however_the_bootstrap_looks():
    first, first_items = report_and_items([0.0] * 5, "sft")
    second, second_items = report_and_items([1.0] * 5, "grpo")
    found = compare(first, first_items, second, second_items)
    assert (found.low, found.high, found.p_value, found.established) == (1.0, 1.0, 0.0625, False)


def test_fractional_scores_are_compared_by_the_bootstrap_alone():
    first, first_items = report_and_items([0.25, 0.5, 0.0, 0.75] * 6, "sft")
    second, second_items = report_and_items([0.5, 0.75, 0.25, 1.0] * 6, "grpo")
    found = compare(first, first_items, second, second_items)
    assert (found.p_value, found.low, found.high, found.established) == (None, 0.25, 0.25, True)


def test_incomparable_reports_are_refused_with_every_reason():
    first, items = report_and_items([1, 0])
    second, _ = report_and_items([1, 0], generation={"max_tokens": 65}, prompt={"system": "Think."})
    with pytest.raises(ValueError) as refused:
        compare(first, items, second, items)
    assert str(refused.value).splitlines()[1:] == [
        "  generation.max_tokens: 64 against 65",
        "  prompt.system: None against 'Think.'",
    ]


def test_a_metric_that_is_not_there_is_named():
    report, items = report_and_items([1, 0])
    with pytest.raises(ValueError, match="no problem has a value for 'strict'"):
        compare(report, items, report, items, "strict")


# ---- leaderboard ---------------------------------------------------------------------------------------------------


def test_the_leaderboard_holds_the_contracted_fields_in_a_stable_order(tmp_path):
    path = tmp_path / "new" / "leaderboard.json"
    reports = [report_and_items([1, 0], stage)[0] for stage in ("grpo", "base", "sft")]
    update_leaderboard([*reports, report_and_items([1, 1], "base", "another")[0]], path)
    rows = json.loads(path.read_text(encoding="utf-8"))
    fields = {"experiment", "stage", "benchmark", "metric", "score", "n", "low", "high", "checkpoint", "comparability"}
    assert all(set(row) == fields for row in rows)
    assert [(row["experiment"], row["stage"]) for row in rows] == [
        ("another", "base"),
        ("trial", "base"),
        ("trial", "sft"),
        ("trial", "grpo"),
    ]


def test_a_newer_report_takes_the_place_of_the_older_and_leaves_the_others(tmp_path):
    path = tmp_path / "leaderboard.json"
    update_leaderboard([report_and_items([0, 0], stage)[0] for stage in ("base", "sft")], path)
    update_leaderboard([report_and_items([1, 1], "sft")[0]], path)
    assert [(row.stage, row.score) for row in read_leaderboard(path)] == [("base", 0.0), ("sft", 1.0)]


@pytest.mark.parametrize("content", ["{", '{"rows": 1}', '[{"experiment": "x"}]'])
def test_a_file_that_is_no_leaderboard_is_named_and_kept(tmp_path, content):
    path = tmp_path / "leaderboard.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=r"leaderboard\.json"):
        update_leaderboard([report_and_items([1, 0])[0]], path)
    assert path.read_text(encoding="utf-8") == content


def leaderboard(tmp_path):
    comparable = [
        report_and_items(scores, stage)[0] for scores, stage in (([0, 1], "base"), ([1, 1], "sft"), ([1, 1], "grpo"))
    ]
    alone = report_and_items([1, 1], "base", "short", generation={"max_tokens": 16})[0]
    return update_leaderboard([*comparable, alone], tmp_path / "leaderboard.json")


def test_only_the_comparable_are_ranked(tmp_path):
    ranked, alone = rankings(leaderboard(tmp_path))
    assert [[row.stage for row in group] for group in ranked] == [["sft", "grpo", "base"]]
    assert [row.experiment for row in alone] == ["short"]


def test_equal_scores_share_a_rank_and_the_incomparable_stand_apart(tmp_path):
    page = render_markdown(leaderboard(tmp_path))
    assert "| 1 | trial | sft | 100.0% |" in page
    assert "| 1 | trial | grpo | 100.0% |" in page
    assert "| 3 | trial | base | 50.0% |" in page
    apart = page.partition("## Not comparable with any other")[2]
    assert "| sums: accuracy | short | base | 100.0% |" in apart
    assert "trial |" not in apart


def test_the_table_for_the_terminal_says_the_same(tmp_path):
    console = Console(width=160, record=True, file=open(os.devnull, "w", encoding="utf-8"))  # noqa: PTH123, SIM115
    console.print(render_table(leaderboard(tmp_path)))
    text = console.export_text()
    assert "sums: accuracy" in text
    assert "Not comparable with any other" in text
    assert text.index("sft") < text.index("base")


def test_an_empty_leaderboard_says_so(tmp_path):
    assert render_markdown(read_leaderboard(tmp_path / "none.json")) == "No reports yet.\n"


# ---- contamination -------------------------------------------------------------------------------------------------


def test_overlap_is_the_share_of_an_items_ngrams_in_the_training_prompts():
    train = ["the quick brown fox jumps over the lazy dog and sleeps"]
    items = [
        ("same", "The quick, brown fox jumps over the lazy dog and sleeps!"),
        ("most", "the quick brown fox jumps over the lazy dog and wakes"),  # 5 of 6 six-grams: 0.83
        ("some", "the quick brown fox jumps over my old shoe yesterday"),  # 1 of 5
        ("none", "how many apples does Ann have after lunch today"),
    ]
    found = contamination(train, items, ngram=6)
    assert (found.exact, found.contaminated, found.touched, found.items) == (1, 2, 3, 4)
    assert found.examples == ("same", "most")


def test_a_short_text_is_one_ngram():
    found = contamination(["3 + 4"], [("a", "3 + 4?"), ("b", "3 + 5")])
    assert (found.exact, found.contaminated, found.touched) == (1, 1, 1)


# ---- provenance ----------------------------------------------------------------------------------------------------


def test_provenance_names_versions_and_machine_and_no_secret(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "canary-5d1e")
    monkeypatch.setenv("WANDB_API_KEY", "canary-5d1e")
    made = collect(ROOT)
    assert made.versions["mlx"].startswith("0.")
    assert made.device.startswith(("cpu: ", "gpu: "))
    assert "canary-5d1e" not in made.model_dump_json()


def test_a_folder_without_a_repository_has_no_commit(tmp_path):
    assert git_state(tmp_path).model_dump() == {"commit": None, "dirty": None}
