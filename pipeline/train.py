"""From settings and folders to a trained model in a folder: where trainers, checkpoints and reports meet."""

import json
import logging
import os
import platform
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, cast

import mlx_ops as mlx_ops  # before MLX, which binds its BLAS when it is imported

# isort: split
import mlx.core as mx

from configs.atomic import is_full, new_directory, verify
from configs.loader import changed_fields, digest
from configs.schema import (
    ExperimentConfig,
    LoraAdapter,
    PretrainedModel,
    TrainedStage,
    TrainingConfig,
)
from mlx_ops.backend import Backend, prepare
from mlx_ops.checkpoint import (
    CheckpointStore,
    Saved,
    manifest_digest,
    restore_optimizer,
    trainer_arrays,
    tree_bytes,
)
from mlx_ops.checkpointing import checkpoint_layers
from mlx_ops.footprint import Footprint, estimate, require_memory
from mlx_ops.model import (
    DTYPES,
    Policy,
    add_adapter,
    copy_model,
    finite,
    fuse_adapters,
    load_adapter,
    load_policy,
    make_scratch,
    write_adapter,
    write_model,
)
from mlx_ops.prompts import prompt_text
from mlx_ops.trainer import BaseTrainer, Metrics
from mlx_ops.watchdog import Watchdog
from pipeline.data.store import read_examples
from pipeline.hub import locate
from pipeline.job import Job, Trained
from pipeline.provenance import PACKAGES, installed
from pipeline.resources import DeviceSettings
from pipeline.samples import SampleFiles
from pipeline.trainers import build

log = logging.getLogger(__name__)

Settings = dict[str, Any]
MAX_INSPECTED = 10
"""Batches of skipped updates that a run keeps."""


def make_base(
    experiment: ExperimentConfig, dataset_dir: Path | None, directory: Path, device: DeviceSettings
) -> Trained:
    """The untrained model as a checkpoint folder. One from scratch needs the dataset, for its tokenizer."""
    prepare(device.device)
    config = experiment.model
    with new_directory(directory, {"stage": "base", "step": 0}) as folder:
        if isinstance(config, PretrainedModel):
            copy_model(locate(config), folder / "model")
        else:
            assert dataset_dir is not None, "a tokenizer from scratch needs a dataset"
            examples = read_examples(dataset_dir, "train")
            texts = (prompt_text(e, experiment.prompt) + (e.target or e.answer or "") for e in examples)
            make_scratch(config, texts, folder / "model", experiment.seed)
        load_policy(folder / "model")
    return Trained(directory, 0, manifest_digest(directory), [])


def train_stage(job: Job, stage: TrainedStage) -> Trained:
    """Train one stage, or go on from the newest checkpoint of the run directory that verifies.

    An interrupt leaves a checkpoint of the last completed step and goes on its way. `ValueError` where the model that
    it starts from is not what was written, or the memory can't hold the training; `OSError` where the disk can't hold
    its checkpoints. Both say how much is missing.
    """
    store, samples = fit_stage(job, stage)
    return publish(store.chosen(), job, stage, samples.best_and_worst(job.experiment.monitoring.log_samples))


def fit_stage(job: Job, stage: TrainedStage) -> tuple[CheckpointStore, SampleFiles]:
    """`train_stage` up to what it publishes, on every rank of the job: the run's checkpoints and its samples."""
    config: TrainingConfig = getattr(job.experiment, stage)
    backend = prepare(job.device.device, job.device.memory_limit_gb)
    verify(job.start_dir)
    policy = _load_start(job, config, backend)
    needs = estimate(policy.model, _model_settings(policy), config, backend.memory_bytes)
    log.info("memory: %s", needs)
    require_memory(needs, config, backend.memory_bytes, stage)
    samples = SampleFiles(job.run_dir / "samples")
    parts = build(job, policy, config, samples, needs.token_budget)
    store = CheckpointStore(job.run_dir / "checkpoints", config.checkpoint)
    run = _Run(job, stage, config, policy, parts.trainer, parts.watchdog, store)
    run.resume()
    run.require_room(needs)
    run.fit(parts.evaluate)
    return store, samples


@dataclass(frozen=True)
class _Run:
    """A trainer in its run directory."""

    job: Job
    stage: TrainedStage
    config: TrainingConfig
    policy: Policy
    trainer: BaseTrainer[Any]
    watchdog: Watchdog | None
    store: CheckpointStore

    def settings(self) -> Settings:
        """What the result depends on; a resume refuses to go on under other settings."""
        experiment = self.job.experiment
        return {
            "stage": self.stage,
            "seed": experiment.seed,
            "config": self.config.model_dump(mode="json"),
            "prompt": experiment.prompt.model_dump(mode="json"),
            "rewards": [reward.model_dump(mode="json") for reward in experiment.rewards],
            "dataset": manifest_digest(self.job.dataset_dir),
            "start": manifest_digest(self.job.start_dir),
        }

    def resume(self) -> None:
        """Go on from the newest checkpoint that verifies; `ValueError` lists settings that differ from the run's."""
        saved, skipped = self.store.newest()
        for reason in skipped:
            log.warning("checkpoint passed over: %s", reason)
        self._require_the_same(0 if saved is None else saved.step)
        if saved is None:
            return
        log.info("going on from step %d", saved.step)
        differing = self._differences(saved.state["settings"])
        if differing:
            raise ValueError(
                f"{self.job.run_dir}: its checkpoint was made with other settings: {', '.join(differing)}; "
                "set them back, or start a new run"
            )
        _warn_of_other_versions(saved.state["versions"])
        for fault in self.store.go_on_from(saved):
            log.warning("pointer written anew: %s", fault)
        load_weights(self.policy, self.config, saved.path)
        restore_optimizer(self.trainer.optimizer, saved.path)
        self.trainer.restore(saved.step, saved.state["trainer"], trainer_arrays(saved.path))
        if self.watchdog is not None:
            self.watchdog.restore(saved.state["watchdog"])

    def _require_the_same(self, step: int) -> None:
        """`ValueError` where a rank would go on from another step, or with other settings, data or weights."""
        first, *others = self.job.ranks.gather([{"step": step, "settings": digest(self.settings())}])
        for rank, found in enumerate(others, 1):
            if found != first:
                raise ValueError(
                    f"rank {rank} would go on with {found}, rank 0 with {first}; "
                    "every machine needs the same artifacts folder, code and settings"
                )

    def fit(self, evaluate: Callable[[int], Metrics]) -> None:
        every, steps = self.config.checkpoint.save_every, self.config.steps

        def save(step: int, metrics: Metrics) -> None:
            stops = self._not_learning()
            if step % every == 0 or step == steps or self.config.checkpoint.best_metric in metrics or stops:
                self.save(metrics)
            if stops:
                raise ValueError(f"stopped after step {step}, as watchdog.stop says: {stops}")

        try:
            self.trainer.fit(
                steps, report=self._report, save=save, evaluate=evaluate, shield=held_interrupts, inspect=self._inspect
            )
        except Exception as error:
            if is_full(error):
                raise self.store.full(self.trainer.completed, error) from error
            raise
        except BaseException:  # an interrupt: what was reached must not be lost
            self.trainer.rewind()
            if self.trainer.resting and self.trainer.completed not in self.store.steps():
                self.save({})
            raise

    def _report(self, step: int, metrics: Metrics) -> None:
        self.job.report(step, metrics)
        if self.watchdog is not None:
            for symptom in self.watchdog.look(metrics):
                log.warning("step %d: %s", step, symptom)

    def _not_learning(self) -> str:
        """What the run is to be stopped for; nothing where the settings only warn."""
        if self.watchdog is None or not self.watchdog.config.stop:
            return ""
        return "; ".join(str(symptom) for symptom in self.watchdog.lasting)

    def require_room(self, needs: Footprint) -> None:
        """`OSError` where the disk can't hold the checkpoints that are still to come."""
        lora = isinstance(self.config.adapter, LoraAdapter)
        checkpoint = self._weight_bytes() + needs.optimizer + needs.reference + needs.critic
        # A whole model is published as links to its checkpoint.
        self.store.require_room(self.config.steps, checkpoint, needs.weights if lora else 0)

    def _weight_bytes(self) -> int:
        lora, model = isinstance(self.config.adapter, LoraAdapter), self.policy.model
        return tree_bytes(model.trainable_parameters() if lora else model.parameters())

    def _inspect(self, name: str, arrays: Mapping[str, mx.array]) -> None:
        """Keep the batch of a skipped update, of the first few of them."""
        folder = self.job.run_dir / "nonfinite"
        folder.mkdir(exist_ok=True)
        log.warning("update %s skipped: its loss or gradient is not finite; see %s", name, folder)
        if len(list(folder.iterdir())) < MAX_INSPECTED:
            mx.save_safetensors(str(folder / f"{name}.safetensors"), dict(arrays))

    def save(self, metrics: Metrics) -> None:
        if not self.job.ranks.is_writer:
            return
        if not finite(self.policy.model):
            raise FloatingPointError(
                f"step {self.trainer.completed}: the weights are not finite any more, so no checkpoint is written; "
                "lower the learning rate and start a new run"
            )
        settings = self.settings()
        watched = None if self.watchdog is None else self.watchdog.state()
        with held_interrupts():
            self.store.save(
                self.trainer.completed,
                write_weights=lambda folder: save_weights(self.policy, self.config, folder),
                weight_bytes=self._weight_bytes(),
                optimizer=self.trainer.optimizer,
                state={
                    "settings": settings,
                    "config_digest": digest(settings),
                    "versions": versions(),
                    # Relative, so that the artifacts can move.
                    "base": {
                        "path": os.path.relpath(self.job.start_dir, self.job.run_dir),
                        "sha256": settings["start"],
                    },
                    "trainer": self.trainer.committed,
                    "watchdog": watched,
                },
                metrics=metrics,
                arrays=self.trainer.arrays(),
            )

    def _differences(self, old: Settings) -> list[str]:
        now = self.settings()
        others = [name for name in now if name != "config" and old.get(name) != now[name]]
        return [*others, *(f"{self.stage}.{field}" for field in changed_fields(old["config"], self.config))]


def versions() -> dict[str, str]:
    """What the numbers of a run may depend on beside its settings."""
    return {"python": platform.python_version(), **installed(PACKAGES)}


def _warn_of_other_versions(then: Mapping[str, str]) -> None:
    now = versions()
    other = [
        f"{name} {then.get(name)} -> {now.get(name)}"
        for name in sorted({*then, *now})
        if then.get(name) != now.get(name)
    ]
    if other:
        log.warning("the run goes on with other versions, so its numbers may differ: %s", ", ".join(other))


def save_weights(policy: Policy, config: TrainingConfig, folder: Path) -> None:
    """The trained weights: a whole model, or the adapter alone."""
    if isinstance(config.adapter, LoraAdapter):
        write_adapter(policy.model, config.adapter, folder / "adapter")
    else:
        write_model(policy.model, policy.path, folder / "model")


def load_weights(policy: Policy, config: TrainingConfig, folder: Path) -> None:
    """What `save_weights` wrote, into the model that wrote it."""
    if isinstance(config.adapter, LoraAdapter):
        load_adapter(policy.model, folder / "adapter")
        return
    for file in sorted((folder / "model").glob("model*.safetensors")):
        policy.model.load_weights(list(cast(dict[str, mx.array], mx.load(str(file))).items()), strict=False)


def publish(saved: Saved, job: Job, stage: TrainedStage, samples: list[dict[str, Any]]) -> Trained:
    """The chosen checkpoint as a folder of its own that rotation never touches, with adapters fused into `model/`."""
    path = job.run_dir / "published" / saved.path.name
    with new_directory(path, {"stage": stage, "step": saved.step}) as folder:
        if (saved.path / "adapter").is_dir():
            copy_model(saved.path / "adapter", folder / "adapter")
            config: TrainingConfig = getattr(job.experiment, stage)
            policy = load_policy(job.start_dir / "model")
            add_adapter(policy.model, config.adapter, job.experiment.seed)
            load_adapter(policy.model, folder / "adapter")
            fuse_adapters(policy.model)
            write_model(policy.model, policy.path, folder / "model")
        else:
            copy_model(saved.path / "model", folder / "model")
    return Trained(path, saved.step, manifest_digest(path), samples)


def _load_start(job: Job, config: TrainingConfig, backend: Backend) -> Policy:
    policy = load_policy(job.start_dir / "model", _dtype(job.device, config, backend))
    add_adapter(policy.model, config.adapter, job.experiment.seed)
    if config.gradient_checkpointing:
        checkpoint_layers(policy.model)
    return policy


def _dtype(device: DeviceSettings, config: TrainingConfig, backend: Backend) -> mx.Dtype | None:
    """What the weights are held in. A full model trains in float32: in bfloat16 most of a step of 1e-6 rounds away."""
    if device.dtype != "auto":
        return DTYPES[device.dtype]
    return DTYPES[backend.dtype] if isinstance(config.adapter, LoraAdapter) else mx.float32


def _model_settings(policy: Policy) -> Settings:
    return json.loads((policy.path / "config.json").read_text(encoding="utf-8"))


@contextmanager
def held_interrupts() -> Iterator[None]:
    """An interrupt that comes inside the block takes effect after it. Only the main thread receives any."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    caught: list[int] = []

    def remember(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 (a signal handler's shape)
        caught.append(number)

    before = {number: signal.signal(number, remember) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if caught:
        signal.raise_signal(signal.Signals(caught[0]))
