import math

import mlx.core as mx
import numpy as np
import pytest

from configs.schema import SamplingConfig
from mlx_ops.sampling import draw, make_sampler, uniforms


def frequencies(sampler, logits: list[float], draws: int = 4000) -> np.ndarray:
    u = mx.array(uniforms(range(draws), [0] * draws, 1)[0])
    tokens, _ = sampler(mx.broadcast_to(mx.array([logits]), (draws, len(logits))), u)
    return np.bincount(np.array(tokens), minlength=len(logits)) / draws


def test_a_step_of_a_row_is_a_function_of_its_seed_and_number():
    table = uniforms([7, 8], [0, 0], 6)
    assert table.shape == (6, 2, 2)
    np.testing.assert_array_equal(uniforms([8], [4], 1)[0, 0], table[4, 1])
    np.testing.assert_array_equal(uniforms([9, 8], [100, 2], 2)[:, 1], table[2:4, 1])
    assert not np.array_equal(table[0, 0], table[0, 1])
    assert not np.array_equal(table[0, 0], table[1, 0])


def test_uniforms_fill_the_unit_interval_evenly_and_never_reach_one():
    numbers = uniforms(range(2000), [0] * 2000, 50).reshape(-1, 2).astype(np.float64)
    assert numbers.min() >= 0
    assert numbers.max() < 1
    counts = np.histogram2d(*numbers.T, bins=16, range=((0, 1), (0, 1)))[0]
    expected = len(numbers) / 256
    # Chi-square with 255 degrees of freedom: its 99.99 % point is 344.
    assert ((counts - expected) ** 2 / expected).sum() < 344
    assert abs(np.corrcoef(numbers[:-50, 0], numbers[50:, 0])[0, 1]) < 0.015


def test_large_and_negative_seeds_are_seeds_too():
    table = uniforms([-1, 2**64 - 1, 2**63, 5], [0] * 4, 1)[0]
    np.testing.assert_array_equal(table[0], table[1])
    assert len({tuple(row) for row in table.tolist()}) == 3


@pytest.mark.parametrize("vocabulary", [5, 5000], ids=["one level", "two levels"])
def test_tokens_come_with_the_probabilities_of_the_softmax(vocabulary):
    logits = np.full(vocabulary, -50.0)
    places = [0, 1, vocabulary // 2, vocabulary - 1]
    logits[places] = np.log([0.5, 0.1, 0.3, 0.1])
    drawn = frequencies(draw, logits.tolist())
    # Four standard deviations of 4,000 draws at p = 0.5 are 0.032.
    np.testing.assert_allclose(drawn[places], [0.5, 0.1, 0.3, 0.1], atol=0.032)


@pytest.mark.parametrize("vocabulary", [64, 2049, 4096])
def test_extreme_uniforms_draw_the_first_and_last_token_that_has_weight(vocabulary):
    logits = np.full((1, vocabulary), -np.inf, dtype=np.float32)
    logits[0, [3, 17, vocabulary - 2]] = 0.0
    below_one = float(np.float32(1 - 2**-24))
    low, low_logprob = draw(mx.array(logits), mx.array([[0.0, 0.0]]))
    high, high_logprob = draw(mx.array(logits), mx.array([[below_one, below_one]]))
    assert (low.item(), high.item()) == (3, vocabulary - 2)
    assert low_logprob.item() == pytest.approx(-math.log(3), abs=1e-6)
    assert high_logprob.item() == pytest.approx(-math.log(3), abs=1e-6)


def test_the_logprob_is_of_the_tempered_distribution():
    sampler = make_sampler(SamplingConfig(temperature=2.0))
    # softmax([4, 0] / 2) gives the first token 1 / (1 + e^-2) = 0.8808.
    tokens, logprobs = sampler(mx.array([[4.0, 0.0], [4.0, 0.0]]), mx.array([[0.87, 0.5], [0.89, 0.5]]))
    assert tokens.tolist() == [0, 1]
    assert np.exp(np.array(logprobs)).tolist() == pytest.approx([0.8808, 0.1192], abs=1e-4)


def test_greedy_takes_the_largest_with_the_models_own_logprob():
    tokens, logprobs = make_sampler(SamplingConfig(temperature=0.0))(mx.array([[0.0, 2.0, 1.0]]), mx.zeros((1, 2)))
    assert tokens.tolist() == [1]
    assert logprobs.item() == pytest.approx(2 - math.log(1 + math.e**2 + math.e), abs=1e-6)


PROBABILITIES = [0.4, 0.3, 0.2, 0.06, 0.04]


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"top_k": 2}, 2),
        ({"top_k": 50}, 5),
        ({"top_p": 0.7}, 2),
        ({"top_p": 0.71}, 3),
        ({"top_p": 0.1}, 1),
        ({"min_p": 0.45}, 3),
        ({"top_k": 4, "top_p": 0.72, "min_p": 0.6}, 2),
    ],
    ids=str,
)
def test_truncation_keeps_the_likeliest_and_renormalises(settings, kept):
    sampler = make_sampler(SamplingConfig(**settings))
    shuffled = [PROBABILITIES[place] for place in (3, 0, 4, 2, 1)]
    u = mx.array([[(place + 0.5) / 200, 0.5] for place in range(200)])
    tokens, logprobs = sampler(mx.broadcast_to(mx.log(mx.array([shuffled])), (200, 5)), u)
    pairs = zip(np.array(tokens).tolist(), np.array(logprobs).tolist(), strict=True)
    drawn = {shuffled[token]: math.exp(logprob) for token, logprob in pairs}
    whole = sum(PROBABILITIES[:kept])
    assert drawn == pytest.approx({p: p / whole for p in PROBABILITIES[:kept]}, abs=1e-5)


def test_top_k_keeps_no_more_than_ties_force():
    sampler = make_sampler(SamplingConfig(top_k=1))
    tokens, logprobs = sampler(mx.array([[1.0, 3.0, 2.0]] * 3), mx.array([[0.0, 0], [0.5, 0], [0.99, 0]]))
    assert tokens.tolist() == [1, 1, 1]
    assert logprobs.tolist() == pytest.approx([0, 0, 0], abs=1e-6)


def test_half_precision_logits_are_drawn_in_float32():
    logits = mx.random.normal((4, 300), key=mx.random.key(0)).astype(mx.bfloat16)
    for config in (SamplingConfig(), SamplingConfig(temperature=0.0), SamplingConfig(top_p=0.9)):
        tokens, logprobs = make_sampler(config)(logits, mx.full((4, 2), 0.4))
        wide = logits.astype(mx.float32)
        expected = mx.take_along_axis(wide, tokens[:, None], -1)[:, 0] - mx.logsumexp(wide, -1)
        assert logprobs.dtype == mx.float32
        if not config.truncates:
            np.testing.assert_allclose(np.array(logprobs), np.array(expected), atol=1e-5)
