"""One rank of a training: `mlx.launch -n 2 -- python -m pipeline.worker ORDER.json`.

Under Dagster, rank 0 reports through Pipes; started by hand, into the run directory and on the console.
"""

import json
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dagster_pipes import DAGSTER_PIPES_CONTEXT_ENV_VAR, PipesContext, open_dagster_pipes

from configs.schema import ExperimentConfig
from mlx_ops.backend import prepare
from mlx_ops.distributed import RankLostError, Ranks
from pipeline.catalog import Entry
from pipeline.guard import MISTAKES, words
from pipeline.job import Job
from pipeline.launch import Order, alive
from pipeline.monitoring import LOGGERS, open_reporter
from pipeline.ranks import joined
from pipeline.sinks import RunInfo
from pipeline.train import fit_stage, train_stage

PARENT_SECONDS = 1.0
Report = Callable[[int, Mapping[str, float]], None]


def main(path: Path) -> int:
    """Train what the order says, and say how it ended; the exit status."""
    order = Order.model_validate_json(path.read_bytes())
    prepare(order.device.device)
    try:
        with joined(os.environ) as ranks:
            if ranks.is_writer and order.parent is not None:
                _end_with(order.parent)
            trained = _train(order, ranks)
    except KeyboardInterrupt as error:
        why = str(error) if isinstance(error, RankLostError) else "interrupted"
        _say({"failed": f"{why}; what was reached is under {order.run_dir}, re-execute to go on", "again": False})
        return 130
    except Exception as error:  # noqa: BLE001 (the top of a process: whoever started it must hear)
        traceback.print_exc()
        _say({"failed": words(error), "again": not isinstance(error, MISTAKES)})
        return 1
    if trained is not None:
        _say({"trained": trained})
    return 0


def _train(order: Order, ranks: Ranks) -> dict[str, Any] | None:
    entry = Entry(ExperimentConfig.model_validate_json(order.experiment), Path(order.source))
    entry.load_plugins()
    with _reporting(order, entry.experiment) if ranks.is_writer else nullcontext(_silent) as report:
        job = Job(
            entry.experiment, order.dataset_dir, order.start_dir, order.run_dir, order.device, report, ranks=ranks
        )
        if ranks.is_writer:
            trained = asdict(train_stage(job, order.stage))
            return json.loads(json.dumps(trained, default=_plain))
        fit_stage(job, order.stage)
    return None


def _silent(step: int, metrics: Mapping[str, float]) -> None:
    """The writer reports for all ranks."""


def _plain(value: Any) -> Any:
    """What JSON doesn't know: the numbers of NumPy, and paths."""
    return value.tolist() if hasattr(value, "tolist") else str(value)


@contextmanager
def _reporting(order: Order, experiment: ExperimentConfig) -> Iterator[Report]:
    if DAGSTER_PIPES_CONTEXT_ENV_VAR in os.environ:
        open_dagster_pipes()
        _say({"pid": os.getpid()})
        for name in LOGGERS:
            logging.getLogger(name).addHandler(Forwarded())
            logging.getLogger(name).setLevel(logging.DEBUG)
        yield lambda step, metrics: _say({"step": step, "metrics": dict(metrics)})
        return
    info = RunInfo(
        experiment=experiment.name,
        stage=order.stage,
        run=order.run_dir.name,
        directory=order.run_dir,
        steps=getattr(experiment, order.stage).steps,
        settings=experiment.model_dump(mode="json"),
    )
    with open_reporter(info, experiment.monitoring) as reporter:
        yield reporter


class Forwarded(logging.Handler):
    """Log records, sent to the process that follows this one."""

    def emit(self, record: logging.LogRecord) -> None:
        _say({"log": [record.name, record.levelno, record.getMessage()]})


def _say(message: Mapping[str, Any]) -> None:
    if PipesContext.is_initialized():
        PipesContext.get().report_custom_message(message)
    else:
        print(json.dumps(message), file=sys.stderr, flush=True)


def _end_with(parent: int) -> None:
    """Interrupt this process when `parent` is gone: it would go on training, unseen by Dagster."""

    def watch() -> None:
        while alive(parent):
            threading.Event().wait(PARENT_SECONDS)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=watch, daemon=True, name="parent-watch").start()


if __name__ == "__main__":
    status = main(Path(sys.argv[1]))
    if PipesContext.is_initialized():
        PipesContext.get().close()
    sys.stdout.flush()
    sys.stderr.flush()
    # A collective that waits for a lost rank would keep the interpreter from ending.
    os._exit(status)
