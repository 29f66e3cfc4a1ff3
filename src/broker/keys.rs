//! Submission keys and dedup keys: what has been submitted already (G11, G12).
//!
//! A key that belongs to a run is kept as long as the run, and at least for the dedup window; it is never evicted early. When
//! retention deletes the run within the window, the key is written again with content 0, which no submission has: *expired*. It
//! still names the run, so that a repetition is refused instead of starting it anew.

use std::collections::{BTreeMap, BTreeSet};

use super::World;
use super::command::{Code, Rejection};
use super::outcome::{Fact, Tx};
use super::types::{KeyHash, RunId, RunSeq, Timestamp};

/// Content of a key whose run was deleted.
const EXPIRED: u64 = 0;
/// Content of a key whose messages are not compared: the queue vouches for them.
pub(super) const ANY: u64 = 1;

/// All keys held.
#[derive(Debug, Default)]
pub(super) struct Keys {
    table: BTreeMap<KeyHash, Entry>,
    /// Keys of runs that are kept.
    by_run: BTreeSet<(RunSeq, KeyHash)>,
    /// The others, by age.
    loose: BTreeSet<(Timestamp, KeyHash)>,
}

/// A key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Entry {
    run: Option<RunId>,
    content: u64,
    at: Timestamp,
}

impl Entry {
    /// The run it started; `None` if its message died.
    pub(super) fn run(&self) -> Option<RunId> {
        self.run
    }

    /// Whether its run was deleted.
    pub(super) fn is_expired(&self) -> bool {
        self.run.is_some() && self.content == EXPIRED
    }

    /// Whether that is what was submitted with it.
    pub(super) fn is_of(&self, content: u64) -> bool {
        self.run.is_some() && self.content == normal(content)
    }

    fn is_loose(&self) -> bool {
        self.run.is_none() || self.is_expired()
    }
}

/// 0 has a meaning of its own, so a hash that happens to be 0 becomes 1.
pub(super) fn normal(content: u64) -> u64 {
    content.max(1)
}

impl Keys {
    pub(super) fn get(&self, key: KeyHash) -> Option<&Entry> {
        self.table.get(&key)
    }

    pub(super) fn len(&self) -> usize {
        self.table.len()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (&KeyHash, &Entry)> {
        self.table.iter()
    }

    pub(super) fn absorb(&mut self, key: KeyHash, run: Option<RunId>, content: u64, at: Timestamp) {
        self.remove(key);
        let entry = Entry { run, content, at };
        self.table.insert(key, entry);
        match run {
            Some(run) if !entry.is_loose() => {
                self.by_run.insert((run.seq, key));
            }
            _ => {
                self.loose.insert((at, key));
            }
        }
    }

    pub(super) fn remove(&mut self, key: KeyHash) {
        if let Some(entry) = self.table.remove(&key) {
            self.loose.remove(&(entry.at, key));
            if let Some(run) = entry.run {
                self.by_run.remove(&(run.seq, key));
            }
        }
    }

    fn of_run(&self, run: RunSeq) -> Vec<(KeyHash, Entry)> {
        self.by_run
            .range((run, KeyHash(0))..=(run, KeyHash(u128::MAX)))
            .map(|(_, key)| (*key, self.table[key]))
            .collect()
    }

    /// When keys should be forgotten: a little after the first may be, so that many go at once.
    pub(super) fn next_deadline(&self, window_ms: u64) -> Option<Timestamp> {
        let (at, _) = self.loose.first()?;
        let patience = (window_ms / 16).min(60_000);
        Some(at.after_ms(window_ms).after_ms(patience))
    }

    pub(super) fn check(&self) {
        for (key, entry) in &self.table {
            let bound = entry
                .run
                .is_some_and(|run| self.by_run.contains(&(run.seq, *key)));
            let loose = self.loose.contains(&(entry.at, *key));
            assert_eq!(bound, !entry.is_loose(), "I18 keys by run");
            assert_eq!(loose, entry.is_loose(), "I18 keys by age");
        }
        assert_eq!(
            self.by_run.len() + self.loose.len(),
            self.table.len(),
            "I18 no key is indexed twice"
        );
    }
}

impl World {
    /// Whether `n` more keys fit.
    pub(super) fn check_room_for_keys(&self, n: usize) -> Result<(), Rejection> {
        let limit = self.settings.max_keys;
        if n > 0 && self.keys.len() + n > limit {
            return Err(Rejection::new(
                Code::InboxWindowFull,
                format!(
                    "{limit} keys are held, which is the limit: wait until the oldest leave the dedup window"
                ),
            ));
        }
        Ok(())
    }

    pub(super) fn take_key(&mut self, tx: &mut Tx, key: KeyHash, run: Option<RunId>, content: u64) {
        let at = self.now;
        self.put(
            tx,
            Fact::Key {
                key,
                run,
                content: normal(content),
                at,
            },
        );
    }

    /// A run was deleted: its keys go with it if their window is over, and say so if it is not.
    pub(super) fn expire_keys_of(&mut self, tx: &mut Tx, run: RunSeq) {
        let mut over = Vec::new();
        for (key, entry) in self.keys.of_run(run) {
            if entry.at.after_ms(self.settings.dedup_window_ms) <= self.now {
                over.push(key);
            } else {
                self.put(
                    tx,
                    Fact::Key {
                        key,
                        run: entry.run,
                        content: EXPIRED,
                        at: entry.at,
                    },
                );
            }
        }
        if !over.is_empty() {
            self.put(tx, Fact::KeysExpired { keys: over });
        }
    }

    /// Forgets keys whose window is over and whose run is not kept.
    pub(super) fn expire_keys(&mut self, tx: &mut Tx, budget: &mut usize) {
        let window = self.settings.dedup_window_ms;
        let keys: Vec<KeyHash> = self
            .keys
            .loose
            .iter()
            .take_while(|(at, _)| at.after_ms(window) <= self.now)
            .take(*budget)
            .map(|(_, key)| *key)
            .collect();
        *budget -= keys.len();
        if !keys.is_empty() {
            self.put(tx, Fact::KeysExpired { keys });
        }
    }
}
