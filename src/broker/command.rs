//! Everything that can be asked of the broker, and everything it can answer. Both lists are closed.
//!
//! A command takes lists, so that one round trip and one sync serve many; each item of a list is all or nothing by itself.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::types::{
    Attempt, Batch, InputUse, KeyHash, LeaseToken, NodeIndex, NodeKey, NodeState, Note, Payload,
    RunId, RunSeq, RunState, SessionId, Spec, Timestamp, WallTime,
};

/// A request to change something. The engine sends each through [`Broker::apply`](super::Broker::apply).
#[derive(Debug, Clone, PartialEq)]
pub enum Command {
    // ---- intake: may be refused when the broker is overloaded ----
    /// Start runs. Reply: [`Reply::Submitted`].
    Submit(Vec<Submission>),
    /// Store messages that cannot become runs. Reply: [`Reply::Done`].
    DeadLetter(Vec<DeadLetter>),

    // ---- control: never refused for load ----
    /// Open a worker's session, or come back to it. Reply: [`Reply::Attached`].
    Attach(Attach),
    /// The connection of a session has closed: its leases end in five seconds unless it comes back. Reply: [`Reply::Done`].
    Detach(SessionId),
    /// The session ends for good: its leases are released, neither failure nor loss. Reply: [`Reply::Done`].
    Close(SessionId),
    /// The session can take that many more calls (a bundle counts once). Reply: [`Reply::Done`].
    Credit {
        /// Whose.
        session: SessionId,
        /// How many more.
        calls: u32,
    },
    /// These sessions were heard from since the last turn. The engine puts it first in a turn; it writes no fact. Reply: [`Reply::Done`].
    Touch(Vec<SessionId>),
    /// Attempts have ended. Reply: [`Reply::Done`], an entry an item.
    Finish(Vec<Completion>),
    /// Create children of a running attempt now (a flush). Reply: [`Reply::Created`].
    CreateChildren(CreateChildren),
    /// Stop a run: one flag, from which the states of its nodes derive. Reply: [`Reply::Done`].
    Cancel {
        /// Which.
        run: RunId,
        /// For people.
        reason: Arc<str>,
    },
    /// Begin the next round of an ended run: failed, skipped and cancelled nodes open again. Reply: [`Reply::Done`].
    Resume(RunId),
    /// The receiver has confirmed these deliveries. Reply: [`Reply::Done`].
    ConfirmOutbox {
        /// Name of the output.
        output: Arc<str>,
        /// Their sequence numbers.
        seqs: Vec<u64>,
    },
    /// Remove a dead letter. Reply: [`Reply::Done`].
    DropDeadLetter {
        /// Name of the route.
        route: Arc<str>,
        /// Its number.
        seq: u64,
    },
    /// Begin a new epoch of a route's positions at `next`: a wanted backward seek. Reply: [`Reply::Done`].
    SeekInbox {
        /// Name of the route.
        route: Arc<str>,
        /// Which partition.
        partition: Arc<str>,
        /// The next position to be applied.
        next: u64,
    },
    /// Delete these ended runs (retention; the engine names those that are old enough). Runs that are open, unknown or still
    /// owe an outbox delivery are passed over. Reply: [`Reply::Done`], an entry a run.
    Expire(Vec<RunSeq>),
    /// Time has passed: lapse leases, wake what is due, go on with cascades. Reply: [`Reply::Done`].
    Tick,
}

/// A run to start.
#[derive(Debug, Clone, PartialEq)]
pub struct Submission {
    /// Makes it idempotent: the same key gives the same run (G11).
    pub key: Option<SubmissionKey>,
    /// The specs that `nodes` refer to by position.
    pub specs: Vec<Arc<Spec>>,
    /// At least one node; inputs name earlier ones.
    pub nodes: Vec<NewNode>,
    /// Which of them is the run's value.
    pub root: u32,
    /// For people and outputs.
    pub tags: BTreeMap<String, String>,
    /// The message it came from, when a bridge sends it.
    pub origin: Option<Origin>,
}

/// An idempotency key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SubmissionKey {
    /// Hash of the key and its scope.
    pub hash: KeyHash,
    /// Hash of what is submitted: the same key with other content is a conflict.
    pub content: u64,
}

/// Where an inbound message stood. It is stored in the same commit as the run it starts (G12).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Origin {
    /// Name of the route.
    pub route: Arc<str>,
    /// How a repetition is recognised.
    pub identity: Identity,
}

/// How the repetition of an inbound message is recognised.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Identity {
    /// By its place in an ordered log: applied only if `position` is not before the stored next one, which becomes `next`.
    Position {
        /// Which log (file, or cluster/topic/partition).
        partition: Arc<str>,
        /// Where the message begins.
        position: u64,
        /// Where the next one begins.
        next: u64,
    },
    /// By a key, within the dedup window.
    Key(KeyHash),
    /// A dead letter that is replayed: removed in the same commit. Its position or key was consumed when it died.
    DeadLetter {
        /// Its number.
        seq: u64,
    },
    /// Nothing: applied at least once.
    None,
}

/// A node to create.
#[derive(Debug, Clone, PartialEq)]
pub struct NewNode {
    /// Position in the list of specs that goes with it.
    pub spec: u32,
    /// What the function is called with.
    pub arguments: Payload,
    /// What it waits for, in the order in which the arguments refer to them.
    pub inputs: Vec<NewInput>,
    /// When it may start.
    pub delay: Delay,
}

/// When a new node may start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Delay {
    /// At once.
    None,
    /// That many milliseconds of the broker's time after its creation.
    For(u64),
    /// At a date.
    Until(WallTime),
}

/// Neighbouring nodes, before they have numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NewInput {
    /// The first of them.
    pub first: NodeRef,
    /// How many; at least 1.
    pub count: u32,
    /// What for.
    pub mode: InputUse,
}

/// A node that exists, or one of the list being created.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NodeRef {
    /// Position in the list that is being created.
    New(u32),
    /// Number in the run: an already created child of the same attempt's node, or a node that has succeeded.
    Existing(NodeIndex),
}

/// A session's introduction.
#[derive(Debug, Clone, PartialEq)]
pub struct Attach {
    /// Its id; the same one as before when it comes back.
    pub session: SessionId,
    /// For people: host, pid.
    pub name: Arc<str>,
    /// Queues it serves.
    pub queues: Vec<Arc<str>>,
    /// Taints it tolerates.
    pub tolerations: Vec<Arc<str>>,
    /// The actions it has, as it would record them (their fingerprints included). What is announced last is used for runs
    /// started by name.
    pub actions: Vec<Arc<Spec>>,
}

/// The end of one attempt.
#[derive(Debug, Clone, PartialEq)]
pub struct Completion {
    /// Which node.
    pub node: NodeKey,
    /// Which attempt.
    pub attempt: Attempt,
    /// Proof of the lease.
    pub token: LeaseToken,
    /// Hash of everything below, made by the edge: a repetition has the same one.
    pub digest: u64,
    /// The specs that `children` refer to by position.
    pub specs: Vec<Arc<Spec>>,
    /// Nodes recorded during the attempt. They become real with it, in the same commit; not if it failed or was released.
    pub children: Vec<NewNode>,
    /// How it ended.
    pub end: AttemptEnd,
}

/// How an attempt ended.
#[derive(Debug, Clone, PartialEq)]
pub enum AttemptEnd {
    /// With a value.
    Value(Payload),
    /// With a structure that refers to nodes, in the order of its references; it settles when they have.
    Structure {
        /// The structure.
        body: Payload,
        /// Neighbouring nodes each; `mode` is always [`InputUse::Value`].
        references: Vec<NewInput>,
    },
    /// With the promise of a node: its value is that node's value.
    Tail(NodeRef),
    /// With an error.
    Failed {
        /// The error: JSON with `type`, `message`, `traceback` and, from Python, the pickled exception in base64.
        error: Payload,
        /// Whether the retry policy of the action covers this error.
        retryable: bool,
        /// The attempt was ended by its timeout.
        timed_out: bool,
    },
    /// Not ended: given back by a worker that drains. Neither failure nor loss.
    Released,
}

/// Children of a running attempt that are created before it ends.
#[derive(Debug, Clone, PartialEq)]
pub struct CreateChildren {
    /// The parent.
    pub node: NodeKey,
    /// Its attempt.
    pub attempt: Attempt,
    /// Proof of the lease.
    pub token: LeaseToken,
    /// Position of the first of them among all children of the parent: with it, a retry that creates one again gets the same child.
    pub first_child: u32,
    /// The specs that `children` refer to by position.
    pub specs: Vec<Arc<Spec>>,
    /// The children. `NodeRef::New` counts within this list.
    pub children: Vec<NewNode>,
}

/// A message that could not become a run (G13).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeadLetter {
    /// Where it stood. Its position or key is consumed by the same commit.
    pub origin: Origin,
    /// Stable code of the reason.
    pub code: Arc<str>,
    /// The reason, for people.
    pub reason: Arc<str>,
    /// How often it was tried.
    pub attempts: u32,
    /// Where it came from, in the source's own words (`topic`, `offset`, `path`, `line`…).
    pub coordinates: BTreeMap<String, String>,
    /// The original bytes.
    pub body: Payload,
}

/// The answer to a command.
#[derive(Debug, Clone, PartialEq)]
pub enum Reply {
    /// To [`Command::Submit`], an entry a submission.
    Submitted(Vec<Result<Submitted, Rejection>>),
    /// An entry an item (one for commands without a list).
    Done(Vec<Result<(), Rejection>>),
    /// To [`Command::Attach`].
    Attached(Attached),
    /// To [`Command::CreateChildren`]: the number of the first child of the list.
    Created(Result<NodeIndex, Rejection>),
}

/// A run that is durable.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Submitted {
    /// Its id.
    pub run: RunId,
    /// It existed already: the key or the message was a repetition.
    pub existing: bool,
}

/// A session that is open.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attached {
    /// Leases that it still holds from before. The worker goes on with those it knows and releases the others.
    pub leases: Vec<(NodeKey, Attempt)>,
}

/// "No", with a reason: a normal, deterministic answer. Nothing was changed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{code}: {message}", code = .code.as_str())]
pub struct Rejection {
    /// Stable, for programs.
    pub code: Code,
    /// For people: names the thing and the value, then the way out.
    pub message: String,
}

impl Rejection {
    /// A rejection with that code and text.
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
        }
    }
}

macro_rules! codes {
    ($($(#[$doc:meta])* $name:ident = $text:literal,)*) => {
        /// Stable codes of every "no" that this broker says (closed list; `src/error.rs` maps them to the outside).
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum Code { $($(#[$doc])* $name,)* }
        impl Code {
            /// All codes, in table order.
            pub const ALL: &'static [Self] = &[$(Self::$name,)*];
            /// The code as users and programs see it.
            #[must_use]
            pub fn as_str(self) -> &'static str { match self { $(Self::$name => $text,)* } }
        }
    };
}

codes! {
    /// The request is malformed.
    InvalidRequest = "INVALID_REQUEST",
    /// No run, node, session, output or dead letter has that name.
    UnknownRun = "UNKNOWN_RUN",
    /// An input or reference names a node that does not exist.
    UnknownNode = "UNKNOWN_NODE",
    /// No session has that id: attach first.
    UnknownSession = "UNKNOWN_SESSION",
    /// No output, route or dead letter has that name.
    UnknownName = "UNKNOWN_NAME",
    /// An input does not come before its node.
    GraphCycle = "GRAPH_CYCLE",
    /// A limit on nodes, edges, inputs, depth or children.
    GraphTooLarge = "GRAPH_TOO_LARGE",
    /// A payload over the limit.
    PayloadTooLarge = "PAYLOAD_TOO_LARGE",
    /// Too many open nodes.
    QuotaPending = "QUOTA_PENDING",
    /// Too much in flight: try again after a moment.
    Overloaded = "OVERLOADED",
    /// The outbox is nearly full: intake waits.
    OutboxFull = "OUTBOX_FULL",
    /// The disk is nearly full: intake waits.
    DiskFull = "DISK_FULL",
    /// The table of dedup keys is full: intake waits.
    InboxWindowFull = "INBOX_WINDOW_FULL",
    /// The key belongs to a run that retention removed.
    RunExpired = "RUN_EXPIRED",
    /// The run has not ended, so it cannot be resumed.
    RunNotEnded = "RUN_NOT_ENDED",
    /// The lease has ended: another attempt began or may begin.
    LeaseExpired = "LEASE_EXPIRED",
    /// The run was cancelled.
    LeaseRevoked = "LEASE_REVOKED",
    /// There never was such a lease.
    LeaseUnknown = "LEASE_UNKNOWN",
    /// The attempt has ended already, with another outcome.
    CompletionConflict = "COMPLETION_CONFLICT",
    /// The key was used with other content.
    SubmissionConflict = "SUBMISSION_CONFLICT",
    /// That child exists already, with another specification.
    NodeConflict = "NODE_CONFLICT",
    /// A bridge sent a pickle.
    CodecRefused = "CODEC_REFUSED",
    /// No valid token.
    Unauthenticated = "UNAUTHENTICATED",
    /// The broker is stopping.
    Stopping = "STOPPING",
    /// The feature is not built yet.
    NotAvailable = "NOT_AVAILABLE",
    /// A stored record is damaged: `dagorama verify` says which.
    StoreCorrupt = "STORE_CORRUPT",
}

/// A question. It changes nothing and is answered by [`Broker::query`](super::Broker::query) from what is resident.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Query {
    /// A run's record and counts. Answer: [`Answer::Run`].
    Run(RunId),
    /// Every node of a run that does not run, and why (at most `limit`). Answer: [`Answer::Explained`].
    Explain {
        /// Which run.
        run: RunId,
        /// Only this node.
        node: Option<NodeIndex>,
        /// At most this many.
        limit: usize,
    },
    /// The nodes of a run from `first` on (at most `limit`). Answer: [`Answer::Nodes`].
    Nodes {
        /// Which run.
        run: RunId,
        /// The first of them.
        first: NodeIndex,
        /// At most this many.
        limit: usize,
    },
    /// Open runs, newest first (at most `limit`). Answer: [`Answer::Runs`].
    OpenRuns {
        /// At most this many.
        limit: usize,
    },
    /// Where the value of a node is to be read: the end of its chain of tail calls. Answer: [`Answer::Value`].
    Value(NodeKey),
    /// Totals for metrics and `status`. Answer: [`Answer::Totals`].
    Totals,
    /// Next position of a route's partition. Answer: [`Answer::Position`].
    Position {
        /// Name of the route.
        route: Arc<str>,
        /// Which partition.
        partition: Arc<str>,
    },
    /// Pending deliveries of an output. Answer: [`Answer::Outbox`].
    Outbox {
        /// Name of the output.
        output: Arc<str>,
    },
}

/// The answer to a [`Query`].
#[derive(Debug, Clone, PartialEq)]
pub enum Answer {
    /// The run.
    Run(RunSummary),
    /// Why nodes do not run.
    Explained(Vec<(NodeIndex, Reason)>),
    /// Nodes in order.
    Nodes(Vec<NodeSummary>),
    /// Open runs.
    Runs(Vec<RunSummary>),
    /// The node that has the value, and its state.
    Value {
        /// Where to read.
        node: NodeIndex,
        /// State of that value.
        state: NodeState,
    },
    /// Totals.
    Totals(Totals),
    /// The next position to be applied; 0 if nothing was yet.
    Position(u64),
    /// Deliveries of an output.
    Outbox {
        /// All before this one are confirmed.
        cursor: u64,
        /// The next number to be given.
        next: u64,
        /// Confirmed ones at or after the cursor.
        confirmed: Vec<u64>,
    },
    /// No.
    No(Rejection),
}

/// A run, for people.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RunSummary {
    /// Its id.
    pub run: RunId,
    /// Where it stands.
    pub state: RunState,
    /// State of the root's value, which may be known before the run has ended.
    pub root_state: NodeState,
    /// The node that has (or will have) the root's value.
    pub value_node: NodeIndex,
    /// Action of the root.
    pub action: Arc<str>,
    /// Round.
    pub round: u32,
    /// Nodes by state.
    pub counts: BTreeMap<NodeState, u32>,
    /// Number of its latest event.
    pub n_events: u64,
    /// Calendar time of creation.
    pub created_wall: WallTime,
    /// Tags.
    pub tags: BTreeMap<String, String>,
    /// Where it came from.
    pub source: Arc<str>,
    /// Why it was cancelled.
    pub cancel_reason: Arc<str>,
}

/// A node, for people.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeSummary {
    /// Its number.
    pub node: NodeIndex,
    /// Its action.
    pub action: Arc<str>,
    /// Its state.
    pub state: NodeState,
    /// Leases so far.
    pub attempt: Attempt,
    /// Its parent.
    pub parent: Option<NodeIndex>,
    /// To blame when it was skipped or failed by reference.
    pub cause: Option<NodeIndex>,
    /// Note of its latest event.
    pub note: Note,
}

/// Why a node does not run (closed list, one each).
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reason {
    /// Waits for inputs.
    Inputs {
        /// How many are missing.
        remaining: u32,
    },
    /// Its start is delayed until that broker time.
    Delayed(Timestamp),
    /// Its start is delayed until that date.
    DelayedUntil(WallTime),
    /// Waits after a failure or a loss until that broker time.
    Backoff {
        /// When it is ready again.
        until: Timestamp,
        /// Failures so far.
        failures: u32,
        /// Losses so far.
        losses: u32,
    },
    /// No worker serves its queue.
    NoWorkerOnQueue(Arc<str>),
    /// No worker on its queue tolerates its taint.
    NoWorkerTolerates(Arc<str>),
    /// No worker on its queue has its action.
    NoWorkerHasAction(Arc<str>),
    /// The code is pinned, and no worker has it.
    NoWorkerHasCode(Arc<str>),
    /// Started by name, and no worker has announced that action.
    NeverAnnounced(Arc<str>),
    /// Its bundle is not full and not due.
    BatchFilling {
        /// Ready calls.
        ready: u32,
        /// How many make a bundle.
        batch: Batch,
        /// When it leaves anyway.
        until: Timestamp,
    },
    /// All workers that could run it are busy.
    WorkersBusy,
    /// It runs: that session holds it.
    Leased(SessionId),
    /// Its body has ended; its value waits for that many nodes.
    Settling {
        /// How many.
        remaining: u32,
    },
    /// It has ended.
    Ended(NodeState),
}

/// Totals, for metrics and `status`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Totals {
    /// Resident runs that have not ended.
    pub open_runs: u64,
    /// Nodes that are not terminal.
    pub open_nodes: u64,
    /// Nodes that may be claimed.
    pub ready_nodes: u64,
    /// Open leases.
    pub leases: u64,
    /// Attached sessions.
    pub sessions: u64,
    /// Ready nodes whose queue no attached session serves, by queue.
    pub stranded: BTreeMap<Arc<str>, u64>,
    /// Pending deliveries, by output.
    pub outbox: BTreeMap<Arc<str>, u64>,
    /// Dedup keys held.
    pub keys: u64,
}
