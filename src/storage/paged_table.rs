//! `PagedTable`: sorted rows over sled's pages (STATE §8).
//!
//! A row lies in the page with the greatest key at or before it. [`PagedTable`] reads; [`Change`] collects what one sled batch
//! will change (read, modify, write of the pages touched) and reads its own changes. It does not know what tables mean, who
//! owns a page, or when to stop: callers count [`Change::touched`].

use std::collections::BTreeMap;
use std::ops::Bound;

use ::sled::{IVec, Tree};

use super::StorageError;
use super::pages::{
    self, EncodedPage, Entry, FILL_BYTES, NONE, PAGE_BYTES, PageError, PageKey, PageView, Place,
    key_parts, page_key,
};

/// The largest place.
pub(crate) const LAST: Place = (u64::MAX, u64::MAX);

/// Reads the tables of a tree.
#[derive(Debug, Clone, Copy)]
pub(crate) struct PagedTable<'a> {
    tree: &'a Tree,
}

/// A page that is damaged, by its key.
pub(crate) fn corrupt(key: &[u8], error: PageError) -> StorageError {
    let record = match <&PageKey>::try_from(key) {
        Ok(key) => {
            let (table, (major, minor)) = key_parts(key);
            format!("page {}/{major:x}/{minor:x}", char::from(table))
        }
        Err(_) => format!("page {key:?}"),
    };
    StorageError::Corrupt {
        record,
        detail: error.0.into(),
    }
}

/// The key as an array.
pub(crate) fn exact_key(key: &[u8]) -> Result<PageKey, StorageError> {
    key.try_into()
        .map_err(|_| corrupt(key, PageError("the key has a wrong length")))
}

/// Parses, naming the page when it is damaged.
pub(crate) fn parse<'p>(key: &[u8], bytes: &'p [u8]) -> Result<PageView<'p>, StorageError> {
    PageView::parse(key, bytes).map_err(|error| corrupt(key, error))
}

impl<'a> PagedTable<'a> {
    /// The tables of this tree.
    pub(crate) fn new(tree: &'a Tree) -> Self {
        Self { tree }
    }

    /// The page that holds a place if any does: the last one at or before it.
    pub(crate) fn floor(
        self,
        table: u8,
        place: Place,
    ) -> Result<Option<(PageKey, IVec)>, StorageError> {
        let range = page_key(table, (0, 0))..=page_key(table, place);
        found(self.tree.range(range).next_back())
    }

    /// The first page after a place.
    pub(crate) fn after(
        self,
        table: u8,
        place: Place,
    ) -> Result<Option<(PageKey, IVec)>, StorageError> {
        let range = (
            Bound::Excluded(page_key(table, place)),
            Bound::Included(page_key(table, LAST)),
        );
        found(self.tree.range(range).next())
    }

    /// Pages with keys in a range, ascending.
    pub(crate) fn pages(
        self,
        table: u8,
        first: Place,
        last: Place,
    ) -> impl DoubleEndedIterator<Item = Result<(PageKey, IVec), StorageError>> {
        self.tree
            .range(page_key(table, first)..=page_key(table, last))
            .map(|item| {
                let (key, bytes) = item?;
                Ok((exact_key(&key)?, bytes))
            })
    }

    /// A row, and the key of the page where it must be.
    pub(crate) fn get(
        self,
        table: u8,
        place: Place,
    ) -> Result<(Option<PageKey>, Option<Vec<u8>>), StorageError> {
        let Some((key, bytes)) = self.floor(table, place)? else {
            return Ok((None, None));
        };
        let view = parse(&key, &bytes)?;
        Ok((Some(key), view.get(place).map(<[u8]>::to_vec)))
    }

    /// The rows at ascending places, page by page.
    pub(crate) fn get_many(
        self,
        table: u8,
        places: &[Place],
    ) -> Result<Vec<Option<Vec<u8>>>, StorageError> {
        let mut values = Vec::with_capacity(places.len());
        while values.len() < places.len() {
            let rest = &places[values.len()..];
            let page = self.floor(table, rest[0])?;
            let next = match &page {
                Some((key, _)) => self.after(table, key_parts(key).1)?,
                None => self.after(table, rest[0])?,
            };
            let here = match next {
                Some((key, _)) => rest.partition_point(|&p| p < key_parts(&key).1),
                None => rest.len(),
            };
            match page {
                Some((key, bytes)) => {
                    let view = parse(&key, &bytes)?;
                    values.extend(
                        rest[..here]
                            .iter()
                            .map(|&place| view.get(place).map(<[u8]>::to_vec)),
                    );
                }
                None => values.extend(rest[..here].iter().map(|_| None)),
            }
        }
        Ok(values)
    }
}

fn found(
    item: Option<::sled::Result<(IVec, IVec)>>,
) -> Result<Option<(PageKey, IVec)>, StorageError> {
    match item {
        None => Ok(None),
        Some(item) => {
            let (key, bytes) = item?;
            Ok(Some((exact_key(&key)?, bytes)))
        }
    }
}

/// A row to write, or to delete.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Op<'a> {
    /// Where.
    pub(crate) place: Place,
    /// The value; `None` deletes.
    pub(crate) value: Option<&'a [u8]>,
}

/// A page that a change writes or removes.
#[derive(Debug)]
struct Staged {
    /// Checksum of what sled holds under the key.
    old: Option<u64>,
    /// What it shall hold.
    new: Option<(IVec, u64)>,
}

/// What one sled batch will change.
#[derive(Debug)]
pub(crate) struct Change<'a> {
    table: PagedTable<'a>,
    staged: BTreeMap<PageKey, Staged>,
    position: u64,
    bytes: usize,
    firsts: &'a BTreeMap<u8, Place>,
    new_firsts: BTreeMap<u8, Place>,
}

/// How far a bounded change came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Progress {
    /// Everything.
    Done,
    /// The rest begins here.
    At(Place),
}

impl<'a> Change<'a> {
    /// Begins; the pages written will carry this log position. `firsts`: where the first page of each table is.
    pub(crate) fn new(tree: &'a Tree, position: u64, firsts: &'a BTreeMap<u8, Place>) -> Self {
        Self {
            table: PagedTable::new(tree),
            staged: BTreeMap::new(),
            position,
            bytes: 0,
            firsts,
            new_firsts: BTreeMap::new(),
        }
    }

    /// Pages written or removed so far.
    pub(crate) fn touched(&self) -> usize {
        self.staged.len()
    }

    /// Bytes of pages encoded so far.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Every page touched: key, checksum in sled, checksum to be.
    pub(crate) fn differences(&self) -> impl Iterator<Item = (&PageKey, Option<u64>, Option<u64>)> {
        self.staged
            .iter()
            .map(|(key, page)| (key, page.old, page.new.as_ref().map(|(_, sum)| *sum)))
    }

    /// The same for the pages of one table.
    pub(crate) fn differences_in(
        &self,
        table: u8,
    ) -> impl Iterator<Item = (&PageKey, Option<u64>, Option<u64>)> {
        self.staged
            .range(page_key(table, (0, 0))..=page_key(table, LAST))
            .map(|(key, page)| (key, page.old, page.new.as_ref().map(|(_, sum)| *sum)))
    }

    /// The sled batch, and where tables begin that begin elsewhere now.
    pub(crate) fn into_batch(self) -> (::sled::Batch, BTreeMap<u8, Place>) {
        let mut batch = ::sled::Batch::default();
        for (key, page) in self.staged {
            match page.new {
                Some((bytes, _)) => batch.insert(&key, bytes),
                None if page.old.is_some() => batch.remove(&key),
                None => {}
            }
        }
        (batch, self.new_firsts)
    }

    /// Reads rows as they will be, at ascending places.
    pub(crate) fn get_many(
        &self,
        table: u8,
        places: &[Place],
    ) -> Result<Vec<Option<Vec<u8>>>, StorageError> {
        let untouched = self
            .staged
            .range(page_key(table, (0, 0))..=page_key(table, LAST))
            .next()
            .is_none();
        if untouched {
            return self.table.get_many(table, places);
        }
        places
            .iter()
            .map(|&place| match self.floor(table, place)? {
                None => Ok(None),
                Some((key, bytes)) => Ok(parse(&key, &bytes)?.get(place).map(<[u8]>::to_vec)),
            })
            .collect()
    }

    /// Writes ascending rows, at most until `budget` pages are touched; returns how many rows were taken (at least one).
    pub(crate) fn apply(
        &mut self,
        table: u8,
        ops: &[Op<'_>],
        budget: usize,
    ) -> Result<usize, StorageError> {
        debug_assert!(
            ops.windows(2).all(|w| w[0].place < w[1].place),
            "rows ascend"
        );
        let mut taken = 0;
        while taken < ops.len() && (taken == 0 || self.touched() < budget) {
            taken += self.apply_group(table, &ops[taken..])?;
        }
        Ok(taken)
    }

    /// Takes the rows that belong into the page of the first one (or in front of the first page), and packs them anew.
    fn apply_group(&mut self, table: u8, ops: &[Op<'_>]) -> Result<usize, StorageError> {
        let first = ops[0].place;
        let mut old: Vec<(PageKey, IVec)> = self.floor(table, first)?.into_iter().collect();
        let start = old.first().map_or(first, |(key, _)| key_parts(key).1);
        let mut next = self.after(table, start)?;
        let upto = |next: &Option<(PageKey, IVec)>| match next {
            Some((key, _)) => ops.partition_point(|op| op.place < key_parts(key).1),
            None => ops.len(),
        };
        let mut end = upto(&next);
        loop {
            let views = old
                .iter()
                .map(|(key, bytes)| parse(key, bytes))
                .collect::<Result<Vec<_>, _>>()?;
            for (at, view) in views.iter().enumerate() {
                let follows = old.get(at + 1).or(next.as_ref());
                if view.next() != follows.map_or(NONE, |(key, _)| key_parts(key).1) {
                    return Err(corrupt(
                        &old[at].0,
                        PageError("the page that follows it is missing"),
                    ));
                }
            }
            let before: Vec<Entry<'_>> = views.iter().flat_map(PageView::entries).collect();
            let (merged, shrunk) = merge(&before, &ops[..end]);
            if merged == before {
                return Ok(end);
            }
            let size = pages::packed_len(&merged);
            let small = shrunk && !merged.is_empty() && size < PAGE_BYTES / 4 && old.len() < 3;
            // Small pages join a neighbour when both fit, so that deletions leave no dust.
            if small
                && next
                    .as_ref()
                    .is_some_and(|(_, bytes)| size + bytes.len() <= FILL_BYTES)
            {
                drop((merged, before, views));
                old.extend(next.take());
                next = match old.last() {
                    Some((key, _)) => self.after(table, key_parts(key).1)?,
                    None => None,
                };
                end = upto(&next);
                continue;
            }
            if small
                && let Some(place) = old
                    .first()
                    .and_then(|(key, _)| place_before(key_parts(key).1))
            {
                let neighbour = self.floor(table, place)?;
                if neighbour
                    .as_ref()
                    .is_some_and(|(_, bytes)| size + bytes.len() <= FILL_BYTES)
                {
                    drop((merged, before, views));
                    old.splice(0..0, neighbour);
                    continue;
                }
            }
            let appended = merged
                .last()
                .is_some_and(|last| before.last().is_none_or(|b| b.place < last.place));
            if let Some(bad) = merged
                .iter()
                .find(|e| e.value.len() > pages::ROW_BYTES || e.place == LAST)
            {
                return Err(StorageError::State {
                    what: "packing rows",
                    detail: format!(
                        "row {}/{:x}/{:x} has {} bytes",
                        char::from(table),
                        bad.place.0,
                        bad.place.1,
                        bad.value.len()
                    ),
                });
            }
            let behind = next.map_or(NONE, |(key, _)| key_parts(&key).1);
            let mut written = Vec::new();
            let mut begun = 0;
            for cut in pages::cut(&merged, appended) {
                let next = merged.get(cut).map_or(behind, |entry| entry.place);
                written.push(pages::encode(
                    table,
                    self.position,
                    next,
                    &merged[begun..cut],
                ));
                begun = cut;
            }
            let first_before = old.first().map(|(key, _)| key_parts(key).1);
            let first_now = merged.first().map_or(behind, |entry| entry.place);
            let gone: Vec<(PageKey, u64)> = old
                .iter()
                .zip(&views)
                .map(|((key, _), view)| (*key, view.checksum()))
                .collect();
            for (key, checksum) in gone {
                self.remove(key, checksum);
            }
            for page in written {
                self.put(page);
            }
            if first_before != Some(first_now) {
                self.link(table, first_before.unwrap_or(first_now), first_now)?;
            }
            return Ok(end);
        }
    }

    /// Deletes the rows from `from` to `last`, at most until `budget` pages are touched.
    pub(crate) fn delete(
        &mut self,
        table: u8,
        from: Place,
        last: Place,
        budget: usize,
    ) -> Result<Progress, StorageError> {
        let mut at = from;
        while at <= last {
            let page = match self.floor(table, at)? {
                Some(page) if parse(&page.0, &page.1)?.last() >= at => page,
                _ => match self.after(table, at)? {
                    Some(page) => page,
                    None => break,
                },
            };
            let (key, bytes) = page;
            if key_parts(&key).1 > last {
                break;
            }
            if self.touched() >= budget {
                return Ok(Progress::At(at));
            }
            let view = parse(&key, &bytes)?;
            let doomed: Vec<Op<'_>> = view
                .entries()
                .filter(|e| e.place >= from && e.place <= last)
                .map(|e| Op {
                    place: e.place,
                    value: None,
                })
                .collect();
            let end = view.last();
            if doomed.len() == view.len() {
                let next = view.next();
                self.remove(key, view.checksum());
                self.link(table, key_parts(&key).1, next)?;
            } else if !doomed.is_empty() {
                let mut taken = 0;
                while taken < doomed.len() {
                    taken += self.apply_group(table, &doomed[taken..])?;
                }
            }
            at = match next_place(end) {
                Some(place) => place,
                None => break,
            };
        }
        Ok(Progress::Done)
    }

    /// Makes the last page before a place, or the table, point to the page that follows now.
    fn link(&mut self, table: u8, place: Place, next: Place) -> Result<(), StorageError> {
        let before = match place_before(place) {
            Some(place) => self.floor(table, place)?,
            None => None,
        };
        if let Some((key, bytes)) = before {
            let checksum = pages::checked(&key, &bytes).map_err(|error| corrupt(&key, error))?;
            self.remove(key, checksum);
            self.put(pages::relink(key, &bytes, self.position, next));
        } else {
            let first = self
                .new_firsts
                .get(&table)
                .or_else(|| self.firsts.get(&table));
            if first.is_some_and(|&first| first < place.min(next)) {
                return Err(corrupt(
                    &page_key(table, place),
                    PageError("the first page of its table is missing"),
                ));
            }
            self.new_firsts.insert(table, next);
        }
        Ok(())
    }

    fn remove(&mut self, key: PageKey, checksum: u64) {
        self.staged
            .entry(key)
            .or_insert(Staged {
                old: Some(checksum),
                new: None,
            })
            .new = None;
    }

    /// A key that was not read as an old page of the group is not in sled: its place lies between the group's pages.
    fn put(&mut self, page: EncodedPage) {
        self.bytes += page.bytes.len();
        self.staged
            .entry(page.key)
            .or_insert(Staged {
                old: None,
                new: None,
            })
            .new = Some((IVec::from(page.bytes), page.checksum));
    }

    fn floor(&self, table: u8, place: Place) -> Result<Option<(PageKey, IVec)>, StorageError> {
        let range = page_key(table, (0, 0))..=page_key(table, place);
        let staged = self
            .staged
            .range(range.clone())
            .rev()
            .find_map(|(key, page)| page.new.as_ref().map(|(bytes, _)| (*key, bytes.clone())));
        for item in self.table.tree.range(range).rev() {
            let (key, bytes) = item?;
            let key = exact_key(&key)?;
            if staged.as_ref().is_some_and(|(mine, _)| *mine >= key) {
                break;
            }
            if !self.staged.contains_key(&key) {
                return Ok(Some((key, bytes)));
            }
        }
        Ok(staged)
    }

    fn after(&self, table: u8, place: Place) -> Result<Option<(PageKey, IVec)>, StorageError> {
        let range = (
            Bound::Excluded(page_key(table, place)),
            Bound::Included(page_key(table, LAST)),
        );
        let staged = self
            .staged
            .range(range)
            .find_map(|(key, page)| page.new.as_ref().map(|(bytes, _)| (*key, bytes.clone())));
        for item in self.table.tree.range(range) {
            let (key, bytes) = item?;
            let key = exact_key(&key)?;
            if staged.as_ref().is_some_and(|(mine, _)| *mine <= key) {
                break;
            }
            if !self.staged.contains_key(&key) {
                return Ok(Some((key, bytes)));
            }
        }
        Ok(staged)
    }
}

/// The place behind another one.
pub(crate) fn next_place(place: Place) -> Option<Place> {
    match place {
        LAST => None,
        (major, u64::MAX) => Some((major + 1, 0)),
        (major, minor) => Some((major, minor + 1)),
    }
}

/// The place in front of another one.
pub(crate) fn place_before(place: Place) -> Option<Place> {
    match place {
        (0, 0) => None,
        (major, 0) => Some((major - 1, u64::MAX)),
        (major, minor) => Some((major, minor - 1)),
    }
}

/// Old rows with new ones over them, and whether a row went away. Both ascend.
fn merge<'e>(old: &[Entry<'e>], ops: &[Op<'e>]) -> (Vec<Entry<'e>>, bool) {
    let mut merged = Vec::with_capacity(old.len() + ops.len());
    let mut shrunk = false;
    let mut at = 0;
    for op in ops {
        while at < old.len() && old[at].place < op.place {
            merged.push(old[at]);
            at += 1;
        }
        if at < old.len() && old[at].place == op.place {
            shrunk |= op.value.is_none();
            at += 1;
        }
        if let Some(value) = op.value {
            merged.push(Entry {
                place: op.place,
                value,
            });
        }
    }
    merged.extend_from_slice(&old[at..]);
    (merged, shrunk)
}

#[cfg(test)]
mod tests;
