"""Reports on disk: `report.json`, `items.jsonl` and `report.md` in one folder with a manifest, all or none."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from pydantic import ValidationError

from configs.atomic import new_directory
from configs.loader import describe
from configs.schema import Strict
from pipeline.evaluation.report import EvaluationReport, Item
from pipeline.evaluation.report_page import markdown

REPORT, ITEMS, PAGE = "report.json", "items.jsonl", "report.md"


def write_report(report: EvaluationReport, items: Sequence[Item], directory: Path) -> None:
    """Put the three files into `directory`, all of them or none."""
    with new_directory(directory) as folder:
        (folder / REPORT).write_text(_json(report, indent=2) + "\n", encoding="utf-8")
        lines = "".join(_json(item) + "\n" for item in items)
        (folder / ITEMS).write_text(lines, encoding="utf-8")
        (folder / PAGE).write_text(markdown(report, items), encoding="utf-8")


def _json(model: Strict, indent: int | None = None) -> str:
    return json.dumps(model.model_dump(mode="json"), indent=indent, sort_keys=True, allow_nan=False)


def read_report(path: Path) -> EvaluationReport:
    """The report of a folder (or a `report.json` itself). `ValueError` names the file and what is wrong with it."""
    file = path / REPORT if path.is_dir() else path
    try:
        return EvaluationReport.model_validate_json(file.read_bytes())
    except OSError as error:
        raise ValueError(f"{file}: no readable report: {error.strerror}") from error
    except ValidationError as error:
        raise ValueError(describe(error, file)) from error


def read_items(directory: Path) -> list[Item]:
    """The items of a report's folder. `ValueError` names the file and the line that is no item."""
    file, items = directory / ITEMS, []
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: not readable: {error}") from error
    for number, line in enumerate(lines, start=1):
        try:
            items.append(Item.model_validate_json(line))
        except ValidationError as error:
            raise ValueError(describe(error, f"{file}:{number}")) from error
    return items


def untimed(report: EvaluationReport, items: Iterable[Item]) -> str:
    """Report and items as JSON without their times: equal for two runs of one seed."""
    samples = {"samples": {"__all__": {"seconds"}}}
    return json.dumps(
        [
            report.model_dump(mode="json", exclude={"timing"}),
            [item.model_dump(mode="json", exclude=samples) for item in items],
        ],
        sort_keys=True,
    )
