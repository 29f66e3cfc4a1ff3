//! Replays a recorded trace of file operations and makes what a power cut could have left behind.
//!
//! Model. Data of a file survives for certain up to the last sync of that file that had *completed*; each later write survives
//! whole, not at all, or torn at 4 KiB, in any order, as the image's seed decides. Names (create, rename, unlink) survive as a prefix of their
//! order, as in a journaling file system: a completed directory sync makes all before it certain, and in half of the images a file sync does
//! too. A file whose length was pending may end anywhere a surviving write ends; bytes nobody wrote are zero.
//!
//! What it does not model: a disk that lies about a sync, damage at rest (tests/it has flips), several disks.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;

/// Bytes that a disk writes at once.
pub(crate) const SECTOR: usize = 4096;

/// One operation of the trace.
#[derive(Debug, Clone)]
pub(crate) struct Op {
    /// Letter of the kind, as `preload.c` documents it.
    pub kind: u8,
    /// Path below the watched directory.
    pub path: String,
    /// Second path of a rename.
    pub second: String,
    /// Offset, or new length.
    pub offset: u64,
    /// Bytes written; for a punched hole, its length as 8 bytes.
    pub data: Vec<u8>,
    /// Length of the trace after this record: an acknowledgement noted at a length is owed by every image of operations up to it.
    pub trace_end: u64,
}

/// Reads a trace. A last record that is cut short (the process was killed) is left out.
pub(crate) fn read_trace(path: &Path) -> io::Result<Vec<Op>> {
    let bytes = std::fs::read(path)?;
    let mut ops = Vec::new();
    let mut at = 0usize;
    while bytes.len() - at >= 24 {
        let head = &bytes[at..at + 24];
        let u16_at = |i: usize| usize::from(u16::from_le_bytes([head[i], head[i + 1]]));
        let u64_at = |i: usize| u64::from_le_bytes(head[i..i + 8].try_into().expect("8 bytes"));
        let (kind, first, second, offset, length) = (
            head[0],
            u16_at(2),
            u16_at(4),
            u64_at(8),
            u64_at(16) as usize,
        );
        let end = at + 24 + first + second + length;
        if end > bytes.len() {
            break;
        }
        let text = |from: usize, length: usize| {
            String::from_utf8_lossy(&bytes[from..from + length]).into_owned()
        };
        ops.push(Op {
            kind,
            path: text(at + 24, first),
            second: text(at + 24 + first, second),
            offset,
            data: bytes[at + 24 + first + second..end].to_vec(),
            trace_end: end as u64,
        });
        at = end;
    }
    Ok(ops)
}

/// Which syncs the replay pretends not to have seen: a checker that is any good must then find lost acknowledgements.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Blind {
    /// None: the real thing.
    No,
    /// Syncs of the commit log: as if acknowledgements went out before the sync.
    Log,
    /// Syncs of sled: as if the interposer were off, and as if the log were shortened before sled was synced.
    State,
    /// Syncs of payload segments: as if commands named payloads before they were durable.
    Payloads,
}

impl Blind {
    fn ignores(self, path: &str) -> bool {
        match self {
            Self::No => false,
            Self::Log => path.contains("/log/"),
            Self::State => path.contains("/state/"),
            Self::Payloads => path.contains("/payloads/"),
        }
    }
}

#[derive(Debug, Clone)]
enum Change {
    Write { offset: usize, data: Vec<u8> },
    Truncate(usize),
    Punch { offset: usize, length: usize },
}

#[derive(Debug, Clone, Default)]
struct Inode {
    durable: Vec<u8>,
    pending: Vec<Change>,
}

#[derive(Debug, Clone)]
enum NameChange {
    Create { path: String, inode: usize },
    Rename { from: String, to: String },
    Unlink(String),
    MakeDir(String),
    RemoveDir(String),
}

type Names = BTreeMap<String, Option<usize>>; // None: a directory

/// The file system while a trace is replayed.
#[derive(Debug, Default)]
pub(crate) struct Replay {
    inodes: Vec<Inode>,
    now: Names,
    durable: Names,
    pending: Vec<(NameChange, bool)>, // and whether only a directory sync makes it certain
    blind: Option<Blind>,
}

impl Replay {
    /// A replay that pretends not to see some syncs.
    pub(crate) fn new(blind: Blind) -> Self {
        Self {
            blind: Some(blind),
            ..Self::default()
        }
    }

    /// Carries out the next operation.
    pub(crate) fn step(&mut self, op: &Op) {
        let blind = self.blind.unwrap_or(Blind::No);
        match op.kind {
            b'C' => {
                let inode = self.inodes.len();
                self.inodes.push(Inode::default());
                self.rename_names(NameChange::Create {
                    path: op.path.clone(),
                    inode,
                });
            }
            b'R' => self.rename_names(NameChange::Rename {
                from: op.path.clone(),
                to: op.second.clone(),
            }),
            b'U' => self.rename_names(NameChange::Unlink(op.path.clone())),
            b'M' => self.rename_names(NameChange::MakeDir(op.path.clone())),
            b'X' => self.rename_names(NameChange::RemoveDir(op.path.clone())),
            b'W' => self.change(
                &op.path,
                Change::Write {
                    offset: op.offset as usize,
                    data: op.data.clone(),
                },
            ),
            b'T' => self.change(&op.path, Change::Truncate(op.offset as usize)),
            b'P' => {
                let length = u64::from_le_bytes(
                    op.data[..8].try_into().expect("a punch carries its length"),
                ) as usize;
                self.change(
                    &op.path,
                    Change::Punch {
                        offset: op.offset as usize,
                        length,
                    },
                );
            }
            b'S' if !blind.ignores(&op.path) => {
                if let Some(Some(inode)) = self.now.get(&op.path).copied() {
                    let inode = &mut self.inodes[inode];
                    for change in inode.pending.drain(..) {
                        apply(&mut inode.durable, &change);
                    }
                }
                for (_, only_directory) in &mut self.pending {
                    *only_directory = false;
                }
            }
            b'D' => {
                for (change, _) in std::mem::take(&mut self.pending) {
                    rename(&mut self.durable, &change);
                }
            }
            _ => {}
        }
    }

    fn rename_names(&mut self, change: NameChange) {
        rename(&mut self.now, &change);
        self.pending.push((change, true));
    }

    fn change(&mut self, path: &str, change: Change) {
        let inode = match self.now.get(path) {
            Some(Some(inode)) => *inode,
            // A file that was there before recording began, or one that lives on without a name.
            _ => return,
        };
        self.inodes[inode].pending.push(change);
    }

    /// What a power cut at this moment could have left: paths below the directory, `None` for a directory.
    pub(crate) fn image(&self, random: &mut Random) -> BTreeMap<String, Option<Vec<u8>>> {
        let mut names = self.durable.clone();
        let strict = random.below(2) == 0;
        let certain = if strict {
            0
        } else {
            self.pending
                .iter()
                .take_while(|(_, only_directory)| !only_directory)
                .count()
        };
        let kept = certain + random.below((self.pending.len() - certain + 1) as u64) as usize;
        for (change, _) in &self.pending[..kept] {
            rename(&mut names, change);
        }
        let policy = random.below(4);
        let mut image = BTreeMap::new();
        for (path, inode) in names {
            let Some(inode) = inode else {
                image.insert(path, None);
                continue;
            };
            let inode = &self.inodes[inode];
            let mut content = inode.durable.clone();
            let upto = if policy == 2 {
                random.below(inode.pending.len() as u64 + 1) as usize
            } else {
                inode.pending.len()
            };
            for (i, change) in inode.pending[..upto].iter().enumerate() {
                match policy {
                    0 => break,                                       // nothing after the last sync
                    1 => apply(&mut content, change),                 // everything
                    2 if i + 1 < upto => apply(&mut content, change), // in order, the last one torn
                    _ => tear(&mut content, change, random),
                }
            }
            image.insert(path, Some(content));
        }
        image
    }
}

fn rename(names: &mut Names, change: &NameChange) {
    match change {
        NameChange::Create { path, inode } => {
            names.insert(path.clone(), Some(*inode));
        }
        NameChange::MakeDir(path) => {
            names.insert(path.clone(), None);
        }
        NameChange::Unlink(path) | NameChange::RemoveDir(path) => {
            names.remove(path);
        }
        NameChange::Rename { from, to } => {
            let below = format!("{from}/");
            let moved: Vec<String> = names
                .keys()
                .filter(|name| *name == from || name.starts_with(&below))
                .cloned()
                .collect();
            for name in moved {
                let what = names.remove(&name).expect("just listed");
                names.insert(format!("{to}{}", &name[from.len()..]), what);
            }
        }
    }
}

fn apply(content: &mut Vec<u8>, change: &Change) {
    match change {
        Change::Write { offset, data } => {
            if content.len() < offset + data.len() {
                content.resize(offset + data.len(), 0);
            }
            content[*offset..offset + data.len()].copy_from_slice(data);
        }
        Change::Truncate(length) => content.resize(*length, 0),
        Change::Punch { offset, length } => {
            let end = (offset + length).min(content.len());
            if *offset < end {
                content[*offset..end].fill(0);
            }
        }
    }
}

/// Each sector of a write survives or not by itself.
fn tear(content: &mut Vec<u8>, change: &Change, random: &mut Random) {
    let Change::Write { offset, data } = change else {
        if random.below(2) == 0 {
            apply(content, change);
        }
        return;
    };
    let mut from = 0;
    while from < data.len() {
        let sector_end = ((offset + from) / SECTOR + 1) * SECTOR - offset;
        let to = sector_end.min(data.len());
        if random.below(2) == 0 {
            apply(
                content,
                &Change::Write {
                    offset: offset + from,
                    data: data[from..to].to_vec(),
                },
            );
        }
        from = to;
    }
}

/// Writes an image to an empty directory. Paths are those of the trace: "" and "/…" are the store, ".…" its siblings.
pub(crate) fn write_image(
    image: &BTreeMap<String, Option<Vec<u8>>>,
    store: &Path,
) -> io::Result<()> {
    for (name, content) in image {
        let mut path = store.as_os_str().to_owned();
        path.push(name);
        let path = Path::new(&path);
        match content {
            None => std::fs::create_dir_all(path)?,
            Some(bytes) => {
                // A name whose directory did not survive did not survive either.
                if path.parent().is_some_and(Path::is_dir) {
                    // Zeros at the end cost nothing as a hole.
                    let used = bytes
                        .iter()
                        .rposition(|byte| *byte != 0)
                        .map_or(0, |last| last + 1);
                    std::fs::write(path, &bytes[..used])?;
                    std::fs::OpenOptions::new()
                        .write(true)
                        .open(path)?
                        .set_len(bytes.len() as u64)?;
                }
            }
        }
    }
    Ok(())
}

/// A small deterministic generator (`SplitMix64`).
#[derive(Debug, Clone)]
pub(crate) struct Random(pub u64);

impl Random {
    /// The next 64 bits.
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `n`, which is at least 1.
    pub(crate) fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
}
