"""The trusted side of one run: executes the test, and calls the candidate in the worker through a proxy.

Its input is one JSON job on standard input, its output JSON lines: `ready` when the worker is, then the verdict. Only
what this process concludes from values that it decoded itself counts; a reply that isn't a frame fails the candidate.
"""

from __future__ import annotations

import builtins
import json
import os
import sys

from . import lockdown, wire

TYPE_CHECKING = False  # `typing` takes longer to import than all the rest of a child.
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import CodeType
    from typing import Any, NoReturn

TEST_FILE = "<test>"

# Tests of MBPP use modules that only the reference solution imports. They are ours, never the candidate's.
_MODULES = (
    *("bisect", "cmath", "collections", "copy", "datetime", "decimal", "fractions", "functools", "heapq", "itertools"),
    *("json", "math", "operator", "random", "re", "statistics", "string", "sys"),
)
# The first two would end a loop of the test and not the test; the others want more than a message.
_NOT_RAISED = (StopIteration, StopAsyncIteration, UnicodeError, BaseExceptionGroup)

_SYNTAX_ERRORS = ("SyntaxError", "IndentationError", "TabError")


class BrokenTestError(BaseException):
    """The test can't be judged, whatever the candidate does."""


class CandidateError(Exception):
    """What the candidate raised has no builtin class that may be raised here, or its value can't be used."""


class UnparseableError(CandidateError):
    """The program is not Python."""


class WorkerLostError(BaseException):
    """The worker ended, or sent what is no reply. Not an `Exception`: no `except` of a test takes it for an answer."""


class Proxy:
    """Calls functions of the candidate in its worker."""

    def __init__(self, requests: int, replies: int, limit: int) -> None:
        self._requests, self._replies, self._limit = requests, replies, limit
        self.calls = 0
        self.lost = ""
        """Why there is no worker any more."""

    def hello(self) -> dict[str, Any]:
        """What the worker says when it has locked itself in."""
        return self._read()

    def load(self, program: str) -> None:
        """Have the program run. What it raises is raised as `CandidateError`."""
        reply = self._exchange(program)
        if "error" in reply:
            builtin, name, message = _error_of(reply)
            kind = UnparseableError if builtin in _SYNTAX_ERRORS else CandidateError
            raise kind(f"{name}: {message}")

    def function(self, name: str) -> Callable[..., Any]:
        """A stand-in for the candidate's function of that name."""

        def call(*args: Any, **kwargs: Any) -> Any:
            return self._call(name, args, kwargs)

        call.__name__ = call.__qualname__ = name
        return call

    def _call(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.calls += 1
        reply = self._exchange({"call": name, "args": _encode(args), "kwargs": _encode(kwargs)})
        if "missing" in reply:
            raise NameError(f"the program defines no {name!r}")
        try:
            if "error" in reply:
                _raise(*_error_of(reply))
            return wire.decode(reply["value"])
        except (wire.WireError, KeyError) as error:
            self.lost = f"the program wrote to the judge's pipe ({error})"
            raise WorkerLostError(self.lost) from None

    def _exchange(self, request: Any) -> dict[str, Any]:
        if not self.lost:
            try:
                wire.write_frame(self._requests, request)
                return self._read()
            except (BrokenPipeError, EOFError):
                self.lost = "the program ended its process"
            except wire.WireError as error:
                self.lost = f"the program wrote to the judge's pipe ({error})"
        raise WorkerLostError(self.lost)

    def _read(self) -> dict[str, Any]:
        reply = wire.read_frame(self._replies, self._limit)
        if not isinstance(reply, dict) or len(reply) != 1:
            raise wire.WireError("not a reply")
        return reply


def _encode(arguments: Any) -> Any:
    try:
        return wire.encode(arguments, stand_ins=False)
    except wire.ForeignError as error:
        raise BrokenTestError(f"the test passes {error}") from None
    except wire.WireError as error:
        raise CandidateError(str(error)) from None


def _error_of(reply: dict[str, Any]) -> tuple[str, str, str]:
    match reply["error"]:
        case [str(builtin), str(name), str(message)]:
            return builtin, name[:100], message[:500]
    raise wire.WireError("an error is two names and a message")


def _raise(builtin: str, name: str, message: str) -> NoReturn:
    kind = getattr(builtins, builtin, None)
    if not isinstance(kind, type) or not issubclass(kind, Exception) or issubclass(kind, _NOT_RAISED):
        raise CandidateError(f"{name}: {message}")
    raise kind(message)


class Asserts:
    """Counts a test's assert statements as they pass or fail."""

    def __init__(self) -> None:
        self.passed = self.total = 0

    def __enter__(self) -> None:
        self.total += 1

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> bool:
        self.passed += kind is None
        return kind is not None and not issubclass(kind, BrokenTestError)


def counted(test: str) -> Any:
    """The test's syntax tree with each assert inside `with __asserts__:`, which counts it and goes on."""
    import ast

    class Wrap(ast.NodeTransformer):
        def visit_Assert(self, node: ast.Assert) -> ast.With:
            name = ast.Name("__asserts__", ast.Load())
            return ast.copy_location(ast.With([ast.withitem(name)], [node]), node)

    return ast.fix_missing_locations(Wrap().visit(ast.parse(test, TEST_FILE)))


def names_of(code: CodeType) -> set[str]:
    """Every global and attribute name in a code object and those inside it."""
    inner = (constant for constant in code.co_consts if isinstance(constant, type(code)))
    return set(code.co_names).union(*map(names_of, inner))


def namespace_for(code: CodeType, entry_point: str, proxy: Proxy) -> dict[str, Any]:
    """The test's globals: modules it forgot to import, and stand-ins for the candidate's functions."""
    space: dict[str, Any] = {"__name__": "test"}
    for name in names_of(code) - set(dir(builtins)):
        is_module = name in _MODULES and name != entry_point
        space[name] = __import__(name) if is_module else proxy.function(name)
    if entry_point:
        space["candidate"] = space[entry_point] = proxy.function(entry_point)
    return space


def run(job: dict[str, Any], proxy: Proxy) -> dict[str, Any]:
    """The verdict on a job: whether it `passed`, its `kind`, `detail`, and the `share` of its asserts that hold."""
    try:
        source = counted(job["test"]) if job["every_assert"] else job["test"]
        code = compile(source, TEST_FILE, "exec", dont_inherit=True)
    except (SyntaxError, ValueError) as error:
        return _failed("broken_test", f"the test is not Python: {error}")
    asserts = Asserts()
    try:
        _execute(code, job, proxy, asserts)
    except (BrokenTestError, SystemExit) as error:
        return _failed("broken_test", f"the test can't be judged: {type(error).__name__}: {error}")
    except UnparseableError as error:
        return _failed("unparseable", str(error))
    except (Exception, WorkerLostError) as error:  # noqa: BLE001 (whatever a test raises fails the candidate)
        return _failed("crashed" if proxy.lost else "judged", describe(error, job["test"]))
    share = asserts.passed / max(asserts.total, 1)
    if proxy.lost:
        return _failed("crashed", proxy.lost, share)
    if asserts.passed < asserts.total:
        return _failed("judged", f"{asserts.passed} of {asserts.total} asserts hold", share)
    if proxy.calls == 0:
        return _failed("broken_test", "the test never called the program")
    return {"passed": True, "kind": "judged", "detail": "", "share": 1.0}


def _failed(kind: str, detail: str, share: float = 0.0) -> dict[str, Any]:
    return {"passed": False, "kind": kind, "detail": detail, "share": share}


def _execute(code: CodeType, job: dict[str, Any], proxy: Proxy, asserts: Asserts) -> None:
    proxy.load(job["program"])
    space = namespace_for(code, job["entry_point"], proxy)
    if "random" in job["test"]:
        __import__("random").seed(0)
    space["__asserts__"] = asserts
    exec(code, space)
    check: Any = space.get("check")
    if getattr(getattr(check, "__code__", None), "co_filename", None) != TEST_FILE:
        return
    if not job["entry_point"]:
        raise BrokenTestError("the test defines check(), but no entry point is given to call it with")
    check(space[job["entry_point"]])


def describe(error: BaseException, test: str) -> str:
    """The error, and the line of the test that it came from."""
    text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    line, trace = 0, error.__traceback__
    while trace is not None:
        line = trace.tb_lineno if trace.tb_frame.f_code.co_filename == TEST_FILE else line
        trace = trace.tb_next
    lines = test.splitlines()
    place = f" (line {line}: {lines[line - 1].strip()[:200]})" if 0 < line <= len(lines) else ""
    return text[:500] + place


def main(config: dict[str, Any], requests: int, replies: int) -> None:
    """Judge the job on standard input; the worker hangs on the two descriptors."""
    stdin, verdicts = lockdown.take_pipes()
    job = json.loads(os.fdopen(stdin, "rb").read())

    def say(**message: Any) -> None:
        os.write(verdicts, json.dumps(message).encode() + b"\n")

    sys.path.extend(config["packages"])
    proxy = Proxy(requests, replies, config["reply_bytes"])
    try:
        lockdown.apply(config)
        hello = proxy.hello()
    except (OSError, EOFError, wire.WireError) as error:
        hello = {"refused": f"{type(error).__name__}: {error}"}
    say(**hello)
    if "ready" in hello:
        say(**run(job, proxy))
    os._exit(0)
