"""The untrusted side: an interpreter that holds a candidate's code and answers calls of its functions, nothing else.

It never sees a test or an expected value. What it replies is believed by nobody: see `tester`.
"""

from __future__ import annotations

import builtins
import os
import sys
import types

from . import lockdown, wire

TYPE_CHECKING = False  # `typing` takes longer to import than all the rest of a child.
if TYPE_CHECKING:
    from typing import Any

MODULE = "candidate"
"""The name the program runs under, so that a `__main__` guard stays shut."""


def main(config: dict[str, Any]) -> None:
    """Lock the process, load the program of the first frame, and serve calls until the judge hangs up."""
    requests, replies = lockdown.take_pipes()
    limit = config["reply_bytes"]
    try:
        lockdown.apply(config)
    except OSError as error:
        wire.write_frame(replies, {"refused": str(error)})
        os._exit(1)
    wire.write_frame(replies, {"ready": True})
    try:
        module = types.ModuleType(MODULE)
        wire.write_frame(replies, load(wire.read_frame(requests, limit), module))
        while True:
            wire.write_frame(replies, answer(wire.read_frame(requests, limit), module, limit))
    finally:
        # Threads and exit hooks of the candidate are not waited for.
        os._exit(0)


def load(program: str, module: types.ModuleType) -> dict[str, Any]:
    """Run the program as that module."""
    sys.modules[MODULE] = module
    try:
        if "random" in program:
            # The same program gets the same verdict each time.
            __import__("random").seed(0)
        exec(compile(program, f"{MODULE}.py", "exec", dont_inherit=True), module.__dict__)
    except BaseException as error:  # noqa: BLE001 (a program may raise anything, SystemExit included)
        return _error(error)
    return {"value": None}


def answer(request: dict[str, Any], module: types.ModuleType, limit: int) -> dict[str, Any]:
    """The reply to a call: `value`, `error` (see `_error`) or `missing`."""
    try:
        function = module.__dict__[request["call"]]
    except KeyError:
        return {"missing": True}
    try:
        args, kwargs = wire.decode(request["args"]), wire.decode(request["kwargs"])
        value = wire.encode(function(*args, **kwargs))
        if len(wire.json.dumps(value)) > limit - 64:
            raise wire.WireError(f"a value of more than {limit} bytes")
    except BaseException as error:  # noqa: BLE001 (see load)
        return _error(error)
    return {"value": value}


def _error(error: BaseException) -> dict[str, Any]:
    """The nearest builtin class, the class's own name and the message; they may lie, but only to fail a test."""
    kind = next(c for c in type(error).__mro__ if getattr(builtins, c.__name__, None) is c)
    try:
        message = str(error)[:500]
    except BaseException:  # noqa: BLE001 (its own __str__)
        message = ""
    return {"error": [kind.__name__, str(type(error).__name__)[:100], message]}
