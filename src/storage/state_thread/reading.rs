//! Reads of rows: the overlay first, then the storage thread; and reading ahead for who goes from run to run.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;

use super::{Request, Shared, ask};
use crate::storage::StorageError;
use crate::storage::overlay::{Patch, merged};
use crate::storage::paged_table::next_place;
use crate::storage::pages::Place;
use crate::storage::row::{RowKey, Table};
use crate::storage::rows::Rows;

/// After so many scans that each begin a little behind the one before, more than asked for is read.
const SEQUENCE: u32 = 3;
/// "A little": so many runs, some of which are not of interest.
const NEXT_MAJORS: u64 = 4_096;
/// Rows that one request to the storage thread brings back, about.
const CHUNK_ROWS: usize = 2_048;

pub(super) struct Reader {
    pub(super) shared: Arc<Shared>,
    pub(super) requests: Sender<Request>,
    pub(super) ahead: Mutex<BTreeMap<Table, Ahead>>,
}

/// What a reader that goes from run to run will want next: a start asks for millions of small stretches, one after another.
#[derive(Debug, Default)]
pub(super) struct Ahead {
    /// Where the last scan began, and how many in a row began a little behind the one before.
    last: u64,
    streak: u32,
    /// The state that the rows are of: it is the present one as long as nothing was applied since.
    version: u64,
    from: Place,
    end: Place,
    rows: Vec<(Place, Bytes)>,
}

impl Ahead {
    /// Notes a scan; whether scans come in sequence.
    fn is_sequence(&mut self, major: u64) -> bool {
        let is_next = major > self.last && major - self.last <= NEXT_MAJORS;
        self.streak = if is_next { self.streak + 1 } else { 0 };
        self.last = major;
        self.streak >= SEQUENCE
    }

    fn rows(&self, from: Place, to: Place) -> Vec<(Place, Bytes)> {
        let first = self.rows.partition_point(|(place, _)| *place < from);
        let end = self.rows.partition_point(|(place, _)| *place < to);
        self.rows[first..end.max(first)].to_vec()
    }
}

impl Reader {
    /// Rows of sled from `from` on and before `to`, and how far they are known. Call after the overlay was asked.
    fn ask_state(
        &self,
        table: Table,
        from: Place,
        to: Place,
        limit: usize,
    ) -> Result<(Vec<(Place, Bytes)>, Place), StorageError> {
        let lock = || self.ahead.lock().unwrap_or_else(PoisonError::into_inner);
        let scan = |to, limit| {
            ask(&self.shared, &self.requests, |answer| Request::Scan {
                table,
                from,
                to,
                limit,
                answer,
            })
        };
        let mut all = lock();
        let ahead = all.entry(table).or_default();
        let is_present = ahead.version == self.shared.version.load(Ordering::SeqCst);
        if is_present && ahead.from <= from && from < ahead.end {
            ahead.last = from.0;
            let end = to.min(ahead.end);
            return Ok((ahead.rows(from, end), end));
        }
        let is_sequence = ahead.is_sequence(from.0);
        drop(all);
        if is_sequence {
            let beyond = to.max((u64::MAX, 0));
            // Damage behind the stretch is for whoever asks for it.
            if let Ok((found, version)) = scan(beyond, CHUNK_ROWS) {
                let mut all = lock();
                let ahead = all.entry(table).or_default();
                ahead.version = version;
                ahead.from = from;
                ahead.end = found.next.unwrap_or(beyond);
                ahead.rows = found.rows;
                let end = to.min(ahead.end);
                return Ok((ahead.rows(from, end), end));
            }
        }
        let (found, _) = scan(to, limit)?;
        Ok((found.rows, found.next.unwrap_or(to)))
    }
}

impl Rows for Reader {
    fn get(&self, key: RowKey) -> Result<Option<Bytes>, StorageError> {
        if let Some(value) = self.recent(key) {
            return Ok(value);
        }
        let place = (key.major, key.minor);
        ask(&self.shared, &self.requests, |answer| {
            Request::Get(key.table, place, answer)
        })
    }

    fn recent(&self, key: RowKey) -> Option<Option<Bytes>> {
        self.shared.read().get(key.table, (key.major, key.minor))
    }

    /// Each chunk looks into the overlay before sled: a row on its way from one to the other is in one of them.
    fn scan(
        &self,
        table: Table,
        from: (u64, u64),
        to: (u64, u64),
        limit: usize,
        visit: &mut dyn FnMut(RowKey, Bytes) -> bool,
    ) -> Result<(), StorageError> {
        let mut at = Some(from);
        let mut left = limit;
        while let Some(from) = at.filter(|&from| from < to && left > 0) {
            let chunk = left.min(CHUNK_ROWS);
            let patch = self.shared.read().patch(table, from, to, chunk, false);
            // Rows of sled behind the last row that the patch knows would be judged without it.
            let known_to = match patch.rows.last() {
                Some((last, _)) if patch.truncated => next_place(*last).unwrap_or(to),
                _ => to,
            };
            let (found, end) = self.ask_state(table, from, known_to, chunk)?;
            for (place, value) in overlaid(patch, found, |place| place < end, |a, b| a < b) {
                if left == 0 {
                    return Ok(());
                }
                left -= 1;
                if !visit(row_key(table, place), value) {
                    return Ok(());
                }
            }
            at = Some(end);
        }
        Ok(())
    }

    fn scan_back(
        &self,
        table: Table,
        before: (u64, u64),
        limit: usize,
    ) -> Result<Vec<(RowKey, Bytes)>, StorageError> {
        let mut rows = Vec::new();
        let mut end = before;
        while rows.len() < limit && end > (0, 0) {
            let chunk = (limit - rows.len()).min(CHUNK_ROWS);
            let patch = self.shared.read().patch(table, (0, 0), end, chunk, true);
            let found = ask(&self.shared, &self.requests, |answer| Request::ScanBack {
                table,
                before: end,
                limit: chunk,
                answer,
            })?;
            // Down to here both are known.
            let patch_to = match patch.rows.last() {
                Some((last, _)) if patch.truncated => *last,
                _ => (0, 0),
            };
            let down_to = patch_to.max(found.next.unwrap_or((0, 0)));
            for (place, value) in
                overlaid(patch, found.rows, |place| place >= down_to, |a, b| a > b)
            {
                if rows.len() == limit {
                    return Ok(rows);
                }
                rows.push((row_key(table, place), value));
            }
            end = down_to;
        }
        Ok(rows)
    }
}

pub(super) fn row_key(table: Table, (major, minor): Place) -> RowKey {
    RowKey {
        table,
        major,
        minor,
    }
}

/// Rows of sled under those of the overlay, as far as both are known.
fn overlaid(
    mut patch: Patch,
    found: Vec<(Place, Bytes)>,
    known: impl Fn(Place) -> bool + Copy,
    comes_first: impl Fn(Place, Place) -> bool,
) -> impl Iterator<Item = (Place, Bytes)> {
    let newer = std::mem::take(&mut patch.rows);
    let older = found
        .into_iter()
        .filter(move |(place, _)| !patch.hides(*place))
        .map(|(place, value)| (place, Some(value)));
    merged(newer.into_iter(), older, comes_first)
        .filter(move |(place, _)| known(*place))
        .filter_map(|(place, value)| Some((place, value?)))
}
