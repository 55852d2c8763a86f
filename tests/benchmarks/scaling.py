"""What a step costs against prompts, group, lengths and vocabulary; and that nothing grows with the number of steps.

    python -m tests.benchmarks.scaling [--repeats 3] [--steps 2000]

Each line changes one number of the default (tiny llama, P 4, G 8, prompt 64, new 64). Seconds are CPU-seconds.
"""

import argparse
import resource
import statistics
from dataclasses import dataclass, replace
from typing import Any

from tests.benchmarks.measure import SIZES, open_model, random_prompts, run

# isort: split
import mlx.core as mx

from configs.schema import SamplingConfig
from mlx_ops.batching import token_rows
from mlx_ops.generation import generate
from tests.benchmarks.update import gradient, shared, update


@dataclass(frozen=True)
class Shape:
    """One step's numbers."""

    P: int = 4
    G: int = 8
    prompt: int = 64
    new: int = 64
    vocabulary: int = 512


CHANGES: dict[str, tuple[int, ...]] = {
    "P": (2, 4, 8, 16),
    "G": (2, 4, 8, 16),
    "prompt": (16, 64, 256, 512),
    "new": (16, 64, 128, 256),
    "vocabulary": (512, 4096, 32_768),
}


def measure(shape: Shape, repeats: int) -> tuple[float, float]:
    """Median CPU-seconds of a rollout and of an update."""
    SIZES["scaled"] = {**SIZES["tiny"], "vocab_size": shape.vocabulary}
    model = open_model("scaled")
    prompts = random_prompts(model, shape.P, shape.prompt)
    rows = shape.P * shape.G
    batch = token_rows(prompts, random_prompts(model, rows, shape.new), [row // shape.G for row in range(rows)])
    step = update(model, batch, shared)

    def rollout() -> int:
        sampling = SamplingConfig(max_tokens=shape.new)
        generate(model, prompts, sampling=sampling, seeds=range(rows), eos=frozenset(), group_size=shape.G)
        return rows * shape.new

    for case in (rollout, step):
        case()
    first, second = (statistics.median(run(case).cpu for _ in range(repeats)) for case in (rollout, step))
    return first, second


def tiny_steps(steps: int) -> None:
    """Rollouts and gradients of a tiny model, with the memory that MLX and the process hold."""
    SIZES["least"] = {
        **SIZES["tiny"],
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "vocab_size": 64,
    }
    model: Any = open_model("least")
    prompts = random_prompts(model, 2, 8)
    print(
        f"\n{steps} steps of a tiny run (rollout of 4 x 2 rows and a gradient): MiB active, cached and of the process"
    )
    for step in range(steps):
        completions = generate(
            model,
            prompts,
            sampling=SamplingConfig(max_tokens=8 + step % 5),
            seeds=range(8 * step, 8 * step + 8),
            eos=frozenset({5}),
            group_size=4,
        )
        mx.eval(
            gradient(
                model, token_rows(prompts, [c.tokens for c in completions], [row // 4 for row in range(8)]), shared
            )
        )
        if step % max(1, steps // 8) == 0 or step == steps - 1:
            active, cached = mx.get_active_memory() / 2**20, mx.get_cache_memory() / 2**20
            process = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            print(
                f"  step {step:5}: {active:8.2f} {cached:8.2f} {process:8.1f}",
                flush=True,
            )


def main(arguments: argparse.Namespace) -> None:
    """Print a line a shape, then the memory."""
    print(f"{'':18}{'rollout':>9}{'update':>9}")
    for name, values in CHANGES.items():
        for value in values:
            rollout, step = measure(replace(Shape(), **{name: value}), arguments.repeats)
            print(f"{name:>11} {value:<6}{rollout:>9.3f}{step:>9.3f}", flush=True)
    tiny_steps(arguments.steps)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--repeats", type=int, default=3)
    made.add_argument("--steps", type=int, default=2000)
    return made


if __name__ == "__main__":
    main(parser().parse_args())
