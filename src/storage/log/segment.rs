//! One segment file: its name, its header, its size.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use xxhash_rust::xxh3::xxh3_64;

use super::{LogIdentity, io};
use crate::storage::{StorageError, sync_shim};

/// Bytes before the first entry.
pub(super) const SEGMENT_HEADER: u64 = 64;
/// Zeros are written so far ahead of the entries.
pub(super) const FILL: u64 = 1 << 20;
const MAGIC: &[u8; 8] = b"dagolog\n";
const VERSION: u32 = 1;

/// A segment that is open.
pub(super) struct Segment {
    pub(super) number: u64,
    pub(super) file: File,
    pub(super) path: PathBuf,
    /// Blocks up to here have been written; those behind are allocated only.
    filled: u64,
}

/// Where a segment lies.
pub(super) fn path(dir: &Path, number: u64) -> PathBuf {
    dir.join(format!("{number:016x}.log"))
}

/// The number in a segment's file name.
pub(super) fn number_of(name: &str) -> Option<u64> {
    let hex = name.strip_suffix(".log")?;
    (hex.len() == 16).then(|| u64::from_str_radix(hex, 16).ok())?
}

/// The header of a segment.
pub(super) fn header(identity: &LogIdentity, number: u64) -> [u8; SEGMENT_HEADER as usize] {
    let mut header = [0; SEGMENT_HEADER as usize];
    header[..8].copy_from_slice(MAGIC);
    header[8..12].copy_from_slice(&VERSION.to_le_bytes());
    header[16..32].copy_from_slice(&identity.store_id);
    header[32..40].copy_from_slice(&number.to_le_bytes());
    header[40..48].copy_from_slice(&identity.segment_bytes.to_le_bytes());
    let sum = xxh3_64(&header[..48]);
    header[48..56].copy_from_slice(&sum.to_le_bytes());
    header
}

impl Segment {
    /// Opens a segment that must be there, whole and the right one.
    pub(super) fn open(identity: &LogIdentity, number: u64) -> Result<Self, StorageError> {
        let path = path(&identity.dir, number);
        let corrupt = |detail: String| StorageError::Corrupt {
            record: format!("log segment {}", path.display()),
            detail,
        };
        let file = match OpenOptions::new().read(true).write(true).open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return Err(corrupt("it is missing".to_owned()));
            }
            Err(error) => return Err(io("open", &path, error)),
        };
        let length = file.metadata().map_err(|e| io("stat", &path, e))?.len();
        if length != identity.segment_bytes {
            let expected = identity.segment_bytes;
            return Err(corrupt(format!(
                "it has {length} bytes instead of {expected}"
            )));
        }
        let mut found = [0; SEGMENT_HEADER as usize];
        file.read_exact_at(&mut found, 0)
            .map_err(|e| io("read", &path, e))?;
        if found != header(identity, number) {
            return Err(corrupt("its header is not this segment's".to_owned()));
        }
        let filled = sync_shim::next_hole(&file, SEGMENT_HEADER)
            .map_err(|e| io("look for holes in", &path, e))?;
        Ok(Self {
            number,
            file,
            path,
            filled,
        })
    }

    /// Called before something is written up to `end`: has zeros written behind it, so that most writes overwrite and need no
    /// metadata. They are durable with the next sync, and nothing depends on it.
    pub(super) fn fill(&mut self, end: u64, size: u64) -> Result<(), StorageError> {
        if end <= self.filled {
            return Ok(());
        }
        let to = end.next_multiple_of(FILL).min(size);
        if to > end {
            let zeros = vec![0; (to - end) as usize];
            self.file
                .write_all_at(&zeros, end)
                .map_err(|e| io("write", &self.path, e))?;
        }
        self.filled = to;
        Ok(())
    }
}
