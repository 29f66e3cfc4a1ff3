"""Exceptions as they travel: JSON for everyone, with a pickle inside for Python, verified before it is sent."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import importlib
import itertools
import json
import os
import pickle
import traceback
from types import TracebackType
from typing import Any

from ._errors import ActionFailed, Cancelled, DagoramaError
from ._payload import pickled, unpickled
from ._wire import NODE_CANCELLED, Item

_PICKLE_LIMIT = 1 << 20
_TEXT_LIMIT = 1 << 18


_OURS = (os.path.dirname(os.path.abspath(__file__)) + os.sep, os.path.dirname(asyncio.__file__) + os.sep)


def users_part(error: BaseException) -> TracebackType | None:
    """Its traceback from the first frame on that is neither ours nor of the event loop which we run."""
    trace = error.__traceback__
    while trace is not None and (trace.tb_frame.f_code.co_filename.startswith(_OURS) or _importing(trace)):
        trace = trace.tb_next
    return trace


def _importing(trace: TracebackType) -> bool:
    name = trace.tb_frame.f_code.co_filename
    return name.startswith("<frozen importlib") or name == importlib.__file__


def _raised_in(trace: TracebackType | None, file: str) -> bool:
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and os.path.basename(trace.tb_frame.f_code.co_filename) == file


def describe(error: BaseException, action: str, node_id: str, attempt: int) -> bytes:
    """The error of an attempt. Without a frame of the user's, what was raised where we call has no traceback (the call was wrong, or
    the exception was a result of a batch), and what was raised deeper has all of it."""
    trace = users_part(error)
    if trace is None and not isinstance(error, DagoramaError) and not _raised_in(error.__traceback__, "_executor.py"):
        trace = error.__traceback__
    try:
        text = "".join(traceback.format_exception(type(error), error, trace))
    except Exception:  # an exception whose __str__ raises
        text = f"{type(error).__qualname__}: (its text cannot be made)\n"
    try:
        message = str(error)
    except Exception:
        message = "(the exception's text cannot be made)"
    return json.dumps({
        "type": f"{type(error).__module__}.{type(error).__qualname__}", "message": _cut(message), "traceback": _cut(text),
        "pickle": _chain(error), "action": action, "node": node_id, "attempt": attempt,
    }).encode()


def _cut(text: str) -> str:
    return text if len(text) <= _TEXT_LIMIT else text[: _TEXT_LIMIT // 2] + "\n[…]\n" + text[-_TEXT_LIMIT // 2 :]


def _chain(error: BaseException) -> str | None:
    """The exception and its causes, as far as each can be rebuilt."""
    links: list[bytes] = []
    at: BaseException | None = error
    while at is not None and len(links) < 10:
        try:
            body = pickled(at)
            if type(unpickled(body)) is not type(at):
                break
        except Exception:
            break
        links.append(body)
        at = at.__cause__
    raw = pickle.dumps(links, 5)
    return base64.b64encode(raw).decode() if links and len(raw) <= _PICKLE_LIMIT else None


def rebuild(item: Item, run_id: str) -> DagoramaError:
    """The exception for a node that ended without a value."""
    node, state, _, _, body = item
    said: dict[str, Any] = {}
    with contextlib.suppress(ValueError):
        said = json.loads(str(body, "utf-8")) if len(body) else {}
    if state == NODE_CANCELLED:
        return Cancelled(str(said.get("message") or f"run {run_id} was cancelled"))
    action = str(said.get("action") or "")
    attempts = int(said.get("attempt") or 0)
    node_id = str(said.get("node") or f"{run_id}/{node}")
    what = f"{said.get('type', 'unknown error')}: {said.get('message', '')}".removeprefix("builtins.")
    trace = str(said.get("traceback") or "")
    failed = ActionFailed(f"{action or 'node ' + node_id} failed: {what}" + (f"\n\n{trace}" if trace else ""))
    failed.action, failed.node_id, failed.attempts, failed.remote_traceback = action, node_id, attempts, trace
    failed.__cause__ = _rebuild_chain(said.get("pickle"))
    return failed


def _rebuild_chain(text: object) -> BaseException | None:
    try:
        links = [unpickled(body) for body in pickle.loads(base64.b64decode(str(text)))] if text else []
    except Exception:  # the class does not exist here, or not in this version
        return None
    if not all(isinstance(link, BaseException) for link in links):
        return None
    for outer, inner in itertools.pairwise(links):
        outer.__cause__ = inner
    return links[0] if links else None
