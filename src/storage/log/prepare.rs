//! The thread that has the next segment ready before it is needed: all blocks allocated and the first ones zeros, or an old one
//! with a new header and name.
//!
//! A segment appears under its name only after its content is durable, so a short or nameless one is nobody's.

use std::collections::HashMap;
use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;

use super::segment::{self, FILL, Segment};
use super::{LogIdentity, io, sync_dir};
use crate::storage::{StorageError, sync_shim};

/// Name of a segment that is being made.
pub(super) const UNFINISHED: &str = "next.tmp";

enum Request {
    Make(u64, Option<PathBuf>),
    Delete(PathBuf),
}

/// The thread, seen from the log.
pub(super) struct Preparer {
    requests: Option<Sender<Request>>,
    made: Receiver<(u64, Result<(), StorageError>)>,
    ready: HashMap<u64, Result<(), StorageError>>,
    thread: Option<JoinHandle<()>>,
}

impl Preparer {
    pub(super) fn start(identity: LogIdentity) -> Result<Self, StorageError> {
        let dir = identity.dir.clone();
        let (requests, inbox) = channel();
        let (report, made) = channel();
        let thread = std::thread::Builder::new()
            .name("dagorama-log".to_owned())
            .spawn(move || work(&identity, &inbox, &report))
            .map_err(|e| io("start a thread for", &dir, e))?;
        Ok(Self {
            requests: Some(requests),
            made,
            ready: HashMap::new(),
            thread: Some(thread),
        })
    }

    /// Asks for a segment, made of an old one if there is one to spare.
    pub(super) fn request(&mut self, number: u64, recycle: Option<PathBuf>) {
        self.send(Request::Make(number, recycle));
    }

    /// Asks for a segment's deletion. It is behind the state, so it does not matter when or whether.
    pub(super) fn delete(&mut self, path: PathBuf) {
        self.send(Request::Delete(path));
    }

    fn send(&mut self, request: Request) {
        if let Some(requests) = &self.requests {
            // A thread that is gone is noticed by who waits for it.
            let _ = requests.send(request);
        }
    }

    /// Notes that a segment was made before.
    pub(super) fn is_ready(&mut self, number: u64) {
        self.ready.insert(number, Ok(()));
    }

    /// Waits until a segment that was asked for is there.
    pub(super) fn wait_for(&mut self, number: u64) -> Result<(), StorageError> {
        loop {
            if let Some(result) = self.ready.remove(&number) {
                return result;
            }
            match self.made.recv() {
                Ok((made, result)) => {
                    self.ready.insert(made, result);
                }
                Err(_) => {
                    return Err(StorageError::Stopped(
                        "the thread that prepares log segments is gone".to_owned(),
                    ));
                }
            }
        }
    }
}

impl Drop for Preparer {
    fn drop(&mut self) {
        self.requests = None;
        if let Some(thread) = self.thread.take() {
            // Its panic was reported as a missing segment, if anybody waited for one.
            let _ = thread.join();
        }
    }
}

fn work(
    identity: &LogIdentity,
    inbox: &Receiver<Request>,
    report: &Sender<(u64, Result<(), StorageError>)>,
) {
    for request in inbox {
        match request {
            Request::Make(number, recycle) => {
                let result = make_segment(identity, number, recycle.as_deref());
                if report.send((number, result)).is_err() {
                    return;
                }
            }
            Request::Delete(path) => {
                // What is left is found and deleted at the next start.
                let _ = std::fs::remove_file(path);
            }
        }
    }
}

/// Makes a segment and makes it durable, name and all.
pub(super) fn make_segment(
    identity: &LogIdentity,
    number: u64,
    recycle: Option<&Path>,
) -> Result<(), StorageError> {
    let unfinished = identity.dir.join(UNFINISHED);
    let recycled = match recycle {
        Some(old) => {
            std::fs::rename(old, &unfinished).map_err(|e| io("rename", old, e))?;
            sync_dir(&identity.dir)?;
            true
        }
        None => false,
    };
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(!recycled)
        .truncate(!recycled)
        .open(&unfinished)
        .map_err(|e| io("create", &unfinished, e))?;
    let whole = file
        .metadata()
        .is_ok_and(|m| m.len() == identity.segment_bytes);
    if !(recycled && whole) {
        let size = identity.segment_bytes;
        file.set_len(0)
            .and_then(|()| file.set_len(size))
            .map_err(|e| io("cut", &unfinished, e))?;
        // Blocks that are allocated but not written look like a hole: a start need not read them.
        let allocated = sync_shim::allocate(&file, size)
            .map_err(|e| io("allocate blocks for", &unfinished, e))?;
        let filled = if allocated { size.min(FILL) } else { size };
        let zeros = vec![0; FILL as usize];
        let mut offset = 0;
        while offset < filled {
            let length = (filled - offset).min(FILL);
            file.write_all_at(&zeros[..length as usize], offset)
                .map_err(|e| io("write", &unfinished, e))?;
            offset += length;
        }
    }
    file.write_all_at(&segment::header(identity, number), 0)
        .map_err(|e| io("write", &unfinished, e))?;
    sync_shim::fdatasync(&file).map_err(|e| io("sync", &unfinished, e))?;
    let path = segment::path(&identity.dir, number);
    std::fs::rename(&unfinished, &path).map_err(|e| io("rename", &unfinished, e))?;
    sync_dir(&identity.dir)?;
    Segment::open(identity, number).map(|_| ())
}
