"""Reaching the broker: addresses, tokens, the greeting, and `Channel`, the blocking transport of clients.

A channel has one socket and one thread that reads it. Requests are futures; when the connection breaks, the thread connects
again and repeats what was not answered, which every verb allows. Nothing here knows what a request means.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future, InvalidStateError
from pathlib import Path
from typing import Any

from ._action import SPECS
from ._errors import BrokerUnavailable, ConnectionLost, DagoramaError, refusal
from ._wire import DEFINE, ERROR, HELLO, MORE, REPLY, SUBMIT, Bytes, Reader, frame

DEFAULT_URL = "dagorama://127.0.0.1:7373"
_FIRST_PATIENCE = 1.0


class Address:
    """Where a broker listens: ``dagorama://host:port`` or ``dagorama+unix:///path``."""

    def __init__(self, url: str | None) -> None:
        self.url = url or os.environ.get("DAGORAMA_URL") or DEFAULT_URL
        scheme, _, rest = self.url.partition("://")
        self.path: str | None = None
        self.host, self.port = "", 0
        if scheme == "dagorama+unix" and rest.startswith("/"):
            self.path = rest
        else:
            host, colon, port = rest.rstrip("/").rpartition(":")
            if scheme != "dagorama" or not colon or not port.isdigit() or not host:
                raise DagoramaError(f"{self.url!r} is not a URL of a broker: write dagorama://127.0.0.1:7373 or "
                                    "dagorama+unix:///path/to.sock", code="BAD_URL")
            self.host, self.port = host.strip("[]"), int(port)

    def connect(self, timeout: float) -> socket.socket:
        """A connected socket without a timeout, or `OSError`."""
        if self.path is not None:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                sock.settimeout(timeout)
                sock.connect(self.path)
            except OSError:
                sock.close()
                raise
        else:
            sock = socket.create_connection((self.host, self.port), timeout)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return sock

    def token_file(self, peer: socket.socket) -> Path:
        """Where `serve` writes the token for its owner."""
        if self.path is not None:
            return Path(self.path + ".token")
        folder = os.environ.get("DAGORAMA_STATE_DIR")
        host, port = peer.getpeername()[:2]
        return (Path(folder) if folder else Path.home() / ".local/state/dagorama") / f"{host}-{port}.token"

    def token(self, peer: socket.socket) -> str | None:
        """The token from the environment, or from the file that `serve` wrote for its owner."""
        token = os.environ.get("DAGORAMA_TOKEN")
        if token:
            return token
        try:
            return self.token_file(peer).read_text().strip()
        except OSError:
            return None

    def unauthenticated(self, given: bool, file: Path) -> DagoramaError:
        """The error for a token that is missing or wrong: where it came from, and what to do."""
        if given:
            why = "the token that was given is not the broker's: leave it out to use DAGORAMA_TOKEN or the token file"
        elif os.environ.get("DAGORAMA_TOKEN"):
            why = f"the token in DAGORAMA_TOKEN is not the broker's: correct it, or unset it to use the file {file}"
        elif file.exists():
            why = f"the token in {file} is not the broker's, or cannot be read: set DAGORAMA_TOKEN to the broker's token"
        else:
            why = (f"there is no token: DAGORAMA_TOKEN is not set and {file} does not exist; set DAGORAMA_TOKEN, or run as the user "
                   "who started the broker")
        return DagoramaError(f"the broker at {self.url} refuses: {why} [UNAUTHENTICATED]", code="UNAUTHENTICATED")

    def unavailable(self, cause: BaseException | None) -> BrokerUnavailable:
        """The error to raise when nobody answers there."""
        why = f" ({cause})" if cause is not None and str(cause) else ""
        return BrokerUnavailable(f"no broker answers at {self.url}{why}: start one with `dagorama serve`, or set DAGORAMA_URL")


def greet(address: Address, token: str | None, hello: Mapping[str, object], timeout: float = 10.0
          ) -> tuple[socket.socket, Reader, dict[str, Any]]:
    """Connect and say HELLO. `OSError` and `ConnectionLost` mean: try again; `DagoramaError`: the broker said no."""
    sock = address.connect(timeout)
    try:
        file = address.token_file(sock)  # now: a socket that the broker has closed does not know its peer
        text = {"version": 1, "name": f"{socket.gethostname()}:{os.getpid()}", **hello,
                "token": token if token is not None else address.token(sock)}
        sock.sendall(frame(HELLO, json.dumps(text).encode(), 1))
        reader = Reader(sock)
        while (got := reader.next()) is None:
            reader.fill()
        verb, _, _, body = got
        if verb == ERROR:
            no = refusal(body)
            if no.code in ("STOPPING", "OVERLOADED"):  # it is going down, or busy: as if nobody had answered
                raise ConnectionLost(str(no))
            raise address.unauthenticated(token is not None, file) if no.code == "UNAUTHENTICATED" else no
        sock.settimeout(None)
        return sock, reader, json.loads(str(body, "utf-8"))
    except BaseException:
        sock.close()
        raise


class _Pending:
    __slots__ = ("frame", "future", "parts", "patience", "refused", "verb")

    def __init__(self, verb: int, data: bytes, patience: float) -> None:
        self.verb = verb
        self.frame = data
        self.patience = patience
        self.future: Future[list[Bytes]] = Future()
        self.parts: list[Bytes] = []
        self.refused = 0.0  # when a broker that was stopping first refused it


class Channel:
    """One connection of a client, shared by its threads; it opens itself again when it breaks."""

    def __init__(self, address: Address, token: str | None, timeout: float, hello: Mapping[str, object] | None = None) -> None:
        self.address = address
        self.timeout = timeout
        self.greeting: dict[str, Any] = {}
        self._token = token
        self._hello = dict(hello or {"kind": "client"})
        self._numbers = itertools.count(1)
        self.connections = 0
        self._reset()

    def _reset(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.RLock()
        self._pending: dict[int, _Pending] = {}
        self._sock: socket.socket | None = None
        self._reading: threading.Thread | None = None
        self._defined = 0
        self._closed = False

    def request(self, verb: int, body: bytes, patience: float | None = None) -> Future[list[Bytes]]:
        """Send; the future gets the bodies of the reply's frames. ``patience``: how long the broker may be away."""
        if self._pid != os.getpid():  # forked: the socket belongs to the parent
            self._reset()
        if self._closed:
            raise DagoramaError("this client is closed", code="CLOSED")
        number = next(self._numbers) & 0x7FFFFFFF or 1
        pending = _Pending(verb, frame(verb, body, number), self.timeout if patience is None else patience)
        with self._lock:
            if self._reading is None:
                self._open(self.timeout if self.connections else min(self.timeout, _FIRST_PATIENCE))
            self._pending[number] = pending
            if self._sock is not None:
                self._send(self._sock, pending)
        return pending.future

    def send(self, verb: int, body: bytes) -> None:
        """Send what has no reply; lost without notice when there is no connection."""
        with self._lock:
            if self._sock is not None:
                with contextlib.suppress(OSError):
                    self._sock.sendall(frame(verb, body))

    def open(self, patience: float = _FIRST_PATIENCE) -> None:
        """Connect now, if not connected."""
        with self._lock:
            if self._reading is None:
                self._open(patience)

    def close(self) -> None:
        """Close; requests that are still open fail."""
        with self._lock:
            self._closed = True
            if self._sock is not None:
                with contextlib.suppress(OSError):
                    self._sock.shutdown(socket.SHUT_RDWR)
        if self._reading is not None and self._reading is not threading.current_thread() and self._pid == os.getpid():
            self._reading.join(2)

    def _send(self, sock: socket.socket, pending: _Pending) -> None:
        try:
            if pending.verb == SUBMIT and self._defined < len(SPECS):
                specs = SPECS[self._defined :]
                sock.sendall(frame(DEFINE, ("[" + ",".join(specs) + "]").encode()))
                self._defined += len(specs)
            sock.sendall(pending.frame)
        except OSError:
            pass  # the reading thread sees it too, and repeats

    def _greet(self) -> Reader:
        hello = dict(self._hello)
        if "session" in hello and self.greeting.get("session"):
            hello["session"] = self.greeting["session"]
        sock, reader, self.greeting = greet(self.address, self._token, hello, min(self.timeout, 10.0))
        with self._lock:
            self._sock = sock
            self._defined = 0
            self.connections += 1
            for _, pending in sorted(self._pending.items()):
                pending.parts = []
                self._send(sock, pending)
        return reader

    def _open(self, patience: float) -> None:
        began = time.monotonic()
        while True:
            try:
                reader = self._greet()
                break
            except (OSError, ConnectionLost) as error:
                if time.monotonic() - began > patience:
                    raise self.address.unavailable(error) from error
                time.sleep(0.05)
        self._reading = threading.Thread(target=self._read, args=(reader,), name="dagorama-client", daemon=True)
        self._reading.start()

    def _read(self, reader: Reader | None) -> None:
        """The reading thread: dispatch replies, connect again after a loss, end when nobody waits."""
        while reader is not None:
            try:
                while True:
                    while (got := reader.next()) is None:
                        reader.fill()
                    self._dispatch(*got)
            except (ConnectionLost, DagoramaError, ValueError):
                reader = self._again()

    def _dispatch(self, verb: int, flags: int, request: int, body: Bytes) -> None:
        pending = self._pending.get(request)
        if verb not in (REPLY, ERROR) or pending is None:
            return
        with contextlib.suppress(InvalidStateError):  # given up by whoever asked
            if verb == ERROR:
                no = refusal(body)
                if no.code == "STOPPING":
                    self._postpone(request, pending, no)
                del self._pending[request]
                pending.future.set_exception(no)
            elif flags & MORE:
                pending.parts.append(body)
            else:
                del self._pending[request]
                pending.future.set_result([*pending.parts, body])

    def _postpone(self, request: int, pending: _Pending, no: DagoramaError) -> None:
        """Going down is no answer: the next life of the broker gives one, to the same request."""
        now = time.monotonic()
        pending.refused = pending.refused or now
        if now - pending.refused > pending.patience:
            del self._pending[request]
            pending.future.set_exception(self.address.unavailable(no))
        else:
            time.sleep(0.05)  # should it go down slowly
        raise ConnectionLost(str(no))

    def _again(self) -> Reader | None:
        lost = time.monotonic()
        pause = 0.02
        with self._lock:
            if self._sock is not None:
                self._sock.close()
            self._sock = None
        while True:
            error: BaseException | None = None
            with self._lock:
                for number, pending in list(self._pending.items()):
                    if pending.future.cancelled():
                        del self._pending[number]
                if self._closed or not self._pending:
                    self._fail_all(DagoramaError("this client is closed", code="CLOSED"))
                    self._reading = None  # the next request opens a connection
                    return None
            try:
                return self._greet()
            except (OSError, ConnectionLost) as cause:
                error = cause
            except (DagoramaError, ValueError) as no:
                with self._lock:
                    self._fail_all(no)
                continue
            waited = time.monotonic() - lost
            with self._lock:
                for number, pending in list(self._pending.items()):
                    if waited > pending.patience:
                        del self._pending[number]
                        with contextlib.suppress(InvalidStateError):
                            pending.future.set_exception(self.address.unavailable(error))
            time.sleep(pause)
            pause = min(pause * 1.5, 0.5)

    def _fail_all(self, error: BaseException) -> None:
        for number in list(self._pending):
            with contextlib.suppress(InvalidStateError):
                self._pending.pop(number).future.set_exception(error)


def warn(text: str) -> None:
    """A line for people on standard error."""
    print(f"dagorama: {text}", file=sys.stderr, flush=True)
