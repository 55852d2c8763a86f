"""How work is cut among ranks; what ranks do together is in tests/ranks."""

import numpy as np
import pytest

from mlx_ops.distributed import ALONE, Lost, MlxRanks, bounds


def shares(costs, size):
    """What each rank owns."""
    return [list(range(len(costs)))[slice(*bounds(costs, rank, size))] for rank in range(size)]


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("costs", [[1.0] * 6, [9.0, 1, 1, 1], [0.0, 0.0], [], [3.0], list(np.arange(20.0))])
def test_the_shares_of_all_ranks_in_order_are_the_whole(costs, size):
    assert [item for share in shares(costs, size) for item in share] == list(range(len(costs)))


def test_equal_items_are_dealt_evenly():
    assert shares([1.0] * 6, 3) == [[0, 1], [2, 3], [4, 5]]
    assert [len(share) for share in shares([1.0] * 7, 2)] in ([3, 4], [4, 3])


def test_a_long_item_weighs_as_much_as_the_short_ones_together():
    assert shares([6.0, 2.0, 2.0, 2.0], 2) == [[0], [1, 2, 3]]


def test_with_fewer_items_than_ranks_some_ranks_have_none():
    assert sorted(map(len, shares([5.0], 3))) == [0, 0, 1]


def test_one_rank_has_all_and_sends_nothing():
    items, tree = [{"tokens": [1, 2]}, None], {"weight": object()}
    assert ALONE.share(items, [1.0, 2.0]) is items
    assert ALONE.gather(items) == items
    assert ALONE.sum(tree) is tree
    assert ALONE.is_writer


@pytest.mark.parametrize(
    ("lost", "writer"),
    [
        (None, 0),
        (Lost(0, "mac1", "its process is gone"), 1),
        (Lost(0, "mac1", "interrupted", said=True), 0),
        (Lost(2, "mac3", "its process is gone"), 0),
    ],
    ids=["nobody is lost", "rank 0 is lost", "rank 0 has saved and left", "another is lost"],
)
def test_the_writer_is_rank_0_or_the_next_where_it_is_lost_without_a_word(lost, writer):
    class OfThree(MlxRanks):
        def __init__(self, rank):
            self.rank, self.size, self.lost = rank, 3, lambda: lost

    assert [rank for rank in range(3) if OfThree(rank).is_writer] == [writer]


def test_what_is_said_of_a_lost_rank_names_its_host():
    assert str(Lost(1, "mac2", "its process is gone")) == "rank 1 on mac2 was lost: its process is gone"
    assert str(Lost(1, "mac2", "ValueError: x", said=True)) == "rank 1 on mac2 ended: ValueError: x"
