import math
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.evaluation.statistics import (
    estimate,
    maj_at_k,
    majority,
    mcnemar,
    paired_bootstrap,
    pass_at_k,
    standard_error,
    wilson_interval,
)


@pytest.mark.parametrize(
    ("n", "correct", "k", "expected"),
    [
        (5, 2, 1, 0.4),
        (10, 3, 5, 11 / 12),
        (20, 1, 10, 0.5),
        (10, 9, 2, 1.0),
        (200, 13, 100, 0.9999194972),
        (4, 0, 4, 0.0),
    ],
)
def test_pass_at_k_is_the_unbiased_estimate(n, correct, k, expected):
    assert pass_at_k(n, correct, k) == pytest.approx(expected, abs=1e-10)


@given(n=st.integers(1, 8), correct=st.integers(0, 8), k=st.integers(1, 8))
def test_pass_at_k_is_the_share_of_subsets_with_a_pass(n, correct, k):
    correct, k = min(correct, n), min(k, n)
    subsets = list(combinations([True] * correct + [False] * (n - correct), k))
    assert pass_at_k(n, correct, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_fewer_samples_than_k_are_refused():
    with pytest.raises(ValueError, match="pass@5 needs at least 5 samples a problem, got 4"):
        pass_at_k(4, 1, 5)
    with pytest.raises(ValueError, match="maj@3 needs at least 3"):
        maj_at_k(["1", "2"], [True, False], 3)


def test_the_majority_needs_no_vote_of_those_without_an_answer():
    assert majority([None, None, None, "7", "8", "8"]) == 4
    assert majority([None, None]) is None


def test_a_tie_goes_to_the_answer_that_came_first():
    assert majority(["8", "7", "7", "8"]) == 0


def test_maj_at_k_looks_at_the_first_k_only():
    votes, correct = ["7", "8", "8", "7", "7"], [False, True, True, False, False]
    assert [maj_at_k(votes, correct, k) for k in (1, 3, 5)] == [0.0, 1.0, 0.0]


def test_the_standard_error_divides_by_n_minus_one():
    # Mean 0.25, squared deviations 3 * 0.0625 + 0.5625 = 0.75, variance 0.75 / 3, over n = 4.
    assert standard_error([0, 0, 0, 1]) == pytest.approx(0.25)
    assert standard_error([1]) is None


def test_gsm8k_at_one_half_has_the_standard_error_that_lm_eval_prints():
    assert standard_error([1] * 660 + [0] * 659) == pytest.approx(0.0138, abs=5e-5)


@pytest.mark.parametrize(
    ("share", "n", "low", "high"),
    # z^2 = 3.8415: at 0 of 10 the upper end is 3.8415 / 13.8415; 3 of 4: centre 1.23018 / 1.96036, half 0.32689.
    [(0.0, 10, 0.0, 0.27753), (1.0, 10, 0.72247, 1.0), (0.5, 10, 0.23659, 0.76341), (0.75, 4, 0.30064, 0.95442)],
)
def test_wilsons_interval(share, n, low, high):
    assert wilson_interval(share, n) == pytest.approx((low, high), abs=2e-5)


def test_a_score_of_all_or_nothing_still_has_a_width():
    none, every = estimate([0.0] * 20), estimate([1.0] * 20)
    assert (none.low, every.high) == (0.0, 1.0)
    assert none.high == pytest.approx(1 - every.low) == pytest.approx(0.16113, abs=1e-5)
    assert none.method == every.method == "wilson"


def test_fractions_have_a_normal_interval_within_zero_and_one():
    # Mean 0.8, deviations ±0.2: stderr 0.2 * sqrt(4 / 3) / 2 = 0.11547; 1.96 of it is 0.22632.
    found = estimate([0.6, 1.0, 0.6, 1.0])
    assert (found.score, found.stderr, found.low, found.high) == pytest.approx((0.8, 0.11547, 0.57368, 1.0), abs=1e-5)
    assert found.method == "normal"


def test_a_mean_reward_may_leave_zero_to_one():
    found = estimate([-3.0, 5.0, 1.0], share=False)
    # Deviations -4, 4, 0: stderr sqrt(32 / 2 / 3) = 2.3094.
    assert (found.score, found.low, found.high) == pytest.approx((1.0, -3.52635, 5.52635), abs=1e-5)
    single = estimate([4.0], share=False)
    assert (single.low, single.high, single.stderr, single.method) == (4.0, 4.0, None, "none")


def test_a_mean_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one problem"):
        estimate([])


@pytest.mark.parametrize(
    ("gained", "lost", "p"),
    # 2 * (1 + 10 + 45) / 1024; 2 * 1 / 32; no change at all; 2 * (1 + 8 + 28 + 56 + 70) / 256 is above 1.
    [(8, 2, 0.109375), (0, 5, 0.0625), (0, 0, 1.0), (4, 4, 1.0), (5, 0, 0.0625)],
)
def test_mcnemar_is_exact(gained, lost, p):
    assert mcnemar(gained, lost) == pytest.approx(p)


def test_mcnemar_does_not_overflow_on_a_large_benchmark():
    assert 0 < mcnemar(900, 419) < 1e-30


def test_the_paired_bootstrap_resamples_pairs():
    # Every problem gains exactly 0.25, however much problems differ: unpaired resampling would have a wide interval.
    first = [0.0, 0.75, 0.25, 0.5] * 5
    assert paired_bootstrap(first, [value + 0.25 for value in first]) == (0.25, 0.25)


def test_the_paired_bootstrap_agrees_with_the_normal_interval_of_many_problems():
    first, second = [0.0] * 400, [1.0] * 100 + [0.0] * 300
    half = 1.96 * math.sqrt(0.25 * 0.75 / 400)
    low, high = paired_bootstrap(first, second)
    assert (low, high) == pytest.approx((0.25 - half, 0.25 + half), abs=0.004)


def test_the_paired_bootstrap_has_a_sign_and_a_seed():
    first, second = [0.0, 0.0, 1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0, 1.0, 0.0]
    low, high = paired_bootstrap(first, second)
    assert paired_bootstrap(first, second) == (low, high)
    assert paired_bootstrap(second, first) == pytest.approx((-high, -low))


def test_the_paired_bootstrap_refuses_unpaired_values():
    with pytest.raises(ValueError, match="got 2 and 1"):
        paired_bootstrap([1, 0], [1])
