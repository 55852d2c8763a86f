"""A trained model in a folder of its own, with a model card that says how it was made and what it scores."""

import io
import json
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from configs.atomic import new_directory, verify
from configs.schema import ExperimentConfig, HuggingFaceSource, PretrainedModel
from pipeline.evaluation.report_page import condition_rows, format_score, provenance_rows
from pipeline.pages.gather import settings_of

if TYPE_CHECKING:
    from pipeline.evaluation.report import EvaluationReport

BITS = (2, 3, 4, 6, 8)


def export_model(
    source: Path,
    directory: Path,
    experiment: ExperimentConfig,
    stage: str,
    reports: Sequence["EvaluationReport"],
    *,
    bits: int | None,
    hf: bool,
) -> None:
    """Write the model of `source` into the new folder `directory`, quantised to `bits`, or as transformers reads it.

    `ValueError` for a folder that exists, a checkpoint that isn't what was written, and what can't be had together.
    """
    if directory.exists():
        raise ValueError(f"{directory} exists; name a new folder")
    if bits is not None and bits not in BITS:
        raise ValueError(f"--bits: {bits} is none of {BITS}")
    if bits is not None and hf:
        raise ValueError("--hf with --bits: transformers can't read MLX's quantised weights; leave one of them out")
    verify(source.parent)
    card = model_card(experiment, stage, reports, settings_of(source.parents[2]), bits=bits, hf=hf)
    with new_directory(directory) as folder:
        _write_weights(source, folder, bits, hf)
        (folder / "README.md").write_text(card, encoding="utf-8")


def _write_weights(source: Path, folder: Path, bits: int | None, hf: bool) -> None:
    from mlx_ops.model import copy_model

    settings = json.loads((source / "config.json").read_bytes())
    if bits is not None:
        _convert(source, folder, quantize=True, q_bits=bits)
    elif hf and "quantization" in settings:
        _convert(source, folder, dequantize=True)
    else:
        copy_model(source, folder)
    if hf:
        _complete_for_transformers(folder)


def _convert(source: Path, folder: Path, **how: Any) -> None:
    from mlx_lm import convert

    made = folder / "converted"  # it wants a new folder
    with redirect_stdout(io.StringIO()):
        convert(str(source), str(made), **how)
    for file in made.iterdir():
        file.rename(folder / file.name)
    made.rmdir()


def _complete_for_transformers(folder: Path) -> None:
    """The class and the end tokens, which transformers takes from files that mlx-lm does without."""
    from mlx_ops.model import TRANSFORMERS_CLASSES

    config = folder / "config.json"
    settings: dict[str, Any] = json.loads(config.read_bytes())
    kind = settings["model_type"]
    if kind not in TRANSFORMERS_CLASSES:
        raise ValueError(
            f"--hf: mlx-lm may name the weights of {kind!r} otherwise than transformers does; known to agree: "
            f"{sorted(TRANSFORMERS_CLASSES)}. Leave --hf out"
        )
    settings.setdefault("architectures", [TRANSFORMERS_CLASSES[kind]])
    _replace(config, settings)
    tokens = {name: settings.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    generation = folder / "generation_config.json"
    if not generation.is_file():
        _replace(generation, {name: value for name, value in tokens.items() if value is not None})


def _replace(file: Path, value: dict[str, Any]) -> None:
    file.unlink(missing_ok=True)  # a link to the checkpoint's own, which must stay as it is
    file.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


# ---- the card ------------------------------------------------------------------------------------------------------


def model_card(
    experiment: ExperimentConfig,
    stage: str,
    reports: Sequence["EvaluationReport"],
    settings: Mapping[str, Any],
    *,
    bits: int | None,
    hf: bool,
) -> str:
    """The hub's `README.md`: what its tools read on top, then for people how to use the model, scores, settings."""
    made = yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True) if settings else ""
    head = yaml.safe_dump(_card_data(experiment, stage, reports, bits, hf), sort_keys=False, allow_unicode=True)
    sections = [
        f"---\n{head}---",
        f"# {experiment.name}, after {stage}",
        experiment.description,
        _origin(experiment, stage, bits),
        _usage(hf),
        _scores(reports, bits),
        f"## Settings\n\n```yaml\n{made}```" if made else "",
        *(_details(report) for report in reports),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _card_data(
    experiment: ExperimentConfig, stage: str, reports: Sequence["EvaluationReport"], bits: int | None, hf: bool
) -> dict[str, Any]:
    data: dict[str, Any] = {
        "library_name": "transformers" if hf else "mlx",
        "pipeline_tag": "text-generation",
        "tags": ["mlx", "mlx-rl-trainer", stage, *([f"{bits}-bit"] if bits else [])],
    }
    model, train = experiment.model, experiment.dataset.train
    if isinstance(model, PretrainedModel) and _is_hub_id(model.path):
        data["base_model"] = model.path
    if isinstance(train, HuggingFaceSource) and _is_hub_id(train.path):
        data["datasets"] = [train.path]
    if reports and bits is None:  # a quantised model was not measured
        data["model-index"] = [{"name": experiment.name, "results": [_result(report) for report in reports]}]
    return data


def _is_hub_id(path: str) -> bool:
    return not path.startswith((".", "/", "~")) and path.count("/") == 1


def _result(report: "EvaluationReport") -> dict[str, Any]:
    head = report.headline
    return {
        "task": {"type": "text-generation"},
        "dataset": {"name": report.dataset.name, "type": report.dataset.name, "split": report.dataset.split},
        "metrics": [{"name": f"{report.name} {head.name}", "type": head.name, "value": round(head.score, 4)}],
    }


def _origin(experiment: ExperimentConfig, stage: str, bits: int | None) -> str:
    model = experiment.model
    start = f"`{Path(model.path).name}`" if isinstance(model, PretrainedModel) else "random weights"
    shape = f" Its weights are quantised to {bits} bits." if bits else ""
    return f"Trained from {start} with MLX RL Trainer ({stage}).{shape}"


def _usage(hf: bool) -> str:
    load = 'from mlx_lm import generate, load\n\nmodel, tokenizer = load("path/to/this/folder")\n'
    text = "## Use\n\n```python\n" + load + 'print(generate(model, tokenizer, prompt="…", max_tokens=256))\n```'
    return text + ("\n\n`AutoModelForCausalLM.from_pretrained` of transformers loads it too." if hf else "")


def _scores(reports: Sequence["EvaluationReport"], bits: int | None) -> str:
    if not reports:
        return "## Scores\n\nIt was not evaluated."
    rows = [
        f"| {report.name} | {metric.name} | {format_score(metric)} | {metric.n} | {report.task.protocol} |"
        for report in reports
        for metric in report.metrics
    ]
    warnings = [f"- {report.name}: {words}" for report in reports for words in report.warnings]
    before = "They were measured before the quantisation.\n\n" if bits else ""
    table = ["| benchmark | metric | score [95% interval] | n | protocol |", "|---|---|---|---|---|", *rows]
    return f"## Scores\n\n{before}" + "\n".join(table) + ("\n\n" + "\n".join(warnings) if warnings else "")


def _details(report: "EvaluationReport") -> str:
    facts = condition_rows(report) | provenance_rows(report)
    rows = [f"| {name} | {_cell(value)} |" for name, value in facts.items() if value]
    return f"## How {report.name} was measured\n\n| | |\n|---|---|\n" + "\n".join(rows)


def _cell(value: object) -> str:
    return str(value).replace("|", "\\|").replace("\n", "\\n")
