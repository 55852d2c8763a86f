"""What an experiment has left under the artifact root: its newest reports, and the runs of the models in them.

Only files are read, so a page can be made on another machine, from a copy of the folder, and without Dagster.
"""

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from configs.schema import Stage
from pipeline.evaluation.report import EvaluationReport
from pipeline.evaluation.report_files import REPORT, read_report
from pipeline.samples import SampleFiles
from pipeline.sinks import METRICS, read_metrics

STAGES: tuple[str, ...] = get_args(Stage)
SAMPLES = 4
"""Completions of the highest rewards, and as many of the lowest, each of another prompt."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Found:
    """A report and its folder."""

    report: EvaluationReport
    folder: Path

    @property
    def place(self) -> tuple[str, int]:
        """Benchmark by benchmark, and in each the stages in the order of training."""
        return self.report.name, STAGES.index(self.report.model.stage)


@dataclass(frozen=True)
class StageRun:
    """One training: its numbers, some of its completions, its settings."""

    stage: str
    directory: Path
    metrics: list[dict[str, Any]]
    best: list[dict[str, Any]]
    """Completions of the last step."""
    worst: list[dict[str, Any]]
    settings: dict[str, Any]
    """What the newest checkpoint says it was made with."""


def experiments(root: Path) -> list[str]:
    """The experiments that have a training or a report under `root`."""
    if not root.is_dir():
        return []
    runs = (file.relative_to(root).parts[0] for file in root.glob(f"*/*/*/{METRICS}"))
    reports = (file.relative_to(root).parts[0] for file in root.glob(f"*/reports/*/*/{REPORT}"))
    return sorted({*runs, *reports})


def newest_reports(root: Path, experiment: str) -> list[Found]:
    """The newest report of each stage and benchmark; one that can't be read is named in the log and passed over."""
    found = []
    for folder in newest_folders((root / experiment / "reports").glob(f"*/*/{REPORT}")):
        try:
            found.append(Found(read_report(folder), folder))
        except ValueError as error:
            log.warning("passed over: %s", error)
    return sorted(found, key=lambda one: one.place)


def stage_runs(root: Path, experiment: str, reports: Sequence[Found]) -> list[StageRun]:
    """The trainings that made the evaluated models; of a stage without a report, its newest."""
    newest = {folder.parent.name: folder for folder in newest_folders((root / experiment).glob(f"*/*/{METRICS}"))}
    evaluated = {one.report.model.stage: _run_directory(root, one.report) for one in reports}
    directories = newest | {stage: folder for stage, folder in evaluated.items() if folder is not None}
    return [stage_run(stage, directories[stage]) for stage in STAGES if stage in directories]


def stage_run(stage: str, directory: Path) -> StageRun:
    ordered = SampleFiles(directory / "samples").best_and_worst(10_000)
    best, worst = _of_different_prompts(ordered), _of_different_prompts(ordered[::-1])
    return StageRun(stage, directory, read_metrics(directory), best, worst, settings_of(directory))


def _of_different_prompts(samples: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    first = {sample["prompt"]: sample for sample in reversed(samples)}
    return [sample for sample in samples if first[sample["prompt"]] is sample][:SAMPLES]


def newest_folders(files: Iterator[Path]) -> list[Path]:
    """Of the files `…/<name>/<run>/<file>`, the folder of the newest of each name."""
    whole = [file for file in files if not file.parent.name.startswith(".")]
    newest = {file.parents[1]: file.parent for file in sorted(whole, key=lambda file: file.stat().st_mtime)}
    return list(newest.values())


def _run_directory(root: Path, report: EvaluationReport) -> Path | None:
    """`<experiment>/<stage>/<run>` of the evaluated checkpoint, where it is a training that is still there."""
    parts = Path(report.model.path).parts
    directory = root.joinpath(*parts[:3])
    return directory if len(parts) > 3 and ".." not in parts and (directory / METRICS).is_file() else None


def settings_of(directory: Path) -> dict[str, Any]:
    """What the newest checkpoint of a run directory was made with; empty where there is none."""
    states = sorted((directory / "checkpoints").glob("step_*/state.json"))
    return json.loads(states[-1].read_bytes()).get("settings", {}) if states else {}
