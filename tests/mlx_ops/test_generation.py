import random
from contextlib import nullcontext
from functools import cache

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.models import gemma3_text, llama

from configs.schema import SamplingConfig
from mlx_ops import generation
from mlx_ops.backend import prepare
from mlx_ops.batching import token_rows
from mlx_ops.forward import score
from mlx_ops.generation import StopStrings, generate
from mlx_ops.holding import Kind, choose, hold
from tests.mlx_ops.tiny import tiny_model

GREEDY = SamplingConfig(temperature=0.0, max_tokens=12)
COMPILES = prepare().kind == "cpu" and prepare().compiles
KINDS: tuple[Kind, ...] = (
    *("shared", "rows", "paged", "library"),
    *(("fused",) if mx.cuda.is_available() else ()),
    *(("lean",) if COMPILES else ()),
)
NO_EOS: frozenset[int] = frozenset()


def make_prompts(count: int, longest: int = 20, *, seed: int = 0, vocabulary: int = 64) -> list[list[int]]:
    source = random.Random(seed)
    return [[source.randrange(vocabulary) for _ in range(source.randint(1, longest))] for _ in range(count)]


def one_by_one(model, prompt: list[int], eos: frozenset[int], max_tokens: int) -> list[int]:
    """mlx-lm's own greedy loop, with the end token kept."""
    tokens = []
    for token, _ in generate_step(mx.array(prompt), model, max_tokens=max_tokens):
        tokens.append(int(token))
        if token in eos:
            break
    return tokens


@cache
def expected_of_64(eos: frozenset[int]) -> list[list[int]]:
    return [one_by_one(tiny_model(), prompt, eos, 12) for prompt in make_prompts(64)]


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_equals_mlx_lm_on_64_prompts_of_different_length(kind):
    eos = frozenset({7, 9})
    drawn = generate(tiny_model(), make_prompts(64), sampling=GREEDY, seeds=[0] * 64, eos=eos, cache=kind)
    assert [list(c.tokens) for c in drawn] == expected_of_64(eos)
    assert {c.truncated for c in drawn} == {True, False}


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3", "gemma2"])
def test_other_architectures_equal_mlx_lm_too(architecture):
    model, prompts = tiny_model(architecture), make_prompts(9)
    drawn = generate(model, prompts, sampling=GREEDY, seeds=[0] * 9, eos=NO_EOS)
    assert [list(c.tokens) for c in drawn] == [one_by_one(model, prompt, NO_EOS, 12) for prompt in prompts]


@pytest.mark.parametrize("kind", KINDS)
def test_a_seeded_row_is_the_same_alone_and_in_any_batch(kind):
    model, prompts, eos = tiny_model(), make_prompts(6), frozenset({5, 8, 13, 21})
    sampling, seeds = SamplingConfig(max_tokens=20), list(range(100, 118))
    whole = generate(model, prompts, sampling=sampling, seeds=seeds, eos=eos, group_size=3, cache=kind)
    for width in (1, 4, 7):
        narrow = generate(
            model, prompts, sampling=sampling, seeds=seeds, eos=eos, group_size=3, max_rows=width, cache=kind
        )
        assert [c.tokens for c in narrow] == [c.tokens for c in whole]
    for row in (0, 7, 17):
        alone = generate(model, [prompts[row // 3]], sampling=sampling, seeds=[seeds[row]], eos=eos, cache=kind)
        assert alone[0].tokens == whole[row].tokens
        np.testing.assert_allclose(alone[0].logprobs, whole[row].logprobs, atol=1e-5)
    assert len({c.tokens for c in whole}) == 18
    assert len({len(c.tokens) for c in whole}) > 3


def test_results_do_not_depend_on_how_often_the_host_looks(monkeypatch):
    model, prompts = tiny_model(), make_prompts(4)

    def drawn(every: int):
        monkeypatch.setattr(generation, "CHECK_EVERY", every)
        sampling = SamplingConfig(max_tokens=17)
        return generate(model, prompts, sampling=sampling, seeds=range(8), eos=frozenset({3}), group_size=2)

    assert [c.tokens for c in drawn(1)] == [c.tokens for c in drawn(5)] == [c.tokens for c in drawn(100)]


def test_sampled_logprobs_are_those_of_a_teacher_forced_pass_at_the_same_temperature():
    model, prompts = tiny_model(), make_prompts(5)
    sampling = SamplingConfig(temperature=1.7, max_tokens=15)
    drawn = generate(model, prompts, sampling=sampling, seeds=range(20), eos=frozenset({11}), group_size=4)
    rows = token_rows(prompts, [c.tokens for c in drawn], [row // 4 for row in range(20)])
    scored = np.array(score(model, rows, temperature=1.7)[0])
    for row, completion in enumerate(drawn):
        np.testing.assert_allclose(completion.logprobs, scored[row, : len(completion.tokens)], atol=1e-5)
    plain = np.array(score(model, rows)[0])
    assert np.abs(plain[0, :5] - np.array(drawn[0].logprobs[:5])).max() > 0.01


def test_an_end_token_is_kept_with_its_logprob_and_the_limit_truncates():
    model, prompt = tiny_model(), [4, 8, 15]
    free = generate(model, [prompt], sampling=GREEDY, seeds=[0], eos=NO_EOS)[0]
    assert free.truncated
    assert len(free.tokens) == len(free.logprobs) == 12
    end = free.tokens[4]
    first = free.tokens.index(end)
    ended = generate(model, [prompt], sampling=GREEDY, seeds=[0], eos=frozenset({end}))[0]
    assert ended.tokens == free.tokens[: first + 1]
    assert ended.logprobs == pytest.approx(free.logprobs[: first + 1], abs=1e-6)
    assert not ended.truncated


def test_a_row_ends_with_the_token_that_completes_a_stop_string():
    model, prompts = tiny_model(), make_prompts(3)
    free = generate(model, prompts, sampling=GREEDY, seeds=[0] * 3, eos=NO_EOS)
    text = "".join(f"<{token}>" for token in free[1].tokens)
    # The string spans two tokens, and ends inside the eleventh.
    string = f"{free[1].tokens[9]}><{free[1].tokens[10]}"
    stop = StopStrings(lambda tokens: "".join(f"<{token}>" for token in tokens), (string,))
    stopped = generate(model, prompts, sampling=GREEDY, seeds=[0] * 3, eos=NO_EOS, stop=stop)
    count = text[: text.index(string) + len(string)].count("<")
    assert stopped[1].tokens == free[1].tokens[:count]
    assert len(stopped[1].logprobs) == count
    assert not stopped[1].truncated


def test_long_prompts_are_prefilled_in_chunks_and_give_the_same(monkeypatch):
    model, prompts = tiny_model(), make_prompts(5, 60, seed=3)
    whole = generate(model, prompts, sampling=GREEDY, seeds=[0] * 5, eos=NO_EOS)
    monkeypatch.setattr("mlx_ops.held.PREFILL_COLUMNS", 7)
    monkeypatch.setattr("mlx_ops.holding.PREFILL_COLUMNS", 7)
    assert [c.tokens for c in generate(model, prompts, sampling=GREEDY, seeds=[0] * 5, eos=NO_EOS)] == [
        c.tokens for c in whole
    ]


def test_more_tokens_than_are_reserved_at_once_give_the_same(monkeypatch):
    model, prompts = tiny_model(), make_prompts(4)
    whole = {kind: generate(model, prompts, sampling=GREEDY, seeds=[0] * 4, eos=NO_EOS, cache=kind) for kind in KINDS}
    monkeypatch.setattr("mlx_ops.row_cache.GROWTH", 3)
    monkeypatch.setattr("mlx_ops.holding.GROWTH", 3)
    for kind in KINDS:
        assert generate(model, prompts, sampling=GREEDY, seeds=[0] * 4, eos=NO_EOS, cache=kind) == whole[kind]


def test_a_model_with_a_sliding_window_falls_back_to_mlx_lms_caches():
    model = tiny_model(layer_types=["sliding_attention", "full_attention"], sliding_window=6)
    assert choose(model) == "library"
    with pytest.raises(ValueError, match="RotatingKVCache"):
        hold("paged", model, [[1, 2]], [0], 4)
    prompts = make_prompts(6)
    drawn = generate(model, prompts, sampling=GREEDY, seeds=[0] * 6, eos=frozenset({7}))
    assert [list(c.tokens) for c in drawn] == [one_by_one(model, prompt, frozenset({7}), 12) for prompt in prompts]


@pytest.mark.skipif(not COMPILES, reason="for a CPU with a compiler")
def test_the_default_kind_on_a_cpu_is_the_lean_step_and_the_shared_prompt_for_what_it_refuses():
    model = tiny_model()
    assert choose(model) == "lean"
    model.set_dtype(mx.bfloat16)
    assert choose(model) == "shared"


@pytest.mark.parametrize(
    ("narrow", "group", "expected"), [(0, 20, ["all"]), (0, 4, ["all", "one"]), (1 << 40, 20, ["one"])]
)
def test_small_models_and_steps_of_few_rows_multiply_on_one_core(monkeypatch, narrow, group, expected):
    used: list[str] = []
    monkeypatch.setattr(generation, "NARROW", narrow)
    monkeypatch.setattr(generation, "one_blas_thread", lambda: used.append("one") or nullcontext())
    monkeypatch.setattr(generation, "nullcontext", lambda: used.append("all") or nullcontext())
    sampling = SamplingConfig(max_tokens=12)
    generate(tiny_model(), [[5] * 20], sampling=sampling, seeds=range(group), eos=frozenset(), group_size=group)
    assert sorted(set(used)) == expected


def test_progress_counts_up_to_all_rows_and_tokens():
    seen = []
    drawn = generate(
        tiny_model(),
        make_prompts(4),
        sampling=SamplingConfig(max_tokens=20),
        seeds=range(8),
        eos=frozenset({2, 3}),
        group_size=2,
        max_rows=4,
        progress=lambda rows, tokens: seen.append((rows, tokens)),
    )
    assert seen == sorted(seen)
    assert seen[-1] == (8, sum(len(c.tokens) for c in drawn))


def test_wrong_numbers_of_seeds_and_empty_prompts_are_named():
    with pytest.raises(ValueError, match="3 for 2 prompts x 2"):
        generate(tiny_model(), [[1], [2]], sampling=GREEDY, seeds=[0] * 3, eos=NO_EOS, group_size=2)
    with pytest.raises(ValueError, match="without tokens"):
        generate(tiny_model(), [[1], []], sampling=GREEDY, seeds=[0] * 2, eos=NO_EOS)


def test_routing_attention_leaves_other_caches_as_they_were():
    model, prompt = tiny_model(), [3, 1, 4, 1, 5]
    before = one_by_one(model, prompt, NO_EOS, 8)
    generate(model, [prompt], sampling=GREEDY, seeds=[0], eos=NO_EOS, cache="shared")
    assert one_by_one(model, prompt, NO_EOS, 8) == before
    assert vars(llama)["scaled_dot_product_attention"].__module__ == "mlx_ops.shared_prompt"
    assert vars(gemma3_text)["scaled_dot_product_attention"].__module__ == "mlx_lm.models.base"
