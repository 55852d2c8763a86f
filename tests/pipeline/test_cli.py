import json

import pytest
from typer.testing import CliRunner

from configs.atomic import write_json
from configs.loader import load_experiment
from pipeline.cli import app, main
from pipeline.samples import SampleFiles

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
    assert isinstance(result.exception, ValueError)
    assert "no scores of 'absent'" in str(result.exception)


def test_of_each_report_the_newest_page_is_named(artifacts):
    folder = artifacts / "tiny" / "reports"
    newer = folder / "grpo_held_out" / "ffff0000" / "report.md"
    newer.parent.mkdir()
    newer.write_text("newer")
    output = CliRunner().invoke(app, ["leaderboard", "tiny", "--artifacts", str(artifacts)]).output
    assert output.split("Reports of tiny:")[1].split("\n\n")[0].split() == [str(newer)]


def test_the_schema_refuses_what_the_loader_refuses(tmp_path):
    file = tmp_path / "schema.json"
    assert CliRunner().invoke(app, ["schema", "--output", str(file)]).exit_code == 0
    described = json.loads(file.read_text())
    assert described["additionalProperties"] is False
    assert described["$defs"]["GRPOConfig"]["properties"]["group_size"]["minimum"] == 2
    assert json.loads(CliRunner().invoke(app, ["schema"]).output) == described


# ---- init ----------------------------------------------------------------------------------------------------------


ROW_OF_DATA = {"question": "1 + 2 =", "worked": "1 + 2 = 3\n#### 3", "answer": 3}


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A folder outside the repository, with data in it."""
    (tmp_path / "sums.jsonl").write_text(json.dumps(ROW_OF_DATA) + "\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("algorithm", ["grpo", "ppo", "sft"])
@pytest.mark.parametrize("model", ["scratch", "./a/model"])
@pytest.mark.parametrize("data", ["sums.jsonl", "chain_sum"])
def test_what_init_writes_loads_and_says_what_was_asked_for(algorithm, model, data, elsewhere):
    columns = ["--target", "worked"] if data == "sums.jsonl" else []
    flags = ["--data", data, "--model", model, "--algorithm", algorithm, *columns]
    result = CliRunner().invoke(app, ["init", "mine", *flags], catch_exceptions=False)
    assert result.exit_code == 0
    made = load_experiment(elsewhere / "mine.yaml")
    assert made.stages[-1] == algorithm
    assert made.model.kind == ("scratch" if model == "scratch" else "pretrained")
    assert made.dataset.fields.answer == "answer"
    assert made.dataset.train.kind == ("jsonl" if data == "sums.jsonl" else "reasoning_gym")
    assert "mlx-rl train mine.yaml" in result.output


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["Mine"], "name: String should match pattern"),
        (["mine", "--data", "absent.jsonl"], "no readable JSON lines"),
        (["mine", "--data", "sums.jsonl", "--prompt", "qestion"], "no column 'qestion'; there are"),
        (["mine", "--data", "sums.jsonl", "--model", "scratch", "--target", "nope"], "no column 'nope'"),
        (["mine", "--reward", "nope"], "unknown reward 'nope'"),
        (["mine", "--algorithm", "dpo"], "none of grpo, ppo, sft"),
    ],
)
def test_what_init_refuses_is_one_message_and_leaves_no_file(flags, words, elsewhere, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["mlx-rl", "init", *flags])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 1
    assert words in capsys.readouterr().err
    assert list(elsewhere.glob("*.yaml")) == []


# ---- samples, doctor, completion -----------------------------------------------------------------------------------


@pytest.fixture
def sampled(tmp_path):
    files = SampleFiles(tmp_path / "tiny" / "grpo" / "abcd" / "samples")
    for step in (1, 2):
        row = {"step": step, "prompt": "1 + 1 =", "answer": "2", "tokens": 3, "truncated": False}
        says = f"step {step} \x1b[2J\u202e says"
        files.write(
            [
                {**row, "completion": f"{says} {r}", "reward": r, "rewards": {"a": r}, "advantage": r - 0.5}
                for r in (0.0, 1.0)
            ]
        )
    return tmp_path


def test_samples_shows_the_newest_step_best_first_and_obeys_no_control_character(sampled):
    shown = CliRunner().invoke(app, ["samples", "tiny", "--artifacts", str(sampled)], catch_exceptions=False).output
    assert "step 2 \\x1b[2J\\u202e says 1.0" in shown
    assert "\x1b[2J" not in shown
    assert shown.index("says 1.0") < shown.index("says 0.0")
    assert "mean reward 0.5" in shown


def test_samples_of_a_step_that_is_not_there_say_which_are(sampled):
    result = CliRunner().invoke(app, ["samples", "tiny", "--step", "7", "--artifacts", str(sampled)])
    assert "there are steps 1 to 2" in str(result.exception)


def test_doctor_names_device_blas_memory_and_sandbox():
    result = CliRunner().invoke(app, ["doctor"])
    names = {line.split()[1] for line in result.output.splitlines() if not line.startswith(" ")}
    assert {"python", "device", "memory", "blas", "compile", "sandbox", "disk", "versions"} <= names
    assert result.exit_code == 0


def test_the_shell_completes_commands_and_experiments():
    def completed(words: str, place: int) -> list[str]:
        variables = {"_MLX_RL_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(place)}
        return CliRunner().invoke(app, [], prog_name="mlx-rl", env=variables).output.split()

    assert completed("mlx-rl ex", 1) == ["export"]
    assert completed("mlx-rl train quick", 2) == ["quickstart"]
