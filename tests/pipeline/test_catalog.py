import pytest

from pipeline.catalog import load_catalog, split_overrides


def test_every_yaml_of_the_folder_is_an_experiment(write_experiment):
    folder = write_experiment("one").parent
    write_experiment("two")
    assert [entry.experiment.name for entry in load_catalog(folder)] == ["one", "two"]


def test_an_override_reaches_its_experiment_alone(write_experiment):
    folder = write_experiment("one").parent
    write_experiment("two")
    one, two = load_catalog(folder, ["two:grpo.steps=9"])
    assert one.experiment.grpo is not None
    assert two.experiment.grpo is not None
    assert (one.experiment.grpo.steps, two.experiment.grpo.steps) == (3, 9)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("three:grpo.steps=9", r"no experiment 'three'; there are \['one', 'two'\]"),
        ("grpo.steps=9", "expected experiment:section.field=value"),
        ("grpo.steps=one:9", "expected experiment:section.field=value"),
    ],
    ids=["an unknown experiment", "none named", "a colon in the value only"],
)
def test_an_override_must_name_an_experiment(override, message):
    with pytest.raises(ValueError, match=message):
        split_overrides([override], ["one", "two"])


def test_an_empty_folder_is_named(tmp_path):
    with pytest.raises(ValueError, match="no experiments"):
        load_catalog(tmp_path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"grpo": {"stepz": 3}}, ["bad.yaml", "grpo.stepz", "unknown key"]),
        ({"grpo": {"steps": "many"}}, ["bad.yaml", "grpo.steps", "'many'"]),
        ({"grpo": {"learning_rate": float("nan")}}, ["bad.yaml", "grpo.learning_rate", "finite"]),
        ({"rewards": [{"name": "numeric_anser"}]}, ["bad.yaml", "rewards.0.name", "numeric_anser", "numeric_answer"]),
        ({"rewards": [{"name": "numeric_answer", "options": {"mood": 1}}]}, ["bad.yaml", "rewards.0.options", "mood"]),
        ({"plugins": ["./absent.py"]}, ["bad.yaml", "plugins", "./absent.py", "no such file"]),
        ({"evaluations": [{"benchmark": "gsm9k"}]}, ["bad.yaml", "evaluations.0", "gsm9k", "held_out"]),
        ({"name": "good"}, ["bad.yaml", "name", "the file's stem"]),
    ],
    ids=["misspelt", "type", "nan", "reward", "option", "plugin", "benchmark", "name"],
)
def test_a_refused_file_is_named_with_the_field(write_experiment, changes, words):
    write_experiment("good")
    folder = write_experiment("bad", **changes).parent
    with pytest.raises(ValueError) as error:
        load_catalog(folder)
    assert [word for word in words if word not in str(error.value)] == []


def test_every_refused_file_is_named(write_experiment):
    folder = write_experiment("one", grpo={"stepz": 1}).parent
    write_experiment("two", sft={"stepz": 1})
    with pytest.raises(ValueError, match=r"one\.yaml[\s\S]*grpo\.stepz[\s\S]*two\.yaml[\s\S]*sft\.stepz"):
        load_catalog(folder)


def test_a_plugin_that_fails_to_import_is_named_with_its_fault(write_experiment):
    path = write_experiment("bad", plugins=["./broken.py"])
    path.with_name("broken.py").write_text("import nothing_of_that_name\n")
    with pytest.raises(ValueError, match=r"bad\.yaml: plugins: plugin '\./broken\.py'.*nothing_of_that_name"):
        load_catalog(path.parent)


def test_a_reward_in_a_file_beside_the_experiment_is_found(write_experiment):
    path = write_experiment("own", plugins=["./own_reward.py"], rewards=[{"name": "shortness"}])
    path.with_name("own_reward.py").write_text(
        "from rewards.base import BaseReward, RewardRegistry\n\n"
        "@RewardRegistry.register('shortness')\n"
        "class Shortness(BaseReward):\n"
        "    def __call__(self, prompts, completions, **columns):\n"
        "        return [-len(c) / 1000 for c in completions]\n"
    )
    (entry,) = load_catalog(path.parent)
    assert entry.experiment.rewards[0].name == "shortness"


def test_two_experiments_may_share_a_dataset_only_if_they_agree_on_it(write_experiment):
    folder = write_experiment("one").parent
    write_experiment("two", dataset={"held_out": 0.3, "limit": 5})
    with pytest.raises(ValueError, match=r"one\.yaml and .*two\.yaml.*'sums'.*dataset\.held_out, dataset\.limit"):
        load_catalog(folder)


@pytest.mark.parametrize("name", ["leaderboard", "dataset", "assets"])
def test_names_of_other_things_are_refused(write_experiment, name):
    with pytest.raises(ValueError, match=f"an experiment can't be called '{name}'"):
        load_catalog(write_experiment(name).parent)
