//! The meta record: what sled as a whole has reached.
//!
//! One record under its own key, rewritten by every sled batch, so a batch and the log position it stands for are one thing.
//! It also holds one sum for each table whose pages belong to no run (`digest.rs`).

use std::collections::BTreeMap;

use xxhash_rust::xxh3::xxh3_64;

use super::StorageError;
use super::digest::{GROUPS, PageSum};
use super::pages::{NONE, Place};
use crate::broker::types::{Timestamp, WallTime};

/// Key of the meta record in sled: shorter than a page's.
pub(crate) const META_KEY: &[u8] = b"m";
/// The newest format of pages and records that this program reads.
pub const FORMAT: u32 = 1;
/// Version of the meta record itself.
const VERSION: u8 = 1;

/// What sled reaches, and what is fixed for the life of a store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StateMeta {
    /// Log position: every entry before it is in sled.
    pub position: u64,
    /// Sequence of the last entry before the position.
    pub sequence: u64,
    /// Broker time of that entry.
    pub now: Timestamp,
    /// Calendar time of that entry.
    pub wall: WallTime,
    /// The first run number that was not given in those entries.
    pub next_run: u64,
    /// Identity of the store.
    pub store_id: [u8; 16],
    /// Secret from which lease tokens derive.
    pub lease_secret: [u8; 16],
    /// Format of the store.
    pub format: u32,
}

/// The whole record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Meta {
    /// What callers see.
    pub(crate) state: StateMeta,
    /// Pages may carry positions up to here: the end of the window that is being applied.
    pub(crate) high: u64,
    /// Sums of the tables without runs.
    pub(crate) groups: BTreeMap<u8, PageSum>,
    /// Where the first page of each table begins; none, or [`NONE`]: the table is empty.
    pub(crate) firsts: BTreeMap<u8, Place>,
}

impl Meta {
    /// Of a store without a page.
    pub(crate) fn new(state: StateMeta) -> Self {
        Self {
            state,
            high: state.position,
            groups: GROUPS
                .iter()
                .map(|&table| (table, PageSum::default()))
                .collect(),
            firsts: BTreeMap::new(),
        }
    }

    /// Where the first page of a table begins; [`NONE`] of an empty one.
    pub(crate) fn first(&self, table: u8) -> Place {
        self.firsts.get(&table).copied().unwrap_or(NONE)
    }

    /// As bytes.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let state = &self.state;
        let mut out = vec![VERSION];
        out.extend_from_slice(&state.format.to_le_bytes());
        for word in [
            state.position,
            self.high,
            state.sequence,
            state.now.0,
            state.wall.0,
            state.next_run,
        ] {
            out.extend_from_slice(&word.to_le_bytes());
        }
        out.extend_from_slice(&state.store_id);
        out.extend_from_slice(&state.lease_secret);
        out.push(self.groups.len() as u8);
        for (&table, sum) in &self.groups {
            out.push(table);
            out.extend_from_slice(&sum.to_bytes());
        }
        out.push(self.firsts.len() as u8);
        for (&table, place) in &self.firsts {
            out.push(table);
            out.extend_from_slice(&place.0.to_le_bytes());
            out.extend_from_slice(&place.1.to_le_bytes());
        }
        let checksum = xxh3_64(&out);
        out.extend_from_slice(&checksum.to_le_bytes());
        out
    }

    /// From bytes. `path` is for the words of an error.
    pub(crate) fn decode(bytes: &[u8], path: &str) -> Result<Self, StorageError> {
        let damaged = |detail: &str| StorageError::Corrupt {
            record: "the meta record".into(),
            detail: detail.into(),
        };
        let short = || damaged("it is cut off");
        let (body, checksum) = bytes.split_last_chunk::<8>().ok_or_else(short)?;
        if xxh3_64(body) != u64::from_le_bytes(*checksum) {
            return Err(damaged("the checksum is wrong"));
        }
        let mut rest = body;
        let version = take::<1>(&mut rest).ok_or_else(short)?[0];
        let format = u32::from_le_bytes(take(&mut rest).ok_or_else(short)?);
        if version > VERSION || format > FORMAT {
            return Err(StorageError::TooNew {
                path: path.into(),
                found: format.max(u32::from(version)),
                known: FORMAT,
            });
        }
        let mut words = [0; 6];
        for word in &mut words {
            *word = u64::from_le_bytes(take(&mut rest).ok_or_else(short)?);
        }
        let store_id = take(&mut rest).ok_or_else(short)?;
        let lease_secret = take(&mut rest).ok_or_else(short)?;
        let n = take::<1>(&mut rest).ok_or_else(short)?[0];
        let mut groups = BTreeMap::new();
        for _ in 0..n {
            let table = take::<1>(&mut rest).ok_or_else(short)?[0];
            let sum: [u8; 16] = take(&mut rest).ok_or_else(short)?;
            groups.insert(
                table,
                PageSum::from_bytes(&sum).map_err(|error| damaged(error.0))?,
            );
        }
        let n = take::<1>(&mut rest).ok_or_else(short)?[0];
        let mut firsts = BTreeMap::new();
        for _ in 0..n {
            let table = take::<1>(&mut rest).ok_or_else(short)?[0];
            let major = u64::from_le_bytes(take(&mut rest).ok_or_else(short)?);
            let minor = u64::from_le_bytes(take(&mut rest).ok_or_else(short)?);
            firsts.insert(table, (major, minor));
        }
        if !rest.is_empty()
            || groups.len() != GROUPS.len()
            || GROUPS.iter().any(|t| !groups.contains_key(t))
        {
            return Err(damaged("it does not have one sum for each table"));
        }
        let [position, high, sequence, now, wall, next_run] = words;
        if high < position {
            return Err(damaged("its positions contradict each other"));
        }
        Ok(Self {
            state: StateMeta {
                position,
                sequence,
                now: Timestamp(now),
                wall: WallTime(wall),
                next_run,
                store_id,
                lease_secret,
                format,
            },
            high,
            groups,
            firsts,
        })
    }
}

fn take<const N: usize>(rest: &mut &[u8]) -> Option<[u8; N]> {
    let (head, tail) = rest.split_first_chunk::<N>()?;
    *rest = tail;
    Some(*head)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn meta_comes_back_and_no_bit_may_change() {
        let mut meta = Meta::new(StateMeta {
            position: 7,
            sequence: 3,
            now: Timestamp(5),
            wall: WallTime(6),
            next_run: 9,
            store_id: [1; 16],
            lease_secret: [2; 16],
            format: FORMAT,
        });
        meta.high = 12;
        meta.groups.entry(b's').or_default().add(77);
        meta.firsts.insert(b'n', (3, 4));
        let bytes = meta.encode();
        assert_eq!(Meta::decode(&bytes, "x").ok(), Some(meta.clone()));
        for bit in 0..bytes.len() * 8 {
            let mut bad = bytes.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(Meta::decode(&bad, "x").is_err(), "bit {bit}");
        }
        for cut in 0..bytes.len() {
            assert!(Meta::decode(&bytes[..cut], "x").is_err(), "cut {cut}");
        }
        meta.state.format = FORMAT + 1;
        assert!(matches!(
            Meta::decode(&meta.encode(), "x"),
            Err(StorageError::TooNew { .. })
        ));
    }
}
