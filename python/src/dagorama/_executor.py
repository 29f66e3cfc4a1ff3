"""The hot loop of a worker: one connection, one session, one call at a time.

Frames of leases become tuples in a queue; each is decoded, called and encoded, and its outcome is an entry of the next FINISH.
A small memory shared with the supervisor (`Slot`) says what is running, so that the supervisor can enforce timeouts and, when
the process dies, give back everything but the culprit.

Outcomes leave when there are 256, when nothing is left to run, before an action that was slow the last time, and by a helper
thread when they are older than 20 ms. Credit is one call plus what 50 ms of observed run time are worth; when a call turns out
to be slow while more was asked for, the session comes back anew (`_retreat`), which gives leases and credit to others.

The broker can spend credit on a call that never arrives, because it could not be read or was taken back. So when nothing has come
for two heartbeats, the session comes back anew too, and asks again: then after four, after eight, …, while nothing comes.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import itertools
import json
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from struct import Struct
from typing import Any

from ._action import REGISTRY, SPECS, Action
from ._connection import Address, greet, warn
from ._current import RUNNING, Attempt
from ._errors import BrokerUnavailable, ConnectionLost, DagoramaError, refusal
from ._exceptions import describe, rebuild
from ._journal import Journal
from ._payload import SCALAR_RESULTS, decode_arguments, encode_result, read_values, unpickled
from ._promise import Outcome
from ._retry import ONCE, Retry
from ._wire import (
    CHUNK,
    CREATE, CREATE_VERB, CREDIT, DEFINE, ERROR, FAILED, FAILED_RETRY, FETCH, FINISH, FINISH_VERB, GOODBYE, JSON, LEASE,
    LEASE_HEAD, LEASES, MODE_AFTER, MODE_OUTCOME, MORE, PICKLE, RANGE, RELEASED, REPLY, REVOKE, REVOKED, SUCCEEDED, U16,
    U32, Bytes, Item, Reader, fetch_body, frame, read_items, run_text,
)
from ._wire import SPECS as SPECS_VERB

# head, run, salt, node, attempt, token, spec, codec, ranges, arguments, inline inputs
Lease = tuple[Bytes, int, int, int, int, bytes, int, int, tuple[tuple[int, int, int], ...], Bytes, list[Item] | None]
Key = tuple[int, int, int]

_HEAD = Struct("<QQII")
_DEADLINE = Struct("<d")
PER_FRAME = 256
FRAME_BYTES = 16 << 20
MAX_WINDOW = 2048
MAX_QUIET = 600.0
WORTH = 0.05
SLOW = 0.002
_GONE = {"LEASE_EXPIRED", "LEASE_REVOKED", "LEASE_UNKNOWN", "COMPLETION_CONFLICT", "UNKNOWN_RUN", "UNKNOWN_NODE"}


class Slot:
    """What the supervisor sees of an executor: 0 session, 8 deadline, 16 running, 17 retry a timeout, 20 count, 24 lease heads.

    The deadline is zero while no call with a timeout runs; no two calls of a process have the same.
    """

    SIZE = 64 << 10
    MAX = (SIZE - 24) // LEASE_HEAD

    def __init__(self, memory: Any) -> None:
        self.memory = memory

    @property
    def session(self) -> int:
        """The session, 0 before there is one."""
        return int.from_bytes(self.memory[0:8], "little")

    def running(self) -> list[tuple[int, int, int, int, bytes]]:
        """Run, salt, node, attempt and token of what is being called."""
        if not self.memory[16]:
            return []
        count = int.from_bytes(self.memory[20:24], "little")
        heads = bytes(self.memory[24 : 24 + count * LEASE_HEAD])
        return [(*_HEAD.unpack_from(heads, i), heads[i + 24 : i + 40]) for i in range(0, len(heads), LEASE_HEAD)]

    def leave(self, words: str) -> None:
        """Last words of a process that cannot start."""
        said = words.encode(errors="replace")[: self.SIZE - 24]
        self.memory[20:24] = U32.pack(len(said))
        self.memory[24 : 24 + len(said)] = said

    def words(self) -> str:
        """What `leave` left."""
        return bytes(self.memory[24 : 24 + U32.unpack(self.memory[20:24])[0]]).decode(errors="replace")


class Handler:
    """What to do with leases of one spec."""

    __slots__ = ("action", "batch", "fn", "is_async", "name", "plain", "retry", "slow", "timeout")

    def __init__(self, spec: dict[str, Any]) -> None:
        self.name = str(spec["action"])
        self.action: Action[..., Any] | None = REGISTRY.get(self.name)
        self.timeout: float | None = spec["timeout_ms"] / 1000 if spec.get("timeout_ms") else None
        self.batch = spec.get("batch") is not None
        self.slow = True
        self.retry: Retry = ONCE
        self.is_async = False
        self.fn: Any = self._missing
        if self.action is not None:
            self.retry = self.action._settings.retry
            self.is_async = self.action._is_async
            self.fn = self.action._fn
            self.batch = self.action._settings.batch is not None
        self.plain = not self.batch and self.timeout is None and not self.is_async

    def _missing(self, *args: object, **kwargs: object) -> None:
        raise DagoramaError(f"this worker has no action {self.name}: start it with the module that defines it", code="NO_ACTION")


class Executor:
    """One session. ``run`` returns after ``stop`` was called and what was running has ended."""

    def __init__(self, address: Address, token: str | None, queues: Sequence[str], tolerate: Sequence[str], slot: Slot) -> None:
        self._address = address
        self._token = token
        self._hello: dict[str, object] = {
            "kind": "worker", "session": None, "queues": list(queues), "tolerate": list(tolerate),
            "actions": [action._wire_spec() for action in REGISTRY.values()]}
        self._slot = slot.memory
        self._draining = False
        self._wake, self._waker = socket.socketpair()
        self._waker.setblocking(False)
        self._parent: int | None = None
        self._orphan = False  # the supervisor is gone
        self._lock = threading.Lock()  # one frame at a time
        self._flushing = threading.RLock()  # held by whoever takes outcomes, and while the connection is made anew
        self._poll: select.poll | None = None
        self._sock: socket.socket | None = None
        self._reader: Reader | None = None
        self._looking = threading.Lock()
        self._queue: deque[Lease | list[Lease]] = deque()
        self._handlers: dict[int, Handler] = {}
        self._items: deque[bytes] = deque()
        self._unanswered: dict[int, list[bytes]] = {}
        self._parts: dict[int, list[Bytes]] = {}  # of requests that somebody waits for
        self._replies: dict[int, list[Bytes] | DagoramaError] = {}
        self._request = itertools.count(1)
        self._defined = 0
        self._owed = 0  # calls the broker may still send
        self._quiet = self._quiet_at_first = 20.0  # so long nothing may arrive before the credit is doubted
        self._window = 1
        self._per_call = WORTH
        self._flushed = 0.0
        self._began = 0.0  # when the present call did
        self._running: set[Key] = set()
        self._stopped: set[Key] = set()  # those of them that were revoked
        self._given_back: set[Key] = set()  # released at the last greeting: leases of them may still be on their way
        self._working = threading.Event()
        self._runner: asyncio.Runner | None = None
        self._journal: Journal | None = None

    # ---- life ----

    def run(self, parent: int | None = None) -> None:
        """Work until stopped. ``parent``: a pipe whose end means that the supervisor is gone."""
        self._parent = parent
        self._journal = Journal.from_environment()  # here: the process is the one that works
        self._connect()
        helper = threading.Thread(target=self._push_out, name="dagorama-flush", daemon=True)
        helper.start()
        try:
            while not self._draining:
                try:
                    if self._queue:
                        self._work()
                    else:
                        self._flush()
                        if not self._receive(self._quiet):
                            self._quiet = min(self._quiet * 2, MAX_QUIET)
                            self._connect()
                except ConnectionLost:
                    self._connect()
            self._leave()
        finally:
            self._draining = True
            self._working.set()
            helper.join(2)
            if self._runner is not None:
                self._runner.close()
            for sock in (self._sock, self._wake, self._waker):
                if sock is not None:
                    sock.close()

    def stop(self) -> None:
        """Finish what is being called, give the rest back, leave. Safe in signal handlers and other threads."""
        self._draining = True
        with contextlib.suppress(OSError):
            self._waker.send(b"x")

    def _leave(self) -> None:
        until = time.monotonic() + 5
        while time.monotonic() < until:
            try:
                self._release()
                self._flush()
                while self._unanswered and time.monotonic() < until:
                    self._receive(0.1)
                self._ask(GOODBYE, b"", until)
                return
            except ConnectionLost:
                self._connect(until)

    def _connect(self, until: float | None = None, once: bool = False) -> None:
        """Come back with the same session: keep the leases it still holds, release those nobody here knows, repeat outcomes."""
        pause = 0.02
        lost = self._sock
        if lost is not None:
            with contextlib.suppress(OSError):
                lost.shutdown(socket.SHUT_RDWR)  # wakes the other thread, should it be sending
        while True:
            try:
                with self._flushing:
                    if self._sock is not lost and self._sock is not None:
                        return  # the other thread has connected
                    if lost is not None:
                        lost.close()
                    self._sock = lost = None
                    self._sock, self._reader, greeting = greet(self._address, self._token, self._hello)
                    self._poll = select.poll()
                    for fd in (self._sock.fileno(), self._wake.fileno(), self._parent):
                        if fd is not None:
                            self._poll.register(fd, select.POLLIN)
                    self._defined = 0
                    self._hello["session"] = greeting["session"]
                    beats = 2 * greeting.get("heartbeat_ms", 10_000) / 1000
                    if beats != self._quiet_at_first:
                        self._quiet = self._quiet_at_first = beats
                    self._slot[0:8] = int(greeting["session"], 16).to_bytes(8, "little")
                    self._resume({(run, node, attempt) for run, node, attempt in greeting["leases"]})
                return
            except (OSError, ConnectionLost) as error:
                if once:
                    raise ConnectionLost(str(error)) from error
                self._pause(pause)
                if self._draining and (self._orphan or until is None or time.monotonic() > until):
                    raise self._address.unavailable(error) from error
                pause = min(pause * 1.5, 1.0)

    def _pause(self, seconds: float) -> None:
        """Sleep, unless the supervisor goes: nobody would end a process that waits for a broker which stays away."""
        parent = self._parent
        if parent is None:
            time.sleep(seconds)
            return
        poll = select.poll()
        poll.register(parent, select.POLLIN)
        if poll.poll(seconds * 1000):
            self._orphaned()

    def _orphaned(self) -> None:
        self._draining, self._orphan, self._parent = True, True, None

    def _resume(self, held: set[Key]) -> None:
        queue = [entry for entry in self._queue if _keys(entry) & held]
        self._queue.clear()
        self._queue.extend(queue)
        self._stopped |= self._running - held
        self._owed = 0
        known = set(self._running)
        for entry in queue:
            known |= _keys(entry)
        repeated = list(self._unanswered.items())
        for item in [*self._items, *(item for _, items in repeated for item in items)]:
            run, node, attempt, *_ = FINISH.unpack_from(item)
            known.add((run, node, attempt))
        if self._defined < len(SPECS):
            self._write(self._define())
        for request, items in repeated:
            self._send(FINISH_VERB, U32.pack(len(items)) + b"".join(items), request)
        self._given_back = held - known
        unknown = [FINISH.pack(*key, bytes(16), RELEASED, JSON, 0, 0, 0, 0) for key in sorted(self._given_back)]
        for i in range(0, len(unknown), PER_FRAME):
            self._write(self._finish(unknown[i : i + PER_FRAME]))

    # ---- sending ----

    def _send(self, verb: int, body: bytes, request: int = 0) -> None:
        self._write(frame(verb, body, request))

    def _write(self, data: bytes) -> None:
        sock = self._sock
        if sock is None:
            raise ConnectionLost
        try:
            with self._lock:
                sock.sendall(data)
        except OSError as error:
            raise ConnectionLost(str(error)) from error

    def _define(self) -> bytes:
        """The frame that defines the specs which this connection does not know yet."""
        texts = SPECS[self._defined :]
        self._defined += len(texts)
        return frame(DEFINE, ("[" + ",".join(texts) + "]").encode())

    def _flush(self, grant: bool = True) -> None:
        """Send the outcomes that are ready, and credit for as many calls as the window allows, in as few writes as possible."""
        items = self._items
        with self._flushing:
            frames: list[bytes] = []
            while items:
                batch: list[bytes] = []
                size = 0
                while items and len(batch) < PER_FRAME and (not batch or size + len(items[0]) <= FRAME_BYTES):
                    item = items.popleft()
                    batch.append(item)
                    size += len(item)
                if self._defined < len(SPECS):  # after they were taken: the other thread may have made some of them just now
                    frames.append(self._define())
                frames.append(self._finish(batch))
                if size > CHUNK:
                    self._write(frames.pop() if len(frames) == 1 else b"".join(frames))
                    frames.clear()
            self._flushed = time.perf_counter()
            want = self._credit() if grant else 0  # only the main loop knows how many are owed
            if want:
                self._owed += want
                frames.append(frame(CREDIT, U32.pack(want)))
            if frames:
                self._write(b"".join(frames))

    def _finish(self, items: list[bytes]) -> bytes:
        """The frame for these outcomes; they are repeated until it is answered."""
        request = next(self._request)
        self._unanswered[request] = items
        if self._journal is not None:
            self._journal.sent(items)
        return frame(FINISH_VERB, U32.pack(len(items)) + b"".join(items), request)

    def _credit(self) -> int:
        """How many more calls to ask for: up to the window, when half of it is used up."""
        have = self._owed + len(self._queue) + len(self._running)
        return 0 if self._draining or have * 2 > self._window else self._window - have

    def _push_out(self) -> None:
        """Neither outcomes nor leases must wait for a slow call, and its own lease must not end because the connection did."""
        tried = 0.0
        while not self._draining:
            self._working.wait()
            time.sleep(0.02)
            now = time.perf_counter()
            with contextlib.suppress(ConnectionLost, DagoramaError):  # the main loop sees it too, and repeats
                slow = self._working.is_set() and not self._draining and now - self._began > WORTH
                cut = slow and now - tried > 0.2 and self._cut()
                if slow and (self._queue or self._owed or cut):
                    if self._looking.acquire(blocking=False):
                        tried = now
                        try:
                            self._retreat()
                        finally:
                            self._looking.release()
                elif self._items and now - self._flushed > 0.02:
                    self._flush(grant=False)

    def _cut(self) -> bool:
        """Whether the connection has ended, without reading from it."""
        sock = self._sock
        try:
            if sock is None:
                return True
            poll = select.poll()
            poll.register(sock.fileno(), getattr(select, "POLLRDHUP", 0))
            return bool(poll.poll(0))
        except (OSError, ValueError):
            return True

    def _retreat(self) -> None:
        """Calls are slower than they were: give back what waits here. Credit cannot be taken back, but ends with a connection."""
        self._window = 1
        self._per_call = WORTH
        self._queue.clear()  # no longer known here, so released
        self._connect(once=True)

    def _release(self) -> None:
        """Give back what waits here."""
        while self._queue:
            entry = self._queue.popleft()
            for lease in entry if isinstance(entry, list) else (entry,):
                self._items.append(FINISH.pack(lease[1], lease[3], lease[4], lease[5], RELEASED, JSON, 0, 0, 0, 0))

    # ---- receiving ----

    def _receive(self, timeout: float | None = None) -> bool:
        """Wait for something and handle all that is here; whether there was something."""
        reader, sock, poll = self._reader, self._sock, self._poll
        if reader is None or sock is None or poll is None:
            raise ConnectionLost
        if self._handle(reader):
            return True
        here = poll.poll(None if timeout is None else timeout * 1000)
        for fd, _ in here:
            if fd == sock.fileno():
                reader.fill()
                self._handle(reader)
            elif fd == self._parent:
                poll.unregister(fd)
                self._orphaned()
            elif fd == self._wake.fileno():
                self._wake.recv(64)
        return bool(here)

    def _handle(self, reader: Reader) -> bool:
        any_ = False
        while (got := reader.next()) is not None:
            any_ = True
            verb, flags, request, body = got
            if verb == LEASES:
                self._on_leases(body)
            elif verb == REPLY:
                parts = self._parts.get(request)
                if parts is None:
                    self._answered(request, body)
                else:
                    parts.append(body)
                    if not flags & MORE:
                        self._replies[request] = parts
            elif verb == SPECS_VERB:
                for spec in json.loads(str(body, "utf-8")):
                    self._handlers[spec["id"]] = Handler(spec)
            elif verb == REVOKE:
                self._on_revoke([(run, node, attempt) for run, node, attempt in REVOKED.iter_unpack(body[4:])])
            elif verb == ERROR:
                error = refusal(body)
                if request in self._parts:
                    self._replies[request] = error
                elif request in self._unanswered:
                    self._refused(self._unanswered.pop(request), error)
                elif request == 0:
                    raise ConnectionLost(str(error))
        return any_

    def _on_leases(self, body: Bytes) -> None:
        unpack = LEASE.unpack_from
        queue = self._queue
        (count,) = U32.unpack_from(body)
        at, calls, last = 4, 0, 0
        bundle: list[Lease] = []
        for _ in range(count):
            run, salt, node, attempt, token, spec, batch, codec, _, _, n_ranges, length, n_inline = unpack(body, at)
            head = body[at : at + 40]
            at += 64
            ranges: tuple[tuple[int, int, int], ...] = ()
            if n_ranges:
                ranges = tuple((first, n, mode) for first, n, mode in RANGE.iter_unpack(body[at : at + 12 * n_ranges]))
                at += 12 * n_ranges
            arguments = body[at : at + length]
            at += length
            inline = None
            if n_inline:
                inline, at = read_items(body, at, n_inline)
            if self._given_back and (run, node, attempt) in self._given_back:
                continue
            lease: Lease = (head, run, salt, node, attempt, token, spec, codec, ranges, arguments, inline)
            if not batch:
                queue.append(lease)
            elif batch == last:
                bundle.append(lease)
                continue
            else:
                bundle = [lease]
                queue.append(bundle)
            last = batch
            calls += 1
        self._owed = max(0, self._owed - calls)
        self._quiet = self._quiet_at_first

    def _on_revoke(self, keys: list[Key]) -> None:
        gone = set(keys)
        self._stopped |= gone & self._running
        for _ in range(len(self._queue)):
            entry = self._queue.popleft()
            if isinstance(entry, list):
                entry = [lease for lease in entry if (lease[1], lease[3], lease[4]) not in gone]
                if entry:
                    self._queue.append(entry)
            elif not _keys(entry) & gone:
                self._queue.append(entry)

    def _answered(self, request: int, body: Bytes) -> None:
        items = self._unanswered.pop(request, None)
        if items is None:
            return
        at = 4
        refused: set[int] = set()
        for _ in range(U32.unpack_from(body)[0]):
            (position,) = U32.unpack_from(body, at)
            refused.add(position)
            (length,) = U16.unpack_from(body, at + 4)
            self._refused([items[position]], refusal(body[at + 6 : at + 6 + length]))
            at += 6 + length
        if self._journal is not None:
            self._journal.answered(items, refused)

    def _refused(self, items: list[bytes], error: DagoramaError) -> None:
        """A lease that has ended is no news. An outcome that the broker cannot take is a failure of its node."""
        for item in items:
            run, node, attempt, token, end, *_ = FINISH.unpack_from(item)
            if error.code in _GONE:
                continue
            if error.code == "STOPPING":  # repeated after the connection that is about to close
                self._items.append(item)
                continue
            if end in (FAILED, FAILED_RETRY, RELEASED):
                warn(f"the broker refused the end of node {run:x}/{node}: {error}")
                continue
            said = describe(error, "", "", attempt)
            self._items.append(FINISH.pack(run, node, attempt, token, FAILED, JSON, 0, 0, 0, len(said)) + said)

    def _ask(self, verb: int, body: bytes, until: float | None = None) -> list[Bytes]:
        """A request of ours and its reply; what else arrives meanwhile is kept. Repeated after a lost connection."""
        while True:
            request = next(self._request)
            self._parts[request] = []
            try:
                self._send(verb, body, request)
                while request not in self._replies:
                    if until is not None and time.monotonic() > until:
                        return []
                    self._receive(None if until is None else 0.2)
                reply = self._replies[request]
                if isinstance(reply, DagoramaError):
                    if reply.code == "STOPPING" and until is None:  # no answer: its next life gives one
                        raise ConnectionLost(str(reply))
                    raise reply
                return reply
            except ConnectionLost:
                if until is not None:
                    raise
                self._connect()
            finally:
                self._parts.pop(request, None)
                self._replies.pop(request, None)

    def _fetch(self, run: int, ranges: list[tuple[int, int]]) -> list[Item]:
        items: list[Item] = []
        with self._looking:
            for part in self._ask(FETCH, fetch_body(run, ranges)):
                items += read_items(part, 4, U32.unpack_from(part)[0])[0]
        return items

    # ---- what attempts need (Link) ----

    def revoked(self, run: int, node: int, attempt: int) -> bool:
        """Look at what has arrived, without waiting."""
        if self._looking.acquire(blocking=False):
            try:
                sock, reader, poll = self._sock, self._reader, self._poll
                if sock is not None and reader is not None and poll is not None and sock.fileno() in dict(poll.poll(0)):
                    reader.fill()
                    self._handle(reader)
            except ConnectionLost:
                pass  # the next send or receive connects again
            finally:
                self._looking.release()
        return (run, node, attempt) in self._stopped

    def create(self, run: int, node: int, attempt: int, token: bytes, first_child: int, count: int, nodes: bytes) -> int:
        """Create children now."""
        with self._looking:
            if self._defined < len(SPECS):
                with contextlib.suppress(ConnectionLost), self._flushing:
                    self._write(self._define())
            reply = self._ask(CREATE_VERB, CREATE.pack(run, node, attempt, token, first_child, count) + nodes)
        return int(U32.unpack_from(reply[0])[0])

    # ---- running ----

    def _work(self) -> None:
        """Run what is queued."""
        queue, items, slot, handlers, clock = self._queue, self._items, self._slot, self._handlers, time.perf_counter
        journal = self._journal
        running, stopped, set_running = self._running, self._stopped, RUNNING.set
        self._working.set()
        slot[20:24] = b"\1\0\0\0"
        slot[16] = 1
        calls = 0
        began = now = clock()
        try:
            while not self._draining:
                try:
                    entry = queue.popleft()
                except IndexError:  # the end, or the helper thread has given it back
                    break
                calls += 1
                self._began = now
                if isinstance(entry, list):
                    self._flush()
                    self._bundle(entry)
                    now = clock()
                    continue
                head, run, salt, node, number, token, spec, codec, ranges, body, inline = entry
                handler = handlers.get(spec)
                if handler is None:
                    raise ConnectionLost(f"the broker leased spec {spec} without defining it")
                if handler.batch:
                    self._flush()
                    self._bundle([entry])
                    now = clock()
                    continue
                if items and (handler.slow or len(items) >= PER_FRAME):
                    self._flush()
                slot[24:64] = head
                key = (run, node, number)
                running.add(key)
                if journal is not None:
                    journal.started(run, node, number, handler.name)
                attempt = Attempt(self, run, salt, node, number, token, handler.name)
                try:
                    if codec == PICKLE and not ranges:
                        args, kwargs = unpickled(body)
                    else:
                        args, kwargs = decode_arguments(codec, body, self._inputs(run, salt, ranges, inline))
                    set_running(attempt)
                    value = handler.fn(*args) if handler.plain and not kwargs else self._call(handler, attempt, args, kwargs)
                    scalar = SCALAR_RESULTS.get(type(value))
                    if scalar is not None:
                        end, codec, n_ranges, refs, out = scalar(value)
                    else:
                        end, codec, n_ranges, refs, out = encode_result(value, attempt, handler.name)
                    pending = attempt.pending
                    if pending:
                        item = FINISH.pack(run, node, number, token, end, codec, 0, n_ranges, len(pending), len(out)) + refs + out
                        item += b"".join(pending)
                    else:
                        item = FINISH.pack(run, node, number, token, end, codec, 0, n_ranges, 0, len(out)) + refs + out
                except BaseException as error:
                    item = b"" if self._left(error) else self._failure(error, handler, run, salt, node, number, token, attempt)
                attempt.open = False
                set_running(None)
                if item and not (stopped and key in stopped):
                    items.append(item)  # before it no longer runs: a thread that connects must find it here or there
                running.discard(key)
                if stopped:
                    stopped.discard(key)
                spent, now = -now, clock()
                spent += now
                handler.slow = spent > SLOW
                if spent > WORTH and (queue or self._owed):
                    self._retreat()
        finally:
            slot[16] = 0
            self._working.clear()
            if self._draining:
                self._release()
        self._measure(calls, now - began)

    def _measure(self, calls: int, spent: float) -> None:
        per_call = spent / max(1, calls)
        self._per_call = per_call if per_call > self._per_call else (self._per_call + per_call) / 2
        self._window = 1 + min(MAX_WINDOW, int(WORTH / max(self._per_call, 1e-6)))

    def _inputs(self, run: int, salt: int, ranges: Iterable[tuple[int, int, int]], inline: list[Item] | None) -> list[Any] | None:
        """What the arguments refer to: values, and outcomes where the call asked for them."""
        wanted = [(first, count, mode & 0xFF) for first, count, mode in ranges if mode & 0xFF != MODE_AFTER]
        if not wanted:
            return None
        items = inline if inline is not None else self._fetch(run, [(first, count) for first, count, _ in wanted])
        text = run_text(run, salt)

        def read(some: list[Item]) -> list[Any]:
            return read_values(some, lambda more: self._fetch(run, more), lambda item: rebuild(item, text))

        if all(mode != MODE_OUTCOME for _, _, mode in wanted):
            return read(items)
        values: list[Any] = []
        for _, count, mode in wanted:
            some = items[len(values) : len(values) + count]
            if mode == MODE_OUTCOME:
                values += [Outcome(read([item])[0]) if item[1] == SUCCEEDED else _failed(rebuild(item, text)) for item in some]
            else:
                values += read(some)
        return values

    def _call(self, handler: Handler, attempt: Attempt, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        retry = kwargs.pop("$retry", None) if kwargs else None
        policy = handler.retry
        if retry is not None:
            policy = Retry(2, on=retry[0], never=retry[1])
            attempt.retry = policy
        if handler.timeout is not None:
            deadline = time.monotonic() + handler.timeout
            attempt.deadline = time.time() + handler.timeout
            self._slot[17] = policy._covers(TimeoutError)
            self._slot[8:16] = _DEADLINE.pack(deadline)
        try:
            value = handler.fn(*args, **kwargs)
            return self._await(value) if handler.is_async else value
        finally:
            if handler.timeout is not None:
                self._slot[8:16] = bytes(8)

    def _await(self, coroutine: Any) -> Any:
        if self._runner is None:
            self._runner = asyncio.Runner()
        return self._runner.run(coroutine, context=contextvars.copy_context())

    def _left(self, error: BaseException) -> bool:
        """The broker was gone while this worker had to leave: not the call's fault. Without an outcome it is released or lapses."""
        return isinstance(error, BrokerUnavailable) and self._draining and self._sock is None

    def _failure(self, error: BaseException, handler: Handler, run: int, salt: int, node: int, number: int, token: bytes,
                 attempt: Attempt | None) -> bytes:
        policy = (attempt.retry if attempt is not None else None) or handler.retry
        end = FAILED_RETRY if policy._covers(type(error)) else FAILED
        try:
            said = describe(error, handler.name, f"{run_text(run, salt)}/{node}", number)
        except BaseException as worse:
            said = describe(DagoramaError(f"the error of {handler.name} cannot be described: {type(worse).__name__}"), handler.name,
                            f"{run_text(run, salt)}/{node}", number)
        return FINISH.pack(run, node, number, token, end, JSON, 0, 0, 0, len(said)) + said

    def _bundle(self, leases: list[Lease]) -> None:
        """One call of a batch action. Each call of a node has its own lease and its own outcome."""
        handler = self._handlers[leases[0][6]]
        slot = self._slot
        keys = [(lease[1], lease[3], lease[4]) for lease in leases]
        self._running.update(keys)
        slot[20:24] = U32.pack(min(len(leases), Slot.MAX))
        heads = b"".join(lease[0] for lease in leases[: Slot.MAX])
        slot[24 : 24 + len(heads)] = heads
        good: list[Lease] = []
        arguments: list[Any] = []
        outcomes: dict[int, bytes] = {}

        def fail(lease: Lease, error: BaseException) -> None:
            left = self._left(error)
            outcomes[id(lease)] = b"" if left else self._failure(error, handler, *lease[1:6], attempt)

        first = leases[0]
        attempt = Attempt(self, first[1], first[2], first[3], first[4], first[5], handler.name)
        attempt.bundle = True
        for lease in leases:
            if self._journal is not None:
                self._journal.started(lease[1], lease[3], lease[4], handler.name)
            try:
                args, kwargs = decode_arguments(lease[7], lease[9], self._inputs(lease[1], lease[2], lease[8], lease[10]))
                if "$retry" in kwargs:
                    on, never = kwargs.pop("$retry")
                    attempt.retry = Retry(2, on=on, never=never)
                if len(args) != 1 or kwargs:
                    raise TypeError(f"{handler.name}() takes one positional argument")
                arguments.append(args[0])
                good.append(lease)
            except BaseException as error:
                fail(lease, error)
        try:
            if good:
                RUNNING.set(attempt)
                results = self._call(handler, attempt, (arguments,), {})
                if not isinstance(results, list | tuple) or len(results) != len(good):
                    raise DagoramaError(f"{handler.name} must return a list with one result for each of its {len(good)} calls")
                for lease, value in zip(good, results, strict=True):
                    try:
                        if isinstance(value, BaseException):
                            raise value
                        end, codec, n_ranges, refs, out = encode_result(value, attempt, handler.name)
                        outcomes[id(lease)] = FINISH.pack(lease[1], lease[3], lease[4], lease[5], end, codec, 0, n_ranges, 0,
                                                          len(out)) + refs + out
                    except BaseException as error:
                        fail(lease, error)
        except BaseException as error:
            for lease in good:
                fail(lease, error)
        attempt.open = False
        RUNNING.set(None)
        for lease, key in zip(leases, keys, strict=True):
            if key in self._stopped:
                self._stopped.discard(key)
            elif outcomes[id(lease)]:
                self._items.append(outcomes[id(lease)])  # before it no longer runs, as above
        self._running.difference_update(keys)
        slot[20:24] = b"\1\0\0\0"


def _keys(entry: Lease | list[Lease]) -> set[Key]:
    return {(lease[1], lease[3], lease[4]) for lease in (entry if isinstance(entry, list) else (entry,))}


def _failed(error: DagoramaError) -> Outcome[Any]:
    from ._errors import ActionFailed

    if isinstance(error, ActionFailed):
        return Outcome(error=error)
    failed = ActionFailed(str(error))
    failed.__cause__ = error
    return Outcome(error=failed)
