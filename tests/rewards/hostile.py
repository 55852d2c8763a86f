"""Runs hostile programs through a judge and reports what they got away with.

`python -m tests.rewards.hostile [backend ...]` runs every snippet of `<repo>/../shared/vectors/hostile_snippets.json`.
"""

import ctypes
import json
import os
import resource
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rewards.sandbox import Judge, Limits, Verdict

SHARED = Path(__file__).parents[2] / ".." / "shared"
VECTORS = Path(os.environ.get("HOSTILE", SHARED / "vectors" / "hostile_snippets.json"))

_SET_CHILD_SUBREAPER = 36
_CANARY = "canary\n"


@dataclass
class Scene:
    """The things around a judge that a hostile program may go for."""

    outside: Path
    secret_file: Path
    secret: str
    mark: str
    ports: dict[str, Any]
    victim: subprocess.Popen[bytes]
    traffic: list[str] = field(default_factory=list)

    def fill(self, code: str) -> str:
        """The code with the placeholders of the snippets' file replaced."""
        values = {
            "CANARY_FILE": self.outside / "canary.txt",
            "OUTSIDE_DIR": self.outside,
            "SECRET": self.secret,
            "SECRET_FILE": self.secret_file,
            "MARK": self.mark,
            "VICTIM_PID": self.victim.pid,
            **self.ports,
        }
        for name, value in values.items():
            code = code.replace("{{" + name + "}}", str(value))
        return code

    def damage(self) -> list[str]:
        """What a program changed, one line each."""
        canary = self.outside / "canary.txt"
        found = []
        stat = canary.stat() if canary.exists() else None
        if stat is None or canary.read_text() != _CANARY or (stat.st_mode & 0o777, stat.st_mtime) != (0o644, 1e9):
            found.append("the canary file was changed")
        if sorted(path.name for path in self.outside.iterdir()) != ["canary.txt", "listener"]:
            found.append("new files in the outside folder")
        places = {self.outside, Path.home(), *map(Path, ("/tmp", "/var/tmp", "/dev/shm", *sys.path))}
        if any(self.mark in name for place in places if place.is_dir() for name in _names(place)):
            found.append("marker files on the host")
        if self.victim.poll() is not None:
            found.append("the victim process was ended")
        if self.traffic:
            found.append(f"the listeners heard {self.traffic}")
        return found


@contextmanager
def scene() -> Iterator[Scene]:
    """A canary, a secret, listeners, a victim; the secret is in this process's environment too, and in a descriptor."""
    with ExitStack() as stack:
        outside = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="outside-")))
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="home-", dir=_home())))
        secret, mark = secrets.token_hex(12), "mark" + secrets.token_hex(8)
        secret_file = home / "id_ed25519"
        secret_file.write_text(secret)
        secret_file.chmod(0o600)
        leaked = os.open(secret_file, os.O_RDONLY)
        os.set_inheritable(leaked, True)
        stack.callback(os.close, leaked)
        canary = outside / "canary.txt"
        canary.write_text(_CANARY)
        canary.chmod(0o644)
        os.utime(canary, (1e9, 1e9))
        victim = subprocess.Popen(["sleep", "600"])
        stack.callback(lambda: (victim.kill(), victim.wait()))
        for name in ("WANDB_API_KEY", "HF_TOKEN"):
            os.environ[name] = secret
            stack.callback(os.environ.pop, name, None)
        it = Scene(outside, secret_file, secret, mark, {}, victim)
        it.ports.update(_listen(outside / "listener", it.traffic, stack))
        yield it


def _home() -> str:
    home = str(Path.home())
    return home if os.access(home, os.W_OK) else tempfile.gettempdir()


def _names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def _listen(path: Path, traffic: list[str], stack: ExitStack) -> dict[str, Any]:
    tcp, udp = socket.socket(), socket.socket(type=socket.SOCK_DGRAM)
    unix = socket.socket(socket.AF_UNIX)
    tcp.bind(("127.0.0.1", 0))
    udp.bind(("127.0.0.1", 0))
    unix.bind(str(path))
    for kind, listener in (("tcp", tcp), ("unix", unix), ("udp", udp)):
        stack.callback(listener.close)
        threading.Thread(target=_serve, args=(kind, listener, traffic), daemon=True).start()
    return {"TCP_PORT": tcp.getsockname()[1], "UDP_PORT": udp.getsockname()[1], "UNIX_SOCKET": path}


def _serve(kind: str, listener: socket.socket, traffic: list[str]) -> None:
    try:
        if kind != "udp":
            listener.listen()
        while True:
            if kind == "udp":
                _, sender = listener.recvfrom(64)
                listener.sendto(b"PONG", sender)
            else:
                connection, _ = listener.accept()
                connection.sendall(b"PONG")
                connection.close()
            traffic.append(kind)
    except OSError:
        return


def adopt_orphans() -> None:
    """Have processes whose parent ended become children of this one, where `survivors` sees them."""
    ctypes.CDLL(None).prctl(_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def survivors(known: set[int]) -> list[str]:
    """Command lines of the descendants of this process, but for `known`."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
    mine, grew = {os.getpid()}, True
    while grew:
        more = {pid for pid, parent in parents.items() if parent in mine} - mine
        mine |= more
        grew = bool(more)
    return [_command(pid) for pid in mine - known - {os.getpid()}]


def _command(pid: int) -> str:
    try:
        return f"{pid} {Path(f'/proc/{pid}/cmdline').read_bytes()[:200]!r}"
    except OSError:
        return str(pid)


def work_dirs() -> set[str]:
    return {name for name in _names(Path(tempfile.gettempdir())) if name.startswith("mlx-rl-")}


def memory() -> int:
    """Resident bytes of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def problems(judge: Judge, entry: dict[str, Any], it: Scene, *, hostile: bool) -> tuple[Verdict, list[str]]:
    """The verdict on one entry of the snippets' file, and what is wrong with it or after it."""
    before, used, free = work_dirs(), memory(), shutil.disk_usage(tempfile.gettempdir()).free
    started = time.monotonic()
    verdict = judge.check(it.fill(entry["code"]), entry["test"], entry["entry_point"])
    seconds = time.monotonic() - started
    found = it.damage()
    if (verdict.status == "passed") == hostile or verdict.status == "sandbox_error":
        found.append(f"verdict {verdict.status} {verdict.detail}")
    if seconds > judge.limits.wall_seconds + 5:
        found.append(f"took {seconds:.1f} s")
    if memory() - used > 100 << 20:
        found.append("the memory of the judging process grew")
    if free - shutil.disk_usage(tempfile.gettempdir()).free > 64 << 20:
        found.append("less disk space than before")
    if work_dirs() - before:
        found.append(f"folders left behind: {work_dirs() - before}")
    return verdict, [f"{entry['id']}: {line}" for line in found]


def main() -> int:
    """Every snippet and control, with the limits that the file recommends."""
    data = json.loads(VECTORS.read_text(encoding="utf-8"))
    adopt_orphans()
    bad: list[str] = []
    for name in sys.argv[1:] or ["bwrap", "landlock"]:
        with scene() as it, Judge(Limits(), backend=name) as judge:
            known = {it.victim.pid}
            for entry in [*data["controls"], *data["snippets"], *data["controls"]]:
                hostile = entry["expected"]["verdict"] != "passed"
                verdict, found = problems(judge, entry, it, hostile=hostile)
                time.sleep(float(os.environ.get("PAUSE", "1")))
                found += [f"{entry['id']}: still alive: {line}" for line in survivors(known)]
                print(f"{name} {entry['id']}: {verdict.status} {verdict.seconds:.2f} s {verdict.detail[:90]}", *found)
                bad += found
    print(f"{len(bad)} problems", *bad, sep="\n")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
