"""Is this value one that the field takes? Types and ranges of configuration values, in one sentence each.

`checked` returns the value in the field's own type (a whole number for a float field becomes a float, a list
becomes a tuple) or raises a `UserError` that names the value, the limit and the mend.
"""

import math
from dataclasses import dataclass
from numbers import Integral, Real
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from rdopt.config.errors import UserError

_PLAIN = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The range of a number, or of each number of a list.

    low: smallest value taken.
    above: the value must be greater than this.
    high: largest value taken.
    """

    low: float | None = None
    above: float | None = None
    high: float | None = None


def type_name(kind: Any) -> str:
    """What a user calls the type: `int` is "a whole number", `tuple[float, ...]` "a list, each a number"."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is Literal:
        return "one of " + ", ".join(map(str, args))
    if origin is tuple:
        return f"a list, each {type_name(args[0])}"
    if origin in (Union, UnionType):
        return " or ".join("null" if a is type(None) else type_name(a) for a in args)
    return _PLAIN.get(kind, "a section of keys")


def checked(name: str, value: Any, kind: Any, limits: Limits) -> Any:
    """The value as its field's type holds it.

    Args:
        name: dotted key, for the sentence.
        value: what the user wrote.
        kind: the field's annotation: bool, int, float, str, a Literal, a tuple of those, or `| None`.
        limits: the range.

    Raises:
        UserError: the value has another type or lies outside the range.
    """
    converted = _converted(value, kind)
    if converted is _WRONG:
        raise UserError(f"{name} is {_shown(value)}, but it must be {type_name(kind)}.")
    for number in converted if isinstance(converted, tuple) else (converted,):
        if isinstance(number, (int, float)) and not isinstance(number, bool):
            _check_range(name, number, limits)
    if converted == () and get_origin(kind) is tuple:
        raise UserError(f"{name} is empty, but it must hold at least one value: {type_name(kind)}.")
    return converted


_WRONG = object()


def _converted(value: Any, kind: Any) -> Any:
    """The value in the type `kind`, or the mark `_WRONG`."""
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        tried = (_converted(value, a) for a in args)
        return next((t for t in tried if t is not _WRONG), _WRONG)
    if origin is Literal:
        return value if isinstance(value, str) and value in args else _WRONG
    if origin is tuple:
        items = tuple(value) if isinstance(value, (list, tuple)) else (value,)
        done = tuple(_converted(item, args[0]) for item in items)
        return _WRONG if value is None or _WRONG in done else done
    if kind is type(None):
        return None if value is None else _WRONG
    return _scalar(value, kind)


def _scalar(value: Any, kind: type) -> Any:
    if kind is bool or isinstance(value, bool):
        return value if kind is bool and isinstance(value, bool) else _WRONG
    if kind is int:
        return int(value) if isinstance(value, Integral) else _WRONG
    if kind is float:
        return _float(value)
    return value if isinstance(value, kind) else _WRONG


def _float(value: Any) -> Any:
    """A number, also in the form 1e-3, which YAML 1.1 reads as text because it has no point."""
    if not isinstance(value, Real) and not (isinstance(value, str) and "e" in value.lower()):
        return _WRONG
    try:
        return float(value)
    except (ValueError, OverflowError):
        return _WRONG


def _check_range(name: str, number: float, limits: Limits) -> None:
    mends = []
    if isinstance(number, float) and not math.isfinite(number):
        mends.append("finite")
    if limits.low is not None and number < limits.low:
        mends.append(f"at least {limits.low:g}")
    if limits.above is not None and number <= limits.above:
        mends.append(f"greater than {limits.above:g}")
    if limits.high is not None and number > limits.high:
        mends.append(f"at most {limits.high:g}")
    if mends:
        raise UserError(f"{name} is {number}, but it must be {' and '.join(mends)}.")


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return "null" if value is None else repr(value)
