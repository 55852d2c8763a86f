"""What assets pass to each other: where a thing is and what made it, never the thing itself. All of it is JSON."""

from configs.schema import Stage, Strict


class DatasetRef(Strict):
    """A preprocessed dataset: `train.jsonl`, `test.jsonl`, `rejected.jsonl` and `manifest.json` in one folder."""

    path: str
    """Relative to the artifact root."""
    sha256: str
    """Of the manifest, which holds the sha256 of each file."""
    train: int
    test: int
    rejected: int


class CheckpointRef(Strict):
    """A model on disk."""

    path: str
    """The checkpoint's folder, relative to the artifact root; its `model/` loads in mlx-lm."""
    stage: Stage
    step: int
    config_digest: str
    sha256: str
    """Of the checkpoint's manifest."""


class ReportRef(Strict):
    """An evaluation report: `report.json`, `items.jsonl` and `report.md` in one folder."""

    path: str
    """Relative to the artifact root."""
    stage: Stage
    benchmark: str
    metric: str
    score: float
    n: int
    low: float
    high: float
    comparability: str
    """Two scores may be compared only where this hash is equal."""
    checkpoint: str
    sha256: str
