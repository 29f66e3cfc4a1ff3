//! The model of the suite, and the script that it follows: plausible turns of a broker.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;

use super::filled;
use crate::broker::outcome::{CreatedNode, DeadLetterRecord, Fact};
use crate::broker::types::*;
use crate::storage::{Arguments, EventRecord, OutboxRecord, Outcome};

/// All that was committed.
#[derive(Debug, Default)]
pub(super) struct Model {
    pub(super) runs: BTreeMap<RunSeq, ModelRun>,
    pub(super) specs: BTreeMap<SpecId, Arc<Spec>>,
    pub(super) names: BTreeMap<NameId, Arc<str>>,
    pub(super) announced: BTreeMap<Arc<str>, SpecId>,
    pub(super) keys: BTreeMap<KeyHash, (Option<RunId>, u64, Timestamp)>,
    pub(super) positions: BTreeMap<(NameId, Arc<str>), (u32, u64)>,
    pub(super) outbox: BTreeMap<(NameId, u64), OutboxRecord>,
    pub(super) cursors: BTreeMap<NameId, (u64, Vec<u64>)>,
    pub(super) letters: BTreeMap<(NameId, u64), DeadLetterRecord>,
    pub(super) last_letters: BTreeMap<NameId, u64>,
    pub(super) stored: BTreeMap<PayloadRef, Bytes>,
    pub(super) latest: Timestamp,
}

#[derive(Debug, Clone)]
pub(super) struct ModelRun {
    pub(super) record: RunRecord,
    pub(super) nodes: Vec<ModelNode>,
    pub(super) events: Vec<EventRecord>,
    /// Number of the latest event, also where the events themselves are not known.
    latest_event: u64,
}

#[derive(Debug, Clone)]
pub(super) struct ModelNode {
    pub(super) record: NodeRecord,
    event: u64,
    pub(super) arguments: Arguments,
    pub(super) outcome: Option<Outcome>,
}

impl ModelNode {
    pub(super) fn payloads(&self) -> impl Iterator<Item = &Payload> {
        let outcome = self.outcome.as_ref().map(|o| &o.payload);
        std::iter::once(&self.arguments.payload).chain(outcome)
    }
}

impl ModelRun {
    /// Equal in all that a start tells.
    pub(super) fn assert_same_graph(&self, other: &Self, run: RunSeq) {
        assert_eq!(self.record, other.record, "{run:?}");
        assert_eq!(self.nodes.len(), other.nodes.len(), "{run:?}");
        assert_eq!(self.latest_event, other.latest_event, "{run:?}");
        for (n, (a, b)) in self.nodes.iter().zip(&other.nodes).enumerate() {
            assert_eq!(a.record, b.record, "{run:?}/{n}");
            assert_eq!(a.arguments.inputs, b.arguments.inputs, "{run:?}/{n}");
            if a.record.body == BodyEnd::Structure {
                let references =
                    |node: &ModelNode| node.outcome.as_ref().map(|o| o.references.clone());
                assert_eq!(references(a), references(b), "{run:?}/{n}");
            }
        }
    }
}

impl Model {
    pub(super) fn open_nodes(&self) -> u64 {
        let open = self.runs.values().filter(|r| r.record.ended.is_none());
        open.map(|r| r.nodes.len() as u64).sum()
    }

    /// Compares what must be resident after a start.
    pub(super) fn assert_resident_equal(&self, found: &Self, turn: usize) {
        assert_eq!(self.specs, found.specs, "turn {turn}");
        assert_eq!(self.names, found.names, "turn {turn}");
        assert_eq!(self.announced, found.announced, "turn {turn}");
        assert_eq!(self.keys, found.keys, "turn {turn}");
        assert_eq!(self.positions, found.positions, "turn {turn}");
        assert_eq!(self.outbox, found.outbox, "turn {turn}");
        assert_eq!(self.cursors, found.cursors, "turn {turn}");
        assert_eq!(self.letters, found.letters, "turn {turn}");
        assert_eq!(self.last_letters, found.last_letters, "turn {turn}");
        for (run, known) in &self.runs {
            if known.record.ended.is_none() {
                let found = found.runs.get(run);
                let found = found.unwrap_or_else(|| panic!("turn {turn}: {run:?} is missing"));
                known.assert_same_graph(found, *run);
            }
        }
        for (run, found) in &found.runs {
            if found.record.ended.is_none() {
                assert!(
                    self.runs.contains_key(run),
                    "turn {turn}: {run:?} came back"
                );
            }
        }
    }

    pub(super) fn apply(&mut self, facts: &[Fact]) {
        for fact in facts {
            self.fact(fact.clone());
        }
    }

    fn fact(&mut self, fact: Fact) {
        match fact {
            Fact::Spec { id, spec } => drop(self.specs.insert(id, spec)),
            Fact::Name { id, name } => drop(self.names.insert(id, name)),
            Fact::Announced { action, spec } => drop(self.announced.insert(action, spec)),
            Fact::Run { run, record } => {
                let known = self.runs.entry(run).or_insert_with(|| ModelRun {
                    record: record.clone(),
                    nodes: Vec::new(),
                    events: Vec::new(),
                    latest_event: 0,
                });
                known.record = record;
            }
            Fact::Nodes {
                run,
                first,
                parent,
                round,
                event,
                nodes,
            } => {
                // A run that ended or was deleted later in the log is not told from its beginning.
                let Some(known) = self.runs.get_mut(&run) else {
                    return;
                };
                for (created, n) in nodes.into_iter().zip(0u32..) {
                    let at = (first.0 + n) as usize;
                    let node = ModelNode {
                        record: NodeRecord {
                            spec: created.spec,
                            parent,
                            round,
                            progress: Progress::Open,
                            body: BodyEnd::Plain,
                            attempt: Attempt(0),
                            failures: 0,
                            losses: 0,
                            not_before: created.not_before,
                            not_before_wall: created.not_before_wall,
                            digest: 0,
                            cause: None,
                            note: Note::None,
                        },
                        event: event + u64::from(n),
                        arguments: Arguments {
                            payload: created.arguments,
                            inputs: created.inputs,
                        },
                        outcome: None,
                    };
                    assert!(at <= known.nodes.len(), "nodes come in order");
                    if at == known.nodes.len() {
                        known.nodes.push(node);
                    } else {
                        known.nodes[at] = node;
                    }
                    known.events.push(EventRecord {
                        seq: event + u64::from(n),
                        at: self.latest,
                        node: NodeIndex(at as u32),
                        state: "created",
                        attempt: 0,
                        note: Note::None,
                    });
                    known.latest_event = known.latest_event.max(event + u64::from(n));
                }
            }
            Fact::Node {
                node,
                event,
                record,
            } => {
                let Some(known) = self.runs.get_mut(&node.run) else {
                    return;
                };
                known.latest_event = known.latest_event.max(event);
                known.events.push(EventRecord {
                    seq: event,
                    at: self.latest,
                    node: node.node,
                    state: word(&record),
                    attempt: record.attempt.0,
                    note: record.note,
                });
                let node = &mut known.nodes[node.node.0 as usize];
                node.record = record;
                node.event = event;
            }
            Fact::Outcome {
                node,
                is_error,
                payload,
                references,
            } => {
                if let Some(known) = self.runs.get_mut(&node.run) {
                    known.nodes[node.node.0 as usize].outcome = Some(Outcome {
                        is_error,
                        payload,
                        references,
                    });
                }
            }
            Fact::Key {
                key,
                run,
                content,
                at,
            } => drop(self.keys.insert(key, (run, content, at))),
            Fact::KeysExpired { keys } => self.keys.retain(|key, _| !keys.contains(key)),
            Fact::Position {
                route,
                partition,
                epoch,
                next,
            } => drop(self.positions.insert((route, partition), (epoch, next))),
            Fact::Outbox {
                output,
                seq,
                node,
                salt,
                round,
                at,
            } => {
                let record = OutboxRecord {
                    seq,
                    node,
                    salt,
                    round,
                    at,
                };
                self.outbox.insert((output, seq), record);
            }
            Fact::OutboxConfirmed {
                output,
                cursor,
                beyond,
            } => {
                self.outbox
                    .retain(|(o, seq), _| *o != output || *seq >= cursor && !beyond.contains(seq));
                self.cursors.insert(output, (cursor, beyond));
            }
            Fact::DeadLetter { route, seq, letter } => {
                let last = self.last_letters.entry(route).or_default();
                *last = seq.max(*last);
                self.letters.insert((route, seq), *letter);
            }
            Fact::DeadLetterRemoved { route, seq } => {
                let last = self.last_letters.entry(route).or_default();
                *last = seq.max(*last);
                self.letters.remove(&(route, seq));
            }
            Fact::RunDeleted { run } => drop(self.runs.remove(&run)),
        }
    }
}

fn word(record: &NodeRecord) -> &'static str {
    let state = match record.progress {
        Progress::Open if record.note == Note::Reopened => NodeState::Waiting,
        Progress::Open => NodeState::Ready,
        Progress::Leased { .. } => NodeState::Leased,
        Progress::Backoff => NodeState::Backoff,
        Progress::Settling => NodeState::Settling,
        Progress::Succeeded => NodeState::Succeeded,
        Progress::Failed => NodeState::Failed,
        Progress::Skipped => NodeState::Skipped,
    };
    state.as_str()
}

/// Makes up turns.
pub(super) struct Script {
    state: u64,
    pub(super) now: Timestamp,
    pub(super) next_run: u64,
    next_seq: [u64; 2],
    next_letter: [u64; 2],
    next_spec: u32,
}

type Write<'a> = &'a mut dyn FnMut(Bytes) -> PayloadRef;

impl Script {
    pub(super) fn new(seed: u64) -> Self {
        Self {
            state: seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1,
            now: Timestamp(1_000),
            next_run: 1,
            next_seq: [1; 2],
            next_letter: [1; 2],
            next_spec: 0,
        }
    }

    pub(super) fn dice(&mut self, n: u64) -> u64 {
        self.state ^= self.state << 13;
        self.state ^= self.state >> 7;
        self.state ^= self.state << 17;
        (self.state >> 11) % n
    }

    /// The facts of a turn, never none.
    pub(super) fn turn(&mut self, model: &mut Model, write: Write<'_>) -> Vec<Fact> {
        self.now.0 += self.dice(5_000);
        model.latest = self.now;
        let mut facts = Vec::new();
        // The steps of a turn see each other, so they go into a copy of the runs they touch.
        let mut view = Model {
            runs: model.runs.clone(),
            latest: self.now,
            ..Model::default()
        };
        for _ in 0..=self.dice(6) {
            let before = facts.len();
            self.step(model, &view, write, &mut facts);
            view.apply(&facts[before..]);
        }
        if facts.is_empty() {
            facts.push(Fact::Name {
                id: NameId(self.dice(3) as u32),
                name: format!("name {}", self.dice(9)).into(),
            });
        }
        facts
    }

    fn step(&mut self, model: &mut Model, view: &Model, write: Write<'_>, facts: &mut Vec<Fact>) {
        match self.dice(24) {
            0..=2 => self.submit(&mut model.stored, write, facts),
            3 => self.children(&mut model.stored, view, write, facts),
            4..=13 => self.transition(&mut model.stored, view, write, facts),
            14 => self.end_or_resume(view, facts),
            15 => {
                let old = view.runs.iter().find(|(_, r)| r.record.ended.is_some());
                if let (Some((run, _)), 0) = (old, self.dice(2)) {
                    facts.push(Fact::RunDeleted { run: *run });
                }
            }
            16 => {
                self.next_spec += 1;
                let spec = Spec {
                    action: format!("action {}", self.next_spec % 5).into(),
                    queue: "q".into(),
                    taint: None,
                    priority: 3,
                    retry: Retry::default(),
                    timeout_ms: None,
                    fingerprint: Some("f".repeat(self.dice(5_000) as usize).into()),
                    pin_code: false,
                    batch: None,
                    by_name: false,
                };
                facts.push(Fact::Announced {
                    action: Arc::clone(&spec.action),
                    spec: SpecId(self.next_spec),
                });
                facts.push(Fact::Spec {
                    id: SpecId(self.next_spec),
                    spec: Arc::new(spec),
                });
            }
            17 | 18 => {
                let high = u128::from(self.dice(u64::MAX)) << 64;
                facts.push(Fact::Key {
                    key: KeyHash(high | u128::from(self.dice(u64::MAX))),
                    run: (self.dice(3) > 0).then_some(RunId {
                        seq: RunSeq(4),
                        salt: 5,
                    }),
                    content: self.dice(9),
                    at: self.now,
                });
            }
            19 => {
                let keys = model.keys.keys().copied().collect::<Vec<_>>();
                let keys: Vec<_> = keys.into_iter().filter(|_| self.dice(3) == 0).collect();
                facts.push(Fact::KeysExpired { keys });
            }
            20 => facts.push(Fact::Position {
                route: NameId(self.dice(2) as u32),
                partition: format!("topic/{}", self.dice(4)).into(),
                epoch: 1,
                next: self.dice(1 << 40),
            }),
            21 => {
                let output = self.dice(2) as u32;
                let seq = &mut self.next_seq[output as usize];
                let at = self.now;
                facts.push(Fact::Outbox {
                    output: NameId(output),
                    seq: *seq,
                    node: NodeKey::new(RunSeq(1), NodeIndex(0)),
                    salt: 3,
                    round: 1,
                    at,
                });
                *seq += 1;
            }
            22 => {
                let output = self.dice(2) as usize;
                let id = NameId(output as u32);
                let (cursor, _) = model.cursors.get(&id).cloned().unwrap_or((1, vec![]));
                let next = self.next_seq[output];
                let cursor = cursor + self.dice(next - cursor + 1);
                let beyond = (cursor + 1..next).filter(|_| self.dice(3) == 0).collect();
                // Within a turn cursors may be told twice; they never go back.
                let told = facts
                    .iter()
                    .any(|f| matches!(f, Fact::OutboxConfirmed { .. }));
                if !told {
                    facts.push(Fact::OutboxConfirmed {
                        output: id,
                        cursor,
                        beyond,
                    });
                }
            }
            _ => self.dead_letter(model, write, facts),
        }
    }

    fn payload(&mut self, stored: &mut BTreeMap<PayloadRef, Bytes>, write: Write<'_>) -> Payload {
        let n = self.dice(250) as u8;
        let body = match self.dice(12) {
            0 => {
                let bytes = filled(n, 3_073 + self.dice(20_000) as usize);
                let at = write(bytes.clone());
                stored.insert(at, bytes);
                Body::Stored(at)
            }
            1 => Body::Inline(filled(n, 3_072)),
            _ => Body::Inline(filled(n, self.dice(80) as usize)),
        };
        Payload {
            codec: Codec::Json,
            body,
        }
    }

    fn ranges(&mut self, below: u32) -> Vec<InputRange> {
        if below == 0 || self.dice(3) > 0 {
            return Vec::new();
        }
        let count = if self.dice(12) == 0 {
            600
        } else {
            1 + self.dice(3)
        };
        (0..count)
            .map(|_| InputRange {
                first: NodeIndex(self.dice(u64::from(below)) as u32),
                count: 1,
                mode: InputUse::Value,
            })
            .collect()
    }

    fn created(
        &mut self,
        first: u32,
        stored: &mut BTreeMap<PayloadRef, Bytes>,
        write: Write<'_>,
    ) -> Vec<CreatedNode> {
        let count = if self.dice(10) == 0 {
            40
        } else {
            1 + self.dice(4) as u32
        };
        (0..count)
            .map(|n| CreatedNode {
                spec: SpecId(self.dice(3) as u32),
                arguments: self.payload(stored, write),
                inputs: self.ranges(first + n),
                not_before: Timestamp(self.dice(2) * 77),
                not_before_wall: WallTime(0),
            })
            .collect()
    }

    fn submit(
        &mut self,
        stored: &mut BTreeMap<PayloadRef, Bytes>,
        write: Write<'_>,
        facts: &mut Vec<Fact>,
    ) {
        let run = RunSeq(self.next_run);
        self.next_run += 1 + self.dice(2) * self.dice(2);
        // The numbers left out were never given, so only the one after the last counts.
        self.next_run = run.0 + 1;
        let nodes = self.created(0, stored, write);
        let long = if self.dice(9) == 0 { 9_000 } else { 3 };
        facts.push(Fact::Run {
            run,
            record: RunRecord {
                salt: self.dice(u64::MAX),
                root: NodeIndex(0),
                round: 1,
                cancelled: false,
                cancel_reason: "".into(),
                tags: [("tag".to_owned(), "x".repeat(long))].into(),
                source: "native".into(),
                created: self.now,
                created_wall: WallTime(7),
                ended: None,
                state: RunState::Running,
                key: None,
                n_nodes: nodes.len() as u32,
                n_events: nodes.len() as u64,
            },
        });
        facts.push(Fact::Nodes {
            run,
            first: NodeIndex(0),
            parent: None,
            round: 1,
            event: 1,
            nodes,
        });
    }

    fn open_run(&mut self, view: &Model) -> Option<RunSeq> {
        let open: Vec<_> = view
            .runs
            .iter()
            .filter(|(_, run)| run.record.ended.is_none())
            .map(|(run, _)| *run)
            .collect();
        let count = open.len() as u64;
        (count > 0).then(|| open[self.dice(count) as usize])
    }

    fn children(
        &mut self,
        stored: &mut BTreeMap<PayloadRef, Bytes>,
        view: &Model,
        write: Write<'_>,
        facts: &mut Vec<Fact>,
    ) {
        let Some(run) = self.open_run(view) else {
            return;
        };
        let known = &view.runs[&run];
        let first = known.nodes.len() as u32;
        let nodes = self.created(first, stored, write);
        facts.push(Fact::Nodes {
            run,
            first: NodeIndex(first),
            parent: Some(NodeIndex(self.dice(u64::from(first)) as u32)),
            round: known.record.round,
            event: known.latest_event + 1,
            nodes,
        });
    }

    fn transition(
        &mut self,
        stored: &mut BTreeMap<PayloadRef, Bytes>,
        view: &Model,
        write: Write<'_>,
        facts: &mut Vec<Fact>,
    ) {
        let Some(run) = self.open_run(view) else {
            return;
        };
        let known = &view.runs[&run];
        let index = self.dice(known.nodes.len() as u64) as u32;
        let node = NodeKey::new(run, NodeIndex(index));
        let mut record = known.nodes[index as usize].record.clone();
        record.note = Note::None;
        match self.dice(5) {
            0 | 1 => {
                record.attempt.0 += 1;
                record.progress = Progress::Leased {
                    session: SessionId(self.dice(3) << 50),
                };
            }
            2 => {
                record.progress = Progress::Succeeded;
                record.body = BodyEnd::Plain;
                record.digest = self.dice(u64::MAX);
                facts.push(Fact::Outcome {
                    node,
                    is_error: false,
                    payload: self.payload(stored, write),
                    references: vec![],
                });
            }
            3 => {
                record.progress = Progress::Settling;
                record.body = BodyEnd::Structure;
                facts.push(Fact::Outcome {
                    node,
                    is_error: false,
                    payload: self.payload(stored, write),
                    references: self.ranges(index),
                });
            }
            _ => {
                record.progress = Progress::Backoff;
                record.body = BodyEnd::Plain;
                record.failures += 1;
                record.note = Note::AttemptFailed;
                facts.push(Fact::Outcome {
                    node,
                    is_error: true,
                    payload: self.payload(stored, write),
                    references: vec![],
                });
            }
        }
        facts.push(Fact::Node {
            node,
            event: known.latest_event + 1,
            record,
        });
    }

    fn end_or_resume(&mut self, view: &Model, facts: &mut Vec<Fact>) {
        let runs: Vec<_> = view.runs.keys().copied().collect();
        if runs.is_empty() {
            return;
        }
        let run = runs[self.dice(runs.len() as u64) as usize];
        let known = &view.runs[&run];
        let mut record = known.record.clone();
        if record.ended.is_none() {
            record.ended = Some(self.now);
            record.state = RunState::Failed;
            record.n_nodes = known.nodes.len() as u32;
            record.n_events = known.latest_event;
            facts.push(Fact::Run { run, record });
            return;
        }
        record.ended = None;
        record.state = RunState::Running;
        record.round += 1;
        let round = record.round;
        facts.push(Fact::Run { run, record });
        let mut node = known.nodes[0].record.clone();
        node.round = round;
        node.progress = Progress::Open;
        node.body = BodyEnd::Plain;
        node.note = Note::Reopened;
        facts.push(Fact::Node {
            node: NodeKey::new(run, NodeIndex(0)),
            event: known.latest_event + 1,
            record: node,
        });
    }

    fn dead_letter(&mut self, model: &mut Model, write: Write<'_>, facts: &mut Vec<Fact>) {
        let route = self.dice(2) as usize;
        if self.dice(3) == 0 {
            if let Some((route, seq)) = model.letters.keys().next().copied() {
                facts.push(Fact::DeadLetterRemoved { route, seq });
            }
            return;
        }
        let seq = self.next_letter[route];
        self.next_letter[route] += 1;
        let body = self.payload(&mut model.stored, write);
        facts.push(Fact::DeadLetter {
            route: NameId(route as u32),
            seq,
            letter: Box::new(DeadLetterRecord {
                code: "INVALID_REQUEST".into(),
                reason: "why ".repeat(self.dice(3_000) as usize).into(),
                attempts: 5,
                coordinates: [("topic".to_owned(), "t".to_owned())].into(),
                body,
                at: self.now,
            }),
        });
    }
}
