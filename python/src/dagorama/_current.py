"""The attempt that is being executed: what it has recorded so far, and what user code may know about it.

Nodes recorded here are bytes in a list until the attempt ends; they are sent with its outcome, in the same frame.
"""

from __future__ import annotations

import logging
import time
from contextvars import ContextVar
from datetime import datetime
from typing import TYPE_CHECKING, Any, Protocol

from ._errors import Cancelled, DagoramaError
from ._payload import SCALARS, Refs, dumps, encode_arguments
from ._promise import Promise, make_promise
from ._retry import Retry
from ._wire import NEW, NODE, PICKLE, run_text

if TYPE_CHECKING:
    from ._action import Action

MAX_CHILDREN = 100_000
MAX_CHILDREN_BYTES = 32 << 20


class Link(Protocol):
    """What an attempt needs of the worker that runs it."""

    def revoked(self, run: int, node: int, attempt: int) -> bool:
        """Look at what has arrived; whether it says to stop that attempt."""
        ...

    def create(self, run: int, node: int, attempt: int, token: bytes, first_child: int, count: int, nodes: bytes) -> int:
        """Create children now; the number of the first."""
        ...


def node_body(action: Action[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], attempt: Attempt | None) -> bytes:
    """A node to create, as the protocol writes it."""
    settings = action._settings
    if settings.hidden:
        kwargs = {**kwargs, **settings.hidden}
    n_ranges, ranges = 0, b""
    if not kwargs and not settings.after and SCALARS.issuperset(map(type, args)):
        body = dumps((args, kwargs), 5)
    else:
        refs = Refs(attempt) if attempt is not None else None
        body = encode_arguments(args, kwargs, refs, action.name, action._names)
        if refs is not None:
            if settings.after:
                refs.wait_for(settings.after)
            n_ranges, ranges = refs.pack()
    how, when = 0, 0
    if settings.delay is not None:
        how, when = delay_of(settings.delay)
    return NODE.pack(action._number(), PICKLE, how, 0, n_ranges, len(body), when) + ranges + body


def delay_of(delay: float | datetime) -> tuple[int, int]:
    """Kind and value of a delay on the wire."""
    if isinstance(delay, datetime):
        return 2, max(0, round(delay.timestamp() * 1000))
    return (1, round(delay * 1000)) if delay > 0 else (0, 0)


class Attempt:
    """One attempt of a node. ``base`` children have been created by `flush`; the ``pending`` ones behind them have not."""

    open = True
    base = 0
    count = 0
    size = 0
    bundle = False
    deadline: float | None = None
    _flushed: list[tuple[int, int, int]] = []
    _current: Current | None = None
    retry: Retry | None = None  # of options(retry=), when it names exceptions

    def __init__(self, link: Link, run: int, salt: int, node: int, number: int, token: bytes, action: str) -> None:
        self.link = link
        self.run = run
        self.salt = salt
        self.node = node
        self.number = number
        self.token = token
        self.action = action
        self.pending: list[bytes] = []

    def record(self, action: Action[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Promise:
        """Note a call; it becomes a node when this attempt ends."""
        if not self.open:
            raise DagoramaError(f"{action.name} was called by code that {self.action} left running: its attempt has ended")
        if self.bundle:
            raise DagoramaError(f"{self.action} handles calls of several nodes at once, so it cannot call "
                                f"{action.name}: call it from the action that uses the results")
        settings = action._settings
        if settings.key is not None or settings.tags is not None:
            raise TypeError(f"options(key=, tags=) belong to a run: they mean something only for {action.name}.submit")
        node = node_body(action, args, kwargs, self)
        index = self.count
        self.size += len(node)
        if index - self.base >= MAX_CHILDREN or self.size > MAX_CHILDREN_BYTES:
            raise DagoramaError(f"{self.action} has recorded {index - self.base:,} calls of {self.size:,} bytes; at most "
                                f"{MAX_CHILDREN:,} calls and {MAX_CHILDREN_BYTES:,} bytes go with one result: call current().flush() "
                                "now and then [GRAPH_TOO_LARGE]", code="GRAPH_TOO_LARGE")
        self.pending.append(node)
        self.count = index + 1
        return make_promise(action.name, self, index)

    def node_of(self, index: int) -> tuple[int, int]:
        """How a range that begins with that child is written: the NEW bit or 0, and the number."""
        if index >= self.base:
            return NEW, index - self.base
        for first, count, node in self._flushed:
            if index < first + count:
                return 0, node + index - first
        raise AssertionError("a child is either flushed or pending")

    def flush(self) -> None:
        """Create the recorded children now."""
        if self.pending:
            count = len(self.pending)
            first = self.link.create(self.run, self.node, self.number, self.token, self.base, count, b"".join(self.pending))
            self._flushed = [*self._flushed, (self.base, count, first)]
            self.base += count
            self.pending = []
            self.size = 0


RUNNING: ContextVar[Attempt | None] = ContextVar("dagorama_attempt", default=None)


class Current:
    """The node being executed. ``deadline`` is in seconds since 1970, ``None`` without a timeout."""

    def __init__(self, attempt: Attempt) -> None:
        self._attempt = attempt
        self.run_id: str = run_text(attempt.run, attempt.salt)
        self.node_id: str = f"{self.run_id}/{attempt.node}"
        self.attempt: int = attempt.number
        self.deadline: float | None = attempt.deadline
        self.idempotency_key: str = self.node_id
        self.log: logging.LoggerAdapter[Any] = logging.LoggerAdapter(
            logging.getLogger(attempt.action), {"run": self.run_id, "node": attempt.node, "attempt": attempt.number})
        self._looked = 0.0
        self._stop = False

    def cancelled(self) -> bool:
        """Whether this attempt should stop: its run was cancelled, or its lease has ended. Asks at most every 10 ms."""
        now = time.monotonic()
        if not self._stop and now - self._looked > 0.01:
            self._looked = now
            attempt = self._attempt
            self._stop = attempt.open and attempt.link.revoked(attempt.run, attempt.node, attempt.number)
        return self._stop

    def check(self) -> None:
        """Raise `Cancelled` when the run was cancelled; cheap enough for an inner loop."""
        if self.cancelled():
            raise Cancelled(f"{self.node_id} was cancelled, or its lease has ended")

    def flush(self) -> None:
        """Send the nodes recorded so far now, instead of together with the result."""
        self._attempt.flush()


def current() -> Current:
    """The node being executed; `LookupError` outside an action."""
    attempt = RUNNING.get()
    if attempt is None:
        raise LookupError("no action is running here: current() is for code that a worker calls")
    if attempt._current is None:
        attempt._current = Current(attempt)
    return attempt._current
