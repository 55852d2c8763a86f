"""One runnable program out of a prompt and whatever a model answered.

`assemble` finds the function in a whole file, in a block with or without fences, in prose, as a bare body, or as what
follows the prompt; drops examples and checks that would run on loading; and keeps the prompt's imports and helpers. It
repairs nothing: a missing import, a wrong name or a syntax error of the answer stays one. Mode `completion` is the
plain protocol of HumanEval (arXiv:2107.03374), `prompt + completion`.

It leaves out: programs in other languages, notebooks, diffs, and functions under another name than the one asked for.
"""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from textwrap import indent
from typing import Literal

from rewards.program_names import bound_by, defines, has_own_return, is_real, unresolved, without_usage
from rewards.program_text import Piece, Reader, answer_text, split_fences

ASSEMBLER_VERSION = "1"
"""Changes whenever the program made of a completion can change; reports carry it."""

Mode = Literal["robust", "completion"]

_FUTURE = re.compile(r"^from __future__ import .*$\n?", re.MULTILINE)
_DOCTEST = re.compile(r"^(?:>>>|\.\.\.) ?(.*)$", re.MULTILINE)
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class _Prompt:
    """The Python of a prompt. Without any, all is empty."""

    code: str = ""
    """As it stands, to its end."""
    preamble: str = ""
    """Its imports, helpers and constants: all but the function that is asked for."""
    entry_point: str = ""
    indent: str = "    "


def assemble(prompt: str, completion: str, entry_point: str | None, mode: Mode = "robust") -> str:
    """One program that defines `entry_point`, if the completion holds one.

    A completion that holds none gives a program that fails: `prompt + completion`, or one that says why. Without an
    `entry_point` it is the function that the prompt leaves unfinished, or else every function of the answer.
    """
    if mode == "completion":
        return prompt + completion
    text = answer_text(completion)
    if text is None:
        return 'raise NotImplementedError("no program: the answer ends inside a thought")\n'
    asked = _read_prompt(prompt, entry_point or "")
    for program in _programs(asked, text, Reader()):
        return _futures_first(program)
    return prompt + completion


def helpers(prompt: str, entry_point: str | None) -> str:
    """The prompt's own imports, helpers and constants, for a test to define before it uses them.

    A test that finds a helper in the candidate's program instead believes what the candidate made of it.
    """
    return _read_prompt(prompt, entry_point or "").preamble


def _programs(asked: _Prompt, text: str, reader: Reader) -> Iterator[str]:
    """Readings of the answer, the most likely first."""
    blocks, outside = split_fences(text)
    yield from _continued(asked, outside[0], reader)
    fenced = [piece for block in blocks for piece in reader.pieces(block)]
    loose = [piece for part in outside for piece in reader.pieces(part)]
    yield from _defined(asked, fenced, loose)
    for block in reversed(blocks):
        yield from _continued(asked, block, reader)
    yield from _methods(asked, [*loose, *fenced])
    # A block may hold fences of its own in a docstring, be indented as a whole, or be a session of the interpreter.
    yield from _defined(asked, [piece for part in _unwrapped(asked, text) for piece in reader.pieces(part)], [])


def _defined(asked: _Prompt, first: list[Piece], others: list[Piece]) -> Iterator[str]:
    """The last piece that defines the entry point, with what it needs of the other pieces."""
    name = asked.entry_point
    if not name:
        found = [piece for piece in first or others if any(isinstance(node, _FUNCTIONS) for node in piece.tree.body)]
        if found:
            yield "\n\n".join([asked.preamble, *(without_usage(piece, "") for piece in found)])
        return
    for group in (first, others):
        defining = [piece for piece in group if defines(piece.tree, name)]
        if defining:
            chosen = defining[-1]
            rest = [piece for piece in [*others, *first] if piece is not chosen]
            yield _joined(asked, [*_suppliers(asked, chosen, rest), chosen])


def _suppliers(asked: _Prompt, chosen: Piece, rest: list[Piece]) -> list[Piece]:
    """The other pieces that bind what the chosen one uses and doesn't define."""
    preamble = Reader().parse(asked.preamble) or ast.Module([], [])
    taken: list[Piece] = []
    for _ in rest:
        missing = unresolved([preamble, chosen.tree, *(piece.tree for piece in taken)])
        more = [piece for piece in rest if piece not in taken and _binds(piece, missing)]
        if not more:
            break
        taken += more
    return [piece for piece in rest if piece in taken]


def _binds(piece: Piece, names: set[str]) -> bool:
    return any(bound_by(node) & names for node in piece.tree.body)


def _joined(asked: _Prompt, parts: list[Piece]) -> str:
    return "\n\n".join([asked.preamble, *(without_usage(part, asked.entry_point) for part in parts)]) + "\n"


def _continued(asked: _Prompt, text: str, reader: Reader) -> Iterator[str]:
    """The text as the body that the prompt lacks: as it is, with its first line indented, or indented anew."""
    lines = text.split("\n")
    first = next((number for number, line in enumerate(lines) if line.strip()), None)
    if first is None or not asked.code or not asked.entry_point:
        return
    margin = re.match(r"[ \t]*", lines[first])
    assert margin is not None
    lost = [*lines[:first], asked.indent + lines[first].lstrip(), *lines[first + 1 :]]
    anew = [
        indent(line.removeprefix(margin[0]), asked.indent) if line.startswith(margin[0]) else line for line in lines
    ]
    line_number = asked.code.count("\n") + first + 1
    readings = [(text, bool(margin[0])), ("\n".join(lost), False), ("\n".join(anew), False)]
    complete = [
        piece
        for body, own_margin in readings
        if (piece := reader.longest_prefix(asked.code + body)) is not None
        and _completes(piece, asked, line_number, needs_return=not own_margin)
    ]
    if complete:
        best = max(complete, key=lambda piece: piece.source.count("\n"))
        yield without_usage(best, asked.entry_point, keep_first=True) + "\n"


def _completes(piece: Piece, asked: _Prompt, line: int, *, needs_return: bool) -> bool:
    """Whether the function that was asked for got a body, from that line of the source on."""
    stub = next((node for node in piece.tree.body if asked.entry_point in bound_by(node)), None)
    if not isinstance(stub, _FUNCTIONS) or not is_real(stub) or has_own_return(piece.tree):
        return False
    real = [node for node in stub.body if (node.end_lineno or 0) >= line]
    working = [node for node in real if not isinstance(node, (*_FUNCTIONS, ast.ClassDef, ast.Import, ast.ImportFrom))]
    return bool(working) and (has_own_return(stub) or not needs_return)


def _unwrapped(asked: _Prompt, text: str) -> Iterator[str]:
    fences = [match.start() for match in re.finditer(r"^[ \t]*(?:`{3,}|~{3,})", text, re.MULTILINE)]
    if len(fences) > 2:
        yield text[text.index("\n", fences[0]) : fences[-1]]
    margin = re.search(rf"^((?:[ \t]*>)?[ \t]+)(?:async )?def {re.escape(asked.entry_point)}\b", text, re.MULTILINE)
    if margin:
        yield "\n".join(line.removeprefix(margin[1]) for line in text.split("\n"))
    if ">>> def " in text:
        yield "\n".join(_DOCTEST.findall(text))


def _methods(asked: _Prompt, found: list[Piece]) -> Iterator[str]:
    """The entry point as a method of a class, as in `class Solution`."""
    name = asked.entry_point
    for piece in reversed(found):
        for node in piece.tree.body:
            if isinstance(node, ast.ClassDef) and name in {
                part.name for part in node.body if isinstance(part, _FUNCTIONS)
            }:
                yield f"{_joined(asked, [piece])}\n{name} = {node.name}().{name}\n"


def _read_prompt(prompt: str, entry_point: str) -> _Prompt:
    reader, prompt = Reader(), prompt.replace("\r\n", "\n")
    blocks, _ = split_fences(prompt)
    start = re.search(r"^(?:(?:from|import|def|async def|class)\b|@)", prompt, re.MULTILINE)
    for code in (prompt, *blocks, prompt[start.start() :] if start else ""):
        # A stub with no docstring lacks a body.
        for source in (code, f"{code.rstrip()}\n    pass\n"):
            tree = reader.parse(source)
            stub = _stub(tree, entry_point) if tree is not None else None
            if tree is not None and stub is not None:
                return _prompt_of(code, Piece(source, tree), stub)
    tree = reader.parse(prompt)
    is_code = tree is not None and any(
        isinstance(node, (ast.Import, ast.ImportFrom, *_FUNCTIONS)) for node in tree.body
    )
    return _Prompt(preamble=prompt if is_code else "", entry_point=entry_point)


def _stub(tree: ast.Module, entry_point: str) -> ast.FunctionDef | ast.AsyncFunctionDef | None:
    functions = [node for node in tree.body if isinstance(node, _FUNCTIONS)]
    if entry_point:
        functions = [node for node in functions if node.name == entry_point]
    return functions[-1] if functions and (entry_point or not is_real(functions[-1])) else None


def _prompt_of(code: str, piece: Piece, stub: ast.FunctionDef | ast.AsyncFunctionDef) -> _Prompt:
    lines = piece.source.split("\n")
    first = min([stub.lineno, *(decorator.lineno for decorator in stub.decorator_list)])
    preamble = "\n".join([*lines[: first - 1], *lines[stub.end_lineno :]]).strip("\n")
    return _Prompt(
        code=code if code.endswith("\n") else code + "\n",
        preamble=preamble + "\n" if preamble.strip() else "",
        entry_point=stub.name,
        indent=" " * max(stub.body[0].col_offset, 1),
    )


def _futures_first(program: str) -> str:
    """`from __future__` must precede what the prompt has put before it."""
    futures = "".join(dict.fromkeys(line.rstrip("\n") + "\n" for line in _FUTURE.findall(program)))
    return futures + _FUTURE.sub("", program) if futures else program
