//! What a bridge to another message broker implements.
//!
//! A [`Source`] brings messages in and acknowledges them upstream only after the broker's commit. A [`Sink`] takes deliveries out and
//! confirms them only after the other side has. Both are driven by the supervisor in the server (`src/bridges`): any returned error
//! means "drop me, back off, build me again from the configuration", so a bridge never retries connections itself.
//!
//! Nothing here knows runs, nodes or storage: a bridge sees messages. The shape is that of Kafka and RabbitMQ: acknowledgements are
//! contiguous and in order of receipt, positions are asked for before a partition is read, reading can be paused while the connection
//! stays alive, and confirmations of deliveries may come later, in any order, with a window of the bridge's choice.
//!
//! [`loopback`] is a bridge in memory, for tests; [`conformance`] is the suite that every bridge must pass.

pub mod conformance;
pub mod loopback;

use std::collections::BTreeMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;

use bytes::Bytes;

/// A boxed future, so that bridges can be chosen at run time.
pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// A message as it came in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    /// The original bytes. `None` is a tombstone, which is not the same as empty.
    pub body: Option<Bytes>,
    /// Key, if the other side has one.
    pub key: Option<Bytes>,
    /// Headers or properties, in order.
    pub headers: Vec<(String, Bytes)>,
    /// How a repetition is recognised.
    pub identity: MessageIdentity,
    /// Where it stood, in the source's words (`topic`, `partition`, `offset`, `path`, `line`…): kept with dead letters.
    pub coordinates: BTreeMap<String, String>,
    /// Set when the source itself found it unusable (a line that is too long): it becomes a dead letter with this reason.
    pub unusable: Option<Unusable>,
}

/// Why a message cannot be used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unusable {
    /// Stable code, such as `PAYLOAD_TOO_LARGE`.
    pub code: &'static str,
    /// For people.
    pub reason: String,
}

/// How the repetition of a message is recognised.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MessageIdentity {
    /// A place in an ordered log. Messages of one partition arrive in order.
    Position {
        /// Names the log: a file's identity, or cluster/topic/partition.
        partition: Arc<str>,
        /// Where the message begins.
        position: u64,
        /// Where the next one begins.
        next: u64,
    },
    /// A key chosen by the producer (`message-id`), unique within the dedup window.
    Key(Bytes),
    /// Nothing to recognise it by.
    None,
}

/// What the source gets back for its messages. Only after this may it acknowledge upstream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Receipt {
    /// Durable: a run was started (or had been before).
    Applied {
        /// It had been applied before.
        duplicate: bool,
    },
    /// Durable as a dead letter.
    DeadLettered,
}

/// The inbound half.
pub trait Source: Send {
    /// Waits for messages and returns at most `max` of them, never an empty list; while paused it waits. It may be called again before
    /// earlier messages were settled. It may be cancelled: a cancelled call loses nothing. `None`: no more messages will ever come (a
    /// file that is not followed has ended).
    fn receive(&mut self, max: usize) -> BoxFuture<'_, Result<Option<Vec<Message>>, BridgeError>>;
    /// The next `receipts.len()` messages that were received and not settled yet, in order of receipt, are durable: acknowledge
    /// them upstream. That is a hint to the other side, never the truth: what is repeated nevertheless is recognised.
    fn settle<'a>(&'a mut self, receipts: &'a [Receipt]) -> BoxFuture<'a, Result<(), BridgeError>>;
    /// Stop or go on reading (back-pressure); keep the connection alive meanwhile.
    fn pause(&mut self, paused: bool) -> BoxFuture<'_, Result<(), BridgeError>>;
    /// Whether messages of this partition may still be applied. Asked before each commit: a source that has lost a partition to another
    /// reader says no, and what it had handed out of it is discarded, unsettled.
    fn holds(&self, partition: &str) -> bool {
        let _ = partition;
        true
    }
    /// How far behind the source is, in messages or bytes, if it knows.
    fn lag(&self) -> Option<u64>;
    /// The route ends in good order: say goodbye upstream. What was not settled comes again.
    fn close(&mut self) -> BoxFuture<'_, Result<(), BridgeError>> {
        Box::pin(async { Ok(()) })
    }
}

/// Looks up the next position to be read of a partition, as the broker has committed it. 0: nothing yet. A source asks before it reads a
/// partition (a file when it opens it, a Kafka consumer inside the rebalance callback, into the assignment itself).
pub trait Positions: Send + Sync {
    /// The position of that partition on this route.
    fn next(&self, partition: &str) -> BoxFuture<'_, Result<u64, BridgeError>>;
}

/// A message on its way out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Delivery {
    /// Number within its outbox; a sink sees them ascending, and again after a crash.
    pub seq: u64,
    /// `run/node/round/output`: the same when it is delivered again.
    pub message_id: String,
    /// Key for ordering and partitioning.
    pub key: Option<Bytes>,
    /// The bytes; `None` is a tombstone.
    pub body: Option<Bytes>,
    /// `application/json`, `application/msgpack`, `application/octet-stream`.
    pub content_type: &'static str,
    /// More headers.
    pub headers: Vec<(String, String)>,
}

/// What became of a delivery.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Confirmation {
    /// Its number.
    pub seq: u64,
    /// `None`: the other side has it, durably. Else it can never be delivered as it is: it becomes a dead letter of the output, so that
    /// those behind it go on.
    pub refused: Option<Unusable>,
}

/// The outbound half.
pub trait Sink: Send {
    /// Hands over deliveries, in order, waiting only while the window of unconfirmed ones is full. Returns what has been confirmed by
    /// now (of this or earlier calls), or an error; what was not confirmed is delivered again after a rebuild, with the same number
    /// and `message_id`. The caller commits what one call has confirmed before it makes the next. A cancelled call needs a rebuild.
    fn deliver(
        &mut self,
        deliveries: Vec<Delivery>,
    ) -> BoxFuture<'_, Result<Vec<Confirmation>, BridgeError>>;
    /// Waits until everything handed over is confirmed, and returns the rest.
    fn drain(&mut self) -> BoxFuture<'_, Result<Vec<Confirmation>, BridgeError>>;
}

impl Confirmation {
    /// The other side has it.
    #[must_use]
    pub fn confirmed(seq: u64) -> Self {
        Self { seq, refused: None }
    }
}

/// What goes wrong in a bridge.
#[derive(Debug, thiserror::Error)]
pub enum BridgeError {
    /// Will not get better by itself: the route is parked with this reason until someone acts.
    #[error("{code}: {reason}")]
    Parked {
        /// Stable code.
        code: &'static str,
        /// For people: what, why, and what to do.
        reason: String,
    },
    /// May get better: drop, back off, build again.
    #[error("{0}")]
    Retry(String),
}
