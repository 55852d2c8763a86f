"""The command line's own way from data to a report, without Dagster."""

import json

import mlx_lm
import pytest
from typer.testing import CliRunner

from pipeline.cli import app, main


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_train_evaluate_and_export_go_from_data_to_a_model_that_mlx_lm_loads(write_experiment, tmp_path):
    file, artifacts = write_experiment(), tmp_path / "artifacts"
    assert "train" in run("preprocess", file, "--artifacts", artifacts)
    assert "grpo after 3 steps" in run("train", file, "--artifacts", artifacts)
    metrics = artifacts / "tiny" / "grpo" / "cli" / "metrics.jsonl"
    before = metrics.read_text()
    shown = run("evaluate", file, "--artifacts", artifacts)
    assert "held_out: accuracy" in shown
    assert "n=4" in shown
    assert metrics.read_text() == before, "a finished training is not trained again"
    run("export", file, tmp_path / "out", "--artifacts", artifacts)
    _, tokenizer = mlx_lm.load(str(tmp_path / "out"))[:2]
    assert tokenizer.eos_token_id is not None


def test_a_setting_is_laid_over_the_file(write_experiment, tmp_path):
    run("train", write_experiment(), "--set", "grpo.steps=1", "--artifacts", tmp_path)
    lines = (tmp_path / "tiny" / "grpo" / "cli" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "nothing"], "nothing.yaml: no such file"),
        (["train", "quickstart", "--stage", "ppo"], "there are ['base', 'sft', 'grpo']"),
        (["train", "quickstart", "--set", "grpo.stepz=1"], "grpo.stepz: unknown key"),
        (["train", "quickstart", "--set", "grpo.learning_rate=.nan"], "grpo.learning_rate"),
        (["train", "quickstart", "--model-path", "./nowhere", "--set", "model.kind=pretrained"], "model."),
    ],
)
def test_what_is_refused_is_one_message_and_exit_code_1(arguments, words, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["mlx-rl", *arguments])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 1
    shown = capsys.readouterr().err
    assert words in shown
    assert "Traceback" not in shown
