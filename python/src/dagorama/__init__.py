"""Durable task graphs from plain Python functions.

A call of an `action` inside a running action records a node and returns a promise, typed as the value; `submit` starts a
run. One small broker (``dagorama serve``) keeps the graph; ``dagorama worker my_module`` runs it.

What a promise cannot catch: ``promise is None``, ``isinstance(promise, X)`` and ``type(promise)`` look at the promise itself.
Everything else that needs the value raises `EarlyUse` at once.
"""

from ._action import Action, action, batch_action
from ._client import Client
from ._current import Current, current
from ._errors import ActionFailed, BrokerUnavailable, Cancelled, DagoramaError, EarlyUse, NotSerialisable
from ._promise import Outcome, outcome
from ._retry import Retry
from ._run import NodeState, Run, RunState
from ._worker import Worker

__version__ = "0.1.0"
__all__ = [
    "Action", "ActionFailed", "BrokerUnavailable", "Cancelled", "Client", "Current", "DagoramaError", "EarlyUse", "NodeState",
    "NotSerialisable", "Outcome", "Retry", "Run", "RunState", "Worker", "action", "batch_action", "current", "outcome",
]


def _sign() -> None:
    for name in __all__:
        if hasattr(globals()[name], "__qualname__"):
            globals()[name].__module__ = "dagorama"


_sign()
