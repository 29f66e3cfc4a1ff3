//! What must hold at the end, and every now and then before.

use dagorama::broker::types::{BodyEnd, NodeIndex};

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
        let memory = engine.broker().fingerprint();
        // Rebuilt at the time of the broker's latest command: what was not due then must not be due in the rebuild.
        let now = memory
            .strip_prefix("now ")
            .and_then(|rest| rest.split_once(' '));
        let now = now.and_then(|(now, _)| now.parse().ok());
        let now = Timestamp(now.expect("a fingerprint begins with the time"));
        let disk = rebuild(&mut engine.store().crash(), now).fingerprint();
        if memory != disk {
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
                RunState::Running => self.violation(format!("{run} ended and runs")),
                RunState::Cancelled => {}
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

    /// Nothing is left over; and retention takes everything, whole, but for the keys (G15).
    pub(super) fn expire_all(&mut self) {
        if self.options.early_ack || !self.report.violations.is_empty() {
            return;
        }
        let runs: Vec<RunSeq> = (self.jobs.iter())
            .filter_map(|job| job.done)
            .map(|run| run.seq)
            .collect();
        let mut disk = self.disk.lock().unwrap();
        disk.pressure = Pressure::None;
        disk.fate = Fate::Works;
        drop(disk);
        let Some(engine) = &mut self.engine else {
            return;
        };
        let mut turn = Turn {
            now: self.latest,
            wall: WallTime(self.calendar + self.now),
            seed: 1,
        };
        let Some(Answer::Totals(totals)) = engine.ask(turn, Ticket(0), Query::Totals) else {
            panic!("totals are always there");
        };
        let left = [
            totals.open_runs,
            totals.open_nodes,
            totals.ready_nodes,
            totals.leases,
        ];
        let request = |command| Request {
            ticket: Some(Ticket(1)),
            command,
        };
        let mut requests = vec![request(Command::Expire(runs.clone()))];
        for _ in 0..1_000 {
            turn.now = turn.now.after_ms(1);
            engine.turn(turn, requests).expect("a turn without faults");
            requests = Vec::new();
            if engine.due_in(turn.now, turn.wall) != Some(0) {
                break;
            }
        }
        let job = &self.jobs[0];
        let program = &self.programs[job.program];
        let again = Submission {
            key: Some(job.key),
            specs: worker::specs(),
            nodes: program.new_nodes(job.program as u64, &program.top),
            root: program.root as u32,
            tags: BTreeMap::new(),
            origin: None,
        };
        let output = engine
            .turn(turn, vec![request(Command::Submit(vec![again]))])
            .expect("a turn without faults");
        let reply = output.replies.into_iter().next().map(|(_, reply)| reply);
        let expired = matches!(
            &reply,
            Some(Reply::Submitted(list)) if matches!(&list[0], Err(no) if no.code == Code::RunExpired)
        );
        if left != [0; 4] {
            self.violation(format!("left over at the end: {totals:?}"));
        }
        if !expired {
            self.violation(format!("G11 the key of a deleted run got {reply:?}"));
        }
        for run in runs {
            let kept = self.reader.run(run).unwrap().is_some()
                || self
                    .reader
                    .node(NodeKey::new(run, NodeIndex(0)))
                    .unwrap()
                    .is_some();
            if kept {
                self.violation(format!("G15 run {:x} was not deleted", run.0));
            }
        }
        self.check_engine();
    }

    /// What workers were told against what the store has: the outcome is that of the accepted attempt.
    pub(super) fn check_journal(&mut self) {
        let reader = Arc::clone(&self.reader);
        let mut newest: BTreeMap<NodeKey, Attempt> = BTreeMap::new();
        for ((node, _), attempt) in &self.applied {
            newest.insert(*node, *attempt);
        }
        for (node, attempt) in newest {
            let record = reader.node(node).unwrap();
            if record.is_some_and(|record| matches!(record.body, BodyEnd::Tail(_))) {
                // A tail call leaves no bytes of its own.
                continue;
            }
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
                other => {
                    self.violation(format!("I1 {node} was acked, {other:?} is stored"));
                    continue;
                }
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
