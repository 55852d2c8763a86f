"""Ranks: processes, on one machine or several, that train one model together over `mx.distributed`.

Every rank holds the whole model and does its share of each batch. What is small (rollouts, scores, metrics) is
gathered, so that every rank has the whole step's numbers and decides alike; gradients are summed, with weights that
make the sum the gradient of the whole batch. Left out: sharded models and optimizers, and going on without a lost rank.
"""

import json
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar, cast

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

Item = TypeVar("Item")
Answer = TypeVar("Answer")
POLL_SECONDS = 0.2
WORD_SECONDS = 5.0
"""How long a collective that failed waits to hear which rank was lost."""


@dataclass(frozen=True)
class Lost:
    """A rank that is gone."""

    rank: int
    host: str
    why: str
    said: bool = False
    """It said so itself: it was interrupted, or failed, and saved what it could."""

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host} {'ended' if self.said else 'was lost'}: {self.why}"


class RankLostError(KeyboardInterrupt):
    """An interrupt, because the others can't go on without a rank."""


class Ranks:
    """The ranks of a training: this process alone."""

    rank = 0
    size = 1

    @property
    def is_writer(self) -> bool:
        """Writes checkpoints, samples and metrics."""
        return self.rank == 0

    def share(self, items: Sequence[Item], costs: Sequence[float] | None = None) -> Sequence[Item]:
        """This rank's run of the items; the runs of all ranks in order are the items, of about equal cost."""
        del costs
        return items

    def gather(self, items: Sequence[Item]) -> list[Item]:
        """The items (JSON; arrays arrive as lists) of all ranks in order. Every rank must call it, as for `sum`."""
        return list(items)

    def sum(self, tree: Any) -> Any:
        """The sum over all ranks of a tree of arrays, equal on all of them."""
        return tree


ALONE = Ranks()


class MlxRanks(Ranks):
    """Ranks over a group of `mx.distributed`.

    Collectives run in a thread and on a stream of their own: the main thread stays open to interrupts while it waits,
    and can still compute when a lost rank has left a collective hanging.
    """

    def __init__(self, group: mx.distributed.Group, device: mx.DeviceType = mx.cpu) -> None:
        """`device` is where the backend communicates: the GPU for NCCL, the CPU for every other."""
        self.rank, self.size, self._group = group.rank(), group.size(), group
        self.lost: Callable[[], Lost | None] = lambda: None
        """Says which rank is gone, if any."""
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="collectives")
        # A stream belongs to the thread that made it.
        self._stream = self._thread.submit(lambda: mx.new_stream(mx.Device(device))).result()

    @property
    def is_writer(self) -> bool:
        """Rank 0, or the next one where it was lost without a word."""
        lost = self.lost()
        return self.rank == (1 if lost is not None and lost.rank == 0 and not lost.said else 0)

    def share(self, items: Sequence[Item], costs: Sequence[float] | None = None) -> Sequence[Item]:
        start, end = bounds([1.0] * len(items) if costs is None else costs, self.rank, self.size)
        return items[start:end]

    def gather(self, items: Sequence[Item]) -> list[Item]:
        own = json.dumps(list(items), default=lambda array: array.tolist()).encode()
        lengths = self._all_gather(np.array([len(own)]))
        padded = np.frombuffer(own.ljust(int(lengths.max()), b" "), dtype=np.uint8)
        rows = self._all_gather(padded).reshape(self.size, -1)
        return [item for row in rows for item in json.loads(row.tobytes())]

    def sum(self, tree: Any) -> Any:
        # In the order of names, so that every rank sums the same arrays at the same time.
        named = sorted(cast(list[tuple[str, mx.array]], tree_flatten(tree)))
        mx.eval([array for _, array in named])

        def summed(stream: mx.Stream) -> list[mx.array]:
            arrays = [mx.distributed.all_sum(array, group=self._group, stream=stream) for _, array in named]
            mx.eval(arrays)
            return arrays

        arrays = self._call(summed)
        return tree_unflatten(list(zip((name for name, _ in named), arrays, strict=True)))

    def _all_gather(self, values: np.ndarray) -> np.ndarray:
        def gathered(stream: mx.Stream) -> np.ndarray:
            with mx.stream(stream):
                return np.array(mx.distributed.all_gather(mx.array(values), group=self._group, stream=stream))

        return self._call(gathered)

    def _call(self, collective: Callable[[mx.Stream], Answer]) -> Answer:
        answer = self._thread.submit(self._confirmed, collective)
        while not wait([answer], timeout=POLL_SECONDS).done:
            lost = self.lost()
            if lost is not None:
                raise RankLostError(str(lost))
        error = answer.exception()
        if isinstance(error, RuntimeError):
            self._explain(error)
        return answer.result()

    def _confirmed(self, collective: Callable[[mx.Stream], Answer]) -> Answer:
        """What a collective gives; `RuntimeError` where a rank that died meanwhile made the backend give garbage."""
        found = collective(self._stream)
        answered = mx.distributed.all_sum(mx.array([1.0]), group=self._group, stream=self._stream)
        if float(np.array(answered)[0]) != self.size:
            raise RuntimeError("a rank stopped answering in the middle of a collective")
        return found

    def _explain(self, error: RuntimeError) -> NoReturn:
        """The backend has lost a connection: the interrupt that says whose, as soon as that is known."""
        waited = threading.Event()
        for _ in range(round(WORD_SECONDS / POLL_SECONDS)):
            lost = self.lost()
            if lost is not None:
                raise RankLostError(str(lost)) from error
            waited.wait(POLL_SECONDS)
        raise error


def bounds(costs: Iterable[float], rank: int, size: int) -> tuple[int, int]:
    """Start and end of a rank's run: it owns the items whose middle falls into its part of the whole cost."""
    widths = np.asarray(list(costs), dtype=np.float64)
    middles = np.cumsum(widths) - widths / 2
    owners = np.minimum(middles * size / max(widths.sum(), 1e-9), size - 1).astype(int)
    start, end = np.searchsorted(owners, [rank, rank + 1])
    return int(start), int(end)
