//! What the store itself must remember to turn facts into rows: where a key lies, how far an outbox is confirmed, which runs
//! use which payload segment. Small, in memory, and filled again from the rows at every start.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::hash::{Hash, Hasher};

use crate::broker::types::{KeyHash, NameId, PayloadRef, Timestamp};

/// Keys are kept by the time they were taken, in steps of 2^13 ms, so that new ones are neighbours.
const KEY_STEP: u32 = 13;
/// Steps are remembered modulo 2^24, which is over four years.
const STEP_BITS: u32 = 24;

/// Where each key lies: its fact when it expires does not say. 8 bytes a key: 40 bits of its hash, 24 of the step.
///
/// Two keys that agree in 40 bits, or a key older than four years, can make a row outlive its key until the next start, when
/// it is loaded, found expired and deleted again. No row is ever deleted too early by that: a deletion names the key's own
/// low half.
#[derive(Debug, Default)]
pub(super) struct KeyPlaces {
    slots: HashSet<Slot>,
}

#[derive(Debug, Clone, Copy)]
struct Slot(u64);

impl PartialEq for Slot {
    fn eq(&self, other: &Self) -> bool {
        self.0 >> STEP_BITS == other.0 >> STEP_BITS
    }
}

impl Eq for Slot {}

impl Hash for Slot {
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write_u64(self.0 >> STEP_BITS);
    }
}

impl Slot {
    fn new(key: KeyHash, step: u64) -> Self {
        let fingerprint = (key.0 >> 88) as u64;
        Self(fingerprint << STEP_BITS | step & ((1 << STEP_BITS) - 1))
    }
}

pub(super) fn key_step(at: Timestamp) -> u64 {
    at.0 >> KEY_STEP
}

impl KeyPlaces {
    pub(super) fn insert(&mut self, key: KeyHash, at: Timestamp) {
        self.slots.replace(Slot::new(key, key_step(at)));
    }

    /// The step in which the key was taken, seen from `now`, which is not before it.
    pub(super) fn take(&mut self, key: KeyHash, now: Timestamp) -> Option<u64> {
        let slot = self.slots.take(&Slot::new(key, 0))?;
        let low = slot.0 & ((1 << STEP_BITS) - 1);
        let current = key_step(now);
        let age = current.wrapping_sub(low) & ((1 << STEP_BITS) - 1);
        current.checked_sub(age)
    }
}

/// How far outboxes are confirmed, so that a confirmation deletes only what the one before did not.
#[derive(Debug, Default)]
pub(super) struct OutboxPlaces {
    by_output: HashMap<NameId, (u64, BTreeSet<u64>)>,
}

impl OutboxPlaces {
    /// Takes a confirmation; gives the range of rows to delete and the single ones.
    pub(super) fn confirm(
        &mut self,
        output: NameId,
        cursor: u64,
        beyond: &[u64],
    ) -> (std::ops::Range<u64>, Vec<u64>) {
        let (from, confirmed) = self.by_output.entry(output).or_default();
        let range = *from..cursor.max(*from);
        let single = beyond
            .iter()
            .copied()
            .filter(|seq| !confirmed.contains(seq))
            .collect();
        *from = range.end;
        confirmed.clear();
        confirmed.extend(beyond);
        (range, single)
    }

    /// What a start found: nothing of it needs to be deleted again.
    pub(super) fn restore(&mut self, output: NameId, cursor: u64, beyond: &[u64]) {
        self.by_output
            .insert(output, (cursor, beyond.iter().copied().collect()));
    }
}

/// Which runs use which payload segment. A segment without any is dead.
#[derive(Debug, Default)]
pub struct PayloadUse {
    segments: BTreeMap<u32, SegmentUse>,
}

/// Use of one segment.
#[derive(Debug, Default)]
struct SegmentUse {
    runs: BTreeSet<u64>,
    end: u64,
}

/// Marks a number that stands for a dead letter, not for a run.
const LETTER: u64 = 1 << 63;

/// The number under which a dead letter owns payloads.
pub(super) fn letter_owner(route: NameId, seq: u64) -> u64 {
    LETTER | u64::from(route.0) << 40 | seq & ((1 << 40) - 1)
}

impl PayloadUse {
    /// Notes a use; gives the end of the segment's used part if the row must be written.
    pub(super) fn note(&mut self, at: &PayloadRef, owner: u64) -> Option<u64> {
        let segment = self.segments.entry(at.segment).or_default();
        let end = at.offset.saturating_add(u64::from(at.length));
        let grew = end > segment.end;
        segment.end = segment.end.max(end);
        (segment.runs.insert(owner) || grew).then_some(segment.end)
    }

    /// What a start found.
    pub(crate) fn restore(&mut self, segment: u32, owner: u64, end: u64) {
        let segment = self.segments.entry(segment).or_default();
        segment.runs.insert(owner);
        segment.end = segment.end.max(end);
    }

    /// Forgets all uses by an owner; gives the segments it had used.
    pub(crate) fn release(&mut self, owner: u64) -> Vec<u32> {
        self.segments
            .iter_mut()
            .filter_map(|(number, segment)| segment.runs.remove(&owner).then_some(*number))
            .collect()
    }

    /// Segments in use, and where their used part ends.
    pub fn used(&self) -> impl Iterator<Item = (u32, u64)> + '_ {
        self.segments
            .iter()
            .filter(|(_, segment)| !segment.runs.is_empty())
            .map(|(number, segment)| (*number, segment.end))
    }

    /// Whether a run uses the segment.
    pub fn is_used(&self, segment: u32) -> bool {
        self.segments
            .get(&segment)
            .is_some_and(|segment| !segment.runs.is_empty())
    }

    /// Forgets a segment that is gone.
    pub fn forget(&mut self, segment: u32) {
        self.segments.remove(&segment);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_found_where_it_was_put_for_years() {
        let mut places = KeyPlaces::default();
        for (n, at) in [
            (1u128, 0u64),
            (2, 8_191),
            (3, 8_192),
            (4, 1_700_000_000_000),
        ] {
            let key = KeyHash(n << 88 | 0x77);
            places.insert(key, Timestamp(at));
            let later = Timestamp(at + 3 * 365 * 86_400_000);
            assert_eq!(places.take(key, later), Some(at >> KEY_STEP), "{at}");
            assert_eq!(places.take(key, later), None, "it is gone");
        }
    }

    #[test]
    fn a_confirmation_deletes_once() {
        let mut places = OutboxPlaces::default();
        let output = NameId(1);
        assert_eq!(places.confirm(output, 1, &[3, 5]), (0..1, vec![3, 5]));
        assert_eq!(places.confirm(output, 1, &[3, 5, 6]), (1..1, vec![6]));
        assert_eq!(places.confirm(output, 4, &[5, 6]), (1..4, vec![]));
    }

    #[test]
    fn a_segment_is_used_until_its_last_run_goes() {
        let mut places = PayloadUse::default();
        let at = |offset| PayloadRef {
            segment: 2,
            offset,
            length: 10,
            checksum: 0,
        };
        assert_eq!(places.note(&at(4_096), 1), Some(4_106));
        assert_eq!(places.note(&at(0), 1), None, "known, and not further");
        assert_eq!(places.note(&at(0), 2), Some(4_106));
        assert_eq!(places.release(1), vec![2]);
        assert!(places.is_used(2));
        assert_eq!(places.release(2), vec![2]);
        assert!(!places.is_used(2));
        assert_eq!(places.used().count(), 0);
    }
}
