import random
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_map
from mlx_lm.models.cache import make_prompt_cache

from configs.schema import LoraAdapter, SamplingConfig
from mlx_ops import lean_rows, lean_weights
from mlx_ops.backend import prepare
from mlx_ops.generation import generate
from mlx_ops.holding import Kind, hold
from mlx_ops.lean_blocks import Rows, attend, blank, logits, stretch
from mlx_ops.lean_rows import COLUMNS, LeanRows, refusal
from mlx_ops.lean_weights import FOR_A_CPU, read
from mlx_ops.model import add_adapter
from mlx_ops.sampling import make_sampler, uniforms
from tests.mlx_ops.tiny import leaves, tiny_model

pytestmark = pytest.mark.skipif(
    prepare().kind != "cpu" or not prepare().compiles, reason="the lean step is for a CPU with a compiler"
)
SAMPLER = make_sampler(SamplingConfig())


def tokens_of(lengths: list[int]) -> list[list[int]]:
    source = random.Random(3)
    return [[source.randrange(64) for _ in range(length)] for length in lengths]


def advance(held, tokens: mx.array, seeds: list[int], start: int, count: int):
    """Tokens and log-probabilities (count, B) of some steps."""
    draws = mx.array(uniforms(seeds, [start] * len(seeds), count))
    drawn, scores = [], []
    for t in range(count):
        tokens, logprobs = held.step(SAMPLER, tokens, draws[t])
        drawn.append(tokens)
        scores.append(logprobs)
    return np.array(mx.stack(drawn)), np.array(mx.stack(scores))


def adapted(kind: str):
    """A model with adapters that do something."""
    model = tiny_model("qwen2").eval()
    add_adapter(model, LoraAdapter(kind=kind, rank=3, scale=4.0, dropout=0.3), seed=1)  # pyright: ignore[reportArgumentType]
    mx.random.seed(5)
    moved = tree_map(lambda array: array + 0.3 * mx.random.normal(array.shape), model.trainable_parameters())
    model.update(moved)
    return model.eval()


def far_turned(**rope):
    """A model whose layers rotate so."""
    model: Any = tiny_model()
    for layer in model.model.layers:
        layer.self_attn.rope = nn.RoPE(**rope)
    return model


USUAL = [
    *(pytest.param(lambda kind=kind: tiny_model(kind), id=kind) for kind in ("llama", "qwen2", "qwen3")),
    *(pytest.param(lambda kind=kind: adapted(kind), id=kind) for kind in ("lora", "dora")),
    pytest.param(lambda: far_turned(dims=4, traditional=True, base=500.0, scale=0.5), id="pairs of a part"),
    pytest.param(lambda: far_turned(dims=6, base=50.0, scale=2.0), id="halves of a part"),
    pytest.param(lambda: tiny_model(tie_word_embeddings=True, num_key_value_heads=4), id="tied"),
    pytest.param(lambda: tiny_model(attention_bias=True, mlp_bias=True), id="biases"),
    pytest.param(lambda: tiny_model(intermediate_size=800, vocab_size=770, mlp_bias=True), id="panels"),
]
"""Makers of models whose blocks are the usual ones."""


@pytest.mark.parametrize("model", USUAL)
def test_the_blocks_compute_what_the_model_computes_far_from_the_start_too(model):
    model = model()
    assert refusal(model) is None
    blocks, weights = read(model, FOR_A_CPU)
    tokens, first = mx.array(tokens_of([6])[0]), 1500
    cache = make_prompt_cache(model)
    for layer in cache:  # as if so many tokens had been read, which nobody may look at
        empty = mx.zeros((1, blocks.kv_heads, first, blocks.size))
        layer.update_and_fetch(empty, empty)
    mask = mx.tril(mx.ones((6, first + 6), mx.bool_), k=first) & (mx.arange(first + 6) >= first)
    hidden = model.model.embed_tokens(tokens[None])
    for layer, held in zip(model.model.layers, cache, strict=True):
        hidden = layer(hidden, mask, held)
    hidden = model.model.norm(hidden)
    expected = (model.lm_head(hidden) if "lm_head" in model else model.model.embed_tokens.as_linear(hidden))[0]
    layers = [[blank(blocks, 1, 8)] for _ in weights["layers"]]
    for place in range(6):
        rows = Rows(mx.array([first + place]), mx.array([place]))
        found, layers = logits(blocks, weights, tokens[place : place + 1], rows, layers)
        np.testing.assert_allclose(found[0], expected[place], atol=2e-4 * float(mx.abs(expected).max()))


@pytest.mark.parametrize(("columns", "panels"), [(64, 1), (384, 1), (960, 3), (4096, 16), (49_152, 128), (4099, 1)])
def test_a_wide_matrix_is_cut_into_panels_where_it_divides(columns, panels):
    weight = mx.random.normal((2, columns))
    cut = FOR_A_CPU.head({"weight": weight})["weight"]
    assert cut.shape == (panels, 2, columns // panels)
    assert mx.array_equal(mx.concatenate(list(cut), axis=1), weight)


def test_attention_over_prompts_apart_is_attention_over_all_columns():
    source = np.random.default_rng(0)
    heads, prompts, rows, repeats, size = 2, 3, 6, 2, 4
    queries = mx.array(source.normal(size=(heads, rows, repeats, size)))
    held = mx.array(source.normal(size=(2, heads, prompts, 5, size)))
    own = mx.array(source.normal(size=(2, heads, rows, 7, size)))
    shown = [mx.array(source.random(shape)) < 0.6 for shape in ((rows, 7), (prompts, 5))]
    parts = [stretch(part.flatten(0, 1), there) for part, there in zip((own, held), shown, strict=True)]
    sums = attend(mx.concatenate([queries, mx.ones((*queries.shape[:3], 1))], axis=-1), parts)
    found = sums[..., :-1] / sums[..., -1:]
    keys, values = mx.concatenate([mx.repeat(held, 2, axis=2), own], axis=3)
    scores = np.array(queries @ keys.swapaxes(-1, -2), dtype=np.float64)
    weights = np.exp(scores) * np.concatenate([np.repeat(np.array(shown[1]), 2, axis=0), shown[0]], axis=1)[:, None]
    expected = weights / weights.sum(axis=-1, keepdims=True) @ np.array(values, dtype=np.float64)
    np.testing.assert_allclose(found, expected, atol=1e-5)


class Gelu(nn.Module):
    """A llama's MLP, by names and types, with another activation."""

    def __init__(self, mlp):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj

    def __call__(self, x):
        return self.down_proj(nn.gelu(self.gate_proj(x)) * self.up_proj(x))


def test_what_is_not_the_usual_block_is_named():
    assert "feedforward_layernorm" in str(refusal(tiny_model("gemma2")))
    half = tiny_model()
    half.set_dtype(mx.bfloat16)
    assert "bfloat16" in str(refusal(half))
    quantised = tiny_model()
    nn.quantize(quantised, group_size=32, bits=8)
    assert "Quantized" in str(refusal(quantised))
    dropping = adapted("lora")
    dropping.train()
    assert "drop out" in str(refusal(dropping))
    with pytest.raises(ValueError, match="cache 'lean': its weights are"):
        hold("lean", half, [[1, 2]], [0], 4)


def test_an_activation_that_names_do_not_tell_is_found_by_comparison(monkeypatch):
    monkeypatch.setattr(lean_weights, "_DIFFERENCES", {})
    model: Any = tiny_model()
    for layer in model.model.layers:
        layer.mlp = Gelu(layer.mlp)
    assert "computes something else" in str(refusal(model))


@pytest.mark.parametrize("sharing", [1, lean_rows.SHARING, 1 << 60], ids=["prompts apart", "as set", "prompts before"])
@pytest.mark.parametrize("lengths", [[9, 3, 14], [1, 1], [6, 1]])
def test_rows_draw_what_they_draw_with_another_cache(monkeypatch, lengths, sharing):
    monkeypatch.setattr(lean_rows, "SHARING", sharing)
    model, prompts = tiny_model(), tokens_of(lengths)
    index, seeds, steps = sorted(list(range(len(lengths))) * 2), list(range(len(lengths) * 2)), COLUMNS + 20
    last = mx.array([prompts[place][-1] for place in index])
    kinds: tuple[Kind, Kind] = ("shared", "lean")
    expected, found = (advance(hold(kind, model, prompts, index, steps), last, seeds, 0, steps) for kind in kinds)
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_allclose(found[1], expected[1], atol=2e-5)


@pytest.mark.parametrize("sharing", [1, 1 << 60], ids=["prompts apart", "prompts before"])
def test_rows_that_joined_later_and_rows_that_are_left_stand_at_their_own_positions(monkeypatch, sharing):
    monkeypatch.setattr(lean_rows, "SHARING", sharing)
    model, prompts = tiny_model(), tokens_of([8, 5, 11])
    both = [hold(kind, model, prompts[:2], [0, 0, 1, 1], 40) for kind in ("shared", "lean")]
    last = mx.array([prompts[place][-1] for place in (0, 0, 1, 1)])
    (tokens, _), _ = [advance(held, last, [0, 1, 2, 7], 0, 4) for held in both]
    for held in both:
        held.join(prompts[2:], [0], 40)
    more = mx.concatenate([mx.array(tokens[-1]), mx.array(prompts[2][-1:])])
    seeds = [0, 1, 2, 7, 3]
    expected, found = (advance(held, more, seeds, 4, 70) for held in both)
    np.testing.assert_array_equal(found[0], expected[0])
    kept = mx.array(expected[0][-1])[mx.array([1, 2, 4])]
    for held in both:
        held.keep([1, 2, 4], 20)
    expected, found = (advance(held, kept, [1, 2, 3], 74, 20) for held in both)
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_allclose(found[1], expected[1], atol=2e-5)


@pytest.mark.parametrize("sharing", [1, 1 << 60], ids=["prompts apart", "prompts before"])
def test_whichever_rows_end_the_others_draw_the_same(monkeypatch, sharing):
    monkeypatch.setattr(lean_rows, "SHARING", sharing)
    model, prompts = tiny_model(), tokens_of([7, 2, 12, 5])

    def drawn(kind: Kind, width: int | None = None):
        settings = {"sampling": SamplingConfig(max_tokens=90), "seeds": range(32), "eos": frozenset({3, 11})}
        return generate(model, prompts, **settings, group_size=8, cache=kind, max_rows=width)

    expected = drawn("shared")
    assert len({len(completion.tokens) for completion in expected}) > 10
    for found in (drawn("lean"), drawn("lean", 12)):
        assert [c.tokens for c in found] == [c.tokens for c in expected]
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(one.logprobs, other.logprobs, atol=2e-5)


@pytest.mark.parametrize("sharing", [1, 1 << 60], ids=["prompts apart", "prompts before"])
def test_what_fits_holds_the_living_and_is_no_larger_than_before(monkeypatch, sharing):
    monkeypatch.setattr(lean_rows, "SHARING", sharing)
    model, prompts, source = tiny_model(), tokens_of([7, 2, 12]), random.Random(0)
    for _ in range(20):
        held, slots = LeanRows(model, prompts, [0] * 8 + [1] * 8 + [2] * 8, 30), list(range(24))
        while slots:
            slots = sorted(source.sample(slots, source.randint(1, len(slots))))
            kept = held.fit(slots)
            assert set(slots) <= set(kept)
            assert kept == sorted(set(kept))
            held.keep(kept, 10)
            slots = [kept.index(slot) for slot in slots]
            del slots[source.randrange(len(slots))]
            assert held.fit(slots or [0])[-1] < len(kept)


def test_rows_that_come_and_go_need_no_more_columns_than_the_oldest_of_them():
    model, prompts = tiny_model(), tokens_of([20] * 8)
    held, tokens, sizes = LeanRows(model, prompts[:2], [0, 1], 60), mx.array([row[-1] for row in prompts[:2]]), []
    for prompt in prompts[2:]:
        drawn, _ = advance(held, tokens, [0, 1], 0, 60)
        held.keep([1], 60)
        held.join([prompt], [0], 60)
        tokens = mx.array([drawn[-1, 1].item(), prompt[-1]])
        sizes.append(held.nbytes)
    # Each row is there for two rounds: 20 + 120 tokens, in buffers of 64 columns more.
    a_column = 2 * 2 * 2 * 2 * 8 * 4
    assert max(sizes) <= (64 + 120 + 64) * a_column


def test_a_second_rollout_of_the_same_shape_is_not_traced_and_sees_the_new_weights():
    model, prompts, traced = tiny_model(), tokens_of([6]), []

    def sampler(out: mx.array, u: mx.array) -> tuple[mx.array, mx.array]:
        traced.append(out.shape)
        return mx.argmax(out, axis=-1), u[:, 0]

    def drawn():
        held, tokens, found = LeanRows(model, prompts, [0], 20), mx.array(prompts[0][-1:], mx.uint32), []
        for _ in range(20):
            tokens, _ = held.step(sampler, tokens, mx.zeros((1, 2)))
            found.append(tokens.item())
        return found

    before, weights = drawn(), model.parameters()
    assert len(traced) == 1
    model.update(tree_map(lambda array: -array, weights))
    changed = drawn()
    model.update(weights)
    assert before != changed
    assert drawn() == before
    assert len(traced) == 1
    assert all(array.dtype == mx.float32 for _, array in leaves(model.parameters()))
