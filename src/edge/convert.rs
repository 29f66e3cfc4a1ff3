//! Wire types to domain types and back; the only place that knows both.
//!
//! Checks the shape of what came in (a spec that exists, texts of a sane length) and leaves every decision to the broker.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use bytes::Bytes;
use xxhash_rust::xxh3::{Xxh3, xxh3_128};

use super::native::codec;
use super::native::frame::Malformed;
use super::native::json;
use crate::broker::command::{
    AttemptEnd, Code, Completion, CreateChildren, Delay, NewInput, NewNode, NodeRef, NodeSummary,
    Reason, Rejection, RunSummary, Submission, SubmissionKey,
};
use crate::broker::types::{
    Attempt, Batch, Body, InputRange, KeyHash, LeaseToken, NodeIndex, NodeKey, NodeState, Note,
    Payload, Retry, RunId, RunSeq, RunState, SessionId, Spec, WallTime,
};
use crate::storage::StorageError;

/// The longest name of an action, a queue or a taint, in bytes.
const MAX_NAME_BYTES: usize = 1024;
/// The most specs that one connection may define.
const MAX_DEFINITIONS: usize = 65_536;
/// The largest payload.
pub const MAX_PAYLOAD_BYTES: usize = 64 * 1024 * 1024;
/// The most tags of a run.
const MAX_TAGS: usize = 256;

// ---- errors ---------------------------------------------------------------------------------------------------------

/// Whether the same request may succeed later.
#[must_use]
pub fn is_retryable(code: Code) -> bool {
    matches!(
        code,
        Code::QuotaPending
            | Code::Overloaded
            | Code::OutboxFull
            | Code::DiskFull
            | Code::InboxWindowFull
            | Code::Stopping
    )
}

/// A rejection as JSON; its message is cut so that the document fits where its length is a u16.
#[must_use]
pub fn no(rejection: &Rejection) -> Bytes {
    let mut message = rejection.message.clone();
    if message.len() > 4_096 {
        let mut end = 4_096;
        while !message.is_char_boundary(end) {
            end -= 1;
        }
        message.truncate(end);
    }
    json::write(&json::No {
        code: rejection.code.as_str().to_owned(),
        message,
        retryable: is_retryable(rejection.code),
    })
}

/// Malformed bytes as a rejection.
#[must_use]
pub fn malformed(error: &Malformed) -> Rejection {
    let code = if error.is_too_large() {
        Code::PayloadTooLarge
    } else {
        Code::InvalidRequest
    };
    Rejection::new(code, error.to_string())
}

/// A failed read or write of the store as a rejection.
#[must_use]
pub fn storage(error: &StorageError) -> Rejection {
    let code = match error {
        StorageError::Corrupt { .. } => Code::StoreCorrupt,
        _ => Code::Stopping,
    };
    Rejection::new(code, error.to_string())
}

// ---- ids ------------------------------------------------------------------------------------------------------------

/// A run id from its text.
pub fn run_id(text: &str) -> Result<RunId, Rejection> {
    text.parse().map_err(|()| {
        let shown: String = text.chars().take(64).collect();
        Rejection::new(
            Code::InvalidRequest,
            format!("{shown:?} is no run id: it looks like 1f-0123456789abcdef"),
        )
    })
}

/// A session id from its 16 hex digits.
#[must_use]
pub fn session_id(text: &str) -> Option<SessionId> {
    let is_hex = text.len() == 16 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
    if !is_hex {
        return None;
    }
    u64::from_str_radix(text, 16).ok().map(SessionId)
}

/// The identity of a store as 32 hex digits.
#[must_use]
pub fn store_text(id: [u8; 16]) -> String {
    format!("{:032x}", u128::from_be_bytes(id))
}

/// A session id as 16 hex digits.
#[must_use]
pub fn session_text(session: SessionId) -> String {
    format!("{:016x}", session.0)
}

// ---- specs ----------------------------------------------------------------------------------------------------------

/// A spec from its JSON.
pub fn spec(json: &json::Spec) -> Result<Spec, Malformed> {
    let name = |field, text: &str| -> Result<Arc<str>, Malformed> {
        if text.is_empty() {
            return Err(Malformed::text(field, "is empty"));
        }
        if text.len() > MAX_NAME_BYTES {
            let (found, limit) = (text.len() as u64, MAX_NAME_BYTES as u64);
            return Err(Malformed::too_large(field, found, limit));
        }
        Ok(Arc::from(text))
    };
    let retry = json.retry;
    for (field, value) in [
        ("max_attempts", retry.max_attempts),
        ("max_losses", retry.max_losses),
        ("max_size", json.batch.map_or(1, |batch| batch.max_size)),
    ] {
        if value == 0 {
            return Err(Malformed::text(field, "is 0, must be at least 1"));
        }
    }
    Ok(Spec {
        action: name("action", &json.action)?,
        queue: name("queue", &json.queue)?,
        taint: json
            .taint
            .as_deref()
            .map(|taint| name("taint", taint))
            .transpose()?,
        priority: json.priority,
        retry: Retry {
            max_attempts: retry.max_attempts,
            max_losses: retry.max_losses,
            delay_ms: retry.delay_ms,
            factor_milli: retry.factor_milli,
            max_delay_ms: retry.max_delay_ms,
            jitter_milli: retry.jitter_milli,
        },
        timeout_ms: json.timeout_ms,
        fingerprint: json
            .fingerprint
            .as_deref()
            .map(|mark| name("fingerprint", mark))
            .transpose()?,
        pin_code: json.pin_code,
        batch: json.batch.map(|batch| Batch {
            max_size: batch.max_size,
            max_wait_ms: batch.max_wait_ms,
        }),
        by_name: json.by_name,
    })
}

/// A spec as JSON.
#[must_use]
pub fn spec_json(id: Option<u32>, spec: &Spec) -> json::Spec {
    json::Spec {
        id,
        action: spec.action.to_string(),
        queue: spec.queue.to_string(),
        taint: spec.taint.as_deref().map(str::to_owned),
        priority: spec.priority,
        retry: json::Retry {
            max_attempts: spec.retry.max_attempts,
            max_losses: spec.retry.max_losses,
            delay_ms: spec.retry.delay_ms,
            factor_milli: spec.retry.factor_milli,
            max_delay_ms: spec.retry.max_delay_ms,
            jitter_milli: spec.retry.jitter_milli,
        },
        timeout_ms: spec.timeout_ms,
        fingerprint: spec.fingerprint.as_deref().map(str::to_owned),
        pin_code: spec.pin_code,
        batch: spec.batch.map(|batch| json::Batch {
            max_size: batch.max_size,
            max_wait_ms: batch.max_wait_ms,
        }),
        by_name: spec.by_name,
    }
}

/// The specs that a connection has defined, by its own numbers.
#[derive(Debug, Default)]
pub struct Definitions(HashMap<u32, Arc<Spec>>);

impl Definitions {
    /// Takes the specs of a DEFINE.
    pub fn define(&mut self, specs: &[json::Spec]) -> Result<(), Malformed> {
        for json in specs {
            let Some(id) = json.id else {
                return Err(Malformed::text("id", "is missing"));
            };
            self.0.insert(id, Arc::new(spec(json)?));
            if self.0.len() > MAX_DEFINITIONS {
                let (found, limit) = (self.0.len() as u64, MAX_DEFINITIONS as u64);
                return Err(Malformed::too_large("specs of a connection", found, limit));
            }
        }
        Ok(())
    }

    fn get(&self, number: u32) -> Result<&Arc<Spec>, Rejection> {
        self.0.get(&number).ok_or_else(|| {
            Rejection::new(
                Code::InvalidRequest,
                format!("spec {number} was not defined on this connection: send DEFINE first"),
            )
        })
    }
}

/// The specs of one command, each once, by position.
#[derive(Default)]
struct Used {
    specs: Vec<Arc<Spec>>,
    positions: HashMap<u32, u32>,
    /// Neighbours mostly have the same spec.
    latest: Option<(u32, u32)>,
}

impl Used {
    fn position(&mut self, number: u32, definitions: &Definitions) -> Result<u32, Rejection> {
        if let Some((latest, position)) = self.latest
            && latest == number
        {
            return Ok(position);
        }
        let position = if let Some(position) = self.positions.get(&number) {
            *position
        } else {
            let spec = definitions.get(number)?;
            let position = self.specs.len() as u32;
            self.specs.push(Arc::clone(spec));
            self.positions.insert(number, position);
            position
        };
        self.latest = Some((number, position));
        Ok(position)
    }
}

// ---- requests -------------------------------------------------------------------------------------------------------

/// Inline bytes as a payload.
#[must_use]
pub fn inline(codec: crate::broker::types::Codec, bytes: Bytes) -> Payload {
    Payload {
        codec,
        body: Body::Inline(bytes),
    }
}

fn sized(what: &str, bytes: &Bytes) -> Result<(), Rejection> {
    if bytes.len() <= MAX_PAYLOAD_BYTES {
        return Ok(());
    }
    Err(Rejection::new(
        Code::PayloadTooLarge,
        format!(
            "{what} of {} bytes, at most {MAX_PAYLOAD_BYTES} are taken: keep large data elsewhere and pass a reference",
            bytes.len()
        ),
    ))
}

fn new_inputs(ranges: &[codec::Range]) -> Vec<NewInput> {
    ranges
        .iter()
        .map(|range| NewInput {
            first: if range.new {
                NodeRef::New(range.first)
            } else {
                NodeRef::Existing(NodeIndex(range.first))
            },
            count: range.count,
            mode: range.mode,
        })
        .collect()
}

fn new_nodes(
    nodes: Vec<codec::Node>,
    definitions: &Definitions,
    used: &mut Used,
) -> Result<Vec<NewNode>, Rejection> {
    nodes
        .into_iter()
        .map(|node| {
            sized("arguments", &node.arguments)?;
            Ok(NewNode {
                spec: used.position(node.spec, definitions)?,
                inputs: new_inputs(&node.ranges),
                delay: match node.delay {
                    codec::Delay::None => Delay::None,
                    codec::Delay::For(ms) => Delay::For(ms),
                    codec::Delay::Until(ms) => Delay::Until(WallTime(ms)),
                },
                arguments: inline(node.codec, node.arguments),
            })
        })
        .collect()
}

/// A run to start.
pub fn submission(
    submit: codec::Submit,
    definitions: &Definitions,
) -> Result<Submission, Rejection> {
    let tags = tags(&submit.tags)?;
    let key = if submit.key.is_empty() {
        None
    } else {
        Some(SubmissionKey {
            hash: submission_key(&submit.key),
            content: content(&submit, definitions)?,
        })
    };
    let mut used = Used::default();
    let nodes = new_nodes(submit.nodes, definitions, &mut used)?;
    Ok(Submission {
        key,
        specs: used.specs,
        nodes,
        root: submit.root,
        tags,
        origin: None,
    })
}

/// The hash of a client's key, in the scope of all clients.
#[must_use]
pub fn submission_key(key: &[u8]) -> KeyHash {
    KeyHash(xxh3_128(&[b"submission\0", key].concat()))
}

/// Hash of what is submitted: the same call by another process, or after a change of its retry policy, is the same content, so specs
/// count by the names of their actions.
fn content(submit: &codec::Submit, definitions: &Definitions) -> Result<u64, Rejection> {
    let mut hash = Xxh3::new();
    let mut part = |bytes: &[u8]| {
        hash.update(&(bytes.len() as u64).to_le_bytes());
        hash.update(bytes);
    };
    part(&submit.tags);
    part(&submit.root.to_le_bytes());
    let mut shape = Vec::new();
    for node in &submit.nodes {
        part(definitions.get(node.spec)?.action.as_bytes());
        shape.clear();
        codec::put_node(
            &mut shape,
            &codec::Node {
                spec: 0,
                ..node.clone()
            },
        );
        part(&shape);
    }
    Ok(hash.digest())
}

fn tags(bytes: &[u8]) -> Result<BTreeMap<String, String>, Rejection> {
    if bytes.is_empty() {
        return Ok(BTreeMap::new());
    }
    let tags: BTreeMap<String, String> =
        json::parse(bytes, "tags").map_err(|error| malformed(&error))?;
    if tags.len() > MAX_TAGS {
        return Err(Rejection::new(
            Code::InvalidRequest,
            format!("{} tags, at most {MAX_TAGS} are taken", tags.len()),
        ));
    }
    Ok(tags)
}

/// The end of an attempt.
pub fn completion(
    finish: codec::Finish,
    definitions: &Definitions,
) -> Result<Completion, Rejection> {
    sized("a body", &finish.body)?;
    let mut used = Used::default();
    let children = if finish.children.is_empty() {
        Vec::new()
    } else {
        new_nodes(finish.children, definitions, &mut used)?
    };
    let body = inline(finish.codec, finish.body);
    let failed = |retryable, timed_out| AttemptEnd::Failed {
        error: body.clone(),
        retryable,
        timed_out,
    };
    let end = match finish.end {
        codec::End::Value => AttemptEnd::Value(body),
        codec::End::Structure => AttemptEnd::Structure {
            body,
            references: new_inputs(&finish.ranges),
        },
        codec::End::Tail => match new_inputs(&finish.ranges)[..] {
            [NewInput { first, .. }] => AttemptEnd::Tail(first),
            _ => {
                return Err(Rejection::new(
                    Code::InvalidRequest,
                    "a tail call names exactly one node",
                ));
            }
        },
        codec::End::Failed => failed(false, false),
        codec::End::FailedRetryable => failed(true, false),
        codec::End::TimedOutRetryable => failed(true, true),
        codec::End::TimedOut => failed(false, true),
        codec::End::Released => AttemptEnd::Released,
    };
    Ok(Completion {
        node: NodeKey::new(RunSeq(finish.run), NodeIndex(finish.node)),
        attempt: Attempt(finish.attempt),
        token: LeaseToken(finish.token),
        digest: finish.digest,
        specs: used.specs,
        children,
        end,
    })
}

/// Children to create now.
pub fn create(
    create: codec::Create,
    definitions: &Definitions,
) -> Result<CreateChildren, Rejection> {
    let mut used = Used::default();
    let children = new_nodes(create.nodes, definitions, &mut used)?;
    Ok(CreateChildren {
        node: NodeKey::new(RunSeq(create.run), NodeIndex(create.node)),
        attempt: Attempt(create.attempt),
        token: LeaseToken(create.token),
        first_child: create.first_child,
        specs: used.specs,
        children,
    })
}

// ---- answers --------------------------------------------------------------------------------------------------------

/// Ranges of the store, as they are sent.
#[must_use]
pub fn ranges(ranges: &[InputRange]) -> Vec<codec::Range> {
    ranges
        .iter()
        .map(|range| codec::Range {
            first: range.first.0,
            count: range.count,
            mode: range.mode,
            new: false,
        })
        .collect()
}

/// Number of a state on the wire.
#[must_use]
pub fn state_number(state: NodeState) -> u8 {
    match state {
        NodeState::Waiting => 0,
        NodeState::Ready => 1,
        NodeState::Leased => 2,
        NodeState::Backoff => 3,
        NodeState::Settling => 4,
        NodeState::Succeeded => codec::SUCCEEDED,
        NodeState::Failed => 6,
        NodeState::Cancelled => 7,
        NodeState::Skipped => 8,
    }
}

/// A run state from its word.
pub fn run_state(word: &str) -> Result<RunState, Rejection> {
    let states = [
        RunState::Running,
        RunState::Succeeded,
        RunState::Failed,
        RunState::Cancelled,
    ];
    states
        .into_iter()
        .find(|state| state.as_str() == word)
        .ok_or_else(|| {
            let shown: String = word.chars().take(64).collect();
            Rejection::new(
                Code::InvalidRequest,
                format!("{shown:?} is no state of a run: it is one of running, succeeded, failed, cancelled"),
            )
        })
}

/// The word for a note; empty when there is none.
#[must_use]
pub fn note_word(note: Note) -> &'static str {
    match note {
        Note::None => "",
        Note::OtherCode => "other_code",
        Note::AttemptFailed => "attempt_failed",
        Note::TimedOut => "timed_out",
        Note::LeaseLost => "lease_lost",
        Note::Released => "released",
        Note::Quarantined => "quarantined",
        Note::ReferenceFailed => "reference_failed",
        Note::Reopened => "reopened",
        Note::LeaseShortened => "lease_shortened",
        Note::LeaseResumed => "lease_resumed",
    }
}

/// A run, for people.
#[must_use]
pub fn run_json(run: &RunSummary) -> json::Run {
    json::Run {
        run: run.run.to_string(),
        state: run.state.as_str().to_owned(),
        root_state: run.root_state.as_str().to_owned(),
        action: run.action.to_string(),
        round: run.round,
        n_nodes: run.counts.values().sum(),
        counts: run
            .counts
            .iter()
            .map(|(state, n)| (state.as_str().to_owned(), *n))
            .collect(),
        n_events: run.n_events,
        created: run.created_wall.0,
        tags: run.tags.clone(),
        source: run.source.to_string(),
        cancel_reason: run.cancel_reason.to_string(),
        nodes: None,
    }
}

/// A node, for people.
#[must_use]
pub fn node_json(node: &NodeSummary) -> json::Node {
    json::Node {
        node: node.node.0,
        action: node.action.to_string(),
        state: node.state.as_str().to_owned(),
        attempt: node.attempt.0,
        parent: node.parent.map(|parent| parent.0),
        cause: node.cause.map(|cause| cause.0),
        note: note_word(node.note).to_owned(),
    }
}

/// Why a node does not run: a word for programs and a text for people.
#[must_use]
pub fn reason_words(reason: &Reason) -> (&'static str, String) {
    match reason {
        Reason::Inputs { remaining } => ("inputs", format!("waits for {remaining} inputs")),
        Reason::Delayed(_) => ("delayed", "its start is delayed".to_owned()),
        Reason::DelayedUntil(date) => (
            "delayed_until",
            format!("its start is delayed until {} ms after 1970", date.0),
        ),
        Reason::Backoff {
            failures, losses, ..
        } => (
            "backoff",
            format!(
                "is tried again after a pause: {failures} failures, {losses} lost leases so far"
            ),
        ),
        Reason::NoWorkerOnQueue(queue) => (
            "no_worker_on_queue",
            format!(
                "no worker serves queue {queue:?}: start one with {}",
                worker_command(queue)
            ),
        ),
        Reason::NoWorkerTolerates(taint) => (
            "no_worker_tolerates",
            format!(
                "no worker on its queue tolerates {taint:?}: start one with `dagorama worker <module> --tolerate {taint}`"
            ),
        ),
        Reason::NoWorkerHasAction(action) => (
            "no_worker_has_action",
            format!(
                "no worker on its queue has {action}: start one whose module defines it with `dagorama worker <module>`"
            ),
        ),
        Reason::NoWorkerHasCode(action) => (
            "no_worker_has_code",
            format!(
                "no worker has the code that {action} was recorded with, and the code is pinned: start that version with `dagorama worker <module>`"
            ),
        ),
        Reason::NeverAnnounced(action) => (
            "never_announced",
            format!(
                "no worker has ever announced {action}: start one with `dagorama worker <module>`"
            ),
        ),
        Reason::BatchFilling { ready, batch, .. } => (
            "batch_filling",
            format!(
                "its bundle has {ready} of {} calls and waits at most {} ms",
                batch.max_size, batch.max_wait_ms
            ),
        ),
        Reason::WorkersBusy => (
            "workers_busy",
            "all workers that could run it are busy".to_owned(),
        ),
        Reason::Leased(session) => (
            "leased",
            format!("is running in session {:016x}", session.0),
        ),
        Reason::Settling { remaining } => (
            "settling",
            format!("its body has ended, its value waits for {remaining} nodes"),
        ),
        Reason::Ended(state) => ("ended", format!("has {}", state.as_str())),
    }
}

fn worker_command(queue: &str) -> String {
    if queue == "default" {
        "`dagorama worker <module>`".to_owned()
    } else {
        format!("`dagorama worker <module> --queue {queue}`")
    }
}

#[cfg(test)]
#[path = "convert_tests.rs"]
mod tests;
