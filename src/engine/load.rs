//! Runs that are not resident and are needed: what is being read for whom, and whether what was read is still true.
//!
//! An ended run leaves memory. A request that needs one waits here, beside the turns, while its facts are read elsewhere. Invariant:
//! facts that were read before a turn changed the run are never adopted; they are read again.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

use crate::broker::outcome::Fact;
use crate::broker::types::RunSeq;
use crate::storage::{Read, StorageError};

/// What reading a run gave: its facts, `None` if there is no such run, or what is wrong with the store.
pub type RunFacts = Result<Option<Vec<Fact>>, String>;

/// Runs that were read.
pub type Loads = Vec<(RunSeq, RunFacts)>;

/// Reads all that adopting a run needs. Blocking.
pub fn read_run(reader: &dyn Read, run: RunSeq) -> RunFacts {
    let mut facts = Vec::new();
    let found: Result<bool, StorageError> = reader.run_facts(run, &mut |fact| facts.push(fact));
    match found {
        Ok(true) => Ok(Some(facts)),
        Ok(false) => Ok(None),
        Err(error) => Err(error.to_string()),
    }
}

/// The run that a fact changes.
#[must_use]
pub fn run_of(fact: &Fact) -> Option<RunSeq> {
    match fact {
        Fact::Run { run, .. } | Fact::Nodes { run, .. } | Fact::RunDeleted { run } => Some(*run),
        Fact::Node { node, .. } | Fact::Outcome { node, .. } => Some(node.run),
        _ => None,
    }
}

#[derive(Debug)]
enum Load {
    /// To be asked for when the turn is durable.
    Wanted,
    /// Being read; `stale` if a turn has changed the run since.
    Reading { stale: bool },
    /// Read, and no turn has changed the run since.
    Fresh(RunFacts),
}

/// See the head of the file.
#[derive(Debug, Default)]
pub(super) struct LoadTable {
    runs: BTreeMap<RunSeq, Load>,
}

impl LoadTable {
    /// Somebody needs the run.
    pub(super) fn want(&mut self, run: RunSeq) {
        self.runs.entry(run).or_insert(Load::Wanted);
    }

    /// The runs to be read now. What a later turn changes makes them stale.
    pub(super) fn begin(&mut self) -> Vec<RunSeq> {
        let mut begun = Vec::new();
        for (run, load) in &mut self.runs {
            if matches!(load, Load::Wanted) {
                *load = Load::Reading { stale: false };
                begun.push(*run);
            }
        }
        begun
    }

    /// A run was read.
    pub(super) fn arrived(&mut self, run: RunSeq, facts: RunFacts) {
        // Nobody waits for it any more: forget it.
        if let Entry::Occupied(mut entry) = self.runs.entry(run) {
            let stale = matches!(entry.get(), Load::Reading { stale: true });
            *entry.get_mut() = if stale {
                Load::Wanted
            } else {
                Load::Fresh(facts)
            };
        }
    }

    /// These facts were emitted: what was read of their runs is no longer true.
    pub(super) fn changed(&mut self, facts: &[Fact]) {
        if self.runs.is_empty() {
            return;
        }
        for run in facts.iter().filter_map(run_of) {
            match self.runs.get_mut(&run) {
                Some(Load::Reading { stale }) => *stale = true,
                Some(load @ Load::Fresh(_)) => *load = Load::Wanted,
                Some(Load::Wanted) | None => {}
            }
        }
    }

    /// What was read of the run, if it is here and still true.
    pub(super) fn fresh(&self, run: RunSeq) -> Option<&RunFacts> {
        match self.runs.get(&run) {
            Some(Load::Fresh(facts)) => Some(facts),
            _ => None,
        }
    }

    /// Forgets runs that nobody waits for.
    pub(super) fn keep_only(&mut self, mut wanted: impl FnMut(RunSeq) -> bool) {
        self.runs.retain(|run, _| wanted(*run));
    }

    /// Whether a run has been changed since it was read, so that it must be read again.
    pub(super) fn any_wanted(&self) -> bool {
        self.runs.values().any(|load| matches!(load, Load::Wanted))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RUN: RunSeq = RunSeq(7);

    fn deleted(run: u64) -> Fact {
        Fact::RunDeleted { run: RunSeq(run) }
    }

    #[test]
    fn what_was_read_before_a_change_is_read_again() {
        let mut table = LoadTable::default();
        table.want(RUN);
        // Changed in the turn that asked for it: it is read after that turn's commit, so it is true.
        table.changed(&[deleted(7)]);
        assert_eq!(table.begin(), [RUN]);
        assert_eq!(table.begin(), [], "asked for once");
        table.changed(&[deleted(8)]);
        table.arrived(RUN, Ok(None));
        assert_eq!(table.fresh(RUN), Some(&Ok(None)));

        // Changed after it was read.
        table.changed(&[deleted(7)]);
        assert_eq!(table.fresh(RUN), None);
        assert!(table.any_wanted());
        assert_eq!(table.begin(), [RUN]);

        // Changed while it is read.
        table.changed(&[deleted(7)]);
        table.arrived(RUN, Ok(None));
        assert_eq!(table.fresh(RUN), None);
        assert_eq!(table.begin(), [RUN]);
        table.arrived(RUN, Ok(None));
        assert!(table.fresh(RUN).is_some());
    }

    #[test]
    fn a_run_that_nobody_wants_is_forgotten() {
        let mut table = LoadTable::default();
        table.want(RUN);
        assert_eq!(table.begin(), [RUN]);
        table.keep_only(|run| run != RUN);
        table.arrived(RUN, Ok(None));
        assert!(table.runs.is_empty() && table.fresh(RUN).is_none());
    }
}
