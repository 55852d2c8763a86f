import pytest

from configs.schema import GRPOConfig, PPOConfig, SFTConfig
from mlx_ops.checkpoint import tree_bytes
from mlx_ops.footprint import estimate, require_memory
from tests.mlx_ops.tiny import tiny_model

SETTINGS = {"vocab_size": 64, "hidden_size": 32}
GRPO = {"prompts_per_step": 2, "group_size": 3, "sampling": {"max_tokens": 10}, "max_prompt_tokens": 20}


def test_the_parts_are_what_the_settings_ask_for():
    model = tiny_model()
    weights = tree_bytes(model.parameters())
    found = estimate(model, SETTINGS, GRPOConfig.model_validate({**GRPO, "kl_coef": 0.1}), 1 << 30)
    assert (found.weights, found.optimizer, found.reference, found.critic) == (weights, 2 * weights, weights, 0)
    # 6 rows of 30 tokens; 2 layers x (keys and values) x 2 heads x 8 x 4 bytes.
    assert found.keys_and_values == 6 * 30 * 2 * 2 * 2 * 8 * 4
    critic = {**GRPO, "critic": {"kind": "separate"}}
    critic.pop("group_size")
    assert estimate(model, SETTINGS, PPOConfig.model_validate(critic), 1 << 30).critic == 5 * weights


def test_a_small_memory_gives_a_small_microbatch_and_a_smaller_one_is_refused_with_the_fields_to_change():
    model, config = tiny_model(), GRPOConfig.model_validate(GRPO)
    large, small = (estimate(model, SETTINGS, config, memory) for memory in (1 << 30, 2 << 20))
    assert small.token_budget < large.token_budget
    require_memory(large, config, 1 << 30, "grpo")
    with pytest.raises(ValueError, match=r"grpo: needs about .* of memory \(weights .*change .*grpo\.adapter"):
        require_memory(estimate(model, SETTINGS, config, 1 << 18), config, 1 << 18, "grpo")
    long = SFTConfig(max_length=100_000)
    with pytest.raises(ValueError, match=r"change sft\.max_length, or sft\.gradient_checkpointing"):
        require_memory(estimate(model, SETTINGS, long, 1 << 28), long, 1 << 28, "sft")
