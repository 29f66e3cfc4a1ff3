"""`Client`: starting runs and reading their results. One default client per process, found through the environment."""

from __future__ import annotations

import contextlib
import json
import threading
import time
import uuid
from collections.abc import Mapping
from concurrent.futures import Future
from types import TracebackType
from typing import Any, Self

from ._action import Action, Settings
from ._connection import Address, Channel
from ._current import node_body
from ._errors import DagoramaError, refusal
from ._exceptions import rebuild
from ._payload import json_body, pickled, read_values
from ._run import Run
from ._wire import (
    FETCH, JSON, NODE, PICKLE, RUN_ID, SUBMIT, SUCCEEDED, U16, U32, WAIT, WAIT_BODY, Bytes, Item, fetch_body,
    read_items, run_numbers, run_text,
)

_clients: list[Client] = []
_default: list[Client] = []
_lock = threading.Lock()


def default_client() -> Client:
    """The client of the innermost ``with Client(...)``, else the one that the environment describes."""
    if _clients:
        return _clients[-1]
    with _lock:
        url = Address(None).url
        if not _default or _default[0].url != url:
            _default[:] = [Client()]
        return _default[0]


class Client:
    """A connection to a broker. Used as a context manager it is what `submit` uses inside."""

    def __init__(self, url: str | None = None, *, token: str | None = None, timeout: float = 10.0) -> None:
        """``url`` defaults to ``DAGORAMA_URL``, then to the local broker."""
        address = Address(url)
        self.url = address.url
        self._channel = Channel(address, token, timeout)

    def __enter__(self) -> Self:
        _clients.append(self)
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        with contextlib.suppress(ValueError):
            _clients.remove(self)
        self._channel.close()

    def run(self, run_id: str) -> Run[Any]:
        """The run with that id. Whether there is one, the first use says."""
        run_numbers(run_id)
        return Run(run_id, self)

    def emit(self, action_name: str, *args: object, **kwargs: object) -> Run[Any]:
        """Start a run by name, for producers that cannot import the code."""
        stub: Action[..., Any] = Action(lambda *a, **k: None, action_name)
        stub._settings = Settings(by_name=True)
        said = json_body({"args": list(args), "kwargs": kwargs})
        codec, body = (JSON, said) if said is not None else (PICKLE, pickled((args, kwargs)))
        return self._send(_submission(NODE.pack(stub._number(), codec, 0, 0, 0, len(body), 0) + body, stub._settings))

    # ---- internal ----

    def _submission(self, action: Action[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bytes:
        settings = action._settings
        if settings.after:
            raise TypeError(f"options(after=) waits for calls of the same run: it means nothing for {action.name}.submit")
        return _submission(node_body(action, args, dict(kwargs), None), settings)

    def _send(self, body: bytes) -> Run[Any]:
        until = time.monotonic() + self._channel.timeout
        while (reply := self._call(SUBMIT, body))[4] == 0:
            (length,) = U16.unpack_from(reply, 5)
            no = refusal(reply[7 : 7 + length])
            if no.code != "STOPPING" or time.monotonic() > until:
                raise no
            time.sleep(0.05)  # its next life answers; the key makes it the same run
        return Run(run_text(*RUN_ID.unpack_from(reply, 5)), self)

    def _call(self, verb: int, body: bytes) -> Bytes:
        return self._channel.request(verb, body).result()[0]

    def _ask(self, verb: int, question: Mapping[str, object]) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(str(self._call(verb, json.dumps(question).encode()), "utf-8"))
        return answer

    def _wait(self, run_id: str, timeout_ms: int) -> Future[list[Bytes]]:
        """The reply says how the root ended. The broker may be away for a while: a restart only delays it."""
        patience = max(60.0, 6 * self._channel.timeout) if timeout_ms == 0 else timeout_ms / 1000 + self._channel.timeout
        return self._channel.request(WAIT, WAIT_BODY.pack(*run_numbers(run_id), timeout_ms), patience)

    def _fetch(self, run_id: str, ranges: list[tuple[int, int]]) -> list[Item]:
        items: list[Item] = []
        for part in self._channel.request(FETCH, fetch_body(run_numbers(run_id)[0], ranges)).result():
            items += read_items(part, 4, U32.unpack_from(part)[0])[0]
        return items

    def _value(self, run_id: str, reply: Bytes) -> Any:
        """The value in a reply of WAIT whose time was not over, or the exception."""
        items, _ = read_items(reply, 3 + U16.unpack_from(reply, 1)[0], 1)
        if items[0][1] != SUCCEEDED:
            raise rebuild(items[0], run_id)
        return read_values(items, lambda ranges: self._fetch(run_id, ranges), lambda item: rebuild(item, run_id))[0]


def _submission(node: bytes, settings: Settings) -> bytes:
    # A repetition after a broken connection must not start a second run: without a key of the user, one is made up.
    key = (settings.key if settings.key is not None else f"auto:{uuid.uuid4().hex}").encode()
    tags = json.dumps(dict(settings.tags)).encode() if settings.tags else b""
    if len(key) > 0xFFFF or len(tags) > 0xFFFF:
        raise DagoramaError("a key or the tags of a run are longer than 65,535 bytes", code="BAD_REQUEST")
    if settings.key == "":
        raise ValueError("key is empty: leave it out, or give each run its own")
    return b"".join([U32.pack(1), U16.pack(len(key)), key, U16.pack(len(tags)), tags, U32.pack(1), U32.pack(0), node])
