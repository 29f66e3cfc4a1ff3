//! Pages: how rows are packed into sled's values.
//!
//! A page holds neighbouring rows of one table and is keyed by its first row. It does not know which page is the newest one
//! (`digest.rs`) nor what a row means (`records/`).
//!
//! ```text
//! key   = table u8 | major u64 BE | minor u64 BE
//! value = version u8 | number of rows u16 | log position u64 | major and minor of the next page | rows | xxh3-64
//! row   = major delta, minor (delta), length as varints | bytes
//! ```
//!
//! The checksum covers key and value, so a page can pass neither as another page nor with another byte. A page names the one
//! that follows, so that a page that is gone is noticed by whoever lands on the one before it.
//!
//! Invariants: a page is never over [`PAGE_BYTES`]; its rows ascend strictly; the first row is the key; the next page begins
//! behind the last row. Decoding believes nothing before it has checked it (I17).

use xxhash_rust::xxh3::{xxh3_64, xxh3_64_with_seed};

/// The largest page in bytes: what is larger, sled would put into files that it never syncs (S2).
pub const PAGE_BYTES: usize = 4_096;
/// Pages are filled to here, so that rows that grow a little need no split.
pub(crate) const FILL_BYTES: usize = 3_712;
/// A row with a value over this has a page of its own.
const LONELY_BYTES: usize = 2_048;
/// The largest value of a row, headers of runs with their digests included.
pub(crate) const ROW_BYTES: usize = PAGE_BYTES - OVERHEAD - ROW_OVERHEAD;
/// Where the rows begin: behind version, number of rows, position and next page.
const ROWS_AT: usize = 1 + 2 + 8 + NEXT_BYTES;
const POSITION_AT: usize = 3;
const NEXT_AT: usize = 11;
const NEXT_BYTES: usize = 16;
/// That and the checksum.
const OVERHEAD: usize = ROWS_AT + 8;
/// Three varints at most.
const ROW_OVERHEAD: usize = 10 + 10 + 2;
/// Version of the page format.
const VERSION: u8 = 1;
/// Length of a page's key.
pub(crate) const KEY_BYTES: usize = 17;

/// Key of a page in sled.
pub(crate) type PageKey = [u8; KEY_BYTES];

/// Major and minor of a row.
pub(crate) type Place = (u64, u64);

/// Stands for the next page when there is none.
pub(crate) const NONE: Place = (u64::MAX, u64::MAX);

/// The key that a page has whose first row is this one.
pub(crate) fn page_key(table: u8, place: Place) -> PageKey {
    let mut key = [0; KEY_BYTES];
    key[0] = table;
    key[1..9].copy_from_slice(&place.0.to_be_bytes());
    key[9..].copy_from_slice(&place.1.to_be_bytes());
    key
}

/// Table and first row of a page's key.
pub(crate) fn key_parts(key: &PageKey) -> (u8, Place) {
    let word = |at: usize| {
        u64::from_be_bytes(
            key[at..at + 8]
                .try_into()
                .expect("a slice of eight bytes is eight bytes"),
        )
    };
    (key[0], (word(1), word(9)))
}

/// What a damaged page says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct PageError(pub(crate) &'static str);

/// A row that is to be packed, borrowed from an old page or from the overlay.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Entry<'a> {
    /// Where it belongs.
    pub(crate) place: Place,
    /// Its value.
    pub(crate) value: &'a [u8],
}

/// Where a row lies in its page.
#[derive(Debug, Clone, Copy)]
struct Slot {
    place: Place,
    start: u16,
    length: u16,
}

/// A page that has been checked.
#[derive(Debug)]
pub(crate) struct PageView<'a> {
    bytes: &'a [u8],
    slots: Vec<Slot>,
    position: u64,
    next: Place,
    checksum: u64,
}

impl<'a> PageView<'a> {
    /// Checks a page and finds its rows.
    pub(crate) fn parse(key: &[u8], bytes: &'a [u8]) -> Result<Self, PageError> {
        let checksum = checked(key, bytes)?;
        let table_key: &PageKey = key
            .try_into()
            .map_err(|_| PageError("the key has a wrong length"))?;
        let (_, first) = key_parts(table_key);
        if bytes[0] != VERSION {
            return Err(PageError("the page version is unknown"));
        }
        let n = usize::from(u16::from_le_bytes([bytes[1], bytes[2]]));
        let position = word_at(bytes, POSITION_AT);
        let next = (word_at(bytes, NEXT_AT), word_at(bytes, NEXT_AT + 8));
        let end = bytes.len() - 8;
        if n == 0 || n > end {
            return Err(PageError("the number of rows is impossible"));
        }
        let mut slots = Vec::with_capacity(n);
        let mut at = ROWS_AT;
        let mut place = first;
        for index in 0..n {
            let major = read_varint(&bytes[..end], &mut at)?;
            let minor = read_varint(&bytes[..end], &mut at)?;
            let length = read_varint(&bytes[..end], &mut at)?;
            if index == 0 {
                if major != 0 || minor != 0 {
                    return Err(PageError("the first row is not the key"));
                }
            } else if major == 0 {
                if minor == 0 {
                    return Err(PageError("two rows have the same place"));
                }
                place.1 = place
                    .1
                    .checked_add(minor)
                    .ok_or(PageError("a row's place overflows"))?;
            } else {
                place.0 = place
                    .0
                    .checked_add(major)
                    .ok_or(PageError("a row's place overflows"))?;
                place.1 = minor;
            }
            let length = usize::try_from(length)
                .ok()
                .filter(|&l| l <= end - at)
                .ok_or(PageError("a row is longer than its page"))?;
            // Both fit: a page is at most 4 KiB, which `checked` has seen to.
            slots.push(Slot {
                place,
                start: at as u16,
                length: length as u16,
            });
            at += length;
        }
        if at != end {
            return Err(PageError("bytes follow the last row"));
        }
        if next <= place {
            return Err(PageError("the next page begins before the last row"));
        }
        Ok(Self {
            bytes,
            slots,
            position,
            next,
            checksum,
        })
    }

    /// Log position that this page reaches.
    pub(crate) fn position(&self) -> u64 {
        self.position
    }

    /// Where the next page begins; [`NONE`] for the last one.
    pub(crate) fn next(&self) -> Place {
        self.next
    }

    /// Its checksum.
    pub(crate) fn checksum(&self) -> u64 {
        self.checksum
    }

    /// Number of rows; never 0.
    pub(crate) fn len(&self) -> usize {
        self.slots.len()
    }

    /// The last row's place.
    pub(crate) fn last(&self) -> Place {
        self.slots[self.slots.len() - 1].place
    }

    /// The row at a place.
    pub(crate) fn get(&self, place: Place) -> Option<&'a [u8]> {
        let at = self
            .slots
            .binary_search_by_key(&place, |slot| slot.place)
            .ok()?;
        Some(self.entry(at).value)
    }

    /// The row with a number; the number is less than [`Self::len`].
    pub(crate) fn entry(&self, at: usize) -> Entry<'a> {
        let slot = self.slots[at];
        Entry {
            place: slot.place,
            value: &self.bytes[usize::from(slot.start)..][..usize::from(slot.length)],
        }
    }

    /// Where the value of the row with a number lies in the page.
    pub(crate) fn value_range(&self, at: usize) -> std::ops::Range<usize> {
        let slot = self.slots[at];
        usize::from(slot.start)..usize::from(slot.start) + usize::from(slot.length)
    }

    /// Number of the first row at or after a place.
    pub(crate) fn lower_bound(&self, place: Place) -> usize {
        self.slots.partition_point(|slot| slot.place < place)
    }

    /// All rows, in order.
    pub(crate) fn entries(&self) -> impl DoubleEndedIterator<Item = Entry<'a>> + '_ {
        (0..self.slots.len()).map(|at| self.entry(at))
    }
}

/// Checks length and checksum and returns the checksum, without looking at the rows.
pub(crate) fn checked(key: &[u8], bytes: &[u8]) -> Result<u64, PageError> {
    if key.len() != KEY_BYTES {
        return Err(PageError("the key has a wrong length"));
    }
    if bytes.len() < OVERHEAD {
        return Err(PageError("the page is too short"));
    }
    if bytes.len() > PAGE_BYTES {
        return Err(PageError("the page is too long"));
    }
    let (body, tail) = bytes.split_at(bytes.len() - 8);
    let stated = word_at(tail, 0);
    if stated != checksum_of(key, body) {
        return Err(PageError("the checksum is wrong"));
    }
    Ok(stated)
}

/// The log position that a page states, once [`checked`] has passed.
pub(crate) fn stated_position(bytes: &[u8]) -> u64 {
    word_at(bytes, POSITION_AT)
}

fn checksum_of(key: &[u8], body: &[u8]) -> u64 {
    xxh3_64_with_seed(body, xxh3_64(key))
}

/// A page ready to be written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct EncodedPage {
    /// Its key.
    pub(crate) key: PageKey,
    /// Its bytes.
    pub(crate) bytes: Vec<u8>,
    /// Its checksum.
    pub(crate) checksum: u64,
}

/// The same page with another one behind it.
pub(crate) fn relink(key: PageKey, bytes: &[u8], position: u64, next: Place) -> EncodedPage {
    let mut bytes = bytes[..bytes.len() - 8].to_vec();
    bytes[POSITION_AT..POSITION_AT + 8].copy_from_slice(&position.to_le_bytes());
    bytes[NEXT_AT..NEXT_AT + 8].copy_from_slice(&next.0.to_le_bytes());
    bytes[NEXT_AT + 8..ROWS_AT].copy_from_slice(&next.1.to_le_bytes());
    let checksum = checksum_of(&key, &bytes);
    bytes.extend_from_slice(&checksum.to_le_bytes());
    EncodedPage {
        key,
        bytes,
        checksum,
    }
}

/// Packs rows that belong together into one page. They ascend strictly and fit.
pub(crate) fn encode(table: u8, position: u64, next: Place, entries: &[Entry<'_>]) -> EncodedPage {
    let first = entries[0].place;
    let key = page_key(table, first);
    let mut bytes = Vec::with_capacity(PAGE_BYTES);
    bytes.push(VERSION);
    bytes.extend_from_slice(&(entries.len() as u16).to_le_bytes());
    bytes.extend_from_slice(&position.to_le_bytes());
    bytes.extend_from_slice(&next.0.to_le_bytes());
    bytes.extend_from_slice(&next.1.to_le_bytes());
    let mut before = first;
    for (at, entry) in entries.iter().enumerate() {
        debug_assert!(at == 0 || before < entry.place, "rows ascend");
        let major = entry.place.0 - before.0;
        let minor = if major == 0 {
            entry.place.1 - before.1
        } else {
            entry.place.1
        };
        write_varint(&mut bytes, major);
        write_varint(&mut bytes, minor);
        write_varint(&mut bytes, entry.value.len() as u64);
        bytes.extend_from_slice(entry.value);
        before = entry.place;
    }
    let checksum = checksum_of(&key, &bytes);
    bytes.extend_from_slice(&checksum.to_le_bytes());
    debug_assert!(bytes.len() <= PAGE_BYTES, "a page is never over 4 KiB");
    EncodedPage {
        key,
        bytes,
        checksum,
    }
}

/// Bytes that a row takes behind another one; an upper bound when it comes first.
fn cost(before: Place, entry: &Entry<'_>) -> usize {
    let (major, minor) = if before.0 == entry.place.0 {
        (0, entry.place.1.wrapping_sub(before.1))
    } else {
        (entry.place.0.wrapping_sub(before.0), entry.place.1)
    };
    varint_len(major) + varint_len(minor) + varint_len(entry.value.len() as u64) + entry.value.len()
}

/// Size of one page with all these rows.
pub(crate) fn packed_len(entries: &[Entry<'_>]) -> usize {
    let mut before = entries.first().map_or((0, 0), |e| e.place);
    let mut total = OVERHEAD;
    for entry in entries {
        total += cost(before, entry);
        before = entry.place;
    }
    total
}

/// Cuts ascending rows into pages and returns the end of each. `appended`: they grow at the end, so pages are filled up;
/// otherwise they are made about equally full, which leaves room on both sides.
///
/// A major that fits whole shares a page with its neighbours; a larger one begins its own, so its pages are its own.
pub(crate) fn cut(entries: &[Entry<'_>], appended: bool) -> Vec<usize> {
    let mut ends = Vec::new();
    if entries.is_empty() {
        return ends;
    }
    let total = packed_len(entries);
    let lonely = |e: &Entry<'_>| e.value.len() > LONELY_BYTES;
    if total <= PAGE_BYTES && (entries.len() == 1 || !entries.iter().any(lonely)) {
        ends.push(entries.len());
        return ends;
    }
    let fill = if appended {
        FILL_BYTES
    } else {
        let pages = total.div_ceil(FILL_BYTES).max(2);
        (total.div_ceil(pages) + 128).min(FILL_BYTES)
    };
    let mut used = OVERHEAD;
    let mut begun = 0;
    let mut group_end = 0;
    for (at, entry) in entries.iter().enumerate() {
        let before = if at == begun {
            entry.place
        } else {
            entries[at - 1].place
        };
        let need = cost(before, entry);
        let mut over = used + need > fill;
        if at == group_end {
            let (end, size) = group(entries, at, fill);
            group_end = end;
            over |= used + size > fill;
        }
        let alone = lonely(entry) || (at > begun && lonely(&entries[at - 1]));
        if at > begun && (over || alone) {
            ends.push(at);
            begun = at;
            used = OVERHEAD + cost(entry.place, entry);
        } else {
            used += need;
        }
    }
    ends.push(entries.len());
    ends
}

/// Where the rows of one major end, and their size (which is not counted further than `limit`).
fn group(entries: &[Entry<'_>], from: usize, limit: usize) -> (usize, usize) {
    let major = entries[from].place.0;
    let mut size = 0;
    let mut before = (major.wrapping_sub(1), 0);
    let mut at = from;
    while at < entries.len() && entries[at].place.0 == major {
        if size <= limit {
            size += cost(before, &entries[at]);
        }
        before = entries[at].place;
        at += 1;
    }
    (at, size)
}

fn word_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(
        bytes[at..at + 8]
            .try_into()
            .expect("a slice of eight bytes is eight bytes"),
    )
}

/// Length of a number as a varint.
pub(crate) fn varint_len(value: u64) -> usize {
    (64 - (value | 1).leading_zeros() as usize).div_ceil(7)
}

/// Appends a number, seven bits a byte, low bits first.
pub(crate) fn write_varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push((value as u8) | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

/// Reads a number and moves on.
pub(crate) fn read_varint(bytes: &[u8], at: &mut usize) -> Result<u64, PageError> {
    let mut value = 0_u64;
    for shift in (0..64).step_by(7) {
        let byte = *bytes.get(*at).ok_or(PageError("a number is cut off"))?;
        *at += 1;
        let bits = u64::from(byte & 0x7f);
        if shift == 63 && bits > 1 {
            return Err(PageError("a number is too large"));
        }
        value |= bits << shift;
        if byte & 0x80 == 0 {
            return Ok(value);
        }
    }
    Err(PageError("a number is too long"))
}

#[cfg(test)]
mod tests {
    use super::super::dice::{one_in, random};
    use super::*;

    fn rows(seed: &mut u64, n: usize, max: u64) -> Vec<(Place, Vec<u8>)> {
        let mut place = (random(seed) % 5, random(seed) % 1_000);
        (0..n)
            .map(|_| {
                if one_in(seed, 5) {
                    place = (place.0 + 1 + random(seed) % 300, random(seed) >> 3);
                } else {
                    place.1 += 1 + random(seed) % 200;
                }
                let len = (random(seed) % (max + 1)) as usize;
                (place, (0..len).map(|_| random(seed) as u8).collect())
            })
            .collect()
    }

    fn entries(rows: &[(Place, Vec<u8>)]) -> Vec<Entry<'_>> {
        rows.iter()
            .map(|(place, value)| Entry {
                place: *place,
                value,
            })
            .collect()
    }

    #[test]
    fn varints_come_back_and_only_in_their_range() {
        for value in [
            0,
            1,
            127,
            128,
            16_383,
            16_384,
            u64::from(u32::MAX),
            u64::MAX,
        ] {
            let mut bytes = Vec::new();
            write_varint(&mut bytes, value);
            assert_eq!(bytes.len(), varint_len(value));
            let mut at = 0;
            assert_eq!(read_varint(&bytes, &mut at), Ok(value));
            assert_eq!(at, bytes.len());
            bytes.pop();
            assert!(read_varint(&bytes, &mut 0).is_err());
        }
        assert!(read_varint(&[0xff; 11], &mut 0).is_err());
        assert!(read_varint(&[255, 255, 255, 255, 255, 255, 255, 255, 255, 2], &mut 0).is_err());
    }

    #[test]
    fn what_is_packed_comes_back() {
        let mut seed = 7;
        for round in 0..2_000 {
            let n = 1 + (random(&mut seed) % 120) as usize;
            let max = [8, 60, 300, 3_600][(random(&mut seed) % 4) as usize];
            let rows = rows(&mut seed, n, max);
            let entries = entries(&rows);
            let ends = cut(&entries, round % 2 == 0);
            let mut begun = 0;
            let mut unpacked = Vec::new();
            for end in ends {
                assert!(end > begun, "no page is empty");
                let page = encode(b'n', 42, NONE, &entries[begun..end]);
                assert!(page.bytes.len() <= PAGE_BYTES);
                let view = PageView::parse(&page.key, &page.bytes).expect("own page");
                assert_eq!(view.position(), 42);
                assert_eq!(view.checksum(), page.checksum);
                let next = (view.last().0 + 1, 5);
                let linked = relink(page.key, &page.bytes, 43, next);
                let again = PageView::parse(&linked.key, &linked.bytes).expect("relinked page");
                assert_eq!((again.position(), again.next()), (43, next));
                assert!(again.entries().eq(view.entries()));
                let wrong = relink(page.key, &page.bytes, 43, view.last());
                assert!(PageView::parse(&wrong.key, &wrong.bytes).is_err());
                for entry in view.entries() {
                    assert_eq!(view.get(entry.place), Some(entry.value));
                    unpacked.push((entry.place, entry.value.to_vec()));
                }
                if view.len() > 1 {
                    assert!(view.entries().all(|e| e.value.len() <= LONELY_BYTES));
                }
                begun = end;
            }
            assert_eq!(unpacked, rows, "round {round}");
        }
    }

    #[test]
    fn a_major_of_over_a_page_starts_its_own_and_small_ones_share() {
        let value = vec![7; 100];
        let mut all = Vec::new();
        for (major, n) in [(1, 3), (2, 3), (3, 100), (4, 2), (5, 2)] {
            for minor in 0..n {
                all.push(Entry {
                    place: (major, minor),
                    value: &value,
                });
            }
        }
        let ends = cut(&all, true);
        let starts: Vec<Place> = std::iter::once(0)
            .chain(ends.iter().copied())
            .filter(|&at| at < all.len())
            .map(|at| all[at].place)
            .collect();
        assert_eq!(starts[0], (1, 0));
        assert_eq!(starts[1], (3, 0), "the large one begins its own page");
        assert!(
            !starts.contains(&(2, 0)) && !starts.contains(&(5, 0)),
            "small ones share: {starts:?}"
        );
    }

    #[test]
    fn the_largest_row_fits_a_page() {
        let value = vec![1; ROW_BYTES];
        let page = encode(
            b'v',
            u64::MAX,
            NONE,
            &[Entry {
                place: (u64::MAX, u64::MAX - 1),
                value: &value,
            }],
        );
        assert!(page.bytes.len() <= PAGE_BYTES);
    }

    #[test]
    fn hostile_bytes_are_an_error_and_never_a_panic() {
        let mut seed = 99;
        let (mut refused, mut accepted) = (0, 0);
        for round in 0..100_000_u32 {
            let n = 1 + (random(&mut seed) % 20) as usize;
            let rows = rows(&mut seed, n, 60);
            let page = encode(b'n', random(&mut seed), NONE, &entries(&rows));
            let mut key = page.key;
            let mut bytes = page.bytes.clone();
            match random(&mut seed) % 5 {
                0 => {
                    let at = (random(&mut seed) % bytes.len() as u64) as usize;
                    bytes[at] ^= 1 << (random(&mut seed) % 8);
                }
                1 => bytes.truncate((random(&mut seed) % bytes.len() as u64) as usize),
                2 => {
                    let at = (random(&mut seed) % KEY_BYTES as u64) as usize;
                    key[at] ^= 1 << (random(&mut seed) % 8);
                }
                3 => {
                    bytes = (0..random(&mut seed) % 5_000)
                        .map(|_| random(&mut seed) as u8)
                        .collect();
                }
                _ => {
                    // An attacker who can also fix the checksum: nothing may panic, and what is accepted is well formed.
                    for _ in 0..=random(&mut seed) % 4 {
                        let at = (random(&mut seed) % (bytes.len() as u64 - 8)) as usize;
                        bytes[at] = random(&mut seed) as u8;
                    }
                    let body = bytes.len() - 8;
                    let sum = checksum_of(&key, &bytes[..body]);
                    bytes[body..].copy_from_slice(&sum.to_le_bytes());
                    if let Ok(view) = PageView::parse(&key, &bytes) {
                        accepted += 1;
                        let places: Vec<Place> = view.entries().map(|e| e.place).collect();
                        assert!(places.windows(2).all(|w| w[0] < w[1]), "round {round}");
                    }
                    continue;
                }
            }
            let result = PageView::parse(&key, &bytes);
            assert!(
                result.is_err() || (key == page.key && bytes == page.bytes),
                "round {round}: a changed page passed"
            );
            refused += u32::from(result.is_err());
        }
        assert!(refused > 70_000 && accepted > 100, "{refused} {accepted}");
    }
}
