//! Bodies of the binary verbs, as PROTOCOL §5 to §10 lays them out: decoding and encoding, used by the broker and by the Rust client.
//!
//! Pure and free of panics. Every count and length is compared with what is left of the body before anything is allocated for it, so
//! a decoded body takes at most a small multiple of its bytes. Arguments and bodies are slices of the frame's memory. What the numbers mean to
//! the broker is `convert.rs`'s business.

use bytes::Bytes;
use xxhash_rust::xxh3::xxh3_64;

use super::frame::{Malformed, Problem};
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

// ---- reading --------------------------------------------------------------------------------------------------------

/// What is left of a body.
struct Cursor {
    bytes: Bytes,
    at: usize,
    /// Nodes and items that may still come in this frame.
    budget: usize,
}

impl Cursor {
    fn new(bytes: Bytes) -> Self {
        Self {
            bytes,
            at: 0,
            budget: MAX_ITEMS,
        }
    }

    fn left(&self) -> usize {
        self.bytes.len() - self.at
    }

    fn array<const N: usize>(&mut self, field: &'static str) -> Result<&[u8; N], Malformed> {
        let left = self.left();
        let Some(array) = self
            .bytes
            .get(self.at..)
            .and_then(|rest| rest.first_chunk::<N>())
        else {
            return Err(short(field, N as u64, left));
        };
        self.at += N;
        Ok(array)
    }

    fn u8(&mut self, field: &'static str) -> Result<u8, Malformed> {
        self.array::<1>(field).map(|&[byte]| byte)
    }

    fn u16(&mut self, field: &'static str) -> Result<u16, Malformed> {
        self.array(field).map(|bytes| u16::from_le_bytes(*bytes))
    }

    fn u32(&mut self, field: &'static str) -> Result<u32, Malformed> {
        self.array(field).map(|bytes| u32::from_le_bytes(*bytes))
    }

    fn u64(&mut self, field: &'static str) -> Result<u64, Malformed> {
        self.array(field).map(|bytes| u64::from_le_bytes(*bytes))
    }

    fn slice(&mut self, length: u32, field: &'static str) -> Result<Bytes, Malformed> {
        let length = length as usize;
        if length > self.left() {
            return Err(short(field, length as u64, self.left()));
        }
        if length == 0 {
            // An empty slice would keep the whole frame alive for nothing.
            return Ok(Bytes::new());
        }
        let slice = self.bytes.slice(self.at..self.at + length);
        self.at += length;
        Ok(slice)
    }

    /// Checks a count of things of at least `least` bytes each against what is left.
    fn room(&self, count: u32, least: usize, field: &'static str) -> Result<usize, Malformed> {
        let needed = u64::from(count) * least as u64;
        if needed > self.left() as u64 {
            return Err(short(field, needed, self.left()));
        }
        Ok(count as usize)
    }

    /// The same for nodes and items, of which a frame may carry only so many.
    fn items(&mut self, count: u32, least: usize, field: &'static str) -> Result<usize, Malformed> {
        let count = self.room(count, least, field)?;
        if count > self.budget {
            return Err(Malformed::too_large(
                field,
                count as u64,
                self.budget as u64,
            ));
        }
        self.budget -= count;
        Ok(count)
    }

    fn end(&self) -> Result<(), Malformed> {
        match self.left() {
            0 => Ok(()),
            left => Err(Malformed {
                field: "body",
                problem: Problem::Trailing(left),
            }),
        }
    }

    fn range(&mut self) -> Result<Range, Malformed> {
        let bytes: &[u8; RANGE_BYTES] = self.array("ranges")?;
        let first = le32(bytes, 0);
        let count = le32(bytes, 4);
        let mode = le32(bytes, 8);
        if count == 0 || first.checked_add(count).is_none() {
            return Err(Malformed::unknown("count", u64::from(count)));
        }
        Ok(Range {
            first,
            count,
            new: mode & NEW != 0,
            mode: match mode & !NEW {
                0 => InputUse::Value,
                1 => InputUse::Outcome,
                2 => InputUse::After,
                _ => return Err(Malformed::unknown("mode", u64::from(mode))),
            },
        })
    }

    fn ranges(&mut self, count: u32) -> Result<Vec<Range>, Malformed> {
        let count = self.room(count, RANGE_BYTES, "n_ranges")?;
        let mut ranges = Vec::with_capacity(count);
        for _ in 0..count {
            ranges.push(self.range()?);
        }
        Ok(ranges)
    }

    fn node(&mut self) -> Result<Node, Malformed> {
        let head: [u8; NODE_BYTES] = *self.array("node")?;
        let value = le64(&head, 16);
        let delay = match head[5] {
            0 if value == 0 => Delay::None,
            1 => Delay::For(value),
            2 => Delay::Until(value),
            kind => return Err(Malformed::unknown("delay", u64::from(kind))),
        };
        reserved(le16(&head, 6))?;
        let codec = codec(head[4])?;
        let ranges = self.ranges(le32(&head, 8))?;
        let arguments = self.slice(le32(&head, 12), "length")?;
        Ok(Node {
            spec: le32(&head, 0),
            codec,
            delay,
            ranges,
            arguments,
        })
    }

    fn nodes(&mut self, count: u32, field: &'static str) -> Result<Vec<Node>, Malformed> {
        let count = self.items(count, NODE_BYTES, field)?;
        let mut nodes = Vec::with_capacity(count);
        for _ in 0..count {
            nodes.push(self.node()?);
        }
        Ok(nodes)
    }

    fn item(&mut self) -> Result<Item, Malformed> {
        let head: [u8; ITEM_BYTES] = *self.array("item")?;
        let state = head[4];
        if usize::from(state) >= STATES.len() {
            return Err(Malformed::unknown("state", u64::from(state)));
        }
        reserved(le16(&head, 6))?;
        let codec = codec(head[5])?;
        let ranges = self.ranges(le32(&head, 8))?;
        let body = self.slice(le32(&head, 12), "length")?;
        Ok(Item {
            node: le32(&head, 0),
            state,
            codec,
            ranges,
            body,
        })
    }

    fn lease(&mut self) -> Result<Lease, Malformed> {
        let head: [u8; LEASE_BYTES] = *self.array("lease")?;
        let flags = head[49];
        if flags > 1 {
            return Err(Malformed::unknown("flags", u64::from(flags)));
        }
        reserved(le16(&head, 50))?;
        let codec = codec(head[48])?;
        let ranges = self.ranges(le32(&head, 52))?;
        let arguments = self.slice(le32(&head, 56), "length")?;
        let n_inline = self.items(le32(&head, 60), ITEM_BYTES, "n_inline")?;
        let mut inline = Vec::with_capacity(n_inline);
        for _ in 0..n_inline {
            inline.push(self.item()?);
        }
        Ok(Lease {
            run: le64(&head, 0),
            salt: le64(&head, 8),
            node: le32(&head, 16),
            attempt: le32(&head, 20),
            token: part(&head, 24),
            spec: le32(&head, 40),
            batch: le32(&head, 44),
            other_code: flags == 1,
            codec,
            ranges,
            arguments,
            inline,
        })
    }

    fn finish(&mut self) -> Result<Finish, Malformed> {
        let start = self.at;
        let head: [u8; FINISH_BYTES] = *self.array("finish")?;
        let end = match head[32] {
            0 => End::Value,
            1 => End::Structure,
            2 => End::Tail,
            3 => End::Failed,
            4 => End::FailedRetryable,
            5 => End::Released,
            6 => End::TimedOutRetryable,
            7 => End::TimedOut,
            other => return Err(Malformed::unknown("end", u64::from(other))),
        };
        reserved(le16(&head, 34))?;
        let codec = codec(head[33])?;
        let ranges = self.ranges(le32(&head, 36))?;
        let allowed = match end {
            End::Structure => true,
            End::Tail => matches!(ranges[..], [Range { count: 1, .. }]),
            _ => ranges.is_empty(),
        };
        if !allowed {
            return Err(Malformed::unknown("n_ranges", ranges.len() as u64));
        }
        let body = self.slice(le32(&head, 44), "length")?;
        let children = self.nodes(le32(&head, 40), "n_children")?;
        Ok(Finish {
            run: le64(&head, 0),
            node: le32(&head, 8),
            attempt: le32(&head, 12),
            token: part(&head, 16),
            end,
            codec,
            ranges,
            body,
            children,
            digest: xxh3_64(&self.bytes[start..self.at]).max(1),
        })
    }

    fn submit(&mut self) -> Result<Submit, Malformed> {
        let key_length = self.u16("key_length")?;
        let key = self.slice(u32::from(key_length), "key")?;
        let tags_length = self.u16("tags_length")?;
        let tags = self.slice(u32::from(tags_length), "tags")?;
        let n_nodes = self.u32("n_nodes")?;
        let root = self.u32("root")?;
        if root >= n_nodes {
            return Err(Malformed::unknown("root", u64::from(root)));
        }
        let nodes = self.nodes(n_nodes, "n_nodes")?;
        Ok(Submit {
            key,
            tags,
            root,
            nodes,
        })
    }
}

fn short(field: &'static str, needed: u64, left: usize) -> Malformed {
    Malformed {
        field,
        problem: Problem::Short { needed, left },
    }
}

fn reserved(value: u16) -> Result<(), Malformed> {
    match value {
        0 => Ok(()),
        _ => Err(Malformed::unknown("reserved", u64::from(value))),
    }
}

fn codec(number: u8) -> Result<Codec, Malformed> {
    match number {
        0 => Ok(Codec::Json),
        1 => Ok(Codec::MessagePack),
        2 => Ok(Codec::Pickle),
        3 => Ok(Codec::Raw),
        _ => Err(Malformed::unknown("codec", u64::from(number))),
    }
}

/// Number of a codec on the wire.
#[must_use]
pub fn codec_number(codec: Codec) -> u8 {
    match codec {
        Codec::Json => 0,
        Codec::MessagePack => 1,
        Codec::Pickle => 2,
        Codec::Raw => 3,
    }
}

fn part<const N: usize, const M: usize>(head: &[u8; N], at: usize) -> [u8; M] {
    let mut out = [0; M];
    out.copy_from_slice(&head[at..at + M]);
    out
}

fn le16<const N: usize>(head: &[u8; N], at: usize) -> u16 {
    u16::from_le_bytes(part(head, at))
}

fn le32<const N: usize>(head: &[u8; N], at: usize) -> u32 {
    u32::from_le_bytes(part(head, at))
}

fn le64<const N: usize>(head: &[u8; N], at: usize) -> u64 {
    u64::from_le_bytes(part(head, at))
}

fn list<T>(
    body: Bytes,
    least: usize,
    mut one: impl FnMut(&mut Cursor) -> Result<T, Malformed>,
) -> Result<Vec<T>, Malformed> {
    let mut cursor = Cursor::new(body);
    let n = cursor.u32("n")?;
    let n = cursor.items(n, least, "n")?;
    let mut out = Vec::with_capacity(n);
    for _ in 0..n {
        out.push(one(&mut cursor)?);
    }
    cursor.end()?;
    Ok(out)
}

/// The body of SUBMIT.
pub fn decode_submit(body: Bytes) -> Result<Vec<Submit>, Malformed> {
    list(body, 12, Cursor::submit)
}

/// The reply to SUBMIT.
pub fn decode_submitted(body: Bytes) -> Result<Vec<Submitted>, Malformed> {
    list(body, 3, |cursor| {
        let ok = cursor.u8("ok")?;
        match ok {
            0 => {
                let length = cursor.u16("length")?;
                Ok(Submitted::Refused(
                    cursor.slice(u32::from(length), "reason")?,
                ))
            }
            1 | 2 => Ok(Submitted::Run {
                seq: cursor.u64("seq")?,
                salt: cursor.u64("salt")?,
                existing: ok == 2,
            }),
            _ => Err(Malformed::unknown("ok", u64::from(ok))),
        }
    })
}

/// The body of CREDIT.
pub fn decode_credit(body: Bytes) -> Result<u32, Malformed> {
    let mut cursor = Cursor::new(body);
    let calls = cursor.u32("credit")?;
    cursor.end()?;
    Ok(calls)
}

/// The body of HEARTBEAT.
pub fn decode_heartbeat(body: Bytes) -> Result<Vec<u64>, Malformed> {
    list(body, 8, |cursor| cursor.u64("session"))
}

/// The body of FINISH.
pub fn decode_finish(body: Bytes) -> Result<Vec<Finish>, Malformed> {
    list(body, FINISH_BYTES, Cursor::finish)
}

/// The reply to FINISH.
pub fn decode_refusals(body: Bytes) -> Result<Vec<Refusal>, Malformed> {
    list(body, 6, |cursor| {
        let position = cursor.u32("position")?;
        let length = cursor.u16("length")?;
        let reason = cursor.slice(u32::from(length), "reason")?;
        Ok(Refusal { position, reason })
    })
}

/// The body of CREATE.
pub fn decode_create(body: Bytes) -> Result<Create, Malformed> {
    let mut cursor = Cursor::new(body);
    let head: [u8; 36] = *cursor.array("create")?;
    let n = cursor.u32("n")?;
    let nodes = cursor.nodes(n, "n")?;
    cursor.end()?;
    Ok(Create {
        run: le64(&head, 0),
        node: le32(&head, 8),
        attempt: le32(&head, 12),
        token: part(&head, 16),
        first_child: le32(&head, 32),
        nodes,
    })
}

/// The reply to CREATE: number of the first child in the run.
pub fn decode_created(body: Bytes) -> Result<u32, Malformed> {
    decode_credit(body)
}

/// The body of FETCH.
pub fn decode_fetch(body: Bytes) -> Result<Fetch, Malformed> {
    let mut cursor = Cursor::new(body);
    let run = cursor.u64("run")?;
    let n = cursor.u32("n_ranges")?;
    let n = cursor.items(n, RANGE_BYTES, "n_ranges")?;
    let mut ranges = Vec::with_capacity(n);
    for _ in 0..n {
        // The mode is ignored here, so any value is one.
        let bytes: &[u8; RANGE_BYTES] = cursor.array("ranges")?;
        let (first, count) = (le32(bytes, 0), le32(bytes, 4));
        if count == 0 || first.checked_add(count).is_none() {
            return Err(Malformed::unknown("count", u64::from(count)));
        }
        ranges.push(Range {
            first,
            count,
            mode: InputUse::Value,
            new: false,
        });
    }
    cursor.end()?;
    Ok(Fetch { run, ranges })
}

/// One frame of the reply to FETCH.
pub fn decode_items(body: Bytes) -> Result<Vec<Item>, Malformed> {
    list(body, ITEM_BYTES, Cursor::item)
}

/// The body of WAIT.
pub fn decode_wait(body: Bytes) -> Result<Wait, Malformed> {
    let mut cursor = Cursor::new(body);
    let wait = Wait {
        seq: cursor.u64("seq")?,
        salt: cursor.u64("salt")?,
        timeout_ms: cursor.u32("timeout_ms")?,
    };
    cursor.end()?;
    Ok(wait)
}

/// The reply to WAIT.
pub fn decode_waited(body: Bytes) -> Result<Waited, Malformed> {
    let mut cursor = Cursor::new(body);
    let state = cursor.u8("state")?;
    if usize::from(state) >= STATES.len() {
        return Err(Malformed::unknown("state", u64::from(state)));
    }
    let length = cursor.u16("length")?;
    let hint = cursor.slice(u32::from(length), "hint")?;
    let hint = String::from_utf8(hint.to_vec())
        .map_err(|_| Malformed::text("hint", "is not UTF-8 text"))?;
    let item = if state >= SUCCEEDED {
        Some(cursor.item()?)
    } else {
        None
    };
    cursor.end()?;
    Ok(Waited { state, hint, item })
}

/// The body of LEASES.
pub fn decode_leases(body: Bytes) -> Result<Vec<Lease>, Malformed> {
    list(body, LEASE_BYTES, Cursor::lease)
}

/// The body of REVOKE.
pub fn decode_revoke(body: Bytes) -> Result<Vec<AttemptName>, Malformed> {
    list(body, 16, |cursor| {
        Ok(AttemptName {
            run: cursor.u64("run")?,
            node: cursor.u32("node")?,
            attempt: cursor.u32("attempt")?,
        })
    })
}

// ---- writing --------------------------------------------------------------------------------------------------------

fn put_range(out: &mut Vec<u8>, range: &Range) {
    let mode = match range.mode {
        InputUse::Value => 0,
        InputUse::Outcome => 1,
        InputUse::After => 2,
    } | if range.new { NEW } else { 0 };
    out.extend_from_slice(&range.first.to_le_bytes());
    out.extend_from_slice(&range.count.to_le_bytes());
    out.extend_from_slice(&u32::to_le_bytes(mode));
}

/// Appends a node.
pub fn put_node(out: &mut Vec<u8>, node: &Node) {
    let mut head = [0; NODE_BYTES];
    let (kind, value) = match node.delay {
        Delay::None => (0, 0),
        Delay::For(ms) => (1, ms),
        Delay::Until(ms) => (2, ms),
    };
    head[..4].copy_from_slice(&node.spec.to_le_bytes());
    head[4] = codec_number(node.codec);
    head[5] = kind;
    head[8..12].copy_from_slice(&(node.ranges.len() as u32).to_le_bytes());
    head[12..16].copy_from_slice(&(node.arguments.len() as u32).to_le_bytes());
    head[16..].copy_from_slice(&u64::to_le_bytes(value));
    out.extend_from_slice(&head);
    for range in &node.ranges {
        put_range(out, range);
    }
    out.extend_from_slice(&node.arguments);
}

/// Appends a submission. A key and tags longer than 65,535 bytes cannot be said: the caller has checked them.
pub fn put_submit(out: &mut Vec<u8>, submit: &Submit) {
    put_short(out, &submit.key);
    put_short(out, &submit.tags);
    out.extend_from_slice(&(submit.nodes.len() as u32).to_le_bytes());
    out.extend_from_slice(&submit.root.to_le_bytes());
    for node in &submit.nodes {
        put_node(out, node);
    }
}

/// Appends the answer to a submission.
pub fn put_submitted(out: &mut Vec<u8>, submitted: &Submitted) {
    match submitted {
        Submitted::Refused(reason) => {
            out.push(0);
            put_short(out, reason);
        }
        Submitted::Run {
            seq,
            salt,
            existing,
        } => {
            out.push(if *existing { 2 } else { 1 });
            out.extend_from_slice(&seq.to_le_bytes());
            out.extend_from_slice(&salt.to_le_bytes());
        }
    }
}

/// Appends bytes after their length as u16; what is longer is cut (only texts for people can be).
fn put_short(out: &mut Vec<u8>, bytes: &[u8]) {
    let length = bytes.len().min(usize::from(u16::MAX));
    out.extend_from_slice(&(length as u16).to_le_bytes());
    out.extend_from_slice(&bytes[..length]);
}

/// Appends an item.
pub fn put_item(out: &mut Vec<u8>, item: &Item) {
    let mut head = [0; ITEM_BYTES];
    head[..4].copy_from_slice(&item.node.to_le_bytes());
    head[4] = item.state;
    head[5] = codec_number(item.codec);
    head[8..12].copy_from_slice(&(item.ranges.len() as u32).to_le_bytes());
    head[12..16].copy_from_slice(&(item.body.len() as u32).to_le_bytes());
    out.extend_from_slice(&head);
    for range in &item.ranges {
        put_range(out, range);
    }
    out.extend_from_slice(&item.body);
}

/// Appends a lease.
pub fn put_lease(out: &mut Vec<u8>, lease: &Lease) {
    let mut head = [0; LEASE_BYTES];
    head[..8].copy_from_slice(&lease.run.to_le_bytes());
    head[8..16].copy_from_slice(&lease.salt.to_le_bytes());
    head[16..20].copy_from_slice(&lease.node.to_le_bytes());
    head[20..24].copy_from_slice(&lease.attempt.to_le_bytes());
    head[24..40].copy_from_slice(&lease.token);
    head[40..44].copy_from_slice(&lease.spec.to_le_bytes());
    head[44..48].copy_from_slice(&lease.batch.to_le_bytes());
    head[48] = codec_number(lease.codec);
    head[49] = u8::from(lease.other_code);
    head[52..56].copy_from_slice(&(lease.ranges.len() as u32).to_le_bytes());
    head[56..60].copy_from_slice(&(lease.arguments.len() as u32).to_le_bytes());
    head[60..].copy_from_slice(&(lease.inline.len() as u32).to_le_bytes());
    out.extend_from_slice(&head);
    for range in &lease.ranges {
        put_range(out, range);
    }
    out.extend_from_slice(&lease.arguments);
    for item in &lease.inline {
        put_item(out, item);
    }
}

/// Appends the end of an attempt.
pub fn put_finish(out: &mut Vec<u8>, finish: &Finish) {
    let mut head = [0; FINISH_BYTES];
    head[..8].copy_from_slice(&finish.run.to_le_bytes());
    head[8..12].copy_from_slice(&finish.node.to_le_bytes());
    head[12..16].copy_from_slice(&finish.attempt.to_le_bytes());
    head[16..32].copy_from_slice(&finish.token);
    head[32] = finish.end as u8;
    head[33] = codec_number(finish.codec);
    head[36..40].copy_from_slice(&(finish.ranges.len() as u32).to_le_bytes());
    head[40..44].copy_from_slice(&(finish.children.len() as u32).to_le_bytes());
    head[44..].copy_from_slice(&(finish.body.len() as u32).to_le_bytes());
    out.extend_from_slice(&head);
    for range in &finish.ranges {
        put_range(out, range);
    }
    out.extend_from_slice(&finish.body);
    for child in &finish.children {
        put_node(out, child);
    }
}

/// Appends a refusal.
pub fn put_refusal(out: &mut Vec<u8>, refusal: &Refusal) {
    out.extend_from_slice(&refusal.position.to_le_bytes());
    put_short(out, &refusal.reason);
}

/// Appends the body of CREATE.
pub fn put_create(out: &mut Vec<u8>, create: &Create) {
    out.extend_from_slice(&create.run.to_le_bytes());
    out.extend_from_slice(&create.node.to_le_bytes());
    out.extend_from_slice(&create.attempt.to_le_bytes());
    out.extend_from_slice(&create.token);
    out.extend_from_slice(&create.first_child.to_le_bytes());
    out.extend_from_slice(&(create.nodes.len() as u32).to_le_bytes());
    for node in &create.nodes {
        put_node(out, node);
    }
}

/// Appends the body of FETCH.
pub fn put_fetch(out: &mut Vec<u8>, fetch: &Fetch) {
    out.extend_from_slice(&fetch.run.to_le_bytes());
    out.extend_from_slice(&(fetch.ranges.len() as u32).to_le_bytes());
    for range in &fetch.ranges {
        put_range(out, range);
    }
}

/// Appends the body of WAIT.
pub fn put_wait(out: &mut Vec<u8>, wait: &Wait) {
    out.extend_from_slice(&wait.seq.to_le_bytes());
    out.extend_from_slice(&wait.salt.to_le_bytes());
    out.extend_from_slice(&wait.timeout_ms.to_le_bytes());
}

/// Appends the reply to WAIT. An item goes with a terminal state, and only with one.
pub fn put_waited(out: &mut Vec<u8>, waited: &Waited) {
    out.push(waited.state);
    put_short(out, waited.hint.as_bytes());
    if let Some(item) = &waited.item {
        put_item(out, item);
    }
}

/// Appends one attempt of REVOKE.
pub fn put_attempt(out: &mut Vec<u8>, name: &AttemptName) {
    out.extend_from_slice(&name.run.to_le_bytes());
    out.extend_from_slice(&name.node.to_le_bytes());
    out.extend_from_slice(&name.attempt.to_le_bytes());
}

/// Appends `n` and then each thing.
pub fn put_list<T>(out: &mut Vec<u8>, things: &[T], mut one: impl FnMut(&mut Vec<u8>, &T)) {
    out.extend_from_slice(&(things.len() as u32).to_le_bytes());
    for thing in things {
        one(out, thing);
    }
}

#[cfg(test)]
#[path = "codec_tests.rs"]
mod tests;
