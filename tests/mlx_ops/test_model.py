import json

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest

from configs.schema import LoraAdapter, PromptConfig, ScratchModel
from mlx_ops.model import (
    add_adapter,
    copy_model,
    finite,
    fuse_adapters,
    load_adapter,
    load_policy,
    make_scratch,
    write_adapter,
    write_model,
)
from mlx_ops.prompts import completion_text, prompt_tokens, target_tokens
from rewards.base import Example
from tests.mlx_ops.tiny import leaves

TEXTS = [f"{a} + {b} =\n#### {a + b}" for a in range(20) for b in range(20)]


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    make_scratch(
        ScratchModel(vocab_size=280, hidden_size=32, intermediate_size=64, num_hidden_layers=2), TEXTS, folder, 0
    )
    return folder


def logits(model):
    return np.array(model(mx.array([[5, 9, 30, 7]])))


def test_a_model_from_scratch_loads_in_mlx_lm_and_round_trips_text(scratch):
    model, tokenizer = mlx_lm.load(str(scratch))[:2]
    assert logits(model).shape[-1] == len(tokenizer.vocab)
    assert tokenizer.decode(tokenizer.encode("12 + 3 =\n#### 15")) == "12 + 3 =\n#### 15"
    assert tokenizer.eos_token_id in load_policy(scratch).eos
    twelve = tokenizer.encode("12", add_special_tokens=False)
    assert len(twelve) == 2, "digits are single tokens"


def test_a_model_from_scratch_gives_the_same_logits_in_transformers(scratch):
    torch = pytest.importorskip("torch", reason="transformers computes with torch, which is not installed")
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(scratch)(torch.tensor([[5, 9, 30, 7]])).logits
    np.testing.assert_allclose(theirs.detach().numpy(), logits(load_policy(scratch).model), atol=1e-3)


def test_the_same_seed_makes_the_same_model(scratch, tmp_path):
    config = ScratchModel(vocab_size=280, hidden_size=32, intermediate_size=64, num_hidden_layers=2)
    make_scratch(config, TEXTS, tmp_path, 0)
    assert (tmp_path / "model.safetensors").read_bytes() == (scratch / "model.safetensors").read_bytes()
    assert (tmp_path / "tokenizer.json").read_bytes() == (scratch / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_an_adapter_is_written_read_and_fused_without_changing_the_function(scratch, tmp_path, kind):
    adapter = LoraAdapter(kind=kind, rank=4)
    policy = load_policy(scratch)
    before = logits(policy.model)
    add_adapter(policy.model, adapter, seed=0)
    np.testing.assert_allclose(logits(policy.model), before, atol=1e-5)
    names = {name.rsplit(".", 1)[-1] for name, _ in leaves(policy.model.trainable_parameters())}
    assert names == ({"lora_a", "lora_b"} if kind == "lora" else {"lora_a", "lora_b", "m"})
    shifted = [(n, a + 0.05) for n, a in leaves(policy.model.trainable_parameters())]
    policy.model.load_weights(shifted, strict=False)
    trained = logits(policy.model)
    assert np.abs(trained - before).max() > 1e-3
    write_adapter(policy.model, adapter, tmp_path / "adapter")
    np.testing.assert_allclose(logits(mlx_lm.load(str(scratch), adapter_path=str(tmp_path / "adapter"))[0]), trained)
    again = load_policy(scratch)
    add_adapter(again.model, adapter, seed=1)
    load_adapter(again.model, tmp_path / "adapter")
    fuse_adapters(again.model)
    write_model(again.model, scratch, tmp_path / "fused")
    np.testing.assert_allclose(logits(mlx_lm.load(str(tmp_path / "fused"))[0]), trained, atol=1e-5)


def test_qlora_trains_over_quantised_weights_and_fuses_without_requantising(scratch, tmp_path):
    mlx_lm.convert(str(scratch), str(tmp_path / "q"), quantize=True, q_bits=4, q_group_size=32)
    policy = load_policy(tmp_path / "q")
    add_adapter(policy.model, LoraAdapter(rank=4), seed=0)
    shifted = [(n, a + 1e-3) for n, a in leaves(policy.model.trainable_parameters())]
    policy.model.load_weights(shifted, strict=False)
    trained = logits(policy.model)
    fuse_adapters(policy.model)
    write_model(policy.model, tmp_path / "q", tmp_path / "fused")
    np.testing.assert_allclose(logits(load_policy(tmp_path / "fused").model), trained, atol=1e-4)


def test_an_adapter_for_another_rank_is_refused(scratch, tmp_path):
    policy, other = load_policy(scratch), load_policy(scratch)
    add_adapter(policy.model, LoraAdapter(rank=4), seed=0)
    add_adapter(other.model, LoraAdapter(rank=8), seed=0)
    write_adapter(policy.model, LoraAdapter(rank=4), tmp_path / "adapter")
    with pytest.raises(ValueError, match="doesn't fit the model"):
        load_adapter(other.model, tmp_path / "adapter")


@pytest.mark.parametrize(
    ("adapter", "words"),
    [(LoraAdapter(layers=9), "9 of a model with 2"), (LoraAdapter(keys=("nowhere",)), "name no linear layer")],
)
def test_adapter_settings_that_name_nothing_are_refused(scratch, adapter, words):
    with pytest.raises(ValueError, match=words):
        add_adapter(load_policy(scratch).model, adapter, seed=0)


def test_missing_and_unknown_models_say_so(scratch, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        load_policy(tmp_path)
    copy_model(scratch, tmp_path / "odd")
    settings = json.loads((tmp_path / "odd" / "config.json").read_text())
    (tmp_path / "odd" / "config.json").unlink()
    (tmp_path / "odd" / "config.json").write_text(json.dumps(settings | {"model_type": "abacus"}))
    with pytest.raises(ValueError, match="abacus"):
        load_policy(tmp_path / "odd")


def test_nan_weights_are_seen(scratch):
    policy = load_policy(scratch)
    assert finite(policy.model)
    broken = [(name, array * float("nan")) for name, array in leaves(policy.model.parameters())[:1]]
    policy.model.load_weights(broken, strict=False)
    assert not finite(policy.model)


def test_prompts_and_targets_become_tokens_once(scratch):
    tokenizer = load_policy(scratch).tokenizer
    example = Example("a", "2 + 3 =")
    plain = prompt_tokens(example, PromptConfig(chat=False, template="Q: {prompt}\n"), tokenizer)
    assert tokenizer.decode(plain) == "Q: 2 + 3 =\n"
    chat = prompt_tokens(example, PromptConfig(system="Add."), tokenizer)
    assert tokenizer.decode(chat) == "system: Add.\nuser: 2 + 3 =\nassistant: "
    target = target_tokens("#### 5", tokenizer)
    assert target[-1] == tokenizer.eos_token_id
    assert completion_text(tuple(target), tokenizer, frozenset({tokenizer.eos_token_id})) == "#### 5"


def test_a_prompt_without_tokens_is_refused(scratch):
    with pytest.raises(ValueError, match="'a': its prompt has no tokens"):
        prompt_tokens(Example("a", ""), PromptConfig(chat=False), load_policy(scratch).tokenizer)
