import dagster as dg
import pytest
from dagster._config import process_config

from configs.loader import load_experiment
from configs.schema import ExperimentConfig
from pipeline.catalog import Entry
from pipeline.launchpad import config_mapping, overridden, section_fields


@pytest.fixture
def entry(write_experiment):
    path = write_experiment(grpo={"adapter": {"kind": "lora"}}, ppo={"steps": 2})
    return Entry(load_experiment(path), path)


def resolve(entry: Entry, stage: str, settings: dict) -> tuple[dict, list[str]]:
    """What Dagster makes of settings that somebody typed: defaults filled in, and the errors."""
    result = process_config(dg.Shape(section_fields(getattr(entry.experiment, stage))), settings)
    return dict(result.value or {}), [error.message for error in result.errors or ()]


@pytest.mark.parametrize("stage", ["sft", "grpo", "ppo"])
def test_an_untouched_launchpad_means_the_file(entry, stage):
    settings, _ = resolve(entry, stage, {})
    assert settings["steps"] == getattr(entry.experiment, stage).steps
    assert overridden(entry, stage, settings) == entry.experiment


@pytest.mark.parametrize("stage", ["sft", "grpo", "ppo"])
def test_every_setting_of_a_section_is_in_the_launchpad(entry, stage):
    section = getattr(entry.experiment, stage)
    fixed = {"algorithm"} | ({"adapter"} if section.adapter.kind == "full" else set())
    assert set(section_fields(section)) == set(type(section).model_fields) - fixed


def test_what_is_changed_at_launch_reaches_the_experiment_and_nothing_else_does(entry):
    settings = {"learning_rate": 0.25, "sampling": {"max_tokens": 3}, "adapter": {"rank": 4}}
    changed = overridden(entry, "grpo", resolve(entry, "grpo", settings)[0])
    assert changed.grpo is not None
    assert (changed.grpo.learning_rate, changed.grpo.sampling.max_tokens) == (0.25, 3)
    assert changed.grpo.adapter.model_dump()["rank"] == 4
    back = {"learning_rate": 0.001, "sampling": {"max_tokens": 8}, "adapter": {"rank": 16}}
    grpo = changed.model_dump(mode="json")["grpo"] | {"learning_rate": 0.001}
    grpo["sampling"]["max_tokens"], grpo["adapter"]["rank"] = 8, back["adapter"]["rank"]
    assert entry.experiment.grpo is not None
    assert grpo == entry.experiment.grpo.model_dump(mode="json")


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"stepz": 3}, "stepz"),
        ({"steps": "many"}, "steps"),
        ({"sampling": {"temprature": 1.0}}, "temprature"),
        ({"loss": "clop"}, "loss"),
    ],
    ids=["a typo", "a type", "a typo in a part", "an unknown choice"],
)
def test_dagster_refuses_names_and_types(entry, settings, field):
    _, errors = resolve(entry, "grpo", settings)
    assert len(errors) == 1
    assert field in errors[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rate": float("nan")}, r"grpo\.learning_rate: .*finite"),
        ({"learning_rate": -1.0}, r"grpo\.learning_rate: .*greater than 0"),
        ({"sampling": {"top_p": 0.5}}, "importance_correction"),
        ({"clip_range": 0.1}, "clip_range: with epochs: 1 and minibatches: 1"),
        ({"importance_correction": {"high": -2.0}}, r"grpo\.importance_correction\.high"),
    ],
    ids=["nan", "range", "a rule across fields", "a setting without effect", "in an optional part"],
)
def test_the_schema_refuses_values_by_name(entry, settings, message):
    resolved, errors = resolve(entry, "grpo", settings)
    assert errors == []
    with pytest.raises(dg.DagsterInvalidConfigError, match=message):
        overridden(entry, "grpo", resolved)


def test_the_op_gets_the_whole_experiment_as_it_was_at_launch(entry):
    mapping = config_mapping(entry, "grpo")
    config = mapping.config_fn(resolve(entry, "grpo", {"steps": 7})[0])["train"]["config"]
    experiment = ExperimentConfig.model_validate_json(config["experiment"])
    assert experiment.grpo is not None
    assert experiment.grpo.steps == 7
    assert (config["stage"], config["source"]) == ("grpo", str(entry.source))
