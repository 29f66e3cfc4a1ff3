"""Frames and fixed layouts of docs/PROTOCOL.md. Knows bytes; knows nothing of promises, pickles or sessions."""

from __future__ import annotations

import socket
from struct import Struct

from ._errors import ConnectionLost, DagoramaError

Bytes = bytes | bytearray | memoryview
# A node as FETCH, WAIT and LEASES deliver it: node, state, codec, ranges of nodes it refers to, body.
Item = tuple[int, int, int, tuple[tuple[int, int], ...], Bytes]

HEADER = Struct("<IBBHI")
NODE = Struct("<IBBHIIQ")
RANGE = Struct("<III")
LEASE = Struct("<QQII16sIIBBHIII")
LEASE_HEAD = 40  # run, salt, node, attempt, token: what tells one lease from all others
FINISH = Struct("<QII16sBBHIII")
CREATE = Struct("<QII16sII")
ITEM = Struct("<IBBHII")
WAIT_BODY = Struct("<QQI")
RUN_ID = Struct("<QQ")
REVOKED = Struct("<QII")
U16 = Struct("<H")
U32 = Struct("<I")
U64 = Struct("<Q")

HELLO, DEFINE, SUBMIT, CREDIT, FINISH_VERB, HEARTBEAT, FETCH, WAIT, CREATE_VERB, CANCEL = range(1, 11)
RESUME, SHOW, STATUS, GOODBYE = 11, 15, 16, 17
REPLY, ERROR, SPECS, LEASES, REVOKE = 128, 129, 130, 131, 132
MORE = 1

JSON, MSGPACK, PICKLE, RAW = range(4)
VALUE, STRUCTURE, TAIL, FAILED, FAILED_RETRY, RELEASED, TIMED_OUT_RETRY, TIMED_OUT = range(8)
SUCCEEDED, NODE_FAILED, NODE_CANCELLED, SKIPPED = 5, 6, 7, 8
MODE_VALUE, MODE_OUTCOME, MODE_AFTER = 0, 1, 2
NEW = 0x8000_0000

MAX_PAYLOAD = 64 << 20
MAX_FRAME = MAX_PAYLOAD + (1 << 20)
CHUNK = 1 << 18


def frame(verb: int, body: bytes | bytearray, request: int = 0) -> bytes:
    """One frame, header included."""
    return HEADER.pack(len(body), verb, 0, 0, request) + body


class Reader:
    """Cuts what arrives on a socket into frames. Holds what has arrived and was not yet asked for."""

    __slots__ = ("_buffer", "_position", "_sock")

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._buffer: Bytes = b""
        self._position = 0

    def next(self) -> tuple[int, int, int, Bytes] | None:
        """Verb, flags, request and body of the next frame that is here completely; never blocks."""
        at = self._position
        have = len(self._buffer) - at
        if have < 12:
            return None
        length, verb, flags, _, request = HEADER.unpack_from(self._buffer, at)
        if length > MAX_FRAME:
            raise DagoramaError(f"a frame of {length} bytes, at most {MAX_FRAME} are allowed", code="PROTOCOL")
        if have < 12 + length:
            return None
        self._position = at + 12 + length
        return verb, flags, request, self._buffer[at + 12 : at + 12 + length]

    def fill(self) -> None:
        """Wait for more bytes. A large frame is received into its own memory, in one go."""
        rest = self._buffer[self._position :]
        self._position = 0
        try:
            if len(rest) >= 12:
                whole = 12 + int(HEADER.unpack_from(rest)[0])
                if whole - len(rest) > CHUNK:
                    memory = memoryview(bytearray(whole))
                    memory[: len(rest)] = rest
                    at = len(rest)
                    while at < whole:
                        got = self._sock.recv_into(memory[at:])
                        if not got:
                            raise ConnectionLost
                        at += got
                    self._buffer = memory
                    return
            chunk = self._sock.recv(CHUNK)
        except OSError as error:
            raise ConnectionLost(str(error)) from error
        if not chunk:
            raise ConnectionLost
        self._buffer = bytes(rest) + chunk if len(rest) else chunk


def read_items(body: Bytes, at: int, count: int) -> tuple[list[Item], int]:
    """``count`` items of a FETCH reply from offset ``at`` on, and the offset behind them."""
    unpack = ITEM.unpack_from
    items: list[Item] = []
    for _ in range(count):
        node, state, codec, _, n_ranges, length = unpack(body, at)
        at += 16
        ranges: tuple[tuple[int, int], ...] = ()
        if n_ranges:
            end = at + 12 * n_ranges
            ranges = tuple((first, n) for first, n, _ in RANGE.iter_unpack(body[at:end]))
            at = end
        end = at + length
        items.append((node, state, codec, ranges, body[at:end]))
        at = end
    if at > len(body):
        raise DagoramaError("an item is longer than its frame", code="PROTOCOL")
    return items, at


def fetch_body(run: int, ranges: list[tuple[int, int]]) -> bytes:
    """The body of a FETCH."""
    return b"".join([U64.pack(run), U32.pack(len(ranges)), *(RANGE.pack(first, n, 0) for first, n in ranges)])


def merge(nodes: list[int]) -> list[tuple[int, int]]:
    """Ascending node numbers as ranges."""
    ranges: list[tuple[int, int]] = []
    for node in nodes:
        if ranges and ranges[-1][0] + ranges[-1][1] == node:
            ranges[-1] = (ranges[-1][0], ranges[-1][1] + 1)
        else:
            ranges.append((node, 1))
    return ranges


def run_text(seq: int, salt: int) -> str:
    """The public id of a run."""
    return f"{seq:x}-{salt:016x}"


def run_numbers(text: str) -> tuple[int, int]:
    """The two numbers behind a public id."""
    seq, dash, salt = text.partition("-")
    try:
        if not dash or len(salt) != 16:
            raise ValueError
        return int(seq, 16), int(salt, 16)
    except ValueError:
        raise DagoramaError(f"{text!r} is not the id of a run (they look like 2a-0123456789abcdef)",
                            code="UNKNOWN_RUN") from None
