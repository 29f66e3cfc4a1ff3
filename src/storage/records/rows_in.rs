//! From rows back to what they say. Used by readers, by the start and by `verify`.

use bytes::Bytes;

use super::cold;
use super::facts::{read_confirmed, read_dead_letter, read_run_id};
use super::node::{Context, note_of, read_node, read_payload, read_ranges};
use super::rows_out::{EVENT_CREATED, ROW_VERSION, UNTOUCHED};
use super::wire::{DecodeError, Reader};
use crate::broker::outcome::{DeadLetterRecord, Fact};
use crate::broker::types::{
    InputRange, KeyHash, NameId, NodeIndex, NodeKey, NodeRecord, NodeState, Payload, RunRecord,
    RunSeq, Spec, SpecId, Timestamp,
};
use crate::storage::row::RowKey;
use crate::storage::{EventRecord, OutboxRecord};

fn open(value: &Bytes) -> Result<Reader<'_>, DecodeError> {
    let mut reader = Reader::new(value);
    if reader.u8()? != ROW_VERSION {
        return Err(reader.error("an unknown version of a row"));
    }
    Ok(reader)
}

fn whole<T>(reader: &Reader<'_>, value: T) -> Result<T, DecodeError> {
    reader.finish().map(|()| value)
}

/// A node row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeRow {
    /// Nothing has happened to it since its creation, which was event `event`.
    pub untouched: bool,
    /// Number of its latest event.
    pub event: u64,
    /// The record.
    pub record: NodeRecord,
}

/// Reads a row of `Node`.
pub fn node_row(key: RowKey, value: &Bytes) -> Result<NodeRow, DecodeError> {
    let mut reader = Reader::new(value);
    let head = reader.u8()?;
    if head & !UNTOUCHED != ROW_VERSION {
        return Err(reader.error("an unknown version of a row"));
    }
    let expected =
        u32::try_from(key.minor).map_err(|_| reader.error("a node number over 32 bits"))?;
    let mut context = Context {
        node: expected,
        ..Context::default()
    };
    let (node, event, record) = read_node(&mut reader, &mut context)?;
    if node != expected {
        return Err(reader.error("another node's row"));
    }
    whole(
        &reader,
        NodeRow {
            untouched: head & UNTOUCHED != 0,
            event,
            record,
        },
    )
}

/// Reads a row of `Arguments`: the payload, and how many ranges of inputs there are.
pub fn arguments_row(value: &Bytes) -> Result<(Payload, usize), DecodeError> {
    let mut reader = open(value)?;
    let head = reader.u8()?;
    if head > 7 {
        return Err(reader.error("an unknown kind of body"));
    }
    let ranges = reader.varint32()? as usize;
    let payload = read_payload(&mut reader, head)?;
    whole(&reader, (payload, ranges))
}

/// Reads a row of `Outcome`: whether it is an error, the payload, and how many ranges of references there are.
pub fn outcome_row(value: &Bytes) -> Result<(bool, Payload, usize), DecodeError> {
    let mut reader = open(value)?;
    let head = reader.u8()?;
    if head > 15 {
        return Err(reader.error("an unknown kind of body"));
    }
    let ranges = reader.varint32()? as usize;
    let payload = read_payload(&mut reader, head)?;
    whole(&reader, (head & 8 != 0, payload, ranges))
}

/// Reads a row of `Inputs`: how many ranges there are in all parts, and those of this part.
pub fn ranges_row(value: &Bytes) -> Result<(usize, Vec<InputRange>), DecodeError> {
    let mut reader = open(value)?;
    let all = reader.varint32()? as usize;
    let ranges = read_ranges(&mut reader)?;
    whole(&reader, (all, ranges))
}

/// Reads a row of `Event`: the events from number `key.minor` on. `visit` returns `false` to stop.
pub fn event_row(
    key: RowKey,
    value: &Bytes,
    visit: &mut dyn FnMut(EventRecord) -> bool,
) -> Result<(), DecodeError> {
    let mut reader = open(value)?;
    let at = Timestamp(reader.varint()?);
    let mut seq = key.minor;
    let mut last = 0u32;
    while reader.remaining() > 0 {
        let head = reader.u8()?;
        let code = head & 15;
        let note = note_of(head >> 4).ok_or_else(|| reader.error("an unknown note"))?;
        if code == EVENT_CREATED {
            let first = reader.varint32()?;
            let count = reader.varint32()?;
            if count == 0 || first.checked_add(count - 1).is_none() {
                return Err(reader.error("a node number over 32 bits"));
            }
            for node in first..=first + (count - 1) {
                let event = EventRecord {
                    seq,
                    at,
                    node: NodeIndex(node),
                    state: "created",
                    attempt: 0,
                    note,
                };
                if !visit(event) {
                    return Ok(());
                }
                seq = seq.wrapping_add(1);
            }
            last = first + (count - 1);
            continue;
        }
        let index = super::node::near(&mut reader, last)?;
        let event = EventRecord {
            seq,
            at,
            node: NodeIndex(index),
            state: state_word(code).ok_or_else(|| reader.error("an unknown state"))?,
            attempt: reader.varint32()?,
            note,
        };
        if !visit(event) {
            return Ok(());
        }
        seq = seq.wrapping_add(1);
        last = index;
    }
    Ok(())
}

fn state_word(code: u8) -> Option<&'static str> {
    let state = match code {
        0 => NodeState::Waiting,
        1 => NodeState::Ready,
        2 => NodeState::Leased,
        3 => NodeState::Backoff,
        4 => NodeState::Settling,
        5 => NodeState::Succeeded,
        6 => NodeState::Failed,
        7 => NodeState::Skipped,
        _ => return None,
    };
    Some(state.as_str())
}

/// Reads a row of `Key`.
pub fn key_row(key: RowKey, value: &Bytes) -> Result<Fact, DecodeError> {
    let mut reader = open(value)?;
    let high = u128::from(reader.u64()?);
    let run = read_run_id(&mut reader)?;
    let content = reader.u64()?;
    let at = Timestamp(reader.varint()?);
    if super::places::key_step(at) != key.major {
        return Err(reader.error("another time's key"));
    }
    whole(
        &reader,
        Fact::Key {
            key: KeyHash(high << 64 | u128::from(key.minor)),
            run,
            content,
            at,
        },
    )
}

/// Reads a row of `Outbox`.
pub fn outbox_row(key: RowKey, value: &Bytes) -> Result<OutboxRecord, DecodeError> {
    let mut reader = open(value)?;
    let record = OutboxRecord {
        seq: key.minor,
        node: NodeKey::new(RunSeq(reader.varint()?), NodeIndex(reader.varint32()?)),
        salt: reader.u64()?,
        round: reader.varint32()?,
        at: Timestamp(reader.varint()?),
    };
    whole(&reader, record)
}

/// Reads a row of `Payload`: where the used part of the segment ends.
pub fn payload_row(value: &Bytes) -> Result<u64, DecodeError> {
    let mut reader = open(value)?;
    let end = reader.varint()?;
    whole(&reader, end)
}

/// A record that may go on in further parts.
#[derive(Debug)]
pub struct Parts {
    length: usize,
    bytes: Vec<u8>,
}

impl Parts {
    /// Takes up part 0.
    pub fn first(value: &Bytes) -> Result<Self, DecodeError> {
        let mut reader = open(value)?;
        let length = reader.varint32()? as usize;
        let bytes = reader.raw(reader.remaining())?.to_vec();
        let parts = Self { length, bytes };
        parts.checked(&reader)
    }

    /// Takes up the next part.
    pub fn next(mut self, value: &Bytes) -> Result<Self, DecodeError> {
        let mut reader = open(value)?;
        self.bytes
            .extend_from_slice(reader.raw(reader.remaining())?);
        self.checked(&reader)
    }

    fn checked(self, reader: &Reader<'_>) -> Result<Self, DecodeError> {
        if self.bytes.len() > self.length {
            return Err(reader.error("parts longer than the record"));
        }
        Ok(self)
    }

    /// Whether further parts follow.
    pub fn is_open(&self) -> bool {
        self.bytes.len() < self.length
    }

    /// The whole record.
    pub fn finish(self) -> Bytes {
        Bytes::from(self.bytes)
    }
}

/// Reads the parts of `OpenRun` or `EndedRun`.
pub fn run_record(whole: &Bytes) -> Result<RunRecord, DecodeError> {
    cold::read_run(whole)
}

/// Reads the parts of `Spec`.
pub fn spec_record(whole: &Bytes) -> Result<Spec, DecodeError> {
    cold::read_spec(whole)
}

/// Reads the parts of `Name`.
pub fn name_record(bytes: &Bytes) -> Result<&str, DecodeError> {
    std::str::from_utf8(bytes).map_err(|_| Reader::new(bytes).error("text that is not UTF-8"))
}

/// Reads the parts of `Announced`.
pub fn announced_record(bytes: &Bytes) -> Result<Fact, DecodeError> {
    let mut reader = Reader::new(bytes);
    let spec = SpecId(reader.varint32()?);
    let action = reader.str()?.into();
    whole(&reader, Fact::Announced { action, spec })
}

/// Reads the parts of `Position` of a route.
pub fn position_record(route: NameId, bytes: &Bytes) -> Result<Fact, DecodeError> {
    let mut reader = Reader::new(bytes);
    let epoch = reader.varint32()?;
    let next = reader.varint()?;
    let partition = reader.str()?.into();
    whole(
        &reader,
        Fact::Position {
            route,
            partition,
            epoch,
            next,
        },
    )
}

/// Reads the parts of `OutboxCursor`: the cursor and what is confirmed after it.
pub fn cursor_record(bytes: &Bytes) -> Result<(u64, Vec<u64>), DecodeError> {
    let mut reader = Reader::new(bytes);
    let confirmed = read_confirmed(&mut reader)?;
    whole(&reader, confirmed)
}

/// Reads the parts of `DeadLetter` with number 0: the number that was given last.
pub fn last_letter_record(bytes: &Bytes) -> Result<u64, DecodeError> {
    let mut reader = Reader::new(bytes);
    let last = reader.varint()?;
    whole(&reader, last)
}

/// Reads the parts of `DeadLetter`.
pub fn letter_record(bytes: &Bytes) -> Result<DeadLetterRecord, DecodeError> {
    let mut reader = Reader::new(bytes);
    let letter = read_dead_letter(&mut reader)?;
    whole(&reader, letter)
}
