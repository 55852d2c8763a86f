import pytest

from rewards.shaping import repetition_penalty, soft_overlong_penalty


@pytest.mark.parametrize(
    ("length", "expected"), [(0, 0.0), (80, 0.0), (85, -0.25), (99, -0.95), (100, -1.0), (500, -1.0)]
)
def test_length_is_punished_within_the_cache_and_no_further_than_minus_one(length, expected):
    assert soft_overlong_penalty(length, max_length=100, cache=20) == pytest.approx(expected)


def test_without_a_cache_only_what_is_longer_than_the_cap_is_punished():
    assert soft_overlong_penalty(100, max_length=100, cache=0) == 0.0
    assert soft_overlong_penalty(101, max_length=100, cache=0) == -1.0


def test_a_cache_longer_than_the_cap_is_refused():
    with pytest.raises(ValueError, match="max_length 10"):
        soft_overlong_penalty(5, max_length=10, cache=11)


def test_repetition_costs_the_share_of_repeated_ngrams():
    # the cat, cat the, the cat, cat sat: three of four differ.
    assert repetition_penalty(["the", "cat", "the", "cat", "sat"], ngram=2, max_penalty=-0.8) == pytest.approx(-0.2)
    assert repetition_penalty([1, 2, 3], ngram=2, max_penalty=-0.8) == 0.0
    assert repetition_penalty([1], ngram=2, max_penalty=-0.8) == 0.0


def test_a_positive_penalty_is_refused():
    with pytest.raises(ValueError, match="positive"):
        repetition_penalty([1, 1], ngram=1, max_penalty=0.5)
