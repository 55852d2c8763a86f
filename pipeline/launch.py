"""A training on several ranks, as Dagster sees it: `mlx.launch` is started, followed through Pipes, and ended.

Rank 0 runs on this machine. It sends metrics, log records and how it ended; a cancel is passed on to it, and the other
ranks follow it. Nothing here imports MLX: the ranks do.
"""

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import dagster as dg
from dagster._core.pipes.context import PipesSession

from configs.atomic import write_text
from configs.schema import Strict, TrainedStage
from pipeline.resources import DeviceSettings, Launch, project_root

if TYPE_CHECKING:
    from pipeline.job import Job, Trained

ORDER = "order.json"
LOOPBACK = "127.0.0.1"
WATCH_SECONDS = 0.5
STOP_SECONDS = 300.0
"""For the last checkpoint of a large model, after a cancel."""
STUFFING = 1 << 17
"""More bytes than a pipe holds."""
LAST_SECONDS = 20.0
"""For the launcher and the ranks that are left to end, once rank 0 has."""


class Order(Strict):
    """What the ranks are to train; every machine reads it at the same path."""

    experiment: str
    """JSON of what was set."""
    source: str
    stage: TrainedStage
    dataset_dir: Path
    start_dir: Path
    run_dir: Path
    device: DeviceSettings
    parent: int | None = None
    """The process on rank 0's machine without which the training is to end."""


def train_on_ranks(
    context: dg.OpExecutionContext, job: "Job", stage: TrainedStage, source: Path, launch: Launch
) -> "Trained":
    """As `train_stage`, on the ranks that `launch` describes. `dg.Failure` names a rank that was lost, and its host."""
    from pipeline.job import Trained

    order = Order(
        experiment=job.experiment.model_dump_json(exclude_unset=True),
        source=str(source),
        stage=stage,
        dataset_dir=job.dataset_dir.resolve(),
        start_dir=job.start_dir.resolve(),
        run_dir=job.run_dir.resolve(),
        device=job.device,
        parent=os.getpid(),
    )
    path = order.run_dir / ORDER
    write_text(path, order.model_dump_json())
    command = launch_command(launch, order.run_dir, [sys.executable, "-m", "pipeline.worker", str(path)])
    reader = dg.PipesTempFileMessageReader()
    with ExitStack() as after, dg.open_pipes_session(context, dg.PipesEnvContextInjector(), reader) as session:
        post = Post(session, job.report)
        # The session's end brings the last messages in, also of a run that was cancelled.
        after.callback(post.read)
        _follow(command, session.get_bootstrap_env_vars(), post)
    return Trained(**_trained(post.end))


def launch_command(launch: Launch, folder: Path, command: Sequence[str]) -> list[str]:
    """The `mlx.launch` that runs a command on every rank; several machines are written into a host file in `folder`.

    `ValueError` where rank 0 would not run on this machine.
    """
    found = [
        str(Path(sys.executable).with_name("mlx.launch")),
        "--backend",
        launch.backend,
        "-n",
        str(launch.processes),
    ]
    if launch.hostfile is not None:
        hostfile = Path(launch.hostfile).expanduser()
        data = json.loads(hostfile.read_text(encoding="utf-8"))
        hosts = data["hosts"] if isinstance(data, dict) else data
        if hosts[0]["ssh"] != LOOPBACK:
            raise ValueError(f"{hostfile}: the first host is this machine, so its ssh must be {LOOPBACK}")
        found += ["--hostfile", str(hostfile)]
    elif launch.hosts != [LOOPBACK]:
        each = [(host, LOOPBACK if place == 0 else host) for place, host in enumerate(launch.hosts)]
        rows = [{"ssh": ssh, "ips": [host]} for host, ssh in each for _ in range(launch.processes)]
        write_text(folder / "hosts.json", json.dumps(rows))
        found += ["--hostfile", str(folder / "hosts.json")]
    else:
        found += ["-p", str(_free_port())]
    return [*found, "--", *command]


def _free_port() -> int:
    # Two runs on one machine must not meet at mlx.launch's fixed port.
    with socket.create_server((LOOPBACK, 0)) as server:
        return server.getsockname()[1]


def launched(command: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
    """An `mlx.launch` that keeps no core busy.

    It spins where its own standard input has ended, and while a rank's, which nobody reads, has room left.
    """
    process = cast("subprocess.Popen[bytes]", subprocess.Popen(command, stdin=subprocess.PIPE, **options))
    assert process.stdin is not None
    with suppress(BrokenPipeError):
        process.stdin.write(b"\n" * STUFFING)
        process.stdin.flush()
    return process


class Post:
    """What rank 0 has sent so far: metrics and log records are handed on, how it began and ended is kept."""

    def __init__(self, session: PipesSession, report: Callable[[int, Mapping[str, float]], None]) -> None:
        self._session, self._report, self._read = session, report, 0
        self.pid: int | None = None
        self.end: Mapping[str, Any] | None = None

    def read(self) -> None:
        messages = self._session.get_custom_messages()[self._read :]
        self._read += len(messages)
        for message in messages:
            if "metrics" in message:
                self._report(message["step"], message["metrics"])
            elif "log" in message:
                name, level, text = message["log"]
                logging.getLogger(name).log(level, "%s", text)
            elif "pid" in message:
                self.pid = message["pid"]
            else:
                self.end = message

    def is_over(self) -> bool:
        """Rank 0 has ended, with or without a word."""
        return self.end is not None or (self.pid is not None and not alive(self.pid))


def alive(pid: int) -> bool:
    """Whether there is such a process."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _follow(command: Sequence[str], environ: Mapping[str, str], post: Post) -> None:
    process = launched(command, cwd=project_root(), env={**os.environ, **environ}, start_new_session=True)
    patience = 0.0
    try:
        while process.poll() is None and not post.is_over():
            post.read()
            time.sleep(WATCH_SECONDS)
        patience = LAST_SECONDS
    except BaseException:  # a cancel
        patience = STOP_SECONDS
        if post.pid is None:
            os.killpg(process.pid, signal.SIGTERM)
        elif alive(post.pid):
            os.kill(post.pid, signal.SIGINT)
        raise
    finally:
        _end(process, patience)


def _end(process: subprocess.Popen[bytes], patience: float) -> None:
    try:
        process.wait(timeout=patience)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _trained(end: Mapping[str, Any] | None) -> dict[str, Any]:
    """What rank 0 said of the model it left. `dg.Failure` where it said something else, or nothing."""
    if end is None:
        host = socket.gethostname()
        raise dg.Failure(f"rank 0 on {host} was lost; re-execute the run to go on", allow_retries=False)
    if "failed" in end:
        raise dg.Failure(end["failed"], allow_retries=end["again"])
    return {**end["trained"], "checkpoint": Path(end["trained"]["checkpoint"])}
