import random

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_map

from configs.schema import SamplingConfig
from mlx_ops import compiled_rows, generation
from mlx_ops.backend import prepare
from mlx_ops.compiled_rows import COLUMNS, CompiledRows, compiled
from mlx_ops.generation import generate
from mlx_ops.holding import hold
from mlx_ops.sampling import make_sampler, uniforms
from tests.mlx_ops.tiny import tiny_model

pytestmark = pytest.mark.skipif(
    prepare().kind != "cpu" or not prepare().compiles, reason="the compiled step is for a CPU with g++"
)
SAMPLER = make_sampler(SamplingConfig())


def tokens_of(lengths: list[int]) -> list[list[int]]:
    source = random.Random(3)
    return [[source.randrange(64) for _ in range(length)] for length in lengths]


def advance(model, held, tokens: mx.array, seeds: list[int], start: int, count: int):
    """Tokens and log-probabilities (count, B) of some steps."""
    draws = mx.array(uniforms(seeds, [start] * len(seeds), count))
    drawn, scores = [], []
    for t in range(count):
        tokens, logprobs = held.step(
            lambda tokens, u, caches: SAMPLER(model(tokens[:, None], cache=caches)[:, -1], u), tokens, draws[t]
        )
        drawn.append(tokens)
        scores.append(logprobs)
    return np.array(mx.stack(drawn)), np.array(mx.stack(scores))


@pytest.mark.parametrize("lengths", [[9, 3, 14], [1, 1], [6, 1]])
def test_rows_that_are_taken_over_go_on_as_before(lengths):
    model, prompts = tiny_model(), tokens_of(lengths)
    index, seeds, steps = sorted(list(range(len(lengths))) * 2), list(range(len(lengths) * 2)), COLUMNS + 20
    begun = [hold("shared", model, prompts, index, steps + 5) for _ in range(2)]
    last = mx.array([prompts[place][-1] for place in index])
    (tokens, _), _ = [advance(model, held, last, seeds, 0, 5) for held in begun]
    taken = compiled(begun[1], len(index))
    assert isinstance(taken, CompiledRows)
    expected = advance(model, begun[0], mx.array(tokens[-1]), seeds, 5, steps)
    found = advance(model, taken, mx.array(tokens[-1]), seeds, 5, steps)
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_allclose(found[1], expected[1], atol=1e-5)


def test_rows_that_joined_later_and_rows_that_are_left_stand_at_their_own_positions():
    model, prompts = tiny_model(), tokens_of([8, 5, 11])
    both = [hold("shared", model, prompts[:2], [0, 0, 1], 40) for _ in range(2)]
    last = mx.array([prompts[place][-1] for place in (0, 0, 1)])
    (tokens, _), _ = [advance(model, held, last, [0, 1, 2], 0, 4) for held in both]
    for held in both:
        held.join(prompts[2:], [0], 40)
    more = mx.concatenate([mx.array(tokens[-1]), mx.array(prompts[2][-1:])])
    (tokens, _), _ = [advance(model, held, more, [0, 1, 2, 3], 4, 6) for held in both]
    left, rows = compiled(both[1], 4), mx.array(tokens[-1])
    kept = rows[mx.array([1, 3])]
    for held in (both[0], left):
        held.keep([1, 3], 20)
    expected, found = (advance(model, held, kept, [1, 3], 10, 20) for held in (both[0], left))
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_allclose(found[1], expected[1], atol=1e-5)


def test_the_engine_draws_the_same_with_and_without_it(monkeypatch):
    model, prompts = tiny_model(), tokens_of([7, 2, 12, 5])
    taken = []
    monkeypatch.setattr(generation, "compiled", lambda held, rows: taken.append(compiled(held, rows)) or taken[-1])

    def drawn():
        sampling = SamplingConfig(max_tokens=90)
        return generate(model, prompts, sampling=sampling, seeds=range(20), eos=frozenset({3, 11}), group_size=5)

    first = drawn()
    assert any(isinstance(held, CompiledRows) for held in taken)
    monkeypatch.setattr(compiled_rows, "FEW", 0)
    second = drawn()
    assert [c.tokens for c in first] == [c.tokens for c in second]
    for one, other in zip(first, second, strict=True):
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-5)


def test_an_update_between_two_rollouts_is_seen():
    model, prompts = tiny_model(), tokens_of([6])
    greedy = SamplingConfig(temperature=0.0, max_tokens=20)

    def drawn():
        return generate(model, prompts, sampling=greedy, seeds=[0], eos=frozenset())[0].tokens

    before, weights = drawn(), model.parameters()
    model.update(tree_map(lambda array: -array, weights))
    changed = drawn()
    model.update(weights)
    assert before != changed
    assert drawn() == before
