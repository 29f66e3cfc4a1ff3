//! The pure state machine that decides everything.
//!
//! No I/O, no clock, no randomness, no async: same state, time and command, same result. It is read, tested and fuzzed alone.
//! Memory holds the metadata of open runs; arguments, results and history are read from the store by whoever needs them.
//!
//! ```text
//!   Command ──▶ Broker::apply ──▶ Reply
//!                 │  on_… in the file of its noun: checks, then changes
//!                 │  cascades: a bounded number of doomed nodes is skipped
//!                 │  dispatch: ready nodes go to sessions with credit
//!                 └▶ Tx: facts for the log, effects for after the commit
//! ```
//!
//! Reading order: `settings` · `run` (nodes and edges of one run) · `spec`, `queue` (lanes) · `node` (creating) · `lease` (claims,
//! tokens, dispatch) · `complete` · `retry` · `cascade` (what follows from an end) · `rounds` (cancel, resume, expire) · `worker`
//! (sessions) · `timer` · `inbox`, `keys`, `outbox` · `explain` (questions) · `restore` · `check`.
//!
//! State is two things that can be borrowed apart: the runs, and the [`World`] they share (specs, lanes, sessions, timers, keys).
//! *Base* state is what facts say, and changes only by absorbing a fact, live as on a restart. *Derived* state follows from it:
//! handlers keep it up to date, `restore` computes it anew, and [`Broker::fingerprint`] lets tests compare the two.

mod cascade;
mod check;
pub mod command;
mod complete;
mod explain;
#[cfg(test)]
mod fixtures;
mod inbox;
mod keys;
mod lease;
mod node;
mod outbox;
pub mod outcome;
mod queue;
pub mod restore;
mod retry;
mod rounds;
mod run;
#[cfg(test)]
mod scenes;
#[cfg(test)]
pub(crate) mod self_check;
pub mod settings;
mod spec;
mod timer;
pub mod types;
mod worker;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use command::{Command, Rejection, Reply};
use outcome::{Fact, Tx};
pub use restore::{CorruptStore, Restoring};
use run::Run;
pub use settings::{OutputRule, Settings};
use types::{Attempt, NameId, NodeKey, RunSeq, Spec, SpecId, Timestamp, Turn, WallTime};

/// Everything the broker knows.
#[derive(Debug)]
pub struct Broker {
    /// Open runs, and those adopted for a moment.
    runs: BTreeMap<RunSeq, Box<Run>>,
    adopted: Vec<RunSeq>,
    world: World,
}

/// What runs share.
#[derive(Debug)]
struct World {
    settings: Settings,
    secret: [u8; 16],
    now: Timestamp,
    wall: WallTime,
    seed: u64,
    next_run: u64,
    specs: spec::Specs,
    names: spec::Names,
    announced: BTreeMap<Arc<str>, SpecId>,
    lanes: queue::Lanes,
    workers: worker::Workers,
    timers: timer::Timers,
    keys: keys::Keys,
    inbox: inbox::Inbox,
    outboxes: outbox::Outboxes,
    /// Nodes that are going to be skipped, or fail by reference.
    doomed: BTreeSet<NodeKey>,
    /// Ended nodes whose dependents are to be visited: node and first edge. Empty between handlers.
    unvisited: Vec<(u32, u32)>,
    /// Runs that ended in this command.
    ended: Vec<RunSeq>,
    /// Latest attempts that were revoked by cancelling: their late outcomes are refused without loading the run again.
    revoked: BTreeMap<NodeKey, Attempt>,
    /// Nodes of all runs that are not terminal.
    open_nodes: u64,
    /// Number of the latest bundle.
    bundle: u32,
    /// Texts that are in most records.
    native: Arc<str>,
    nothing: Arc<str>,
}

impl Broker {
    /// A broker that knows nothing yet.
    pub fn new(settings: Settings, lease_secret: [u8; 16]) -> Self {
        Self {
            runs: BTreeMap::new(),
            adopted: Vec::new(),
            world: World {
                settings,
                secret: lease_secret,
                now: Timestamp(0),
                wall: WallTime(0),
                seed: 0,
                next_run: 1,
                specs: spec::Specs::default(),
                names: spec::Names::default(),
                announced: BTreeMap::new(),
                lanes: queue::Lanes::default(),
                workers: worker::Workers::default(),
                timers: timer::Timers::default(),
                keys: keys::Keys::default(),
                inbox: inbox::Inbox::default(),
                outboxes: outbox::Outboxes::default(),
                doomed: BTreeSet::new(),
                unvisited: Vec::new(),
                ended: Vec::new(),
                revoked: BTreeMap::new(),
                open_nodes: 0,
                bundle: 0,
                native: Arc::from("native"),
                nothing: Arc::from(""),
            },
        }
    }

    /// The only way state changes. Same state, time and command: same result.
    ///
    /// Ends by leasing ready nodes to sessions that have credit, and by dropping runs that have ended from memory.
    pub fn apply(&mut self, tx: &mut Tx, turn: Turn, command: Command) -> Reply {
        self.advance(turn);
        let mut budget = self.world.settings.slice;
        let reply = match command {
            Command::Submit(list) => Reply::Submitted(self.on_submissions(tx, list)),
            Command::DeadLetter(list) => {
                each(tx, list, |tx, letter| self.world.on_dead_letter(tx, letter))
            }
            Command::Attach(attach) => Reply::Attached(self.on_attach(tx, attach)),
            Command::Detach(session) => once(tx, |tx| self.on_detach(tx, session)),
            Command::Close(session) => once(tx, |tx| self.on_close(tx, session)),
            Command::Credit { session, calls } => once(tx, |_| self.on_credit(session, calls)),
            Command::Touch(sessions) => each(tx, sessions, |_, session| self.on_touch(session)),
            Command::Finish(list) => {
                each(tx, list, |tx, completion| self.on_finish(tx, completion))
            }
            Command::CreateChildren(request) => {
                Reply::Created(item(tx, |tx| self.on_create_children(tx, request)))
            }
            Command::Cancel { run, reason } => once(tx, |tx| self.on_cancel(tx, run, reason)),
            Command::Resume(run) => once(tx, |tx| self.on_resume(tx, run)),
            Command::ConfirmOutbox { output, seqs } => {
                once(tx, |tx| self.world.on_confirm_outbox(tx, &output, &seqs))
            }
            Command::DropDeadLetter { route, seq } => {
                once(tx, |tx| self.world.on_drop_dead_letter(tx, &route, seq))
            }
            Command::SeekInbox {
                route,
                partition,
                next,
            } => once(tx, |tx| {
                self.world.on_seek_inbox(tx, &route, partition, next);
                Ok(())
            }),
            Command::Expire(runs) => each(tx, runs, |tx, run| self.on_expire(tx, run)),
            Command::Tick => {
                self.lapse_sessions(tx, &mut budget);
                self.end_overdue(tx, &mut budget);
                self.world.expire_keys(tx, &mut budget);
                Reply::Done(vec![Ok(())])
            }
        };
        self.continue_cascades(tx, budget);
        self.dispatch(tx);
        self.world.announce_growth(tx);
        for seq in std::mem::take(&mut self.world.ended) {
            self.runs.remove(&seq);
        }
        self.release_adopted();
        reply
    }

    /// Runs that a command names and that are not resident but may exist: they have ended. The engine loads and
    /// [adopts](Broker::adopt) them before it applies the command; a run that is not found is left out. Submitting needs none,
    /// because keys name their run, and deleting needs none, because every run that is not resident has ended.
    pub fn needs(&self, command: &Command) -> Vec<RunSeq> {
        let mut needed = Vec::new();
        match command {
            Command::Finish(list) => {
                let mut previous = None;
                for completion in list {
                    let seq = completion.node.run;
                    if self.world.revoked.get(&completion.node) == Some(&completion.attempt) {
                        continue;
                    }
                    if previous != Some(seq) && self.may_exist(seq) && !needed.contains(&seq) {
                        needed.push(seq);
                    }
                    previous = Some(seq);
                }
            }
            Command::CreateChildren(request) if self.may_exist(request.node.run) => {
                needed.push(request.node.run);
            }
            Command::Cancel { run, .. } | Command::Resume(run) if self.may_exist(run.seq) => {
                needed.push(run.seq);
            }
            _ => {}
        }
        needed
    }

    /// Whether a run is not resident but may have been before.
    fn may_exist(&self, seq: RunSeq) -> bool {
        seq.0 > 0 && seq.0 < self.world.next_run && !self.runs.contains_key(&seq)
    }

    /// A spec by its number.
    pub fn spec(&self, id: SpecId) -> Option<&Arc<Spec>> {
        self.world.specs.get(id)
    }

    /// The name of a route or an output.
    pub fn name(&self, id: NameId) -> Option<&Arc<str>> {
        self.world.names.get(id)
    }

    /// The number of a route or an output.
    pub fn name_id(&self, name: &str) -> Option<NameId> {
        self.world.names.find(name)
    }
}

/// One item of a command: a rejection wrote nothing (check, then change).
fn item<T>(
    tx: &mut Tx,
    handler: impl FnOnce(&mut Tx) -> Result<T, Rejection>,
) -> Result<T, Rejection> {
    let before = (tx.facts.len(), tx.effects.len());
    let result = handler(tx);
    debug_assert!(
        result.is_ok() || before == (tx.facts.len(), tx.effects.len()),
        "check, then change: a rejection wrote nothing"
    );
    result
}

fn once(tx: &mut Tx, handler: impl FnOnce(&mut Tx) -> Result<(), Rejection>) -> Reply {
    Reply::Done(vec![item(tx, handler)])
}

fn each<T>(
    tx: &mut Tx,
    list: Vec<T>,
    mut handler: impl FnMut(&mut Tx, T) -> Result<(), Rejection>,
) -> Reply {
    Reply::Done(
        list.into_iter()
            .map(|entry| item(tx, |tx| handler(tx, entry)))
            .collect(),
    )
}

impl World {
    /// Changes what runs share: the fact, and by the same fact the memory.
    fn put(&mut self, tx: &mut Tx, fact: Fact) {
        let absorbed = self.absorb(&fact);
        debug_assert_eq!(absorbed, Ok(()), "own facts fit");
        tx.facts.push(fact);
    }

    /// Base state that runs share, as facts say it. An error names what does not fit.
    fn absorb(&mut self, fact: &Fact) -> Result<(), String> {
        match fact {
            Fact::Spec { id, spec } => {
                if !self.absorb_spec(*id, spec) {
                    return Err(format!("spec {} does not follow the one before it", id.0));
                }
            }
            Fact::Name { id, name } => self.names.absorb(*id, name),
            Fact::Announced { action, spec } => {
                if self.specs.get(*spec).is_none() {
                    return Err(format!("spec {} of action {action:?} is missing", spec.0));
                }
                self.announced.insert(Arc::clone(action), *spec);
                for lane in 0..self.specs.len() {
                    let by_name = self.specs.of(lane);
                    if by_name.by_name && by_name.action == *action {
                        self.refresh_lane(lane);
                    }
                }
            }
            Fact::Key {
                key,
                run,
                content,
                at,
            } => self.keys.absorb(*key, *run, *content, *at),
            Fact::KeysExpired { keys } => {
                for key in keys {
                    self.keys.remove(*key);
                }
            }
            Fact::Position {
                route,
                partition,
                epoch,
                next,
            } => {
                let at = (*route, Arc::clone(partition));
                self.inbox.positions.insert(at, (*epoch, *next));
            }
            Fact::Outbox {
                output, seq, node, ..
            } => self.outboxes.absorb_owed(*output, *seq, node.run),
            Fact::OutboxConfirmed {
                output,
                cursor,
                beyond,
            } => self.outboxes.absorb_confirmed(*output, *cursor, beyond),
            Fact::DeadLetter { route, seq, .. } => self.inbox.absorb_letter(*route, *seq, true),
            Fact::DeadLetterRemoved { route, seq } => {
                self.inbox.absorb_letter(*route, *seq, false);
            }
            Fact::Run { .. }
            | Fact::Nodes { .. }
            | Fact::Node { .. }
            | Fact::Outcome { .. }
            | Fact::RunDeleted { .. } => {
                return Err("a fact of a run was taken for one of the world".into());
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
