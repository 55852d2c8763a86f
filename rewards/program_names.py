"""Which names a piece of Python binds, uses and needs, and which of its statements only show or check the result."""

import ast
import builtins
from collections.abc import Iterable

from rewards.program_text import Piece, is_bare

_BUILTINS = frozenset(dir(builtins))
_SHOWING = {"print", "input", "exit", "quit", "pprint", "doctest", "unittest", "pytest", "main"}
_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def bound_by(node: ast.stmt) -> set[str]:
    """Names that a top-level statement binds in the module."""
    if isinstance(node, _DEFINITIONS):
        return {node.name}
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
    inner = (child for child in ast.walk(node) if child is not node)
    own = {child.id for child in ast.walk(node) if isinstance(child, ast.Name) and isinstance(child.ctx, ast.Store)}
    return own.union(
        *(bound_by(child) for child in inner if isinstance(child, (*_DEFINITIONS, ast.Import, ast.ImportFrom)))
    )


def used_by(node: ast.AST) -> set[str]:
    """Names of the module that it reads: for a function, those that it doesn't bind itself."""
    names = [child for child in ast.walk(node) if isinstance(child, ast.Name)]
    used = {name.id for name in names if not isinstance(name.ctx, ast.Store)}
    if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        return used
    own = {name.id for name in names if isinstance(name.ctx, ast.Store)}
    return used - own - {child.arg for child in ast.walk(node) if isinstance(child, ast.arg)}


def definition(tree: ast.Module, name: str) -> ast.stmt | None:
    """The last top-level statement that binds the name to something that has a body."""
    found = [node for node in tree.body if name in bound_by(node) and is_real(node)]
    return found[-1] if found else None


def is_real(node: ast.stmt) -> bool:
    """Not a stub: a function whose body is a docstring, `pass`, `...` or NotImplementedError is one."""
    if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        return True
    return any(not _is_filler(child) for child in node.body)


def _is_filler(node: ast.stmt) -> bool:
    if isinstance(node, ast.Raise):
        return "NotImplementedError" in used_by(node)
    return isinstance(node, (ast.Pass, ast.Import, ast.ImportFrom)) or (
        isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    )


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
    bound = {node.arg for node in nodes if isinstance(node, ast.arg)}
    bound |= {node.name for node in nodes if isinstance(node, ast.ExceptHandler) and node.name}
    bound = bound.union(*(bound_by(node) for node in nodes if isinstance(node, ast.stmt)))
    bound |= {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    return {node.id for node in nodes if isinstance(node, ast.Name)} - bound - _BUILTINS


def without_usage(piece: Piece, entry_point: str, *, keep_first: bool = False) -> str:
    """The source without its examples, checks and prints, which would run, and might fail, when it is loaded.

    With `keep_first`, later definitions of the entry point go too: text that ran on after the answer.
    """
    tree, dropped = piece.tree, []
    needed = _needed(tree, entry_point)
    tainted = _reaching(tree, entry_point, needed)
    seen = False
    for node in tree.body:
        defines = entry_point in bound_by(node)
        if _shows(node, tainted, needed | {entry_point}) or (keep_first and seen and defines):
            dropped.append(node)
            tainted |= bound_by(node) - needed - {entry_point}
        seen = seen or defines
    return _without_lines(piece, dropped)


def _needed(tree: ast.Module, entry_point: str) -> set[str]:
    """Names that the entry point uses, directly or through what it uses."""
    needed, grew = {entry_point}, True
    while grew:
        users = [node for node in tree.body if bound_by(node) & needed]
        more = set().union(*(used_by(node) for node in users)) - needed
        needed |= more
        grew = bool(more)
    return needed - {entry_point}


def _reaching(tree: ast.Module, entry_point: str, needed: set[str]) -> set[str]:
    """The entry point, and the functions that call it and are not needed by it: tests, demonstrations, `main`."""
    tainted, grew = {entry_point}, bool(entry_point)
    while grew:
        users = (node for node in tree.body if isinstance(node, _DEFINITIONS) and used_by(node) & tainted)
        more = set().union(*map(bound_by, users)) - tainted - needed
        tainted |= more
        grew = bool(more)
    return tainted


def _shows(node: ast.stmt, tainted: set[str], kept: set[str]) -> bool:
    if isinstance(node, (*_DEFINITIONS, ast.Import, ast.ImportFrom)):
        return False
    is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    if isinstance(node, ast.Assert) or (is_bare(node) and not is_text):
        return True
    used = used_by(node)
    if isinstance(node, ast.If) and "__name__" in used:
        return True
    if bound_by(node) & kept:
        return False
    calls = isinstance(node, ast.Expr) or "input" in used
    return bool(used & tainted) or (calls and bool(used & _SHOWING))


def _without_lines(piece: Piece, dropped: list[ast.stmt]) -> str:
    lines = piece.source.split("\n")
    gone = {line for node in dropped for line in _lines(node)}
    kept = {line for node in piece.tree.body if node not in dropped for line in _lines(node)}
    return "\n".join(text for number, text in enumerate(lines, start=1) if number not in gone - kept)


def _lines(node: ast.stmt) -> range:
    decorators = getattr(node, "decorator_list", [])
    first = min([node.lineno, *(decorator.lineno for decorator in decorators)])
    return range(first, (node.end_lineno or node.lineno) + 1)
