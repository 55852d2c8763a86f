import math
from typing import Any

import numpy as np
import pytest

from configs.schema import RewardConfig
from rewards import BaseReward, Example, RewardComposer, RewardRegistry, Score


class Said(BaseReward):
    """A reward that does what its test hands in."""

    def __init__(self, scores):
        super().__init__()
        self.scores = scores

    def __call__(self, prompts, completions, **columns) -> Any:
        return self.scores(prompts, completions, columns) if callable(self.scores) else self.scores


def compose(**rewards):
    return RewardComposer({name: (Said(scores), weight) for name, (scores, weight) in rewards.items()})


def judged(composer, count=2, **columns):
    ids = {"id": [f"ex-{number}" for number in range(count)]}
    return composer(["p"] * count, [f"c{number}" for number in range(count)], ids | columns)


def test_the_total_is_the_weighted_sum_and_the_parts_stay_unweighted():
    scores = judged(compose(right=([1.0, 0.5], 2.0), short=([-0.25, -1.0], 0.5)))
    assert scores == [
        Score(1.875, {"right": 1.0, "short": -0.25}),
        Score(0.5, {"right": 0.5, "short": -1.0}),
    ]


def test_weight_zero_makes_a_metric():
    assert judged(compose(right=([1.0, 0.0], 1.0), seen=([9.0, 9.0], 0.0)))[0] == Score(
        1.0, {"right": 1.0, "seen": 9.0}
    )


def test_what_was_not_scored_counts_for_nothing():
    first, second = judged(compose(right=([None, 1.0], 2.0), short=([-0.5, None], 1.0)))
    assert first == Score(-0.5, {"right": None, "short": -0.5})
    assert second == Score(2.0, {"right": 1.0, "short": None})


def test_without_any_weighted_score_there_is_no_total():
    assert judged(compose(right=([None, None], 1.0), seen=([1.0, 1.0], 0.0)))[0].total is None
    assert judged(RewardComposer({}))[0] == Score(None, {})


def test_a_reward_sees_prompts_completions_and_every_column():
    def scores(prompts, completions, columns):
        assert (prompts, completions) == (["p", "p"], ["c0", "c1"])
        assert columns == {"id": ["ex-0", "ex-1"], "task": ["a", "b"]}
        return [1, 0]

    assert [score.total for score in judged(compose(r=(scores, 1.0)), task=["a", "b"])] == [1.0, 0.0]


def test_numbers_of_any_make_become_floats():
    scores = judged(compose(r=((np.float32(0.5), True), 1.0)))
    assert [score.total for score in scores] == [0.5, 1.0]
    assert {type(score.parts["r"]) for score in scores} == {float}


@pytest.mark.parametrize(
    "score", [math.nan, math.inf, -math.inf, 10.5, -11, 10**400, "1", [1.0], np.float64("nan")], ids=repr
)
def test_a_score_that_is_no_number_within_ten_is_refused_with_reward_and_example(score):
    with pytest.raises(ValueError, match=r"reward 'r' gave example 'ex-1' .*expected a number"):
        judged(compose(r=([0.0, score], 1.0)))


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        ([1.0], "returned 1 scores for 2 completions"),
        ([1.0] * 3, "returned 3 scores for 2 completions"),
        (None, "returned NoneType; expected a list"),
        (1.0, "returned float; expected a list"),
        ("11", "returned str; expected a list"),
        ({0: 1.0, 1: 1.0}, "returned dict; expected a list"),
    ],
)
def test_anything_but_one_score_a_completion_is_refused(returned, said):
    with pytest.raises(ValueError, match=f"reward 'r' {said}"):
        judged(compose(ok=([1, 1], 1.0), r=(returned, 1.0)))


@pytest.mark.parametrize("weight", [1.0, 0.0])
def test_an_exception_names_the_reward_the_example_and_itself(weight):
    def scores(prompts, completions, columns):
        return [1 / (completion != "c1") for completion in completions]

    with pytest.raises(ValueError, match=r"reward 'r' failed on example 'ex-1': ZeroDivisionError: division by zero"):
        judged(compose(r=(scores, weight)))


def test_an_exception_that_no_single_example_causes_names_the_reward():
    def scores(prompts, completions, columns):
        return [{1: 1.0}[len(completions)]]

    with pytest.raises(ValueError, match=r"reward 'r' failed: KeyError: 2"):
        judged(compose(r=(scores, 1.0)))


def test_an_interrupt_is_no_fault_of_the_reward():
    def scores(prompts, completions, columns):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        judged(compose(r=(scores, 1.0)))


def test_columns_of_another_length_are_refused():
    with pytest.raises(ValueError, match=r"2 completions, but \{'task': 3\}"):
        judged(compose(), task=["a"] * 3)
    with pytest.raises(ValueError, match=r"1 completions, but \{'prompts': 2\}"):
        compose()(["p", "p"], ["c"], {})


def test_validation_names_the_reward():
    composer = RewardComposer.from_config([RewardConfig(name="numeric_answer")])
    composer.validate([Example("a", "1 + 1", answer="2")])
    with pytest.raises(ValueError, match=r"reward 'numeric_answer' refuses the dataset: .*example 'b'.*'two'"):
        composer.validate([Example("a", "1 + 1", answer="2"), Example("b", "1 + 1", answer="two")])


def test_weights_and_options_come_from_the_configuration():
    configs = [
        RewardConfig(name="regex", weight=0.5, options={"pattern": "a+", "matched": 2}),
        RewardConfig(name="repetition", weight=0),
    ]
    composer = RewardComposer.from_config(configs)
    assert composer.weights == {"regex": 0.5, "repetition": 0.0}
    assert judged(composer, 1)[0] == Score(0.0, {"regex": 0.0, "repetition": 0.0})
    assert composer(["p"], ["baa"], {})[0].total == 1.0


def test_options_that_a_reward_does_not_know_are_refused_by_name():
    with pytest.raises(ValueError, match=r"options of reward 'regex': 2 setting.*(?s:.*)paten: unknown key"):
        RewardComposer.from_config([RewardConfig(name="regex", options={"paten": "a"})])


def test_an_unknown_reward_lists_those_there_are():
    with pytest.raises(KeyError, match=r"unknown reward 'numeric'; registered: .*'numeric_answer'"):
        RewardComposer.from_config([RewardConfig(name="numeric")])


def test_a_registered_reward_is_built_like_ours():
    @RewardRegistry.register("test_composer_constant")
    class Constant(BaseReward):
        def __call__(self, prompts, completions, **columns):
            return [0.25] * len(completions)

    composer = RewardComposer.from_config([RewardConfig(name="test_composer_constant", weight=4)])
    assert judged(composer, 1) == [Score(1.0, {"test_composer_constant": 0.25})]
