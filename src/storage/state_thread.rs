//! The storage thread: the only one that touches sled.
//!
//! The engine pushes what it has committed; the thread brings it into sled a second later, sorted and coalesced, in slices,
//! and answers reads between the slices. Reads look into the overlay first, so what was pushed is visible at once.
//!
//! Knows neither facts nor the log. Invariants: `synced` never names an entry that a power cut could take out of sled; after
//! an error of a write nothing is written any more (G17); with nothing to do the thread sleeps.

mod reading;
#[cfg(test)]
mod tests;

use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, SyncSender, channel, sync_channel};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::thread::JoinHandle;
use std::time::Duration;

use bytes::Bytes;

use super::StorageError;
pub use super::meta::{FORMAT, StateMeta};
pub use super::overlay::PushedEntry;
use super::overlay::{Generation, Overlay};
use super::pages::Place;
use super::row::Table;
pub use super::rows::Rows;
use super::sled::{CACHE_BYTES, guarded};
use super::state::{Found, State};
use super::sync_shim::{boot_clock_ms, malloc_trim};
use super::window::Window;
use reading::Reader;

/// After a window of over this many bytes, memory is given back to the system when all is quiet.
const TRIM_BYTES: usize = 8 << 20;
/// So long without a request, memory is given back.
const QUIET: Duration = Duration::from_secs(1);
/// So long without a request counts as idle.
const IDLE: Duration = Duration::from_secs(30);
/// When idle, sled is reopened if it has written this much since its last open.
const IDLE_REOPEN_BYTES: u64 = 128 << 20;

/// One call of sled may take so long, on a disk whose syncs take seconds.
const STUCK_MS: u64 = 120_000;
/// Who waits for an answer looks now and then whether one can still come.
const PATIENCE: Duration = Duration::from_secs(5);
const JOIN_PAUSE: Duration = Duration::from_millis(1);

/// How the storage thread works.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StateOptions {
    /// Entries stay in memory for so long, so that what changes soon again is written once.
    pub window_ms: u64,
    /// Or until they take so much memory.
    pub window_bytes: usize,
    /// Pages of one slice: what a read waits for at most.
    pub slice_pages: usize,
    /// Cache of sled in bytes.
    pub cache_bytes: u64,
    /// After so many bytes written, sled is closed and opened: it replays what was written since its last open.
    pub reopen_bytes: u64,
}

impl Default for StateOptions {
    fn default() -> Self {
        Self {
            window_ms: 1_000,
            window_bytes: 16 << 20,
            slice_pages: 64,
            cache_bytes: CACHE_BYTES,
            reopen_bytes: 2 << 30,
        }
    }
}

type Answer<T> = SyncSender<Result<T, StorageError>>;

enum Request {
    /// The window being filled has its first entry, or is full.
    Look,
    Get(Table, Place, Answer<Option<Bytes>>),
    Scan {
        table: Table,
        from: Place,
        to: Place,
        limit: usize,
        answer: Answer<(Found, u64)>,
    },
    ScanBack {
        table: Table,
        before: Place,
        limit: usize,
        answer: Answer<Found>,
    },
    Flush(Answer<()>),
    Close(Answer<()>),
}

#[derive(Debug, Default)]
struct Shared {
    overlay: RwLock<Overlay>,
    /// When the oldest entry of the window being filled was pushed.
    first_push_ms: AtomicU64,
    /// The thread knows that the window is full.
    told_full: AtomicBool,
    synced: Mutex<(u64, u64)>,
    failed: OnceLock<String>,
    /// The owner is gone without closing: nothing more is to be done.
    abandoned: AtomicBool,
    /// Since when the thread has been inside of sled; 0 when it is not.
    busy_since_ms: AtomicU64,
    /// Grows whenever what sled holds is about to change.
    version: AtomicU64,
}

impl Shared {
    // The overlay is whole even if a thread died while it held the lock: nothing in it can panic half way.
    fn read(&self) -> RwLockReadGuard<'_, Overlay> {
        self.overlay.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Overlay> {
        self.overlay.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn synced(&self) -> (u64, u64) {
        *self.synced.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Why nothing more will come, if that is so.
    fn failed(&self) -> Option<String> {
        if let Some(why) = self.failed.get() {
            return Some(why.clone());
        }
        let busy = self.busy_since_ms.load(Ordering::Relaxed);
        (busy != 0 && boot_clock_ms().saturating_sub(busy) > STUCK_MS)
            .then(|| "sled has not answered for two minutes".into())
    }

    fn stopped(&self) -> StorageError {
        StorageError::Stopped(
            self.failed()
                .unwrap_or_else(|| "the storage thread has ended".into()),
        )
    }
}

/// The storage thread, and what is on its way to it. Used by one thread; readers have [`StateThread::rows`].
pub struct StateThread {
    shared: Arc<Shared>,
    requests: Sender<Request>,
    thread: Option<JoinHandle<()>>,
    window_bytes: usize,
}

impl std::fmt::Debug for StateThread {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("StateThread")
            .field("synced", &self.shared.synced())
            .field("failed", &self.shared.failed.get())
            .finish_non_exhaustive()
    }
}

impl StateThread {
    /// Makes an empty state at a directory; everything is on disk when this returns, and closed.
    pub fn create(dir: &Path, meta: &StateMeta) -> Result<(), StorageError> {
        State::create(dir, meta)
    }

    /// Opens a state, checks it and starts the thread.
    pub fn open(dir: &Path, options: StateOptions) -> Result<(Self, StateMeta), StorageError> {
        let state = State::open(dir, options.cache_bytes)?;
        let meta = state.meta().state;
        let shared = Arc::new(Shared {
            synced: Mutex::new((meta.position, meta.sequence)),
            ..Shared::default()
        });
        let (requests, inbox) = channel();
        let worker = Worker {
            shared: Arc::clone(&shared),
            state: Some(state),
            options,
            deferred: Vec::new(),
            trim: false,
        };
        let thread = std::thread::Builder::new()
            .name("storage".into())
            .spawn(move || worker.run(&inbox))
            .map_err(|error| super::sled::io_error("starting the storage thread", dir, error))?;
        Ok((
            Self {
                shared,
                requests,
                thread: Some(thread),
                window_bytes: options.window_bytes,
            },
            meta,
        ))
    }

    /// Takes a committed entry. Its rows are visible to reads when this returns.
    pub fn push(&self, entry: PushedEntry) {
        let mut overlay = self.shared.write();
        let first = overlay.push(entry);
        let full = overlay.filling_bytes() >= self.window_bytes;
        if first {
            // Under the lock, so that the thread never sees a window without its age.
            self.shared
                .first_push_ms
                .store(boot_clock_ms(), Ordering::Relaxed);
        }
        drop(overlay);
        let full = full && !self.shared.told_full.swap(true, Ordering::Relaxed);
        if first || full {
            // A thread that has ended has said why in `failed`.
            let _ = self.requests.send(Request::Look);
        }
    }

    /// A handle for reading, for any thread.
    pub fn rows(&self) -> Arc<dyn Rows> {
        Arc::new(Reader {
            shared: Arc::clone(&self.shared),
            requests: self.requests.clone(),
            ahead: Mutex::default(),
        })
    }

    /// Log position and sequence up to which sled survives a power cut: the log may be shortened behind it.
    pub fn synced(&self) -> (u64, u64) {
        self.shared.synced()
    }

    /// The synced position, for readers on any thread.
    pub fn watch(&self) -> Arc<dyn Fn() -> u64 + Send + Sync> {
        let shared = Arc::clone(&self.shared);
        Arc::new(move || shared.synced().0)
    }

    /// Bytes of log that a start would have to replay.
    pub fn unapplied_log_bytes(&self, current_position: u64) -> u64 {
        current_position.saturating_sub(self.synced().0)
    }

    /// Why the store must stop (G17), if it must.
    pub fn failed(&self) -> Option<String> {
        self.shared.failed()
    }

    /// Brings sled to everything pushed, synced.
    pub fn flush(&self) -> Result<(), StorageError> {
        ask(&self.shared, &self.requests, Request::Flush)
    }

    /// The same, and ends the thread and closes sled.
    pub fn close(mut self) -> Result<(), StorageError> {
        let closed = ask(&self.shared, &self.requests, Request::Close);
        self.join();
        closed
    }

    fn join(&mut self) {
        let Some(thread) = self.thread.take() else {
            return;
        };
        while !thread.is_finished() {
            if self.shared.failed.get().is_none() && self.shared.failed().is_some() {
                return; // stuck inside of sled: the process ends without it
            }
            std::thread::sleep(JOIN_PAUSE);
        }
        // Its panics are errors of the requests that were open.
        let _ = thread.join();
    }
}

impl Drop for StateThread {
    /// Without [`StateThread::close`] nothing more is written: the log has it all.
    fn drop(&mut self) {
        if self.thread.is_some() {
            self.shared.abandoned.store(true, Ordering::Relaxed);
            let _ = self.requests.send(Request::Look);
            self.join();
        }
    }
}

/// Sends a request and waits for its answer.
fn ask<T>(
    shared: &Shared,
    requests: &Sender<Request>,
    request: impl FnOnce(Answer<T>) -> Request,
) -> Result<T, StorageError> {
    let (answer, wait) = sync_channel(1);
    requests
        .send(request(answer))
        .map_err(|_| shared.stopped())?;
    loop {
        match wait.recv_timeout(PATIENCE) {
            Ok(result) => return result,
            Err(RecvTimeoutError::Timeout) if shared.failed().is_none() => {}
            Err(_) => return Err(shared.stopped()),
        }
    }
}

/// Notes since when the thread is inside of sled: if that never ends, the store must stop rather than wait for ever (G17).
fn busy<T>(shared: &Shared, call: impl FnOnce() -> T) -> T {
    shared
        .busy_since_ms
        .store(boot_clock_ms().max(1), Ordering::Relaxed);
    let result = call();
    shared.busy_since_ms.store(0, Ordering::Relaxed);
    result
}

// ---- the thread -------------------------------------------------------------------------------------------------------

struct Worker {
    shared: Arc<Shared>,
    /// `None`: lost while it was being reopened.
    state: Option<State>,
    options: StateOptions,
    /// Requests that came while a window was being applied and need the one after it.
    deferred: Vec<Request>,
    /// A large window has left memory behind that the allocator keeps.
    trim: bool,
}

impl Worker {
    fn run(mut self, inbox: &Receiver<Request>) {
        self.work(inbox);
        let closed = self.close();
        self.stop_on_error(closed);
    }

    /// sled writes what it has buffered, and may fail or panic at that.
    fn close(&mut self) -> Result<(), StorageError> {
        let state = self.state.take();
        busy(&self.shared, || {
            guarded("closing", move || {
                drop(state);
                Ok(())
            })
        })
    }

    fn work(&mut self, inbox: &Receiver<Request>) {
        loop {
            let request = match self.wait(inbox) {
                Ok(request) => request,
                Err(RecvTimeoutError::Timeout) => None,
                Err(RecvTimeoutError::Disconnected) => return,
            };
            if self.shared.abandoned.load(Ordering::Relaxed) {
                return;
            }
            if let Some(Request::Close(answer)) = request.and_then(|request| self.serve(request)) {
                let caught_up = self.catch_up(inbox);
                let closed = self.close();
                let _ = answer.send(caught_up.and(closed));
                return;
            }
            if self.shared.failed.get().is_none() && self.is_due() {
                let result = self.apply_window(inbox);
                self.stop_on_error(result);
            }
        }
    }

    /// Sleeps until a request comes, the window is due, or (once) sled has been idle for long.
    fn wait(&mut self, inbox: &Receiver<Request>) -> Result<Option<Request>, RecvTimeoutError> {
        if !self.deferred.is_empty() {
            return Ok(Some(self.deferred.remove(0)));
        }
        if self.shared.failed.get().is_none() {
            if self.shared.read().is_pending() {
                return inbox.recv_timeout(self.due_in()).map(Some);
            }
            if self.trim {
                // Not after each window: it holds up every thread that allocates.
                match inbox.recv_timeout(QUIET) {
                    Err(RecvTimeoutError::Timeout) => {
                        malloc_trim();
                        self.trim = false;
                    }
                    other => return other.map(Some),
                }
            }
            if self.state.as_ref().map_or(0, State::written) >= IDLE_REOPEN_BYTES {
                match inbox.recv_timeout(IDLE) {
                    Err(RecvTimeoutError::Timeout) => {
                        let result = self.reopen();
                        self.stop_on_error(result);
                    }
                    other => return other.map(Some),
                }
            }
        }
        inbox
            .recv()
            .map(Some)
            .map_err(|_| RecvTimeoutError::Disconnected)
    }

    fn due_in(&self) -> Duration {
        let age = boot_clock_ms().saturating_sub(self.shared.first_push_ms.load(Ordering::Relaxed));
        Duration::from_millis(self.options.window_ms.saturating_sub(age))
    }

    fn is_due(&self) -> bool {
        let overlay = self.shared.read();
        overlay.is_pending()
            && (overlay.filling_bytes() >= self.options.window_bytes || self.due_in().is_zero())
    }

    /// Answers a request; gives `Close` back.
    fn serve(&mut self, request: Request) -> Option<Request> {
        match request {
            Request::Look => {}
            Request::Get(table, place, answer) => {
                let _ = answer.send(self.read(|state| state.get(table, place)));
            }
            Request::Scan {
                table,
                from,
                to,
                limit,
                answer,
            } => {
                let version = self.shared.version.load(Ordering::SeqCst);
                let found = self.read(|state| state.scan(table, from, to, limit));
                let _ = answer.send(found.map(|found| (found, version)));
            }
            Request::ScanBack {
                table,
                before,
                limit,
                answer,
            } => {
                let _ = answer.send(self.read(|state| state.scan_back(table, before, limit)));
            }
            Request::Flush(answer) => {
                let result = self.catch_up_without_reads();
                let _ = answer.send(result);
            }
            close @ Request::Close(_) => return Some(close),
        }
        None
    }

    /// A damaged page is an error of that read alone; an error of sled ends all (G17).
    fn read<T>(
        &mut self,
        call: impl FnOnce(&mut State) -> Result<T, StorageError>,
    ) -> Result<T, StorageError> {
        if self.shared.failed.get().is_some() {
            return Err(self.shared.stopped());
        }
        let Some(state) = self.state.as_mut() else {
            return Err(self.shared.stopped());
        };
        let result = busy(&self.shared, || call(state));
        if let Err(error @ (StorageError::State { .. } | StorageError::Io { .. })) = &result {
            let _ = self.shared.failed.set(error.to_string());
        }
        result
    }

    fn stop_on_error(&mut self, result: Result<(), StorageError>) {
        if let Err(error) = result {
            tracing::error!(%error, "the storage thread stops");
            let _ = self.shared.failed.set(error.to_string());
        }
    }

    fn catch_up_without_reads(&mut self) -> Result<(), StorageError> {
        let (_nobody, inbox) = channel();
        self.catch_up(&inbox)
    }

    /// Applies windows until nothing is pending.
    fn catch_up(&mut self, inbox: &Receiver<Request>) -> Result<(), StorageError> {
        loop {
            if self.shared.failed.get().is_some() {
                return Err(self.shared.stopped());
            }
            if !self.shared.read().is_pending() {
                return Ok(());
            }
            if let Err(error) = self.apply_window(inbox) {
                let _ = self.shared.failed.set(error.to_string());
                return Err(error);
            }
        }
    }

    /// Brings the window being filled into sled, syncs it, and says so.
    fn apply_window(&mut self, inbox: &Receiver<Request>) -> Result<(), StorageError> {
        let Some(generation) = self.shared.write().rotate() else {
            return Ok(());
        };
        self.shared.told_full.store(false, Ordering::Relaxed);
        let mut window = Window::new(&generation);
        while !self.apply_slice(&generation, &mut window)? {
            while let Ok(request) = inbox.try_recv() {
                match request {
                    Request::Flush(_) | Request::Close(_) => self.deferred.push(request),
                    read => drop(self.serve(read)),
                }
            }
            let abandoned = self.shared.abandoned.load(Ordering::Relaxed);
            if abandoned || self.shared.failed.get().is_some() {
                return Err(self.shared.stopped());
            }
        }
        let applied = self.shared.write().applied();
        let Some(state) = self.state.as_mut() else {
            return Err(self.shared.stopped());
        };
        busy(&self.shared, || state.sync())?;
        let reach = generation.reach();
        *self
            .shared
            .synced
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = (reach.position, reach.sequence);
        self.trim |= generation.bytes() >= TRIM_BYTES;
        drop((generation, applied));
        if state.written() >= self.options.reopen_bytes {
            self.reopen()?;
        }
        Ok(())
    }

    fn apply_slice(
        &mut self,
        generation: &Generation,
        window: &mut Window,
    ) -> Result<bool, StorageError> {
        // Before anything changes, so that nobody takes older rows for the present ones.
        self.shared.version.fetch_add(1, Ordering::SeqCst);
        match self.state.as_mut() {
            Some(state) => busy(&self.shared, || {
                state.apply_slice(generation, window, self.options.slice_pages)
            }),
            None => Err(self.shared.stopped()),
        }
    }

    fn reopen(&mut self) -> Result<(), StorageError> {
        if let Some(state) = self.state.take() {
            state.sled().check_blobs()?;
            self.state = Some(busy(&self.shared, || state.reopen())?);
        }
        Ok(())
    }
}
