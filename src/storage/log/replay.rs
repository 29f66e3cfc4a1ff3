//! The start: every entry behind the state, and where the log ends.
//!
//! Only what nobody was told about may be missing. Entries are synced one at a time, so at most one can be torn, and it is the
//! last: a bad entry with a valid one anywhere after it is damage, and so is everything else that was synced before.

use std::path::PathBuf;

use bytes::Bytes;

use super::entry::{ENTRY_HEADER, Header, Kind, padded};
use super::prepare::UNFINISHED;
use super::reading::{Pieces, search};
use super::segment::{SEGMENT_HEADER, Segment, number_of};
use super::{LogIdentity, LogPlace, io, sync_dir};
use crate::broker::types::{Timestamp, WallTime};
use crate::storage::{StorageError, sync_shim};

/// An entry found at the start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Replayed {
    /// The place after it: its own, not the end of the log.
    pub after: LogPlace,
    /// Broker time of the turn.
    pub now: Timestamp,
    /// Calendar time of the turn.
    pub wall: WallTime,
    /// The facts. `None` for entries without: seals.
    pub body: Option<Bytes>,
}

/// Where the log ends.
pub(super) struct End {
    pub(super) active: Segment,
    pub(super) place: LogPlace,
    pub(super) sealed: bool,
    /// Segments that the state has left behind.
    pub(super) behind: Vec<PathBuf>,
    /// The segment after the active one is whole and unused.
    pub(super) next_is_ready: bool,
}

/// Reads the log from a place on.
pub(super) fn replay(
    identity: &LogIdentity,
    from: LogPlace,
    replayed: &mut dyn FnMut(Replayed) -> Result<(), StorageError>,
) -> Result<End, StorageError> {
    let size = identity.segment_bytes;
    let numbers = segments(identity)?;
    let first = from.position / size;
    let mut place = from;
    let mut sealed = true;
    let mut segment = Segment::open(identity, first)?;
    'segments: loop {
        let start = place.position % size;
        if start < SEGMENT_HEADER {
            return Err(damaged(
                place.position,
                "the state names a place before the first entry",
            ));
        }
        let base = segment.number * size;
        let mut pieces = Pieces::new(identity, &segment);
        loop {
            let Some((header, bytes)) = pieces.entry(place.position - base)? else {
                nothing_after(identity, &segment, place, &numbers)?;
                break 'segments;
            };
            if header.sequence != place.sequence + 1 {
                let detail = format!("entry {} follows entry {}", header.sequence, place.sequence);
                return Err(damaged(place.position, &detail));
            }
            place = LogPlace {
                position: place.position + padded(header.length as usize) as u64,
                sequence: header.sequence,
            };
            if header.kind == Kind::Roll {
                // What was replayed may still be in the page cache only, if the process was killed and not the machine.
                sync_shim::fdatasync(&segment.file).map_err(|e| io("sync", &segment.path, e))?;
                segment = Segment::open(identity, segment.number + 1)?;
                place.position = segment.number * size + SEGMENT_HEADER;
                continue 'segments;
            }
            sealed = header.kind == Kind::Seal;
            replayed(Replayed {
                after: place,
                now: header.now,
                wall: header.wall,
                body: (header.kind == Kind::Facts)
                    .then(|| bytes.slice(ENTRY_HEADER..header.length as usize)),
            })?;
        }
    }
    sync_shim::fdatasync(&segment.file).map_err(|e| io("sync", &segment.path, e))?;
    let (behind, next_is_ready) = tidy(identity, &numbers, first, segment.number)?;
    Ok(End {
        active: segment,
        place,
        sealed,
        behind,
        next_is_ready,
    })
}

/// Numbers of the segments that are there, ascending.
fn segments(identity: &LogIdentity) -> Result<Vec<u64>, StorageError> {
    let dir = &identity.dir;
    let mut numbers = Vec::new();
    for file in std::fs::read_dir(dir).map_err(|e| io("list", dir, e))? {
        let file = file.map_err(|e| io("list", dir, e))?;
        if let Some(number) = file.file_name().to_str().and_then(number_of) {
            numbers.push(number);
        }
    }
    numbers.sort_unstable();
    Ok(numbers)
}

/// Makes sure that no valid entry follows a bad one, in its segment or in a later one.
fn nothing_after(
    identity: &LogIdentity,
    active: &Segment,
    place: LogPlace,
    numbers: &[u64],
) -> Result<(), StorageError> {
    let size = identity.segment_bytes;
    let refuse = |at: u64, found: Header| {
        let detail = format!(
            "entry {} is not whole, but entry {} at byte {at} is",
            place.sequence + 1,
            found.sequence
        );
        Err(damaged(place.position, &detail))
    };
    let from = place.position - active.number * size;
    if let Some((at, found)) = search(identity, active, from, place.sequence)? {
        return refuse(at, found);
    }
    for number in numbers.iter().filter(|n| **n > active.number) {
        // One that is not whole was never used: its header is durable before its name.
        let Ok(segment) = Segment::open(identity, *number) else {
            continue;
        };
        if let Some((at, found)) = search(identity, &segment, SEGMENT_HEADER, place.sequence)? {
            return refuse(at, found);
        }
    }
    Ok(())
}

/// Names the segments that are done with, and deletes what is nobody's.
fn tidy(
    identity: &LogIdentity,
    numbers: &[u64],
    first: u64,
    active: u64,
) -> Result<(Vec<PathBuf>, bool), StorageError> {
    let path = |number: u64| super::segment::path(&identity.dir, number);
    let remove = |path: PathBuf| match std::fs::remove_file(&path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(io("delete", &path, error))
        }
        _ => Ok(()),
    };
    remove(identity.dir.join(UNFINISHED))?;
    let mut next_is_ready = false;
    for number in numbers.iter().copied().filter(|n| *n > active) {
        if number == active + 1 && Segment::open(identity, number).is_ok() {
            next_is_ready = true;
        } else {
            remove(path(number))?;
        }
    }
    sync_dir(&identity.dir)?;
    let behind = numbers.iter().copied().filter(|n| *n < first);
    Ok((behind.map(path).collect(), next_is_ready))
}

fn damaged(position: u64, detail: &str) -> StorageError {
    StorageError::Corrupt {
        record: format!("the log at byte {position}"),
        detail: detail.to_owned(),
    }
}
