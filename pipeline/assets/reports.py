"""The reports of an experiment: one a stage and benchmark."""

import sys
from pathlib import Path

import dagster as dg

from configs.atomic import sha256
from configs.schema import EvaluationConfig
from pipeline.catalog import Entry
from pipeline.guard import long_work
from pipeline.keys import DEVICE_POOL, dataset_key, model_key, report_key, start_stage
from pipeline.labels import labels
from pipeline.metadata import folder, made_by
from pipeline.refs import CheckpointRef, DatasetRef, ReportRef
from pipeline.resources import MlxResource, RunStore
from pipeline.verdicts import SCORE_KEPT, comparison_metadata, earlier, score_kept
from pipeline.versions import report_version

NEW_CHECKPOINT = dg.AutomationCondition.eager() & dg.AutomationCondition.all_deps_blocking_checks_passed()
"""Evaluate each new checkpoint that passed its blocking checks, where the automation sensor is on."""
REPORT = dg.PythonObjectDagsterType(ReportRef)
"""Said outright: beside checks Dagster reads no type out of the annotation."""


def report_asset(entry: Entry, stage: str, evaluation: EvaluationConfig) -> dg.AssetsDefinition:
    """The report of one benchmark on one stage's model."""
    name = entry.experiment.name
    key = report_key(name, stage, evaluation.key)
    start = start_stage(entry.experiment, stage)

    @dg.asset(
        key=key,
        ins={
            "checkpoint": dg.AssetIn(model_key(name, stage)),
            "dataset": dg.AssetIn(dataset_key(entry.experiment.dataset.name)),
        },
        kinds={"mlx", "report"},
        pool=DEVICE_POOL,
        retry_policy=dg.RetryPolicy(max_retries=1, delay=1),
        code_version=report_version(entry, stage, evaluation),
        automation_condition=NEW_CHECKPOINT,
        dagster_type=REPORT,
        check_specs=[dg.AssetCheckSpec(SCORE_KEPT, asset=key, description="Not significantly below the last report.")],
        **labels(entry, stage, f"{evaluation.benchmark} of the {stage} model.", evaluation),
    )
    def report(
        context: dg.AssetExecutionContext,
        checkpoint: CheckpointRef,
        dataset: DatasetRef,
        runs: RunStore,
        mlx: MlxResource,
    ) -> dg.MaterializeResult:
        directory = runs.report_dir(name, f"{stage}_{evaluation.key}", context.run)
        with long_work("no report was written"):
            ref = _evaluate(entry, evaluation, checkpoint, dataset, directory, runs, mlx)
        last = earlier(runs, key, directory)
        starts = None if start == stage else earlier(runs, report_key(name, start, evaluation.key), directory)
        page = (directory / "report.md").read_text(encoding="utf-8")
        metadata = {
            "score": ref.score,
            "low": ref.low,
            "high": ref.high,
            "n": ref.n,
            "metric": ref.metric,
            **comparison_metadata(directory, {"last report": last, start: starts}),
            "report": dg.MetadataValue.md(page),
            **folder("report_dir", directory),
            **made_by(),
        }
        return dg.MaterializeResult(
            value=ref,
            metadata=metadata,
            check_results=[score_kept(key, last, directory)],
            data_version=dg.DataVersion(ref.sha256),
        )

    return report


def _evaluate(
    entry: Entry,
    evaluation: EvaluationConfig,
    checkpoint: CheckpointRef,
    dataset: DatasetRef,
    directory: Path,
    runs: RunStore,
    mlx: MlxResource,
) -> ReportRef:
    from pipeline.evaluate import Subject, evaluate_checkpoint
    from pipeline.evaluation.report_page import headline

    entry.load_plugins()
    subject = Subject(checkpoint, runs.locate(checkpoint.path), runs.locate(dataset.path))
    report = evaluate_checkpoint(mlx.apply(entry.experiment), evaluation, subject, directory, mlx.settings)
    print(f"{checkpoint.stage} · {headline(report)}", file=sys.stderr, flush=True)
    head = report.headline
    return ReportRef(
        path=runs.relative(directory),
        stage=checkpoint.stage,
        benchmark=report.name,
        metric=head.name,
        score=head.score,
        n=head.n,
        low=head.low,
        high=head.high,
        comparability=report.comparability,
        checkpoint=checkpoint.path,
        sha256=sha256(directory / "manifest.json"),
    )
