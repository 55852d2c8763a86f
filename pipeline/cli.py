"""The command line, over the same functions as the assets."""

import json
from pathlib import Path
from typing import Annotated

import typer

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


def main() -> None:
    """A settings error is a message, not a traceback."""
    try:
        app()
    except (ValueError, FileNotFoundError) as error:
        typer.secho(f"error: {error}", fg=typer.colors.RED, err=True)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
