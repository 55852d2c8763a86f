"""Python out of prose: fenced blocks, and the runs of lines between prose that parse.

Text of a model is parsed here, never run. Python's parser answers nonsense with an exception, however deep it nests.
"""

import ast
import re
import warnings
from dataclasses import dataclass

_MOST_CUTS = 20
_END_OF_TURN = re.compile(
    r"<\|(?:endoftext|im_end|eot_id|end_of_text|end|eom_id)\|>|<end_of_turn>|<｜end▁of▁sentence｜>|</s>\s*\Z"
)
_THINK = r"(?:think|thinking|thought|reasoning)"
_OPEN_THOUGHT = re.compile(rf"<{_THINK}>")
_CLOSED_THOUGHT = re.compile(rf"</{_THINK}>")
_TAG = r"(?:</?(?:answer|code|solution|python|response|output)>|\[/?(?:PYTHON|CODE|ANSWER|INST)\])"
_TAG_AT_EDGE = re.compile(rf"^[ \t]*{_TAG}[ \t]*|[ \t]*{_TAG}[ \t]*$", re.MULTILINE | re.IGNORECASE)
_KEYWORD = r"(?:from|import|def|async|class|if|for|while|try|with)\b"
_CODE_START = re.compile(rf"{_KEYWORD}|[@#]|[A-Za-z_][\w.]*\s*[(\[=:,]|[A-Za-z_]\w*\s*[-+*/|&]=")
_FENCE = re.compile(r"^[ \t]*(?:>[ \t]?|[-*+][ \t]+|\d+[.)][ \t]+)*(?P<fence>`{3,}|~{3,})(?P<info>.*)$")
_CODE_AFTER_LABEL = re.compile(r"^\s*(?:[Pp]y\w*\s+)?(?P<code>(?:(?:def|class|import|from|async def)\b|@).*)$")


@dataclass(frozen=True)
class Piece:
    """Source that parses, and its tree."""

    source: str
    tree: ast.Module


def answer_text(completion: str) -> str | None:
    """What the completion answers: after its thoughts, up to the end of its turn. `None` while a thought is open."""
    text = completion.replace("\r\n", "\n").replace("\r", "\n").replace("\ufeff", "").replace("\u200b", "")
    text = _CLOSED_THOUGHT.split(text)[-1]
    if _OPEN_THOUGHT.search(text):
        return None
    end = _END_OF_TURN.search(text)
    text = text[: end.start()] if end else text
    text = re.sub(r"^[ \t\u00a0]+", lambda blank: blank[0].replace("\u00a0", " "), text, flags=re.MULTILINE)
    return _TAG_AT_EDGE.sub("", text)


def split_fences(text: str) -> tuple[list[str], list[str]]:
    """The contents of fenced blocks, and the texts before, between and after them.

    A block that is not closed ends with the text.
    """
    blocks: list[str] = []
    outside: list[list[str]] = [[]]
    block: list[str] | None = None
    opening = ""
    for line in text.split("\n"):
        fence = _FENCE.match(line)
        if block is None and fence is not None:
            opening, block = fence["fence"], _code_on_fence_line(fence)
            if block is not None and fence["info"].rstrip().endswith(opening):
                blocks.append(block[0].rstrip()[: -len(opening)])
                outside.append([])
                block = None
            else:
                block = block or []
        elif block is None:
            outside[-1].append(line)
        elif _closes(line, opening):
            blocks.append("\n".join([*block, line.rstrip().rstrip(opening[0])]))
            outside.append([])
            block = None
        else:
            block.append(line)
    return blocks + (["\n".join(block)] if block is not None else []), ["\n".join(lines) for lines in outside]


def _code_on_fence_line(fence: re.Match[str]) -> list[str] | None:
    """Code that stands behind the label of its fence."""
    code = _CODE_AFTER_LABEL.match(fence["info"])
    return [code["code"]] if code else None


def _closes(line: str, opening: str) -> bool:
    bare = line.strip().lstrip(">").strip()
    alone = len(bare) >= len(opening) and bare == opening[0] * len(bare)
    return alone or line.rstrip().endswith(opening)


class Reader:
    """Parses one answer, within a budget: text that is no code costs time for each attempt to read it as code."""

    def __init__(self, characters: int = 1_000_000) -> None:
        self._left = characters

    def parse(self, source: str) -> ast.Module | None:
        """The syntax tree, or `None`."""
        return self._parse(source)[0]

    def _parse(self, source: str) -> tuple[ast.Module | None, int]:
        """The tree; or none, and the line of the error."""
        self._left -= len(source)
        if self._left < 0:
            return None, 0
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return ast.parse(source), 0
        except SyntaxError as error:
            return None, error.lineno or 0
        except (ValueError, RecursionError, MemoryError):
            return None, 0

    def longest_prefix(self, text: str) -> Piece | None:
        """The longest beginning of the text, in lines, that parses."""
        lines = text.split("\n")
        for _ in range(_MOST_CUTS):
            source = "\n".join(lines)
            tree, line = self._parse(source)
            if tree is not None:
                return Piece(source, tree)
            # The lines from the error on don't parse; where the error has no place, the last one goes.
            keep = min(line - 1, len(lines) - 1) if line else len(lines) - 1
            lines = lines[:keep]
            if not lines or self._left < 0:
                return None
        return None

    def pieces(self, text: str) -> list[Piece]:
        """The runs of lines that parse and hold more than words, in order."""
        lines, found, start = text.split("\n"), [], 0
        while start < len(lines) and self._left > 0:
            piece = self.longest_prefix("\n".join(lines[start:])) if _CODE_START.match(lines[start]) else None
            if piece is None:
                start += 1
                continue
            start += piece.source.count("\n") + 1
            if any(not is_bare(node) for node in piece.tree.body):
                found.append(piece)
        return found


def is_bare(node: ast.stmt) -> bool:
    """An expression that does nothing, as a word of prose that happens to parse."""
    return isinstance(node, ast.Expr) and not isinstance(node.value, (ast.Call, ast.Await, ast.Yield, ast.YieldFrom))
