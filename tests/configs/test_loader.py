import copy
import string
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.loader import EXPERIMENTS, changed_fields, digest, load_experiment, merge
from configs.schema import ExperimentConfig, GRPOConfig, PPOConfig, SFTConfig
from configs.strict_yaml import parse_yaml

SMALL = {
    "dataset": {"name": "sums", "train": {"kind": "jsonl", "path": "sums.jsonl"}, "fields": {"target": "solution"}},
    "model": {"kind": "pretrained", "path": "./model"},
    "sft": {"learning_rate": 1e-4, "adapter": {"kind": "lora", "rank": 4}},
    "grpo": {"preset": "dapo", "sampling": {"temperature": 0.9}},
    "rewards": [{"name": "numeric_answer"}, {"name": "format", "weight": 0.5, "options": {"tags": ["answer"]}}],
    "evaluations": [{"benchmark": "gsm8k", "limit": 5}],
    "nightly": {"timezone": "Europe/Berlin"},
}


def write(folder: Path, data: object, name: str = "small.yaml") -> Path:
    path = folder / name
    path.write_text(data if isinstance(data, str) else yaml.safe_dump(data), encoding="utf-8")
    return path


def refusal(folder: Path, data: object, *overrides: str) -> str:
    path = write(folder, data)
    with pytest.raises(ValueError) as caught:
        load_experiment(path, overrides)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    return message.removeprefix(f"{path}: ")


@pytest.mark.parametrize("path", sorted(EXPERIMENTS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_experiment_that_we_ship_loads_and_is_called_like_its_file(path):
    assert load_experiment(path).name == path.stem


def test_an_experiment_takes_its_name_from_its_file(tmp_path):
    assert load_experiment(write(tmp_path, SMALL, "my_run.yaml")).name == "my_run"


def test_a_file_extends_another_but_for_its_name(tmp_path):
    write(tmp_path, {**SMALL, "name": "parent"}, "parent.yaml")
    child = load_experiment(write(tmp_path, {"extends": "parent.yaml", "sft": {"adapter": {"rank": 2}}}, "child.yaml"))
    assert child.name == "child"
    assert child.sft is not None
    assert child.sft.adapter.model_dump()["rank"] == 2
    assert child.sft.learning_rate == 1e-4


@pytest.mark.parametrize("parent", ["", ".", "..", "../x.yaml", "/etc/passwd", 3, ["a.yaml"], {"a": 1}])
def test_extends_takes_the_name_of_a_file_beside_it_only(tmp_path, parent):
    assert refusal(tmp_path, {**SMALL, "extends": parent}).startswith("extends: expected the name of another file")


def test_a_circle_of_files_is_named(tmp_path):
    write(tmp_path, {"extends": "b.yaml"})
    b = write(tmp_path, {"extends": "small.yaml"}, "b.yaml")
    with pytest.raises(ValueError) as caught:
        load_experiment(tmp_path / "small.yaml")
    assert str(caught.value).startswith(f"{tmp_path / 'small.yaml'}: extends: ")
    assert str(caught.value).endswith(f"{b}: extends: small.yaml extends b.yaml extends small.yaml, which never ends")


def test_overrides_reach_into_lists_and_make_missing_sections(tmp_path):
    path = write(tmp_path, SMALL)
    loaded = load_experiment(path, ["rewards.1.weight=2", "ppo.gamma=0.5", "grpo.sampling.max_tokens=7", "seed=3"])
    assert loaded.rewards[1].weight == 2
    assert loaded.ppo is not None
    assert loaded.ppo.gamma == 0.5
    assert loaded.grpo is not None
    assert loaded.grpo.sampling.max_tokens == 7
    assert loaded.grpo.sampling.temperature == 0.9
    assert loaded.seed == 3


def test_an_override_of_one_place_leaves_an_alias_of_it_alone(tmp_path):
    text = yaml.safe_dump(SMALL) + "ppo:\n  optimizer: &o {weight_decay: 0.1}\n  critic:\n    optimizer: *o\n"
    loaded = load_experiment(write(tmp_path, text), ["ppo.optimizer.weight_decay=0.2"])
    assert loaded.ppo is not None
    assert loaded.ppo.optimizer.weight_decay == 0.2
    assert loaded.ppo.critic.optimizer.weight_decay == 0.1


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("sft.steps", "expected section.field=value"),
        ("=3", "expected section.field=value"),
        ("rewards.7.weight=1", "'7' has no place in [{"),
        ("rewards.²=1", "'²' has no place in [{"),
        ("seed.a=1", "'a' has no place in 0"),
        ("sft.steps=[1", "not readable as YAML"),
        ("sft.steps=.nan", "expected a finite number, got nan"),
    ],
)
def test_an_override_without_a_place_or_a_value_is_refused(tmp_path, override, said):
    assert said in refusal(tmp_path, {**SMALL, "seed": 0}, override)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("off", "off"),
        ("yes", "yes"),
        ("true", True),
        ("1e-6", 1e-6),
        ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"),
        ("010", "010"),
        ("20_000", 20000),
        ("-.5", -0.5),
        ("0x1F", 31),
        ("~", None),
        ("'7'", "7"),
        ("1.2.3", "1.2.3"),
    ],
)
def test_scalars_are_what_they_look_like(text, value):
    assert parse_yaml(text) == value
    assert type(parse_yaml(text)) is type(value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: 1\nb: 2\na: 3\n", "the key 'a' stands twice; at line 3"),
        ("a: {b: 1, b: 1}\n", "the key 'b' stands twice; at line 1"),
        ("a: [\n", "line 2"),
        ("a: .inf", "a: expected a finite number, got inf"),
        ("a:\n  - {b: .nan}\n", "a.0.b: expected a finite number, got nan"),
        ("a: &x [*x]", "more than 64 levels"),
        ("[" * 5000, "nested too deeply"),
        ("a: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
        ("a: !!timestamp 2024-01-01", "a: expected text, a number, a list or a mapping, got date"),
        ("a: !!int x", "line 1"),
        ("1: 2", "expected a name as key, got 1"),
        ('a: "\\ud800"', "half a surrogate pair"),
        ("- a\n- b\n", "expected a mapping of settings, got list"),
        ("", "expected a mapping of settings, got NoneType"),
    ],
)
def test_a_text_that_is_no_mapping_of_settings_is_refused_at_its_line_or_field(tmp_path, text, said):
    assert said in refusal(tmp_path, text)


def test_a_few_aliases_of_aliases_do_not_become_a_billion_values(tmp_path):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 10)]
    assert "100000 values" in refusal(tmp_path, "\n".join(lines))


def test_a_merge_key_may_be_overlaid():
    assert parse_yaml("a: &a {b: 1, c: 2}\nd:\n  <<: *a\n  b: 3\n")["d"] == {"b": 3, "c": 2}


def test_a_file_that_is_not_there_or_not_utf_8_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"gone\.yaml: no such file"):
        load_experiment(tmp_path / "gone.yaml")
    with pytest.raises(ValueError, match="no such file"):
        load_experiment(tmp_path)
    (tmp_path / "small.yaml").write_bytes(b"name: \xff\n")
    with pytest.raises(ValueError, match=r"small\.yaml: .*utf-8"):
        load_experiment(tmp_path / "small.yaml")


def test_a_refusal_has_one_line_for_each_fault_with_the_path_in_the_file(tmp_path):
    data = merge(
        SMALL,
        {
            "dataset": {"train": {"pth": "x"}, "held_out": 3},
            "sft": {"adapter": {"rank": 0}, "learning_rate": "fast"},
            "rewards": [{"nam": "x"}],
        },
    )
    del data["dataset"]["train"]["path"]
    head, *lines = refusal(tmp_path, data).split("\n")
    assert head == "7 setting(s) refused"
    assert [line.split(":")[0].strip() for line in lines] == [
        "dataset.train.path",
        "dataset.train.pth",
        "dataset.held_out",
        "sft.learning_rate",
        "sft.adapter.rank",
        "rewards.0.name",
        "rewards.0.nam",
    ]
    assert lines[1] == "  dataset.train.pth: unknown key (misspelt?) (got 'x')"
    assert lines[2] == "  dataset.held_out: Input should be less than or equal to 1 (got 3)"


def test_what_was_got_is_shown_short(tmp_path):
    assert len(refusal(tmp_path, {**SMALL, "seed": "x" * 10_000})) < 300


def test_a_digest_depends_on_the_values_and_not_on_their_order():
    assert digest({"a": 1, "b": [2, None]}) == digest({"b": (2, None), "a": 1})
    assert digest({"a": 1}) != digest({"a": 2})
    assert digest(SFTConfig(steps=7)) == digest({"x": SFTConfig(steps=7)}["x"]) != digest(SFTConfig(steps=8))
    assert digest("a", 1) != digest("a", 2)
    assert digest({"sft": SFTConfig()}) == digest({"sft": SFTConfig().model_dump(mode="json")})
    assert len(digest(None)) == 16


def test_a_changed_field_is_named_unless_it_may_change_on_resume():
    old = GRPOConfig(learning_rate=1e-5, steps=10).model_dump(mode="json")
    new = GRPOConfig.model_validate(
        {
            "learning_rate": 2e-5,
            "steps": 20,
            "checkpoint": {"save_every": 7, "best_metric": "reward"},
            "watchdog": {"stop": True, "patience": 3},
        }
    )
    assert changed_fields(old, new) == ["checkpoint.best_metric", "learning_rate", "watchdog.patience"]
    assert changed_fields(old, GRPOConfig(learning_rate=1e-5)) == []


def test_a_changed_field_within_an_optional_section_is_named_with_its_section():
    new = GRPOConfig.model_validate({"importance_correction": {"high": 2}})
    assert changed_fields(GRPOConfig().model_dump(mode="json"), new) == ["importance_correction"]
    assert changed_fields({}, PPOConfig()) != []


# ---- whatever the file says ----------------------------------------------------------------------------------------

LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
)


def places(data: object, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return [path, *(place for key, value in items for place in places(value, (*path, key)))]


@st.composite
def malformed(draw: st.DrawFn) -> bytes:
    """A good file with values replaced, keys added, bytes changed or its end missing; or no file of ours at all."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.binary(max_size=60) | st.text(alphabet=string.printable, max_size=60).map(str.encode))
    data = copy.deepcopy(SMALL)
    for _ in range(draw(st.integers(1, 3))):
        *parents, last = draw(st.sampled_from(places(data)[1:]))
        inside: object = data
        for key in parents:
            inside = inside[key]  # type: ignore[index]
        value = draw(VALUES)
        if isinstance(inside, dict) and draw(st.booleans()):
            inside[draw(st.text(alphabet="abcdeklmn_", max_size=6))] = value
        else:
            inside[last] = value  # type: ignore[index]
    text = yaml.safe_dump(data, allow_unicode=draw(st.booleans())).encode("utf-8", "surrogatepass")
    if draw(st.booleans()):
        start = draw(st.integers(0, len(text)))
        text = text[:start] + draw(st.binary(max_size=4)) + text[start + draw(st.sampled_from([0, 1, 2, 10_000])) :]
    return text


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(malformed())
def test_any_file_is_an_experiment_or_a_refusal_that_names_the_file_and_a_place_in_it(tmp_path_factory, text):
    path = tmp_path_factory.mktemp("configs") / "small.yaml"
    path.write_bytes(text)
    try:
        assert isinstance(load_experiment(path), ExperimentConfig)
    except ValueError as error:
        head, *places = str(error).split("\n")
        assert head.startswith(f"{path}: ")
        located = head.endswith("setting(s) refused") and all(": " in place for place in places)
        assert located or any(word in head for word in ("line", "expected", "position", "codec", "levels", "surrogate"))
