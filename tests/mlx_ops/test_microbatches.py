import random

import pytest

from mlx_ops.microbatches import bucketed, microbatch_token_bytes, padded_tokens, plan


def unequal(rows: int, seed: int = 0) -> list[int]:
    source = random.Random(seed)
    return [min(250, 8 + int(source.expovariate(1 / 63))) for _ in range(rows)]


def test_buckets_are_multiples_of_32():
    assert [bucketed(length) for length in (1, 32, 33, 250)] == [32, 32, 64, 256]


def test_a_microbatch_pays_its_prompts_once_and_its_rows_to_the_longest_bucket():
    # Two prompts of at most 7 tokens, three rows of at most 33 tokens: 2 x 7 + 3 x 64.
    assert padded_tokens([0, 1, 2], [5, 7, 100], [0, 0, 1, 2], [3, 33, 9, 1]) == 2 * 7 + 3 * 64


@pytest.mark.parametrize("group_size", [1, 8])
def test_every_row_is_planned_once_and_no_microbatch_is_above_the_budget(group_size):
    lengths = unequal(64)
    prompts, index = [20 + 3 * p for p in range(64 // group_size)], [row // group_size for row in range(64)]
    parts = plan(prompts, index, lengths, token_budget=1500)
    assert sorted(row for part in parts for row in part) == list(range(64))
    assert all(padded_tokens(part, prompts, index, lengths) <= 1500 for part in parts)
    assert len(parts) > 2


def test_a_row_above_the_budget_stands_alone():
    assert sorted(plan([10, 10], [0, 1, 1], [500, 5, 9], token_budget=100)) == [[0], [1, 2]]


def test_unequal_lengths_are_padded_to_little_more_than_they_are():
    lengths = unequal(64)
    parts = plan([32] * 64, list(range(64)), lengths, token_budget=2048)
    padded = sum(padded_tokens(part, [32] * 64, range(64), lengths) for part in parts)
    whole = 64 * (32 + bucketed(max(lengths)))
    assert padded < 0.6 * whole
    assert padded < 1.35 * (sum(lengths) + 64 * 32)


def test_long_prompts_keep_a_group_together_and_short_ones_go_by_length():
    lengths = [10, 200, 10, 200, 10, 200, 10, 200]
    index = [0, 0, 1, 1, 2, 2, 3, 3]
    together = plan([2000] * 4, index, lengths, token_budget=2500)
    assert together == [[0, 1], [2, 3], [4, 5], [6, 7]]
    apart = plan([8] * 4, index, lengths, token_budget=930)
    assert sorted(apart) == [[0, 2, 4, 6], [1, 3, 5, 7]]


def test_rows_of_a_prompt_stand_beside_each_other():
    index = [1, 0, 1, 0, 1]
    for part in plan([4, 4], index, [9, 9, 9, 9, 9], token_budget=10_000):
        assert [index[row] for row in part] == sorted(index[row] for row in part)


def test_a_token_costs_three_rows_of_the_vocabulary_and_the_vectors_of_its_layers():
    sizes = {"vocabulary": 1000, "hidden": 64, "layers": 10}
    # 3 x 1,000 floats, and 34 x 64 of them in each of 10 layers.
    assert microbatch_token_bytes(**sizes, checkpointed=False) == 4 * (3000 + 34 * 64 * 10)
    # One layer's own, and the input of each.
    assert microbatch_token_bytes(**sizes, checkpointed=True) == 4 * (3000 + 44 * 64)
