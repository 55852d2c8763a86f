"""Where a pretrained model comes from: a folder, or a snapshot of the hub in its local cache."""

from pathlib import Path

from configs.schema import PretrainedModel

HUB_FILES = ["*.json", "model*.safetensors", "*.txt", "*.model", "*.jinja", "tokenizer*"]


def locate(config: PretrainedModel) -> Path:
    """The local folder of a pretrained model: the path itself, or the hub's snapshot in the local cache or fetched now.

    `FileNotFoundError` says which field to change where neither is there.
    """
    local = Path(config.path).expanduser()
    if local.is_dir():
        return local
    if config.path.startswith((".", "/", "~")) or config.path.count("/") != 1:
        raise FileNotFoundError(f"model.path: no such folder: {config.path}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(config.path, revision=config.revision, allow_patterns=HUB_FILES))
    except (LocalEntryNotFoundError, RepositoryNotFoundError, HfHubHTTPError, OSError) as error:
        raise FileNotFoundError(
            f"model.path: {config.path!r} is no local folder, not in the cache, and the hub can't give it: {error}"
        ) from error
