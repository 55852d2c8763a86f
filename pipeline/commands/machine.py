"""`doctor`: is this machine fit for the work?"""

import typer

from pipeline.commands.options import ArtifactsOption

MARKS = {"ok": ("ok", "green"), "slow": ("slow", "yellow"), "missing": ("--", "yellow"), "broken": ("no", "red")}


def doctor(artifacts: ArtifactsOption = "artifacts") -> None:
    """Say what this machine has (device, BLAS, memory, sandbox, versions), what is missing, and what mends it.

    Exits with 1 where nothing works before something is mended.
    """
    import warnings

    from pipeline.doctor import examine
    from pipeline.resources import RunStore, project_root

    broken = False
    with warnings.catch_warnings(action="ignore"):  # they say what the findings say
        for found in examine(RunStore(root=artifacts).directory, project_root()):
            broken = broken or found.state == "broken"
            word, colour = MARKS[found.state]
            typer.echo(f"{typer.style(f'{word:4}', fg=colour)} {found.name:16} {found.words}")
            if found.fix:
                typer.echo(f"{'':21} fix: {found.fix}")
    if broken:
        raise typer.Exit(1)
