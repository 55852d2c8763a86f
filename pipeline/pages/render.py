"""Pages for people, each one file without script or network: a report of each experiment, a leaderboard across them.

Model text is hostile: the templates escape everything that they are given, and a policy in each page lets no script run
if they ever failed to.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from configs.atomic import write_text
from pipeline.evaluation.leaderboard import Row, rankings, read_leaderboard
from pipeline.evaluation.report import Metric
from pipeline.evaluation.report_page import condition_rows, format_score, provenance_rows
from pipeline.pages.charts import HEIGHT, LEFT, RIGHT, WIDTH, charts
from pipeline.pages.gather import Found, StageRun, experiments, newest_reports, stage_runs
from pipeline.pages.verdicts import verdict, verdicts

REPORT_PAGE, LEADERBOARD_PAGE = "report.html", "leaderboard.html"
MAX_TEXT = 2000
MAX_COMPARED = 10
"""Rows of a ranking that are compared with its best."""


def write_pages(root: Path, leaderboard: Path, only: str | None = None) -> list[Path]:
    """Write each experiment's page (or one's only), then the leaderboard's; their paths.

    `ValueError` for an experiment without a training or a report under `root`.
    """
    known = experiments(root)
    if only is not None and only not in known:
        raise ValueError(f"nothing of {only!r} in {root} yet; there is {known or 'nothing'}")
    pages = []
    for name in known if only is None else [only]:
        pages.append(root / name / REPORT_PAGE)
        write_text(pages[-1], experiment_page(root, name))
    pages.append(leaderboard.with_name(LEADERBOARD_PAGE))
    write_text(pages[-1], leaderboard_page(root, read_leaderboard(leaderboard)))
    return pages


def experiment_page(root: Path, experiment: str) -> str:
    """The page of an experiment: scores, verdicts, curves, completions, settings, provenance."""
    reports = newest_reports(root, experiment)
    runs = stage_runs(root, experiment, reports)
    return _template("experiment.html").render(
        experiment=experiment,
        ended=max((one.report.timing.ended for one in reports), default=None),
        benchmarks=_benchmarks(reports),
        verdicts=verdicts(reports),
        runs=[_run(run) for run in reversed(runs)],
        warnings=_warnings(reports),
        facts=[
            (f"{one.report.name} of {one.report.model.stage}", condition_rows(one.report) | provenance_rows(one.report))
            for one in reports
        ],
    )


def _benchmarks(reports: Sequence[Found]) -> dict[str, list[dict[str, Any]]]:
    """Benchmark to a line a stage: the headline with its interval, and the other metrics."""
    lines: dict[str, list[dict[str, Any]]] = {}
    for one in reports:
        head = one.report.headline
        others = [(metric.name, format_score(metric)) for metric in one.report.metrics if metric.name != head.name]
        line = {"stage": one.report.model.stage, "step": one.report.model.step, "head": head, "others": others}
        lines.setdefault(one.report.name, []).append(line | {"words": format_score(head)})
    for group in lines.values():
        place_on_scale(group, [line["head"] for line in group])
    return lines


def _warnings(reports: Sequence[Found]) -> dict[str, list[str]]:
    """What to beware of, once, with the reports that it is about."""
    places: dict[str, list[str]] = {}
    for one in reports:
        for words in one.report.warnings:
            places.setdefault(words, []).append(f"{one.report.name} of {one.report.model.stage}")
    return places


def place_on_scale(lines: Sequence[dict[str, Any]], scores: Sequence[Metric | Row]) -> None:
    """Where each score and its interval lie in a bar, in per cent of its width: 0 to 1 for shares, else as it fits."""
    low, high = min(score.low for score in scores), max(score.high for score in scores)
    low, high = (0.0, 1.0) if low >= 0 and high <= 1 else (low, high)
    width = (high - low) or 1.0
    for line, score in zip(lines, scores, strict=True):
        left, right, at = (round(100 * (value - low) / width, 2) for value in (score.low, score.high, score.score))
        line.update(left=left, width=round(right - left, 2), at=at)


def _run(run: StageRun) -> dict[str, Any]:
    return {
        "stage": run.stage,
        "steps": run.metrics[-1]["step"] if run.metrics else 0,
        "seconds": sum(row.get("seconds/step") or 0 for row in run.metrics),
        "directory": run.directory.name,
        "charts": charts(run.metrics),
        "samples": {"best": run.best, "worst": run.worst},
        "settings": yaml.safe_dump(run.settings, sort_keys=True, allow_unicode=True) if run.settings else "",
    }


def leaderboard_page(root: Path, rows: Iterable[Row]) -> str:
    """The page of all experiments: a ranking of each group that may be compared, with the best against each other."""
    ranked, alone = rankings(rows)
    names = {row.experiment for group in (*ranked, alone) for row in group}
    found = {
        (name, one.report.name, one.report.model.path): one for name in names for one in newest_reports(root, name)
    }
    return _template("leaderboard.html").render(
        groups=[(f"{group[0].benchmark}: {group[0].metric}", _ranking(root, group, found)) for group in ranked],
        alone=_ranking(root, alone, {}),
    )


def _ranking(root: Path, group: Sequence[Row], found: dict[tuple[str, str, str], Found]) -> list[dict[str, Any]]:
    scores = [row.score for row in group]
    reports = [found.get((row.experiment, row.benchmark, row.checkpoint)) for row in group]
    lines: list[dict[str, Any]] = []
    for place, (row, report) in enumerate(zip(group, reports, strict=True)):
        page = root / row.experiment / REPORT_PAGE
        compared = None
        if 0 < place < MAX_COMPARED and reports[0] is not None and report is not None:
            compared = verdict(report, reports[0])
        lines.append(
            {
                "row": row,
                "rank": 1 + scores.index(row.score),
                "link": page.relative_to(root).as_posix() if page.is_file() else None,
                "verdict": compared,
                "share": row.low >= 0 and row.high <= 1,
            }
        )
    if group:
        place_on_scale(lines, group)
    return lines


def _template(name: str) -> Any:
    # Autoescape by name would leave a template called otherwise unescaped.
    environment = Environment(
        loader=PackageLoader("pipeline.pages"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"capped": capped, "duration": duration, "plain": plain}
    environment.globals |= {"chart_width": WIDTH, "chart_height": HEIGHT, "chart_left": LEFT, "chart_right": RIGHT}
    return environment.get_template(name)


def capped(text: str) -> str:
    return text if len(text) <= MAX_TEXT else text[:MAX_TEXT] + " …"


def plain(value: object) -> str:
    """A fact of the Markdown page without its code marks."""
    return str(value).replace("`", "")


def duration(seconds: float) -> str:
    """`1 h 02 min`, `3 min 20 s`, `12 s`."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600} h {whole // 60 % 60:02} min"
    return f"{whole // 60} min {whole % 60:02} s" if whole >= 60 else f"{whole} s"
