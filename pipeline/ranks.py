"""How a process joins the ranks that `mlx.launch` (or `mpirun`) has started, and learns that one of them is gone.

The backends don't say who was lost, and some wait for ever. So every rank holds a connection to rank 0 that carries
nothing but a last word; where it breaks without one, the rank at its other end is lost. The operating system notices
a process that dies at once, and probes for a machine that has gone silent. A process that is merely stopped isn't lost.
"""

import json
import logging
import os
import secrets
import signal
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import FrameType

import mlx_ops as mlx_ops  # before MLX, which binds its BLAS when it is imported

# isort: split
import mlx.core as mx

from mlx_ops.distributed import ALONE, Lost, MlxRanks, RankLostError, Ranks

LAUNCHED = ("MLX_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK")
SILENT_SECONDS = 5
PROBES = 3
JOIN_SECONDS = 60.0

log = logging.getLogger(__name__)


@contextmanager
def joined(environ: Mapping[str, str]) -> Iterator[Ranks]:
    """The ranks that this process was started among; alone where nobody started any.

    Inside, SIGTERM interrupts, as the loss of another rank does, which then leaves as `RankLostError`. Rank 0 alone
    heeds SIGINT: the others follow it.
    """
    group = mx.distributed.init(strict=True) if any(name in environ for name in LAUNCHED) else None
    if group is None or group.size() == 1:
        yield ALONE
        return
    ranks = MlxRanks(group, mx.gpu if "NCCL_HOST_IP" in environ else mx.cpu)
    watch = Watch(*_connected(ranks, meeting_place(environ)))
    interrupted = False

    def interrupt(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 (a signal handler's shape)
        # Once: the launcher and the watch both send one, and the second must not break what follows the first.
        nonlocal interrupted
        if not interrupted:
            interrupted = True
            raise KeyboardInterrupt

    def lost_one() -> Lost | None:
        nonlocal interrupted
        interrupted = interrupted or watch.lost is not None
        return watch.lost

    ranks.lost = lost_one
    signal.signal(signal.SIGTERM, interrupt)
    signal.signal(signal.SIGINT, signal.SIG_IGN if ranks.rank else interrupt)
    try:
        yield ranks
    except KeyboardInterrupt:
        # A launcher may stop us for the loss of a rank a moment before we hear of it.
        lost = watch.lost or watch.heard(seconds=1.0)
        watch.leave("interrupted" if lost is None else f"interrupted, for {lost}")
        if lost is None:
            raise
        raise RankLostError(str(lost)) from None
    except BaseException as error:
        watch.leave(f"{type(error).__name__}: {error}")
        raise
    watch.leave(None)


def meeting_place(environ: Mapping[str, str]) -> str:
    """An address of rank 0 that the others reach: the one that its backend communicates through, else loopback."""
    if file := environ.get("MLX_HOSTFILE"):
        return str(json.loads(Path(file).read_text(encoding="utf-8"))[0][0]).rsplit(":", 1)[0]
    if coordinator := environ.get("MLX_JACCL_COORDINATOR"):
        return coordinator.rsplit(":", 1)[0]
    return environ.get("NCCL_HOST_IP", "127.0.0.1")


def _connected(ranks: MlxRanks, place: str) -> tuple[list[str], dict[int, socket.socket]]:
    """The ranks' hosts, and the connections: rank 0's to every other, another's to rank 0."""
    server = socket.create_server((place, 0)) if ranks.rank == 0 else None
    port = None if server is None else server.getsockname()[1]
    rows = ranks.gather([(socket.gethostname(), port, secrets.token_hex(16))])
    hosts, (_, first_port, token) = [row[0] for row in rows], rows[0]
    if server is None:
        link = socket.create_connection((place, first_port), timeout=JOIN_SECONDS)
        link.sendall(json.dumps({"rank": ranks.rank, "token": token}).encode() + b"\n")
        return hosts, {0: _probed(link)}
    links: dict[int, socket.socket] = {}
    server.settimeout(JOIN_SECONDS)
    with server:
        while len(links) < ranks.size - 1:
            link, _ = server.accept()
            hello = _word(link)
            if hello is not None and secrets.compare_digest(hello.get("token", ""), token):
                links[hello["rank"]] = _probed(link)
    return hosts, links


def _probed(link: socket.socket) -> socket.socket:
    """A connection that breaks within `SILENT_SECONDS` * (`PROBES` + 1) of its other end's silence."""
    link.settimeout(None)
    link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    idle = getattr(socket, "TCP_KEEPIDLE", None) or socket.TCP_KEEPALIVE  # macOS has the second
    for option, value in ((idle, SILENT_SECONDS), (socket.TCP_KEEPINTVL, SILENT_SECONDS), (socket.TCP_KEEPCNT, PROBES)):
        link.setsockopt(socket.IPPROTO_TCP, option, value)
    return link


def _word(link: socket.socket) -> dict | None:
    """The next word (a line of JSON); `None` where the connection is gone."""
    text = b""
    try:
        while not text.endswith(b"\n"):
            more = link.recv(4096)
            if not more:
                return None
            text += more
    except OSError:
        return None
    return json.loads(text)


class Watch:
    """Listens at the connections; the first loss interrupts the main thread."""

    def __init__(self, hosts: list[str], links: dict[int, socket.socket]) -> None:
        self.lost: Lost | None = None
        self._hosts, self._links = hosts, links
        self._lock, self._told = threading.Lock(), threading.Event()
        self._left = False
        for rank, link in links.items():
            threading.Thread(target=self._listen, args=(rank, link), daemon=True, name=f"rank-{rank}").start()

    def heard(self, *, seconds: float) -> Lost | None:
        """The loss, if there is word of one within so many seconds."""
        self._told.wait(seconds)
        return self.lost

    def leave(self, why: str | None) -> None:
        """Say goodbye: for `why`, or because all is done."""
        with self._lock:
            self._left = True
        self._tell({"goodbye": why})

    def _listen(self, rank: int, link: socket.socket) -> None:
        word = _word(link)
        if word is not None and word.get("goodbye", "") is None:
            return
        if word is None:
            lost = Lost(rank, self._hosts[rank], "its process or its machine is gone")
        elif "lost" in word:
            lost = Lost(**word["lost"])
        else:
            lost = Lost(rank, self._hosts[rank], str(word["goodbye"]), said=True)
        with self._lock:
            if self._left or self.lost is not None:
                return
            self.lost = lost
        self._told.set()
        log.error("%s", lost)
        self._tell({"lost": asdict(lost)})
        os.kill(os.getpid(), signal.SIGTERM)

    def _tell(self, word: dict) -> None:
        for link in self._links.values():
            try:
                link.sendall(json.dumps(word).encode() + b"\n")
            except OSError:  # gone already
                continue
