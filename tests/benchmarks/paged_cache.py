"""Pages against other caches: memory of a group, and tokens a second of the same draws.

python -m tests.benchmarks.paged_cache --model tiny [--repeats 5]
"""

import argparse
from typing import Any

from tests.benchmarks.measure import in_turns, open_model, print_machine, print_rates, random_prompts

# isort: split
import mlx.core as mx
from mlx_lm.models.cache import BatchKVCache

from configs.schema import SamplingConfig
from mlx_ops.held import Held
from mlx_ops.holding import Kind, hold
from mlx_ops.sampling import make_sampler
from tests.benchmarks.rollout import Work, engine, unequal_lengths

KINDS: tuple[Kind, ...] = ("lean", "shared", "rows", "paged", "paged8")


def drawn(held: Held, rows: int, new: int) -> int:
    """Bytes that the caches hold after so many tokens of every row."""
    sampler, tokens = make_sampler(SamplingConfig(temperature=0.0)), mx.ones((rows,), mx.uint32)
    for _ in range(new):
        mx.eval(held.step(sampler, tokens, mx.zeros((rows, 2))))
    return held.nbytes


def compare_memory(name: str, model: Any) -> None:
    """Keys and values of groups of 16, for mlx-lm's batch and each of our caches."""
    print(f"\n{name}: bytes of keys and values, one group of 16")
    for prompt, new in ((512, 128), (128, 128)):
        prompts = random_prompts(model, 1, prompt + 1)
        library = [BatchKVCache([0] * 16) for _ in model.layers]
        mx.eval(model(mx.repeat(mx.array(prompts)[:, :-1], 16, axis=0), cache=library))
        for _ in range(new):
            mx.eval(model(mx.ones((16, 1), mx.int32), cache=library))
        base = sum(cache.nbytes for cache in library)
        print(f"  prompt {prompt}, new {new}: BatchKVCache {base / 2**20:.1f} MiB", end="")
        for kind in KINDS:
            used = drawn(hold(kind, model, prompts, [0] * 16, new), 16, new)
            print(f", {kind} {used / 2**20:.1f} ({used / base:.2f})", end="")
        print()


def main(arguments: argparse.Namespace) -> None:
    """Print memory, then speed with equal and unequal lengths."""
    print_machine()
    model = open_model(arguments.model)
    compare_memory(arguments.model, model)
    for title, lengths in (("new 64", [64] * 32), ("new 8-256", unequal_lengths(32))):
        work = Work(model, random_prompts(model, 4, 128), lengths)
        samples = in_turns({kind: engine(work, kind) for kind in KINDS}, arguments.repeats)
        print_rates(f"{arguments.model}, 4 x 8 rows, prompt 128, {title}", samples, base="rows")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--model", default="tiny", help="tiny, mini, small or a directory")
    made.add_argument("--repeats", type=int, default=5)
    return made


if __name__ == "__main__":
    main(parser().parse_args())
