"""Checkpoints: one atomic folder a saved step, the newest that verifies for a resume, rotation, `latest` and `best`.

    step_000100/  model/ or adapter/   what was trained, in mlx-lm's layout
                  optimizer.safetensors  moments and step of the optimizer
                  trainer.safetensors    what else the trainer keeps as arrays, such as PPO's critic; where it does
                  state.json           step, settings, the trainer's own state, best metric, versions
                  manifest.json        sizes and sha256 of all of these

Random numbers are a function of the seed, the step and the row, so that no generator's state has to be kept.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
from mlx.optimizers import Optimizer
from mlx.utils import tree_flatten, tree_unflatten

from configs.atomic import new_directory, read_manifest, sha256, verify, write_json
from configs.schema import CheckpointConfig

STATE = "state.json"
OPTIMIZER = "optimizer.safetensors"
TRAINER = "trainer.safetensors"


@dataclass(frozen=True)
class Saved:
    """A checkpoint on disk, verified."""

    path: Path
    step: int
    state: Mapping[str, Any]


@dataclass(frozen=True)
class CheckpointStore:
    """The checkpoints of one run, under `root`."""

    root: Path
    config: CheckpointConfig

    def save(
        self,
        step: int,
        *,
        write_weights: Callable[[Path], None],
        optimizer: Optimizer,
        state: Mapping[str, Any],
        metrics: Mapping[str, float],
        arrays: Mapping[str, mx.array] | None = None,
    ) -> Path:
        """Write the checkpoint of `step` completed steps, move the pointers, drop what rotation doesn't keep."""
        best = self._best_after(step, metrics)
        path = self.path(step)
        with new_directory(path) as folder:
            write_weights(folder)
            mx.save_safetensors(str(folder / OPTIMIZER), dict(tree_flatten(optimizer.state)))
            if arrays:
                mx.save_safetensors(str(folder / TRAINER), dict(arrays))
            write_json(folder / STATE, {**state, "step": step, "best": best})
        write_json(self.root / "latest.json", {"step": step, "checkpoint": path.name})
        if best is not None:
            write_json(self.root / "best.json", best)
        self.rotate(protected={step} | ({best["step"]} if best else set()))
        return path

    def path(self, step: int) -> Path:
        return self.root / f"step_{step:06d}"

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, in order; unfinished folders are hidden and don't count."""
        return sorted(int(folder.name.removeprefix("step_")) for folder in self.root.glob("step_*"))

    def newest(self) -> tuple[Saved | None, list[str]]:
        """The newest checkpoint that verifies, and why each newer one was passed over."""
        skipped: list[str] = []
        for step in reversed(self.steps()):
            try:
                return load(self.path(step)), skipped
            except ValueError as error:
                skipped.append(str(error))
        return None, skipped

    def chosen(self) -> Saved:
        """The one to publish: the best by the configured metric, else the newest. `ValueError` where none verifies."""
        best = _read_pointer(self.root / "best.json")
        if best is not None and self.config.best_metric is not None:
            return load(self.path(int(best["step"])))
        newest, skipped = self.newest()
        if newest is None:
            raise ValueError(f"{self.root}: no checkpoint that verifies; {'; '.join(skipped) or 'none there'}")
        return newest

    def rotate(self, protected: set[int]) -> None:
        """Delete all but the last `keep_last`, every `keep_every`-th and the protected steps."""
        steps = self.steps()
        kept = set(steps[-self.config.keep_last :]) | protected
        if self.config.keep_every:
            kept |= {step for step in steps if step % self.config.keep_every == 0}
        for step in set(steps) - kept:
            shutil.rmtree(self.path(step))
        for unfinished in self.root.glob(".step_*.tmp"):
            shutil.rmtree(unfinished)

    def _best_after(self, step: int, metrics: Mapping[str, float]) -> dict[str, Any] | None:
        best = _read_pointer(self.root / "best.json")
        name = self.config.best_metric
        if name is None or name not in metrics:
            return best
        value, sign = metrics[name], 1 if self.config.best_mode == "max" else -1
        if best is not None and best["metric"] == name and sign * value <= sign * best["value"]:
            return best
        return {"metric": name, "value": value, "step": step, "checkpoint": self.path(step).name}


def load(path: Path) -> Saved:
    """A checkpoint whose files are all what its manifest says. `ValueError` names what is wrong with it."""
    verify(path)
    state = json.loads((path / STATE).read_text(encoding="utf-8"))
    return Saved(path, state["step"], state)


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


def _read_pointer(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
