//! Reading a segment in pieces: what a start needs of it, and not 64 MiB at once.
//!
//! Holes are zeros, and zeros are no entry, so a search need not read them.

use std::os::unix::fs::FileExt;

use bytes::Bytes;

use super::entry::{self, ALIGN, ENTRY_HEADER, Header};
use super::segment::Segment;
use super::{LogIdentity, io};
use crate::storage::{StorageError, sync_shim};

/// What is read at once, unless an entry is larger. It stays in the processor's cache.
const PIECE: u64 = 256 << 10;
/// Zeros are recognised in blocks of this.
const BLOCK: usize = 4_096;
static ZEROS: [u8; BLOCK] = [0; BLOCK];

/// One segment, read from front to back.
pub(super) struct Pieces<'a> {
    identity: &'a LogIdentity,
    segment: &'a Segment,
    /// Offset of `bytes` in the segment.
    start: u64,
    bytes: Bytes,
}

impl<'a> Pieces<'a> {
    pub(super) fn new(identity: &'a LogIdentity, segment: &'a Segment) -> Self {
        Self {
            identity,
            segment,
            start: 0,
            bytes: Bytes::new(),
        }
    }

    /// The entry at an offset and its bytes. `None`: there is none, or it is not whole.
    pub(super) fn entry(&mut self, offset: u64) -> Result<Option<(Header, Bytes)>, StorageError> {
        let LogIdentity {
            store_id,
            segment_bytes,
            ..
        } = self.identity;
        let position = self.segment.number * segment_bytes + offset;
        let begin = self.from(offset, ENTRY_HEADER as u64)?;
        let Some(length) = entry::length(&begin, store_id, position) else {
            return Ok(None);
        };
        if u64::from(length) > segment_bytes - offset {
            return Ok(None);
        }
        let bytes = self.from(offset, u64::from(length))?;
        Ok(entry::read(&bytes, store_id, position).map(|header| (header, bytes)))
    }

    /// The bytes from an offset on: at least so many, or all up to the end of the segment.
    fn from(&mut self, offset: u64, needed: u64) -> Result<Bytes, StorageError> {
        let left = self.identity.segment_bytes.saturating_sub(offset);
        let there = offset
            .checked_sub(self.start)
            .and_then(|skipped| (self.bytes.len() as u64).checked_sub(skipped));
        if there.is_none_or(|there| there < needed.min(left)) {
            let mut bytes = vec![0; needed.max(PIECE).min(left) as usize];
            read(self.segment, &mut bytes, offset)?;
            self.bytes = Bytes::from(bytes);
            self.start = offset;
        }
        Ok(self.bytes.slice((offset - self.start) as usize..))
    }
}

/// The first valid entry after entry `sequence` that begins at an offset or behind it, and its position.
pub(super) fn search(
    identity: &LogIdentity,
    segment: &Segment,
    from: u64,
    sequence: u64,
) -> Result<Option<(u64, Header)>, StorageError> {
    let size = identity.segment_bytes;
    let mut buffer = vec![0; PIECE as usize + ENTRY_HEADER];
    // A hole that was read, ahead or not, is in the page cache and looks like data: the search would follow itself to the end.
    sync_shim::read_nothing_ahead(&segment.file).map_err(|e| io("advise on", &segment.path, e))?;
    let mut offset = from;
    while offset < size {
        // No entry begins in a hole: its length is not 0.
        let Some((data, hole)) = data_from(segment, offset)? else {
            break;
        };
        offset = offset.max(data - data % ALIGN as u64);
        let length = (buffer.len() as u64).min(size - offset);
        let bytes = &mut buffer[..length as usize];
        let (written, zeros) = bytes.split_at_mut(length.min(hole.saturating_sub(offset)) as usize);
        read(segment, written, offset)?;
        zeros.fill(0);
        // What begins in the last bytes begins the next piece.
        let mut starts = (0..length.min(PIECE) as usize).step_by(BLOCK);
        let found =
            starts.find_map(|at| candidates(identity, segment, bytes, offset, at, sequence));
        if let Some(found) = found {
            return found.map(Some);
        }
        offset += PIECE;
    }
    Ok(None)
}

/// Where data is that begins at an offset or behind it, and where its end. `None`: only zeros follow.
fn data_from(segment: &Segment, offset: u64) -> Result<Option<(u64, u64)>, StorageError> {
    let Some(data) = sync_shim::next_data(&segment.file, offset)
        .map_err(|e| io("look for data in", &segment.path, e))?
    else {
        return Ok(None);
    };
    let hole = sync_shim::next_hole(&segment.file, data)
        .map_err(|e| io("look for holes in", &segment.path, e))?;
    Ok(Some((data, hole)))
}

/// Looks at everything that may begin in the block at `at`; `bytes` lie at `offset` of the segment.
fn candidates(
    identity: &LogIdentity,
    segment: &Segment,
    bytes: &[u8],
    offset: u64,
    at: usize,
    sequence: u64,
) -> Option<Result<(u64, Header), StorageError>> {
    // The sequence numbers of entries that begin in this block.
    let numbers = bytes.get(at + 8..bytes.len().min(at + 8 + BLOCK))?;
    if numbers == &ZEROS[..numbers.len()] {
        return None;
    }
    for (n, number) in numbers.chunks_exact(ALIGN).enumerate() {
        let number = u64::from_le_bytes(number.try_into().ok()?);
        // Most of what lies here are entries of long ago: a cheap look before the checksum.
        if number <= sequence {
            continue;
        }
        let at = at + n * ALIGN;
        let position = segment.number * identity.segment_bytes + offset + at as u64;
        if entry::length(&bytes[at..], &identity.store_id, position).is_none() {
            continue;
        }
        match Pieces::new(identity, segment).entry(offset + at as u64) {
            Ok(None) => {}
            Ok(Some((header, _))) => return Some(Ok((position, header))),
            Err(error) => return Some(Err(error)),
        }
    }
    None
}

fn read(segment: &Segment, bytes: &mut [u8], offset: u64) -> Result<(), StorageError> {
    segment
        .file
        .read_exact_at(bytes, offset)
        .map_err(|e| io("read", &segment.path, e))
}
