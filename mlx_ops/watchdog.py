"""Names a run that is not learning, from the metrics that its steps report.

A symptom that lasts for `patience` steps in a row is told, and told again each time it has lasted as long once more. A
step without a metric says nothing about it. What to do about a symptom is the caller's.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import fmean, variance
from typing import Any

from configs.schema import WatchdogConfig

ADVICE = {
    "reward_flat": "the reward doesn't rise; look at the samples, raise the learning rate or make the task easier",
    "constant_groups": "every group's rewards are equal, so there is nothing to learn from; choose other prompts",
    "entropy_gone": "the policy hardly varies any more; raise entropy_coef or kl_coef, or lower the learning rate",
    "at_length_cap": "completions run into the token limit; raise sampling.max_tokens or reward stopping",
    "sampler_apart": "sampler and trainer disagree on the same tokens; set importance_correction, or a wider dtype",
    "value_loss": "the critic's error explodes; lower critic.learning_rate, or scale the reward down",
}
"""What each symptom means and what helps, by its name."""


@dataclass(frozen=True)
class Symptom:
    """What has been wrong for so many steps in a row."""

    name: str
    found: str
    """The latest numbers."""
    steps: int

    def __str__(self) -> str:
        return f"{self.name} for {self.steps} steps ({self.found}): {ADVICE[self.name]}"


class Watchdog:
    """Looks at one step after the other."""

    def __init__(self, config: WatchdogConfig) -> None:
        self.config = config
        self.counts: dict[str, int] = {}
        self.first: list[float] = []
        """The rewards of the run's first `patience` steps."""
        self.recent: list[float] = []
        """Those of its last."""
        self.lasting: list[Symptom] = []
        """What has lasted for `patience` steps or more, as of the last look."""

    def look(self, metrics: Mapping[str, float]) -> list[Symptom]:
        """What is to be told after a step with these metrics."""
        signs = symptoms(metrics, self.config) | self._reward_flat(metrics)
        for name, found in signs.items():
            self.counts[name] = self.counts.get(name, 0) + 1 if found else 0
        there = [Symptom(name, found, self.counts[name]) for name, found in signs.items() if found]
        self.lasting = [symptom for symptom in there if symptom.steps >= self.config.patience]
        return [symptom for symptom in self.lasting if symptom.steps % self.config.patience == 0]

    def state(self) -> dict[str, Any]:
        """What a resumed run needs; JSON."""
        return {"counts": dict(self.counts), "first": list(self.first), "recent": list(self.recent)}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.counts = dict(state["counts"])
        self.first, self.recent = list(state["first"]), list(state["recent"])

    def _reward_flat(self, metrics: Mapping[str, float]) -> dict[str, str]:
        patience = self.config.patience
        if "reward" not in metrics:
            return {}
        if len(self.first) < patience:
            self.first.append(metrics["reward"])
            return {}
        self.recent = [*self.recent, metrics["reward"]][-patience:]
        if len(self.recent) < patience:
            return {}
        early, late = fmean(self.first), fmean(self.recent)
        risen = late - early > 2 * sqrt(_error(self.first) + _error(self.recent))
        return {"reward_flat": "" if risen else f"{late:.4g}, first {early:.4g}"}


def symptoms(metrics: Mapping[str, float], config: WatchdogConfig) -> dict[str, str]:
    """For each symptom that one step's metrics tell of: the numbers where it is there, "" where it isn't."""
    limits = {
        "constant_groups": ("groups_without_signal", lambda x: x >= 1, "all"),
        "entropy_gone": ("sampler_entropy", lambda x: x < config.min_entropy, f"least {config.min_entropy:g}"),
        "at_length_cap": ("truncated", lambda x: x > config.max_truncated, f"most {config.max_truncated:g}"),
        "sampler_apart": (
            "sampler_gap_mean",
            lambda x: x > config.max_logprob_difference,
            f"most {config.max_logprob_difference:g}",
        ),
        "value_loss": ("value_loss", lambda x: not x <= config.max_value_loss, f"most {config.max_value_loss:g}"),
    }
    return {
        name: f"{metric} {metrics[metric]:.4g}, {limit}" if wrong(metrics[metric]) else ""
        for name, (metric, wrong, limit) in limits.items()
        if metric in metrics
    }


def _error(values: Sequence[float]) -> float:
    """The squared standard error of a mean."""
    return variance(values) / len(values) if len(values) > 1 else 0.0
