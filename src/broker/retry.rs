//! Attempts that end without a value: failures, losses, timeouts, releases.
//!
//! A failure of user code counts against `max_attempts`, a lease lost to a dead or silent worker against `max_losses`, a release
//! against nothing (G10). So a worker that is killed never fails a node by itself, and a node that kills its workers is
//! quarantined. A lost or released node is ready again at once and keeps its place; a failed one backs off.

use bytes::Bytes;
use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::World;
use super::cascade::{end, follow, make_ready, outcome};
use super::outcome::{Effect, Tx};
use super::run::Run;
use super::types::{
    Body, Codec, NodeKey, NodeRecord, NodeState, Note, Payload, Progress, Retry, SessionId,
    Timestamp, WallTime,
};

/// The body raised an error.
pub(super) struct Failure {
    pub error: Payload,
    pub retryable: bool,
    pub timed_out: bool,
    /// Of the completion that said so; 0 when the broker says it itself.
    pub digest: u64,
}

/// An attempt has failed: backoff, or the end.
pub(super) fn fail(run: &mut Run, world: &mut World, tx: &mut Tx, node: u32, failure: Failure) {
    let retry = retry_of(run, world, node);
    let mut record = close(run, world, node);
    record.failures += 1;
    record.digest = failure.digest;
    record.note = if failure.timed_out {
        Note::TimedOut
    } else {
        Note::AttemptFailed
    };
    outcome(run, tx, node, true, failure.error, Vec::new());
    if failure.retryable && record.failures < retry.max_attempts {
        let key = run.key(node);
        let wait = backoff_ms(&retry, record.failures, world.seed, key, record.attempt.0);
        record.progress = Progress::Backoff;
        record.not_before = world.now.after_ms(wait);
        reopen(run, world, tx, node, record);
    } else {
        record.progress = Progress::Failed;
        end(run, world, tx, node, record);
        follow(run, world, tx);
    }
}

/// A lease was lost: its worker died or fell silent.
pub(super) fn lose(run: &mut Run, world: &mut World, tx: &mut Tx, node: u32) {
    revoke(run, world, tx, node);
    let retry = retry_of(run, world, node);
    let mut record = close(run, world, node);
    record.losses += 1;
    if record.losses < retry.max_losses {
        record.progress = Progress::Open;
        record.note = Note::LeaseLost;
        reopen(run, world, tx, node, record);
        return;
    }
    record.progress = Progress::Failed;
    record.note = Note::Quarantined;
    let text = format!(
        "quarantined: {} leases were lost, each time the worker died or fell silent",
        record.losses
    );
    outcome(
        run,
        tx,
        node,
        true,
        own_error("dagorama.Quarantined", &text),
        Vec::new(),
    );
    end(run, world, tx, node, record);
    follow(run, world, tx);
}

/// An attempt took longer than its timeout and another lease period, and its worker did not end it: the backstop.
pub(super) fn overrun(run: &mut Run, world: &mut World, tx: &mut Tx, node: u32) {
    revoke(run, world, tx, node);
    let limit = world
        .resolved(run.core(node).spec)
        .and_then(|spec| spec.timeout_ms)
        .unwrap_or_default();
    let text = format!("the attempt took longer than {limit} ms and its worker did not end it");
    let failure = Failure {
        error: own_error("dagorama.TimedOut", &text),
        retryable: true,
        timed_out: true,
        digest: 0,
    };
    fail(run, world, tx, node, failure);
}

/// A worker gave the node back.
pub(super) fn release(run: &mut Run, world: &mut World, tx: &mut Tx, node: u32, digest: u64) {
    let mut record = close(run, world, node);
    record.progress = Progress::Open;
    record.note = Note::Released;
    record.digest = digest;
    reopen(run, world, tx, node, record);
}

/// Ends the lease of a node; returns its record, about to be changed.
pub(super) fn close(run: &mut Run, world: &mut World, node: u32) -> NodeRecord {
    let mut record = run.node_record(node);
    let holder = super::worker::holder(record.progress).expect("I4 a lease is of a leased node");
    world.close_lease(run.key(node), holder);
    record.round = run.record.round;
    record.not_before = Timestamp(0);
    record.not_before_wall = WallTime(0);
    record
}

fn reopen(run: &mut Run, world: &mut World, tx: &mut Tx, node: u32, record: NodeRecord) {
    let waits = record.not_before > world.now;
    let not_before = record.not_before;
    run.write(tx, node, record);
    let after = run.state(node);
    run.recount(NodeState::Leased, after, 1);
    if waits {
        world.timers.wake.insert((not_before, run.key(node)));
    } else {
        make_ready(run, world, node);
    }
}

fn retry_of(run: &Run, world: &World, node: u32) -> Retry {
    world
        .resolved(run.core(node).spec)
        .map(|spec| spec.retry)
        .unwrap_or_default()
}

/// Tells a leased node's worker to stop.
pub(super) fn revoke(run: &Run, world: &World, tx: &mut Tx, node: u32) {
    let record = run.node_record(node);
    let session = super::worker::holder(record.progress).unwrap_or(SessionId(0));
    if world
        .workers
        .sessions
        .get(&session)
        .is_some_and(|session| session.attached)
    {
        tx.effects.push(Effect::Revoke {
            session,
            node: run.key(node),
            attempt: record.attempt,
        });
    }
}

/// An error of the broker's own. Neither text needs escaping.
fn own_error(kind: &str, message: &str) -> Payload {
    let json = format!(r#"{{"type":"{kind}","message":"{message}","traceback":"","pickle":null}}"#);
    Payload {
        codec: Codec::Json,
        body: Body::Inline(Bytes::from(json)),
    }
}

/// How long a node waits after its n-th failure: grown per failure, capped, then spread around that by chance, which is derived
/// from the turn, the node and the attempt.
fn backoff_ms(retry: &Retry, failures: u32, seed: u64, key: NodeKey, attempt: u32) -> u64 {
    let cap = u128::from(retry.max_delay_ms);
    let mut delay = u128::from(retry.delay_ms).min(cap);
    for _ in 1..failures.min(1_000) {
        let next = (delay * u128::from(retry.factor_milli) / 1_000).min(cap);
        if next == delay {
            break;
        }
        delay = next;
    }
    let delay = delay as u64;
    let spread = u128::from(delay) * u128::from(retry.jitter_milli.min(1_000)) / 1_000;
    // 2^62 ms are an age: the bound only keeps the product below in range.
    let spread = spread.min(1 << 62);
    if spread == 0 {
        return delay;
    }
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&key.run.0.to_le_bytes());
    bytes[8..12].copy_from_slice(&key.node.0.to_le_bytes());
    bytes[12..].copy_from_slice(&attempt.to_le_bytes());
    let chance = u128::from(xxh3_64_with_seed(&bytes, seed));
    let offset = (chance * (2 * spread + 1)) >> 64;
    u64::try_from(u128::from(delay) + offset - spread).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::super::types::{NodeIndex, RunSeq};
    use super::*;

    #[test]
    fn backoff_grows_to_its_cap_and_spreads_around_it() {
        let key = NodeKey::new(RunSeq(1), NodeIndex(2));
        let steady = Retry {
            delay_ms: 100,
            factor_milli: 2_000,
            max_delay_ms: 1_000,
            jitter_milli: 0,
            ..Retry::default()
        };
        let delays = [1, 2, 3, 4, 5, 1_000_000].map(|n| backoff_ms(&steady, n, 7, key, n));
        assert_eq!(delays, [100, 200, 400, 800, 1_000, 1_000]);
        let spread = Retry {
            jitter_milli: 100,
            ..steady
        };
        let (mut low, mut high) = (u64::MAX, 0);
        for seed in 0..500 {
            let delay = backoff_ms(&spread, 1, seed, key, 1);
            assert_eq!(
                delay,
                backoff_ms(&spread, 1, seed, key, 1),
                "no chance of its own"
            );
            (low, high) = (low.min(delay), high.max(delay));
        }
        assert!(
            (90..93).contains(&low) && (108..=110).contains(&high),
            "{low}..{high}"
        );
    }

    #[test]
    fn extreme_policies_do_not_overflow() {
        let key = NodeKey::new(RunSeq(u64::MAX), NodeIndex(u32::MAX));
        let wild = Retry {
            delay_ms: u64::MAX,
            factor_milli: u32::MAX,
            max_delay_ms: u64::MAX,
            jitter_milli: u32::MAX,
            ..Retry::default()
        };
        let _ = backoff_ms(&wild, u32::MAX, u64::MAX, key, u32::MAX);
        let none = Retry {
            delay_ms: 0,
            ..wild
        };
        assert_eq!(backoff_ms(&none, 9, 1, key, 1), 0);
    }
}
