//! A broker as the documentation describes it, written to be read and not to be fast: vectors scanned from the start, no index,
//! nothing derived that can be counted. It says what may be answered to a command, and what must be true afterwards.
//!
//! It does not know which of several sessions is served first, nor the order in which nodes that settle together are owed to an
//! output: those it takes from what the broker did, and checks.

mod attempts;
mod offers;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use crate::broker::command::{
    AttemptEnd, Code, Command, Completion, CreateChildren, Delay, Identity, NewInput, NewNode,
    NodeRef, Submission,
};
use crate::broker::outcome::{Effect, Lease};
use crate::broker::types::{
    Attempt, InputUse, KeyHash, NodeIndex, NodeKey, NodeState, Note, Retry, RunId, RunSeq,
    RunState, SessionId, Spec, Turn, WallTime,
};
use crate::broker::{OutputRule, Settings};

/// What may be answered to one item: a repetition, yes, or one of some codes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::broker::tests) enum Expect {
    /// Yes, and it takes effect.
    Yes,
    /// Yes, because it was so already.
    Again,
    /// One of these.
    No(&'static [Code]),
    /// It must not take effect; what is said does not matter.
    Nothing,
}

/// Where a node stands, before the run's cancel flag is looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::broker::tests) enum Stage {
    Open,
    Leased(SessionId),
    Backoff,
    Settling,
    Succeeded,
    Failed,
    Skipped,
}

impl Stage {
    fn terminal(self) -> bool {
        matches!(self, Self::Succeeded | Self::Failed | Self::Skipped)
    }
}

#[derive(Debug, Clone)]
pub(in crate::broker::tests) struct OracleNode {
    pub(in crate::broker::tests) spec: Arc<Spec>,
    pub(in crate::broker::tests) stage: Stage,
    pub(in crate::broker::tests) attempt: u32,
    inputs: Vec<(u32, InputUse)>,
    failures: u32,
    losses: u32,
    not_before: u64,
    not_before_wall: WallTime,
    /// A tick has seen that its delay is over.
    woken: bool,
    /// Digest of the accepted completion of the current attempt.
    digest: Option<u64>,
    released: bool,
    references: Vec<u32>,
    /// The one reference is a tail call.
    tail: bool,
    children: Vec<u32>,
    ready_since: Option<u64>,
}

#[derive(Debug, Clone)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "as the documentation says it, not as a machine would"
)]
pub(in crate::broker::tests) struct OracleRun {
    pub(in crate::broker::tests) id: RunId,
    pub(in crate::broker::tests) root: u32,
    pub(in crate::broker::tests) round: u32,
    pub(in crate::broker::tests) cancelled: bool,
    pub(in crate::broker::tests) ended: bool,
    pub(in crate::broker::tests) deleted: bool,
    pub(in crate::broker::tests) nodes: Vec<OracleNode>,
    root_told: bool,
}

#[derive(Debug, Clone)]
pub(in crate::broker::tests) struct OracleSession {
    pub(in crate::broker::tests) id: SessionId,
    pub(in crate::broker::tests) attached: bool,
    pub(in crate::broker::tests) credit: u32,
    last_seen: u64,
    detached: Option<u64>,
    queues: Vec<Arc<str>>,
    tolerations: Vec<Arc<str>>,
    actions: Vec<Arc<Spec>>,
}

/// What a command is expected to have done, beside its leases.
#[derive(Debug, Default)]
pub(in crate::broker::tests) struct Deeds {
    pub(in crate::broker::tests) revoked: BTreeSet<(SessionId, NodeKey, u32)>,
    pub(in crate::broker::tests) settled: BTreeSet<RunSeq>,
    pub(in crate::broker::tests) ended: BTreeSet<RunSeq>,
    pub(in crate::broker::tests) owed: BTreeSet<(Arc<str>, NodeKey, u32)>,
}

#[derive(Debug, Clone, Default)]
pub(in crate::broker::tests) struct OracleOutbox {
    pub(in crate::broker::tests) next: u64,
    pub(in crate::broker::tests) confirmed: BTreeSet<u64>,
    pub(in crate::broker::tests) of: BTreeMap<u64, NodeKey>,
}

impl OracleOutbox {
    pub(in crate::broker::tests) fn cursor(&self) -> u64 {
        let mut all = 1..=self.next + 1;
        all.find(|seq| !self.confirmed.contains(seq))
            .unwrap_or(self.next + 1)
    }
}

pub(in crate::broker::tests) struct Oracle {
    settings: Settings,
    pub(in crate::broker::tests) now: u64,
    wall: WallTime,
    pub(in crate::broker::tests) runs: Vec<OracleRun>,
    pub(in crate::broker::tests) sessions: Vec<OracleSession>,
    keys: Vec<(KeyHash, Option<RunId>, u64)>,
    pub(in crate::broker::tests) positions: BTreeMap<(Arc<str>, Arc<str>), u64>,
    pub(in crate::broker::tests) letters: Vec<(Arc<str>, u64, bool)>,
    announced: BTreeMap<Arc<str>, Arc<Spec>>,
    pub(in crate::broker::tests) outboxes: BTreeMap<Arc<str>, OracleOutbox>,
    pub(in crate::broker::tests) deeds: Deeds,
    /// Codes that were expected to be said, for the figures.
    pub(in crate::broker::tests) outcomes: u64,
}

impl Oracle {
    pub(in crate::broker::tests) fn new(settings: Settings) -> Self {
        Self {
            settings,
            now: 0,
            wall: WallTime(0),
            runs: Vec::new(),
            sessions: Vec::new(),
            keys: Vec::new(),
            positions: BTreeMap::new(),
            letters: Vec::new(),
            announced: BTreeMap::new(),
            outboxes: BTreeMap::new(),
            deeds: Deeds::default(),
            outcomes: 0,
        }
    }

    pub(in crate::broker::tests) fn run(&self, seq: RunSeq) -> Option<usize> {
        self.runs
            .iter()
            .position(|run| run.id.seq == seq && !run.deleted)
    }

    fn session(&mut self, id: SessionId) -> Option<&mut OracleSession> {
        self.sessions.iter_mut().find(|session| session.id == id)
    }

    /// Begins a turn.
    pub(in crate::broker::tests) fn turn(&mut self, turn: Turn) {
        self.now = turn.now.0;
        self.wall = turn.wall;
        self.deeds = Deeds::default();
        self.forget_idle_sessions();
        self.wake();
    }

    /// What may be said to a command that is not a list of submissions; and does it.
    pub(in crate::broker::tests) fn command(&mut self, command: &Command) -> Vec<Expect> {
        const UNKNOWN: Expect = Expect::No(&[Code::UnknownSession]);
        match command {
            Command::Submit(_) => unreachable!("submissions are asked for one by one"),
            Command::Attach(attach) => {
                let known = self.session(attach.session).is_some();
                let entry = OracleSession {
                    id: attach.session,
                    attached: true,
                    credit: 0,
                    last_seen: self.now,
                    detached: None,
                    queues: attach.queues.clone(),
                    tolerations: attach.tolerations.clone(),
                    actions: attach.actions.clone(),
                };
                if known {
                    *self.session(attach.session).expect("known") = entry;
                } else {
                    self.sessions.push(entry);
                }
                for spec in &attach.actions {
                    self.announced
                        .insert(Arc::clone(&spec.action), Arc::clone(spec));
                }
                vec![]
            }
            Command::Detach(id) => {
                let (now, held) = (self.now, !self.leases_of(*id).is_empty());
                let Some(session) = self.session(*id) else {
                    return vec![UNKNOWN];
                };
                if !session.attached {
                    return vec![Expect::Nothing];
                }
                session.attached = false;
                session.credit = 0;
                session.detached = Some(now);
                if !held {
                    self.sessions.retain(|session| session.id != *id);
                }
                vec![Expect::Yes]
            }
            Command::Close(id) => {
                if self.session(*id).is_none() {
                    return vec![UNKNOWN];
                }
                for (run, node) in self.leases_of(*id) {
                    let node = &mut self.runs[run].nodes[node];
                    node.stage = Stage::Open;
                    node.released = true;
                }
                self.sessions.retain(|session| session.id != *id);
                vec![Expect::Yes]
            }
            Command::Credit { session, calls } => match self.session(*session) {
                Some(session) if session.attached => {
                    session.credit += calls;
                    vec![Expect::Yes]
                }
                _ => vec![UNKNOWN],
            },
            Command::Touch(ids) => {
                let now = self.now;
                let mut touch = |id: &SessionId| match self.session(*id) {
                    Some(session) => {
                        session.last_seen = now;
                        Expect::Again
                    }
                    None => UNKNOWN,
                };
                ids.iter().map(&mut touch).collect()
            }
            Command::Finish(items) => items.iter().map(|item| self.finish(item)).collect(),
            Command::CreateChildren(request) => vec![self.create(request)],
            Command::Cancel { run, .. } => vec![self.cancel(*run)],
            Command::Resume(run) => vec![self.resume(*run)],
            Command::ConfirmOutbox { output, seqs } => {
                let outbox = self.outboxes.entry(Arc::clone(output)).or_default();
                if seqs.iter().any(|seq| *seq == 0 || *seq > outbox.next) {
                    return vec![Expect::No(&[Code::InvalidRequest, Code::UnknownName])];
                }
                outbox.confirmed.extend(seqs);
                vec![Expect::Yes]
            }
            Command::DeadLetter(letters) => letters
                .iter()
                .map(|letter| {
                    let origin = &letter.origin;
                    if !self.is_new(&origin.route, &origin.identity) {
                        return Expect::Again;
                    }
                    self.consume(&origin.route, &origin.identity, None);
                    let n = self
                        .letters
                        .iter()
                        .filter(|l| l.0 == letter.origin.route)
                        .count() as u64;
                    self.letters
                        .push((Arc::clone(&letter.origin.route), n + 1, true));
                    Expect::Yes
                })
                .collect(),
            Command::DropDeadLetter { route, seq } => vec![self.take_letter(route, *seq)],
            Command::SeekInbox {
                route,
                partition,
                next,
            } => {
                self.positions
                    .insert((Arc::clone(route), Arc::clone(partition)), *next);
                vec![Expect::Yes]
            }
            Command::Expire(runs) => runs.iter().map(|run| self.expire(*run)).collect(),
            Command::Tick => {
                self.tick();
                vec![Expect::Yes]
            }
        }
    }

    fn take_letter(&mut self, route: &Arc<str>, seq: u64) -> Expect {
        match self
            .letters
            .iter_mut()
            .find(|l| l.0 == *route && l.1 == seq && l.2)
        {
            Some(letter) => {
                letter.2 = false;
                Expect::Yes
            }
            None => Expect::No(&[Code::UnknownName]),
        }
    }

    /// Whether a message was not applied before.
    fn is_new(&self, route: &Arc<str>, identity: &Identity) -> bool {
        match identity {
            Identity::Position {
                partition,
                position,
                ..
            } => {
                let at = self
                    .positions
                    .get(&(Arc::clone(route), Arc::clone(partition)));
                at.is_none_or(|at| position >= at)
            }
            Identity::Key(key) => self.keys.iter().all(|taken| taken.0 != *key),
            Identity::DeadLetter { .. } | Identity::None => true,
        }
    }

    /// Takes its position or key.
    fn consume(&mut self, route: &Arc<str>, identity: &Identity, run: Option<RunId>) {
        match identity {
            Identity::Position {
                partition, next, ..
            } => {
                self.positions
                    .insert((Arc::clone(route), Arc::clone(partition)), *next);
            }
            Identity::Key(key) => self.keys.push((*key, run, 0)),
            Identity::DeadLetter { .. } | Identity::None => {}
        }
    }

    /// What may be said to a submission; `given` is the id the broker gave, if it said yes. Does it.
    pub(in crate::broker::tests) fn submit(
        &mut self,
        submission: &Submission,
        given: Option<RunId>,
    ) -> Expect {
        // A repetition is recognised before anything else is looked at.
        if let Some(origin) = &submission.origin {
            if let Identity::DeadLetter { seq } = origin.identity
                && !self
                    .letters
                    .contains(&(Arc::clone(&origin.route), seq, true))
            {
                return Expect::No(&[Code::UnknownName]);
            }
            if !self.is_new(&origin.route, &origin.identity) {
                return Expect::Again;
            }
        }
        if let Some(key) = submission.key
            && let Some((_, run, content)) = self.keys.iter().find(|taken| taken.0 == key.hash)
        {
            let kept = run.is_some_and(|run| self.run(run.seq).is_some());
            return match (kept, *content == key.content) {
                (true, true) => Expect::Again,
                (true, false) => Expect::No(&[Code::SubmissionConflict]),
                (false, _) => Expect::No(&[Code::RunExpired]),
            };
        }
        let mut nodes = submission.nodes.iter().enumerate();
        if nodes.any(|(i, node)| bad_inputs(node, i)) {
            return Expect::No(&[Code::GraphCycle]);
        }
        if let Some(origin) = &submission.origin {
            if let Identity::DeadLetter { seq } = origin.identity {
                self.take_letter(&origin.route, seq);
            }
            self.consume(&origin.route, &origin.identity, given);
        }
        let Some(id) = given else { return Expect::Yes };
        if let Some(key) = submission.key {
            self.keys.push((key.hash, Some(id), key.content));
        }
        self.runs.push(OracleRun {
            id,
            root: submission.root,
            round: 1,
            cancelled: false,
            ended: false,
            deleted: false,
            nodes: Vec::new(),
            root_told: false,
        });
        let run = self.runs.len() - 1;
        self.add(run, None, &submission.nodes, &submission.specs);
        self.settle(run);
        Expect::Yes
    }

    /// Adds nodes whose edges were found good.
    fn add(&mut self, run: usize, parent: Option<usize>, new: &[NewNode], specs: &[Arc<Spec>]) {
        let (now, wall) = (self.now, self.wall);
        let run = &mut self.runs[run];
        let base = run.nodes.len() as u32;
        for node in new {
            let inputs = node.inputs.iter();
            let inputs = inputs
                .flat_map(|input| each(input, base).map(|at| (at, input.mode)))
                .collect();
            let (not_before, not_before_wall) = match node.delay {
                Delay::None => (0, WallTime(0)),
                Delay::For(ms) => (now + ms, WallTime(0)),
                Delay::Until(date) => (0, date),
            };
            if let Some(parent) = parent {
                let at = run.nodes.len() as u32;
                run.nodes[parent].children.push(at);
            }
            run.nodes.push(OracleNode {
                spec: Arc::clone(&specs[node.spec as usize]),
                stage: Stage::Open,
                attempt: 0,
                inputs,
                failures: 0,
                losses: 0,
                not_before,
                not_before_wall,
                woken: not_before <= now && not_before_wall <= wall,
                digest: None,
                released: false,
                references: Vec::new(),
                tail: false,
                children: Vec::new(),
                ready_since: None,
            });
        }
    }
}

/// The numbers that an input stands for, when the list begins at `base`.
fn each(input: &NewInput, base: u32) -> impl Iterator<Item = u32> + use<> {
    let first = match input.first {
        NodeRef::New(at) => base + at,
        NodeRef::Existing(at) => at.0,
    };
    first..first + input.count
}

/// Whether an input does not come before its node. The schedules make no other bad edges.
fn bad_inputs(node: &NewNode, position: usize) -> bool {
    node.inputs.iter().any(|input| match input.first {
        NodeRef::New(at) => (at + input.count) as usize > position,
        NodeRef::Existing(_) => false,
    })
}

/// The schedules use `x*`, `*` and plain names.
fn matches(rule: &OutputRule, action: &str) -> bool {
    match rule.action.strip_suffix('*') {
        Some(prefix) => action.starts_with(prefix),
        None => rule.action == action,
    }
}
