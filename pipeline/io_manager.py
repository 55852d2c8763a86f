"""References between assets: `<root>/assets/<asset key>/current.json`, readable without Dagster, written atomically."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import dagster as dg
from pydantic import ValidationError

from configs.atomic import write_json
from configs.loader import describe
from configs.schema import Strict
from pipeline.resources import RunStore

Ref = TypeVar("Ref", bound=Strict)


class Manifest(Strict):
    """What `current.json` holds."""

    asset: str
    kind: str
    """The class of the reference."""
    run_id: str
    written: str
    """UTC, ISO 8601."""
    value: dict[str, Any]


def manifest_path(root: Path, key: dg.AssetKey) -> Path:
    return root.joinpath("assets", *key.path, "current.json")


def write_ref(root: Path, key: dg.AssetKey, ref: Strict, run_id: str) -> None:
    """Make `ref` the current value of an asset."""
    path = manifest_path(root, key)
    path.parent.mkdir(parents=True, exist_ok=True)
    written = datetime.now(UTC).isoformat(timespec="seconds")
    manifest = Manifest(
        asset=key.to_user_string(),
        kind=type(ref).__name__,
        run_id=run_id,
        written=written,
        value=ref.model_dump(mode="json"),
    )
    write_json(path, manifest.model_dump(mode="json"))


def read_ref(root: Path, key: dg.AssetKey, kind: type[Ref]) -> Ref:
    """The current value of an asset.

    `FileNotFoundError` where the asset was never materialised under `root`, `ValueError` where the file holds something
    else.
    """
    path = manifest_path(root, key)
    if not path.is_file():
        raise FileNotFoundError(f"{key.to_user_string()} was never materialised under {root}: no {path}")
    try:
        manifest = Manifest.model_validate_json(path.read_bytes())
        if manifest.kind != kind.__name__:
            raise ValueError(f"{path}: holds a {manifest.kind}, and a {kind.__name__} was expected")
        return kind.model_validate(manifest.value)
    except ValidationError as error:
        raise ValueError(describe(error, path)) from error


def find_ref(root: Path, key: dg.AssetKey, kind: type[Ref]) -> Ref | None:
    """`read_ref`, or `None` where the asset was never materialised."""
    return read_ref(root, key, kind) if manifest_path(root, key).is_file() else None


class ReferenceIOManager(dg.IOManager):
    """Assets return references, and take them by annotation (`checkpoint: CheckpointRef`)."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def handle_output(self, context: dg.OutputContext, obj: object) -> None:
        if not isinstance(obj, Strict):
            raise TypeError(f"{context.asset_key.to_user_string()}: expected a reference, got {type(obj).__name__}")
        write_ref(self.root, context.asset_key, obj, context.run_id)

    def load_input(self, context: dg.InputContext) -> Strict:
        kind = context.dagster_type.typing_type
        if not (isinstance(kind, type) and issubclass(kind, Strict)):
            raise TypeError(f"{context.asset_key.to_user_string()}: annotate the input with its reference, not {kind}")
        return read_ref(self.root, context.asset_key, kind)


@dg.io_manager(required_resource_keys={"runs"})
def reference_io_manager(context: dg.InitResourceContext) -> ReferenceIOManager:
    """Under the root of `runs`, also where a run's configuration changes it (a nested resource wouldn't follow)."""
    runs: RunStore = context.resources.runs
    return ReferenceIOManager(runs.directory)
