"""`action` and `batch_action`: functions that become nodes when a running action calls them."""

from __future__ import annotations

import asyncio
import hashlib
import inspect
import json
import threading
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import TYPE_CHECKING, Any, Concatenate, Generic, ParamSpec, Protocol, TypeVar, cast, overload

from . import _names
from ._current import RUNNING
from ._errors import DagoramaError
from ._promise import Promise
from ._retry import ONCE, Retry

if TYPE_CHECKING:
    from ._run import Run

P = ParamSpec("P")
Q = ParamSpec("Q")
R = TypeVar("R")
S = TypeVar("S")
A = TypeVar("A")
B = TypeVar("B")
A_contra = TypeVar("A_contra", contravariant=True)
B_contra = TypeVar("B_contra", contravariant=True)
R_co = TypeVar("R_co", covariant=True)

REGISTRY: dict[str, Action[..., Any]] = {}
"""Every action that this process knows, by name."""
SPECS: list[str] = []
"""Every spec that this process has recorded, as JSON; its number is its position, on every connection."""
_spec_numbers: dict[str, int] = {}
_spec_lock = threading.Lock()
_ANY_NUMBER = 1 << 60
_BY_NAME = "$retry"


class _Unary(Protocol[A_contra, R_co]):
    def __call__(self, a: A_contra, /) -> R_co: ...


class _Binary(Protocol[A_contra, B_contra, R_co]):
    def __call__(self, a: A_contra, b: B_contra, /) -> R_co: ...


@dataclass(frozen=True, slots=True)
class Settings:
    """What the decorator and `options` say."""

    queue: str = "default"
    taint: str | None = None
    priority: int = 0
    retry: Retry = ONCE
    timeout: float | None = None
    version: str | None = None
    pin_code: bool = False
    batch: tuple[int, float] | None = None
    by_name: bool = False
    key: str | None = None
    delay: float | datetime | None = None
    after: Sequence[object] = ()
    tags: Mapping[str, str] | None = None
    hidden: Mapping[str, object] = field(default_factory=dict)  # travels with the arguments


def spec_number(spec: Mapping[str, object]) -> int:
    """The number of a spec, the same on every connection of this process."""
    text = json.dumps(spec, sort_keys=True)
    with _spec_lock:
        number = _spec_numbers.get(text)
        if number is None:
            number = _spec_numbers[text] = len(SPECS)
            SPECS.append(json.dumps({"id": number, **spec}))
        return number


class Action(Generic[P, R_co]):
    """A function that can run on a worker.

    Called inside a running action it records a node and returns at once; the static
    type is the function's own result type, so results can be handed to other actions
    as if they were values.  Called anywhere else it simply runs the function, which is
    what a unit test wants.
    """

    def __init__(self, fn: Callable[P, R_co], name: str) -> None:
        self.name: str = name
        self._fn: Callable[..., Any] = fn
        self._bound: tuple[Any, ...] = ()
        self._settings = Settings()
        self._spec: int | None = None
        self._fingerprint: list[str] = []  # shared by all copies, made when first wanted
        self._is_async = inspect.iscoroutinefunction(fn)
        self._names: tuple[str, ...] = ()
        self._arity, self._signature = (0, _ANY_NUMBER), cast("inspect.Signature | None", None)
        self._inspect()
        for attribute in ("__doc__", "__name__", "__qualname__", "__module__", "__wrapped__"):
            value = fn if attribute == "__wrapped__" else getattr(fn, attribute, None)
            if value is not None:
                setattr(self, attribute, value)

    # ---- calls ----

    @overload
    def __call__(self: Action[P, Coroutine[Any, Any, S]], *args: P.args, **kwargs: P.kwargs) -> S: ...
    @overload
    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R_co: ...
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Record a node inside a running action; anywhere else, run the function."""
        if self._bound:
            args = self._bound + args
        attempt = RUNNING.get()
        if attempt is not None:
            if kwargs or not self._arity[0] <= len(args) <= self._arity[1]:
                self._check(args, kwargs)
            return attempt.record(self, args, kwargs)
        if not self._is_async:
            return self._run(args, kwargs)
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            return asyncio.run(self._arun(args, kwargs))
        raise DagoramaError(f"{self.name} is async: inside an event loop, write `await {self.name.rpartition('.')[2]}.local(...)`")

    def local(self, *args: P.args, **kwargs: P.kwargs) -> R_co:
        """Run the function here and now, even inside another action (a coroutine for async def)."""
        call = self._arun if self._is_async else self._run
        return cast(R_co, call(self._bound + args, kwargs))

    def _run(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        if self._settings.batch is None:
            return self._fn(*args, **kwargs)
        return _only(self._fn([_one(self, args, kwargs)]))

    async def _arun(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        if self._settings.batch is None:
            return await self._fn(*args, **kwargs)
        return _only(await self._fn([_one(self, args, kwargs)]))

    @overload
    def submit(self: Action[P, Coroutine[Any, Any, S]], *args: P.args, **kwargs: P.kwargs) -> Run[S]: ...
    @overload
    def submit(self, *args: P.args, **kwargs: P.kwargs) -> Run[R_co]: ...
    def submit(self, *args: Any, **kwargs: Any) -> Any:
        """Start a run with this action as its root.  Returns once the broker has made it durable."""
        from ._client import default_client

        client = default_client()
        return client._send(client._submission(self, *self._checked(args, kwargs)))

    @overload
    async def asubmit(self: Action[P, Coroutine[Any, Any, S]], *args: P.args, **kwargs: P.kwargs) -> Run[S]: ...
    @overload
    async def asubmit(self, *args: P.args, **kwargs: P.kwargs) -> Run[R_co]: ...
    async def asubmit(self, *args: Any, **kwargs: Any) -> Any:
        """`submit` for code that runs in an event loop."""
        from ._client import default_client

        client = default_client()
        body = client._submission(self, *self._checked(args, kwargs))
        return await asyncio.to_thread(client._send, body)

    @overload
    def map(self: Action[[A], Coroutine[Any, Any, S]], items: Iterable[A]) -> list[S]: ...
    @overload
    def map(self: _Unary[A, S], items: Iterable[A]) -> list[S]: ...
    def map(self: Any, items: Iterable[Any]) -> list[Any]:
        """One node per item.  ``items`` may itself be a promise: the fan-out then happens when it is known."""
        if isinstance(items, Promise):
            return _later(self, items, False)
        return [self(item) for item in items]

    @overload
    def starmap(self: Action[[A, B], Coroutine[Any, Any, S]], items: Iterable[tuple[A, B]]) -> list[S]: ...
    @overload
    def starmap(self: _Binary[A, B, S], items: Iterable[tuple[A, B]]) -> list[S]: ...
    def starmap(self: Any, items: Iterable[Any]) -> list[Any]:
        """`map` for items that are tuples of arguments."""
        if isinstance(items, Promise):
            return _later(self, items, True)
        return [self(*item) for item in items]

    def options(
        self, *, queue: str | None = None, taint: str | None = None, priority: int | None = None, retry: Retry | None = None,
        timeout: float | None = None, key: str | None = None, delay: float | datetime | None = None,
        after: Sequence[object] = (), tags: Mapping[str, str] | None = None,
    ) -> Action[P, R_co]:
        """The same action with other settings for the next call.

        ``key`` makes `submit` idempotent: the same key gives the same run.
        ``after`` waits for promises without receiving their values.
        """
        given: dict[str, Any] = {"queue": queue, "taint": taint, "priority": priority, "retry": retry, "timeout": timeout,
                                 "key": key, "delay": delay, "tags": tags}
        given = {name: value for name, value in given.items() if value is not None}
        if after:
            given["after"] = tuple(after)
        if retry is not None and (retry.on, retry.never) != (ONCE.on, ONCE.never):
            given["hidden"] = {**self._settings.hidden, _BY_NAME: (retry.on, retry.never)}
        return self._with(replace(self._settings, **given))

    # A method: the object it is called on is its first argument.
    @overload
    def __get__(self, obj: None, owner: type | None = None, /) -> Action[P, R_co]: ...
    @overload
    def __get__(self: Action[Concatenate[S, Q], R_co], obj: S, owner: type | None = None, /) -> Action[Q, R_co]: ...
    def __get__(self: Any, obj: Any, owner: type | None = None, /) -> Any:
        if obj is None:
            return self
        copy = self._with(self._settings)
        copy._spec = self._spec
        copy._bound = (*self._bound, obj)
        return copy

    def __reduce__(self) -> tuple[Any, ...]:
        settings = self._settings
        plain = REGISTRY.get(self.name)
        changed = {} if plain is None else {
            name: getattr(settings, name) for name in ("queue", "taint", "priority", "retry", "timeout", "delay", "hidden")
            if getattr(settings, name) is not getattr(plain._settings, name)}
        return _find, (_names.public_module(str(self.__module__)), self.name, changed, self._bound)

    def __repr__(self) -> str:
        return f"<action {self.name}>"

    # ---- internal ----

    def _with(self, settings: Settings) -> Action[P, R_co]:
        copy: Action[P, R_co] = object.__new__(type(self))
        copy.__dict__.update(self.__dict__)
        copy._settings = settings
        copy._spec = None
        return copy

    def _inspect(self) -> None:
        try:
            self._signature = inspect.signature(self._fn)
        except (ValueError, TypeError):
            return
        low = high = 0
        for parameter in self._signature.parameters.values():
            if parameter.kind is parameter.VAR_POSITIONAL:
                high = _ANY_NUMBER
            elif parameter.kind is parameter.KEYWORD_ONLY:
                low += _ANY_NUMBER if parameter.default is parameter.empty else 0
            elif parameter.kind is not parameter.VAR_KEYWORD:
                high += 1
                low += parameter.default is parameter.empty
        self._arity = low, high
        self._names = tuple(self._signature.parameters)

    def _check(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """A wrong call is an error where it is made, not on a worker."""
        if self._settings.batch is not None:
            _one(self, args, kwargs)
        elif self._signature is not None:
            try:
                self._signature.bind(*args, **kwargs)
            except TypeError as error:
                raise TypeError(f"{self.name}(): {error}") from None

    def _checked(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if self.name.startswith("__main__."):
            raise DagoramaError(f"{self.name} stands in no file that a worker could import (an interactive session, standard input, or a "
                                "script whose name does not end in .py): move it to a module, say my_module.py, and import it from there",
                                code="NOT_IMPORTABLE")
        args = self._bound + args
        self._check(args, kwargs)
        return args, kwargs

    def _number(self) -> int:
        if self._spec is None:
            self._spec = spec_number(self._wire_spec())
        return self._spec

    def _wire_spec(self) -> dict[str, object]:
        s = self._settings
        if s.by_name:
            return {"action": self.name, "by_name": True}
        return {
            "action": self.name, "queue": s.queue, "taint": s.taint, "priority": s.priority, "retry": s.retry._wire(),
            "timeout_ms": None if s.timeout is None else max(1, round(s.timeout * 1000)), "fingerprint": self._mark(),
            "pin_code": s.pin_code, "by_name": False,
            "batch": None if s.batch is None else {"max_size": s.batch[0], "max_wait_ms": round(s.batch[1] * 1000)},
        }

    def _mark(self) -> str:
        if self._settings.version is not None:
            return self._settings.version
        if not self._fingerprint:
            try:
                text = inspect.getsource(self._fn)
            except (OSError, TypeError):
                code = getattr(self._fn, "__code__", None)
                text = f"{code.co_code.hex()} {code.co_names} {code.co_varnames}" if code else self.name
            self._fingerprint.append(hashlib.sha256(text.encode()).hexdigest()[:16])
        return self._fingerprint[0]


def _one(action: Action[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    if len(args) != 1 or any(name != _BY_NAME for name in kwargs):
        raise TypeError(f"{action.name}() takes one positional argument: it is called for one item, the broker makes the list")
    return args[0]


def _only(results: Any) -> Any:
    if len(results) != 1:
        raise DagoramaError(f"a batch action returned {len(results)} results for 1 call")
    if isinstance(results[0], BaseException):
        raise results[0]
    return results[0]


def _find(module: str, name: str, changed: Mapping[str, Any], bound: tuple[Any, ...]) -> Action[..., Any]:
    """An action that was an argument or part of one."""
    if name not in REGISTRY:
        _names.load_module(module)
    if name not in REGISTRY:
        raise DagoramaError(f"{module} has no action {name!r}: does it stand inside a function?")
    found = REGISTRY[name]
    if changed or bound:
        found = found._with(replace(found._settings, **changed))
        found._bound = bound
    return found


class _Decorator(Protocol):
    def __call__(self, fn: Callable[P, R], /) -> Action[P, R]: ...


class _BatchDecorator(Protocol):
    @overload
    def __call__(self, fn: Callable[[list[A]], Coroutine[Any, Any, list[S]]], /) -> Action[[A], S]: ...
    @overload
    def __call__(self, fn: Callable[[list[A]], list[S]], /) -> Action[[A], S]: ...


def _make(fn: Callable[..., Any], name: str | None, settings: Settings) -> Action[..., Any]:
    module = _names.public_module(getattr(fn, "__module__", None) or "unknown")
    made: Action[..., Any] = Action(fn, name or f"{module}.{getattr(fn, '__qualname__', type(fn).__name__)}")
    made._settings = settings
    if settings.batch is not None:
        made._arity = 1, 1
    REGISTRY[made.name] = made
    return made


def _retry(retry: Retry | int | None) -> Retry:
    return ONCE if retry is None else Retry(retry) if isinstance(retry, int) else retry


@overload
def action(fn: Callable[P, R], /) -> Action[P, R]: ...
@overload
def action(
    *, name: str | None = None, queue: str = "default", taint: str | None = None, priority: int = 0,
    retry: Retry | int | None = None, timeout: float | None = None, version: str | None = None, pin_code: bool = False,
) -> _Decorator: ...
def action(
    fn: Callable[..., Any] | None = None, /, *, name: str | None = None, queue: str = "default", taint: str | None = None,
    priority: int = 0, retry: Retry | int | None = None, timeout: float | None = None, version: str | None = None,
    pin_code: bool = False,
) -> Any:
    """Mark a function, coroutine function or method as an action.

    ``taint`` keeps the action off workers that do not tolerate it
    (``taint="gpu"``).  ``version`` replaces the fingerprint of the source as the mark by
    which code is compared.  A worker with other code than the node was recorded with runs it
    and the event says so; ``pin_code`` makes the node wait for a worker that has that code.
    """
    settings = Settings(queue, taint, priority, _retry(retry), timeout, version, pin_code)
    if fn is not None:
        return _make(fn, None, settings)
    return lambda function: _make(function, name, settings)


def batch_action(
    *, max_size: int = 64, max_wait: float = 0.02, name: str | None = None, queue: str = "default", taint: str | None = None,
    priority: int = 0, retry: Retry | int | None = None, timeout: float | None = None, version: str | None = None,
    pin_code: bool = False,
) -> _BatchDecorator:
    """Write ``(list[A]) -> list[B]``, call it as ``(A) -> B``: the broker bundles ready calls of any runs,
    at most ``max_size``, once that many are ready or the oldest has been ready for ``max_wait`` seconds.
    The result list has one entry per call, in order; an entry that is an exception fails that call alone."""
    if max_size < 1:
        raise ValueError(f"max_size is {max_size}, must be at least 1")
    settings = Settings(queue, taint, priority, _retry(retry), timeout, version, pin_code, (max_size, max_wait))

    def decorate(fn: Callable[..., Any], /) -> Any:
        return _make(fn, name, settings)

    return cast(_BatchDecorator, decorate)


@action(name="dagorama.map")
def _fan_out(target: Action[..., Any], items: Iterable[Any], star: bool) -> list[Any]:
    """The helper node behind ``action.map(promise)``: the items are known here."""
    return target.starmap(items) if star else target.map(items)


def _later(target: Action[..., Any], items: Any, star: bool) -> list[Any]:
    settings = target._settings
    return _fan_out.options(queue=settings.queue, priority=settings.priority, after=settings.after)(
        target._with(replace(settings, after=())), items, star)
