//! sled as a box of pages: how it is opened, pinned and distrusted.
//!
//! Knows nothing of tables or runs. The rules (STATE §8): one tree, no background flusher, a small cache, segments of 2 MiB,
//! every sync a real one (proved at each start), `blobs/` always empty, panics are errors, and nobody but the thread that owns
//! a [`Sled`] touches it.

use std::fs;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::time::Duration;

use ::sled::Db;

use super::StorageError;
use super::sync_shim;

/// Cache of sled in bytes; its default is 1 GiB. It does not bound the memory that sled takes.
pub(crate) const CACHE_BYTES: u64 = 32 << 20;
/// Segments of sled in bytes: a leaf over a quarter of it would go to `blobs/`. Fixed for ever when a store is made.
const SEGMENT_BYTES: usize = 2 << 20;
/// Key of the record that proves at each start that a flush is a sync. Not a page key: it is shorter.
pub(crate) const PROOF_KEY: &[u8] = b"~sync";
/// The lock of a handle that has just been dropped may be held for a moment longer.
const LOCK_TRIES: u32 = 250;
const LOCK_PAUSE: Duration = Duration::from_millis(20);

impl From<::sled::Error> for StorageError {
    fn from(error: ::sled::Error) -> Self {
        match error {
            ::sled::Error::Corruption { at, .. } => Self::Corrupt {
                record: "the state store".into(),
                detail: match at {
                    Some(at) => format!("sled found damage at {at:?}"),
                    None => "sled found damage".into(),
                },
            },
            other => Self::State {
                what: "using sled",
                detail: other.to_string(),
            },
        }
    }
}

/// Runs something that calls sled; a panic inside becomes an error.
pub(crate) fn guarded<T>(
    what: &'static str,
    call: impl FnOnce() -> Result<T, StorageError>,
) -> Result<T, StorageError> {
    match catch_unwind(AssertUnwindSafe(call)) {
        Ok(result) => result,
        Err(panic) => {
            let detail = panic
                .downcast_ref::<String>()
                .map(String::as_str)
                .or_else(|| panic.downcast_ref::<&str>().copied())
                .unwrap_or("a panic without words");
            Err(StorageError::State {
                what,
                detail: format!("panic: {detail}"),
            })
        }
    }
}

/// An open sled.
#[derive(Debug)]
pub(crate) struct Sled {
    /// The one tree.
    pub(crate) tree: Db,
    path: PathBuf,
}

impl Sled {
    /// Opens or creates a store and proves that a flush is a sync.
    pub(crate) fn open(path: &Path, cache_bytes: u64) -> Result<Self, StorageError> {
        let tree = match open_patiently(path, cache_bytes) {
            Err(StorageError::Corrupt { .. }) if set_snapshots_aside(path)? => {
                // A damaged snapshot only costs time: without it sled reads its whole log, which has checksums of its own.
                open_patiently(path, cache_bytes)?
            }
            other => other?,
        };
        let sled = Self {
            tree,
            path: path.to_owned(),
        };
        sled.check_blobs()?;
        sled.prove_syncs()?;
        Ok(sled)
    }

    /// Makes everything that was applied survive a power cut.
    pub(crate) fn sync(&self) -> Result<(), StorageError> {
        guarded("syncing", || {
            self.tree.flush()?;
            Ok(())
        })
    }

    /// Fails when sled has put something into its never-synced files (S2).
    pub(crate) fn check_blobs(&self) -> Result<(), StorageError> {
        check_blobs(&self.path)
    }

    /// The flush that must be a sync: writes something new, flushes, and looks whether the system was asked for a sync.
    fn prove_syncs(&self) -> Result<(), StorageError> {
        guarded("proving that a flush is a sync", || {
            let count = match self.tree.get(PROOF_KEY)? {
                Some(bytes) => bytes.as_ref().try_into().map_or(0, u64::from_le_bytes),
                None => 0,
            };
            let before = sync_shim::sled_syncs();
            self.tree
                .insert(PROOF_KEY, &count.wrapping_add(1).to_le_bytes())?;
            self.tree.flush()?;
            if sync_shim::sled_syncs() == before {
                return Err(StorageError::State {
                    what: "proving that a flush is a sync",
                    detail: "this build does not replace sync_file_range, so the store would not survive a power cut".into(),
                });
            }
            Ok(())
        })
    }
}

/// Fails when sled's `blobs/` holds anything (S2).
pub(crate) fn check_blobs(path: &Path) -> Result<(), StorageError> {
    let blobs = path.join("blobs");
    let mut found = match fs::read_dir(&blobs) {
        Ok(found) => found,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(io_error("reading the directory", &blobs, error)),
    };
    match found.next() {
        None => Ok(()),
        Some(_) => Err(StorageError::Corrupt {
            record: blobs.display().to_string(),
            detail: "it must be empty: sled never syncs what it puts there".into(),
        }),
    }
}

/// Syncs the files and directories of a store that has just been created and closed (sled never does), and its parent.
pub(crate) fn sync_created(path: &Path) -> Result<(), StorageError> {
    let failed = |error| io_error("syncing", path, error);
    for entry in fs::read_dir(path).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        fs::File::open(entry.path())
            .and_then(|file| file.sync_all())
            .map_err(|error| io_error("syncing", &entry.path(), error))?;
    }
    for directory in [Some(path), path.parent()].into_iter().flatten() {
        let directory = if directory.as_os_str().is_empty() {
            Path::new(".")
        } else {
            directory
        };
        fs::File::open(directory)
            .and_then(|file| file.sync_all())
            .map_err(|error| io_error("syncing", directory, error))?;
    }
    Ok(())
}

/// An error of the operating system, with its place.
pub(crate) fn io_error(what: &'static str, path: &Path, source: io::Error) -> StorageError {
    StorageError::Io {
        what,
        path: path.display().to_string(),
        source,
    }
}

fn open_patiently(path: &Path, cache_bytes: u64) -> Result<Db, StorageError> {
    let mut tries = 0;
    loop {
        let opened = guarded("opening", || {
            Ok(::sled::Config::new()
                .path(path)
                .flush_every_ms(None)
                .cache_capacity(cache_bytes)
                .segment_size(SEGMENT_BYTES)
                .open())
        })?;
        match opened {
            Ok(db) => return Ok(db),
            Err(::sled::Error::Io(error)) if is_locked(&error) => {
                tries += 1;
                if tries == LOCK_TRIES {
                    return Err(StorageError::Locked {
                        path: path.display().to_string(),
                        pid: "(unknown)".into(),
                    });
                }
                std::thread::sleep(LOCK_PAUSE);
            }
            Err(::sled::Error::Io(error)) => return Err(io_error("opening", path, error)),
            Err(other) => return Err(other.into()),
        }
    }
}

fn is_locked(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::WouldBlock
        || error.to_string().contains("could not acquire lock")
}

/// Renames `snap.*` so that sled does not find them. `Ok(false)`: there were none.
fn set_snapshots_aside(path: &Path) -> Result<bool, StorageError> {
    let failed = |error| io_error("setting a snapshot aside", path, error);
    let mut found = false;
    for entry in fs::read_dir(path).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if name.starts_with("snap.") {
            fs::rename(entry.path(), path.join(format!("damaged-{name}"))).map_err(failed)?;
            found = true;
        }
    }
    Ok(found)
}
