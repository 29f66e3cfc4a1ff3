//! Deliveries that are owed to outputs, until they are confirmed (G14).
//!
//! A delivery is owed by the commit in which the outcome settles, and leaves only after its confirmation. Confirmations may come in
//! any order; the cursor never passes one that is missing (I13).

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::World;
use super::command::{Code, Rejection};
use super::outcome::{Effect, Fact, Tx};
use super::run::Run;
use super::types::{NameId, RunSeq};

/// All outputs.
#[derive(Debug, Default)]
pub(super) struct Outboxes {
    by_output: BTreeMap<NameId, Outbox>,
    /// How many deliveries a run still owes.
    owed: BTreeMap<RunSeq, u32>,
    /// Outputs that got something in this command.
    grew: BTreeSet<NameId>,
    pub n_pending: u64,
}

/// One output.
#[derive(Debug)]
pub(super) struct Outbox {
    pub next: u64,
    pub cursor: u64,
    pub confirmed: BTreeSet<u64>,
    pub pending: BTreeMap<u64, RunSeq>,
}

impl Default for Outbox {
    fn default() -> Self {
        Self {
            next: 1,
            cursor: 1,
            confirmed: BTreeSet::new(),
            pending: BTreeMap::new(),
        }
    }
}

impl Outboxes {
    pub(super) fn get(&self, output: NameId) -> Option<&Outbox> {
        self.by_output.get(&output)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (NameId, &Outbox)> {
        self.by_output.iter().map(|(id, outbox)| (*id, outbox))
    }

    /// Whether a run still owes something.
    pub(super) fn owes(&self, run: RunSeq) -> bool {
        self.owed.contains_key(&run)
    }

    pub(super) fn absorb_owed(&mut self, output: NameId, seq: u64, run: RunSeq) {
        let outbox = self.by_output.entry(output).or_default();
        outbox.next = outbox.next.max(seq.saturating_add(1));
        if seq < outbox.cursor || outbox.confirmed.contains(&seq) {
            return;
        }
        if outbox.pending.insert(seq, run).is_none() {
            *self.owed.entry(run).or_default() += 1;
            self.n_pending += 1;
        }
    }

    pub(super) fn absorb_confirmed(&mut self, output: NameId, cursor: u64, beyond: &[u64]) {
        let outbox = self.by_output.entry(output).or_default();
        outbox.cursor = cursor;
        outbox.confirmed = beyond.iter().copied().collect();
        let highest = beyond
            .last()
            .map_or(cursor, |last| cursor.max(last.saturating_add(1)));
        outbox.next = outbox.next.max(highest);
        let rest = outbox.pending.split_off(&cursor);
        let mut settled = std::mem::replace(&mut outbox.pending, rest);
        for seq in beyond {
            if let Some(run) = outbox.pending.remove(seq) {
                settled.insert(*seq, run);
            }
        }
        self.n_pending -= settled.len() as u64;
        for run in settled.into_values() {
            let left = self.owed.get_mut(&run).map_or(0, |n| {
                *n -= 1;
                *n
            });
            if left == 0 {
                self.owed.remove(&run);
            }
        }
    }

    pub(super) fn check(&self) {
        let mut owed: BTreeMap<RunSeq, u32> = BTreeMap::new();
        let mut n = 0;
        for outbox in self.by_output.values() {
            assert!(outbox.cursor <= outbox.next, "I13 the cursor is not ahead");
            for seq in outbox.cursor..outbox.next {
                assert!(
                    outbox.pending.contains_key(&seq) != outbox.confirmed.contains(&seq),
                    "I13 delivery {seq} is pending or confirmed"
                );
            }
            let kept = outbox.pending.keys().chain(&outbox.confirmed);
            assert!(
                kept.copied()
                    .all(|seq| seq >= outbox.cursor && seq < outbox.next),
                "I13 nothing is kept before the cursor"
            );
            for run in outbox.pending.values() {
                *owed.entry(*run).or_default() += 1;
                n += 1;
            }
        }
        assert_eq!(owed, self.owed, "I12 deliveries by run");
        assert_eq!(n, self.n_pending, "I12 deliveries in all");
    }
}

impl World {
    /// The outcome of a node is owed to an output.
    pub(super) fn owe(&mut self, tx: &mut Tx, run: &Run, node: u32, output: &Arc<str>) {
        let output = self.intern_name(tx, output);
        let seq = self.outboxes.get(output).map_or(1, |outbox| outbox.next);
        let at = self.now;
        self.put(
            tx,
            Fact::Outbox {
                output,
                seq,
                node: run.key(node),
                salt: run.record.salt,
                round: run.record.round,
                at,
            },
        );
        self.outboxes.grew.insert(output);
    }

    /// Tells the outputs that got something.
    pub(super) fn announce_growth(&mut self, tx: &mut Tx) {
        while let Some(output) = self.outboxes.grew.pop_first() {
            if let Some(output) = self.names.get(output) {
                tx.effects.push(Effect::OutboxGrew {
                    output: Arc::clone(output),
                });
            }
        }
    }

    pub(super) fn on_confirm_outbox(
        &mut self,
        tx: &mut Tx,
        output: &str,
        seqs: &[u64],
    ) -> Result<(), Rejection> {
        let known = self
            .names
            .find(output)
            .and_then(|id| Some((id, self.outboxes.get(id)?)));
        let Some((id, outbox)) = known else {
            return Err(Rejection::new(
                Code::UnknownName,
                format!("output {output:?} owes nothing"),
            ));
        };
        if let Some(seq) = seqs.iter().find(|seq| **seq == 0 || **seq >= outbox.next) {
            return Err(Rejection::new(
                Code::InvalidRequest,
                format!("delivery {seq} of output {output:?} was never owed"),
            ));
        }
        let fresh: BTreeSet<u64> = seqs
            .iter()
            .filter(|seq| outbox.pending.contains_key(seq))
            .copied()
            .collect();
        if fresh.is_empty() {
            return Ok(());
        }
        let cursor = outbox
            .pending
            .keys()
            .find(|seq| !fresh.contains(seq))
            .map_or(outbox.next, |seq| *seq);
        let beyond = outbox
            .confirmed
            .union(&fresh)
            .copied()
            .filter(|seq| *seq >= cursor)
            .collect();
        self.put(
            tx,
            Fact::OutboxConfirmed {
                output: id,
                cursor,
                beyond,
            },
        );
        Ok(())
    }

    /// Intake waits while the outbox is nearly full; completions never do.
    pub(super) fn check_outbox(&self) -> Result<(), Rejection> {
        let limit = self.settings.max_outbox;
        if !self.settings.outputs.is_empty()
            && self.outboxes.n_pending >= limit.saturating_mul(8) / 10
        {
            return Err(Rejection::new(
                Code::OutboxFull,
                format!(
                    "{} deliveries are pending of at most {limit}: see whether their receivers are up",
                    self.outboxes.n_pending
                ),
            ));
        }
        Ok(())
    }
}
