//! Rows: what a fact looks like as keys and values, before they are packed into pages.
//!
//! `records/` turns facts into rows and back; `pages.rs`, `sled.rs` and `overlay.rs` only ever see rows.

use bytes::Bytes;

/// The tables. The byte is the first of every sled key; numbers are never reused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Table {
    /// Meta records, one key each, not paged.
    Meta = b'm',
    /// Specs: (spec id, part). Kept in one run-less digest group.
    Spec = b's',
    /// Names of routes and outputs: (name id, part).
    Name = b't',
    /// What actions announced: (xxh3-64 of the action, part).
    Announced = b'w',
    /// Headers of open runs: (run, 0). Start scans only these.
    OpenRun = b'o',
    /// Headers of ended runs: (run, 0).
    EndedRun = b'r',
    /// What changes about a node: (run, node).
    Node = b'n',
    /// Arguments, written once: (run, node).
    Arguments = b'a',
    /// Inputs and references as ranges: (run, node << 32 | part); parts from 0 are inputs, from `1 << 31` references.
    /// The node number `u32::MAX` holds what did not fit the run's header.
    Inputs = b'i',
    /// Outcomes: (run, node).
    Outcome = b'v',
    /// Events: (run, number of the first event in the row).
    Event = b'e',
    /// Submission and dedup keys: (broker time taken >> 13, low half of the hash).
    Key = b'k',
    /// Inbox positions: (route, xxh3-64 of the partition with a part number as its low 16 bits).
    Position = b'b',
    /// Deliveries owed: (output, seq).
    Outbox = b'f',
    /// Cursor of an outbox: (output, part).
    OutboxCursor = b'F',
    /// Dead letters: (route, seq << 16 | part); number 0 holds the number given last.
    DeadLetter = b'd',
    /// Which runs have large payloads in a payload segment: (segment, run). Not one of the tables of runs.
    Payload = b'g',
}

/// Place of a row. Rows of one `major` (a run, a route, an hour) are neighbours and die together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RowKey {
    /// Which table.
    pub table: Table,
    /// Run number, or what takes its place.
    pub major: u64,
    /// Node number, or what takes its place.
    pub minor: u64,
}

/// A row to be written, or deleted when there is no value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Row {
    /// Where.
    pub key: RowKey,
    /// What; at most 3.5 KiB. `None` deletes.
    pub value: Option<Bytes>,
}
