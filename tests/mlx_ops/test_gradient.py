import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.optimizers import SGD, AdamW

from configs.schema import LoraAdapter, SFTConfig
from mlx_ops.backend import prepare
from mlx_ops.checkpointing import checkpoint_layers
from mlx_ops.gradient import SLOT, CompiledGradient, put_together, taken_apart
from mlx_ops.grpo import GRPOTrainer
from mlx_ops.model import add_adapter
from mlx_ops.pairs import Pair
from mlx_ops.ppo import PPOTrainer
from mlx_ops.sft import SFTTrainer
from tests.mlx_ops.bench import groups, grpo_config, make_trainer, ppo_config, rollout
from tests.mlx_ops.tiny import leaves, tiny_model

pytestmark = pytest.mark.skipif(not prepare().compiles, reason="without a C++ compiler nothing compiles on this CPU")


def lora(**fields):
    model = tiny_model()
    add_adapter(model, LoraAdapter(rank=4, **fields), seed=0)
    # An adapter that adds nothing has no gradient on one side.
    model.update({"model": {"layers": [{"mlp": {"up_proj": {"lora_b": mx.full((4, 64), 0.1)}}}]}})
    return model


def checkpointed():
    model = tiny_model()
    checkpoint_layers(model)
    return model


def scaled_rope():
    """Frequencies of its own, which are no parameters."""
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    model: Any = tiny_model(rope_scaling=scaling)
    # As after a rollout: they are known, and no part of a graph.
    mx.eval(model(mx.array([[1, 2]])))
    return model


def quantized():
    model = tiny_model(head_dim=32, hidden_size=128)
    nn.quantize(model, group_size=32, bits=8)
    add_adapter(model, LoraAdapter(rank=4), seed=0)
    return model


def policy_trainer(cls, model, config, *, compiled, **more):
    """A trainer whose steps draw other groups each, of unequal lengths."""
    given = {"optimizer": SGD(learning_rate=config.learning_rate), **more}
    made = make_trainer(cls, model, config, [], **given)
    made.draw = lambda position, prompts: (groups(position, prompts=prompts), {"seconds/generate": 0.0})
    made.compiled, made.compiled_gradient = compiled, CompiledGradient(after=0)
    return made


def sft_trainer(model, *, compiled, pairs: Sequence[Pair] = (), budget=10_000, **changes):
    config = SFTConfig.model_validate({"batch_size": 6, "learning_rate": 0.05, "max_length": 40, **changes})
    pairs = pairs or random_pairs(24)
    made = SFTTrainer(
        *(model, SGD(learning_rate=config.learning_rate), config),
        pairs=pairs,
        validation=pairs[:1],
        take=lambda position, count: [index % len(pairs) for index in range(position, position + count)],
        token_budget=budget,
        seed=0,
    )
    made.compiled, made.compiled_gradient = compiled, CompiledGradient(after=0)
    return made


def random_pairs(count):
    draw = np.random.default_rng(0)
    lengths = draw.integers(1, 12, (count, 2)).tolist()
    return [Pair(*(tuple(draw.integers(1, 64, length).tolist()) for length in both)) for both in lengths]


def trained(trainer, steps: Iterable[int] = range(3)):
    """The metrics of each update, and the weights at the end."""
    found = []
    for step in steps:
        mx.random.seed(step)
        minibatches, _ = trainer.collect(step)
        found += [trainer.update(minibatch) for minibatch in minibatches]
    return found, dict(leaves(trainer.model.trainable_parameters()))


def assert_equal_training(make, *, entropy=True):
    (eager, ours), (compiled, theirs) = (trained(make(compiled=choice)) for choice in (False, True))
    assert len(eager) == len(compiled) >= 3
    left_out = {"seconds/update"} if entropy else {"seconds/update", "entropy"}
    for before, after in zip(eager, compiled, strict=True):
        own = {name: value for name, value in before.items() if name not in left_out}
        assert {name: after[name] for name in own} == pytest.approx(own, rel=1e-4, abs=5e-6)
        assert after["loss"] == pytest.approx(before["loss"], abs=3e-6)
    for name, array in ours.items():
        np.testing.assert_allclose(np.array(theirs[name]), np.array(array), rtol=1e-5, atol=3e-6, err_msg=name)


@pytest.mark.parametrize(
    ("changes", "budget"),
    [
        ({"kl_coef": 0.1}, 10_000),
        ({"loss": "sapo"}, 400),
        (
            {
                "epochs": 2,
                "minibatches": 2,
                "clip_range": 0.1,
                "entropy_coef": 0.1,
                "sampling": {"max_tokens": 8, "temperature": 0.7},
                "importance_correction": {"level": "token"},
                "off_policy_threshold": 0.5,
                "mask_truncated": True,
            },
            10_000,
        ),
    ],
    ids=["on policy, with KL", "microbatches", "old log-probabilities and corrections"],
)
def test_grpo_compiled_trains_as_it_does_eagerly(changes, budget):
    config = grpo_config(learning_rate=0.02, **changes)
    # Padded prompts are cut otherwise, and the entropy is measured at tokens of each microbatch.
    assert_equal_training(
        lambda compiled: policy_trainer(
            GRPOTrainer, tiny_model(sharpness=1.0), config, compiled=compiled, budget=budget
        ),
        entropy=budget > 400,
    )


@pytest.mark.parametrize("make", [lora, checkpointed, quantized, scaled_rope])
def test_other_models_compiled_train_as_they_do_eagerly(make):
    config = grpo_config(learning_rate=0.02, kl_coef=0.1)
    assert_equal_training(lambda compiled: policy_trainer(GRPOTrainer, make(), config, compiled=compiled))


@pytest.mark.parametrize(("kind", "kl_in"), [("head", "loss"), ("separate", "loss"), ("head", "reward")])
def test_ppo_compiled_trains_as_it_does_eagerly_with_warm_up_and_a_coefficient_that_moves(kind, kl_in):
    config = ppo_config(
        learning_rate=0.05,
        minibatches=2,
        kl_in=kl_in,
        kl_coef=0.5,
        kl_target=0.01,
        kl_horizon=20,
        critic={"kind": kind, "warmup_steps": 1},
    )
    made = []

    def make(compiled):
        # SGD: Adam divides by the root of what is still near 0, which makes steps of rounding.
        made.append(
            policy_trainer(
                PPOTrainer, tiny_model(), config, compiled=compiled, critic_optimizer=SGD(learning_rate=0.05)
            )
        )
        return made[-1]

    assert_equal_training(make)
    assert made[0].kl.coef == pytest.approx(made[1].kl.coef)
    assert abs(made[0].kl.coef / 0.5 - 1) > 0.1


@pytest.mark.parametrize(
    "changes", [{"packing": True}, {"loss": "dft", "budget": 100}], ids=["packed", "dft in microbatches"]
)
def test_sft_compiled_trains_as_it_does_eagerly(changes):
    assert_equal_training(lambda compiled: sft_trainer(tiny_model(), compiled=compiled, **changes))


@pytest.mark.parametrize(
    ("model", "changes"),
    [(tiny_model, {"neftune_alpha": 5.0}), (lambda: lora(dropout=0.5), {"neftune_alpha": 5.0, "packing": True})],
    ids=["noise", "noise and dropout, packed"],
)
def test_compiled_noise_is_drawn_anew_each_step_and_as_it_is_eagerly(model, changes):
    def make(compiled):
        # Padding draws too: both have the same.
        made = sft_trainer(model(), compiled=True, **changes)
        if not compiled:
            made.gradient = lambda batch: nn.value_and_grad(made.model, made.loss)(made.model, batch)
        return made

    assert_equal_training(make)
    sft = sft_trainer(model(), compiled=True, **changes)
    (batch,) = sft.collect(0)[0][0]
    assert float(sft.gradient(batch)[0][0]) != float(sft.gradient(batch)[0][0])


def judged(lengths, prompts, seed):
    """Two groups of two completions of these lengths."""
    draw = np.random.default_rng(seed)

    def tokens(count):
        return draw.integers(1, 64, count).tolist()

    heads = [tokens(count) for count in prompts for _ in range(2)]
    heads[1], heads[3] = heads[0], heads[2]
    made = [
        rollout(tokens(length), reward, prompt=head, logprobs=draw.normal(-3, 1, length))
        for length, head, reward in zip(lengths, heads, (1.0, 0.0, 0.0, 2.0), strict=True)
    ]
    return [made[:2], made[2:]]


def traces(trainer):
    """How often the trainer's loss has been called, as it goes on."""
    counts, loss = [0], trainer.loss

    def counted(model, batch):
        counts[0] += 1
        return loss(model, batch)

    trainer.loss = counted
    return counts


@pytest.mark.parametrize(
    ("cls", "config"),
    [
        (GRPOTrainer, grpo_config(prompts_per_step=2, group_size=2, kl_coef=0.1, learning_rate=0.1)),
        (
            PPOTrainer,
            ppo_config(
                prompts_per_step=2,
                completions_per_prompt=2,
                kl_coef=0.1,
                kl_in="loss",
                kl_target=0.01,
                kl_horizon=20,
                learning_rate=0.1,
            ),
        ),
    ],
    ids=["grpo", "ppo"],
)
def test_batches_of_one_shape_share_a_trace_whatever_their_lengths(cls, config):
    draws = [judged((3, 7, 5, 2), (4, 9), 0), judged((9, 1, 4, 6), (2, 3), 1), judged((30, 2, 2, 1), (20, 1), 2)]
    draws += [judged((33, 2, 2, 1), (20, 1), 3)]
    ends = []
    for compiled in (False, True):
        more = {"critic_optimizer": SGD(learning_rate=0.1)} if cls is PPOTrainer else {}
        trainer = policy_trainer(cls, tiny_model(), config, compiled=compiled, **more)
        trainer.draw = lambda position, prompts: (draws[position // prompts], {"seconds/generate": 0.0})
        counts, seen, metrics = traces(trainer), [], []
        for step in range(4):
            metrics += trained(trainer, [step])[0]
            seen.append(counts[0])
        ends.append((metrics, dict(leaves(trainer.model.trainable_parameters()))))
    # Completions of up to 32 tokens are one shape, one of 33 is another.
    assert seen == [1, 1, 1, 2]
    (eager, ours), (traced, theirs) = ends
    for before, after in zip(eager, traced, strict=True):
        for name in ("loss", "grad_norm", "tokens", "entropy", "kl_k3", "sampler_gap_mean"):
            assert after[name] == pytest.approx(before[name], rel=1e-4, abs=1e-6), name
    for name, array in ours.items():
        np.testing.assert_allclose(np.array(theirs[name]), np.array(array), rtol=1e-5, atol=3e-6, err_msg=name)


def test_packed_rows_of_other_examples_share_a_trace():
    lengths = ((4, 5), (9, 3), (3, 7), (5, 6), (7, 4), (2, 8))
    pairs = [Pair(tuple(range(1, prompt)), tuple(range(1, target))) for prompt, target in lengths]
    sft = sft_trainer(tiny_model(), compiled=True, packing=True, pairs=pairs, batch_size=3)
    counts = traces(sft)
    trained(sft, range(2))
    # 12 and 15 targets stand on 32 places.
    assert counts == [1]


def test_a_trace_leaves_the_models_own_weights_in_it():
    trainer = policy_trainer(GRPOTrainer, tiny_model(), grpo_config(), compiled=True)
    before = dict(leaves(trainer.model.parameters()))
    ((batch,),) = trainer.collect(0)[0]
    trainer.gradient(batch)
    assert all(mx.array_equal(array, before[name]) for name, array in leaves(trainer.model.parameters()))


def test_a_compiled_update_that_is_not_finite_changes_nothing():
    trainer = policy_trainer(
        GRPOTrainer, tiny_model(), grpo_config(), compiled=True, optimizer=AdamW(learning_rate=0.1)
    )
    trained(trainer, range(1))
    before = [*leaves(trainer.model.parameters()), *leaves(trainer.optimizer.state)]
    trainer.compiled_gradient = CompiledGradient(after=0)
    trainer.loss = lambda model, batch: (
        mx.array(float("nan")) * model.model.norm.weight.sum(),
        {"tokens": mx.array(1)},
    )
    ((metrics,), _) = trained(trainer, range(1))
    assert metrics["skipped_updates"] == 1
    after = [*leaves(trainer.model.parameters()), *leaves(trainer.optimizer.state)]
    assert all(mx.array_equal(old, new) for (_, old), (_, new) in zip(before, after, strict=True))


def test_a_compiled_run_that_resumes_is_bit_equal_to_one_that_never_stopped():
    """Whatever shapes the process met before."""
    config = grpo_config(learning_rate=0.05, kl_coef=0.1, epochs=2)

    def start(model):
        made = policy_trainer(GRPOTrainer, model, config, compiled=True, optimizer=AdamW(learning_rate=0.01))
        made.compiled_gradient = CompiledGradient(after=3)
        return made, traces(made)

    (whole, all_traces), (first, early) = start(tiny_model()), start(tiny_model())
    trained(whole, range(4))
    trained(first, range(2))
    rest, late = start(tiny_model())
    rest.model.update(first.model.parameters())
    rest.optimizer.state = first.optimizer.state
    rest.restore(2, json.loads(json.dumps(first.state())), first.arrays())
    trained(rest, range(2, 4))
    # Three of the eight updates aren't by a trace, whoever makes them.
    assert (all_traces, early, late) == ([4], [4], [1])
    for name, array in leaves(whole.model.parameters()):
        assert mx.array_equal(array, dict(leaves(rest.model.parameters()))[name]), name


def test_a_class_is_compiled_only_where_it_says_so_of_its_own_loss():
    class Tuned(GRPOTrainer):
        """Has the loss of its base."""

    class Other(GRPOTrainer):
        def loss(self, model, batch):
            return super().loss(model, batch)

    class Stated(Other):
        compilable = True

        def loss(self, model, batch):
            return super().loss(model, batch)

    assert [cls.compilable for cls in (GRPOTrainer, PPOTrainer, SFTTrainer, Tuned, Other, Stated)] == [
        *(True, True, True, True),
        *(False, True),
    ]


@dataclass(frozen=True)
class Part:
    tokens: mx.array
    count: int


@dataclass(frozen=True)
class Whole:
    part: Part
    pair: tuple[Any, ...]
    weights: mx.array | None


def test_a_batch_is_its_arrays_and_a_form_that_tells_all_else_apart():
    arrays = [mx.array([1]), mx.array([2.0]), mx.array([3])]
    whole = Whole(Part(arrays[0], 7), (arrays[1], "x"), arrays[2])
    taken, form = taken_apart(whole)
    assert [array.tolist() for array in taken] == [[1], [2.0], [3]]
    assert form == Whole(Part(SLOT, 7), (SLOT, "x"), SLOT)  # type: ignore[arg-type]
    assert put_together(form, taken).pair[0] is arrays[1]
    others = [Whole(Part(arrays[0], 8), (arrays[1], "x"), arrays[2]), Whole(Part(arrays[0], 7), (arrays[1], "x"), None)]
    assert len({form, *(taken_apart(other)[1] for other in others)}) == 3


def test_a_metric_that_repeats_another_compiles():
    """MLX 0.32.4's compile fails on an output that is a stop_gradient of a repeated expression."""
    model = nn.Linear(2, 1, bias=False)
    model.weight = mx.array([[2.0, 3.0]])

    def loss(model, batch):
        return model(batch).sum(), {
            "tokens": batch.sum(),
            "mean": model.weight.sum() / batch.sum(),
            "same": batch.sum(),
        }

    (value, extra), grads = CompiledGradient(after=0)(loss, model, mx.array([[1.0, 4.0]]))
    assert (value.item(), {name: array.item() for name, array in extra.items()}) == (
        14.0,
        {"tokens": 5.0, "mean": 1.0, "same": 5.0},
    )
    assert grads["weight"].tolist() == [[1.0, 4.0]]
