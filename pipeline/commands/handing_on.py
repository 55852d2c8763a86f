"""A model for others: `export` to a folder, `serve` to programs on this machine."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.commands.options import (
    ArtifactsOption,
    DeviceOption,
    ExperimentArgument,
    ExperimentsOption,
    StageOption,
    known_stage,
    workshop,
)

if TYPE_CHECKING:
    from pipeline.local import Workshop


def export(
    experiment: ExperimentArgument,
    directory: Annotated[Path, typer.Argument(help="A new folder for the model.", show_default=False)],
    stage: StageOption = None,
    bits: Annotated[int | None, typer.Option(help="Quantise the weights to so many bits: 2, 3, 4, 6 or 8.")] = None,
    hf: Annotated[bool, typer.Option("--hf", help="As transformers loads it: unquantised.")] = False,
    artifacts: ArtifactsOption = "artifacts",
    experiments: ExperimentsOption = None,
) -> None:
    """Write a trained stage's model, adapters fused, with a model card that carries its scores."""
    from pipeline.export import export_model
    from pipeline.pages.gather import newest_reports

    work = workshop(experiment, artifacts=artifacts, experiments=experiments)
    chosen = known_stage(work, stage)
    found = newest_reports(work.runs.directory, work.entry.experiment.name)
    reports = [one.report for one in found if one.report.model.stage == chosen]
    export_model(model_folder(work, chosen), directory, work.entry.experiment, chosen, reports, bits=bits, hf=hf)
    print(directory)


def serve(
    experiment: ExperimentArgument,
    stage: StageOption = None,
    port: Annotated[int, typer.Option(help="On 127.0.0.1.")] = 8080,
    token: Annotated[
        str | None,
        typer.Option(envvar="MLX_RL_TOKEN", show_envvar=True, help="Bearer token; a command line is no secret."),
    ] = None,
    artifacts: ArtifactsOption = "artifacts",
    experiments: ExperimentsOption = None,
    device: DeviceOption = "auto",
) -> None:
    """Answer the OpenAI API with a stage's model, or an exported folder's, on this machine only."""
    from pipeline.resources import DeviceSettings
    from pipeline.serving import serve_model

    if (Path(experiment) / "config.json").is_file():
        model, settings = Path(experiment), DeviceSettings.model_validate({"device": device})
    else:
        work = workshop(experiment, artifacts=artifacts, device=device, experiments=experiments)
        model, settings = model_folder(work, known_stage(work, stage)), work.device
    serve_model(model, port, token, settings)


def model_folder(work: "Workshop", stage: str) -> Path:
    """The model of a stage that is trained already, by Dagster or by `mlx-rl train`; the newest of the two.

    `ValueError` where there is none: to hand a model on is no reason to train one.
    """
    root = work.runs.directory / work.entry.experiment.name / stage
    folders = [*root.glob("*/published/*/model"), *(root.glob("**/model") if stage == "base" else [])]
    whole = [folder for folder in folders if not any(part.startswith(".") for part in folder.relative_to(root).parts)]
    if not whole:
        name = work.entry.experiment.name
        raise ValueError(f"no {stage} model in {root} yet; train one: mlx-rl train {name} --stage {stage}")
    return max(whole, key=lambda folder: (folder.parent / "manifest.json").stat().st_mtime)
