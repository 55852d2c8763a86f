"""From data to scores: `preprocess`, `train`, `evaluate`."""

from typing import Annotated

import typer

from pipeline.commands.options import (
    ArtifactsOption,
    DataPathOption,
    DeviceOption,
    ExperimentArgument,
    ExperimentsOption,
    ModelPathOption,
    SetOption,
    StageOption,
    known_stage,
    workshop,
)


def preprocess(
    experiment: ExperimentArgument,
    settings: SetOption = None,
    data_path: DataPathOption = None,
    artifacts: ArtifactsOption = "artifacts",
    experiments: ExperimentsOption = None,
) -> None:
    """Load, clean and split the experiment's dataset."""
    from pipeline.data.store import read_summary

    folder = workshop(experiment, settings, None, data_path, artifacts, experiments=experiments).dataset()
    summary = read_summary(folder)
    print(f"{summary.train} train, {summary.test} test, {summary.rejected} set aside: {folder}")


def train(
    experiment: ExperimentArgument,
    stage: StageOption = None,
    settings: SetOption = None,
    model_path: ModelPathOption = None,
    data_path: DataPathOption = None,
    artifacts: ArtifactsOption = "artifacts",
    experiments: ExperimentsOption = None,
    device: DeviceOption = "auto",
) -> None:
    """Train a stage, and the stages that it starts from; a training that was interrupted goes on."""
    work = workshop(experiment, settings, model_path, data_path, artifacts, device, experiments)
    reference = work.checkpoint(known_stage(work, stage))
    print(f"{reference.stage} after {reference.step} steps: {work.runs.locate(reference.path) / 'model'}")


def evaluate(
    experiment: ExperimentArgument,
    stage: StageOption = None,
    benchmark: Annotated[str | None, typer.Option(help="One of the experiment's evaluations; all if absent.")] = None,
    settings: SetOption = None,
    model_path: ModelPathOption = None,
    data_path: DataPathOption = None,
    artifacts: ArtifactsOption = "artifacts",
    experiments: ExperimentsOption = None,
    device: DeviceOption = "auto",
) -> None:
    """Put the experiment's benchmarks to a stage's model, which is trained first where it isn't there."""
    from pipeline.evaluation.report_page import headline

    work = workshop(experiment, settings, model_path, data_path, artifacts, device, experiments)
    chosen = [e for e in work.entry.experiment.evaluations if benchmark in (None, e.key)]
    if not chosen:
        known = [evaluation.key for evaluation in work.entry.experiment.evaluations]
        raise ValueError(f"no evaluation {benchmark!r} in {work.entry.source}; there are {known}")
    for evaluation in chosen:
        report, folder = work.evaluate(known_stage(work, stage), evaluation)
        print(f"{headline(report)}: {folder}")
    print(f"page: {work.publish()}")
