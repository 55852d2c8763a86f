"""What is loaded can't run code, and what is named can't lie elsewhere."""

import ast
import json
import struct
from contextlib import suppress
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from configs.atomic import write_manifest, write_sealed
from configs.schema import CheckpointConfig
from mlx_ops.checkpoint import CheckpointStore, load, trainer_arrays
from mlx_ops.model import copy_model, load_policy
from pipeline.resources import RunStore
from tests.faults.bench import prepare

ROOT = Path(__file__).parents[1]
RUNS_CODE = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
PWNED = "import os\nos.mkdir({path!r})\n"


def modules() -> list[Path]:
    return [
        path for package in ("configs", "rewards", "mlx_ops", "pipeline") for path in (ROOT / package).rglob("*.py")
    ]


def test_nothing_of_ours_reads_pickles():
    found = []
    for path in modules():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            found += [f"{path}: {name}" for name in names if name.split(".")[0] in RUNS_CODE]
            if isinstance(node, ast.keyword) and node.arg in ("allow_pickle", "trust_remote_code"):
                allowed = isinstance(node.value, ast.Constant) and node.value.value is False
                found += [] if allowed else [f"{path}: {node.arg}"]
            if isinstance(node, ast.Attribute) and node.attr in (
                "read_pickle",
                "to_pickle",
                "unsafe_load",
                "full_load",
            ):
                found.append(f"{path}: {node.attr}")
    assert found == []


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("begun")
    prepare(folder)
    return folder / "start" / "model"


def copy_with(model: Path, target: Path, name: str, content: bytes) -> Path:
    copy_model(model, target)
    (target / name).unlink(missing_ok=True)  # a link to the original
    (target / name).write_bytes(content)
    return target


@pytest.mark.parametrize("settings", [{"model_file": "evil.py"}, {"auto_map": {"AutoModelForCausalLM": "evil.Model"}}])
def test_a_models_settings_run_no_code(model, tmp_path, settings):
    told = json.loads((model / "config.json").read_text()) | settings
    folder = copy_with(model, tmp_path / "m", "config.json", json.dumps(told).encode())
    (folder / "evil.py").write_text(PWNED.format(path=str(tmp_path / "pwned")))
    with suppress(ValueError):
        load_policy(folder)
    assert not (tmp_path / "pwned").exists()


def test_a_tokenizers_settings_run_no_code(model, tmp_path):
    told = json.loads((model / "tokenizer_config.json").read_text())
    told |= {"auto_map": {"AutoTokenizer": ["evil.T", "evil.T"]}, "tokenizer_class": "T", "trust_remote_code": True}
    folder = copy_with(model, tmp_path / "m", "tokenizer_config.json", json.dumps(told).encode())
    (folder / "evil.py").write_text(PWNED.format(path=str(tmp_path / "pwned")))
    with suppress(ValueError):
        load_policy(folder)
    assert not (tmp_path / "pwned").exists()


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.mkdir, (self.path,))


def test_pickles_are_never_loaded_whatever_they_are_called(model, tmp_path):
    np.savez(tmp_path / "evil.npz", a=np.array([Evil(tmp_path / "pwned")], dtype=object))
    content = (tmp_path / "evil.npz").read_bytes()
    for number, name in enumerate(["model.safetensors", "pytorch_model.bin", "weights.npz"]):
        folder = copy_with(model, tmp_path / str(number), name, content)
        if name == "model.safetensors":
            with pytest.raises((ValueError, RuntimeError)):
                load_policy(folder)
        else:
            load_policy(folder)
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    "header",
    [
        {"a": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}},
        {"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 1 << 62]}},
        {"a": {"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]}},
        {"a": {"dtype": "X9", "shape": [4], "data_offsets": [0, 16]}},
        {"a": 3},
    ],
)
def test_a_header_that_lies_is_an_error_and_no_crash(tmp_path, header):
    folder = tmp_path / "step_000001"
    folder.mkdir()
    text = json.dumps(header).encode()
    (folder / "trainer.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(16))
    with pytest.raises((ValueError, RuntimeError)):
        mx.eval(trainer_arrays(folder))


def test_a_manifest_names_nothing_outside_its_folder(tmp_path):
    (tmp_path / "secret").write_text("x")
    folder = tmp_path / "step_000001"
    folder.mkdir()
    (folder / "state.json").write_text('{"step": 1}')
    write_manifest(folder, {})
    assert load(folder).step == 1
    for name in ("../secret", "/etc/passwd", "a/../../secret"):
        write_sealed(folder / "manifest.json", {"files": {name: {"bytes": 1, "sha256": "x"}}})
        saved, skipped = CheckpointStore(tmp_path, CheckpointConfig()).newest()
        assert saved is None
        assert "leaves the folder" in skipped[0]


@pytest.mark.parametrize("path", ["../x", "/etc", "a/../../x"])
def test_a_reference_leads_nowhere_outside_the_artifacts(tmp_path, path):
    with pytest.raises(ValueError, match="leaves the artifacts' folder"):
        RunStore(root=str(tmp_path)).locate(path)
