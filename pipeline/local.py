"""An experiment without Dagster: the same functions as the assets, in the same folders, under the run name `cli`.

What is there already, made by the same settings, is used as it is; a training that was interrupted goes on.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from configs.atomic import folder_fault, sha256, verify
from configs.loader import digest
from configs.schema import EvaluationConfig, ExperimentConfig
from pipeline.catalog import Entry
from pipeline.io_manager import find_ref
from pipeline.keys import model_key, start_stage
from pipeline.lock import owned
from pipeline.monitoring import open_reporter
from pipeline.refs import CheckpointRef
from pipeline.resources import DeviceSettings, RunStore
from pipeline.sinks import RunInfo
from pipeline.versions import base_version, dataset_version

if TYPE_CHECKING:
    from pipeline.evaluation.report import EvaluationReport

RUN = "cli"


@dataclass(frozen=True)
class Workshop:
    """Where an experiment is worked on, and with what."""

    entry: Entry
    runs: RunStore
    device: DeviceSettings

    def dataset(self) -> Path:
        """The preprocessed dataset's folder. `ValueError` for data that can't be used."""
        from pipeline.data.store import build_dataset

        config = self.entry.experiment.dataset
        folder = self.runs.dataset_dir(config.name, dataset_version(config))
        if not folder.is_dir():
            self.entry.load_plugins()
            build_dataset(config, folder)
        return folder

    def checkpoint(self, stage: str) -> CheckpointRef:
        """The published checkpoint of a stage, trained now (with the stages before it) where it isn't there."""
        return self._base() if stage == "base" else self._trained(stage)

    def evaluate(self, stage: str, evaluation: EvaluationConfig) -> tuple["EvaluationReport", Path]:
        """The report of a stage's model, and its folder."""
        from pipeline.evaluate import Subject, evaluate_checkpoint

        self.entry.load_plugins()
        checkpoint = self._made_by_a_job(stage) or self.checkpoint(stage)
        folder = self._folder("reports") / f"{stage}_{evaluation.key}" / RUN
        subject = Subject(checkpoint, self.runs.locate(checkpoint.path), self.dataset())
        return evaluate_checkpoint(self.entry.experiment, evaluation, subject, folder, self.device), folder

    def _made_by_a_job(self, stage: str) -> CheckpointRef | None:
        """What Dagster made by these settings, where nothing was trained here and it is there whole."""
        experiment = self.entry.experiment
        ref = find_ref(self.runs.directory, model_key(experiment.name, stage), CheckpointRef)
        here = (self._folder(stage) / RUN).is_dir()
        if ref is None or here or ref.config_digest != _settings_digest(experiment, stage):
            return None
        return None if folder_fault(self.runs.locate(ref.path)) else ref

    def publish(self) -> Path:
        """Put the experiment's reports into the leaderboard and onto its page; the page's path."""
        from pipeline.evaluation.leaderboard import update_leaderboard
        from pipeline.pages.gather import newest_reports
        from pipeline.pages.render import write_pages

        name = self.entry.experiment.name
        update_leaderboard((one.report for one in newest_reports(self.runs.directory, name)), self.runs.leaderboard)
        return write_pages(self.runs.directory, self.runs.leaderboard, name)[0]

    def _folder(self, name: str) -> Path:
        return self.runs.directory / self.entry.experiment.name / name

    def _base(self) -> CheckpointRef:
        from pipeline.train import make_base

        experiment = self.entry.experiment
        folder = self._folder("base") / RUN / base_version(experiment)
        if not folder.is_dir():
            make_base(experiment, self.dataset(), folder, self.device)
        verify(folder)
        return self._reference(folder, "base", 0)

    def _trained(self, stage: str) -> CheckpointRef:
        from pipeline.job import Job
        from pipeline.train import train_stage

        experiment = self.entry.experiment
        start = self.checkpoint(start_stage(experiment, stage))
        directory = self._folder(stage) / RUN
        section = getattr(experiment, stage)
        info = RunInfo(
            experiment=experiment.name,
            stage=stage,
            run=RUN,
            directory=directory,
            steps=section.steps,
            settings=experiment.model_dump(mode="json"),
        )
        self.entry.load_plugins()
        with owned(directory, RUN), open_reporter(info, experiment.monitoring) as reporter:
            job = Job(experiment, self.dataset(), self.runs.locate(start.path), directory, self.device, reporter)
            trained = train_stage(job, stage)  # pyright: ignore[reportArgumentType]
            reporter.published(trained.checkpoint)
        return self._reference(trained.checkpoint, stage, trained.step)

    def _reference(self, folder: Path, stage: str, step: int) -> CheckpointRef:
        experiment = self.entry.experiment
        return CheckpointRef(
            path=self.runs.relative(folder),
            stage=stage,  # pyright: ignore[reportArgumentType] (validated by the reference)
            step=step,
            config_digest=_settings_digest(experiment, stage),
            sha256=sha256(folder / "manifest.json"),
        )


def _settings_digest(experiment: ExperimentConfig, stage: str) -> str:
    return digest(getattr(experiment, stage, None) or experiment.model)


def overrides(settings: Sequence[str], model_path: str | None, data_path: str | None) -> list[str]:
    """`--set` values, and a local copy of the model and of the training data (a JSON-lines file)."""
    extra = [*settings]
    if model_path is not None:
        extra.append(f"model.path={model_path}")
    if data_path is not None:
        extra.append(f"dataset.train={{kind: jsonl, path: '{data_path}'}}")
        extra.append("dataset.test=null")
    return extra
