"""The algorithm that `docs/algorithms.md` writes works as it stands there."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from configs.loader import merge
from configs.schema import GRPO_PRESETS, CriticConfig, GRPOConfig, PluginPolicyConfig, PolicyConfig, PPOConfig
from mlx_ops.algorithm import AlgorithmRegistry
from pipeline.catalog import Entry, load_entry
from pipeline.data.store import build_dataset
from pipeline.factory import build_definitions
from pipeline.job import Job
from pipeline.resources import DeviceSettings
from pipeline.train import make_base, train_stage
from tests.conftest import TINY
from tests.mlx_ops.test_learning import COMMON, learn

PAGE = (Path(__file__).parents[1] / "docs" / "algorithms.md").read_text(encoding="utf-8")
CPU = DeviceSettings(device="cpu")


def block(language: str, holding: str) -> str:
    """The code of this language that holds a word."""
    (found,) = (code for code in re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL) if holding in code)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The plugin as a file. Loaded from one place: a name that another file registered is taken."""
    made = tmp_path_factory.mktemp("experiments")
    (made / "my_reinforce.py").write_text(block("python", "AlgorithmRegistry"), encoding="utf-8")
    return made


def write(folder: Path, **changes: Any) -> Path:
    settings = merge(merge(TINY, yaml.safe_load(block("yaml", "my_reinforce"))), {"grpo": None, **changes})
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return path


@pytest.fixture
def entry(folder: Path) -> Entry:
    rl = {"steps": 2, "prompts_per_step": 2, "sampling": {"max_tokens": 8}, "kl_coef": 0.1}
    return load_entry(write(folder, rl=rl))


def test_an_algorithm_of_ones_own_takes_less_than_forty_lines():
    assert len(block("python", "AlgorithmRegistry").splitlines()) < 40


def test_it_becomes_an_asset_with_reports(entry):
    keys = build_definitions([entry]).resolve_all_asset_keys()
    assert {"tiny/rl_checkpoint", "tiny/rl_held_out"} <= {key.to_user_string() for key in keys}


def test_it_trains_checkpoints_and_publishes(entry, tmp_path):
    rows = []
    build_dataset(entry.experiment.dataset, tmp_path / "dataset")
    base = make_base(entry.experiment, tmp_path / "dataset", tmp_path / "base", CPU)

    def report(step: int, metrics: Any) -> None:
        rows.append((step, metrics["kl"], metrics["seconds/ref_logprobs"]))

    trained = train_stage(
        Job(entry.experiment, tmp_path / "dataset", base.checkpoint, tmp_path / "run", CPU, report), "rl"
    )
    assert [step for step, *_ in rows] == [1, 2]
    assert all(seconds > 0 for *_, seconds in rows)
    assert (trained.checkpoint / "model" / "model.safetensors").is_file()
    assert len(trained.samples) == 8


def test_it_learns(entry):
    fields = {"algorithm": "my_reinforce", "options": {"baseline": 0.4}, "steps": 25, "learning_rate": 3e-3, **COMMON}
    rows = learn(AlgorithmRegistry["my_reinforce"], PluginPolicyConfig.model_validate(fields), 8)
    assert rows[0]["reward"] < 0.3
    assert min(row["reward"] for row in rows[-4:]) > 0.6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"options": {"baselin": 1}}, r"tiny.yaml: rl.options: of algorithm 'my_reinforce': 1 setting.*\n  baselin"),
        ({"algorithm": "yours"}, r"tiny.yaml: rl.algorithm: unknown 'yours'; registered: \['grpo', 'my_reinforce'"),
    ],
)
def test_a_wrong_name_or_option_is_refused_with_its_file_and_field(folder, changes, message):
    with pytest.raises(ValueError, match=message):
        load_entry(write(folder, rl=changes))


def test_the_page_shows_every_preset_with_its_fields():
    for name, fields in GRPO_PRESETS.items():
        (row,) = re.findall(rf"^\| `{name}` \| (`.*?`) \|", PAGE, flags=re.MULTILINE)
        assert yaml.safe_load("{" + ", ".join(re.findall(r"`([^`]+)`", row)) + "}") == fields


def table_after(words: str) -> dict[str, str]:
    """The first two columns of the next table of the page, without the quotes of code."""
    (table,) = re.findall(r"\|---.*?\n((?:\|.*\n)+)", PAGE.split(words, 1)[1])[:1]
    cells = ([cell.strip().strip("`") for cell in row.split("|")] for row in table.splitlines())
    return {name: default for _, name, default, *_ in cells}


def defaults(model: type[BaseModel], prefix: str = "") -> dict[str, Any]:
    return {prefix + name: field.default for name, field in model.model_fields.items()}


def own(model: type[PolicyConfig]) -> dict[str, Any]:
    """The fields that not every algorithm has."""
    return {name: value for name, value in defaults(model).items() if name not in PolicyConfig.model_fields}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("share these.", defaults(PolicyConfig)),
        ("GRPO alone:", own(GRPOConfig)),
        ("PPO alone,", own(PPOConfig) | defaults(CriticConfig, "critic.")),
    ],
    ids=["shared", "grpo", "ppo"],
)
def test_the_page_names_every_setting_with_its_default(words, expected):
    rows = table_after(words)
    assert set(rows) == set(expected)
    for name, default in expected.items():
        if isinstance(default, bool | str) or default is None:
            assert yaml.safe_load(rows[name]) == default, name
        elif isinstance(default, int | float):
            assert float(rows[name]) == default, name
