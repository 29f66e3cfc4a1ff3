//! The overlay: what is committed and not yet in sled, in memory and visible at once.
//!
//! Two generations: one that is being filled by the engine thread, and one that the storage thread is bringing into sled. A
//! read asks the first, then the second, then sled. Rows of a generation are kept sorted, because the storage thread writes
//! them in order and readers walk neighbours (a join reads the outcomes of its inputs as a range).
//!
//! Knows no fact and no page. Invariants: within a generation later changes win, and a deletion removes what the generation
//! held before; so a row that is present is newer than the generation's deletions.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use bytes::Bytes;

use super::pages::Place;
use super::records::RowBatch;
use super::row::Table;
use crate::broker::types::{Timestamp, WallTime};

/// All paged tables, in the order of their bytes.
pub(crate) const TABLES: [Table; 16] = [
    Table::OutboxCursor,
    Table::Arguments,
    Table::Position,
    Table::DeadLetter,
    Table::Event,
    Table::Outbox,
    Table::Payload,
    Table::Inputs,
    Table::Key,
    Table::Node,
    Table::OpenRun,
    Table::EndedRun,
    Table::Spec,
    Table::Name,
    Table::Outcome,
    Table::Announced,
];

/// Tables whose rows die with their run.
pub(crate) const TABLES_OF_RUNS: [Table; 7] = [
    Table::OpenRun,
    Table::EndedRun,
    Table::Node,
    Table::Arguments,
    Table::Inputs,
    Table::Outcome,
    Table::Event,
];

/// What a row costs in memory beside its bytes: key, handle, its share of the tree.
const ROW_COST: usize = 96;

fn index(table: Table) -> usize {
    match table {
        Table::OutboxCursor => 0,
        Table::Arguments => 1,
        Table::Position => 2,
        Table::DeadLetter => 3,
        Table::Event => 4,
        Table::Outbox => 5,
        Table::Payload => 6,
        Table::Inputs => 7,
        Table::Key => 8,
        Table::Node => 9,
        Table::OpenRun => 10,
        Table::EndedRun => 11,
        Table::Spec => 12,
        Table::Name => 13,
        Table::Outcome => 14,
        Table::Announced => 15,
        Table::Meta => unreachable!("no row is in the meta table"),
    }
}

/// Whether rows of the table die with their run.
pub(crate) fn is_of_runs(table: Table) -> bool {
    TABLES_OF_RUNS.contains(&table)
}

/// One log entry, as the storage thread needs it.
#[derive(Debug, Clone)]
pub struct PushedEntry {
    /// Log position behind the entry.
    pub position_after: u64,
    /// Its sequence number.
    pub sequence: u64,
    /// Broker time of its turn.
    pub now: Timestamp,
    /// Calendar time.
    pub wall: WallTime,
    /// The first run number that was not given after it.
    pub next_run: u64,
    /// Its rows.
    pub batch: RowBatch,
    /// Its size in the log.
    pub bytes: usize,
}

/// How far a generation reaches: the newest entry in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Reach {
    /// Log position behind it.
    pub(crate) position: u64,
    /// Its sequence.
    pub(crate) sequence: u64,
    /// Its broker time.
    pub(crate) now: Timestamp,
    /// Its calendar time.
    pub(crate) wall: WallTime,
    /// First run number not given.
    pub(crate) next_run: u64,
}

type Rows = BTreeMap<Place, Option<Bytes>>;
type Ranges = BTreeMap<Place, Place>;

/// Some log entries' worth of rows.
#[derive(Debug, Default)]
pub(crate) struct Generation {
    tables: [Rows; TABLES.len()],
    deleted_runs: BTreeSet<u64>,
    /// From, and before; apart from each other.
    deleted_ranges: [Ranges; TABLES.len()],
    entries: u64,
    bytes: usize,
    reach: Reach,
}

impl Generation {
    /// Whether there is no entry.
    pub(crate) fn is_empty(&self) -> bool {
        self.entries == 0
    }

    /// Memory that it takes, about.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// The newest entry.
    pub(crate) fn reach(&self) -> Reach {
        self.reach
    }

    /// Rows of a table, sorted.
    pub(crate) fn rows(&self, table: Table) -> &Rows {
        &self.tables[index(table)]
    }

    /// Runs deleted.
    pub(crate) fn deleted_runs(&self) -> &BTreeSet<u64> {
        &self.deleted_runs
    }

    /// Ranges deleted from a table: from, and before.
    pub(crate) fn deleted_ranges(&self, table: Table) -> &Ranges {
        &self.deleted_ranges[index(table)]
    }

    fn push(&mut self, entry: PushedEntry) {
        self.entries += 1;
        self.reach = Reach {
            position: entry.position_after,
            sequence: entry.sequence,
            now: entry.now,
            wall: entry.wall,
            next_run: entry.next_run,
        };
        let mut bytes = 0;
        for row in entry.batch.rows {
            bytes += ROW_COST + row.value.as_ref().map_or(0, Bytes::len);
            self.tables[index(row.key.table)].insert((row.key.major, row.key.minor), row.value);
        }
        self.bytes += bytes;
        for (from, before) in entry.batch.deleted_ranges {
            debug_assert_eq!(from.table, before.table, "a range lies in one table");
            let (first, end) = ((from.major, from.minor), (before.major, before.minor));
            if first < end {
                cut_out(&mut self.tables[index(from.table)], first, end);
                unite(&mut self.deleted_ranges[index(from.table)], first, end);
                self.bytes += ROW_COST;
            }
        }
        for run in entry.batch.deleted_runs {
            for table in TABLES_OF_RUNS {
                let rows = &mut self.tables[index(table)];
                let doomed: Vec<Place> = rows
                    .range((run, 0)..=(run, u64::MAX))
                    .map(|(&place, _)| place)
                    .collect();
                for place in doomed {
                    rows.remove(&place);
                }
            }
            self.deleted_runs.insert(run);
            self.bytes += ROW_COST;
        }
    }

    fn hides(&self, table: Table, place: Place) -> bool {
        (!self.deleted_runs.is_empty() && is_of_runs(table) && self.deleted_runs.contains(&place.0))
            || self
                .deleted_ranges(table)
                .range(..=place)
                .next_back()
                .is_some_and(|(_, &before)| place < before)
    }

    #[expect(
        clippy::option_option,
        reason = "unknown, known to be absent and present are three answers"
    )]
    fn get(&self, table: Table, place: Place) -> Option<Option<Bytes>> {
        if self.entries == 0 {
            return None;
        }
        match self.rows(table).get(&place) {
            Some(value) => Some(value.clone()),
            None => self.hides(table, place).then_some(None),
        }
    }
}

/// Adds a range, joined with those that it overlaps or touches.
fn unite(ranges: &mut Ranges, mut first: Place, mut end: Place) {
    while let Some((&from, &before)) = ranges
        .range(..=end)
        .next_back()
        .filter(|&(_, &before)| before >= first)
    {
        ranges.remove(&from);
        first = first.min(from);
        end = end.max(before);
    }
    ranges.insert(first, end);
}

fn cut_out(rows: &mut Rows, first: Place, end: Place) {
    if rows.range(first..end).next().is_some() {
        let mut tail = rows.split_off(&first);
        let mut behind = tail.split_off(&end);
        rows.append(&mut behind);
    }
}

/// Both generations.
#[derive(Debug, Default)]
pub(crate) struct Overlay {
    filling: Generation,
    applying: Option<Arc<Generation>>,
}

/// What the overlay knows of a stretch of a table: rows (or their deletion) and what hides older rows.
#[derive(Debug, Default)]
pub(crate) struct Patch {
    /// In the order asked for.
    pub(crate) rows: Vec<(Place, Option<Bytes>)>,
    /// The stretch is known only up to the last row: there may be more behind it.
    pub(crate) truncated: bool,
    hidden_runs: Vec<u64>,
    hidden_ranges: Ranges,
}

impl Patch {
    /// Whether a row of sled at this place was deleted.
    pub(crate) fn hides(&self, place: Place) -> bool {
        self.hidden_runs.binary_search(&place.0).is_ok()
            || self
                .hidden_ranges
                .range(..=place)
                .next_back()
                .is_some_and(|(_, &before)| place < before)
    }
}

impl Overlay {
    /// Adds an entry; returns whether the window was empty before.
    pub(crate) fn push(&mut self, entry: PushedEntry) -> bool {
        let first = self.filling.is_empty();
        self.filling.push(entry);
        first
    }

    /// Memory that the window being filled takes.
    pub(crate) fn filling_bytes(&self) -> usize {
        self.filling.bytes()
    }

    /// Whether the window being filled has an entry.
    pub(crate) fn is_pending(&self) -> bool {
        !self.filling.is_empty()
    }

    /// Closes the window being filled and makes it the one being applied; there must be none. `None`: nothing to do.
    pub(crate) fn rotate(&mut self) -> Option<Arc<Generation>> {
        debug_assert!(self.applying.is_none(), "one window is applied at a time");
        if self.filling.is_empty() {
            return None;
        }
        let window = Arc::new(std::mem::take(&mut self.filling));
        self.applying = Some(Arc::clone(&window));
        Some(window)
    }

    /// Forgets the window that is now in sled; the caller drops it outside of the lock.
    pub(crate) fn applied(&mut self) -> Option<Arc<Generation>> {
        self.applying.take()
    }

    /// `None`: not here, ask sled. `Some(None)`: deleted.
    #[expect(
        clippy::option_option,
        reason = "unknown, known to be absent and present are three answers"
    )]
    pub(crate) fn get(&self, table: Table, place: Place) -> Option<Option<Bytes>> {
        self.filling
            .get(table, place)
            .or_else(|| self.applying.as_ref()?.get(table, place))
    }

    /// At most `limit` rows from `from` on and before `to`, ascending, or descending from the end.
    pub(crate) fn patch(
        &self,
        table: Table,
        from: Place,
        to: Place,
        limit: usize,
        descending: bool,
    ) -> Patch {
        let mut patch = Patch::default();
        if from >= to {
            return patch;
        }
        let older = self.applying.as_deref();
        for generation in std::iter::once(&self.filling).chain(older) {
            if is_of_runs(table) {
                patch
                    .hidden_runs
                    .extend(generation.deleted_runs.range(from.0..=to.0));
            }
            let ranges = generation.deleted_ranges(table).range(..to).rev();
            for (&first, &before) in ranges.take_while(|&(_, &before)| from < before) {
                unite(&mut patch.hidden_ranges, first, before);
            }
        }
        patch.hidden_runs.sort_unstable();
        let newer = self.filling.rows(table).range(from..to);
        let older = older.map(|g| g.rows(table).range(from..to));
        let visible = |place: &Place| !self.filling.hides(table, *place);
        let mut take = |rows: &mut dyn Iterator<Item = (Place, Option<Bytes>)>| {
            for row in rows {
                if patch.rows.len() == limit {
                    patch.truncated = true;
                    break;
                }
                patch.rows.push(row);
            }
        };
        let copy = |(place, value): (&Place, &Option<Bytes>)| (*place, value.clone());
        match (older, descending) {
            (None, false) => take(&mut newer.map(copy)),
            (None, true) => take(&mut newer.rev().map(copy)),
            (Some(older), false) => {
                let older = older.filter(|(place, _)| visible(place));
                take(&mut merged(newer.map(copy), older.map(copy), |a, b| a < b));
            }
            (Some(older), true) => {
                let older = older.rev().filter(|(place, _)| visible(place));
                take(&mut merged(
                    newer.rev().map(copy),
                    older.map(copy),
                    |a, b| a > b,
                ));
            }
        }
        patch
    }
}

/// Two sorted streams as one; the first wins where both have a row.
pub(crate) fn merged<V>(
    newer: impl Iterator<Item = (Place, V)>,
    older: impl Iterator<Item = (Place, V)>,
    comes_first: impl Fn(Place, Place) -> bool,
) -> impl Iterator<Item = (Place, V)> {
    let mut newer = newer.peekable();
    let mut older = older.peekable();
    std::iter::from_fn(move || match (newer.peek(), older.peek()) {
        (Some((a, _)), Some((b, _))) => {
            if a == b {
                older.next();
                newer.next()
            } else if comes_first(*a, *b) {
                newer.next()
            } else {
                older.next()
            }
        }
        (Some(_), None) => newer.next(),
        (None, _) => older.next(),
    })
}
