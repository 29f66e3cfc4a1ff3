"""Flows through the real client and worker code, over sockets, on the fake broker."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import SRC, TESTS, running
from fake import FakeBroker
from flows import Oops

from dagorama import ActionFailed, BrokerUnavailable, Cancelled, Client, DagoramaError, EarlyUse, NotSerialisable, Run


@pytest.mark.parametrize("value", [
    0, 1, -1, 2**63, -(2**63), 2**200, 0.0, 1.5, float("inf"), "", "ä\n\"", "\ud800", b"", b"\0x", None, True, False, [], {}, (), set(),
    [0, None, False, ""], {"a": [1, {"b": 2.5}]}, {1: 2}, (1, 2), {"$dagorama": 0}, [(1,)], [float("nan")] * 0, range(3)])
def test_values(flows: Any, value: Any) -> None:
    got = flows.same.submit(value).result(10)
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize("name, args, expected", [
    ("add", (1, 2), 3), ("fan", (50,), 2450), ("spread", (5,), [0, 2, 4, 6, 8]), ("anywhere", (), 17), ("structured", (5,), 27),
    ("nest", (60,), None), ("down", (60,), 0), ("mapped", (5,), 40), ("star", (4,), 46), ("aflow", (5,), 15), ("nap", (1,), 2),
    ("batched", (10,), 570), ("judged", (), ["ok 8", "failed ValueError", "failed ValueError"]),
    ("batch_bad", (), ["ok 4", "failed ValueError", "ok 16"]), ("ordered", (), "c"), ("flaky", ("a", 2), 2), ("flushed", (10,), 90),
    ("gives_action", (4,), 8), ("big_between", (3 << 20,), 3 << 20), ("fan", (400,), 159600)])
def test_flows(flows: Any, name: str, args: tuple[Any, ...], expected: Any) -> None:
    got = getattr(flows, name).submit(*args).result(30)
    if name == "nest":
        depth = 0
        while got:
            got, depth = got[0], depth + 1
        assert depth == 60
    else:
        assert got == expected


def test_structures_are_filled_in_with_the_types_they_had(flows: Any) -> None:
    assert flows.structure.submit(1).result(10) == {"a": 2, "b": [flows.Point(1, 2, ["t"]), None, {"c": 4}], "box": 7}
    assert flows.boxed.submit(2).result(10) == flows.Box("l", [4, 4])


def test_methods_carry_their_object(flows: Any) -> None:
    assert flows.Scaler(3).many.submit(4).result(10) == 18
    assert flows.Scaler(2).scale(5) == 10


def test_delay(flows: Any) -> None:
    assert flows.delayed.submit().result(10) >= 0.19


def test_failure_has_traceback_cause_and_node(flows: Any) -> None:
    with pytest.raises(ActionFailed, match=r"flows.fail failed: ValueError: boo") as caught:
        flows.fail.submit("boo").result(10)
    error = caught.value
    assert (error.action, error.attempts) == ("flows.fail", 1) and error.node_id.endswith("/0")
    assert isinstance(error.__cause__, ValueError) and error.__cause__.args == ("boo",)
    assert "raise ValueError(text)" in error.remote_traceback and "_executor" not in error.remote_traceback


@pytest.mark.parametrize("name, args, kwargs, frames", [
    ("fail", ("boo",), {}, ["fail"]), ("fail", (), {"text": "boo"}, ["fail"]), ("fail_timed", ("boo",), {}, ["fail_timed"]),
    ("afail", ("boo",), {}, ["afail"]), ("afail", (), {"text": "boo"}, ["afail"]), ("fail_batch", ("boo",), {}, ["fail_batch"]),
    ("fail_one", ("boo",), {}, [])])
def test_a_traceback_begins_with_the_users_code(flows: Any, name: str, args: tuple[str, ...], kwargs: dict[str, str],
                                                frames: list[str]) -> None:
    with pytest.raises(ActionFailed, match="boo") as caught:
        getattr(flows, name).submit(*args, **kwargs).result(10)
    said = caught.value.remote_traceback.splitlines()
    assert [line.rpartition(" in ")[2] for line in said if line.startswith("  File ")] == frames, said
    assert said[-1] == "ValueError: boo"


def test_a_wrong_call_by_name_shows_no_frames_of_ours(flows: Any, client: Client) -> None:
    with pytest.raises(ActionFailed, match=r"fail\(\) missing 1 required") as caught:
        client.emit("flows.fail").result(10)
    assert "File" not in caught.value.remote_traceback


def test_failure_rebuilds_the_chain_of_causes(flows: Any) -> None:
    with pytest.raises(ActionFailed) as caught:
        flows.fail_with_cause.submit().result(10)
    cause = caught.value.__cause__
    assert isinstance(cause, Oops) and (cause.code, cause.detail) == (7, "outer")
    assert isinstance(cause.__cause__, KeyError)


@pytest.mark.parametrize("name, text", [("fail_stubborn", "stubborn"), ("fail_hard", "SystemExit: no")])
def test_odd_exceptions_only_fail_their_node(flows: Any, name: str, text: str) -> None:
    with pytest.raises(ActionFailed, match=text):
        getattr(flows, name).submit().result(10)
    assert flows.add.submit(1, 1).result(10) == 2


def test_failure_flows_to_the_root(flows: Any) -> None:
    with pytest.raises(ActionFailed, match="deep") as caught:
        flows.chain_of_failure.submit().result(10)
    assert caught.value.action == "flows.fail"


def test_retry_policy_of_options_reaches_the_worker(flows: Any) -> None:
    with pytest.raises(ActionFailed) as caught:
        flows.flaky_never.submit().result(10)
    assert caught.value.attempts == 1
    with pytest.raises(ActionFailed) as caught:
        flows.flaky.submit("b", 9).result(10)
    assert caught.value.attempts == 3


def test_what_cannot_be_stored_names_argument_and_path(flows: Any) -> None:
    with pytest.raises(ActionFailed, match=r"result of flows.unpicklable_result .* result\['a'\]\[1\] is a _thread.lock"):
        flows.unpicklable_result.submit().result(10)
    with pytest.raises(ActionFailed, match=r"argument 'value' of flows.same .* value\['a'\]\[1\].content is a _thread.lock"):
        flows.unpicklable_argument.submit().result(10)
    with pytest.raises(NotSerialisable, match=r"argument 'b' of flows.add cannot be stored: b\[0\] is a _thread.lock"):
        flows.add.submit(1, b=[threading.Lock()])


def test_early_use_fails_the_attempt_with_the_rewrite(flows: Any) -> None:
    with pytest.raises(ActionFailed, match=r"(?s)flows.double.*is not known yet.*return use") as caught:
        flows.early.submit().result(10)
    assert isinstance(caught.value.__cause__, EarlyUse)


def test_current(flows: Any) -> None:
    run = flows.whoami.submit()
    assert run.result(10) == [run.id, f"{run.id}/0", 1, f"{run.id}/0", None]


def test_wrong_calls_are_refused_where_they_are_made(flows: Any) -> None:
    with pytest.raises(TypeError, match=r"flows\.add"):
        flows.add.submit(1)
    with pytest.raises(TypeError, match="positional"):
        flows.squares.submit(xs=1)


def test_cancel_reaches_running_code(flows: Any) -> None:
    run = flows.wait_for_cancel.submit()
    time.sleep(0.1)
    run.cancel("enough")
    with pytest.raises(Cancelled):
        run.result(10)
    assert run.state() == "cancelled"
    assert flows.add.submit(1, 1).result(10) == 2


def test_key_makes_submit_idempotent(flows: Any) -> None:
    a = flows.add.options(key="k")
    assert a.submit(1, 2).id == a.submit(1, 2).id != flows.add.submit(1, 2).id


def test_result_timeout_and_resume(flows: Any, fake: FakeBroker) -> None:
    run = flows.wait_for_cancel.submit()
    with pytest.raises(TimeoutError):
        run.result(0.2)
    with pytest.raises(DagoramaError, match="RUN_NOT_ENDED"):
        run.retry()
    run.cancel()
    failed = flows.fail.submit("x")
    with pytest.raises(ActionFailed):
        failed.result(10)
    failed.retry()
    with pytest.raises(ActionFailed):
        failed.result(10)


def test_async_client(flows: Any) -> None:
    async def main() -> list[int]:
        runs = [await flows.nap.asubmit(i) for i in range(20)]
        many = await asyncio.gather(*runs)
        with pytest.raises(ActionFailed):
            await (await flows.fail.asubmit("x"))
        assert await (await flows.structure.asubmit(1))
        return many

    assert asyncio.run(main()) == list(range(1, 21))


def test_emit_by_name_and_client_run(flows: Any, client: Client, fake: FakeBroker) -> None:
    run = client.emit("flows.add", 1, b=2)
    assert isinstance(client.run(run.id), Run)
    assert fake.runs[-1].nodes[0].spec["by_name"] and fake.runs[-1].nodes[0].body == b'{"args":[1],"kwargs":{"b":2}}'
    assert client.run(run.id).result(10) == 3
    with pytest.raises(DagoramaError, match="UNKNOWN_RUN"):
        client.run("99-0123456789abcdef").result(1)


def test_refused_submission_has_the_code_of_the_broker(flows: Any, fake: FakeBroker) -> None:
    fake.refuse = {"code": "DISK_FULL", "message": "the disk is nearly full", "retryable": True}
    with pytest.raises(DagoramaError, match="DISK_FULL") as caught:
        flows.add.submit(1, 2)
    assert caught.value.code == "DISK_FULL"
    fake.refuse = {"code": "STOPPING", "message": "the broker is stopping", "retryable": True}
    assert flows.add.submit(1, 2).result(10) == 3


def test_wrong_token(fake: FakeBroker) -> None:
    import flows

    with Client(fake.url, token="wrong"), pytest.raises(DagoramaError) as caught:
        flows.add.submit(1, 2)
    assert caught.value.code == "UNAUTHENTICATED"


def test_broker_down_is_named_with_its_url_and_the_command() -> None:
    import flows

    with Client("dagorama://127.0.0.1:1", timeout=0.2), pytest.raises(
            BrokerUnavailable, match=r"dagorama://127\.0\.0\.1:1 .*dagorama serve"):
        flows.add.submit(1, 2)


def test_hint_after_two_seconds_without_a_worker(client: Client, capsys: pytest.CaptureFixture[str]) -> None:
    import flows

    with pytest.raises(TimeoutError):
        flows.add.submit(1, 2).result(2.6)
    assert capsys.readouterr().err.count("dagorama worker") == 1


def test_lost_connections_are_invisible(flows: Any, fake: FakeBroker) -> None:
    run = flows.leaves.submit(60, 0.01)
    for _ in range(8):
        time.sleep(0.05)
        fake.drop()
    assert run.result(20) == sum(range(60))
    ended = [entry[1][:2] for entry in fake.log if entry[0] == "end" and entry[1][3] < 3]
    assert len(ended) == len(set(ended)) == 62
    assert len(fake.runs) == 1


def test_a_long_call_comes_back_to_its_lease_while_it_runs(flows: Any, fake: FakeBroker) -> None:
    run = flows.leaves.submit(1, 1.5)
    time.sleep(0.5)
    busy = next(n.session for r in fake.runs for n in r.nodes if n.kind == "leased")
    before = len(fake.log)
    fake.drop()
    time.sleep(0.6)
    assert [c.session for c in fake.connections].count(busy) == 1, "its connection is there again before the call has ended"
    hellos = [entry for entry in fake.log[before:] if entry[0] == "hello" and entry[1].get("session") == f"{busy:016x}"]
    assert len(hellos) == 1
    assert run.result(20) == 0
    assert len([entry for entry in fake.log if entry[0] == "end" and entry[1][3] < 3]) == 3


def test_stopping_is_no_answer(flows: Any, fake: FakeBroker, monkeypatch: pytest.MonkeyPatch) -> None:
    refused: list[str] = []

    def once(verb: str) -> Any:
        real = getattr(fake, f"_on_{verb}")

        def handler(c: Any, request: int, body: bytes) -> None:
            if refused.count(verb) < 1 and (verb != "hello" or json.loads(body)["kind"] == "worker"):
                refused.append(verb)
                fake._error(c, request, "STOPPING", "the broker is stopping")
            else:
                real(c, request, body)

        return handler

    for verb in ("fetch", "create", "hello"):
        monkeypatch.setattr(fake, f"_on_{verb}", once(verb))
    assert flows.fan.submit(400).result(30) == 159600
    assert flows.flushed.submit(10).result(10) == 90
    assert sorted(refused) == ["create", "fetch", "hello"]


@pytest.mark.parametrize("verb", ["submit", "wait", "fetch", "cancel", "show"])
def test_a_client_repeats_what_a_stopping_broker_refused(flows: Any, fake: FakeBroker, monkeypatch: pytest.MonkeyPatch,
                                                         verb: str) -> None:
    real = getattr(fake, f"_on_{verb}")
    refused: list[str] = []

    def handler(c: Any, request: int, body: bytes) -> None:
        if len(refused) < 3 and not c.queues:  # of a client
            refused.append(verb)
            fake._error(c, request, "STOPPING", "the broker is stopping")
        else:
            real(c, request, body)

    monkeypatch.setattr(fake, f"_on_{verb}", handler)
    run = flows.spread.submit(5)
    assert run.result(10) == [0, 2, 4, 6, 8] and run.state() == "succeeded"
    run.cancel()
    assert len(refused) == 3 and len(fake.runs) == 1


def test_a_broker_that_goes_on_stopping_is_unavailable(fake: FakeBroker, monkeypatch: pytest.MonkeyPatch) -> None:
    import flows

    monkeypatch.setattr(fake, "_on_submit", lambda c, request, body: fake._error(c, request, "STOPPING", "the broker is stopping"))
    with Client(fake.url, token=fake.token, timeout=0.5), pytest.raises(BrokerUnavailable, match="stopping"):
        flows.add.submit(1, 2)


def test_credit_that_the_broker_spent_on_nothing_is_asked_for_again(flows: Any, fake: FakeBroker) -> None:
    assert flows.add.submit(1, 2).result(10) == 3
    time.sleep(0.1)
    with fake.lock:
        for connection in fake.connections:
            connection.credit = 0
    began = time.monotonic()
    assert flows.add.submit(1, 2).result(10) == 3
    assert time.monotonic() - began < 5
    before = len(fake.log)
    time.sleep(3)
    assert len([entry for entry in fake.log[before:] if entry[0] == "hello"]) <= 6, "less and less often"


def test_a_late_outcome_is_refused_and_harms_nobody(flows: Any, fake: FakeBroker) -> None:
    run = flows.leaves.submit(4, 0.3)
    time.sleep(0.2)
    for connection in list(fake.connections):
        fake.lose(connection.session)
    assert run.result(20) == 6
    assert [entry for entry in fake.log if entry[0] == "refused"]


def test_process_isolation_timeouts_crashes_and_drain(fake: FakeBroker, client: Client, tmp_path: Path,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    import flows

    monkeypatch.setenv("FLOWS_JOURNAL", str(tmp_path / "journal"))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    with running(isolation="process", concurrency=2):
        assert flows.fan.submit(100).result(20) == 9900
        assert flows.too_long.submit("a").result(20) == "attempt 2"
        run = flows.kill_me.submit()
        journal = tmp_path / "journal"
        until = time.monotonic() + 20
        while "kill_me 1" not in journal.read_text() and time.monotonic() < until:
            time.sleep(0.05)
        time.sleep(0.3)
        assert fake.runs[-1].nodes[0].kind == "leased"  # neither released nor finished: a loss, in time
        run.cancel()
        assert flows.fan.submit(10).result(20) == 90
    said = journal.read_text().split()
    assert said.count("too_long") == 2
    assert len([entry for entry in fake.log if entry[0] == "goodbye"]) >= 2
    assert set(fake.heartbeats) >= {1, 2, 3}


def test_a_call_that_ends_while_its_process_is_being_halted_keeps_its_outcome(
        fake: FakeBroker, client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import flows

    from dagorama._worker import Worker, _Child

    monkeypatch.setenv("FLOWS_JOURNAL", str(tmp_path / "journal"))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    halt, seen = _Child.halt, Worker._look_after
    asked: list[bool] = []

    def early(worker: Worker, child: _Child, now: float) -> None:
        seen(worker, child, now + (1000 if not asked else 0))  # the first deadline is over as soon as it is seen

    def late(child: _Child, still: Any) -> bool:
        asked.append(still())
        until = time.monotonic() + 10
        while still() and time.monotonic() < until:
            time.sleep(0.01)
        return halt(child, still)

    monkeypatch.setattr(Worker, "_look_after", early)
    monkeypatch.setattr(_Child, "halt", late)
    with running(isolation="process", concurrency=1):
        assert flows.in_time.submit().result(20) == 1
        assert flows.add.submit(1, 2).result(20) == 3  # the process was let go on
    assert asked == [True]
    assert [entry for entry in fake.log if entry[0] == "end" and entry[1][3] > 2] == []


def test_no_isolation_runs_in_the_calling_thread(fake: FakeBroker, client: Client) -> None:
    import flows

    run = flows.fan.submit(20)
    from dagorama import Worker

    Worker("flows", isolation="none").run(until_idle=True)
    assert run.result(5) == 380


def test_prefetched_calls_are_given_back_when_one_is_slow(fake: FakeBroker, client: Client) -> None:
    import flows

    with running(concurrency=1):
        assert flows.fan.submit(300).result(20) == 89700  # learns that calls are fast
        run = flows.leaves.submit(30, 0.06)
        assert run.result(20) == sum(range(30))
    assert [entry for entry in fake.log if entry[0] == "end" and entry[1][3] == 5]


# ---- the command line ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def command(folder: Path, *words: str, **env: str) -> Iterator[subprocess.Popen[str]]:
    """`dagorama worker …` in a directory, with two processes."""
    process = subprocess.Popen(
        [sys.executable, "-m", "dagorama", "worker", "--concurrency", "2", *words], cwd=folder, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, start_new_session=True, env={**os.environ, "PYTHONPATH": f"{SRC}{os.pathsep}{TESTS}", **env})
    try:
        with process:
            yield process
    finally:
        with contextlib.suppress(OSError):
            os.killpg(process.pid, 9)


def ended(process: subprocess.Popen[str], seconds: float = 20) -> tuple[int, list[str]]:
    said = process.communicate(timeout=seconds)[1]
    return process.returncode, said.splitlines()


@pytest.mark.parametrize("module, source, expected", [
    ("absent", None, "there is no module absent: run this in the directory that has it"),
    ("absent.py", None, "there is no module absent: run this"),
    ("broken", "x = 1\nraise RuntimeError('boo')\n", "RuntimeError: boo"),
    ("broken", "import absent\n", "ModuleNotFoundError: No module named 'absent'"),
    ("broken", "def f(:\n", "SyntaxError"),
    ("leaves", "import sys\nsys.exit('no')\n", "SystemExit: no"),
    ("dies", "import os\nos._exit(3)\n", "exit code 3"),
    ("empty", "def f(): ...\n", "no action is defined in empty ("),
    ("json", None, "no action is defined in json ("),
    ("../x.py", None, "is not a module")])
def test_a_worker_that_cannot_start_says_why_once(fake: FakeBroker, tmp_path: Path, module: str, source: str | None, expected: str) -> None:
    if source is not None:
        (tmp_path / f"{module}.py").write_text(source)
    with command(tmp_path, module) as process:
        code, said = ended(process)
    assert code == 2 and "\n".join(said).count(expected) == 1, said
    assert not [line for line in said if "_worker.py" in line or "importlib" in line], said
    assert len([line for line in said if line.startswith("Traceback")]) == (module in ("broken", "leaves") and "def f(:" not in str(source))


@pytest.mark.parametrize("env, expected", [
    ({"DAGORAMA_TOKEN": "wrong"}, "the token in DAGORAMA_TOKEN is not the broker's"),
    ({"DAGORAMA_TOKEN": ""}, "DAGORAMA_TOKEN is not set and {state}/127.0.0.1-{port}.token does not exist"),
    ({"DAGORAMA_TOKEN": "", "file": "wrong"}, "the token in {state}/127.0.0.1-{port}.token is not the broker's")])
def test_a_worker_without_the_right_token_ends_with_5_and_the_remedy(fake: FakeBroker, tmp_path: Path, env: dict[str, str],
                                                                    expected: str) -> None:
    port = fake.url.rpartition(":")[2]
    if "file" in env:
        (tmp_path / f"127.0.0.1-{port}.token").write_text(env["file"])
    with command(tmp_path, "flows", **env, DAGORAMA_STATE_DIR=str(tmp_path)) as process:
        code, said = ended(process)
    assert code == 5 and len(said) == 1 and expected.format(state=tmp_path, port=port) in said[0], said


def test_a_worker_says_what_it_serves_and_an_idle_one_leaves_silently(fake: FakeBroker, client: Client, tmp_path: Path) -> None:
    import flows

    with command(tmp_path, f"{TESTS}/flows.py", "flows", "--queue", "default", "--queue", "b") as process:
        assert ended(process)[0] == 2  # outside of this directory
    with command(TESTS, "./flows.py", "--queue", "default", "--queue", "b") as process:
        assert flows.add.submit(1, 2).result(20) == 3
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all of them
        code, said = ended(process)
    assert (code, said) == (0, [f"dagorama worker: modules flows, queues default, b, 2 processes, broker {fake.url}"])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_busy_worker_waits_and_the_second_signal_stops_it_at_once(fake: FakeBroker, client: Client, tmp_path: Path,
                                                                   number: signal.Signals) -> None:
    import flows

    with command(tmp_path, "flows") as process:
        run = flows.leaves.submit(1, 2.0)
        until = time.monotonic() + 20
        while not [n for r in fake.runs for n in r.nodes if n.kind == "leased" and n.number == 1] and time.monotonic() < until:
            time.sleep(0.05)
        process.send_signal(number)
        code, said = ended(process)
        assert code == 0 and said[1:] == ["dagorama: waiting for 1 running call; again to stop at once"]
        assert [entry for entry in fake.log if entry[0] == "end" and entry[1][1] == 1 and entry[1][3] == 0]  # its outcome
        run.cancel()
    with command(tmp_path, "flows") as process:
        run = flows.leaves.submit(1, 60.0)
        while not [n for n in fake.runs[-1].nodes if n.kind == "leased" and n.number == 1] and time.monotonic() < until:
            time.sleep(0.05)
        process.send_signal(number)
        time.sleep(1)
        assert process.poll() is None
        process.send_signal(number)
        began = time.monotonic()
        code, said = ended(process)
        assert time.monotonic() - began < 5
        assert code == 128 + number and said[1] == "dagorama: waiting for 1 running call; again to stop at once"
        run.cancel()


def test_the_journals_directory_is_made_or_its_absence_told_once(fake: FakeBroker, client: Client, tmp_path: Path) -> None:
    import flows

    folder = tmp_path / "a" / "b"
    with command(tmp_path, "flows", DAGORAMA_JOURNAL=str(folder)) as process:
        assert flows.add.submit(1, 2).result(20) == 3
        process.terminate()
        assert ended(process)[0] == 0
    assert any(file.read_text() for file in folder.glob("*.jsonl"))
    (tmp_path / "file").touch()
    with command(tmp_path, "flows", DAGORAMA_JOURNAL=str(tmp_path / "file" / "x")) as process:
        code, said = ended(process)
    assert code == 2 and "\n".join(said).count("DAGORAMA_JOURNAL") == 1, said
