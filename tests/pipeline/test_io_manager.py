import json

import dagster as dg
import pytest

from pipeline.io_manager import ReferenceIOManager, find_ref, manifest_path, read_ref, reference_io_manager, write_ref
from pipeline.refs import CheckpointRef, DatasetRef
from pipeline.resources import PROJECT, RunStore

DATASET = DatasetRef(path="datasets/words/1", sha256="ab", train=9, test=1, rejected=0)
KEY = dg.AssetKey(["dataset", "words"])


def test_a_reference_comes_back_as_it_was_written(tmp_path):
    write_ref(tmp_path, KEY, DATASET, "run-1")
    assert read_ref(tmp_path, KEY, DatasetRef) == DATASET


def test_a_manifest_reads_without_dagster_and_names_its_run(tmp_path):
    write_ref(tmp_path, KEY, DATASET, "run-1")
    manifest = json.loads((tmp_path / "assets/dataset/words/current.json").read_text())
    assert manifest["run_id"] == "run-1"
    assert manifest["value"]["path"] == "datasets/words/1"


def test_a_newer_value_takes_the_place_of_the_older_and_leaves_nothing_beside_it(tmp_path):
    write_ref(tmp_path, KEY, DATASET, "run-1")
    newer = DATASET.model_copy(update={"train": 8})
    write_ref(tmp_path, KEY, newer, "run-2")
    assert read_ref(tmp_path, KEY, DatasetRef).train == 8
    assert [file.name for file in manifest_path(tmp_path, KEY).parent.iterdir()] == ["current.json"]


def test_a_key_may_begin_with_another_key(tmp_path):
    short, long = dg.AssetKey(["a"]), dg.AssetKey(["a", "b"])
    write_ref(tmp_path, short, DATASET, "run-1")
    write_ref(tmp_path, long, DATASET.model_copy(update={"test": 7}), "run-1")
    assert (read_ref(tmp_path, short, DatasetRef).test, read_ref(tmp_path, long, DatasetRef).test) == (1, 7)


def test_an_asset_that_was_never_made_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="dataset/words was never materialised"):
        read_ref(tmp_path, KEY, DatasetRef)
    assert find_ref(tmp_path, KEY, DatasetRef) is None


def test_another_kind_of_reference_is_refused(tmp_path):
    write_ref(tmp_path, KEY, DATASET, "run-1")
    with pytest.raises(ValueError, match="holds a DatasetRef, and a CheckpointRef was expected"):
        read_ref(tmp_path, KEY, CheckpointRef)


def test_a_damaged_manifest_is_named_with_its_field(tmp_path):
    write_ref(tmp_path, KEY, DATASET, "run-1")
    path = manifest_path(tmp_path, KEY)
    path.write_text(path.read_text().replace('"train": 9', '"train": "many"'))
    with pytest.raises(ValueError, match=r"current\.json[\s\S]*train"):
        read_ref(tmp_path, KEY, DatasetRef)


@dg.asset(key=KEY)
def words() -> dg.MaterializeResult[DatasetRef]:
    return dg.MaterializeResult(value=DATASET)


@dg.asset(ins={"dataset": dg.AssetIn(KEY)})
def size(dataset: DatasetRef) -> dg.MaterializeResult:
    return dg.MaterializeResult(metadata={"train": dataset.train})


@dg.asset(ins={"dataset": dg.AssetIn(KEY)})
def unannotated(dataset) -> dg.MaterializeResult:
    return dg.MaterializeResult(metadata={"train": dataset.train})


@dg.asset
def number() -> int:
    return 3


def materialize(asset: dg.AssetsDefinition, root, **settings):
    resources = {"runs": RunStore(root=str(root)), "io_manager": reference_io_manager}
    return dg.materialize([words, size, unannotated, number], selection=[asset], resources=resources, **settings)


def test_an_input_takes_its_type_from_the_annotation_in_a_later_run(tmp_path):
    materialize(words, tmp_path)
    result = materialize(size, tmp_path)
    assert result.asset_materializations_for_node("size")[0].metadata["train"].value == 9


def test_the_root_follows_the_run_configuration(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    materialize(words, tmp_path, run_config={"resources": {"runs": {"config": {"root": str(elsewhere)}}}})
    assert find_ref(tmp_path, KEY, DatasetRef) is None
    assert find_ref(elsewhere, KEY, DatasetRef) == DATASET


@pytest.mark.parametrize(
    ("asset", "message"),
    [(unannotated, "annotate the input with its reference"), (number, "expected a reference, got int")],
    ids=["an input without annotation", "a value that is no reference"],
)
def test_anything_but_references_is_refused(tmp_path, asset, message):
    materialize(words, tmp_path)
    result = materialize(asset, tmp_path, raise_on_error=False)
    (failure,) = result.get_step_failure_events()
    assert message in str(failure.step_failure_data.error)


def test_a_relative_root_is_the_repositorys_whatever_the_current_folder_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert RunStore(root="artifacts").directory == PROJECT / "artifacts"


def test_paths_in_references_survive_a_move_of_the_root(tmp_path):
    runs = RunStore(root=str(tmp_path / "old"))
    folder = tmp_path / "old" / "x" / "sft"
    folder.mkdir(parents=True)
    relative = runs.relative(folder)
    (tmp_path / "old").rename(tmp_path / "new")
    assert RunStore(root=str(tmp_path / "new")).locate(relative).is_dir()


def test_the_manager_is_rooted_where_the_runs_are(tmp_path):
    assert ReferenceIOManager(tmp_path).root == tmp_path
