"""Judging text. Importing the package registers the rewards that come with it."""

from rewards import (  # noqa: F401 (importing a plugin registers it)
    code_tests,
    format,
    json_schema,
    length,
    math_answer,
    numeric_answer,
    python_function,
    reasoning_gym,
    regex,
    repetition,
)
from rewards.base import BaseReward, Example, RewardRegistry
from rewards.composer import RewardComposer, Score

__all__ = ["BaseReward", "Example", "RewardComposer", "RewardRegistry", "Score"]
