"""The asset `dataset/<name>`: examples loaded, cleaned, split. Experiments that name the same dataset share it."""

import dagster as dg

from pipeline.catalog import Entry
from pipeline.guard import long_work
from pipeline.keys import DATASETS_GROUP, dataset_key
from pipeline.labels import as_yaml
from pipeline.metadata import dataset_metadata, folder
from pipeline.refs import DatasetRef
from pipeline.resources import RunStore
from pipeline.versions import dataset_version


def dataset_asset(entry: Entry) -> dg.AssetsDefinition:
    """The dataset that an experiment names."""
    config = entry.experiment.dataset
    version = dataset_version(config)

    @dg.asset(
        key=dataset_key(config.name),
        group_name=DATASETS_GROUP,
        kinds={config.train.kind},
        metadata={"settings": as_yaml(config)},
        code_version=version,
        description=f"Examples of {config.name}: loaded, cleaned, deduplicated, split.",
    )
    def dataset(runs: RunStore) -> dg.MaterializeResult[DatasetRef]:
        from pipeline.data.store import build_dataset

        directory = runs.dataset_dir(config.name, version)
        with long_work("nothing was written"):
            entry.load_plugins()
            summary = build_dataset(config, directory)
        ref = DatasetRef(
            path=runs.relative(directory),
            sha256=summary.sha256,
            train=summary.train,
            test=summary.test,
            rejected=summary.rejected,
        )
        metadata = {**dataset_metadata(summary), **folder("dataset_dir", directory)}
        return dg.MaterializeResult(value=ref, metadata=metadata, data_version=dg.DataVersion(ref.sha256))

    return dataset
