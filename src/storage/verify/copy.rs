//! The temporary copy that `verify` may write to.

use std::fs::{self, DirBuilder, File};
use std::io::Read;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use crate::storage::StorageError;
use crate::storage::sled::io_error;
use crate::storage::sync_shim::{free_bytes, try_lock};

/// Copied: all but payloads, which are read where they are.
const PARTS: [&str; 2] = ["log", "state"];
/// Makes names of copies differ within a process.
static COPIES: AtomicU64 = AtomicU64::new(0);

/// A copy that is removed when it is dropped.
#[derive(Debug)]
pub(super) struct Copy {
    path: PathBuf,
    /// Its size.
    pub(super) bytes: u64,
}

impl Copy {
    /// Copies the store at `dir`, which nobody may have open.
    pub(super) fn make(dir: &Path, scratch: Option<&Path>) -> Result<Self, StorageError> {
        let _lock = hold(dir)?;
        let scratch = scratch.map_or_else(std::env::temp_dir, Path::to_owned);
        let mut bytes = 0;
        for part in PARTS {
            bytes += size(&dir.join(part))?;
        }
        // The state grows while the log is brought into it.
        let needed = bytes + bytes / 2;
        let space = free_bytes(&scratch).map_err(|e| io_error("asking for room", &scratch, e))?;
        if space.free < needed {
            let source = std::io::Error::other(format!(
                "{needed} bytes are needed for a copy and {} are free: choose another place",
                space.free
            ));
            return Err(io_error("copying", &scratch, source));
        }
        let number = COPIES.fetch_add(1, Ordering::Relaxed);
        let path = scratch.join(format!("dagorama-verify-{}-{number}", std::process::id()));
        DirBuilder::new()
            .mode(0o700)
            .create(&path)
            .map_err(|e| io_error("creating", &path, e))?;
        let copy = Self { path, bytes };
        for part in PARTS {
            copy_dir(&dir.join(part), &copy.path.join(part))?;
        }
        Ok(copy)
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Copy {
    fn drop(&mut self) {
        // What is left behind is in a directory for temporary files.
        let _ = fs::remove_dir_all(&self.path);
    }
}

/// Holds the store's lock without writing to it. `None`: it was never opened.
fn hold(dir: &Path) -> Result<Option<File>, StorageError> {
    let path = dir.join("LOCK");
    let mut file = match File::open(&path) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(io_error("opening", &path, error)),
    };
    if try_lock(&file).map_err(|e| io_error("locking", &path, e))? {
        return Ok(Some(file));
    }
    let mut pid = String::new();
    let _ = file.read_to_string(&mut pid);
    let pid = pid.trim();
    Err(StorageError::Locked {
        path: dir.display().to_string(),
        pid: if pid.is_empty() { "(unknown)" } else { pid }.to_owned(),
    })
}

fn size(dir: &Path) -> Result<u64, StorageError> {
    let mut bytes = 0;
    for entry in fs::read_dir(dir).map_err(|e| io_error("listing", dir, e))? {
        let entry = entry.map_err(|e| io_error("listing", dir, e))?;
        let data = entry
            .metadata()
            .map_err(|e| io_error("asking for the size of", &entry.path(), e))?;
        bytes += if data.is_dir() {
            size(&entry.path())?
        } else {
            data.len()
        };
    }
    Ok(bytes)
}

fn copy_dir(from: &Path, to: &Path) -> Result<(), StorageError> {
    fs::create_dir(to).map_err(|e| io_error("creating", to, e))?;
    for entry in fs::read_dir(from).map_err(|e| io_error("listing", from, e))? {
        let entry = entry.map_err(|e| io_error("listing", from, e))?;
        let (path, target) = (entry.path(), to.join(entry.file_name()));
        if path.is_dir() {
            copy_dir(&path, &target)?;
        } else {
            fs::copy(&path, &target).map_err(|e| io_error("copying", &path, e))?;
        }
    }
    Ok(())
}
