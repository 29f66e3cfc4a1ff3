"""Fixtures: the fake broker, the real one, and workers for both."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).parent
ROOT = TESTS.parent.parent
SRC = TESTS.parent / "src"
sys.path.insert(0, str(TESTS))

from fake import FakeBroker  # noqa: E402

from dagorama import Client, Worker  # noqa: E402


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeBroker]:
    broker = FakeBroker()
    monkeypatch.setenv("DAGORAMA_URL", broker.url)
    monkeypatch.setenv("DAGORAMA_TOKEN", broker.token)
    yield broker
    broker.close()
    assert not [entry for entry in broker.log if entry[0] == "bug"]


@contextlib.contextmanager
def running(**options: Any) -> Iterator[Worker]:
    """A worker of the tests' actions, in threads of this process."""
    worker = Worker("flows", **{"isolation": "thread", "concurrency": 2, **options})
    thread = threading.Thread(target=worker.run)
    thread.start()
    try:
        yield worker
    finally:
        worker.stop(10)
        thread.join(20)
        assert not thread.is_alive()


@pytest.fixture
def client(fake: FakeBroker) -> Iterator[Client]:
    with Client(fake.url, token=fake.token) as client:
        yield client


@pytest.fixture
def flows(client: Client) -> Iterator[Any]:
    """The module of actions, with a worker in threads on the fake broker."""
    import flows

    with running():
        yield flows


# ---- the real binary -------------------------------------------------------------------------------------------------


def binary() -> str:
    named = os.environ.get("DAGORAMA_BIN")
    places = [Path(named)] if named else [ROOT / "target" / profile / "dagorama" for profile in ("release", "debug")]
    found = [place for place in places if place.exists()]
    if found:
        return str(max(found, key=lambda place: place.stat().st_mtime))
    pytest.fail(f"the broker binary is missing: build it with `cargo build`, or set DAGORAMA_BIN (looked at {places})")


class RealBroker:
    """The real binary on a free port, with a directory of its own. An early death fails the test; its log is kept."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.folder, self.options = folder, options
        self.port = 0
        self.token = "test-token"
        self.log = folder / "broker.log"
        self.url = ""
        self.start()

    def start(self) -> None:
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                [binary(), "serve", "--data-dir", str(self.folder / "data"), "--listen", f"127.0.0.1:{self.port}", "--ready-stdout",
                 *self.options],
                stdout=subprocess.PIPE, stderr=log,
                env={**os.environ, "DAGORAMA_TOKEN": self.token, "DAGORAMA_STATE_DIR": str(self.folder)})
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.process.wait(10)
            pytest.fail(f"the broker did not start: {self.log.read_text()}")
        self.url = json.loads(line)["native"]
        self.port = int(self.url.rpartition(":")[2])

    def kill(self) -> None:
        assert self.process.poll() is None, f"the broker died early: {self.log.read_text()}"
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()

    def restart(self) -> None:
        self.kill()
        self.start()


class RealWorker:
    """`python -m dagorama worker flows` as its own process group."""

    def __init__(self, url: str, token: str, journal: Path, *options: str, module: str = "flows") -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "dagorama", "worker", module, "--url", url, *options], cwd=TESTS, start_new_session=True,
            env={**os.environ, "PYTHONPATH": str(SRC), "DAGORAMA_TOKEN": token, "FLOWS_JOURNAL": str(journal)})

    def signal(self, number: int) -> None:
        os.killpg(self.process.pid, number)

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(20)
        with contextlib.suppress(OSError):
            self.signal(9)
        self.process.wait()


class Site:
    """A real broker with its client, its workers and their journal."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.broker = RealBroker(folder, *options)
        self.journal = folder / "journal"
        self.journal.touch()
        self.workers: list[RealWorker] = []
        self.client = Client(self.broker.url, token=self.broker.token)

    def worker(self, *options: str, url: str | None = None) -> RealWorker:
        worker = RealWorker(url or self.broker.url, self.broker.token, self.journal, *options)
        self.workers.append(worker)
        return worker

    def lines(self, word: str) -> list[list[str]]:
        return [line.split()[1:] for line in self.journal.read_text().splitlines() if line.split()[0] == word]

    def wait_for(self, fact: Callable[[], bool], seconds: float = 30) -> None:
        until = time.monotonic() + seconds
        while not fact():
            assert time.monotonic() < until, f"did not happen within {seconds} s; journal: {self.journal.read_text()[-2000:]}"
            time.sleep(0.01)

    def close(self) -> None:
        for worker in self.workers:
            worker.stop()
        self.client._channel.close()
        self.broker.kill()


@pytest.fixture
def real(tmp_path: Path) -> Iterator[Callable[..., Site]]:
    sites: list[Site] = []

    def start(*options: str) -> Site:
        site = Site(tmp_path, *options)
        sites.append(site)
        site.client.__enter__()
        return site

    yield start
    for site in sites:
        site.client.__exit__(None, None, None)
        site.close()
