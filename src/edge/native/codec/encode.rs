//! Writing bodies: each function appends to a buffer, so that a frame is built in place.

use super::{
    AttemptName, Create, Delay, FINISH_BYTES, Fetch, Finish, ITEM_BYTES, Item, LEASE_BYTES, Lease,
    NEW, NODE_BYTES, Node, Range, Refusal, Submit, Submitted, Wait, Waited,
};
use crate::broker::types::{Codec, InputUse};

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
