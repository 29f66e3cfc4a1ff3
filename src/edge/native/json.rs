//! The JSON documents of the protocol (PROTOCOL §3, §4, §11), as types of their own: the domain knows no JSON.
//!
//! Unknown fields are passed over, so that a newer client can talk to an older broker. Missing ones have the defaults of the page.

use std::collections::BTreeMap;

use bytes::Bytes;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::frame::{MAX_JSON_BYTES, Malformed};

/// Who connects (§3).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Hello {
    /// Of the protocol.
    pub version: u64,
    /// Client or worker.
    pub kind: Kind,
    /// The shared secret.
    #[serde(default)]
    pub token: Option<String>,
    /// For people.
    #[serde(default)]
    pub name: String,
    /// The session to come back to, as 16 hex digits.
    #[serde(default)]
    pub session: Option<String>,
    /// Queues that the worker serves.
    #[serde(default)]
    pub queues: Vec<String>,
    /// Taints that it tolerates.
    #[serde(default)]
    pub tolerate: Vec<String>,
    /// What it can run.
    #[serde(default)]
    pub actions: Vec<Spec>,
}

/// What kind of peer it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// Starts runs and reads results.
    Client,
    /// Runs nodes.
    Worker,
}

/// The answer to [`Hello`] (§3).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Welcome {
    /// Of the protocol.
    pub version: u64,
    /// Name and version of the broker.
    pub broker: String,
    /// Identity of the store.
    pub store: String,
    /// The worker's session.
    #[serde(default)]
    pub session: Option<String>,
    /// A silent session loses its leases after this long.
    pub lease_ms: u64,
    /// How often a worker must be heard from.
    pub heartbeat_ms: u64,
    /// The largest payload.
    pub max_payload: u64,
    /// Leases that the session still holds: run, node, attempt.
    #[serde(default)]
    pub leases: Vec<(u64, u32, u32)>,
}

/// A spec (§4).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Spec {
    /// The connection's number in DEFINE, the broker's in SPECS, absent in HELLO.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<u32>,
    /// Name of the user's function.
    pub action: String,
    /// Queue.
    #[serde(default = "default_queue")]
    pub queue: String,
    /// Taint.
    #[serde(default)]
    pub taint: Option<String>,
    /// Larger runs earlier.
    #[serde(default)]
    pub priority: i32,
    /// What happens after failures and losses.
    #[serde(default)]
    pub retry: Retry,
    /// Longest run time of one attempt.
    #[serde(default)]
    pub timeout_ms: Option<u64>,
    /// Mark of the code.
    #[serde(default)]
    pub fingerprint: Option<String>,
    /// Wait for a worker with exactly that code.
    #[serde(default)]
    pub pin_code: bool,
    /// Ready calls are bundled.
    #[serde(default)]
    pub batch: Option<Batch>,
    /// Only the action is known.
    #[serde(default)]
    pub by_name: bool,
}

fn default_queue() -> String {
    "default".to_owned()
}

/// Part of a [`Spec`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Retry {
    /// Failures until it has failed for good.
    pub max_attempts: u32,
    /// Losses until it is quarantined.
    pub max_losses: u32,
    /// First delay.
    pub delay_ms: u64,
    /// Growth per failure in thousandths.
    pub factor_milli: u32,
    /// Longest delay.
    pub max_delay_ms: u64,
    /// Spread in thousandths.
    pub jitter_milli: u32,
}

impl Default for Retry {
    fn default() -> Self {
        let retry = crate::broker::types::Retry::default();
        Self {
            max_attempts: retry.max_attempts,
            max_losses: retry.max_losses,
            delay_ms: retry.delay_ms,
            factor_milli: retry.factor_milli,
            max_delay_ms: retry.max_delay_ms,
            jitter_milli: retry.jitter_milli,
        }
    }
}

/// Part of a [`Spec`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Batch {
    /// Calls in a bundle.
    #[serde(default = "default_size")]
    pub max_size: u32,
    /// How long the oldest waits.
    #[serde(default = "default_wait")]
    pub max_wait_ms: u64,
}

fn default_size() -> u32 {
    64
}

fn default_wait() -> u64 {
    20
}

/// "No" (§2 ERROR, and refused items).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct No {
    /// Stable, for programs.
    pub code: String,
    /// For people.
    pub message: String,
    /// The same request may succeed later.
    pub retryable: bool,
}

/// CANCEL.
#[derive(Debug, Serialize, Deserialize)]
pub struct Cancel {
    /// Which run.
    pub run: String,
    /// For people.
    #[serde(default)]
    pub reason: String,
}

/// RESUME.
#[derive(Debug, Serialize, Deserialize)]
pub struct Resume {
    /// Which run.
    pub run: String,
}

/// EVENTS.
#[derive(Debug, Serialize, Deserialize)]
pub struct Events {
    /// Which run.
    pub run: String,
    /// Events after this number.
    #[serde(default)]
    pub after: u64,
    /// At most this many.
    #[serde(default)]
    pub limit: Option<usize>,
}

/// EXPLAIN.
#[derive(Debug, Serialize, Deserialize)]
pub struct Explain {
    /// Which run.
    pub run: String,
    /// Only this node.
    #[serde(default)]
    pub node: Option<u32>,
    /// At most this many.
    #[serde(default)]
    pub limit: Option<usize>,
}

/// RUNS.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Runs {
    /// Only runs in this state.
    #[serde(default)]
    pub state: Option<String>,
    /// Only runs with this tag: `key` or `key=value`.
    #[serde(default)]
    pub tag: Option<String>,
    /// At most this many.
    #[serde(default)]
    pub limit: Option<usize>,
}

/// SHOW.
#[derive(Debug, Serialize, Deserialize)]
pub struct Show {
    /// Which run.
    pub run: String,
    /// With its nodes.
    #[serde(default)]
    pub nodes: bool,
}

/// A run (§11).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Run {
    /// Its id.
    pub run: String,
    /// Where it stands.
    pub state: String,
    /// State of the root's value.
    pub root_state: String,
    /// Action of the root.
    pub action: String,
    /// Round.
    pub round: u32,
    /// Nodes by state. Lists leave it out for ended runs: SHOW has it.
    pub counts: BTreeMap<String, u32>,
    /// All nodes.
    pub n_nodes: u32,
    /// Number of its latest event.
    pub n_events: u64,
    /// Milliseconds since 1970.
    pub created: u64,
    /// Tags.
    pub tags: BTreeMap<String, String>,
    /// Where it came from.
    pub source: String,
    /// Why it was cancelled.
    pub cancel_reason: String,
    /// Its nodes, when asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nodes: Option<Vec<Node>>,
}

/// A node of a [`Run`] (§11).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Node {
    /// Its number.
    pub node: u32,
    /// Its action.
    pub action: String,
    /// Its state.
    pub state: String,
    /// Leases so far.
    pub attempt: u32,
    /// Its parent.
    pub parent: Option<u32>,
    /// To blame.
    pub cause: Option<u32>,
    /// Note of its latest event; empty: none.
    pub note: String,
}

/// An event (§11).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// 1, 2, 3…
    pub seq: u64,
    /// Milliseconds of the calendar.
    pub at: u64,
    /// Which node.
    pub node: u32,
    /// Its action.
    pub action: String,
    /// What it became.
    pub state: String,
    /// Leases so far.
    pub attempt: u32,
    /// Note; empty: none.
    pub note: String,
}

/// Why a node does not run (§11).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reason {
    /// Its number.
    pub node: u32,
    /// Its action.
    pub action: String,
    /// One of a closed list of words.
    pub reason: String,
    /// For people.
    pub text: String,
}

/// Reads a document of at most [`MAX_JSON_BYTES`].
pub fn parse<T: DeserializeOwned>(body: &[u8], field: &'static str) -> Result<T, Malformed> {
    if body.len() > MAX_JSON_BYTES {
        return Err(Malformed::too_large(
            field,
            body.len() as u64,
            MAX_JSON_BYTES as u64,
        ));
    }
    serde_json::from_slice(body).map_err(|error| Malformed::text(field, error.to_string()))
}

/// Writes a document.
#[must_use]
pub fn write<T: Serialize>(document: &T) -> Bytes {
    // Serialising these types cannot fail: their keys are texts and they write into memory.
    serde_json::to_vec(document).unwrap_or_default().into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_action_of_a_spec_is_required() {
        let spec: Spec = parse(br#"{"action": "a"}"#, "spec").expect("a spec");
        assert_eq!((spec.queue.as_str(), spec.id), ("default", None));
        assert_eq!(spec.retry.max_losses, 3);
        assert_eq!(
            (spec.timeout_ms, spec.pin_code, spec.by_name),
            (None, false, false)
        );
        let spec: Spec = parse(
            br#"{"id": 7, "action": "a", "retry": {"max_attempts": 5}, "batch": {}, "new_field": [1]}"#,
            "spec",
        )
        .expect("a spec");
        assert_eq!((spec.retry.max_attempts, spec.retry.delay_ms), (5, 1_000));
        let batch = spec.batch.expect("a batch");
        assert_eq!((batch.max_size, batch.max_wait_ms), (64, 20));
    }

    #[test]
    fn wrong_documents_are_refused() {
        for body in [
            &b""[..],
            b"null",
            b"[]",
            b"{}",
            b"{\"action\": 1}",
            b"{\"action\": \"a\", \"priority\": \"high\"}",
            b"{\"action\": \"a\", \"priority\": 99999999999}",
            b"{\"action\": \"a\"} trailing",
            b"\xff\xfe",
        ] {
            assert!(parse::<Spec>(body, "spec").is_err(), "{body:?}");
        }
        let deep = [vec![b'['; 100_000], vec![b']'; 100_000]].concat();
        assert!(parse::<serde_json::Value>(&deep, "deep").is_err());
        let large = vec![b' '; MAX_JSON_BYTES + 1];
        let error = parse::<serde_json::Value>(&large, "large").expect_err("large");
        assert!(error.is_too_large());
    }
}
