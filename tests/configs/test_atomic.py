import json

import pytest

from configs.atomic import (
    new_directory,
    read_manifest,
    read_sealed,
    sweep,
    verify,
    write_json,
    write_sealed,
    write_text,
)


def test_a_folder_appears_whole_with_a_manifest_of_its_files(tmp_path):
    with new_directory(tmp_path / "made", {"step": 3}) as folder:
        assert not (tmp_path / "made").exists()
        (folder / "inner").mkdir()
        (folder / "inner" / "a.txt").write_text("abc")
    manifest = verify(tmp_path / "made")
    assert manifest["step"] == 3
    # sha256 of "abc", FIPS 180-2 appendix B.1.
    assert manifest["files"]["inner/a.txt"] == {
        "bytes": 3,
        "sha256": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
    }
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_an_error_leaves_what_was_there_and_nothing_else(tmp_path):
    with new_directory(tmp_path / "made") as folder:
        (folder / "a.txt").write_text("old")
    with pytest.raises(RuntimeError), new_directory(tmp_path / "made") as folder:  # noqa: PT012
        (folder / "a.txt").write_text("new")
        raise RuntimeError
    assert (tmp_path / "made" / "a.txt").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda d: (d / "a.txt").write_text("abd"), "a.txt: not what was written"),
        (lambda d: (d / "a.txt").write_text("abcd"), "a.txt: not what was written"),
        (lambda d: (d / "a.txt").unlink(), "a.txt: missing"),
        (lambda d: (d / "b.txt").write_text("abc"), "b.txt: not in manifest.json"),
        (lambda d: (d / "a.txt").rename(d / "b") and (d / "a.txt").symlink_to(d / "b"), "a.txt: missing"),
        (lambda d: (d / "manifest.json").unlink(), "no readable manifest.json"),
        (lambda d: (d / "manifest.json").write_text("{"), r"manifest.json: can't be read"),
        (lambda d: (d / "manifest.json").write_text("[]"), r"manifest.json: can't be read"),
        (lambda d: (d / "manifest.json").write_text("[" * 99_999), r"manifest.json: can't be read"),
        (lambda d: write_sealed(d / "manifest.json", {"step": 1}), "holds no list of files"),
        (lambda d: write_sealed(d / "manifest.json", {"files": {"a.txt": 3}}), "'a.txt' has no size and sha256"),
        (lambda d: write_sealed(d / "manifest.json", {"files": {"../b": {}}}), "leaves the folder"),
        (lambda d: write_sealed(d / "manifest.json", {"files": {"/etc/passwd": {}}}), "leaves the folder"),
    ],
)
def test_what_is_wrong_with_a_folder_is_named(tmp_path, harm, words):
    with new_directory(tmp_path / "made") as folder:
        (folder / "a.txt").write_text("abc")
    harm(tmp_path / "made")
    with pytest.raises(ValueError, match=words):
        verify(tmp_path / "made")


def test_a_file_is_replaced_and_nan_is_no_json(tmp_path):
    write_text(tmp_path / "a", "old")
    write_json(tmp_path / "a", {"b": 1})
    assert json.loads((tmp_path / "a").read_text()) == {"b": 1}
    with pytest.raises(ValueError, match="Out of range"):
        write_json(tmp_path / "a", float("nan"))
    assert json.loads((tmp_path / "a").read_text()) == {"b": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_manifest_of_a_folder_without_one_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"manifest\.json"):
        read_manifest(tmp_path)


def test_no_other_byte_in_a_sealed_file_goes_unseen(tmp_path):
    path = tmp_path / "best.json"
    write_sealed(path, {"metric": "é", "value": 0.1})
    content = path.read_bytes()
    for place in range(len(content)):
        for bit in (0, 2, 5):
            path.write_bytes(content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :])
            with pytest.raises(ValueError, match=r"best\.json: can't be read"):
                read_sealed(path)
    path.write_bytes(content)
    assert read_sealed(path) == {"metric": "é", "value": 0.1}


def test_what_killed_writers_left_is_swept_up_and_nothing_else(tmp_path):
    (tmp_path / ".step_000003.77.tmp").mkdir()
    (tmp_path / ".latest.json.77.tmp").write_text("{")
    (tmp_path / "step_000003").mkdir()
    sweep(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step_000003"]
