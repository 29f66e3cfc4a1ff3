"""What the worker's own code costs, without a broker: `python tests/bench_codec.py` prints one JSON line per measurement.

Leaves: an executor in a process of its own against a peer that only sends prepared frames of leases and answers every FINISH.
CPU time is the executor's own; the rate also contains the peer's share of the machine. Recording and reading are CPU milliseconds.
"""

from __future__ import annotations

import gc
import json
import os
import pickle
import resource
import socket
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "src"))

from dagorama import _wire as w
from dagorama import action
from dagorama._connection import Address
from dagorama._current import RUNNING, Attempt
from dagorama._executor import Executor, Slot
from dagorama._payload import decode_arguments, encode_result, read_values


@action
def noop(i: int) -> int:
    return i


@action
def join(xs: list[int]) -> int:
    return len(xs)


def say(name: str, **numbers: Any) -> None:
    print(json.dumps({"bench": name, **numbers}), flush=True)


def leaves(count: int) -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    pid = os.fork()
    if pid == 0:
        executor = Executor(Address(f"dagorama://127.0.0.1:{listener.getsockname()[1]}"), "t", ["default"], [], Slot(bytearray(Slot.SIZE)))
        try:
            executor.run()
        finally:
            os._exit(0)
    sock, _ = listener.accept()
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    reader = w.Reader(sock)

    def lease(i: int) -> bytes:
        body = pickle.dumps(((i,), {}), 5)
        return w.LEASE.pack(1, 2, i, 1, b"t" * 16, 7, 0, w.PICKLE, 0, 0, 0, len(body), 0) + body

    prepared = [lease(i) for i in range(count)]
    answer = w.U32.pack(0)
    credit = sent = done = 0
    began = 0.0
    while done < count:
        while (got := reader.next()) is None:
            reader.fill()
        verb, _, request, body = got
        if verb == w.HELLO:
            sock.sendall(w.frame(w.REPLY, json.dumps(
                {"session": "1" * 16, "leases": [], "heartbeat_ms": 10000}).encode(), request))
            sock.sendall(w.frame(w.SPECS, json.dumps([{"id": 7, **noop._wire_spec()}]).encode()))
            began = time.perf_counter()
        elif verb == w.CREDIT:
            credit += w.U32.unpack(body)[0]
        elif verb == w.FINISH_VERB:
            done += w.U32.unpack_from(body)[0]
            sock.sendall(w.frame(w.REPLY, answer, request))
        if credit and sent < count:
            n = min(credit, count - sent)
            credit -= n
            sock.sendall(w.frame(w.LEASES, w.U32.pack(n) + b"".join(prepared[sent : sent + n])))
            sent += n
    wall = time.perf_counter() - began
    sock.close()
    os.kill(pid, 9)
    _, _, used = os.wait4(pid, 0)
    cpu = used.ru_utime + used.ru_stime
    say("leaves", n=count, leaves_per_s=round(count / wall), cpu_us_per_leaf=round(cpu / count * 1e6, 2))


class NoLink:
    def revoked(self, run: int, node: int, attempt: int) -> bool:
        return False

    def create(self, run: int, node: int, attempt: int, token: bytes, first_child: int, count: int, nodes: bytes) -> int:
        return 0


def record(n: int) -> tuple[float, int]:
    gc.collect()
    began = time.process_time()
    attempt = Attempt(NoLink(), 1, 2, 0, 1, b"t" * 16, "bench")
    RUNNING.set(attempt)
    promise: Any = join([noop(i) for i in range(n)])
    end, codec, n_ranges, refs, out = encode_result(promise, attempt, "bench")
    body = w.FINISH.pack(1, 0, 1, b"t" * 16, end, codec, 0, n_ranges, len(attempt.pending), len(out)) + refs + out
    body += b"".join(attempt.pending)
    RUNNING.set(None)
    return (time.process_time() - began) * 1000, len(body)


def fetch(n: int) -> float:
    frame = b"".join(w.ITEM.pack(i, w.SUCCEEDED, w.JSON, 0, 0, len(b"%d" % i)) + b"%d" % i for i in range(n))
    attempt = Attempt(NoLink(), 1, 2, 0, 1, b"t" * 16, "bench")
    RUNNING.set(attempt)
    join([noop(i) for i in range(n)])
    arguments = attempt.pending[-1][w.NODE.size + 12 :]
    RUNNING.set(None)
    gc.collect()
    began = time.process_time()
    items, _ = w.read_items(frame, 0, n)
    values = read_values(items, lambda _: [], lambda _: ValueError())
    args, _ = decode_arguments(w.PICKLE, arguments, values)
    spent = (time.process_time() - began) * 1000
    assert args == (list(range(n)),)
    return spent


def main() -> None:
    n = int(sys.argv[1]) if len(sys.argv) > 1 else 200_000
    for _ in range(3):
        leaves(n)
    recorded = [record(10_000) for _ in range(9)]
    say("fanout_recorded", n=10_000, cpu_ms=round(median(ms for ms, _ in recorded), 2), frame_bytes=recorded[0][1])
    say("join_read", n=10_000, cpu_ms=round(median(fetch(10_000) for _ in range(9)), 2))
    say("memory", max_rss_mb=round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024))


if __name__ == "__main__":
    main()
