"""Promises: what a call inside a running action returns, and `outcome`, which lets failure through.

A promise knows the attempt that recorded it and its position among that attempt's children. It is typed as the value
it stands for, so every use as a value raises `EarlyUse` at once, with the rewrite. ``repr`` works, for debuggers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, NoReturn, TypeVar, cast

from ._errors import ActionFailed, EarlyUse

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

_MOVE = """put the code that needs the value into an action, and hand the promise to it:

    @action
    def use(value): ...            # here the value is known
    return use({call}(...))"""
_REWRITE = {
    "test": ("tested (if, while, and, or, not, ==, <, in)", "decide inside an action that receives the value: " + _MOVE),
    "iterate": ("iterated, unpacked or measured",
                "`other.map(promise)` makes one node per item once the value is known; for anything else " + _MOVE),
    "compute": ("computed with", _MOVE),
    "text": ("turned into text", _MOVE),
    "attribute": ("asked for an attribute or an item", _MOVE),
    "call": ("called", _MOVE),
    "await": ("awaited", "inside an action, results of other actions are handed on and never awaited: " + _MOVE),
    "change": ("changed", _MOVE),
    "hash": ("put into a set or used as a key of a dict", "keep promises in lists or as values of a dict, or " + _MOVE),
}


def _trap(how: str) -> Callable[..., NoReturn]:
    what, rewrite = _REWRITE[how]

    def early_use(self: Promise, *args: object, **kwargs: object) -> NoReturn:
        name = _get_action(self)
        call = name.rpartition(".")[2]
        raise EarlyUse(f"the value of {name}(...) is not known yet, so it cannot be {what}. "
                       f"Instead, {rewrite.format(call=call)}")

    return early_use


class Promise:
    """Stands for the value that a recorded node will have. Any use as a value raises `EarlyUse`."""

    __slots__ = ("_action", "_attempt", "_index")

    def __repr__(self) -> str:
        return f"<promise of {_get_action(self)}>"

    def __copy__(self) -> Promise:
        return self

    def __deepcopy__(self, memo: object) -> Promise:
        return self

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise EarlyUse(f"the value of {_get_action(self)}(...) is not known yet, so it cannot be pickled by your own code: "
                       "give the promise to an action, or return it")


_TRAPS = {
    "test": "bool eq ne lt le gt ge contains",
    "iterate": "iter next len reversed length_hint aiter anext",
    "compute": "add radd iadd sub rsub isub mul rmul imul matmul rmatmul imatmul truediv rtruediv itruediv floordiv rfloordiv "
               "ifloordiv mod rmod imod divmod rdivmod pow rpow ipow lshift rlshift ilshift rshift rrshift irshift and rand "
               "iand xor rxor ixor or ror ior neg pos abs invert int float complex index round trunc floor ceil",
    "text": "str format bytes fspath",
    "attribute": "getattr getitem enter exit aenter aexit",
    "call": "call",
    "await": "await",
    "change": "setattr delattr setitem delitem",
    "hash": "hash",
}
for _how, _names in _TRAPS.items():
    _method = _trap(_how)
    for _name in _names.split():
        setattr(Promise, f"__{_name}__", _method)

# Slots are read and written through their descriptors: the class itself traps attribute access.
_slots = cast(Any, Promise)
_get_action: Callable[[Promise], str] = _slots._action.__get__
_set_action: Callable[[Promise, str], None] = _slots._action.__set__
get_attempt: Callable[[Promise], Any] = _slots._attempt.__get__
_set_attempt: Callable[[Promise, object], None] = _slots._attempt.__set__
get_index: Callable[[Promise], int] = _slots._index.__get__
_set_index: Callable[[Promise, int], None] = _slots._index.__set__
_new = object.__new__


def make_promise(action: str, attempt: object, index: int) -> Promise:
    """The promise of child ``index`` of ``attempt``."""
    promise = _new(Promise)
    _set_action(promise, action)
    _set_attempt(promise, attempt)
    _set_index(promise, index)
    return promise


class Outcome(Generic[T_co]):
    """How a dependency ended: exactly one of ``value`` and ``error`` is meaningful."""

    __slots__ = ("_error", "_promise", "_value")

    def __init__(self, value: object = None, error: ActionFailed | None = None, promise: Promise | None = None) -> None:
        self._value = value
        self._error = error
        self._promise = promise

    def _known(self) -> None:
        if self._promise is not None:
            raise EarlyUse(f"how {_get_action(self._promise)}(...) ends is not known yet: give the outcome to an action")

    @property
    def ok(self) -> bool:
        """Whether there is a value."""
        self._known()
        return self._error is None

    @property
    def value(self) -> T_co:
        """The value; raises the stored error when there is none."""
        self._known()
        if self._error is not None:
            raise self._error
        return cast(T_co, self._value)

    @property
    def error(self) -> ActionFailed | None:
        """The error, or ``None``."""
        self._known()
        return self._error

    def __bool__(self) -> bool:
        raise EarlyUse("an Outcome is neither true nor false: ask for .ok")

    def __reduce__(self) -> tuple[type[Outcome[Any]], tuple[object, ActionFailed | None]]:
        self._known()
        return Outcome, (self._value, self._error)

    def __repr__(self) -> str:
        if self._promise is not None:
            return f"<outcome of {self._promise!r}>"
        return f"<outcome: {self._value!r}>" if self._error is None else f"<outcome: failed, {self._error}>"


def outcome(value: T) -> Outcome[T]:
    """Let the receiving action run even if this promise fails, and see how it ended."""
    if isinstance(value, Promise):
        return Outcome(promise=value)
    return Outcome(value)
