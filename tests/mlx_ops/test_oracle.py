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
