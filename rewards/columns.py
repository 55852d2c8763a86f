"""Columns that a reward can't do without, and what an example's answer says."""

from collections.abc import Mapping, Sequence
from typing import Any

from rewards.answers import gsm8k_gold


def column(columns: Mapping[str, Sequence[Any]], name: str) -> Sequence[Any]:
    """A column of the batch; `ValueError` lists those there are."""
    if name not in columns:
        raise ValueError(f"needs the column {name!r}; the batch has {sorted(columns)}")
    return columns[name]


def gold(example: Any, answer: Any) -> str:
    """The reference answer: what follows the last `####` where there is one. `ValueError` names the example."""
    if not isinstance(answer, str) or not answer.strip():
        raise ValueError(f"example {example!r}: no reference answer to compare with, got {answer!r}")
    try:
        return gsm8k_gold(answer) if "####" in answer else answer.strip()
    except ValueError as error:
        raise ValueError(f"example {example!r}: {error}") from error
