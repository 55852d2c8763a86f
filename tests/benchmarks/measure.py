"""What the benchmarks share: models, cases timed in turns, tables, and the machine's ceilings measured in the same run.

A CPU-second is user and system time of the whole process: on a machine that others use it moves less than wall time.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx_ops as mlx_ops  # before MLX, which binds its BLAS when it is imported

# isort: split
import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm import load
from mlx_lm.models import llama

from mlx_ops.backend import measure_matmul, prepare

SIZES: dict[str, dict[str, int]] = {
    "tiny": {
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "vocab_size": 512,
    },
    "mini": {
        "hidden_size": 192,
        "intermediate_size": 512,
        "num_hidden_layers": 6,
        "num_attention_heads": 6,
        "vocab_size": 512,
    },
    "small": {
        "hidden_size": 320,
        "intermediate_size": 960,
        "num_hidden_layers": 8,
        "num_attention_heads": 5,
        "vocab_size": 4096,
    },
}


@dataclass(frozen=True)
class Sample:
    """One run of a case: what it made (tokens), and the seconds it took."""

    made: int
    wall: float
    cpu: float


Case = Callable[[], int]
"""Does the work and gives how many tokens it was."""


def open_model(name: str) -> Any:
    """A random llama of one of `SIZES`, or the model of a directory, in the device's best number format."""
    backend = prepare()
    if name in SIZES:
        mx.random.seed(0)
        fields = {"model_type": "llama", "rms_norm_eps": 1e-5, "max_position_embeddings": 8192, **SIZES[name]}
        model: Any = llama.Model(llama.ModelArgs.from_dict(fields))
    elif Path(name).is_dir():
        model = load(name)[0]
    else:
        raise SystemExit(f"--model {name}: neither a directory nor one of {', '.join(SIZES)}")
    model.set_dtype(getattr(mx, backend.dtype))
    mx.eval(model.parameters())
    return model


def parameters(model: Any) -> int:
    """How many numbers the model's weights are."""
    leaves: Any = tree_flatten(model.parameters())
    return sum(array.size for _, array in leaves)


def random_prompts(model: Any, prompts: int, tokens: int) -> list[list[int]]:
    """Prompts of random tokens."""
    source = np.random.default_rng(0)
    return source.integers(3, model.args.vocab_size, (prompts, tokens)).tolist()


def run(case: Case) -> Sample:
    """One timed run."""
    wall, cpu = time.perf_counter(), time.process_time()
    made = case()
    mx.synchronize()
    return Sample(made, time.perf_counter() - wall, time.process_time() - cpu)


def in_turns(cases: Mapping[str, Case], repeats: int) -> dict[str, list[Sample]]:
    """Each case once to warm up, then all of them `repeats` times in turns, so that a busy moment hits each."""
    for case in cases.values():
        case()
    samples: dict[str, list[Sample]] = {name: [] for name in cases}
    for _ in range(repeats):
        for name, case in cases.items():
            samples[name].append(run(case))
    return samples


def print_rates(
    title: str, samples: Mapping[str, Sequence[Sample]], *, base: str, ceiling: float | None = None
) -> None:
    """Tokens a CPU-second and a second: median and range, and the median of the ratios to `base`, pair by pair."""
    print(f"\n{title}")
    print(f"{'':34}{'tok/CPU-s':>10}{'range':>16}{'ratio':>7}{'tok/s':>10}{'ratio':>7}{'roofline':>10}")
    for name, rows in samples.items():
        cpu, wall = [row.made / row.cpu for row in rows], [row.made / row.wall for row in rows]
        pairs = list(zip(rows, samples[base], strict=True))
        ratios = [statistics.median(r) for r in zip(*(_ratios(row, other) for row, other in pairs), strict=True)]
        share = f"{statistics.median(cpu) / ceiling:>10.0%}" if ceiling else f"{'':>10}"
        print(
            f"{name:34}{statistics.median(cpu):>10.0f}{f'{min(cpu):.0f}-{max(cpu):.0f}':>16}{ratios[0]:>7.2f}"
            f"{statistics.median(wall):>10.0f}{ratios[1]:>7.2f}{share}"
        )


def _ratios(row: Sample, other: Sample) -> tuple[float, float]:
    return (row.made / row.cpu) / (other.made / other.cpu), (row.made / row.wall) / (other.made / other.wall)


def peak_bytes(case: Callable[[], Any]) -> int:
    """The most memory that the case had beyond what was there before it."""
    mx.synchronize()
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    case()
    mx.synchronize()
    return mx.get_peak_memory() - before


def print_machine() -> float:
    """Say what this runs on, with its ceilings; gives the float32 GFLOP a CPU-second of a large matmul."""
    backend, big = prepare(), mx.zeros((1 << 26,))
    mx.eval(big)
    moved = min(run(lambda: mx.eval(big + 1) or big.nbytes).wall for _ in range(3))
    gflops = measure_matmul(1024)
    print(
        f"{backend.kind}: {backend.name}, BLAS {Path(backend.blas).name}, {gflops:.0f} GFLOP a CPU-second (1024^3), "
        f"{2 * big.nbytes / moved / 1e9:.1f} GB/s (elementwise, read and write)"
    )
    return gflops
