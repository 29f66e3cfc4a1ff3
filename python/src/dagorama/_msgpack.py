"""A reader of MessagePack, for arguments and results that producers in other languages wrote. No extension types."""

from __future__ import annotations

import struct
from typing import Any

_FIXED = {0xC0: None, 0xC2: False, 0xC3: True}
_NUMBERS = {0xCA: ">f", 0xCB: ">d", 0xCC: ">B", 0xCD: ">H", 0xCE: ">I", 0xCF: ">Q", 0xD0: ">b", 0xD1: ">h", 0xD2: ">i", 0xD3: ">q"}
_SIZED = {0xC4: ("b", 1), 0xC5: ("b", 2), 0xC6: ("b", 4), 0xD9: ("s", 1), 0xDA: ("s", 2), 0xDB: ("s", 4),
          0xDC: ("l", 2), 0xDD: ("l", 4), 0xDE: ("m", 2), 0xDF: ("m", 4)}


def unpack(body: bytes | bytearray | memoryview) -> Any:
    """The one value in ``body``; `ValueError` if it is not exactly that."""
    try:
        value, end = _read(memoryview(body), 0, 0)
    except (IndexError, struct.error) as error:
        raise ValueError("the MessagePack ends too early") from error
    if end != len(body):
        raise ValueError(f"{len(body) - end} bytes follow the MessagePack value")
    return value


def _read(body: memoryview, at: int, depth: int) -> tuple[Any, int]:
    if depth > 100:
        raise ValueError("the MessagePack is nested too deeply")
    tag = body[at]
    at += 1
    if tag < 0x80:
        return tag, at
    if tag >= 0xE0:
        return tag - 256, at
    if tag in _FIXED:
        return _FIXED[tag], at
    if tag in _NUMBERS:
        form = _NUMBERS[tag]
        return struct.unpack_from(form, body, at)[0], at + struct.calcsize(form)
    if tag in _SIZED:
        kind, width = _SIZED[tag]
        size = int.from_bytes(body[at : at + width], "big")
        at += width
    elif tag < 0xC0:
        kind, size = ("m", tag & 15) if tag < 0x90 else ("l", tag & 15) if tag < 0xA0 else ("s", tag & 31)
    else:
        raise ValueError(f"MessagePack type 0x{tag:02x} is not supported")
    if size > len(body) - at:
        raise IndexError
    if kind in "bs":
        raw = bytes(body[at : at + size])
        return (raw if kind == "b" else raw.decode()), at + size
    parts = []
    for _ in range(size * 2 if kind == "m" else size):
        part, at = _read(body, at, depth + 1)
        parts.append(part)
    return (dict(zip(parts[::2], parts[1::2], strict=True)) if kind == "m" else parts), at
