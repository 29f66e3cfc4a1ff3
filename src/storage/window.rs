//! How a window of the overlay becomes batches of sled: in slices of a bounded number of pages.
//!
//! Deleted ranges first, then deleted runs, then rows: a row that a generation holds is newer than its deletions. Whatever
//! a slice does to pages of runs, it does to the headers and sums that account for them in the same batch. Does not know
//! log positions or the meta record.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound;

use bytes::Bytes;

use super::StorageError;
use super::digest::{
    CHUNKS, ENDED, HEADLESS, OPEN, PageSum, RUN_TABLES, RunDigest, chunk_of, run_table,
};
use super::overlay::{Generation, TABLES, is_of_runs};
use super::paged_table::{Change, Op, Progress, corrupt, next_place, place_before};
use super::pages::{self, FILL_BYTES, Place, key_parts};

/// Rows of each table that a slice looks at: ten pages of ordinary rows.
const SLICE_BYTES: usize = 10 * FILL_BYTES;
/// And at most so many rows.
const SLICE_ROWS: usize = 1_024;

/// How far a window has been applied.
#[derive(Debug)]
pub(crate) struct Window {
    /// Of which table ranges are being deleted, and from where on.
    ranges: usize,
    range_from: Place,
    runs: Vec<u64>,
    run_at: Option<(usize, Place)>,
    cursors: [Option<Place>; TABLES.len()],
}

impl Window {
    /// At the beginning.
    pub(crate) fn new(generation: &Generation) -> Self {
        Self {
            ranges: 0,
            range_from: (0, 0),
            runs: generation.deleted_runs().iter().rev().copied().collect(),
            run_at: None,
            cursors: [Some((0, 0)); TABLES.len()],
        }
    }

    /// Collects the next slice; `true`: it is the last one.
    pub(crate) fn apply(
        &mut self,
        generation: &Generation,
        change: &mut Change<'_>,
        budget: usize,
    ) -> Result<bool, StorageError> {
        let mut headers = Headers::new();
        let mut done = apply_ranges(generation, self, change, budget)?;
        done = done && apply_runs(self, change, &mut headers, budget)?;
        done = done && apply_rows(generation, self, change, &mut headers, budget)?;

        let differences = differences_of_runs(change);
        apply_headers(change, &headers, &differences)?;
        apply_chunks(change)?;
        Ok(done)
    }
}

/// Headers of runs to be written or deleted, by table.
type Headers<'g> = BTreeMap<u8, Vec<(u64, Option<&'g [u8]>)>>;

/// Differences of digests that a slice has made.
#[derive(Debug, Default)]
struct Differences {
    runs: BTreeMap<u64, RunDigest>,
}

/// Deletes ranges; `true`: all of them are gone.
fn apply_ranges(
    generation: &Generation,
    window: &mut Window,
    change: &mut Change<'_>,
    budget: usize,
) -> Result<bool, StorageError> {
    while let Some(&table) = TABLES.get(window.ranges) {
        // Ranges do not touch each other, so at most one begins before the place reached and ends behind it.
        let ranges = generation.deleted_ranges(table);
        for (&first, &before) in ranges
            .iter()
            .filter(|&(_, &before)| before > window.range_from)
        {
            // A range is not empty, so there is a place before its end.
            let last = place_before(before).unwrap_or_default();
            let first = first.max(window.range_from);
            if let Progress::At(place) = change.delete(table as u8, first, last, budget)? {
                window.range_from = place;
                return Ok(false);
            }
        }
        window.ranges += 1;
        window.range_from = (0, 0);
    }
    Ok(true)
}

/// Deletes runs; `true`: all of them are gone.
fn apply_runs(
    window: &mut Window,
    change: &mut Change<'_>,
    headers: &mut Headers<'_>,
    budget: usize,
) -> Result<bool, StorageError> {
    while let Some(&run) = window.runs.last() {
        let (mut number, mut from) = window.run_at.take().unwrap_or_else(|| {
            // Its headers go first: what is left of its digest moves to the table of headless runs.
            for table in [OPEN, ENDED] {
                headers.entry(table).or_default().push((run, None));
            }
            (0, (run, 0))
        });
        while number < RUN_TABLES.len() {
            match change.delete(RUN_TABLES[number], from, (run, u64::MAX), budget)? {
                Progress::At(place) => {
                    window.run_at = Some((number, place));
                    return Ok(false);
                }
                Progress::Done => {
                    number += 1;
                    from = (run, 0);
                }
            }
        }
        window.runs.pop();
        let headers_touched = headers.get(&OPEN).map_or(0, Vec::len);
        if change.touched() >= budget || headers_touched >= SLICE_ROWS {
            return Ok(window.runs.is_empty());
        }
    }
    Ok(true)
}

/// Writes rows; `true`: all of them are written. Tables of runs advance together, run by run, so that the header of a small
/// run is written once; then the others.
fn apply_rows<'g>(
    generation: &'g Generation,
    window: &mut Window,
    change: &mut Change<'_>,
    headers: &mut Headers<'g>,
    budget: usize,
) -> Result<bool, StorageError> {
    let mut taken: Vec<(usize, Vec<Op<'g>>)> = Vec::new();
    let mut bound = u64::MAX;
    for (at, &table) in TABLES.iter().enumerate() {
        let Some(from) = window.cursors[at] else {
            continue;
        };
        let mut ops = Vec::new();
        let mut bytes = 0;
        for (&place, value) in generation.rows(table).range(from..) {
            if bytes >= SLICE_BYTES || ops.len() == SLICE_ROWS {
                if is_of_runs(table) {
                    bound = bound.min(ops.last().map_or(place.0, |op: &Op<'_>| op.place.0));
                }
                break;
            }
            bytes += 16 + value.as_ref().map_or(0, Bytes::len);
            ops.push(Op {
                place,
                value: value.as_deref(),
            });
        }
        if ops.is_empty() {
            window.cursors[at] = None;
        } else {
            taken.push((at, ops));
        }
    }
    for (at, mut ops) in taken {
        let table = TABLES[at];
        let of_runs = is_of_runs(table);
        if of_runs {
            ops.truncate(ops.partition_point(|op| op.place.0 <= bound));
        }
        if ops.is_empty() {
            continue;
        }
        let n = if run_table(table as u8).is_none() && of_runs {
            let into = headers.entry(table as u8).or_default();
            into.extend(ops.iter().map(|op| (op.place.0, op.value)));
            into.sort_by_key(|(run, _)| *run); // stable: a row comes after the deletion of an older one
            ops.len()
        } else if change.touched() >= budget {
            0
        } else {
            change.apply(table as u8, &ops, budget)?
        };
        if n > 0 {
            let last = ops[n - 1].place;
            window.cursors[at] = next_place(last).filter(|&place| {
                generation
                    .rows(table)
                    .range((Bound::Included(place), Bound::Unbounded))
                    .next()
                    .is_some()
            });
        }
    }
    Ok(window.cursors.iter().all(Option::is_none))
}

fn differences_of_runs(change: &Change<'_>) -> Differences {
    let mut differences = Differences::default();
    for (number, &table) in RUN_TABLES.iter().enumerate() {
        for (key, old, new) in change.differences_in(table) {
            let run = key_parts(key).1.0;
            let digest = differences.runs.entry(run).or_default();
            digest.tables[number].replace(old, new);
        }
    }
    differences
}

/// Writes the headers of runs with their digests: where a header is, there the digest is; `o` before `r`, and `q` for none.
fn apply_headers(
    change: &mut Change<'_>,
    headers: &Headers<'_>,
    differences: &Differences,
) -> Result<(), StorageError> {
    let mut runs: BTreeSet<u64> = differences.runs.keys().copied().collect();
    let mut wanted: [BTreeMap<u64, Option<&[u8]>>; 2] = [BTreeMap::new(), BTreeMap::new()];
    for (side, table) in [OPEN, ENDED].into_iter().enumerate() {
        for &(run, value) in headers.get(&table).into_iter().flatten() {
            runs.insert(run);
            wanted[side].insert(run, value);
        }
    }
    if runs.is_empty() {
        return Ok(());
    }
    let places: Vec<Place> = runs.iter().map(|&run| (run, 0)).collect();
    let tables = [OPEN, ENDED, HEADLESS];
    let mut stored = Vec::with_capacity(3);
    for table in tables {
        stored.push(change.get_many(table, &places)?);
    }
    let mut written: [Vec<(Place, Option<Vec<u8>>)>; 3] = Default::default();
    for (at, &run) in runs.iter().enumerate() {
        let mut digest = RunDigest::default();
        let mut own: [Option<&[u8]>; 2] = [None, None];
        for (side, table) in tables.into_iter().enumerate() {
            if let Some(bytes) = &stored[side][at] {
                let key = pages::page_key(table, (run, 0));
                let (found, value) =
                    RunDigest::read(bytes).map_err(|error| corrupt(&key, error))?;
                digest.merge(&found); // at most one of them is not zero
                if side < 2 {
                    own[side] = Some(value);
                }
            }
        }
        for side in 0..2 {
            if let Some(value) = wanted[side].get(&run) {
                own[side] = *value;
            }
        }
        if let Some(difference) = differences.runs.get(&run) {
            digest.merge(difference);
        }
        let mut left = Some(digest);
        for side in 0..3 {
            let value = if side < 2 {
                own[side].map(|value| {
                    let mut bytes = Vec::with_capacity(value.len() + RunDigest::MAX_BYTES);
                    left.take().unwrap_or_default().write(&mut bytes);
                    bytes.extend_from_slice(value);
                    bytes
                })
            } else {
                left.filter(|digest| !digest.is_zero()).map(|digest| {
                    let mut bytes = Vec::new();
                    digest.write(&mut bytes);
                    bytes
                })
            };
            if value != stored[side][at] {
                written[side].push(((run, 0), value));
            }
        }
    }
    for (side, table) in tables.into_iter().enumerate() {
        apply_all(change, table, &written[side])?;
    }
    Ok(())
}

/// Brings the sums over chunks of ended runs up to the pages changed.
fn apply_chunks(change: &mut Change<'_>) -> Result<(), StorageError> {
    let mut chunks: BTreeMap<u64, PageSum> = BTreeMap::new();
    for (key, old, new) in change.differences_in(ENDED) {
        let chunk = chunk_of(key_parts(key).1.0);
        chunks.entry(chunk).or_default().replace(old, new);
    }
    let places: Vec<Place> = chunks.keys().map(|&chunk| (chunk, 0)).collect();
    let stored = change.get_many(CHUNKS, &places)?;
    let mut written = Vec::with_capacity(places.len());
    for ((place, stored), difference) in places.into_iter().zip(stored).zip(chunks.values()) {
        let mut sum = match stored {
            None => PageSum::default(),
            Some(bytes) => PageSum::from_bytes(&bytes)
                .map_err(|error| corrupt(&pages::page_key(CHUNKS, place), error))?,
        };
        sum.merge(*difference);
        let value = (!sum.is_zero()).then(|| sum.to_bytes().to_vec());
        written.push((place, value));
    }
    apply_all(change, CHUNKS, &written)
}

fn apply_all(
    change: &mut Change<'_>,
    table: u8,
    rows: &[(Place, Option<Vec<u8>>)],
) -> Result<(), StorageError> {
    let ops: Vec<Op<'_>> = rows
        .iter()
        .map(|(place, value)| Op {
            place: *place,
            value: value.as_deref(),
        })
        .collect();
    let mut at = 0;
    while at < ops.len() {
        at += change.apply(table, &ops[at..], usize::MAX)?;
    }
    Ok(())
}
