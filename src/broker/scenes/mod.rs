//! Small scenes: one promise each, yes, no and repetition. After every command all invariants hold and the rebuild is equal.

mod attempts;
mod graphs;
mod queues;

use std::collections::BTreeMap;
use std::sync::Arc;

use super::command::*;
use super::fixtures::{payload, spec};
use super::outcome::*;
use super::types::*;
use super::{Broker, OutputRule, Restoring, Settings};

const W1: SessionId = SessionId(1);
const W2: SessionId = SessionId(2);

struct Scene {
    broker: Broker,
    settings: Settings,
    facts: Vec<Fact>,
    effects: Vec<Effect>,
    now: u64,
    wall: u64,
}

fn value() -> AttemptEnd {
    AttemptEnd::Value(payload("1"))
}

fn failed(retryable: bool) -> AttemptEnd {
    AttemptEnd::Failed {
        error: payload(r#"{"type":"E"}"#),
        retryable,
        timed_out: false,
    }
}

fn node(spec: u32, inputs: &[(NodeRef, u32, InputUse)]) -> NewNode {
    NewNode {
        spec,
        arguments: payload("[]"),
        inputs: inputs
            .iter()
            .map(|(first, count, mode)| NewInput {
                first: *first,
                count: *count,
                mode: *mode,
            })
            .collect(),
        delay: Delay::None,
    }
}

fn after(position: u32, mode: InputUse) -> (NodeRef, u32, InputUse) {
    (NodeRef::New(position), 1, mode)
}

fn graph(specs: &[Spec], nodes: Vec<NewNode>, root: u32) -> Submission {
    Submission {
        key: None,
        specs: specs.iter().cloned().map(Arc::new).collect(),
        nodes,
        root,
        tags: BTreeMap::new(),
        origin: None,
    }
}

fn single(spec: Spec) -> Submission {
    graph(&[spec], vec![node(0, &[])], 0)
}

fn codes<T>(list: &[Result<T, Rejection>]) -> Vec<&'static str> {
    list.iter()
        .map(|result| result.as_ref().err().map_or("ok", |no| no.code.as_str()))
        .collect()
}

impl Scene {
    fn new() -> Self {
        Self::with(Settings::default())
    }

    fn with(settings: Settings) -> Self {
        Self {
            broker: Broker::new(settings.clone(), [3; 16]),
            settings,
            facts: Vec::new(),
            effects: Vec::new(),
            now: 1_000,
            wall: 50_000,
        }
    }

    fn turn(&self) -> Turn {
        Turn {
            now: Timestamp(self.now),
            wall: WallTime(self.wall),
            seed: 5,
        }
    }

    fn apply(&mut self, command: Command) -> Reply {
        for seq in self.broker.needs(&command) {
            let facts = self.facts_of(seq);
            self.broker.adopt(seq, facts).unwrap();
        }
        let mut tx = Tx::default();
        let reply = self.broker.apply(&mut tx, self.turn(), command);
        self.facts.append(&mut tx.facts);
        self.effects = tx.effects;
        self.broker.check_invariants();
        let mut restoring = Restoring::new(self.settings.clone(), [3; 16]);
        for fact in &self.facts {
            restoring.absorb(fact.clone());
        }
        let rebuilt = restoring.finish(Timestamp(self.now), 0).unwrap();
        assert_eq!(self.broker.fingerprint(), rebuilt.fingerprint());
        reply
    }

    fn facts_of(&self, seq: RunSeq) -> Vec<Fact> {
        let of_run = |fact: &&Fact| match fact {
            Fact::Run { run, .. } | Fact::Nodes { run, .. } => *run == seq,
            Fact::Node { node, .. } | Fact::Outcome { node, .. } => node.run == seq,
            _ => false,
        };
        self.facts.iter().filter(of_run).cloned().collect()
    }

    fn done(&mut self, command: Command) -> Vec<&'static str> {
        match self.apply(command) {
            Reply::Done(list) => codes(&list),
            other => panic!("{other:?}"),
        }
    }

    fn submit(&mut self, submission: Submission) -> Result<Submitted, Rejection> {
        match self.apply(Command::Submit(vec![submission])) {
            Reply::Submitted(mut list) => list.pop().unwrap(),
            other => panic!("{other:?}"),
        }
    }

    fn worker(
        &mut self,
        session: SessionId,
        actions: &[Spec],
        calls: u32,
    ) -> Vec<(NodeKey, Attempt)> {
        let reply = self.apply(Command::Attach(Attach {
            session,
            name: "w".into(),
            queues: vec!["default".into()],
            tolerations: vec![],
            actions: actions.iter().cloned().map(Arc::new).collect(),
        }));
        if calls > 0 {
            self.apply(Command::Credit { session, calls });
        }
        match reply {
            Reply::Attached(attached) => attached.leases,
            other => panic!("{other:?}"),
        }
    }

    /// Leases of the latest command.
    fn leased(&self) -> Vec<Lease> {
        let lease = |effect: &Effect| match effect {
            Effect::Lease(lease) => Some(lease.clone()),
            _ => None,
        };
        self.effects.iter().filter_map(lease).collect()
    }

    fn lease(&self) -> Lease {
        let mut leases = self.leased();
        assert_eq!(leases.len(), 1, "{:?}", self.effects);
        leases.pop().unwrap()
    }

    fn completion(lease: &Lease, digest: u64, end: AttemptEnd) -> Completion {
        Completion {
            node: lease.node,
            attempt: lease.attempt,
            token: lease.token,
            digest,
            specs: vec![],
            children: vec![],
            end,
        }
    }

    fn finish(&mut self, lease: &Lease, end: AttemptEnd) -> Vec<&'static str> {
        self.done(Command::Finish(vec![Self::completion(lease, 7, end)]))
    }

    fn with_children(
        &mut self,
        lease: &Lease,
        end: AttemptEnd,
        specs: &[Spec],
        children: Vec<NewNode>,
    ) -> Vec<&'static str> {
        let completion = Completion {
            specs: specs.iter().cloned().map(Arc::new).collect(),
            children,
            ..Self::completion(lease, 7, end)
        };
        self.done(Command::Finish(vec![completion]))
    }

    fn tick(&mut self, ms: u64) {
        self.now += ms;
        self.apply(Command::Tick);
    }

    fn query(&mut self, query: &Query) -> Answer {
        if let Some(seq) = self.broker.needs_query(query) {
            let facts = self.facts_of(seq);
            self.broker.adopt(seq, facts).unwrap();
        }
        let answer = self.broker.query(self.turn(), query);
        self.broker.release_adopted();
        answer
    }

    fn states(&mut self, run: RunId) -> String {
        match self.query(&Query::Nodes {
            run,
            first: NodeIndex(0),
            limit: 99,
        }) {
            Answer::Nodes(nodes) => {
                let words: Vec<&str> = nodes.iter().map(|node| node.state.as_str()).collect();
                words.join(" ")
            }
            other => format!("{other:?}"),
        }
    }

    fn reason(&mut self, run: RunId, node: u32) -> Reason {
        match self.query(&Query::Explain {
            run,
            node: Some(NodeIndex(node)),
            limit: 9,
        }) {
            Answer::Explained(mut list) => list.pop().unwrap().1,
            other => panic!("{other:?}"),
        }
    }

    fn owed(&self) -> Vec<(u64, NodeIndex, u32)> {
        let owed = |fact: &Fact| match fact {
            Fact::Outbox {
                seq, node, round, ..
            } => Some((*seq, node.node, *round)),
            _ => None,
        };
        self.facts.iter().filter_map(owed).collect()
    }

    fn root_settled(&self) -> bool {
        self.effects
            .iter()
            .any(|effect| matches!(effect, Effect::RootSettled { .. }))
    }
}

impl Scene {
    /// The newest lease in the facts, when another command than the latest gave it.
    fn broker_lease(&self) -> Option<Lease> {
        self.facts.iter().rev().find_map(|fact| match fact {
            Fact::Node { node, record, .. } => match record.progress {
                Progress::Leased { session } => Some(Lease {
                    session,
                    node: *node,
                    salt: 0,
                    attempt: record.attempt,
                    token: self.broker.world.token(*node, record.attempt),
                    spec: record.spec,
                    batch: 0,
                    note: record.note,
                }),
                _ => None,
            },
            _ => None,
        })
    }
}
