"""How long work in a Dagster step ends: a cancel stays a cancel, a mistake isn't tried twice, an orphan stops."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess

import dagster as dg

from pipeline.lock import InUseError

MISTAKES = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    FileNotFoundError,
    ImportError,
    InUseError,
    LookupError,
    NameError,
    TypeError,
    ValueError,
)
"""What fails the same way again. Other errors, and a process that dies, are tried again from the last checkpoint."""
WATCH_SECONDS = 1.0


@contextmanager
def long_work(left: str) -> Iterator[None]:
    """Around training and evaluation in a step; `left` says what an interrupted run leaves behind.

    Dagster treats a cancel like a failure, and a retry policy would start the step again.
    """
    try:
        with stopped_with_its_parent():
            yield
    except (dg.DagsterExecutionInterruptedError, KeyboardInterrupt) as error:
        raise dg.Failure(f"interrupted; {left}", allow_retries=False) from error
    except MISTAKES as error:
        raise dg.Failure(words(error), allow_retries=False) from error


def words(error: BaseException) -> str:
    # A KeyError shows the repr of its message.
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    return text or type(error).__name__


@contextmanager
def stopped_with_its_parent() -> Iterator[None]:
    """Interrupt this process when the run that started it is gone: a step would go on training, unseen by Dagster."""
    parent = multiprocessing.parent_process()
    if parent is None:
        yield
        return
    done = threading.Event()
    watcher = threading.Thread(target=_watch, args=(parent, done), daemon=True, name="parent-watch")
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()


def _watch(parent: BaseProcess, done: threading.Event) -> None:
    while not done.wait(WATCH_SECONDS):
        if not parent.is_alive():
            os.kill(os.getpid(), signal.SIGINT)
            return
