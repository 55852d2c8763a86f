import math

import mlx.core as mx
import numpy as np
import pytest

from mlx_ops.advantages import (
    AdaptiveKL,
    as_column,
    constant_groups,
    gae,
    group_advantages,
    kl_in_reward,
    leave_one_out_advantages,
    length_weighted_advantages,
    multi_reward_advantages,
    reinforce_plus_plus,
    reinforce_plus_plus_baseline,
    rewards_to_go,
    token_rewards,
    total_rewards,
)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize(("value", "size"), [(0.1, 3), (0.3, 8), (0.7, 16)])
def test_a_constant_group_gives_exactly_zero(value, size, scale):
    noise = np.float32(value) + np.float32(6e-8) * (np.arange(size) % 2)
    rewards = np.concatenate([noise, np.arange(size)])
    advantages = group_advantages(rewards, size, scale=scale)
    assert not advantages[:size].any()
    assert advantages[size:].any()
    assert constant_groups(rewards, size).tolist() == [True, False]


def test_a_small_but_real_difference_is_signal():
    assert constant_groups([0.0, 2e-5], 2).tolist() == [False]
    assert group_advantages([0.0, 2e-5], 2, eps=0.0) == pytest.approx([-(0.5**0.5), 0.5**0.5])


def test_the_std_is_unbiased_and_epsilon_is_added_to_it():
    # Mean 2, squares 4 + 0 + 4, std = sqrt(8 / 2) = 2.
    assert group_advantages([0.0, 2.0, 4.0], 3, eps=0.5) == pytest.approx([-0.8, 0.0, 0.8], abs=1e-12)
    assert group_advantages([0.0, 2.0, 4.0], 3, scale="none") == pytest.approx([-2.0, 0.0, 2.0])


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_what_was_not_scored_changes_nothing_for_the_others(scale):
    alone = group_advantages([1.0, 0.0, 0.0], 3, scale=scale)
    with_none = group_advantages([1.0, None, 0.0, 0.0], 4, scale=scale)
    assert with_none == pytest.approx([alone[0], 0.0, alone[1], alone[2]])


def test_a_group_with_one_score_or_none_has_no_signal():
    assert group_advantages([None, None, 3.0, None], 2).tolist() == [0.0] * 4
    assert constant_groups([None, None, 3.0, None], 2).tolist() == [True, True]


def test_rows_that_do_not_fill_groups_are_refused():
    with pytest.raises(ValueError, match="group size 4"):
        group_advantages([1.0] * 6, 4)


def test_leaving_one_out_compares_with_the_others():
    # 6 against (3 + 0) / 2, 3 against 3, 0 against 4.5.
    assert leave_one_out_advantages([6.0, 3.0, 0.0], 3) == pytest.approx([4.5, 0.0, -4.5])
    assert leave_one_out_advantages([6.0, None, 0.0], 3) == pytest.approx([6.0, 0.0, -6.0])
    assert leave_one_out_advantages([6.0, 3.0, 0.0], 3, scale="batch", eps=0.5) == pytest.approx([0.9, 0.0, -0.9])


def test_the_length_weighted_baseline_leans_to_long_completions():
    # (1 * 2 + 3 * 6) / 4 = 5.
    assert length_weighted_advantages([2.0, 6.0], [1, 3], 2) == pytest.approx([-3.0, 1.0])
    assert length_weighted_advantages([2.0, 6.0], [7, 7], 2) == pytest.approx([-2.0, 2.0])
    assert length_weighted_advantages([2.0, None, 6.0], [1, 50, 3], 3) == pytest.approx([-3.0, 0.0, 1.0])
    assert not length_weighted_advantages([0.7, 0.7 + 6e-8], [1, 3], 2).any()


def test_totals_leave_out_what_was_not_scored_and_what_does_not_weigh():
    totals = total_rewards([[1.0, 2.0, 9.0], [None, 2.0, 9.0], [None, None, 9.0]], [1.0, 0.5, 0.0])
    np.testing.assert_array_equal(totals, [2.0, 1.0, math.nan])


def test_normalising_first_makes_the_scale_of_a_reward_irrelevant():
    rewards = np.array([[1.0, 0.0], [0.0, 500.0], [0.0, 0.0], [1.0, 500.0]])
    first = multi_reward_advantages(rewards, [1.0, 1.0], 4, order="normalize_then_sum", eps=0.0)
    assert first == pytest.approx([0.0, 0.0, -1.5 / math.sqrt(1.5), 1.5 / math.sqrt(1.5)])
    then = multi_reward_advantages(rewards, [1.0, 1.0], 4, order="sum_then_normalize", eps=0.0)
    assert then[1] > 0.8 > -0.8 > then[0]


def test_normalising_first_keeps_constant_groups_at_exactly_zero():
    rewards = [[0.1, 0.7]] * 3 + [[0.0, 1.0], [0.3, 0.2], [0.9, 0.1]]
    advantages = multi_reward_advantages(rewards, [1.0, 0.3], 3, order="normalize_then_sum")
    assert not advantages[:3].any()
    assert advantages[3:].all()


def test_normalising_first_leaves_unscored_rows_out_of_the_batch():
    advantages = multi_reward_advantages([[1.0], [0.0], [None], [None]], [1.0], 4, order="normalize_then_sum", eps=0.0)
    # 0.71 and -0.71 have the unbiased std 1.
    assert advantages == pytest.approx([0.5**0.5, -(0.5**0.5), 0.0, 0.0])


def test_with_lambda_one_the_returns_are_discounted_sums_whatever_the_values():
    rewards, values = mx.array([[1.0, 2.0, 4.0]]), mx.array([[7.0, -3.0, 5.0]])
    advantages, returns = gae(rewards, values, mx.ones((1, 3)), gamma=0.5, gae_lambda=1.0)
    np.testing.assert_allclose(np.array(returns), [[3.0, 4.0, 4.0]])
    np.testing.assert_allclose(np.array(advantages), [[-4.0, 7.0, -1.0]])
    np.testing.assert_allclose(np.array(rewards_to_go(rewards, mx.ones((1, 3)), gamma=0.5)), [[3.0, 4.0, 4.0]])


def test_with_lambda_zero_the_advantages_are_one_step_errors():
    rewards, values = mx.array([[1.0, 2.0, 4.0]]), mx.array([[7.0, -3.0, 5.0]])
    advantages, _ = gae(rewards, values, mx.ones((1, 3)), gamma=0.5, gae_lambda=0.0)
    np.testing.assert_allclose(np.array(advantages), [[1 - 1.5 - 7, 2 + 2.5 + 3, 4 - 5]])


@pytest.mark.parametrize("length", [1, 2, 5, 8, 13])
def test_a_hole_is_as_if_it_were_not_there(length):
    rng = np.random.default_rng(length)
    rewards, values = rng.normal(size=(2, 3, length)).astype(np.float32)
    mask = np.ones((3, length), dtype=np.float32)
    mask[1, rng.random(length) < 0.5] = 0
    mask[2, length // 2 :] = 0
    advantages, returns = gae(mx.array(rewards), mx.array(values), mx.array(mask), gamma=0.9, gae_lambda=0.7)
    for row in range(3):
        kept = mask[row] == 1
        advantage = value = 0.0
        for t in reversed(np.flatnonzero(kept)):
            delta = rewards[row, t] + 0.9 * value - values[row, t]
            advantage, value = delta + 0.9 * 0.7 * advantage, values[row, t]
            assert advantages[row, int(t)].item() == pytest.approx(advantage, abs=1e-5)
            assert returns[row, int(t)].item() == pytest.approx(advantage + value, abs=1e-5)
        assert not np.array(advantages)[row, ~kept].any()
        assert not np.array(returns)[row, ~kept].any()


def test_garbage_in_padding_does_not_reach_the_advantages():
    bad = mx.array([[1.0, math.nan, math.inf]])
    advantages, returns = gae(bad, bad, mx.array([[1, 0, 0]]), gamma=0.9)
    assert advantages.tolist() == [[0.0, 0.0, 0.0]]
    assert returns.tolist() == [[1.0, 0.0, 0.0]]


def test_the_score_stands_at_the_last_counted_token():
    mask = mx.array([[1, 1, 0], [1, 0, 1], [0, 0, 0]])
    rewards = token_rewards(mx.array([[2.0], [3.0], [5.0]]), mask)
    assert rewards.tolist() == [[0, 2, 0], [0, 0, 3], [0, 0, 0]]


def test_the_kl_is_taken_off_at_every_counted_token():
    old, ref = mx.array([[-1.0, -1.0, 50.0]]), mx.array([[-2.0, -1.5, 0.0]])
    rewards = kl_in_reward(mx.array([[10.0]]), old, ref, mx.array([[1, 1, 0]]), kl_coef=0.1)
    np.testing.assert_allclose(np.array(rewards), [[-0.1, 9.95, 0.0]], rtol=1e-6)


def test_reinforce_plus_plus_whitens_over_tokens_not_rows():
    mask = mx.array([[1, 1, 1], [1, 0, 0]])
    advantages, returns = reinforce_plus_plus(token_rewards(mx.array([[1.0], [-3.0]]), mask), mask)
    assert returns.tolist() == [[1, 1, 1], [-3, 0, 0]]
    # Mean 0, squares 3 + 9 over three: std 2.
    np.testing.assert_allclose(np.array(advantages), [[0.5, 0.5, 0.5], [-1.5, 0, 0]], rtol=1e-6)


def test_the_baseline_form_takes_the_groups_mean_off_first():
    advantages = reinforce_plus_plus_baseline([4.0, 2.0], mx.array([[1, 1, 1], [1, 0, 0]]), 2)
    # 1, 1, 1, -1: mean 1/2, squares 0.75 + 2.25 over three: std 1.
    np.testing.assert_allclose(np.array(advantages), [[0.5, 0.5, 0.5], [-1.5, 0, 0]], rtol=1e-6)
    advantages = reinforce_plus_plus_baseline([4.0, 2.0, 9.0, 9.0], mx.ones((4, 1)), 2)
    np.testing.assert_allclose(np.array(advantages), [[1.5**0.5], [-(1.5**0.5)], [0], [0]], rtol=1e-6)


def test_the_adaptive_coefficient_follows_its_target():
    controller = AdaptiveKL(1.0, target=0.1, horizon=100)
    assert controller.update(0.11, samples=10).coef == pytest.approx(1.01)
    assert controller.update(9.0, samples=10).coef == pytest.approx(1.02)
    assert controller.update(0.0, samples=10).coef == pytest.approx(0.98)
    assert controller.coef == 1.0


def test_a_number_a_rollout_becomes_a_column():
    column = as_column([1.0, 2.0])
    assert column.shape == (2, 1)
    assert column.dtype == mx.float32
