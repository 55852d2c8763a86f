"""Progress as people read it: a bar in a terminal, a line now and then in a log."""

import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from pipeline.sinks import RunInfo, Sink

PLAIN_SECONDS = 10.0
"""Between two lines where there is no terminal."""
SHOWN = ("reward", "loss", "nll", "completion_length", "kl", "entropy")


class Progress:
    """Steps, speed and time left, as words."""

    def __init__(self, info: RunInfo, clock: Callable[[], float] = time.monotonic) -> None:
        self.info, self._clock = info, clock
        self._first: tuple[int, float] | None = None

    def words(self, step: int, metrics: Mapping[str, float]) -> str:
        """`grpo 12/100 · reward 0.520 · 1,234 tokens/s · 0:03:10 left`."""
        numbers = [f"{name} {metrics[name]:.3g}" for name in SHOWN if name in metrics]
        speed = tokens_per_second(metrics)
        rate = [] if speed is None else [f"{speed:,.0f} tokens/s"]
        return " · ".join([f"{self.info.stage} {step}/{self.info.steps}", *numbers, *rate, *self._left(step)])

    def _left(self, step: int) -> list[str]:
        """The time left, from the steps that this process has seen: a resumed run starts its own clock."""
        now = self._clock()
        if self._first is None:
            self._first = (step, now)
            return []
        first, started = self._first
        left = round((now - started) / max(step - first, 1) * (self.info.steps - step))
        return [f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02} left"] if step > first else []


def tokens_per_second(metrics: Mapping[str, float]) -> float | None:
    """Tokens generated or trained over the seconds of the whole step; `None` where a step says neither."""
    tokens = metrics.get("tokens_generated", metrics.get("tokens_trained"))
    seconds = metrics.get("seconds/step", 0.0)
    return None if tokens is None or seconds <= 0 else tokens / seconds


class PlainLines(Sink):
    """A line now and then, for logs."""

    def __init__(self, info: RunInfo, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream, self._clock, self._steps = stream, clock, info.steps
        self._progress = Progress(info, clock)
        self._last = -math.inf

    def report(self, step: int, metrics: Mapping[str, float]) -> None:
        words = self._progress.words(step, metrics)
        if step == self._steps or self._clock() - self._last >= PLAIN_SECONDS:
            self._last = self._clock()
            print(words, file=self._stream, flush=True)


class RichBar(Sink):
    """A progress bar in a terminal."""

    def __init__(self, info: RunInfo, stream: TextIO) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as Bar

        self._progress = Progress(info)
        self._bar = Bar(BarColumn(), TextColumn("{task.description}"), console=Console(file=stream))
        self._task = self._bar.add_task(f"{info.stage} starts", total=info.steps)
        self._bar.start()

    def report(self, step: int, metrics: Mapping[str, float]) -> None:
        self._bar.update(self._task, completed=step, description=self._progress.words(step, metrics))

    def close(self, *, failed: bool) -> None:  # noqa: ARG002
        self._bar.stop()


def console(info: RunInfo, stream: TextIO) -> Sink:
    """A bar in a terminal, lines elsewhere."""
    return RichBar(info, stream) if stream.isatty() else PlainLines(info, stream)


@contextmanager
def drawing(
    name: str, rows: int, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic
) -> Iterator[Callable[[int, int], None]]:
    """The progress of an evaluation's completions: called with the rows that are finished and the tokens drawn."""
    place, started = stream or sys.stderr, clock()
    info = RunInfo(experiment="", stage=name, run="", directory=Path(), steps=rows)
    sink = RichBar(info, place) if place.isatty() else PlainLines(info, place, clock)

    def report(finished: int, tokens: int) -> None:
        sink.report(finished, {"tokens_generated": tokens, "seconds/step": clock() - started})

    try:
        yield report
    finally:
        sink.close(failed=False)
