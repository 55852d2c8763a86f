"""One program against one test: two locked-in children, a clock, and nothing left behind.

The caller's process starts children by exec of a clean interpreter and looks at a few bytes of verdict; it neither
parses what a candidate wrote nor forks itself.
"""

import contextlib
import json
import os
import re
import select
import shutil
import signal
import subprocess
import tempfile
import time
from dataclasses import dataclass
from typing import Any, Literal

from rewards.sandbox_backends import Backend, Limits, Place, Role, environment
from rewards.sandbox_watch import overuse

Status = Literal["passed", "failed", "timeout", "sandbox_error"]
Kind = Literal["judged", "unparseable", "crashed", "excess", "timeout", "broken_test", "broken_sandbox"]

_TICK = 0.05
_KILL_SECONDS = 5.0
_CPU_SIGNALS = (signal.SIGKILL, signal.SIGXCPU)


@dataclass(frozen=True)
class Job:
    """A program and the test that it has to pass."""

    program: str
    test: str
    """Python that defines `check(candidate)`, or that asserts things of the entry point by its name."""
    entry_point: str
    every_assert: bool = False
    """Go on after a failing assert, so that `Verdict.share` counts them all."""


@dataclass(frozen=True)
class Verdict:
    """What came of a job."""

    status: Status
    """`sandbox_error` says nothing about the program: the sandbox or the test is broken."""
    detail: str
    seconds: float
    """From the start of the program's own run."""
    share: float = 0.0
    """Of the asserts that hold: 1 when passed, else 0 but for a job with `every_assert`."""
    kind: Kind = "judged"
    """How it ended: `judged` by what the program returned or raised; `excess` of threads, files or memory."""


class Child:
    """A started child interpreter, and with it everything that it could start."""

    def __init__(
        self,
        backend: Backend,
        role: Role,
        limits: Limits,
        *,
        stdin: int,
        stdout: int,
        packages: tuple[str, ...] = (),
        descriptors: tuple[int, ...] = (),
    ) -> None:
        self._limits = limits
        self._pidfd: int | None = None
        self.workdir = os.path.realpath(tempfile.mkdtemp(prefix="mlx-rl-judge-")) if backend.needs_workdir else ""
        info, tell = os.pipe() if backend.reports_pid else (-1, -1)
        try:
            self.process = subprocess.Popen(
                backend.command(role, limits, Place(self.workdir, packages, tell), descriptors),
                stdin=stdin,
                stdout=stdout,
                stderr=subprocess.PIPE,
                cwd=self.workdir or "/",
                env=environment(self.workdir) if backend.needs_workdir else {},
                pass_fds=(*descriptors, tell) if backend.reports_pid else descriptors,
                start_new_session=True,
            )
        except OSError:
            self._remove_workdir()
            raise
        finally:
            _close(tell)
        self.pid = self.process.pid
        self._info = info

    def learn_pid(self) -> None:
        """Take the child's own PID out of its launcher's report; none comes where the launcher failed."""
        if self._info < 0:
            return
        text = b""
        deadline = time.monotonic() + self._limits.start_seconds
        while b"}" not in text and _readable(self._info, deadline):
            chunk = os.read(self._info, 4096)
            if not chunk:
                break
            text += chunk
        _close(self._info)
        self._info = -1
        found = re.search(rb'"child-pid": *(\d+)', text)
        if found is not None:
            self.pid = int(found[1])
            with contextlib.suppress(ProcessLookupError):
                self._pidfd = os.pidfd_open(self.pid)

    def overuse(self) -> str:
        """What the child has too much of, or nothing."""
        return overuse(self.pid, self.workdir, self._limits)

    def end(self) -> None:
        """Kill it with all that it started, and remove its files. Returns when that has happened."""
        self.learn_pid()
        try:
            if self._pidfd is not None:
                # The first process of a PID namespace: the kernel ends the others before it lets go of this one.
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
            elif self.process.returncode is None:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(self.process.pid, signal.SIGKILL)
            self._wait()
        finally:
            if self._pidfd is not None:
                os.close(self._pidfd)
                self._pidfd = None
            for pipe in (self.process.stdout, self.process.stderr):
                if pipe is not None:
                    pipe.close()
            self._remove_workdir()

    def _wait(self) -> None:
        try:
            self.process.wait(_KILL_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(_KILL_SECONDS)

    def _remove_workdir(self) -> None:
        if self.workdir:
            remove_tree(self.workdir)

    def errors(self) -> str:
        """What the launcher or the interpreter wrote to standard error so far."""
        stream = self.process.stderr
        if stream is None or stream.closed:
            return ""
        os.set_blocking(stream.fileno(), False)
        with contextlib.suppress(BlockingIOError):
            return os.read(stream.fileno(), self._limits.output_bytes).decode(errors="replace").strip()
        return ""

    def death(self) -> int | None:
        """The signal that ended the child by itself, if one did."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = self.process.wait(1.0)
            return -code if code < 0 else code - 128 if code > 128 else None
        return None


def remove_tree(path: str) -> None:
    """Remove a folder whatever an enemy put in: links, folders without rights, a nesting deeper than any path."""
    with contextlib.suppress(OSError, RecursionError):
        shutil.rmtree(path)
        return
    # Both tools walk by descriptor, so depth is no matter, and neither follows a link.
    for command in (["chmod", "-R", "u+rwX", path], ["rm", "-rf", path]):
        subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=60, check=False)


def run(backend: Backend, limits: Limits, job: Job, packages: tuple[str, ...] = ()) -> Verdict:
    """Judge one job. Never raises for what the program or the test does."""
    started = time.monotonic()
    try:
        with contextlib.ExitStack() as stack:
            worker, tester = _start(backend, limits, job, packages, stack)
            return _follow(worker, tester, limits)
    except OSError as error:
        detail = f"{backend.name}: {type(error).__name__}: {error}"
        seconds = time.monotonic() - started
        return Verdict("sandbox_error", detail[: limits.output_bytes], seconds, kind="broken_sandbox")


def _start(
    backend: Backend, limits: Limits, job: Job, packages: tuple[str, ...], stack: contextlib.ExitStack
) -> tuple[Child, Child]:
    """The worker and its tester, joined by two pipes whose ends nobody else holds."""
    with contextlib.ExitStack() as ours:

        def pipe() -> tuple[int, int]:
            ends = os.pipe()
            for end in ends:
                ours.callback(os.close, end)
            return ends

        requests, replies = pipe(), pipe()
        job_file = ours.enter_context(tempfile.TemporaryFile())
        job_file.write(json.dumps(vars(job)).encode())
        job_file.seek(0)
        worker = Child(backend, "worker", limits, stdin=requests[0], stdout=replies[1])
        stack.callback(worker.end)
        tester = Child(
            backend,
            "tester",
            limits,
            packages=packages,
            stdin=job_file.fileno(),
            stdout=subprocess.PIPE,
            descriptors=(requests[1], replies[0]),
        )
        stack.callback(tester.end)
    for child in (worker, tester):
        child.learn_pid()
    return worker, tester


def _follow(worker: Child, tester: Child, limits: Limits) -> Verdict:
    started = time.monotonic()
    inbox = _Inbox(tester)
    hello = inbox.next(started + limits.start_seconds)
    if hello is None or "ready" not in hello:
        cause = [str((hello or {}).get("refused", "it did not start")), worker.errors(), tester.errors()]
        detail = "; ".join(filter(None, cause))[: limits.output_bytes]
        return Verdict("sandbox_error", detail, time.monotonic() - started, kind="broken_sandbox")
    begun = time.monotonic()
    verdict, excess = _await_verdict(inbox, worker, begun + limits.wall_seconds)
    seconds = time.monotonic() - begun
    if excess:
        return Verdict("failed", excess, seconds, kind="excess")
    if verdict is None and inbox.ended:
        return Verdict("failed", "a reply of the program ended the judging interpreter", seconds, kind="crashed")
    if verdict is None:
        return Verdict("timeout", f"not done after {limits.wall_seconds:g} s", seconds, kind="timeout")
    return _conclude(verdict, worker, limits, seconds)


def _conclude(verdict: dict[str, Any], worker: Child, limits: Limits, seconds: float) -> Verdict:
    detail, kind = str(verdict["detail"])[: limits.output_bytes], verdict["kind"]
    if verdict["passed"]:
        return Verdict("passed", "", seconds, 1.0)
    if kind == "broken_test":
        return Verdict("sandbox_error", detail, seconds, kind=kind)
    if kind == "crashed" and (death := worker.death()) is not None:
        if death in _CPU_SIGNALS and seconds > 0.9 * limits.cpu_seconds:
            return Verdict("timeout", f"used {limits.cpu_seconds} s of processor time", seconds, kind="timeout")
        detail += f" (signal {death})"
    return Verdict("failed", detail, seconds, float(verdict["share"]), kind)


def _await_verdict(inbox: "_Inbox", worker: Child, deadline: float) -> tuple[dict[str, Any] | None, str]:
    """The tester's verdict, or none; and what the worker used too much of."""
    while True:
        tick = min(time.monotonic() + _TICK, deadline)
        verdict = inbox.next(tick)
        if verdict is not None or inbox.ended or time.monotonic() >= deadline:
            return verdict, ""
        excess = worker.overuse()
        if excess:
            return None, excess


class _Inbox:
    """The JSON lines that a tester sends."""

    def __init__(self, tester: Child) -> None:
        assert tester.process.stdout is not None
        self._descriptor = tester.process.stdout.fileno()
        self._text = b""
        self.ended = False

    def next(self, deadline: float) -> dict[str, Any] | None:
        """The next message, or `None` when the deadline or the end comes first."""
        while b"\n" not in self._text:
            if self.ended or not _readable(self._descriptor, deadline):
                return None
            chunk = os.read(self._descriptor, 65_536)
            self.ended = not chunk
            self._text += chunk
        line, _, self._text = self._text.partition(b"\n")
        return json.loads(line)


def _close(descriptor: int) -> None:
    if descriptor >= 0:
        os.close(descriptor)


def _readable(descriptor: int, deadline: float) -> bool:
    poll = select.poll()
    poll.register(descriptor, select.POLLIN | select.POLLHUP)
    return bool(poll.poll(max(deadline - time.monotonic(), 0) * 1000))
