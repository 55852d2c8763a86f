"""`make bench`: one GRPO step of each size of model that it makes itself; `--model DIR` of `grpo_step` takes yours."""

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


def main() -> None:
    """Print a line of figures for each size."""
    with tempfile.TemporaryDirectory() as temporary:
        for name, size in SIZES.items():
            folder = Path(temporary) / name
            make_scratch(size, TEXTS, folder, seed=0)
            print(f"{name}, 4 prompts x 8 completions x 64 tokens, LoRA rank 8:", flush=True)
            command = [sys.executable, "-m", "tests.benchmarks.grpo_step", "--model", str(folder), "--force-length"]
            subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
