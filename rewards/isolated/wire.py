"""The typed JSON that the judge's two child interpreters speak: values of exact builtin types, and nothing that runs.

A frame is four bytes of length and a JSON document. JSON's own null, booleans, strings, lists, finite floats and small
integers stand for themselves; every other type is an object with one key, its tag. Decoding builds builtin types alone
(and `Opaque`, of which only the truth is known), so that a candidate's class never reaches the side that compares.
"""

from __future__ import annotations

import json
import os

TYPE_CHECKING = False  # `typing` takes longer to import than all the rest of a child.
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from typing import Any

MAX_DEPTH = 200
"""Nesting of a value; deeper ones are refused on both sides."""

MAX_ITEMS = 100_000
"""Items taken from a returned iterator, which may have no end."""

# JSON integers of other readers are doubles; larger ones travel as hexadecimal, which has no limit on digits.
_PLAIN_INT = 2**53

_TYPES = {
    kind.__name__: kind
    for kind in (
        *(bool, int, float, complex, str, bytes, bytearray, list, tuple, dict, set, frozenset, range, object),
        type(None),
    )
}
_SEQUENCES: tuple[tuple[Any, str], ...] = ((tuple, "t"), (set, "s"), (frozenset, "z"))
_BYTES: tuple[tuple[Any, str], ...] = ((bytes, "b"), (bytearray, "y"))
_VIEWS = {type({}.keys()): "keys", type({}.values()): "values", type({}.items()): "items"}


class WireError(ValueError):
    """A value or a frame that the protocol doesn't carry."""


class ForeignError(WireError):
    """An object of a type that has no form on the wire, where none may stand in for it."""


class Opaque:
    """Stands for a returned object of another type: it is true or false, and equal to nothing else."""

    def __init__(self, kind: str, truth: bool) -> None:
        self._kind, self._truth = kind, truth

    def __bool__(self) -> bool:
        return self._truth

    def __repr__(self) -> str:
        return f"<an object of type {self._kind}>"


def encode(value: Any, depth: int = 0, *, stand_ins: bool = True) -> Any:
    """JSON of a value; subclasses travel as their builtin base. `WireError` beyond `MAX_DEPTH`.

    An object of any other type arrives as `Opaque`, or raises `ForeignError` where `stand_ins` is off.
    """
    if depth > MAX_DEPTH:
        raise WireError(f"nested deeper than {MAX_DEPTH}")
    if value is None or value is True or value is False:
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        number = int.__index__(value)
        return number if -_PLAIN_INT < number < _PLAIN_INT else {"i": hex(number)}
    if isinstance(value, float):
        number = float.__float__(value)
        return number if number - number == 0 else {"f": float.__repr__(number)}
    if isinstance(value, list):
        return [encode(item, depth + 1, stand_ins=stand_ins) for item in list.__iter__(value)]
    return _encode_tagged(value, depth + 1, stand_ins=stand_ins)


def _encode_tagged(value: Any, depth: int, *, stand_ins: bool) -> dict[str, Any]:
    def inner(items: Iterable[Any]) -> list[Any]:
        return [encode(item, depth, stand_ins=stand_ins) for item in items]

    for base, tag in _SEQUENCES:
        if isinstance(value, base):
            return {tag: inner(base.__iter__(value))}
    if isinstance(value, dict):
        return {"d": [inner(pair) for pair in dict.items(value)]}
    for base, tag in _BYTES:
        if isinstance(value, base):
            return {tag: base.hex(value)}
    if isinstance(value, complex):
        return {"c": inner((value.real, value.imag))}
    if isinstance(value, range):
        return {"r": inner((value.start, value.stop, value.step))}
    if any(value is kind for kind in _TYPES.values()):
        return {"T": value.__name__}
    if type(value) in _VIEWS:
        return {"v": [_VIEWS[type(value)], inner(value)]}
    if hasattr(type(value), "__next__"):
        return {"n": inner(_bounded(value))}
    if not stand_ins and not isinstance(value, Opaque):
        raise ForeignError(f"an object of type {type(value).__name__} can't cross over")
    if not stand_ins:
        raise WireError(f"{value!r} can't be handed back")
    return {"o": [type(value).__name__, bool(value)]}


def _bounded(items: Iterator[Any]) -> Iterator[Any]:
    for count, item in enumerate(items):
        if count == MAX_ITEMS:
            raise WireError(f"an iterator of more than {MAX_ITEMS} items")
        yield item


def decode(document: Any, depth: int = 0) -> Any:
    """The value of a JSON document. `WireError` for anything that `encode` doesn't write."""
    if depth > MAX_DEPTH + 1:
        raise WireError(f"nested deeper than {MAX_DEPTH}")
    if isinstance(document, list):
        return [decode(item, depth + 1) for item in document]
    if not isinstance(document, dict):
        return document
    if len(document) != 1:
        raise WireError("a tagged value has one key")
    tag, body = next(iter(document.items()))
    try:
        return _decode_tagged(tag, body, depth + 1)
    except (TypeError, ValueError, KeyError, IndexError, OverflowError) as error:
        raise WireError(f"tag {tag[:20]!r}: {type(error).__name__}") from None


def _decode_tagged(tag: str, body: Any, depth: int) -> Any:
    match tag:
        case "i":
            return int(body, 16)
        case "f":
            return {"nan": float("nan"), "inf": float("inf"), "-inf": -float("inf")}[body]
        case "t" | "s" | "z":
            items = (decode(item, depth) for item in _list(body))
            return {"t": tuple, "s": set, "z": frozenset}[tag](items)
        case "d":
            return {decode(key, depth): decode(item, depth) for key, item in map(_list, _list(body))}
        case "b" | "y":
            return {"b": bytes, "y": bytearray}[tag].fromhex(body)
        case "c":
            real, imaginary = (float(decode(part)) for part in _list(body))
            return complex(real, imaginary)
        case "r":
            return range(*(decode(part) for part in _list(body)))
        case "T":
            return _TYPES[body]
        case "v":
            return _view(body[0], [decode(item, depth) for item in _list(body[1])])
        case "n":
            return iter([decode(item, depth) for item in _list(body)])
        case "o":
            return Opaque(str(body[0])[:100], body[1] is True)
        case _:
            raise WireError("unknown tag")


def _list(body: Any) -> list[Any]:
    if not isinstance(body, list):
        raise WireError("not a list")
    return body


def _view(kind: str, items: list[Any]) -> Any:
    if kind == "keys":
        return dict.fromkeys(items).keys()
    return dict(items).items() if kind == "items" else dict(enumerate(items)).values()


def write_frame(descriptor: int, document: Any) -> None:
    """Send one document, whole."""
    body = json.dumps(document, separators=(",", ":")).encode()
    rest = memoryview(len(body).to_bytes(4, "big") + body)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def read_frame(descriptor: int, limit: int) -> Any:
    """The next document. `EOFError` where the writer is gone, `WireError` where it is no frame or too long a one."""
    size = int.from_bytes(_read(descriptor, 4), "big")
    if size > limit:
        raise WireError(f"a frame of {size} bytes, the limit is {limit}")
    body = _read(descriptor, size)
    try:
        return json.loads(body, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise WireError(f"not a frame: {type(error).__name__}") from None


def _refuse(name: str) -> None:
    raise WireError(f"{name} is not JSON")


def _read(descriptor: int, size: int) -> bytes:
    parts = bytearray()
    while len(parts) < size:
        chunk = os.read(descriptor, min(size - len(parts), 1 << 20))
        if not chunk:
            raise EOFError("the other side has gone")
        parts += chunk
    return bytes(parts)
