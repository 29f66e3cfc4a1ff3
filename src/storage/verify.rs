//! `verify`: whether a store is what its own rules say (INVARIANTS §4, those marked V).
//!
//! Works on a temporary copy of log and state, because sled writes when it opens, and reads payload segments where they are;
//! the store itself is never changed, and one in use is refused. First every page as it lies there, then the log is brought
//! into the copy, then what the rows say is recounted. Knows the decoders and no broker: what the broker derives is derived
//! here a second time.

mod copy;
mod pages;
mod run;
mod tables;
#[cfg(test)]
mod tests;

use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use bytes::Bytes;

use super::StorageError;
use super::durable::{StoreFormat, read_format};
use super::loading::{Replay, state_facts};
use super::log::{Log, LogIdentity, LogPlace};
use super::pages::Place;
use super::payloads::{PayloadOptions, Payloads};
use super::records::{RowBatch, RowMaker, decode_shared_facts};
use super::row::{RowKey, Table};
use super::rows::Rows;
use super::state::State;
use super::state_thread::{PushedEntry, StateOptions, StateThread};

/// Violations of one invariant that are described.
const DESCRIBED: usize = 10;

/// How to verify.
#[derive(Debug, Clone, Default)]
pub struct VerifyOptions {
    /// Read every payload and compare its checksum; otherwise only its place is checked.
    pub deep: bool,
    /// Where the temporary copy goes; the system's directory for such things when `None`.
    pub scratch: Option<PathBuf>,
}

/// What was found out about one invariant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Invariant {
    /// Its number in docs/INVARIANTS.md.
    pub id: &'static str,
    /// What it says, shortly.
    pub text: &'static str,
    /// Records looked at.
    pub checked: u64,
    /// Records that break it.
    pub violations: u64,
    /// The first ten of them, with keys.
    pub first: Vec<String>,
    /// The store has records that it speaks of.
    pub has_data: bool,
}

impl Invariant {
    /// Nothing was checked although there is something: a failure too.
    pub fn was_skipped(&self) -> bool {
        self.has_data && self.checked == 0
    }
}

/// What a table holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct TableCount {
    /// Pages.
    pub pages: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Rows in them.
    pub rows: u64,
}

/// Totals of a store.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Totals {
    /// Each table's name and what it holds.
    pub tables: Vec<(String, TableCount)>,
    /// Entries of the log that the state did not have yet.
    pub log_entries: u64,
    /// Facts in them.
    pub log_facts: u64,
    /// Runs that go on.
    pub open_runs: u64,
    /// Runs that have ended.
    pub ended_runs: u64,
    /// Nodes of both.
    pub nodes: u64,
    /// Inputs of nodes, one by one.
    pub inputs: u64,
    /// Events of runs.
    pub events: u64,
    /// Large payloads referred to.
    pub payloads: u64,
    /// Their bytes.
    pub payload_bytes: u64,
    /// Payload segments that nothing refers to; the next start drops them.
    pub orphan_segments: u64,
    /// Bytes copied to verify.
    pub copied_bytes: u64,
}

/// What was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VerifyReport {
    /// The store's id.
    pub store_id: [u8; 16],
    /// Version of its format.
    pub format: u32,
    /// Number of its last log entry.
    pub sequence: u64,
    /// The invariants, in order.
    pub invariants: Vec<Invariant>,
    /// Counts.
    pub totals: Totals,
    /// What could not be looked at, and why.
    pub unreadable: Vec<String>,
}

impl VerifyReport {
    /// Whether nothing is wrong: exit status 0.
    pub fn is_sound(&self) -> bool {
        self.unreadable.is_empty()
            && self
                .invariants
                .iter()
                .all(|i| i.violations == 0 && !i.was_skipped())
    }

    /// Violations of all invariants.
    pub fn violations(&self) -> u64 {
        self.invariants.iter().map(|i| i.violations).sum()
    }

    /// One of them.
    pub fn invariant(&self, id: &str) -> Option<&Invariant> {
        self.invariants.iter().find(|i| i.id == id)
    }
}

/// Verifies the store at `dir`. An error means that nothing could be found out; damage is in the report.
pub fn verify(dir: &Path, options: &VerifyOptions) -> Result<VerifyReport, StorageError> {
    let format = read_format(dir)?.ok_or_else(|| StorageError::Corrupt {
        record: dir.display().to_string(),
        detail: "there is no store here".into(),
    })?;
    let copy = copy::Copy::make(dir, options.scratch.as_deref())?;
    let mut findings = Findings::default();
    findings.totals.copied_bytes = copy.bytes;

    let sequence = verify_copy(dir, copy.path(), format, options, &mut findings);
    let sequence = match sequence {
        Ok(sequence) => sequence,
        Err(error) => {
            findings.unreadable.push(error.to_string());
            0
        }
    };
    Ok(VerifyReport {
        store_id: format.store_id,
        format: format.version,
        sequence,
        invariants: findings.report(),
        totals: findings.totals,
        unreadable: findings.unreadable,
    })
}

fn verify_copy(
    dir: &Path,
    copy: &Path,
    format: StoreFormat,
    options: &VerifyOptions,
    findings: &mut Findings,
) -> Result<u64, StorageError> {
    let state_dir = copy.join("state");
    let state = State::open_unchecked(&state_dir, super::sled::CACHE_BYTES)?;
    pages::check(&state, findings)?;
    drop(state);

    // The log is brought into the copy as a start would do it. A state that a start refuses is looked at as it is.
    if let Err(error) = replay(copy, &state_dir, format, findings) {
        findings.violation(I17, || format!("the log behind the state: {error}"));
    }
    let state = State::open_unchecked(&state_dir, super::sled::CACHE_BYTES)?;
    let sequence = state.meta().state.sequence;
    let headers = pages::check_owners(&state, findings)?;
    pages::count(&state, findings)?;
    let next_run = state.meta().state.next_run;
    let rows = Direct(Mutex::new(state));
    let payloads = Payloads::new(
        dir.join("payloads"),
        format.store_id,
        PayloadOptions::default(),
    );
    let mut references = tables::References::new(&payloads, &dir.join("payloads"), options.deep);
    let facts = tables::check(&rows, next_run, &mut references, findings);
    for header in &headers {
        if let Err(error) = run::check(&rows, *header, &facts, &mut references, findings) {
            findings.violation(I17, || format!("run {:x}: {error}", header.run));
        }
    }
    for (run, owed) in &facts.owed {
        if headers.binary_search_by_key(run, |h| h.run).is_err() {
            findings.violation(I12, || {
                format!("run {run:x} is gone and {} deliveries are owed", owed.len())
            });
        }
    }
    references.finish(&rows, &facts, &headers, findings);
    findings.derive_has_data();
    Ok(sequence)
}

/// Replays the log into the copy and brings its state up to it.
fn replay(
    copy: &Path,
    state_dir: &Path,
    format: StoreFormat,
    findings: &mut Findings,
) -> Result<(), StorageError> {
    let by_hand = StateOptions {
        window_ms: u64::MAX,
        window_bytes: 64 << 20,
        ..StateOptions::default()
    };
    let (thread, meta) = StateThread::open(state_dir, by_hand)?;
    let rows = thread.rows();
    let mut maker = RowMaker::default();
    let found = state_facts(&*rows, &mut maker, &mut |_| {})?;
    let mut replay = Replay::new(found, meta.next_run);
    let identity = LogIdentity {
        dir: copy.join("log"),
        store_id: format.store_id,
        segment_bytes: format.segment_bytes,
    };
    let from = LogPlace {
        position: meta.position,
        sequence: meta.sequence,
    };
    let segment_of = |position: u64| position / format.segment_bytes;
    let (mut last, mut segment) = (meta.sequence, segment_of(meta.position));
    let log = Log::open(identity, from, &mut |entry| {
        // The roll at a segment's end has a number too, and is not shown.
        let rolls = segment_of(entry.after.position) - segment;
        segment += rolls;
        let sequence = entry.after.sequence;
        findings.check(I11, sequence == last + 1 + rolls, || {
            format!("entry {sequence} of the log follows {last}")
        });
        last = sequence;
        findings.totals.log_entries += 1;
        let Some(body) = entry.body else {
            return Ok(());
        };
        let facts = decode_shared_facts(&body).map_err(|error| StorageError::Corrupt {
            record: format!("entry {last} of the log"),
            detail: error.to_string(),
        })?;
        findings.totals.log_facts += facts.len() as u64;
        replay.entry(&*rows, &facts, &mut |_| {})?;
        let mut batch = RowBatch::default();
        maker.rows_of(&facts, entry.now, &mut batch);
        thread.push(PushedEntry {
            position_after: entry.after.position,
            sequence: entry.after.sequence,
            now: entry.now,
            wall: entry.wall,
            next_run: replay.next_run,
            batch,
            bytes: body.len(),
        });
        Ok(())
    });
    let closed = thread.close();
    log.map(drop).and(closed)
}

// ---- invariants -------------------------------------------------------------------------------------------------------

/// Number of an invariant in [`TEXTS`].
type Id = usize;
const I2: Id = 0;
const I3: Id = 1;
const I4: Id = 2;
const I5: Id = 3;
const I6: Id = 4;
const I7: Id = 5;
const I8: Id = 6;
const I9: Id = 7;
const I10: Id = 8;
const I11: Id = 9;
const I12: Id = 10;
const I14: Id = 11;
const I16: Id = 12;
const I17: Id = 13;
const I18: Id = 14;
const I19: Id = 15;

const TEXTS: [(&str, &str); 16] = [
    ("I2", "one outcome a node and round, terminal states stay"),
    ("I3", "attempts are 1..n"),
    ("I4", "leased iff there is an open lease"),
    ("I5", "missing inputs, recounted"),
    ("I6", "nothing runs before its inputs allow it"),
    ("I7", "every ready node has its lane"),
    ("I8", "no lease before the last input's commit"),
    ("I9", "no cycles, every edge end and parent exists"),
    ("I10", "a run has ended iff its nodes have, counters agree"),
    ("I11", "events and commits are numbered without gaps"),
    ("I12", "deliveries owed are there once"),
    ("I14", "keys and positions are unique"),
    ("I16", "payloads referred to are there"),
    ("I17", "pages, digests and records are whole"),
    ("I18", "indexes say what the records say"),
    ("I19", "nothing of what is kept is missing"),
];

/// Collects what is found.
#[derive(Debug, Default)]
struct Findings {
    counts: [(u64, u64, Vec<String>, bool); TEXTS.len()],
    totals: Totals,
    unreadable: Vec<String>,
}

impl Findings {
    fn checked(&mut self, id: Id, n: u64) {
        self.counts[id].0 += n;
    }

    fn violation(&mut self, id: Id, describe: impl FnOnce() -> String) {
        let (_, violations, first, _) = &mut self.counts[id];
        *violations += 1;
        if first.len() < DESCRIBED {
            first.push(describe());
        }
    }

    /// Looks at one record, and notes a violation when `holds` is false.
    fn check(&mut self, id: Id, holds: bool, describe: impl FnOnce() -> String) {
        self.checked(id, 1);
        if !holds {
            self.violation(id, describe);
        }
    }

    /// What tables hold says which invariants must have been looked at.
    fn derive_has_data(&mut self) {
        let rows = |table: Table| {
            let name = format!("{table:?}");
            self.totals
                .tables
                .iter()
                .find(|(n, _)| *n == name)
                .is_some_and(|(_, count)| count.rows > 0)
        };
        let nodes = rows(Table::Node);
        let runs = rows(Table::OpenRun) || rows(Table::EndedRun);
        let has = [
            nodes,
            nodes,
            nodes,
            nodes,
            nodes,
            nodes,
            nodes,
            nodes,
            runs,
            rows(Table::Event) || self.totals.log_entries > 0,
            rows(Table::Outbox),
            rows(Table::Key) || rows(Table::Position),
            rows(Table::Payload),
            true,
            runs,
            nodes,
        ];
        for (count, has) in self.counts.iter_mut().zip(has) {
            count.3 = has;
        }
    }

    fn report(&self) -> Vec<Invariant> {
        TEXTS
            .iter()
            .zip(&self.counts)
            .map(
                |(&(id, text), (checked, violations, first, has_data))| Invariant {
                    id,
                    text,
                    checked: *checked,
                    violations: *violations,
                    first: first.clone(),
                    has_data: *has_data,
                },
            )
            .collect()
    }
}

// ---- rows without a thread --------------------------------------------------------------------------------------------

/// Reads of a state that nobody writes.
struct Direct(Mutex<State>);

impl Direct {
    fn with<T>(&self, call: impl FnOnce(&mut State) -> T) -> T {
        call(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Rows for Direct {
    fn get(&self, key: RowKey) -> Result<Option<Bytes>, StorageError> {
        self.with(|state| state.get(key.table, (key.major, key.minor)))
    }

    fn recent(&self, _key: RowKey) -> Option<Option<Bytes>> {
        None
    }

    fn scan(
        &self,
        table: Table,
        from: Place,
        to: Place,
        limit: usize,
        visit: &mut dyn FnMut(RowKey, Bytes) -> bool,
    ) -> Result<(), StorageError> {
        let mut left = limit;
        let mut at = Some(from);
        while let Some(from) = at.filter(|_| left > 0) {
            let found = self.with(|state| state.scan(table, from, to, left.min(4_096)))?;
            for ((major, minor), value) in found.rows {
                let key = RowKey {
                    table,
                    major,
                    minor,
                };
                if left == 0 || !visit(key, value) {
                    return Ok(());
                }
                left -= 1;
            }
            at = found.next;
        }
        Ok(())
    }

    fn scan_back(
        &self,
        table: Table,
        before: Place,
        limit: usize,
    ) -> Result<Vec<(RowKey, Bytes)>, StorageError> {
        let found = self.with(|state| state.scan_back(table, before, limit))?;
        let rows = found.rows.into_iter().take(limit);
        Ok(rows
            .map(|((major, minor), value)| {
                let key = RowKey {
                    table,
                    major,
                    minor,
                };
                (key, value)
            })
            .collect())
    }
}
