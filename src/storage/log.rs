//! The commit log: what a turn leaves behind, made durable by one sync. It is the truth; everything else is brought forward
//! behind it.
//!
//! A position is a byte of the endless log: segment number times segment size, plus the offset in the segment. An entry's
//! checksum covers its position, its sequence number and the store's id, so an old entry in a recycled segment never passes.
//! A segment's blocks are allocated before it is used, and zeros or old entries lie ahead of the end: overwriting needs no
//! metadata, and half as long a sync.
//!
//! Knows bytes, not facts. After any failed write or sync it refuses everything (G17).

mod entry;
mod prepare;
mod reading;
mod replay;
mod segment;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

pub use replay::Replayed;

use entry::{ENTRY_HEADER, Kind, padded};
use prepare::Preparer;
use segment::{SEGMENT_HEADER, Segment};

use super::{StorageError, sync_shim};
use crate::broker::types::{Timestamp, WallTime};

/// Segments kept for recycling; more are deleted.
const SPARES: usize = 2;
/// A buffer that a large entry has grown beyond this is given back.
const BUFFER_BYTES: usize = 8 << 20;

/// What the log belongs to and how it is cut.
#[derive(Debug, Clone)]
pub struct LogIdentity {
    /// Directory of the segments.
    pub dir: PathBuf,
    /// The store's id.
    pub store_id: [u8; 16],
    /// Size of a segment in bytes. Fixed when the store is made.
    pub segment_bytes: u64,
}

/// A place in the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LogPlace {
    /// Where the next entry begins.
    pub position: u64,
    /// Number of the entry before it.
    pub sequence: u64,
}

/// The log, open for writing at its end.
pub struct Log {
    identity: LogIdentity,
    active: Segment,
    place: LogPlace,
    /// The last entry is a seal, or there is none.
    sealed: bool,
    /// The oldest segment that is kept.
    first: u64,
    spares: VecDeque<PathBuf>,
    preparer: Preparer,
    buffer: Vec<u8>,
    failed: Option<String>,
}

impl Log {
    /// Makes an empty log in a directory that does not exist yet; everything is durable but the directory's own name. Gives
    /// the place of the first entry.
    pub fn create(identity: &LogIdentity) -> Result<LogPlace, StorageError> {
        std::fs::create_dir(&identity.dir).map_err(|e| io("create", &identity.dir, e))?;
        prepare::make_segment(identity, 1, None)?;
        Ok(LogPlace {
            position: identity.segment_bytes + SEGMENT_HEADER,
            sequence: 0,
        })
    }

    /// Opens the log, gives every entry after `from` to `replayed`, and is ready to go on after the last one.
    pub fn open(
        identity: LogIdentity,
        from: LogPlace,
        replayed: &mut dyn FnMut(Replayed) -> Result<(), StorageError>,
    ) -> Result<Self, StorageError> {
        let end = replay::replay(&identity, from, replayed)?;
        let mut preparer = Preparer::start(identity.clone())?;
        let mut spares = VecDeque::from(end.behind);
        let next = end.active.number + 1;
        if end.next_is_ready {
            preparer.is_ready(next);
        } else {
            preparer.request(next, spares.pop_front());
        }
        let mut log = Self {
            place: end.place,
            sealed: end.sealed,
            first: from.position / identity.segment_bytes,
            active: end.active,
            identity,
            spares,
            preparer,
            buffer: Vec::new(),
            failed: None,
        };
        log.drop_spares();
        Ok(log)
    }

    /// Where the next entry begins, and the number of the last one.
    pub fn place(&self) -> LogPlace {
        self.place
    }

    /// Whether nothing was written since the last seal.
    pub fn is_sealed(&self) -> bool {
        self.sealed
    }

    /// Writes an entry whose body `put` appends, and syncs it. Gives the place after it.
    pub fn append(
        &mut self,
        now: Timestamp,
        wall: WallTime,
        put: impl FnOnce(&mut Vec<u8>),
    ) -> Result<LogPlace, StorageError> {
        self.check()?;
        let mut buffer = std::mem::take(&mut self.buffer);
        buffer.clear();
        buffer.resize(ENTRY_HEADER, 0);
        put(&mut buffer);
        let result = self.write(Kind::Facts, now, wall, &mut buffer);
        if buffer.capacity() <= BUFFER_BYTES {
            self.buffer = buffer;
        }
        self.sealed = false;
        self.settle(result)
    }

    /// Marks the end of a burst: damage to what is before the mark cannot be taken for a torn tail.
    pub fn seal(&mut self, now: Timestamp, wall: WallTime) -> Result<(), StorageError> {
        self.check()?;
        if self.sealed {
            return Ok(());
        }
        let mut buffer = vec![0; ENTRY_HEADER];
        let result = self.write(Kind::Seal, now, wall, &mut buffer);
        self.settle(result)?;
        self.sealed = true;
        Ok(())
    }

    /// Gives up whole segments before `position`, which the state must have reached by a sync of its own.
    pub fn shorten(&mut self, position: u64) {
        let keep = (position / self.identity.segment_bytes).min(self.active.number);
        while self.first < keep {
            self.spares
                .push_back(segment::path(&self.identity.dir, self.first));
            self.first += 1;
        }
        self.drop_spares();
    }

    /// The oldest position that is still kept.
    pub fn first_position(&self) -> u64 {
        self.first * self.identity.segment_bytes
    }

    fn drop_spares(&mut self) {
        while self.spares.len() > SPARES {
            if let Some(path) = self.spares.pop_front() {
                self.preparer.delete(path);
            }
        }
    }

    fn check(&self) -> Result<(), StorageError> {
        match &self.failed {
            None => Ok(()),
            Some(reason) => Err(StorageError::Stopped(reason.clone())),
        }
    }

    fn settle<T>(&mut self, result: Result<T, StorageError>) -> Result<T, StorageError> {
        if let Err(error) = &result {
            self.failed = Some(error.to_string());
        }
        result
    }

    fn write(
        &mut self,
        kind: Kind,
        now: Timestamp,
        wall: WallTime,
        buffer: &mut Vec<u8>,
    ) -> Result<LogPlace, StorageError> {
        let size = self.identity.segment_bytes;
        let needed = padded(buffer.len()) as u64 + ENTRY_HEADER as u64;
        if needed > size - SEGMENT_HEADER {
            return Err(StorageError::State {
                what: "writing a log entry",
                detail: format!("{} bytes do not fit a segment of {size}", buffer.len()),
            });
        }
        if self.place.position % size + needed > size {
            self.roll(now, wall)?;
        }
        self.put(kind, now, wall, buffer)
    }

    /// Ends the active segment with an entry that says so, and goes on in the next one.
    fn roll(&mut self, now: Timestamp, wall: WallTime) -> Result<(), StorageError> {
        let number = self.active.number + 1;
        self.preparer.wait_for(number)?;
        let next = Segment::open(&self.identity, number)?;
        let mut buffer = vec![0; ENTRY_HEADER];
        self.put(Kind::Roll, now, wall, &mut buffer)?;
        self.active = next;
        self.place.position = number * self.identity.segment_bytes + SEGMENT_HEADER;
        self.preparer.request(number + 1, self.spares.pop_front());
        Ok(())
    }

    fn put(
        &mut self,
        kind: Kind,
        now: Timestamp,
        wall: WallTime,
        buffer: &mut Vec<u8>,
    ) -> Result<LogPlace, StorageError> {
        let position = self.place.position;
        let sequence = self.place.sequence + 1;
        let header = entry::Header {
            kind,
            length: buffer.len() as u32,
            sequence,
            now,
            wall,
        };
        entry::finish(buffer, &header, &self.identity.store_id, position);
        let offset = position % self.identity.segment_bytes;
        self.active
            .fill(offset + buffer.len() as u64, self.identity.segment_bytes)?;
        let Segment { file, path, .. } = &self.active;
        file.write_all_at(buffer, offset)
            .map_err(|e| io("write", path, e))?;
        sync_shim::fdatasync(file).map_err(|e| io("sync", path, e))?;
        self.place = LogPlace {
            position: position + buffer.len() as u64,
            sequence,
        };
        Ok(self.place)
    }
}

/// An error of the operating system, with the file's name.
pub(super) fn io(what: &'static str, path: &Path, source: std::io::Error) -> StorageError {
    StorageError::Io {
        what,
        path: path.display().to_string(),
        source,
    }
}

/// Makes the names in a directory durable.
pub(super) fn sync_dir(dir: &Path) -> Result<(), StorageError> {
    std::fs::File::open(dir)
        .and_then(|dir| dir.sync_all())
        .map_err(|e| io("sync", dir, e))
}
