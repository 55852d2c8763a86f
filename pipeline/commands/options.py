"""What the commands have in common: their options, and the experiment that they work on."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from pipeline.local import Workshop


def complete_experiment(incomplete: str) -> list[str]:
    """The names of the repository's experiments, for the shell."""
    from configs.loader import EXPERIMENTS

    return sorted(file.stem for file in EXPERIMENTS.glob("*.yaml") if file.stem.startswith(incomplete))


def complete_stage(incomplete: str) -> list[str]:
    return [stage for stage in ("base", "sft", "grpo", "ppo", "rl") if stage.startswith(incomplete)]


ArtifactsOption = Annotated[
    str, typer.Option(envvar="MLX_RL_ARTIFACTS", help="Root of all artifacts, relative to the repository.")
]
ExperimentsOption = Annotated[
    Path | None, typer.Option(envvar="MLX_RL_EXPERIMENTS", help="Folder of experiments, where not configs/experiments.")
]
ExperimentArgument = Annotated[
    str,
    typer.Argument(
        help="An experiment's name, or the path of its YAML file.",
        autocompletion=complete_experiment,
        show_default=False,
    ),
]
StageOption = Annotated[
    str | None,
    typer.Option(
        help="base, sft, grpo, ppo or rl; the last one of the experiment if absent.", autocompletion=complete_stage
    ),
]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", help="section.field=value, over the file; may be repeated.")
]
ModelPathOption = Annotated[str | None, typer.Option(help="A local copy of the model.")]
DataPathOption = Annotated[str | None, typer.Option(help="A JSON-lines file instead of the training data.")]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu or gpu.")]


def workshop(
    experiment: str,
    settings: list[str] | None = None,
    model_path: str | None = None,
    data_path: str | None = None,
    artifacts: str = "artifacts",
    device: str = "auto",
    experiments: Path | None = None,
) -> "Workshop":
    """The experiment and its folders. `ValueError` names the file and the field that is refused."""
    from configs.loader import EXPERIMENTS
    from pipeline.catalog import load_entry
    from pipeline.local import Workshop, overrides
    from pipeline.resources import DeviceSettings, RunStore

    if device not in ("auto", "cpu", "gpu"):
        raise ValueError(f"--device: {device!r} is none of auto, cpu, gpu")
    folder = (experiments or EXPERIMENTS).expanduser()
    file = Path(experiment) if experiment.endswith((".yaml", ".yml")) else folder / f"{experiment}.yaml"
    entry = load_entry(file, overrides(settings or [], model_path, data_path))
    return Workshop(entry, RunStore(root=artifacts), DeviceSettings.model_validate({"device": device}))


def known_stage(work: "Workshop", stage: str | None) -> str:
    """The stage that is meant. `ValueError` lists those there are."""
    stages = work.entry.experiment.stages
    if stage is not None and stage not in stages:
        raise ValueError(f"stage {stage!r} is not in {work.entry.source}; there are {list(stages)}")
    return stage or stages[-1]
