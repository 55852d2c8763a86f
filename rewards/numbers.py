"""One number out of a short statement of model-written text, or the reason why it does not state one.

Expressions are not evaluated (but for a plain ``\\frac``), numbers in words and Roman numerals are not read, units and
currencies are not compared (1800 cents is 1800), and 57.500 is 57.5.
"""

import re
import unicodedata
from decimal import Context, Decimal, Inexact

MAX_DIGITS = 30
MAX_STATEMENT = 300
"""Characters; what is longer is a text, not a statement. It bounds the time of every pattern below ``plain``."""


def plain(text: str) -> str:
    """NFKC with ASCII digits, minus signs and quotes, in which 10² is 10^2."""
    text = re.sub("([⁰¹²³⁴-⁹])", r"^\1", text.translate(INVISIBLE | ASCII_SIGNS))
    text = unicodedata.normalize("NFKC", text)
    return re.sub(r"(?![0-9])\d", lambda digit: str(unicodedata.decimal(digit[0])), text)


def read_number(statement: str) -> str:
    """The one number of a ``plain`` statement, canonical: equal numbers are equal strings.

    Digits with ``-`` and ``.``, and ``%`` where the statement has it. ValueError, with the reason, where there is not
    exactly one: a hedge, a list, a range, an expression, an unfinished equation, more than 30 digits.
    """
    if len(statement) > MAX_STATEMENT:
        raise ValueError("a text, not a statement")
    text = _clean(statement)
    if HEDGED_ASIDE.search(text):
        raise ValueError("a hedge")
    outside = re.sub(r"\([^()]*\)", " ", text)
    return _single_number(_stating_part(outside if has_digit(outside) else text))


def read_bare_number(text: str) -> str:
    """As ``read_number``, of a text that is nothing but a number with an optional currency or percent sign."""
    cleaned = _clean(plain(text[: MAX_STATEMENT + 1]))
    if len(text) > MAX_STATEMENT or not NUMBER.fullmatch(cleaned):
        raise ValueError("not one number")
    return _single_number(cleaned)


def has_digit(text: str) -> bool:
    return re.search(r"\d", text) is not None


# --- what is markup --------------------------------------------------------------------------------------

INVISIBLE = {ord(character): None for character in "\u00ad\u200b\u200c\u200d\u200e\u200f\u2060\ufeff"}
ASCII_SIGNS = {ord(dash): "-" for dash in "\u2010\u2011\u2012\u2013\u2212"} | {ord(quote): "'" for quote in "‘’"}

MARKUP = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"<<[^<>]*>>", ""),  # GSM8K's calculator notes
        (r"</?[A-Za-z][^<>]*>", " "),
        (r"<([^<>]*)>", r"\1"),
        (r"\{,\}", ","),
        (r"\\!", ""),
        (r"\\%", "%"),
        (r"\^\s*\{?\s*\\circ\b", "°"),
        (r"\\(?:times|cdot)\b", "*"),
        (r"(?<=[mtdns])[\s}]*\^\s*\{?[23]\b(?!\s*[=*+])\}?", " "),  # square and cubic units
        (r"\\div\b", "/"),
        (r"\\pm\b|\+\s?/\s?-", "±"),
        (r"\\(?:approx|implies|(?:long)?[rR]ightarrow|to)(?![A-Za-z])|[=-]+>|[≈→⇒]", "="),
        (r"\\(?:l|g|le|ge|leq|geq|lt|gt)(?![A-Za-z])|[≤≥]", "<"),
        (r"\\[lc]?dots(?![A-Za-z])", "..."),
        (r"\\(?:boxed|fbox|text\w*|math\w+|left|right|q?quad|displaystyle|[,;: ()\[\]\\])", " "),
        (r"(-?)\s*\\?[$€£¥₹]\s*", r" \1"),
        (r"\b(?:US|USD|EUR|GBP|INR|CAD|AUD|Rs)\.?\s?(?=[-\d])", " "),
        (r"\*\*|__|[`\"“”~]|(?<!\w)'|'(?!\w)", " "),
        (r"([*_])([^*_\s][^*_]*)\1(?!\s*\d)", r"\2"),
        (r"(?<=[\d)])\((?=\s*-?\d[\d.]*\s*\))", "*("),  # 9(2) is a product, 9 (2 each) has an aside
        (r"(?i)\b(?:minus|negative)\s+(?=\d)", "-"),
    )
]
FRACTION = re.compile(r"(-?)\\[dt]?frac\s*\{\s*(\d{1,15})\s*\}\s*\{\s*(\d{1,15})\s*\}")


def _clean(statement: str) -> str:
    text = FRACTION.sub(_fraction_value, statement)
    for pattern, replacement in MARKUP:
        text = pattern.sub(replacement, text)
    return re.sub(r"[{}\s]+", " ", text).strip()


def _fraction_value(fraction: re.Match[str]) -> str:
    """A decimal where the fraction is one exactly; else an expression, which nothing reads."""
    exact = Context(prec=MAX_DIGITS, traps=[Inexact])
    sign, above, below = fraction.groups()
    try:
        return f" {sign}{exact.divide(Decimal(above), Decimal(below)):f} "
    except ArithmeticError:
        return f" {sign}{above}/{below} "


# --- which part of a statement states its value ----------------------------------------------------------

HEDGED_ASIDE = re.compile(r"\(\s*(?:or|maybe|perhaps|possibly|could)\b", re.IGNORECASE)
REASON = re.compile(r"\b(?:because|since|as (?:she|he|it|they|we|the))\b", re.IGNORECASE)
ASIDE = re.compile(
    r"\bwhich (?:is|was|are|equals)\b|\bthat is\b|\bi\.e\b|[—;](?=\s*[A-Za-z])|, (?:and )?not\b|\bnot (?=\d)",
    re.IGNORECASE,
)
CONSEQUENCE = re.compile(
    r"""\b(?:so|thus|therefore|hence|making|giving|meaning|totall?ing|for[ ]a[ ]total[ ]of
      |which[ ](?:makes|gives|means|rounds[ ](?:(?:up|down)[ ])?to))\b""",
    re.VERBOSE | re.IGNORECASE,
)
SETTING = re.compile(
    r"(?:after|with|since|as|when|by|because|given|in|at|for|on|from|if)\b(?:[^,]|,(?!\s))*,\s", re.IGNORECASE
)
HEDGE = re.compile(
    r"""\b(?:or|either|maybe|perhaps|possibly|probably|might|may[ ]be|could[ ]be|guess|not|cannot|at[ ](?:least|most)
      |between(?=[ ]-?\d) |(?:more|less|fewer|greater)[ ]than(?=[ ]-?\d))\b
    | n't\b | [±<>?] | \.\.\.""",
    re.VERBOSE | re.IGNORECASE,
)
SEVERAL_UNKNOWNS = re.compile(r"\d\s*(?:[,;]|and)\s*(?:and\s+)?[A-Za-z]\s*=")


def _stating_part(text: str) -> str:
    """Without reasons and asides, after "so", "in all," and the last "="; ValueError for a hedge or an open end."""
    reason = _first_after_digit(REASON, text)
    if reason is not None and CONSEQUENCE.search(text, reason):
        raise ValueError("a reason and a consequence")
    consequences = [part for part in CONSEQUENCE.split(text[:reason]) if has_digit(part)]
    text = (consequences or [""])[-1].strip(" ,:")
    text = text[: _first_after_digit(ASIDE, text)]
    text = SETTING.sub("", text, count=1) if SETTING.match(text) else text
    if HEDGE.search(text):
        raise ValueError("a hedge")
    if SEVERAL_UNKNOWNS.search(text):
        raise ValueError("several answers")
    text = text.rpartition("=")[2].strip()
    if not has_digit(text):
        raise ValueError("no number where the statement ends")
    return text


def _first_after_digit(pattern: re.Pattern[str], text: str) -> int | None:
    return next((found.start() for found in pattern.finditer(text) if has_digit(text[: found.start()])), None)


# --- the number ------------------------------------------------------------------------------------------

SCALES = {"hundred": 2, "thousand": 3, "k": 3, "million": 6, "M": 6, "billion": 9, "B": 9}
NUMBER = re.compile(
    r"""(?P<sign>(?<![\w)\s])[-+]\s?|(?<=\s)[-+](?=[\d.]))?
    (?<!\w)(?<!\d[.,'])
    (?P<digits>(?:[1-9]\d{0,2}(?:(?:,\d{3})++|(?:[ ]\d{3})++|(?:'\d{3})++)|\d++)(?:\.\d++)?|(?<![\w.])\.\d++)
    (?:[eE](?P<e>[+-]?\d{1,3})|\s?[*xX×]\s?10\s?\^\s?\(?(?P<power>-?\d{1,3})\)?)?
    (?![\d^])(?![.,']\d)(?!\s\^)(?![inxyz]\b)
    (?P<scale>\s(?:hundred|thousand|million|billion)\b|[kKMB]\b)?
    (?P<percent>\s?%|\s(?:percent|per[ ]cent)\b)?""",
    re.VERBOSE,
)
MODIFIED = re.compile(r"\s*(?:squared|cubed|and (?:a|one|two|three) |and half|half)")
OPERATOR = re.compile(r"[*×÷^\\+√π]|/(?!\s*[A-Za-z])|\s-\s*$|--")


def _single_number(text: str) -> str:
    found = list(NUMBER.finditer(text))
    if has_digit(NUMBER.sub(" ", text)):
        raise ValueError("a number in no usual form")
    if len(found) != 1:
        raise ValueError("several numbers" if found else "no number")
    number = found[0]
    before, after = text[: number.start()], text[number.end() :]
    if OPERATOR.search(before) or OPERATOR.search(after) or MODIFIED.match(after):
        raise ValueError("an expression")
    return _canonical(number)


def _canonical(number: re.Match[str]) -> str:
    digits = re.sub("[ ,']", "", number["digits"])
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"more than {MAX_DIGITS} digits")
    scale = (number["scale"] or "").strip()
    exponent = int(number["e"] or number["power"] or 0) + SCALES.get(scale.lower(), SCALES.get(scale, 0))
    if abs(exponent) > MAX_DIGITS:
        raise ValueError(f"more than {MAX_DIGITS} digits")
    value = Decimal(digits).scaleb(exponent, Context(prec=2 * MAX_DIGITS))
    text = f"{value:f}"
    text = text.rstrip("0").rstrip(".") if "." in text else text
    sign = "-" if value and (number["sign"] or "").startswith("-") else ""
    return f"{sign}{text}{'%' if number['percent'] else ''}"
