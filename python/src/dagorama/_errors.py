"""What can go wrong, as one tree.

    DagoramaError                 everything below, and every "no" of the broker, told apart by ``code``
    ├── EarlyUse (TypeError)      a promise was used as if its value were known
    ├── NotSerialisable (TypeError)  an argument or a result cannot be stored
    ├── ActionFailed              the root of a run, or a dependency, failed for good
    ├── Cancelled                 the run was cancelled
    └── BrokerUnavailable         no broker answers at the URL

``code`` is stable; the text may change.
"""

from __future__ import annotations

import json


class DagoramaError(Exception):
    """Base of everything this package raises on purpose. ``code`` is stable, the message is for people."""

    code: str = "ERROR"

    def __init__(self, message: str = "", *, code: str | None = None) -> None:
        super().__init__(message)
        if code is not None:
            self.code = code


class EarlyUse(DagoramaError, TypeError):
    """A promise was tested, iterated or computed with before its value is known.

    Raised at once, by nearly everything one can do with a value. Three things cannot be caught, because Python asks no
    one: ``promise is None`` (always false), ``isinstance(promise, X)`` and ``type(promise)`` (they see the promise). And
    ``"".join(promise)`` raises a plain `TypeError`, because Python puts a text of its own in place of this one.
    """

    code = "EARLY_USE"


class NotSerialisable(DagoramaError, TypeError):
    """Names the argument and the path inside it that could not be stored."""

    code = "NOT_SERIALISABLE"


class ActionFailed(DagoramaError):
    """The root of a run failed for good. ``__cause__`` is the original exception when it can be rebuilt."""

    code = "ACTION_FAILED"
    action: str = ""
    node_id: str = ""
    attempts: int = 0
    remote_traceback: str = ""


class Cancelled(DagoramaError):
    """The run was cancelled."""

    code = "CANCELLED"


class BrokerUnavailable(DagoramaError):
    """No broker answers. The message names the URL and the command that starts one."""

    code = "BROKER_UNAVAILABLE"


class ConnectionLost(Exception):
    """Internal: the connection has closed. Whoever sees it connects again."""


def refusal(body: bytes | bytearray | memoryview) -> DagoramaError:
    """The exception for an ERROR frame, or for the refusal of one item of a list."""
    try:
        said = json.loads(str(body, "utf-8"))
        code, message = str(said["code"]), str(said["message"])
    except (ValueError, KeyError, TypeError):
        return DagoramaError("the broker refused with an unreadable reason", code="PROTOCOL")
    kind = Cancelled if code == "LEASE_REVOKED" else DagoramaError
    return kind(f"{message} [{code}]", code=code)
