from datetime import UTC, datetime
from pathlib import Path

import dagster as dg
import pytest

from pipeline.catalog import load_catalog
from pipeline.factory import build_definitions

NIGHTLY = {"cron": "30 1 * * *", "timezone": "Europe/Berlin", "benchmarks": ["held_out"]}


@pytest.fixture
def folder(write_experiment) -> Path:
    evaluations = [{"benchmark": "held_out"}, {"benchmark": "held_out", "name": "long", "limit": 2}]
    return write_experiment(nightly=NIGHTLY, evaluations=evaluations).parent


def made(instance: dg.DagsterInstance, *names: str) -> None:
    for name in names:
        instance.report_runless_asset_event(dg.AssetMaterialization(dg.AssetKey(["tiny", name])))


def tick(instance: dg.DagsterInstance, folder: Path, day: int = 1):
    definitions = build_definitions(load_catalog(folder))
    context = dg.build_schedule_context(
        instance=instance,
        scheduled_execution_time=datetime(2026, 12, day, 0, 30, tzinfo=UTC),
        repository_def=definitions.get_repository_def(),
    )
    return definitions.resolve_schedule_def("tiny_nightly").evaluate_tick(context)


def test_the_time_and_zone_are_the_files(folder):
    schedule = build_definitions(load_catalog(folder)).resolve_schedule_def("tiny_nightly")
    assert (schedule.cron_schedule, schedule.execution_timezone) == ("30 1 * * *", "Europe/Berlin")


def test_an_experiment_without_the_section_has_no_schedule(write_experiment):
    assert not build_definitions(load_catalog(write_experiment().parent)).schedules


def test_no_checkpoint_is_a_reason_to_skip(folder):
    with dg.instance_for_test() as instance:
        made(instance, "base_model")
        result = tick(instance, folder)
    assert result.run_requests == []
    assert result.skip_message is not None
    assert "tiny has no checkpoint yet" in result.skip_message


def test_the_newest_checkpoints_reports_are_asked_for_and_only_the_named_benchmarks(folder):
    with dg.instance_for_test() as instance:
        made(instance, "sft_model", "grpo_checkpoint")
        (request,) = tick(instance, folder).run_requests or []
        assert {key.to_user_string() for key in request.asset_selection or ()} == {"tiny/grpo_held_out", "leaderboard"}
        made(instance, "sft_model")
        (request,) = tick(instance, folder).run_requests or []
    assert {key.to_user_string() for key in request.asset_selection or ()} == {"tiny/sft_held_out", "leaderboard"}


def test_a_night_asks_once_and_the_next_night_asks_again_for_an_unchanged_checkpoint(folder):
    with dg.instance_for_test() as instance:
        made(instance, "grpo_checkpoint")
        keys = [request.run_key for day in (1, 1, 2) for request in tick(instance, folder, day).run_requests or []]
    assert keys[0] == keys[1] != keys[2]


# ---- automation ----------------------------------------------------------------------------------------------------


def checked(instance: dg.DagsterInstance, *, passed: bool) -> None:
    key = dg.AssetKey(["tiny", "grpo_checkpoint"])
    instance.report_runless_asset_event(
        dg.AssetCheckEvaluation(key, "reloads_finite", passed=passed, metadata={}, blocking=True)
    )


@pytest.mark.parametrize(("passed", "requested"), [(True, {"grpo_held_out", "grpo_long"}), (False, set())])
def test_a_new_checkpoint_is_evaluated_once_its_blocking_check_has_passed(folder, passed, requested):
    definitions = build_definitions(load_catalog(folder))
    with dg.instance_for_test() as instance:
        before = dg.evaluate_automation_conditions(defs=definitions, instance=instance)
        dataset = dg.AssetKey(["dataset", "sums"])
        instance.report_runless_asset_event(dg.AssetMaterialization(dataset))
        for check in ("not_empty", "no_overlap"):
            instance.report_runless_asset_event(
                dg.AssetCheckEvaluation(dataset, check, passed=True, metadata={}, blocking=True)
            )
        made(instance, "grpo_checkpoint")
        checked(instance, passed=passed)
        after = dg.evaluate_automation_conditions(defs=definitions, instance=instance, cursor=before.cursor)
    asked = {name for name in ("grpo_held_out", "grpo_long") if after.get_num_requested(dg.AssetKey(["tiny", name]))}
    assert asked == requested
