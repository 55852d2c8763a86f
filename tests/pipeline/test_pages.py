"""The pages that people open: what they say, and that model text can't do anything in them."""

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from configs.atomic import write_text
from configs.schema import PromptConfig, RewardConfig
from pipeline.evaluation.leaderboard import update_leaderboard
from pipeline.evaluation.report import EvaluationReport
from pipeline.evaluation.report_files import read_items, read_report, write_report
from pipeline.pages.charts import chart, number, series, thinned, ticks
from pipeline.pages.gather import newest_reports, stage_runs
from pipeline.pages.render import duration, experiment_page, write_pages
from pipeline.samples import SampleFiles
from pipeline.sinks import JsonLines
from rewards.base import Example
from tests.pipeline.evaluating import config, context, speak, speaker

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>\"' </pre></body> {{ 739*739 }} \u202e"
PLAIN = PromptConfig(chat=False)
EXAMPLES = [Example(f"e{i}", f"{i} + {i}? {HOSTILE}", answer=str(2 * i)) for i in range(20)]


def evaluated(root: Path, stage: str, right: int, name: str = "demo") -> EvaluationReport:
    """A report of a stage whose model knows the first `right` answers."""
    from pipeline.evaluation.run import evaluate

    def say(prompt: str, seed: int) -> str:
        number = int(prompt.split()[0])
        return f"{HOSTILE}\n#### {2 * number if number < right else -1}"

    folder = root / name / "reports" / f"{stage}_held_out" / "run1"
    where = replace(
        context(test=EXAMPLES, stage=stage, rewards=(RewardConfig(name="numeric_answer"),), prompt=PLAIN),
        experiment=name,
        checkpoint=f"{name}/{stage}/run1/published/step_000003",
    )
    root.mkdir(exist_ok=True)
    return evaluate(speaker(say, root), config("held_out"), context=where, directory=folder, generate=speak)


def trained(root: Path, stage: str, name: str = "demo") -> None:
    folder = root / name / stage / "run1"
    sink = JsonLines(folder / "metrics.jsonl")
    for step in (1, 2, 3):
        sink.report(step, {"reward": step / 10, "reward/a": 0.5, "reward/<b>": 0.25, "kl": 0.0, "seconds/step": 2.0})
    sink.close(failed=False)
    row = {"step": 3, "prompt": HOSTILE, "answer": HOSTILE, "tokens": 5, "truncated": False, "rewards": {"a": 1.0}}
    rows = [{**row, "completion": f"{HOSTILE} {reward}", "reward": reward} for reward in (0.0, 1.0)]
    SampleFiles(folder / "samples").write(rows)
    state = folder / "checkpoints" / "step_000003" / "state.json"
    state.parent.mkdir(parents=True)
    write_text(state, '{"settings": {"prompt": {"template": "<script>{prompt}"}, "seed": 7}}')


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pages") / "artifacts"
    reports = [evaluated(root, "base", 2), evaluated(root, "sft", 5), evaluated(root, "grpo", 18)]
    reports.append(evaluated(root, "sft", 9, name="other"))
    trained(root, "grpo")
    update_leaderboard(reports, root / "leaderboard.json")
    write_pages(root, root / "leaderboard.json")
    return root


class Tags(HTMLParser):
    """The tags and the attributes of a page, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.words: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.words.append(data)


@pytest.mark.parametrize("page", ["demo/report.html", "leaderboard.html"])
def test_a_page_runs_nothing_and_fetches_nothing(root, page):
    found = Tags((root / page).read_text(encoding="utf-8"))
    assert {"script", "img", "link", "iframe", "object", "form"}.isdisjoint(found.tags)
    assert [name for name, _ in found.attributes if name.startswith("on") or name in ("src", "action")] == []
    assert [value for name, value in found.attributes if name == "href" and "://" in str(value)] == []
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'") in found.attributes


def test_hostile_text_is_shown_as_it_is(root):
    page = (root / "demo" / "report.html").read_text(encoding="utf-8")
    words = "".join(Tags(page).words)
    assert words.count(HOSTILE) >= 6
    assert "<script" not in page
    assert str(739 * 739) not in page


def test_no_template_turns_escaping_off():
    folder = Path(__file__).parents[2] / "pipeline" / "pages"
    code = "".join(file.read_text(encoding="utf-8") for file in (*folder.glob("*.py"), *folder.rglob("*.html")))
    assert re.findall(r"\|\s*safe\b|Markup|autoescape (?:false|off)|autoescape=False", code) == []


def test_the_page_says_scores_verdicts_and_settings(root):
    words = "".join(Tags((root / "demo" / "report.html").read_text(encoding="utf-8")).words)
    assert "90.0% [69.9, 97.2]" in words  # Wilson's interval of 18 of 20
    assert "grpo has accuracy" not in words
    assert "demo/grpo at step" in words
    assert "13 problems gained, 0 lost" in words
    assert "The difference is established" in words
    assert "template: <script>{prompt}" in words


def test_each_stage_is_set_against_the_one_it_started_from(root):
    page = (root / "demo" / "report.html").read_text(encoding="utf-8")
    assert re.findall(r"<strong>held_out: (\w+) against (\w+)</strong>", page) == [("sft", "base"), ("grpo", "sft")]


def test_the_leaderboard_links_to_pages_and_compares_with_the_best(root):
    page = (root / "leaderboard.html").read_text(encoding="utf-8")
    assert {"demo/report.html", "other/report.html"} <= set(re.findall(r'href="([^"]+)"', page))
    assert page.count('class="tag') == 3
    assert "demo/grpo at step" in page


def test_curves_and_samples_are_those_of_the_evaluated_run(root):
    (run,) = stage_runs(root, "demo", newest_reports(root, "demo"))
    assert (run.stage, run.directory.name, len(run.metrics)) == ("grpo", "run1", 3)
    assert [sample["reward"] for sample in run.best] == [1.0]
    assert [sample["reward"] for sample in run.worst] == [0.0]
    page = experiment_page(root, "demo")
    assert page.count("<svg") == 2, "reward and its parts; the KL is 0 throughout"


def test_equal_files_give_an_equal_page(root):
    assert experiment_page(root, "demo") == experiment_page(root, "demo")


def test_a_report_that_cannot_be_read_is_passed_over(root, tmp_path, caplog):
    broken = tmp_path / "demo" / "reports" / "grpo_held_out" / "run1" / "report.json"
    write_text_into(broken, "{}")
    assert newest_reports(tmp_path, "demo") == []
    assert "report.json" in caplog.text


def write_text_into(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True)
    path.write_text(text, encoding="utf-8")


def test_reports_that_may_not_be_compared_say_why(root, tmp_path):
    for stage in ("sft", "grpo"):
        folder = root / "demo" / "reports" / f"{stage}_held_out" / "run1"
        report, items = read_report(folder), read_items(folder)
        changed = report.model_copy(update={"comparability": stage})
        write_report(changed, items, tmp_path / "demo" / "reports" / f"{stage}_held_out" / "run1")
    assert "may not be compared" in experiment_page(tmp_path, "demo")


def test_an_experiment_that_is_not_there_is_named_with_those_that_are(root):
    with pytest.raises(ValueError, match=r"'absent'.*\['demo', 'other'\]"):
        write_pages(root, root / "leaderboard.json", "absent")


# ---- charts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.0, 1.0, [0.0, 0.5, 1.0]),
        (0.39, 0.68, [0.3, 0.4, 0.5, 0.6, 0.7]),
        (-0.31, -0.04, [-0.4, -0.3, -0.2, -0.1, 0.0]),
        (1, 25, [0, 10, 20, 30]),
        (2e-5, 9e-5, [2e-5, 4e-5, 6e-5, 8e-5, 1e-4]),
    ],
)
def test_ticks_are_round_and_enclose_the_values(low, high, expected):
    assert ticks(low, high) == pytest.approx(expected)


def test_a_line_goes_from_corner_to_corner():
    made = chart("x", {"a": [(0.0, 0.0), (10.0, 1.0)]})
    assert made is not None
    assert made.lines[0].points == "46.0,148.0 310.0,8.0"
    assert [tick.label for tick in made.up] == ["0", "0.5", "1"]


@pytest.mark.parametrize("points", [[], [(1.0, 2.0)], [(1.0, 0.0), (2.0, 0.0)]], ids=["none", "one", "zeros"])
def test_nothing_to_see_is_no_chart(points):
    assert chart("x", {"a": points}) is None


def test_a_constant_line_is_drawn():
    made = chart("x", {"a": [(1.0, 0.5), (2.0, 0.5)]})
    assert made is not None
    assert len(set(re.findall(r",([\d.]+)", made.lines[0].points))) == 1


def test_missing_and_infinite_values_are_left_out():
    assert series([{"step": 1, "a": None}, {"step": 2, "a": float("inf")}, {"step": 3, "a": 2}], "a") == [(3, 2)]


def test_many_points_become_means():
    assert thinned([(float(i), float(i % 2)) for i in range(320)]) == [(2.0 * i + 1, 0.5) for i in range(160)]


def test_numbers_and_durations_are_short():
    assert [number(value) for value in (0, 1234, 0.25, 5e-05, -0.0669, 2.5e7)] == [
        "0", "1,234", "0.25", "5e-05", "-0.0669", "2.5e+07",
    ]  # fmt: skip
    assert [duration(value) for value in (12.3, 200, 3720)] == ["12 s", "3 min 20 s", "1 h 02 min"]
