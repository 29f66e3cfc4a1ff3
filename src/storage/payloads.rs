//! Bodies too large for records: segments that only grow, each body at a multiple of 4 KiB, named by a reference that carries its
//! length and checksum.
//!
//! A body is durable before anything refers to it. What nothing refers to at a start is cut off. A segment goes as a whole, when
//! no run has used it for a while: nothing is ever copied or moved, so a reference stays right for as long as its run is kept.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};

use bytes::Bytes;
use xxhash_rust::xxh3::xxh3_64;

use super::log::{io, sync_dir};
use super::reader::PayloadSource;
use super::records::PayloadUse;
use super::{PayloadWriter, StorageError, sync_shim};
use crate::broker::types::PayloadRef;

/// The largest body.
pub const PAYLOAD_BYTES: usize = 64 << 20;
/// Bodies begin at multiples of this; the header takes one.
const BLOCK: u64 = 4_096;
const MAGIC: &[u8; 8] = b"dagopay\n";
const VERSION: u32 = 1;

/// How payload segments are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PayloadOptions {
    /// A segment takes no further body beyond this size.
    pub segment_bytes: u64,
    /// A segment that no run uses is deleted after so many milliseconds: who is reading it, or is about to name it, has had
    /// the time to.
    pub grace_ms: u64,
}

impl Default for PayloadOptions {
    fn default() -> Self {
        Self {
            segment_bytes: 64 << 20,
            grace_ms: 15 * 60 * 1_000,
        }
    }
}

/// The payload segments of a store. Any thread may write and read.
#[derive(Debug)]
pub struct Payloads {
    dir: PathBuf,
    store_id: [u8; 16],
    options: PayloadOptions,
    state: Mutex<State>,
    /// Readers and backups that hold all segments.
    pins: AtomicUsize,
    failed: OnceLock<String>,
}

#[derive(Debug, Default)]
struct State {
    active: Option<Arc<Segment>>,
    /// Where the next body goes.
    offset: u64,
    /// All segments but the active one, and since when no run uses them.
    closed: BTreeMap<u32, Option<u64>>,
    next: u32,
}

/// The segment that grows.
#[derive(Debug)]
struct Segment {
    number: u32,
    file: File,
    path: PathBuf,
    sync: Mutex<Sync>,
    synced: Condvar,
}

/// Writers that wait for one sync.
#[derive(Debug, Default)]
struct Sync {
    written: u64,
    synced: u64,
    running: bool,
    failed: bool,
}

/// Keeps all segments while it lives.
#[derive(Debug)]
pub struct PayloadPin(Arc<Payloads>);

impl Drop for PayloadPin {
    fn drop(&mut self) {
        self.0.pins.fetch_sub(1, Ordering::Release);
    }
}

impl Payloads {
    /// Makes the directory; its name is the caller's to sync.
    pub fn create(dir: &Path) -> Result<(), StorageError> {
        std::fs::create_dir(dir).map_err(|e| io("create", dir, e))?;
        sync_dir(dir)
    }

    /// The segments in a directory. They may be read at once, but written only after [`Payloads::take_stock`].
    pub fn new(dir: PathBuf, store_id: [u8; 16], options: PayloadOptions) -> Self {
        Self {
            dir,
            store_id,
            options,
            state: Mutex::default(),
            pins: AtomicUsize::new(0),
            failed: OnceLock::new(),
        }
    }

    /// Compares the segments with what the state refers to: all of it must be there, and the rest is dropped.
    pub fn take_stock(&self, used: &PayloadUse) -> Result<(), StorageError> {
        let mut ends: BTreeMap<u32, u64> = used.used().collect();
        let mut state = self.lock();
        let mut last = None;
        for number in self.numbers()? {
            let path = self.path(number);
            state.next = state.next.max(number.saturating_add(1));
            let Some(end) = ends.remove(&number) else {
                std::fs::remove_file(&path).map_err(|e| io("delete", &path, e))?;
                continue;
            };
            let file = OpenOptions::new()
                .read(true)
                .write(true)
                .open(&path)
                .map_err(|e| io("open", &path, e))?;
            let length = file.metadata().map_err(|e| io("stat", &path, e))?.len();
            if length < end {
                return Err(damaged(
                    &path,
                    &format!("it ends at {length}, before {end}"),
                ));
            }
            let mut header = [0; 40];
            file.read_exact_at(&mut header, 0)
                .map_err(|e| io("read", &path, e))?;
            if header[..] != self.header(number)[..40] {
                return Err(damaged(&path, "its header is not this segment's"));
            }
            if length > end {
                file.set_len(end).map_err(|e| io("cut", &path, e))?;
                sync_shim::fdatasync(&file).map_err(|e| io("sync", &path, e))?;
            }
            state.closed.insert(number, None);
            last = Some((number, file, path, end));
        }
        if let Some((number, end)) = ends.pop_first() {
            let detail = format!("it is missing, and used up to {end}");
            return Err(damaged(&self.path(number), &detail));
        }
        sync_dir(&self.dir)?;
        if let Some((number, file, path, end)) = last
            && end < self.options.segment_bytes
        {
            state.closed.remove(&number);
            state.offset = end.next_multiple_of(BLOCK);
            state.active = Some(Arc::new(Segment::new(number, file, path)));
        }
        Ok(())
    }

    /// Why the store must stop (G17), if it must.
    pub fn failed(&self) -> Option<&str> {
        self.failed.get().map(String::as_str)
    }

    /// Keeps all segments until the pin is dropped.
    #[must_use]
    pub fn pin(self: &Arc<Self>) -> PayloadPin {
        self.pins.fetch_add(1, Ordering::Acquire);
        PayloadPin(Arc::clone(self))
    }

    /// Deletes segments that no run has used for the time of grace. What made them unused must be durable. Gives how many.
    pub fn collect(&self, used: &mut PayloadUse, now_ms: u64) -> Result<usize, StorageError> {
        let mut dead = Vec::new();
        let mut state = self.lock();
        let is_pinned = self.pins.load(Ordering::Acquire) > 0;
        for (number, since) in &mut state.closed {
            if used.is_used(*number) {
                *since = None;
                continue;
            }
            if is_pinned {
                // Whoever lets go of the pin may be about to name what lies here: the time of grace begins then.
                *since = Some(now_ms);
                continue;
            }
            let since = *since.get_or_insert(now_ms);
            if now_ms.saturating_sub(since) >= self.options.grace_ms {
                dead.push(*number);
            }
        }
        for number in &dead {
            state.closed.remove(number);
        }
        drop(state);
        for number in &dead {
            let path = self.path(*number);
            std::fs::remove_file(&path).map_err(|e| io("delete", &path, e))?;
            used.forget(*number);
        }
        Ok(dead.len())
    }

    fn numbers(&self) -> Result<Vec<u32>, StorageError> {
        let mut numbers = Vec::new();
        let list = |e| io("list", &self.dir, e);
        for file in std::fs::read_dir(&self.dir).map_err(list)? {
            let name = file.map_err(list)?.file_name();
            let number = name.to_str().and_then(|name| {
                let hex = name.strip_suffix(".pay")?;
                (hex.len() == 8).then(|| u32::from_str_radix(hex, 16).ok())?
            });
            numbers.extend(number);
        }
        numbers.sort_unstable();
        Ok(numbers)
    }

    fn path(&self, number: u32) -> PathBuf {
        self.dir.join(format!("{number:08x}.pay"))
    }

    fn header(&self, number: u32) -> Vec<u8> {
        let mut header = Vec::with_capacity(BLOCK as usize);
        header.extend_from_slice(MAGIC);
        header.extend_from_slice(&VERSION.to_le_bytes());
        header.extend_from_slice(&number.to_le_bytes());
        header.extend_from_slice(&self.store_id);
        let sum = xxh3_64(&header);
        header.extend_from_slice(&sum.to_le_bytes());
        header.resize(BLOCK as usize, 0);
        header
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives a body its place, in a new segment if the active one is full.
    fn place(&self, length: u64) -> Result<(Arc<Segment>, u64), StorageError> {
        let mut state = self.lock();
        if state.active.is_none() || state.offset >= self.options.segment_bytes {
            let number = state.next.max(1);
            let path = self.path(number);
            let file = OpenOptions::new()
                .read(true)
                .write(true)
                .create_new(true)
                .mode(0o600)
                .open(&path)
                .map_err(|e| io("create", &path, e))?;
            file.write_all_at(&self.header(number), 0)
                .map_err(|e| io("write", &path, e))?;
            sync_shim::fdatasync(&file).map_err(|e| io("sync", &path, e))?;
            sync_dir(&self.dir)?;
            state.next = number + 1;
            state.offset = BLOCK;
            let full = state
                .active
                .replace(Arc::new(Segment::new(number, file, path)));
            if let Some(full) = full {
                state.closed.insert(full.number, None);
            }
        }
        let offset = state.offset;
        state.offset = (offset + length).next_multiple_of(BLOCK);
        let segment = state.active.as_ref().map(Arc::clone);
        segment
            .map(|segment| (segment, offset))
            .ok_or_else(|| StorageError::Stopped("no payload segment is open".to_owned()))
    }

    fn try_write(&self, bytes: &Bytes) -> Result<PayloadRef, StorageError> {
        let (segment, offset) = self.place(bytes.len() as u64)?;
        segment
            .file
            .write_all_at(bytes, offset)
            .map_err(|e| io("write", &segment.path, e))?;
        segment.sync()?;
        Ok(PayloadRef {
            segment: segment.number,
            offset,
            length: bytes.len() as u32,
            checksum: xxh3_64(bytes),
        })
    }
}

impl Segment {
    fn new(number: u32, file: File, path: PathBuf) -> Self {
        Self {
            number,
            file,
            path,
            sync: Mutex::default(),
            synced: Condvar::new(),
        }
    }

    /// Makes what the caller has written durable. One sync serves all who have written before it begins.
    fn sync(&self) -> Result<(), StorageError> {
        let lock = || self.sync.lock().unwrap_or_else(PoisonError::into_inner);
        let mut sync = lock();
        sync.written += 1;
        let mine = sync.written;
        loop {
            if sync.failed {
                return Err(StorageError::Stopped(format!(
                    "an earlier sync of {} failed",
                    self.path.display()
                )));
            }
            if sync.synced >= mine {
                return Ok(());
            }
            if sync.running {
                sync = self
                    .synced
                    .wait(sync)
                    .unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            sync.running = true;
            let covered = sync.written;
            drop(sync);
            let result = sync_shim::fdatasync(&self.file);
            sync = lock();
            sync.running = false;
            match result {
                Ok(()) => sync.synced = covered,
                Err(error) => {
                    sync.failed = true;
                    self.synced.notify_all();
                    return Err(io("sync", &self.path, error));
                }
            }
            self.synced.notify_all();
        }
    }
}

impl PayloadWriter for Payloads {
    fn write(&self, bytes: Bytes) -> Result<PayloadRef, StorageError> {
        if let Some(reason) = self.failed.get() {
            return Err(StorageError::Stopped(reason.clone()));
        }
        if bytes.len() > PAYLOAD_BYTES {
            return Err(StorageError::State {
                what: "writing a payload",
                detail: format!("{} bytes are over {PAYLOAD_BYTES}", bytes.len()),
            });
        }
        self.try_write(&bytes).inspect_err(|error| {
            let _ = self.failed.set(error.to_string());
        })
    }

    fn keep(self: Arc<Self>) -> Box<dyn Send + std::marker::Sync> {
        Box::new(self.pin())
    }
}

impl PayloadSource for Payloads {
    fn read(&self, at: PayloadRef) -> Result<Bytes, StorageError> {
        let path = self.path(at.segment);
        let wrong = |detail: &str| StorageError::Corrupt {
            record: format!("payload at byte {} of {}", at.offset, path.display()),
            detail: detail.to_owned(),
        };
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return Err(wrong("its segment is missing"));
            }
            Err(error) => return Err(io("open", &path, error)),
        };
        let length = file.metadata().map_err(|e| io("stat", &path, e))?.len();
        let end = at.offset.checked_add(u64::from(at.length));
        if at.offset < BLOCK
            || at.length as usize > PAYLOAD_BYTES
            || end.is_none_or(|end| end > length)
        {
            return Err(wrong("it lies outside of its segment"));
        }
        let mut bytes = vec![0; at.length as usize];
        file.read_exact_at(&mut bytes, at.offset)
            .map_err(|e| io("read", &path, e))?;
        if xxh3_64(&bytes) != at.checksum {
            return Err(wrong("its checksum is wrong"));
        }
        Ok(bytes.into())
    }
}

fn damaged(path: &Path, detail: &str) -> StorageError {
    StorageError::Corrupt {
        record: format!("payload segment {}", path.display()),
        detail: detail.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options() -> PayloadOptions {
        PayloadOptions {
            segment_bytes: 64 << 10,
            grace_ms: 100,
        }
    }

    fn open(dir: &Path, used: &PayloadUse) -> Result<Arc<Payloads>, StorageError> {
        let payloads = Payloads::new(dir.to_owned(), [7; 16], options());
        payloads.take_stock(used)?;
        Ok(Arc::new(payloads))
    }

    fn body(n: u8, length: usize) -> Bytes {
        vec![n; length].into()
    }

    #[test]
    fn bodies_come_back_after_a_start() {
        let dir = tempfile::tempdir().unwrap();
        let mut used = PayloadUse::default();
        let payloads = open(dir.path(), &used).unwrap();
        let mut all = Vec::new();
        for n in 0..30u8 {
            let bytes = body(n, 1 + usize::from(n) * 700);
            let at = payloads.write(bytes.clone()).unwrap();
            assert_eq!(at.offset % BLOCK, 0);
            used.restore(at.segment, u64::from(n), at.offset + u64::from(at.length));
            all.push((at, bytes));
        }
        assert!(all.iter().any(|(at, _)| at.segment > 1), "never rolled");
        drop(payloads);
        let payloads = open(dir.path(), &used).unwrap();
        let at = payloads.write(body(99, 5_000)).unwrap();
        all.push((at, body(99, 5_000)));
        for (at, bytes) in &all {
            assert_eq!(payloads.read(*at).unwrap(), bytes);
        }
    }

    #[test]
    fn an_unreferenced_tail_is_dropped_and_a_lost_one_noticed() {
        let dir = tempfile::tempdir().unwrap();
        let mut used = PayloadUse::default();
        let payloads = open(dir.path(), &used).unwrap();
        let kept = payloads.write(body(1, 5_000)).unwrap();
        let orphan = payloads.write(body(2, 5_000)).unwrap();
        used.restore(kept.segment, 1, kept.offset + u64::from(kept.length));
        drop(payloads);
        let payloads = open(dir.path(), &used).unwrap();
        assert_eq!(payloads.read(kept).unwrap(), body(1, 5_000));
        assert!(payloads.read(orphan).is_err());
        let next = payloads.write(body(3, 10)).unwrap();
        assert_eq!(next.offset, orphan.offset, "the room is used again");
        assert!(
            payloads.read(orphan).is_err(),
            "another body lies there now"
        );
        let path = payloads.path(kept.segment);
        drop(payloads);
        let file = OpenOptions::new().write(true).open(&path).unwrap();
        file.set_len(6_000).unwrap();
        assert!(matches!(
            open(dir.path(), &used),
            Err(StorageError::Corrupt { .. })
        ));
        std::fs::remove_file(&path).unwrap();
        assert!(matches!(
            open(dir.path(), &used),
            Err(StorageError::Corrupt { .. })
        ));
    }

    #[test]
    fn a_changed_byte_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let payloads = open(dir.path(), &PayloadUse::default()).unwrap();
        let at = payloads.write(body(5, 9_000)).unwrap();
        let path = payloads.path(at.segment);
        let file = OpenOptions::new().write(true).open(&path).unwrap();
        for place in [0, 4_500, 8_999] {
            file.write_all_at(&[6], at.offset + place).unwrap();
            let result = payloads.read(at);
            assert!(matches!(result, Err(StorageError::Corrupt { .. })));
            file.write_all_at(&[5], at.offset + place).unwrap();
        }
        assert!(payloads.read(at).is_ok());
        for wrong in [
            PayloadRef { segment: 77, ..at },
            PayloadRef { offset: 0, ..at },
            PayloadRef {
                offset: u64::MAX,
                ..at
            },
            PayloadRef {
                length: u32::MAX,
                ..at
            },
            PayloadRef {
                length: at.length - 1,
                ..at
            },
        ] {
            assert!(payloads.read(wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn a_dead_segment_goes_after_its_grace_unless_pinned() {
        let dir = tempfile::tempdir().unwrap();
        let mut used = PayloadUse::default();
        let payloads = open(dir.path(), &used).unwrap();
        let first = payloads.write(body(1, 60_000)).unwrap();
        let second = payloads.write(body(2, 60_000)).unwrap();
        let third = payloads.write(body(3, 60_000)).unwrap();
        assert!(first.segment < second.segment && second.segment < third.segment);
        for (at, run) in [(first, 1), (second, 2), (third, 3)] {
            used.restore(at.segment, run, at.offset + u64::from(at.length));
        }
        assert_eq!(payloads.collect(&mut used, 1_000).unwrap(), 0);
        used.release(1);
        used.release(3);
        assert_eq!(payloads.collect(&mut used, 2_000).unwrap(), 0, "grace");
        let pin = payloads.pin();
        assert_eq!(payloads.collect(&mut used, 3_000).unwrap(), 0, "pinned");
        assert!(payloads.read(first).is_ok());
        drop(pin);
        assert_eq!(payloads.collect(&mut used, 3_050).unwrap(), 0, "grace");
        assert_eq!(payloads.collect(&mut used, 3_100).unwrap(), 1);
        assert!(payloads.read(first).is_err());
        assert!(payloads.read(second).is_ok(), "still used");
        assert!(payloads.read(third).is_ok(), "still active");
    }

    #[test]
    fn writers_share_syncs_and_all_survive() {
        let dir = tempfile::tempdir().unwrap();
        let payloads = open(dir.path(), &PayloadUse::default()).unwrap();
        let threads: Vec<_> = (0..4u8)
            .map(|n| {
                let payloads = Arc::clone(&payloads);
                std::thread::spawn(move || {
                    (0..25)
                        .map(|_| payloads.write(body(n, 5_000)).unwrap())
                        .collect::<Vec<_>>()
                })
            })
            .collect();
        for (n, thread) in (0..4u8).zip(threads) {
            for at in thread.join().unwrap() {
                assert_eq!(payloads.read(at).unwrap(), body(n, 5_000));
            }
        }
    }
}
