"""The final answer of a model-written solution: one extractor for rewards and for evaluation.

``robust`` takes the last answer that the text commits to: after the thinking and before the end of the turn, the first
of ``RULES`` that fires, and the one number that it states. A hedge, a list, a range, an expression, cut text: no value.
``lm_eval_strict`` and ``lm_eval_flexible`` are the filters and the exact match of lm-eval's ``gsm8k``, version 3.0.

What counts as one number, and what is left out, stands in ``rewards.numbers``.
"""

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from rewards import lm_eval
from rewards.numbers import MAX_STATEMENT, has_digit, plain, read_bare_number, read_number

EXTRACTOR_VERSION = "2"
"""Changes whenever a verdict can change; reports carry it."""

Mode = Literal["robust", "lm_eval_strict", "lm_eval_flexible"]


@dataclass(frozen=True)
class Extraction:
    """The answer of a text (``value`` and the ``rule`` that found it), or the ``reason`` why it has none.

    In ``robust`` the value is canonical, as ``rewards.numbers.read_number`` gives it: equal answers are equal strings.
    The lm-eval modes keep the matched text as it stands.
    """

    value: str | None
    rule: str | None
    reason: str | None


def extract_answer(
    text: str, mode: Mode = "robust", *, rules: Collection[str] | None = None, truncated: bool = False
) -> Extraction:
    """The final answer of ``text``.

    ``rules`` restricts ``robust`` to some of ``RULES``: a reward pays only for the format that its prompt asked for.
    Of a ``truncated`` text ``robust`` takes only what a finished line marks as the answer: what stands last in it is
    an intermediate value, or half a number.
    """
    if mode in lm_eval.FILTERS:
        value = lm_eval.extract(text, mode)
        return Extraction(value, mode, None) if value is not None else Extraction(None, None, "no match")
    unknown = sorted(set(rules or ()) - set(RULES))
    if mode != "robust" or unknown:
        modes = ["robust", *lm_eval.FILTERS]
        raise ValueError(f"mode {mode!r}, unknown rules {unknown}; modes are {modes}, rules are {[*RULES]}")
    allowed = set(RULES if rules is None else rules)
    if truncated:
        text, allowed = text.rpartition("\n")[0], allowed - {"sentence"}
    try:
        return _last_commitment(_answering_part(_ending(text)), allowed)
    except ValueError as refusal:
        return Extraction(None, None, str(refusal))


def is_correct(
    text: str,
    gold: str,
    mode: Mode = "robust",
    *,
    question: str = "",
    rules: Collection[str] | None = None,
    truncated: bool = False,
) -> bool:
    """Whether the final answer of ``text`` equals ``gold``; in ``robust`` a gold that is no number is a ValueError.

    "25%" is 25 only where the ``question`` asks for a percentage. ``rules`` and ``truncated`` as in ``extract_answer``.
    """
    value = extract_answer(text, mode, rules=rules, truncated=truncated).value
    if mode in lm_eval.FILTERS:
        return lm_eval.is_match(value, gold)
    expected = comparable(canonical_gold(gold), question)
    return value is not None and comparable(value, question) == expected


def comparable(value: str, question: str) -> str:
    """A ``robust`` value as answers to the question are compared: equal strings for equal answers."""
    return value.removesuffix("%") if PERCENT.search(question) else value


PERCENT = re.compile(r"percent|%", re.IGNORECASE)


def canonical_gold(gold: str) -> str:
    """The gold answer as a ``robust`` value; ValueError for one that is not exactly one number."""
    try:
        return read_bare_number(gold)
    except ValueError as error:
        raise ValueError(f"gold answer {gold!r}: {error}") from error


def gsm8k_gold(answer: str) -> str:
    """The gold answer in GSM8K's ``answer`` column as it is written ("2,125"); ValueError where there is none."""
    _, marker, gold = answer.rpartition("####")
    if not marker:
        raise ValueError(f"no '####' line in the answer {answer[-80:]!r}")
    canonical_gold(gold)
    return gold.strip()


# --- the part of a text that answers ---------------------------------------------------------------------

END_OF_TURN = re.compile(
    r"</s>|<\|(?:im_end|im_start|endoftext|end_of_text|eot_id|eom_id|end|return|user|start_header_id|end▁of▁sentence)\|>"
    r"|<(?:end_of_turn|start_of_turn|eos)>|\[/?INST\]"
)
RUN_ON = re.compile(r"Question ?\d*:|\n[ \t#*]*(?:Q|Problem|Instruction|Human|User)[ \t]*\d*[ \t]*:")
THOUGHT = re.compile(r"<(/?)(?:think|thinking|thought|reasoning|scratchpad)>", re.IGNORECASE)

MAX_TEXT = 20_000
"""Characters from the end that ``robust`` reads: it bounds the time that a text can take."""


def _ending(text: str) -> str:
    """The last ``MAX_TEXT`` characters; a thought that was open before them is open in them."""
    thoughts = THOUGHT.findall(text[:-MAX_TEXT])
    return ("<think>" if thoughts and not thoughts[-1] else "") + text[-MAX_TEXT:]


def _answering_part(text: str) -> str:
    text = _cut(plain(text), END_OF_TURN, after=r"\S")
    thoughts = list(THOUGHT.finditer(text))
    if thoughts and not thoughts[-1][1]:
        raise ValueError("the thinking never ends")
    # A solution may begin with its question: only after some figure is a question another problem.
    text = _cut(text[thoughts[-1].end() :] if thoughts else text, RUN_ON, after=r"\d")
    if not text.strip():
        raise ValueError("no text")
    return text


def _cut(text: str, stop: re.Pattern[str], *, after: str) -> str:
    begun = re.search(after, text)
    found = stop.search(text, begun.end()) if begun else None
    return text[: found.start()] if found else text


# --- where an answer stands: one finder a rule -----------------------------------------------------------


class Candidate(NamedTuple):
    """A place that offers an answer: the statement, and where the marker with it begins and ends."""

    statement: str
    start: int
    end: int


HASH = re.compile(r"#{4,}\s*([^\n#]*)(?:#+[ \t]*$)?", re.MULTILINE)
BOX_OR_BRACE = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)
TAG = re.compile(r"<(/?)(?:final_)?answer>", re.IGNORECASE)
PHRASE = re.compile(
    r"""(?: (?P<hedge>\b(?:or|if|maybe|perhaps|possibly)\b[^.,\n]{0,30})?
            (?<![A-Za-z])answers?\b (?:[ ](?:to|for)\b[^.:\n]{0,100}? | [ ]?\([^()\n]{0,60}\))? ["'*_ \t]*
            (?: \b(?:is|are|was|(?:would|will|should|must)[ ]be|equals|comes[ ](?:out[ ])?to)\b
                (?:[ ](?:therefore|thus|then))?
              | (?P<colon>[:=]) | -[ ] )
          | ^[#*_ \t]*(?:the[ ])?(?:final[ ])?(?P<heading>answer)[*_ \t]*$ )
        (?:[\s:=*_"'$]|\\[\[(])*""",
    re.VERBOSE | re.IGNORECASE | re.MULTILINE,
)
ABBREVIATION = re.compile(r"\b(Mr|Mrs|Ms|Dr|St|Rs|approx|vs)\.(?=\s)")
SENTENCE_END = re.compile(r"(?<=[.!?])[\"')*_]*+\s++(?![a-z])")
PLEASANTRY = re.compile(r"\b(?:hope|let me know|feel free|glad|thanks?|questions|good luck|great)\b", re.IGNORECASE)
BULLET = re.compile(r"^\s*(?:[-*•]|\d+\.)\s+")
NUMBER_LED = re.compile(r"[^\w=]*\d[^=*×]*$")
LABEL = re.compile(r"\W*(?:step|part|problem|question|example|case|option|equation)\s*\d+\W*", re.IGNORECASE)
DANGLING = re.compile(r"(?:[-=:,;(\[/+×÷]|\s\*)\s*$")


def _sentences(text: str) -> list[str]:
    return SENTENCE_END.split(ABBREVIATION.sub(r"\1 ", text.strip()))


def _hash_lines(text: str) -> list[Candidate]:
    """``#### 18``. Words with more text below them are a Markdown heading."""
    end = len(text.rstrip("# \t\n"))
    lines = [line for line in HASH.finditer(text) if not line[1][:1].isalpha() or line.end() >= end]
    return [Candidate(_sentences(line[1])[0], line.start(), line.end()) for line in lines]


def _boxes(text: str) -> list[Candidate]:
    r"""Balanced ``\boxed{}`` with something in it, in the order of their ends."""
    boxes: list[Candidate] = []
    opened: list[re.Match[str]] = []
    for token in BOX_OR_BRACE.finditer(text):
        if token[0] == "{" or len(token[0]) > 2:
            opened.append(token)
        elif token[0] == "}" and opened:
            start = opened.pop()
            if start[0] != "{" and text[start.end() : token.start()].strip():
                boxes.append(Candidate(text[start.end() : token.start()], start.start(), token.end()))
    return boxes


def _answer_tags(text: str) -> list[Candidate]:
    """``<answer>``, also a last open one: ``</answer>`` is a usual stop string, and those are cut off."""
    tags = list(TAG.finditer(text))
    found: list[Candidate] = []
    for tag, following in zip(tags, [*tags[1:], None], strict=False):
        if not tag[1]:
            statement = _sentences(text[tag.end() : following.start() if following else len(text)])[-1]
            end = following.end() if following and following[1] else tag.end() + len(statement)
            found.append(Candidate(statement, tag.start(), end))
    return found


def _answer_phrases(text: str) -> list[Candidate]:
    """``The answer is 18``, ``Answer: 18``, or a heading ``Answer`` with 18 below it."""
    phrases: list[Candidate] = []
    text_end = len(text.rstrip())
    for phrase in PHRASE.finditer(text):
        line = text[phrase.end() : phrase.end() + MAX_STATEMENT + 1].partition("\n")[0]
        statement = _sentences(line)[0]
        end = phrase.end() + len(statement)
        # "Answer:" may head a whole solution, whose first sentence is not its answer.
        is_head = phrase["colon"] or phrase["heading"]
        heads_solution = is_head and end < text_end and not NUMBER_LED.match(statement)
        if has_digit(statement) and not statement.startswith("not ") and not heads_solution:
            phrases.append(Candidate("maybe " + statement if phrase["hedge"] else statement, phrase.start(), end))
    return phrases


def _last_sentence(text: str) -> list[Candidate]:
    """A final statement without any marker; polite sentences after it do not count."""
    lines = [line for line in text[-10 * MAX_STATEMENT :].splitlines() if re.search(r"\w", line)]
    sentences = [sentence for line in lines[-3:] for sentence in _sentences(BULLET.sub("", line))]
    while sentences and not has_digit(sentences[-1]) and PLEASANTRY.search(sentences[-1]):
        sentences.pop()
    last = sentences[-1] if sentences else ""
    if not has_digit(last) or LABEL.fullmatch(last) or DANGLING.search(last):
        return []
    return [Candidate(last, 0, len(text))]


RULES: Mapping[str, Callable[[str], list[Candidate]]] = {
    "hash": _hash_lines,
    "boxed": _boxes,
    "answer_tag": _answer_tags,
    "answer_phrase": _answer_phrases,
    "sentence": _last_sentence,
}
"""name -> what it finds in a text, in order. The first rule that finds anything decides; its last candidate counts."""


# --- from candidates to the answer -----------------------------------------------------------------------

MERE_JOINT = re.compile(
    r"(?:\W|\b(?:text|so|the|final)\b)*(?:(?:or|and)\b(?:\W|\b(?:text|maybe|the)\b)*)?", re.IGNORECASE
)
SECOND_THOUGHT = re.compile(
    r"""(?:\A|(?<=[.!?\n])) [ \t*_(]* (?:but[ ])?
    (?: (?: wait | actually | correction | scratch[ ]that | on[ ]second[ ]thought | hold[ ]on | oops | sorry | hmm
          | I[ ]made[ ]an?[ ](?:mistake|error)
          | (?:that|this|it)(?:'s|[ ]is|[ ]was)[ ](?:wrong|incorrect|not[ ](?:right|correct)) )\b
      | no, )""",
    re.VERBOSE | re.IGNORECASE,
)
WITHDRAWN = re.compile(
    r"\b(?:wrong|incorrect|mistaken?|error|correction|scratch that|not (?:right|correct))\b", re.IGNORECASE
)
REPLACED = re.compile(r"\b(?:no|it's|it is|should be|must be)\b", re.IGNORECASE)


def _last_commitment(text: str, rules: Collection[str]) -> Extraction:
    """The answer of the first rule that fires, unless second thoughts after it replace or withdraw it."""
    found, end = _first_rule(text, rules)
    after = text[end:].lstrip()
    thoughts = list(SECOND_THOUGHT.finditer(after))
    if not thoughts:
        return found
    corrected, _ = _first_rule(after[thoughts[-1].end() :].lstrip(" ,.:;!\n"), rules)
    withdrawn = WITHDRAWN.search(after, thoughts[0].start())
    if corrected.value is None:
        return Extraction(None, found.rule, "withdrawn") if withdrawn else found
    if corrected.rule != "sentence" or withdrawn or REPLACED.search(after, thoughts[0].start()):
        return corrected
    return found if corrected.value == found.value else Extraction(None, found.rule, "second thoughts")


def _first_rule(text: str, rules: Collection[str]) -> tuple[Extraction, int]:
    """The extraction of the first rule that finds a candidate, and where that candidate ends."""
    for rule, find in RULES.items():
        candidates = find(text) if rule in rules else []
        if candidates:
            return _read(rule, text, candidates), candidates[-1].end
    return Extraction(None, None, "no answer is stated"), len(text)


def _read(rule: str, text: str, candidates: list[Candidate]) -> Extraction:
    *earlier, last = candidates
    try:
        value = read_number(last.statement)
    except ValueError as refusal:
        return Extraction(None, rule, str(refusal))
    if earlier and MERE_JOINT.fullmatch(text[earlier[-1].end : last.start]) and _differs(earlier[-1].statement, value):
        return Extraction(None, rule, "several answers side by side")
    return Extraction(value, rule, None)


def _differs(statement: str, value: str) -> bool:
    try:
        return read_number(statement) != value
    except ValueError:
        return False
