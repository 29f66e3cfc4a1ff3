//! A worker's session, as far as this connection is concerned: what the engine gives it is put into LEASES, SPECS and REVOKE frames.
//!
//! The engine only says which nodes; arguments and small inputs are read here, from memory when they are recent. A lease whose arguments
//! cannot be read is failed with the reason, so that nothing waits for a call that never arrives.

use std::collections::HashSet;

use bytes::Bytes;
use tokio::sync::mpsc::UnboundedReceiver;
use tracing::error;

use super::codec::{self, AttemptName};
use super::frame::{self, MAX_BODY_BYTES, Verb};
use super::io::Outgoing;
use super::{json, outcomes};
use crate::broker::command::{AttemptEnd, Code, Command, Completion, Rejection};
use crate::broker::outcome::Lease;
use crate::broker::types::{Body, Codec, Note, SpecId};
use crate::edge::convert;
use crate::engine::{Handle, SessionEffect};
use crate::storage::Arguments;

/// Leases of one frame.
const FRAME_LEASES: usize = 256;
/// Bytes after which a frame is sent.
const FRAME_BYTES: usize = 1024 * 1024;

/// Sends what comes until the channel ends (another connection has the session, or the engine has stopped) or the peer is gone.
pub(super) async fn push(
    handle: Handle,
    mut effects: UnboundedReceiver<SessionEffect>,
    outgoing: Outgoing,
) {
    let mut known: HashSet<SpecId> = HashSet::new();
    while let Some(effect) = effects.recv().await {
        if !outgoing.room().await {
            return;
        }
        match effect {
            SessionEffect::Leases(leases) => {
                let mut leases = &leases[..];
                while !leases.is_empty() {
                    let (chunk, rest) = leases.split_at(border(leases));
                    if !outgoing.room().await {
                        return;
                    }
                    introduce(&handle, chunk, &mut known, &outgoing);
                    lease(&handle, chunk, &outgoing).await;
                    leases = rest;
                }
            }
            SessionEffect::Revoked(attempts) => outgoing.push(|out| {
                let start = frame::begin(out, Verb::Revoke, false, 0);
                codec::put_list(out, &attempts, |out, (node, attempt)| {
                    codec::put_attempt(
                        out,
                        &AttemptName {
                            run: node.run.0,
                            node: node.node.0,
                            attempt: attempt.0,
                        },
                    );
                });
                frame::end(out, start);
            }),
        }
    }
}

/// How many of the first leases go together: a full frame, but for a bundle that would be cut in two.
fn border(leases: &[Lease]) -> usize {
    let mut end = leases.len().min(FRAME_LEASES);
    if end < leases.len() {
        while end < leases.len()
            && leases[end].batch != 0
            && leases[end].batch == leases[end - 1].batch
        {
            end += 1;
        }
    }
    end
}

/// Sends the specs that this connection has not seen yet.
fn introduce(handle: &Handle, leases: &[Lease], known: &mut HashSet<SpecId>, outgoing: &Outgoing) {
    let mut specs: Vec<json::Spec> = Vec::new();
    let mut latest = None;
    for lease in leases {
        if latest == Some(lease.spec) {
            continue;
        }
        latest = Some(lease.spec);
        if known.insert(lease.spec)
            && let Some(spec) = handle.spec(lease.spec)
        {
            specs.push(convert::spec_json(Some(lease.spec.0), &spec));
        }
    }
    if !specs.is_empty() {
        let document = json::write(&specs);
        outgoing.push(|out| frame::put(out, Verb::Specs, false, 0, &document));
    }
}

/// Sends a chunk of leases, in one frame if they are small.
async fn lease(handle: &Handle, leases: &[Lease], outgoing: &Outgoing) {
    let mut ready: Vec<codec::Lease> = Vec::with_capacity(leases.len());
    let mut bytes = 0;
    let reader = handle.reader();
    for lease in leases {
        let arguments = match reader.recent_arguments(lease.node) {
            Some(arguments) => Ok(arguments),
            None => load(handle, lease).await,
        };
        let filled = match arguments {
            Ok(arguments) => fill(handle, lease, arguments).await,
            Err(rejection) => Err(rejection),
        };
        let wire = match filled {
            Ok(wire) => wire,
            Err(rejection) => {
                give_up(handle, lease, &rejection).await;
                continue;
            }
        };
        let size = 64
            + 12 * wire.ranges.len()
            + wire.arguments.len()
            + wire
                .inline
                .iter()
                .map(|item| 16 + 12 * item.ranges.len() + item.body.len())
                .sum::<usize>();
        let same_bundle =
            wire.batch != 0 && ready.last().is_some_and(|last| last.batch == wire.batch);
        // A bundle stays in one frame as long as a frame can hold it.
        let limit = if same_bundle {
            MAX_BODY_BYTES - 4
        } else {
            FRAME_BYTES
        };
        if !ready.is_empty() && bytes + size > limit {
            send(&mut ready, outgoing);
            bytes = 0;
            if !outgoing.room().await {
                return;
            }
        }
        bytes += size;
        ready.push(wire);
    }
    send(&mut ready, outgoing);
}

fn send(ready: &mut Vec<codec::Lease>, outgoing: &Outgoing) {
    if ready.is_empty() {
        return;
    }
    outgoing.push(|out| {
        let start = frame::begin(out, Verb::Leases, false, 0);
        codec::put_list(out, ready, codec::put_lease);
        frame::end(out, start);
    });
    ready.clear();
}

/// Arguments that are no longer in memory.
async fn load(handle: &Handle, lease: &Lease) -> Result<Arguments, Rejection> {
    let node = lease.node;
    let arguments = handle
        .read(move |reader| reader.arguments(node))
        .await
        .map_err(|error| convert::storage(&error))?;
    arguments.ok_or_else(|| {
        Rejection::new(
            Code::StoreCorrupt,
            format!("the arguments of node {node} are missing: run `dagorama verify`"),
        )
    })
}

async fn fill(
    handle: &Handle,
    lease: &Lease,
    arguments: Arguments,
) -> Result<codec::Lease, Rejection> {
    let ranges = convert::ranges(&arguments.inputs);
    let inline = if ranges.is_empty() {
        Vec::new()
    } else {
        outcomes::inline(handle, lease.node.run, &ranges).unwrap_or_default()
    };
    let codec = arguments.payload.codec;
    let bytes: Bytes = match arguments.payload.body {
        Body::Inline(bytes) => bytes,
        Body::Stored(_) => outcomes::bytes(handle, &arguments.payload).await?,
    };
    Ok(codec::Lease {
        run: lease.node.run.0,
        salt: lease.salt,
        node: lease.node.node.0,
        attempt: lease.attempt.0,
        token: lease.token.0,
        spec: lease.spec.0,
        batch: lease.batch,
        other_code: lease.note == Note::OtherCode,
        codec,
        ranges,
        arguments: bytes,
        inline,
    })
}

/// Fails a lease that cannot be delivered.
async fn give_up(handle: &Handle, lease: &Lease, rejection: &Rejection) {
    if rejection.code == Code::Stopping {
        // The store has failed, not the call: it is given out again after the restart.
        return;
    }
    error!(node = %lease.node, attempt = lease.attempt.0, %rejection, "a call could not be read");
    let document = serde_json::json!({
        "type": rejection.code.as_str(), "message": rejection.message, "traceback": "", "pickle": null,
    });
    let completion = Completion {
        node: lease.node,
        attempt: lease.attempt,
        token: lease.token,
        digest: 1,
        specs: Vec::new(),
        children: Vec::new(),
        end: AttemptEnd::Failed {
            error: convert::inline(Codec::Json, document.to_string().into()),
            retryable: false,
            timed_out: false,
        },
    };
    // If the engine has stopped, the connection ends too.
    let _ = handle.control(Command::Finish(vec![completion])).await;
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::broker::types::{Attempt, LeaseToken, NodeIndex, NodeKey, RunSeq, SessionId};

    #[test]
    fn a_bundle_is_not_cut_at_the_border_of_a_frame() {
        let leases = |batches: &[(u32, usize)]| -> Vec<Lease> {
            let one = |batch| Lease {
                session: SessionId(1),
                node: NodeKey::new(RunSeq(1), NodeIndex(0)),
                salt: 0,
                attempt: Attempt(1),
                token: LeaseToken([0; 16]),
                spec: SpecId(0),
                batch,
                note: Note::None,
            };
            batches
                .iter()
                .flat_map(|(batch, n)| vec![one(*batch); *n])
                .collect()
        };
        for (batches, expected) in [
            (vec![(0, 3)], 3),
            (vec![(0, 256)], 256),
            (vec![(0, 300)], 256),
            (vec![(1, 200), (2, 100), (3, 5)], 300),
            (vec![(1, 256), (2, 100)], 256),
            (vec![(1, 1_000)], 1_000),
        ] {
            assert_eq!(border(&leases(&batches)), expected, "{batches:?}");
        }
    }
}
