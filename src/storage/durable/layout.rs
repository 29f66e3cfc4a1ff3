//! The store's directory: what lies in it, how it is made, how it is recognised.
//!
//! ```text
//! FORMAT      version, id and sizes; last to appear, so a store that has it is whole
//! LOCK        pid of the process that has the store open
//! log/        the commit log
//! state/      sled
//! payloads/   large payloads
//! .new/       a store being made: while it exists without FORMAT beside it, nothing here was ever used
//! ```

use std::fmt::Write as _;
use std::fs::{DirBuilder, Permissions};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::Path;

use xxhash_rust::xxh3::xxh3_64;

use super::{DurableOptions, StateMeta, StateThread, StorageError};
use crate::broker::types::{Timestamp, WallTime};
use crate::storage::lock::StoreLock;
use crate::storage::log::{Log, LogIdentity, io, sync_dir};
use crate::storage::payloads::Payloads;

/// The newest format that this program reads, and the one that it writes.
pub const FORMAT: u32 = 1;

pub(super) const LOG: &str = "log";
pub(super) const STATE: &str = "state";
pub(super) const PAYLOADS: &str = "payloads";
const FORMAT_FILE: &str = "FORMAT";
const LOCK_FILE: &str = "LOCK";
const NEW: &str = ".new";
/// Parts of a store, in the order in which a new one gets them.
const PARTS: [&str; 3] = [LOG, STATE, PAYLOADS];
/// The smallest log segment: a turn of the default size must fit.
const MIN_SEGMENT: u64 = 4_096;

/// What `FORMAT` says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StoreFormat {
    /// Version of everything in the store.
    pub version: u32,
    /// The store's id.
    pub store_id: [u8; 16],
    /// Size of a log segment.
    pub segment_bytes: u64,
}

impl StoreFormat {
    fn text(&self) -> String {
        let mut text = format!("dagorama store\nformat {}\nid ", self.version);
        for byte in self.store_id {
            let _ = write!(text, "{byte:02x}");
        }
        let _ = write!(text, "\nsegment-bytes {}\n", self.segment_bytes);
        let sum = xxh3_64(text.as_bytes());
        let _ = writeln!(text, "sum {sum:016x}");
        text
    }

    fn parse(text: &str, path: &Path) -> Result<Self, StorageError> {
        let damaged = |detail: &str| StorageError::Corrupt {
            record: path.display().to_string(),
            detail: detail.to_owned(),
        };
        let mut lines = text.lines();
        if lines.next() != Some("dagorama store") {
            return Err(damaged("it does not begin like one of a store"));
        }
        let mut field = |name: &str| {
            let line = lines.next().unwrap_or_default();
            line.strip_prefix(name)
                .and_then(|rest| rest.strip_prefix(' '))
                .ok_or_else(|| damaged(&format!("the line {name} is missing")))
        };
        let version = field("format")?
            .parse()
            .map_err(|_| damaged("the version is not a number"))?;
        // A newer one may go on as it likes, so this comes before everything else.
        if version > FORMAT {
            return Err(StorageError::TooNew {
                path: path.display().to_string(),
                found: version,
                known: FORMAT,
            });
        }
        let id = u128::from_str_radix(field("id")?, 16).map_err(|_| damaged("the id is none"))?;
        let segment_bytes = field("segment-bytes")?
            .parse()
            .map_err(|_| damaged("the segment size is not a number"))?;
        let format = Self {
            version,
            store_id: id.to_be_bytes(),
            segment_bytes,
        };
        if format.text() != text || version == 0 || segment_bytes < MIN_SEGMENT {
            return Err(damaged("its sum is wrong"));
        }
        Ok(format)
    }
}

/// Reads what a store says about itself, without opening it. `None`: there is no store, or only a half-made one.
pub fn read_format(dir: &Path) -> Result<Option<StoreFormat>, StorageError> {
    let path = dir.join(FORMAT_FILE);
    match std::fs::read(&path) {
        Ok(bytes) => StoreFormat::parse(&String::from_utf8_lossy(&bytes), &path).map(Some),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(io("read", &path, error)),
    }
}

/// Locks the store, after making it if there is none.
pub(super) fn open_or_create(
    dir: &Path,
    options: &DurableOptions,
) -> Result<(StoreFormat, StoreLock), StorageError> {
    // Before anything is written, the lock's pid included.
    read_format(dir)?;
    make_dir(dir)?;
    let lock = StoreLock::take(dir)?;
    if let Some(format) = read_format(dir)? {
        remove_dir(&dir.join(NEW))?;
        return Ok((format, lock));
    }
    clear_half_made(dir)?;
    let format = create(dir, options)?;
    Ok((format, lock))
}

fn make_dir(dir: &Path) -> Result<(), StorageError> {
    if dir.is_dir() {
        return Ok(());
    }
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .map_err(|e| io("create", dir, e))?;
    let parent = match dir.parent() {
        Some(parent) if parent.as_os_str().is_empty() => Path::new("."),
        Some(parent) => parent,
        None => return Ok(()),
    };
    sync_dir(parent)
}

/// Removes what a crash left of a store that was being made. Refuses to touch anything else.
fn clear_half_made(dir: &Path) -> Result<(), StorageError> {
    let new = dir.join(NEW);
    let half_made = new.is_dir();
    let list = |e| io("list", dir, e);
    for file in std::fs::read_dir(dir).map_err(list)? {
        let name = file.map_err(list)?.file_name();
        let name = name.to_string_lossy();
        if PARTS.contains(&&*name) && !half_made {
            return Err(StorageError::Corrupt {
                record: dir.join(FORMAT_FILE).display().to_string(),
                detail: format!("it is missing, but {name} is there"),
            });
        }
        let known = PARTS.contains(&&*name)
            || [LOCK_FILE, NEW, "lost+found"].contains(&&*name)
            || name.ends_with(".token");
        if !known {
            let found = format!("the directory holds {name}, which is no part of a store");
            return Err(io("use", dir, std::io::Error::other(found)));
        }
    }
    if half_made {
        for part in PARTS {
            remove_dir(&dir.join(part))?;
        }
        sync_dir(dir)?;
        remove_dir(&new)?;
        sync_dir(dir)?;
    }
    Ok(())
}

fn remove_dir(path: &Path) -> Result<(), StorageError> {
    match std::fs::remove_dir_all(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(io("delete", path, error))
        }
        _ => Ok(()),
    }
}

/// Makes a store in `.new`, every part of it durable, and moves the parts to their places, `FORMAT` last.
fn create(dir: &Path, options: &DurableOptions) -> Result<StoreFormat, StorageError> {
    std::fs::set_permissions(dir, Permissions::from_mode(0o700))
        .map_err(|e| io("protect", dir, e))?;
    let mut random = [0; 32];
    getrandom::fill(&mut random).map_err(|e| {
        let cause = std::io::Error::other(e.to_string());
        io("get random bytes for", dir, cause)
    })?;
    let [store_id, lease_secret] = [0, 16].map(|at| {
        let mut half = [0; 16];
        half.copy_from_slice(&random[at..at + 16]);
        half
    });
    let format = StoreFormat {
        version: FORMAT,
        store_id,
        segment_bytes: options.segment_bytes.max(MIN_SEGMENT),
    };
    let new = dir.join(NEW);
    DirBuilder::new()
        .mode(0o700)
        .create(&new)
        .map_err(|e| io("create", &new, e))?;
    sync_dir(dir)?;
    let start = Log::create(&LogIdentity {
        dir: new.join(LOG),
        store_id,
        segment_bytes: format.segment_bytes,
    })?;
    // The state's record of where the log begins is durable before the log has an entry.
    StateThread::create(
        &new.join(STATE),
        &StateMeta {
            position: start.position,
            sequence: start.sequence,
            now: Timestamp(0),
            wall: WallTime(0),
            next_run: 1,
            store_id,
            lease_secret,
            format: FORMAT,
        },
    )?;
    Payloads::create(&new.join(PAYLOADS))?;
    let format_file = new.join(FORMAT_FILE);
    std::fs::write(&format_file, format.text()).map_err(|e| io("write", &format_file, e))?;
    std::fs::File::open(&format_file)
        .and_then(|file| file.sync_all())
        .map_err(|e| io("sync", &format_file, e))?;
    sync_dir(&new)?;
    for part in PARTS {
        move_up(&new, dir, part)?;
    }
    sync_dir(dir)?;
    sync_dir(&new)?;
    move_up(&new, dir, FORMAT_FILE)?;
    sync_dir(dir)?;
    remove_dir(&new)?;
    sync_dir(dir)?;
    Ok(format)
}

fn move_up(new: &Path, dir: &Path, name: &str) -> Result<(), StorageError> {
    let from = new.join(name);
    std::fs::rename(&from, dir.join(name)).map_err(|e| io("rename", &from, e))
}
