import random
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_ops.batching import TokenRows, token_rows
from mlx_ops.checkpointing import checkpoint_layers
from mlx_ops.forward import check_projection, completion_hidden, completion_logits, project, score, unshared_because
from tests.mlx_ops.tiny import tiny_model

UNEVEN = (0, 0, 0, 1, 3, 3)
LAYOUTS = {
    "even groups": (0, 0, 1, 1, 2, 2, 3, 3),
    "uneven groups": UNEVEN,
    "one row a prompt": (0, 1, 2, 3),
    "rows out of order": (2, 0, 3, 0, 1, 2),
    "one prompt": (1, 1, 1),
}


def random_tokens(lengths: list[int], seed: int = 0) -> list[list[int]]:
    source = random.Random(seed)
    return [[source.randrange(64) for _ in range(length)] for length in lengths]


def make_rows(index: tuple[int, ...], prompt_lengths: tuple[int, ...] = (4, 11, 1, 7)) -> TokenRows:
    completions = random_tokens([3 + 2 * (row % 3) for row in range(len(index))], seed=1)
    return token_rows(random_tokens(list(prompt_lengths)), completions, index)


def plain_logprobs(model: Any, rows: TokenRows) -> mx.array:
    """Every row alone through the model, without padding or caches; zeros behind its end."""
    prompts, completions = cast(Any, rows.prompt_tokens.tolist()), cast(Any, rows.completion_tokens.tolist())
    width, out = rows.completion_tokens.shape[1], []
    for row, prompt in enumerate(rows.prompt_index):
        start, count = rows.prompt_lengths[prompt], rows.completion_lengths[row]
        tokens = mx.array(prompts[prompt][len(prompts[prompt]) - start :] + completions[row][:count])
        logits = model(tokens[None, :-1])[0, start - 1 :]
        chosen = mx.take_along_axis(logits, tokens[start:, None], axis=1)[:, 0] - mx.logsumexp(logits, axis=1)
        out.append(mx.pad(chosen, (0, width - count)))
    return mx.stack(out)


def gradients(model: nn.Module, rows: TokenRows, logprobs) -> tuple[dict[str, mx.array], mx.array]:
    # Unequal weights: a gradient that lands on the wrong row or column shows.
    weights = mx.random.normal(rows.completion_tokens.shape, key=mx.random.key(3)) * rows.completion_mask
    value, grads = nn.value_and_grad(model, lambda model: (logprobs(model, rows) * weights).sum())(model)
    return dict(cast(Any, tree_flatten(grads))), value


def assert_same_gradients(got: dict[str, mx.array], expected: dict[str, mx.array]) -> None:
    assert got.keys() == expected.keys()
    for name, grad in expected.items():
        difference = mx.linalg.norm((got[name] - grad).flatten()) / mx.linalg.norm(grad.flatten())
        assert float(difference) < 3e-5, name


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_a_shared_prompt_gives_the_logprobs_and_gradients_of_separate_rows(architecture, layout):
    model, rows = tiny_model(architecture), make_rows(LAYOUTS[layout])
    assert unshared_because(model) is None
    expected = np.array(plain_logprobs(model, rows))
    got = np.array(score(model, rows)[0] * rows.completion_mask)
    np.testing.assert_allclose(got, expected, atol=3e-5)
    grads, _ = gradients(model, rows, lambda model, rows: score(model, rows)[0])
    assert_same_gradients(grads, gradients(model, rows, plain_logprobs)[0])


@pytest.mark.parametrize("lengths", [(1, 1, 1, 1), (5, 5, 5, 5)], ids=["one token", "no padding"])
def test_prompts_of_equal_length_need_no_mask(lengths):
    model, rows = tiny_model(), make_rows(UNEVEN, lengths)
    got = np.array(score(model, rows)[0] * rows.completion_mask)
    np.testing.assert_allclose(got, np.array(plain_logprobs(model, rows)), atol=3e-5)


def test_a_sliding_window_runs_every_row_and_gives_the_same():
    model = tiny_model(layer_types=["sliding_attention", "full_attention"], sliding_window=4)
    rows = make_rows(UNEVEN)
    assert "RotatingKVCache" in (unshared_because(model) or "")
    got = np.array(score(model, rows)[0] * rows.completion_mask)
    np.testing.assert_allclose(got, np.array(plain_logprobs(model, rows)), atol=3e-5)
    grads, _ = gradients(model, rows, lambda model, rows: score(model, rows)[0])
    assert_same_gradients(grads, gradients(model, rows, plain_logprobs)[0])


def test_temperature_divides_the_logits_and_the_entropy_is_that_distributions():
    model, rows = tiny_model(), make_rows(UNEVEN)
    logprobs, entropy = score(model, rows, temperature=1.5, entropy=True)
    reference = nn.log_softmax(completion_logits(model, rows) / 1.5, axis=-1)
    chosen = mx.take_along_axis(reference, rows.completion_tokens[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(np.array(logprobs), np.array(chosen), atol=1e-5)
    assert entropy is not None
    np.testing.assert_allclose(np.array(entropy), -np.array((mx.exp(reference) * reference).sum(-1)), atol=1e-4)
    assert score(model, rows)[1] is None


@pytest.mark.parametrize("tied", [True, False])
def test_hidden_states_project_to_the_models_logits(tied):
    model, rows = tiny_model(tie_word_embeddings=tied), make_rows(UNEVEN)
    check_projection(model)
    hidden = completion_hidden(model, rows)
    assert hidden.shape == (*rows.completion_tokens.shape, 32)
    np.testing.assert_allclose(np.array(project(model, hidden)), np.array(completion_logits(model, rows)), atol=1e-5)


def test_a_model_that_caps_its_logits_is_named_rather_than_projected_wrongly():
    model = tiny_model("gemma2", final_logit_softcapping=1.0)
    with pytest.raises(ValueError, match="after the head"):
        check_projection(model)
    rows = make_rows(UNEVEN)
    assert "no mask for each row" in (unshared_because(model) or "")
    got = np.array(score(model, rows)[0] * rows.completion_mask)
    np.testing.assert_allclose(got, np.array(plain_logprobs(model, rows)), atol=3e-5)


def test_checkpointed_layers_give_the_same_gradients_through_the_prompts():
    rows, model, again = make_rows(UNEVEN), tiny_model(), tiny_model()
    checkpoint_layers(again)
    checkpoint_layers(again)
    expected, value = gradients(model, rows, lambda model, rows: score(model, rows)[0])
    got, same = gradients(again, rows, lambda model, rows: score(model, rows)[0])
    assert float(same) == pytest.approx(float(value), rel=1e-6)
    assert_same_gradients(got, expected)
    assert type(cast(Any, model).layers[0]).__name__ == "TransformerBlock"


def test_checkpointed_layers_hold_less():
    # Long enough that the layers outweigh the head.
    rows = token_rows(random_tokens([64]), random_tokens([96] * 4), (0, 0, 0, 0))

    def peak(model: nn.Module) -> int:
        mx.synchronize()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        mx.eval(gradients(model, rows, lambda model, rows: score(model, rows)[0]))
        return mx.get_peak_memory() - before

    plain, checkpointed = tiny_model(num_hidden_layers=6), tiny_model(num_hidden_layers=6)
    checkpoint_layers(checkpointed)
    assert peak(checkpointed) < 0.6 * peak(plain)
