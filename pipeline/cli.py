"""The command line, over the same functions as the assets."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from pipeline.local import Workshop

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, help="Post-train language models on MLX.")

ArtifactsOption = Annotated[str, typer.Option(help="Root of all artifacts, relative to the repository.")]


@app.callback()
def commands() -> None:
    """Keeps a sub-command's name necessary, however few there are."""


@app.command()
def leaderboard(
    experiment: Annotated[str | None, typer.Argument(help="Only this experiment's scores.")] = None,
    artifacts: ArtifactsOption = "artifacts",
) -> None:
    """Show the scores with their 95% intervals, and where the reports are."""
    from rich.console import Console

    from pipeline.evaluation.leaderboard import read_leaderboard, render_table
    from pipeline.resources import RunStore

    runs = RunStore(root=artifacts)
    rows = [row for row in read_leaderboard(runs.leaderboard) if experiment in (None, row.experiment)]
    if not rows:
        raise typer.BadParameter(f"no scores{f' of {experiment!r}' if experiment else ''} in {runs.leaderboard} yet")
    Console().print(render_table(rows))
    for name in sorted({row.experiment for row in rows}):
        newest = newest_reports(runs.directory / name / "reports")
        print(f"Reports of {name}:", *newest, sep="\n  ")
    print("\nLook at it in the UI: make dev")


def newest_reports(folder: Path) -> list[Path]:
    """The newest page of each report, by stage and evaluation."""
    names = sorted(folder.iterdir()) if folder.is_dir() else []
    pages = [sorted(name.glob("*/report.md"), key=lambda page: page.stat().st_mtime) for name in names]
    return [found[-1] for found in pages if found]


@app.command()
def schema(
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write to this file instead.")] = None,
) -> None:
    """Write the JSON schema of experiments, which editors complete from."""
    from configs.atomic import write_json
    from configs.schema import ExperimentConfig

    described = ExperimentConfig.model_json_schema()
    if output is None:
        print(json.dumps(described, indent=2, sort_keys=True))
    else:
        write_json(output, described)


ExperimentArgument = Annotated[str, typer.Argument(help="An experiment's name, or the path of its YAML file.")]
StageOption = Annotated[
    str | None, typer.Option(help="base, sft, grpo or ppo; the last one of the experiment if absent.")
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
) -> "Workshop":
    """The experiment and its folders. `ValueError` names the file and the field that is refused."""
    from configs.loader import EXPERIMENTS
    from pipeline.catalog import load_entry
    from pipeline.local import Workshop, overrides
    from pipeline.resources import DeviceSettings, RunStore

    file = Path(experiment) if experiment.endswith(".yaml") else EXPERIMENTS / f"{experiment}.yaml"
    entry = load_entry(file, overrides(settings or [], model_path, data_path))
    return Workshop(entry, RunStore(root=artifacts), DeviceSettings.model_validate({"device": device}))


@app.command()
def preprocess(
    experiment: ExperimentArgument,
    settings: SetOption = None,
    data_path: DataPathOption = None,
    artifacts: ArtifactsOption = "artifacts",
) -> None:
    """Load, clean and split the experiment's dataset."""
    from pipeline.data.store import read_summary

    folder = workshop(experiment, settings, None, data_path, artifacts).dataset()
    summary = read_summary(folder)
    print(f"{summary.train} train, {summary.test} test, {summary.rejected} set aside: {folder}")


@app.command()
def train(
    experiment: ExperimentArgument,
    stage: StageOption = None,
    settings: SetOption = None,
    model_path: ModelPathOption = None,
    data_path: DataPathOption = None,
    artifacts: ArtifactsOption = "artifacts",
    device: DeviceOption = "auto",
) -> None:
    """Train a stage, and the stages that it starts from; a training that was interrupted goes on."""
    work = workshop(experiment, settings, model_path, data_path, artifacts, device)
    reference = work.checkpoint(known_stage(work, stage))
    print(f"{reference.stage} after {reference.step} steps: {work.runs.locate(reference.path) / 'model'}")


@app.command()
def evaluate(
    experiment: ExperimentArgument,
    stage: StageOption = None,
    benchmark: Annotated[str | None, typer.Option(help="One of the experiment's evaluations; all if absent.")] = None,
    settings: SetOption = None,
    model_path: ModelPathOption = None,
    data_path: DataPathOption = None,
    artifacts: ArtifactsOption = "artifacts",
    device: DeviceOption = "auto",
) -> None:
    """Put the experiment's benchmarks to a stage's model, which is trained first where it isn't there."""
    work = workshop(experiment, settings, model_path, data_path, artifacts, device)
    chosen = [e for e in work.entry.experiment.evaluations if benchmark in (None, e.key)]
    if not chosen:
        known = [evaluation.key for evaluation in work.entry.experiment.evaluations]
        raise ValueError(f"no evaluation {benchmark!r} in {work.entry.source}; there are {known}")
    for evaluation in chosen:
        report, folder = work.evaluate(known_stage(work, stage), evaluation)
        head = report.headline
        print(f"{report.name}: {head.name} {head.score:.3f} [{head.low:.3f}, {head.high:.3f}] n={head.n}: {folder}")


@app.command()
def export(
    experiment: ExperimentArgument,
    directory: Annotated[Path, typer.Argument(help="A new folder for the model.")],
    stage: StageOption = None,
    bits: Annotated[int | None, typer.Option(help="Quantise the weights to so many bits.")] = None,
    artifacts: ArtifactsOption = "artifacts",
) -> None:
    """Copy a stage's model, adapters fused, to a folder that mlx-lm and transformers load."""
    work = workshop(experiment, artifacts=artifacts)
    source = work.runs.locate(work.checkpoint(known_stage(work, stage)).path) / "model"
    if directory.exists():
        raise ValueError(f"{directory} exists; name a new folder")
    if bits is None:
        from mlx_ops.model import copy_model

        copy_model(source, directory)
    else:
        from mlx_lm import convert

        convert(str(source), str(directory), quantize=True, q_bits=bits)
    print(directory)


@app.command()
def serve(
    experiment: ExperimentArgument,
    stage: StageOption = None,
    port: Annotated[int, typer.Option(help="On 127.0.0.1.")] = 8080,
    artifacts: ArtifactsOption = "artifacts",
) -> None:
    """Answer the OpenAI API with a stage's model, through mlx-lm's server, on this machine only."""
    import subprocess
    import sys

    work = workshop(experiment, artifacts=artifacts)
    model = work.runs.locate(work.checkpoint(known_stage(work, stage)).path) / "model"
    from mlx_ops.model import load_policy

    load_policy(model)  # a model that doesn't load is an error here, not at the first request
    command = [
        sys.executable,
        "-m",
        "mlx_lm",
        "server",
        "--model",
        str(model),
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    raise SystemExit(subprocess.run(command, check=False).returncode)


@app.command()
def compare(
    one: Annotated[Path, typer.Argument(help="A report's folder.")],
    other: Annotated[Path, typer.Argument(help="Another report's folder.")],
) -> None:
    """Compare two reports problem by problem, and say what may be said."""
    from pipeline.evaluation.compare import compare_reports

    print(compare_reports(one, other).sentence())


@app.command()
def doctor() -> None:
    """Say what this machine has: device, BLAS, memory, sandbox, versions."""
    import platform

    from mlx_ops.backend import prepare
    from pipeline.provenance import collect
    from pipeline.resources import project_root

    backend = prepare()
    made = collect(project_root(), device=backend.name)
    print(f"device    {backend.kind}: {backend.name}, {backend.memory_bytes / 1e9:.1f} GB for arrays, {backend.dtype}")
    print(f"blas      {backend.blas}" + (f", {backend.gflops:.0f} GFLOP/s" if backend.gflops else ""))
    print(f"compile   {'mx.compile fuses' if backend.compiles else 'no C++ compiler: mx.compile stays off'}")
    print(f"sandbox   {sandbox()}")
    print(f"python    {platform.python_version()} on {made.system} {made.machine}")
    print("versions  " + ", ".join(f"{name} {version}" for name, version in made.versions.items()))


def sandbox() -> str:
    """The sandbox that programs would run in, or what is missing."""
    from rewards.sandbox import Judge

    try:
        with Judge() as judge:
            return judge.backend
    except RuntimeError as error:
        return f"none: {error}"


def known_stage(work: "Workshop", stage: str | None) -> str:
    """The stage that is meant. `ValueError` lists those there are."""
    stages = work.entry.experiment.stages
    if stage is not None and stage not in stages:
        raise ValueError(f"stage {stage!r} is not in {work.entry.source}; there are {list(stages)}")
    return stage or stages[-1]


def main() -> None:
    """A settings error is a message, not a traceback."""
    try:
        app()
    except (ValueError, FileNotFoundError) as error:
        typer.secho(f"error: {error}", fg=typer.colors.RED, err=True)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
