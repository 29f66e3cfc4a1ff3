//! Reading bodies. Every count and length is compared with what is left before anything is allocated for it; nothing here panics.

use bytes::Bytes;
use xxhash_rust::xxh3::xxh3_64;

use super::{
    AttemptName, Create, Delay, End, FINISH_BYTES, Fetch, Finish, ITEM_BYTES, Item, LEASE_BYTES,
    Lease, MAX_ITEMS, NEW, NODE_BYTES, Node, RANGE_BYTES, Range, Refusal, STATES, SUCCEEDED,
    Submit, Submitted, Wait, Waited,
};
use crate::broker::types::{Codec, InputUse};
use crate::edge::native::frame::{Malformed, Problem};

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
