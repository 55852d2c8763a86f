"""What an asset's page says before anything ran: group, owners, tags, words, and the settings that it is made with."""

from collections.abc import Mapping
from typing import Any, TypedDict

import dagster as dg
import yaml
from pydantic import BaseModel

from pipeline.catalog import Entry


class Labels(TypedDict):
    """Arguments of `dg.asset` and `dg.graph_asset`."""

    group_name: str
    owners: list[str]
    tags: Mapping[str, str]
    description: str
    metadata: Mapping[str, Any]


def labels(entry: Entry, stage: str, words: str, settings: BaseModel) -> Labels:
    """Of an asset of an experiment. Dagster has no descriptions of groups, so each asset carries the experiment's."""
    experiment = entry.experiment
    about = f"\n\n*{experiment.name}:* {experiment.description}" if experiment.description else ""
    return Labels(
        group_name=experiment.name,
        owners=list(experiment.owners),  # a tuple is refused by graph assets
        tags={"experiment": experiment.name, "stage": stage},
        description=words + about,
        metadata={"settings": as_yaml(settings), "experiment_file": dg.MetadataValue.path(str(entry.source))},
    )


def as_yaml(settings: BaseModel) -> dg.MarkdownMetadataValue:
    """What a section sets apart from the defaults, as it would stand in a file."""
    plain = settings.model_dump(mode="json", exclude_defaults=True)
    return dg.MetadataValue.md(f"```yaml\n{yaml.safe_dump(plain, sort_keys=False)}```")
