"""One training a run directory: a lock that says whose it is, and is free again the moment its owner is gone.

The operating system's lock (`flock`) ends with the process, however it ends. Folders shared between machines may not
pass it on, so the owner's file is touched now and then, and one from another host that is fresh counts as held.
"""

import fcntl
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TextIO

from configs.schema import Strict

FILE = "owner.json"
HEARTBEAT_SECONDS = 15.0
STALE_SECONDS = 90.0
"""After so long without a heartbeat an owner on another host is taken for dead."""
PATIENCE_SECONDS = 30.0
"""For an orphan that still writes its last checkpoint when the retry of its run has started."""

log = logging.getLogger(__name__)


class Owner(Strict):
    """Who trains in a run directory."""

    host: str
    pid: int
    run: str
    since: str
    """UTC, ISO 8601."""

    def __str__(self) -> str:
        return f"run {self.run} (process {self.pid} on {self.host}, since {self.since})"


class InUseError(RuntimeError):
    """Somebody else trains in this run directory."""


@contextmanager
def owned(directory: Path, run: str, patience: float = PATIENCE_SECONDS) -> Iterator[None]:
    """Hold `directory` for the block. `InUseError` names who holds it, after waiting `patience` seconds for them."""
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / FILE).open("a+", encoding="utf-8") as stream:
        _acquire(stream, directory, patience)
        _write(stream, run)
        done = threading.Event()
        heart = threading.Thread(target=_beat, args=(directory / FILE, done), daemon=True, name="lock-heartbeat")
        heart.start()
        try:
            yield
        finally:
            done.set()
            heart.join()
            stream.truncate(0)


def _acquire(stream: TextIO, directory: Path, patience: float) -> None:
    deadline = time.monotonic() + patience
    waiting = False
    while (holder := _holder(stream)) is not None:
        if time.monotonic() >= deadline:
            raise InUseError(f"{directory}: {holder} trains here; wait for it, cancel it, or start a new run")
        if not waiting:
            log.warning("%s: %s trains here; waiting up to %.0f s for it to end", directory, holder, patience)
            waiting = True
        time.sleep(0.2)


def _holder(stream: TextIO) -> str | None:
    """Who holds the directory; `None` where we do now."""
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return str(_owner(stream) or "another process")
    owner = _owner(stream)
    if owner is None or owner.host == socket.gethostname():  # our host's locks are the system's to keep
        return None
    if time.time() - os.fstat(stream.fileno()).st_mtime > STALE_SECONDS:
        return None
    fcntl.flock(stream, fcntl.LOCK_UN)
    return str(owner)


def _owner(stream: TextIO) -> Owner | None:
    stream.seek(0)
    try:
        return Owner.model_validate_json(stream.read())
    except ValueError:  # empty after a clean end, or cut short by a crash
        return None


def _write(stream: TextIO, run: str) -> None:
    since = datetime.now(UTC).isoformat(timespec="seconds")
    owner = Owner(host=socket.gethostname(), pid=os.getpid(), run=run, since=since)
    stream.truncate(0)
    stream.write(owner.model_dump_json() + "\n")
    stream.flush()


def _beat(path: Path, done: threading.Event) -> None:
    while not done.wait(HEARTBEAT_SECONDS):
        os.utime(path)
