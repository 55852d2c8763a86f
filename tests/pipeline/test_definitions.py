"""The definitions as Dagster's own commands load them."""

import os
import subprocess
import sys
from pathlib import Path

import dagster as dg
import pytest

ROOT = Path(__file__).parents[2]


def run_dagster(*arguments: str, folder: Path, home: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    home.mkdir(exist_ok=True)
    settings = {
        "DAGSTER_HOME": str(home),
        "MLX_RL_EXPERIMENTS": str(folder),
        "MLX_RL_ARTIFACTS": str(home / "artifacts"),
        "DAGSTER_DISABLE_TELEMETRY": "1",
    }
    return subprocess.run(
        [sys.executable, "-m", "dagster", *arguments],
        cwd=ROOT,
        env=os.environ | settings | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_the_experiments_of_the_repository_load():
    from pipeline.definitions import defs

    dg.Definitions.validate_loadable(defs())


def test_validate_passes_and_names_no_location_of_its_own(write_experiment, tmp_path):
    folder = write_experiment().parent
    done = run_dagster("definitions", "validate", "-m", "pipeline.definitions", folder=folder, home=tmp_path / "home")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "pipeline.definitions" in done.stdout + done.stderr


@pytest.mark.parametrize(
    "command",
    [
        ("definitions", "validate", "-m", "pipeline.definitions"),
        ("job", "execute", "-m", "pipeline.definitions", "-j", "tiny"),
    ],
    ids=["validate", "execute"],
)
def test_a_broken_file_is_an_error_of_each_command_that_names_file_and_field(write_experiment, tmp_path, command):
    folder = write_experiment(grpo={"stepz": 3}).parent
    done = run_dagster(*command, folder=folder, home=tmp_path / "home")
    assert done.returncode != 0
    assert f"{folder}/tiny.yaml: 1 setting(s) refused\n  grpo.stepz: unknown key (misspelt?) (got 3)" in (
        done.stdout + done.stderr
    )


def test_overrides_from_the_environment_reach_the_definitions(write_experiment, tmp_path):
    folder = write_experiment().parent
    done = run_dagster(
        "definitions",
        "validate",
        "-m",
        "pipeline.definitions",
        folder=folder,
        home=tmp_path / "home",
        MLX_RL_OVERRIDES="tiny:grpo.steps=0",
    )
    assert done.returncode != 0
    assert "grpo.steps: Input should be greater than 0 (got 0)" in done.stdout + done.stderr


def test_a_setting_that_is_refused_at_launch_is_named_and_nothing_runs(write_experiment, tmp_path):
    folder = write_experiment().parent
    config = tmp_path / "run.yaml"
    config.write_text("ops: {tiny__grpo_checkpoint: {config: {learning_rate: .nan}}}\n")
    done = run_dagster(
        "job",
        "execute",
        "-m",
        "pipeline.definitions",
        "-j",
        "tiny",
        "-c",
        str(config),
        folder=folder,
        home=tmp_path / "h",
    )
    assert done.returncode == 1
    assert "grpo.learning_rate: Input should be a finite number (got nan)" in done.stderr
    assert not (tmp_path / "h" / "artifacts").exists()


def test_a_typo_at_launch_is_named_with_its_place(write_experiment, tmp_path):
    folder = write_experiment().parent
    config = tmp_path / "run.yaml"
    config.write_text("ops: {tiny__grpo_checkpoint: {config: {stepz: 3}}}\n")
    done = run_dagster(
        "job",
        "execute",
        "-m",
        "pipeline.definitions",
        "-j",
        "tiny",
        "-c",
        str(config),
        folder=folder,
        home=tmp_path / "h",
    )
    assert done.returncode == 1
    assert 'unexpected config entry "stepz" at path root:ops:tiny__grpo_checkpoint:config' in done.stderr
