import math

import mlx.core as mx
import numpy as np
import pytest
from pydantic import ValidationError

from configs.schema import GRPOConfig, PluginPolicyConfig, PolicyConfig, PPOConfig
from mlx_ops.algorithm import AlgorithmRegistry, PolicyTrainer
from mlx_ops.grpo import GRPOTrainer
from mlx_ops.policy import make_row, microbatches, split, totals
from mlx_ops.policy_loss import ROW_GAP, full_loss, probed_entropy
from mlx_ops.ppo import PPOTrainer
from tests.mlx_ops.bench import groups, grpo_config, make_trainer, ppo_config, rollout
from tests.mlx_ops.tiny import leaves, tiny_model


def played(trainer, step):
    minibatches, metrics = trainer.collect(step)
    updates = [trainer.update(batch) for batch in minibatches]
    return metrics, updates


def batch_of(rollouts):
    rows = [make_row(each, np.ones(len(each.completion.tokens)), mask_truncated=False) for each in rollouts]
    (batch,) = microbatches(rows, totals(rows), aggregation="token_mean", max_tokens=8, token_budget=10_000)
    return batch


def test_our_algorithms_are_registered_under_their_sections_names():
    assert AlgorithmRegistry["grpo"] is GRPOTrainer
    assert AlgorithmRegistry["ppo"] is PPOTrainer
    with pytest.raises(ValueError, match="algorithm 'grpo' is taken by"):
        AlgorithmRegistry.register("grpo")(type("Other", (PPOTrainer,), {}))


def test_a_plugins_options_are_checked_by_its_own_model():
    class Mine(PolicyTrainer[PluginPolicyConfig]):
        def collect(self, step):
            return [], {}

        def loss(self, model, batch):
            return mx.array(0.0), {}

    with pytest.raises(ValidationError, match="Extra inputs"):
        make_trainer(Mine, tiny_model(), PluginPolicyConfig(algorithm="mine", options={"baselin": 0.5}), groups())


def test_the_reference_follows_after_every_so_many_steps():
    config = grpo_config(kl_coef=0.1, ref_refresh_every=2, learning_rate=0.5)
    model = tiny_model()
    trainer = make_trainer(GRPOTrainer, model, config, groups())
    start = dict(leaves(model.parameters()))
    assert trainer.reference is not None

    def same(tree):
        return all(mx.array_equal(array, dict(leaves(tree))[name]) for name, array in leaves(trainer.reference.weights))

    played(trainer, 0)
    assert all(mx.array_equal(array, start[name]) for name, array in leaves(trainer.reference.weights))
    assert not same(model.parameters())
    played(trainer, 1)
    assert same(model.parameters())
    kept = trainer.arrays()
    played(trainer, 2)
    assert not same(model.parameters())
    resumed = make_trainer(GRPOTrainer, tiny_model(), config, groups())
    resumed.restore(2, {"nonfinite_in_a_row": 0, "position": 8}, kept)
    assert all(
        mx.array_equal(array, dict(leaves(trainer.reference.weights))[name])
        for name, array in leaves(resumed.reference.weights)
    )
    assert resumed.position == 8


def test_a_reference_that_stays_takes_no_place_in_the_checkpoint():
    assert make_trainer(GRPOTrainer, tiny_model(), grpo_config(kl_coef=0.1), groups()).arrays() == {}


def test_samples_say_how_far_sampler_and_trainer_are_apart():
    drawn = [
        [rollout([5, 6, 7], 1.0, truncated=True), rollout([8, 9], 0.0)],
        [rollout([5], 1.0), rollout([6], 1.0)],
    ]
    model = tiny_model()
    rows = [make_row(r, (), mask_truncated=False) for r in drawn[0]]
    trainer = make_trainer(
        GRPOTrainer, model, grpo_config(prompts_per_step=2, group_size=2, mask_truncated=True), drawn, budget=1
    )
    # The sampler's log-probabilities are 0, so the difference is the mean of the trainer's. What was cut counts too.
    expected = [-float(np.mean(found)) for found in trainer._score(rows)]
    played(trainer, 0)
    differences = [sample["logprob_difference"] for sample in trainer.kept]
    assert differences[:2] == pytest.approx(expected, rel=1e-4)
    # A group without signal is not computed.
    assert differences[2:] == [None, None]
    assert [sample["policy_version"] for sample in trainer.kept] == [0] * 4
    # In the next step the other group is without signal.
    drawn.reverse()
    played(trainer, 1)
    assert [sample["logprob_difference"] is None for sample in trainer.kept[4:]] == [True, True, False, False]


@pytest.mark.parametrize(("cls", "config"), [(GRPOTrainer, grpo_config()), (PPOTrainer, ppo_config())])
def test_an_update_runs_in_training_mode_and_everything_else_outside_it(cls, config):
    trainer = make_trainer(cls, tiny_model(), config, groups())
    trainer.policy.eval()
    modes, loss = [], trainer.loss
    trainer.loss = lambda model, batch: (modes.append(trainer.policy.training), loss(model, batch))[1]
    minibatches, _ = trainer.collect(0)
    assert not trainer.policy.training
    for minibatch in minibatches:
        trainer.update(minibatch)
    assert modes == [True]
    assert not trainer.policy.training


def test_the_difference_is_that_of_the_policy_that_sampled_not_of_a_later_one():
    config = grpo_config(epochs=3, learning_rate=0.5)
    trainer = make_trainer(GRPOTrainer, tiny_model(), config, groups())
    rows = [make_row(r, (), mask_truncated=False) for group in groups() for r in group]
    expected = [-float(np.mean(found)) for found in trainer._score(rows)]
    played(trainer, 0)
    assert [sample["logprob_difference"] for sample in trainer.kept] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("cls", "config"),
    [(GRPOTrainer, grpo_config(minibatches=2)), (PPOTrainer, ppo_config(minibatches=2))],
    ids=["grpo", "ppo"],
)
def test_each_step_cuts_its_minibatches_anew(cls, config):
    trainer = make_trainer(cls, tiny_model(), config, groups())

    def places(step):
        return [
            sorted(place for batch in minibatch for place in batch.places.tolist())
            for minibatch in trainer.collect(step)[0]
        ]

    assert places(0) == places(0)
    assert places(0) != places(1)


def test_a_split_is_even_and_has_no_empty_part():
    order = np.random.default_rng(0)
    assert sorted(map(len, split(7, 3, order))) == [2, 2, 3]
    assert sorted(map(len, split(2, 3, order))) == [1, 1]
    assert split(0, 2, order) == []


def test_the_entropy_is_measured_at_tokens_of_completions_evenly_over_all_rows():
    batch = batch_of([rollout([5] * 8, 1.0), rollout([6], 1.0), rollout([7] * 7, 1.0)])
    # Rows in order: 0 to 7, 8, 16 to 22 of a (3, 8) array are the 16 tokens; a probe for 8 places of a (3, 32) one.
    counted = [*range(8), 8, *range(16, 23)]
    assert np.array(batch.probes).tolist() == [counted[probe * 16 // 12] for probe in range(12)]


def test_probed_entropy_is_exact_where_it_is_measured():
    batch = batch_of([rollout([0] * 8, 1.0), rollout([1] * 8, 1.0)])
    peaked, flat = mx.array([0.0, math.log(3.0)]), mx.zeros(2)
    logits = mx.stack([mx.broadcast_to(peaked, (8, 2)), mx.broadcast_to(flat, (8, 2))])
    # Probabilities 1/4 and 3/4 in the first row, 1/2 and 1/2 in the second; a probe in each.
    first = 0.25 * math.log(4) + 0.75 * math.log(4 / 3)
    assert float(probed_entropy(logits, batch, 1.0)) == pytest.approx((first + math.log(2)) / 2, rel=1e-5)
    # At temperature 1/2 the logits are doubled: 1/10 and 9/10.
    cold = 0.1 * math.log(10) + 0.9 * math.log(10 / 9)
    assert float(probed_entropy(logits, batch, 0.5)) == pytest.approx((cold + math.log(2)) / 2, rel=1e-5)


def test_the_kl_is_measured_without_a_coefficient_and_weighs_with_one():
    batch = batch_of([rollout([0], 1.0)])
    reference = mx.array([[math.log(0.25)]])
    batch = type(batch)(**{**batch.__dict__, "ref_logprobs": reference})

    def surrogate(logprobs, old, batch):
        return mx.array(0.5), {}

    # The policy gives the token 1/2, the reference 1/4: k1 is log 2, k3 is 1/2 - 1 + log 2.
    logits = mx.zeros((1, 1, 2))
    config = PolicyConfig.model_validate({"kl_coef": 2.0})
    loss, metrics = full_loss(logits, batch, config, surrogate, kl_coef=0.0)
    k3 = 0.5 - 1 + math.log(2)
    assert float(loss) == 0.5
    assert "kl_loss" not in metrics
    assert [float(metrics[name]) for name in ("kl_k1", "kl_k3", "kl")] == pytest.approx([math.log(2), k3, k3])
    loss, metrics = full_loss(logits, batch, config, surrogate, kl_coef=2.0)
    assert float(metrics["kl_loss"]) == pytest.approx(2 * k3, rel=1e-5)
    assert float(loss) == pytest.approx(0.5 + 2 * k3, rel=1e-5)
    assert float(metrics[ROW_GAP][0]) == pytest.approx(math.log(2), rel=1e-5)


@pytest.mark.parametrize(
    ("cls", "fields", "message"),
    [
        (GRPOConfig, {"ref_refresh_every": 5}, "ref_refresh_every: has no effect with kl_coef: 0"),
        (GRPOConfig, {"loss": "cispo", "clip_range": 0.1, "minibatches": 2}, "clip_range: has no effect with loss"),
        (GRPOConfig, {"loss": "cispo", "clip_range_high": 4.0}, "the ratio is exactly 1"),
        (GRPOConfig, {"loss": "sapo", "ratio_level": "sequence"}, "ratio_level: sequence needs loss: clip"),
        (GRPOConfig, {"advantage": "leave_one_out", "scale_advantages": "group"}, "goes with none or batch"),
        (GRPOConfig, {"advantage": "opo", "scale_advantages": "none"}, "scale_advantages: has no effect"),
        (GRPOConfig, {"advantage": "opo", "reward_aggregation": "normalize_then_sum"}, "has its own baseline"),
        (
            GRPOConfig,
            {"adapter": {"kind": "lora", "dropout": 0.1}},
            "adapter.dropout: the policy that samples has none",
        ),
        (PPOConfig, {"kl_target": 0.1}, "kl_target: a coefficient of 0 stays 0"),
        (PPOConfig, {"max_approx_kl": 0.1, "epochs": 1}, "max_approx_kl: has no effect with epochs: 1"),
        (PPOConfig, {"steps": 5, "critic": {"warmup_steps": 5}}, "critic.warmup_steps: 5 of 5 steps"),
        (PPOConfig, {"minibatches": 20}, "minibatches: 20 of 16 completions"),
        (PPOConfig, {"critic": {"kind": "separate", "coef": 0.5}}, "coef: has no effect with kind: separate"),
        (PPOConfig, {"epochs": 1, "minibatches": 1, "clip_range": 0.1}, "the ratio is exactly 1"),
        (PluginPolicyConfig, {"algorithm": "ppo"}, "'ppo' has a section of its own"),
    ],
)
def test_settings_without_effect_are_refused_with_the_way_out(cls, fields, message):
    with pytest.raises(ValidationError, match=message):
        cls.model_validate(fields)


def test_leave_one_out_scales_over_the_batch_or_not_at_all():
    drawn = [[rollout([5], 3.0), rollout([6], 1.0)], [rollout([7], 5.0), rollout([8], 1.0)]]

    def advantages(**changes):
        config = grpo_config(prompts_per_step=2, group_size=2, advantage="leave_one_out", **changes)
        ((batch,),) = make_trainer(GRPOTrainer, tiny_model(), config, drawn).collect(0)[0]
        return sorted(np.array(batch.advantages).ravel().tolist())

    assert advantages() == [-4.0, -2.0, 2.0, 4.0]
    # The unbiased variance of these is 40 / 3.
    assert advantages(scale_advantages="batch") == pytest.approx(
        [x / math.sqrt(40 / 3) for x in (-4, -2, 2, 4)], rel=1e-3
    )


def test_a_group_of_equal_totals_still_counts_where_its_advantages_differ():
    """With each reward normalised by itself, a total that is constant can hide two that are not."""

    def judged(tokens, first, second):
        made = rollout(tokens, first + second)
        return type(made)(**{**made.__dict__, "score": type(made.score)(first + second, {"a": first, "b": second})})

    # In group 0 reward a varies by 1 as b varies by -1; in group 1 alone the total varies.
    drawn = [
        [judged([5], 1.0, 0.0), judged([6], 0.0, 1.0), judged([9], 0.0, 1.0)],
        [judged([7], 1.0, 3.0), judged([8], 0.0, 1.0), judged([9], 0.0, 0.0)],
    ]
    config = grpo_config(prompts_per_step=2, group_size=3, reward_aggregation="normalize_then_sum")
    trainer = make_trainer(GRPOTrainer, tiny_model(), config, drawn)
    trainer.weights = {"a": 2.0, "b": 1.0}
    ((batch,),) = trainer.collect(0)[0]
    assert sorted(batch.places.tolist()) == [0, 1, 2, 3, 4, 5]
