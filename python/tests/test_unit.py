"""Pieces without a broker: promises, payloads, numbers of references, exceptions, settings."""

from __future__ import annotations

import copy
import json
import math
import operator
import os
import pickle
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flows
import pytest
from fake import FakeBroker

import dagorama
from dagorama import ActionFailed, DagoramaError, EarlyUse, NotSerialisable, Outcome, Retry, action, batch_action, current, outcome
from dagorama import _wire as w
from dagorama._action import SPECS
from dagorama._connection import Address
from dagorama._current import RUNNING, Attempt
from dagorama._exceptions import describe, rebuild
from dagorama._executor import Executor, Slot
from dagorama._main import module_name
from dagorama._msgpack import unpack
from dagorama._payload import decode, decode_arguments, encode_result, read_values

TESTS = Path(__file__).parent


class Recorder:
    """The worker that an attempt believes it has."""

    def __init__(self) -> None:
        self.created: list[tuple[int, int]] = []

    def revoked(self, run: int, node: int, attempt: int) -> bool:
        return False

    def create(self, run: int, node: int, attempt: int, token: bytes, first_child: int, count: int, nodes: bytes) -> int:
        self.created.append((first_child, count))
        return 100 + first_child


class Recording:
    """Inside: a running attempt. ``nodes`` are what it recorded since the last flush."""

    def __enter__(self) -> Recording:
        self.link = Recorder()
        self.attempt = Attempt(self.link, 1, 2, 0, 1, b"t" * 16, "tests.parent")
        RUNNING.set(self.attempt)
        return self

    def __exit__(self, *_: object) -> None:
        RUNNING.set(None)

    def nodes(self) -> list[tuple[dict[str, Any], list[tuple[int, int, int]], bytes, int, int]]:
        out = []
        for node in self.attempt.pending:
            spec, _, how, _, n_ranges, length, when = w.NODE.unpack_from(node)
            at = w.NODE.size
            ranges = [w.RANGE.unpack_from(node, at + 12 * i) for i in range(n_ranges)]
            body = node[at + 12 * n_ranges :]
            assert len(body) == length
            out.append((json.loads(SPECS[spec]), ranges, body, how, when))
        return out


# ---- promises --------------------------------------------------------------------------------------------------------

USES: dict[str, Callable[[Any], Any]] = {
    "bool": bool, "if": lambda p: 1 if p else 2, "not": operator.not_, "and": lambda p: p and 1, "==": lambda p: p == 1,
    "!=": lambda p: p != 1, "<": lambda p: p < 1, "<=": lambda p: p <= 1, ">": lambda p: p > 1, ">=": lambda p: p >= 1,
    "reflected <": lambda p: p > 1, "in": lambda p: 1 in p, "is in": lambda p: p in [1], "iter": list, "for": lambda p: [x + 1 for x in p],
    "unpack": lambda p: (lambda a, b: a)(*p), "star star": lambda p: dict(**p), "len": len, "next": next, "reversed": reversed,
    "sorted": sorted, "sum": sum, "max": max, "zip": lambda p: list(zip(p, p, strict=True)), "+": lambda p: p + 1,
    "r+": lambda p: 1 + p, "-": lambda p: p - 1, "*": lambda p: p * 2, "r*": lambda p: "a" * p, "/": lambda p: p / 2, "//": lambda p: p // 2,
    "%": lambda p: p % 2, "% text": lambda p: "%s" % p, "**": lambda p: p**2, "@": lambda p: p @ p, "<<": lambda p: p << 1,
    "&": lambda p: p & 1, "|": lambda p: p | {}, "^": lambda p: p ^ 1, "~": lambda p: ~p, "neg": lambda p: -p, "abs": abs, "round": round,
    "int": int, "float": float, "complex": complex, "index": operator.index, "range": range, "math": math.floor, "divmod": lambda p: divmod(p, 2),
    "str": str, "format": lambda p: f"{p}", "bytes": bytes, "print": lambda p: print(p), "open": open, "attribute": lambda p: p.name,
    "method": lambda p: p.upper(), "hasattr": lambda p: hasattr(p, "x"), "getattr default": lambda p: getattr(p, "x", None),
    "item": lambda p: p[0], "slice": lambda p: p[1:], "call": lambda p: p(), "set item": lambda p: operator.setitem(p, 0, 1),
    "set attribute": lambda p: setattr(p, "x", 1), "del item": lambda p: operator.delitem(p, 0), "hash": hash, "in set": lambda p: {p},
    "dict key": lambda p: {p: 1}, "with": lambda p: p.__enter__(), "await": lambda p: p.__await__(), "own pickle": pickle.dumps,
    "+=": lambda p: setattr([p], "x", p.__iadd__(1)), "list +": lambda p: [1] + p,
}


@pytest.mark.parametrize("use", USES)
def test_early_use(use: str) -> None:
    with Recording():
        promise = flows.double(1)
        with pytest.raises(EarlyUse, match=r"flows\.double\(\.\.\.\) is not known yet") as caught:
            USES[use](promise)
    assert isinstance(caught.value, TypeError) and caught.value.code == "EARLY_USE"
    if use != "own pickle":
        assert "return use(double(...))" in str(caught.value)


def test_what_a_promise_allows() -> None:
    with Recording():
        promise: Any = flows.double(1)
        assert repr(promise) == "<promise of flows.double>"
        assert copy.deepcopy([promise])[0] is promise and copy.copy(promise) is promise
        with pytest.raises(TypeError, match="can only join an iterable"):  # CPython puts its own text over any TypeError here
            "".join(promise)
        assert promise is not None and not isinstance(promise, int)  # cannot be caught: documented
    assert "isinstance" in (EarlyUse.__doc__ or "") and "isinstance" in (dagorama.__doc__ or "")


def test_outcome_is_closed_until_it_is_known() -> None:
    with Recording():
        closed = outcome(flows.double(1))
        for use in (lambda: closed.ok, lambda: closed.value, lambda: closed.error):
            with pytest.raises(EarlyUse):
                use()
    known = outcome(3)
    assert known.ok and known.value == 3 and known.error is None
    with pytest.raises(EarlyUse, match=r"\.ok"):
        bool(known)
    failed: Outcome[int] = Outcome(error=ActionFailed("x"))
    assert not failed.ok
    with pytest.raises(ActionFailed):
        _ = failed.value


def test_a_promise_of_another_attempt_is_refused() -> None:
    with Recording():
        stray: Any = flows.double(1)
    with Recording(), pytest.raises(EarlyUse, match="another attempt"):
        flows.total([stray])
    with pytest.raises(EarlyUse, match="running action"):
        flows.total.submit([stray])


def test_code_left_running_cannot_record() -> None:
    with Recording() as r:
        r.attempt.open = False
        with pytest.raises(DagoramaError, match="has ended"):
            flows.double(1)


# ---- recording -------------------------------------------------------------------------------------------------------

NEW = w.NEW


def test_neighbours_become_one_range() -> None:
    with Recording() as r:
        xs = [flows.double(i) for i in range(5)]
        flows.total(xs)
        flows.total([xs[3], xs[4], xs[0], xs[3]])
        flows.judge(outcome(xs[2]))
        flows.same({"a": xs[1], "b": (outcome(xs[1]), xs[2])})
        flows.append.options(after=[xs[0], xs[1], "not a promise"])("a")
        nodes = [ranges for _, ranges, _, _, _ in r.nodes()]
    assert nodes[:5] == [[]] * 5
    assert nodes[5] == [(0, 5, NEW)]
    assert nodes[6] == [(3, 2, NEW), (0, 1, NEW)]
    assert nodes[7] == [(2, 1, NEW | 1)]
    assert nodes[8] == [(1, 1, NEW), (1, 1, NEW | 1), (2, 1, NEW)]
    assert nodes[9] == [(0, 2, NEW | 2)]


def test_arguments_refer_by_number() -> None:
    with Recording() as r:
        a, b = flows.double(1), flows.double(2)
        flows.same([b, {"k": flows.Box("l", (a, outcome(b)))}, b])
        body = r.nodes()[2][2]
    args, kwargs = decode_arguments(w.PICKLE, body, ["B", "A", Outcome("O")])
    (value,) = args
    assert value[0] == "B" == value[2] and value[1]["k"].content[0] == "A" and value[1]["k"].content[1].value == "O" and kwargs == {}


def test_flushed_children_are_nodes_of_the_run() -> None:
    with Recording() as r:
        xs = [flows.double(i) for i in range(4)]
        current().flush()
        current().flush()  # nothing new: no request
        xs += [flows.double(i) for i in range(2)]
        flows.total(xs)
        assert r.link.created == [(0, 4)]
        assert r.nodes()[2][1] == [(100, 4, 0), (0, 2, NEW)]
        current().flush()
        flows.total(xs[3:5])
        assert r.link.created == [(0, 4), (4, 3)]
        assert r.nodes()[0][1] == [(103, 2, 0)]


def test_arguments_are_a_snapshot() -> None:
    with Recording() as r:
        xs = [1]
        flows.total(xs)
        xs.append(2)
        assert decode_arguments(w.PICKLE, r.nodes()[0][2], None) == (([1],), {})


def test_too_many_children_name_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dagorama._current.MAX_CHILDREN", 3)
    with Recording():
        for i in range(3):
            flows.double(i)
        with pytest.raises(DagoramaError, match=r"flush\(\).*GRAPH_TOO_LARGE"):
            flows.double(3)
        current().flush()
        flows.double(4)


def test_settings_on_the_wire() -> None:
    @action(name="n", queue="q", taint="gpu", priority=3, retry=Retry(4, delay=0.5, losses=2), timeout=1.5, version="v", pin_code=True)
    def f(x: int) -> int:
        return x

    @batch_action(name="b", max_size=5, max_wait=0.1)
    def g(xs: list[int]) -> list[int]:
        return xs

    with Recording() as r:
        f(1)
        g(1)
        f.options(queue="other", delay=2.5)(1)
        first, second, third = r.nodes()
    assert {k: first[0][k] for k in ("action", "queue", "taint", "priority", "timeout_ms", "fingerprint", "pin_code", "batch")} == {
        "action": "n", "queue": "q", "taint": "gpu", "priority": 3, "timeout_ms": 1500, "fingerprint": "v", "pin_code": True, "batch": None}
    assert first[0]["retry"] == {"max_attempts": 4, "max_losses": 2, "delay_ms": 500, "factor_milli": 2000, "max_delay_ms": 300000,
                                 "jitter_milli": 100}
    assert second[0]["batch"] == {"max_size": 5, "max_wait_ms": 100} and len(second[0]["fingerprint"]) == 16
    assert (third[0]["queue"], third[3], third[4]) == ("other", 1, 2500)


anything: Any = flows  # the type checkers would refuse these calls


@pytest.mark.parametrize("call", [
    lambda: anything.add(1), lambda: anything.add(1, 2, 3), lambda: anything.add(1, c=2), lambda: anything.squares(1, 2),
    lambda: anything.squares(x=1), lambda: flows.add.options(key="k")(1, 2), lambda: flows.add.options(tags={"a": "b"})(1, 2)])
def test_wrong_calls_fail_at_the_call(call: Callable[[], Any]) -> None:
    with Recording() as r:
        with pytest.raises(TypeError):
            call()
        assert r.attempt.count == 0


def test_outside_an_action_a_call_is_a_call() -> None:
    assert flows.add(1, 2) == 3 and flows.nap(1) == 2 and flows.squares(3) == 9 and flows.asquares(3) == 9
    assert flows.fan(3) == 6 and flows.mapped(3) == 12 and flows.Scaler(2).many(3) == 6
    with pytest.raises(ValueError, match="bad"):
        flows.squares(-1)
    with pytest.raises(LookupError):
        current()
    with Recording() as r:
        assert flows.add.local(1, 2) == 3 and r.attempt.count == 0


def test_a_batch_action_cannot_record() -> None:
    with Recording() as r:
        r.attempt.bundle = True
        with pytest.raises(DagoramaError, match="several nodes at once"):
            flows.double(1)


# ---- payloads --------------------------------------------------------------------------------------------------------

shared: list[int] = [1]
cyclic: list[Any] = []
cyclic.append(cyclic)
deep: Any = []
for _ in range(200):
    deep = [deep]
NAN = float("nan")


@pytest.mark.parametrize("codec, value", [
    (w.JSON, None), (w.JSON, True), (w.JSON, 0), (w.JSON, -(2**63)), (w.JSON, 2**63 - 1), (w.PICKLE, 2**63), (w.JSON, 1e308), (w.JSON, -0.0),
    (w.JSON, 1e16), (w.PICKLE, math.inf), (w.JSON, ""), (w.JSON, "a\"\\\n\x00ä\u2028😀"), (w.PICKLE, "\ud800"), (w.RAW, b""), (w.RAW, b"\xff"),
    (w.PICKLE, bytearray(b"a")), (w.JSON, []), (w.JSON, {}), (w.JSON, [1, "a", None, [2.5, {"k": []}]]), (w.PICKLE, [1, (2,)]),
    (w.PICKLE, (1, 2)), (w.PICKLE, {1: 2}), (w.PICKLE, {"a": {None: 1}}), (w.PICKLE, [2**70]), (w.PICKLE, [1, 2**70, "a"]), (w.PICKLE, [math.inf]),
    (w.PICKLE, ["\ud800"]), (w.PICKLE, {"\ud800": 1}), (w.PICKLE, [shared, shared]), (w.PICKLE, deep), (w.PICKLE, {"$dagorama": 1}),
    (w.PICKLE, {1, 2}), (w.PICKLE, flows.Point(1, 2)), (w.PICKLE, [flows.Point(1, 2)]), (w.PICKLE, [b"x"]), (w.PICKLE, "x" * (1 << 20)),
])
def test_json_when_it_loses_nothing_else_pickle(codec: int, value: Any) -> None:
    with Recording() as r:
        end, got, n_ranges, _, body = encode_result(value, r.attempt, "f")
    assert (end, got, n_ranges) == (w.VALUE, codec, 0)
    back = decode(got, body)
    assert back == value and type(back) is type(value) and repr(back) == repr(value)
    assert decode(got, memoryview(body)) == value


def test_cycles_and_nan() -> None:
    with Recording() as r:
        _, codec, _, _, body = encode_result(cyclic, r.attempt, "f")
        back = decode(codec, body)
        assert codec == w.PICKLE and back[0] is back
        _, codec, _, _, body = encode_result([NAN], r.attempt, "f")
        assert codec == w.PICKLE and math.isnan(decode(codec, body)[0])


def test_results_with_promises() -> None:
    with Recording() as r:
        a, b = flows.double(1), flows.double(2)
        assert encode_result(b, r.attempt, "f")[0] == w.TAIL and encode_result(b, r.attempt, "f")[3] == w.RANGE.pack(1, 1, NEW)
        end, codec, n, ranges, body = encode_result({"x": [a, b], "y": [b, 5]}, r.attempt, "f")
        assert (end, codec, n, ranges) == (w.STRUCTURE, w.JSON, 1, w.RANGE.pack(0, 2, NEW))
        assert json.loads(body) == {"x": [{"$dagorama": 0}, {"$dagorama": 1}], "y": [{"$dagorama": 1}, 5]}
        assert decode(codec, body, [None, False]) == {"x": [None, False], "y": [False, 5]}
        end, codec, n, ranges, body = encode_result(flows.Box("l", (b, a)), r.attempt, "f")
        assert (end, codec, n) == (w.STRUCTURE, w.PICKLE, 2)
        assert decode(codec, body, [0, ""]) == flows.Box("l", (0, ""))
        with pytest.raises(NotSerialisable, match="outcome"):
            encode_result([outcome(a)], r.attempt, "f")


def item(node: int, body: bytes, refs: list[tuple[int, int]] | None = None, codec: int = w.JSON, state: int = 5) -> w.Item:
    return node, state, codec, tuple(refs or ()), body


def test_structures_of_any_depth_are_read_level_by_level() -> None:
    n = 20_000
    nodes = {i: item(i, b'[{"$dagorama":0}]', [(i + 1, 1)]) for i in range(n)} | {n: item(n, b"null")}
    asked = []

    def fetch(ranges: list[tuple[int, int]]) -> list[w.Item]:
        asked.append(ranges)
        return [nodes[i] for first, count in ranges for i in range(first, first + count)]

    (value,) = read_values([nodes[0]], fetch, lambda _: AssertionError())
    depth = 0
    while value is not None:
        (value,), depth = value, depth + 1
    assert depth == n == len(asked)


def test_a_shared_part_is_fetched_once() -> None:
    nodes = {1: item(1, b'[{"$dagorama":0},{"$dagorama":1}]', [(2, 2)]), 2: item(2, b'{"a":{"$dagorama":0}}', [(3, 1)]), 3: item(3, b"[7]")}
    asked = []

    def fetch(ranges: list[tuple[int, int]]) -> list[w.Item]:
        asked.append(ranges)
        return [nodes[i] for first, count in ranges for i in range(first, first + count)]

    assert read_values([nodes[1]], fetch, lambda _: AssertionError()) == [[{"a": [7]}, [7]]]
    assert asked == [[(2, 2)]]


@pytest.mark.parametrize("hexes, value", [
    ("c0", None), ("c3", True), ("05", 5), ("ff", -1), ("cd0100", 256), ("d1ff00", -256), ("cb3ff8000000000000", 1.5), ("a161", "a"),
    ("c40161", b"a"), ("93010203", [1, 2, 3]), ("81a16191c2", {"a": [False]}), ("d90161", "a"), ("dc000101", [1]), ("de0001a16101", {"a": 1}),
    ("cf8000000000000000", 2**63)])
def test_msgpack(hexes: str, value: Any) -> None:
    assert unpack(bytes.fromhex(hexes)) == value


@pytest.mark.parametrize("hexes", ["", "c1", "a2", "cd01", "dcffff", "0505", "91", "dd7fffffff01", "91" * 200, "a1ff"])
def test_msgpack_refuses(hexes: str) -> None:
    with pytest.raises(ValueError):
        unpack(bytes.fromhex(hexes))


def test_arguments_of_every_codec() -> None:
    assert decode_arguments(w.JSON, b'{"args":[1,{"$dagorama":0}],"kwargs":{"a":2}}', ["v"]) == ((1, "v"), {"a": 2})
    assert decode_arguments(w.RAW, b"\x00", None) == ((b"\x00",), {})
    assert decode_arguments(w.MSGPACK, bytes.fromhex("82a461726773910aa66b776172677380"), None) == ((10,), {})


def test_not_serialisable_names_argument_and_path() -> None:
    lock = threading.Lock()
    with Recording() as r:
        for value, path in [(lock, "value"), ([0, {"k": (1, lock)}], r"value\[1\]\['k'\]\[1\]"), (flows.Box("b", [lock]), r"value\.content\[0\]"),
                            (lambda: 1, "value")]:
            with pytest.raises(NotSerialisable, match=f"argument 'value' of flows.same cannot be stored: {path} is a "):
                flows.same(value)
            with pytest.raises(NotSerialisable, match="the result of f cannot be stored: result"):
                encode_result(value, r.attempt, "f")
        with pytest.raises(NotSerialisable, match="argument 'b'"):
            flows.add(1, b=lock)  # type: ignore[arg-type]
        assert r.attempt.count == 0
        flows.same([1])  # the pickler is as good as new
        assert decode_arguments(w.PICKLE, r.nodes()[0][2], None) == (([1],), {})


def test_too_large_is_said_before_it_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dagorama._payload.MAX_PAYLOAD", 1000)
    with Recording() as r:
        for value in (b"x" * 1001, "x" * (1 << 20), ["x" * 2000], (b"x" * 2000,)):
            with pytest.raises(DagoramaError, match="PAYLOAD_TOO_LARGE"):
                encode_result(value, r.attempt, "f")
        with pytest.raises(DagoramaError, match=r"arguments of flows.same.*PAYLOAD_TOO_LARGE"):
            flows.same(["x" * 2000])


def test_an_action_inside_reduce_does_not_spoil_the_pickler() -> None:
    class Calls:
        def __reduce__(self) -> Any:
            flows.total([flows.double(1)])
            return (int, (5,))

    with Recording() as r:
        x = flows.double(0)
        flows.same([x, Calls(), x])
        assert decode_arguments(w.PICKLE, r.nodes()[-1][2], ["X"]) == ((["X", 5, "X"],), {})


def test_large_values_are_not_copied_without_end() -> None:
    body = pickle.dumps(b"x" * (8 << 20), 5)
    tracemalloc.start()
    assert len(decode(w.PICKLE, memoryview(body))) == 8 << 20
    assert tracemalloc.get_traced_memory()[1] < 20 << 20
    tracemalloc.stop()


# ---- exceptions, names, addresses ----------------------------------------------------------------------------------------


def raised(error: BaseException) -> BaseException:
    try:
        raise error
    except BaseException as caught:
        return caught


class Local(Exception):
    pass


def test_exceptions_are_rebuilt_or_described() -> None:
    inner = raised(KeyError("k"))
    outer = raised(flows.Oops(1, "d"))
    outer.__cause__ = inner
    body = describe(outer, "a.b", "1-0/3", 2)
    got = rebuild((3, w.NODE_FAILED, w.JSON, (), body), "1-0")
    assert isinstance(got, ActionFailed)
    assert (got.action, got.node_id, got.attempts) == ("a.b", "1-0/3", 2) and "KeyError" in got.remote_traceback
    assert type(got.__cause__) is flows.Oops and type(got.__cause__.__cause__) is KeyError
    got = rebuild((3, w.NODE_FAILED, w.JSON, (), describe(raised(flows.Stubborn(1, 2)), "a", "n", 1)), "1-0")
    assert got.__cause__ is None and "stubborn" in str(got)

    class Hidden(Exception):
        def __str__(self) -> str:
            raise RuntimeError("no text")

    assert "Hidden" in str(rebuild((3, w.NODE_FAILED, w.JSON, (), describe(raised(Hidden()), "a", "n", 1)), "1-0"))


@pytest.mark.parametrize("body", [b"", b"{}", b"not json", b'{"pickle":"AAAA","type":"X","message":"m"}', b'{"type":"dagorama.Quarantined","message":"m"}'])
def test_errors_of_others_are_read(body: bytes) -> None:
    got = rebuild((3, w.NODE_FAILED, w.JSON, (), body), "1-0")
    assert isinstance(got, ActionFailed) and got.node_id == "1-0/3" and got.__cause__ is None
    assert type(rebuild((3, w.NODE_CANCELLED, w.JSON, (), b""), "1-0")) is dagorama.Cancelled


def test_failures_survive_pickling() -> None:
    error = ActionFailed("text", code="X")
    error.action = "a"
    back = pickle.loads(pickle.dumps(error))
    assert (str(back), back.code, back.action) == ("text", "X", "a")


@pytest.mark.parametrize("url, good", [
    ("dagorama://127.0.0.1:7373", True), ("dagorama://[::1]:7373", True), ("dagorama+unix:///tmp/x.sock", True), ("dagorama://host", False),
    ("http://127.0.0.1:7373", False), ("127.0.0.1:7373", False), ("dagorama+unix://x.sock", False)])
def test_urls(url: str, good: bool) -> None:
    if good:
        Address(url)
    else:
        with pytest.raises(DagoramaError, match="not a URL"):
            Address(url)


def test_token_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broker = FakeBroker("from-file")
    port = broker.url.rpartition(":")[2]
    (tmp_path / f"127.0.0.1-{port}.token").write_text("from-file\n")
    monkeypatch.delenv("DAGORAMA_TOKEN", raising=False)
    monkeypatch.setenv("DAGORAMA_STATE_DIR", str(tmp_path))
    with dagorama.Client(broker.url.replace("127.0.0.1", "localhost")) as client:
        client.emit("x")
    broker.close()


def test_public_names_are_honest() -> None:
    for name in dagorama.__all__:
        assert getattr(getattr(dagorama, name), "__module__", "dagorama") in ("dagorama", "typing"), name
    assert flows.Scaler.scale.name == "flows.Scaler.scale" and flows.leaf.__doc__ == "A leaf whose every execution is in the journal."


APP = '''
import sys
from dataclasses import dataclass
from dagorama import action

@dataclass
class Pair:
    a: int
    b: int

class AppError(Exception):
    pass

@action
def make(a: int) -> Pair:
    return swap(Pair(a, 2), Pair)

@action
def swap(p: Pair, cls: type) -> Pair:
    assert type(p) is cls
    return cls(p.b, p.a)

@action
def broken() -> int:
    raise AppError("x")

if __name__ == "__main__":
    print(make.name, make._mark())
    got = make.submit(1).result(10)
    assert type(got) is Pair, type(got)
    try:
        broken.submit().result(10)
    except Exception as error:
        assert type(error.__cause__) is AppError, error
    print(got)
'''


def test_main_and_worker_agree_on_names(tmp_path: Path, fake: FakeBroker) -> None:
    (tmp_path / "app.py").write_text(APP)
    path = {"PYTHONPATH": str(TESTS.parent / "src"), "DAGORAMA_URL": fake.url, "DAGORAMA_TOKEN": fake.token, "PATH": "/usr/bin:/bin"}
    worker = subprocess.Popen([sys.executable, "-m", "dagorama", "worker", "app", "--concurrency", "1"], cwd=tmp_path, env=path)
    try:
        done = subprocess.run([sys.executable, "app.py"], cwd=tmp_path, env=path, capture_output=True, text=True, timeout=30)
    finally:
        worker.terminate()
        assert worker.wait(20) == 0
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("app.make ") and done.stdout.endswith("Pair(a=2, b=1)\n")
    mark = done.stdout.split()[1]
    hello = [entry[1] for entry in fake.log if entry[0] == "hello" and entry[1].get("actions")]
    assert {spec["action"]: spec["fingerprint"] for spec in hello[0]["actions"]}["app.make"] == mark


@pytest.mark.parametrize("args, code, text", [
    (["worker"], 2, "MODULE"), (["worker", "no_such_module"], 2, "no_such_module"), (["worker", "flows", "--concurrency", "0"], 2, "at least 1"),
    (["worker", "flows", "--url", "http://x"], 2, "not a URL")])
def test_command_line_says_what_is_wrong(fake: FakeBroker, args: list[str], code: int, text: str) -> None:
    env = {"PYTHONPATH": str(TESTS.parent / "src"), "DAGORAMA_URL": fake.url, "DAGORAMA_TOKEN": fake.token, "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-m", "dagorama", *args], cwd=TESTS, env=env, capture_output=True, text=True, timeout=30)
    assert done.returncode == code and text in done.stderr, done


def test_a_lease_that_was_given_back_at_the_greeting_is_not_run_when_it_arrives() -> None:
    executor = Executor(Address("dagorama://127.0.0.1:1"), "t", ["default"], [], Slot(bytearray(Slot.SIZE)))

    def leases(*named: tuple[int, int, int]) -> bytes:
        each = [w.LEASE.pack(1, 2, node, attempt, b"t" * 16, 7, batch, w.PICKLE, 0, 0, 0, 0, 0) for node, attempt, batch in named]
        return w.U32.pack(len(each)) + b"".join(each)

    executor._given_back = {(1, 4, 1), (1, 5, 1)}
    executor._on_leases(leases((3, 1, 0), (4, 1, 0), (4, 2, 0), (5, 1, 9), (6, 1, 9)))
    queued = [[lease[3:5] for lease in (entry if isinstance(entry, list) else [entry])] for entry in executor._queue]
    executor._wake.close()
    executor._waker.close()
    assert queued == [[(3, 1)], [(4, 2)], [(6, 1)]]


# ---- the command line of the worker ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given, expected", [
    ("my_module", "my_module"), ("pkg.mod", "pkg.mod"), ("my_module.py", "my_module"), ("./my_module.py", "my_module"),
    ("./my_module", "my_module"), ("pkg/mod.py", "pkg.mod"), ("pkg/mod", "pkg.mod"), ("pkg/__init__.py", "pkg"), ("pkg//mod.py", "pkg.mod"),
    (os.path.join(os.getcwd(), "pkg", "mod.py"), "pkg.mod"),
    ("../other.py", None), ("/nowhere/other.py", None), ("a-b", None), ("a-b.py", None), ("", None), (".", None), ("./", None),
    ("a..b", None), (".py", None)])
def test_names_of_modules(given: str, expected: str | None) -> None:
    if expected is not None:
        assert module_name(given) == expected
        return
    with pytest.raises(ValueError, match="is not a module: write it as in `import my_module`"):
        module_name(given)


PROGRAM = """
from dagorama import DagoramaError, action

@action
def double(x: int) -> int:
    return 2 * x

@action(name="elsewhere.double")
def named(x: int) -> int: ...

print(double(2))
for each in (double, named):
    try:
        each.submit(1)
    except DagoramaError as error:
        print(each.name, error.code)
"""


@pytest.mark.parametrize("how, name, code", [
    ("stdin", "__main__.double", "NOT_IMPORTABLE"), ("-c", "__main__.double", "NOT_IMPORTABLE"), ("script", "__main__.double", "NOT_IMPORTABLE"),
    ("script.py", "script.double", "BROKER_UNAVAILABLE"), ("-m", "script.double", "BROKER_UNAVAILABLE")])
def test_actions_that_no_worker_can_import_are_refused_when_submitted(tmp_path: Path, how: str, name: str, code: str) -> None:
    for file in ("script", "script.py"):
        (tmp_path / file).write_text(PROGRAM)
    words = {"stdin": ["-"], "-c": ["-c", PROGRAM], "-m": ["-m", "script"]}.get(how, [how])
    done = subprocess.run([sys.executable, *words], input=PROGRAM if how == "stdin" else "", cwd=tmp_path, text=True, capture_output=True,
                          timeout=60, env={**os.environ, "PYTHONPATH": str(TESTS.parent / "src"), "DAGORAMA_URL": "dagorama://127.0.0.1:1"})
    assert done.stdout.splitlines() == ["4", f"{name} {code}", "elsewhere.double BROKER_UNAVAILABLE"], done.stderr
