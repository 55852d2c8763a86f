"""The tiny experiment, from data to leaderboard, as Dagster runs it."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import dagster as dg
import pytest
import yaml
from dagster._core.definitions.data_version import CachingStaleStatusResolver, StaleStatus
from dagster._core.loader import LoadingContextForTest

from pipeline.catalog import load_catalog
from pipeline.factory import build_definitions
from pipeline.io_manager import read_ref
from pipeline.keys import model_key, report_key
from pipeline.refs import CheckpointRef, ReportRef
from pipeline.sinks import read_metrics
from tests.conftest import TINY

GRPO = model_key("tiny", "grpo")


@dataclass(frozen=True)
class Ran:
    """A finished run, and where it left things."""

    definitions: dg.Definitions
    instance: dg.DagsterInstance
    artifacts: Path
    result: dg.ExecuteInProcessResult

    def again(self, *keys: dg.AssetKey, **settings) -> dg.ExecuteInProcessResult:
        """Materialise some of the assets once more."""
        job = self.definitions.resolve_job_def("tiny")
        return job.execute_in_process(
            instance=self.instance, asset_selection=list(keys), raise_on_error=False, **settings
        )

    def metadata(self, key: dg.AssetKey) -> dict:
        event = self.instance.get_latest_materialization_event(key)
        assert event is not None
        assert event.asset_materialization is not None
        return dict(event.asset_materialization.metadata)


@pytest.fixture(scope="module")
def ran(tmp_path_factory) -> Iterator[Ran]:
    folder = tmp_path_factory.mktemp("experiments")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    artifacts = tmp_path_factory.mktemp("artifacts")
    definitions = build_definitions(load_catalog(folder), str(artifacts))
    with dg.instance_for_test() as instance:
        result = definitions.resolve_job_def("tiny").execute_in_process(instance=instance)
        yield Ran(definitions, instance, artifacts, result)


def test_one_job_goes_from_data_to_the_leaderboard(ran):
    rows = json.loads((ran.artifacts / "leaderboard.json").read_text())
    assert [(row["experiment"], row["stage"], row["benchmark"], row["n"]) for row in rows] == [
        ("tiny", stage, "held_out", 4) for stage in ("base", "sft", "grpo")
    ]
    assert rows[2]["checkpoint"] == read_ref(ran.artifacts, GRPO, CheckpointRef).path


def test_each_stage_ran_its_steps_into_its_run_directory(ran):
    name = ran.result.run_id[:8]
    sft, grpo = (read_metrics(ran.artifacts / "tiny" / stage / name) for stage in ("sft", "grpo"))
    assert [row["step"] for row in sft] == [1, 2, 3, 4]
    assert [row["step"] for row in grpo] == [1, 2, 3]
    assert all("reward/numeric_answer" in row for row in grpo)


def test_a_checkpoint_starts_from_the_stage_before_it_and_its_model_differs(ran):
    digests = {
        stage: read_ref(ran.artifacts, model_key("tiny", stage), CheckpointRef).sha256
        for stage in ("base", "sft", "grpo")
    }
    assert len(set(digests.values())) == 3
    event = ran.instance.get_latest_materialization_event(GRPO)
    assert event.asset_materialization.tags["dagster/input_data_version/tiny/sft_model"] == digests["sft"]
    assert event.asset_materialization.tags["dagster/data_version"] == digests["grpo"]


def test_after_a_run_nothing_is_stale(ran):
    found = ran.definitions.resolve_asset_graph()
    resolver = CachingStaleStatusResolver(ran.instance, found, LoadingContextForTest(ran.instance))
    assert {resolver.get_status(key) for key in found.get_all_asset_keys()} == {StaleStatus.FRESH}


def test_the_page_of_a_checkpoint_answers_what_one_asks(ran):
    labels = ran.metadata(GRPO)
    wanted = {"reward", "curves", "samples", "provenance", "checkpoint_dir", "run_dir", "step"}
    assert wanted <= labels.keys()
    assert "path" not in labels
    assert Path(labels["checkpoint_dir"].value, "model", "config.json").is_file()
    assert labels["samples"].records != []


def test_the_page_of_a_report_has_its_score_and_text(ran):
    key = report_key("tiny", "grpo", "held_out")
    labels, ref = ran.metadata(key), read_ref(ran.artifacts, key, ReportRef)
    assert (labels["score"].value, labels["n"].value, labels["low"].value) == (ref.score, 4, ref.low)
    assert "held_out" in labels["report"].md_str
    assert labels["scores"].md_str.startswith("![accuracy, 95% intervals](data:image/png;base64,")
    assert "tiny/grpo at step 3 has" in labels["against_sft"].md_str


def test_numbers_come_while_it_trains(ran):
    observed = ran.instance.fetch_observations(GRPO, limit=10).records
    steps = [
        record.asset_observation.metadata["step"].value for record in observed if record.run_id == ran.result.run_id
    ]
    assert sorted(steps) == [1, 2, 3]
    assert any("grpo 2/3 · reward" in (record.asset_observation.description or "") for record in observed)


def test_every_check_was_run_and_the_blocking_ones_passed(ran):
    found = {
        (evaluation.asset_key.to_user_string(), evaluation.check_name): evaluation
        for evaluation in ran.result.get_asset_check_evaluations()
    }
    assert {name for name, evaluation in found.items() if evaluation.blocking} == {
        ("dataset/sums", "not_empty"),
        ("dataset/sums", "no_overlap"),
        ("tiny/sft_model", "reloads_finite"),
        ("tiny/grpo_checkpoint", "reloads_finite"),
    }
    assert all(evaluation.passed for evaluation in found.values() if evaluation.blocking)
    assert ("tiny/grpo_checkpoint", "reward_improved") in found
    assert found["tiny/grpo_held_out", "score_kept"].description == "there is no earlier report"


# ---- what comes after; each leaves the run as it was, or says what it breaks -----------------------------------------


def test_the_same_settings_give_the_same_weights_in_another_run(ran):
    before = read_ref(ran.artifacts, GRPO, CheckpointRef)
    assert ran.again(GRPO).success
    after = read_ref(ran.artifacts, GRPO, CheckpointRef)
    assert after.path != before.path
    weights = [(ran.artifacts / ref.path / "model" / "model.safetensors").read_bytes() for ref in (before, after)]
    assert weights[0] == weights[1]


def test_a_report_alone_takes_the_current_checkpoint(ran):
    key = report_key("tiny", "grpo", "held_out")
    assert ran.again(key).success
    assert read_ref(ran.artifacts, key, ReportRef).checkpoint == read_ref(ran.artifacts, GRPO, CheckpointRef).path


def test_a_report_whose_folder_is_gone_keeps_its_row(ran):
    before = (ran.artifacts / "leaderboard.json").read_bytes()
    shutil.rmtree(ran.artifacts / read_ref(ran.artifacts, report_key("tiny", "base", "held_out"), ReportRef).path)
    assert ran.again(dg.AssetKey(["leaderboard"])).success
    assert len(json.loads((ran.artifacts / "leaderboard.json").read_bytes())) == len(json.loads(before))


def test_a_checkpoint_that_does_not_reload_fails_its_check(ran):
    ref = read_ref(ran.artifacts, GRPO, CheckpointRef)
    weights = ran.artifacts / ref.path / "model" / "model.safetensors"
    damaged = bytearray(weights.read_bytes())
    damaged[-1] ^= 1
    weights.unlink()  # it may be a link to the file of another checkpoint
    weights.write_bytes(damaged)
    recheck = dg.define_asset_job("recheck", dg.AssetSelection.checks(dg.AssetCheckKey(GRPO, "reloads_finite")))
    definitions = dg.Definitions.merge(ran.definitions, dg.Definitions(jobs=[recheck]))
    result = definitions.resolve_job_def("recheck").execute_in_process(instance=ran.instance, raise_on_error=False)
    (evaluation,) = result.get_asset_check_evaluations()
    assert (evaluation.check_name, evaluation.passed, evaluation.blocking) == ("reloads_finite", False, True)
    assert "not what was written" in str(evaluation.description)
    assert not result.success
