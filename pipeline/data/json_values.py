"""Values of a dataset's columns as JSON values."""

import datetime
import decimal
import math
from collections.abc import Mapping
from typing import Any


def as_json(value: Any, where: str = "") -> Any:
    """The value as JSON would hold it; dates become ISO text, arrays become lists.

    `ValueError` names the column, and the place inside, of what JSON can't hold: an image, bytes, a nan, half a
    surrogate pair.
    """
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, str):
        return _text(value, where)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{where}: {value} is not JSON")
        # A plain float: numpy's prints itself with its type.
        return float(value)
    if isinstance(value, Mapping):
        return {_text(str(key), where): as_json(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(item, f"{where}.{number}") for number, item in enumerate(value)]
    return as_json(_converted(value, where), where)


def _converted(value: Any, where: str) -> Any:
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, datetime.timedelta):
        return value.total_seconds()
    if isinstance(value, decimal.Decimal):
        return str(value)
    # numpy's scalars and arrays, without importing numpy.
    if type(value).__module__ == "numpy" and hasattr(value, "tolist"):
        return value.tolist()
    raise ValueError(f"{where}: a {type(value).__name__} has no place in JSON")


def _text(value: str, where: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: half a surrogate pair at character {error.start}") from error
    return str(value)
