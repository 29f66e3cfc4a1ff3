"""The whole of it: the real broker, real worker processes, and what must hold when either of them dies.

The judge of "applied once" is the workers' own journal and the result: a leaf returns its number, so the sum is right only if each
outcome was applied exactly once; the journal says which executions there were.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import http.server
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import flows
import pytest
from conftest import ROOT, SRC, Site
from flows import Oops

from dagorama import ActionFailed, BrokerUnavailable, Cancelled, Client, DagoramaError

Real = Callable[..., Site]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """One broker and one worker for the tests that break nothing."""
    site = Site(tmp_path_factory.mktemp("shared"))
    site.worker("--concurrency", "2")
    yield site
    site.close()


@pytest.fixture
def site(shared: Site) -> Iterator[Site]:
    with Client(shared.broker.url, token=shared.broker.token):
        yield shared


# ---- values and shapes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [
    0, 2**63, 2**200, 0.0, -1.5, float("inf"), "", "ä\n\"\u2028", "\ud800", b"", b"\0x", None, True, False, [], {}, (), set(),
    [0, None, False, ""], {"a": [1, {"b": 2.5}]}, {1: 2}, {"$dagorama": 0}, [(1,)], "x" * 5000, b"y" * 100_000, flows.Point(1, 2)])
def test_values(site: Site, value: Any) -> None:
    got = flows.same.submit(value).result(30)
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize("name, args, expected", [
    ("add", (1, 2), 3), ("fan", (0,), 0), ("fan", (50,), 2450), ("spread", (5,), [0, 2, 4, 6, 8]), ("anywhere", (), 17),
    ("structured", (5,), 27),
    ("mapped", (5,), 40), ("mapped", (0,), 0), ("star", (4,), 46), ("aflow", (5,), 15), ("batched", (100,), 656700),
    ("judged", (), ["ok 8", "failed ValueError", "failed ValueError"]), ("batch_bad", (), ["ok 4", "failed ValueError", "ok 16"]),
    ("ordered", (), "c"),
    ("flaky", ("real", 3), 3), ("flushed", (10,), 90), ("gives_action", (4,), 8), ("big_between", (3 << 20,), 3 << 20),
    ("fan", (10_000,), 99990000)])
def test_flows(site: Site, name: str, args: tuple[Any, ...], expected: Any) -> None:
    assert getattr(flows, name).submit(*args).result(60) == expected


def test_structures_methods_and_delay(site: Site) -> None:
    assert flows.structure.submit(1).result(30) == {"a": 2, "b": [flows.Point(1, 2, ["t"]), None, {"c": 4}], "box": 7}
    assert flows.boxed.submit(2).result(30) == flows.Box("l", [4, 4])
    assert flows.Scaler(3).many.submit(4).result(30) == 18
    assert flows.delayed.submit().result(30) >= 0.19
    assert 0.28 < flows.since.options(delay=0.3).submit(time.time()).result(30) < 5


def test_recursion_of_10_000_on_one_slot(real: Real) -> None:
    site = real()
    site.worker("--concurrency", "1")
    assert flows.down.submit(10_000).result(110) == 0


def test_structures_of_depth_1000(site: Site) -> None:
    got, depth = flows.nest.submit(1000).result(60), 0
    while got:
        got, depth = got[0], depth + 1
    assert depth == 1000


def test_64_mib_go_in_and_out(site: Site) -> None:
    most = 64 << 20
    got = flows.big.submit(most).result(60)
    assert len(got) == most and got == b"x" * most
    del got
    assert flows.size.submit(b"x" * (most - 64)).result(60) == most - 64
    assert flows.big_between.submit(most).result(60) == most
    with pytest.raises(ActionFailed, match="PAYLOAD_TOO_LARGE"):
        flows.big.submit(most + 1).result(60)
    with pytest.raises(DagoramaError, match="PAYLOAD_TOO_LARGE"):
        flows.size.submit(b"x" * most)


def test_failures(site: Site) -> None:
    with pytest.raises(ActionFailed) as caught:
        flows.fail_with_cause.submit().result(30)
    cause = caught.value.__cause__
    assert isinstance(cause, Oops) and (cause.code, cause.detail) == (7, "outer") and isinstance(cause.__cause__, KeyError)
    assert caught.value.action == "flows.fail_with_cause" and "raise KeyError" in caught.value.remote_traceback
    with pytest.raises(ActionFailed, match="ValueError: deep") as caught:
        flows.chain_of_failure.submit().result(30)
    assert caught.value.action == "flows.fail"
    for name, text in [("fail_hard", "SystemExit"), ("unpicklable_result", r"result\['a'\]\[1\]"), ("fail_stubborn", "stubborn")]:
        with pytest.raises(ActionFailed, match=text):
            getattr(flows, name).submit().result(30)
    with pytest.raises(ActionFailed) as caught:
        flows.flaky_never.submit().result(30)
    assert caught.value.attempts == 1


def test_keys_and_runs_from_elsewhere(site: Site) -> None:
    keyed = flows.add.options(key="the key", tags={"who": "me"})
    first, again = keyed.submit(1, 2), keyed.submit(1, 2)
    assert first.id == again.id and first.result(30) == 3 and first.state() == "succeeded"
    with pytest.raises(DagoramaError) as caught:
        keyed.submit(1, 3)
    assert caught.value.code == "SUBMISSION_CONFLICT"
    with Client(site.broker.url, token=site.broker.token) as other:
        assert other.run(first.id).result(30) == 3
        assert other.emit("flows.add", 20, b=3).result(30) == 23
        with pytest.raises(DagoramaError) as caught:
            other.run("99-0123456789abcdef").result(5)
        assert caught.value.code == "UNKNOWN_RUN"


def test_async_client(site: Site) -> None:
    async def main() -> list[int]:
        return list(await asyncio.gather(*[await flows.nap.asubmit(i) for i in range(50)]))

    assert asyncio.run(main()) == list(range(1, 51))


def test_cancel_and_resume(site: Site) -> None:
    run = flows.wait_for_cancel.submit()
    site.wait_for(lambda: bool(site.lines("waiting")))
    run.cancel("enough")
    with pytest.raises(Cancelled):
        run.result(30)
    assert run.state() == "cancelled"
    site.wait_for(lambda: bool(site.lines("cancelled")))
    failed = flows.chain_of_failure.submit()
    for _ in range(2):
        with pytest.raises(ActionFailed):
            failed.result(30)
        site.wait_for(lambda: failed.state() == "failed")
        failed.retry()
    with pytest.raises(ActionFailed):
        failed.result(30)


def test_timeout_ends_the_call(site: Site) -> None:
    assert flows.too_long.submit("real").result(60) == "attempt 2"
    assert site.lines("too_long") == [["real", "1"], ["real", "2"]]


def test_wrong_token_and_no_broker(site: Site) -> None:
    with Client(site.broker.url, token="wrong"), pytest.raises(DagoramaError) as caught:
        flows.add.submit(1, 2)
    assert caught.value.code == "UNAUTHENTICATED"
    with Client("dagorama://127.0.0.1:1", timeout=0.2), pytest.raises(BrokerUnavailable, match="dagorama serve"):
        flows.add.submit(1, 2)


def test_hint_when_no_worker_serves_the_queue(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    run = flows.add.options(queue="nobody").submit(1, 2)
    with pytest.raises(TimeoutError):
        run.result(3)
    said = capsys.readouterr().err
    assert said.count("dagorama worker") == 1 and "nobody" in said, said
    run.cancel()


# ---- the example -------------------------------------------------------------------------------------------------------------


def test_the_site_program(real: Real, tmp_path: Path) -> None:
    site = real()
    pages = tmp_path / "pages"
    pages.mkdir()
    for name, text in [("a", "cats and dogs"), ("b", "dogs and cats"), ("c", "the weather today")]:
        (pages / name).write_text(text)
    handler = functools.partial(QuietHandler, directory=str(pages))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    env = {**os.environ, "PYTHONPATH": str(SRC), "DAGORAMA_URL": site.broker.url, "DAGORAMA_TOKEN": site.broker.token}
    examples = ROOT / "examples"
    worker = subprocess.Popen([sys.executable, "-m", "dagorama", "worker", "pages", "--tolerate", "gpu"], cwd=examples, env=env)
    try:
        urls = [f"http://127.0.0.1:{server.server_address[1]}/{name}" for name in "abc"]
        done = subprocess.run([sys.executable, "pages.py", *urls], cwd=examples, env=env, capture_output=True, text=True, timeout=60)
    finally:
        worker.terminate()
        worker.wait(20)
        server.shutdown()
        server.server_close()
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("[(0, 1, 1.0), "), done.stdout


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


# ---- crashes -------------------------------------------------------------------------------------------------------------------


def once(site: Site, run: Any, n: int, executions: int | None = None) -> None:
    """The result is right, and the journal knows every leaf."""
    assert run.result(100) == sum(range(n))
    ran = Counter(int(line[2]) for line in site.lines("leaf"))
    assert set(ran) == set(range(n))
    if executions is not None:
        assert sum(ran.values()) - n <= executions, ran


def test_broker_killed_and_restarted(real: Real) -> None:
    site = real()
    site.worker("--concurrency", "2")
    run = flows.leaves.submit(300, 0.01)
    for part in (50, 120, 200):
        site.wait_for(lambda part=part: len(site.lines("leaf")) >= part)  # type: ignore[misc]
        site.broker.restart()
    once(site, run, 300)
    assert flows.add.submit(1, 2).result(30) == 3


def test_broker_stopped_in_order_and_restarted(real: Real) -> None:
    site = real()
    site.worker("--concurrency", "2")
    run = flows.leaves.submit(200, 0.01)
    runs: list[Any] = []
    ended = threading.Event()

    def go_on() -> None:
        while not ended.wait(0.002):
            runs.append(flows.add.submit(len(runs), 1))

    client = threading.Thread(target=go_on)
    client.start()
    try:
        for part in (50, 100, 150):
            site.wait_for(lambda part=part: len(site.lines("leaf")) >= part)  # type: ignore[misc]
            site.broker.process.terminate()
            site.broker.process.wait(20)
            assert site.broker.process.stdout is not None
            site.broker.process.stdout.close()
            site.broker.start()
        once(site, run, 200)
    finally:
        ended.set()
        client.join(30)
    assert len({run.id for run in runs}) == len(runs) > 50
    assert [run.result(30) for run in runs] == list(range(1, len(runs) + 1))


def test_worker_killed(real: Real) -> None:
    site = real("--lease", "2s")
    worker = site.worker("--concurrency", "2")
    run = flows.leaves.submit(200, 0.01)
    site.wait_for(lambda: len(site.lines("leaf")) >= 60)
    worker.signal(signal.SIGKILL)
    site.worker("--concurrency", "2")
    once(site, run, 200)


def test_worker_stopped_past_its_lease_and_back(real: Real) -> None:
    site = real("--lease", "1s")
    frozen = site.worker("--concurrency", "2")
    run = flows.leaves.submit(100, 0.02)
    site.wait_for(lambda: len(site.lines("leaf")) >= 20)
    frozen.signal(signal.SIGSTOP)
    site.worker("--concurrency", "1")
    time.sleep(3)
    frozen.signal(signal.SIGCONT)
    once(site, run, 100)
    assert flows.leaves.submit(20, 0.0).result(30) == 190  # the one that came back works again


def test_one_process_killed_its_neighbours_pay_nothing(real: Real) -> None:
    site = real("--lease", "2s")
    site.worker("--concurrency", "2")
    calm = flows.leaves.submit(150, 0.02)
    with pytest.raises(ActionFailed):
        flows.kill_me.submit().result(60)  # three losses: quarantined
    assert site.lines("kill_me") == [["1"], ["2"], ["3"]]
    once(site, calm, 150)


def test_connections_cut(real: Real) -> None:
    site = real()
    proxy = Proxy(site.broker.port)
    site.worker("--concurrency", "2", url=f"dagorama://127.0.0.1:{proxy.port}")
    with Client(f"dagorama://127.0.0.1:{proxy.port}", token=site.broker.token):
        run = flows.leaves.submit(200, 0.01)
        for part in (30, 80, 130):
            site.wait_for(lambda part=part: len(site.lines("leaf")) >= part)  # type: ignore[misc]
            proxy.cut()
        once(site, run, 200, executions=0)  # sessions come back in time: nothing runs twice
        assert len({flows.add.submit(i, 2).id for i in range(5)}) == 5
    proxy.close()


def test_a_call_that_holds_the_gil_over_two_leases(real: Real) -> None:
    site = real("--lease", "1s")
    site.worker("--concurrency", "1")
    attempt, silence = flows.hold_gil.submit(3).result(60)
    assert attempt == 1 and silence > 2.5
    assert site.lines("hold") == [["1"]]


def test_drain_finishes_what_runs_and_gives_back_the_rest(real: Real) -> None:
    site = real()
    worker = site.worker("--concurrency", "2")
    run = flows.leaves.submit(40, 0.1)
    site.wait_for(lambda: len(site.lines("leaf")) >= 6)
    worker.process.send_signal(signal.SIGTERM)
    assert worker.process.wait(20) == 0
    site.worker("--concurrency", "2")
    once(site, run, 40, executions=0)


def test_supervisor_killed_takes_its_processes_along(real: Real) -> None:
    site = real("--lease", "2s")
    worker = site.worker("--concurrency", "2")
    run = flows.leaves.submit(60, 0.02)
    site.wait_for(lambda: len(site.lines("leaf")) >= 10)
    worker.process.kill()
    worker.process.wait()
    time.sleep(1)
    before = len(site.lines("leaf"))
    time.sleep(0.5)
    assert len(site.lines("leaf")) == before < 60
    site.worker("--concurrency", "2")
    once(site, run, 60)


def test_processes_do_not_outlive_their_supervisor_while_the_broker_is_away(real: Real) -> None:
    site = real()
    worker = site.worker("--concurrency", "2")
    assert flows.fan.submit(10).result(30) == 90
    group = worker.process.pid
    assert len(members(group)) == 3
    site.broker.kill()
    time.sleep(0.5)  # both are connecting again and again
    worker.process.kill()
    worker.process.wait()
    site.wait_for(lambda: not members(group), 5)
    site.broker.start()


def members(group: int) -> list[int]:
    """The living processes of a process group."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit():
                state, _, of = (entry / "stat").read_text().rpartition(") ")[2].split()[:3]
                if int(of) == group and state != "Z":
                    found.append(int(entry.name))
    return found


def test_slow_calls_are_shared_out_although_fast_ones_were_asked_for_in_hundreds(real: Real) -> None:
    site = real()
    site.worker("--concurrency", "1")
    assert flows.fan.submit(3000).result(60) == 3000 * 2999  # one worker learns that calls take microseconds
    run = flows.leaves.submit(8, 1.0)
    site.wait_for(lambda: len(site.lines("leaf")) == 1)
    site.worker("--concurrency", "3")
    once(site, run, 8, executions=0)
    assert len({line[3] for line in site.lines("leaf")}) > 1, "the leaves waited behind each other in one process"


class Proxy:
    """A TCP proxy whose connections can be cut."""

    def __init__(self, target: int) -> None:
        self.target = target
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.pairs: list[tuple[socket.socket, socket.socket]] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                inner, _ = self.listener.accept()
                outer = socket.create_connection(("127.0.0.1", self.target))
            except OSError:
                return
            self.pairs.append((inner, outer))
            for a, b in ((inner, outer), (outer, inner)):
                threading.Thread(target=self._pump, args=(a, b), daemon=True).start()

    @staticmethod
    def _pump(a: socket.socket, b: socket.socket) -> None:
        try:
            while data := a.recv(65536):
                b.sendall(data)
        except OSError:
            pass
        for sock in (a, b):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def cut(self) -> None:
        pairs, self.pairs = self.pairs, []
        for pair in pairs:
            for sock in pair:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
                sock.close()

    def close(self) -> None:
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        self.cut()
