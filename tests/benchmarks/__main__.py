"""`make bench`: steps, rollouts beside mlx-lm's and updates of two models made here; each part takes `--model DIR`."""

import subprocess
import sys
import tempfile
from pathlib import Path

from configs.schema import ScratchModel
from mlx_ops.model import make_scratch

SIZES = {
    "tiny": ScratchModel(vocab_size=512, hidden_size=128, intermediate_size=384, num_hidden_layers=4),
    "small": ScratchModel(
        vocab_size=4096,
        hidden_size=320,
        intermediate_size=960,
        num_hidden_layers=8,
        num_attention_heads=5,
        num_key_value_heads=5,
    ),
}
TEXTS = [f"What is {a} + {b}? {a} + {b} = {a + b}" for a in range(60) for b in range(60)]


PARTS = {
    "grpo_step": ["--force-length"],
    "rollout": ["--rows", "32"],
    "rollout, unequal lengths": ["--rows", "32", "--unequal"],
    "update": [],
    "paged_cache": [],
}


def main() -> None:
    """Print the figures of each part for each size."""
    with tempfile.TemporaryDirectory() as temporary:
        for name, size in SIZES.items():
            folder = Path(temporary) / name
            make_scratch(size, TEXTS, folder, seed=0)
            for part, arguments in PARTS.items():
                print(f"\n{part}, {name}:", flush=True)
                module = f"tests.benchmarks.{part.partition(',')[0]}"
                subprocess.run([sys.executable, "-m", module, "--model", str(folder), *arguments], check=True)


if __name__ == "__main__":
    main()
