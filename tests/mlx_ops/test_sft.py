import math
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.optimizers import SGD
from mlx.utils import tree_map
from mlx_lm.models import gpt2

from configs.schema import LoraAdapter, PromptConfig, SFTConfig
from mlx_ops.checkpoint import CheckpointStore
from mlx_ops.model import add_adapter
from mlx_ops.neftune import NoisyEmbedding, embedding_of
from mlx_ops.optimizers import global_norm
from mlx_ops.pairs import Pair
from mlx_ops.sft import SFTTrainer, make_pairs, sft_batches
from rewards.base import Example
from tests.mlx_ops.test_prompts import CHATML, EXAMPLE, tokenizer
from tests.mlx_ops.tiny import leaves, tiny_model

PAIRS = [Pair((1, 2, 3), (4, 5)), Pair((6,), (7, 8, 9, 10, 11, 12)), Pair((2, 2), (3,))]
TURNS = [*PAIRS, Pair((20, 21), (22, 23, 24, 25), (True, False, False, True))]


def trainer(model, *, pairs=PAIRS, budget=10_000, **changes):
    config = SFTConfig.model_validate({"batch_size": len(pairs), "learning_rate": 1.0, **changes})
    made = SFTTrainer(
        model,
        SGD(learning_rate=config.learning_rate),
        config,
        pairs=pairs,
        validation=pairs,
        take=lambda position, count: [index % len(pairs) for index in range(position, position + count)],
        token_budget=budget,
        seed=0,
    )
    # What a GPU compiles it pads; tests count without.
    made.compiled = False
    return made


def nll_of_targets(model, pairs):
    """Summed over targets, from a plain forward of each pair alone."""
    total, tokens = 0.0, 0
    for pair in pairs:
        ids = [*pair.prompt, *pair.target]
        logits = np.array(model(mx.array([ids[:-1]]))[0], dtype=np.float64)
        logprobs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        for place, trained in enumerate(pair.trained, start=len(pair.prompt) - 1):
            if trained:
                total -= logprobs[place, ids[place + 1]]
                tokens += 1
    return total, tokens


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("budget", [1, 100, 10_000])
def test_the_loss_is_the_mean_over_the_target_tokens_of_the_step_however_it_is_cut(budget, packing):
    model = tiny_model()
    total, tokens = nll_of_targets(model, TURNS)
    assert tokens == 11
    sft = trainer(model, pairs=TURNS, budget=budget, learning_rate=1e-9, packing=packing)
    (minibatch,), metrics = sft.collect(0)
    assert metrics["tokens_trained"] == 11
    assert sft.update(minibatch)["loss"] == pytest.approx(total / 11, rel=1e-5)


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
    moved = tree_map(mx.subtract, model.parameters(), before.parameters())
    assert metrics["grad_norm"] > 0.1
    assert float(global_norm(moved)) == pytest.approx(0.01, rel=1e-2)


@pytest.mark.parametrize(("packing", "share"), [(False, 1 - 16 / 32), (True, 1 - 16 / 20)])
def test_the_padded_share_is_what_is_run_without_holding_a_token(packing, share):
    # Inputs are all tokens but the last: 4 + 6 + 2 + 4. A row each has 3 - 1 prompt columns and 6 of the target;
    # packed into rows of 10 they are 6 + 4 and 4 + 2.
    pairs = [*PAIRS, Pair((20, 21), (22, 23, 24))]
    sft = trainer(tiny_model(), pairs=pairs, packing=packing, max_length=10)
    assert sft.collect(0)[1]["padded_share"] == pytest.approx(share)


def test_the_accuracy_is_the_share_of_targets_that_come_first():
    model = tiny_model()
    (first,) = np.argmax(model(mx.array([[6]]))[0], axis=-1).tolist()
    after, second = np.argmax(model(mx.array([[6, first]]))[0], axis=-1).tolist()
    assert after == first
    other = (second + 1) % 64
    sft = trainer(model, pairs=[Pair((6,), (first, other)), Pair((6,), (first, second, 0), (True, True, False))])
    (minibatch,), _ = sft.collect(0)
    # Four tokens count, and `other` is not what greedy decoding gives.
    assert sft.update(minibatch)["token_accuracy"] == pytest.approx(3 / 4)


def test_dft_weighs_a_token_by_its_probability():
    model, pairs = tiny_model(), [PAIRS[2]]
    surprise, _ = nll_of_targets(model, pairs)
    probability = math.exp(-surprise)
    assert 0.0001 < probability < 0.9
    values, norms = [], []
    for loss in ("nll", "dft"):
        sft = trainer(tiny_model(), pairs=pairs, loss=loss, learning_rate=1e-9)
        (minibatch,), _ = sft.collect(0)
        metrics = sft.update(minibatch)
        values.append(metrics["loss"])
        norms.append(metrics["grad_norm"])
    assert values == pytest.approx([surprise, probability * surprise], rel=1e-4)
    assert norms[1] == pytest.approx(probability * norms[0], rel=1e-4)


def test_the_noise_is_uniform_within_alpha_over_the_root_of_length_times_width():
    mx.random.seed(0)
    embedding = nn.Embedding(64, 100)
    noisy = NoisyEmbedding(embedding, 5.0, mx.array([[4], [25]]))
    tokens = mx.arange(60).reshape(2, 30)
    noise = np.array(noisy(tokens) - embedding(tokens))
    for row, bound in zip(noise, (5 / math.sqrt(4 * 100), 5 / math.sqrt(25 * 100)), strict=True):
        assert 0.99 * bound < np.abs(row).max() <= bound * (1 + 1e-5)
        assert np.std(row) == pytest.approx(bound / math.sqrt(3), rel=0.05)
        assert abs(row.mean()) < 0.05 * bound
    assert mx.array_equal(noisy.as_linear(mx.ones((100,))), embedding.as_linear(mx.ones((100,))))


@pytest.mark.parametrize("packing", [False, True])
def test_noise_is_drawn_anew_for_training_and_never_for_validation(packing):
    model = tiny_model()
    sft = trainer(model, pairs=TURNS, neftune_alpha=5.0, validation_every=1, packing=packing, max_length=10)
    trunk: Any = model["model"]
    embedding = trunk.embed_tokens
    (batch,) = sft.collect(0)[0][0]

    def losses(seed):
        mx.random.seed(seed)
        return [float(sft.loss(model, batch)[0]) for _ in range(2)]

    total, tokens = nll_of_targets(model, TURNS)
    assert losses(0) == losses(0)
    assert len({*losses(0), *losses(1)}) == 4
    assert all(0.001 < abs(loss - total / tokens) < 1 for loss in losses(0))
    assert sft.validate(1)["validation_loss"] == pytest.approx(total / tokens, rel=1e-5)
    assert trunk.embed_tokens is embedding


def test_training_with_noise_moves_the_same_weights_and_fits():
    model = tiny_model()
    names = [name for name, _ in leaves(model.parameters())]
    sft = trainer(model, learning_rate=0.5, neftune_alpha=1.0)
    losses = []
    sft.fit(40, report=lambda step, metrics: losses.append(metrics["loss"]), save=lambda step, metrics: None)
    assert losses[-1] < 0.2 < 3 < losses[0]
    assert [name for name, _ in leaves(model.parameters())] == names


def test_noise_is_refused_where_the_embedding_is_not_clear():
    sizes = {"n_ctx": 64, "n_positions": 64, "n_embd": 32, "n_head": 4, "n_layer": 1, "vocab_size": 64}
    model = gpt2.Model(gpt2.ModelArgs.from_dict({"model_type": "gpt2", "layer_norm_epsilon": 1e-5, **sizes}))
    with pytest.raises(ValueError, match=r"gpt2 has 2 embeddings \['wpe', 'wte'\].*set neftune_alpha: 0"):
        trainer(model, neftune_alpha=5.0)
    assert embedding_of(tiny_model())[1] == "embed_tokens"


def test_dropout_acts_in_training_alone():
    model = tiny_model()
    add_adapter(model, LoraAdapter(rank=4, dropout=0.5), seed=0)
    model.update({"model": {"layers": [{"mlp": {"up_proj": {"lora_b": mx.ones((4, 64))}}}]}})
    sft = trainer(model, validation_every=1)
    clean, tokens = nll_of_targets(model, PAIRS)
    (batch,) = sft.collect(0)[0][0]
    assert float(sft.loss(model, batch)[0]) != float(sft.loss(model, batch)[0])
    assert sft.validate(1)["validation_loss"] == pytest.approx(clean / tokens, rel=1e-5)


def test_the_checkpoint_with_the_least_validation_loss_is_the_one_to_publish(tmp_path):
    held_out = [Pair((6,), (7, 9)), Pair((2, 2), (4,))]
    best = {"save_every": 50, "keep_last": 1, "best_metric": "validation_loss", "best_mode": "min"}
    sft = trainer(tiny_model(), learning_rate=0.3, validation_every=1, checkpoint=best)
    sft.validation = held_out
    store = CheckpointStore(tmp_path, sft.config.checkpoint)
    seen = []

    def save(step, metrics):
        seen.append(metrics["validation_loss"])
        store.save(
            step,
            write_weights=lambda folder: None,
            weight_bytes=0,
            optimizer=sft.optimizer,
            state={},
            metrics=metrics,
        )

    sft.fit(12, report=lambda step, metrics: None, save=save, evaluate=sft.validate)
    assert min(seen) < seen[-1]
    assert store.chosen().step == seen.index(min(seen)) + 1


def test_examples_become_pairs_and_what_is_missing_or_too_long_is_counted():
    words, prompt = tokenizer(CHATML, "<|im_end|>"), PromptConfig(chat=False)
    examples = [Example("a", "12", target="3"), Example("b", "12"), Example("c", "12", target="345"), EXAMPLE]
    config = SFTConfig(max_length=4, max_prompt_tokens=2)
    pairs, left_out = make_pairs(examples, prompt, words, config)
    assert left_out == 3
    assert [words.decode([*pair.prompt, *pair.target]) for pair in pairs] == ["123<eos>"]
    with pytest.raises(ValueError, match=r"no target of 2 examples .1 have one. fits .* 2 and max_length 4"):
        make_pairs(examples[1:3], prompt, words, config)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"checkpoint": {"best_metric": "validation_loss"}}, "checkpoint.best_mode: set min"),
        (
            {"checkpoint": {"best_metric": "validation_loss", "best_mode": "min"}, "validation_every": None},
            "validation_every: null gives no validation_loss",
        ),
        ({"adapter": {"kind": "lora", "dropout": 0.1}, "gradient_checkpointing": True}, "set adapter.dropout: 0"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        SFTConfig.model_validate(changes)
