"""The experiments that become assets: every YAML of a folder, with overrides, checked against each other.

A refused file takes the whole folder down: half a graph would hide what is missing. Every refused file is named.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from configs.loader import load_experiment
from configs.registry import load_plugins
from configs.schema import ExperimentConfig
from pipeline.keys import RESERVED


@dataclass(frozen=True)
class Entry:
    """An experiment and the file it stands in."""

    experiment: ExperimentConfig
    source: Path

    def load_plugins(self) -> None:
        """Import the experiment's plugins; `ValueError` names the file, the field and the source that fails."""
        try:
            load_plugins(self.experiment.plugins, self.source.parent)
        except ImportError as error:
            raise ValueError(f"{self.source}: plugins: {error}") from error


def load_catalog(folder: Path, overrides: Sequence[str] = ()) -> tuple[Entry, ...]:
    """The experiments of a folder, by name.

    An override is `experiment:section.field=value`. `ValueError` names each refused file, or both of two that clash.
    """
    files = sorted(folder.glob("*.yaml")) if folder.is_dir() else []
    if not files:
        raise ValueError(f"{folder}: no experiments (*.yaml) in this folder")
    wanted = split_overrides(overrides, [file.stem for file in files])
    entries, refused = [], []
    for file in files:
        try:
            entries.append(load_entry(file, wanted.get(file.stem, ())))
        except ValueError as error:
            refused.append(str(error))
    if refused:
        raise ValueError("\n".join(refused))
    _refuse_clashes(entries)
    return tuple(entries)


def load_entry(file: Path, overrides: Sequence[str] = ()) -> Entry:
    """One experiment, its plugins imported and the names that it uses looked up. `ValueError` names file and field."""
    experiment = load_experiment(file, overrides)
    if experiment.name != file.stem:
        raise ValueError(f"{file}: name: {experiment.name!r} is not the file's stem {file.stem!r}; leave it out")
    if experiment.name in RESERVED:
        raise ValueError(f"{file}: an experiment can't be called {experiment.name!r}; rename the file")
    entry = Entry(experiment, file)
    entry.load_plugins()
    _look_up_rewards(entry)
    _look_up_algorithm(entry)
    _look_up_evaluations(entry)
    return entry


def split_overrides(overrides: Sequence[str], names: Sequence[str]) -> dict[str, list[str]]:
    """Overrides by experiment. `ValueError` for one that names none of `names`."""
    split: dict[str, list[str]] = {}
    for override in overrides:
        name, colon, setting = override.partition(":")
        if not colon or "=" in name:
            raise ValueError(f"override {override!r}: expected experiment:section.field=value")
        if name not in names:
            raise ValueError(f"override {override!r}: no experiment {name!r}; there are {sorted(names)}")
        split.setdefault(name, []).append(setting)
    return split


def _look_up_rewards(entry: Entry) -> None:
    from rewards import RewardRegistry
    from rewards.composer import build_reward

    for place, config in enumerate(entry.experiment.rewards):
        if config.name not in RewardRegistry:
            raise ValueError(
                f"{entry.source}: rewards.{place}.name: unknown reward {config.name!r}; "
                f"registered: {RewardRegistry.names()}"
            )
        try:
            build_reward(config)
        except ValueError as error:
            raise ValueError(f"{entry.source}: rewards.{place}.options: {error}") from error


def _look_up_algorithm(entry: Entry) -> None:
    """An algorithm's class brings MLX with it: only an experiment that has one waits for that."""
    if entry.experiment.rl is None:
        return
    from pipeline.algorithms import algorithm_of

    try:
        algorithm_of(entry.experiment.rl)
    except ValueError as error:
        raise ValueError(f"{entry.source}: rl.{error}") from error


def _look_up_evaluations(entry: Entry) -> None:
    from pipeline.evaluation.run import check_evaluation

    for place, config in enumerate(entry.experiment.evaluations):
        try:
            check_evaluation(config)
        except ValueError as error:
            raise ValueError(f"{entry.source}: evaluations.{place}: {error}") from error


def _refuse_clashes(entries: Sequence[Entry]) -> None:
    """Experiments that name the same dataset share one asset, so they must mean the same."""
    owners: dict[str, Entry] = {}
    for entry in entries:
        name = entry.experiment.dataset.name
        owner = owners.setdefault(name, entry)
        ours, theirs = entry.experiment.dataset.model_dump(), owner.experiment.dataset.model_dump()
        if ours != theirs:
            fields = [field for field in ours if ours[field] != theirs[field]]
            raise ValueError(
                f"{owner.source} and {entry.source}: dataset.name: both name {name!r}, but differ in "
                f"{', '.join(f'dataset.{field}' for field in fields)}; make them equal, or rename one"
            )
