//! From facts to rows.
//!
//! All values of a batch lie in one buffer and rows are slices of it. Neighbouring events share a row. The same facts always
//! give the same rows, so a batch may be applied again.

use std::ops::Range;

use bytes::Bytes;
use xxhash_rust::xxh3::xxh3_64;

use super::RowBatch;
use super::cold;
use super::facts::{put_confirmed, put_dead_letter, put_run_id};
use super::node::{Context, note_code, payload_head, put_node, put_payload_body, put_ranges};
use super::places::{KeyPlaces, OutboxPlaces, PayloadUse, key_step, letter_owner};
use super::wire::{put_bytes, put_signed, put_varint};
use crate::broker::outcome::{CreatedNode, Fact};
use crate::broker::types::{
    Body, BodyEnd, InputRange, KeyHash, NameId, NodeIndex, NodeKey, NodeRecord, Note, Payload,
    Progress, RunRecord, RunSeq, SpecId, Timestamp,
};
use crate::storage::row::{Row, RowKey, Table};

/// Version of every row, the low seven bits of its first byte.
pub(super) const ROW_VERSION: u8 = 1;
/// High bit of a node row's first byte: nothing has happened to the node since its creation.
pub(super) const UNTOUCHED: u8 = 0x80;
/// Largest value of a row. A larger record goes on in further parts.
pub(super) const PART_BYTES: usize = 3_400;
/// Low bits of a row's number that count the parts of its record.
pub(crate) const PART_BITS: u32 = 16;
/// Those bits.
pub(crate) const PART_MASK: u64 = (1 << PART_BITS) - 1;
/// Ranges in a part of `Inputs`.
pub(crate) const RANGES_PER_PART: usize = 256;
/// Parts from here on are references.
pub(crate) const REFERENCES: u64 = 1 << 31;
/// Node number of `Inputs` under which a run's header goes on.
pub(crate) const HEADER_TAIL: u64 = (u32::MAX as u64) << 32;
/// An event row takes no further event beyond this size.
const EVENT_BYTES: usize = 1_024;
/// Code of "created" in an event; the others are in [`super::rows_in`].
pub(super) const EVENT_CREATED: u8 = 15;

/// Turns facts into rows, and remembers what that needs.
#[derive(Debug, Default)]
pub struct RowMaker {
    keys: KeyPlaces,
    outboxes: OutboxPlaces,
    payloads: PayloadUse,
    /// Values of the batch at work.
    arena: Vec<u8>,
    /// Its rows: ranges of the arena, an empty one to delete.
    rows: Vec<(RowKey, Range<u32>)>,
    events: Events,
    /// The node whose outcome was told last, if that refers to nothing.
    unreferring: Option<NodeKey>,
    scratch: Vec<u8>,
}

/// The event row at work.
#[derive(Debug, Default)]
struct Events {
    run: u64,
    first: u64,
    next: u64,
    node: u32,
    value: Vec<u8>,
}

impl RowMaker {
    /// Which payload segments are in use.
    pub fn payload_use(&mut self) -> &mut PayloadUse {
        &mut self.payloads
    }

    /// Takes up a row that a start has found, if it is one to be remembered.
    pub(crate) fn restore_key(&mut self, key: KeyHash, at: Timestamp) {
        self.keys.insert(key, at);
    }

    /// Takes up an outbox's cursor that a start has found.
    pub(crate) fn restore_outbox(&mut self, output: NameId, cursor: u64, beyond: &[u64]) {
        self.outboxes.restore(output, cursor, beyond);
    }

    /// Takes up the use of a payload segment that a start has found.
    pub(crate) fn restore_payload_use(&mut self, segment: u32, owner: u64, end: u64) {
        self.payloads.restore(segment, owner, end);
    }

    /// Adds the rows of a batch of facts, committed at `now`, to `out`.
    pub fn rows_of(&mut self, facts: &[Fact], now: Timestamp, out: &mut RowBatch) {
        for fact in facts {
            self.fact(fact, now, out);
        }
        self.close_events();
        self.unreferring = None;
        let values = Bytes::from(std::mem::take(&mut self.arena));
        out.rows.reserve(self.rows.len());
        for (key, range) in self.rows.drain(..) {
            let value =
                (!range.is_empty()).then(|| values.slice(range.start as usize..range.end as usize));
            out.rows.push(Row { key, value });
        }
        // As much again is the best guess for the next one, within reason.
        self.arena = Vec::with_capacity(values.len().min(1 << 20));
    }

    fn fact(&mut self, fact: &Fact, now: Timestamp, out: &mut RowBatch) {
        match fact {
            Fact::Node {
                node,
                event,
                record,
            } => self.node(*node, *event, record, now),
            Fact::Outcome {
                node,
                is_error,
                payload,
                references,
            } => self.outcome(*node, *is_error, payload, references),
            Fact::Nodes {
                run,
                first,
                parent,
                round,
                event,
                nodes,
            } => self.nodes(*run, *first, (*parent, *round, *event), nodes, now),
            Fact::Run { run, record } => self.run(*run, record),
            Fact::Spec { id, spec } => {
                self.in_parts(Table::Spec, u64::from(id.0), 0, |out| {
                    cold::put_spec(out, spec);
                });
            }
            Fact::Name { id, name } => {
                self.in_parts(Table::Name, u64::from(id.0), 0, |out| {
                    out.extend_from_slice(name.as_bytes());
                });
            }
            Fact::Announced { action, spec } => {
                let place = xxh3_64(action.as_bytes());
                self.in_parts(Table::Announced, place, 0, |out| {
                    put_varint(out, u64::from(spec.0));
                    put_bytes(out, action.as_bytes());
                });
            }
            Fact::Key {
                key,
                run,
                content,
                at,
            } => {
                self.keys.insert(*key, *at);
                let start = self.start();
                self.arena.push(ROW_VERSION);
                self.arena
                    .extend_from_slice(&((key.0 >> 64) as u64).to_le_bytes());
                put_run_id(&mut self.arena, *run);
                self.arena.extend_from_slice(&content.to_le_bytes());
                put_varint(&mut self.arena, at.0);
                self.finish(key_row(*key, key_step(*at)), start);
            }
            Fact::KeysExpired { keys } => {
                for key in keys {
                    if let Some(step) = self.keys.take(*key, now) {
                        self.delete(key_row(*key, step));
                    }
                }
            }
            Fact::Position {
                route,
                partition,
                epoch,
                next,
            } => {
                let place = xxh3_64(partition.as_bytes()) & !PART_MASK;
                self.in_parts(Table::Position, u64::from(route.0), place, |out| {
                    put_varint(out, u64::from(*epoch));
                    put_varint(out, *next);
                    put_bytes(out, partition.as_bytes());
                });
            }
            Fact::Outbox {
                output,
                seq,
                node,
                salt,
                round,
                at,
            } => {
                let start = self.start();
                let arena = &mut self.arena;
                arena.push(ROW_VERSION);
                put_varint(arena, node.run.0);
                put_varint(arena, u64::from(node.node.0));
                arena.extend_from_slice(&salt.to_le_bytes());
                put_varint(arena, u64::from(*round));
                put_varint(arena, at.0);
                self.finish(row_key(Table::Outbox, u64::from(output.0), *seq), start);
            }
            Fact::OutboxConfirmed {
                output,
                cursor,
                beyond,
            } => {
                let major = u64::from(output.0);
                let (range, single) = self.outboxes.confirm(*output, *cursor, beyond);
                if !range.is_empty() {
                    out.deleted_ranges.push((
                        row_key(Table::Outbox, major, range.start),
                        row_key(Table::Outbox, major, range.end),
                    ));
                }
                for seq in single {
                    self.delete(row_key(Table::Outbox, major, seq));
                }
                self.in_parts(Table::OutboxCursor, major, 0, |out| {
                    put_confirmed(out, *cursor, beyond);
                });
            }
            Fact::DeadLetter { route, seq, letter } => {
                if let Body::Stored(at) = &letter.body.body {
                    self.stored(at, letter_owner(*route, *seq));
                }
                // The number that was given last outlives its letter, so that no number is given twice.
                self.in_parts(Table::DeadLetter, u64::from(route.0), 0, |out| {
                    put_varint(out, *seq);
                });
                self.in_parts(
                    Table::DeadLetter,
                    u64::from(route.0),
                    seq << PART_BITS,
                    |out| {
                        put_dead_letter(out, letter);
                    },
                );
            }
            Fact::DeadLetterRemoved { route, seq } => {
                let major = u64::from(route.0);
                out.deleted_ranges.push((
                    row_key(Table::DeadLetter, major, seq << PART_BITS),
                    row_key(Table::DeadLetter, major, (seq + 1) << PART_BITS),
                ));
                self.release(letter_owner(*route, *seq));
            }
            Fact::RunDeleted { run } => {
                out.deleted_runs.push(run.0);
                self.release(run.0);
            }
        }
    }

    fn nodes(
        &mut self,
        run: RunSeq,
        first: NodeIndex,
        (parent, round, event): (Option<NodeIndex>, u32, u64),
        nodes: &[CreatedNode],
        now: Timestamp,
    ) {
        if nodes.is_empty() {
            return;
        }
        self.begin_event(run, event, nodes.len() as u64, now);
        let value = &mut self.events.value;
        value.push(EVENT_CREATED);
        put_varint(value, u64::from(first.0));
        put_varint(value, nodes.len() as u64);
        self.events.node = first.0.wrapping_add(nodes.len() as u32).wrapping_sub(1);

        let mut record = NodeRecord {
            spec: SpecId(0),
            parent,
            round,
            progress: Progress::Open,
            body: BodyEnd::Plain,
            attempt: crate::broker::types::Attempt(0),
            failures: 0,
            losses: 0,
            not_before: Timestamp(0),
            not_before_wall: crate::broker::types::WallTime(0),
            digest: 0,
            cause: None,
            note: Note::None,
        };
        for (created, at) in nodes.iter().zip(0u32..) {
            let node = NodeKey::new(run, NodeIndex(first.0 + at));
            record.spec = created.spec;
            record.not_before = created.not_before;
            record.not_before_wall = created.not_before_wall;
            self.node_row(node, event + u64::from(at), &record, UNTOUCHED);

            let start = self.start();
            self.arena.push(ROW_VERSION);
            self.arena.push(payload_head(&created.arguments));
            put_varint(&mut self.arena, created.inputs.len() as u64);
            put_payload_body(&mut self.arena, &created.arguments);
            self.finish(
                row_key(Table::Arguments, run.0, u64::from(node.node.0)),
                start,
            );
            self.ranges(node, 0, &created.inputs);
            if let Body::Stored(stored) = &created.arguments.body {
                self.stored(stored, run.0);
            }
        }
    }

    fn node(&mut self, node: NodeKey, event: u64, record: &NodeRecord, now: Timestamp) {
        self.node_row(node, event, record, 0);
        if record.body == BodyEnd::Structure && self.unreferring == Some(node) {
            // An earlier attempt's structure may have referred to something: a start must not take that for this one's.
            let first = u64::from(node.node.0) << 32 | REFERENCES;
            self.delete(row_key(Table::Inputs, node.run.0, first));
        }
        self.begin_event(node.run, event, 1, now);
        let events = &mut self.events;
        events
            .value
            .push(event_code(record) | note_code(record.note) << 4);
        put_signed(
            &mut events.value,
            i64::from(node.node.0) - i64::from(events.node),
        );
        put_varint(&mut events.value, u64::from(record.attempt.0));
        events.node = node.node.0;
    }

    fn node_row(&mut self, node: NodeKey, event: u64, record: &NodeRecord, untouched: u8) {
        let start = self.start();
        self.arena.push(ROW_VERSION | untouched);
        let mut context = Context {
            node: node.node.0,
            ..Context::default()
        };
        put_node(&mut self.arena, &mut context, node.node.0, event, record);
        self.finish(
            row_key(Table::Node, node.run.0, u64::from(node.node.0)),
            start,
        );
    }

    fn outcome(
        &mut self,
        node: NodeKey,
        is_error: bool,
        payload: &Payload,
        references: &[InputRange],
    ) {
        let start = self.start();
        self.arena.push(ROW_VERSION);
        self.arena
            .push(payload_head(payload) | u8::from(is_error) << 3);
        put_varint(&mut self.arena, references.len() as u64);
        put_payload_body(&mut self.arena, payload);
        self.finish(
            row_key(Table::Outcome, node.run.0, u64::from(node.node.0)),
            start,
        );
        self.ranges(node, REFERENCES, references);
        self.unreferring = references.is_empty().then_some(node);
        if let Body::Stored(at) = &payload.body {
            self.stored(at, node.run.0);
        }
    }

    /// Ranges of a node in parts; each says how many ranges there are in all, so that a part of an older, longer list is known
    /// to be one.
    fn ranges(&mut self, node: NodeKey, first_part: u64, ranges: &[InputRange]) {
        for (part, chunk) in (first_part..).zip(ranges.chunks(RANGES_PER_PART)) {
            let start = self.start();
            self.arena.push(ROW_VERSION);
            put_varint(&mut self.arena, ranges.len() as u64);
            put_ranges(&mut self.arena, chunk);
            self.finish(
                row_key(
                    Table::Inputs,
                    node.run.0,
                    u64::from(node.node.0) << 32 | part,
                ),
                start,
            );
        }
    }

    fn run(&mut self, run: RunSeq, record: &RunRecord) {
        let (live, dead) = if record.ended.is_some() {
            (Table::EndedRun, Table::OpenRun)
        } else {
            (Table::OpenRun, Table::EndedRun)
        };
        self.delete(row_key(dead, run.0, 0));
        let mut whole = std::mem::take(&mut self.scratch);
        whole.clear();
        cold::put_run(&mut whole, record);
        for (part, chunk) in (0u64..).zip(parts(&whole)) {
            let key = match part {
                0 => row_key(live, run.0, 0),
                part => row_key(Table::Inputs, run.0, HEADER_TAIL | part),
            };
            self.part(key, part, whole.len(), chunk);
        }
        self.scratch = whole;
    }

    /// Writes a record under (major, minor), (major, minor + 1) and so on, as many as it takes.
    fn in_parts(&mut self, table: Table, major: u64, minor: u64, put: impl FnOnce(&mut Vec<u8>)) {
        let mut whole = std::mem::take(&mut self.scratch);
        whole.clear();
        put(&mut whole);
        for (part, chunk) in (0u64..).zip(parts(&whole)) {
            self.part(
                row_key(table, major, minor + part),
                part,
                whole.len(),
                chunk,
            );
        }
        self.scratch = whole;
    }

    fn part(&mut self, key: RowKey, part: u64, whole: usize, chunk: &[u8]) {
        let start = self.start();
        self.arena.push(ROW_VERSION);
        if part == 0 {
            put_varint(&mut self.arena, whole as u64);
        }
        self.arena.extend_from_slice(chunk);
        self.finish(key, start);
    }

    fn stored(&mut self, at: &crate::broker::types::PayloadRef, owner: u64) {
        if let Some(end) = self.payloads.note(at, owner) {
            let start = self.start();
            self.arena.push(ROW_VERSION);
            put_varint(&mut self.arena, end);
            self.finish(row_key(Table::Payload, u64::from(at.segment), owner), start);
        }
    }

    fn release(&mut self, owner: u64) {
        for segment in self.payloads.release(owner) {
            self.delete(row_key(Table::Payload, u64::from(segment), owner));
        }
    }

    /// Makes room for events `event..event + count` of a run in the row at work, or closes it and begins one.
    fn begin_event(&mut self, run: RunSeq, event: u64, count: u64, now: Timestamp) {
        let events = &self.events;
        if events.value.is_empty()
            || events.run != run.0
            || events.next != event
            || events.value.len() > EVENT_BYTES
        {
            self.close_events();
            let events = &mut self.events;
            events.run = run.0;
            events.first = event;
            events.node = 0;
            events.value.push(ROW_VERSION);
            put_varint(&mut events.value, now.0);
        }
        self.events.next = event.saturating_add(count);
    }

    fn close_events(&mut self) {
        if self.events.value.is_empty() {
            return;
        }
        let start = self.start();
        self.arena.extend_from_slice(&self.events.value);
        self.events.value.clear();
        let key = row_key(Table::Event, self.events.run, self.events.first);
        self.finish(key, start);
    }

    fn start(&self) -> u32 {
        self.arena.len() as u32
    }

    fn finish(&mut self, key: RowKey, start: u32) {
        self.rows.push((key, start..self.arena.len() as u32));
    }

    fn delete(&mut self, key: RowKey) {
        self.rows.push((key, 0..0));
    }
}

/// Cuts a record into parts; an empty one is one empty part.
fn parts(whole: &[u8]) -> impl Iterator<Item = &[u8]> {
    let empty = whole.is_empty().then_some(whole);
    whole.chunks(PART_BYTES).chain(empty)
}

pub(super) fn row_key(table: Table, major: u64, minor: u64) -> RowKey {
    RowKey {
        table,
        major,
        minor,
    }
}

fn key_row(key: KeyHash, step: u64) -> RowKey {
    row_key(Table::Key, step, key.0 as u64)
}

/// What a node became, as an event says it.
fn event_code(record: &NodeRecord) -> u8 {
    match record.progress {
        Progress::Open if record.note == Note::Reopened => 0,
        Progress::Open => 1,
        Progress::Leased { .. } => 2,
        Progress::Backoff => 3,
        Progress::Settling => 4,
        Progress::Succeeded => 5,
        Progress::Failed => 6,
        Progress::Skipped => 7,
    }
}
