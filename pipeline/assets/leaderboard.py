"""The asset `leaderboard`: the scores of every report there is, in one table and in `leaderboard.json`."""

from collections.abc import Sequence

import dagster as dg

from pipeline.io_manager import find_ref
from pipeline.keys import LEADERBOARD
from pipeline.metadata import folder
from pipeline.refs import ReportRef
from pipeline.resources import RunStore

WHEN_A_REPORT_IS_NEW = dg.AutomationCondition.eager().without(~dg.AutomationCondition.any_deps_missing())
"""Reports of experiments that never ran are no reason to wait."""


def leaderboard_asset(reports: Sequence[dg.AssetKey]) -> dg.AssetsDefinition:
    """It depends on every report and reads those that exist, so that one experiment alone has a table."""

    @dg.asset(
        key=LEADERBOARD,
        deps=reports,
        group_name="leaderboard",
        code_version="1",
        automation_condition=WHEN_A_REPORT_IS_NEW,
        description="Every experiment's scores with their 95% intervals.",
    )
    def leaderboard(context: dg.AssetExecutionContext, runs: RunStore) -> dg.MaterializeResult:
        from pipeline.evaluation.leaderboard import render_markdown, update_leaderboard
        from pipeline.evaluation.report_files import read_report
        from pipeline.pages.render import LEADERBOARD_PAGE, write_pages

        refs = [ref for key in reports if (ref := find_ref(runs.directory, key, ReportRef)) is not None]
        gone = [ref.path for ref in refs if not runs.locate(ref.path).is_dir()]
        if gone:
            context.log.warning(f"reports without their folder keep their old row: {gone}")
        found = [read_report(runs.locate(ref.path)) for ref in refs if ref.path not in gone]
        rows = update_leaderboard(found, runs.leaderboard)
        write_pages(runs.directory, runs.leaderboard)
        metadata = {
            "scores": dg.MetadataValue.md(render_markdown(rows)),
            "rows": len(rows),
            **folder("file", runs.leaderboard),
            **folder("page", runs.leaderboard.with_name(LEADERBOARD_PAGE)),
        }
        return dg.MaterializeResult(metadata=metadata)

    return leaderboard
