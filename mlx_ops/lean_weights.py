"""The weights of a usual decoder as one tree, adapters added in: what `lean_blocks` and `fused_blocks` compute with.

`read` takes a model of mlx-lm apart by the names and types of its parts. Those don't say all that it computes, so
`unlike` compares a few tokens. Left out: quantised weights, mixtures of experts, windows, rotations with frequencies of
their own.
"""

import math
from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass
from functools import cache
from itertools import chain
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.tuner.dora import DoRALinear
from mlx_lm.tuner.lora import LoRALinear

from mlx_ops.backend import prepare
from mlx_ops.batching import Tree
from mlx_ops.checkpoint import tree_bytes

MEMORY_SHARE = 0.25
"""A model that fills more of the memory isn't copied."""
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
HEAD_NORMS = ("q_norm", "k_norm")
ADAPTERS = (LoRALinear, DoRALinear)
CLOSE = 1e-3
"""How far logits may be from the model's, as a share of their root mean square: roundings give 1e-6, another activation
1e-1."""
CLOSE_IN_HALVES = 5e-2
"""The same where weights are half precision, whose roundings give 1e-2."""
PANEL, NARROWEST = 384, 64
"""Columns of a matrix that are multiplied together on a CPU, at most and at least."""
TOKENS = (1, 2, 3)
"""What models are compared over."""


@dataclass(frozen=True)
class Blocks:
    """The numbers that all layers of a model share."""

    heads: int
    kv_heads: int
    size: int
    scale: float
    eps: float
    normed: bool
    """Queries and keys are normed before they are rotated."""
    dims: int
    base: float
    stretch: float
    traditional: bool

    @property
    def all_heads(self) -> int:
        """Of queries, keys and values."""
        return self.heads + 2 * self.kv_heads


@dataclass(frozen=True)
class Layout:
    """How weights lie for a device's products."""

    layer: Callable[[Any, Blocks], Tree]
    head: Callable[[dict[str, mx.array]], dict[str, mx.array]]


@cache
def rates(blocks: Blocks) -> mx.array:
    """(dims / 2,) radians a position that pairs are rotated by, before `stretch`, as `mx.fast.rope` computes them."""
    half = blocks.dims // 2
    made = mx.exp(mx.arange(half, dtype=mx.float32) * (-math.log(blocks.base) / half))
    mx.eval(made)
    return made


def refusal(model: Any) -> str | None:
    """What about the model's parts is unknown, or None where `read` may take it apart."""
    return next(_complaints(model), None)


def read(model: Any, layout: Layout) -> tuple[Blocks, Tree]:
    """The numbers and weights, not yet evaluated, of a model that isn't refused."""
    trunk = model["model"]
    blocks, embedding = numbers(model), trunk["embed_tokens"]["weight"]
    head = _linear(model["lm_head"]) if "lm_head" in model else {"weight": embedding.T}
    layers = [layout.layer(layer, blocks) for layer in trunk["layers"]]
    norm = trunk["norm"]["weight"]
    return blocks, {"embedding": embedding, "norm": norm, "head": layout.head(head), "layers": layers}


def unlike(model: Any, compute: Callable[[Any, mx.array], mx.array]) -> str | None:
    """How what is computed differs from the model, or None; `compute` gives the logits (T, V) behind tokens (T,).

    Each kind of model is compared once a process.
    """
    kind = (frozenset(map(type, model.modules())), numbers(model), weight_type(model), compute)
    if kind not in _DIFFERENCES:
        tokens = mx.array(TOKENS)
        expected = model(tokens[None])[0].astype(mx.float32)
        apart = compute(model, tokens).astype(mx.float32) - expected
        _DIFFERENCES[kind] = float(mx.sqrt(mx.square(apart).mean() / mx.square(expected).mean()))
    far, whole = _DIFFERENCES[kind], weight_type(model) == mx.float32
    name = type(model).__module__
    return None if far < (CLOSE if whole else CLOSE_IN_HALVES) else f"{name} computes something else: {far:.1e} apart"


_DIFFERENCES: dict[tuple[Any, ...], float] = {}


def weight_type(model: Any) -> mx.Dtype:
    """The number format of a model that isn't refused."""
    return model["model"]["embed_tokens"]["weight"].dtype


def numbers(model: Any) -> Blocks:
    """The numbers of a model that isn't refused."""
    return _numbers(model["model"]["layers"][0])


def _complaints(model: Any) -> Iterator[str]:
    """Each complaint stands before the line that needs what it is about: who takes the first never gets there."""
    yield from _odd_parts(model, {"model"}, {"lm_head"})
    trunk = model["model"]
    yield from _odd_parts(trunk, {"embed_tokens", "layers", "norm"})
    yield from _odd_kind(trunk["embed_tokens"], nn.Embedding)
    if "lm_head" in model:
        yield from _odd_linear(model["lm_head"])
    for layer in trunk["layers"]:
        yield from _odd_layer(layer)
    norms = [_norms(layer) for layer in trunk["layers"]]
    for norm in (trunk["norm"], *chain.from_iterable(norms)):
        yield from _odd_kind(norm, nn.RMSNorm)
    if len({norm.eps for norm in (trunk["norm"], *chain.from_iterable(norms))}) > 1:
        yield "its norms differ"
    if len({_numbers(layer) for layer in trunk["layers"]}) > 1:
        yield "its layers differ"
    if tree_bytes(model.parameters()) > MEMORY_SHARE * prepare().memory_bytes:
        yield "its weights fill too much of the memory to be copied"


def _odd_layer(layer: Any) -> Iterator[str]:
    yield from _odd_parts(layer, {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"})
    attention, mlp = layer["self_attn"], layer["mlp"]
    yield from _odd_parts(attention, set(PROJECTIONS), set(HEAD_NORMS))
    yield from _odd_parts(mlp, {"gate_proj", "up_proj", "down_proj"})
    for module in (*(attention[name] for name in PROJECTIONS), *mlp.children().values()):
        yield from _odd_linear(module)
    for together in ([attention[name] for name in PROJECTIONS[:3]], [mlp["gate_proj"], mlp["up_proj"]]):
        if len({"bias" in _base(module) for module in together}) > 1:
            yield "some of its linear layers have a bias, others none"
    if missing := {"rope", "n_heads", "n_kv_heads", "scale"} - set(attention) - set(vars(attention)):
        yield f"its attention has no {', '.join(sorted(missing))}"
    yield from _odd_kind(attention["rope"], nn.RoPE)
    if len(_norms(layer)) == 3:
        yield "it norms queries or keys alone"


def _odd_linear(module: Any) -> Iterator[str]:
    if type(module) in ADAPTERS and module.training and module["dropout"]._p_1 < 1:
        yield "its adapters drop out; set it to eval"
    yield from _odd_kind(_base(module), nn.Linear)


def _odd_parts(module: Any, needed: set[str], more: Set[str] = frozenset()) -> Iterator[str]:
    """A complaint where a module lacks one of these parts, or has one that is in neither set."""
    found = {name for name, value in module.items() if any(isinstance(leaf, mx.array) for leaf in _leaves(value))}
    if odd := (needed - found) | (found - needed - more):
        yield f"{type(module).__name__} has or lacks {', '.join(sorted(odd))}"


def _odd_kind(module: Any, kind: type) -> Iterator[str]:
    if type(module) is not kind:
        yield f"it has a {type(module).__name__} for a {kind.__name__}"


def _leaves(value: Any) -> list[Any]:
    """What a part holds: arrays, or settings."""
    return [leaf for _, leaf in tree_flatten(value.parameters() if isinstance(value, nn.Module) else value)]


def _norms(layer: Any) -> list[Any]:
    """Of the layer's input, of its MLP's, and of queries and keys."""
    attention = layer["self_attn"]
    own = [attention[name] for name in HEAD_NORMS if name in attention]
    return [layer["input_layernorm"], layer["post_attention_layernorm"], *own]


def _numbers(layer: Any) -> Blocks:
    attention, norms = layer["self_attn"], _norms(layer)
    rope = attention["rope"]
    return Blocks(
        heads=attention.n_heads,
        kv_heads=attention.n_kv_heads,
        size=_base(attention["k_proj"])["weight"].shape[0] // attention.n_kv_heads,
        scale=attention.scale,
        eps=norms[0].eps,
        normed=len(norms) == 4,
        dims=rope.dims,
        base=rope.base,
        stretch=rope.scale,
        traditional=rope.traditional,
    )


def _cpu_layer(layer: Any, blocks: Blocks) -> Tree:
    """Queries, keys and values by head; gate and up in panels; the weights of norms are in the matrices."""
    attention, mlp = layer["self_attn"], layer["mlp"]
    before, between = (layer[name]["weight"][:, None] for name in ("input_layernorm", "post_attention_layernorm"))
    parts = [_laid_out(_linear(attention[name]), before) for name in PROJECTIONS[:3]]
    inner = [_in_panels(_laid_out(_linear(mlp[name]), between)) for name in ("gate_proj", "up_proj")]
    weights: dict[str, Any] = {
        "qkv": {name: mx.concatenate([_by_head(part[name], blocks) for part in parts]) for name in parts[0]},
        "out": _laid_out(_linear(attention["o_proj"])),
        "gate_up": {name: mx.concatenate([part[name] for part in inner]) for name in inner[0]},
        "down": _laid_out(_linear(mlp["down_proj"])),
    }
    if blocks.normed:
        each = mx.concatenate([_head_norms(attention, blocks), mx.ones((blocks.kv_heads, blocks.size))])
        weights["head_norms"] = mx.pad(each, [(0, 0), (0, 1)])[:, None]
    return weights


def _gpu_layer(layer: Any, blocks: Blocks) -> Tree:
    """Queries, keys and values in one matrix, gate and up in another; the rest is the model's own."""
    attention, mlp = layer["self_attn"], layer["mlp"]
    weights: dict[str, Any] = {
        "input_norm": layer["input_layernorm"]["weight"],
        "mlp_norm": layer["post_attention_layernorm"]["weight"],
        "qkv": _beside([_linear(attention[name]) for name in PROJECTIONS[:3]]),
        "out": _linear(attention["o_proj"]),
        "gate_up": _beside([_linear(mlp[name]) for name in ("gate_proj", "up_proj")]),
        "down": _linear(mlp["down_proj"]),
    }
    return weights | ({"head_norms": _head_norms(attention, blocks)} if blocks.normed else {})


def _head_norms(attention: Any, blocks: Blocks) -> mx.array:
    """(heads of queries and keys, D)."""
    counts = zip(HEAD_NORMS, (blocks.heads, blocks.kv_heads), strict=True)
    return mx.concatenate([mx.repeat(attention[name]["weight"][None], count, axis=0) for name, count in counts])


def _beside(linears: list[dict[str, mx.array]]) -> dict[str, mx.array]:
    # Joined as they lie in memory, (out, in), and then turned: the product reads them so.
    made = {"weight": mx.concatenate([linear["weight"].T for linear in linears]).T}
    bias = {"bias": mx.concatenate([linear["bias"] for linear in linears])} if "bias" in linears[0] else {}
    return made | bias


def _by_head(array: mx.array, blocks: Blocks) -> mx.array:
    """Heads of D numbers beside each other, (heads D,) or (in, heads D), as (heads, 1 or in, D + 1), with a 0 more."""
    heads = array.reshape(-1, array.shape[-1] // blocks.size, blocks.size).swapaxes(0, 1)
    return mx.contiguous(mx.pad(heads, [(0, 0), (0, 0), (0, 1)]))


def _in_panels(linear: dict[str, mx.array]) -> dict[str, mx.array]:
    """The matrix (in, out) as P of (in, out / P): with 4 to 32 rows a BLAS multiplies them 1.1 to 1.9 times as fast."""
    columns = linear["weight"].shape[-1]
    counts = range(-(-columns // PANEL), columns // NARROWEST + 1)
    count = next((count for count in counts if columns % count == 0), 1)
    return {
        name: mx.contiguous(array.reshape(-1, count, columns // count).swapaxes(0, 1)) for name, array in linear.items()
    }


def _base(module: Any) -> Any:
    """A linear layer without its adapter."""
    return module["linear"] if type(module) in ADAPTERS else module


def _linear(module: Any) -> dict[str, mx.array]:
    """A linear layer's matrix (in, out), with its adapter in it, and its bias."""
    plain = module.fuse() if type(module) in ADAPTERS else module
    bias = {"bias": plain["bias"]} if "bias" in plain else {}
    return {"weight": plain["weight"].T, **bias}


def _laid_out(linear: dict[str, mx.array], norm: mx.array | float = 1.0) -> dict[str, mx.array]:
    """The layer with a norm's weights (in, 1) in its matrix, row by row in memory.

    With 4 to 32 rows a BLAS multiplies such a matrix 1.3 to 2 times as fast as one that lies across.
    """
    return linear | {"weight": mx.contiguous(linear["weight"] * norm)}


def times(x: mx.array, linear: dict[str, mx.array], added: mx.array | None = None) -> mx.array:
    """x (B, in) through a linear layer, on top of what is `added` (B, out); P panels give (P, B, out / P)."""
    if added is None:
        return mx.addmm(linear["bias"], x, linear["weight"]) if "bias" in linear else x @ linear["weight"]
    out = mx.addmm(added, x, linear["weight"])
    return out + linear["bias"] if "bias" in linear else out


FOR_A_CPU = Layout(_cpu_layer, _in_panels)
FOR_A_GPU = Layout(_gpu_layer, lambda linear: linear)
