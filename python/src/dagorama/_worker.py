"""`Worker`: the supervisor. It runs no user code itself (unless asked not to use processes).

It starts the executors, sends heartbeats for their sessions over a connection of its own (so that a call which holds the GIL
costs no lease), ends calls that outlive their timeout, replaces processes that die, and drains on SIGTERM.

When a process dies by itself, its session is taken over for a moment: what was waiting in it is released, what was running is
left to become a loss. So a node that kills its process is quarantined after its losses, and its neighbours pay nothing.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import mmap
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from typing import IO, Any, Literal

from . import _names
from ._action import REGISTRY
from ._connection import Address, Channel, greet, warn
from ._errors import BrokerUnavailable, ConnectionLost, DagoramaError
from ._exceptions import describe, users_part
from ._executor import _DEADLINE, Executor, Slot
from ._journal import make_directory
from ._wire import (
    FINISH, FINISH_VERB, GOODBYE, HEARTBEAT, JSON, RELEASED, STATUS, TIMED_OUT, TIMED_OUT_RETRY, U32, U64, frame,
    run_text,
)

Isolation = Literal["process", "thread", "none"]
CANNOT_START = 3
_TICK = 0.05


def import_modules(modules: Sequence[str]) -> None:
    """Make the actions of these modules known, or say what is wrong. A module that runs as ``__main__`` is known already."""
    for module in modules:
        if module == _names.MAIN:
            continue
        try:
            importlib.import_module(module)
        except BaseException as error:
            raise _cannot_import(module, error) from error
    if len(REGISTRY) < 2:
        where = ", ".join(f"{name} ({getattr(sys.modules.get(name), '__file__', None) or 'built in'})" for name in modules)
        raise DagoramaError(f"no action is defined in {where or 'no module'}: name the modules that have functions with @action",
                            code="CANNOT_START")


def _cannot_import(module: str, error: BaseException) -> DagoramaError:
    if isinstance(error, ModuleNotFoundError) and error.name and f"{module}.".startswith(f"{error.name}."):
        return DagoramaError(f"there is no module {module}: run this in the directory that has it (this is {os.getcwd()}), "
                             "or set PYTHONPATH", code="CANNOT_START")
    text = "".join(traceback.format_exception(type(error), error, users_part(error)))
    return DagoramaError(f"module {module} cannot be imported:\n{text.rstrip()}", code="CANNOT_START")


class _Child:
    """An executor in a process or thread of its own."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.started = time.monotonic()
        self.timed_out = False
        self.ended = False  # of a thread
        self.process: subprocess.Popen[bytes] | None = None
        self.thread: threading.Thread | None = None
        self.executor: Executor | None = None
        self.file: IO[bytes] | None = None
        if worker._isolation == "process":
            self._start_process()
        else:
            self.slot = Slot(bytearray(Slot.SIZE))
            self.executor = Executor(worker._address, worker._token, worker._queues, worker._tolerate, self.slot)
            self.thread = threading.Thread(target=self._run_thread, name="dagorama-executor", daemon=True)
            if worker._isolation == "thread":
                self.thread.start()

    def _start_process(self) -> None:
        # Ctrl-C in the moment before it ignores that signal must not be the end of it.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self._spawn()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def _spawn(self) -> None:
        worker = self.worker
        self.file = tempfile.TemporaryFile()  # noqa: SIM115 - closed by close()
        self.file.truncate(Slot.SIZE)
        self.slot = Slot(mmap.mmap(self.file.fileno(), Slot.SIZE))
        number = self.file.fileno()
        # Its standard input is the supervisor's sign of life: it ends when the supervisor does.
        self.process = subprocess.Popen(
            [sys.executable, "-c", "from dagorama._worker import child_main; child_main()"], stdin=subprocess.PIPE,
            pass_fds=(number,), env={**os.environ, "DAGORAMA_URL": worker._address.url,
                                     "PYTHONPATH": os.pathsep.join(filter(None, [os.path.dirname(os.path.dirname(__file__)),
                                                                                os.environ.get("PYTHONPATH")]))})
        said = {"modules": worker._modules, "queues": worker._queues, "tolerate": worker._tolerate, "path": sys.path,
                "token": worker._token, "slot": number}
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):
            self.process.stdin.write(json.dumps(said).encode() + b"\n")
            self.process.stdin.flush()

    def _run_thread(self) -> None:
        assert self.executor is not None
        try:
            self.executor.run()
        except DagoramaError as error:
            if not self.worker._stopped():
                warn(str(error))
        finally:
            self.ended = True

    def code(self) -> int | None:
        """``None`` while it lives; 0 when it left in order."""
        if self.process is not None:
            return self.process.poll()
        return 0 if self.ended else None

    def frozen(self) -> bool:
        """Stopped by a signal: then its leases should lapse, as they do when a machine freezes."""
        if self.process is None:
            return False
        try:
            with open(f"/proc/{self.process.pid}/stat", "rb") as file:
                return file.read().rpartition(b") ")[2][:1] in (b"T", b"t")
        except OSError:
            return False

    def stop(self) -> None:
        """Drain."""
        if self.process is not None:
            with contextlib.suppress(OSError):
                self.process.send_signal(signal.SIGTERM)
        elif self.executor is not None:
            self.executor.stop()

    def halt(self, still: Callable[[], bool]) -> bool:
        """Stop the process where it is, provided that this still holds when it has stopped; a thread cannot be stopped."""
        if self.process is None:
            return still()
        with contextlib.suppress(OSError):
            self.process.send_signal(signal.SIGSTOP)
            until = time.monotonic() + 0.2
            while not self.frozen() and self.process.poll() is None and time.monotonic() < until:
                time.sleep(0.0005)
        if still():
            return True
        with contextlib.suppress(OSError):
            self.process.send_signal(signal.SIGCONT)
        return False

    def kill(self) -> None:
        """End it at once; threads cannot be."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def close(self) -> None:
        """Give back what it used."""
        if self.process is not None and self.process.stdin is not None:
            with contextlib.suppress(OSError):
                self.process.stdin.close()
        if self.file is not None:
            self.slot.memory.close()
            self.file.close()


class Worker:
    """Runs nodes: a supervisor and ``concurrency`` executors, each a process of its own (or a thread, or this very thread).

    ``isolation="process"`` is the only one in which a timeout really ends a call, and in which a call that crashes the
    interpreter harms nobody else. Asynchronous actions run in one event loop per executor, one call at a time.
    """

    def __init__(
        self, *modules: str, queues: Sequence[str] = ("default",), tolerate: Sequence[str] = (), concurrency: int | None = None,
        isolation: Isolation = "process", url: str | None = None,
    ) -> None:
        self._modules = list(modules)
        self._queues = list(queues)
        self._tolerate = list(tolerate)
        self._isolation = isolation
        if isolation not in ("process", "thread", "none"):
            raise ValueError(f"isolation is {isolation!r}, must be 'process', 'thread' or 'none'")
        if concurrency is not None and concurrency < 1:
            raise ValueError(f"concurrency is {concurrency}, must be at least 1")
        self._concurrency = 1 if isolation == "none" else concurrency or os.cpu_count() or 1
        self._address = Address(url)
        self._token: str | None = None
        self._stopping = threading.Event()
        self._done = threading.Event()
        self._done.set()
        self._signals = 0  # a handler must not touch an Event: the thread it interrupts may hold its lock
        self._signal = 0  # which it was
        self._talks = False  # to people at a terminal
        self._grace = 30.0
        self._channel: Channel | None = None
        self._children: list[_Child] = []
        self._restart_at: list[float] = []

    def run(self, *, until_idle: bool = False) -> None:
        """Work until `stop`, SIGTERM or Ctrl-C; with ``until_idle``, until the broker has no open node left."""
        self._stopping.clear()
        self._done.clear()
        self._signals = 0
        handlers: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                handlers[number] = signal.signal(number, self._on_signal)
        try:
            make_directory()
            if self._isolation != "process":
                import_modules(self._modules)
            self._channel = Channel(self._address, None, 10.0, {
                "kind": "worker", "session": None, "queues": [], "tolerate": [], "actions": []})
            if self._wait_for_broker():
                self._say_hello()
                self._children = [_Child(self) for _ in range(self._concurrency)]
                if self._isolation == "none":
                    supervisor = threading.Thread(target=self._supervise, args=(until_idle,), daemon=True)
                    supervisor.start()
                    self._children[0]._run_thread()
                    self._stopping.set()
                    supervisor.join(self._grace)
                else:
                    self._supervise(until_idle)
        finally:
            for child in self._children:
                child.kill()
                child.close()
            self._children = []
            if self._channel is not None:
                self._channel.close()
            for which, handler in handlers.items():
                signal.signal(which, handler)
            self._done.set()

    def stop(self, timeout: float = 30.0) -> None:
        """Finish what is running, give back the rest, and return when `run` has; after ``timeout`` seconds, kill."""
        self._grace = timeout
        self._stopping.set()
        self._done.wait(timeout + 10)

    # ---- internal ----

    def _on_signal(self, number: int, _frame: object) -> None:
        self._signals += 1
        self._signal = number
        if self._signals > 1:
            self._grace = 0.0  # the second time: now
            if self._isolation == "none":
                os._exit(128 + number)  # the call that runs is on this very thread

    def _say_hello(self) -> None:
        if not self._talks:
            return
        one = self._concurrency == 1
        where = {"process": "process" if one else "processes", "thread": "thread" if one else "threads", "none": "call at a time"}
        parts = [f"modules {', '.join(self._modules)}", f"queue{'s' * (len(self._queues) > 1)} {', '.join(self._queues)}",
                 *([f"tolerates {', '.join(self._tolerate)}"] if self._tolerate else []),
                 f"{self._concurrency} {where[self._isolation]}", f"broker {self._address.url}"]
        print(f"dagorama worker: {', '.join(parts)}", file=sys.stderr, flush=True)

    def _stopped(self, seconds: float = 0.0) -> bool:
        """Whether to stop; waits so long for it."""
        return self._signals > 0 or self._stopping.wait(seconds) or self._signals > 0

    def _wait_for_broker(self) -> bool:
        assert self._channel is not None
        said = False
        while not self._stopped():
            try:
                self._channel.open()
                return True
            except BrokerUnavailable as error:
                if not said:
                    warn(f"{error}; waiting for it")
                said = True
                self._stopped(0.2)
        return False

    def _supervise(self, until_idle: bool) -> None:
        assert self._channel is not None
        beat = 0.0
        idle_since = asked = time.monotonic()
        while not self._stopped(_TICK):
            now = time.monotonic()
            if now >= beat:
                beat = now + max(0.05, self._channel.greeting.get("heartbeat_ms", 10_000) / 1000 * 0.9)
                self._heartbeat()
            for child in list(self._children):
                self._look_after(child, now)
            if until_idle and now - asked > 0.1:
                asked = now
                if not self._idle():
                    idle_since = now
                elif now - idle_since > 0.3:
                    self._stopping.set()
        self._drain()

    def _heartbeat(self) -> None:
        assert self._channel is not None
        sessions = [child.slot.session for child in self._children if not child.frozen()]
        sessions = [session for session in sessions if session]
        own = self._channel.greeting.get("session")
        if own:
            sessions.append(int(own, 16))
        with contextlib.suppress(DagoramaError):
            self._channel.open(0.0)
        self._channel.send(HEARTBEAT, U32.pack(len(sessions)) + b"".join(map(U64.pack, sessions)))

    def _look_after(self, child: _Child, now: float) -> None:
        code = child.code()
        if code is None:
            mark = bytes(child.slot.memory[8:16])
            if any(mark) and now > _DEADLINE.unpack(mark)[0] and child.slot.memory[16]:
                self._time_out(child, mark)
            return
        self._children.remove(child)
        if code == CANNOT_START and not child.slot.session:  # afterwards, that code is the user's
            words = child.slot.words() or f"a worker process ended with exit code {code} while it imported its modules"
            child.close()
            self._stopping.set()
            raise DagoramaError(words, code="CANNOT_START")
        if code != 0:
            if not child.timed_out:
                warn(f"a worker process died ({_how(code)}); what it ran will be tried again, a new one starts")
            self._take_over(child)
        child.close()
        if self._isolation != "none" and not self._stopped():
            if now - child.started < 1 and not child.timed_out:
                self._stopped(0.5)  # not as fast as it dies
            self._children.append(_Child(self))

    def _time_out(self, child: _Child, mark: bytes) -> None:
        """End the call with this deadline. Its outcome is reported here: the process cannot.

        The deadline tells one call from every other one of its process: it is set when a timed call begins and cleared when the
        call ends. The process is halted first, so that the call cannot end, nor another one begin, between the last look and the
        end. Where /proc does not show that it has halted, a moment remains in which an outcome that is just being made is lost
        with the process: then the call counts as one that took too long, which it has.
        """
        assert self._channel is not None
        if not child.halt(lambda: child.slot.memory[8:16] == mark):
            return  # it ended in the last moment
        running, retry = child.slot.running(), bool(child.slot.memory[17])
        child.kill()
        child.timed_out = True
        child.slot.memory[8:16] = bytes(8)
        parts = []
        for run, salt, node, attempt, token in running:
            error = TimeoutError("the attempt took longer than the timeout of its action")
            said = describe(error, "", f"{run_text(run, salt)}/{node}", attempt)
            end = TIMED_OUT_RETRY if retry else TIMED_OUT
            parts.append(FINISH.pack(run, node, attempt, token, end, JSON, 0, 0, 0, len(said)) + said)
        with contextlib.suppress(DagoramaError, TimeoutError):
            self._channel.request(FINISH_VERB, U32.pack(len(parts)) + b"".join(parts)).result(10)

    def _take_over(self, child: _Child) -> None:
        """Release what waited in a dead process. What it was running becomes a loss when the session's five seconds are over."""
        session = child.slot.session
        if not session:
            return
        keep = set() if child.timed_out else {(run, node, attempt) for run, _, node, attempt, _ in child.slot.running()}
        try:
            sock, reader, greeting = greet(self._address, self._token, {
                "kind": "worker", "session": f"{session:016x}", "queues": [], "tolerate": [], "actions": []}, 2.0)
        except (OSError, ConnectionLost, DagoramaError, ValueError):
            return  # then they all become losses
        try:
            sock.settimeout(5.0)
            items = [FINISH.pack(*key, bytes(16), RELEASED, JSON, 0, 0, 0, 0)
                     for key in sorted(map(tuple, greeting["leases"])) if key not in keep]
            if items:
                sock.sendall(frame(FINISH_VERB, U32.pack(len(items)) + b"".join(items), 2))
            if not keep:
                sock.sendall(frame(GOODBYE, b"", 3))
            while items or not keep:
                while (got := reader.next()) is None:
                    reader.fill()
                if got[2] == (3 if not keep else 2):
                    break
        except (OSError, ConnectionLost, DagoramaError):
            pass
        finally:
            sock.close()

    def _idle(self) -> bool:
        assert self._channel is not None
        try:
            status = json.loads(str(self._channel.request(STATUS, b"{}").result(10)[0], "utf-8"))
        except (DagoramaError, TimeoutError, ValueError):
            return False
        return not status.get("open_nodes", 0) and not status.get("leases", 0)

    def _drain(self) -> None:
        for child in self._children:
            child.stop()
        began = time.monotonic()
        beat = began + 1.0
        talks = self._talks and self._signals > 0
        while any(child.code() is None for child in self._children):
            now = time.monotonic()
            if now - began > self._grace:
                break
            if talks and now - began > 0.2:  # what ends at once is not worth a line
                talks = False
                if running := sum(len(child.slot.running()) for child in self._children if child.code() is None):
                    warn(f"waiting for {running} running call{'s' * (running > 1)}; again to stop at once")
            if now >= beat:
                beat = now + 1.0
                self._heartbeat()
            time.sleep(0.01)
        for child in self._children:
            if child.code() is None and child.process is not None:
                if child.slot.running():
                    warn("a call did not end in time: its process is killed")
                child.kill()
                self._take_over(child)


def _how(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    with contextlib.suppress(ValueError):
        return signal.Signals(-code).name
    return f"signal {-code}"


def child_main() -> None:
    """A worker process: everything it must know comes as one line on standard input, whose end means that its parent is gone."""
    parent = os.dup(0)
    line = b""
    while not line.endswith(b"\n"):
        more = os.read(parent, 65536)
        if not more:
            return
        line += more
    said = json.loads(line)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    sys.path[:] = said["path"]
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the supervisor, which drains
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    slot = Slot(mmap.mmap(said["slot"], Slot.SIZE))
    executor: list[Executor] = []
    signal.signal(signal.SIGTERM, lambda *_: executor[0].stop() if executor else os._exit(0))
    try:
        import_modules(said["modules"])
    except DagoramaError as error:  # told once, by the supervisor
        slot.leave(str(error))
        os._exit(CANNOT_START)
    executor.append(Executor(Address(None), said["token"], said["queues"], said["tolerate"], slot))
    try:
        executor[0].run(parent)
    except BrokerUnavailable:
        os._exit(0)
    except DagoramaError as error:
        warn(str(error))
        os._exit(1)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # threads that user code left behind must not keep it
