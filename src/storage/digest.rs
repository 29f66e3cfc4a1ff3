//! Digests: how a page that silently went back to an older state is found.
//!
//! A page's checksum proves that its bytes belong together, not that they are the newest. So whoever owns pages keeps their
//! number and the sum of their checksums, changed in the same sled batch as the pages (STATE §8):
//!
//! ```text
//! meta ── sum per table without runs (specs, names, keys, outbox, …), `o` among them: checked when the store opens
//!   └─── sum over the chunk table, which has one row per 4,096 ended runs: checked when the store opens
//!          └── chunk of `r` pages: checked at the first read of one of its runs
//! header of a run (in `o`, `r`, or `q` while it is being deleted) ── sum per table of the run: checked at its first read
//! ```
//!
//! Does not know sled. Invariant: a sum is exactly the pages of its owner, after every batch (I17).

use super::pages::{PageError, read_varint, write_varint};

/// Tables whose pages belong to runs, in the order of their bits in a header's mask.
pub(crate) const RUN_TABLES: [u8; 5] = [b'n', b'a', b'i', b'v', b'e'];
/// Digests of runs without a header: they are being deleted, or a replay has not reached their header yet.
pub(crate) const HEADLESS: u8 = b'q';
/// Sums over chunks of the table of ended runs.
pub(crate) const CHUNKS: u8 = b'R';
/// Headers of open runs.
pub(crate) const OPEN: u8 = b'o';
/// Headers of ended runs.
pub(crate) const ENDED: u8 = b'r';
/// Tables with one sum each in the meta record.
pub(crate) const GROUPS: [u8; 12] = [
    b's', b't', b'w', OPEN, HEADLESS, CHUNKS, b'k', b'b', b'f', b'F', b'd', b'g',
];
/// Ended runs of one chunk, as a power of two.
const CHUNK_BITS: u32 = 12;

/// The chunk of the table of ended runs that a page belongs to whose first row has this major.
pub(crate) fn chunk_of(run: u64) -> u64 {
    run >> CHUNK_BITS
}

/// The runs of a chunk.
pub(crate) fn chunk_runs(chunk: u64) -> std::ops::RangeInclusive<u64> {
    let first = chunk << CHUNK_BITS;
    first..=first | ((1 << CHUNK_BITS) - 1)
}

/// Number of a table of runs, `None` for another table.
pub(crate) fn run_table(table: u8) -> Option<usize> {
    RUN_TABLES.iter().position(|&t| t == table)
}

/// Number and sum of some pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct PageSum {
    /// How many. Wraps, so that a difference is a sum too.
    pub(crate) pages: u64,
    /// Sum of their mixed checksums.
    pub(crate) digest: u64,
}

impl PageSum {
    /// Counts a page in.
    pub(crate) fn add(&mut self, checksum: u64) {
        self.pages = self.pages.wrapping_add(1);
        self.digest = self.digest.wrapping_add(mix(checksum));
    }

    /// Counts a page out.
    pub(crate) fn remove(&mut self, checksum: u64) {
        self.pages = self.pages.wrapping_sub(1);
        self.digest = self.digest.wrapping_sub(mix(checksum));
    }

    /// Counts a page out and what it became in.
    pub(crate) fn replace(&mut self, old: Option<u64>, new: Option<u64>) {
        if old != new {
            if let Some(checksum) = old {
                self.remove(checksum);
            }
            if let Some(checksum) = new {
                self.add(checksum);
            }
        }
    }

    /// Adds a difference.
    pub(crate) fn merge(&mut self, other: Self) {
        self.pages = self.pages.wrapping_add(other.pages);
        self.digest = self.digest.wrapping_add(other.digest);
    }

    /// Whether there is nothing.
    pub(crate) fn is_zero(self) -> bool {
        self == Self::default()
    }

    /// As bytes.
    pub(crate) fn to_bytes(self) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&self.pages.to_le_bytes());
        bytes[8..].copy_from_slice(&self.digest.to_le_bytes());
        bytes
    }

    /// From bytes.
    pub(crate) fn from_bytes(bytes: &[u8]) -> Result<Self, PageError> {
        let wrong = PageError("a sum has a wrong length");
        let (pages, digest) = bytes.split_first_chunk::<8>().ok_or(wrong)?;
        let digest = digest.try_into().map_err(|_| wrong)?;
        Ok(Self {
            pages: u64::from_le_bytes(*pages),
            digest: u64::from_le_bytes(digest),
        })
    }
}

/// The key, position and rows are already in the checksum; mixing keeps sums of related checksums unrelated.
fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// What a run's header says about the run's pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct RunDigest {
    /// By number of the table ([`RUN_TABLES`]).
    pub(crate) tables: [PageSum; RUN_TABLES.len()],
}

impl RunDigest {
    /// The most bytes that a digest takes in front of a header.
    pub(crate) const MAX_BYTES: usize = 1 + RUN_TABLES.len() * (10 + 8);

    /// Whether the run owns no page (small runs: their rows lie in pages of neighbours).
    pub(crate) fn is_zero(&self) -> bool {
        self.tables.iter().all(|sum| sum.is_zero())
    }

    /// Adds differences.
    pub(crate) fn merge(&mut self, other: &Self) {
        for (mine, theirs) in self.tables.iter_mut().zip(other.tables) {
            mine.merge(theirs);
        }
    }

    /// Writes it in front of a header's own value.
    pub(crate) fn write(&self, out: &mut Vec<u8>) {
        let mut mask = 0_u8;
        for (bit, sum) in self.tables.iter().enumerate() {
            mask |= u8::from(!sum.is_zero()) << bit;
        }
        out.push(mask);
        for sum in self.tables.iter().filter(|sum| !sum.is_zero()) {
            write_varint(out, sum.pages);
            out.extend_from_slice(&sum.digest.to_le_bytes());
        }
    }

    /// Splits a stored header into digest and value.
    pub(crate) fn read(bytes: &[u8]) -> Result<(Self, &[u8]), PageError> {
        let mask = *bytes.first().ok_or(PageError("a header is empty"))?;
        if mask >> RUN_TABLES.len() != 0 {
            return Err(PageError("a header names an unknown table"));
        }
        let mut digest = Self::default();
        let mut at = 1;
        for (bit, sum) in digest.tables.iter_mut().enumerate() {
            if mask & (1 << bit) != 0 {
                sum.pages = read_varint(bytes, &mut at)?;
                let word = bytes[at..]
                    .first_chunk::<8>()
                    .ok_or(PageError("a header's digest is cut off"))?;
                sum.digest = u64::from_le_bytes(*word);
                at += 8;
            }
        }
        Ok((digest, &bytes[at..]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_do_not_depend_on_order_and_notice_an_older_page() {
        let (mut a, mut b) = (PageSum::default(), PageSum::default());
        for checksum in 0..100 {
            a.add(checksum);
            b.add(99 - checksum);
        }
        assert_eq!(a, b);
        assert_eq!(PageSum::from_bytes(&a.to_bytes()), Ok(a));
        b.remove(17);
        b.add(1_000);
        assert_ne!(a, b);
        b.remove(1_000);
        b.add(17);
        assert_eq!(a, b);
    }

    #[test]
    fn a_header_carries_its_digest() {
        let mut digest = RunDigest::default();
        let mut bytes = Vec::new();
        digest.write(&mut bytes);
        assert_eq!(bytes, [0], "a run without pages pays one byte");
        digest.tables[1].add(5);
        digest.tables[4].add(6);
        bytes.clear();
        digest.write(&mut bytes);
        assert!(bytes.len() <= RunDigest::MAX_BYTES);
        bytes.extend_from_slice(b"header");
        assert_eq!(RunDigest::read(&bytes), Ok((digest, &b"header"[..])));
        for cut in 0..bytes.len() - b"header".len() {
            assert!(RunDigest::read(&bytes[..cut]).is_err(), "{cut}");
        }
        assert!(RunDigest::read(&[0x20]).is_err());
    }
}
