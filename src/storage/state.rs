//! The state: tables, digests and the meta record over one sled, used by one thread.
//!
//! Applies windows of the overlay in bounded slices, each one sled batch that carries pages, headers, sums and meta together;
//! and answers reads, each checked against the digest of whoever owns the page. Does not know threads or clocks.
//!
//! Invariants: after every batch all sums are exact (I17); the log position moves only with a window's last slice, because
//! facts are idempotent and an interrupted window is applied again from its beginning.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use bytes::Bytes;

use super::StorageError;
use super::digest::{
    CHUNKS, ENDED, GROUPS, HEADLESS, OPEN, PageSum, RunDigest, chunk_of, chunk_runs, run_table,
};
use super::meta::{META_KEY, Meta, StateMeta};
use super::overlay::Generation;
use super::paged_table::{Change, LAST, PagedTable, corrupt, parse};
use super::pages::{self, NONE, PageError, PageKey, Place, key_parts};
use super::row::Table;
use super::sled::{Sled, guarded, sync_created};
use super::window::Window;

/// A point read checks the digest of a run's table up to this many pages (64 MiB, some 100 ms); a larger one is checked by its
/// first scan, which reads all of it anyway. Until then its pages are believed by checksum and position.
const POINT_CHECK_PAGES: u64 = 16_384;
/// A sync follows each second slice, so that few of sled's buffers are on their way at once. sled writes them, and shortens its
/// file, by a pool of seven threads that never grows once they are busy. A writer that waits for the shortening holds the
/// lock that buffers need at their end: when seven of them wait for it, nothing ever moves again (seen with 512 KiB segments
/// and no flush). A slice ends in a buffer of its own and takes three when everything around it is cleaned as well.
const UNSYNCED_SLICES: u32 = 2;
/// So many (table, run) are remembered as checked; then all are forgotten and checked again when read.
const REMEMBERED: usize = 1 << 20;
/// Rows found by a scan, and where to go on (`None`: at the end).
#[derive(Debug, Default)]
pub(crate) struct Found {
    /// In order.
    pub(crate) rows: Vec<(Place, Bytes)>,
    /// The first place that was not looked at (ascending), or the last one that was (descending).
    pub(crate) next: Option<Place>,
}

/// sled with everything that gives its pages a meaning.
#[derive(Debug)]
pub(crate) struct State {
    sled: Sled,
    path: PathBuf,
    cache_bytes: u64,
    meta: Meta,
    checked: HashSet<(u8, u64)>,
    checked_chunks: HashSet<u64>,
    written: u64,
    unsynced: u32,
}

impl State {
    /// Makes a store: its meta record is on disk, really, when this returns.
    pub(crate) fn create(path: &Path, meta: &StateMeta) -> Result<(), StorageError> {
        let sled = Sled::open(path, super::sled::CACHE_BYTES)?;
        guarded("creating", || {
            if sled.tree.contains_key(META_KEY)? {
                return Err(StorageError::State {
                    what: "creating",
                    detail: format!("there is a store at {} already", path.display()),
                });
            }
            sled.tree.insert(META_KEY, Meta::new(*meta).encode())?;
            Ok(())
        })?;
        sled.sync()?;
        guarded("closing", || {
            drop(sled);
            Ok(())
        })?;
        sync_created(path)
    }

    /// Opens a store and checks what start relies on: the sums of all tables without runs, and the nodes of open runs.
    pub(crate) fn open(path: &Path, cache_bytes: u64) -> Result<Self, StorageError> {
        if !path.join("db").exists() {
            return Err(StorageError::Corrupt {
                record: path.display().to_string(),
                detail: "there is no state store here".into(),
            });
        }
        let mut state = Self::open_unchecked(path, cache_bytes)?;
        guarded("checking the state store", || {
            for table in GROUPS {
                let expected = state.meta.groups.get(&table).copied().unwrap_or_default();
                let found = state.sum(table, (0, 0), LAST)?;
                if found != expected {
                    return Err(stale(
                        &format!("table {}", char::from(table)),
                        found,
                        expected,
                    ));
                }
            }
            state.check_open_runs()
        })?;
        Ok(state)
    }

    /// Opens without checking any sum: for `verify`, which reports instead of refusing.
    pub(crate) fn open_unchecked(path: &Path, cache_bytes: u64) -> Result<Self, StorageError> {
        let sled = Sled::open(path, cache_bytes)?;
        let meta = guarded("reading the meta record", || {
            let bytes = sled
                .tree
                .get(META_KEY)?
                .ok_or_else(|| StorageError::Corrupt {
                    record: "the meta record".into(),
                    detail: "it is missing".into(),
                })?;
            Meta::decode(&bytes, &path.display().to_string())
        })?;
        Ok(Self {
            sled,
            path: path.to_owned(),
            cache_bytes,
            meta,
            checked: HashSet::new(),
            checked_chunks: HashSet::new(),
            written: 0,
            unsynced: 0,
        })
    }

    /// Closes and opens again: sled then begins a new snapshot, so that a later start replays less and damage is detected.
    /// On an error the state is unusable.
    pub(crate) fn reopen(self) -> Result<Self, StorageError> {
        let Self {
            sled,
            path,
            cache_bytes,
            meta,
            checked,
            checked_chunks,
            ..
        } = self;
        sled.sync()?;
        guarded("closing", || {
            drop(sled);
            Ok(())
        })?;
        let opened = Self::open_unchecked(&path, cache_bytes)?;
        if opened.meta != meta {
            return Err(StorageError::Corrupt {
                record: "the meta record".into(),
                detail: "it changed while the store was being reopened".into(),
            });
        }
        Ok(Self {
            checked,
            checked_chunks,
            ..opened
        })
    }

    /// What sled reaches.
    pub(crate) fn meta(&self) -> &Meta {
        &self.meta
    }

    /// The pages.
    pub(crate) fn pages(&self) -> PagedTable<'_> {
        PagedTable::new(&self.sled.tree)
    }

    /// The store itself, for `verify` and tests.
    pub(crate) fn sled(&self) -> &Sled {
        &self.sled
    }

    /// Bytes of pages written since the last open.
    pub(crate) fn written(&self) -> u64 {
        self.written
    }

    /// Makes everything applied survive a power cut.
    pub(crate) fn sync(&mut self) -> Result<(), StorageError> {
        self.unsynced = 0;
        self.sled.sync()
    }

    // ---- writing ----------------------------------------------------------------------------------------------------

    /// Applies the next slice of a window; `true`: it was the last one. After an error the state must not be used.
    pub(crate) fn apply_slice(
        &mut self,
        generation: &Generation,
        window: &mut Window,
        budget: usize,
    ) -> Result<bool, StorageError> {
        guarded("applying a window", || {
            self.apply_slice_inner(generation, window, budget)
        })
    }

    fn apply_slice_inner(
        &mut self,
        generation: &Generation,
        window: &mut Window,
        budget: usize,
    ) -> Result<bool, StorageError> {
        let reach = generation.reach();
        let mut meta = self.meta.clone();
        meta.high = meta.high.max(reach.position);
        let mut change = Change::new(&self.sled.tree, meta.high, &meta.firsts);
        let done = window.apply(generation, &mut change, budget)?;
        for (key, old, new) in change.differences() {
            if let Some(sum) = meta.groups.get_mut(&key[0]) {
                sum.replace(old, new);
            }
        }
        if done {
            meta.state = StateMeta {
                position: reach.position,
                sequence: reach.sequence,
                now: reach.now,
                wall: reach.wall,
                next_run: reach.next_run,
                ..meta.state
            };
        }
        self.written += change.bytes() as u64;
        self.unsynced += 1;
        let (mut batch, firsts) = change.into_batch();
        meta.firsts.extend(firsts);
        batch.insert(META_KEY, meta.encode());
        self.sled.tree.apply_batch(batch)?;
        self.meta = meta;
        if self.unsynced >= UNSYNCED_SLICES {
            self.sync()?;
        }
        Ok(done)
    }

    // ---- reading ----------------------------------------------------------------------------------------------------

    /// A row.
    pub(crate) fn get(
        &mut self,
        table: Table,
        place: Place,
    ) -> Result<Option<Bytes>, StorageError> {
        guarded("reading", || {
            let byte = table as u8;
            let page = self.pages().floor(byte, place)?;
            self.check_absent(byte, place.0, false)?;
            let Some((key, bytes)) = page else {
                self.check_before_first(byte, place)?;
                return Ok(None);
            };
            self.check_page(byte, key_parts(&key).1.0, false)?;
            let view = parse(&key, &bytes)?;
            self.check_position(&key, view.position())?;
            if view.next() <= place {
                return Err(missing(byte, view.next()));
            }
            match view.get(place) {
                None => Ok(None),
                Some(value) => Ok(Some(Bytes::copy_from_slice(own_value(byte, &key, value)?))),
            }
        })
    }

    /// Rows from `from` on and before `to`; stops behind the page in which `limit` is reached.
    pub(crate) fn scan(
        &mut self,
        table: Table,
        from: Place,
        to: Place,
        limit: usize,
    ) -> Result<Found, StorageError> {
        guarded("scanning", || {
            let byte = table as u8;
            let mut found = Found::default();
            if from >= to {
                return Ok(found);
            }
            let (first, last) = (from.0, to.0);
            if last - first <= 1 {
                self.check_absent(byte, first, true)?;
            }
            let (start, mut expected) = match self.pages().floor(byte, from)? {
                Some((key, _)) => (key_parts(&key).1, key_parts(&key).1),
                None => (from, self.meta.first(byte)),
            };
            let mut owner = None;
            let tree = self.sled.tree.clone();
            for page in PagedTable::new(&tree).pages(byte, start, to) {
                let (key, bytes) = page?;
                let place = key_parts(&key).1;
                if place != expected {
                    return Err(missing(byte, expected.min(place)));
                }
                if place >= to {
                    return Ok(found);
                }
                if found.rows.len() >= limit {
                    found.next = Some(place.max(from));
                    return Ok(found);
                }
                if owner != Some(place.0) {
                    self.check_page(byte, place.0, true)?;
                    owner = Some(place.0);
                }
                let view = parse(&key, &bytes)?;
                self.check_position(&key, view.position())?;
                expected = view.next();
                let shared = Bytes::copy_from_slice(&bytes);
                for at in view.lower_bound(from)..view.lower_bound(to) {
                    let range = view.value_range(at);
                    let place = view.entry(at).place;
                    let skipped = range.len() - own_value(byte, &key, view.entry(at).value)?.len();
                    found
                        .rows
                        .push((place, shared.slice(range.start + skipped..range.end)));
                }
            }
            // sled's range includes the page at `to`, so nothing up to there may be expected.
            if expected <= to && expected != NONE {
                return Err(missing(byte, expected));
            }
            Ok(found)
        })
    }

    /// Rows before `before`, descending; stops behind the page in which `limit` is reached.
    pub(crate) fn scan_back(
        &mut self,
        table: Table,
        before: Place,
        limit: usize,
    ) -> Result<Found, StorageError> {
        guarded("scanning", || {
            let byte = table as u8;
            let mut found = Found::default();
            let tree = self.sled.tree.clone();
            // Which page must follow: the one seen before, or (at first) any behind the end.
            let mut follows = None;
            for page in PagedTable::new(&tree).pages(byte, (0, 0), before).rev() {
                let (key, bytes) = page?;
                let place = key_parts(&key).1;
                if found.rows.len() >= limit {
                    found.next = found.rows.last().map(|(place, _)| *place);
                    break;
                }
                self.check_page(byte, place.0, false)?;
                let view = parse(&key, &bytes)?;
                self.check_position(&key, view.position())?;
                let next = view.next();
                if follows.map_or(next <= before && next != NONE, |place| next != place) {
                    return Err(missing(byte, next));
                }
                follows = Some(place);
                for at in (0..view.lower_bound(before)).rev() {
                    let entry = view.entry(at);
                    let value = own_value(byte, &key, entry.value)?;
                    found
                        .rows
                        .push((entry.place, Bytes::copy_from_slice(value)));
                }
            }
            if found.next.is_none() {
                match follows {
                    Some(first) if self.meta.first(byte) == first => {}
                    Some(_) => return Err(missing(byte, self.meta.first(byte))),
                    None => self.check_before_first(byte, before)?,
                }
            }
            Ok(found)
        })
    }

    // ---- checking ---------------------------------------------------------------------------------------------------

    /// Counts the pages of a stretch, checking each one's checksum and position.
    pub(crate) fn sum(
        &self,
        table: u8,
        first: Place,
        last: Place,
    ) -> Result<PageSum, StorageError> {
        let mut sum = PageSum::default();
        for page in self.pages().pages(table, first, last) {
            let (key, bytes) = page?;
            let checksum = pages::checked(&key, &bytes).map_err(|error| corrupt(&key, error))?;
            self.check_position(&key, pages::stated_position(&bytes))?;
            sum.add(checksum);
        }
        Ok(sum)
    }

    /// Before it is believed that no page begins at or before a place.
    fn check_before_first(&self, table: u8, place: Place) -> Result<(), StorageError> {
        match self.meta.first(table) {
            first if first <= place && first != NONE => Err(missing(table, first)),
            _ => Ok(()),
        }
    }

    fn check_position(&self, key: &PageKey, position: u64) -> Result<(), StorageError> {
        if position > self.meta.high {
            return Err(corrupt(
                key,
                PageError("it is newer than the state that holds it"),
            ));
        }
        Ok(())
    }

    /// The digest of a run, wherever its header is.
    pub(crate) fn digest_of(&mut self, run: u64) -> Result<RunDigest, StorageError> {
        for table in [OPEN, ENDED, HEADLESS] {
            if table == ENDED {
                self.check_chunk(chunk_of(run))?;
            }
            let (key, value) = self.pages().get(table, (run, 0))?;
            if let (Some(key), Some(value)) = (key, value) {
                let (digest, _) = RunDigest::read(&value).map_err(|error| corrupt(&key, error))?;
                return Ok(digest);
            }
        }
        Ok(RunDigest::default())
    }

    /// Before a page is believed: the sum of its owner.
    fn check_page(&mut self, table: u8, owner: u64, whole: bool) -> Result<(), StorageError> {
        if table == ENDED {
            self.check_chunk(chunk_of(owner))
        } else if let Some(number) = run_table(table) {
            self.check_run(table, number, owner, whole)
        } else {
            Ok(()) // checked when the store was opened
        }
    }

    /// Before it is believed that rows of a run are absent: the run's own pages are complete.
    fn check_absent(&mut self, table: u8, run: u64, whole: bool) -> Result<(), StorageError> {
        self.check_page(table, run, whole)
    }

    fn check_chunk(&mut self, chunk: u64) -> Result<(), StorageError> {
        if self.checked_chunks.contains(&chunk) {
            return Ok(());
        }
        let (_, stored) = self.pages().get(CHUNKS, (chunk, 0))?;
        let expected = match stored {
            None => PageSum::default(),
            Some(bytes) => PageSum::from_bytes(&bytes).map_err(|error| StorageError::Corrupt {
                record: format!("chunk {chunk:x} of ended runs"),
                detail: error.0.into(),
            })?,
        };
        let runs = chunk_runs(chunk);
        let found = self.sum(ENDED, (*runs.start(), 0), (*runs.end(), u64::MAX))?;
        if found != expected {
            return Err(stale(
                &format!(
                    "headers of ended runs {:x} to {:x}",
                    runs.start(),
                    runs.end()
                ),
                found,
                expected,
            ));
        }
        self.checked_chunks.insert(chunk);
        Ok(())
    }

    fn check_run(
        &mut self,
        table: u8,
        number: usize,
        run: u64,
        whole: bool,
    ) -> Result<(), StorageError> {
        if self.checked.contains(&(table, run)) {
            return Ok(());
        }
        let expected = self.digest_of(run)?.tables[number];
        if expected.pages > POINT_CHECK_PAGES && !whole {
            return Ok(());
        }
        self.check_sum(table, run, expected)
    }

    fn check_sum(&mut self, table: u8, run: u64, expected: PageSum) -> Result<(), StorageError> {
        let found = self.sum(table, (run, 0), (run, u64::MAX))?;
        if found != expected {
            return Err(stale(
                &format!("run {run:x}, table {}", char::from(table)),
                found,
                expected,
            ));
        }
        if self.checked.len() >= REMEMBERED {
            self.checked.clear();
        }
        self.checked.insert((table, run));
        Ok(())
    }

    /// What start reads of open runs, nodes and inputs, is checked now.
    fn check_open_runs(&mut self) -> Result<(), StorageError> {
        let tree = self.sled.tree.clone();
        for page in PagedTable::new(&tree).pages(OPEN, (0, 0), LAST) {
            let (key, bytes) = page?;
            for entry in parse(&key, &bytes)?.entries() {
                let (digest, _) =
                    RunDigest::read(entry.value).map_err(|error| corrupt(&key, error))?;
                for table in [b'n', b'i'] {
                    let number = run_table(table).unwrap_or_default();
                    let expected = digest.tables[number];
                    if !expected.is_zero() {
                        self.check_sum(table, entry.place.0, expected)?;
                    }
                }
            }
        }
        Ok(())
    }
}

/// The value without the digest that this module keeps in front of headers.
fn own_value<'v>(table: u8, key: &PageKey, value: &'v [u8]) -> Result<&'v [u8], StorageError> {
    if table == OPEN || table == ENDED {
        let (_, own) = RunDigest::read(value).map_err(|error| corrupt(key, error))?;
        Ok(own)
    } else {
        Ok(value)
    }
}

fn missing(table: u8, place: Place) -> StorageError {
    corrupt(
        &pages::page_key(table, place),
        PageError("it is missing, or another page claims that it is there"),
    )
}

fn stale(what: &str, found: PageSum, expected: PageSum) -> StorageError {
    StorageError::Corrupt {
        record: what.into(),
        detail: format!(
            "its pages are not the newest ones: {} pages with digest {:016x} instead of {} with {:016x}",
            found.pages, found.digest, expected.pages, expected.digest
        ),
    }
}
