import datetime
import decimal
import gzip
import json
import math

import numpy as np
import pytest

from configs.schema import HuggingFaceSource, JsonlSource, PluginSource
from pipeline.data.json_values import as_json
from pipeline.data.loaders import BaseLoader, LoaderRegistry, Record, Rejected, excerpt, make_loader


def read(path, content=None):
    if content is not None:
        path.write_bytes(content)
    return list(make_loader(JsonlSource(path=str(path))).rows())


def test_a_row_knows_its_file_and_its_line(tmp_path):
    path = tmp_path / "a.jsonl"
    rows = read(path, b'\xef\xbb\xbf{"prompt": "1"}\r\n\n  \n{"prompt": "\xc3\xa9"}')
    assert rows == [Record({"prompt": "1"}, str(path), 1), Record({"prompt": "é"}, str(path), 4)]


@pytest.mark.parametrize(
    ("line", "reason", "said"),
    [
        (b'{"prompt": "x"', "malformed JSON", "delimiter"),
        (b'{"prompt": "\xff"}', "not UTF-8", "byte 13 of the line"),
        (b'["prompt"]', "not an object", "got a list"),
        (b"3", "not an object", "got a int"),
        (b'{"n": NaN}', "malformed JSON", "NaN is not JSON"),
        (b"[" * 100_000, "malformed JSON", "recursion"),
        (b'{"n": ' + b"9" * 5000 + b"}", "malformed JSON", "4300 digits"),
        (b'{"prompt": "a\x00b"}', "malformed JSON", "control character"),
        (b'{"prompt": "a", "prompt": "b"}', "malformed JSON", "'prompt' stands twice"),
        (b'{"n": ' + b"[" * 64 + b"]" * 64 + b"}", "malformed JSON", "64 levels"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_line_that_is_no_object_is_set_aside_and_its_neighbours_are_kept(tmp_path, line, reason, said):
    before, bad, after = read(tmp_path / "a.jsonl", b'{"a": 1}\n' + line + b'\n{"a": 2}\n')
    assert isinstance(before, Record)
    assert after == Record({"a": 2}, str(tmp_path / "a.jsonl"), 3)
    assert isinstance(bad, Rejected)
    assert (bad.line, bad.reason) == (2, reason)
    assert said in bad.detail
    assert len(bad.excerpt) <= 120


def test_a_last_line_that_was_cut_says_so(tmp_path):
    _, bad = read(tmp_path / "a.jsonl", b'{"prompt": "x"}\n{"prompt": "y')
    assert isinstance(bad, Rejected)
    assert "cut short?" in bad.detail
    assert bad.excerpt == '{"prompt": "y'


def test_a_gzip_is_read_and_one_cut_short_is_refused_whole(tmp_path):
    lines = b"".join(
        b'{"prompt": "%d", "noise": "%s"}\n' % (n, np.random.default_rng(n).bytes(60).hex().encode())
        for n in range(300)
    )
    path = tmp_path / "a.jsonl.gz"
    whole = gzip.compress(lines, mtime=0)
    assert [row.line for row in read(path, whole)] == list(range(1, 301))
    # 20 bytes are less than a row of 300: a share of bad rows would have let it pass.
    for kept in (len(whole) // 2, len(whole) - 20, len(whole) - 1):
        with pytest.raises(ValueError, match=r"a\.jsonl\.gz: line \d+: gzip damaged or cut short"):
            read(path, whole[:kept])


@pytest.mark.parametrize(
    "content", [b"not gzip", gzip.compress(b"{}\n" * 99)[:12], gzip.compress(b'{"a": 1}\n') + b"junk"]
)
def test_a_gzip_that_is_none_is_refused(tmp_path, content):
    with pytest.raises(ValueError, match="gzip damaged"):
        read(tmp_path / "a.jsonl.gz", content)


def test_an_endless_line_is_set_aside_without_being_parsed(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.data.loaders.MAX_LINE_BYTES", 20)
    long, fits = read(tmp_path / "a.jsonl", b'{"a": "' + b"x" * 95 + b'"}\n{"a": 1}\n')
    assert isinstance(long, Rejected)
    assert long.reason == "line too long"
    assert fits.line == 2


@pytest.mark.parametrize("path", ["gone.jsonl", ".", "a\x00b", "~nobody-of-that-name/a.jsonl", "x" * 5000])
def test_a_file_that_is_not_there_is_named(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"no such file|a folder, not a file"):
        list(make_loader(JsonlSource(path=path)).rows())


def test_an_excerpt_is_short_and_on_one_line():
    assert excerpt(b"a\n\x00b\xff") == "a  b\ufffd"
    assert excerpt("x" * 500) == "x" * 119 + "…"
    assert excerpt({"a": 1}) == "{'a': 1}"


# ---- Hugging Face --------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path, monkeypatch):
    import datasets.config

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def hugging_face(path, **changes):
    return list(make_loader(HuggingFaceSource.model_validate({"path": str(path), **changes})).rows())


def test_a_local_dataset_of_hugging_face_is_read(tmp_path, cache):
    folder = tmp_path / "data"
    folder.mkdir()
    rows = [{"question": "1 + 1", "when": "2024-01-01"}, {"question": "é", "when": None}]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    first, second = hugging_face(folder)
    assert first == Record({"question": "1 + 1", "when": datetime.datetime(2024, 1, 1)}, f"{folder}[train]", 1)
    assert second.line == 2
    with pytest.raises(ValueError, match=r"data\[validation\]: can't be loaded: .*validation"):
        hugging_face(folder, split="validation")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("data.py", "raise SystemExit('ran')", "scripts are no longer supported"),
        ("train.jsonl", '{"a": 1}\n{"a":', "JSON parse error"),
        ("train.parquet", "junk", "Parquet"),
        (None, "", "any data files"),
    ],
)
def test_a_folder_that_holds_no_dataset_is_named_and_its_code_never_runs(tmp_path, cache, name, content, said):
    folder = tmp_path / "data"
    folder.mkdir()
    if name is not None:
        (folder / name).write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=f"data.train.: can't be loaded: .*(?s:.*){said}"):
        hugging_face(folder)


def test_a_missing_folder_is_named_without_asking_the_hub(tmp_path):
    with pytest.raises(ValueError, match=r"gone\[train\]: no such file or folder"):
        hugging_face(tmp_path / "gone")


# ---- plugins -------------------------------------------------------------------------------------------------------


@LoaderRegistry.register("test_countdown")
class Countdown(BaseLoader):
    @property
    def name(self):
        return "countdown"

    def rows(self):
        yield Record({"prompt": "3"})
        yield Record({"prompt": "2"}, "elsewhere", 7)
        yield Rejected("", 0, "odd", "", "")
        raise RuntimeError("no more")


def test_rows_of_a_plugin_are_numbered_and_its_faults_name_it():
    rows = make_loader(PluginSource(name="test_countdown")).rows()
    assert next(rows) == Record({"prompt": "3"}, "countdown", 1)
    assert next(rows) == Record({"prompt": "2"}, "elsewhere", 7)
    assert next(rows) == Rejected("countdown", 3, "odd", "", "")
    with pytest.raises(ValueError, match="countdown: loader 'test_countdown' failed at row 4: RuntimeError: no more"):
        next(rows)


def test_a_loader_that_is_not_registered_or_refuses_its_options_is_named():
    with pytest.raises(ValueError, match=r"unknown loader 'cntdown'; registered: .*'jsonl'.*'test_countdown'"):
        make_loader(PluginSource(name="cntdown"))
    with pytest.raises(ValueError, match=r"options of loader 'test_countdown'(?s:.*)from: unknown key"):
        make_loader(PluginSource(name="test_countdown", options={"from": 3}))
    with pytest.raises(ValueError, match=r"options of loader 'jsonl'(?s:.*)path: Field required"):
        make_loader(PluginSource(name="jsonl"))


# ---- JSON values ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (np.int64(3), 3),
        (np.float32(0.5), 0.5),
        (np.bool_(True), True),
        (np.array([[1, 2]]), [[1, 2]]),
        (datetime.datetime(2024, 1, 2, 3, 4), "2024-01-02T03:04:00"),
        (datetime.date(2024, 1, 2), "2024-01-02"),
        (datetime.timedelta(minutes=1), 60.0),
        (decimal.Decimal("1.50"), "1.50"),
        ({"a": (1, None), 2: "x"}, {"a": [1, None], "2": "x"}),
        (np.str_("x"), "x"),
        (np.float64(0.25), 0.25),
    ],
    ids=repr,
)
def test_values_become_json(value, expected):
    got = as_json(value, "column")
    assert got == expected
    assert json.loads(json.dumps(got, allow_nan=False)) == got
    assert not type(got).__module__.startswith("numpy")


@pytest.mark.parametrize(
    "value",
    [math.nan, math.inf, b"x", {"a": [object()]}, "\ud800", {"\udfff": 1}, np.array([math.nan]), {1, 2}],
    ids=repr,
)
def test_a_value_that_json_cannot_hold_is_refused_with_its_column(value):
    with pytest.raises(ValueError, match="column"):
        as_json(value, "column")
