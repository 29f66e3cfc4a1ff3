"""Values to bytes and back: arguments, results, and the promises inside them at any depth.

Arguments are a pickle of ``(args, kwargs)``. Results are JSON when that loses nothing (so that sinks and other languages can
read them), bytes as they are, anything else a pickle. A promise becomes a number: the position of its node in the list of
inputs or references that goes with the payload.
"""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Callable, Iterable, Mapping
from json.encoder import encode_basestring
from typing import Any, cast

from . import _names
from ._errors import DagoramaError, EarlyUse, NotSerialisable
from ._msgpack import unpack as unpack_msgpack
from ._promise import Outcome, Promise, get_attempt, get_index
from ._wire import (
    JSON, MAX_PAYLOAD, MODE_AFTER, MODE_OUTCOME, MODE_VALUE, MSGPACK, PICKLE, RANGE, RAW, STRUCTURE, SUCCEEDED, TAIL,
    VALUE, Bytes, Item, merge,
)

Encoded = tuple[int, int, int, bytes, bytes]  # end, codec, n_ranges, ranges, body
Fetch = Callable[[list[tuple[int, int]]], list[Item]]
SCALARS = frozenset((int, str, float, bool, type(None), bytes))
dumps = pickle.dumps
_INT_LOW, _INT_HIGH = -(1 << 63), 1 << 63


class Refs:
    """The nodes that one payload refers to, in the order of their numbers; neighbours become one range."""

    __slots__ = ("_attempt", "_count", "_next", "_numbers", "_ranges")

    def __init__(self, attempt: Any) -> None:
        self._attempt = attempt
        self._numbers: dict[int, int] = {}
        self._ranges: list[list[int]] = []
        self._next = -1  # the child that would prolong the last range
        self._count = 0

    def add(self, promise: Promise, mode: int) -> int:
        """The number by which the payload refers to the promise."""
        index = get_index(promise)
        key = index if mode == MODE_VALUE else -1 - index
        known = self._numbers.get(key)
        if known is None:
            self._append(promise, index, mode)
            known = self._numbers[key] = self._count
            self._count += 1
        return known

    def _append(self, promise: Promise, index: int, mode: int) -> None:
        attempt: Any = self._attempt
        if get_attempt(promise) is not attempt:
            raise EarlyUse(f"{promise!r} was recorded by another attempt or outside this one: a promise can only be used by the "
                           "action that made the call")
        if index == self._next and self._ranges[-1][2] & 0xFF == mode:
            self._ranges[-1][1] += 1
        else:
            new, first = attempt.node_of(index)
            self._ranges.append([first, 1, mode | new])
        self._next = index + 1
        if self._next == attempt.base:
            self._next = -1  # flushed children and those still recorded are numbered differently

    def wait_for(self, promises: Iterable[object]) -> None:
        """Add inputs that are waited for and not received."""
        self._next = -1
        for promise in promises:
            if type(promise) is Outcome and promise._promise is not None:
                raise TypeError("after= waits for success: give it the promise itself")
            if type(promise) is Promise:
                self._append(promise, get_index(promise), MODE_AFTER)

    def pack(self) -> tuple[int, bytes]:
        """How many ranges, and their bytes."""
        if not self._ranges:
            return 0, b""
        return len(self._ranges), b"".join([RANGE.pack(*item) for item in self._ranges])

    def __len__(self) -> int:
        return self._count


class _Pickler(pickle.Pickler):
    refs: Refs | None = None
    busy = False
    allow_outcomes = True

    def __init__(self) -> None:
        self.sink = io.BytesIO()
        super().__init__(self.sink, 5)

    def persistent_id(self, obj: object) -> int | tuple[str, int] | None:
        kind = type(obj)
        if kind is Promise:
            return self._refs().add(obj, MODE_VALUE)  # type: ignore[arg-type]
        if kind is Outcome and obj._promise is not None:  # type: ignore[attr-defined]
            if not self.allow_outcomes:
                raise TypeError("outcome(...) of a promise can be an argument of an action, not a part of a result")
            return "o", self._refs().add(obj._promise, MODE_OUTCOME)  # type: ignore[attr-defined]
        return None

    def _refs(self) -> Refs:
        if self.refs is None:
            raise EarlyUse("a promise can only be used by the running action that made the call")
        return self.refs

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, type) or hasattr(obj, "__code__"):
            module = getattr(obj, "__module__", None)
            if module == "__main__" and _names.MAIN is not None and "<" not in obj.__qualname__:
                return _names.load_global, (_names.MAIN, obj.__qualname__)
        return NotImplemented


_spare: list[_Pickler] = []


def pickled(value: object, refs: Refs | None = None, *, outcomes: bool = True) -> bytes:
    """A pickle in which promises are persistent ids. The pickler is kept for the next one."""
    try:
        pickler = _spare.pop()
    except IndexError:  # the first, or inside a __reduce__ that calls an action
        pickler = _Pickler()
    try:
        pickler.refs = refs
        pickler.allow_outcomes = outcomes
        pickler.dump(value)
        return pickler.sink.getvalue()
    finally:
        pickler.refs = None
        pickler.clear_memo()
        pickler.sink.seek(0)
        pickler.sink.truncate()
        if len(_spare) < 4:
            _spare.append(pickler)


class _Unpickler(pickle.Unpickler):
    def __init__(self, body: Bytes, values: list[Any] | None) -> None:
        super().__init__(io.BytesIO(body))
        self.values = values

    def persistent_load(self, pid: Any) -> Any:
        number = pid[1] if type(pid) is tuple else pid
        if self.values is None:
            raise pickle.UnpicklingError("refers to a node, but none came with it")
        return self.values[number]

    def find_class(self, module: str, name: str) -> Any:
        return super().find_class("__main__" if module == _names.MAIN else module, name)


def unpickled(body: Bytes, values: list[Any] | None = None) -> Any:
    """The value of a pickle; ``values`` are what its persistent ids refer to."""
    if values is None and _names.MAIN is None:
        return pickle.loads(body)
    return _Unpickler(body, values).load()


# ---- arguments -------------------------------------------------------------------------------------------------------


def encode_arguments(args: tuple[Any, ...], kwargs: Mapping[str, Any], refs: Refs | None, name: str,
                     names: tuple[str, ...] = ()) -> bytes:
    """``(args, kwargs)`` as a pickle, or `NotSerialisable` with the argument and the path inside it."""
    try:
        return _limited(pickled((args, kwargs), refs))
    except (EarlyUse, NotSerialisable):
        raise
    except DagoramaError as error:
        raise _about(error, f"the arguments of {name}") from None
    except Exception as error:
        parts = [(names[i] if i < len(names) else f"#{i + 1}", arg) for i, arg in enumerate(args)]
        for label, arg in [*parts, *kwargs.items()]:
            path, cause = _first_bad(arg, label, refs)
            if cause is not None:
                raise NotSerialisable(f"argument {label!r} of {name} cannot be stored: {path} is {_kind(cause[0])} "
                                      f"({cause[1]})") from error
        raise NotSerialisable(f"the arguments of {name} cannot be stored: {error}") from error


def decode_arguments(codec: int, body: Bytes, values: list[Any] | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and named arguments of a call."""
    if codec == PICKLE:
        args, kwargs = unpickled(body, values)
        return args, kwargs
    if codec == RAW:
        return (bytes(body),), {}
    said = decode(codec, body, values)
    return tuple(said["args"]), dict(said["kwargs"])


def _kind(value: object) -> str:
    return f"a {type(value).__module__}.{type(value).__qualname__}".replace("a builtins.", "a ")


def _about(error: DagoramaError, what: str) -> DagoramaError:
    return type(error)(f"{what}: {error}", code=error.code)


def _limited(body: bytes) -> bytes:
    if len(body) > MAX_PAYLOAD:
        raise DagoramaError(f"{len(body):,} bytes, at most {MAX_PAYLOAD:,} are allowed: store it elsewhere and pass a reference "
                            "[PAYLOAD_TOO_LARGE]", code="PAYLOAD_TOO_LARGE")
    return body


def _first_bad(value: Any, path: str, refs: Refs | None) -> tuple[str, tuple[Any, Exception] | None]:
    """Follow the first part that cannot be pickled down to the smallest one."""
    cause: tuple[Any, Exception] | None = None
    for _ in range(100):
        try:
            pickled(value, refs)
            return path, cause
        except Exception as error:
            cause = (value, error)
        for step, part in _parts(value):
            try:
                pickled(part, refs)
            except Exception:
                path, value = path + step, part
                break
        else:
            return path, cause
    return path, cause


def _parts(value: Any) -> Iterable[tuple[str, Any]]:
    if isinstance(value, Mapping):
        return [(f"[{key!r}]", part) for key, part in value.items()]
    if isinstance(value, list | tuple):
        return [(f"[{i}]", part) for i, part in enumerate(value)]
    if isinstance(value, set | frozenset):
        return [("{...}", part) for part in value]
    state = getattr(value, "__dict__", None)
    if isinstance(state, dict) and not isinstance(value, type) and not callable(value):
        return [(f".{key}", part) for key, part in state.items()]
    return []


# ---- results ---------------------------------------------------------------------------------------------------------


def _int(value: int) -> Encoded:
    if _INT_LOW <= value < _INT_HIGH:
        return VALUE, JSON, 0, b"", b"%d" % value
    return VALUE, PICKLE, 0, b"", dumps(value, 5)


def _text(value: str) -> Encoded:
    if len(value) < 1 << 20:
        try:
            return VALUE, JSON, 0, b"", encode_basestring(value).encode()
        except UnicodeEncodeError:  # lone surrogates: only a pickle keeps them
            pass
    return VALUE, PICKLE, 0, b"", _limited(dumps(value, 5))


def _float(value: float) -> Encoded:
    if value - value == 0:
        return VALUE, JSON, 0, b"", repr(value).encode()
    return VALUE, PICKLE, 0, b"", dumps(value, 5)


SCALAR_RESULTS: dict[type, Callable[[Any], Encoded]] = {
    int: _int,
    str: _text,
    float: _float,
    bool: lambda value: (VALUE, JSON, 0, b"", b"true" if value else b"false"),
    type(None): lambda value: (VALUE, JSON, 0, b"", b"null"),
    bytes: lambda value: (VALUE, RAW, 0, b"", _limited(value)),
}
_LEAVES = frozenset((int, str, float, bool, type(None), Promise))
_JSON_TYPES = _LEAVES | {list, dict}
_JSON_DEPTH = 100  # readers in other languages stop at 128


def _fits_json(value: Any) -> bool:
    """Whether reading the JSON gives back exactly this: only exact types, text keys, no shared or cyclic parts."""
    seen: set[int] = set()
    level = [value]
    for _ in range(_JSON_DEPTH):
        deeper: list[Any] = []
        for part in level:
            if id(part) in seen:
                return False
            seen.add(id(part))
            parts: Iterable[Any] = part
            if type(part) is dict:
                if not {str}.issuperset(map(type, part)) or "$dagorama" in part:
                    return False
                parts = part.values()
            kinds = set(map(type, parts))
            if not kinds <= _JSON_TYPES:
                return False
            if int in kinds:
                ints = parts if len(kinds) == 1 else [x for x in parts if type(x) is int]
                if min(ints) < _INT_LOW or max(ints) >= _INT_HIGH:
                    return False
            if not kinds <= _LEAVES:
                deeper += [x for x in parts if type(x) in (list, dict)]
        if not deeper:
            return True
        level = deeper
    return False


def json_body(value: Any, refs: Refs | None = None) -> bytes | None:
    """The value as JSON, or ``None`` if that would lose something."""
    if type(value) in (list, dict) and not _fits_json(value):
        return None

    def reference(part: Any) -> dict[str, int]:
        if refs is None or type(part) is not Promise:
            raise TypeError(type(part).__name__)
        return {"$dagorama": refs.add(part, MODE_VALUE)}

    try:
        text = json.JSONEncoder(ensure_ascii=False, allow_nan=False, check_circular=False, separators=(",", ":"),
                                default=reference).encode(value)
        body = text.encode()
    except (ValueError, TypeError, RecursionError):  # not a number, lone surrogates
        return None
    return body if len(body) <= MAX_PAYLOAD else None


def encode_result(value: Any, attempt: Any, name: str) -> Encoded:
    """What an attempt left: a value, a structure that refers to nodes, or a tail call."""
    kind = type(value)
    scalar = SCALAR_RESULTS.get(kind)
    if scalar is not None:
        return scalar(value)
    refs = Refs(attempt)
    if kind is Promise:
        refs.add(value, MODE_VALUE)
        n_ranges, ranges = refs.pack()
        return TAIL, JSON, n_ranges, ranges, b""
    codec = JSON
    body = json_body(value, refs) if kind in (list, dict) else None
    if body is None:
        codec, refs = PICKLE, Refs(attempt)
        try:
            body = pickled(value, refs, outcomes=False)
        except EarlyUse:
            raise
        except Exception as error:
            path, cause = _first_bad(value, "result", refs)
            detail = f"{path} is {_kind(cause[0])} ({cause[1]})" if cause else str(error)
            raise NotSerialisable(f"the result of {name} cannot be stored: {detail}") from error
    _limited(body)
    n_ranges, ranges = refs.pack()
    return STRUCTURE if n_ranges else VALUE, codec, n_ranges, ranges, body


_scan: Callable[[str, int], tuple[Any, int]] = cast(Any, json.JSONDecoder()).scan_once


def decode(codec: int, body: Bytes, values: list[Any] | None = None) -> Any:
    """The value behind bytes; ``values`` are what it refers to."""
    if codec == JSON:
        text = str(body, "utf-8")
        if values is None:
            try:
                value, end = _scan(text, 0)
                if end == len(text):
                    return value
            except StopIteration:
                pass
            return json.loads(text)
        return json.loads(text, object_hook=lambda d: values[d["$dagorama"]] if len(d) == 1 and "$dagorama" in d else d)
    if codec == PICKLE:
        return unpickled(body, values)
    if codec == RAW:
        return bytes(body)
    if codec == MSGPACK:
        return unpack_msgpack(body)
    raise DagoramaError(f"codec {codec} is not known to this version", code="CODEC_UNKNOWN")


def read_values(items: list[Item], fetch: Fetch, fail: Callable[[Item], BaseException]) -> list[Any]:
    """The values of nodes, what they refer to included. ``fail`` makes the exception for one that has none."""
    values = []
    for item in items:
        if item[1] != SUCCEEDED:
            raise fail(item)
        if item[3]:
            return _read_structures(items, fetch, fail)
        values.append(decode(item[2], item[4]))
    return values


def _read_structures(items: list[Item], fetch: Fetch, fail: Callable[[Item], BaseException]) -> list[Any]:
    """Structures that refer to structures, of any depth and without recursion: fetch level by level, then build from below."""
    known = {item[0]: item for item in items}
    level = [item for item in items if item[3]]
    while level:
        missing = {node for item in level for node in _referred(item)} - known.keys()
        level = []
        for item in fetch(merge(sorted(missing))) if missing else ():
            known[item[0]] = item
            if item[1] != SUCCEEDED:
                raise fail(item)
            if item[3]:
                level.append(item)
    done: dict[int, Any] = {}
    for root in items:
        stack = [root]
        while stack:
            item = stack[-1]
            if item[0] not in done:
                if item[1] != SUCCEEDED:
                    raise fail(item)
                nodes = _referred(item)
                open_ = [node for node in nodes if node not in done]
                if open_:
                    stack += [known[node] for node in open_]
                    continue
                done[item[0]] = decode(item[2], item[4], [done[node] for node in nodes] if nodes else None)
            stack.pop()
    return [done[item[0]] for item in items]


def _referred(item: Item) -> list[int]:
    return [node for first, count in item[3] for node in range(first, first + count)]
