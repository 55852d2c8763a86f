import json
import unicodedata

import pytest

from configs.atomic import sha256
from configs.schema import DatasetConfig, FieldsConfig, JsonlSource, ReasoningGymSource
from pipeline.data.examples import SetAside, clean, columns_of, prompt_key, read_example
from pipeline.data.loaders import BaseLoader, LoaderRegistry, Record
from pipeline.data.preprocessing import overlapping, prepare, unique_ids
from rewards.base import Example


@pytest.fixture
def dataset(tmp_path, monkeypatch):
    """Prepares a dataset out of rows that are written to train.jsonl, and to test.jsonl where there are any."""
    monkeypatch.chdir(tmp_path)

    def source(split, rows):
        if rows is None or isinstance(rows, dict):
            return rows
        text = "".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{split}.jsonl").write_text(text, encoding="utf-8")
        return {"kind": "jsonl", "path": f"{split}.jsonl"}

    def make(train, test=None, **settings):
        sources = {"train": source("train", train), "test": source("test", test)}
        return prepare(DatasetConfig.model_validate({"name": "sums", "held_out": 0, **sources, **settings}))

    return make


def example(values, limit=1000, kind="jsonl", **fields):
    source = JsonlSource(path="x") if kind == "jsonl" else ReasoningGymSource.model_validate({"tasks": [{"name": "x"}]})
    return read_example(values, columns_of(FieldsConfig(**fields), source), limit)


# ---- text ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  a \t\n", "a"),
        ("a\r\nb\rc\u2028d\x0ce\x85f", "a\nb\nc\nd\ne\nf"),
        ("a\x00b\x1bc\x7fd\x9fe\ufefff", "abcdef"),
        ("e\u0301", "\u00e9"),
        ("a\tb  c", "a\tb  c"),
        ("x² ﬁ １", "x² ﬁ １"),
        ("👩‍👩‍👧", "👩‍👩‍👧"),
    ],
    ids=ascii,
)
def test_cleaning_leaves_what_a_text_says(text, expected):
    assert clean(text) == expected
    assert clean(clean(text)) == clean(text)
    assert unicodedata.is_normalized("NFC", clean(text))


def test_a_target_keeps_the_indentation_of_its_first_line():
    made = example({"prompt": " def f():", "target": "\n    return 1\r\n\n"}, target="target")
    assert (made.prompt, made.target) == ("def f():", "    return 1")


def test_prompts_are_the_same_but_for_white_space_and_nothing_else():
    key = prompt_key(Example("a", "1 + 1\n=  ?"))
    assert key == prompt_key(Example("b", "1 + 1 = ?", answer="2"))
    assert key != prompt_key(Example("c", "1 + 1 = "))
    assert prompt_key(Example("c", "Caesar: ABC")) != prompt_key(Example("c", "Caesar: abc"))


# ---- one row -------------------------------------------------------------------------------------------------------


def test_a_row_becomes_an_example_with_its_other_columns():
    values = {"q": " 1 + 1 ", "sol": "2!", "gold": 2, "level": 3, "tags": ["a"], "nr": 7}
    made = example(values, prompt="q", target="sol", answer="gold", id="nr")
    assert made == Example("7", "1 + 1", None, "2!", "2", {"level": 3, "tags": ["a"]})


def test_answer_and_target_default_to_the_columns_of_these_names():
    made = example({"prompt": "p", "answer": " 2 ", "target": "t"})
    assert (made.answer, made.target, made.columns) == ("2", "t", {})
    bare = example({"prompt": "p", "answer": ["a", "list"]})
    assert (bare.answer, bare.target, bare.columns) == (None, None, {"source_answer": ["a", "list"]})


def test_a_column_never_hides_what_a_reward_is_handed():
    made = example({"prompt": "p", "id": 3, "truncated": True, "prompts": 1, "task": "t"})
    assert made.columns == {"source_id": 3, "source_truncated": True, "source_prompts": 1, "task": "t"}
    assert made.id == prompt_key(made)[:16]


def test_one_column_may_be_target_and_answer():
    made = example({"question": "p", "answer": "4\n#### 4"}, prompt="question", target="answer", answer="answer")
    assert made.target == made.answer == "4\n#### 4"


def test_a_generated_row_needs_no_fields():
    made = example({"question": "q", "answer": "1", "target": "s", "expression": "1"}, kind="reasoning_gym")
    assert (made.prompt, made.answer, made.target, made.columns) == ("q", "1", "s", {"expression": "1"})
    chosen = example(
        {"question": "q", "expression": "1 + 0", "answer": None}, kind="reasoning_gym", prompt="expression"
    )
    assert (chosen.prompt, chosen.answer) == ("1 + 0", None)


TURNS = [{"role": "system", "content": "s "}, {"role": "user", "content": "u\r\n"}]


def test_a_chat_is_the_prompt_and_its_last_user_turn_the_text():
    made = example({"messages": [*TURNS, {"role": "assistant", "content": " a", "tool": None}]}, messages="messages")
    assert made.messages == ({"role": "system", "content": "s"}, {"role": "user", "content": "u"})
    assert (made.prompt, made.target, made.columns) == ("u", "a", {})
    assert example({"messages": TURNS, "t": "x"}, messages="messages", target="t").target == "x"


@pytest.mark.parametrize(
    ("values", "fields", "reason", "said"),
    [
        ({"question": "x"}, {}, "prompt missing", "no column 'prompt'; there are ['question']"),
        ({"prompt": None}, {}, "prompt missing", "no column"),
        ({"prompt": 3}, {}, "prompt not text", "holds 3"),
        ({"prompt": ["x"]}, {}, "prompt not text", "holds ['x']"),
        ({"prompt": " \x00\n"}, {}, "prompt empty", "'prompt'"),
        ({"prompt": "x" * 1001}, {}, "too long", "1001 characters; max_prompt_chars is 1000"),
        ({"prompt": "p"}, {"answer": "gold"}, "no answer", "'gold' holds None; there are ['prompt']"),
        ({"prompt": "p", "gold": " "}, {"answer": "gold"}, "no answer", "'gold'"),
        ({"prompt": "p", "gold": [1]}, {"answer": "gold"}, "no answer", "[1]"),
        ({"prompt": "p", "t": ""}, {"target": "t"}, "no target", "'t'"),
        ({"prompt": "p", "k": None}, {"id": "k"}, "no id", "'k' holds None"),
        ({"prompt": "p", "x": {"y": float("inf")}}, {}, "value not JSON", "x.y: inf"),
        ({"prompt": "\ud800"}, {}, "value not JSON", "half a surrogate pair"),
        ({"m": "hello"}, {"messages": "m"}, "prompt missing", "no list of messages"),
        ({"m": []}, {"messages": "m"}, "prompt empty", "no message to answer"),
        ({"m": [{"role": "user"}]}, {"messages": "m"}, "prompt not text", "m.0: expected role and content"),
        ({"m": [{"role": "user", "content": [1]}]}, {"messages": "m"}, "prompt not text", "m.0"),
        ({"m": [{"role": "assistant", "content": "a"}]}, {"messages": "m"}, "prompt empty", "no message to answer"),
        (
            {"m": [*TURNS, {"role": "assistant", "content": "a"}], "t": "b"},
            {"messages": "m", "target": "t"},
            "two targets",
            "ends with the assistant",
        ),
        ({"m": [{"role": "user", "content": "x" * 600}] * 2}, {"messages": "m"}, "too long", "1200 characters"),
    ],
)
def test_a_row_that_cannot_be_used_says_why(values, fields, reason, said):
    with pytest.raises(SetAside) as caught:
        example(values, **fields)
    assert caught.value.reason == reason
    assert said in caught.value.detail


# ---- the whole dataset ---------------------------------------------------------------------------------------------


def prompts(examples):
    return [made.prompt for made in examples]


def test_the_first_of_equal_prompts_is_kept_and_the_others_name_it(dataset):
    made = dataset([{"prompt": "a", "answer": "1"}, {"prompt": "b"}, {"prompt": " a\n", "answer": "2"}])
    assert [(x.prompt, x.answer) for x in made.train] == [("a", "1"), ("b", None)]
    (row,) = made.rejected
    assert (row.file, row.line, row.reason, row.detail) == (
        "train.jsonl",
        3,
        "duplicate",
        "same prompt as train.jsonl:1",
    )
    assert made.reasons == {"duplicate": 1}


def test_no_question_of_the_test_set_is_trained_on_whatever_is_deduplicated(dataset):
    train = [{"prompt": "a"}, {"prompt": "b"}, {"prompt": "b"}, {"prompt": "c"}]
    for deduplicate in (True, False):
        made = dataset(train, [{"prompt": "b "}, {"prompt": "d"}], deduplicate=deduplicate)
        assert prompts(made.train) == ["a", "c"]
        assert prompts(made.test) == ["b", "d"]
        assert made.reasons["duplicate of a test question"] == (1 if deduplicate else 2)
        assert overlapping(made.train, made.test) == []
    assert overlapping([Example("x", "b  b")], [Example("y", "b b")]) == ["x"]


def test_duplicates_may_be_kept_and_get_ids_of_their_own(dataset):
    made = dataset([{"prompt": "a", "nr": 1}] * 3, deduplicate=False, fields={"id": "nr"})
    assert [x.id for x in made.train] == ["1", "1-2", "1-3"]


def test_ids_are_unique_even_where_the_numbered_one_is_taken():
    rows = [Example(name, "p") for name in ("a", "a-2", "a", "b", "a", "a-2")]
    assert [x.id for x in unique_ids(rows)] == ["a", "a-2", "a-3", "b", "a-4", "a-2-2"]


def test_a_question_stays_on_its_side_when_others_come_and_go(dataset):
    rows = [{"prompt": f"{n} + {n}"} for n in range(400)]
    whole, part = dataset(rows, held_out=0.25), dataset(rows[::-2], held_out=0.25)
    assert set(prompts(part.test)) == set(prompts(whole.test)) & set(prompts([*part.train, *part.test]))
    # Four standard deviations of a binomial of 400 draws at 1/4 are 35.
    assert abs(len(whole.test) - 100) < 35
    assert set(prompts(whole.test)) < set(prompts(dataset(rows, held_out=0.5).test))
    # By sha256, not by Python's hash: these in every process.
    assert prompts(whole.test)[:4] == ["13 + 13", "17 + 17", "18 + 18", "20 + 20"]


def test_the_limit_keeps_the_first_of_each_split(dataset):
    made = dataset([{"prompt": c} for c in "abcdef"], [{"prompt": c} for c in "wxyz"], limit=3)
    assert (prompts(made.train), prompts(made.test)) == (["a", "b", "c"], ["w", "x", "y"])


def test_too_many_bad_rows_refuse_the_file_with_the_first_of_them(dataset):
    rows = [{"prompt": f"p{n}"} for n in range(96)] + ['{"prompt": \n', {"prompt": ""}, {"q": 1}, {"prompt": ""}]
    assert dataset(rows, max_bad_rows=0.04).reasons == {"malformed JSON": 1, "prompt empty": 2, "prompt missing": 1}
    with pytest.raises(ValueError) as caught:
        dataset(rows, max_bad_rows=0.03)
    head, *lines = str(caught.value).split("\n")
    assert head.startswith("dataset 'sums': train: train.jsonl: 4 of 100 rows can't be used (2 prompt empty, ")
    assert head.endswith("max_bad_rows allows 3.00%")
    assert [line.split(":")[0] for line in lines] == ["  line 97", "  line 98", "  line 99", "  line 100"]


def test_duplicates_are_not_bad_rows(dataset):
    assert dataset([{"prompt": "a"}] * 50, max_bad_rows=0).reasons == {"duplicate": 49}


def test_bad_rows_are_counted_for_each_source(dataset):
    with pytest.raises(ValueError, match=r"test: test\.jsonl: 1 of 2 rows"):
        dataset([{"prompt": str(n)} for n in range(500)], [{"prompt": "x"}, {}])


@pytest.mark.parametrize(
    ("train", "test", "settings", "said"),
    [
        ([], None, {}, r"train: train\.jsonl: no rows"),
        (["\n\n"], None, {}, r"train: train\.jsonl: no rows"),
        ([{"prompt": "a"}], [], {}, r"test: test\.jsonl: no rows"),
        ([{"q": 1}], None, {"max_bad_rows": 1}, "1 of 1 rows can't be used"),
        ([{"prompt": "a"}], [{"prompt": "a"}], {}, "every question of train is in test"),
        ([{"prompt": "a"}], None, {"held_out": 1}, "held_out is too large"),
        ([{"prompt": "a"}, {"prompt": "b"}], None, {"held_out": 0.001}, "held_out: 0.001 of 2 examples left none"),
    ],
)
def test_a_split_that_would_be_empty_is_refused(dataset, train, test, settings, said):
    with pytest.raises(ValueError, match=f"dataset 'sums': .*{said}"):
        dataset(train, test, **settings)


def test_a_source_that_is_missing_is_named_with_its_split(dataset):
    with pytest.raises(ValueError, match=r"dataset 'sums': test: gone\.jsonl: no such file"):
        dataset([{"prompt": "a"}], test={"kind": "jsonl", "path": "gone.jsonl"})


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path):
    path = tmp_path / "growing.jsonl"

    class Growing(BaseLoader):
        @property
        def name(self):
            return "growing"

        def rows(self):
            path.write_text("more")
            yield Record({"prompt": "p"}, str(path), 1)

        def provenance(self) -> dict[str, str | int]:
            return {"sha256": sha256(path)}

    path.write_text("some")
    LoaderRegistry.register("growing")(Growing)
    config = DatasetConfig.model_validate({"name": "sums", "train": {"kind": "plugin", "name": "growing"}})
    with pytest.raises(ValueError, match="growing: changed while it was read"):
        prepare(config)
