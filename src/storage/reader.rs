//! Reads of committed state: rows become what they mean, payload references become bytes.
//!
//! Works over any [`Rows`] and any [`PayloadSource`], so the store in memory and the store on disk answer alike. Knows no file.

use std::sync::Arc;

use bytes::Bytes;

use super::records::{DecodeError, HEADER_TAIL, PART_BITS, PART_MASK, REFERENCES, rows_in};
use super::row::{RowKey, Table};
use super::rows::Rows;
use super::{Arguments, EventRecord, OutboxRecord, Outcome, Read, StorageError};
use crate::broker::outcome::{DeadLetterRecord, Fact};
use crate::broker::types::{
    InputRange, NameId, NodeIndex, NodeKey, NodeRecord, PayloadRef, RunRecord, RunSeq, Timestamp,
};

/// Rows that one request to the state brings.
pub(super) const SCAN_ROWS: usize = 4_096;

/// Where the bytes of large payloads are.
pub trait PayloadSource: Send + Sync {
    /// The bytes, checked against their checksum.
    fn read(&self, at: PayloadRef) -> Result<Bytes, StorageError>;
}

/// A handle for reading, for any thread.
#[derive(Clone)]
pub struct StoreReader {
    rows: Arc<dyn Rows>,
    payloads: Arc<dyn PayloadSource>,
}

impl StoreReader {
    /// A reader of these rows and payloads.
    pub fn new(rows: Arc<dyn Rows>, payloads: Arc<dyn PayloadSource>) -> Self {
        Self { rows, payloads }
    }

    fn ranges(
        &self,
        node: NodeKey,
        first_part: u64,
        expected: usize,
    ) -> Result<Vec<InputRange>, StorageError> {
        let mut all = Vec::new();
        let mut part = first_part;
        while all.len() < expected {
            let key = inputs_key(node, part);
            let value = self.rows.get(key)?.ok_or_else(|| missing(key))?;
            take_ranges(key, &value, expected, &mut all)?;
            part += 1;
        }
        Ok(all)
    }

    /// The same from memory; `None` if a part is not there.
    fn recent_ranges(
        &self,
        node: NodeKey,
        first_part: u64,
        expected: usize,
    ) -> Option<Vec<InputRange>> {
        let mut all = Vec::new();
        let mut part = first_part;
        while all.len() < expected {
            let key = inputs_key(node, part);
            let value = self.rows.recent(key)??;
            take_ranges(key, &value, expected, &mut all).ok()?;
            part += 1;
        }
        Some(all)
    }

    fn outcome_of(&self, key: RowKey, value: &Bytes) -> Result<Outcome, StorageError> {
        let (is_error, payload, expected) =
            rows_in::outcome_row(value).map_err(|e| corrupt(key, &e))?;
        let node = NodeKey::new(RunSeq(key.major), NodeIndex(key.minor as u32));
        Ok(Outcome {
            is_error,
            payload,
            references: self.ranges(node, REFERENCES, expected)?,
        })
    }
}

impl Read for StoreReader {
    fn arguments(&self, node: NodeKey) -> Result<Option<Arguments>, StorageError> {
        let key = node_key(Table::Arguments, node);
        let Some(value) = self.rows.get(key)? else {
            return Ok(None);
        };
        let (payload, expected) = rows_in::arguments_row(&value).map_err(|e| corrupt(key, &e))?;
        Ok(Some(Arguments {
            payload,
            inputs: self.ranges(node, 0, expected)?,
        }))
    }

    fn recent_arguments(&self, node: NodeKey) -> Option<Arguments> {
        let value = self.rows.recent(node_key(Table::Arguments, node))??;
        let (payload, expected) = rows_in::arguments_row(&value).ok()?;
        Some(Arguments {
            payload,
            inputs: self.recent_ranges(node, 0, expected)?,
        })
    }

    fn outcome(&self, node: NodeKey) -> Result<Option<Outcome>, StorageError> {
        let key = node_key(Table::Outcome, node);
        match self.rows.get(key)? {
            Some(value) => self.outcome_of(key, &value).map(Some),
            None => Ok(None),
        }
    }

    fn recent_outcome(&self, node: NodeKey) -> Option<Outcome> {
        let value = self.rows.recent(node_key(Table::Outcome, node))??;
        let (is_error, payload, expected) = rows_in::outcome_row(&value).ok()?;
        Some(Outcome {
            is_error,
            payload,
            references: self.recent_ranges(node, REFERENCES, expected)?,
        })
    }

    fn outcomes(
        &self,
        run: RunSeq,
        first: NodeIndex,
        count: u32,
        max_bytes: usize,
    ) -> Result<Vec<(NodeIndex, Outcome)>, StorageError> {
        let end = u64::from(first.0) + u64::from(count);
        let mut found = Vec::new();
        let mut from = u64::from(first.0);
        let mut left = max_bytes;
        // Values are at most a row long, so this many rows are wanted for what may still be given.
        while from < end {
            let mut rows = Vec::new();
            scan_some(
                &*self.rows,
                Table::Outcome,
                (run.0, from),
                (run.0, end),
                SCAN_ROWS.min(left / 64 + 1),
                &mut rows,
            )?;
            let Some((last, _)) = rows.last() else {
                break;
            };
            from = last.minor + 1;
            for (key, value) in &rows {
                let outcome = self.outcome_of(*key, value)?;
                // Stored bytes are fetched by the caller, so they count as what they will cost.
                let cost = outcome.payload.body.len() + 16 + outcome.references.len() * 12;
                if cost > left && !found.is_empty() {
                    return Ok(found);
                }
                left = left.saturating_sub(cost);
                found.push((NodeIndex(key.minor as u32), outcome));
            }
        }
        Ok(found)
    }

    fn run(&self, run: RunSeq) -> Result<Option<RunRecord>, StorageError> {
        read_run(&*self.rows, run)
    }

    fn node(&self, node: NodeKey) -> Result<Option<NodeRecord>, StorageError> {
        let key = node_key(Table::Node, node);
        match self.rows.get(key)? {
            Some(value) => rows_in::node_row(key, &value)
                .map(|row| Some(row.record))
                .map_err(|e| corrupt(key, &e)),
            None => Ok(None),
        }
    }

    fn run_facts(&self, run: RunSeq, absorb: &mut dyn FnMut(Fact)) -> Result<bool, StorageError> {
        match read_run(&*self.rows, run)? {
            Some(record) => {
                super::loading::run_facts(&*self.rows, run, record, absorb).map(|_| true)
            }
            None => Ok(false),
        }
    }

    fn runs(
        &self,
        before: Option<RunSeq>,
        limit: usize,
    ) -> Result<Vec<(RunSeq, RunRecord)>, StorageError> {
        let before = (before.map_or(u64::MAX, |run| run.0), 0);
        // A run that ends between the two looks is in both lists, never in none.
        let mut numbers: Vec<u64> = Vec::new();
        for table in [Table::OpenRun, Table::EndedRun] {
            let rows = self.rows.scan_back(table, before, limit)?;
            numbers.extend(rows.iter().map(|(key, _)| key.major));
        }
        numbers.sort_unstable_by(|a, b| b.cmp(a));
        numbers.dedup();
        let mut runs = Vec::with_capacity(limit.min(numbers.len()));
        for run in numbers.into_iter().map(RunSeq) {
            if runs.len() == limit {
                break;
            }
            if let Some(record) = self.run(run)? {
                runs.push((run, record));
            }
        }
        Ok(runs)
    }

    fn ended_runs(
        &self,
        first: RunSeq,
        ended_before: Timestamp,
        limit: usize,
    ) -> Result<(Vec<RunSeq>, Option<RunSeq>), StorageError> {
        let mut rows = Vec::new();
        scan_some(
            &*self.rows,
            Table::EndedRun,
            (first.0, 0),
            (u64::MAX, u64::MAX),
            SCAN_ROWS,
            &mut rows,
        )?;
        let mut runs = Vec::new();
        let mut next = (rows.len() == SCAN_ROWS)
            .then(|| rows.last().map(|(key, _)| RunSeq(key.major + 1)))
            .flatten();
        for (key, value) in rows {
            if runs.len() == limit {
                next = Some(RunSeq(key.major));
                break;
            }
            let run = RunSeq(key.major);
            let Some(record) = whole_run(&*self.rows, key, &value)? else {
                continue;
            };
            if record.ended.is_some_and(|ended| ended < ended_before) {
                runs.push(run);
            }
        }
        Ok((runs, next))
    }

    fn events(
        &self,
        run: RunSeq,
        after: u64,
        limit: usize,
    ) -> Result<Vec<EventRecord>, StorageError> {
        let mut found = Vec::new();
        if limit == 0 {
            return Ok(found);
        }
        // A row holds neighbouring events and is named by the first: the one that holds `after` + 1 may begin before it.
        let wanted = after.saturating_add(1);
        let before = (run.0, wanted.saturating_add(1));
        let start = match self.rows.scan_back(Table::Event, before, 1)?.first() {
            Some((key, _)) if key.major == run.0 => key.minor,
            _ => wanted,
        };
        let mut from = start;
        while found.len() < limit {
            let mut rows = Vec::new();
            scan_some(
                &*self.rows,
                Table::Event,
                (run.0, from),
                (run.0, u64::MAX),
                (limit - found.len()).min(SCAN_ROWS),
                &mut rows,
            )?;
            let Some((last, _)) = rows.last() else {
                break;
            };
            from = last.minor + 1;
            for (key, value) in &rows {
                rows_in::event_row(*key, value, &mut |event| {
                    if event.seq > after {
                        found.push(event);
                    }
                    found.len() < limit
                })
                .map_err(|e| corrupt(*key, &e))?;
                if found.len() == limit {
                    break;
                }
            }
        }
        Ok(found)
    }

    fn outbox(
        &self,
        output: NameId,
        from: u64,
        limit: usize,
    ) -> Result<Vec<OutboxRecord>, StorageError> {
        let major = u64::from(output.0);
        let mut rows = Vec::new();
        scan_some(
            &*self.rows,
            Table::Outbox,
            (major, from),
            (major + 1, 0),
            limit,
            &mut rows,
        )?;
        rows.iter()
            .map(|(key, value)| rows_in::outbox_row(*key, value).map_err(|e| corrupt(*key, &e)))
            .collect()
    }

    fn dead_letters(
        &self,
        route: NameId,
        from: u64,
        limit: usize,
    ) -> Result<Vec<(u64, DeadLetterRecord)>, StorageError> {
        let mut letters = Vec::new();
        let major = u64::from(route.0);
        let from = (major, from.clamp(1, u64::MAX >> PART_BITS) << PART_BITS);
        each_parted(
            &*self.rows,
            Table::DeadLetter,
            from,
            (major + 1, 0),
            &mut |key, whole| {
                let letter = rows_in::letter_record(&whole).map_err(|e| corrupt(key, &e))?;
                if letters.len() < limit {
                    letters.push((key.minor >> PART_BITS, letter));
                }
                Ok(letters.len() < limit)
            },
        )?;
        Ok(letters)
    }

    fn payload(&self, at: PayloadRef) -> Result<Bytes, StorageError> {
        self.payloads.read(at)
    }
}

fn node_key(table: Table, node: NodeKey) -> RowKey {
    RowKey {
        table,
        major: node.run.0,
        minor: u64::from(node.node.0),
    }
}

fn inputs_key(node: NodeKey, part: u64) -> RowKey {
    RowKey {
        table: Table::Inputs,
        major: node.run.0,
        minor: u64::from(node.node.0) << 32 | part,
    }
}

/// Adds a part of a node's ranges.
pub(super) fn take_ranges(
    key: RowKey,
    value: &Bytes,
    expected: usize,
    all: &mut Vec<InputRange>,
) -> Result<(), StorageError> {
    let (said, ranges) = rows_in::ranges_row(value).map_err(|e| corrupt(key, &e))?;
    if said != expected || ranges.is_empty() || all.len() + ranges.len() > expected {
        return Err(corrupt_text(key, "not as many ranges as the node has"));
    }
    all.extend(ranges);
    Ok(())
}

/// A run's record, wherever it stands.
fn read_run(rows: &dyn Rows, run: RunSeq) -> Result<Option<RunRecord>, StorageError> {
    // A run can move from one table to the other between two looks: then the third look finds it.
    for table in [Table::OpenRun, Table::EndedRun, Table::OpenRun] {
        let key = RowKey {
            table,
            major: run.0,
            minor: 0,
        };
        if let Some(value) = rows.get(key)? {
            return whole_run(rows, key, &value);
        }
    }
    Ok(None)
}

/// Puts a run's header together from its parts.
pub(super) fn whole_run(
    rows: &dyn Rows,
    key: RowKey,
    value: &Bytes,
) -> Result<Option<RunRecord>, StorageError> {
    let mut parts = rows_in::Parts::first(value).map_err(|e| corrupt(key, &e))?;
    let mut part = 1;
    while parts.is_open() {
        let key = RowKey {
            table: Table::Inputs,
            major: key.major,
            minor: HEADER_TAIL | part,
        };
        let value = rows.get(key)?.ok_or_else(|| missing(key))?;
        parts = parts.next(&value).map_err(|e| corrupt(key, &e))?;
        part += 1;
    }
    let record = rows_in::run_record(&parts.finish()).map_err(|e| corrupt(key, &e))?;
    Ok(Some(record))
}

/// Collects at most `limit` rows.
pub(super) fn scan_some(
    rows: &dyn Rows,
    table: Table,
    from: (u64, u64),
    to: (u64, u64),
    limit: usize,
    found: &mut Vec<(RowKey, Bytes)>,
) -> Result<(), StorageError> {
    rows.scan(table, from, to, limit, &mut |key, value| {
        found.push((key, value));
        true
    })
}

/// Visits all rows of a part of a table, a few thousand at a time.
pub(super) fn each_row(
    rows: &dyn Rows,
    table: Table,
    from: (u64, u64),
    to: (u64, u64),
    visit: &mut dyn FnMut(RowKey, Bytes) -> Result<bool, StorageError>,
) -> Result<(), StorageError> {
    let mut from = from;
    let mut chunk = Vec::new();
    loop {
        chunk.clear();
        scan_some(rows, table, from, to, SCAN_ROWS, &mut chunk)?;
        let Some((last, _)) = chunk.last() else {
            return Ok(());
        };
        let full = chunk.len() == SCAN_ROWS;
        from = match last.minor.checked_add(1) {
            Some(minor) => (last.major, minor),
            None => (last.major.saturating_add(1), 0),
        };
        for (key, value) in chunk.drain(..) {
            if !visit(key, value)? {
                return Ok(());
            }
        }
        if !full {
            return Ok(());
        }
    }
}

/// Visits all records of a table whose records may have parts with ascending numbers.
pub(super) fn each_parted(
    rows: &dyn Rows,
    table: Table,
    from: (u64, u64),
    to: (u64, u64),
    visit: &mut dyn FnMut(RowKey, Bytes) -> Result<bool, StorageError>,
) -> Result<(), StorageError> {
    let mut open: Option<(RowKey, u64, rows_in::Parts)> = None;
    each_row(rows, table, from, to, &mut |key, value| {
        let (first, next, parts) = match open.take() {
            None => {
                // What is left of a longer record that was replaced has no first part before it.
                if key.minor & PART_MASK != 0 {
                    return Ok(true);
                }
                let parts = rows_in::Parts::first(&value).map_err(|e| corrupt(key, &e))?;
                (key, key.minor + 1, parts)
            }
            Some((first, next, parts)) => {
                if key.major != first.major || key.minor != next {
                    return Err(corrupt_text(first, "a part is missing"));
                }
                let parts = parts.next(&value).map_err(|e| corrupt(key, &e))?;
                (first, next + 1, parts)
            }
        };
        if parts.is_open() {
            open = Some((first, next, parts));
            return Ok(true);
        }
        visit(first, parts.finish())
    })?;
    match open {
        None => Ok(()),
        Some((first, ..)) => Err(corrupt_text(first, "a part is missing")),
    }
}

/// The error for a row that does not decode.
pub(super) fn corrupt(key: RowKey, error: &DecodeError) -> StorageError {
    corrupt_text(key, &error.to_string())
}

pub(super) fn corrupt_text(key: RowKey, detail: &str) -> StorageError {
    StorageError::Corrupt {
        record: format!("row {:?} {:x}/{:x}", key.table, key.major, key.minor),
        detail: detail.to_owned(),
    }
}

fn missing(key: RowKey) -> StorageError {
    corrupt_text(key, "it is missing")
}
