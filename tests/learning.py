"""Whether each algorithm learns: `python -m tests.learning [FOLDER [ALGORITHM …]]`, or `make learn` for all of them.

One dataset, one model and one SFT start, those of the quickstart, made once; each algorithm trains from there within a
number of updates. The table says what each gained on all held-out chains, greedily; the exit status is 1 where one
misses a claim. Runs in FOLDER that were finished are used as they are.
"""

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx_ops as mlx_ops  # before MLX, which binds its BLAS when it is imported

# isort: split
from configs.loader import EXPERIMENTS, digest
from configs.schema import ExperimentConfig, PolicyConfig, TrainedStage
from configs.strict_yaml import read_mapping
from pipeline.catalog import Entry
from pipeline.evaluate import Subject, evaluate_checkpoint
from pipeline.evaluation.compare import Comparison, compare_reports
from pipeline.job import Job, Trained
from pipeline.local import Workshop
from pipeline.monitoring import open_reporter
from pipeline.refs import CheckpointRef
from pipeline.resources import DeviceSettings, RunStore
from pipeline.sinks import RunInfo, read_metrics
from pipeline.train import train_stage

UPDATES = 200
"""Optimizer updates that each algorithm may take."""
GAIN = 0.10
"""What each must add to SFT's held-out accuracy."""
EXPLAINED_VARIANCE = 0.3
"""What PPO's critic must explain of the returns, on average over the last `LAST` steps."""
LAST = 5

PLOT = Path(__file__).parents[1] / "docs" / "images" / "learning.png"

SEEN: dict[str, Any] = {"eval_every": 5, "eval_examples": 256}
PPO: dict[str, Any] = {
    "steps": 25,
    "learning_rate": 2.0e-5,
    "optimizer": {"warmup_steps": 5},
    "prompts_per_step": 512,
    "completions_per_prompt": 1,
    "epochs": 2,
    "minibatches": 4,
    "sampling": {"max_tokens": 64},
    "checkpoint": {"save_every": 5},
    "critic": {"kind": "separate", "learning_rate": 3.0e-4},
}
"""As many completions a step as the quickstart's GRPO, each of another prompt: a critic that sees few prompts learns
them by heart. A linear head on the shared trunk explains nothing here: what is still to be earned hangs on whether the
sums so far are right, which the trunk need not know. The policy's rate is lower: it moves eight times a step."""
ALGORITHMS: dict[str, dict[str, Any]] = {
    **{name: {"preset": name} for name in ("grpo", "dr_grpo", "dapo", "gspo", "rloo", "cispo")},
    "ppo": PPO,
}
"""Over the quickstart's own `grpo:` section, or in place of it."""


@dataclass(frozen=True)
class Learned:
    """What one algorithm made of the SFT start."""

    algorithm: str
    updates: int
    comparison: Comparison
    rows: list[dict[str, float]]

    @property
    def explained_variance(self) -> float | None:
        """Of the last steps; None without a critic."""
        found = [row["explained_variance"] for row in self.rows[-LAST:] if "explained_variance" in row]
        return sum(found) / len(found) if found else None

    def missed(self) -> list[str]:
        """The claims that do not hold."""
        explained, claims = self.explained_variance, []
        if self.updates > UPDATES:
            claims.append(f"{self.algorithm}: {self.updates} updates, at most {UPDATES}")
        if self.comparison.difference < GAIN:
            claims.append(f"{self.algorithm}: {100 * self.comparison.difference:+.1f} points, at least {100 * GAIN:g}")
        if explained is not None and explained <= EXPLAINED_VARIANCE:
            claims.append(f"{self.algorithm}: explained variance {explained:.2f}, above {EXPLAINED_VARIANCE}")
        return claims

    def line(self) -> str:
        """A row of the table."""
        change, explained = self.comparison, self.explained_variance
        cells = [
            self.algorithm,
            str(self.updates),
            f"{change.first_score:.1%}",
            f"{change.second_score:.1%}",
            f"{100 * change.difference:+.1f}",
            f"[{100 * change.low:+.1f}, {100 * change.high:+.1f}]",
            f"{sum(row['seconds/step'] for row in self.rows):.0f} s",
            "–" if explained is None else f"{explained:.2f}",
        ]
        return f"| {' | '.join(cells)} |"


HEADER = (
    "| algorithm | updates | SFT | after | gain | 95 % of the gain | seconds | explained variance |",
    "|---|---|---|---|---|---|---|---|",
)


def experiment_of(algorithm: str) -> ExperimentConfig:
    """The quickstart with this algorithm in place of its own."""
    data = read_mapping(EXPERIMENTS / "quickstart.yaml")
    quickstart, own = data.pop("grpo"), ALGORITHMS[algorithm] | SEEN
    section = {"ppo": own} if algorithm == "ppo" else {"grpo": quickstart | own}
    return ExperimentConfig.model_validate({**data, **section, "name": "quickstart"})


def learn(folder: Path, algorithm: str) -> Learned:
    """Train from the shared start, and look at all held-out chains before and after."""
    experiment, stage = experiment_of(algorithm), "ppo" if algorithm == "ppo" else "grpo"
    config: PolicyConfig = getattr(experiment, stage)
    shared = Workshop(Entry(experiment, EXPERIMENTS / "quickstart.yaml"), RunStore(root=str(folder)), DeviceSettings())
    before = shared.evaluate("sft", experiment.evaluations[0])[1]
    start = shared.runs.locate(shared.checkpoint("sft").path)
    run_dir = shared.runs.directory / algorithm
    info = RunInfo("quickstart", algorithm, algorithm, run_dir, config.steps)
    with open_reporter(info, experiment.monitoring) as reporter:
        job = Job(experiment, shared.dataset(), start, run_dir, shared.device, reporter)
        trained = train_stage(job, stage)
    after = _report(shared, experiment, stage, trained)
    return Learned(
        algorithm, config.steps * config.updates_per_step, compare_reports(before, after), read_metrics(run_dir)
    )


def _report(shared: Workshop, experiment: ExperimentConfig, stage: TrainedStage, trained: Trained) -> Path:
    checkpoint = CheckpointRef(
        path=shared.runs.relative(trained.checkpoint),
        stage=stage,
        step=trained.step,
        config_digest=digest(getattr(experiment, stage)),
        sha256=trained.sha256,
    )
    folder = trained.checkpoint.parents[1] / "report"
    subject = Subject(checkpoint, trained.checkpoint, shared.dataset())
    evaluate_checkpoint(experiment, experiment.evaluations[0], subject, folder, shared.device)
    return folder


def draw(learned: Sequence[Learned], path: Path) -> None:
    """Reward of the rollouts and held-out accuracy over updates, one curve an algorithm."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), dpi=90, layout="constrained")
    rewards, accuracies = figure.subplots(1, 2, sharex=True, sharey=True)
    for place, each in enumerate(learned):
        per_step, color = each.updates / len(each.rows), f"C{place}"
        seen = [(row["step"] * per_step, row["eval_reward"]) for row in each.rows if "eval_reward" in row]
        rewards.plot([row["step"] * per_step for row in each.rows], [row["reward"] for row in each.rows], color=color)
        accuracies.plot(*zip((0, each.comparison.first_score), *seen, strict=True), color=color, label=each.algorithm)
    rewards.set_title("reward of the rollouts", fontsize=10)
    accuracies.set_title(f"held-out accuracy, greedy, {SEEN['eval_examples']} chains", fontsize=10)
    accuracies.legend(fontsize=8, loc="lower right")
    for axes in (rewards, accuracies):
        axes.set_xlabel("optimizer updates", fontsize=9)
        axes.set_xscale("symlog", linthresh=10)  # most of it happens in the first updates; 0 is the SFT start
        axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def main(folder: Path, algorithms: Sequence[str]) -> list[str]:
    """Print the table; the claims that do not hold."""
    learned = [learn(folder, algorithm) for algorithm in algorithms]
    if list(algorithms) == list(ALGORITHMS):
        draw(learned, PLOT)
    print("\n".join([*HEADER, *(each.line() for each in learned)]), flush=True)
    return [claim for each in learned for claim in each.missed()]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        where, *names = sys.argv[1:] or [temporary]
        missed = main(Path(where).resolve(), names or list(ALGORITHMS))
    print("\n".join(missed) or "every claim holds")
    sys.exit(bool(missed))
