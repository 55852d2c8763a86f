"""The training op: one for every experiment and stage, bound by configuration (`pipeline.launchpad`)."""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import dagster as dg
from sqlalchemy.exc import SQLAlchemyError

from configs.loader import digest
from configs.schema import ExperimentConfig, TrainedStage
from pipeline.catalog import Entry
from pipeline.guard import long_work
from pipeline.keys import DEVICE_POOL, model_key
from pipeline.launch import train_on_ranks
from pipeline.lock import owned
from pipeline.metadata import final_numbers, folder, made_by, training_metadata
from pipeline.monitoring import open_reporter
from pipeline.progress import Progress
from pipeline.refs import CheckpointRef, DatasetRef
from pipeline.resources import MlxResource, RunStore, short_id
from pipeline.sinks import RunInfo, Sink, read_metrics

if TYPE_CHECKING:
    from pipeline.job import Trained

log = logging.getLogger(__name__)

MAX_OBSERVATIONS = 100
"""Of one run: each costs 10 ms and a row of the run database."""


class TrainConfig(dg.Config):
    """What the launchpad's settings become for the op."""

    stage: TrainedStage
    experiment: str
    """JSON of what was set; the defaults are the schema's."""
    source: str
    """The experiment's file: plugins are relative to it."""


class Observations(Sink):
    """An observation of the asset every so many steps: its numbers and the time left, during the training."""

    def __init__(self, context: dg.OpExecutionContext, asset: dg.AssetKey, info: RunInfo) -> None:
        self._context, self._asset = context, asset
        self._every = max(1, math.ceil(info.steps / MAX_OBSERVATIONS))
        self._progress = Progress(info)

    def report(self, step: int, metrics: Mapping[str, float]) -> None:
        words = self._progress.words(step, metrics)
        if step % self._every == 0:
            metadata = final_numbers({"step": step, **metrics})
            observation = dg.AssetObservation(self._asset, description=words, metadata=metadata)
            try:
                self._context.log_event(observation)
            except SQLAlchemyError as error:  # Dagster's database is locked or away: the training is none the worse
                log.warning("step %d: no observation, Dagster's database fails: %s", step, error)


@dg.op(pool=DEVICE_POOL, retry_policy=dg.RetryPolicy(max_retries=1, delay=1))
def train(
    context: dg.OpExecutionContext,
    config: TrainConfig,
    start: CheckpointRef,
    dataset: DatasetRef,
    runs: RunStore,
    mlx: MlxResource,
) -> dg.MaterializeResult[CheckpointRef]:
    """Train one stage, or go on from the newest checkpoint of the same root run."""
    entry = Entry(ExperimentConfig.model_validate_json(config.experiment), Path(config.source))
    experiment = mlx.apply(entry.experiment)
    directory = runs.run_dir(experiment.name, config.stage, context.run)
    with long_work(f"what was reached is under {directory}, and a re-execution of the run goes on from there"):
        entry.load_plugins()
        data, model = (runs.verified(ref.path, ref.sha256) for ref in (dataset, start))
        place = Place(directory, data, model, mlx, entry.source)
        trained, url = _train(context, experiment, config.stage, place)
    ref = CheckpointRef(
        path=runs.relative(trained.checkpoint),
        stage=config.stage,
        step=trained.step,
        config_digest=digest(getattr(experiment, config.stage)),
        sha256=trained.sha256,
    )
    metadata = {
        **training_metadata(read_metrics(directory), trained.samples),
        **({} if url is None else {"wandb": dg.MetadataValue.url(url)}),
        **folder("checkpoint_dir", trained.checkpoint),
        **folder("run_dir", directory),
        **made_by(),
        "step": trained.step,
        "seed": experiment.seed,
    }
    return dg.MaterializeResult(value=ref, metadata=metadata, data_version=dg.DataVersion(trained.sha256))


@dataclass(frozen=True)
class Place:
    """Where a training reads and writes, and on what it runs."""

    run_dir: Path
    dataset_dir: Path
    start_dir: Path
    mlx: MlxResource
    source: Path


def _train(
    context: dg.OpExecutionContext, experiment: ExperimentConfig, stage: TrainedStage, place: Place
) -> tuple["Trained", str | None]:
    """What the stage left, and the page where its numbers are."""
    place.mlx.prepare()  # before anything imports MLX
    from pipeline.job import Job
    from pipeline.train import train_stage

    steps = getattr(experiment, stage).steps
    info = RunInfo(
        experiment=experiment.name,
        stage=stage,
        run=short_id(context.run),
        directory=place.run_dir,
        steps=steps,
        settings=experiment.model_dump(mode="json"),
    )
    observations = Observations(context, model_key(experiment.name, stage), info)
    with (
        owned(place.run_dir, short_id(context.run)),
        open_reporter(info, experiment.monitoring, [observations]) as reporter,
    ):
        job = Job(
            experiment=experiment,
            dataset_dir=place.dataset_dir,
            start_dir=place.start_dir,
            run_dir=place.run_dir,
            device=place.mlx.settings,
            report=reporter,
        )
        launch = place.mlx.launch
        if launch.is_alone:
            trained = train_stage(job, stage)
        else:
            trained = train_on_ranks(context, job, stage, place.source, launch)
        reporter.published(trained.checkpoint)
        return trained, reporter.url
