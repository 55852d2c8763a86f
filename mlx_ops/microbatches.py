"""Which rows run together: microbatches under a budget of padded tokens, and what a token of one costs."""

from collections.abc import Sequence

BUCKET = 32
"""Completions are padded to multiples of this, so that a compiled step meets few shapes."""
MICROBATCH_SHARE = 0.5
"""Share of the device's memory that a microbatch may fill, where nothing else needs it."""


def bucketed(length: int, bucket: int = BUCKET) -> int:
    """`length` rounded up to a multiple of `bucket`."""
    return -(-length // bucket) * bucket


def plan(
    prompt_lengths: Sequence[int], prompt_index: Sequence[int], completion_lengths: Sequence[int], *, token_budget: int
) -> list[list[int]]:
    """The rows of each microbatch, none above `token_budget` padded tokens unless it is one row.

    A microbatch costs its prompts once each and its rows' completions, padded to the longest. Rows are cut by length,
    or by group where the prompts that this saves are worth more than the padding.
    """
    rows = range(len(prompt_index))
    longest: dict[int, int] = {}
    for row in rows:
        longest[prompt_index[row]] = max(longest.get(prompt_index[row], 0), completion_lengths[row])
    orders = (
        sorted(rows, key=lambda row: (bucketed(completion_lengths[row]), prompt_index[row])),
        sorted(rows, key=lambda row: (longest[prompt_index[row]], prompt_index[row], completion_lengths[row])),
    )
    plans = [_cut(order, prompt_lengths, prompt_index, completion_lengths, token_budget) for order in orders]
    return min(
        plans,
        key=lambda chosen: sum(
            padded_tokens(part, prompt_lengths, prompt_index, completion_lengths) for part in chosen
        ),
    )


def padded_tokens(
    rows: Sequence[int], prompt_lengths: Sequence[int], prompt_index: Sequence[int], completion_lengths: Sequence[int]
) -> int:
    """What a microbatch of these rows runs: distinct prompts x the longest, and rows x the longest completion's
    bucket."""
    prompts = {prompt_index[row] for row in rows}
    prompt_width = max(prompt_lengths[prompt] for prompt in prompts)
    return len(prompts) * prompt_width + len(rows) * bucketed(max(completion_lengths[row] for row in rows))


def _cut(
    order: Sequence[int],
    prompt_lengths: Sequence[int],
    prompt_index: Sequence[int],
    completion_lengths: Sequence[int],
    token_budget: int,
) -> list[list[int]]:
    parts: list[list[int]] = []
    for row in order:
        if parts and padded_tokens([*parts[-1], row], prompt_lengths, prompt_index, completion_lengths) <= token_budget:
            parts[-1].append(row)
        else:
            parts.append([row])
    # Rows of one prompt beside each other: their keys and values then expand without a gather.
    return [sorted(part, key=lambda row: (prompt_index[row], row)) for part in parts]


def microbatch_token_bytes(*, vocabulary: int, hidden: int, layers: int, checkpointed: bool, element: int = 4) -> int:
    """What the backward pass holds for a padded token.

    Three float32 rows of the vocabulary (logits, their exponentials, their gradient), and some 34 vectors of the hidden
    size in every layer: with gradient checkpointing in one layer at a time, and one vector in each of the others.
    """
    vectors = 34 + layers if checkpointed else 34 * layers
    return 3 * 4 * vocabulary + vectors * element * hidden
