//! Bodies of the binary verbs, as PROTOCOL §5 to §10 lays them out: decoding and encoding, used by the broker and by the Rust client.
//!
//! Pure and free of panics. Every count and length is compared with what is left of the body before anything is allocated for it, so
//! a decoded body takes at most a small multiple of its bytes. Arguments and bodies are slices of the frame's memory. What the numbers mean to
//! the broker is `convert.rs`'s business.

mod decode;
mod encode;

use bytes::Bytes;

pub use self::decode::{
    decode_create, decode_created, decode_credit, decode_fetch, decode_finish, decode_heartbeat,
    decode_items, decode_leases, decode_refusals, decode_revoke, decode_submit, decode_submitted,
    decode_wait, decode_waited,
};
pub use self::encode::{
    codec_number, put_attempt, put_create, put_fetch, put_finish, put_item, put_lease, put_list,
    put_node, put_refusal, put_submit, put_submitted, put_wait, put_waited,
};
use crate::broker::types::{Codec, InputUse};

/// The most items or nodes that one frame may carry.
pub const MAX_ITEMS: usize = 262_144;

const NODE_BYTES: usize = 24;
const RANGE_BYTES: usize = 12;
const LEASE_BYTES: usize = 64;
const FINISH_BYTES: usize = 48;
const ITEM_BYTES: usize = 16;
const NEW: u32 = 1 << 31;

/// Neighbouring nodes (§5).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Range {
    /// The first of them.
    pub first: u32,
    /// How many; at least 1.
    pub count: u32,
    /// What for.
    pub mode: InputUse,
    /// `first` counts within the list that is being created.
    pub new: bool,
}

/// When a node may start (§5).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Delay {
    /// At once.
    None,
    /// Milliseconds from now.
    For(u64),
    /// A date, in milliseconds since 1970.
    Until(u64),
}

/// A node to create (§5).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    /// The connection's number of the spec.
    pub spec: u32,
    /// Of the arguments.
    pub codec: Codec,
    /// When it may start.
    pub delay: Delay,
    /// Its inputs.
    pub ranges: Vec<Range>,
    /// The arguments.
    pub arguments: Bytes,
}

/// A run to start (§6).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Submit {
    /// Empty: no key.
    pub key: Bytes,
    /// A JSON object; empty: none.
    pub tags: Bytes,
    /// Which node is the run's value.
    pub root: u32,
    /// The nodes.
    pub nodes: Vec<Node>,
}

/// The answer to a submission (§6).
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Submitted {
    /// It is durable.
    Run {
        /// Its sequence number.
        seq: u64,
        /// The random part of its id.
        salt: u64,
        /// It existed already.
        existing: bool,
    },
    /// JSON: code, message, retryable.
    Refused(Bytes),
}

/// Work for a worker (§7).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lease {
    /// Sequence number of the run.
    pub run: u64,
    /// Random part of its id.
    pub salt: u64,
    /// The node.
    pub node: u32,
    /// From 1.
    pub attempt: u32,
    /// Proof of the lease.
    pub token: [u8; 16],
    /// The broker's number of the spec.
    pub spec: u32,
    /// 0, or the same number for neighbours that are one call.
    pub batch: u32,
    /// The node was recorded with other code.
    pub other_code: bool,
    /// Of the arguments.
    pub codec: Codec,
    /// Its inputs.
    pub ranges: Vec<Range>,
    /// The arguments.
    pub arguments: Bytes,
    /// All delivered inputs, or nothing.
    pub inline: Vec<Item>,
}

/// How an attempt ended (§8.1; the numbers are those of the wire).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum End {
    /// With a value.
    Value = 0,
    /// With a structure that refers to nodes.
    Structure = 1,
    /// With the promise of a node.
    Tail = 2,
    /// Failed.
    Failed = 3,
    /// Failed, and the retry policy covers it.
    FailedRetryable = 4,
    /// Given back.
    Released = 5,
    /// Timed out, and the retry policy covers it.
    TimedOutRetryable = 6,
    /// Timed out.
    TimedOut = 7,
}

/// The end of an attempt (§8.1).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finish {
    /// Sequence number of the run.
    pub run: u64,
    /// The node.
    pub node: u32,
    /// From 1.
    pub attempt: u32,
    /// Proof of the lease.
    pub token: [u8; 16],
    /// How it ended.
    pub end: End,
    /// Of the body.
    pub codec: Codec,
    /// Nodes a structure refers to, or the one node of a tail call.
    pub ranges: Vec<Range>,
    /// Value, structure or error.
    pub body: Bytes,
    /// Nodes recorded during the attempt.
    pub children: Vec<Node>,
    /// xxh3-64 of the item's bytes, never 0: a repetition has the same. Set by the decoder, ignored by the encoder.
    pub digest: u64,
}

/// An item that was refused (§8.2).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// Position in the request.
    pub position: u32,
    /// JSON: code, message, retryable.
    pub reason: Bytes,
}

/// Children to create now (§8.3).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Create {
    /// Sequence number of the run.
    pub run: u64,
    /// The parent.
    pub node: u32,
    /// Its attempt.
    pub attempt: u32,
    /// Proof of the lease.
    pub token: [u8; 16],
    /// Position of the first among all children of the parent.
    pub first_child: u32,
    /// The children.
    pub nodes: Vec<Node>,
}

/// Outcomes to read (§9).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fetch {
    /// Sequence number of the run.
    pub run: u64,
    /// Which nodes.
    pub ranges: Vec<Range>,
}

/// An outcome (§9).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Item {
    /// The node that was asked for.
    pub node: u32,
    /// See [`STATES`].
    pub state: u8,
    /// Of the body.
    pub codec: Codec,
    /// Nodes that a structure refers to.
    pub ranges: Vec<Range>,
    /// Value or error.
    pub body: Bytes,
}

/// States of an item by number.
pub const STATES: [&str; 9] = [
    "waiting",
    "ready",
    "leased",
    "backoff",
    "settling",
    "succeeded",
    "failed",
    "cancelled",
    "skipped",
];
/// Number of the first terminal state, which is success.
pub const SUCCEEDED: u8 = 5;

/// A run to wait for (§10).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wait {
    /// Sequence number of the run.
    pub seq: u64,
    /// Random part of its id.
    pub salt: u64,
    /// 0: no limit.
    pub timeout_ms: u32,
}

/// The answer to a [`Wait`] (§10).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Waited {
    /// State of the root.
    pub state: u8,
    /// For people.
    pub hint: String,
    /// Present when the root has ended.
    pub item: Option<Item>,
}

/// One attempt, as REVOKE lists them (§2).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct AttemptName {
    /// Sequence number of the run.
    pub run: u64,
    /// The node.
    pub node: u32,
    /// From 1.
    pub attempt: u32,
}

#[cfg(test)]
#[path = "codec_tests.rs"]
mod tests;
