from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.optimizers import SGD
from mlx.utils import tree_flatten

from configs.schema import LoraAdapter
from mlx_ops.batching import token_rows
from mlx_ops.critic import ActorCritic, SharedTrunk, TwoTrunks, actor_critic
from mlx_ops.forward import completion_logits
from mlx_ops.model import add_adapter
from tests.mlx_ops.tiny import tiny_model

ROWS = token_rows([[1, 2, 3, 4, 5], [6, 7]], [[8, 9, 10], [11, 12, 13, 14], [15]], [0, 1, 1])


def names(tree: Any):
    return {name for name, _ in tree_flatten(tree)}


@pytest.mark.parametrize("kind", ["head", "separate"])
def test_the_first_values_are_exactly_zero(kind):
    values = actor_critic(tiny_model(), kind).estimate(ROWS)
    assert values.dtype == mx.float32
    assert np.array_equal(np.array(values), np.zeros((3, 4)))


def with_random_head(made: Any) -> tuple[mx.array, float]:
    head = made.critic if isinstance(made, SharedTrunk) else made.critic.head
    head.weight, head.bias = mx.random.normal((32,), key=mx.random.key(1)), mx.array([0.5])
    return head.weight, 0.5


@pytest.mark.parametrize("kind", ["head", "separate"])
def test_a_value_is_of_the_state_before_its_token(kind):
    model: Any = tiny_model()
    made = actor_critic(model, kind)
    weight, bias = with_random_head(made)
    logits, values = made.logits_and_values(ROWS)
    for row, (prompt, completion) in enumerate([([1, 2, 3, 4, 5], [8, 9, 10]), ([6, 7], [11, 12, 13, 14])]):
        hidden = model.model(mx.array([[*prompt, *completion]]))[0]
        expected = np.array(hidden @ weight + bias)[len(prompt) - 1 : -1]
        np.testing.assert_allclose(np.array(values)[row, : len(completion)], expected, rtol=1e-4, atol=1e-4)
        # The last token's value doesn't know that token: its state is the one that predicts it.
        direct = model(mx.array([[*prompt, *completion]]))[0, len(prompt) - 1 : -1]
        np.testing.assert_allclose(np.array(logits)[row, : len(completion)], np.array(direct), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(np.array(made.estimate(ROWS)), np.array(values), rtol=1e-5, atol=1e-5)


def value_gradient(made: ActorCritic, *, trains_policy: bool):
    def loss(model: ActorCritic):
        return model.logits_and_values(ROWS, trains_policy=trains_policy)[1].square().sum()

    return nn.value_and_grad(made, loss)(made)[1]


def largest(tree: Any) -> float:
    return max(float(np.abs(np.array(array)).max()) for _, array in tree_flatten(tree))


def test_the_value_loss_reaches_a_shared_trunk_unless_the_policy_is_left_alone():
    made = SharedTrunk(tiny_model())
    with_random_head(made)
    assert largest(value_gradient(made, trains_policy=True)["policy"]) > 0
    left_alone = value_gradient(made, trains_policy=False)
    assert largest(left_alone["policy"]) == 0
    assert largest(left_alone["critic"]) > 0


def test_a_separate_critic_moves_by_itself():
    policy: Any = tiny_model()
    made: Any = TwoTrunks(policy)
    before = {name: np.array(array) for name, array in tree_flatten(policy.parameters())}
    with_random_head(made)
    grads = value_gradient(made, trains_policy=True)
    assert largest(grads["policy"]) == 0
    SGD(learning_rate=0.1).update(made.critic, grads["critic"])
    moved = made.critic.backbone.model.layers[0].mlp.up_proj.weight
    assert not mx.array_equal(moved, policy.model.layers[0].mlp.up_proj.weight)
    assert all(np.array_equal(array, before[name]) for name, array in tree_flatten(policy.parameters()))


def test_a_separate_critic_takes_no_memory_before_it_moves():
    policy = tiny_model()
    critic: Any = TwoTrunks(policy).critic
    own = dict(tree_flatten(critic.backbone.parameters()))
    assert all(own[name] is array for name, array in tree_flatten(policy.parameters()))


def test_with_adapters_the_critic_trains_adapters_of_its_own_and_its_head():
    policy = tiny_model(tie_word_embeddings=False)
    add_adapter(policy, LoraAdapter(rank=4, layers=1), seed=0)
    made = TwoTrunks(policy)
    trained = names(made.critic.trainable_parameters())
    assert {"head.weight", "head.bias"} < trained
    assert {name.removeprefix("backbone.") for name in trained if name.startswith("backbone.")} == names(
        policy.trainable_parameters()
    )


def test_a_full_critic_leaves_the_language_models_head_out():
    made = TwoTrunks(tiny_model(tie_word_embeddings=False))
    trained = names(made.critic.trainable_parameters())
    assert "backbone.model.embed_tokens.weight" in trained
    assert not any("lm_head" in name for name in trained)


def test_policy_and_critic_are_apart_in_the_tree():
    made = SharedTrunk(tiny_model())
    assert names(made.critic.parameters()) == {"weight", "bias"}
    assert names(made.policy.parameters()) == names(tiny_model().parameters())
    np.testing.assert_allclose(
        np.array(made.logits_and_values(ROWS)[0]), np.array(completion_logits(made.policy, ROWS)), rtol=1e-5, atol=1e-5
    )
