"""One NVIDIA GPU: rollouts beside mlx-lm's `BatchGenerator`, updates beside torch, and where a decode step goes.

    python -m tests.benchmarks.gpu [--rows 32 256 1024] [--repeats 5] [--torch] [--profile] [--tiny]

A Qwen2 of 0.5B parameters (random weights, bfloat16), prompts of 128 tokens in groups of 8, 128 new ones. `--torch` and
`--profile` need torch with CUDA; the profile is of its own run, for it slows the host down. `--tiny` is a dry run.
"""

import argparse
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tests.benchmarks.measure import Case, Sample, in_turns, parameters, random_prompts, run

# isort: split
import mlx.core as mx
from mlx_lm.models import qwen2

from mlx_ops.backend import prepare
from tests.benchmarks.rollout import GROUP, Work, engine, mlx_lm_generator, unequal_lengths
from tests.benchmarks.update import group_rows, shared, trained, update

SHAPE = {
    "hidden_size": 896,
    "num_hidden_layers": 24,
    "intermediate_size": 4864,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
}
TINY = SHAPE | {"hidden_size": 128, "num_hidden_layers": 2, "intermediate_size": 64, "num_attention_heads": 2}
TINY |= {"num_key_value_heads": 1, "vocab_size": 4096}
PROMPT = 128
NEW = 128


def make_model(shape: Mapping[str, Any]) -> Any:
    """Random weights in the device's best number format."""
    mx.random.seed(0)
    model = qwen2.Model(qwen2.ModelArgs.from_dict({"model_type": "qwen2", **shape}))
    model.set_dtype(getattr(mx, prepare().dtype))
    mx.eval(model.parameters())
    return model


def ceilings(size: int) -> tuple[float, float]:
    """bfloat16 operations and bytes a second: a (size, size) matmul, and an elementwise pass (read and write)."""
    square, long = mx.random.normal((size, size)).astype(mx.bfloat16), mx.zeros((size * size * 4,), mx.bfloat16)
    mx.eval(square, long)
    matmul = min(run(lambda: mx.eval(square @ square) or 1).wall for _ in range(8))
    moved = min(run(lambda: mx.eval(long + 1) or 1).wall for _ in range(8))
    return 2 * size**3 / matmul, 2 * long.nbytes / moved


def table(title: str, samples: Mapping[str, Sequence[Sample]], steps: int = 0) -> None:
    """Tokens a second: median and range; milliseconds of one of `steps`, or of the whole."""
    print(f"\n{title}\n{'':44}{'tok/s':>9}{'range':>17}{'ms':>10}", flush=True)
    for name, rows in samples.items():
        rates = [row.made / row.wall for row in rows]
        wall = statistics.median(row.wall for row in rows) * 1e3 / max(steps, 1)
        print(
            f"{name:44}{statistics.median(rates):>9.0f}{f'{min(rates):.0f}-{max(rates):.0f}':>17}{wall:>10.2f}",
            flush=True,
        )


def work(model: Any, rows: int, lengths: Sequence[int] = ()) -> Work:
    """So many rows in groups of 8."""
    return Work(model, random_prompts(model, -(-rows // GROUP), PROMPT), list(lengths) or [NEW] * rows)


def rollouts(model: Any, rows: int, repeats: int) -> None:
    """Equal lengths, then at 256 rows unequal ones."""
    equal = work(model, rows)
    cases = {"engine": engine(equal), "engine, cache rows": engine(equal, "rows")}
    if rows <= 256:
        cases["mlx_lm BatchGenerator"] = mlx_lm_generator(equal)
    table(f"{rows} rows, prompt {PROMPT}, new {NEW}; ms a step", in_turns(cases, repeats), NEW)
    if rows == 256:
        mixed = work(model, rows, unequal_lengths(rows))
        cases = {"engine": engine(mixed), "engine, cache rows": engine(mixed, "rows")}
        cases["mlx_lm BatchGenerator"] = mlx_lm_generator(mixed)
        table("256 rows, new 8-256 (mean about 70)", in_turns(cases, repeats))


def updates(model: Any, groups: int, peak: float, repeats: int, with_torch: bool) -> None:
    """Forward, backward and AdamW on completions; the fraction of the matmul rate counts every row's prompt."""
    rows = group_rows(model, groups, PROMPT, NEW)
    cases = {
        "the trainer's own": trained(model, groups, PROMPT, NEW),
        "the trainer's own, unequal lengths": trained(model, groups, PROMPT, NEW, ragged=True),
        "the trainer's own, not compiled": trained(model, groups, PROMPT, NEW, compiled=False),
        "log-probabilities alone, compiled": update(model, rows, shared, compiled=True),
    }
    if with_torch:
        cases["torch, prompt in every row"] = torch_update(model, groups * GROUP)
    samples = in_turns(cases, repeats)
    table(f"update of {groups} x {GROUP} rows, prompt {PROMPT}, new {NEW}; completion tokens", samples)
    done = 6 * parameters(model) * groups * GROUP * (PROMPT + NEW)
    for name, found in samples.items():
        rate = done / statistics.median(sample.wall for sample in found)
        print(f"{name:44}{rate / 1e12:>9.0f} TFLOP/s worth, {rate / peak:.0%} of the matmul rate", flush=True)


def tracing(model: Any) -> None:
    """Seconds of a shape's first update, which traces it, beside its later ones'; the first of all compiles kernels."""
    print(f"\n{'first updates of a shape':44}{'seconds':>9}{'next':>9}", flush=True)
    shapes = ((4, NEW, False), (4, NEW // 2, False), (3, NEW, False), (4, NEW, True), (3, NEW // 2, True))
    for groups, new, ragged in shapes:
        case = trained(model, groups, PROMPT, new, ragged=ragged)
        walls = [run(case).wall for _ in range(3)]
        name = f"{groups} x {GROUP} rows, new {new}{', unequal' * ragged}"
        print(f"{name:44}{walls[0]:>9.2f}{min(walls[1:]):>9.3f}", flush=True)


def torch_update(model: Any, rows: int) -> Case:
    """transformers and fused AdamW on the same shape, its head on the completions alone."""
    import torch  # pyright: ignore[reportMissingImports]
    from transformers import Qwen2Config, Qwen2ForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape = {name: getattr(model.args, name) for name in SHAPE}
    peer: Any = Qwen2ForCausalLM(Qwen2Config(**shape))
    peer = peer.to(device, torch.bfloat16)
    optimizer = torch.optim.AdamW(peer.parameters(), lr=1e-6, fused=True)
    tokens = torch.randint(3, model.args.vocab_size, (rows, PROMPT + NEW), device=device)

    def case() -> int:
        hidden = peer.model(tokens[:, :-1]).last_hidden_state[:, PROMPT - 1 :]
        logits = peer.lm_head(hidden).float()
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, PROMPT:].flatten(), reduction="sum")
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        return rows * NEW

    return case


def profile(name: str, case: Callable[[], Any], steps: int) -> None:
    """The kernels of one run by torch's profiler: milliseconds a step, how often, and what they are."""
    from torch.profiler import ProfilerActivity  # pyright: ignore[reportMissingImports]
    from torch.profiler import profile as record  # pyright: ignore[reportMissingImports]

    case()
    with record(activities=[ProfilerActivity.CUDA]) as recorded:
        case()
        mx.synchronize()
    spent: dict[str, list[float]] = defaultdict(list)
    for event in recorded.events():
        if str(event.device_type).endswith("CUDA"):
            spent[event.name].append((event.time_range.end - event.time_range.start) / 1e3)
    total = sum(map(sum, spent.values()))
    print(f"\n{name}: {total / steps:.2f} ms of kernels, {sum(map(len, spent.values())) / steps:.0f} of them")
    for kernel, times in sorted(spent.items(), key=lambda item: -sum(item[1]))[:14]:
        print(f"{sum(times) / steps:9.3f} ms {len(times) / steps:7.1f}x  {kernel[:90]}", flush=True)


def main(arguments: argparse.Namespace) -> None:
    """Print all tables."""
    backend = prepare()
    peak, bandwidth = ceilings(512 if arguments.tiny else 8192)
    print(
        f"{backend.kind}: {backend.name}, {peak / 1e12:.0f} TFLOP/s in bfloat16, {bandwidth / 1e9:.0f} GB/s", flush=True
    )
    model = make_model(TINY if arguments.tiny else SHAPE)
    print(f"{parameters(model):,} parameters", flush=True)
    for rows in arguments.rows:
        rollouts(model, rows, arguments.repeats)
    if arguments.groups:
        tracing(model)
    for groups in arguments.groups:
        updates(model, groups, peak, arguments.repeats, arguments.torch)
    if arguments.profile:
        for rows in arguments.rows:
            profile(f"a decode step of {rows} rows", engine(work(model, rows)), NEW)
        for groups in arguments.groups:
            profile(f"the trainer's update of {groups} x {GROUP} rows", trained(model, groups, PROMPT, NEW), 1)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--rows", type=int, nargs="*", default=[32, 256, 1024])
    made.add_argument("--groups", type=int, nargs="*", default=[4, 8], help="of the updates")
    made.add_argument("--repeats", type=int, default=5)
    made.add_argument("--torch", action="store_true")
    made.add_argument("--profile", action="store_true")
    made.add_argument("--tiny", action="store_true")
    return made


if __name__ == "__main__":
    main(parser().parse_args())
