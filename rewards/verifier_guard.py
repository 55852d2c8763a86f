"""What may reach a verifier that evaluates text as Python.

Some of reasoning-gym's verifiers hand the model's answer to `eval`, or to sympy's `parse_expr`, which does the same.
Such an answer is read here first, with `ast`, and only literals and plain arithmetic pass. What stays possible: an
expression that sympy takes long to simplify.
"""

import ast
import re
from collections.abc import Callable, Mapping
from typing import Any

MAX_CHARACTERS = 2_000
MAX_NODES = 500
MAX_DIGITS = 30
MAX_EXPONENT = 20
FUNCTIONS = {"sin", "cos", "tan", "asin", "acos", "atan", "sinh", "cosh", "tanh", "exp", "log", "sqrt"}
PLAIN = re.compile(r"[\w\s.,-]*")
"""Text without brackets, quotes and operators: evaluated, it calls nothing and builds nothing."""

OPERATORS = (ast.Add, ast.Sub, ast.Mult, ast.Div, ast.USub, ast.UAdd, ast.Load)
BITWISE = (ast.BitAnd, ast.BitOr, ast.BitXor, ast.Invert, ast.LShift, ast.RShift)


def is_literal(text: str) -> bool:
    """Plain text, or a Python list of literals."""
    if PLAIN.fullmatch(text):
        return len(text) <= MAX_CHARACTERS * 10
    return _only(text, ast.List, ast.Tuple, ast.Constant, ast.UnaryOp, ast.USub, ast.Load)


def is_arithmetic(text: str) -> bool:
    """Numbers, `+ - * /` and brackets."""
    return _only(text, ast.BinOp, ast.UnaryOp, ast.Constant, *OPERATORS)


def is_bitwise(text: str) -> bool:
    """Numbers, `+ - *`, bit operators, and shifts by a written number."""
    return _only(text, ast.BinOp, ast.UnaryOp, ast.Constant, *OPERATORS, *BITWISE) and all(
        isinstance(node.right, ast.Constant) and node.right.value in range(65)
        for node in ast.walk(ast.parse(text.strip(), mode="eval"))
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.LShift | ast.RShift)
    )


def is_algebra(text: str) -> bool:
    """Arithmetic with one-letter names, the functions of `FUNCTIONS`, and small written powers of what holds none."""
    if not _only(text, ast.BinOp, ast.UnaryOp, ast.Constant, ast.Name, ast.Call, ast.Pow, *OPERATORS):
        return False
    return all(_tame(node) for node in ast.walk(ast.parse(text.strip(), mode="eval")))


def _only(text: str, *allowed: type[ast.AST]) -> bool:
    if len(text) > MAX_CHARACTERS:
        return False
    try:
        nodes = list(ast.walk(ast.parse(text.strip(), mode="eval")))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    fits = all(isinstance(node, (ast.Expression, *allowed)) for node in nodes)
    return fits and len(nodes) <= MAX_NODES and all(_short(node) for node in nodes if isinstance(node, ast.Constant))


def _short(constant: ast.Constant) -> bool:
    value = constant.value
    if isinstance(value, bool) or not isinstance(value, int | float):
        return isinstance(value, str)
    return abs(value) < 10**MAX_DIGITS


def _tame(node: ast.AST) -> bool:
    if isinstance(node, ast.Name):
        return len(node.id) == 1 or node.id in FUNCTIONS
    if isinstance(node, ast.Call):
        named = isinstance(node.func, ast.Name) and node.func.id in FUNCTIONS
        return named and not node.keywords and not any(_calls(argument) for argument in node.args)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow):
        return _is_small(node.right) and not any(isinstance(inner, ast.Pow) for inner in ast.walk(node.left))
    return not (isinstance(node, ast.Constant) and isinstance(node.value, str))


def _calls(node: ast.AST) -> bool:
    return any(isinstance(inner, ast.Call) for inner in ast.walk(node))


def _is_small(exponent: ast.expr) -> bool:
    """A number up to `MAX_EXPONENT`, its negative, or a fraction of two."""
    if isinstance(exponent, ast.UnaryOp):
        return _is_small(exponent.operand)
    if isinstance(exponent, ast.BinOp) and isinstance(exponent.op, ast.Div):
        return _is_small(exponent.left) and _is_small(exponent.right)
    return isinstance(exponent, ast.Constant) and isinstance(exponent.value, int) and exponent.value <= MAX_EXPONENT


ANSWERS: Mapping[str, Callable[[str], bool]] = {
    "binary_matrix": is_literal,
    "n_queens": is_literal,
    "spiral_matrix": is_literal,
    "string_insertion": is_literal,
    "countdown": is_arithmetic,
    "puzzle24": is_arithmetic,
    "intermediate_integration": is_algebra,
    "polynomial_multiplication": is_algebra,
    "simple_integration": is_algebra,
}
"""Tasks whose verifier evaluates the answer, and what an answer must be to reach it."""

ENTRIES: Mapping[str, Callable[[Mapping[str, Any]], bool]] = {
    "number_sorting": lambda entry: is_literal(str(entry["answer"])),
    "polynomial_multiplication": lambda entry: is_algebra(str(entry["answer"])),
    "bitwise_arithmetic": lambda entry: is_bitwise(str(entry["metadata"]["problem"])),
    "simple_integration": lambda entry: is_algebra(str(entry["metadata"]["integrand"])),
    "intermediate_integration": lambda entry: is_algebra(str(entry["metadata"]["integrand"])),
}
"""Tasks whose verifier evaluates a part of the entry, which a dataset from elsewhere could have written."""


def may_verify(task: str, answer: str) -> bool:
    """Whether the task's verifier may see the answer."""
    return task not in ANSWERS or ANSWERS[task](answer)


def check_entry(task: str, entry: Mapping[str, Any]) -> None:
    """`ValueError` for an entry that the task's verifier would evaluate, and that is not what the task makes."""
    if task in ENTRIES and not ENTRIES[task](entry):
        raise ValueError(f"the entry of a {task!r} task holds an expression that may not be evaluated")
