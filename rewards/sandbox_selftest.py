"""Programs that tell whether a sandbox holds: two that must pass, and attacks that answer rightly only if they work."""

import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rewards.sandbox_backends import Limits, environment
from rewards.sandbox_run import Job

_TEST = "def check(candidate):\n    assert candidate(2, 3) == 5\n    assert candidate(100, 250) == 350\n"
_ATTEMPT = "def add(a, b):\n    try:\n{body}\n        return a + b\n    except BaseException:\n        return 0\n"


@dataclass(frozen=True)
class Case:
    """One program of the self-test."""

    name: str
    job: Job
    honest: bool = False


def _attempt(body: str) -> Job:
    indented = "\n".join(" " * 8 + line for line in body.splitlines())
    return Job(_ATTEMPT.format(body=indented), _TEST, "add")


CONTROL = Job("def add(a, b):\n    return a + b\n", _TEST, "add")

_WORK = "import tempfile, pathlib\nwith tempfile.TemporaryDirectory() as d:\n    pathlib.Path(d, 'x').write_text('x')"
_KNOWN = [*environment(""), "PWD", "LC_CTYPE", "__CF_USER_TEXT_ENCODING"]
_ALWAYS_EQUAL = (
    "class Equal(int):\n    def __eq__(self, other): return True\n    __hash__ = int.__hash__\n"
    "def add(a, b): return Equal(0)\n"
)
_MEMORY = "hoard = [bytearray({half}) for _ in range(6)]\nassert all(block.count(0) for block in hoard)"


@contextmanager
def attacks(limits: Limits) -> Iterator[list[Case]]:
    """The cases, while the file and the port that some of them reach for exist."""
    with tempfile.TemporaryDirectory(prefix="mlx-rl-selftest-") as folder, socket.socket() as listener:
        secret = Path(folder) / "secret"
        secret.write_text("secret", encoding="utf-8")
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        bodies = {
            # They run side by side: the secret may have been written to by then.
            "reads a file": f"assert open({str(secret)!r}).read().startswith('secret')",
            "writes a file": f"open({str(secret)!r}, 'a').write('x')",
            "makes a file": f"open({str(Path(folder) / 'new')!r}, 'w').close()",
            "lists a folder": f"import os\nassert os.listdir({folder!r})",
            "connects": f"import socket\nsocket.create_connection(('127.0.0.1', {port}), timeout=2)",
            "forks": "import os\npid = os.fork()\npid or os._exit(0)",
            "starts a program": "import subprocess, sys\nsubprocess.run([sys.executable, '-c', ''], check=True)",
            "sees the environment": f"import os\nassert set(os.environ) - set({_KNOWN!r})",
            "takes too much memory": _MEMORY.format(half=limits.memory_bytes // 2),
        }
        yield [
            Case("adds", CONTROL, honest=True),
            Case("uses a temporary file", _attempt(_WORK), honest=True),
            Case("is equal to everything", Job(_ALWAYS_EQUAL, _TEST, "add")),
            Case("exits with status 0", Job("import os\nos._exit(0)\ndef add(a, b): return 0\n", _TEST, "add")),
            *(Case(name, _attempt(body)) for name, body in bodies.items()),
        ]
