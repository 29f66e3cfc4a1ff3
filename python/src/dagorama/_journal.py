"""What this process saw with its own eyes: a witness that does not depend on the broker.

With ``DAGORAMA_JOURNAL=DIR`` every worker process appends JSON lines to ``DIR/PID.jsonl``: an attempt *started*, its outcome was
*sent*, the broker *accepted* or *refused* it. ``end`` is the number of PROTOCOL section 8: up to 2 there is a value. Meant for proofs
and demonstrations; it costs a system call for every line.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

from ._errors import DagoramaError
from ._wire import FINISH


def _made(directory: str) -> Path:
    path = Path(directory)
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK | os.X_OK):
            raise PermissionError(f"{path} cannot be written to")
    except OSError as error:
        raise DagoramaError(f"DAGORAMA_JOURNAL is {directory!r}: no journal can be kept there ({error.strerror or error})",
                            code="CANNOT_START") from error
    return path


def make_directory() -> None:
    """Make the place of the journals, if they were asked for: one error before anything starts, not one in every process."""
    directory = os.environ.get("DAGORAMA_JOURNAL")
    if directory:
        _made(directory)


class Journal:
    """Lines of one process, each written whole."""

    def __init__(self, directory: str) -> None:
        self._file = os.open(_made(directory) / f"{os.getpid()}.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._actions: dict[tuple[int, int, int], str] = {}

    @classmethod
    def from_environment(cls) -> Journal | None:
        """The journal that was asked for, if one was."""
        directory = os.environ.get("DAGORAMA_JOURNAL")
        return cls(directory) if directory else None

    def started(self, run: int, node: int, attempt: int, action: str) -> None:
        """An attempt begins."""
        self._actions[run, node, attempt] = action
        self._write([self._line("started", run, node, attempt, -1)])

    def sent(self, items: Iterable[bytes]) -> None:
        """Outcomes are about to leave."""
        self._note("sent", items)

    def answered(self, items: list[bytes], refused: set[int]) -> None:
        """The broker has said what became of the outcomes of one frame."""
        self._note("accepted", (item for at, item in enumerate(items) if at not in refused))
        self._note("refused", (item for at, item in enumerate(items) if at in refused))

    def _note(self, what: str, items: Iterable[bytes]) -> None:
        lines = []
        for item in items:
            run, node, attempt, _, end, *_ = FINISH.unpack_from(item)
            lines.append(self._line(what, run, node, attempt, end))
        if lines:
            self._write(lines)

    def _line(self, what: str, run: int, node: int, attempt: int, end: int) -> str:
        action = self._actions.get((run, node, attempt), "")
        entry = {"what": what, "run": f"{run:x}", "node": str(node), "attempt": attempt, "action": action, "end": end}
        return json.dumps(entry)

    def _write(self, lines: list[str]) -> None:
        os.write(self._file, ("\n".join(lines) + "\n").encode())
