"""Actions that the tests run, on the fake broker and on the real one. Bodies write to the journal named by FLOWS_JOURNAL."""

from __future__ import annotations

import asyncio
import ctypes
import os
import threading
import time
from dataclasses import dataclass, field
from typing import Any, TypeVar

from dagorama import Outcome, Retry, action, batch_action, current, outcome

T = TypeVar("T")


def journal(*words: object) -> None:
    """One line that survives a SIGKILL of this process."""
    path = os.environ.get("FLOWS_JOURNAL")
    if path:
        fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        os.write(fd, (" ".join(map(str, words)) + "\n").encode())
        os.close(fd)


@dataclass
class Point:
    x: int
    y: int
    tags: list[str] = field(default_factory=list)


@dataclass
class Box:
    label: str
    content: Any


class Oops(Exception):
    def __init__(self, code: int, detail: str) -> None:
        super().__init__(code, detail)
        self.code, self.detail = code, detail


class Stubborn(Exception):
    """Pickles, but cannot be unpickled."""

    def __init__(self, a: int, b: int) -> None:
        super().__init__("stubborn")


@action
def same(value: T) -> T:
    return value


@action
def add(a: int, b: int) -> int:
    return a + b


@action
def double(x: int) -> int:
    return x * 2


@action
def total(xs: list[int]) -> int:
    return sum(xs)


@action
def fan(n: int) -> int:
    return total([double(i) for i in range(n)])


@action
def spread(n: int) -> list[int]:
    return [double(i) for i in range(n)]


@action
def consume(parts: dict[str, Any]) -> int:
    return int(sum(parts["list"]) + parts["point"].x + parts["box"].content["deep"][0])


@action
def anywhere() -> int:
    return consume({"list": [double(1), double(2)], "point": make_point(3), "box": Box("b", {"deep": (double(4),)})})


@action
def make_point(x: int) -> Point:
    return Point(x, x + 1, ["t"])


@action
def structure(n: int) -> dict[str, Any]:
    return {"a": double(n), "b": [make_point(n), None, {"c": double(n + 1)}], "box": 7}


@action
def boxed(n: int) -> Box:
    return Box("l", [double(n), double(n)])


@action
def use_structure(value: dict[str, Any]) -> int:
    return int(value["a"] + value["b"][0].x + value["b"][2]["c"])


@action
def structured(n: int) -> int:
    return use_structure(structure(n))


@action
def nest(depth: int) -> list[Any]:
    return [] if depth == 0 else [nest(depth - 1)]


@action
def down(n: int) -> int:
    return 0 if n == 0 else down(n - 1)


@action
def mapped(n: int) -> int:
    return total(double.map(spread(n)))


@action
def star(n: int) -> int:
    return total(add.starmap(pairs(n)))


@action
def pairs(n: int) -> list[tuple[int, int]]:
    return [(i, 10) for i in range(n)]


@action
async def nap(x: int) -> int:
    await asyncio.sleep(0.001)
    return x + 1


@action
async def aflow(n: int) -> int:
    await asyncio.sleep(0)
    return total([nap(i) for i in range(n)])


@batch_action(max_size=8, max_wait=0.02)
def squares(xs: list[int]) -> list[int]:
    journal("bundle", len(xs))
    return [ValueError(f"{x} is bad") if x < 0 else x * x for x in xs]  # type: ignore[misc]


@batch_action(max_size=8)
async def asquares(xs: list[int]) -> list[int]:
    return [x * x for x in xs]


@action
def batched(n: int) -> int:
    return total([squares(i) for i in range(n)] + [asquares(i) for i in range(n)])


@action
def batch_bad() -> list[Any]:
    return [judge(outcome(squares(x))) for x in (2, -3, 4)]


@action
def fail(text: str) -> int:
    raise ValueError(text)


@action
async def afail(text: str) -> int:
    raise ValueError(text)


@batch_action(max_size=4)
def fail_batch(texts: list[str]) -> list[int]:
    raise ValueError(texts[0])


@batch_action(max_size=4)
def fail_one(texts: list[str]) -> list[int]:
    return [ValueError(text) for text in texts]  # type: ignore[misc]


@action(timeout=30)
def fail_timed(text: str) -> int:
    raise ValueError(text)


@action
def fail_with_cause() -> int:
    try:
        raise KeyError("inner")
    except KeyError as error:
        raise Oops(7, "outer") from error


@action
def fail_stubborn() -> int:
    raise Stubborn(1, 2)


@action
def fail_hard() -> int:
    raise SystemExit("no")


@action
def chain_of_failure() -> int:
    return add(1, add(2, fail("deep")))


@action
def judge(x: Outcome[Any]) -> str:
    return f"ok {x.value}" if x.ok else f"failed {type(x.error.__cause__).__name__ if x.error else ''}"


@action
def judged() -> list[str]:
    return [judge(outcome(double(4))), judge(outcome(fail("x"))), judge(outcome(add(1, fail("y"))))]


@action
def ordered() -> str:
    first = append("a")
    return append.options(after=[append.options(after=[first])("b")])("c")


@action
def append(letter: str) -> str:
    journal("append", letter)
    return letter


@action
def delayed() -> float:
    return since.options(delay=0.2)(time.time())


@action
def since(then: float) -> float:
    return time.time() - then


_failures: dict[str, int] = {}


@action(retry=Retry(3, delay=0.01, jitter=0))
def flaky(name: str, until: int) -> int:
    journal("flaky", name, current().attempt)
    if current().attempt < until:
        raise OSError("again")
    return current().attempt


@action
def flaky_never() -> int:
    return flaky.options(retry=Retry(5, delay=0.01, never=(OSError,)))("never", 4)


@action
def flushed(n: int) -> int:
    xs = []
    for i in range(n):
        xs.append(double(i))
        if i % 3 == 2:
            current().flush()
    return total(xs)


@action(timeout=0.5, retry=Retry(2, delay=0.01, jitter=0))
def too_long(name: str) -> str:
    journal("too_long", name, current().attempt)
    if current().attempt == 1:
        while True:
            pass
    return f"attempt {current().attempt}"


@action(timeout=5)
def in_time() -> int:
    time.sleep(0.5)
    return current().attempt


@action
def wait_for_cancel() -> int:
    journal("waiting")
    for _ in range(2000):
        if current().cancelled():
            journal("cancelled")
            current().check()
        time.sleep(0.005)
    return 1


@action
def kill_me() -> int:
    journal("kill_me", current().attempt)
    os._exit(9)


@action
def whoami() -> list[Any]:
    c = current()
    c.log.info("here")
    return [c.run_id, c.node_id, c.attempt, c.idempotency_key, c.deadline]


@action
def unpicklable_result() -> Any:
    return {"a": [1, threading.Lock()]}


@action
def unpicklable_argument() -> Any:
    return same({"a": [1, Box("b", threading.Lock())]})


@action
def early() -> int:
    x = double(1)
    return x + 1


@action
def takes_action(fn: Any, x: int) -> int:
    return int(fn(x)) if not isinstance(fn, type(double)) else fn(x)


@action
def gives_action(x: int) -> int:
    return takes_action(double, x)


class Scaler:
    def __init__(self, factor: int) -> None:
        self.factor = factor

    @action
    def scale(self, x: int) -> int:
        return self.factor * x

    @action
    def many(self, n: int) -> int:
        return total([self.scale(i) for i in range(n)])


@action
def leaf(run: int, i: int, pause: float) -> int:
    """A leaf whose every execution is in the journal."""
    c = current()
    journal("leaf", c.node_id, c.attempt, i, os.getpid())
    if pause:
        time.sleep(pause)
    return i


@action
def leaves(n: int, pause: float) -> int:
    return total([leaf(0, i, pause) for i in range(n)])


@action
def big(n: int) -> bytes:
    return b"x" * n


@action
def size(value: bytes) -> int:
    return len(value)


@action
def big_between(n: int) -> int:
    return size(big(n))


@action
def hold_gil(seconds: int) -> tuple[int, float]:
    """One C call that lets no other thread run: the attempt, and the longest silence that another thread saw."""
    journal("hold", current().attempt)
    gaps: list[float] = []
    done = threading.Event()

    def tick() -> None:
        last = time.monotonic()
        while not done.wait(0.01):
            gaps.append(time.monotonic() - last)
            last = time.monotonic()

    thread = threading.Thread(target=tick)
    thread.start()
    time.sleep(0.05)
    ctypes.PyDLL(None).sleep(seconds)  # a PyDLL keeps the GIL
    time.sleep(0.05)
    done.set()
    thread.join()
    return current().attempt, max(gaps)
