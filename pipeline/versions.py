"""Code versions: a hash of what determines an asset, so that an edit marks that asset as unsynced and no other.

What an asset takes from upstream is not part of its hash: Dagster follows that by data versions.
"""

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path

from configs.atomic import sha256
from configs.loader import digest
from configs.schema import DatasetConfig, EvaluationConfig, ExperimentConfig
from pipeline.catalog import Entry


def dataset_version(config: DatasetConfig) -> str:
    return digest(config)


def base_version(experiment: ExperimentConfig) -> str:
    return digest(experiment.model, experiment.seed)


def stage_version(entry: Entry, stage: str) -> str:
    """Of a trained model: its own section, how examples become text, and for reinforcement learning the rewards."""
    experiment = entry.experiment
    section = getattr(experiment, stage)
    if stage == "sft":
        return digest(section, experiment.prompt, experiment.seed)
    return digest(section, list(experiment.rewards), experiment.prompt, experiment.seed, rewards_source(entry))


def report_version(entry: Entry, evaluation: EvaluationConfig) -> str:
    """Of a report: the benchmark's settings, the prompt, and the rewards where they are what it measures."""
    experiment = entry.experiment
    judged = [list(experiment.rewards), rewards_source(entry)] if evaluation.benchmark == "held_out" else []
    return digest(evaluation, experiment.prompt, experiment.seed, *judged)


def rewards_source(entry: Entry) -> str:
    """A hash of the code that the experiment's rewards run: their own files, and what these import of `rewards`."""
    from rewards import RewardRegistry

    files: set[Path] = set()
    for config in entry.experiment.rewards:
        _collect(Path(inspect.getfile(RewardRegistry[config.name])), files)
    return digest(sorted(sha256(file) for file in files))


def _collect(file: Path, files: set[Path]) -> None:
    if file in files:
        return
    files.add(file)
    for imported in _imported_rewards(file):
        _collect(imported, files)


def _imported_rewards(file: Path) -> Iterator[Path]:
    root = Path(__file__).parents[1]
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        for name in _module_names(node):
            path = root.joinpath(*name.split(".")).with_suffix(".py")
            if name.startswith("rewards.") and path.is_file():
                yield path


def _module_names(node: ast.AST) -> list[str]:
    if isinstance(node, ast.ImportFrom) and node.module:
        return [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
