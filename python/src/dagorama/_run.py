"""`Run`: the handle of a durable run."""

from __future__ import annotations

import asyncio
import concurrent.futures
import time
from collections.abc import Generator
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar, cast

from ._connection import warn
from ._errors import DagoramaError
from ._wire import CANCEL, RESUME, SHOW, SUCCEEDED, U16, Bytes

if TYPE_CHECKING:
    from ._client import Client

R_co = TypeVar("R_co", covariant=True)
RunState = Literal["running", "succeeded", "failed", "cancelled"]
NodeState = Literal["waiting", "ready", "leased", "backoff", "settling", "succeeded", "failed", "cancelled", "skipped"]
_HINT_AFTER = 2.0


class Run(Generic[R_co]):
    """A durable run.  Rebuild it anywhere from its id with `Client.run`."""

    def __init__(self, run_id: str, client: Client) -> None:
        self.id: str = run_id
        self._client = client

    def result(self, timeout: float | None = None) -> R_co:
        """Wait and return, or raise `ActionFailed` / `Cancelled` / `TimeoutError`."""
        until = None if timeout is None else time.monotonic() + timeout
        waiting = self._begin(timeout)
        try:
            reply = waiting.result(_HINT_AFTER)[0]
        except concurrent.futures.TimeoutError:
            self._hint(self._client._wait(self.id, 1).result()[0])
            try:
                reply = waiting.result(None if until is None else max(0.0, until - time.monotonic()) + 5)[0]
            except concurrent.futures.TimeoutError:
                waiting.cancel()
                raise self._late(timeout) from None
        return self._finish(reply, timeout)

    def __await__(self) -> Generator[Any, None, R_co]:
        return self._result().__await__()

    async def _result(self) -> R_co:
        waiting = asyncio.wrap_future(self._begin(None))
        done, _ = await asyncio.wait([waiting], timeout=_HINT_AFTER)
        if not done:
            self._hint((await asyncio.wrap_future(self._client._wait(self.id, 1)))[0])
        reply = (await waiting)[0]
        if len(reply) < 1 << 16 and reply[0] == SUCCEEDED and not reply[3 + U16.unpack_from(reply, 1)[0] + 8]:
            return self._finish(reply, None)  # nothing to fetch: no thread needed
        return await asyncio.to_thread(self._finish, reply, None)

    def _begin(self, timeout: float | None) -> concurrent.futures.Future[list[Bytes]]:
        return self._client._wait(self.id, 0 if timeout is None else max(1, round(timeout * 1000)))

    def _finish(self, reply: Bytes, timeout: float | None) -> R_co:
        if reply[0] < SUCCEEDED:
            raise self._late(timeout)
        return cast(R_co, self._client._value(self.id, reply))

    def _late(self, timeout: float | None) -> TimeoutError:
        return TimeoutError(f"run {self.id} has not ended within {timeout} s; it goes on")

    def _hint(self, reply: Bytes) -> None:
        """What the broker says to people who wait and see nothing happen, such as which command starts a worker."""
        if reply[0] < SUCCEEDED:
            (length,) = U16.unpack_from(reply, 1)
            if length:
                warn(str(reply[3 : 3 + length], "utf-8"))

    def state(self) -> RunState:
        """Where the run stands."""
        return cast(RunState, self._client._ask(SHOW, {"run": self.id, "nodes": False})["state"])

    def cancel(self, reason: str = "") -> None:
        """Stop what has not started, signal what has.  The whole run, not one node."""
        self._client._ask(CANCEL, {"run": self.id, "reason": reason})

    def retry(self) -> None:
        """Begin the next round: failed, skipped and cancelled nodes run again, succeeded ones keep their results."""
        connections = self._client._channel.connections
        try:
            self._client._ask(RESUME, {"run": self.id})
        except DagoramaError as error:
            # Asked again because the connection broke in between: then the first time has opened the round.
            if error.code != "RUN_NOT_ENDED" or self._client._channel.connections - connections < 2:
                raise

    def __repr__(self) -> str:
        return f"<run {self.id}>"
