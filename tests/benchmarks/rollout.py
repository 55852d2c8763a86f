"""Rollouts: tokens a second of the engine beside mlx-lm's, all in one batch, sampled, with log-probabilities.

    python -m tests.benchmarks.rollout --model tiny --rows 32 64 --prompt 64 --new 64 [--unequal] [--every-cache]

`--unequal` gives every row a length of its own, 8 to 256 with a mean of about 70. On a CPU "its products alone" are the
matrix products of these tokens and nothing else: what is left of the ratio is what an engine could gain. `--torch`
adds transformers' `generate`.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tests.benchmarks.measure import Case, in_turns, open_model, parameters, print_machine, print_rates, random_prompts

# isort: split
import mlx.core as mx
import numpy as np
from mlx_lm import batch_generate
from mlx_lm.generate import BatchGenerator

from configs.schema import SamplingConfig
from mlx_ops.generation import cores, generate, is_narrow
from mlx_ops.holding import Kind
from mlx_ops.lean_rows import refusal as lean_refusal
from mlx_ops.lean_weights import FOR_A_CPU, read

GROUP = 8


@dataclass(frozen=True)
class Work:
    """Prompts, G rows each, and how many tokens each row draws."""

    model: Any
    prompts: list[list[int]]
    lengths: list[int]

    @property
    def rows(self) -> list[list[int]]:
        return [prompt for prompt in self.prompts for _ in range(len(self.lengths) // len(self.prompts))]


@dataclass(frozen=True)
class Lengths:
    """Ends row b after lengths[b] tokens."""

    lengths: Sequence[int]

    def __call__(self, row: int, tokens: Sequence[int], seen: int) -> int | None:
        return self.lengths[row] if len(tokens) >= self.lengths[row] else None


class Endless:
    """What `batch_generate` needs of a tokenizer whose model never ends."""

    eos_token_ids = frozenset({1 << 30})

    def decode(self, tokens: Sequence[int]) -> str:
        del tokens
        return ""


def engine(work: Work, cache: Kind | None = None, max_rows: int | None = None) -> Case:
    """Our engine."""

    def case() -> int:
        drawn = generate(
            work.model,
            work.prompts,
            sampling=SamplingConfig(max_tokens=max(work.lengths)),
            seeds=range(len(work.lengths)),
            eos=frozenset(),
            group_size=len(work.lengths) // len(work.prompts),
            stop=Lengths(work.lengths) if len(set(work.lengths)) > 1 else None,
            max_rows=max_rows,
            cache=cache,
        )
        return sum(len(completion.tokens) for completion in drawn)

    return case


def mlx_lm_batch(work: Work, slots: int | None = None) -> Case:
    """mlx-lm's `batch_generate` with log-probabilities, in one batch or in so many slots."""
    width = slots or len(work.lengths)

    def case() -> int:
        drawn = batch_generate(
            work.model,
            Endless(),
            work.rows,
            max_tokens=work.lengths,
            return_logprobs=True,
            return_token_ids=True,
            sampler=mx.random.categorical,
            completion_batch_size=width,
            prefill_batch_size=width,
        )
        return sum(len(row) for row in drawn.token_ids or [])

    return case


def mlx_lm_generator(work: Work) -> Case:
    """mlx-lm's `BatchGenerator` itself, whose log-probabilities nobody reads."""

    def case() -> int:
        width, tokens = len(work.lengths), 0
        generator = BatchGenerator(
            work.model, sampler=mx.random.categorical, completion_batch_size=width, prefill_batch_size=width
        )
        generator.insert(work.rows, work.lengths)
        while responses := generator.next_generated():
            tokens += len(responses)
        return tokens

    return case


def products(work: Work) -> Case:
    """What the drawn tokens would take if all but their matrix products were free, on as many BLAS threads as ours.

    With the model's matrices, with each row's own keys and values, and once a group with its prompt's; rows leave as
    they end. For a CPU.
    """
    blocks, weights = read(work.model, FOR_A_CPU)
    matrices = [layer[name]["weight"] for layer in weights["layers"] for name in ("qkv", "out", "gate_up", "down")]
    matrices.append(weights["head"]["weight"])
    groups, prompt = len(work.prompts), len(work.prompts[0])
    shapes = ((len(work.lengths), max(work.lengths)), (groups, prompt))
    own, shared = (mx.zeros((len(weights["layers"]), 2, blocks.kv_heads, *shape, blocks.size)) for shape in shapes)
    mx.eval(matrices, own, shared)
    live = [sum(length > step for length in work.lengths) for step in range(max(work.lengths))]

    def attended(held: mx.array, queries: int) -> list[mx.array]:
        asked = mx.zeros((blocks.kv_heads, held.shape[3], queries, blocks.size))
        return [asked @ keys.swapaxes(-1, -2) @ values for keys, values in held]

    def case() -> int:
        repeats, narrow = blocks.heads // blocks.kv_heads, is_narrow(work.model)
        for step, rows in enumerate(live):
            with cores(narrow, rows):
                through = [mx.ones((rows, matrix.shape[-2])) @ matrix for matrix in matrices]
                own_columns = attended(own[:, :, :, :rows, : step + 1], repeats)
                left = min(groups, rows)
                mx.eval(through, own_columns, attended(shared[:, :, :, :left], -(-rows // left) * repeats))
        return sum(work.lengths)

    return case


def torch_generate(work: Work) -> Case:
    """transformers' `generate` on a llama of the same shape with random weights; rows of equal length only."""
    import torch  # pyright: ignore[reportMissingImports]
    from transformers import LlamaConfig, LlamaForCausalLM

    arguments = work.model.args
    names = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "vocab_size",
    )
    shape = {name: getattr(arguments, name) for name in names}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model: Any = LlamaForCausalLM(LlamaConfig(**shape, eos_token_id=None))
    model = model.to(device, dtype)
    tokens, new = torch.tensor(work.rows, device=device), max(work.lengths)

    def case() -> int:
        with torch.no_grad():
            model.generate(tokens, max_new_tokens=new, min_new_tokens=new, do_sample=True, top_k=0, pad_token_id=0)
        return tokens.shape[0] * new

    return case


def unequal_lengths(rows: int) -> list[int]:
    """Lengths 8 to 256 with a mean of about 70."""
    drawn = np.random.default_rng(0).exponential(63, rows).astype(int) + 8
    return np.minimum(drawn, 256).tolist()


def cases(work: Work, arguments: argparse.Namespace) -> dict[str, Case]:
    """What is compared on this work."""
    found: dict[str, Case] = {"engine": engine(work)}
    if arguments.every_cache:
        kinds: tuple[Kind, ...] = ("lean", "shared", "rows", "paged", "library")
        found |= {f"engine, cache {kind}": engine(work, kind) for kind in kinds}
    if arguments.slots:
        found[f"engine, {arguments.slots} slots"] = engine(work, max_rows=arguments.slots)
        found[f"engine, {arguments.slots} slots, paged"] = engine(work, "paged", arguments.slots)
        found[f"mlx_lm batch_generate, {arguments.slots} slots"] = mlx_lm_batch(work, arguments.slots)
    found |= {"mlx_lm batch_generate": mlx_lm_batch(work), "mlx_lm BatchGenerator": mlx_lm_generator(work)}
    if lean_refusal(work.model) is None:
        found["its products alone"] = products(work)
    if arguments.torch:
        found["transformers generate"] = torch_generate(work)
    return found


def main(arguments: argparse.Namespace) -> None:
    """Print one table a number of rows."""
    gflops = print_machine()
    model = open_model(arguments.model)
    ceiling = gflops * 1e9 / (2 * parameters(model))
    for rows in arguments.rows:
        lengths = unequal_lengths(rows) if arguments.unequal else [arguments.new] * rows
        work = Work(model, random_prompts(model, -(-rows // GROUP), arguments.prompt), lengths)
        title = (
            f"{arguments.model}, {rows} rows in groups of {GROUP}, prompt {arguments.prompt}, "
            f"new {min(lengths)}-{max(lengths)} "
            f"(mean {sum(lengths) / rows:.0f}), median of {arguments.repeats}"
        )
        print_rates(
            title, in_turns(cases(work, arguments), arguments.repeats), base="mlx_lm batch_generate", ceiling=ceiling
        )


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--model", default="tiny", help="tiny, mini, small or a directory")
    made.add_argument("--rows", type=int, nargs="+", default=[32, 64])
    made.add_argument("--prompt", type=int, default=64)
    made.add_argument("--new", type=int, default=64)
    made.add_argument("--unequal", action="store_true")
    made.add_argument("--every-cache", action="store_true")
    made.add_argument("--slots", type=int, help="also so many rows at once")
    made.add_argument("--torch", action="store_true")
    made.add_argument("--repeats", type=int, default=5)
    return made


if __name__ == "__main__":
    main(parser().parse_args())
