import gzip
import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.atomic import write_sealed
from configs.schema import DatasetConfig
from configs.strict_yaml import parse_yaml
from pipeline.data.preprocessing import overlapping
from pipeline.data.store import build_dataset, length_statistics, read_examples, read_summary
from rewards.base import Example

GSM8K = Path(__file__).parents[2] / ".." / "shared" / "data" / "gsm8k"
ROWS = [{"prompt": f"{n} + {n} = ?", "answer": str(2 * n), "level": n % 3, "é": "ü"} for n in range(60)]


def config_of(path, **settings):
    return DatasetConfig.model_validate({"name": "sums", "train": {"kind": "jsonl", "path": str(path)}, **settings})


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "source.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*ROWS, ROWS[3]]), encoding="utf-8")
    return path


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_a_dataset_comes_back_as_it_was_written(source, tmp_path):
    summary = build_dataset(config_of(source), tmp_path / "out" / "d")
    train, test = (read_examples(summary.path, split, summary.sha256) for split in ("train", "test"))
    assert (summary.train, summary.test, summary.rejected) == (len(train), len(test), 1)
    assert summary.train + summary.test == 60
    assert summary.reasons == {"duplicate": 1}
    (first,) = [row for row in [*train, *test] if row.prompt == "1 + 1 = ?"]
    assert first == Example(first.id, "1 + 1 = ?", answer="2", columns={"level": 1, "é": "ü"})
    assert overlapping(train, test) == []
    assert read_summary(summary.path) == summary
    assert summary.sources["train"]["rows"] == 61
    assert [row["prompt"] for row in summary.samples] == [row.prompt for row in train[:5]]
    (rejected,) = map(json.loads, (summary.path / "rejected.jsonl").read_text(encoding="utf-8").splitlines())
    assert (rejected["line"], rejected["reason"], rejected["excerpt"]) == (61, "duplicate", "3 + 3 = ?")


def test_a_chat_comes_back_as_messages(tmp_path):
    path = tmp_path / "chat.jsonl"
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    path.write_text(json.dumps({"messages": turns}), encoding="utf-8")
    summary = build_dataset(config_of(path, held_out=0, fields={"messages": "messages"}), tmp_path / "d")
    (row,) = read_examples(summary.path, "train")
    assert (row.messages, row.target) == ((turns[0],), "hello")
    assert read_examples(summary.path, "test") == []


def test_the_same_settings_give_the_same_bytes_and_replace_what_stood_there(source, tmp_path):
    first = build_dataset(config_of(source), tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "stale").touch()
    second = build_dataset(config_of(source), tmp_path / "b")
    assert contents(first.path) == contents(second.path)
    assert sorted(contents(second.path)) == ["manifest.json", "rejected.jsonl", "test.jsonl", "train.jsonl"]
    assert sorted(child.name for child in tmp_path.iterdir()) == ["a", "b", "source.jsonl"]


def test_tasks_that_depend_on_the_order_of_sets_give_the_same_bytes_too(tmp_path):
    names = ("ransom_note", "isomorphic_strings", "word_ladder", "polynomial_multiplication", "chain_sum")
    tasks = [{"name": name, "weight": 2 if name == "chain_sum" else 1} for name in names]
    config = {"name": "mix", "train": {"kind": "reasoning_gym", "size": 40, "seed": 3, "tasks": tasks}}
    # Each build makes its rows in a process of its own, whose order of sets would differ.
    first = build_dataset(DatasetConfig.model_validate(config), tmp_path / "a")
    build_dataset(DatasetConfig.model_validate(config), tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    made = [row.columns["task"] for split in ("train", "test") for row in read_examples(first.path, split)]
    # Two shares of six, of 40: about 13.
    assert set(made) == set(names)
    assert 6 <= made.count("chain_sum") <= 21


@pytest.mark.parametrize("name", ["train.jsonl", "manifest.json"])
@pytest.mark.parametrize("change", ["flip", "cut", "remove"])
def test_a_file_that_is_not_what_was_written_is_named(source, tmp_path, name, change):
    summary = build_dataset(config_of(source), tmp_path / "d")
    file = summary.path / name
    content = file.read_bytes()
    if change == "remove":
        file.unlink()
    else:
        file.write_bytes(content[:-1] if change == "cut" else content.replace(b"3", b"4", 1))
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        read_examples(summary.path, "train", summary.sha256)
    if name == "train.jsonl":
        assert len(read_examples(summary.path, "test", summary.sha256)) == summary.test


def test_a_dataset_that_was_built_anew_from_other_data_is_not_the_one_that_was_asked_for(source, tmp_path):
    old = build_dataset(config_of(source), tmp_path / "d")
    build_dataset(config_of(source, limit=3), tmp_path / "d")
    with pytest.raises(ValueError, match=r"manifest\.json: .*not the one of sha256"):
        read_examples(old.path, "train", old.sha256)
    assert len(read_examples(old.path, "train")) == 3


def test_a_folder_without_a_dataset_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"no readable manifest\.json"):
        read_examples(tmp_path, "train")
    (tmp_path / "manifest.json").write_text('{"files": {}}', encoding="utf-8")
    with pytest.raises(ValueError, match=r"manifest\.json: can't be read: no seal"):
        read_examples(tmp_path, "train")
    write_sealed(tmp_path / "manifest.json", {"files": {}})
    with pytest.raises(ValueError, match=r"manifest\.json: format None"):
        read_summary(tmp_path)
    with pytest.raises(ValueError, match=r"train\.jsonl: missing"):
        read_examples(tmp_path, "train")


def test_a_refused_dataset_leaves_the_old_one_and_nothing_beside_it(source, tmp_path):
    build_dataset(config_of(source), tmp_path / "d")
    before = contents(tmp_path / "d")
    source.write_text("{\n", encoding="utf-8")
    with pytest.raises(ValueError, match="1 of 1 rows can't be used"):
        build_dataset(config_of(source), tmp_path / "d")
    assert contents(tmp_path / "d") == before
    assert sorted(child.name for child in tmp_path.iterdir()) == ["d", "source.jsonl"]


def test_a_plugin_brings_its_loader(tmp_path):
    (tmp_path / "squares.py").write_text(
        "from pipeline.data.loaders import BaseLoader, LoaderRegistry, Record\n"
        "@LoaderRegistry.register('test_store_squares')\n"
        "class Squares(BaseLoader):\n"
        "    name = 'squares'\n"
        "    def rows(self):\n"
        "        return (Record({'prompt': f'{n} * {n}', 'answer': n * n}) for n in range(4))\n",
        encoding="utf-8",
    )
    config = DatasetConfig.model_validate(
        {"name": "squares", "train": {"kind": "plugin", "name": "test_store_squares"}, "held_out": 0}
    )
    summary = build_dataset(config, tmp_path / "d", plugins=["squares.py"], plugins_root=tmp_path)
    assert [row.answer for row in read_examples(summary.path, "train")] == ["0", "1", "4", "9"]


def test_lengths_are_counted_in_characters():
    texts = ["x" * n for n in range(1, 101)]
    assert length_statistics(texts) == {"min": 1, "mean": 50.5, "median": 50.5, "p95": 95, "max": 100}
    assert length_statistics(["é"]) == {"min": 1, "mean": 1.0, "median": 1, "p95": 1, "max": 1}


def test_gsm8k_is_read_whole(tmp_path):
    if not GSM8K.is_dir():
        pytest.skip(f"no copy of GSM8K at {GSM8K}")
    config = DatasetConfig.model_validate(
        {
            "name": "gsm8k",
            "train": {"kind": "jsonl", "path": str(GSM8K / "gsm8k_train.jsonl")},
            "test": {"kind": "jsonl", "path": str(GSM8K / "gsm8k_test.jsonl")},
            "fields": {"prompt": "question", "answer": "answer", "target": "answer"},
            "max_bad_rows": 0,
        }
    )
    summary = build_dataset(config, tmp_path / "d")
    assert (summary.train, summary.test, summary.rejected) == (7473, 1319, 0)


DOCS = Path(__file__).parents[2] / "docs" / "data.md"


def test_the_examples_of_the_documentation_are_what_they_say(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = DOCS.read_text(encoding="utf-8")
    settings = [parse_yaml(block)["dataset"] for block in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)]
    configs = [DatasetConfig.model_validate(one) for one in settings]
    assert [config.train.kind for config in configs] == ["jsonl", "huggingface", "reasoning_gym", "plugin"]
    source, train, rejected, refusal, *_ = re.findall(
        r"```\n(.*?)```", re.sub(r"```(yaml|python)\n.*?```", "", text, flags=re.DOTALL), re.DOTALL
    )
    (tmp_path / "questions.jsonl").write_text(source, encoding="utf-8")
    summary = build_dataset(configs[0], tmp_path / "out")
    assert (summary.path / "train.jsonl").read_text(encoding="utf-8") == train
    assert (summary.path / "rejected.jsonl").read_text(encoding="utf-8") == rejected
    with pytest.raises(ValueError) as caught:
        build_dataset(configs[0].model_copy(update={"max_bad_rows": 0.01}), tmp_path / "out")
    assert f"{caught.value}\n" == refusal
    (code,) = re.findall(r"```python\n(from pipeline\.data\.loaders.*?)```", text, re.DOTALL)
    (tmp_path / "my_loaders.py").write_text(code, encoding="utf-8")
    assert build_dataset(configs[3], tmp_path / "mine", plugins=["my_loaders.py"]).sources["train"]["rows"] == 100


# ---- whatever the file holds ---------------------------------------------------------------------------------------

TEXT = st.text(max_size=12) | st.sampled_from(["1 + 1", " 1 + 1\n", "\ud800", "x" * 99])
VALUE = TEXT | st.none() | st.integers() | st.floats() | st.lists(st.integers(), max_size=2) | st.booleans()
ROW = st.dictionaries(st.sampled_from(["prompt", "answer", "target", "id", "é", "prompts"]), VALUE, max_size=5)
GOOD = st.builds(lambda n: json.dumps({"prompt": f"{n} + 1", "answer": str(n)}).encode(), st.integers(0, 10**6))
ANY = ROW.map(lambda row: json.dumps(row).encode()) | st.binary(max_size=20)


@st.composite
def files(draw):
    lines = draw(st.lists(GOOD | GOOD | ANY, max_size=12))
    content = draw(st.sampled_from([b"\n", b"\r\n"])).join(lines) + draw(st.sampled_from([b"", b"\n"]))
    if draw(st.booleans()) and content:
        start = draw(st.integers(0, len(content) - 1))
        content = content[:start] + draw(st.binary(max_size=3)) + content[start + draw(st.sampled_from([1, 9, 9999])) :]
    return content


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(
    files(),
    st.sampled_from(["a.jsonl", "a.jsonl.gz"]),
    st.integers(0, 30),
    st.fixed_dictionaries(
        {"held_out": st.sampled_from([0, 0.1, 0.5, 1])},
        optional={
            "max_bad_rows": st.sampled_from([0, 0.3, 1]),
            "deduplicate": st.booleans(),
            "limit": st.integers(1, 5),
            "max_prompt_chars": st.sampled_from([5, 100]),
            "fields": st.sampled_from([{"answer": "answer"}, {"prompt": "é"}, {"id": "id"}, {"messages": "prompt"}]),
        },
    ),
)
def test_any_file_is_a_whole_dataset_or_a_refusal_that_names_it(tmp_path_factory, content, name, cut, changes):
    folder = tmp_path_factory.mktemp("data")
    path = folder / name
    packed = gzip.compress(content, mtime=0) if path.suffix == ".gz" else content
    path.write_bytes(packed[: len(packed) - cut] if path.suffix == ".gz" else packed)
    refused, summary = "", None
    try:
        summary = build_dataset(config_of(path, **changes), folder / "d")
    except ValueError as error:
        refused = str(error)
    if summary is None:
        assert refused.startswith("dataset 'sums': ")
        assert str(path) in refused or "held_out" in refused
        assert "can't be used" not in refused or "\n  line " in refused
        assert [child.name for child in folder.iterdir()] == [name]
        return
    train, test = (read_examples(folder / "d", split, summary.sha256) for split in ("train", "test"))
    assert (len(train), len(test)) == (summary.train, summary.test)
    assert overlapping(train, test) == []
    ids = [row.id for row in [*train, *test]]
    assert len(set(ids)) == len(ids)
    assert all(row.prompt for row in train)
    assert sorted(child.name for child in folder.iterdir()) == [name, "d"]
