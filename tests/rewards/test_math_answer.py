import importlib.util
import time

import pytest

from configs.schema import RewardConfig
from rewards import Example
from rewards.composer import build_reward
from rewards.math_answer import Verifier

needs_math_verify = pytest.mark.skipif(importlib.util.find_spec("math_verify") is None, reason="no math-verify")


def scores(completions, answer, **options):
    reward = build_reward(RewardConfig(name="math_verify", options=options))
    return reward(["p"] * len(completions), completions, answer=[answer] * len(completions))


@needs_math_verify
def test_equal_expressions_are_right_whatever_their_form():
    completions = [r"So $\boxed{\frac{1}{2}}$", r"$\boxed{0.5}$", r"\boxed{\frac{2}{3}}", "", r"<think>\boxed{1/2}"]
    assert scores(completions, r"\frac{1}{2}") == [1, 1, 0, 0, 0]


@needs_math_verify
def test_an_expression_that_computes_for_ever_is_killed_and_the_next_one_judged():
    started = time.monotonic()
    assert scores([r"\boxed{9^{9^{9^{9}}}}", r"\boxed{9}"], "9", timeout_seconds=2.0) == [0, 1]
    assert time.monotonic() - started < 30


@needs_math_verify
def test_an_answer_that_cannot_be_read_is_named_before_training():
    reward = build_reward(RewardConfig(name="math_verify"))
    reward.validate([Example("a", "p", answer="x^2 + 1")])
    with pytest.raises(ValueError, match="example 'b'"):
        reward.validate([Example("b", "p", answer="}{")])


@pytest.mark.skipif(importlib.util.find_spec("math_verify") is not None, reason="math-verify is installed")
def test_without_the_package_training_is_refused_with_the_extra_to_install():
    with pytest.raises(RuntimeError, match=r"mlx-rl-trainer\[math\]"):
        Verifier(1.0)
