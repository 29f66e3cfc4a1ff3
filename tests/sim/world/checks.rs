//! What must hold at the end, and every now and then before.

use super::*;

impl World {
    /// The broker's own recount, and that the store rebuilds the same broker.
    pub(super) fn check_engine(&mut self) {
        let Some(engine) = &self.engine else {
            return;
        };
        engine.broker().check_invariants();
        self.report.invariant_checks += 1;
        if self.options.early_ack {
            return;
        }
        let rebuilt = rebuild(&mut engine.store().crash());
        if rebuilt.fingerprint() != engine.broker().fingerprint() {
            let (memory, disk) = (engine.broker().fingerprint(), rebuilt.fingerprint());
            let mut lines = memory.lines().zip(disk.lines());
            let differ = lines.find(|(memory, disk)| memory != disk);
            self.violation(format!("rebuild: memory and disk differ: {differ:?}"));
        }
    }

    pub(super) fn check_all(&mut self) {
        self.check_engine();
        let reader = Arc::clone(&self.reader);
        for at in 0..self.jobs.len() {
            let Some(run) = self.jobs[at].done else {
                continue;
            };
            let Some(record) = reader.run(run.seq).unwrap() else {
                self.report.lost += 1;
                self.violation(format!("I1 {run} was acked and is not in the store"));
                continue;
            };
            let root = NodeKey::new(run.seq, record.root);
            let expected = self.programs[self.jobs[at].program].expected();
            match record.state {
                RunState::Cancelled | RunState::Running => {}
                RunState::Succeeded | RunState::Failed => {
                    let found = worker::value_of(&*reader, root);
                    if found != Some(expected) {
                        self.report.wrong_reads += 1;
                        let text = format!("{run} is {found:?}, expected {expected:?}");
                        self.violation(text);
                    }
                    if (record.state == RunState::Succeeded) != expected.is_some() {
                        self.violation(format!("{run} {:?}, expected {expected:?}", record.state));
                    }
                }
            }
            self.report.nodes += u64::from(record.n_nodes);
            let events = reader.events(run.seq, 0, 1_000_000).unwrap();
            let gapless = (events.iter().zip(1..)).all(|(event, n)| event.seq == n);
            if !gapless || (record.ended.is_some() && events.len() as u64 != record.n_events) {
                let n = events.len();
                self.violation(format!(
                    "I11 {run} has {n} events, says {}",
                    record.n_events
                ));
            }
        }
        self.check_journal();
        if let Some(engine) = &self.engine {
            self.report.commits += engine.store().disk().lock().unwrap().commits;
        }
    }

    /// What workers were told against what the store has: the outcome is that of the accepted attempt.
    pub(super) fn check_journal(&mut self) {
        let reader = Arc::clone(&self.reader);
        let mut newest: BTreeMap<NodeKey, Attempt> = BTreeMap::new();
        for ((node, _), attempt) in &self.applied {
            newest.insert(*node, *attempt);
        }
        for (node, attempt) in newest {
            let outcome = reader.outcome(node).unwrap();
            let left = outcome
                .as_ref()
                .and_then(|o| crate::program::Left::read(&o.payload));
            let by = match left {
                Some(
                    crate::program::Left::Value { attempt, .. }
                    | crate::program::Left::Structure { attempt, .. }
                    | crate::program::Left::Error { attempt, .. },
                ) => attempt,
                // A tail call leaves no bytes.
                _ => continue,
            };
            let excused = self
                .maybe
                .iter()
                .any(|(of, later)| *of == node && *later > attempt);
            if by < u64::from(attempt.0) || (by > u64::from(attempt.0) && !excused) {
                let text = format!("I1 {node}: #{} was acked, #{by} is stored", attempt.0);
                self.report.lost += 1;
                self.violation(text);
            }
        }
    }
}
