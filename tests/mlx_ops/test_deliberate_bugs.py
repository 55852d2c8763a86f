"""The oracle is worth what it catches: each bug that some trainer had is put into ours, and must be noticed."""

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from mlx_ops import advantages, corrections, logprobs, losses
from tests.mlx_ops.hand_worked import CASES, FIXTURES
from tests.oracle import disagreements

VECTORS = Path(__file__).parents[3] / "shared" / "vectors" / "rl_vectors.json"
MODULES = (logprobs, advantages, losses, corrections)

BUGS: dict[str, tuple[ModuleType, str, str, str]] = {
    "biased std": (advantages, "np.maximum(count - 1, 1)", "np.maximum(count, 1)", "group_advantage"),
    "epsilon inside the root": (
        advantages,
        "centred /= _std(groups, axis=1)[:, None] + eps",
        "centred /= np.sqrt(_std(groups, axis=1)[:, None] ** 2 + eps)",
        "advantage",
    ),
    "noise of a constant group divided by its std": (
        advantages,
        "centred[constant_groups(groups.reshape(-1), group_size)] = 0.0",
        "pass",
        "group_advantage",
    ),
    "swapped clip ranges": (
        losses,
        "low, high = 1 - clip_range[0], 1 + clip_range[1]",
        "low, high = 1 - clip_range[1], 1 + clip_range[0]",
        "grpo_loss",
    ),
    "min for max": (
        losses,
        "per_token = mx.maximum(-advantages * ratio",
        "per_token = mx.minimum(-advantages * ratio",
        "grpo_loss",
    ),
    "dual clip on gains too": (
        losses,
        "mx.where(advantages < 0, mx.minimum",
        "mx.where(advantages > 0, mx.minimum",
        "_loss",
    ),
    "mask forgotten in the weights": (
        losses,
        "mask = float_mask(completion_mask)\n    rows",
        "mask = mx.ones_like(float_mask(completion_mask))\n    rows",
        "grpo_loss",
    ),
    "mask forgotten in a row's mean": (
        losses,
        "log_ratio = masked(logprobs - old_logprobs, completion_mask)",
        "log_ratio = logprobs - old_logprobs\n    completion_mask = mx.ones_like(completion_mask)",
        "gspo_loss",
    ),
    "product for mean in GSPO": (
        losses,
        "mx.stop_gradient(row_mean(log_ratio, completion_mask))",
        "mx.stop_gradient(log_ratio.sum(axis=-1, keepdims=True))",
        "gspo_loss",
    ),
    "KL in the other direction": (logprobs, "x = ref_logprobs - logprobs", "x = logprobs - ref_logprobs", "kl"),
    "KL gradient of the estimate": (logprobs, 'if gradient == "naive"', "if True", "grpo_loss"),
    "KL not weighted by the ratio": (
        logprobs,
        "ratio = mx.stop_gradient(mx.exp(",
        "ratio = mx.stop_gradient(mx.zeros_like(logprobs) + 1 + 0 * mx.exp(",
        "grpo_loss",
    ),
    "GAE through holes": (
        advantages,
        "_shifted(_suffix_sums(values, 1 - mask), 1)",
        "_shifted(values, 1)",
        "gae",
    ),
    "GAE through padding": (
        advantages,
        "rewards, values = masked(rewards, mask), masked(values, mask)",
        "mask = mx.ones_like(mask)",
        "gae",
    ),
    "lambda forgotten": (advantages, "mask * (gamma * gae_lambda)", "mask * gamma", "gae"),
    "token mean of each micro-batch": (
        losses,
        "mask.sum() if total_tokens is None else total_tokens",
        "mask.sum()",
        "grpo_loss_accumulated",
    ),
    "row mean of each micro-batch": (
        losses,
        "rows = mask.shape[0] if total_rows is None else total_rows",
        "rows = mask.shape[0]",
        "grpo_loss_accumulated",
    ),
    "value clip takes the smaller error": (
        losses,
        "mx.maximum(unclipped, clipped)",
        "mx.minimum(unclipped, clipped)",
        "value_loss",
    ),
    "importance weight upside down": (
        corrections,
        "old_logprobs - sampler_logprobs)",
        "sampler_logprobs - old_logprobs)",
        "importance_sampling",
    ),
}


BY_HAND_ONLY = ("noise of a constant group divided by its std", "token mean of each micro-batch")
"""What no vector in the file tells apart."""


def failing_kinds(cases: list[dict[str, Any]], fixtures: dict[str, Any]) -> set[str]:
    failing = set()
    for case in cases:
        try:
            if disagreements(case, fixtures):
                failing.add(case["kind"])
        except NotImplementedError:
            continue
    return failing


def mutate(monkeypatch: pytest.MonkeyPatch, module: ModuleType, old: str, new: str) -> None:
    """Replace each function of ``module``, wherever it was imported, by that of its source with ``new`` for ``old``."""
    source = Path(str(module.__file__)).read_text(encoding="utf-8")
    assert source.count(old) == 1, f"{old!r} stands {source.count(old)} times in {module.__file__}"
    mutant: dict[str, Any] = {"__name__": module.__name__}
    exec(compile(source.replace(old, new), f"<mutant of {module.__name__}>", "exec"), mutant)
    originals = {
        name: value for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__
    }
    for user in MODULES:
        for name, original in originals.items():
            if getattr(user, name, None) is original:
                monkeypatch.setattr(user, name, mutant[name])


def assert_noticed(bug: str, cases: list[dict[str, Any]], fixtures: dict[str, Any], patch: pytest.MonkeyPatch) -> None:
    module, old, new, kind = BUGS[bug]
    assert failing_kinds(cases, fixtures) == set()
    mutate(patch, module, old, new)
    assert any(kind in failing for failing in failing_kinds(cases, fixtures))


@pytest.mark.parametrize("bug", BUGS)
def test_the_cases_worked_by_hand_notice_the_bug(bug, monkeypatch):
    assert_noticed(bug, CASES, FIXTURES, monkeypatch)


@pytest.mark.skipif(not VECTORS.exists(), reason=f"{VECTORS} is not there")
@pytest.mark.parametrize("bug", [bug for bug in BUGS if bug not in BY_HAND_ONLY])
def test_the_vectors_notice_the_bug(bug, monkeypatch):
    data = json.loads(VECTORS.read_text(encoding="utf-8"))
    assert_noticed(bug, data["cases"], data["fixtures"], monkeypatch)
