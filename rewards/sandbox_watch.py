"""What the kernel does not limit by itself: threads, files in a folder of the host, and on macOS memory.

Looked at from outside every few hundredths of a second, so a program can overshoot by what it does in that time.
"""

import ctypes
import os
import sys
from pathlib import Path

from rewards.sandbox_backends import Limits

_MOST_FILES = 10_000
# proc_pid_rusage(2): flavour 0 of `rusage_info` is 16 bytes of UUID and ten 64-bit fields; the eighth is the footprint.
_FOOTPRINT_FLAVOUR, _FOOTPRINT_FIELD = 0, 7


class _Usage(ctypes.Structure):
    _fields_ = [("uuid", ctypes.c_uint8 * 16), ("fields", ctypes.c_uint64 * 10)]


def overuse(pid: int, workdir: str, limits: Limits) -> str:
    """What the process has more of than its limits allow, in words; empty where all is well or the process is gone."""
    if sys.platform == "darwin":
        used = _footprint(pid)
        if used > limits.memory_bytes:
            return f"{used} bytes of memory, the limit is {limits.memory_bytes}"
    elif (threads := _threads(pid)) > limits.processes:
        return f"{threads} threads, the limit is {limits.processes}"
    return _files(workdir, limits) if workdir else ""


def _threads(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in status.splitlines() if line.startswith("Threads:")), 0)


def _footprint(pid: int) -> int:
    usage = _Usage()
    libc = ctypes.CDLL(None)
    if libc.proc_pid_rusage(pid, _FOOTPRINT_FLAVOUR, ctypes.byref(usage)) != 0:
        return 0
    return int(usage.fields[_FOOTPRINT_FIELD])


def _files(workdir: str, limits: Limits) -> str:
    """Bytes and files below a folder that its owner changes meanwhile."""
    total, count, pending = 0, 0, [workdir]
    while pending:
        try:
            with os.scandir(pending.pop()) as entries:
                for entry in entries:
                    count += 1
                    if count > _MOST_FILES:
                        return f"more than {_MOST_FILES} files"
                    if entry.is_dir(follow_symlinks=False):
                        pending.append(entry.path)
                    else:
                        total += entry.stat(follow_symlinks=False).st_blocks * 512
        except (FileNotFoundError, PermissionError):
            continue
        except OSError as error:
            return f"its folders can't be walked: {error.strerror}"
    return f"{total} bytes of files, the limit is {limits.disk_bytes}" if total > limits.disk_bytes else ""
