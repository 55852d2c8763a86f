import ctypes
import platform
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_ops import backend
from mlx_ops.backend import Backend, measure_matmul, prepare

ROOT = Path(__file__).parents[2]


def run_python(code: str) -> str:
    """What a fresh interpreter prints."""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=120)
    return done.stdout.strip()


def test_prepare_says_what_it_found_and_the_second_call_is_the_first():
    first = prepare()
    assert isinstance(first, Backend)
    assert prepare() is first
    assert first.kind in ("cpu", "metal", "cuda")
    assert first.dtype == ("bfloat16" if first.is_gpu else "float32")
    assert first.memory_bytes > 1 << 28
    assert (mx.default_device() == mx.Device(mx.cpu)) == (first.kind == "cpu")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux wheels come with a slow BLAS")
def test_the_fast_blas_takes_effect():
    found = prepare("cpu")
    if found.blas == "reference":
        pytest.skip("no fast BLAS in this environment")
    assert found.gflops > backend.SLOW_GFLOPS
    assert measure_matmul() > backend.SLOW_GFLOPS


def test_the_backend_module_imports_no_mlx():
    code = "import sys; import mlx_ops.backend; print('mlx.core' in sys.modules, 'mlx_lm' in sys.modules)"
    assert run_python(code) == "False False"


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing is preloaded")
def test_an_mlx_that_came_first_is_warned_about():
    code = (
        "import warnings, mlx.core\n"
        "with warnings.catch_warnings(record=True) as seen:\n"
        "    warnings.simplefilter('always')\n"
        "    import mlx_ops\n"
        "print([str(w.message) for w in seen])"
    )
    if prepare("cpu").blas == "reference":
        pytest.skip("no fast BLAS in this environment")
    assert "import mlx_ops first" in run_python(code)


def test_a_gpu_that_is_not_there_is_an_error_that_says_what_to_do():
    if mx.metal.is_available() or mx.cuda.is_available():
        pytest.skip("this machine has one")
    with pytest.raises(ValueError, match="use cpu"):
        prepare("gpu")


def test_threads_are_lowered_to_the_usable_cores_and_never_raised(monkeypatch):
    class Library:
        threads = 7

        def MKL_Get_Max_Threads(self) -> int:
            return self.threads

        def MKL_Set_Num_Threads(self, count: int) -> None:
            self.threads = count

    library = Library()
    monkeypatch.setattr(backend, "_usable_cores", lambda: 3)
    backend._limit_threads(library)  # pyright: ignore[reportArgumentType]
    assert library.threads == 3
    library.threads = 1
    backend._limit_threads(library)  # pyright: ignore[reportArgumentType]
    assert library.threads == 1


def test_one_thread_inside_the_block_and_as_many_as_before_after_it():
    path = backend.preload_blas()
    names = [get for get, _ in backend._THREADS if path and hasattr(ctypes.CDLL(path), get)]
    if not path or not names:
        pytest.skip("no BLAS here whose threads can be set")
    threads = getattr(ctypes.CDLL(path), names[0])
    before = threads()
    with backend.one_blas_thread():
        assert threads() == 1
    assert threads() == before


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told to keep what is freed")
def test_memory_that_was_freed_serves_arrays_of_other_sizes_without_new_pages():
    printed = run_python(
        "import resource\n"
        "from mlx_ops.backend import prepare\n"
        "prepare('cpu')\n"
        "import mlx.core as mx\n"
        "def faults(sizes):\n"
        "    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "    for size in sizes:\n"
        "        mx.eval(mx.ones(size))\n"
        "        mx.clear_cache()\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before\n"
        "print(faults([12_000_000]), faults(range(1_000_000, 11_000_000, 1_000_003)))"
    )
    first, later = map(int, printed.split())
    assert first > 10_000
    assert later < first / 10
