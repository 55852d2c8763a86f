"""Our numbers against those of TRL, verl and OpenRLHF (``../shared/vectors``), and against cases worked by hand."""

import json
from pathlib import Path

import mlx.core as mx
import pytest

from tests import oracle
from tests.mlx_ops.hand_worked import CASES, FIXTURES
from tests.oracle import disagreements, evaluate

VECTORS = Path(__file__).parents[3] / "shared" / "vectors" / "rl_vectors.json"
UNWANTED = ("vespo", "luspo", "dppo_", "top_entropy", "/abs", "adaptive_entropy")


def vectors():
    if not VECTORS.exists():
        return [pytest.param(None, None, marks=pytest.mark.skip(reason=f"{VECTORS} is not there"), id="vectors")]
    data = json.loads(VECTORS.read_text(encoding="utf-8"))
    return [pytest.param(case, data["fixtures"], id=case["id"]) for case in data["cases"]]


@pytest.mark.parametrize(("case", "fixtures"), vectors())
def test_a_vector_of_another_framework_is_reproduced(case, fixtures):
    if any(word in case["id"] for word in UNWANTED):
        with pytest.raises(NotImplementedError):
            evaluate(case, fixtures)
    else:
        assert disagreements(case, fixtures) == []


@pytest.mark.parametrize(("case", "fixtures"), vectors())
def test_a_vector_is_reproduced_in_the_precision_of_training_too(case, fixtures, monkeypatch):
    if any(word in case["id"] for word in UNWANTED):
        pytest.skip("not offered")
    monkeypatch.setattr(oracle, "DTYPE", mx.float32)
    assert disagreements(case, fixtures) == []


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["id"])
def test_a_case_worked_by_hand_is_reproduced(case):
    assert set(evaluate(case, FIXTURES)) == set(case["expected"])
    assert disagreements(case, FIXTURES) == []


@pytest.mark.parametrize(
    ("kind", "params", "name"),
    [
        ("grpo_loss", {"loss_type": "vespo"}, "vespo"),
        ("grpo_loss", {"loss_type": "dapo", "top_entropy_quantile": 0.2}, "top_entropy"),
        ("kl", {"estimator": "abs"}, "abs"),
        ("ppo_policy_loss", {}, "dppo_tv"),
        ("unheard_of", {}, "unheard_of"),
    ],
)
def test_what_is_not_offered_is_refused_by_name(kind, params, name):
    case = {"id": f"loss/verl/{name}", "kind": kind, "fixture": "rows", "params": params, "expected": {"loss": 0.0}}
    with pytest.raises(NotImplementedError, match=name):
        evaluate(case, FIXTURES)


@pytest.mark.parametrize(
    ("name", "kind", "params", "word"),
    [
        ("loss/x", "grpo_loss", {"loss_type": "dapo", "top_entropy_quantile": 0.2}, "top_entropy_quantile=0.2"),
        ("loss/x", "grpo_loss", {"loss_type": "dapo", "temperature": 0.5}, "temperature"),
        ("loss/x", "grpo_loss", {"loss_type": "dapo", "mask": "prompt"}, "mask='prompt'"),
        ("loss/x", "grpo_loss", {"loss_type": "sapo", "importance_sampling_level": "sequence"}, "sapo"),
        ("loss/x", "grpo_loss", {"loss_type": "dapo", "delta": 1.1}, "delta 1.1"),
        ("loss/x", "grpo_loss", {"loss_type": "dapo", "gradient_accumulation": 2}, "gradient_accumulation=2"),
        ("loss/x", "ppo_policy_loss", {"loss_agg_mode": "prompt-mean"}, "prompt-mean"),
        ("loss/x", "ppo_policy_loss", {"clip_cov_ratio": 2e-4}, "clip_cov_ratio"),
        ("adv/verl/grpo_passk", "group_advantage_tokens", {}, "grpo_passk"),
        ("adv/verl/remax", "token_advantage", {}, "remax"),
        ("gae/x", "gae", {"gamma": 1.0, "lam": 1.0, "rewards": "whitened"}, "whitened"),
        ("is/x", "importance_sampling", {"level": "geometric", "threshold": 2.0}, "geometric"),
        ("is/x", "rejection_mask", {"option": "seq_median_k1", "threshold": "0.5_2.0"}, "seq_median_k1"),
        ("value_loss/x", "value_loss", {"cliprange_value": 0.2, "agg": "token-sum"}, "agg='token-sum'"),
    ],
)
def test_an_option_that_would_be_ignored_is_refused_with_its_value(name, kind, params, word):
    case = {"id": name, "kind": kind, "oracle": "", "fixture": "all", "params": params, "expected": {"loss": 0.0}}
    with pytest.raises(NotImplementedError, match=word):
        evaluate(case, {"all": FIXTURES["values"] | FIXTURES["groups"] | FIXTURES["rows"]})


@pytest.mark.parametrize(
    "params", [{"use_adaptive_entropy": False}, {"note": "what the numbers are for"}, {"delta": None}]
)
def test_an_option_that_is_off_and_a_remark_change_nothing(params):
    (case,) = (case for case in CASES if case["id"] == "loss/token_mean")
    assert disagreements({**case, "params": {**case["params"], **params}}, FIXTURES) == []
