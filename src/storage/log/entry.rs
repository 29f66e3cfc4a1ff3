//! One entry: a header of 40 bytes, a body, zeros up to a multiple of 8.

use xxhash_rust::xxh3::{xxh3_64, xxh3_64_with_seed};

use crate::broker::types::{Timestamp, WallTime};

/// Bytes before the body.
pub(super) const ENTRY_HEADER: usize = 40;
/// Entries begin at multiples of this.
pub(super) const ALIGN: usize = 8;
/// The version of the entry.
const VERSION: u8 = 1;

/// What an entry is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// The facts of a turn.
    Facts,
    /// The end of a burst.
    Seal,
    /// The log goes on in the next segment.
    Roll,
}

/// What an entry says about itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) kind: Kind,
    /// Header and body in bytes, without the zeros after it; never 0.
    pub(super) length: u32,
    pub(super) sequence: u64,
    pub(super) now: Timestamp,
    pub(super) wall: WallTime,
}

/// Length in the log of an entry of that length.
pub(super) fn padded(length: usize) -> usize {
    length.next_multiple_of(ALIGN)
}

/// The seed of the body's checksum: it covers the header, the store and the position. Its low 16 bits stand in the header, so
/// that a search through old bytes need not hash whole bodies to find that they are none.
fn seed(header: &[u8], store_id: &[u8; 16], position: u64) -> u64 {
    let mut start = [0; 16 + 8 + 32];
    start[..16].copy_from_slice(store_id);
    start[16..24].copy_from_slice(&position.to_le_bytes());
    start[24..].copy_from_slice(&header[..32]);
    start[24 + 6..24 + 8].fill(0);
    xxh3_64(&start)
}

/// Fills in the header before a body that is already in place, and the zeros after it.
pub(super) fn finish(buffer: &mut Vec<u8>, header: &Header, store_id: &[u8; 16], position: u64) {
    let kind = match header.kind {
        Kind::Facts => 1,
        Kind::Seal => 2,
        Kind::Roll => 3,
    };
    buffer[0..4].copy_from_slice(&header.length.to_le_bytes());
    buffer[4..8].copy_from_slice(&[kind, VERSION, 0, 0]);
    buffer[8..16].copy_from_slice(&header.sequence.to_le_bytes());
    buffer[16..24].copy_from_slice(&header.now.0.to_le_bytes());
    buffer[24..32].copy_from_slice(&header.wall.0.to_le_bytes());
    let seed = seed(buffer, store_id, position);
    buffer[6..8].copy_from_slice(&seed.to_le_bytes()[..2]);
    let sum = xxh3_64_with_seed(&buffer[ENTRY_HEADER..], seed);
    buffer[32..40].copy_from_slice(&sum.to_le_bytes());
    buffer.resize(padded(buffer.len()), 0);
}

/// The length of what begins like an entry: all but the sum is right. Needs the header only.
pub(super) fn length(bytes: &[u8], store_id: &[u8; 16], position: u64) -> Option<u32> {
    begin(bytes, store_id, position).map(|(length, ..)| length)
}

/// Length, kind and seed of what begins like an entry.
fn begin(bytes: &[u8], store_id: &[u8; 16], position: u64) -> Option<(u32, Kind, u64)> {
    let length = u32::from_le_bytes(bytes.get(..4)?.try_into().ok()?);
    if bytes.len() < ENTRY_HEADER || (length as usize) < ENTRY_HEADER {
        return None;
    }
    let kind = match bytes[4..6] {
        [1, VERSION] => Kind::Facts,
        [2, VERSION] => Kind::Seal,
        [3, VERSION] => Kind::Roll,
        _ => return None,
    };
    let seed = seed(bytes, store_id, position);
    (bytes[6..8] == seed.to_le_bytes()[..2]).then_some((length, kind, seed))
}

/// Reads the entry at the start of `bytes`. `None`: there is none, or it is not whole.
pub(super) fn read(bytes: &[u8], store_id: &[u8; 16], position: u64) -> Option<Header> {
    let (length, kind, seed) = begin(bytes, store_id, position)?;
    let whole = length as usize;
    if whole > bytes.len() {
        return None;
    }
    let number = |at: usize| -> Option<u64> {
        Some(u64::from_le_bytes(bytes.get(at..at + 8)?.try_into().ok()?))
    };
    let header = Header {
        kind,
        length,
        sequence: number(8)?,
        now: Timestamp(number(16)?),
        wall: WallTime(number(24)?),
    };
    let sum = xxh3_64_with_seed(&bytes[ENTRY_HEADER..whole], seed);
    let empty = whole == ENTRY_HEADER;
    (number(32)? == sum && empty == (kind != Kind::Facts)).then_some(header)
}
