"""Checkpoints: one atomic folder a saved step, the newest that verifies for a resume, rotation, `latest` and `best`.

    step_000100/  model/ or adapter/   what was trained, in mlx-lm's layout
                  optimizer.safetensors  moments and step of the optimizer
                  trainer.safetensors    what else the trainer keeps as arrays, such as PPO's critic; where it does
                  state.json           step, settings and their digest, the trainer's own state, best metric, versions
                  manifest.json        sizes and sha256 of all of these, and of itself

Random numbers are a function of the seed, the step and the row, so that no generator's state has to be kept: the
sampler's is its position. `latest.json` and `best.json` are for people and other programs; nothing here reads them.
"""

import errno
import json
import logging
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
from mlx.optimizers import Optimizer
from mlx.utils import tree_flatten, tree_unflatten

from configs.atomic import (
    folder_fault,
    free_bytes,
    new_directory,
    read_manifest,
    seal_fault,
    sha256,
    sweep,
    write_json,
    write_sealed,
)
from configs.schema import CheckpointConfig

STATE = "state.json"
OPTIMIZER = "optimizer.safetensors"
TRAINER = "trainer.safetensors"
POINTERS = ("latest.json", "best.json")
SLACK_BYTES = 1 << 20
"""Of each checkpoint: its JSON, its tokenizer, the file system's own."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Saved:
    """A checkpoint on disk, verified."""

    path: Path
    step: int
    state: Mapping[str, Any]


@dataclass
class CheckpointStore:
    """The checkpoints of one run, under `root`."""

    root: Path
    config: CheckpointConfig
    best: dict[str, Any] | None = None
    """The best step so far, by the configured metric."""
    damaged: set[int] = field(default_factory=set)
    """Steps that were passed over."""
    resumed: int | None = None
    """The step that this process went on from; it is kept."""

    def save(
        self,
        step: int,
        *,
        write_weights: Callable[[Path], None],
        weight_bytes: int,
        optimizer: Optimizer,
        state: Mapping[str, Any],
        metrics: Mapping[str, float],
        arrays: Mapping[str, mx.array] | None = None,
    ) -> Path:
        """Write the checkpoint of `step` completed steps, move the pointers, drop what rotation doesn't keep.

        On a full disk, whose error `full` words, what was there before is untouched.
        """
        best, path = self._best_after(step, metrics), self.path(step)
        sweep(self.root)
        size = weight_bytes + tree_bytes(optimizer.state) + tree_bytes(arrays or {}) + SLACK_BYTES
        free = free_bytes(self.root)
        if size > free:
            raise OSError(errno.ENOSPC, f"the checkpoint needs {gigabytes(size)} and {gigabytes(free)} are free")
        with new_directory(path) as folder:
            write_weights(folder)
            mx.save_safetensors(str(folder / OPTIMIZER), dict(tree_flatten(optimizer.state)))
            if arrays:
                mx.save_safetensors(str(folder / TRAINER), dict(arrays))
            write_json(folder / STATE, {**state, "step": step, "best": best})
        self.best = best
        self.damaged.discard(step)
        self._point(step)
        self.rotate(step)
        return path

    def path(self, step: int) -> Path:
        return self.root / f"step_{step:06d}"

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, in order; unfinished folders are hidden and don't count."""
        found = (re.fullmatch(r"step_(\d{6,})", folder.name) for folder in self.root.glob("step_*") if folder.is_dir())
        return sorted(int(name[1]) for name in found if name)

    def newest(self) -> tuple[Saved | None, list[str]]:
        """The newest checkpoint that verifies, and why each newer one was passed over."""
        skipped: list[str] = []
        for step in reversed(self.steps()):
            wrong = fault(self.path(step))
            if wrong is None:
                return _read(self.path(step)), skipped
            skipped.append(wrong)
            self.damaged.add(step)
        return None, skipped

    def go_on_from(self, saved: Saved) -> list[str]:
        """Take up the run at this checkpoint; which pointers were damaged, and are written anew."""
        self.resumed, self.best = saved.step, saved.state["best"]
        sweep(self.root)
        faults = [wrong for name in POINTERS if (wrong := seal_fault(self.root / name))]
        if faults:
            self._point(saved.step)
        return faults

    def chosen(self) -> Saved:
        """The one to publish: the best by the configured metric, else the newest. `ValueError` where none verifies."""
        newest, skipped = self.newest()
        if newest is None:
            raise ValueError(f"{self.root}: no checkpoint that verifies; {'; '.join(skipped) or 'none there'}")
        best = newest.state["best"]
        if best is None or self.config.best_metric is None or int(best["step"]) == newest.step:
            return newest
        path = self.path(int(best["step"]))
        wrong = fault(path)
        if wrong is not None:
            log.warning("the best checkpoint is passed over, the newest takes its place: %s", wrong)
        return _read(path) if wrong is None else newest

    def rotate(self, step: int) -> None:
        """Delete what is before `step` but for the last `keep_last`, every `keep_every`-th, the best, the resumed.

        What is ahead of `step`, where a run went back, stays until the run comes there again.
        """
        past = [each for each in self.steps() if each <= step]
        whole = [each for each in past if each not in self.damaged]
        kept = {*whole[-self.config.keep_last :], self.resumed, *([self.best["step"]] if self.best else [])}
        if self.config.keep_every:
            kept |= {each for each in whole if each % self.config.keep_every == 0}
        for each in set(past) - kept:
            shutil.rmtree(self.path(each))

    def most(self, steps: int) -> int:
        """How many checkpoints stand side by side at most in a run of `steps` steps, the one being written included."""
        saves = -(-steps // self.config.save_every)
        every = steps // self.config.keep_every if self.config.keep_every else 0
        # The best metric may come at any step, so that what is kept for it may be one more.
        return min(saves, self.config.keep_last + every + 1) + (self.config.best_metric is not None)

    def require_room(self, steps: int, checkpoint_bytes: int, published_bytes: int) -> None:
        """`OSError` (ENOSPC) with the figures where the whole run's checkpoints don't fit on the disk."""
        missing = max(self.most(steps) - len(self.steps()), 1)
        needed, free = missing * (checkpoint_bytes + SLACK_BYTES) + published_bytes, free_bytes(self.root)
        log.info("disk: %s for up to %d checkpoints, %s free", gigabytes(needed), missing, gigabytes(free))
        if needed > free:
            raise OSError(
                errno.ENOSPC,
                f"{missing} checkpoints of {gigabytes(checkpoint_bytes)} and what is published need "
                f"{gigabytes(needed)}, and {gigabytes(free)} are free; make room, or lower checkpoint.keep_last or "
                "raise checkpoint.keep_every",
                str(self.root),
            )

    def _point(self, step: int) -> None:
        write_sealed(self.root / "latest.json", {"step": step, "checkpoint": self.path(step).name})
        if self.best is not None:
            write_sealed(self.root / "best.json", self.best)

    def full(self, step: int, error: Exception) -> OSError:
        """What to say of a full disk: the figures, what to do, and where the run will go on."""
        there = [each for each in self.steps() if each not in self.damaged]
        place = f"step {there[-1]}" if there else "its beginning"
        said = (error.strerror if isinstance(error, OSError) else None) or str(error)
        return OSError(
            errno.ENOSPC,
            f"no room at step {step}: {said}; {gigabytes(free_bytes(self.root))} are free; make room and start again: "
            f"the run goes on from {place}",
            str(self.root),
        )

    def _best_after(self, step: int, metrics: Mapping[str, float]) -> dict[str, Any] | None:
        best, name = self.best, self.config.best_metric
        if name is None or name not in metrics:
            return best
        value, sign = metrics[name], 1 if self.config.best_mode == "max" else -1
        if best is not None and best["metric"] == name and sign * value <= sign * best["value"]:
            return best
        return {"metric": name, "value": value, "step": step, "checkpoint": self.path(step).name}


def load(path: Path) -> Saved:
    """A checkpoint whose files are all what its manifest says. `ValueError` names what is wrong with it."""
    wrong = fault(path)
    if wrong is not None:
        raise ValueError(wrong)
    return _read(path)


def fault(path: Path) -> str | None:
    """What is wrong with a checkpoint, if anything."""
    wrong = folder_fault(path)
    if wrong is not None:
        return wrong
    step = _read(path).step
    return None if path.name == f"step_{step:06d}" else f"{path}: holds the checkpoint of step {step}"


def _read(path: Path) -> Saved:
    state = json.loads((path / STATE).read_text(encoding="utf-8"))
    return Saved(path, state["step"], state)


def tree_bytes(tree: Any) -> int:
    """The bytes of all arrays in a tree."""
    return sum(array.nbytes for _, array in cast(list[tuple[str, mx.array]], tree_flatten(tree)))


def gigabytes(size: float) -> str:
    """A size as people read it."""
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.2f} MB"


def restore_optimizer(optimizer: Optimizer, path: Path) -> None:
    """The optimizer as it was when the checkpoint was written."""
    arrays = cast(dict[str, mx.array], mx.load(str(path / OPTIMIZER)))
    optimizer.state = cast(Any, tree_unflatten(list(arrays.items())))


def trainer_arrays(path: Path) -> dict[str, mx.array]:
    """What the trainer kept as arrays when the checkpoint was written; empty where it kept none."""
    file = path / TRAINER
    return cast(dict[str, mx.array], mx.load(str(file))) if file.is_file() else {}


def manifest_digest(path: Path) -> str:
    """The sha256 of a folder's manifest, which fixes the content of every file in it."""
    read_manifest(path)
    return sha256(path / "manifest.json")
