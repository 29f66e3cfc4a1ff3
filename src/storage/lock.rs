//! The lock of an open store (S4): one process at a time, named by its pid to whoever comes second.

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use super::log::io;
use super::{StorageError, sync_shim};

/// Held while the store is open. The kernel releases it when the process ends, however it ends.
#[derive(Debug)]
pub(super) struct StoreLock {
    _file: File,
}

impl StoreLock {
    /// Takes the lock of the store at `dir`, or says who has it.
    pub(super) fn take(dir: &Path) -> Result<Self, StorageError> {
        let path = dir.join("LOCK");
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .map_err(|e| io("open", &path, e))?;
        if !sync_shim::try_lock(&file).map_err(|e| io("lock", &path, e))? {
            let mut pid = String::new();
            // The holder may be about to write it: then nobody knows.
            let _ = file.read_to_string(&mut pid);
            let pid = pid.trim();
            return Err(StorageError::Locked {
                path: dir.display().to_string(),
                pid: if pid.is_empty() { "(unknown)" } else { pid }.to_owned(),
            });
        }
        file.set_len(0)
            .and_then(|()| file.seek(SeekFrom::Start(0)))
            .and_then(|_| writeln!(file, "{}", std::process::id()))
            .map_err(|e| io("write", &path, e))?;
        Ok(Self { _file: file })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_second_is_told_who_was_first() {
        let dir = tempfile::tempdir().unwrap();
        let first = StoreLock::take(dir.path()).unwrap();
        match StoreLock::take(dir.path()) {
            Err(StorageError::Locked { pid, .. }) => {
                assert_eq!(pid, std::process::id().to_string());
            }
            other => panic!("{other:?}"),
        }
        drop(first);
        StoreLock::take(dir.path()).unwrap();
    }
}
