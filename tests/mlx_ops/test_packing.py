import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import gpt2, granite, llama

from mlx_ops.losses import nll_loss
from mlx_ops.packing import pack, packed_logits, packed_parts, packed_rows, require_packable
from mlx_ops.pairs import Pair
from mlx_ops.sft import imitation, packed_batches, sft_batches
from tests.mlx_ops.tiny import tiny_model

PAIRS = [
    Pair((1, 2, 3), (4, 5)),
    Pair((6,), (7, 8, 9, 10, 11, 12), (True, False, False, True, True, True)),
    Pair((2, 2), (3,)),
    Pair((13, 14, 15, 16, 17, 18), (19, 20, 21)),
]


def random_pairs(count: int, seed: int) -> list[Pair]:
    draw = np.random.default_rng(seed)
    lengths = draw.integers(1, 12, (count, 2)).tolist()
    return [Pair(*(tuple(draw.integers(1, 64, length).tolist()) for length in both)) for both in lengths]


def loss_and_gradient(model, batches):
    def loss(model):
        return sum(nll_loss(imitation(model, batch)[0], batch.weights)[0] for batch in batches)

    value, gradient = nn.value_and_grad(model, loss)(model)
    return float(value), {name: np.array(array) for name, array in tree_flatten(gradient)}


def test_the_longest_go_first_each_into_the_row_that_it_fills_best():
    # 13 | 11, then 8 only fits beside 11, and 1 fits both: the row with 1 column left is the better.
    assert pack([1, 8, 11, 13], capacity=20) == [[3], [2, 1, 0]]
    assert pack([4, 4, 4], capacity=8) == [[0, 1], [2]]
    assert pack([9], capacity=8) == [[0]]


def test_every_example_is_packed_once_and_no_row_overflows():
    lengths = np.random.default_rng(0).integers(1, 50, 200).tolist()
    rows = pack(lengths, capacity=64)
    assert sorted(place for row in rows for place in row) == list(range(200))
    assert max(sum(lengths[place] for place in row) for row in rows) <= 64
    # Best fit leaves at most two ninths of an optimal packing's rows too many (Johnson 1973).
    assert len(rows) <= 11 / 9 * -(-sum(lengths) // 64) + 4


def test_a_row_holds_inputs_examples_and_where_targets_are_predicted():
    rows = packed_rows([[PAIRS[1], PAIRS[2]], [PAIRS[0]]])
    assert rows.inputs.tolist() == [[6, 7, 8, 9, 10, 11, 2, 2], [1, 2, 3, 4, 0, 0, 0, 0]]
    assert rows.segments.tolist() == [[1, 1, 1, 1, 1, 1, 2, 2], [1, 1, 1, 1, 0, 0, 0, 0]]
    assert rows.lengths.tolist() == [[7, 7, 7, 7, 7, 7, 3, 3], [5, 5, 5, 5, 1, 1, 1, 1]]
    # The pair's mask leaves 8 and 9 out; the second row begins at column 8.
    assert rows.places.tolist() == [0, 3, 4, 5, 7, 10, 11]
    assert rows.targets.tolist() == [7, 10, 11, 12, 3, 4, 5]


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_packed_examples_have_the_loss_and_the_gradient_that_they_have_apart(architecture):
    model = tiny_model(architecture)
    pairs = PAIRS + random_pairs(6, seed=1)
    apart, expected = loss_and_gradient(model, sft_batches(pairs, 10_000))
    for capacity, budget in ((24, 10_000), (40, 1)):
        packed, gradient = loss_and_gradient(model, packed_batches(pairs, budget, capacity))
        assert packed == pytest.approx(apart, rel=1e-5)
        for name, array in expected.items():
            np.testing.assert_allclose(gradient[name], array, rtol=1e-4, atol=1e-5, err_msg=name)


def test_an_example_does_not_see_the_one_before_it():
    model = tiny_model()
    befores = (PAIRS[3], Pair((8,) * 6, (8, 8, 8)))
    rows = [packed_rows([[before, PAIRS[0]]]) for before in befores]
    logits = [packed_logits(model, row) for row in rows]
    assert not mx.allclose(logits[0][:3], logits[1][:3])
    assert mx.allclose(logits[0][3:], logits[1][3:], rtol=0, atol=1e-6)


def test_microbatches_keep_to_the_budget_in_whole_rows():
    parts = packed_parts(random_pairs(40, seed=2), capacity=30, token_budget=100)
    assert len(parts) > 1
    assert all(part.inputs.size <= 100 for part in parts)
    assert all(part.inputs.shape == (1, part.inputs.shape[1]) for part in packed_parts(PAIRS, 10, 1))


class Absolute(llama.Model):
    """A llama that is also told each token's place in its row."""

    def __init__(self, args: llama.ModelArgs) -> None:
        super().__init__(args)
        embed = self.model.embed_tokens
        self.model.embed_tokens = Placed(embed.weight.shape[0], embed.weight.shape[1])


class Placed(nn.Embedding):
    def __call__(self, x: mx.array) -> mx.array:
        return super().__call__(x) + 0.1 * mx.arange(x.shape[-1])[:, None]


def absolute() -> nn.Module:
    mx.random.seed(0)
    return Absolute(tiny_model().args)  # type: ignore[arg-type]


def learned_positions() -> nn.Module:
    sizes = {"n_ctx": 64, "n_positions": 64, "n_embd": 32, "n_head": 4, "n_layer": 1, "vocab_size": 64}
    return gpt2.Model(gpt2.ModelArgs.from_dict({"model_type": "gpt2", "layer_norm_epsilon": 1e-5, **sizes}))


def scaled_logits() -> nn.Module:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    factors = {"embedding_multiplier": 12.0, "attention_multiplier": 0.3, "residual_multiplier": 0.2}
    rest = {"rms_norm_eps": 1e-5, "rope_theta": 1e4, "attention_bias": False, "mlp_bias": False}
    mx.random.seed(0)
    args = {"model_type": "granite", "logits_scaling": 8.0, "tie_word_embeddings": True}
    return granite.Model(granite.ModelArgs.from_dict({**args, **sizes, **heads, **factors, **rest}))


def sliding_window() -> nn.Module:
    return tiny_model(layer_types=["sliding_attention", "full_attention"], sliding_window=4)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (absolute, "positions are not relative"),
        (learned_positions, r"gpt2 has no trunk `model` under an `lm_head` or a tied `embed_tokens`"),
        (scaled_logits, "granite gives tokens .* changes logits after the head"),
        (sliding_window, "keeps RotatingKVCache"),
    ],
)
def test_models_that_packing_would_change_are_refused(make, words):
    with pytest.raises(ValueError, match=rf"packing: .*{words}.*; set packing: false"):
        require_packable(make())


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
def test_rounding_is_no_reason_to_refuse(dtype):
    model = tiny_model()
    model.set_dtype(dtype)
    require_packable(model)
