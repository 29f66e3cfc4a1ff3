//! Small things that several tests of the broker need.

use std::sync::Arc;

use bytes::Bytes;

use super::command::{Rejection, Reply};
use super::outcome::Fact;
use super::types::{Batch, Body, Codec, Payload, Retry, RunSeq, Spec};

/// Chance from a seed (splitmix64).
pub(super) struct Chance(pub u64);

impl Chance {
    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }
    pub(super) fn below(&mut self, n: u64) -> u64 {
        self.next() % n.max(1)
    }
    pub(super) fn pick<'a, T>(&mut self, list: &'a [T]) -> Option<&'a T> {
        if list.is_empty() {
            None
        } else {
            Some(&list[self.below(list.len() as u64) as usize])
        }
    }
}

/// A small payload.
pub(super) fn payload(text: &str) -> Payload {
    Payload {
        codec: Codec::Json,
        body: Body::Inline(Bytes::copy_from_slice(text.as_bytes())),
    }
}

/// A spec with every default.
pub(super) fn spec(action: &str) -> Spec {
    Spec::of(action)
}

/// One spec of each kind.
pub(super) fn specs() -> Vec<Arc<Spec>> {
    let retry = Retry {
        max_attempts: 3,
        max_losses: 2,
        delay_ms: 50,
        ..Retry::default()
    };
    [
        spec("plain"),
        Spec {
            retry,
            ..spec("again")
        },
        Spec {
            priority: 5,
            taint: Some("gpu".into()),
            ..spec("urgent")
        },
        Spec {
            timeout_ms: Some(500),
            retry,
            ..spec("timed")
        },
        Spec {
            batch: Some(Batch {
                max_size: 3,
                max_wait_ms: 40,
            }),
            ..spec("bundled")
        },
        Spec {
            by_name: true,
            ..spec("plain")
        },
        Spec {
            fingerprint: Some("v1".into()),
            pin_code: true,
            ..spec("pinned")
        },
        Spec {
            fingerprint: Some("v1".into()),
            ..spec("coded")
        },
    ]
    .map(Arc::new)
    .to_vec()
}

/// All "no"s of a reply.
pub(super) fn refusals(reply: &Reply) -> Vec<Rejection> {
    match reply {
        Reply::Submitted(list) => list.iter().filter_map(|r| r.clone().err()).collect(),
        Reply::Done(list) => list.iter().filter_map(|r| r.clone().err()).collect(),
        Reply::Created(result) => result.clone().err().into_iter().collect(),
        Reply::Attached(_) => vec![],
    }
}

/// The run a fact is about.
pub(super) fn run_of(fact: &Fact) -> Option<RunSeq> {
    match fact {
        Fact::Run { run, .. } | Fact::Nodes { run, .. } | Fact::RunDeleted { run } => Some(*run),
        Fact::Node { node, .. } | Fact::Outcome { node, .. } => Some(node.run),
        _ => None,
    }
}
