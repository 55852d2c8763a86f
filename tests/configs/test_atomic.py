import json

import pytest

from configs.atomic import new_directory, read_manifest, verify, write_json, write_text


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
        (lambda d: (d / "manifest.json").unlink(), "no readable manifest.json"),
        (lambda d: (d / "manifest.json").write_text("{"), "no readable manifest.json"),
        (lambda d: (d / "manifest.json").write_text("[]"), "holds no list of files"),
        (lambda d: (d / "manifest.json").write_text('{"files": {"../b": {}}}'), "leaves the folder"),
    ],
    ids=["changed", "longer", "gone", "no manifest", "cut manifest", "wrong manifest", "outside"],
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
