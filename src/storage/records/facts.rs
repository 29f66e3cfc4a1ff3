//! The body of a log entry: a version, then facts one after the other.

use std::sync::Arc;

use bytes::Bytes;

use super::cold;
use super::node::{
    Context, near, payload_head, put_node, put_payload_body, put_ranges, read_node, read_payload,
    read_ranges,
};
use super::wire::{DecodeError, Reader, put_bytes, put_signed, put_varint};
use crate::broker::outcome::{CreatedNode, DeadLetterRecord, Fact};
use crate::broker::types::{
    KeyHash, NameId, NodeIndex, NodeKey, RunId, RunSeq, SpecId, Timestamp, WallTime,
};

/// The version of the body, its first byte.
const VERSION: u8 = 1;

/// First byte of each fact; numbers are never reused.
mod tag {
    pub(super) const SPEC: u8 = 1;
    pub(super) const NAME: u8 = 2;
    pub(super) const ANNOUNCED: u8 = 3;
    pub(super) const RUN: u8 = 4;
    pub(super) const NODES: u8 = 5;
    pub(super) const NODE: u8 = 6;
    pub(super) const NODE_OF_RUN: u8 = 7;
    pub(super) const OUTCOME: u8 = 8;
    pub(super) const KEY: u8 = 9;
    pub(super) const KEYS_EXPIRED: u8 = 10;
    pub(super) const POSITION: u8 = 11;
    pub(super) const OUTBOX: u8 = 12;
    pub(super) const OUTBOX_CONFIRMED: u8 = 13;
    pub(super) const DEAD_LETTER: u8 = 14;
    pub(super) const DEAD_LETTER_REMOVED: u8 = 15;
    pub(super) const RUN_DELETED: u8 = 16;
}

/// Bits of a created node's first byte, after the payload's three.
mod created {
    pub(super) const INPUTS: u8 = 1 << 3;
    pub(super) const NOT_BEFORE: u8 = 1 << 4;
    pub(super) const NOT_BEFORE_WALL: u8 = 1 << 5;
    pub(super) const SAME_SPEC: u8 = 1 << 6;
}

/// Bits of an outcome's first byte, after the payload's three.
mod outcome {
    pub(super) const ERROR: u8 = 1 << 3;
    pub(super) const REFERENCES: u8 = 1 << 4;
    pub(super) const SAME_RUN: u8 = 1 << 5;
    pub(super) const NEXT_NODE: u8 = 1 << 6;
}

/// Appends the body of a log entry.
pub fn encode_facts(facts: &[Fact], out: &mut Vec<u8>) {
    out.push(VERSION);
    let mut context = Context::default();
    for fact in facts {
        put_fact(out, &mut context, fact);
    }
}

fn put_fact(out: &mut Vec<u8>, context: &mut Context, fact: &Fact) {
    match fact {
        Fact::Spec { id, spec } => {
            out.push(tag::SPEC);
            put_varint(out, u64::from(id.0));
            put_sized(out, |out| cold::put_spec(out, spec));
        }
        Fact::Name { id, name } => {
            out.push(tag::NAME);
            put_varint(out, u64::from(id.0));
            put_bytes(out, name.as_bytes());
        }
        Fact::Announced { action, spec } => {
            out.push(tag::ANNOUNCED);
            put_varint(out, u64::from(spec.0));
            put_bytes(out, action.as_bytes());
        }
        Fact::Run { run, record } => {
            out.push(tag::RUN);
            put_varint(out, run.0);
            put_sized(out, |out| cold::put_run(out, record));
            context.run = run.0;
        }
        Fact::Nodes {
            run,
            first,
            parent,
            round,
            event,
            nodes,
        } => put_nodes(out, context, *run, *first, *parent, (*round, *event), nodes),
        Fact::Node {
            node,
            event,
            record,
        } => {
            if node.run.0 == context.run {
                out.push(tag::NODE);
            } else {
                out.push(tag::NODE_OF_RUN);
                put_varint(out, node.run.0);
                context.run = node.run.0;
            }
            put_node(out, context, node.node.0, *event, record);
        }
        Fact::Outcome {
            node,
            is_error,
            payload,
            references,
        } => {
            out.push(tag::OUTCOME);
            let mut head = payload_head(payload);
            let same_run = node.run.0 == context.run;
            let next = Some(node.node.0) == context.node.checked_add(1);
            for (condition, bit) in [
                (*is_error, outcome::ERROR),
                (!references.is_empty(), outcome::REFERENCES),
                (same_run, outcome::SAME_RUN),
                (next, outcome::NEXT_NODE),
            ] {
                if condition {
                    head |= bit;
                }
            }
            out.push(head);
            if !same_run {
                put_varint(out, node.run.0);
            }
            if !next {
                put_signed(out, i64::from(node.node.0) - i64::from(context.node));
            }
            if !references.is_empty() {
                put_ranges(out, references);
            }
            put_payload_body(out, payload);
            context.run = node.run.0;
            context.node = node.node.0;
        }
        Fact::Key {
            key,
            run,
            content,
            at,
        } => {
            out.push(tag::KEY);
            out.extend_from_slice(&key.0.to_le_bytes());
            put_run_id(out, *run);
            out.extend_from_slice(&content.to_le_bytes());
            put_varint(out, at.0);
        }
        Fact::KeysExpired { keys } => {
            out.push(tag::KEYS_EXPIRED);
            put_varint(out, keys.len() as u64);
            for key in keys {
                out.extend_from_slice(&key.0.to_le_bytes());
            }
        }
        Fact::Position {
            route,
            partition,
            epoch,
            next,
        } => {
            out.push(tag::POSITION);
            put_varint(out, u64::from(route.0));
            put_varint(out, u64::from(*epoch));
            put_varint(out, *next);
            put_bytes(out, partition.as_bytes());
        }
        Fact::Outbox {
            output,
            seq,
            node,
            salt,
            round,
            at,
        } => {
            out.push(tag::OUTBOX);
            put_varint(out, u64::from(output.0));
            put_varint(out, *seq);
            put_varint(out, node.run.0);
            put_varint(out, u64::from(node.node.0));
            out.extend_from_slice(&salt.to_le_bytes());
            put_varint(out, u64::from(*round));
            put_varint(out, at.0);
        }
        Fact::OutboxConfirmed {
            output,
            cursor,
            beyond,
        } => {
            out.push(tag::OUTBOX_CONFIRMED);
            put_varint(out, u64::from(output.0));
            put_confirmed(out, *cursor, beyond);
        }
        Fact::DeadLetter { route, seq, letter } => {
            out.push(tag::DEAD_LETTER);
            put_varint(out, u64::from(route.0));
            put_varint(out, *seq);
            put_dead_letter(out, letter);
        }
        Fact::DeadLetterRemoved { route, seq } => {
            out.push(tag::DEAD_LETTER_REMOVED);
            put_varint(out, u64::from(route.0));
            put_varint(out, *seq);
        }
        Fact::RunDeleted { run } => {
            out.push(tag::RUN_DELETED);
            put_varint(out, run.0);
        }
    }
}

fn put_nodes(
    out: &mut Vec<u8>,
    context: &mut Context,
    run: RunSeq,
    first: NodeIndex,
    parent: Option<NodeIndex>,
    (round, event): (u32, u64),
    nodes: &[CreatedNode],
) {
    out.push(tag::NODES);
    put_varint(out, run.0);
    put_varint(out, u64::from(first.0));
    put_varint(out, parent.map_or(0, |p| u64::from(p.0) + 1));
    put_varint(out, u64::from(round));
    put_varint(out, event);
    put_varint(out, nodes.len() as u64);
    for node in nodes {
        let mut head = payload_head(&node.arguments);
        for (condition, bit) in [
            (!node.inputs.is_empty(), created::INPUTS),
            (node.not_before.0 != 0, created::NOT_BEFORE),
            (node.not_before_wall.0 != 0, created::NOT_BEFORE_WALL),
            (node.spec.0 == context.spec, created::SAME_SPEC),
        ] {
            if condition {
                head |= bit;
            }
        }
        out.push(head);
        if head & created::SAME_SPEC == 0 {
            put_varint(out, u64::from(node.spec.0));
            context.spec = node.spec.0;
        }
        if !node.inputs.is_empty() {
            put_ranges(out, &node.inputs);
        }
        if node.not_before.0 != 0 {
            put_varint(out, node.not_before.0);
        }
        if node.not_before_wall.0 != 0 {
            put_varint(out, node.not_before_wall.0);
        }
        put_payload_body(out, &node.arguments);
    }
    after_nodes(context, run.0, first.0, parent, round, event, nodes.len());
}

/// The context after created nodes: as if the last of them had been written.
fn after_nodes(
    context: &mut Context,
    run: u64,
    first: u32,
    parent: Option<NodeIndex>,
    round: u32,
    event: u64,
    count: usize,
) {
    let more = count.saturating_sub(1);
    context.run = run;
    context.node = first.saturating_add(u32::try_from(more).unwrap_or(u32::MAX));
    context.event = event.saturating_add(more as u64);
    context.parent = parent.map(|p| p.0);
    context.round = round;
}

/// Appends something with its length before it, as four bytes.
fn put_sized(out: &mut Vec<u8>, put: impl FnOnce(&mut Vec<u8>)) {
    let start = out.len();
    out.extend_from_slice(&[0; 4]);
    put(out);
    let length = (out.len() - start - 4) as u32;
    out[start..start + 4].copy_from_slice(&length.to_le_bytes());
}

fn read_sized<'a>(reader: &mut Reader<'a>) -> Result<&'a [u8], DecodeError> {
    let length = u32::from_le_bytes(reader.array()?);
    reader.raw(length as usize)
}

pub(super) fn put_run_id(out: &mut Vec<u8>, run: Option<RunId>) {
    match run {
        None => out.push(0),
        Some(run) => {
            out.push(1);
            put_varint(out, run.seq.0);
            out.extend_from_slice(&run.salt.to_le_bytes());
        }
    }
}

pub(super) fn read_run_id(reader: &mut Reader<'_>) -> Result<Option<RunId>, DecodeError> {
    match reader.u8()? {
        0 => Ok(None),
        1 => Ok(Some(RunId {
            seq: RunSeq(reader.varint()?),
            salt: reader.u64()?,
        })),
        _ => Err(reader.error("neither a run nor none")),
    }
}

/// Cursor and what is confirmed after it, as distances.
pub(super) fn put_confirmed(out: &mut Vec<u8>, cursor: u64, beyond: &[u64]) {
    put_varint(out, cursor);
    put_varint(out, beyond.len() as u64);
    let mut last = cursor;
    for seq in beyond {
        put_signed(out, seq.wrapping_sub(last).cast_signed());
        last = *seq;
    }
}

pub(super) fn read_confirmed(reader: &mut Reader<'_>) -> Result<(u64, Vec<u64>), DecodeError> {
    let cursor = reader.varint()?;
    let count = reader.count(1)?;
    let mut beyond = Vec::with_capacity(count.min(4_096));
    let mut last = cursor;
    for _ in 0..count {
        last = last.wrapping_add(reader.signed()?.cast_unsigned());
        beyond.push(last);
    }
    Ok((cursor, beyond))
}

pub(super) fn put_dead_letter(out: &mut Vec<u8>, letter: &DeadLetterRecord) {
    put_sized(out, |out| cold::put_letter(out, letter));
    out.push(payload_head(&letter.body));
    put_payload_body(out, &letter.body);
}

pub(super) fn read_dead_letter(reader: &mut Reader<'_>) -> Result<DeadLetterRecord, DecodeError> {
    let cold = cold::read_letter(read_sized(reader)?)?;
    let head = reader.u8()?;
    if head > 7 {
        return Err(reader.error("an unknown kind of body"));
    }
    Ok(DeadLetterRecord {
        code: cold.code.into(),
        reason: cold.reason.into(),
        attempts: cold.attempts,
        coordinates: cold::owned(&cold.coordinates),
        body: read_payload(reader, head)?,
        at: Timestamp(cold.at),
    })
}

/// Reads the body of a log entry. Payloads share one copy of it.
pub fn decode_facts(bytes: &[u8]) -> Result<Vec<Fact>, DecodeError> {
    decode_shared_facts(&Bytes::copy_from_slice(bytes))
}

/// The same without a copy: payloads share the memory of `bytes`.
pub fn decode_shared_facts(bytes: &Bytes) -> Result<Vec<Fact>, DecodeError> {
    let mut reader = Reader::new(bytes);
    if reader.u8()? != VERSION {
        return Err(reader.error("an unknown version of a log entry"));
    }
    let mut context = Context::default();
    let mut facts = Vec::new();
    while reader.remaining() > 0 {
        facts.push(read_fact(&mut reader, &mut context)?);
    }
    Ok(facts)
}

fn read_fact(reader: &mut Reader<'_>, context: &mut Context) -> Result<Fact, DecodeError> {
    let kind = reader.u8()?;
    Ok(match kind {
        tag::SPEC => Fact::Spec {
            id: SpecId(reader.varint32()?),
            spec: Arc::new(cold::read_spec(read_sized(reader)?)?),
        },
        tag::NAME => Fact::Name {
            id: NameId(reader.varint32()?),
            name: reader.str()?.into(),
        },
        tag::ANNOUNCED => {
            let spec = SpecId(reader.varint32()?);
            let action = reader.str()?.into();
            Fact::Announced { action, spec }
        }
        tag::RUN => {
            let run = reader.varint()?;
            context.run = run;
            Fact::Run {
                run: RunSeq(run),
                record: cold::read_run(read_sized(reader)?)?,
            }
        }
        tag::NODES => read_nodes(reader, context)?,
        tag::NODE | tag::NODE_OF_RUN => {
            if kind == tag::NODE_OF_RUN {
                context.run = reader.varint()?;
            }
            let (node, event, record) = read_node(reader, context)?;
            Fact::Node {
                node: NodeKey::new(RunSeq(context.run), NodeIndex(node)),
                event,
                record,
            }
        }
        tag::OUTCOME => {
            let head = reader.u8()?;
            if head & 0x80 != 0 {
                return Err(reader.error("an unknown kind of outcome"));
            }
            if head & outcome::SAME_RUN == 0 {
                context.run = reader.varint()?;
            }
            context.node = if head & outcome::NEXT_NODE == 0 {
                near(reader, context.node)?
            } else {
                context
                    .node
                    .checked_add(1)
                    .ok_or_else(|| reader.error("a node number over 32 bits"))?
            };
            let references = if head & outcome::REFERENCES == 0 {
                Vec::new()
            } else {
                read_ranges(reader)?
            };
            Fact::Outcome {
                node: NodeKey::new(RunSeq(context.run), NodeIndex(context.node)),
                is_error: head & outcome::ERROR != 0,
                payload: read_payload(reader, head)?,
                references,
            }
        }
        tag::KEY => Fact::Key {
            key: KeyHash(u128::from_le_bytes(reader.array()?)),
            run: read_run_id(reader)?,
            content: reader.u64()?,
            at: Timestamp(reader.varint()?),
        },
        tag::KEYS_EXPIRED => {
            let count = reader.count(16)?;
            let mut keys = Vec::with_capacity(count);
            for _ in 0..count {
                keys.push(KeyHash(u128::from_le_bytes(reader.array()?)));
            }
            Fact::KeysExpired { keys }
        }
        tag::POSITION => {
            let route = NameId(reader.varint32()?);
            let epoch = reader.varint32()?;
            let next = reader.varint()?;
            Fact::Position {
                route,
                partition: reader.str()?.into(),
                epoch,
                next,
            }
        }
        tag::OUTBOX => Fact::Outbox {
            output: NameId(reader.varint32()?),
            seq: reader.varint()?,
            node: NodeKey::new(RunSeq(reader.varint()?), NodeIndex(reader.varint32()?)),
            salt: reader.u64()?,
            round: reader.varint32()?,
            at: Timestamp(reader.varint()?),
        },
        tag::OUTBOX_CONFIRMED => {
            let output = NameId(reader.varint32()?);
            let (cursor, beyond) = read_confirmed(reader)?;
            Fact::OutboxConfirmed {
                output,
                cursor,
                beyond,
            }
        }
        tag::DEAD_LETTER => Fact::DeadLetter {
            route: NameId(reader.varint32()?),
            seq: reader.varint()?,
            letter: Box::new(read_dead_letter(reader)?),
        },
        tag::DEAD_LETTER_REMOVED => Fact::DeadLetterRemoved {
            route: NameId(reader.varint32()?),
            seq: reader.varint()?,
        },
        tag::RUN_DELETED => Fact::RunDeleted {
            run: RunSeq(reader.varint()?),
        },
        _ => return Err(reader.error("an unknown fact")),
    })
}

fn read_nodes(reader: &mut Reader<'_>, context: &mut Context) -> Result<Fact, DecodeError> {
    let run = reader.varint()?;
    let first = reader.varint32()?;
    let parent = match reader.varint()? {
        0 => None,
        n => Some(NodeIndex(
            u32::try_from(n - 1).map_err(|_| reader.error("a node number over 32 bits"))?,
        )),
    };
    let round = reader.varint32()?;
    let event = reader.varint()?;
    let count = reader.count(2)?;
    if count as u64 > u64::from(u32::MAX - first) + 1 {
        return Err(reader.error("a node number over 32 bits"));
    }
    let mut nodes = Vec::with_capacity(count.min(16_384));
    for _ in 0..count {
        let head = reader.u8()?;
        if head & 0x80 != 0 {
            return Err(reader.error("an unknown kind of node"));
        }
        if head & created::SAME_SPEC == 0 {
            context.spec = reader.varint32()?;
        }
        let inputs = if head & created::INPUTS == 0 {
            Vec::new()
        } else {
            read_ranges(reader)?
        };
        let mut optional = |bit: u8| {
            if head & bit == 0 {
                Ok(0)
            } else {
                reader.varint()
            }
        };
        let not_before = Timestamp(optional(created::NOT_BEFORE)?);
        let not_before_wall = WallTime(optional(created::NOT_BEFORE_WALL)?);
        nodes.push(CreatedNode {
            spec: SpecId(context.spec),
            arguments: read_payload(reader, head)?,
            inputs,
            not_before,
            not_before_wall,
        });
    }
    after_nodes(context, run, first, parent, round, event, count);
    Ok(Fact::Nodes {
        run: RunSeq(run),
        first: NodeIndex(first),
        parent,
        round,
        event,
        nodes,
    })
}
