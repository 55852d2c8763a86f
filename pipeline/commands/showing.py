"""What there is: `leaderboard`, `report`, `compare`, `samples`, `schema`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from pipeline.commands.options import ArtifactsOption, ExperimentArgument, StageOption, complete_experiment

OptionalExperiment = Annotated[
    str | None, typer.Argument(help="Only this experiment.", autocompletion=complete_experiment, show_default=False)
]


def leaderboard(experiment: OptionalExperiment = None, artifacts: ArtifactsOption = "artifacts") -> None:
    """Show the scores with their 95% intervals, and where the reports are."""
    from rich.console import Console

    from pipeline.evaluation.leaderboard import read_leaderboard, render_table
    from pipeline.evaluation.report_files import PAGE
    from pipeline.pages.gather import newest_folders
    from pipeline.pages.render import REPORT_PAGE
    from pipeline.resources import RunStore

    runs = RunStore(root=artifacts)
    rows = [row for row in read_leaderboard(runs.leaderboard) if experiment in (None, row.experiment)]
    if not rows:
        raise ValueError(f"no scores{f' of {experiment!r}' if experiment else ''} in {runs.leaderboard} yet")
    Console().print(render_table(rows))
    for name in sorted({row.experiment for row in rows}):
        folder = runs.directory / name
        page = [folder / REPORT_PAGE] if (folder / REPORT_PAGE).is_file() else []
        reports = sorted(found / PAGE for found in newest_folders((folder / "reports").glob(f"*/*/{PAGE}")))
        print(f"Reports of {name}:", *page, *reports, sep="\n  ")
    print("\nLook at it in the UI: make dev")


def report(experiment: OptionalExperiment = None, artifacts: ArtifactsOption = "artifacts") -> None:
    """Write the HTML page of an experiment (of all if absent), and the leaderboard's; they open from disk."""
    from pipeline.pages.render import write_pages
    from pipeline.resources import RunStore

    runs = RunStore(root=artifacts)
    print(*write_pages(runs.directory, runs.leaderboard, experiment), sep="\n")


def compare(
    one: Annotated[str, typer.Argument(help="A report's folder, or experiment/stage, as quickstart/sft.")],
    other: Annotated[str, typer.Argument(help="What to compare with it.")],
    metric: Annotated[str | None, typer.Option(help="The headline if absent.")] = None,
    artifacts: ArtifactsOption = "artifacts",
) -> None:
    """Compare reports problem by problem, and say what may be said: OTHER against ONE."""
    from pipeline.evaluation.compare import compare_reports
    from pipeline.resources import RunStore

    root = RunStore(root=artifacts).directory
    first, second = find_reports(root, one), find_reports(root, other)
    # Two folders are two reports whatever their names; of two stages the reports of the same benchmark are meant.
    shared = [""] if first.keys() == {""} or second.keys() == {""} else sorted(first.keys() & second.keys())
    if not shared:
        raise ValueError(f"no benchmark in both: {one} has {sorted(first)}, {other} has {sorted(second)}")
    for name in shared:
        before, after = (found.get(name) or next(iter(found.values())) for found in (first, second))
        print(f"{name}: " if name else "", compare_reports(before, after, metric).sentence(), sep="")


def find_reports(root: Path, name: str) -> dict[str, Path]:
    """A report's folder itself (under the name ""), or the newest reports of `experiment/stage` by benchmark.

    `ValueError` where there are none.
    """
    from pipeline.evaluation.report_files import REPORT
    from pipeline.pages.gather import experiments, newest_reports

    if (Path(name) / REPORT).is_file():
        return {"": Path(name)}
    experiment, _, stage = name.strip("/").partition("/")
    reports = newest_reports(root, experiment) if experiment in experiments(root) else []
    found = {one.report.name: one.folder for one in reports if one.report.model.stage == stage}
    if not found:
        there = sorted({f"{experiment}/{one.report.model.stage}" for one in reports}) or experiments(root)
        raise ValueError(f"{name}: neither a report's folder nor an evaluated experiment/stage of {root}: {there}")
    return found


def samples(
    experiment: ExperimentArgument,
    stage: StageOption = None,
    step: Annotated[int | None, typer.Option(help="The newest one if absent.")] = None,
    groups: Annotated[int, typer.Option(min=1, help="How many prompts.")] = 2,
    completions: Annotated[int, typer.Option(min=1, help="How many of each group.")] = 4,
    artifacts: ArtifactsOption = "artifacts",
) -> None:
    """Show what a training sampled: prompts, their completions, rewards, advantages."""
    from rich.console import Console

    from pipeline.resources import RunStore
    from pipeline.sampled import find_samples, show_groups

    name = Path(experiment).stem if experiment.endswith(".yaml") else experiment
    file = find_samples(RunStore(root=artifacts).directory, name, stage, step)
    Console().print(show_groups(file, groups, completions))


def schema(
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write to this file instead.")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="As a page for people.")] = False,
) -> None:
    """Write the JSON schema of experiments, which editors complete from."""
    from configs import reference
    from configs.atomic import write_text
    from configs.schema import ExperimentConfig

    described = json.dumps(ExperimentConfig.model_json_schema(), indent=2, sort_keys=True) + "\n"
    text = reference.markdown() if markdown else described
    if output is None:
        print(text, end="")
    else:
        write_text(output, text)
