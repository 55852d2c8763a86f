from typing import get_args

import pytest
from pydantic import BaseModel, ValidationError

from configs import schema
from configs.schema import (
    GRPO_PRESETS,
    DatasetConfig,
    EvaluationConfig,
    ExperimentConfig,
    GRPOConfig,
    PPOConfig,
    SamplingConfig,
)

JSONL = {"kind": "jsonl", "path": "x.jsonl"}
SMALL = {
    "name": "small",
    "dataset": {"name": "sums", "train": JSONL, "fields": {"target": "solution"}},
    "model": {"kind": "pretrained", "path": "./model"},
    "rewards": [{"name": "numeric_answer"}],
}


def refusal(section: type[BaseModel], /, **data: object) -> str:
    with pytest.raises(ValidationError) as caught:
        section.model_validate(data)
    return "\n".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in caught.value.errors())


def experiment(**changes: object) -> ExperimentConfig:
    return ExperimentConfig.model_validate({**SMALL, **changes})


def sections() -> list[type[BaseModel]]:
    return [value for value in vars(schema).values() if isinstance(value, type) and issubclass(value, BaseModel)]


@pytest.mark.parametrize("section", [s for s in sections() if s is not BaseModel], ids=lambda s: s.__name__)
def test_every_section_is_frozen_strict_and_finite(section):
    config = section.model_config
    assert (config.get("frozen"), config.get("extra"), config.get("allow_inf_nan")) == (True, "forbid", False)


def test_a_misspelt_key_a_nan_and_a_wrong_type_are_refused():
    assert "learning_rat: Extra inputs are not permitted" in refusal(GRPOConfig, learning_rat=1e-5)
    assert "learning_rate: Input should be a finite number" in refusal(GRPOConfig, learning_rate=float("nan"))
    assert "steps: Input should be a valid integer" in refusal(GRPOConfig, steps="many")
    assert "kl_coef: Input should be greater than or equal to 0" in refusal(GRPOConfig, kl_coef=-0.1)


@pytest.mark.parametrize("name", sorted(GRPO_PRESETS))
def test_every_preset_is_a_valid_configuration_that_the_file_overlays(name):
    preset = GRPOConfig.model_validate({"preset": name})
    assert {field: getattr(preset, field) for field in GRPO_PRESETS[name]} == GRPO_PRESETS[name]
    overlaid = GRPOConfig.model_validate({"preset": name, "group_size": 3, "aggregation": "dr_grpo"})
    assert (overlaid.group_size, overlaid.aggregation) == (3, "dr_grpo")


def test_an_unknown_preset_lists_those_there_are():
    assert "unknown 'grop'" in refusal(GRPOConfig, preset="grop")
    assert "'dapo'" in refusal(GRPOConfig, preset="grop")


def test_a_clip_range_that_could_never_act_is_refused():
    assert "the clip never acts" in refusal(GRPOConfig, clip_range=0.1)
    assert "the clip never acts" in refusal(GRPOConfig, clip_range_high=0.28)
    assert GRPOConfig(clip_range=0.1, minibatches=2).clip_range == 0.1
    assert GRPOConfig(clip_range=0.1, epochs=2).clip_range == 0.1
    assert "no effect with loss: reinforce" in refusal(GRPOConfig, loss="reinforce", clip_range=0.1)
    assert "no effect with loss: cispo" in refusal(GRPOConfig, loss="cispo", dual_clip=3.0)


def test_an_update_from_one_prompt_and_a_minibatch_without_a_group_are_refused():
    assert "an update from one prompt is noise" in refusal(GRPOConfig, prompts_per_step=1)
    assert "a minibatch holds whole groups" in refusal(GRPOConfig, prompts_per_step=4, minibatches=5)
    assert "group_size: Input should be greater than or equal to 2" in refusal(GRPOConfig, group_size=1)


@pytest.mark.parametrize("algorithm", [GRPOConfig, PPOConfig])
@pytest.mark.parametrize("truncation", [{"top_p": 0.9}, {"top_k": 50}, {"min_p": 0.1}])
def test_sampling_that_biases_the_logprobs_needs_an_importance_correction(algorithm, truncation):
    assert "set importance_correction" in refusal(algorithm, sampling=truncation)
    corrected = algorithm.model_validate({"sampling": truncation, "importance_correction": {}})
    assert corrected.sampling.truncates


def test_greedy_rollouts_are_refused_and_greedy_evaluation_is_not():
    assert "greedy" in refusal(GRPOConfig, sampling={"temperature": 0})
    assert EvaluationConfig(benchmark="gsm8k").sampling.temperature == 0
    assert not SamplingConfig(temperature=0).truncates


def test_a_hub_dataset_needs_a_pinned_revision_and_a_local_one_does_not():
    hub = {"kind": "huggingface", "path": "openai/gsm8k"}
    assert "pin a commit hash" in refusal(DatasetConfig, name="x", train=hub)
    pinned = DatasetConfig.model_validate({"name": "x", "train": {**hub, "revision": "e53f048"}})
    assert pinned.train.model_dump()["revision"] == "e53f048"
    for path in ("./data", "/data", "~/data"):
        DatasetConfig.model_validate({"name": "x", "train": {"kind": "huggingface", "path": path}})


def test_reinforcement_learning_needs_a_reward_that_counts():
    assert "at least one reward" in refusal(ExperimentConfig, **SMALL | {"rewards": [], "grpo": {}})
    metric = [{"name": "format", "weight": 0}]
    assert "at least one reward" in refusal(ExperimentConfig, **SMALL | {"rewards": metric, "ppo": {}})
    assert experiment(rewards=[], sft={}).grpo is None


def test_two_evaluations_of_one_name_are_refused_until_one_is_named():
    twice = [{"benchmark": "gsm8k"}, {"benchmark": "gsm8k", "samples": 4}]
    assert "set `name`" in refusal(ExperimentConfig, **SMALL | {"evaluations": twice})
    twice[1]["name"] = "gsm8k_maj4"
    assert [evaluation.key for evaluation in experiment(evaluations=twice).evaluations] == ["gsm8k", "gsm8k_maj4"]


def test_nightly_names_evaluations_and_a_time_zone_that_exist():
    evaluations = [{"benchmark": "gsm8k"}]
    nightly = {"benchmarks": ["humaneval"]}
    assert "['humaneval'] are not in" in refusal(
        ExperimentConfig, **SMALL | {"evaluations": evaluations, "nightly": nightly}
    )
    assert "Europe/Berlin" in refusal(ExperimentConfig, **SMALL | {"nightly": {"timezone": "Berlin"}})


def test_sft_needs_a_target_and_a_model_from_scratch_needs_sft():
    untargeted = {"dataset": {"name": "sums", "train": JSONL}, "sft": {}}
    assert "dataset.fields.target" in refusal(ExperimentConfig, **SMALL | untargeted)
    assert "from scratch" in refusal(ExperimentConfig, **SMALL | {"model": {"kind": "scratch"}})


def test_stages_are_the_base_and_what_is_configured():
    assert experiment().stages == ("base",)
    assert experiment(sft={}, ppo={}).stages == ("base", "sft", "ppo")


def test_a_prompt_template_holds_the_prompt_and_a_system_text_needs_the_chat():
    assert "must contain {prompt}" in refusal(schema.PromptConfig, template="Q:")
    assert "needs chat: true" in refusal(schema.PromptConfig, system="Be brief.", chat=False)


def test_heads_divide_the_width():
    assert "must divide" in refusal(schema.ScratchModel, hidden_size=100, num_attention_heads=3)
    assert "must divide" in refusal(schema.ScratchModel, num_attention_heads=4, num_key_value_heads=3)


def test_a_dumped_experiment_is_read_back_as_the_same():
    full = experiment(sft={}, grpo={"preset": "gspo"}, ppo={}, evaluations=[{"benchmark": "gsm8k"}], nightly={})
    assert ExperimentConfig.model_validate(full.model_dump(mode="json")) == full


@pytest.mark.parametrize("union", [schema.Source, schema.Model, schema.Adapter])
def test_alternatives_are_told_apart_by_kind(union):
    kinds = [get_args(member.model_fields["kind"].annotation) for member in get_args(get_args(union)[0])]
    flat = [kind for group in kinds for kind in group]
    assert len(flat) == len(set(flat)) > 1
