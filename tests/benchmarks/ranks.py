"""Rollouts on one rank and one core against two ranks and a core each: `python -m tests.benchmarks.ranks [--rounds 3]`.

Every rank is pinned to its own core. Both draw the same completions of the same prompts; the last line is JSON.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from pipeline.launch import launched
from tests.conftest import free_port

LAUNCH = Path(sys.executable).with_name("mlx.launch")
ROOT = Path(__file__).parents[2]
ONE_THREAD = {"OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
PROMPTS, GROUP, TOKENS = 8, 8, 256


def one_rank() -> None:
    """Draw, after one draw that warms up; rank 0 prints tokens a second of the whole, the slowest rank's time."""
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[int(os.environ.get("MLX_RANK", "0"))]})
    from mlx_ops.backend import prepare

    prepare("cpu")
    from configs.schema import SamplingConfig
    from mlx_ops.generation import generate
    from pipeline.ranks import joined
    from tests.mlx_ops.tiny import tiny_model

    model = tiny_model("qwen3", hidden_size=256, intermediate_size=768, num_hidden_layers=6, vocab_size=4096)
    with joined(os.environ) as ranks:
        prompts = ranks.share([[1 + place] * 32 for place in range(PROMPTS)])
        seeds = ranks.share(range(PROMPTS * GROUP))
        sampling, tokens, seconds = SamplingConfig(max_tokens=TOKENS), 0, 1.0
        for _ in range(2):
            ranks.gather([0])
            started = time.perf_counter()
            drawn = generate(model, prompts, sampling=sampling, seeds=list(seeds), eos=frozenset(), group_size=GROUP)
            tokens = sum(ranks.gather([len(each.tokens) for each in drawn]))
            seconds = time.perf_counter() - started
        if ranks.is_writer:
            print(json.dumps({"ranks": ranks.size, "tokens_per_second": tokens / seconds}), flush=True)


def measured(ranks: int) -> float:
    """Tokens a second."""
    command = [sys.executable, "-m", "tests.benchmarks.ranks", "--rank"]
    if ranks > 1:
        command = [str(LAUNCH), "--backend", "ring", "-n", str(ranks), "-p", str(free_port()), "--", *command]
    done = launched(command, cwd=ROOT, env={**os.environ, **ONE_THREAD}, stdout=subprocess.PIPE)
    assert done.stdout is not None
    (row,) = [json.loads(line) for line in done.stdout if line.startswith(b"{")]
    done.wait()
    return row["tokens_per_second"]


def main(rounds: int) -> None:
    pairs = [(measured(1), measured(2)) for _ in range(rounds)]
    for one, two in pairs:
        print(f"1 rank {one:,.0f} tokens/s, 2 ranks {two:,.0f} tokens/s: x{two / one:.2f}", flush=True)
    middle = sorted(two / one for one, two in pairs)[rounds // 2]
    print(json.dumps({"one_rank": [p[0] for p in pairs], "two_ranks": [p[1] for p in pairs], "speedup": middle}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rank", action="store_true")
    arguments = parser.parse_args()
    if arguments.rank:
        one_rank()
    else:
        main(arguments.rounds)
