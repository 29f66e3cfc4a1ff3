//! A simulated worker: what it holds, what it has not been answered, and what its calls leave.

use std::collections::BTreeMap;
use std::sync::Arc;

use dagorama::broker::command::{
    Attach, AttemptEnd, Completion, CreateChildren, NewInput, NewNode, NodeRef,
};
use dagorama::broker::outcome::Lease;
use dagorama::broker::types::{
    Attempt, Batch, BodyEnd, InputRange, InputUse, LeaseToken, NodeIndex, NodeKey, Progress, Retry,
    RunSeq, SessionId, Spec,
};
use dagorama::storage::Read;

use crate::program::{Call, Does, End, FAILED, Left, Program, own_value, structure_value};
use crate::rng::fold;

/// A lease, named by node and attempt.
pub type Held = (NodeKey, Attempt);

#[derive(Debug)]
pub struct Worker {
    pub session: SessionId,
    pub queues: Vec<Arc<str>>,
    pub tolerations: Vec<Arc<str>>,
    /// Calls (or bundles) at a time.
    pub slots: usize,
    /// Number of its connection: messages of earlier ones vanish.
    pub link: u64,
    pub connected: bool,
    /// Number of its process: what an earlier one ran is gone.
    pub life: u64,
    pub frozen_until: u64,
    /// Running bundles.
    pub bundles: BTreeMap<u64, Vec<Lease>>,
    /// Waits for children that were created early.
    pub flushing: BTreeMap<Held, Lease>,
    /// Ended and not yet sent.
    pub outbox: Vec<Completion>,
    /// Sent and not yet answered.
    pub unanswered: BTreeMap<Held, Completion>,
    /// When its last message arrives, either way: a connection keeps its order.
    pub last_up: u64,
    pub last_down: u64,
}

impl Worker {
    pub fn new(session: u64, all: bool, slots: usize) -> Self {
        let names = |names: &[&str]| names.iter().map(|name| Arc::from(*name)).collect();
        Self {
            session: SessionId(session),
            queues: names(if all {
                &["default", "other"]
            } else {
                &["default"]
            }),
            tolerations: names(if all { &["gpu"] } else { &[] }),
            slots,
            link: 0,
            connected: false,
            life: 0,
            frozen_until: 0,
            bundles: BTreeMap::new(),
            flushing: BTreeMap::new(),
            outbox: Vec::new(),
            unanswered: BTreeMap::new(),
            last_up: 0,
            last_down: 0,
        }
    }

    pub fn attach(&self) -> Attach {
        Attach {
            session: self.session,
            name: Arc::from("sim"),
            queues: self.queues.clone(),
            tolerations: self.tolerations.clone(),
            actions: specs(),
        }
    }

    /// A new process in its place.
    pub fn reborn(&mut self, session: u64) {
        self.session = SessionId(session);
        self.life += 1;
        self.bundles.clear();
        self.flushing.clear();
        self.outbox.clear();
        self.unanswered.clear();
    }

    pub fn knows(&self, held: &Held) -> bool {
        let running = self.bundles.values().flatten();
        self.unanswered.contains_key(held)
            || self.flushing.contains_key(held)
            || running
                .clone()
                .any(|lease| (lease.node, lease.attempt) == *held)
    }
}

/// The specs of all programs, in the order of their numbers.
pub fn specs() -> Vec<Arc<Spec>> {
    let plain = Spec {
        action: Arc::from("plain"),
        queue: Arc::from("default"),
        taint: None,
        priority: 0,
        retry: Retry {
            max_attempts: 1,
            max_losses: 1_000_000,
            delay_ms: 20,
            factor_milli: 2_000,
            max_delay_ms: 2_000,
            jitter_milli: 100,
        },
        timeout_ms: None,
        fingerprint: None,
        pin_code: false,
        batch: None,
        by_name: false,
    };
    let mut flaky = plain.clone();
    flaky.action = Arc::from("flaky");
    flaky.retry.max_attempts = 4;
    let mut tainted = plain.clone();
    tainted.action = Arc::from("tainted");
    tainted.taint = Some(Arc::from("gpu"));
    let mut bulk = plain.clone();
    bulk.action = Arc::from("bulk");
    bulk.batch = Some(Batch {
        max_size: 4,
        max_wait_ms: 30,
    });
    let mut other = plain.clone();
    other.action = Arc::from("other");
    other.queue = Arc::from("other");
    other.priority = 5;
    [plain, flaky, tainted, bulk, other].map(Arc::new).to_vec()
}

/// The number of a node's value as the store has it: `Some(None)` without success, `None` while it is open.
pub fn value_of(reader: &dyn Read, node: NodeKey) -> Option<Option<u64>> {
    let record = reader.node(node).unwrap()?;
    if let BodyEnd::Tail(to) = record.body
        && !matches!(record.progress, Progress::Failed | Progress::Skipped)
    {
        return value_of(reader, NodeKey::new(node.run, to));
    }
    let outcome = match record.progress {
        Progress::Failed | Progress::Skipped => return Some(None),
        Progress::Succeeded => reader.outcome(node).unwrap()?,
        _ => return None,
    };
    match Left::read(&outcome.payload)? {
        Left::Value { value, .. } => Some(Some(value)),
        Left::Structure { id, .. } => {
            let mut parts = Vec::new();
            for part in expand(&outcome.references) {
                match value_of(reader, NodeKey::new(node.run, part.0))? {
                    Some(value) => parts.push(value),
                    None => return Some(None),
                }
            }
            Some(Some(structure_value(id, &parts)))
        }
        Left::Call { .. } | Left::Error { .. } => None,
    }
}

fn expand(ranges: &[InputRange]) -> impl Iterator<Item = (NodeIndex, InputUse)> + '_ {
    ranges.iter().flat_map(|range| {
        (range.first.0..range.first.0 + range.count).map(|n| (NodeIndex(n), range.mode))
    })
}

/// Whether everything the lease's node waits for has the outcome that it needs (G4).
pub fn inputs_are_there(reader: &dyn Read, node: NodeKey) -> bool {
    let Some(arguments) = reader.arguments(node).unwrap() else {
        return false;
    };
    expand(&arguments.inputs).all(|(input, mode)| {
        match value_of(reader, NodeKey::new(node.run, input)) {
            Some(Some(_)) => true,
            Some(None) => mode == InputUse::Outcome,
            None => false,
        }
    })
}

/// What running a call comes to.
pub enum Ran {
    Completion(Completion),
    Flush(CreateChildren),
    /// What it needs cannot be read any more: its lease is stale.
    Stale,
}

/// Runs the call of a lease. `raised`: how often this node has raised on purpose; `children`: those created early.
pub fn run(
    reader: &dyn Read,
    programs: &[Program],
    lease: &Lease,
    raised: &mut BTreeMap<NodeKey, u32>,
    children: Option<NodeIndex>,
) -> Ran {
    let Some(arguments) = reader.arguments(lease.node).unwrap() else {
        return Ran::Stale;
    };
    let Some(Left::Call { program: at, id }) = Left::read(&arguments.payload) else {
        panic!("the arguments of {} are not what was sent", lease.node);
    };
    let mut received = Vec::new();
    for (input, mode) in expand(&arguments.inputs) {
        match value_of(reader, NodeKey::new(lease.node.run, input)) {
            None => return Ran::Stale,
            Some(_) if mode == InputUse::After => {}
            Some(value) => received.push(value.unwrap_or(FAILED)),
        }
    }
    let program = &programs[at as usize];
    let call: &Call = &program.calls[id as usize];
    let attempt = u64::from(lease.attempt.0);
    let times = raised.entry(lease.node).or_insert(0);
    let error = |retryable| AttemptEnd::Failed {
        error: Left::Error { id, attempt }.payload(),
        retryable,
        timed_out: false,
    };
    let mut new = Vec::new();
    let end = if *times < call.flaky {
        *times += 1;
        error(true)
    } else {
        match &call.does {
            Does::Raises => error(id % 2 == 0),
            Does::Returns => AttemptEnd::Value(
                Left::Value {
                    value: own_value(id as usize, &received),
                    attempt,
                }
                .payload(),
            ),
            Does::Spawns {
                children: siblings,
                end,
                flush,
            } => {
                let nodes = program.new_nodes(at, siblings);
                let child = |n: usize| match children {
                    Some(first) => NodeRef::Existing(NodeIndex(first.0 + n as u32)),
                    None => NodeRef::New(n as u32),
                };
                if *flush && children.is_none() {
                    return Ran::Flush(CreateChildren {
                        node: lease.node,
                        attempt: lease.attempt,
                        token: lease.token,
                        first_child: 0,
                        specs: specs(),
                        children: nodes,
                    });
                }
                if !*flush {
                    new = nodes;
                }
                match end {
                    End::Own => AttemptEnd::Value(
                        Left::Value {
                            value: own_value(id as usize, &received),
                            attempt,
                        }
                        .payload(),
                    ),
                    End::Tail(n) => AttemptEnd::Tail(child(*n)),
                    End::Structure(refs) => AttemptEnd::Structure {
                        body: Left::Structure { id, attempt }.payload(),
                        references: (refs.iter())
                            .map(|n| NewInput {
                                first: child(*n),
                                count: 1,
                                mode: InputUse::Value,
                            })
                            .collect(),
                    },
                }
            }
        }
    };
    Ran::Completion(completion(lease, new, end))
}

/// The completion that gives a lease back.
pub fn release(node: NodeKey, attempt: Attempt, token: LeaseToken) -> Completion {
    Completion {
        node,
        attempt,
        token,
        digest: 1,
        specs: Vec::new(),
        children: Vec::new(),
        end: AttemptEnd::Released,
    }
}

fn completion(lease: &Lease, children: Vec<NewNode>, end: AttemptEnd) -> Completion {
    let kind = match &end {
        AttemptEnd::Value(_) => 1,
        AttemptEnd::Structure { .. } => 2,
        AttemptEnd::Tail(_) => 3,
        AttemptEnd::Failed { .. } => 4,
        AttemptEnd::Released => 5,
    };
    let run: RunSeq = lease.node.run;
    Completion {
        node: lease.node,
        attempt: lease.attempt,
        token: lease.token,
        // The same for a repetition, as the edge's hash of the bytes would be.
        digest: fold([
            kind,
            run.0,
            u64::from(lease.node.node.0),
            u64::from(lease.attempt.0),
        ]) | 1,
        specs: if children.is_empty() {
            Vec::new()
        } else {
            specs()
        },
        children,
        end,
    }
}
