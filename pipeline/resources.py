"""Resources: where artifacts live, and the device's settings. Neither touches MLX before it is asked to."""

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import dagster as dg
from pydantic import Field, PositiveFloat

from configs.atomic import MANIFEST, sha256
from configs.schema import ExperimentConfig, Strict

if TYPE_CHECKING:
    from mlx_ops.backend import Backend

PROJECT = Path(__file__).resolve().parents[1]


def project_root() -> Path:
    """The repository, or the current folder where the package is installed without it."""
    return PROJECT if (PROJECT / "workspace.yaml").is_file() else Path.cwd()


class RunStore(dg.ConfigurableResource):
    """Where artifacts live. Paths in references are relative to `root`, so that the folder can move."""

    root: str = Field(
        default="artifacts",
        description="Folder of all artifacts, relative to the repository whatever the current folder.",
    )

    @property
    def directory(self) -> Path:
        return project_root() / Path(self.root).expanduser()

    @property
    def leaderboard(self) -> Path:
        return self.directory / "leaderboard.json"

    def locate(self, relative: str) -> Path:
        """The place of a reference's path. `ValueError` for one that leaves the artifacts' folder."""
        if Path(relative).is_absolute() or ".." in Path(relative).parts:
            raise ValueError(f"{relative!r} leaves the artifacts' folder {self.directory}")
        return self.directory / relative

    def verified(self, path: str, digest: str) -> Path:
        """The folder of a reference, whose manifest is still the one of this sha256; `ValueError` where it isn't."""
        folder = self.locate(path)
        manifest = folder / MANIFEST
        if not manifest.is_file() or sha256(manifest) != digest:
            raise ValueError(f"{folder}: gone, or replaced since it was materialized ({digest[:8]}…); make it anew")
        return folder

    def relative(self, path: Path) -> str:
        """A path under `root` as references hold it."""
        return path.resolve().relative_to(self.directory.resolve()).as_posix()

    def dataset_dir(self, name: str, version: str) -> Path:
        return self.directory / "datasets" / name / version

    def run_dir(self, experiment: str, stage: str, run: dg.DagsterRun) -> Path:
        """The folder of one training. Retries and re-executions have the same root run, so they come back to it."""
        return self.directory / experiment / stage / short_id(run)

    def report_dir(self, experiment: str, name: str, run: dg.DagsterRun) -> Path:
        return self.directory / experiment / "reports" / name / short_id(run)


def short_id(run: dg.DagsterRun) -> str:
    """Names the run and every retry of it."""
    return (run.root_run_id or run.run_id)[:8]


class DeviceSettings(Strict):
    """What the work functions are told about the device."""

    device: Literal["auto", "cpu", "gpu"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    memory_limit_gb: PositiveFloat | None = None


class Launch(dg.Config):
    """The ranks of a training. One process on this machine is one rank, and nothing is launched for it."""

    processes: int = Field(default=1, ge=1, description="On each host; one a GPU.")
    hosts: list[str] = Field(
        default=["127.0.0.1"],
        description="Their addresses, this machine's first; the others are reached by ssh without a password.",
    )
    hostfile: str | None = Field(default=None, description="One of mlx.distributed_config, instead of `hosts`.")
    backend: Literal["ring", "jaccl", "jaccl-ring", "nccl", "mpi"] = Field(
        default="ring",
        description="ring takes any network, jaccl Thunderbolt with RDMA, nccl NVIDIA GPUs.",
    )

    @property
    def is_alone(self) -> bool:
        return self.processes == 1 and len(self.hosts) == 1 and self.hostfile is None


class MlxResource(dg.ConfigurableResource):
    """The device's settings. It loads no model: Dagster sets resources up once more in the parent process."""

    device: Literal["auto", "cpu", "gpu"] = Field(default="auto", description="auto takes the GPU where there is one.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="Of the weights; auto is bfloat16 on a GPU and float32 on a CPU."
    )
    memory_limit_gb: float | None = Field(
        default=None, description="What arrays may fill; the device's own limit if empty."
    )
    seed: int | None = Field(default=None, description="Instead of the experiment's, for other random numbers.")
    launch: Launch = Launch()

    @property
    def settings(self) -> DeviceSettings:
        """`ValidationError` for a setting that is refused."""
        return DeviceSettings(device=self.device, dtype=self.dtype, memory_limit_gb=self.memory_limit_gb)

    def apply(self, experiment: ExperimentConfig) -> ExperimentConfig:
        """The experiment with the seed that counts."""
        return experiment if self.seed is None else experiment.model_copy(update={"seed": self.seed})

    def prepare(self) -> "Backend":
        """Choose the device, in the process that computes. Call it first: a fast BLAS must be loaded before MLX."""
        from mlx_ops.backend import prepare

        return prepare(self.device, self.memory_limit_gb)
