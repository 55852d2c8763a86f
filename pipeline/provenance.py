"""What made a result: commit, versions, machine. No environment variable is read; host and user names stay out."""

import platform
import subprocess
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from configs.schema import Strict

PACKAGES = ("mlx", "mlx-lm", "transformers", "tokenizers", "numpy", "dagster", "mlx-rl-trainer")
GIT_SECONDS = 10


class Git(Strict):
    commit: str | None
    """None outside a repository, or before its first commit."""
    dirty: bool | None
    """Tracked files differ from the commit, or untracked ones lie about."""


class Provenance(Strict):
    """What a number must carry to be made again."""

    git: Git
    versions: dict[str, str]
    """Installed packages; those that are not there are left out."""
    python: str
    system: str
    """`macOS 26.1`, `Linux 6.18`: the version of what runs underneath."""
    machine: str
    """`arm64`, `x86_64`."""
    device: str


def collect(root: Path, device: str | None = None) -> Provenance:
    """The provenance of a run of the code in `root`; without `device`, MLX is asked for its own."""
    return Provenance(
        git=git_state(root),
        versions=installed(PACKAGES),
        python=platform.python_version(),
        system=_system(),
        machine=platform.machine(),
        device=device_name() if device is None else device,
    )


def git_state(root: Path) -> Git:
    """Commit and cleanliness of the repository that holds `root`, without touching its index."""
    commit = _git(root, "rev-parse", "--verify", "--quiet", "HEAD")
    status = _git(root, "status", "--porcelain")
    return Git(commit=commit or None, dirty=None if status is None else bool(status))


def _git(root: Path, *arguments: str) -> str | None:
    # No optional locks: a status may otherwise rewrite the index while somebody commits.
    command = ["git", "-C", str(root), "--no-optional-locks", *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=GIT_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def installed(packages: Iterable[str]) -> dict[str, str]:
    """The versions of those packages that are installed."""
    found: dict[str, str] = {}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _system() -> str:
    if platform.system() == "Darwin":
        return f"macOS {platform.mac_ver()[0]}"
    return f"{platform.system()} {platform.release()}"


def device_name() -> str:
    """`gpu: Apple M3 Max`: where MLX computes by default."""
    # Before MLX itself: whoever imports it first settles which BLAS it finds.
    import mlx_ops  # noqa: F401, I001
    import mlx.core as mx

    device = mx.default_device()
    kind = "gpu" if device == mx.Device(mx.gpu) else "cpu"
    return f"{kind}: {mx.device_info(device).get('device_name', platform.machine())}"
