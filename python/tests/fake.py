"""A broker in 300 lines, in memory, for tests of the client without the binary: naive on purpose, and written from PROTOCOL.md.

It checks what it is sent (an unknown spec, a bad range or token is an assertion) and can be told to misbehave: ``drop``
closes every connection, ``refuse`` answers the next submission with an error.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import socket
import struct
import threading
import time
from collections import deque
from typing import Any

from dagorama import _wire as w

TERMINAL = (5, 6, 7, 8)


class Node:
    def __init__(self, run: Run, number: int, spec: dict[str, Any], codec: int, body: bytes, inputs: list[tuple[int, int, int]],
                 not_before: float, parent: int | None) -> None:
        self.run, self.number, self.spec, self.codec, self.body = run, number, spec, codec, body
        self.inputs, self.not_before, self.parent = inputs, not_before, parent
        self.state, self.attempt, self.failures, self.token, self.session = 0, 0, 0, b"", 0
        self.kind, self.value = "open", (0, b"")
        self.refs: list[tuple[int, int, int]] = []
        self.created: list[int] = []  # flushed children
        self.digest: Any = None

    def nodes(self, ranges: list[tuple[int, int, int]]) -> list[tuple[Node, int]]:
        return [(self.run.nodes[n], mode) for first, count, mode in ranges for n in range(first, first + count)]


class Run:
    def __init__(self, seq: int, salt: int) -> None:
        self.seq, self.salt, self.cancelled = seq, salt, False
        self.nodes: list[Node] = []


class Connection:
    def __init__(self, broker: FakeBroker, sock: socket.socket) -> None:
        self.broker, self.sock = broker, sock
        self.specs: dict[int, dict[str, Any]] = {}
        self.sent_specs: set[int] = set()
        self.session, self.credit, self.queues, self.tolerate = 0, 0, [], []  # type: ignore[var-annotated]
        self.lock = threading.Lock()

    def send(self, verb: int, body: bytes, request: int = 0, flags: int = 0) -> None:
        with contextlib.suppress(OSError), self.lock:
            self.sock.sendall(w.HEADER.pack(len(body), verb, flags, 0, request) + body)


class FakeBroker:
    def __init__(self, token: str = "secret") -> None:
        self.lock = threading.RLock()
        self.changed = threading.Condition(self.lock)
        self.runs: list[Run] = []
        self.keys: dict[bytes, Run] = {}
        self.connections: list[Connection] = []
        self.ready: deque[Node] = deque()
        self.spec_numbers: dict[str, int] = {}
        self.log: list[tuple[str, Any]] = []
        self.token = token
        self.refuse: dict[str, Any] | None = None
        self.page = 150
        self.sessions = itertools.count(1)
        self.frames: list[int] = []
        self.heartbeats: list[int] = []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"dagorama://127.0.0.1:{self.listener.getsockname()[1]}"
        self.closed = False
        threading.Thread(target=self._accept, daemon=True).start()
        threading.Thread(target=self._tick, daemon=True).start()

    def close(self) -> None:
        self.closed = True
        self.listener.close()
        self.drop()

    def drop(self) -> None:
        with self.lock:
            for connection in self.connections:
                with contextlib.suppress(OSError):
                    connection.sock.shutdown(socket.SHUT_RDWR)

    def _tick(self) -> None:
        while not self.closed:
            time.sleep(0.02)
            with self.lock:
                self._pump()

    def _accept(self) -> None:
        while not self.closed:
            try:
                sock, _ = self.listener.accept()
            except OSError:
                return
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection = Connection(self, sock)
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, c: Connection) -> None:
        reader = w.Reader(c.sock)
        try:
            while True:
                while (got := reader.next()) is None:
                    reader.fill()
                verb, _, request, body = got
                self.frames.append(verb)
                with self.lock:
                    self._handle(c, verb, request, bytes(body))
        except Exception as error:
            if type(error).__name__ != "ConnectionLost":
                self.log.append(("bug", repr(error)))
                raise
        finally:
            c.sock.close()
            with self.lock:
                if c in self.connections:
                    self.connections.remove(c)

    def _error(self, c: Connection, request: int, code: str, message: str = "no") -> None:
        c.send(w.ERROR, json.dumps({"code": code, "message": message, "retryable": False}).encode(), request)

    def _handle(self, c: Connection, verb: int, request: int, body: bytes) -> None:
        name = {w.HELLO: "hello", w.DEFINE: "define", w.SUBMIT: "submit", w.CREDIT: "credit", w.FINISH_VERB: "finish",
                w.FETCH: "fetch", w.WAIT: "wait", w.CREATE_VERB: "create", w.CANCEL: "cancel", w.SHOW: "show",
                w.GOODBYE: "goodbye", w.HEARTBEAT: "heartbeat", w.STATUS: "status", w.RESUME: "resume"}[verb]
        getattr(self, f"_on_{name}")(c, request, body)
        self._pump()
        self.changed.notify_all()

    def _on_hello(self, c: Connection, request: int, body: bytes) -> None:
        said = json.loads(body)
        if said["token"] != self.token:
            self._error(c, request, "UNAUTHENTICATED", "no valid token")
            c.sock.shutdown(socket.SHUT_WR)
            return
        held: list[list[int]] = []
        reply: dict[str, Any] = {"version": 1, "broker": "fake", "store": "0" * 32, "lease_ms": 30000, "heartbeat_ms": 200,
                                 "max_payload": 1 << 26}
        if said["kind"] == "worker":
            c.session = int(said["session"], 16) if said.get("session") else next(self.sessions)
            c.queues, c.tolerate = said["queues"], said["tolerate"]
            self.connections = [k for k in self.connections if k.session != c.session]  # what an older one was promised is void
            reply["session"] = f"{c.session:016x}"
            for run in self.runs:
                held += [[run.seq, n.number, n.attempt] for n in run.nodes if n.kind == "leased" and n.session == c.session]
        reply["leases"] = held
        self.connections.append(c)
        self.log.append(("hello", said))
        c.send(w.REPLY, json.dumps(reply).encode(), request)

    def _on_define(self, c: Connection, request: int, body: bytes) -> None:
        for spec in json.loads(body):
            c.specs[spec["id"]] = {"queue": "default", "taint": None, "retry": {"max_attempts": 1}, "batch": None, **spec}

    def _on_heartbeat(self, c: Connection, request: int, body: bytes) -> None:
        self.heartbeats += struct.unpack_from(f"<{w.U32.unpack_from(body)[0]}Q", body, 4)

    def _read_nodes(self, c: Connection, run: Run, body: bytes, at: int, count: int, parent: int | None) -> tuple[list[Node], int]:
        base = len(run.nodes)
        made = []
        for i in range(count):
            spec, codec, how, _, n_ranges, length, when = w.NODE.unpack_from(body, at)
            at += w.NODE.size
            inputs = []
            for _ in range(n_ranges):
                first, n, mode = w.RANGE.unpack_from(body, at)
                at += 12
                assert n >= 1
                if mode & w.NEW:
                    assert first + n <= i, "an input must come before its node"
                    first += base
                else:
                    assert first + n <= base
                inputs.append((first, n, mode & 0xFF))
            not_before = time.time() + when / 1000 if how == 1 else when / 1000 if how == 2 else 0.0
            made.append(Node(run, base + i, c.specs[spec], codec, body[at : at + length], inputs, not_before, parent))
            at += length
        return made, at

    def _on_submit(self, c: Connection, request: int, body: bytes) -> None:
        if self.refuse:
            text = json.dumps(self.refuse).encode()
            self.refuse = None
            c.send(w.REPLY, w.U32.pack(1) + b"\0" + w.U16.pack(len(text)) + text, request)
            return
        (length,) = w.U16.unpack_from(body, 4)
        key, at = body[6 : 6 + length], 6 + length
        (length,) = w.U16.unpack_from(body, at)
        at += 2 + length
        n_nodes, _root = struct.unpack_from("<II", body, at)
        run, ok = self.keys.get(key), 2
        if run is None:
            run, ok = Run(len(self.runs) + 1, 0xABCDEF0123456789), 1
            run.nodes, end = self._read_nodes(c, run, body, at + 8, n_nodes, None)
            assert end == len(body)
            self.runs.append(run)
            self.keys[key] = run
        c.send(w.REPLY, w.U32.pack(1) + bytes([ok]) + w.RUN_ID.pack(run.seq, run.salt), request)

    def _on_credit(self, c: Connection, request: int, body: bytes) -> None:
        c.credit += w.U32.unpack(body)[0]

    def _on_finish(self, c: Connection, request: int, body: bytes) -> None:
        at, refused, n_refused = 4, b"", 0
        for position in range(w.U32.unpack_from(body)[0]):
            start = at
            seq, number, attempt, token, end, codec, _, n_ranges, n_children, length = w.FINISH.unpack_from(body, at)
            at += w.FINISH.size
            ranges = [w.RANGE.unpack_from(body, at + 12 * i) for i in range(n_ranges)]
            at += 12 * n_ranges
            value, at = body[at : at + length], at + length
            run = self.runs[seq - 1]
            node = run.nodes[number]
            children, at = self._read_nodes(c, run, body, at, n_children, number)
            digest = (attempt, body[start:at])
            if node.digest == digest:
                continue
            if node.kind != "leased" or node.attempt != attempt or (token != node.token and not (end == 5 and node.session == c.session)):
                text = json.dumps({"code": "LEASE_EXPIRED", "message": "late", "retryable": False}).encode()
                refused += w.U32.pack(position) + w.U16.pack(len(text)) + text
                n_refused += 1
                self.log.append(("refused", (seq, number, attempt, end)))
                continue
            node.digest = digest
            self.log.append(("end", (seq, number, attempt, end)))
            if end == 5:
                node.kind = "open"
            elif end in (3, 4, 6, 7):
                node.failures += 1
                retry = end in (4, 6) and node.failures < node.spec["retry"]["max_attempts"]
                node.kind = "open" if retry else "failed"
                node.value = (codec, value)
            else:
                base = len(run.nodes)
                run.nodes += children
                node.refs = [((first + base) if mode & w.NEW else first, n, mode & 0xFF) for first, n, mode in ranges]
                node.value = (codec, value)
                node.kind = {0: "value", 1: "structure", 2: "tail"}[end]
                assert (end == 0) == (not ranges)
        assert at == len(body)
        c.send(w.REPLY, w.U32.pack(n_refused) + refused, request)

    def _on_create(self, c: Connection, request: int, body: bytes) -> None:
        seq, number, _attempt, token, first, count = w.CREATE.unpack_from(body)
        run = self.runs[seq - 1]
        node = run.nodes[number]
        assert node.kind == "leased" and node.token == token and first <= len(node.created)
        if first == len(node.created):
            made, end = self._read_nodes(c, run, body, w.CREATE.size, count, number)
            assert end == len(body)
            run.nodes += made
            node.created += [n.number for n in made]
        c.send(w.REPLY, w.U32.pack(node.created[first]), request)

    # ---- values ----

    def end_of(self, node: Node) -> Node:
        while node.kind == "tail":
            node = node.run.nodes[node.refs[0][0]]
        return node

    def state_of(self, node: Node) -> tuple[int, Node]:
        """State of a node's value, and the node whose bytes tell it."""
        node = self.end_of(node)
        if node.kind == "value":
            return 5, node
        if node.kind == "failed":
            return 6, node
        if node.run.cancelled:
            return 7, node
        if node.kind == "structure":
            states = [self.state_of(n) for n, _ in node.nodes(node.refs)]
            bad = [s for s in states if s[0] in (6, 7, 8)]
            if bad:
                return 6, bad[0][1]
            return (5, node) if all(s[0] == 5 for s in states) else (4, node)
        if node.kind == "open":
            for n, mode in node.nodes(node.inputs):
                state, blame = self.state_of(n)
                if state in (6, 7, 8) and mode != 1:
                    return 8, blame
        return 1, node

    def _item(self, asked: int, node: Node) -> bytes:
        state, source = self.state_of(node)
        if state not in TERMINAL:
            return w.ITEM.pack(asked, state, 0, 0, 0, 0)
        codec, body = source.value
        refs = source.refs if state == 5 and source.kind == "structure" else []
        return w.ITEM.pack(asked, state, codec, 0, len(refs), len(body)) + b"".join(w.RANGE.pack(*r) for r in refs) + body

    def _on_fetch(self, c: Connection, request: int, body: bytes) -> None:
        seq, n = struct.unpack_from("<QI", body)
        run = self.runs[seq - 1]
        numbers = [k for first, count, _ in w.RANGE.iter_unpack(body[12 : 12 + 12 * n]) for k in range(first, first + count)]
        pages = [numbers[i : i + self.page] for i in range(0, len(numbers), self.page)] or [[]]
        for i, page in enumerate(pages):
            data = w.U32.pack(len(page)) + b"".join(self._item(k, run.nodes[k]) for k in page)
            c.send(w.REPLY, data, request, w.MORE if i + 1 < len(pages) else 0)

    def _on_wait(self, c: Connection, request: int, body: bytes) -> None:
        seq, salt, timeout_ms = w.WAIT_BODY.unpack(body)
        if not 1 <= seq <= len(self.runs) or self.runs[seq - 1].salt != salt:
            self._error(c, request, "UNKNOWN_RUN", "no such run")
            return
        threading.Thread(target=self._wait, args=(c, request, self.runs[seq - 1], timeout_ms), daemon=True).start()

    def _wait(self, c: Connection, request: int, run: Run, timeout_ms: int) -> None:
        until = time.monotonic() + timeout_ms / 1000 if timeout_ms else None
        with self.lock:
            while True:
                state, _ = self.state_of(run.nodes[0])
                if state in TERMINAL:
                    c.send(w.REPLY, bytes([state]) + w.U16.pack(0) + self._item(0, run.nodes[0]), request)
                    return
                left = None if until is None else until - time.monotonic()
                if left is not None and left <= 0:
                    hint = b"" if any(k.queues for k in self.connections) else b"no worker: start one with `dagorama worker`"
                    c.send(w.REPLY, b"\1" + w.U16.pack(len(hint)) + hint, request)
                    return
                if c not in self.connections:
                    return
                self.changed.wait(0.1 if left is None else min(left, 0.1))

    def _on_cancel(self, c: Connection, request: int, body: bytes) -> None:
        run = self.runs[w.run_numbers(json.loads(body)["run"])[0] - 1]
        run.cancelled = True
        for node in run.nodes:
            if node.kind == "leased":
                node.kind = "open"
                for k in self.connections:
                    if k.session == node.session:
                        k.send(w.REVOKE, w.U32.pack(1) + w.REVOKED.pack(run.seq, node.number, node.attempt))
        c.send(w.REPLY, b"{}", request)

    def _on_resume(self, c: Connection, request: int, body: bytes) -> None:
        run = self.runs[w.run_numbers(json.loads(body)["run"])[0] - 1]
        if self.state_of(run.nodes[0])[0] not in TERMINAL:
            self._error(c, request, "RUN_NOT_ENDED", "it runs")
            return
        run.cancelled = False
        for node in run.nodes:
            if node.kind == "failed":
                node.kind, node.failures = "open", 0
        c.send(w.REPLY, b"{}", request)

    def _on_show(self, c: Connection, request: int, body: bytes) -> None:
        run = self.runs[w.run_numbers(json.loads(body)["run"])[0] - 1]
        state = self.state_of(run.nodes[0])[0]
        word = "cancelled" if run.cancelled else {5: "succeeded", 6: "failed", 8: "failed"}.get(state, "running")
        c.send(w.REPLY, json.dumps({"run": "", "state": word}).encode(), request)

    def _on_status(self, c: Connection, request: int, body: bytes) -> None:
        open_ = sum(self.state_of(n)[0] not in TERMINAL for run in self.runs for n in run.nodes)
        c.send(w.REPLY, json.dumps({"open_nodes": open_, "leases": 0}).encode(), request)

    def _on_goodbye(self, c: Connection, request: int, body: bytes) -> None:
        for run in self.runs:
            for node in run.nodes:
                if node.kind == "leased" and node.session == c.session:
                    node.kind = "open"
        c.credit = 0
        self.log.append(("goodbye", c.session))
        c.send(w.REPLY, b"{}", request)

    # ---- leasing ----

    def lose(self, session: int) -> None:
        """The leases of a session lapse."""
        with self.lock:
            for run in self.runs:
                for node in run.nodes:
                    if node.kind == "leased" and node.session == session:
                        node.kind = "open"

    def _may_run(self, node: Node) -> bool:
        if node.kind != "open" or node.run.cancelled or node.not_before > time.time():
            return False
        return all(s in TERMINAL if mode == 1 else s == 5 for s, mode in
                   ((self.state_of(n)[0], mode) for n, mode in node.nodes(node.inputs)))

    def _pump(self) -> None:
        workers = [c for c in self.connections if c.credit > 0 and c.queues]
        if not workers:
            return
        for run in self.runs:
            open_ = [node for node in run.nodes if node.kind == "open"]
            bundles: dict[str, list[Node]] = {}
            for node in open_:
                if self._may_run(node):
                    if node.spec["batch"]:
                        bundles.setdefault(node.spec["action"], []).append(node)
                    else:
                        self._lease([node], 0)
            for nodes in bundles.values():
                size = nodes[0].spec["batch"]["max_size"]
                for i in range(0, len(nodes), size):
                    self._lease(nodes[i : i + size], nodes[i].number + 1)

    def _lease(self, nodes: list[Node], batch: int) -> None:
        spec = nodes[0].spec
        for c in self.connections:
            if c.credit > 0 and spec["queue"] in c.queues and (spec["taint"] is None or spec["taint"] in c.tolerate):
                break
        else:
            return
        c.credit -= 1
        text = json.dumps({**spec, "id": 0}, sort_keys=True)
        number = self.spec_numbers.setdefault(text, 100 + len(self.spec_numbers))
        if number not in c.sent_specs:
            c.sent_specs.add(number)
            c.send(w.SPECS, json.dumps([{**spec, "id": number}]).encode())
        data = [w.U32.pack(len(nodes))]
        for node in nodes:
            node.kind, node.session, node.token = "leased", c.session, os.urandom(16)
            node.attempt += 1
            inline = [k for k, mode in node.nodes(node.inputs) if mode != 2]
            some = inline if 0 < len(inline) <= 4 else []  # many inputs are fetched
            data.append(w.LEASE.pack(node.run.seq, node.run.salt, node.number, node.attempt, node.token, number, batch, node.codec, 0, 0,
                                     len(node.inputs), len(node.body), len(some)))
            data += [w.RANGE.pack(*r) for r in node.inputs]
            data.append(node.body)
            data += [self._item(k.number, k) for k in some]
        c.send(w.LEASES, b"".join(data))
