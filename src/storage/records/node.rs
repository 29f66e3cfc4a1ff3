//! Nodes, payloads and ranges as bytes: the hot part of the format, shared by the log and by rows.
//!
//! A node's record is three bytes of flags and only those fields that are neither zero nor the same as in the context. The
//! log's context is the fact before; a row stands alone and has the empty context.

use super::wire::{DecodeError, Reader, put_bytes, put_signed, put_varint};
use crate::broker::types::{
    Attempt, Body, BodyEnd, Codec, InputRange, InputUse, NodeIndex, NodeRecord, Note, Payload,
    PayloadRef, Progress, SessionId, SpecId, Timestamp, WallTime,
};

/// What went before, so that it need not be said again.
#[derive(Debug, Clone, Copy)]
pub(super) struct Context {
    pub(super) run: u64,
    pub(super) node: u32,
    pub(super) event: u64,
    pub(super) spec: u32,
    pub(super) parent: Option<u32>,
    pub(super) round: u32,
    pub(super) session: u64,
}

impl Default for Context {
    fn default() -> Self {
        Self {
            run: 0,
            node: 0,
            event: 0,
            spec: 0,
            parent: None,
            round: 1,
            session: 0,
        }
    }
}

/// Which flag of a node's three bytes means what.
mod flag {
    /// Bits 0-2: progress. Bits 3-4: body. Bits 5-8: note. Bits 9-10: attempt (0, 1, or a number follows).
    pub(super) const BODY: u32 = 3;
    pub(super) const NOTE: u32 = 5;
    pub(super) const ATTEMPT: u32 = 9;
    pub(super) const FAILURES: u32 = 1 << 11;
    pub(super) const LOSSES: u32 = 1 << 12;
    pub(super) const NOT_BEFORE: u32 = 1 << 13;
    pub(super) const NOT_BEFORE_WALL: u32 = 1 << 14;
    pub(super) const DIGEST: u32 = 1 << 15;
    pub(super) const CAUSE: u32 = 1 << 16;
    pub(super) const SAME_SPEC: u32 = 1 << 17;
    pub(super) const SAME_PARENT: u32 = 1 << 18;
    pub(super) const HAS_PARENT: u32 = 1 << 19;
    pub(super) const SAME_ROUND: u32 = 1 << 20;
    pub(super) const SAME_SESSION: u32 = 1 << 21;
    pub(super) const SAME_NODE: u32 = 1 << 22;
    pub(super) const NEXT_EVENT: u32 = 1 << 23;
}

pub(super) fn note_code(note: Note) -> u8 {
    match note {
        Note::None => 0,
        Note::OtherCode => 1,
        Note::AttemptFailed => 2,
        Note::TimedOut => 3,
        Note::LeaseLost => 4,
        Note::Released => 5,
        Note::Quarantined => 6,
        Note::ReferenceFailed => 7,
        Note::Reopened => 8,
        Note::LeaseShortened => 9,
        Note::LeaseResumed => 10,
    }
}

pub(super) fn note_of(code: u8) -> Option<Note> {
    Some(match code {
        0 => Note::None,
        1 => Note::OtherCode,
        2 => Note::AttemptFailed,
        3 => Note::TimedOut,
        4 => Note::LeaseLost,
        5 => Note::Released,
        6 => Note::Quarantined,
        7 => Note::ReferenceFailed,
        8 => Note::Reopened,
        9 => Note::LeaseShortened,
        10 => Note::LeaseResumed,
        _ => return None,
    })
}

fn codec_code(codec: Codec) -> u8 {
    match codec {
        Codec::Json => 0,
        Codec::MessagePack => 1,
        Codec::Pickle => 2,
        Codec::Raw => 3,
    }
}

fn codec_of(code: u8) -> Codec {
    match code & 3 {
        0 => Codec::Json,
        1 => Codec::MessagePack,
        2 => Codec::Pickle,
        _ => Codec::Raw,
    }
}

fn use_code(mode: InputUse) -> u64 {
    match mode {
        InputUse::Value => 0,
        InputUse::Outcome => 1,
        InputUse::After => 2,
    }
}

/// Appends node, event and record, relative to `context`, and moves the context on.
#[inline]
pub(super) fn put_node(
    out: &mut Vec<u8>,
    context: &mut Context,
    node: u32,
    event: u64,
    record: &NodeRecord,
) {
    let (progress, session) = match record.progress {
        Progress::Open => (0, None),
        Progress::Leased { session } => (1, Some(session.0)),
        Progress::Backoff => (2, None),
        Progress::Settling => (3, None),
        Progress::Succeeded => (4, None),
        Progress::Failed => (5, None),
        Progress::Skipped => (6, None),
    };
    let (body, tail) = match record.body {
        BodyEnd::Plain => (0u32, None),
        BodyEnd::Structure => (1, None),
        BodyEnd::Tail(to) => (2, Some(to.0)),
    };
    let parent = record.parent.map(|p| p.0);
    let attempt = record.attempt.0;
    let mut flags = progress
        | body << flag::BODY
        | u32::from(note_code(record.note)) << flag::NOTE
        | attempt.min(2) << flag::ATTEMPT;
    let mut set = |condition: bool, bit: u32| {
        if condition {
            flags |= bit;
        }
    };
    set(record.failures != 0, flag::FAILURES);
    set(record.losses != 0, flag::LOSSES);
    set(record.not_before.0 != 0, flag::NOT_BEFORE);
    set(record.not_before_wall.0 != 0, flag::NOT_BEFORE_WALL);
    set(record.digest != 0, flag::DIGEST);
    set(record.cause.is_some(), flag::CAUSE);
    set(record.spec.0 == context.spec, flag::SAME_SPEC);
    set(parent == context.parent, flag::SAME_PARENT);
    set(
        parent.is_some() && parent != context.parent,
        flag::HAS_PARENT,
    );
    set(record.round == context.round, flag::SAME_ROUND);
    set(session == Some(context.session), flag::SAME_SESSION);
    set(node == context.node, flag::SAME_NODE);
    set(
        Some(event) == context.event.checked_add(1),
        flag::NEXT_EVENT,
    );

    out.extend_from_slice(&flags.to_le_bytes()[..3]);
    if flags & flag::SAME_NODE == 0 {
        put_signed(out, i64::from(node) - i64::from(context.node));
    }
    if flags & flag::NEXT_EVENT == 0 {
        put_varint(out, event);
    }
    if flags & flag::SAME_SPEC == 0 {
        put_varint(out, u64::from(record.spec.0));
    }
    if let (Some(parent), true) = (parent, flags & flag::HAS_PARENT != 0) {
        put_varint(out, u64::from(parent));
    }
    if flags & flag::SAME_ROUND == 0 {
        put_varint(out, u64::from(record.round));
    }
    if let (Some(session), true) = (session, flags & flag::SAME_SESSION == 0) {
        out.extend_from_slice(&session.to_le_bytes());
    }
    if let Some(tail) = tail {
        put_varint(out, u64::from(tail));
    }
    if attempt >= 2 {
        put_varint(out, u64::from(attempt));
    }
    if record.failures != 0 {
        put_varint(out, u64::from(record.failures));
    }
    if record.losses != 0 {
        put_varint(out, u64::from(record.losses));
    }
    if record.not_before.0 != 0 {
        put_varint(out, record.not_before.0);
    }
    if record.not_before_wall.0 != 0 {
        put_varint(out, record.not_before_wall.0);
    }
    if record.digest != 0 {
        out.extend_from_slice(&record.digest.to_le_bytes());
    }
    if let Some(cause) = record.cause {
        put_varint(out, u64::from(cause.0));
    }

    context.node = node;
    context.event = event;
    context.spec = record.spec.0;
    context.parent = parent;
    context.round = record.round;
    if let Some(session) = session {
        context.session = session;
    }
}

/// Reads what [`put_node`] wrote: node, event, record.
pub(super) fn read_node(
    reader: &mut Reader<'_>,
    context: &mut Context,
) -> Result<(u32, u64, NodeRecord), DecodeError> {
    let [a, b, c] = reader.array::<3>()?;
    let flags = u32::from_le_bytes([a, b, c, 0]);
    let has = |bit: u32| flags & bit != 0;
    let index = if has(flag::SAME_NODE) {
        context.node
    } else {
        near(reader, context.node)?
    };
    let event = if has(flag::NEXT_EVENT) {
        context
            .event
            .checked_add(1)
            .ok_or_else(|| reader.error("an event number over 64 bits"))?
    } else {
        reader.varint()?
    };
    let spec = if has(flag::SAME_SPEC) {
        context.spec
    } else {
        reader.varint32()?
    };
    let parent = match (has(flag::SAME_PARENT), has(flag::HAS_PARENT)) {
        (true, false) => context.parent,
        (false, true) => Some(reader.varint32()?),
        (false, false) => None,
        (true, true) => return Err(reader.error("two parents")),
    };
    let round = if has(flag::SAME_ROUND) {
        context.round
    } else {
        reader.varint32()?
    };
    let progress = match flags & 7 {
        0 => Progress::Open,
        1 => Progress::Leased {
            session: SessionId(if has(flag::SAME_SESSION) {
                context.session
            } else {
                reader.u64()?
            }),
        },
        2 => Progress::Backoff,
        3 => Progress::Settling,
        4 => Progress::Succeeded,
        5 => Progress::Failed,
        6 => Progress::Skipped,
        _ => return Err(reader.error("an unknown progress")),
    };
    let body = match flags >> flag::BODY & 3 {
        0 => BodyEnd::Plain,
        1 => BodyEnd::Structure,
        2 => BodyEnd::Tail(NodeIndex(reader.varint32()?)),
        _ => return Err(reader.error("an unknown body")),
    };
    let note =
        note_of((flags >> flag::NOTE & 15) as u8).ok_or_else(|| reader.error("an unknown note"))?;
    let attempt = match flags >> flag::ATTEMPT & 3 {
        2 => reader.varint32()?,
        3 => return Err(reader.error("an unknown attempt")),
        small => small,
    };
    let mut optional =
        |bit: u32| -> Result<u64, DecodeError> { if has(bit) { reader.varint() } else { Ok(0) } };
    let failures = optional(flag::FAILURES)?;
    let losses = optional(flag::LOSSES)?;
    let not_before = Timestamp(optional(flag::NOT_BEFORE)?);
    let not_before_wall = WallTime(optional(flag::NOT_BEFORE_WALL)?);
    let narrow = |value: u64| u32::try_from(value);
    let (Ok(failures), Ok(losses)) = (narrow(failures), narrow(losses)) else {
        return Err(reader.error("a counter over 32 bits"));
    };
    let digest = if has(flag::DIGEST) { reader.u64()? } else { 0 };
    let cause = if has(flag::CAUSE) {
        Some(NodeIndex(reader.varint32()?))
    } else {
        None
    };
    context.node = index;
    context.event = event;
    context.spec = spec;
    context.parent = parent;
    context.round = round;
    if let Progress::Leased { session } = progress {
        context.session = session.0;
    }
    let record = NodeRecord {
        spec: SpecId(spec),
        parent: parent.map(NodeIndex),
        round,
        progress,
        body,
        attempt: Attempt(attempt),
        failures,
        losses,
        not_before,
        not_before_wall,
        digest,
        cause,
        note,
    };
    Ok((index, event, record))
}

/// A node number written as its distance from another.
pub(super) fn near(reader: &mut Reader<'_>, base: u32) -> Result<u32, DecodeError> {
    let distance = reader.signed()?;
    i64::from(base)
        .checked_add(distance)
        .and_then(|n| u32::try_from(n).ok())
        .ok_or_else(|| reader.error("a node number over 32 bits"))
}

/// Codec and kind of body in the lowest three bits; the rest is for the caller.
#[inline]
pub(super) fn payload_head(payload: &Payload) -> u8 {
    let stored = matches!(payload.body, Body::Stored(_));
    codec_code(payload.codec) | u8::from(stored) << 2
}

/// Appends the bytes, or where they are.
#[inline]
pub(super) fn put_payload_body(out: &mut Vec<u8>, payload: &Payload) {
    match &payload.body {
        Body::Inline(bytes) => put_bytes(out, bytes),
        Body::Stored(at) => {
            put_varint(out, u64::from(at.segment));
            put_varint(out, at.offset);
            put_varint(out, u64::from(at.length));
            out.extend_from_slice(&at.checksum.to_le_bytes());
        }
    }
}

pub(super) fn read_payload(reader: &mut Reader<'_>, head: u8) -> Result<Payload, DecodeError> {
    let body = if head & 4 == 0 {
        Body::Inline(reader.bytes()?)
    } else {
        Body::Stored(PayloadRef {
            segment: reader.varint32()?,
            offset: reader.varint()?,
            length: reader.varint32()?,
            checksum: reader.u64()?,
        })
    };
    Ok(Payload {
        codec: codec_of(head),
        body,
    })
}

/// Appends ranges: each as the distance from the end of the one before, then length - 1 and use.
pub(super) fn put_ranges(out: &mut Vec<u8>, ranges: &[InputRange]) {
    put_varint(out, ranges.len() as u64);
    let mut end = 0i64;
    for range in ranges {
        put_signed(out, i64::from(range.first.0) - end);
        let more = u64::from(range.count.saturating_sub(1));
        put_varint(out, more << 2 | use_code(range.mode));
        end = i64::from(range.first.0) + i64::from(range.count);
    }
}

pub(super) fn read_ranges(reader: &mut Reader<'_>) -> Result<Vec<InputRange>, DecodeError> {
    let count = reader.count(2)?;
    let mut ranges = Vec::with_capacity(count.min(4_096));
    let mut end = 0i64;
    for _ in 0..count {
        let first = end
            .checked_add(reader.signed()?)
            .and_then(|n| u32::try_from(n).ok())
            .ok_or_else(|| reader.error("a node number over 32 bits"))?;
        let packed = reader.varint()?;
        let mode = match packed & 3 {
            0 => InputUse::Value,
            1 => InputUse::Outcome,
            2 => InputUse::After,
            _ => return Err(reader.error("an unknown use of an input")),
        };
        let count = u32::try_from(packed >> 2)
            .ok()
            .and_then(|more| more.checked_add(1))
            .ok_or_else(|| reader.error("a range over 32 bits"))?;
        end = i64::from(first) + i64::from(count);
        ranges.push(InputRange {
            first: NodeIndex(first),
            count,
            mode,
        });
    }
    Ok(ranges)
}
