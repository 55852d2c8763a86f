import math

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.optimizers import SGD, AdamW
from mlx.utils import tree_flatten

from configs.schema import CheckpointConfig, LoraAdapter
from mlx_ops.checkpoint import CheckpointStore, load, restore_optimizer, trainer_arrays
from mlx_ops.forward import score
from mlx_ops.model import add_adapter, load_adapter, write_adapter
from mlx_ops.policy import Row, as_token_rows, make_row, totals
from mlx_ops.ppo import PPOTrainer, whitened, with_targets
from tests.mlx_ops.bench import groups, make_trainer, ppo_config, rollout
from tests.mlx_ops.tiny import tiny_model


def trainer(model, config, drawn, **more):
    return make_trainer(PPOTrainer, model, config, drawn, **more)


def step(ppo, number=0):
    """One step; the metrics of the rollout and of its updates."""
    minibatches, metrics = ppo.collect(number)
    return metrics, [ppo.update(batch) for batch in minibatches]


def flat(module):
    return np.concatenate([np.array(array).reshape(-1) for _, array in tree_flatten(module.parameters())])


def row(tokens, values, *, old=None, ref=None, counts=True) -> Row:
    return Row((1,), tuple(tokens), [0.0] * len(tokens), (), counts, old, ref, values)


# ---- targets -------------------------------------------------------------------------------------------------------


def test_advantages_and_returns_by_hand():
    config = ppo_config(gamma=0.9, gae_lambda=0.5, whiten_advantages=False)
    (made,), metrics = with_targets([row([5, 6, 7], [0.1, 0.2, 0.3])], [1.0], config, kl_coef=0.0)
    # Errors from the end: 1 - 0.3; 0.9 * 0.3 - 0.2; 0.9 * 0.2 - 0.1. Each advantage adds 0.45 of the next.
    third, second, first = 0.7, 0.07 + 0.45 * 0.7, 0.08 + 0.45 * (0.07 + 0.45 * 0.7)
    assert made.advantages == pytest.approx([first, second, third], rel=1e-5)
    assert made.returns == pytest.approx([first + 0.1, second + 0.2, 1.0], rel=1e-5)
    assert metrics["return_max"] == pytest.approx(1.0)
    assert metrics["value_mean"] == pytest.approx(0.2)


def test_with_lambda_one_the_advantage_is_what_is_still_earned_less_the_value():
    config = ppo_config(gae_lambda=1.0, whiten_advantages=False, kl_coef=0.5)
    rows = [
        row([5, 6, 7], [0.1, 0.2, 0.3], old=[-1.0, -2.0, -3.0], ref=[-1.5, -1.0, -3.0]),
        row([5], [-0.4], old=[-1.0], ref=[-1.2]),
    ]
    made, metrics = with_targets(rows, [2.0, -1.0], config, kl_coef=0.5)
    # KL by k1: 0.5, -1, 0 and 0.2. To go from each token: 2 - 0.5 * the KL from there on.
    assert made[0].returns == pytest.approx([2 + 0.25, 2 + 0.5, 2.0])
    assert made[0].advantages == pytest.approx([2.25 - 0.1, 2.5 - 0.2, 2.0 - 0.3])
    assert made[1].returns == pytest.approx([-1.1])
    # The mean over completions of each one's mean.
    assert metrics["rollout_kl"] == pytest.approx((-0.5 / 3 + 0.2) / 2, rel=1e-5)


@pytest.mark.parametrize(("estimator", "kl"), [("k1", 0.5), ("k2", 0.125), ("k3", math.exp(-0.5) + 0.5 - 1)])
def test_the_kl_in_the_reward_is_the_configured_estimate(estimator, kl):
    config = ppo_config(gae_lambda=1.0, whiten_advantages=False, kl_coef=2.0, kl_estimator=estimator)
    (made,), _ = with_targets([row([5], [0.0], old=[-1.0], ref=[-1.5])], [1.0], config, kl_coef=2.0)
    assert made.returns == pytest.approx([1 - 2 * kl], rel=1e-5)


def test_kl_in_the_loss_leaves_the_rewards_alone():
    config = ppo_config(gae_lambda=1.0, whiten_advantages=False, kl_coef=2.0, kl_in="loss")
    (made,), _ = with_targets([row([5], [0.0], old=[-1.0], ref=[-1.5])], [1.0], config, kl_coef=2.0)
    assert made.returns == pytest.approx([1.0])


def test_advantages_are_whitened_over_the_tokens_that_count_and_returns_are_not():
    rows = [row([5, 6], [0.0, 0.0]), row([7], [0.0]), row([8, 9], [0.0, 0.0], counts=False)]
    made, metrics = with_targets(rows, [1.0, 4.0, 100.0], ppo_config(gae_lambda=1.0), kl_coef=0.0)
    # 1, 1, 4: mean 2, unbiased variance 3.
    assert made[0].advantages == pytest.approx([-1 / math.sqrt(3)] * 2, rel=1e-4)
    assert made[1].advantages == pytest.approx([2 / math.sqrt(3)], rel=1e-4)
    assert made[1].returns == pytest.approx([4.0])
    assert (metrics["return_mean"], metrics["return_max"]) == (2.0, 4.0)


def test_equal_advantages_whiten_to_exactly_zero():
    mask = mx.ones((1, 3))
    assert np.array_equal(np.array(whitened(mx.array([[0.7, 0.7 + 6e-8, 0.7]]), mask)), np.zeros((1, 3)))


def test_a_completion_that_was_cut_earns_its_score_at_its_last_token():
    drawn = [[rollout([5, 6, 7], 1.0, truncated=True)], [rollout([5, 6], 0.0)]]
    config = ppo_config(prompts_per_step=2, completions_per_prompt=1, gae_lambda=0.0, whiten_advantages=False)
    minibatches, _ = trainer(tiny_model(), config, drawn).collect(0)
    ((batch,),) = minibatches
    # Values are 0 and lambda is 0: only the token where the score stands has an advantage.
    assert np.array(batch.advantages)[np.array(batch.rows.completion_mask).sum(axis=1) == 3].tolist() == [
        [0.0, 0.0, 1.0]
    ]


# ---- one update ----------------------------------------------------------------------------------------------------


def reinforce_gradient(model, rollouts, advantages):
    """That of -sum(advantage * log-probability) / tokens, without any of the trainer's code."""
    rows = [make_row(r, np.zeros(len(r.completion.tokens)), mask_truncated=False) for r in rollouts]
    tokens = as_token_rows(rows)

    def loss(model):
        logprobs, _ = score(model, tokens)
        weighed = logprobs * mx.array(advantages)[:, None] * tokens.completion_mask
        return -weighed.sum() / tokens.completion_mask.sum()

    return dict(tree_flatten(nn.value_and_grad(model, loss)(model)[1]))


@pytest.mark.parametrize("kind", ["head", "separate"])
def test_with_values_of_zero_the_first_update_is_reinforce_on_the_scores(kind):
    model, drawn = tiny_model(), groups()
    config = ppo_config(
        critic={"kind": kind},
        gae_lambda=1.0,
        whiten_advantages=False,
        learning_rate=1.0,
        optimizer={"max_grad_norm": 1e6},
    )
    before = dict(tree_flatten(model.parameters()))
    rollouts = [r for group in drawn for r in group]
    expected = reinforce_gradient(tiny_model(), rollouts, [r.score.total for r in rollouts])
    step(trainer(model, config, drawn))
    for name, array in tree_flatten(model.parameters()):
        np.testing.assert_allclose(
            np.array(before[name] - array), np.array(expected[name]), rtol=1e-3, atol=1e-5, err_msg=name
        )


@pytest.mark.parametrize("kind", ["head", "separate"])
@pytest.mark.parametrize("budget", [1, 150], ids=["a row each", "some"])
def test_microbatches_change_no_gradient(kind, budget):
    config = ppo_config(critic={"kind": kind}, learning_rate=0.5, optimizer={"max_grad_norm": 1e6})
    ends = []
    for tokens in (10_000, budget):
        ppo = trainer(tiny_model(), config, groups(), budget=tokens, critic_optimizer=SGD(learning_rate=0.5))
        step(ppo)
        _, (update,) = step(ppo, 1)
        ends.append((flat(ppo.model), update))
    moved = ends[0][0] - ends[1][0]
    assert np.abs(moved).max() < 2e-5
    for name in ("loss", "value_loss", "policy_loss", "tokens", "grad_norm", "critic_grad_norm"):
        assert ends[1][1][name] == pytest.approx(ends[0][1][name], rel=1e-3, abs=1e-6), name


@pytest.mark.parametrize("kl_in", ["loss", "reward"])
def test_the_parts_add_up_to_the_loss(kl_in):
    config = ppo_config(kl_coef=0.5, kl_in=kl_in, entropy_coef=0.1, learning_rate=0.3, critic={"coef": 0.25})
    ppo = trainer(tiny_model(), config, groups(), budget=150)
    step(ppo)
    _, (update,) = step(ppo, 1)
    assert update["kl"] != 0
    assert ("kl_loss" in update) == (kl_in == "loss")
    parts = update["policy_loss"] + update.get("kl_loss", 0.0) + update["entropy_loss"] + 0.25 * update["value_loss"]
    assert update["loss"] == pytest.approx(parts, rel=1e-5)
    assert update["entropy_loss"] == pytest.approx(-0.1 * update["entropy"], rel=1e-4)


def test_policy_and_critic_are_clipped_apart():
    config = ppo_config(
        learning_rate=1.0, optimizer={"max_grad_norm": 0.01}, critic={"optimizer": {"max_grad_norm": 0.02}}
    )
    model, drawn = tiny_model(), groups()
    ppo = trainer(model, config, drawn, critic_optimizer=SGD(learning_rate=1.0))
    before = flat(model)
    _, (update,) = step(ppo)
    assert update["grad_norm"] > 0.01
    assert update["critic_grad_norm"] > 0.02
    assert np.linalg.norm(flat(model) - before) == pytest.approx(0.01, rel=0.01)
    assert np.linalg.norm(flat(ppo.actor_critic.critic)) == pytest.approx(0.02, rel=0.01)


@pytest.mark.parametrize("kind", ["head", "separate"])
def test_while_the_critic_warms_up_the_policy_stays_bit_for_bit(kind):
    model = tiny_model()
    config = ppo_config(
        critic={"kind": kind, "warmup_steps": 2}, epochs=2, minibatches=2, optimizer={"weight_decay": 0.1}
    )
    ppo = trainer(model, config, groups(), optimizer=AdamW(learning_rate=0.1, weight_decay=0.1))
    before = flat(model)
    for number in range(2):
        _, updates = step(ppo, number)
        assert updates[-1]["grad_norm"] == 0
        assert updates[-1]["critic_grad_norm"] > 0
        assert np.array_equal(flat(model), before)
    assert int(ppo.optimizer.state["step"]) == 0
    assert np.abs(flat(ppo.actor_critic.critic)).max() > 0
    step(ppo, 2)
    assert not np.array_equal(flat(model), before)
    assert int(ppo.optimizer.state["step"]) == 4


def test_the_policys_schedule_stands_on_the_steps_that_train_it():
    config = ppo_config(steps=10, epochs=3, minibatches=2, critic={"warmup_steps": 4})
    assert config.policy_updates == 6 * 6


# ---- one step ------------------------------------------------------------------------------------------------------


def test_a_completion_without_a_score_is_left_out():
    drawn = [[rollout([5, 6, 7], None), rollout([8, 9], 1.0)], [rollout([5], 0.0), rollout([6], None)]]
    ppo = trainer(tiny_model(), ppo_config(prompts_per_step=2, completions_per_prompt=2), drawn)
    metrics, (update,) = step(ppo)
    assert update["tokens"] == 3
    assert metrics["reward"] == 0.5
    assert [sample["logprob_difference"] is None for sample in ppo.kept] == [True, False, False, True]
    assert [sample["advantage"] == 0 for sample in ppo.kept] == [True, False, False, True]
    metrics, updates = step(trainer(tiny_model(), ppo_config(completions_per_prompt=1), [[rollout([5], None)]] * 4))
    assert updates == []
    assert metrics["unscored/task"] == 1.0


def test_minibatches_hold_all_rows_once_an_epoch():
    ppo = trainer(tiny_model(), ppo_config(epochs=2, minibatches=3), groups())
    seen = [[place for batch in minibatch for place in batch.places.tolist()] for minibatch in ppo.collect(0)[0]]
    assert sorted(map(len, seen)) == [5, 5, 5, 5, 6, 6]
    assert sorted(place for part in seen[:3] for place in part) == list(range(16))
    assert sorted(place for part in seen[3:] for place in part) == list(range(16))
    assert seen[0] != seen[3]


def test_later_epochs_move_the_ratio_and_clip_policy_and_values():
    config = ppo_config(
        epochs=4,
        clip_range=0.02,
        learning_rate=0.5,
        optimizer={"max_grad_norm": 10.0},
        critic={"value_clip_range": 0.01},
    )
    _, updates = step(trainer(tiny_model(), config, groups(), critic_optimizer=SGD(learning_rate=0.5)))
    assert updates[0]["ratio_max"] == pytest.approx(1.0, abs=1e-4)
    assert updates[0]["clip_fraction"] == updates[0]["value_clip_fraction"] == 0
    assert updates[-1]["clip_fraction"] > 0
    assert updates[-1]["value_clip_fraction"] > 0


def test_the_remaining_epochs_are_left_out_once_the_policy_has_moved_too_far():
    still = ppo_config(epochs=5, minibatches=2, learning_rate=1e-6, max_approx_kl=0.01)
    metrics, updates = step(trainer(tiny_model(), still, groups()))
    assert (metrics["epochs"], len(updates)) == (5.0, 10)
    hasty = ppo_config(epochs=5, minibatches=2, learning_rate=3.0, max_approx_kl=0.01)
    metrics, updates = step(trainer(tiny_model(), hasty, groups()))
    assert (metrics["epochs"], len(updates)) == (1.0, 2)
    assert updates[-1]["approx_kl_k3"] > 0.01


def test_the_kl_coefficient_follows_its_target_for_the_next_rollout():
    config = ppo_config(kl_coef=0.2, kl_target=0.5, kl_horizon=100, learning_rate=1e-6)
    ppo = trainer(tiny_model(), config, groups())
    metrics, _ = step(ppo)
    # On policy the KL is 0, far below its target: the error is held at -20 %, times 16 completions of 100.
    assert metrics["kl_coef"] == 0.2
    assert ppo.state()["kl_coef"] == pytest.approx(0.2 * (1 - 0.2 * 16 / 100))
    assert step(ppo, 1)[0]["kl_coef"] == ppo.state()["kl_coef"] / (1 - 0.2 * 16 / 100)


def test_one_update_a_rollout_needs_no_old_logprobs_and_a_kl_does():
    one = next(iter(trainer(tiny_model(), ppo_config(), groups()).collect(0)[0]))
    assert all(batch.old_logprobs is None and batch.old_values is not None for batch in one)
    kl = next(iter(trainer(tiny_model(), ppo_config(kl_coef=0.1), groups()).collect(0)[0]))
    assert all(batch.old_logprobs is not None and batch.ref_logprobs is not None for batch in kl)


@pytest.mark.parametrize("kind", ["head", "separate"])
def test_the_critic_learns_to_explain_the_returns(kind):
    """The score says whether the first token is 5: known from the second token on."""
    rng = np.random.default_rng(0)
    drawn = [
        [rollout([5 + place % 2, *rng.integers(20, 40, 5)], float(place % 2), prompt=[1, 2])] for place in range(16)
    ]
    config = ppo_config(
        prompts_per_step=16,
        completions_per_prompt=1,
        learning_rate=1e-6,
        gae_lambda=1.0,
        epochs=2,
        critic={"kind": kind, "learning_rate": 1e-2, "value_clip_range": None},
    )
    ppo = trainer(tiny_model(), config, drawn, optimizer=AdamW(learning_rate=1e-6))
    explained = [step(ppo, number)[0]["explained_variance"] for number in range(20)]
    assert explained[0] == pytest.approx(0.0, abs=1e-3)
    # Of six tokens' returns the first can't be explained: at best 5 / 6.
    assert 0.5 < explained[-1] < 0.9


def test_better_completions_become_likelier():
    model = tiny_model()
    drawn = [[rollout([5, 6, 7], 1.0)], [rollout([8, 9, 10], 0.0)], [rollout([11, 12], 0.0)], [rollout([13], 1.0)]]
    rows = as_token_rows([make_row(group[0], (), mask_truncated=False) for group in drawn])

    def sums():
        return np.array((score(model, rows)[0] * rows.completion_mask).sum(axis=1))

    before = sums()
    step(trainer(model, ppo_config(completions_per_prompt=1, learning_rate=0.05), drawn))
    assert ((sums() - before) > 0).tolist() == [True, False, False, True]


def test_equal_seeds_give_equal_runs_and_others_do_not():
    config = ppo_config(epochs=2, minibatches=2, learning_rate=0.05)
    ends = []
    for seed in (3, 3, 4):
        ppo = trainer(tiny_model(), config, groups(), seed=seed)
        step(ppo)
        ends.append(flat(ppo.model))
    assert np.array_equal(ends[0], ends[1])
    assert not np.array_equal(ends[0], ends[2])


# ---- resuming ------------------------------------------------------------------------------------------------------


def lora_model():
    model = tiny_model()
    add_adapter(model, LoraAdapter(rank=4), seed=0)
    return model


@pytest.mark.parametrize("kind", ["head", "separate"])
@pytest.mark.parametrize("warmup", [0, 2], ids=["", "while the critic warms up"])
def test_a_resumed_run_is_bit_equal_to_one_that_never_stopped(tmp_path, kind, warmup):
    config = ppo_config(
        steps=4,
        kl_coef=0.1,
        kl_target=0.01,
        kl_horizon=50,
        ref_refresh_every=1,
        minibatches=2,
        critic={"kind": kind, "warmup_steps": warmup, "learning_rate": 1e-3},
    )
    store = CheckpointStore(tmp_path, CheckpointConfig(keep_last=10))

    def make(model):
        return trainer(model, config, groups(prompts=8), optimizer=AdamW(learning_rate=1e-2))

    def save(ppo, number):
        store.save(
            number,
            write_weights=lambda folder: write_adapter(ppo.policy, LoraAdapter(rank=4), folder / "adapter"),
            weight_bytes=4,
            optimizer=ppo.optimizer,
            state={"trainer": ppo.committed},
            metrics={},
            arrays=ppo.arrays(),
        )

    whole = make(lora_model())
    whole.fit(4, report=lambda *_: None, save=lambda number, metrics: save(whole, number))
    rest = make(lora_model())
    load_adapter(rest.policy, store.path(2) / "adapter")
    restore_optimizer(rest.optimizer, store.path(2))
    rest.restore(2, load(store.path(2)).state["trainer"], trainer_arrays(store.path(2)))
    rest.fit(4, report=lambda *_: None, save=lambda *_: None)
    assert rest.kl.coef == whole.kl.coef != 0.1
    assert np.array_equal(flat(rest.model), flat(whole.model))
    for name, array in whole.arrays().items():
        assert mx.array_equal(rest.arrays()[name], array), name


def test_the_checkpoints_arrays_hold_the_critic_and_its_optimizer_and_not_the_policy():
    ppo = trainer(tiny_model(), ppo_config(), groups())
    step(ppo)
    assert {name.split(".")[0] for name in ppo.arrays()} == {"critic", "critic_optimizer"}
    assert {"critic.weight", "critic.bias", "critic_optimizer.weight.m"} <= set(ppo.arrays())


def test_denominators_are_those_of_the_minibatch():
    ppo = trainer(tiny_model(), ppo_config(minibatches=2), groups())
    for minibatch in ppo.collect(0)[0]:
        assert float(sum(batch.weights.sum() for batch in minibatch)) == pytest.approx(1.0)
    assert totals([row([1, 2], [0.0, 0.0]), row([3], [0.0], counts=False)]).tokens == 2
