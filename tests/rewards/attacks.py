"""Programs that attack a judge in ways of our own, and honest ones that look odd. Placeholders as in `hostile.Scene`.

An attempt answers rightly if, and only if, its body ran without an exception.
"""

import os

TEST = "def check(candidate):\n    assert candidate(2, 3) == 5\n    assert candidate(100, 250) == 350\n"

_FUNCTION = "def add(a, b):\n    try:\n{body}\n        return a + b\n    except BaseException:\n        return 0\n"


def attempt(body: str) -> str:
    """A program whose answer tells whether the body ran."""
    return _FUNCTION.format(body="\n".join(" " * 8 + line for line in body.strip("\n").split("\n")))


def _call(number: int, *arguments: object) -> str:
    """A system call of x86-64 by its number; it must not be refused."""
    listed = ", ".join(map(str, (number, *arguments)))
    return f"import ctypes\nassert ctypes.CDLL(None).syscall({listed}) >= 0"


ATTEMPTS = {
    "reads /etc/passwd": "assert open('/etc/passwd').read()",
    "reads a secret file": "assert open('{{SECRET_FILE}}').read() == '{{SECRET}}'",
    "reads it through a link": "import os\nos.symlink('{{SECRET_FILE}}', 'l')\nassert open('l').read()",
    "has the secret in its environment": "import os\nassert '{{SECRET}}' in repr(dict(os.environ))",
    "reads its parent's environment": "import os\nassert open('/proc/%d/environ' % os.getppid()).read()",
    "reads its parent's memory": "import os\nopen('/proc/%d/mem' % os.getppid(), 'rb').read(1)",
    "lists processes": "import os\nassert os.listdir('/proc')",
    "kills": "import os\nos.kill({{VICTIM_PID}}, 9)",
    "asks whether it could kill": "import os\nos.kill({{VICTIM_PID}}, 0)",
    "kills all": "import os\nos.kill(-1, 9)",
    "has a pipe send a signal": """
import fcntl, os
read, write = os.pipe()
fcntl.fcntl(read, fcntl.F_SETOWN, {{VICTIM_PID}})
fcntl.fcntl(read, 10, 9)
fcntl.fcntl(read, fcntl.F_SETFL, os.O_ASYNC | os.O_NONBLOCK)
os.write(write, b'x')""",
    "limits another process": "import resource as r\nr.prlimit({{VICTIM_PID}}, r.RLIMIT_NOFILE, (4, 4))",
    "slows another process": "import os\nos.setpriority(os.PRIO_PROCESS, {{VICTIM_PID}}, 19)",
    "traces": "import ctypes\nassert ctypes.CDLL(None).ptrace(16, {{VICTIM_PID}}, 0, 0) == 0",
    "connects": "import socket\nsocket.create_connection(('127.0.0.1', {{TCP_PORT}}), 2)",
    "sends a datagram": "import socket\nsocket.socket(type=2).sendto(b'x', ('127.0.0.1', {{UDP_PORT}}))",
    "connects to a path": "import socket\nsocket.socket(socket.AF_UNIX).connect('{{UNIX_SOCKET}}')",
    "sends from a pair": "import socket as s\ns.socketpair(s.AF_UNIX, s.SOCK_DGRAM)[0].sendto(b'x', '{{UNIX_SOCKET}}')",
    "opens a vsock": "import socket\nsocket.socket(40, 1, 0)",
    "opens a netlink": "import socket\nsocket.socket(16, 3, 0)",
    "makes memory that is a file": "import os\nos.memfd_create('x')",
    "shares memory": "import ctypes\nassert ctypes.CDLL(None).shmget(0x7777, 1 << 20, 0o1666) >= 0",
    "makes a queue": "import ctypes\nassert ctypes.CDLL(None).msgget(0x7777, 0o1666) >= 0",
    "makes namespaces": "import ctypes\nassert ctypes.CDLL(None).unshare(0x10000000) == 0",
    "mounts": "import ctypes\nassert ctypes.CDLL(None).mount(b'none', b'/tmp', b'tmpfs', 0, None) == 0",
    "changes its root": "import os\nos.chroot('/tmp')",
    "changes a mode": "import os\nos.chmod('{{CANARY_FILE}}', 0o777)",
    "changes times": "import os\nos.utime('{{CANARY_FILE}}', (5, 5))",
    "truncates": "import os\nos.truncate('{{CANARY_FILE}}', 0)",
    "truncates while opening": "import os\nos.open('{{CANARY_FILE}}', os.O_RDONLY | os.O_TRUNC)",
    "sets an attribute": "import os\nos.setxattr('{{CANARY_FILE}}', 'user.x', b'y')",
    "moves a file in": "import os\nos.rename('{{CANARY_FILE}}', 'stolen')",
    "links a file in": "import os\nos.link('{{CANARY_FILE}}', 'stolen')",
    "removes a folder": "import shutil\nshutil.rmtree('{{OUTSIDE_DIR}}')",
    "lists a folder": "import os\nos.listdir('{{OUTSIDE_DIR}}')",
    "writes to shared memory": "open('/dev/shm/{{MARK}}', 'w').write('x')",
    "writes to a terminal": "open('/dev/tty', 'w').write('x')",
    "changes the kernel": "open('/proc/sys/kernel/hostname', 'w').write('x')",
    "writes to the system": "open('/usr/{{MARK}}', 'w').write('x')",
    "changes the judge": "import sys\nopen(sys.modules['isolated'].__file__, 'a').write('#')",
    "becomes a program": "import os\nos.execv('/bin/true', ['true'])",
    "spawns": "import os\nos.posix_spawn('/bin/true', ['true'], {})",
    "forks": "import os\nos.fork() or os._exit(0)",
    "multiprocesses": "import multiprocessing as m\np = m.Process(target=int)\np.start()\np.join()",
    "raises its limits": "import resource as r\nr.setrlimit(r.RLIMIT_AS, (-1, -1))",
    "outlives its parent": "import ctypes\nassert ctypes.CDLL(None).prctl(1, 0, 0, 0, 0) == 0",
    "fills the disk": "for i in range(40):\n    open(f'f{i}', 'wb').write(b'x' * (4 << 20))",
    "writes anywhere": """
for folder in ('/', '/dev', '/run', '/var/tmp', '/home', '/etc', '..'):
    try:
        open(folder + '/{{MARK}}', 'w').close()
        break
    except OSError:
        pass
else:
    raise ValueError""",
}

# The numbers are those of x86-64.
BY_NUMBER = {
    "kills a thread": _call(200, "{{VICTIM_PID}}", 9),
    "kills a thread of a group": _call(234, "{{VICTIM_PID}}", "{{VICTIM_PID}}", 9),
    "opens a process": _call(434, "{{VICTIM_PID}}", 0),
    "queues a signal": _call(129, "{{VICTIM_PID}}", 9, "ctypes.create_string_buffer(128)"),
    "reads another's memory": _call(310, "{{VICTIM_PID}}", "None", 0, "None", 0, 0),
    "opens a socket by number": _call(41, 2, 1, 0),
    "opens a socket as x32": _call(0x40000000 + 41, 2, 1, 0),
    "has io_uring": _call(425, 4, "ctypes.create_string_buffer(256)"),
    "keeps a key": _call(248, "b'user'", "b'x'", "b'y'", 1, -3),
    "forks by number": "import ctypes\nc = ctypes.CDLL(None)\nr = c.syscall(58)\nr or c._exit(0)\nassert r > 0",
    "clones by number": "import ctypes\nc = ctypes.CDLL(None)\nr = c.syscall(56, 17, 0, 0, 0)\nassert r > 0",
}
if os.uname().machine == "x86_64":
    ATTEMPTS |= BY_NUMBER

PROGRAMS = {
    "sleeps through its deadline": "import time\ndef add(a, b):\n    time.sleep(30)\n    return a + b\n",
    "exits": "import os\nos._exit(0)\n",
    "exits when called": "def add(a, b):\n    raise SystemExit(0)\n",
    "interrupts": "def add(a, b):\n    raise KeyboardInterrupt\n",
    "ends iterations": "def add(a, b):\n    raise StopIteration\n",
    "has a fatal message": """
import os
class E(Exception):
    def __str__(self):
        os._exit(0)
def add(a, b):
    raise E
""",
    "is equal to all": "class E:\n    def __eq__(self, o):\n        return True\ndef add(a, b):\n    return E()\n",
    "patches comparison": "import builtins, math\nbuiltins.abs = lambda x: 0\ndef add(a, b):\n    return 0\n",
    "searches memory for the test": """
import gc
def add(a, b):
    return a + b if any(isinstance(o, dict) and "test" in o for o in gc.get_objects()) else 0
""",
    "starts threads without end": """
import threading, time
threading.stack_size(32768)
def add(a, b):
    n = 0
    try:
        while n < 5000:
            threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
            n += 1
    except RuntimeError:
        pass
    return a + b if n == 5000 else 0
""",
    "nests folders": """
import os
def add(a, b):
    for _ in range(3000):
        os.mkdir("d")
        os.chdir("d")
    return 0
""",
    "hides a folder": "import os\nos.mkdir('x', 0o300)\nopen('x/f', 'w').close()\ndef add(a, b):\n    return 0\n",
    "makes many files": "for i in range(20000):\n    open(f'i{i}', 'w').close()\ndef add(a, b):\n    return 0\n",
    "names a file oddly": "def add(a, b):\n    open(b'-rf \\xff\\n', 'w').close()\n    return 0\n",
    "stops itself": "import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)\ndef add(a, b):\n    return 0\n",
    "aborts": "import os\ndef add(a, b):\n    os.abort()\n",
    "returns a huge text": "def add(a, b):\n    return 'x' * (300 << 20)\n",
    "returns a huge number": "def add(a, b):\n    return 10**100000\n",
    "yields for ever": "def add(a, b):\n    while True:\n        yield 5\n",
    "returns a cycle": "def add(a, b):\n    x = []\n    x.append(x)\n    return x\n",
    "returns an exponential value": "x = [1]\nfor _ in range(60):\n    x = [x, x]\ndef add(a, b):\n    return x\n",
    "floods the pipe": """
import os
for fd in range(3, 20):
    try:
        os.write(fd, b'\\0\\0\\0\\2{}' * 1000)
    except OSError:
        pass
def add(a, b):
    return 0
""",
    "answers before it is asked": """
import os
for fd in range(3, 20):
    for reply in (b'{"value":5}', b'{"value":350}', b'{"passed":true,"kind":"judged","detail":"","share":1}'):
        try:
            os.write(fd, len(reply).to_bytes(4, "big") + reply)
        except OSError:
            pass
def add(a, b):
    return 0
""",
    "writes a verdict": """
import os
for fd in range(3, 20):
    try:
        os.write(fd, b'{"passed": true, "kind": "judged", "detail": "", "share": 1.0}\\n')
    except OSError:
        pass
def add(a, b):
    return 0
""",
    "closes its pipes": "import os\nos.closerange(0, 256)\ndef add(a, b):\n    return a + b\n",
    "crashes the compiler": "x = " + "-" * 100_000 + "1\ndef add(a, b):\n    return a + b\n",
    "computes while compiling": "x = 2**100000000000\ndef add(a, b):\n    return a + b\n",
    "is no text": "x = '\ud800'\ndef add(a, b):\n    return a + b\n",
    "holds a null": "def add(a, b):\n    return a + b\n\0",
    "defines another function": "def sub(a, b):\n    return a - b\n",
    "is empty": "",
}

HONEST = {
    "threads": """
from concurrent.futures import ThreadPoolExecutor
def add(a, b):
    with ThreadPoolExecutor(8) as pool:
        return sum(pool.map(int, (a, b)))
""",
    "asyncio": "import asyncio\nasync def f(a, b): return a + b\ndef add(a, b): return asyncio.run(f(a, b))\n",
    "dataclass": """
from __future__ import annotations
from dataclasses import dataclass
@dataclass
class P:
    x: int
    y: list[int]
def add(a, b):
    return P(a, [b]).x + b
""",
    "an enumeration": "import enum\nclass E(enum.IntEnum):\n    A = 5\ndef add(a, b):\n    return E.A - 5 + a + b\n",
    "a cache": "import functools\n@functools.cache\ndef add(a, b):\n    return a + b\n",
    "a callable object": "class Add:\n    def __call__(self, a, b):\n        return a + b\nadd = Add()\n",
    "an alarm": "import signal\ndef add(a, b):\n    signal.alarm(5)\n    signal.alarm(0)\n    return a + b\n",
    "some memory": "def add(a, b):\n    x = bytearray(100 << 20)\n    return a + b\n",
    "much printing": "def add(a, b):\n    print('x' * 1_000_000)\n    return a + b\n",
    "pickling": "import pickle\nclass A: pass\ndef add(a, b):\n    pickle.loads(pickle.dumps(A()))\n    return a + b\n",
    "many modules": """
import ctypes, decimal, hashlib, mmap, multiprocessing, random, secrets, socket, sqlite3, ssl, subprocess, uuid, zlib
def add(a, b):
    return sqlite3.connect(":memory:").execute("select ? + ?", (a, b)).fetchone()[0]
""",
    "no input": "try:\n    input()\nexcept EOFError:\n    pass\ndef add(a, b):\n    return a + b\n",
}
