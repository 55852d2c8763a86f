import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.draws import permutation, uniform
from pipeline.data.samplers import ByLength, Sequential, Shuffled, Weighted, make_sampler
from rewards.base import Example

ORDERS = ("sequential", "shuffled", "weighted", "by_length")


def examples(count):
    return [Example(str(n), "x" * (n * 7 % 11 + 1), columns={"weight": 1 + n % 3}) for n in range(count)]


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.sampled_from(ORDERS), st.integers(1, 30), st.integers(0, 5), st.lists(st.integers(0, 7), max_size=8))
def test_any_cuts_of_the_way_give_the_same_examples_after_any_resume(order, count, seed, cuts):
    whole = make_sampler(order, examples(count), seed, bucket=4).take(0, sum(cuts))
    pieces, position = [], 0
    for cut in cuts:
        # A new sampler each time: nothing but the position is carried over.
        pieces += make_sampler(order, examples(count), seed, bucket=4).take(position, cut)
        position += cut
    assert pieces == whole
    assert all(0 <= index < count for index in whole)


@pytest.mark.parametrize("sampler", [Sequential(7, 3), Shuffled(7, 3), ByLength([3, 1, 4, 1, 5, 9, 2], 3, bucket=2)])
def test_an_epoch_holds_each_example_once(sampler):
    for epoch in range(4):
        assert sorted(sampler.take(7 * epoch, 7)) == list(range(7))


def test_sequential_goes_round():
    assert Sequential(3).take(2, 4) == [2, 0, 1, 2]


def test_epochs_and_seeds_have_orders_of_their_own():
    sampler = Shuffled(50, 1)
    first, second = sampler.take(0, 50), sampler.take(50, 50)
    assert first != second
    assert first != Shuffled(50, 2).take(0, 50)
    assert first != list(range(50))
    # Back in an epoch that was left.
    assert sampler.take(0, 50) == first


def test_weights_are_shares_of_the_draws():
    drawn = Weighted([1, 0, 3, 0], seed=5).take(1000, 4000)
    assert set(drawn) == {0, 2}
    # Four standard deviations of a binomial of 4000 draws at 1/4 are 110.
    assert abs(drawn.count(0) - 1000) < 110


def test_a_draw_does_not_depend_on_the_ones_before_it():
    assert Weighted([1, 1, 1], seed=5).take(17, 3) == [Weighted([1, 1, 1], seed=5).index(p) for p in (17, 18, 19)]


@pytest.mark.parametrize("weight", [None, -1, "2", True, float("nan"), float("inf")], ids=repr)
def test_a_weight_that_is_none_names_its_example(weight):
    with pytest.raises(ValueError, match="example 'b': order: weighted needs"):
        make_sampler(
            "weighted", [Example("a", "p", columns={"weight": 1}), Example("b", "p", columns={"weight": weight})], 0
        )


def test_weights_that_are_all_zero_and_no_examples_are_refused():
    with pytest.raises(ValueError, match="not all 0"):
        Weighted([0, 0])
    for order in ORDERS:
        with pytest.raises(ValueError, match="no examples"):
            make_sampler(order, [], 0)


def test_a_bucket_holds_near_lengths_and_the_short_one_comes_last():
    lengths = [n * 37 % 100 for n in range(100)]  # 0 … 99, each once
    sampler = ByLength(lengths, seed=2, bucket=8)
    order = sampler.take(0, 100)
    spreads = []
    for start in range(0, 100, 8):
        bucket = [lengths[index] for index in order[start : start + 8]]
        spreads.append(max(bucket) - min(bucket))
    assert spreads == [7] * 12 + [3]
    assert [lengths[i] for i in order] != sorted(lengths)
    assert order[:8] != sampler.take(100, 8)


def test_equal_lengths_meet_in_other_buckets_each_epoch():
    sampler = ByLength([5] * 40, seed=2, bucket=8)
    first, second = ({frozenset(sampler.take(40 * e + s, 8)) for s in range(0, 40, 8)} for e in (0, 1))
    assert first != second


def test_length_is_that_of_prompt_and_target():
    rows = [Example("a", "xx", target="yyyy"), Example("b", "xxx"), Example("c", "x", target="y")]
    assert [rows[i].id for i in make_sampler("by_length", rows, 0, bucket=3).take(0, 3)] == ["c", "b", "a"]


def test_draws_are_these_numbers_on_every_machine():
    # `printf 'a\0001' | sha256sum` begins with 05a9c569a185ac60: the top 53 of these bits over 2 ** 53.
    assert uniform("a", 1) == (0x05A9C569A185AC60 >> 11) / 2**53
    assert permutation(8, "p", 0) == [0, 4, 1, 5, 6, 3, 2, 7]
