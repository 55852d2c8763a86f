"""The device MLX runs on, and what must be so before and after its first import. The one place for that.

On Linux without a GPU, MLX's wheel calls a reference BLAS of 2 GFLOP/s; a faster one has to be in the process before
`mlx.core` is loaded, so nothing here imports MLX at the top. Left out: choosing among several GPUs, and NUMA.
"""

import ctypes
import ctypes.util
import os
import platform
import shutil
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

DeviceChoice = Literal["auto", "cpu", "gpu"]
Kind = Literal["cpu", "metal", "cuda"]

SLOW_GFLOPS = 8.0
"""The reference BLAS gives 2 a CPU-second, a fast one 50 to 100 a core, a third of that on a machine in heavy use."""
CPU_CACHE_BYTES = 1 << 30
"""Of freed arrays that MLX keeps by their sizes; with 64 MiB an update of a model of 12 M took 5 to 10 % longer."""
FIX = "install a fast BLAS: `pip install 'mlx-rl-trainer[cpu]'` (x86-64) or `apt install libopenblas0-pthread`"


@dataclass(frozen=True)
class Backend:
    """What `prepare` found and set."""

    kind: Kind
    name: str
    """The chip's name, where MLX gives one."""
    blas: str
    """The preloaded library, `accelerate`, `device`, or `reference` (slow)."""
    gflops: float
    """Measured float32 matmul rate, a CPU-second; 0 where it was not measured (GPU)."""
    compiles: bool
    """`mx.compile` fuses: always on a GPU, on Linux CPU where g++ is on the path."""
    dtype: Literal["float32", "bfloat16"]
    """What weights are best held in: half precision is 3 to 15 times slower than float32 on the CPU backend."""
    memory_bytes: int
    """What arrays may fill."""

    @property
    def is_gpu(self) -> bool:
        return self.kind != "cpu"


@cache
def preload_blas() -> str | None:
    """Load a fast BLAS, so that MLX's CPU library binds to it; its path, or None where none was found or needed.

    Must run before the first `import mlx.core`; afterwards it only warns. Does nothing off Linux.
    """
    if platform.system() != "Linux":
        return None
    present = _mapped_blas()
    if present is not None:
        return present
    library = _find_blas()
    if library is None:
        return None
    if "mlx.core" in sys.modules:
        warnings.warn(
            "mlx was imported before mlx_ops, so a fast BLAS can't take effect; import mlx_ops first", stacklevel=2
        )
        return None
    _limit_threads(ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL))
    return library


_THREADS = (("openblas_get_num_threads", "openblas_set_num_threads"), ("MKL_Get_Max_Threads", "MKL_Set_Num_Threads"))
_M_MMAP_MAX, _M_TRIM_THRESHOLD = -4, -1  # of glibc's malloc.h
_prepared: list[Backend] = []
"""The latest."""


def prepare(device: DeviceChoice | None = None, memory_limit_gb: float | None = None) -> Backend:
    """Choose the device, set MLX's limits for it, and say what was found. Without arguments: the latest, else `auto`.

    `ValueError` where a GPU is asked for and there is none. Warns, with the fix, where matmul is slow.
    """
    if device is None and memory_limit_gb is None and _prepared:
        return _prepared[0]
    found = _find(device or "auto")
    if memory_limit_gb is not None:
        found = replace(found, memory_bytes=min(found.memory_bytes, int(memory_limit_gb * 1e9)))
    _set_limits(found)
    _prepared[:] = [found]
    return found


def _keep_freed_memory() -> None:
    """Let glibc keep what is freed in one heap: no maps of their own for large arrays, and no trimming.

    Rollouts make arrays of ever new sizes, which MLX's cache, by equal sizes, doesn't serve; a page that is given back
    to the kernel and asked for again costs 1 to 7 µs.
    """
    if platform.libc_ver()[0] == "glibc":
        library = ctypes.CDLL(None)
        library.mallopt(_M_MMAP_MAX, 0)
        library.mallopt(_M_TRIM_THRESHOLD, -1)


def _set_limits(found: Backend) -> None:
    """What MLX keeps of freed memory, and on a Mac what stays resident: without that, macOS pages weights out."""
    import mlx.core as mx

    mx.set_default_device(mx.gpu if found.is_gpu else mx.cpu)
    if not found.is_gpu:
        _keep_freed_memory()
    mx.set_memory_limit(found.memory_bytes)
    mx.set_cache_limit(found.memory_bytes // 4 if found.is_gpu else min(CPU_CACHE_BYTES, found.memory_bytes // 4))
    if found.kind == "metal":
        mx.set_wired_limit(found.memory_bytes)


@cache
def _find(device: DeviceChoice) -> Backend:
    library = preload_blas()
    # A decode step is bound by the host, and plain launches cost it less than CUDA graphs; read at the first kernel.
    os.environ.setdefault("MLX_USE_CUDA_GRAPHS", "0")
    import mlx.core as mx

    kind = _choose(device)
    if kind == "cpu":
        mx.set_default_device(mx.cpu)
        return _cpu(library)
    mx.set_default_device(mx.gpu)
    information = mx.device_info()
    memory = _gpu_memory(information)
    return Backend(kind, str(information.get("device_name", kind)), "device", 0.0, True, "bfloat16", memory)


def measure_matmul(size: int = 384, repeats: int = 5) -> float:
    """GFLOP a CPU-second of a float32 (size, size) matmul: the best of `repeats`, whatever else the machine does."""
    import mlx.core as mx

    a = mx.random.normal((size, size), key=mx.random.key(0))
    mx.eval(a)
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        mx.eval(a @ a)
        seconds.append(time.process_time() - start)
    return 2 * size**3 / max(min(seconds), 1e-9) / 1e9


def _cpu(library: str | None) -> Backend:
    import mlx.core as mx

    accelerated = platform.system() == "Darwin"
    gflops = measure_matmul()
    if gflops < SLOW_GFLOPS:
        reason = f"{library} is loaded and did not help" if library else FIX
        warnings.warn(f"matmul runs at {gflops:.1f} GFLOP/s, 10 to 50 times below this CPU; {reason}", stacklevel=3)
    blas = "accelerate" if accelerated else library or "reference"
    name = str(mx.device_info().get("device_name", platform.processor()))
    compiles = accelerated or shutil.which("g++") is not None
    return Backend("cpu", name, blas, gflops, compiles, "float32", int(0.8 * _ram_bytes()))


def _choose(device: DeviceChoice) -> Kind:
    import mlx.core as mx

    gpu: Kind | None = "metal" if mx.metal.is_available() else "cuda" if mx.cuda.is_available() else None
    if device == "gpu" and gpu is None:
        raise ValueError(
            "device gpu: this MLX has none; install `mlx` on a Mac, `mlx[cuda13]` beside an NVIDIA driver, or use cpu"
        )
    return "cpu" if device == "cpu" or gpu is None else gpu


def _gpu_memory(information: Any) -> int:
    keys = ("max_recommended_working_set_size", "total_memory", "memory_size")
    sizes = [int(information[key]) for key in keys if information.get(key)]
    return int(0.9 * sizes[0]) if sizes else _ram_bytes() // 2


def _ram_bytes() -> int:
    """The machine's memory, or less where a container may use less."""
    installed = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    allowed = _kernel_says("/sys/fs/cgroup/memory.max").strip()
    return min(installed, int(allowed)) if allowed.isdigit() else installed


def _mapped_blas() -> str | None:
    """A fast BLAS that is in the process already, by LD_PRELOAD for instance."""
    paths = {line.split()[-1] for line in _kernel_says("/proc/self/maps").splitlines() if "/" in line}
    names = sorted(
        path for path in paths if Path(path).name.startswith(("libmkl_rt", "libopenblas.so", "libopenblas-r"))
    )
    return names[0] if names else None


def _find_blas() -> str | None:
    """System OpenBLAS, else the `mkl` wheel of the running environment."""
    system = ctypes.util.find_library("openblas")
    if system is not None:
        return system
    wheels = sorted(Path(sys.prefix, "lib").glob("libmkl_rt.so*"))
    return str(wheels[-1]) if wheels else None


def _limit_threads(library: ctypes.CDLL) -> None:
    """No more threads than this process may use; never more than OPENBLAS_NUM_THREADS or MKL_NUM_THREADS say."""
    for get, put in _THREADS:
        if hasattr(library, get) and getattr(library, get)() > _usable_cores():
            getattr(library, put)(_usable_cores())


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Matrix products of the block on one core: narrow ones gain nothing from a second, and stall where it is taken."""
    path = preload_blas()
    names = [pair for pair in _THREADS if path and hasattr(ctypes.CDLL(path), pair[0])]
    if not path or not names:
        yield
        return
    library, (get, put) = ctypes.CDLL(path), names[0]
    before = getattr(library, get)()
    getattr(library, put)(1)
    try:
        yield
    finally:
        getattr(library, put)(before)


def _usable_cores() -> int:
    cores = len(os.sched_getaffinity(0))
    quota, *period = _kernel_says("/sys/fs/cgroup/cpu.max").split() or ["max"]
    return cores if quota == "max" else max(1, min(cores, round(int(quota) / int(period[0]))))


def _kernel_says(path: str) -> str:
    """The text of a file of the kernel's; empty on systems that don't have it."""
    return Path(path).read_text(encoding="utf-8") if Path(path).is_file() else ""
