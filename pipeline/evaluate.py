"""A checkpoint on disk to a report on disk: what the report assets and the command line share."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from configs.atomic import sha256
from configs.schema import EvaluationConfig, ExperimentConfig
from pipeline.provenance import collect
from pipeline.refs import CheckpointRef
from pipeline.resources import DeviceSettings, project_root

if TYPE_CHECKING:
    from mlx_ops.backend import Backend
    from mlx_ops.model import Policy
    from pipeline.evaluation.base import EvaluationContext
    from pipeline.evaluation.report import EvaluationReport


@dataclass(frozen=True)
class Subject:
    """The model that is evaluated, and the data around it."""

    checkpoint: CheckpointRef
    checkpoint_dir: Path
    dataset_dir: Path


def evaluate_checkpoint(
    experiment: ExperimentConfig,
    evaluation: EvaluationConfig,
    subject: Subject,
    directory: Path,
    device: DeviceSettings,
) -> "EvaluationReport":
    """Put a benchmark to a checkpoint's model, the report into `directory`. Raises what loading and `evaluate` do."""
    from mlx_ops.backend import prepare
    from pipeline.evaluation.run import evaluate
    from pipeline.progress import drawing

    policy = load(subject.checkpoint_dir / "model", device, prepare(device.device))
    context = surroundings(experiment, subject)
    return evaluate(policy, evaluation, context=context, directory=directory, progress=drawing)


def load(folder: Path, device: DeviceSettings, backend: "Backend") -> "Policy":
    """The model as it is stored, but in float32 on a CPU, where half precision is slower."""
    import mlx.core as mx

    from mlx_ops.model import DTYPES, load_policy

    if device.dtype != "auto":
        return load_policy(folder, DTYPES[device.dtype])
    return load_policy(folder, None if backend.is_gpu else mx.float32)


def surroundings(experiment: ExperimentConfig, subject: Subject) -> "EvaluationContext":
    """What a report says about the model and the experiment's data."""
    from pipeline.data.store import read_examples
    from pipeline.evaluation.base import EvaluationContext
    from pipeline.evaluation.report import DatasetInfo

    dataset, checkpoint = experiment.dataset, subject.checkpoint
    source = dataset.test or dataset.train
    return EvaluationContext(
        experiment=experiment.name,
        stage=checkpoint.stage,
        seed=experiment.seed,
        prompt=experiment.prompt,
        checkpoint=checkpoint.path,
        checkpoint_sha256=checkpoint.sha256,
        step=checkpoint.step,
        run_id=training_run(checkpoint),
        dataset=DatasetInfo(
            name=dataset.name,
            revision=getattr(source, "revision", None),
            sha256=sha256(subject.dataset_dir / "manifest.json"),
            split="test",
        ),
        test=read_examples(subject.dataset_dir, "test"),
        train=read_examples(subject.dataset_dir, "train"),
        rewards=experiment.rewards,
        provenance=collect(project_root()),
    )


def training_run(checkpoint: CheckpointRef) -> str | None:
    """The run that made a checkpoint, as its path says: `<experiment>/<stage>/<run>/…`."""
    parts = Path(checkpoint.path).parts
    return parts[2] if len(parts) > 2 else None
