import dagster as dg

from pipeline.evaluation.report_files import write_report
from pipeline.io_manager import write_ref
from pipeline.refs import ReportRef
from pipeline.resources import RunStore
from pipeline.verdicts import MAX_CHANGED, changed, comparison_metadata, earlier, score_kept
from tests.pipeline.test_evaluation_report import report_and_items

KEY = dg.AssetKey(["tiny", "grpo_held_out"])


def written(folder, scores, stage="grpo", **changes):
    report, items = report_and_items(scores, stage, **changes)
    write_report(report, items, folder)
    return folder


def test_a_score_that_fell_significantly_is_a_warning_with_the_paired_verdict(tmp_path):
    before, after = written(tmp_path / "old", [1.0] * 20), written(tmp_path / "new", [1.0] * 8 + [0.0] * 12)
    found = score_kept(KEY, before, after)
    assert (found.passed, found.severity) == (False, dg.AssetCheckSeverity.WARN)
    assert "accuracy 40.0% against 100.0%" in (found.description or "")
    assert (found.metadata["lost"].value, found.metadata["gained"].value) == (12, 0)


def test_a_score_that_rose_or_fell_by_chance_or_cannot_be_compared_passes(tmp_path):
    low, high = written(tmp_path / "low", [0.0] * 12 + [1.0] * 8), written(tmp_path / "high", [1.0] * 20)
    luck = written(tmp_path / "luck", [1.0] * 18 + [0.0] * 2)
    other = written(tmp_path / "other", [0.0] * 20, generation={"max_tokens": 65})
    assert score_kept(KEY, low, high).passed
    assert score_kept(KEY, high, luck).passed
    assert score_kept(KEY, None, low).description == "there is no earlier report"
    against_other = score_kept(KEY, high, other)
    assert against_other.passed
    assert "generation.max_tokens: 64 against 65" in (against_other.description or "")


def test_the_same_prompts_are_shown_where_their_scores_differ_gains_before_losses(tmp_path):
    before, after = written(tmp_path / "old", [0.0, 1.0, 1.0, 0.0]), written(tmp_path / "new", [1.0, 1.0, 0.0, 1.0])
    assert [(row["id"], row["score before"], row["score after"]) for row in changed(before, after)] == [
        ("p0", 0.0, 1.0),
        ("p3", 0.0, 1.0),
        ("p2", 1.0, 0.0),
    ]
    many = written(tmp_path / "many", [0.0] * 30), written(tmp_path / "more", [1.0] * 30)
    assert len(changed(*many)) == MAX_CHANGED


def test_a_reports_page_compares_with_what_is_comparable_and_leaves_out_the_rest(tmp_path):
    after = written(tmp_path / "new", [1.0] * 10)
    sft = written(tmp_path / "sft", [0.0] * 4 + [1.0] * 6, "sft")
    other = written(tmp_path / "other", [0.0] * 10, generation={"max_tokens": 65})
    found = comparison_metadata(after, {"last report": other, "sft": sft, "gone": None})
    assert set(found) == {"scores", "against_sft", "change_since_sft", "answers_changed_since_sft"}
    assert found["change_since_sft"] == 0.4
    assert comparison_metadata(after, {"last report": other}) == {}


def test_an_earlier_report_is_another_folder_that_is_still_there(tmp_path):
    runs = RunStore(root=str(tmp_path))
    assert earlier(runs, KEY, tmp_path / "new") is None
    ref = ReportRef(
        path="old",
        stage="grpo",
        benchmark="sums",
        metric="accuracy",
        score=0.5,
        n=2,
        low=0.1,
        high=0.9,
        comparability="x",
        checkpoint="y",
        sha256="z",
    )
    write_ref(tmp_path, KEY, ref, "run")
    assert earlier(runs, KEY, tmp_path / "new") is None
    (tmp_path / "old").mkdir()
    assert earlier(runs, KEY, tmp_path / "new") == tmp_path / "old"
    assert earlier(runs, KEY, tmp_path / "old") is None
