"""The graph that experiments make, and what an edit makes stale."""

from collections.abc import Sequence
from pathlib import Path

import dagster as dg
import pytest
import yaml
from dagster._core.definitions.data_version import CachingStaleStatusResolver, StaleStatus
from dagster._core.loader import LoadingContextForTest

from pipeline.catalog import load_catalog
from pipeline.factory import build_definitions
from pipeline.keys import LEADERBOARD
from tests.conftest import TINY


def graph(folder: Path, overrides: Sequence[str] = ()):
    return build_definitions(load_catalog(folder, overrides)).resolve_asset_graph()


def shown(keys) -> set[str]:
    return {key.to_user_string() for key in keys}


def test_the_graph_of_an_experiment_is_the_one_we_mean(write_experiment):
    found = graph(write_experiment().parent)
    assert {key.to_user_string(): shown(found.get(key).parent_keys) for key in found.get_all_asset_keys()} == {
        "dataset/sums": set(),
        "tiny/base_model": {"dataset/sums"},
        "tiny/sft_model": {"tiny/base_model", "dataset/sums"},
        "tiny/grpo_checkpoint": {"tiny/sft_model", "dataset/sums"},
        "tiny/base_held_out": {"tiny/base_model", "dataset/sums"},
        "tiny/sft_held_out": {"tiny/sft_model", "dataset/sums"},
        "tiny/grpo_held_out": {"tiny/grpo_checkpoint", "dataset/sums"},
        "leaderboard": {"tiny/base_held_out", "tiny/sft_held_out", "tiny/grpo_held_out"},
    }


def test_a_pretrained_model_needs_no_dataset_and_policies_start_from_it_without_sft(write_experiment):
    model = {"kind": "pretrained", "path": "/models/x"}
    path = write_experiment("direct", ppo={"steps": 2})
    text = path.read_text()
    path.write_text(text[: text.index("model:")] + f"model: {model}\n" + text[text.index("ppo:") :].split("sft:")[0])
    found = graph(path.parent)
    key = dg.AssetKey(["direct", "ppo_checkpoint"])
    assert shown(found.get(dg.AssetKey(["direct", "base_model"])).parent_keys) == set()
    assert "direct/base_model" in shown(found.get(key).parent_keys)


def test_experiments_share_a_dataset_and_the_leaderboard_and_nothing_else(write_experiment):
    folder = write_experiment("one").parent
    write_experiment("two")
    found = graph(folder)
    keys = found.get_all_asset_keys()
    assert {key for key in keys if key.path[0] == "dataset"} == {dg.AssetKey(["dataset", "sums"])}
    assert {key.path[0] for key in keys if key.path[0] != "dataset"} == {"one", "two", "leaderboard"}
    assert {found.get(key).group_name for key in keys} == {"datasets", "one", "two", "leaderboard"}
    assert len(found.get(LEADERBOARD).parent_keys) == 6


def test_a_job_of_each_experiments_name_makes_its_assets_and_runs_their_checks(write_experiment):
    folder = write_experiment("one").parent
    write_experiment("two")
    definitions = build_definitions(load_catalog(folder))
    job = definitions.resolve_job_def("one")
    assert {key.path[0] for key in job.asset_layer.executable_asset_keys} == {"dataset", "one", "leaderboard"}
    assert {key.name for key in job.asset_layer.asset_graph.asset_check_keys} == {
        "not_empty",
        "no_overlap",
        "reloads_finite",
        "reward_varied",
        "reward_improved",
        "score_kept",
    }


def test_whatever_holds_a_model_is_in_the_device_pool(write_experiment):
    definitions = build_definitions(load_catalog(write_experiment().parent))
    nodes = definitions.resolve_job_def("tiny").all_node_defs
    pools = {node.name: node.pool for node in nodes if isinstance(node, dg.OpDefinition)}
    assert {name for name, pool in pools.items() if pool != "mlx_device"} == {
        "dataset__sums",
        "dataset__sums_checks",
        "leaderboard",
    }


def test_training_is_one_op_however_many_experiments_there_are(write_experiment):
    folder = write_experiment("one").parent
    write_experiment("two")
    definitions = build_definitions(load_catalog(folder))
    ops = [definitions.resolve_job_def(name).get_node_named(f"{name}__grpo_checkpoint") for name in ("one", "two")]
    (first,), (second,) = (node.definition.nodes for node in ops)  # pyright: ignore[reportAttributeAccessIssue]
    assert first.definition is second.definition


def test_every_asset_of_an_experiment_says_whose_it_is_and_what_it_is_about(write_experiment):
    folder = write_experiment(owners=["team:reasoning", "a@b.org"], description="Sums.").parent
    found = graph(folder)
    for key in found.get_all_asset_keys():
        if key.path[0] == "tiny":
            node = found.get(key)
            assert (list(node.owners), node.tags["experiment"]) == (["team:reasoning", "a@b.org"], "tiny")
            assert "Sums." in (node.description or "")


# ---- staleness -----------------------------------------------------------------------------------------------------


def materialize_without_running(instance: dg.DagsterInstance, folder: Path) -> None:
    """Events with the tags that a run would leave: code version, data version, and those of the inputs."""
    found = graph(folder)
    for key in found.toposorted_asset_keys:
        node = found.get(key)
        tags = {"dagster/code_version": node.code_version, "dagster/data_version": f"of {key.to_user_string()}"}
        for parent in node.parent_keys:
            (record,) = instance.fetch_materializations(parent, limit=1).records
            tags[f"dagster/input_data_version/{parent.to_user_string()}"] = f"of {parent.to_user_string()}"
            tags[f"dagster/input_event_pointer/{parent.to_user_string()}"] = str(record.storage_id)
        instance.report_runless_asset_event(dg.AssetMaterialization(key, tags=tags))


def stale(instance: dg.DagsterInstance, folder: Path, overrides: Sequence[str] = ()) -> set[str]:
    """Assets that the UI would show as unsynced."""
    found = graph(folder, overrides)
    resolver = CachingStaleStatusResolver(instance, found, LoadingContextForTest(instance))
    return shown(key for key in found.get_all_asset_keys() if resolver.get_status(key) == StaleStatus.STALE)


BASE, SFT, GRPO = "base_model", "sft_model", "grpo_checkpoint"
REPORTS = {"base_held_out", "sft_held_out", "grpo_held_out"}


@pytest.fixture(scope="module")
def synced(tmp_path_factory):
    """Two experiments, everything materialised."""
    folder = tmp_path_factory.mktemp("experiments")
    for name in ("one", "two"):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(TINY))
    with dg.instance_for_test() as instance:
        materialize_without_running(instance, folder)
        yield instance, folder


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("seed=0", set()),
        ("description=other", set()),
        ("nightly.cron=0 3 * * *", set()),
        ("monitoring.wandb=offline", set()),
        ("grpo.learning_rate=0.5", {GRPO, "grpo_held_out"}),
        ("sft.steps=9", {SFT, "sft_held_out", GRPO, "grpo_held_out"}),
        ("rewards.0.weight=2.0", {GRPO, *REPORTS}),
        ("evaluations.0.limit=3", REPORTS),
        ("prompt.template=Q {prompt}", {SFT, GRPO, *REPORTS}),
        ("model.hidden_size=64", {BASE, SFT, GRPO, *REPORTS}),
        ("seed=1", {BASE, SFT, GRPO, *REPORTS}),
    ],
)
def test_an_edit_makes_exactly_what_follows_from_it_stale(synced, override, expected):
    instance, folder = synced
    assert stale(instance, folder, [f"one:{override}"]) == {f"one/{name}" for name in expected}


def test_an_edit_of_the_dataset_makes_everything_of_the_experiments_that_name_it_stale(synced):
    instance, folder = synced
    changed = stale(instance, folder, ["one:dataset.limit=9", "two:dataset.limit=9"])
    assert changed == {"dataset/sums", *(f"{e}/{name}" for e in ("one", "two") for name in {BASE, SFT, GRPO, *REPORTS})}


def test_an_edit_of_the_file_is_what_an_override_is(synced, tmp_path):
    instance, folder = synced
    for name in ("one", "two"):
        text = (folder / f"{name}.yaml").read_text()
        (tmp_path / f"{name}.yaml").write_text(text)
    (tmp_path / "one.yaml").write_text((tmp_path / "one.yaml").read_text().replace("rate: 0.001", "rate: 0.002"))
    assert stale(instance, tmp_path) == {"one/grpo_checkpoint", "one/grpo_held_out"}


def test_an_edit_of_a_rewards_source_makes_the_checkpoint_stale(write_experiment):
    path = write_experiment("one", plugins=["./brevity.py"], rewards=[{"name": "brevity"}])
    source = path.with_name("brevity.py")
    source.write_text(
        "from rewards.base import BaseReward, RewardRegistry\n\n"
        "@RewardRegistry.register('brevity')\n"
        "class Brevity(BaseReward):\n"
        "    def __call__(self, prompts, completions, **columns):\n"
        "        return [0.0 for _ in completions]\n"
    )
    with dg.instance_for_test() as instance:
        materialize_without_running(instance, path.parent)
        assert stale(instance, path.parent) == set()
        source.write_text(source.read_text().replace("0.0", "1.0"))
        assert stale(instance, path.parent) == {f"one/{name}" for name in {GRPO, *REPORTS}}
