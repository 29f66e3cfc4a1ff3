//! Compares a store on disk with what was acknowledged: nothing acknowledged may be missing or different, nothing may have been invented.

use std::collections::BTreeMap;
use std::path::Path;

use dagorama::broker::types::{Body, NodeIndex, NodeKey, RunSeq, RunState};
use dagorama::broker::{Restoring, settings::Settings};
use dagorama::storage::durable::{Durable, DurableOptions};
use dagorama::storage::{Read, Store};

use super::driver::{Ack, Plan};

/// What a check looked at.
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct Checked {
    /// Acknowledgements compared.
    pub acks: u64,
    /// Runs found.
    pub runs: u64,
}

/// Opens the store in this process, rebuilds the broker, asserts every invariant and compares the content with `acks`.
pub(crate) fn store(
    dir: &Path,
    acks: &[Ack],
    sent: &BTreeMap<u64, Plan>,
) -> Result<Checked, String> {
    let mut store =
        Durable::open(dir, DurableOptions::default()).map_err(|error| format!("open: {error}"))?;
    let mut facts = Vec::new();
    let loaded = store
        .load(&mut |fact| facts.push(fact))
        .map_err(|error| format!("load: {error}"))?;
    let mut restoring = Restoring::new(Settings::default(), loaded.lease_secret);
    for fact in facts {
        restoring.absorb(fact);
    }
    let broker = restoring
        .finish(loaded.now, loaded.next_run)
        .map_err(|error| format!("restore: {}", error.detail))?;
    broker.check_invariants();
    let reader = store.reader();
    let checked = content(&*reader, acks, sent);
    drop(reader);
    // Closed without bringing sled forward: the next check sees the same bytes on disk.
    drop(store);
    checked
}

fn content(reader: &dyn Read, acks: &[Ack], sent: &BTreeMap<u64, Plan>) -> Result<Checked, String> {
    let mut checked = Checked::default();
    for ack in acks {
        checked.acks += 1;
        let record = |seq: u64| match reader.run(RunSeq(seq)) {
            Ok(Some(record)) => Ok(record),
            Ok(None) => Err(format!("lost: run {seq:x} of {ack:?}")),
            Err(error) => Err(format!("unreadable: run {seq:x}: {error}")),
        };
        match ack {
            Ack::Submitted { seq, salt, .. } => {
                if record(*seq)?.salt != *salt {
                    return Err(format!("wrong: run {seq:x} has another id"));
                }
            }
            Ack::Cancelled { seq } => {
                let record = record(*seq)?;
                // Cancelling what has succeeded is accepted and changes nothing.
                if !record.cancelled && record.round == 1 && record.state != RunState::Succeeded {
                    return Err(format!("lost: the cancellation of {seq:x}"));
                }
            }
            Ack::Resumed { seq } => {
                let record = record(*seq)?;
                if record.round < 2 && record.state != RunState::Succeeded {
                    return Err(format!("lost: the resumption of {seq:x}"));
                }
            }
            Ack::Finished {
                seq, node, value, ..
            } => {
                record(*seq)?;
                let Some(value) = value else { continue };
                let key = NodeKey::new(RunSeq(*seq), NodeIndex(*node));
                let outcome = reader
                    .outcome(key)
                    .map_err(|error| format!("unreadable: outcome {key}: {error}"))?
                    .ok_or_else(|| format!("lost: outcome {key}"))?;
                let bytes = match outcome.payload.body {
                    Body::Inline(bytes) => bytes,
                    Body::Stored(at) => reader
                        .payload(at)
                        .map_err(|error| format!("unreadable: payload of {key}: {error}"))?,
                };
                if bytes[..] != value[..] || outcome.is_error {
                    return Err(format!(
                        "wrong: outcome {key}: {} bytes instead of {}",
                        bytes.len(),
                        value.len()
                    ));
                }
            }
        }
    }
    let mut before = None;
    loop {
        let page = reader
            .runs(before, 500)
            .map_err(|error| format!("unreadable: runs: {error}"))?;
        let Some((last, _)) = page.last() else { break };
        before = Some(*last);
        for (seq, _) in &page {
            checked.runs += 1;
            let key = NodeKey::new(*seq, NodeIndex(0));
            let arguments = reader
                .arguments(key)
                .map_err(|error| format!("unreadable: arguments of {key}: {error}"))?
                .ok_or_else(|| format!("lost: arguments of {key}"))?;
            let Body::Inline(bytes) = arguments.payload.body else {
                return Err(format!("wrong: arguments of {key}"));
            };
            let known = Plan::decode(&bytes).and_then(|(plan, _)| sent.get(&plan.seed));
            if known.is_none() {
                return Err(format!("invented: run {:x}", seq.0));
            }
        }
    }
    Ok(checked)
}
