"""Models for others: what is written loads elsewhere and computes the same, and a server of it keeps strangers out."""

import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
import yaml
from mlx_lm.utils import quantize_model, save_config, save_model

from configs.atomic import new_directory
from configs.schema import ExperimentConfig, ScratchModel
from mlx_ops.model import TRANSFORMERS_CLASSES, load_policy, make_scratch
from pipeline.export import export_model
from tests.conftest import TINY

ROOT = Path(__file__).parents[2]
EXPERIMENT = ExperimentConfig.model_validate(TINY | {"name": "tiny", "description": "Sums <b>of</b> two."})
PROMPT = "1 + 2 ="


def checkpoint(folder: Path, architecture: str = "llama", bits: int | None = None) -> Path:
    """The model folder of a published checkpoint with random weights."""
    # Sizes at which no two shapes are equal by chance, with fewer keys than queries.
    config = ScratchModel(
        architecture=architecture,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    path = folder / "run" / "published" / "step_000003"
    with new_directory(path) as made:
        make_scratch(config, ["1 + 2 = 3", "4 * 5 = 20"] * 20, made / "model", seed=3)
        if bits is not None:
            quantise(made / "model", bits)
    return path / "model"


def quantise(folder: Path, bits: int) -> None:
    policy = load_policy(folder)
    settings = json.loads((folder / "config.json").read_bytes())
    model, settings = quantize_model(policy.model, settings, 32, bits)
    save_model(folder, model)
    save_config(settings, folder / "config.json")


def export(source: Path, folder: Path, **how: Any) -> Path:
    export_model(source, folder, EXPERIMENT, "grpo", [], **({"bits": None, "hf": False} | how))
    return folder


def logits(folder: Path) -> tuple[list[int], np.ndarray]:
    model, tokenizer = mlx_lm.load(str(folder))[:2]
    tokens = tokenizer.encode(PROMPT)
    return tokens, np.array(model(mx.array([tokens]))[0].astype(mx.float32))


@pytest.mark.parametrize("architecture", sorted(TRANSFORMERS_CLASSES))
def test_an_exported_model_computes_in_transformers_what_it_computes_here(architecture, tmp_path):
    torch = pytest.importorskip("torch", reason="transformers computes by torch, which is no dependency")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = export(checkpoint(tmp_path, architecture), tmp_path / "out", hf=True)
    tokens, ours = logits(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert AutoTokenizer.from_pretrained(folder).encode(PROMPT) == tokens
    with torch.no_grad():
        theirs = model(torch.tensor([tokens])).logits[0].numpy()
    assert np.abs(ours - theirs).max() < 1e-3
    assert np.abs(ours).max() > 1e-2


def test_for_transformers_a_quantised_model_comes_out_whole(tmp_path):
    folder = export(checkpoint(tmp_path, bits=8), tmp_path / "out", hf=True)
    settings = json.loads((folder / "config.json").read_bytes())
    assert settings["architectures"] == ["LlamaForCausalLM"]
    assert "quantization" not in settings
    weights = cast(dict[str, mx.array], mx.load(str(folder / "model.safetensors")))
    assert [name for name in weights if "scales" in name] == []
    np.testing.assert_allclose(logits(folder)[1], logits(tmp_path / "run/published/step_000003/model")[1], atol=1e-3)


def test_quantised_weights_are_smaller_and_close(tmp_path):
    source = checkpoint(tmp_path)
    folder = export(source, tmp_path / "out", bits=8)
    assert (folder / "model.safetensors").stat().st_size < 0.5 * (source / "model.safetensors").stat().st_size
    assert 0 < np.abs(logits(folder)[1] - logits(source)[1]).max() < 0.05


def test_an_export_leaves_the_checkpoint_as_it_was(tmp_path):
    source = checkpoint(tmp_path)
    before = {file.name: file.read_bytes() for file in source.iterdir()}
    export(source, tmp_path / "out", hf=True)
    assert {file.name: file.read_bytes() for file in source.iterdir()} == before


def test_the_card_has_what_the_hub_reads_and_nothing_of_this_machine(tmp_path):
    card = (export(checkpoint(tmp_path), tmp_path / "out") / "README.md").read_text(encoding="utf-8")
    _, head, text = card.split("---\n", 2)
    assert yaml.safe_load(head)["tags"] == ["mlx", "mlx-rl-trainer", "grpo"]
    assert "It was not evaluated" in text
    assert str(tmp_path) not in card


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"bits": 8, "hf": True}, "leave one of them out"),
        ({"bits": 5}, "none of"),
    ],
)
def test_what_cannot_be_had_together_is_refused(how, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        export(checkpoint(tmp_path), tmp_path / "out", **how)
    assert not (tmp_path / "out").exists()


def test_nothing_is_overwritten_and_a_damaged_checkpoint_is_not_handed_on(tmp_path):
    source = checkpoint(tmp_path)
    with pytest.raises(ValueError, match="exists"):
        export(source, tmp_path)
    weights = source / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        export(source, tmp_path / "out")


# ---- serving -------------------------------------------------------------------------------------------------------


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """The address of `mlx-rl serve` over an exported folder, with a token."""
    folder = export(checkpoint(tmp_path), tmp_path / "out")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "pipeline.cli", "serve", str(folder), "--port", str(port), "--device", "cpu"]
    log = (tmp_path / "log").open("wb")
    process = subprocess.Popen(
        command, cwd=ROOT, env={"PATH": "/usr/bin:/bin", "MLX_RL_TOKEN": "right"}, stdout=log, stderr=log
    )
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 90
        while request(f"{address}/health") is None:
            assert process.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.2)
        yield address
    finally:
        process.kill()
        process.wait()
        log.close()


def request(address: str, token: str | None = None, body: Any = None) -> tuple[int, str] | None:
    """Status and text; None where nobody listens."""
    headers = {"Content-Type": "application/json"} | ({} if token is None else {"Authorization": f"Bearer {token}"})
    data = None if body is None else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(address, data, headers), timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()
    except (urllib.error.URLError, ConnectionError):
        return None


def test_the_server_answers_with_its_one_model_to_those_who_have_the_token(server):
    asked = {"model": "some/other-model", "prompt": PROMPT, "max_tokens": 4, "temperature": 0}
    for token in (None, "wrong", ""):
        assert request(f"{server}/v1/completions", token, asked) == (401, "")
        assert request(f"{server}/v1/models", token) == (401, "")
    answer = request(f"{server}/v1/completions", "right", asked)
    assert answer is not None
    assert answer[0] == 200
    assert json.loads(answer[1])["usage"]["completion_tokens"] in range(1, 5)
