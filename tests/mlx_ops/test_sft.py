import mlx.core as mx
import numpy as np
import pytest
from mlx.optimizers import SGD
from mlx.utils import tree_flatten

from configs.schema import SFTConfig
from mlx_ops.sft import Pair, SFTTrainer, sft_batches
from tests.mlx_ops.tiny import tiny_model

PAIRS = [Pair((1, 2, 3), (4, 5)), Pair((6,), (7, 8, 9, 10, 11, 12)), Pair((2, 2), (3,))]


def trainer(model, *, pairs=PAIRS, budget=10_000, **changes):
    config = SFTConfig.model_validate({"batch_size": len(pairs), "learning_rate": 1.0, **changes})
    return SFTTrainer(
        model,
        SGD(learning_rate=config.learning_rate),
        config,
        pairs=pairs,
        validation=pairs,
        take=lambda position, count: [index % len(pairs) for index in range(position, position + count)],
        token_budget=budget,
        seed=0,
    )


def nll_of_targets(model, pairs):
    """Summed over targets, from a plain forward of each pair alone."""
    total, tokens = 0.0, 0
    for pair in pairs:
        ids = [*pair.prompt, *pair.target]
        logits = np.array(model(mx.array([ids[:-1]]))[0], dtype=np.float64)
        logprobs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        for place in range(len(pair.prompt) - 1, len(ids) - 1):
            total -= logprobs[place, ids[place + 1]]
            tokens += 1
    return total, tokens


@pytest.mark.parametrize("budget", [1, 100, 10_000])
def test_the_loss_is_the_mean_over_the_target_tokens_of_the_step_however_it_is_cut(budget):
    model = tiny_model()
    total, tokens = nll_of_targets(model, PAIRS)
    assert tokens == 9
    sft = trainer(model, budget=budget, learning_rate=1e-9)
    (minibatch,), _ = sft.collect(0)
    assert sft.update(minibatch)["loss"] == pytest.approx(total / 9, rel=1e-5)


def test_the_prompt_is_not_imitated():
    model = tiny_model()
    (batch,) = sft_batches([Pair((1, 2, 3), (4, 5))], 10_000)
    loss, _ = trainer(model).loss(model, batch)
    other = sft_batches([Pair((1, 2, 3), (4, 5)), Pair((1, 9, 3), (4, 5))], 10_000)
    assert float(batch.weights.sum()) == pytest.approx(1.0)
    assert float(sum(b.weights.sum() for b in other)) == pytest.approx(1.0)
    assert float(loss) == pytest.approx(nll_of_targets(model, [Pair((1, 2, 3), (4, 5))])[0] / 2, rel=1e-5)


def test_training_fits_the_targets():
    model = tiny_model()
    sft = trainer(model, learning_rate=0.5)
    losses = []
    sft.fit(60, report=lambda step, metrics: losses.append(metrics["loss"]), save=lambda step, metrics: None)
    assert losses[0] > 3
    assert losses[-1] < 0.1


def test_validation_comes_when_it_is_due_and_agrees_with_the_loss():
    model = tiny_model()
    sft = trainer(model, validation_every=2)
    assert sft.validate(1) == {}
    total, tokens = nll_of_targets(model, PAIRS)
    assert sft.validate(2)["validation_loss"] == pytest.approx(total / tokens, rel=1e-5)


def test_the_gradient_is_clipped_to_the_global_norm():
    model, before = tiny_model(), tiny_model()
    sft = trainer(model, optimizer={"max_grad_norm": 0.01})
    (minibatch,), _ = sft.collect(0)
    metrics = sft.update(minibatch)
    moved = [a - b for (_, a), (_, b) in zip(tree_flatten(model.parameters()), tree_flatten(before.parameters()))]
    assert metrics["grad_norm"] > 0.1
    assert np.sqrt(sum(float(mx.square(m).sum()) for m in moved)) == pytest.approx(0.01, rel=1e-2)
