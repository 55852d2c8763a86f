"""One update: prompts once a group or in every row, microbatches by a token budget, compiled or not; and memory.

    python -m tests.benchmarks.update --model tiny [--repeats 5] [--torch]

Tokens are completion tokens. The base of the first tables is a pass over prompt and completion of every row, its head
on the completions alone; that of the token budget one batch padded to the longest.
"""

import argparse
from collections.abc import Callable, Sequence
from typing import Any

from tests.benchmarks.measure import (
    Case,
    in_turns,
    open_model,
    parameters,
    peak_bytes,
    print_machine,
    print_rates,
    random_prompts,
)

# isort: split
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_map

from configs.schema import GRPOConfig, SamplingConfig
from mlx_ops.batching import TokenRows, token_rows
from mlx_ops.checkpointing import checkpoint_layers
from mlx_ops.forward import project, score
from mlx_ops.gradient import CompiledGradient
from mlx_ops.grpo import GRPOTrainer
from mlx_ops.logprobs import token_logprobs
from mlx_ops.microbatches import bucketed, plan
from mlx_ops.optimizers import ClippedStep, global_norm
from mlx_ops.policy import Row, totals
from tests.benchmarks.rollout import unequal_lengths

GROUP = 8
Logprobs = Callable[[Any, TokenRows], mx.array]


def group_rows(model: Any, prompts: int, prompt: int, new: int) -> TokenRows:
    """P groups of 8 completions of equal length."""
    rows = prompts * GROUP
    completions = random_prompts(model, rows, new)
    return token_rows(random_prompts(model, prompts, prompt), completions, [row // GROUP for row in range(rows)])


def shared(model: Any, rows: TokenRows) -> mx.array:
    """Ours: the prompt once."""
    return score(model, rows)[0]


def every_row(model: Any, rows: TokenRows) -> mx.array:
    """Prompt and completion of every row, all of equal length; the head on the completions."""
    tokens = mx.concatenate([rows.prompt_tokens[mx.array(rows.prompt_index)], rows.completion_tokens], axis=1)
    hidden = model.model(tokens[:, :-1])[:, rows.prompt_tokens.shape[1] - 1 :]
    return token_logprobs(project(model, hidden), rows.completion_tokens)


def gradient(model: Any, rows: TokenRows, logprobs: Logprobs) -> tuple[mx.array, Any]:
    """The summed log-probabilities and their gradient."""

    def loss(model: Any) -> mx.array:
        return -(logprobs(model, rows) * rows.completion_mask).sum()

    return nn.value_and_grad(model, loss)(model)


def update(model: Any, rows: TokenRows, logprobs: Logprobs, *, compiled: bool = False) -> Case:
    """Forward, backward and AdamW, its step compiled as the trainer's is; `compiled` as a whole."""
    optimizer = optim.AdamW(1e-6)
    optimizer.init(model.trainable_parameters())
    move = ClippedStep(optimizer, 1.0)

    def step() -> mx.array:
        value, grads = gradient(model, rows, logprobs)
        move(model, grads, global_norm(grads)).make()
        state[1] = optimizer.state
        return value

    state = [model.state, optimizer.state]
    chosen: Any = mx.compile(step, inputs=state, outputs=state) if compiled else step

    def case() -> int:
        mx.eval(chosen(), state)
        return sum(rows.completion_lengths)

    return case


def trained(
    model: Any, prompts: int, prompt: int, new: int, *, compiled: bool | None = None, ragged: bool = False
) -> Case:
    """`GRPOTrainer.update` of groups of 8 in one microbatch, with all that it measures.

    `compiled` is the trainer's own choice unless said. Where `ragged`, prompts and completions have all lengths from
    three quarters up.
    """
    sampling = SamplingConfig(max_tokens=new)
    config = GRPOConfig(steps=1, prompts_per_step=prompts, group_size=GROUP, sampling=sampling)
    trainer = GRPOTrainer(
        *(model, optim.AdamW(1e-6, bias_correction=True), config),
        draw=lambda position, count: ([], {}),
        weights={"task": 1.0},
        token_budget=prompts * (prompt + GROUP * bucketed(new)),
        seed=0,
        keep=lambda rows: None,
    )
    trainer.compiled_gradient = CompiledGradient(after=0)
    if compiled is not None:
        trainer.compiled = compiled
    heads, tails = random_prompts(model, prompts, prompt), random_prompts(model, prompts * GROUP, new)
    if ragged:
        heads, tails = shortened(heads), shortened(tails)
    rows = [
        Row(
            tuple(heads[place // GROUP]),
            tuple(tail),
            [-5.0] * len(tail),
            [place % 2 - 0.5] * len(tail),
            True,
            place=place,
        )
        for place, tail in enumerate(tails)
    ]
    minibatch, made = trainer.minibatch(rows, totals(rows)), sum(map(len, tails))
    model.train()

    def case() -> int:
        trainer.update(minibatch)
        return made

    return case


def shortened(rows: list[list[int]]) -> list[list[int]]:
    """The rows cut to lengths from three quarters of their own to the whole, evenly."""
    return [row[: len(row) - place * len(row) // (4 * len(rows))] for place, row in enumerate(rows)]


def worst_difference(model: Any, rows: TokenRows) -> float:
    """The largest relative difference of a gradient between the two passes."""
    first, second = (dict(_leaves(gradient(model, rows, kind)[1])) for kind in (shared, every_row))
    return max(
        float(mx.linalg.norm((first[k] - second[k]).flatten()) / mx.linalg.norm(second[k].flatten())) for k in first
    )


def _leaves(tree: Any) -> list[tuple[str, mx.array]]:
    found: Any = tree_flatten(tree)
    return found


def compare_prompts(name: str, model: Any, repeats: int) -> None:
    """Prompt to completion 1:2, 1:1 and 2:1, four groups of eight."""
    for prompt, new in ((32, 64), (64, 64), (128, 64)):
        rows = group_rows(model, 4, prompt, new)
        cases = {
            "prompt once a group": update(model, rows, shared),
            "the same in the trainer": trained(model, 4, prompt, new),
            "prompt once a group, compiled": update(model, rows, shared, compiled=True),
            "prompt in every row": update(model, rows, every_row),
            "prompt in every row, compiled": update(model, rows, every_row, compiled=True),
        }
        print_rates(
            f"{name}, 4 x 8 rows, prompt {prompt}, new {new}", in_turns(cases, repeats), base="prompt in every row"
        )
        print(f"largest relative difference of a gradient: {worst_difference(model, rows):.1e}")


def microbatched(
    model: Any, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], parts: list[list[int]]
) -> Case:
    """Forward and backward of each part, gradients added, and one AdamW step."""
    optimizer = optim.AdamW(1e-6)
    move = ClippedStep(optimizer, 1.0)
    batches = [token_rows([prompts[row] for row in part], [completions[row] for row in part]) for part in parts]

    def case() -> int:
        total: Any = None
        for rows in batches:
            _, grads = gradient(model, rows, shared)
            total = grads if total is None else tree_map(mx.add, total, grads)
            mx.eval(total)
        move(model, total, global_norm(total)).make()
        mx.eval(model.state, optimizer.state)
        return sum(len(row) for row in completions)

    return case


def compare_budgets(name: str, model: Any, repeats: int) -> None:
    """64 rows of unequal length with prompts of their own."""
    lengths = unequal_lengths(64)
    prompts = random_prompts(model, 64, 32)
    completions = [row[:length] for row, length in zip(random_prompts(model, 64, 256), lengths, strict=True)]
    whole, widths = list(range(64)), sorted(range(64), key=lambda row: lengths[row])

    def planned(budget: int) -> list[list[int]]:
        return plan([32] * 64, whole, lengths, token_budget=budget)

    cases = {
        "one batch, padded to 256": microbatched(
            model, prompts, [row + [0] * (256 - len(row)) for row in completions], [whole]
        ),
        "8 batches as they come": microbatched(
            model, prompts, completions, [whole[i : i + 8] for i in range(0, 64, 8)]
        ),
        "8 batches by length": microbatched(model, prompts, completions, [widths[i : i + 8] for i in range(0, 64, 8)]),
        **{
            f"budget of {budget} tokens": microbatched(model, prompts, completions, planned(budget))
            for budget in (1024, 2048, 4096)
        },
    }
    samples = in_turns(cases, repeats)
    made = sum(lengths)
    fair = {key: [type(row)(made, row.wall, row.cpu) for row in rows] for key, rows in samples.items()}
    print_rates(f"{name}, 64 rows, prompt 32, new 8-256 (mean {made / 64:.0f})", fair, base="one batch, padded to 256")


def compare_memory(name: str) -> None:
    """Peak memory of a microbatched gradient against the budget and the number of rows, and of checkpointed layers."""
    print(f"\n{name}: peak memory of the gradient beyond the weights, prompt 64, new 64")
    for rows, budget in ((32, 2048), (32, 4096), (32, 8192), (128, 2048), (128, 4096)):
        model = open_model(name)
        prompts, completions = random_prompts(model, rows, 64), random_prompts(model, rows, 64)
        parts = plan([64] * rows, range(rows), [64] * rows, token_budget=budget)
        batches = [token_rows([prompts[r] for r in part], [completions[r] for r in part]) for part in parts]
        used = peak_bytes(lambda m=model, b=batches: _accumulate(m, b))
        print(f"  {rows:4} rows, budget {budget:5}: {used / 2**20:8.1f} MiB")
    for checkpointed in (False, True):
        model = open_model(name)
        if checkpointed:
            checkpoint_layers(model)
        rows = group_rows(model, 4, 64, 64)
        used = peak_bytes(lambda m=model, r=rows: mx.eval(gradient(m, r, shared)))
        print(f"  4 x 8 rows at once, checkpointed layers {checkpointed!s:5}: {used / 2**20:8.1f} MiB")


def _accumulate(model: Any, batches: Sequence[TokenRows]) -> None:
    total: Any = None
    for rows in batches:
        _, grads = gradient(model, rows, shared)
        total = grads if total is None else tree_map(mx.add, total, grads)
        mx.eval(total)


def torch_update(model: Any, rows: TokenRows) -> Case:
    """transformers and fused AdamW on the same shape and tokens, prompt in every row, head on the completions."""
    import torch  # pyright: ignore[reportMissingImports]
    from transformers import LlamaConfig, LlamaForCausalLM

    names = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "vocab_size",
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    peer: Any = LlamaForCausalLM(LlamaConfig(**{name: getattr(model.args, name) for name in names}))
    peer = peer.to(device, dtype)
    optimizer = torch.optim.AdamW(peer.parameters(), lr=1e-6, fused=True)
    prompts: Any = rows.prompt_tokens.tolist()
    completions: Any = rows.completion_tokens.tolist()
    both = [prompts[prompt] + row for prompt, row in zip(rows.prompt_index, completions, strict=True)]
    tokens, start = torch.tensor(both, device=device), rows.prompt_tokens.shape[1]

    def case() -> int:
        hidden = peer.model(tokens[:, :-1]).last_hidden_state[:, start - 1 :]
        logits = peer.lm_head(hidden).float()
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, start:].flatten(), reduction="sum").backward()
        optimizer.step()
        optimizer.zero_grad()
        return sum(rows.completion_lengths)

    return case


def main(arguments: argparse.Namespace) -> None:
    """Print all tables."""
    gflops = print_machine()
    model = open_model(arguments.model)
    print(
        f"{arguments.model}: {parameters(model):,} parameters, {gflops * 1e9 / 6 / parameters(model):.0f} tok/CPU-s at most"  # noqa: E501
    )
    compare_prompts(arguments.model, model, arguments.repeats)
    compare_budgets(arguments.model, model, arguments.repeats)
    compare_memory(arguments.model)
    if arguments.torch:
        rows = group_rows(model, 4, 64, bucketed(64))
        cases = {"prompt once a group": update(model, rows, shared), "transformers": torch_update(model, rows)}
        print_rates(
            f"{arguments.model}, 4 x 8 rows, prompt 64, new 64", in_turns(cases, arguments.repeats), base="transformers"
        )


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--model", default="tiny", help="tiny, mini, small or a directory")
    made.add_argument("--repeats", type=int, default=5)
    made.add_argument("--torch", action="store_true")
    return made


if __name__ == "__main__":
    main(parser().parse_args())
