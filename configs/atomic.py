"""What lasts is written beside its place, synced, renamed, its folder synced: a reader sees the old or the new, whole.

It stands in the lowest package because every package above writes something that lasts.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"


def write_text(path: Path, text: str) -> None:
    """Replace a file's content atomically."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        beside.write_text(text, encoding="utf-8")
        sync(beside)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    sync(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file atomically; keys sorted, nan refused."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n")


@contextmanager
def new_directory(path: Path, extra: Mapping[str, Any] | None = None) -> Iterator[Path]:
    """A folder to fill, which becomes `path` with a manifest of its files (and `extra`) once the block ends well.

    What stood at `path` is replaced. After an error or an interrupt nothing of the new folder is left.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    try:
        yield beside
        write_manifest(beside, extra or {})
        for folder in [beside, *(item for item in beside.rglob("*") if item.is_dir())]:
            sync(folder)
        old = path.with_name(f".{path.name}.{os.getpid()}.old.tmp")
        if path.exists():
            path.rename(old)
        beside.rename(path)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    sync(path.parent)


def write_manifest(directory: Path, extra: Mapping[str, Any]) -> None:
    """Sync every file of a folder and write down their sizes and sha256."""
    files = {}
    for file in sorted(item for item in directory.rglob("*") if item.is_file()):
        sync(file)
        files[file.relative_to(directory).as_posix()] = {"bytes": file.stat().st_size, "sha256": sha256(file)}
    manifest = directory / MANIFEST
    text = json.dumps({**extra, "files": files}, indent=2, sort_keys=True, allow_nan=False)
    manifest.write_text(text + "\n", encoding="utf-8")
    sync(manifest)


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of a folder. `ValueError` names the folder where there is none that can be read."""
    try:
        manifest = json.loads((directory / MANIFEST).read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"{directory}: no readable {MANIFEST}: {error}") from error
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        raise ValueError(f"{directory / MANIFEST}: holds no list of files")
    return manifest


def verify(directory: Path) -> dict[str, Any]:
    """The manifest of a folder whose files are all as it says. `ValueError` names the first that is not."""
    manifest = read_manifest(directory)
    for name, expected in sorted(manifest["files"].items()):
        file = directory / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"{directory / MANIFEST}: {name!r} leaves the folder")
        if not file.is_file():
            raise ValueError(f"{file}: missing")
        if file.stat().st_size != expected["bytes"] or sha256(file) != expected["sha256"]:
            raise ValueError(
                f"{file}: not what was written ({expected['bytes']} bytes, sha256 {expected['sha256'][:12]}…)"
            )
    return manifest


def sha256(path: Path) -> str:
    """The sha256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
