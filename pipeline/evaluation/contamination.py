"""How much of an evaluation the training prompts gave away: overlap of word n-grams.

Left out: paraphrases, translations, and what the base model saw before; no n-gram finds those. Problems that a
generator makes from one pattern share n-grams without sharing an answer: for them, `exact` is the figure to read.
"""

import re
from collections.abc import Iterable, Sequence

from configs.schema import Strict

NGRAM = 8
OVERLAP = 0.7
"""An item is contaminated when this share of its 8-grams is in the training prompts (PaLM, arXiv:2204.02311, §8)."""
SHOWN = 5
# An operator is a word: 5 - 7 and 5 + 7 are different questions.
_WORD = re.compile(r"\w+|[^\w\s.,;:!?'\"()]")


class Contamination(Strict):
    """Counts of evaluation items, out of `items`."""

    items: int
    training_prompts: int
    ngram: int
    overlap: float
    exact: int
    """The same words in the same order as a training prompt."""
    contaminated: int
    """At least `overlap` of the item's n-grams are in training prompts; the exact ones are among them."""
    touched: int
    """At least one n-gram is."""
    examples: tuple[str, ...]
    """Ids of the first contaminated items."""

    def sentence(self) -> str:
        return (
            f"{self.exact} exact, {self.contaminated} of {self.items} items share at least {self.overlap:.0%} of their "
            f"{self.ngram}-grams with {self.training_prompts} training prompts ({self.touched} share one)"
        )


def contamination(
    training_prompts: Iterable[str],
    items: Sequence[tuple[str, str]],
    *,
    ngram: int = NGRAM,
    overlap: float = OVERLAP,
) -> Contamination:
    """Overlap of `items`, (id, text) pairs, with the training prompts; case and punctuation don't count, operators do.

    A text shorter than an n-gram is one n-gram by itself.
    """
    seen: set[tuple[str, ...]] = set()
    whole: set[tuple[str, ...]] = set()
    count = 0
    for prompt in training_prompts:
        words = _words(prompt)
        seen.update(_ngrams(words, ngram))
        whole.add(words)
        count += 1
    shares = {item_id: _share(_words(text), seen, ngram) for item_id, text in items}
    exact = {item_id for item_id, text in items if (words := _words(text)) and words in whole}
    dirty = [item_id for item_id, share in shares.items() if share >= overlap or item_id in exact]
    return Contamination(
        items=len(items),
        training_prompts=count,
        ngram=ngram,
        overlap=overlap,
        exact=len(exact),
        contaminated=len(dirty),
        touched=sum(share > 0 for share in shares.values()),
        examples=tuple(dirty[:SHOWN]),
    )


def _words(text: str) -> tuple[str, ...]:
    return tuple(_WORD.findall(text.casefold()))


def _ngrams(words: tuple[str, ...], n: int) -> set[tuple[str, ...]]:
    return {words[start : start + n] for start in range(max(len(words) - n, 0) + 1)} if words else set()


def _share(words: tuple[str, ...], seen: set[tuple[str, ...]], n: int) -> float:
    grams = _ngrams(words, n)
    return sum(gram in seen for gram in grams) / len(grams) if grams else 0.0
