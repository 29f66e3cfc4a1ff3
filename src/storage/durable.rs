//! The store on disk: the log in front, the state behind it, large payloads beside them.
//!
//! A commit is one entry of the log and its sync; its rows are then visible to readers and reach the state a second later. A
//! start reads the state and replays the log behind it, each entry with its own place. The log is shortened behind a synced
//! state only. Any error is final (G17).

mod layout;
#[cfg(test)]
mod play;
#[cfg(test)]
mod tests;

use std::path::{Path, PathBuf};
use std::sync::Arc;

pub use layout::{FORMAT, StoreFormat, read_format};

use super::disk::{DiskWatch, Reserve};
pub use super::gauges::Gauges;
use super::loading::{Replay, next_run, state_facts};
use super::lock::StoreLock;
use super::log::{Log, LogIdentity, LogPlace};
use super::payloads::{PayloadOptions, PayloadPin, Payloads};
use super::reader::StoreReader;
use super::records::{RowBatch, RowMaker, decode_shared_facts, encode_facts};
use super::state_thread::{PushedEntry, StateMeta, StateOptions, StateThread};
use super::{Loaded, PayloadWriter, Pressure, Read, StorageBatch, StorageError, Store, sync_shim};
use crate::broker::outcome::Fact;
use crate::broker::types::{Timestamp, WallTime};

/// How often old segments are looked for, in milliseconds.
const TIDY_MS: u64 = 1_000;

/// How the store works. Sizes of segments count when the store is made; everything else at every start.
#[derive(Debug, Clone, Copy)]
pub struct DurableOptions {
    /// Size of a log segment: also bounds a log entry.
    pub segment_bytes: u64,
    /// So long after a burst its end is sealed.
    pub seal_ms: u64,
    /// Committed facts reach the state after so long.
    pub window_ms: u64,
    /// Or when they take so many bytes.
    pub window_bytes: usize,
    /// Cache of the state in bytes.
    pub cache_bytes: u64,
    /// Intake slows when the log is so many bytes ahead of the state.
    pub slow_log_bytes: u64,
    /// Intake stops when it is so many ahead.
    pub stop_log_bytes: u64,
    /// Size of a payload segment.
    pub payload_segment_bytes: u64,
    /// Unused payload segments are deleted after so long.
    pub payload_grace_ms: u64,
    /// Intake stops when fewer bytes are free.
    pub min_free_bytes: u64,
    /// Or a smaller part of the file system, in thousandths.
    pub min_free_permille: u64,
    /// Calendar time, to know the downtime at the next start.
    pub wall: fn() -> WallTime,
}

impl Default for DurableOptions {
    fn default() -> Self {
        let state = StateOptions::default();
        let payloads = PayloadOptions::default();
        let reserve = Reserve::default();
        Self {
            segment_bytes: 64 << 20,
            seal_ms: 100,
            window_ms: state.window_ms,
            window_bytes: state.window_bytes,
            cache_bytes: state.cache_bytes,
            slow_log_bytes: 64 << 20,
            stop_log_bytes: 256 << 20,
            payload_segment_bytes: payloads.segment_bytes,
            payload_grace_ms: payloads.grace_ms,
            min_free_bytes: reserve.bytes,
            min_free_permille: reserve.permille,
            wall: || WallTime(sync_shim::wall_clock_ms()),
        }
    }
}

impl DurableOptions {
    /// Small segments and no reserve: for tests, which make many stores on small disks.
    pub fn small() -> Self {
        Self {
            segment_bytes: 4 << 20,
            payload_segment_bytes: 1 << 20,
            min_free_bytes: 0,
            min_free_permille: 0,
            ..Self::default()
        }
    }
}

/// The store on disk.
pub struct Durable {
    options: DurableOptions,
    format: StoreFormat,
    dir: PathBuf,
    meta: StateMeta,
    state: StateThread,
    payloads: Arc<Payloads>,
    /// Open as soon as the store is loaded.
    log: Option<Log>,
    maker: RowMaker,
    next_run: u64,
    now: Timestamp,
    /// Place of the last entry that the state was given.
    pushed: u64,
    disk: DiskWatch,
    tidied_ms: u64,
    gauges: Arc<Gauges>,
    /// Released last.
    _lock: StoreLock,
}

impl Durable {
    /// Opens the store at a directory, or makes one where there is none.
    pub fn open(dir: &Path, options: DurableOptions) -> Result<Self, StorageError> {
        let (format, lock) = layout::open_or_create(dir, &options)?;
        let state = StateOptions {
            window_ms: options.window_ms,
            window_bytes: options.window_bytes,
            cache_bytes: options.cache_bytes,
            ..StateOptions::default()
        };
        let (state, meta) = StateThread::open(&dir.join(layout::STATE), state)?;
        if meta.store_id != format.store_id {
            return Err(StorageError::Corrupt {
                record: format!("the state in {}", dir.display()),
                detail: "it belongs to another store".to_owned(),
            });
        }
        if meta.format > FORMAT {
            return Err(StorageError::TooNew {
                path: dir.display().to_string(),
                found: meta.format,
                known: FORMAT,
            });
        }
        let payloads = Payloads::new(
            dir.join(layout::PAYLOADS),
            format.store_id,
            PayloadOptions {
                segment_bytes: options.payload_segment_bytes,
                grace_ms: options.payload_grace_ms,
            },
        );
        let reserve = Reserve {
            bytes: options.min_free_bytes,
            permille: options.min_free_permille,
        };
        let gauges = Arc::new(Gauges::new(meta.position, state.watch()));
        Ok(Self {
            options,
            format,
            meta,
            state,
            payloads: Arc::new(payloads),
            log: None,
            maker: RowMaker::default(),
            next_run: meta.next_run,
            now: meta.now,
            pushed: meta.position,
            disk: DiskWatch::new(dir.to_owned(), reserve),
            tidied_ms: 0,
            gauges,
            dir: dir.to_owned(),
            _lock: lock,
        })
    }

    /// Brings the state to everything committed, synced.
    pub fn flush(&self) -> Result<(), StorageError> {
        self.state.flush()
    }

    /// Keeps all payload segments while the pin lives.
    #[must_use]
    pub fn pin_payloads(&self) -> PayloadPin {
        self.payloads.pin()
    }

    /// Where log and state stand, for readers on any thread.
    pub fn gauges(&self) -> Arc<Gauges> {
        Arc::clone(&self.gauges)
    }

    /// The place of the last commit.
    pub fn place(&self) -> LogPlace {
        self.log.as_ref().map_or(
            LogPlace {
                position: self.meta.position,
                sequence: self.meta.sequence,
            },
            Log::place,
        )
    }

    /// Errors of the other threads stop the store too.
    fn check(&self) -> Result<(), StorageError> {
        if let Some(reason) = self.state.failed() {
            return Err(StorageError::Stopped(reason));
        }
        match self.payloads.failed() {
            Some(reason) => Err(StorageError::Stopped(reason.to_owned())),
            None => Ok(()),
        }
    }

    /// Gives back what is behind the state, now and then.
    fn tidy(&mut self) -> Result<(), StorageError> {
        let now = sync_shim::boot_clock_ms();
        if now.saturating_sub(self.tidied_ms) < TIDY_MS {
            return Ok(());
        }
        self.tidied_ms = now;
        if let Some(log) = &mut self.log {
            log.shorten(self.state.synced().0);
        }
        self.payloads.collect(self.maker.payload_use(), now)?;
        Ok(())
    }
}

impl Store for Durable {
    fn load(&mut self, absorb: &mut dyn FnMut(Fact)) -> Result<Loaded, StorageError> {
        let rows = self.state.rows();
        let found = state_facts(&*rows, &mut self.maker, absorb)?;
        let mut replay = Replay::new(found, self.meta.next_run);
        let identity = LogIdentity {
            dir: self.dir.join(layout::LOG),
            store_id: self.format.store_id,
            segment_bytes: self.format.segment_bytes,
        };
        let from = LogPlace {
            position: self.meta.position,
            sequence: self.meta.sequence,
        };
        let mut last_wall = self.meta.wall;
        let log = Log::open(identity, from, &mut |entry| {
            self.now = entry.now;
            last_wall = entry.wall;
            let Some(body) = entry.body else {
                return Ok(());
            };
            let facts = decode_shared_facts(&body).map_err(|error| StorageError::Corrupt {
                record: format!("entry {} of the log", entry.after.sequence),
                detail: error.to_string(),
            })?;
            replay.entry(&*rows, &facts, absorb)?;
            let mut batch = RowBatch::default();
            self.maker.rows_of(&facts, entry.now, &mut batch);
            facts.into_iter().for_each(&mut *absorb);
            self.pushed = entry.after.position;
            self.gauges.committed(self.pushed);
            self.state.push(PushedEntry {
                position_after: entry.after.position,
                sequence: entry.after.sequence,
                now: entry.now,
                wall: entry.wall,
                next_run: replay.next_run,
                batch,
                bytes: body.len(),
            });
            Ok(())
        })?;
        self.payloads.take_stock(self.maker.payload_use())?;
        self.log = Some(log);
        self.next_run = replay.next_run;
        let (from_sled, from_log) = replay.counts();
        Ok(Loaded {
            now: self.now,
            last_wall,
            from_sled,
            from_log,
            lease_secret: self.meta.lease_secret,
            store_id: self.meta.store_id,
            next_run: self.next_run,
        })
    }

    fn commit(&mut self, batch: StorageBatch) -> Result<(), StorageError> {
        self.check()?;
        let Some(log) = &mut self.log else {
            return Err(StorageError::Stopped("it was never loaded".to_owned()));
        };
        let StorageBatch { now, facts } = batch;
        let wall = (self.options.wall)();
        let before = log.place().position;
        let place = log.append(now, wall, |out| encode_facts(&facts, out))?;
        self.now = now;
        self.next_run = next_run(self.next_run, &facts);
        self.pushed = place.position;
        self.gauges.committed(self.pushed);
        let mut rows = RowBatch::default();
        self.maker.rows_of(&facts, now, &mut rows);
        self.state.push(PushedEntry {
            position_after: place.position,
            sequence: place.sequence,
            now,
            wall,
            next_run: self.next_run,
            batch: rows,
            bytes: place.position.saturating_sub(before) as usize,
        });
        self.tidy()
    }

    fn idle(&mut self, since_ms: u64) -> Result<Option<u64>, StorageError> {
        self.check()?;
        self.tidy()?;
        let wall = (self.options.wall)();
        let Some(log) = &mut self.log else {
            return Ok(None);
        };
        if !log.is_sealed() {
            if since_ms < self.options.seal_ms {
                return Ok(Some(self.options.seal_ms - since_ms));
            }
            log.seal(self.now, wall)?;
        }
        // The log can be shortened as soon as the state has been synced.
        let behind = self.state.synced().0 < self.pushed;
        Ok(behind.then_some(TIDY_MS))
    }

    fn pressure(&self) -> Pressure {
        if self.disk.is_low() {
            return Pressure::DiskFull;
        }
        let ahead = self.state.unapplied_log_bytes(self.pushed);
        if ahead >= self.options.stop_log_bytes {
            Pressure::Stop
        } else if ahead >= self.options.slow_log_bytes {
            Pressure::Slow
        } else {
            Pressure::None
        }
    }

    fn reader(&self) -> Arc<dyn Read> {
        Arc::new(StoreReader::new(
            self.state.rows(),
            Arc::clone(&self.payloads) as _,
        ))
    }

    fn payloads(&self) -> Arc<dyn PayloadWriter> {
        Arc::clone(&self.payloads) as _
    }

    fn close(self: Box<Self>) -> Result<(), StorageError> {
        let Self {
            state,
            log,
            now,
            options,
            _lock: lock,
            ..
        } = *self;
        if let Some(mut log) = log {
            log.seal(now, (options.wall)())?;
        }
        state.close()?;
        drop(lock);
        Ok(())
    }
}
