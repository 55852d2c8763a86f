"""Runs hostile programs through judges and reports what they got away with. For Linux; takes minutes.

    python -m tests.rewards.hostile [snippets.json] [--backend NAME ...] [--runs 500] [--own]

The snippets' file has the shape of `<repo>/../shared/vectors/hostile_snippets.json`, which is the default. Each backend
that works here is put to it: every snippet with a control after it, all controls before and afterwards, and after each
of these everything that `must_be_intact` names. Then two judges at once, and `--runs` programs that must leave no
process, file or memory. As root, all of it happens a second time as an ordinary user. `--own` adds this repository's
own attacks. The last line is the number of faults; it is the exit status too.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rewards.sandbox import Job, Judge, Limits, Verdict
from rewards.sandbox_backends import candidates
from tests.rewards.attacks import ATTEMPTS, HONEST, PROGRAMS, TEST, attempt
from tests.rewards.scene import TEMP, Scene, adopt_orphans, marked_commands, memory, scene, survivors, work_dirs

VECTORS = Path(__file__).parents[2] / ".." / "shared" / "vectors"
SNIPPETS = VECTORS / "hostile_snippets.json"
ORDINARY_USER = 65534

Entry = dict[str, Any]


def own_entries() -> tuple[list[Entry], list[Entry]]:
    """This repository's attacks and odd but honest programs, in the snippets' form."""
    attacks = {name: attempt(body) for name, body in ATTEMPTS.items()} | PROGRAMS
    return [_entry(*item, "not_passed") for item in attacks.items()], [
        _entry(*item, "passed") for item in HONEST.items()
    ]


def _entry(name: str, code: str, verdict: str) -> Entry:
    return {"id": name, "code": code, "test": TEST, "entry_point": "add", "expected": {"verdict": verdict}}


def problems(judge: Judge, entry: Entry, it: Scene, wait: float = 0) -> tuple[Verdict, list[str]]:
    """The verdict on one entry, and what is wrong with it or, after `wait` seconds, with the things around."""
    before, used, free = work_dirs(), memory(), shutil.disk_usage(TEMP).free
    started = time.monotonic()
    verdict = judge.check(it.fill(entry["code"]), entry["test"], entry["entry_point"])
    seconds = time.monotonic() - started
    found = wrong_verdict(entry, verdict)
    if seconds > judge.limits.wall_seconds + 5:
        found.append(f"took {seconds:.1f} s")
    time.sleep(wait)
    found += it.damage()
    if memory() - used > 100 << 20:
        found.append("the memory of the judging process grew")
    if free - shutil.disk_usage(TEMP).free > 64 << 20:
        found.append("less disk space than before")
    if work_dirs() - before:
        found.append(f"folders left behind: {work_dirs() - before}")
    if wait:
        found += [f"still alive: {line}" for line in survivors({it.victim.pid}) + marked_commands(it.mark)]
    return verdict, [f"{entry['id']}: {line}" for line in found]


def wrong_verdict(entry: Entry, verdict: Verdict) -> list[str]:
    """What is wrong with a verdict; a sandbox that fails is wrong whatever was to be judged."""
    hostile = entry["expected"]["verdict"] != "passed"
    if (verdict.status == "passed") == hostile or verdict.status == "sandbox_error":
        return [f"verdict {verdict.status} {verdict.detail}"]
    return []


class Round:
    """One user's round over the backends; a line for each part of it."""

    def __init__(self, snippets: list[Entry], controls: list[Entry], runs: int) -> None:
        self.snippets, self.controls, self.runs = snippets, controls, runs
        self.bad: list[str] = []

    def run(self, backends: list[str]) -> int:
        for name in backends:
            self._one_by_one(name)
            self._two_at_once(name)
            self._leftovers(name)
        print(*self.bad, sep="\n")
        return len(self.bad)

    def _note(self, where: str, done: str, found: list[str], seconds: float) -> None:
        self.bad += [f"{where}: {line}" for line in found]
        print(f"{where:34} {done:52} {len(found):3} faults {seconds:7.1f} s", flush=True)

    def _one_by_one(self, name: str) -> None:
        started, found = time.monotonic(), []
        statuses: Counter[str] = Counter()
        between = [part for entry in self.snippets for part in (entry, self.controls[0])]
        with scene() as it, Judge(backend=name) as judge:
            for entry in [*self.controls, *between, *self.controls]:
                hostile = entry["expected"]["verdict"] != "passed"
                verdict, wrong = problems(judge, entry, it, wait=1 if hostile else 0)
                found += wrong
                statuses[("hostile " if hostile else "honest ") + verdict.status] += 1
        done = ", ".join(f"{count} {status}" for status, count in sorted(statuses.items()))
        self._note(f"uid {os.getuid()}, {name}", done, found, time.monotonic() - started)

    def _two_at_once(self, name: str) -> None:
        """Two judges in threads of one process; the things around are looked at afterwards."""
        started = time.monotonic()
        entries = [*self.controls, *self.snippets, *self.controls]
        with scene() as it, ThreadPoolExecutor(2) as pool:

            def judged() -> list[str]:
                with Judge(backend=name, workers=2) as judge:
                    verdicts = judge.check_all(Job(it.fill(e["code"]), e["test"], e["entry_point"]) for e in entries)
                rows = zip(entries, verdicts, strict=True)
                return [f"{entry['id']}: {line}" for entry, verdict in rows for line in wrong_verdict(entry, verdict)]

            both = [pool.submit(judged), pool.submit(judged)]
            found = [line for future in both for line in future.result()]
            time.sleep(1)
            found += it.damage() + survivors({it.victim.pid}) + marked_commands(it.mark) + sorted(work_dirs())
        self._note(f"uid {os.getuid()}, {name}, two at once", f"2 x {len(entries)}", found, time.monotonic() - started)

    def _leftovers(self, name: str) -> None:
        """Processes, files and memory before and after many programs of every kind."""
        started = time.monotonic()
        quick = [
            "def add(a, b):\n    return a + b\n",
            "import os\nos._exit(0)\n",
            "x = (",
            "open('f', 'w').write('x')\n",
        ]
        jobs = [Job(f"{quick[n % 4]}# {n}\n", TEST, "add") for n in range(self.runs)]
        with Judge(Limits(), backend=name) as judge:
            judge.check_all(jobs[:40])
            before = _holdings()
            verdicts = judge.check_all(jobs)
            time.sleep(1)
            after = _holdings()
        allowed = {"MiB": 1}
        found = [
            f"{key}: {before[key]} before, {after[key]} after"
            for key in before
            if after[key] - before[key] > allowed.get(key, 0)
        ]
        statuses = Counter(verdict.status for verdict in verdicts)
        if statuses["passed"] != (self.runs + 3) // 4 or statuses["sandbox_error"]:
            found.append(f"verdicts {dict(statuses)}")
        grown = ", ".join(f"{key} {before[key]}>{after[key]}" for key in before)
        self._note(f"uid {os.getuid()}, {name}, {self.runs} runs", grown, found, time.monotonic() - started)


def _holdings() -> dict[str, int]:
    return {
        "processes": len(survivors(set())),
        "files": sum(1 for _ in TEMP.rglob("*")),
        "descriptors": len(list(Path("/proc/self/fd").iterdir())),
        "MiB": memory() >> 20,
    }


def as_user(user: int, arguments: list[str]) -> int:
    """The faults of a round as this user, in a process with a home and a temporary folder of its own."""
    with tempfile.TemporaryDirectory(prefix="round-") as folder:
        os.chown(folder, user, user)
        paths = {"HOME": folder, "TMPDIR": folder, "PATH": os.environ["PATH"], "PYTHONPATH": os.pathsep.join(sys.path)}
        # The virtual environment's Python may lie where only root may go.
        for python in (sys.executable, "/usr/bin/python3"):
            command = [python, "-m", "tests.rewards.hostile", *arguments, "--here"]
            try:
                child = subprocess.Popen(command, env=paths, **_identity(user))
            except PermissionError:
                continue
            return child.wait()
    print(f"uid {user}: no Python that it may run")
    return 1


def _identity(user: int) -> dict[str, Any]:
    return {} if user == os.getuid() else {"user": user, "group": user, "extra_groups": []}


def offered() -> list[str]:
    """Backends that work here."""
    names = []
    for name in dict.fromkeys(backend.name for backend in candidates(Limits())):
        try:
            with Judge(backend=name):
                names.append(name)
        except RuntimeError as error:
            print(f"uid {os.getuid()}, {name}: does not work here: {str(error).rpartition(': ')[2]}")
    return names


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.rewards.hostile")
    parser.add_argument("snippets", nargs="?", type=Path, default=SNIPPETS)
    parser.add_argument("--backend", action="append", help="this one only; may be repeated")
    parser.add_argument("--runs", type=int, default=500, help="programs that must leave nothing behind")
    parser.add_argument("--own", action="store_true", help="this repository's attacks too")
    parser.add_argument("--here", action="store_true", help="in this process, as this user only")
    options = parser.parse_args()
    if not options.here:
        users = [os.getuid()] + [ORDINARY_USER] * (os.getuid() == 0)
        faults = sum(as_user(user, sys.argv[1:]) for user in users)
        print(f"{faults} faults")
        return min(faults, 100)
    data = json.loads(options.snippets.read_text(encoding="utf-8"))
    attacks, honest = own_entries() if options.own else ([], [])
    adopt_orphans()
    mine = Round([*data["snippets"], *attacks], [*data["controls"], *honest], options.runs)
    return min(mine.run(options.backend or offered()), 100)


if __name__ == "__main__":
    sys.exit(main())
