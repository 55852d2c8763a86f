from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.optimizers import SGD, AdamW

from configs.schema import LoraAdapter
from mlx_ops.grpo import GRPOTrainer, whitened_over_tokens
from mlx_ops.model import add_adapter
from mlx_ops.policy import Reference, make_row, score_rows, totals
from mlx_ops.policy_loss import correction
from rewards.composer import Score
from tests.mlx_ops.bench import groups, grpo_config, rollout
from tests.mlx_ops.tiny import leaves, tiny_model


def trainer(model, config, drawn, *, budget=10_000, optimizer=None, seed=0):
    made = GRPOTrainer(
        model,
        optimizer or SGD(learning_rate=config.learning_rate),
        config,
        draw=lambda position, prompts: (drawn[position : position + prompts], {"seconds/generate": 0.0}),
        weights={"task": 1.0},
        token_budget=budget,
        seed=seed,
        keep=lambda rows: None,
    )
    # What a GPU compiles it pads; tests count without.
    made.compiled = False
    return made


def step(grpo):
    """One step; the metrics of its updates."""
    minibatches, metrics = grpo.collect(0)
    return metrics, [grpo.update(batch) for batch in minibatches]


def weights(model):
    return np.concatenate([np.array(array).reshape(-1) for _, array in leaves(model.parameters())])


def logprob_sums(model, rollouts):
    rows = [make_row(r, np.zeros(len(r.completion.tokens)), mask_truncated=False) for r in rollouts]
    return np.array([scored.sum() for scored in score_rows(model, rows, temperature=1.0, token_budget=10_000)])


def test_one_step_makes_better_completions_likelier_and_worse_ones_less_likely():
    model = tiny_model(sharpness=1.0)
    first, second = (1, 2, 3), (30, 31)
    drawn = [
        [rollout([5, 6, 7], 1.0, prompt=first), rollout([8, 9, 10], 0.0, prompt=first)],
        [rollout([11, 12], 0.0, prompt=second), rollout([13, 14], 1.0, prompt=second)],
    ]
    flat = [r for group in drawn for r in group]
    before = logprob_sums(model, flat)
    step(trainer(model, grpo_config(prompts_per_step=2, group_size=2, learning_rate=0.01), drawn))
    change = logprob_sums(model, flat) - before
    assert change[0] > 0 > change[1]
    assert change[3] > 0 > change[2]


def test_groups_of_equal_rewards_change_no_weight_and_make_no_update():
    model = tiny_model(sharpness=1.0)
    drawn = [[rollout([5, 6, 7], 0.7), rollout([8, 9], 0.7)], [rollout([5], 0.1), rollout([6, 2], 0.1)]]
    before = weights(model)
    metrics, updates = step(
        trainer(model, grpo_config(prompts_per_step=2, group_size=2), drawn, optimizer=AdamW(learning_rate=0.1))
    )
    assert updates == []
    assert metrics["groups_without_signal"] == 1.0
    assert np.array_equal(weights(model), before)


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "dr_grpo"])
@pytest.mark.parametrize("budget", [1, 150, 10_000], ids=["a row each", "some", "all at once"])
def test_microbatches_change_no_gradient(aggregation, budget):
    config = grpo_config(aggregation=aggregation, learning_rate=1.0, optimizer={"max_grad_norm": 1e6})
    whole, parts = tiny_model(sharpness=1.0), tiny_model(sharpness=1.0)
    step(trainer(whole, config, groups()))
    _, (cut,) = step(trainer(parts, config, groups(), budget=budget))
    moved = weights(whole) - weights(tiny_model(sharpness=1.0))
    assert np.abs(moved).max() > 0.01
    np.testing.assert_allclose(
        weights(parts) - weights(tiny_model(sharpness=1.0)), moved, rtol=1e-4, atol=1e-5 * np.abs(moved).max()
    )
    assert cut["tokens"] == sum(len(r.completion.tokens) for group in groups() for r in group)


def test_dead_groups_count_in_the_denominator_but_cost_no_computation():
    live = [[rollout([5, 6, 7], 1.0), rollout([8, 9, 10], 0.0)]]
    dead = [[rollout([3, 4, 5], 1.0), rollout([6, 7, 8], 1.0)]]
    alone = trainer(tiny_model(sharpness=1.0), grpo_config(prompts_per_step=2, group_size=2), live + dead)
    rows = [make_row(r, [0.0] * 3, mask_truncated=False) for group in live + dead for r in group]
    assert totals(rows).tokens == 12
    (minibatch,), _ = alone.collect(0)
    assert sum(len(batch.weights) for batch in minibatch) == 2
    assert float(sum(batch.weights.sum() for batch in minibatch)) == pytest.approx(6 / 12)


def test_several_epochs_move_the_ratio_and_the_clip_acts():
    config = grpo_config(epochs=4, clip_range=0.02, learning_rate=0.5, optimizer={"max_grad_norm": 10.0})
    _, updates = step(trainer(tiny_model(sharpness=1.0), config, groups()))
    assert len(updates) == 4
    assert updates[0]["clip_fraction"] == 0.0
    assert updates[0]["ratio_max"] == pytest.approx(1.0, abs=1e-4)
    assert updates[-1]["clip_fraction"] > 0
    assert updates[-1]["ratio_max"] > 1.02


def test_minibatches_hold_whole_groups_and_together_all_of_them():
    minibatches, _ = trainer(tiny_model(sharpness=1.0), grpo_config(minibatches=2, clip_range=0.2), groups()).collect(0)
    sizes = [sum(len(batch.weights) for batch in parts) for parts in minibatches]
    assert sizes == [8, 8]


def test_truncated_completions_are_left_out_of_the_loss_but_stay_in_the_groups_statistics():
    drawn = [
        [rollout([5, 6, 7], 1.0), rollout([8, 9, 10], 0.0, truncated=True), rollout([4, 4], 0.0)],
        [rollout([5, 6], 1.0), rollout([8, 9], 0.0), rollout([3, 3, 3], 0.5)],
    ]
    config = grpo_config(prompts_per_step=2, group_size=3, mask_truncated=True)
    (minibatch,), metrics = trainer(tiny_model(sharpness=1.0), config, drawn).collect(0)
    (batch,) = minibatch
    counted = np.array(batch.completion_mask).sum(axis=1)
    lengths = np.array(batch.rows.completion_mask).sum(axis=1)
    cut = [place for place, count in enumerate(counted) if count == 0]
    assert [lengths[place] for place in cut] == [3]
    # Rewards 1, 0, 0: mean 1/3, unbiased std 0.577.
    assert float(batch.advantages[0, 0]) == pytest.approx((2 / 3) / (0.57735 + 1e-4), rel=1e-4)
    assert metrics["truncated"] == pytest.approx(1 / 6)


def test_dynamic_sampling_replaces_groups_without_signal_up_to_the_cap():
    dead = [rollout([5], 1.0), rollout([6], 1.0)]
    alive = [rollout([7], 1.0), rollout([8], 0.0)]
    config = grpo_config(prompts_per_step=2, group_size=2, dynamic_sampling=2)
    grpo = trainer(tiny_model(sharpness=1.0), config, [dead, alive, dead, alive, alive])
    _, metrics = grpo.collect(0)
    assert metrics["groups_replaced"] == 1
    assert metrics["sampling_rounds"] == 3
    # Two groups of two, then one at a time: the dead ones were drawn too.
    assert metrics["tokens_generated"] == 8
    assert metrics["groups_without_signal"] == 0
    assert grpo.state()["position"] == 4


@pytest.mark.parametrize("kl_coef", [0.0, 0.1])
def test_dynamic_sampling_judges_by_the_task_reward_and_learns_nothing_from_a_shaped_one_alone(kl_coef):
    shaped = [rollout([5], 0.0), rollout([6], 0.0)]
    shaped[0] = replace(shaped[0], score=Score(0.3, {"task": 0.0}))
    config = grpo_config(prompts_per_step=2, group_size=2, dynamic_sampling=1, kl_coef=kl_coef)
    grpo = trainer(tiny_model(sharpness=1.0), config, [shaped] * 4)
    minibatches, metrics = grpo.collect(0)
    batches = [batch for minibatch in minibatches for batch in minibatch]
    assert metrics["groups_without_signal"] == 1
    assert bool(batches) == (kl_coef > 0)
    assert all(not np.array(batch.advantages).any() for batch in batches)


def test_a_lora_reference_is_the_base_model_exactly():
    base, model = tiny_model(sharpness=1.0), tiny_model(sharpness=1.0)
    add_adapter(model, LoraAdapter(rank=4), seed=0)
    reference = Reference(model)
    rows = [make_row(r, np.zeros(len(r.completion.tokens)), mask_truncated=False) for g in groups() for r in g]
    moved = {name: mx.random.normal(array.shape) for name, array in leaves(model.trainable_parameters())}
    model.load_weights(list(moved.items()), strict=False)
    with reference.in_place_of(model):
        referred = score_rows(model, rows, temperature=1.0, token_budget=10_000)
    for got, expected in zip(referred, score_rows(base, rows, temperature=1.0, token_budget=10_000), strict=True):
        assert np.array_equal(got, expected)
    after = dict(leaves(model.trainable_parameters()))
    assert all(mx.array_equal(after[name], array) for name, array in moved.items())


def test_the_kl_term_pulls_back_to_the_reference():
    model = tiny_model(sharpness=1.0)
    drawn = [[rollout([5, 6, 7], 0.5), rollout([8, 9, 10], 0.5)]] * 2
    config = grpo_config(prompts_per_step=2, group_size=2, kl_coef=1.0, learning_rate=0.005)
    grpo = trainer(model, config, drawn)
    nudged = nn.Module.parameters(tiny_model(sharpness=1.1))
    model.update(nudged)
    kls = []
    for _ in range(3):
        grpo.position = 0
        _, (update,) = step(grpo)
        kls.append(update["kl"])
    assert kls[0] > kls[1] > kls[2] > 0


def test_equal_seeds_give_equal_runs():
    config = grpo_config(epochs=2, minibatches=2, clip_range=0.2)
    ends = []
    for _ in range(2):
        model = tiny_model(sharpness=1.0)
        step(trainer(model, config, groups(), seed=3))
        ends.append(weights(model))
    assert np.array_equal(*ends)


def test_a_step_that_is_not_finite_changes_nothing_and_several_stop_the_run():
    model = tiny_model(sharpness=1.0)
    before = weights(model)
    broken = [[rollout([5], 1.0, logprobs=[0.0]), rollout([6], 0.0)], [rollout([7], 1.0), rollout([8], 0.0)]]
    grpo = trainer(model, grpo_config(prompts_per_step=2, group_size=2, max_nonfinite_steps=2), broken)
    grpo.loss = lambda model, batch: (mx.array(float("nan")) * model.model.norm.weight.sum(), {})  # type: ignore[method-assign]
    (minibatch,), _ = grpo.collect(0)
    assert grpo.update(minibatch)["skipped_updates"] == 1.0
    assert np.array_equal(weights(model), before)
    with pytest.raises(FloatingPointError, match="2 updates in a row"):
        grpo.update(minibatch)


@pytest.mark.parametrize("baseline", [False, True])
def test_reinforce_plus_plus_whitens_over_the_tokens_of_scored_completions_alone(baseline):
    lengths = [2, 1, 3, 1]
    found = whitened_over_tokens(np.array([1.0, 0.0, np.nan, 3.0]), lengths, 2, baseline=baseline)
    tokens = np.array([*found[0, :2], found[1, 0], found[3, 0]])
    assert found[2].tolist() == [0.0, 0.0, 0.0]
    assert tokens.mean() == pytest.approx(0.0, abs=1e-6)
    assert tokens.std(ddof=1) == pytest.approx(1.0, rel=1e-5)
    # Without a baseline 3 is the best; less its group's mean it is as good as its group.
    assert np.argmax(tokens) == (0 if baseline else 3)


def test_reinforce_plus_plus_makes_nothing_of_equal_rewards():
    assert not whitened_over_tokens(np.full(4, 0.7), [1, 2, 3, 4], 2, baseline=False).any()


def test_bad_completions_that_the_policy_has_left_are_left_out():
    """Each row's sampler log-probabilities say how far the policy is from it; only A < 0 and far is dropped."""
    model = tiny_model(sharpness=1.0)
    near = logprob_sums(model, [rollout([5], 0.0), rollout([6], 0.0)])
    drawn = [[rollout([5], 1.0, logprobs=[near[0] + 2]), rollout([6], 0.0, logprobs=[near[1] + far])] for far in (0, 2)]
    changes = {"prompts_per_step": 2, "group_size": 2, "off_policy_threshold": 0.5}
    grpo = trainer(model, grpo_config(**changes), drawn)
    (minibatch,), _ = grpo.collect(0)
    (batch,) = minibatch
    policy = mx.array([[float(near[place % 2])] for place in np.array(batch.places)])
    kept = correction(policy, policy, batch, grpo.config)
    assert kept is not None
    assert dict(zip(np.array(batch.places).tolist(), np.array(kept).ravel(), strict=True)) == {0: 1, 1: 1, 2: 1, 3: 0}
