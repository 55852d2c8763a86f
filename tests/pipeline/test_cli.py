import json

import pytest
from typer.testing import CliRunner

from configs.atomic import write_json
from pipeline.cli import app, newest_reports

ROW = {
    "experiment": "tiny",
    "stage": "grpo",
    "benchmark": "held_out",
    "metric": "accuracy",
    "score": 0.75,
    "n": 500,
    "low": 0.7102,
    "high": 0.7859,
    "checkpoint": "tiny/grpo/abcd1234/published/step_000100",
    "comparability": "0123456789abcdef",
}


@pytest.fixture
def artifacts(tmp_path):
    rows = [ROW, ROW | {"stage": "sft", "score": 0.5, "low": 0.4563, "high": 0.5437}, ROW | {"experiment": "other"}]
    write_json(tmp_path / "leaderboard.json", rows)
    page = tmp_path / "tiny/reports/grpo_held_out/abcd1234/report.md"
    page.parent.mkdir(parents=True)
    page.write_text("report")
    return tmp_path


def test_the_leaderboard_shows_scores_with_intervals_the_report_and_the_next_line(artifacts):
    result = CliRunner().invoke(app, ["leaderboard", "tiny", "--artifacts", str(artifacts)], env={"COLUMNS": "150"})
    assert result.exit_code == 0
    words = result.output
    assert [
        word for word in ("75.0%", "71.0%", "78.6%", "500", "50.0%", "make dev", "report.md") if word not in words
    ] == []
    assert "other" not in words


def test_an_experiment_without_scores_is_an_error(artifacts):
    result = CliRunner().invoke(app, ["leaderboard", "absent", "--artifacts", str(artifacts)])
    assert result.exit_code == 2
    assert "no scores of 'absent'" in result.output


def test_of_each_report_the_newest_page_is_named(artifacts):
    folder = artifacts / "tiny" / "reports"
    newer = folder / "grpo_held_out" / "ffff0000" / "report.md"
    newer.parent.mkdir()
    newer.write_text("newer")
    assert newest_reports(folder) == [newer]


def test_the_schema_refuses_what_the_loader_refuses(tmp_path):
    file = tmp_path / "schema.json"
    assert CliRunner().invoke(app, ["schema", "--output", str(file)]).exit_code == 0
    described = json.loads(file.read_text())
    assert described["additionalProperties"] is False
    assert described["$defs"]["GRPOConfig"]["properties"]["group_size"]["minimum"] == 2
    assert json.loads(CliRunner().invoke(app, ["schema"]).output) == described
