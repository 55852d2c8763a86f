"""What lasts is written beside its place, synced, renamed, its folder synced: a reader sees the old or the new, whole.

It stands in the lowest package because every package above writes something that lasts.
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
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
    write_text(path, _text(value))


def write_sealed(path: Path, value: Mapping[str, Any]) -> None:
    """Replace a JSON object atomically, with a sha256 of itself in it."""
    write_text(path, _sealed(value))


def read_sealed(path: Path) -> dict[str, Any]:
    """What `write_sealed` wrote. `ValueError` names the file where a single byte of it is another."""
    try:
        content = path.read_bytes()
        value = json.loads(content)
        seal = value.pop("seal", None) if isinstance(value, dict) else None
        if seal is None:
            raise ValueError("no seal (it was written by an older version, or by hand); make it anew")
        if _sealed(value).encode() != content:
            raise ValueError("it is not what was written")
    except (OSError, ValueError, LookupError, RecursionError) as error:
        raise ValueError(f"{path}: can't be read: {error}") from error
    return value


def seal_fault(path: Path) -> str | None:
    """What is wrong with a sealed file, if there is one."""
    return _fault(read_sealed, path) if path.exists() else None


def _fault(read: Callable[[Path], object], path: Path) -> str | None:
    try:
        read(path)
    except ValueError as error:
        return str(error)
    return None


def _sealed(value: Mapping[str, Any]) -> str:
    return _text({**value, "seal": hashlib.sha256(_text(value).encode()).hexdigest()})


def _text(value: Any) -> str:
    return json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n"


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
        _put(beside, path)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    sync(path.parent)


def _put(beside: Path, path: Path) -> None:
    old = path.with_name(f".{path.name}.{os.getpid()}.old.tmp")
    if path.exists():
        path.rename(old)
    try:
        beside.rename(path)
    except OSError:
        if old.exists():
            old.rename(path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def sweep(directory: Path) -> None:
    """Remove what writers that were killed left unfinished in a folder; none may be at work in it."""
    for left in directory.glob(".*.tmp"):
        if left.is_dir():
            shutil.rmtree(left)
        else:
            left.unlink(missing_ok=True)


def write_manifest(directory: Path, extra: Mapping[str, Any]) -> None:
    """Sync every file of a folder and write down their sizes and sha256."""
    files = {}
    for name, file in sorted(_files(directory).items()):
        sync(file)
        files[name] = {"bytes": file.stat().st_size, "sha256": sha256(file)}
    write_sealed(directory / MANIFEST, {**extra, "files": files})


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of a folder. `ValueError` names the folder where there is none that can be read."""
    path = directory / MANIFEST
    if not path.is_file():
        raise ValueError(f"{directory}: no readable {MANIFEST}")
    manifest = read_sealed(path)
    if not isinstance(manifest.get("files"), dict):
        raise ValueError(f"{path}: holds no list of files")
    for name, about in manifest["files"].items():
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"{path}: {name!r} leaves the folder")
        if not isinstance(about, dict) or not about.keys() >= {"bytes", "sha256"}:
            raise ValueError(f"{path}: {name!r} has no size and sha256")
    return manifest


def verify(directory: Path) -> dict[str, Any]:
    """The manifest of a folder whose files are all as it says, and no others. `ValueError` names the first fault."""
    manifest = read_manifest(directory)
    found = _files(directory)
    for name, expected in sorted(manifest["files"].items()):
        file = found.pop(name, None)
        if file is None:
            raise ValueError(f"{directory / name}: missing")
        if file.stat().st_size != expected["bytes"] or sha256(file) != expected["sha256"]:
            raise ValueError(
                f"{file}: not what was written ({expected['bytes']} bytes, sha256 {str(expected['sha256'])[:12]}…)"
            )
    if found:
        raise ValueError(f"{min(found.values())}: not in {MANIFEST}")
    return manifest


def folder_fault(directory: Path) -> str | None:
    """What `verify` finds wrong with a folder, if anything."""
    return _fault(verify, directory)


def link_or_copy(source: Path, target: Path) -> None:
    """A hard link where the file system allows it, else a copy."""
    try:
        target.hardlink_to(source)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)


def _files(directory: Path) -> dict[str, Path]:
    """The files of a folder but for its manifest, by relative name; links to elsewhere are not its own."""
    own = (item for item in directory.rglob("*") if item.is_file() and not item.is_symlink())
    named = {item.relative_to(directory).as_posix(): item for item in own}
    named.pop(MANIFEST, None)
    return named


def sha256(path: Path) -> str:
    """The sha256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def free_bytes(path: Path) -> int:
    """What may still be written beside `path`, which need not exist yet."""
    there = next(place for place in (path, *path.absolute().parents) if place.exists())
    return shutil.disk_usage(there).free


def is_full(error: BaseException) -> bool:
    """The disk, a quota or a limit on files left no room for what was written."""
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    # MLX's own writer has no number for it.
    return full or (isinstance(error, RuntimeError) and "Unable to write" in str(error))


def sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
