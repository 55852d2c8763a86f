"""The places that a training's numbers go to, but for the console: `metrics.jsonl` and W&B."""

import json
import logging
import math
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from configs.atomic import write_text
from configs.schema import MonitoringConfig
from pipeline.samples import SampleFiles

if TYPE_CHECKING:
    from wandb import Run

METRICS = "metrics.jsonl"
INIT_SECONDS = 30.0
"""W&B's server gets so long to answer."""
FINISH_SECONDS = 120.0
"""And so long to take the rest at the end; what it does not take is on disk, for `wandb sync`."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunInfo:
    """What a training is called, and how long it is."""

    experiment: str
    stage: str
    run: str
    """Equal for every retry and re-execution of a run."""
    directory: Path
    steps: int
    settings: Mapping[str, Any] = field(default_factory=dict)
    """The experiment as JSON, for W&B's configuration."""


class Sink(ABC):
    """One place that numbers go to."""

    faults: tuple[type[Exception], ...] = (OSError,)
    """What it raises when the world outside fails it. Anything else is a bug and stops the run."""
    url: str | None = None
    """Where people can look at it."""

    @abstractmethod
    def report(self, step: int, metrics: Mapping[str, float]) -> None:
        """The metrics of a completed step, counted from 1."""

    def published(self, checkpoint: Path) -> None:  # noqa: B027 (most keep none)
        """The folder that the training leaves, once it is done."""

    def close(self, *, failed: bool) -> None:  # noqa: B027 (most have nothing to close)
        """Called once, at the end; `failed` says that an error or an interrupt ended the training."""


class JsonLines(Sink):
    """One JSON object a step: `step`, `time` (seconds since 1970) and the metrics; what isn't finite is null."""

    faults = ()
    """None is passed over: a run promises each of its rows, and goes on from its last checkpoint once it can."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._stream: TextIO | None = None

    def report(self, step: int, metrics: Mapping[str, float]) -> None:
        if self._stream is None:
            truncate(self.path, step)
            self._stream = self.path.open("a", encoding="utf-8")
        row = {"step": step, "time": round(time.time(), 3)} | {name: _finite(v) for name, v in metrics.items()}
        # A whole line in one write: a reader, or a crash, never sees two rows mixed.
        self._stream.write(json.dumps(row, allow_nan=False) + "\n")
        self._stream.flush()

    def close(self, *, failed: bool) -> None:  # noqa: ARG002
        if self._stream is not None:
            os.fsync(self._stream.fileno())
            self._stream.close()


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def read_metrics(directory: Path) -> list[dict[str, Any]]:
    """The rows of a run directory's `metrics.jsonl`, but for a last line that a crash cut short."""
    path = directory / METRICS
    if not path.is_file():
        return []
    return [json.loads(line) for line in _whole_lines(path.read_text(encoding="utf-8"))]


def truncate(path: Path, step: int) -> None:
    """Drop the rows of `step` and later, and a line that a crash cut short."""
    if not path.is_file():
        return
    text = path.read_text(encoding="utf-8")
    kept = "".join(line for line in _whole_lines(text) if json.loads(line)["step"] < step)
    if kept != text:
        write_text(path, kept)


def _whole_lines(text: str) -> list[str]:
    return [line for line in text.splitlines(keepends=True) if line.endswith("\n")]


SAMPLE_TABLES = 20
"""Of one run, evenly over its steps."""


class WandbSink(Sink):
    """A W&B run, grouped by experiment and resumed under the same id. Offline it needs no account."""

    def __init__(self, info: RunInfo, config: MonitoringConfig) -> None:
        import wandb

        self.faults = (OSError, RuntimeError, wandb.Error)
        self._info, self._config = info, config
        self._samples = SampleFiles(info.directory / "samples")
        self._every = math.ceil(info.steps / SAMPLE_TABLES)
        self._run = self._start(config.wandb)
        self.url = self._run.url

    def _start(self, mode: str) -> "Run":
        import wandb
        from wandb.errors import CommError

        info = self._info
        try:
            # `allow` goes on under the id after a resume; W&B itself refuses steps that it has seen.
            return wandb.init(
                project=self._config.wandb_project,
                mode="offline" if mode == "offline" else "online",
                group=info.experiment,
                job_type=info.stage,
                name=f"{info.experiment}/{info.stage}/{info.run}",
                id=f"{info.experiment}-{info.stage}-{info.run}",
                tags=[info.experiment, info.stage],
                resume="allow",
                dir=str(info.directory),
                config=dict(info.settings),
                settings=wandb.Settings(silent=True, init_timeout=INIT_SECONDS, finish_timeout=FINISH_SECONDS),
            )
        except (CommError, TimeoutError) as error:  # not a missing key: that is the user's to mend
            if mode == "offline":
                raise
            log.warning("W&B can't be reached (%s): offline; `wandb sync %s/wandb/*` later", error, info.directory)
            wandb.teardown()  # its own process holds on to the id of the run that did not start
            return self._start("offline")

    def report(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log({**metrics, **self._table(step)}, step=step)

    def _table(self, step: int) -> dict[str, Any]:
        """The step's best and worst completions, every so many steps; SFT has none."""
        if step % self._every and step != self._info.steps:
            return {}
        rows = self._samples.best_and_worst(self._config.log_samples, step)
        if not rows:
            return {}
        import wandb

        columns: list[Any] = list(rows[0])
        return {"samples": wandb.Table(columns=columns, data=[[row[name] for name in columns] for row in rows])}

    def published(self, checkpoint: Path) -> None:
        if self._config.wandb_checkpoints:
            import wandb

            artifact = wandb.Artifact(f"{self._info.experiment}-{self._info.stage}", type="model")
            artifact.add_dir(str(checkpoint))
            self._run.log_artifact(artifact, aliases=["latest", checkpoint.name])

    def close(self, *, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))
