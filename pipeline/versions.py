"""Code versions: a hash of the settings that determine an asset, so that an edit marks what it changes as unsynced.

Upstream settings count: Dagster itself looks no further than an asset's direct inputs, and at those only once they are
made anew, so the report of a checkpoint that is out of date would pass for good.
"""

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path

from configs.atomic import sha256
from configs.loader import digest
from configs.schema import DatasetConfig, EvaluationConfig, ExperimentConfig, ScratchModel
from pipeline.catalog import Entry
from pipeline.keys import start_stage


def dataset_version(config: DatasetConfig) -> str:
    return digest(config)


def base_version(experiment: ExperimentConfig) -> str:
    """Of the untrained model; the tokenizer of one from scratch is trained on the dataset."""
    scratch = isinstance(experiment.model, ScratchModel)
    return digest(experiment.model, experiment.seed, dataset_version(experiment.dataset) if scratch else None)


def stage_version(entry: Entry, stage: str) -> str:
    """Of a stage's model: its section, how examples become text, for a policy the rewards, and what it starts from."""
    experiment = entry.experiment
    if stage == "base":
        return base_version(experiment)
    judged = [] if stage == "sft" else [list(experiment.rewards), rewards_source(entry)]
    return digest(
        getattr(experiment, stage),
        experiment.prompt,
        experiment.seed,
        dataset_version(experiment.dataset),
        stage_version(entry, start_stage(experiment, stage)),
        *judged,
        *algorithm_source(entry, stage),
    )


def report_version(entry: Entry, stage: str, evaluation: EvaluationConfig) -> str:
    """Of a report: the benchmark's settings, the model's version, and the rewards where they are what it measures."""
    experiment = entry.experiment
    judged = [list(experiment.rewards), rewards_source(entry)] if evaluation.benchmark == "held_out" else []
    return digest(
        evaluation,
        experiment.prompt,
        experiment.seed,
        dataset_version(experiment.dataset),
        stage_version(entry, stage),
        *judged,
    )


def algorithm_source(entry: Entry, stage: str) -> list[str]:
    """A hash of the file that a plugin's algorithm stands in; nothing for our own, whose code is the package's."""
    if stage != "rl" or entry.experiment.rl is None:
        return []
    from pipeline.algorithms import algorithm_of

    return [sha256(Path(inspect.getfile(algorithm_of(entry.experiment.rl))))]


def rewards_source(entry: Entry) -> str:
    """A hash of the code that the experiment's rewards run: their own files, and what these import of `rewards`."""
    from rewards import RewardRegistry
    from rewards.python_function import load_function

    files: set[Path] = set()
    for config in entry.experiment.rewards:
        _collect(Path(inspect.getfile(RewardRegistry[config.name])), files)
        if config.name == "python":
            files.add(Path(inspect.getfile(load_function(config.options["function"]))))
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
