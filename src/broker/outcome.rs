//! What a turn leaves behind: facts for the log, effects for after the commit.
//!
//! A handler emits facts through [`Tx`], and the same fact changes the memory, so a write cannot be forgotten. Facts are
//! absolute and idempotent: applying one twice changes nothing. What can be derived is never written.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::types::{
    Attempt, InputRange, KeyHash, LeaseToken, NameId, NodeIndex, NodeKey, NodeRecord, Note,
    Payload, RunId, RunRecord, RunSeq, SessionId, Spec, SpecId, Timestamp,
};

/// One thing that has become true.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fact {
    /// A spec got a number.
    Spec {
        /// The number.
        id: SpecId,
        /// The spec.
        spec: Arc<Spec>,
    },
    /// A route or an output got a number.
    Name {
        /// The number.
        id: NameId,
        /// The name.
        name: Arc<str>,
    },
    /// Runs started by name use this spec from now on.
    Announced {
        /// The action.
        action: Arc<str>,
        /// Its spec.
        spec: SpecId,
    },
    /// A run was created, cancelled, resumed or ended.
    Run {
        /// Which.
        run: RunSeq,
        /// All that changes about it.
        record: RunRecord,
    },
    /// Nodes were created: neighbours with the same parent.
    Nodes {
        /// Which run.
        run: RunSeq,
        /// Number of the first.
        first: NodeIndex,
        /// Whose attempt created them.
        parent: Option<NodeIndex>,
        /// Round of their creation.
        round: u32,
        /// Number of the first one's "created" event; the others follow.
        event: u64,
        /// The nodes.
        nodes: Vec<CreatedNode>,
    },
    /// A node changed its state.
    Node {
        /// Which.
        node: NodeKey,
        /// Number of the event in the run's history.
        event: u64,
        /// All that changes about it.
        record: NodeRecord,
    },
    /// The body of an attempt left bytes: a value, a structure, or an error. Written before the `Node` fact that refers to it.
    Outcome {
        /// Which node.
        node: NodeKey,
        /// Whether it is an error.
        is_error: bool,
        /// The bytes.
        payload: Payload,
        /// The nodes a structure refers to, in order.
        references: Vec<InputRange>,
    },
    /// A submission key or a dedup key is taken.
    Key {
        /// The key.
        key: KeyHash,
        /// The run it belongs to; `None` for a dead letter.
        run: Option<RunId>,
        /// Hash of the content.
        content: u64,
        /// When it was taken: it is kept at least for the dedup window from then on.
        at: Timestamp,
    },
    /// Keys taken before this instant are forgotten, except those of runs that are kept.
    KeysExpired {
        /// The keys.
        keys: Vec<KeyHash>,
    },
    /// Inbound messages before `next` have been applied.
    Position {
        /// The route.
        route: NameId,
        /// Which partition.
        partition: Arc<str>,
        /// Grows with every wanted backward seek.
        epoch: u32,
        /// The next position to be applied.
        next: u64,
    },
    /// A delivery is owed.
    Outbox {
        /// The output.
        output: NameId,
        /// Its number in that outbox: 1, 2, 3…
        seq: u64,
        /// The node whose outcome is to be delivered.
        node: NodeKey,
        /// Random part of the run's id.
        salt: u64,
        /// The round in which it settled: part of the message id.
        round: u32,
        /// When it was owed.
        at: Timestamp,
    },
    /// Deliveries were confirmed.
    OutboxConfirmed {
        /// The output.
        output: NameId,
        /// All before this one are confirmed.
        cursor: u64,
        /// Confirmed ones at or after the cursor, ascending.
        beyond: Vec<u64>,
    },
    /// A message died.
    DeadLetter {
        /// The route.
        route: NameId,
        /// Its number on that route: 1, 2, 3…
        seq: u64,
        /// The letter.
        letter: Box<DeadLetterRecord>,
    },
    /// A dead letter was replayed or dropped.
    DeadLetterRemoved {
        /// The route.
        route: NameId,
        /// Its number.
        seq: u64,
    },
    /// An ended run was deleted, with everything that belongs to it except its keys.
    RunDeleted {
        /// Which.
        run: RunSeq,
    },
}

/// A node of [`Fact::Nodes`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CreatedNode {
    /// Its spec.
    pub spec: SpecId,
    /// What it is called with.
    pub arguments: Payload,
    /// What it waits for.
    pub inputs: Vec<InputRange>,
    /// Not ready before this broker time; 0 when there is no delay.
    pub not_before: Timestamp,
    /// Not ready before this date; 0 when there is none.
    pub not_before_wall: super::types::WallTime,
}

/// A dead letter as it is kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeadLetterRecord {
    /// Stable code of the reason.
    pub code: Arc<str>,
    /// The reason.
    pub reason: Arc<str>,
    /// How often it was tried.
    pub attempts: u32,
    /// Where it came from.
    pub coordinates: BTreeMap<String, String>,
    /// The original bytes.
    pub body: Payload,
    /// When it died.
    pub at: Timestamp,
}

/// Something to do once the batch is durable.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Effect {
    /// Give a node to a worker.
    Lease(Lease),
    /// Tell a worker to stop: the run was cancelled, or the lease has ended.
    Revoke {
        /// Which session.
        session: SessionId,
        /// Which node.
        node: NodeKey,
        /// Which attempt.
        attempt: Attempt,
    },
    /// The value (or error) of a run's root is known: release those who wait for it.
    RootSettled {
        /// Which.
        run: RunSeq,
    },
    /// All nodes of a run are terminal.
    RunEnded {
        /// Which.
        run: RunSeq,
    },
    /// An output owes something.
    OutboxGrew {
        /// Name of the output.
        output: Arc<str>,
    },
}

/// A lease, as the worker's connection needs it. Arguments and inputs are read from the store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lease {
    /// To whom.
    pub session: SessionId,
    /// Which node.
    pub node: NodeKey,
    /// Random part of the run's id.
    pub salt: u64,
    /// Which attempt.
    pub attempt: Attempt,
    /// Proof.
    pub token: LeaseToken,
    /// What to run: never a by-name spec.
    pub spec: SpecId,
    /// Leases with the same number, not 0, in one turn are one bundle.
    pub batch: u32,
    /// `OtherCode`, or `None`.
    pub note: Note,
}

/// Collects what a command does.
#[derive(Debug, Default)]
pub struct Tx {
    /// Facts, in order.
    pub facts: Vec<Fact>,
    /// Effects, in order.
    pub effects: Vec<Effect>,
}
