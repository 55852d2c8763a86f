"""lm-eval's filters and exact match for its task `gsm8k`, version 3.0."""

import re
from collections.abc import Mapping

STOP_STRINGS = ("Question:", "</s>", "<|im_end|>")
FILTERS: Mapping[str, tuple[str, int]] = {
    "lm_eval_strict": (r"#### (\-?[0-9\.\,]+)", 0),
    "lm_eval_flexible": (r"(-?[$0-9.,]{2,})|(-?[0-9]+)", -1),
}
"""mode -> (pattern, which of its matches counts)."""


def extract(text: str, mode: str) -> str | None:
    """What the filter of a mode finds before the first stop string."""
    for stop in STOP_STRINGS:
        text = text.partition(stop)[0]
    pattern, position = FILTERS[mode]
    matches = [match[0].removeprefix("#### ") for match in re.finditer(pattern, text)]
    return matches[position] if matches else None


def is_match(value: str | None, gold: str) -> bool:
    """The exact match of what a filter found with the gold answer."""
    return _normal("[invalid]" if value is None else value) == _normal(gold)


def _normal(text: str) -> str:
    text = text.replace(",", "").replace("$", "").rpartition("#### ")[2]
    return re.sub(r"\.$", "", text).lower()
