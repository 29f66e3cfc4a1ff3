//! A store in memory, for tests and for the simulator. It keeps the same rows as the one on disk and answers through the same
//! reader, so that what is tested against it holds for both; what it lacks is the disk.
//!
//! Faults are asked for and then happen exactly once: a commit that fails before or after it took effect. [`MemoryStore::crash`]
//! gives what a power cut leaves.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use xxhash_rust::xxh3::xxh3_64;

use super::loading::{Replay, next_run, state_facts};
use super::reader::{PayloadSource, StoreReader};
use super::records::{RowBatch, RowMaker};
use super::row::{RowKey, Table};
use super::rows::Rows;
use super::{Loaded, PayloadWriter, Pressure, Read, StorageBatch, StorageError, Store};
use crate::broker::outcome::Fact;
use crate::broker::types::{PayloadRef, Timestamp, WallTime};

/// What happens to a commit that fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// Nothing of it is kept.
    Lost,
    /// It is kept, but the caller is told that it failed: what a sync error leaves open.
    KeptUnseen,
}

/// Rows by key.
type Map = BTreeMap<RowKey, Bytes>;

/// The store. Clones share their content.
#[derive(Clone)]
pub struct MemoryStore {
    shared: Arc<Mutex<Content>>,
    /// Batches that a load tells as a log would: the latest so many.
    log_batches: usize,
}

#[derive(Default)]
struct Content {
    rows: Map,
    maker: RowMaker,
    batch: RowBatch,
    /// Rows without the batches of `log`.
    base: Map,
    base_maker: RowMaker,
    base_next_run: u64,
    log: VecDeque<StorageBatch>,
    payloads: HashMap<PayloadRef, Bytes>,
    payload_bytes: u64,
    now: Timestamp,
    wall: WallTime,
    next_run: u64,
    commits: u64,
    fault: Option<(u64, Fault)>,
    failed: bool,
    pressure: Option<Pressure>,
}

impl Default for MemoryStore {
    fn default() -> Self {
        Self::new()
    }
}

impl MemoryStore {
    /// An empty store.
    pub fn new() -> Self {
        Self::with_log(0)
    }

    /// An empty store whose loads tell the latest `batches` batches as a log behind the state does: as they were committed.
    pub fn with_log(batches: usize) -> Self {
        let content = Content {
            next_run: 1,
            base_next_run: 1,
            ..Content::default()
        };
        Self {
            shared: Arc::new(Mutex::new(content)),
            log_batches: batches,
        }
    }

    /// What a power cut at this moment leaves: all that was committed, and none of the faults that were asked for.
    #[must_use]
    pub fn crash(&self) -> Self {
        let content = self.content();
        let mut copy = Content {
            rows: content.rows.clone(),
            base: content.base.clone(),
            base_next_run: content.base_next_run,
            log: content.log.clone(),
            payloads: content.payloads.clone(),
            payload_bytes: content.payload_bytes,
            now: content.now,
            wall: content.wall,
            next_run: content.next_run,
            commits: content.commits,
            ..Content::default()
        };
        if self.log_batches == 0 {
            copy.base_next_run = copy.next_run;
        }
        Self {
            shared: Arc::new(Mutex::new(copy)),
            log_batches: self.log_batches,
        }
    }

    /// Lets the n-th commit from now (1 is the next) fail, and all after it be refused.
    pub fn fail_commit(&self, n: u64, fault: Fault) {
        let mut content = self.content();
        content.fault = Some((content.commits + n, fault));
    }

    /// Reports this pressure from now on.
    pub fn set_pressure(&self, pressure: Pressure) {
        self.content().pressure = Some(pressure);
    }

    /// Notes when the store was last written, for downtime.
    pub fn set_wall(&self, wall: WallTime) {
        self.content().wall = wall;
    }

    /// How many batches were committed.
    pub fn commits(&self) -> u64 {
        self.content().commits
    }

    fn content(&self) -> MutexGuard<'_, Content> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Content {
    fn apply(&mut self, batch: StorageBatch, log_batches: usize) {
        self.now = batch.now;
        self.next_run = next_run(self.next_run, &batch.facts);
        self.batch.clear();
        self.maker.rows_of(&batch.facts, batch.now, &mut self.batch);
        apply(&mut self.rows, &self.batch);
        if log_batches > 0 {
            self.log.push_back(batch);
            while self.log.len() > log_batches {
                self.settle_oldest();
            }
        }
    }

    fn settle_oldest(&mut self) {
        if let Some(batch) = self.log.pop_front() {
            self.base_next_run = next_run(self.base_next_run, &batch.facts);
            self.batch.clear();
            self.base_maker
                .rows_of(&batch.facts, batch.now, &mut self.batch);
            apply(&mut self.base, &self.batch);
        }
    }
}

fn apply(rows: &mut Map, batch: &RowBatch) {
    for row in &batch.rows {
        match &row.value {
            Some(value) => rows.insert(row.key, value.clone()),
            None => rows.remove(&row.key),
        };
    }
    let mut delete = |from: RowKey, to: RowKey| {
        let doomed: Vec<_> = rows.range(from..to).map(|(key, _)| *key).collect();
        for key in doomed {
            rows.remove(&key);
        }
    };
    for (from, to) in &batch.deleted_ranges {
        delete(*from, *to);
    }
    for run in &batch.deleted_runs {
        for table in [
            Table::OpenRun,
            Table::EndedRun,
            Table::Node,
            Table::Arguments,
            Table::Inputs,
            Table::Outcome,
            Table::Event,
        ] {
            let key = |major| RowKey {
                table,
                major,
                minor: 0,
            };
            delete(key(*run), key(run + 1));
        }
    }
}

impl Store for MemoryStore {
    fn load(&mut self, absorb: &mut dyn FnMut(Fact)) -> Result<Loaded, StorageError> {
        let mut content = self.content();
        let content = &mut *content;
        let (from_sled, from_log);
        if self.log_batches == 0 {
            content.maker = RowMaker::default();
            let found = state_facts(&MapRows(&content.rows), &mut content.maker, absorb)?;
            (from_sled, from_log) = (found.values().sum(), 0);
        } else {
            content.base_maker = RowMaker::default();
            let found = state_facts(&MapRows(&content.base), &mut content.base_maker, absorb)?;
            let mut replay = Replay::new(found, content.base_next_run);
            for batch in std::mem::take(&mut content.log) {
                replay.entry(&MapRows(&content.base), &batch.facts, absorb)?;
                batch.facts.iter().cloned().for_each(&mut *absorb);
                content.log.push_back(batch);
                content.settle_oldest();
            }
            (from_sled, from_log) = replay.counts();
            content.rows = content.base.clone();
            content.maker = RowMaker::default();
            state_facts(&MapRows(&content.rows), &mut content.maker, &mut |_| {})?;
        }
        Ok(Loaded {
            now: content.now,
            last_wall: content.wall,
            from_sled,
            from_log,
            lease_secret: *b"secret of memory",
            store_id: *b"a store in memor",
            next_run: content.next_run,
        })
    }

    fn commit(&mut self, batch: StorageBatch) -> Result<(), StorageError> {
        let mut content = self.content();
        if content.failed {
            return Err(StorageError::Stopped("an injected fault".to_owned()));
        }
        content.commits += 1;
        match content.fault {
            Some((n, fault)) if n == content.commits => {
                content.failed = true;
                if fault == Fault::KeptUnseen {
                    content.apply(batch, self.log_batches);
                }
                Err(StorageError::Io {
                    what: "sync",
                    path: "memory".to_owned(),
                    source: std::io::Error::other("an injected fault"),
                })
            }
            _ => {
                content.apply(batch, self.log_batches);
                Ok(())
            }
        }
    }

    fn idle(&mut self, _since_ms: u64) -> Result<Option<u64>, StorageError> {
        Ok(None)
    }

    fn pressure(&self) -> Pressure {
        self.content().pressure.unwrap_or(Pressure::None)
    }

    fn reader(&self) -> Arc<dyn Read> {
        let shared = Arc::new(self.clone());
        Arc::new(StoreReader::new(shared.clone(), shared))
    }

    fn payloads(&self) -> Arc<dyn PayloadWriter> {
        Arc::new(self.clone())
    }

    fn close(self: Box<Self>) -> Result<(), StorageError> {
        Ok(())
    }
}

impl PayloadWriter for MemoryStore {
    fn write(&self, bytes: Bytes) -> Result<PayloadRef, StorageError> {
        let mut content = self.content();
        let at = PayloadRef {
            segment: 1,
            offset: content.payload_bytes,
            length: bytes.len() as u32,
            checksum: xxh3_64(&bytes),
        };
        content.payload_bytes += (bytes.len() as u64).next_multiple_of(4_096);
        content.payloads.insert(at, bytes);
        Ok(at)
    }
}

impl PayloadSource for MemoryStore {
    fn read(&self, at: PayloadRef) -> Result<Bytes, StorageError> {
        self.content()
            .payloads
            .get(&at)
            .cloned()
            .ok_or_else(|| StorageError::Corrupt {
                record: format!("payload {}/{}", at.segment, at.offset),
                detail: "it is missing".to_owned(),
            })
    }
}

/// Rows of a map that is borrowed.
struct MapRows<'a>(&'a Map);

impl Rows for MapRows<'_> {
    fn get(&self, key: RowKey) -> Result<Option<Bytes>, StorageError> {
        Ok(self.0.get(&key).cloned())
    }

    fn recent(&self, key: RowKey) -> Option<Option<Bytes>> {
        Some(self.0.get(&key).cloned())
    }

    fn scan(
        &self,
        table: Table,
        from: (u64, u64),
        to: (u64, u64),
        limit: usize,
        visit: &mut dyn FnMut(RowKey, Bytes) -> bool,
    ) -> Result<(), StorageError> {
        let key = |(major, minor)| RowKey {
            table,
            major,
            minor,
        };
        if from < to {
            for (key, value) in self.0.range(key(from)..key(to)).take(limit) {
                if !visit(*key, value.clone()) {
                    break;
                }
            }
        }
        Ok(())
    }

    fn scan_back(
        &self,
        table: Table,
        before: (u64, u64),
        limit: usize,
    ) -> Result<Vec<(RowKey, Bytes)>, StorageError> {
        let key = |(major, minor)| RowKey {
            table,
            major,
            minor,
        };
        let rows = self.0.range(key((0, 0))..key(before)).rev().take(limit);
        Ok(rows.map(|(key, value)| (*key, value.clone())).collect())
    }
}

impl Rows for MemoryStore {
    fn get(&self, key: RowKey) -> Result<Option<Bytes>, StorageError> {
        MapRows(&self.content().rows).get(key)
    }

    fn recent(&self, key: RowKey) -> Option<Option<Bytes>> {
        MapRows(&self.content().rows).recent(key)
    }

    fn scan(
        &self,
        table: Table,
        from: (u64, u64),
        to: (u64, u64),
        limit: usize,
        visit: &mut dyn FnMut(RowKey, Bytes) -> bool,
    ) -> Result<(), StorageError> {
        // The visitor may ask for further rows, so it is not called under the lock.
        let mut found = Vec::new();
        MapRows(&self.content().rows).scan(table, from, to, limit, &mut |key, value| {
            found.push((key, value));
            true
        })?;
        for (key, value) in found {
            if !visit(key, value) {
                break;
            }
        }
        Ok(())
    }

    fn scan_back(
        &self,
        table: Table,
        before: (u64, u64),
        limit: usize,
    ) -> Result<Vec<(RowKey, Bytes)>, StorageError> {
        MapRows(&self.content().rows).scan_back(table, before, limit)
    }
}
