//! What a file sink remembers beside its file, in `FILE.dagorama`: which deliveries the last write held, and, until that write is known to
//! be whole, their bytes.
//!
//! ```text
//! dagorama file sink 1 <xxh3-64 of everything after this line, in hex>
//! {"offset":120,"length":44,"complete":false,"ids":["9f0c…","77aa…"]}
//! <the bytes of the write, when it is not complete>
//! ```
//! It is replaced whole (written aside, synced, renamed, directory synced), so it is never half written: damage is damage.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::xxh3_64;

const MAGIC: &str = "dagorama file sink 1 ";

/// What is remembered.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Companion {
    /// Where the last write began.
    pub(crate) offset: u64,
    /// Hashes of the message ids that it held; what comes again is recognised by them.
    pub(crate) ids: Vec<u64>,
    /// Its bytes; `None` once it is known to be whole and synced.
    pub(crate) pending: Option<Vec<u8>>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Header {
    offset: u64,
    length: u64,
    complete: bool,
    ids: Vec<String>,
}

impl Companion {
    /// The file beside `path`.
    pub(crate) fn path_of(path: &Path) -> PathBuf {
        let mut name = path.as_os_str().to_owned();
        name.push(".dagorama");
        PathBuf::from(name)
    }

    /// Reads it; a missing one is a fresh one.
    pub(crate) fn read(path: &Path) -> io::Result<Self> {
        match fs::read(path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(Self::default()),
            Err(e) => Err(e),
            Ok(bytes) => Self::decode(&bytes).ok_or_else(|| {
                io::Error::new(io::ErrorKind::InvalidInput, "it is damaged, move it away to begin anew (the last lines may then be repeated)")
            }),
        }
    }

    /// Makes it durable.
    pub(crate) fn write(&self, path: &Path) -> io::Result<()> {
        let mut draft = path.as_os_str().to_owned();
        draft.push(".new");
        let draft = PathBuf::from(draft);
        let mut file = File::create(&draft)?;
        file.write_all(&self.encode())?;
        file.sync_data()?;
        drop(file);
        fs::rename(&draft, path)?;
        sync_directory(path)
    }

    fn encode(&self) -> Vec<u8> {
        let pending = self.pending.as_deref().unwrap_or_default();
        let header = Header {
            offset: self.offset,
            length: pending.len() as u64,
            complete: self.pending.is_none(),
            ids: self.ids.iter().map(|id| format!("{id:016x}")).collect(),
        };
        let mut rest = serde_json::to_vec(&header).unwrap_or_default();
        rest.push(b'\n');
        rest.extend_from_slice(pending);
        let mut bytes = format!("{MAGIC}{:016x}\n", xxh3_64(&rest)).into_bytes();
        bytes.append(&mut rest);
        bytes
    }

    fn decode(bytes: &[u8]) -> Option<Self> {
        let rest = bytes.strip_prefix(MAGIC.as_bytes())?;
        let (sum, rest) = (rest.get(..16)?, rest.get(16..)?.strip_prefix(b"\n")?);
        let sum = u64::from_str_radix(std::str::from_utf8(sum).ok()?, 16).ok()?;
        if sum != xxh3_64(rest) {
            return None;
        }
        let end = rest.iter().position(|b| *b == b'\n')?;
        let header: Header = serde_json::from_slice(&rest[..end]).ok()?;
        let pending = &rest[end + 1..];
        if header.length != pending.len() as u64 || (header.complete && !pending.is_empty()) {
            return None;
        }
        let ids: Option<Vec<u64>> = header
            .ids
            .iter()
            .map(|id| u64::from_str_radix(id, 16).ok())
            .collect();
        Some(Self {
            offset: header.offset,
            ids: ids?,
            pending: (!header.complete).then(|| pending.to_vec()),
        })
    }
}

/// Makes the entry of `path` in its directory durable.
pub(crate) fn sync_directory(path: &Path) -> io::Result<()> {
    let directory = path
        .parent()
        .filter(|d| !d.as_os_str().is_empty())
        .unwrap_or(Path::new("."));
    File::open(directory)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_and_damage_is_noticed() {
        let dir = tempfile::tempdir().unwrap();
        let path = Companion::path_of(&dir.path().join("out"));
        assert_eq!(path.file_name().unwrap(), "out.dagorama");
        assert_eq!(Companion::read(&path).unwrap(), Companion::default());
        for companion in [
            Companion {
                offset: 120,
                ids: vec![1, u64::MAX],
                pending: Some(b"a\nb\n".to_vec()),
            },
            Companion {
                offset: 0,
                ids: vec![],
                pending: Some(Vec::new()),
            },
            Companion {
                offset: 7,
                ids: vec![3],
                pending: None,
            },
        ] {
            companion.write(&path).unwrap();
            assert_eq!(Companion::read(&path).unwrap(), companion);
            let good = fs::read(&path).unwrap();
            for at in 0..good.len() {
                let mut bad = good.clone();
                bad[at] ^= 1;
                assert!(
                    Companion::decode(&bad).is_none(),
                    "byte {at} of {:?}",
                    String::from_utf8_lossy(&good)
                );
                assert!(Companion::decode(&good[..at]).is_none(), "cut at {at}");
            }
            fs::write(&path, b"something else").unwrap();
            assert!(Companion::read(&path).is_err());
        }
    }
}
