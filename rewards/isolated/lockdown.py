"""What a child interpreter does to itself before it looks at code that isn't ours: descriptors, limits, kernel rules.

All of it is inherited by whatever runs later and none of it can be undone from inside.
"""

from __future__ import annotations

import ctypes
import os
import resource
import sys

from . import seccomp

TYPE_CHECKING = False  # `typing` takes longer to import than all the rest of a child.
if TYPE_CHECKING:
    from typing import Any

LANDLOCK_ABI = 3
"""The oldest Landlock that this accepts: below it, truncating a file isn't controlled (Linux 6.2)."""

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1, 2, 4, 8
_MAKE_DEVICE_OR_SOCKET = 1 << 6 | 1 << 9 | 1 << 11
_FILE_RIGHTS = _EXECUTE | _WRITE_FILE | _READ_FILE | 1 << 14
_PATH_BENEATH = 1

_SET_PARENT_DEATH_SIGNAL, _SET_NO_NEW_PRIVS = 1, 38
_CAPABILITY_VERSION = 0x20080522


def take_pipes() -> tuple[int, int]:
    """Standard input and output as two private descriptors; 0, 1 and 2 become /dev/null."""
    requests, replies = os.dup(0), os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    os.close(null)
    return requests, replies


def apply(config: dict[str, Any]) -> None:
    """Take the limits, and on Linux the Landlock and seccomp rules, of `config`. `OSError` where one is refused."""
    for name, value in config["rlimits"].items():
        _limit(getattr(resource, name), value)
    if not sys.platform.startswith("linux"):
        return
    libc = ctypes.CDLL(None, use_errno=True)
    _check(libc.prctl(_SET_PARENT_DEATH_SIGNAL, 9, 0, 0, 0), "prctl")
    _check(libc.prctl(_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl")
    if config["landlock"] is not None:
        _drop_capabilities(libc)
        restrict_files(libc, **config["landlock"])
    if config["seccomp"] is not None:
        seccomp.install(file_modes=config["seccomp"] == "own files")


def _limit(kind: int, value: int) -> None:
    _, hard = resource.getrlimit(kind)
    lowest = value if hard == resource.RLIM_INFINITY else min(value, hard)
    try:
        resource.setrlimit(kind, (lowest, lowest))
    except (ValueError, OSError):
        # macOS knows RLIMIT_AS and refuses it; the judge watches the memory from outside there.
        if sys.platform != "darwin":
            raise


def _check(result: int, call: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{call}: {os.strerror(number)}")
    return result


def _drop_capabilities(libc: ctypes.CDLL) -> None:
    header = _CAPABILITY_VERSION.to_bytes(4, "little") + bytes(4)
    _check(libc.capset(header, bytes(24)), "capset")


def landlock_abi(libc: ctypes.CDLL) -> int:
    """The kernel's Landlock version, 0 where there is none."""
    return max(libc.syscall(_CREATE_RULESET, None, 0, 1), 0)


def restrict_files(libc: ctypes.CDLL, read: list[str], write: list[str], devices: list[str]) -> None:
    """Landlock: read below `read`, read and write below `write` and in `devices`; no other file, TCP or signal."""
    abi = landlock_abi(libc)
    if abi < LANDLOCK_ABI:
        raise OSError(f"Landlock ABI {abi}, {LANDLOCK_ABI} is needed (Linux 6.2 with landlock in its LSM list)")
    handled = (1 << (16 if abi >= 5 else 15)) - 1
    network, scoped = (3 if abi >= 4 else 0), (3 if abi >= 6 else 0)
    size = 8 + 8 * (abi >= 4) + 8 * (abi >= 6)
    attributes = b"".join(part.to_bytes(8, "little") for part in (handled, network, scoped))
    ruleset = _check(libc.syscall(_CREATE_RULESET, attributes, size, 0), "landlock_create_ruleset")
    for paths, rights in (
        (read, _EXECUTE | _READ_FILE | _READ_DIR),
        (write, handled & ~(_EXECUTE | _MAKE_DEVICE_OR_SOCKET)),
        (devices, _READ_FILE | _WRITE_FILE),
    ):
        for path in paths:
            _allow(libc, ruleset, path, rights & handled)
    _check(libc.syscall(_RESTRICT_SELF, ruleset, 0), "landlock_restrict_self")
    os.close(ruleset)


def _allow(libc: ctypes.CDLL, ruleset: int, path: str, rights: int) -> None:
    parent = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        kept = rights if os.path.isdir(path) else rights & _FILE_RIGHTS  # noqa: PTH112 (pathlib takes 5 ms to import)
        rule = kept.to_bytes(8, "little") + parent.to_bytes(4, "little")
        _check(libc.syscall(_ADD_RULE, ruleset, _PATH_BENEATH, rule, 0), "landlock_add_rule")
    finally:
        os.close(parent)
