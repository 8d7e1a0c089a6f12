"""Annotations are checked once for each combination of types, dtypes and shapes that a function is called with.

jaxtyping binds and checks a call in a tenth of a millisecond, which was a third of the time of these tests. What an
annotation tells apart is a value's type, an array's dtype and shape, and what a container holds: a call that agrees in
all of it with one that passed would pass. Where no annotation names an array there are no shapes to bind, and the type
checker alone looks at every call, in a microsecond.
"""

import functools
import re
import threading
import types
from collections.abc import Callable, Collection, Hashable
from typing import Any

import jaxtyping
import numpy as np

_PLAIN = (int, float, complex, bool, type(None), bytes)
_LARGE = 16  # items or letters: more are checked at every call
_everything = jaxtyping.jaxtyped  # checks at every call
_calls: dict[types.CodeType, "_Checked"] = {}


class _Untold(Exception):
    """A value of which annotations may tell more than is cheaply remembered."""


def install() -> None:
    """jaxtyping's import hook decorates functions with the checks of this file from now on."""
    jaxtyping.jaxtyped = _jaxtyped  # type: ignore[assignment]


def _jaxtyped(fn: Any = None, *, typechecker: Any) -> Any:
    """`jaxtyping.jaxtyped`, its functions checked once for each kind of call."""
    if fn is None:
        return functools.partial(_jaxtyped, typechecker=typechecker)
    if not isinstance(fn, types.FunctionType):
        return _everything(fn, typechecker=typechecker)
    # A function within a function is made anew at every call of the outer one, from the same code.
    checked = _calls.setdefault(fn.__code__, _Checked(fn, typechecker))
    if not checked.shapes:

        @functools.wraps(fn)
        def plain(*args: Any, **kwargs: Any) -> Any:
            return checked.run(fn, args, kwargs)

        return plain

    @functools.wraps(fn)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            given = (tuple(map(_kind, args)), tuple((k, _kind(v)) for k, v in kwargs.items()))
        except _Untold:
            return checked.run(fn, args, kwargs)
        passed = checked.passed.get(given)
        found = checked.run(fn, args, kwargs) if passed is None else fn(*args, **kwargs)
        try:
            kind = _kind(found)
        except _Untold:
            return found if passed is None else checked.run(lambda *args, **kwargs: found, args, kwargs)
        if passed is None:
            checked.passed.setdefault(given, set()).add(kind)
        elif kind not in passed:
            checked.run(lambda *args, **kwargs: found, args, kwargs)
            passed.add(kind)
        return found

    return call


class _Checked:
    """The checks of a function's annotations around what is called in its place.

    Attributes:
        shapes: whether an annotation names an array.
        passed: kinds of results that passed, by the kinds of the arguments.
    """

    def __init__(self, fn: types.FunctionType, typechecker: Any) -> None:
        self.shapes = _names_arrays(fn)
        self.passed: dict[Hashable, set[Hashable]] = {}
        self._fn, self._typechecker, self._place = fn, typechecker, threading.local()

    def run(self, instead: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        """What `instead` gives, arguments and result checked."""
        self._place.instead = instead
        return self._around(*args, **kwargs)

    @functools.cached_property
    def _around(self) -> Callable[..., Any]:
        place = self._place

        def stand_in(*args: Any, **kwargs: Any) -> Any:
            return place.instead(*args, **kwargs)

        fn = self._fn
        # Annotations that are strings are looked up in the function's own module.
        stub = types.FunctionType(stand_in.__code__, fn.__globals__, fn.__name__, None, stand_in.__closure__)
        functools.update_wrapper(stub, fn)
        return _everything(stub, typechecker=self._typechecker) if self.shapes else self._typechecker(stub)


def _names_arrays(fn: types.FunctionType) -> bool:
    """Whether an annotation of a function, also one that is a string, names one of jaxtyping's types."""
    said = [note if isinstance(note, str) else repr(note) for note in fn.__annotations__.values()]
    names = {name for note in said for name in re.findall(r"\w+", note)}
    return any("jaxtyping" in note for note in [*said, *(repr(fn.__globals__.get(name)) for name in names)])


def _kind(value: Any) -> Hashable:
    """What annotations tell of a value."""
    t = type(value)
    if t in _PLAIN:
        return t
    if t is np.ndarray:
        return (value.dtype, value.shape)
    if t is str:
        return value if len(value) <= _LARGE else t  # literals are told apart by value
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return (t, value.dtype, value.shape)
    if isinstance(value, type):
        return value
    if isinstance(value, (tuple, list)) and len(value) <= _LARGE:
        return (t, *map(_kind, value))
    if isinstance(value, dict) and len(value) <= _LARGE:
        return (t, *((_kind(k), _kind(v)) for k, v in value.items()))
    if isinstance(value, Collection):
        raise _Untold
    return t
