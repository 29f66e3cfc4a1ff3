//! How the broker keeps what it knows: a checksummed commit log is the truth, sled is the state brought forward behind it.
//!
//! Only this module knows sled and bincode. Callers see facts going in, and facts, records and payloads coming out.

#[cfg(test)]
pub(crate) mod conformance;
#[cfg(test)]
mod dice;
mod digest;
pub mod disk;
pub mod durable;
mod gauges;
mod loading;
mod lock;
pub mod log;
pub mod memory;
mod meta;
pub mod overlay;
mod paged_table;
pub mod pages;
pub mod payloads;
pub mod reader;
pub mod records;
pub mod row;
pub mod rows;
pub mod sled;
mod state;
pub mod state_thread;
pub mod sync_shim;
pub mod verify;
mod window;

use bytes::Bytes;

use crate::broker::outcome::{DeadLetterRecord, Fact};
use crate::broker::types::{
    InputRange, NameId, NodeIndex, NodeKey, NodeRecord, Note, Payload, PayloadRef, RunRecord,
    RunSeq, Timestamp, WallTime,
};

/// What the store refuses or cannot do. Every error after a failed write or sync is final for the process (G17).
#[derive(Debug, thiserror::Error)]
pub enum StorageError {
    /// An operating system call failed.
    #[error("{what} failed on {path}")]
    Io {
        /// The operation.
        what: &'static str,
        /// The file or directory.
        path: String,
        /// The cause.
        #[source]
        source: std::io::Error,
    },
    /// What was read is not what was written (G16). `STORE_CORRUPT`.
    #[error("{record} is damaged: {detail}; run `dagorama verify`, then restore a backup")]
    Corrupt {
        /// Which record, page, entry or file.
        record: String,
        /// What is wrong with it.
        detail: String,
    },
    /// Another process has the store open. `STORE_LOCKED`.
    #[error("{path} is in use by process {pid}: stop it or choose another --data-dir")]
    Locked {
        /// The directory.
        path: String,
        /// Who holds it.
        pid: String,
    },
    /// Written by a newer version. `FORMAT_TOO_NEW`.
    #[error("{path} has format {found}, this program reads up to {known}: use the newer program")]
    TooNew {
        /// The directory.
        path: String,
        /// Version found.
        found: u32,
        /// Newest version known.
        known: u32,
    },
    /// sled failed.
    #[error("the state store failed while {what}: {detail}")]
    State {
        /// The operation.
        what: &'static str,
        /// sled's words.
        detail: String,
    },
    /// An earlier error has closed the store (G17).
    #[error("the store stopped after an earlier error: {0}")]
    Stopped(String),
}

/// What a turn commits: one log entry.
#[derive(Debug, Clone)]
pub struct StorageBatch {
    /// Broker time of the turn; logged with the entry.
    pub now: Timestamp,
    /// The facts, in order; never empty.
    pub facts: Vec<Fact>,
}

/// How a store came up.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Loaded {
    /// Broker time of the last committed entry.
    pub now: Timestamp,
    /// Calendar time when the store was last written, for the measured downtime (G6); 0 for a new store.
    pub last_wall: WallTime,
    /// Nodes whose newest fact came from sled.
    pub from_sled: u64,
    /// Nodes whose newest fact came from the log.
    pub from_log: u64,
    /// Secret that lease tokens are derived from; made with the store, changed by a restore.
    pub lease_secret: [u8; 16],
    /// Identity of the store.
    pub store_id: [u8; 16],
    /// The first run number that was never given.
    pub next_run: u64,
}

/// How much intake the store can take.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Pressure {
    /// Everything.
    None,
    /// Slow down: the log is 64 MiB ahead of sled.
    Slow,
    /// No intake and fewer leases: the log is 256 MiB ahead.
    Stop,
    /// No intake: the disk is nearly full (`DISK_FULL`).
    DiskFull,
}

/// The store, as the engine uses it: by one thread.
pub trait Store: Send {
    /// Streams the facts of everything that must be resident: specs, names, open runs and their nodes, keys, positions, outbox,
    /// dead letter numbers. First what sled holds, then the log behind it; later facts win. Called once, first.
    fn load(&mut self, absorb: &mut dyn FnMut(Fact)) -> Result<Loaded, StorageError>;
    /// Makes a batch durable: when this returns it survives a power cut (S1). An error is final (G17).
    fn commit(&mut self, batch: StorageBatch) -> Result<(), StorageError>;
    /// Called when nothing is to be done for the moment: lets the log write its seal. Returns when it wants to be called again.
    fn idle(&mut self, since_ms: u64) -> Result<Option<u64>, StorageError>;
    /// How much intake is welcome.
    fn pressure(&self) -> Pressure;
    /// A handle for reading, for any thread.
    fn reader(&self) -> std::sync::Arc<dyn Read>;
    /// A handle for writing large payloads, for any thread.
    fn payloads(&self) -> std::sync::Arc<dyn PayloadWriter>;
    /// Brings sled up to the log and closes. An unclean end is recovered from, this only makes the next start faster.
    fn close(self: Box<Self>) -> Result<(), StorageError>;
}

/// Reads of committed state. Blocking: call from a thread that may wait. What was committed is visible at once.
pub trait Read: Send + Sync {
    /// What a node is called with, and what it waits for. `None`: no such node.
    fn arguments(&self, node: NodeKey) -> Result<Option<Arguments>, StorageError>;
    /// The same without waiting, if it is in memory (recently committed).
    fn recent_arguments(&self, node: NodeKey) -> Option<Arguments>;
    /// What the latest attempt's body left. `None`: nothing yet.
    fn outcome(&self, node: NodeKey) -> Result<Option<Outcome>, StorageError>;
    /// The same without waiting, if it is in memory.
    fn recent_outcome(&self, node: NodeKey) -> Option<Outcome>;
    /// Outcomes of neighbouring nodes, in order; nodes without one are left out. Stops after about `max_bytes` and says so by
    /// returning fewer.
    fn outcomes(
        &self,
        run: RunSeq,
        first: NodeIndex,
        count: u32,
        max_bytes: usize,
    ) -> Result<Vec<(NodeIndex, Outcome)>, StorageError>;
    /// A run's record. `None`: no such run.
    fn run(&self, run: RunSeq) -> Result<Option<RunRecord>, StorageError>;
    /// The record of a node (of any run, open or ended).
    fn node(&self, node: NodeKey) -> Result<Option<NodeRecord>, StorageError>;
    /// All facts that `Broker::adopt` needs of a run, streamed: Run, Nodes (with empty arguments), Node, references of structures.
    fn run_facts(&self, run: RunSeq, absorb: &mut dyn FnMut(Fact)) -> Result<bool, StorageError>;
    /// Records of runs before `before` (or the newest), newest first, at most `limit`.
    fn runs(
        &self,
        before: Option<RunSeq>,
        limit: usize,
    ) -> Result<Vec<(RunSeq, RunRecord)>, StorageError>;
    /// Ended runs from `first` on that ended before `ended_before`, at most `limit`; and where to go on (`None`: at the end).
    fn ended_runs(
        &self,
        first: RunSeq,
        ended_before: Timestamp,
        limit: usize,
    ) -> Result<(Vec<RunSeq>, Option<RunSeq>), StorageError>;
    /// Events of a run with numbers after `after`, ascending, at most `limit`.
    fn events(
        &self,
        run: RunSeq,
        after: u64,
        limit: usize,
    ) -> Result<Vec<EventRecord>, StorageError>;
    /// Deliveries of an outbox from `from` on, ascending, at most `limit`.
    fn outbox(
        &self,
        output: NameId,
        from: u64,
        limit: usize,
    ) -> Result<Vec<OutboxRecord>, StorageError>;
    /// Dead letters of a route from `from` on, ascending, at most `limit`.
    fn dead_letters(
        &self,
        route: NameId,
        from: u64,
        limit: usize,
    ) -> Result<Vec<(u64, DeadLetterRecord)>, StorageError>;
    /// The bytes of a stored payload, checked against its checksum.
    fn payload(&self, at: PayloadRef) -> Result<Bytes, StorageError>;
}

/// Writes large payloads before the command that names them.
pub trait PayloadWriter: Send + Sync {
    /// Makes the bytes durable and says where they are. Blocking; calls at the same time share a sync.
    fn write(&self, bytes: Bytes) -> Result<PayloadRef, StorageError>;
    /// Keeps what was written, named by a command or not, while the answer lives: for whoever must wait with a command for long.
    fn keep(self: std::sync::Arc<Self>) -> Box<dyn Send + Sync> {
        Box::new(())
    }
}

/// A node's call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Arguments {
    /// What it is called with.
    pub payload: Payload,
    /// What it waits for, in the order in which the arguments refer to them.
    pub inputs: Vec<InputRange>,
}

/// What a body left.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outcome {
    /// An error, not a value.
    pub is_error: bool,
    /// The bytes.
    pub payload: Payload,
    /// The nodes it refers to, in order.
    pub references: Vec<InputRange>,
}

/// One numbered entry of a run's history (G8).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EventRecord {
    /// 1, 2, 3… without a gap.
    pub seq: u64,
    /// Broker time.
    pub at: Timestamp,
    /// Which node; the root for events of the run.
    pub node: NodeIndex,
    /// What it became: "created", or a word of [`NodeState`](crate::broker::types::NodeState).
    pub state: &'static str,
    /// Leases so far.
    pub attempt: u32,
    /// Note.
    pub note: Note,
}

/// A delivery that is owed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OutboxRecord {
    /// Its number.
    pub seq: u64,
    /// Whose outcome.
    pub node: NodeKey,
    /// Random part of the run's id.
    pub salt: u64,
    /// Round in which it settled.
    pub round: u32,
    /// When it was owed.
    pub at: Timestamp,
}
