//! Records that are rare or rich in text: runs, specs, dead letters. bincode writes them, through types of their own, so that
//! a change of the domain's types is never a silent change of the format.
//!
//! Layouts are positional: a changed struct is a new version with a new number, and the old one stays readable.

use std::collections::BTreeMap;

use bincode::config::{Configuration, Limit, LittleEndian, Varint};
use bincode::{BorrowDecode, Encode};

use super::wire::DecodeError;
use crate::broker::types::{
    Batch, KeyHash, NodeIndex, Retry, RunRecord, RunState, Spec, Timestamp, WallTime,
};

/// As much as a log entry can hold, so whatever was written can be read.
const LIMIT: usize = 64 << 20;

fn config() -> Configuration<LittleEndian, Varint, Limit<LIMIT>> {
    bincode::config::standard().with_limit::<LIMIT>()
}

fn put<T: Encode>(out: &mut Vec<u8>, value: &T) {
    bincode::encode_into_std_write(value, out, config()).expect("a Vec takes every byte");
}

fn read<'a, T: BorrowDecode<'a, ()>>(bytes: &'a [u8]) -> Result<T, DecodeError> {
    match bincode::borrow_decode_from_slice(bytes, config()) {
        Ok((value, used)) if used == bytes.len() => Ok(value),
        Ok((_, used)) => Err(DecodeError {
            what: "bytes after the end of a record",
            at: used,
        }),
        Err(_) => Err(DecodeError {
            what: "a record that is not of its kind",
            at: 0,
        }),
    }
}

/// Texts by name, ascending.
type Pairs<'a> = Vec<(&'a str, &'a str)>;

fn pairs(map: &BTreeMap<String, String>) -> Pairs<'_> {
    map.iter().map(|(k, v)| (k.as_str(), v.as_str())).collect()
}

pub(super) fn owned(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
    pairs
        .iter()
        .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
        .collect()
}

#[derive(Encode, BorrowDecode)]
struct RunV1<'a> {
    salt: [u8; 8],
    root: u32,
    round: u32,
    cancelled: bool,
    cancel_reason: &'a str,
    tags: Pairs<'a>,
    source: &'a str,
    created: u64,
    created_wall: u64,
    ended: Option<u64>,
    state: u8,
    key: Option<[u8; 16]>,
    n_nodes: u32,
    n_events: u64,
}

pub(super) fn put_run(out: &mut Vec<u8>, record: &RunRecord) {
    put(
        out,
        &RunV1 {
            salt: record.salt.to_le_bytes(),
            root: record.root.0,
            round: record.round,
            cancelled: record.cancelled,
            cancel_reason: &record.cancel_reason,
            tags: pairs(&record.tags),
            source: &record.source,
            created: record.created.0,
            created_wall: record.created_wall.0,
            ended: record.ended.map(|t| t.0),
            state: match record.state {
                RunState::Running => 0,
                RunState::Succeeded => 1,
                RunState::Failed => 2,
                RunState::Cancelled => 3,
            },
            key: record.key.map(|k| k.0.to_le_bytes()),
            n_nodes: record.n_nodes,
            n_events: record.n_events,
        },
    );
}

pub(super) fn read_run(bytes: &[u8]) -> Result<RunRecord, DecodeError> {
    let run: RunV1<'_> = read(bytes)?;
    Ok(RunRecord {
        salt: u64::from_le_bytes(run.salt),
        root: NodeIndex(run.root),
        round: run.round,
        cancelled: run.cancelled,
        cancel_reason: run.cancel_reason.into(),
        tags: owned(&run.tags),
        source: run.source.into(),
        created: Timestamp(run.created),
        created_wall: WallTime(run.created_wall),
        ended: run.ended.map(Timestamp),
        state: match run.state {
            0 => RunState::Running,
            1 => RunState::Succeeded,
            2 => RunState::Failed,
            3 => RunState::Cancelled,
            _ => {
                return Err(DecodeError {
                    what: "an unknown state of a run",
                    at: 0,
                });
            }
        },
        key: run.key.map(|k| KeyHash(u128::from_le_bytes(k))),
        n_nodes: run.n_nodes,
        n_events: run.n_events,
    })
}

#[derive(Encode, BorrowDecode)]
struct SpecV1<'a> {
    action: &'a str,
    queue: &'a str,
    taint: Option<&'a str>,
    priority: i32,
    max_attempts: u32,
    max_losses: u32,
    delay_ms: u64,
    factor_milli: u32,
    max_delay_ms: u64,
    jitter_milli: u32,
    timeout_ms: Option<u64>,
    fingerprint: Option<&'a str>,
    pin_code: bool,
    batch: Option<(u32, u64)>,
    by_name: bool,
}

pub(super) fn put_spec(out: &mut Vec<u8>, spec: &Spec) {
    put(
        out,
        &SpecV1 {
            action: &spec.action,
            queue: &spec.queue,
            taint: spec.taint.as_deref(),
            priority: spec.priority,
            max_attempts: spec.retry.max_attempts,
            max_losses: spec.retry.max_losses,
            delay_ms: spec.retry.delay_ms,
            factor_milli: spec.retry.factor_milli,
            max_delay_ms: spec.retry.max_delay_ms,
            jitter_milli: spec.retry.jitter_milli,
            timeout_ms: spec.timeout_ms,
            fingerprint: spec.fingerprint.as_deref(),
            pin_code: spec.pin_code,
            batch: spec.batch.map(|b| (b.max_size, b.max_wait_ms)),
            by_name: spec.by_name,
        },
    );
}

pub(super) fn read_spec(bytes: &[u8]) -> Result<Spec, DecodeError> {
    let spec: SpecV1<'_> = read(bytes)?;
    Ok(Spec {
        action: spec.action.into(),
        queue: spec.queue.into(),
        taint: spec.taint.map(Into::into),
        priority: spec.priority,
        retry: Retry {
            max_attempts: spec.max_attempts,
            max_losses: spec.max_losses,
            delay_ms: spec.delay_ms,
            factor_milli: spec.factor_milli,
            max_delay_ms: spec.max_delay_ms,
            jitter_milli: spec.jitter_milli,
        },
        timeout_ms: spec.timeout_ms,
        fingerprint: spec.fingerprint.map(Into::into),
        pin_code: spec.pin_code,
        batch: spec.batch.map(|(max_size, max_wait_ms)| Batch {
            max_size,
            max_wait_ms,
        }),
        by_name: spec.by_name,
    })
}

/// A dead letter without its body, which is a payload and follows in the payload's own form.
#[derive(Encode, BorrowDecode)]
pub(super) struct LetterV1<'a> {
    pub(super) code: &'a str,
    pub(super) reason: &'a str,
    pub(super) attempts: u32,
    pub(super) coordinates: Pairs<'a>,
    pub(super) at: u64,
}

pub(super) fn put_letter(out: &mut Vec<u8>, letter: &crate::broker::outcome::DeadLetterRecord) {
    put(
        out,
        &LetterV1 {
            code: &letter.code,
            reason: &letter.reason,
            attempts: letter.attempts,
            coordinates: pairs(&letter.coordinates),
            at: letter.at.0,
        },
    );
}

pub(super) fn read_letter(bytes: &[u8]) -> Result<LetterV1<'_>, DecodeError> {
    read(bytes)
}
