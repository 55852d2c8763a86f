"""Where a training's numbers go: the console, `metrics.jsonl` and `debug.log` in the run directory, W&B.

A sink that fails to start is an error; one that fails in mid-run is a warning, and the training goes on without it.
Evaluation doesn't pass through here: its reports are files of their own.
"""

import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from configs.schema import MonitoringConfig
from pipeline.progress import console
from pipeline.sinks import METRICS, JsonLines, RunInfo, Sink, WandbSink

LOG = "debug.log"
LOGGERS = ("mlx_ops", "rewards", "pipeline")

log = logging.getLogger(__name__)


class Reporter:
    """Hands each step's metrics to every sink, and drops a sink that fails."""

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self.sinks = list(sinks)

    def __call__(self, step: int, metrics: Mapping[str, float]) -> None:
        for sink in list(self.sinks):
            self._try(sink, lambda sink=sink: sink.report(step, metrics))

    def published(self, checkpoint: Path) -> None:
        for sink in list(self.sinks):
            self._try(sink, lambda sink=sink: sink.published(checkpoint))

    @property
    def url(self) -> str | None:
        """The page of the first sink that has one."""
        return next((sink.url for sink in self.sinks if sink.url is not None), None)

    def close(self, *, failed: bool) -> None:
        for sink in list(self.sinks):
            self._try(sink, lambda sink=sink: sink.close(failed=failed))

    def _try(self, sink: Sink, action: Callable[[], None]) -> None:
        try:
            action()
        except sink.faults as error:
            self.sinks.remove(sink)
            log.warning("%s fails, training goes on without it: %s", type(sink).__name__, error)


@contextmanager
def open_reporter(info: RunInfo, config: MonitoringConfig, extra: Sequence[Sink] = ()) -> Iterator[Reporter]:
    """A reporter over the run directory's files, the console, W&B where it is on, and `extra`.

    A resumed run needs no word: rows from the first reported step on are dropped, so that no step appears twice.
    """
    info.directory.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        stack.enter_context(debug_log(info.directory / LOG))
        sinks: list[Sink] = [JsonLines(info.directory / METRICS), console(info, sys.stderr)]
        if config.wandb != "off":
            sinks.append(WandbSink(info, config))
        reporter = Reporter([*sinks, *extra])
        try:
            yield reporter
        except BaseException:
            reporter.close(failed=True)
            raise
        reporter.close(failed=False)


@contextmanager
def debug_log(path: Path) -> Iterator[None]:
    """What our packages log goes to `path` too; at every level, but for loggers whose level somebody has set."""
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    loggers = [logging.getLogger(name) for name in LOGGERS]
    unset = [logger for logger in loggers if logger.level == logging.NOTSET]
    for logger in loggers:
        logger.addHandler(handler)
    for logger in unset:
        logger.setLevel(logging.DEBUG)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
        for logger in unset:
            logger.setLevel(logging.NOTSET)
        handler.close()
