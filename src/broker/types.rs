//! The words of the domain: ids, time, payloads, specs, states.
//!
//! Nothing here knows how it is stored or sent: no serde, no bincode. Every boundary has types of its own and converts
//! by hand, because a serialisable type is a promise to someone.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use bytes::Bytes;

/// Position of a run in the order of creation: storage key, age and order at once. Given by the commit that creates it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct RunSeq(pub u64);

/// The public name of a run: its sequence number and 64 random bits, so that ids cannot be guessed or confused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RunId {
    /// Position in the order of creation.
    pub seq: RunSeq,
    /// Random bits fixed when the run was created.
    pub salt: u64,
}

/// A node's number within its run: dense, in order of creation, from 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct NodeIndex(pub u32);

/// A node of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeKey {
    /// The run.
    pub run: RunSeq,
    /// The node within it.
    pub node: NodeIndex,
}

/// An interned [`Spec`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct SpecId(pub u32);

/// An interned name of a route or an output (their own number spaces).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct NameId(pub u32);

/// A worker's session: 64 random bits made by the edge. It outlives its connection, so that a worker can come back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SessionId(pub u64);

/// The n-th lease of a node, counted from 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Attempt(pub u32);

/// The unguessable proof of a lease: a keyed hash of the store's lease secret, node and attempt.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LeaseToken(pub [u8; 16]);

/// The broker's own time in milliseconds: logged, never going back (G6).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Timestamp(pub u64);

/// Calendar time in milliseconds since the Unix epoch. Only compared with dates given by people or messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct WallTime(pub u64);

/// What a turn brings from the outside world.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Turn {
    /// The broker's time.
    pub now: Timestamp,
    /// Calendar time.
    pub wall: WallTime,
    /// Random bits of this turn: run salts and jitter derive from them.
    pub seed: u64,
}

impl Timestamp {
    /// This instant moved `ms` milliseconds later, without overflow.
    #[must_use]
    pub fn after_ms(self, ms: u64) -> Self {
        Self(self.0.saturating_add(ms))
    }
}

impl NodeKey {
    /// The key of node `node` of run `run`.
    #[must_use]
    pub fn new(run: RunSeq, node: NodeIndex) -> Self {
        Self { run, node }
    }
}

impl fmt::Display for RunId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:x}-{:016x}", self.seq.0, self.salt)
    }
}

impl std::str::FromStr for RunId {
    type Err = ();

    /// Reads what `Display` prints; anything else is an error without detail (the caller names the text).
    fn from_str(text: &str) -> Result<Self, ()> {
        let (seq, salt) = text.split_once('-').ok_or(())?;
        if salt.len() != 16 || seq.is_empty() || seq.len() > 16 {
            return Err(());
        }
        let hex = |s: &str| {
            if s.bytes()
                .all(|b| b.is_ascii_hexdigit() && !b.is_ascii_uppercase())
            {
                u64::from_str_radix(s, 16).map_err(|_| ())
            } else {
                Err(())
            }
        };
        Ok(Self {
            seq: RunSeq(hex(seq)?),
            salt: hex(salt)?,
        })
    }
}

impl fmt::Display for NodeKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:x}/{}", self.run.0, self.node.0)
    }
}

impl fmt::Debug for LeaseToken {
    /// Tokens never appear in logs.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("LeaseToken(..)")
    }
}

// ---- payloads -------------------------------------------------------------------------------------------------------

/// How the bytes of a payload are to be read. The broker itself never does, except JSON for sinks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Codec {
    /// JSON text.
    Json,
    /// `MessagePack`.
    MessagePack,
    /// A Python pickle: only ever read by workers and clients, never accepted from a bridge.
    Pickle,
    /// Bytes without further meaning.
    Raw,
}

/// Opaque bytes and how to read them: the arguments or the result of a node, or an error.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Payload {
    /// How to read the bytes.
    pub codec: Codec,
    /// The bytes, or where they are.
    pub body: Body,
}

/// The bytes of a payload. What is larger than [`Body::INLINE_BYTES`] must be [`Body::Stored`] before it enters a command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Body {
    /// The bytes themselves.
    Inline(Bytes),
    /// In a payload segment, already durable.
    Stored(PayloadRef),
}

/// Where a large payload lies, and how to know that it is the right one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PayloadRef {
    /// Number of the payload segment.
    pub segment: u32,
    /// Offset in bytes, 4 KiB aligned.
    pub offset: u64,
    /// Length in bytes.
    pub length: u32,
    /// xxh3-64 of the bytes.
    pub checksum: u64,
}

impl Body {
    /// The largest body, in bytes, that is kept inside records.
    pub const INLINE_BYTES: usize = 3072;

    /// Length in bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        match self {
            Self::Inline(bytes) => bytes.len(),
            Self::Stored(at) => at.length as usize,
        }
    }

    /// Whether there are no bytes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

// ---- specs ----------------------------------------------------------------------------------------------------------

/// What many nodes share; interned, so that a node names it by number. One ready lane per spec.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Spec {
    /// Name of the user's function.
    pub action: Arc<str>,
    /// Queue from which workers claim it.
    pub queue: Arc<str>,
    /// Only workers that tolerate this taint may run it.
    pub taint: Option<Arc<str>>,
    /// Larger runs earlier.
    pub priority: i32,
    /// What happens after failures and losses.
    pub retry: Retry,
    /// Longest run time of one attempt in milliseconds.
    pub timeout_ms: Option<u64>,
    /// Mark of the code the node was recorded with.
    pub fingerprint: Option<Arc<str>>,
    /// Wait for a worker that has exactly that code.
    pub pin_code: bool,
    /// Ready calls are bundled.
    pub batch: Option<Batch>,
    /// Only `action` is known (a run started by name): everything else is what a worker last announced for the action.
    /// Until one has, the node waits.
    pub by_name: bool,
}

impl Spec {
    /// The action with every default: queue "default", one attempt, no taint, no timeout.
    pub fn of(action: impl Into<Arc<str>>) -> Self {
        Self {
            action: action.into(),
            queue: "default".into(),
            taint: None,
            priority: 0,
            retry: Retry::default(),
            timeout_ms: None,
            fingerprint: None,
            pin_code: false,
            batch: None,
            by_name: false,
        }
    }
}

/// What happens after failures and losses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Retry {
    /// Failures of user code until the node has failed for good; at least 1.
    pub max_attempts: u32,
    /// Leases lost to dead or silent workers until the node is quarantined; at least 1.
    pub max_losses: u32,
    /// First delay in milliseconds.
    pub delay_ms: u64,
    /// Growth of the delay per failure, in thousandths (2000 doubles it).
    pub factor_milli: u32,
    /// Longest delay in milliseconds.
    pub max_delay_ms: u64,
    /// Spread of the delay, in thousandths of it (100 is ± 10 %).
    pub jitter_milli: u32,
}

impl Default for Retry {
    fn default() -> Self {
        Self {
            max_attempts: 1,
            max_losses: 3,
            delay_ms: 1_000,
            factor_milli: 2_000,
            max_delay_ms: 300_000,
            jitter_milli: 100,
        }
    }
}

/// How ready calls of an action are bundled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Batch {
    /// At most this many calls in one; at least 1.
    pub max_size: u32,
    /// A bundle leaves when it is full or its oldest call has been ready for this long, in milliseconds.
    pub max_wait_ms: u64,
}

// ---- edges ----------------------------------------------------------------------------------------------------------

/// How a node uses one of its inputs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum InputUse {
    /// Receives the value; is skipped when the input does not succeed.
    Value,
    /// Receives the outcome, whatever it is.
    Outcome,
    /// Only waits for success and receives nothing.
    After,
}

/// Neighbouring nodes of the same run, in order: how inputs and references are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct InputRange {
    /// First node.
    pub first: NodeIndex,
    /// How many; at least 1.
    pub count: u32,
    /// What for.
    pub mode: InputUse,
}

/// What a node's body left behind when it ended, before its value was known.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum BodyEnd {
    /// Nothing: the body has not ended, or it ended with a plain value or an error.
    Plain,
    /// A structure that holds references: it settles when they have.
    Structure,
    /// A tail call: the node's value is the value of that (later) node.
    Tail(NodeIndex),
}

// ---- states ---------------------------------------------------------------------------------------------------------

/// The recorded state of a node. Waiting, Ready and Cancelled are derived and shown by [`NodeState`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Progress {
    /// Not leased, not ended: Waiting or Ready, which its inputs decide.
    Open,
    /// A worker holds it.
    Leased {
        /// The session that holds it.
        session: SessionId,
    },
    /// Waits after a failure or loss until the record's `not_before`.
    Backoff,
    /// The body has ended, the value is still open (`BodyEnd` says what it waits for).
    Settling,
    /// Has a value.
    Succeeded,
    /// Has an error, for good (in this round).
    Failed,
    /// An input that it needs did not succeed: `cause` names it.
    Skipped,
}

/// The state of a node as users see it (closed list).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum NodeState {
    /// Inputs are missing, or its start is delayed.
    Waiting,
    /// May be claimed.
    Ready,
    /// Held by a worker.
    Leased,
    /// Waits before it is tried again.
    Backoff,
    /// Body ended, value open.
    Settling,
    /// Terminal: has a value.
    Succeeded,
    /// Terminal: has an error.
    Failed,
    /// Terminal: its run was cancelled.
    Cancelled,
    /// Terminal: a needed input did not succeed.
    Skipped,
}

impl NodeState {
    /// Whether the state is one of the four terminal ones.
    #[must_use]
    pub fn is_terminal(self) -> bool {
        matches!(
            self,
            Self::Succeeded | Self::Failed | Self::Cancelled | Self::Skipped
        )
    }

    /// The word users see.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Waiting => "waiting",
            Self::Ready => "ready",
            Self::Leased => "leased",
            Self::Backoff => "backoff",
            Self::Settling => "settling",
            Self::Succeeded => "succeeded",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
            Self::Skipped => "skipped",
        }
    }
}

/// The state of a run as users see it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum RunState {
    /// Has a node that is not terminal.
    Running,
    /// All nodes are terminal and the root succeeded.
    Succeeded,
    /// All nodes are terminal and the root failed or was skipped.
    Failed,
    /// Was cancelled.
    Cancelled,
}

impl RunState {
    /// The word users see.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Succeeded => "succeeded",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
        }
    }
}

/// Why a node record was written the way it was: the note of the event that goes with it (closed list, numbers never reused).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Note {
    /// Nothing to add.
    None,
    /// Leased to a worker whose code differs from the code the node was recorded with.
    OtherCode,
    /// The attempt failed in user code.
    AttemptFailed,
    /// The attempt took longer than its timeout.
    TimedOut,
    /// The lease was lost: its worker died or fell silent.
    LeaseLost,
    /// The worker gave the node back.
    Released,
    /// Failed because it was lost too often.
    Quarantined,
    /// Failed because something its value refers to did not succeed: `cause` names it.
    ReferenceFailed,
    /// Opened again by a resume.
    Reopened,
    /// The connection of the session that holds the lease closed: the lease ends in five seconds.
    LeaseShortened,
    /// The session came back in time and keeps its lease.
    LeaseResumed,
}

// ---- records: absolute, idempotent; what facts carry and the store keeps ----------------------------------------------

/// Everything about a run that changes, absolute. Written when the run is created, cancelled, resumed and ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RunRecord {
    /// Random part of the public id.
    pub salt: u64,
    /// The node whose value is the run's value.
    pub root: NodeIndex,
    /// 1, and one more each time the run was resumed.
    pub round: u32,
    /// Cancelled in this round.
    pub cancelled: bool,
    /// What the person who cancelled it said.
    pub cancel_reason: Arc<str>,
    /// Whoever started it may have marked it.
    pub tags: BTreeMap<String, String>,
    /// Where it came from: "native", or the name of a route.
    pub source: Arc<str>,
    /// Broker time of creation.
    pub created: Timestamp,
    /// Calendar time of creation, for people.
    pub created_wall: WallTime,
    /// Broker time of the end of this round; `None` while it runs.
    pub ended: Option<Timestamp>,
    /// Final state of this round; `Running` while it runs.
    pub state: RunState,
    /// The submission key it was started with, hashed.
    pub key: Option<KeyHash>,
    /// Number of nodes when this record was written. For an open run the nodes themselves are counted.
    pub n_nodes: u32,
    /// Number of the run's latest event when this record was written (G8).
    pub n_events: u64,
}

/// Everything about a node that changes, absolute. Written at every transition.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeRecord {
    /// Its spec.
    pub spec: SpecId,
    /// The node whose attempt created it; `None` for nodes of a submission.
    pub parent: Option<NodeIndex>,
    /// The round in which this state was reached.
    pub round: u32,
    /// Where it stands.
    pub progress: Progress,
    /// What its body left behind.
    pub body: BodyEnd,
    /// Leases so far.
    pub attempt: Attempt,
    /// Failures of user code so far in this round.
    pub failures: u32,
    /// Lost leases so far in this round.
    pub losses: u32,
    /// Not ready before this instant (delays and backoff); 0 when there is none.
    pub not_before: Timestamp,
    /// Not ready before this date (a delay given as a date); 0 when there is none.
    pub not_before_wall: WallTime,
    /// Digest of the accepted completion of the current attempt number (repeats are compared with it); 0 when there is none.
    pub digest: u64,
    /// The node that is to blame when this one is Skipped or failed by reference.
    pub cause: Option<NodeIndex>,
    /// Note of the event.
    pub note: Note,
}

/// Hash of a submission key or of a message's dedup key, with its scope hashed in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct KeyHash(pub u128);
