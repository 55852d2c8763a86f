"""What hostile programs may go for: the things around a judge, and what is to be found of them afterwards."""

import ctypes
import os
import resource
import secrets
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_SET_CHILD_SUBREAPER = 36
_CANARY = "canary\n"
TEMP = Path(tempfile.gettempdir())


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
        places = {self.outside, Path.home(), TEMP, *map(Path, ("/tmp", "/var/tmp", "/dev/shm", *sys.path))}
        listed = [place for place in places if os.access(place, os.R_OK | os.X_OK) and place.is_dir()]
        if any(self.mark in path.name for place in listed for path in place.iterdir()):
            found.append("marker files on the host")
        if self.victim.poll() is not None:
            found.append("the victim process was ended")
        if self.traffic:
            found.append(f"the listeners heard {self.traffic}")
        return found


@contextmanager
def scene() -> Iterator[Scene]:
    """A canary, a secret, listeners and a victim. This process holds the secret in its environment and a descriptor."""
    with ExitStack() as stack:
        outside = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="outside-")))
        home = Path.home() if os.access(Path.home(), os.W_OK) else TEMP
        private = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="home-", dir=home)))
        secret, mark = secrets.token_hex(12), "mark" + secrets.token_hex(8)
        secret_file = private / "id_ed25519"
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
        stack.callback(victim.wait)
        stack.callback(victim.kill)
        for name in ("WANDB_API_KEY", "HF_TOKEN"):
            before = os.environ.get(name)
            os.environ[name] = secret
            stack.callback(_restore, name, before)
        it = Scene(outside, secret_file, secret, mark, {}, victim)
        it.ports.update(_listen(outside / "listener", it.traffic, stack))
        yield it


def _restore(name: str, value: str | None) -> None:
    if value is None:
        del os.environ[name]
    else:
        os.environ[name] = value


def _listen(path: Path, traffic: list[str], stack: ExitStack) -> dict[str, Any]:
    tcp, udp, unix = socket.socket(), socket.socket(type=socket.SOCK_DGRAM), socket.socket(socket.AF_UNIX)
    for listener, address in ((tcp, ("127.0.0.1", 0)), (udp, ("127.0.0.1", 0)), (unix, str(path))):
        listener.bind(address)
        stack.callback(listener.close)
        if listener is not udp:
            listener.listen()
        # A thread in accept() outlives the socket's close.
        listener.settimeout(0.2)
        threading.Thread(target=_serve, args=(listener, traffic), daemon=True).start()
    return {"TCP_PORT": tcp.getsockname()[1], "UDP_PORT": udp.getsockname()[1], "UNIX_SOCKET": path}


def _serve(listener: socket.socket, traffic: list[str]) -> None:
    while listener.fileno() >= 0:
        try:
            if listener.type == socket.SOCK_DGRAM:
                _, sender = listener.recvfrom(64)
                listener.sendto(b"PONG", sender)
            else:
                with listener.accept()[0] as connection:
                    connection.sendall(b"PONG")
            traffic.append(str(listener.family))
        except TimeoutError:
            continue
        except OSError:
            return


def adopt_orphans() -> None:
    """Have processes whose parent ended become children of this one, where `survivors` sees them."""
    ctypes.CDLL(None).prctl(_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def survivors(known: set[int]) -> list[str]:
    """Command lines of the descendants of this process, but for `known`."""
    return [_command(pid) for pid in descendants() - known]


def descendants() -> set[int]:
    """The processes that this one started, or that theirs did. What other tests left is there before a test begins."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
            except OSError:
                continue
            if state != "Z":
                parents[int(entry.name)] = int(parent)
    mine, grew = {os.getpid()}, True
    while grew:
        more = {pid for pid, parent in parents.items() if parent in mine} - mine
        mine |= more
        grew = bool(more)
    return mine - {os.getpid()}


def _command(pid: int) -> str:
    try:
        return f"{pid} {Path(f'/proc/{pid}/cmdline').read_bytes()[:200]!r}"
    except OSError:
        return str(pid)


def marked_commands(mark: str) -> list[str]:
    """Command lines on this machine that hold the mark."""
    pids = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    return [command for command in map(_command, pids) if mark in command]


def work_dirs() -> set[str]:
    """Folders of judges that exist now."""
    return {path.name for path in TEMP.glob("mlx-rl-judge-*")}


def memory() -> int:
    """Resident bytes of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
