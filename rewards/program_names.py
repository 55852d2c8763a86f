"""Which names the statements of a program bind and use, and which of them only show or check its result."""

import ast
import builtins
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from rewards.program_text import Piece, is_bare

_BUILTINS = frozenset(dir(builtins))
_SHOWING = {"print", "input", "exit", "quit", "pprint", "doctest", "unittest", "pytest", "main"}
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
_DEFINITIONS = (*_FUNCTIONS, ast.ClassDef)
_IMPORTS = (ast.Import, ast.ImportFrom)


@dataclass(frozen=True)
class Statement:
    """A top-level statement, the names of the module that it binds, and those that it reads."""

    node: ast.stmt
    binds: frozenset[str]
    uses: frozenset[str]


def statements(tree: ast.Module) -> list[Statement]:
    """The module's statements, in order."""
    return [Statement(node, frozenset(bound_by(node)), frozenset(_used_by(node))) for node in tree.body]


def bound_by(node: ast.stmt) -> set[str]:
    """Names that a top-level statement binds in the module."""
    if isinstance(node, _DEFINITIONS):
        return {node.name}
    return {name for child in ast.walk(node) for name in _bound_here(child)}


def _bound_here(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        yield node.id
    elif isinstance(node, _DEFINITIONS):
        yield node.name
    elif isinstance(node, _IMPORTS):
        yield from ((alias.asname or alias.name).partition(".")[0] for alias in node.names)
    elif isinstance(node, ast.ExceptHandler) and node.name:
        yield node.name


def _used_by(node: ast.AST) -> set[str]:
    """Names of the module that it reads: for a function, those that it doesn't bind itself."""
    inside = list(ast.walk(node))
    names = [child for child in inside if isinstance(child, ast.Name)]
    used = {name.id for name in names if not isinstance(name.ctx, ast.Store)}
    if not isinstance(node, _FUNCTIONS):
        return used
    own = {name.id for name in names if isinstance(name.ctx, ast.Store)}
    return used - own - {child.arg for child in inside if isinstance(child, ast.arg)}


def defines(tree: ast.Module, name: str) -> bool:
    """Whether a top-level statement binds the name to something that has a body."""
    return any(name in bound_by(node) and is_real(node) for node in tree.body)


def is_real(node: ast.stmt) -> bool:
    """Not a stub: a function that has nothing but a docstring, imports, `pass`, `...` or NotImplementedError is one."""
    return not isinstance(node, _FUNCTIONS) or not all(map(_is_filler, node.body))


def _is_filler(node: ast.stmt) -> bool:
    if isinstance(node, ast.Raise):
        return "NotImplementedError" in _used_by(node)
    is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    return is_text or isinstance(node, (ast.Pass, *_IMPORTS))


def has_own_return(node: ast.AST) -> bool:
    """Whether a function, or by mistake a module, returns or yields in its own body, functions inside it aside."""
    pending = list(ast.iter_child_nodes(node))
    while pending:
        child = pending.pop()
        if isinstance(child, (ast.Return, ast.Yield, ast.YieldFrom)):
            return True
        if not isinstance(child, (*_DEFINITIONS, ast.Lambda)):
            pending += ast.iter_child_nodes(child)
    return False


def unresolved(trees: Iterable[ast.Module]) -> set[str]:
    """Names that are used and neither bound anywhere in these trees nor builtin."""
    nodes = [node for tree in trees for node in ast.walk(tree)]
    bound = {name for node in nodes for name in _bound_here(node)}
    arguments = {node.arg for node in nodes if isinstance(node, ast.arg)}
    return {node.id for node in nodes if isinstance(node, ast.Name)} - bound - arguments - _BUILTINS


def without_usage(piece: Piece, entry_point: str, *, keep_first: bool = False) -> str:
    """The source without its examples, checks and prints, which would run, and might fail, when it is loaded.

    With `keep_first`, later definitions of the entry point go too: text that ran on after the answer.
    """
    body = statements(piece.tree)
    needed = _needed(body, entry_point)
    tainted = _callers(body, entry_point, needed)
    dropped: list[ast.stmt] = []
    seen = False
    for statement in body:
        is_entry = entry_point in statement.binds
        if _shows(statement, tainted, needed | {entry_point}) or (keep_first and seen and is_entry):
            dropped.append(statement.node)
            tainted |= statement.binds - needed - {entry_point}
        seen = seen or is_entry
    return _without_lines(piece, dropped)


def _needed(body: list[Statement], entry_point: str) -> set[str]:
    """Names that the entry point uses, directly or through what it uses."""
    binders: defaultdict[str, list[Statement]] = defaultdict(list)
    for statement in body:
        for name in statement.binds:
            binders[name].append(statement)
    reached = _closure(entry_point, lambda name: (used for by in binders.get(name, ()) for used in by.uses))
    return reached - {entry_point}


def _callers(body: list[Statement], entry_point: str, needed: set[str]) -> set[str]:
    """The entry point, and the functions that call it and are not needed by it: tests, demonstrations, `main`."""
    users: defaultdict[str, set[str]] = defaultdict(set)
    for statement in body:
        if isinstance(statement.node, _DEFINITIONS):
            for name in statement.uses:
                users[name] |= statement.binds - needed
    return _closure(entry_point, lambda name: users.get(name, ()))


def _closure(start: str, step: Callable[[str], Iterable[str]]) -> set[str]:
    reached, pending = {start}, [start]
    while pending:
        new = set(step(pending.pop())) - reached
        reached |= new
        pending += new
    return reached


def _shows(statement: Statement, tainted: set[str], kept: set[str]) -> bool:
    node = statement.node
    if isinstance(node, (*_DEFINITIONS, *_IMPORTS)):
        return False
    is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    if isinstance(node, ast.Assert) or (is_bare(node) and not is_text):
        return True
    if isinstance(node, ast.If) and "__name__" in statement.uses:
        return True
    if statement.binds & kept:
        return False
    may_stop = isinstance(node, ast.Expr) or "input" in statement.uses
    return bool(statement.uses & tainted) or (may_stop and bool(statement.uses & _SHOWING))


def _without_lines(piece: Piece, dropped: list[ast.stmt]) -> str:
    numbered = enumerate(piece.source.split("\n"), start=1)
    out = set(map(id, dropped))
    gone = {line for node in dropped for line in _lines(node)}
    gone -= {line for node in piece.tree.body if id(node) not in out for line in _lines(node)}
    return "\n".join(text for number, text in numbered if number not in gone)


def _lines(node: ast.stmt) -> range:
    decorators = getattr(node, "decorator_list", [])
    first = min([node.lineno, *(decorator.lineno for decorator in decorators)])
    return range(first, (node.end_lineno or node.lineno) + 1)
