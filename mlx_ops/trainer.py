"""The loop that SFT, GRPO and PPO share: where a batch comes from and what its loss is are the subclass's two methods.

It knows no file, no sink and no tokenizer: what it needs is handed in.
"""

import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, ClassVar, Generic, TypeVar

import mlx.core as mx
import mlx.nn as nn
from mlx.optimizers import Optimizer
from mlx.utils import tree_map

from mlx_ops.backend import prepare
from mlx_ops.batching import Tree
from mlx_ops.distributed import ALONE, Ranks
from mlx_ops.gradient import CompiledGradient, ValueAndGradient
from mlx_ops.microbatches import BUCKET
from mlx_ops.optimizers import ClippedStep, Move, global_norm

Batch = TypeVar("Batch")
Metrics = dict[str, float]
SUMS = ("tokens", "updates", "skipped_updates")
RATES = {"generate": "tokens_generated", "update": "tokens"}
Report = Callable[[int, Metrics], None]
Inspect = Callable[[str, Mapping[str, mx.array]], None]


@dataclass(frozen=True)
class Limits:
    """When an update is held back."""

    max_grad_norm: float = 1.0
    max_nonfinite_steps: int = 3


def forget(name: str, arrays: Mapping[str, mx.array]) -> None:
    """Keeps nothing of a batch."""


def no_metrics(step: int) -> Metrics:  # noqa: ARG001 (the shape of an evaluation)
    """An evaluation that looks at nothing."""
    return {}


class BaseTrainer(ABC, Generic[Batch]):
    """A subclass writes `collect` and `loss`."""

    compilable: ClassVar[bool] = False
    """`loss` reads nothing that changes but the model and the batch. A class that writes a `loss` says so itself."""

    def __init_subclass__(cls, **given: Any) -> None:
        super().__init_subclass__(**given)
        if "loss" in vars(cls) and "compilable" not in vars(cls):
            cls.compilable = False

    def __init__(
        self, model: nn.Module, optimizer: Optimizer, *, seed: int, limits: Limits, ranks: Ranks = ALONE
    ) -> None:
        self.model, self.optimizer, self.seed, self.limits, self.ranks = model, optimizer, seed, limits, ranks
        self.optimizer_step = ClippedStep(optimizer, limits.max_grad_norm)
        # A CPU gains 3 to 5 %, less than tracing each shape costs.
        self.compiled = self.compilable and prepare().is_gpu
        self.compiled_gradient = CompiledGradient()
        self.compiled_check = mx.compile(self._check)
        self.completed = 0
        self.resting = True
        """The weights are those of `completed` steps, `committed` is the state after them, and they are reported."""
        self.committed: dict[str, Any] = {}
        self.nonfinite_in_a_row = 0
        self.kept: tuple[Tree, Tree, dict[str, mx.array]] | None = None
        self.inspect: Inspect = forget

    @abstractmethod
    def collect(self, step: int) -> tuple[Iterable[Sequence[Batch]], Metrics]:
        """The minibatches of a step, each as microbatches whose losses add up to the minibatch's, and metrics.

        Minibatches may come one at a time, as the updates before them are done; metrics may grow until the last.
        """

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch) -> tuple[mx.array, Mapping[str, mx.array]]:
        """The microbatch's share of the minibatch's loss, and detached metrics.

        Metrics are averaged by `tokens`; parts of the loss end in `_loss` and add up; arrays are for `observe`.
        """

    @property
    def bucket(self) -> int:
        """Lengths in batches are padded to multiples of this: a compiled gradient is traced for each shape."""
        return BUCKET if self.compiled else 1

    def gradient(self, batch: Batch) -> ValueAndGradient:
        """The loss of a microbatch with its metrics, and its gradient."""
        if self.compiled:
            return self.compiled_gradient(self.loss, self.model, batch)
        return nn.value_and_grad(self.model, self.loss)(self.model, batch)

    def state(self) -> dict[str, Any]:
        """What a resumed run needs beside weights, optimizer and step; JSON."""
        return {"nonfinite_in_a_row": self.nonfinite_in_a_row, "shapes": dict(self.compiled_gradient.met)}

    def arrays(self) -> dict[str, mx.array]:
        """What else it needs, as arrays: those of the last completed step while the trainer rests."""
        return {}

    def restore(self, step: int, state: Mapping[str, Any], arrays: Mapping[str, mx.array]) -> None:  # noqa: ARG002
        """Go on after `step` completed steps, with what `state` and `arrays` gave then."""
        self.completed = step
        self.nonfinite_in_a_row = int(state["nonfinite_in_a_row"])
        self.compiled_gradient.met = Counter(state.get("shapes", {}))

    def observe(self, batch: Batch, extra: Mapping[str, mx.array]) -> None:
        """Look at what a microbatch's loss returned beside the loss."""

    def fit(
        self,
        steps: int,
        *,
        report: Report,
        save: Callable[[int, Metrics], None],
        evaluate: Callable[[int], Metrics] = no_metrics,
        shield: Callable[[], AbstractContextManager[None]] = nullcontext,
        inspect: Inspect = forget,
    ) -> None:
        """Train up to `steps` completed steps. `shield` holds an interrupt back from the first update to the report.

        `inspect` is handed the minibatch of each update that is skipped, under a name.
        """
        self.committed, self.inspect, saved = self.state(), inspect, 0.0
        for step in range(self.completed, steps):
            started = time.perf_counter()
            mx.reset_peak_memory()
            # Ranks draw their noise (dropout, NEFTune) apart.
            mx.random.seed(self.seed * 1_000_003 + step + (self.ranks.rank << 48))
            minibatches, metrics = self.collect(step)
            with shield():
                self._keep()
                self.resting = False
                metrics |= mean_of([self.update(batch) for batch in minibatches])
                updated = time.perf_counter()
                # Inside the shield: an interrupt that waited must not meet weights whose step isn't reported yet.
                metrics |= evaluate(step + 1)
                done = time.perf_counter()
                metrics |= {"seconds/evaluate": done - updated, "seconds/step": done - started, "seconds/save": saved}
                peak = max(self.ranks.gather([mx.get_peak_memory() / 1e9]))
                report(step + 1, metrics | rates(metrics) | {"peak_memory_gb": peak})
                self.completed, self.committed, self.resting = step + 1, self.state(), True
            save(self.completed, metrics)
            saved = time.perf_counter() - done

    def update(self, minibatch: Sequence[Batch]) -> Metrics:
        """One optimizer step over microbatches; one whose loss or gradient is not finite changes nothing and counts."""
        started = time.perf_counter()
        total, grads, extras = self._summed(minibatch)
        total, grads = self.ranks.sum((total, grads))
        norms, finite = (self.compiled_check if self.compiled else self._check)(total, grads)
        mx.async_eval(norms, finite)
        # Built while the device computes what decides whether they are made.
        moves = self.moves(grads, norms)
        allowed = bool(finite.item())
        if allowed:
            for move in moves:
                move.make()
            mx.eval([(move.weights, move.state) for move in moves])
        parts = self.ranks.gather([self._measured(*part) for part in zip(minibatch, extras, strict=True)])
        assert parts, "a minibatch without microbatches"
        if not allowed:
            name = f"step_{self.completed + 1:06d}_{self.nonfinite_in_a_row + 1}"
            self.inspect(name, {"loss": total, **norms} | named_arrays(minibatch))
        self.nonfinite_in_a_row = nonfinite_in_a_row(allowed, self.nonfinite_in_a_row, self.limits.max_nonfinite_steps)
        return {
            **whole_of(parts),
            **{name: float(norm) for name, norm in norms.items()},
            "loss": float(total),
            "learning_rate": float(self.optimizer.learning_rate),
            "updates": 1.0,
            "skipped_updates": float(not allowed),
            "seconds/update": time.perf_counter() - started,
        }

    def _summed(self, minibatch: Sequence[Batch]) -> tuple[mx.array, Tree, list[Mapping[str, mx.array]]]:
        """The loss and its gradient, enqueued, and what the microbatches returned beside it."""
        total, grads, extras = mx.array(0.0), None, []
        for batch in minibatch:
            if grads is not None:  # a microbatch's activations go before the next one's come
                mx.eval(total, grads)
            (value, extra), new = self.gradient(batch)
            total = total + value
            grads = new if grads is None else tree_map(mx.add, grads, new)
            mx.async_eval(total, grads, extra)
            extras.append(extra)
        if grads is None:  # the other ranks have all of them
            grads = tree_map(mx.zeros_like, self.model.trainable_parameters())
        return total, grads, extras

    def _check(self, total: mx.array, grads: Tree) -> tuple[dict[str, mx.array], mx.array]:
        """The norms, and whether they and the loss are finite."""
        norms = self.norms(grads)
        return norms, mx.all(mx.isfinite(mx.stack([total, *norms.values()])))

    def _measured(self, batch: Batch, extra: Mapping[str, mx.array]) -> Metrics:
        self.observe(batch, extra)
        return {name: float(number) for name, number in extra.items() if number.ndim == 0}

    def rewind(self) -> None:
        """Back to the last completed step, where a lost rank keeps the one that has begun from being completed."""
        if self.resting or self.kept is None:
            return
        weights, moments, arrays = self.kept
        self.model.update(weights)
        self.optimizer.state = moments
        self.restore(self.completed, self.committed, arrays)
        self.resting = True

    def _keep(self) -> None:
        # Alone, the interrupt waits for the end of the step, and no second copy of the weights need be held.
        if self.ranks.size > 1:
            same = tree_map(lambda array: array, (self.model.trainable_parameters(), self.optimizer.state))
            self.kept = (*same, self.arrays())

    def norms(self, grads: Tree) -> dict[str, mx.array]:
        """The norms of the gradients before clipping, by the name of their metric."""
        return {"grad_norm": global_norm(grads)}

    def moves(self, grads: Tree, norms: Mapping[str, mx.array]) -> list[Move]:
        """The steps by these gradients, to be made where they are finite."""
        return [self.optimizer_step(self.model, grads, norms["grad_norm"])]


def named_arrays(value: Any, name: str = "batch") -> dict[str, mx.array]:
    """The arrays in batches, which are dataclasses of arrays and of each other, by dotted name."""
    if isinstance(value, mx.array):
        return {name: value}
    if is_dataclass(value):
        inside = {each.name: getattr(value, each.name) for each in fields(value)}
    elif isinstance(value, list | tuple):
        inside = dict(enumerate(value))
    else:
        return {}
    return {
        found: array for part, item in inside.items() for found, array in named_arrays(item, f"{name}.{part}").items()
    }


def nonfinite_in_a_row(finite: bool, before: int, limit: int) -> int:
    """The count after one more update; `FloatingPointError` at the limit."""
    count = 0 if finite else before + 1
    if count >= limit:
        raise FloatingPointError(
            f"{count} updates in a row had a loss or gradient that is not finite; "
            "lower the learning rate, or look at the batches that were kept under nonfinite/"
        )
    return count


def rates(metrics: Mapping[str, float]) -> Metrics:
    """Tokens a second of generation and of updates, each over its own seconds."""
    return {
        f"tokens_per_second/{part}": metrics[tokens] / metrics[f"seconds/{part}"]
        for part, tokens in RATES.items()
        if tokens in metrics and metrics.get(f"seconds/{part}", 0.0) > 0
    }


def whole_of(parts: Sequence[Mapping[str, float]]) -> Metrics:
    """An update's metrics from those of its microbatches: shares of its loss add up, the rest as in `mean_of`."""
    shares = [name for name in parts[0] if name.endswith("_loss")]
    return mean_of(parts) | {name: sum(part[name] for part in parts) for name in shares}


def mean_of(rows: Sequence[Mapping[str, float]]) -> Metrics:
    """Means by name, weighted by each row's `tokens`; `_min` and `_max` are extremes, counts and seconds are sums."""
    names = {name: None for row in rows for name in row}
    return {name: _combine(name, [row for row in rows if name in row]) for name in names}


def _combine(name: str, rows: Sequence[Mapping[str, float]]) -> float:
    values = [row[name] for row in rows]
    if name.endswith("_min"):
        return min(values)
    if name.endswith("_max"):
        return max(values)
    if name.startswith("seconds/") or name in SUMS:
        return sum(values)
    weights = [row.get("tokens", 1.0) for row in rows]
    return sum(w * v for w, v in zip(weights, values, strict=True)) / max(sum(weights), 1.0)
