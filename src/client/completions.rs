//! Completions on their way out, and the credit that goes with them.
//!
//! Completions gather while more are about to come and leave in one frame when nothing is, so that batching adds no latency. Credit:
//! what was asked for and has not come back as a finished call is `outstanding`; the worker asks for as much as it can run, and what it
//! would run in 50 ms beyond that. More would only starve others.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::call::{Failure, Returned};
use super::data::ranges;
use super::link::Link;
use crate::broker::types::Codec;
use crate::edge::native::codec::{self, End, Finish, Lease};
use crate::edge::native::frame::{self, HEADER_BYTES, Verb};

/// Completions of one frame.
const FRAME_ITEMS: u32 = 256;
/// Bytes after which a frame is sent.
const FRAME_BYTES: usize = 1024 * 1024;
/// Worth of credit beyond free slots.
const AHEAD_NS: u64 = 50_000_000;
/// The most credit ever.
const MAX_CREDIT: u64 = 4_096;

/// How one call ended.
pub(super) enum Ended {
    Returned(Returned),
    Failed(Failure),
    Released,
}

impl From<Result<Returned, Failure>> for Ended {
    fn from(result: Result<Returned, Failure>) -> Self {
        match result {
            Ok(returned) => Self::Returned(returned),
            Err(failure) => Self::Failed(failure),
        }
    }
}

/// The completion of a lease.
pub(super) fn completion(lease: &Lease, children: Vec<codec::Node>, ended: Ended) -> Finish {
    let (end, data, ranges) = match ended {
        Ended::Returned(Returned::Value(data)) => (End::Value, Some(data), Vec::new()),
        Ended::Returned(Returned::Structure { data, references }) => {
            let inputs = references.into_iter().map(super::Promise::value);
            (End::Structure, Some(data), ranges(inputs))
        }
        Ended::Returned(Returned::Tail(promise)) => (End::Tail, None, ranges([promise.value()])),
        Ended::Failed(failure) => {
            let end = if failure.retryable {
                End::FailedRetryable
            } else {
                End::Failed
            };
            (end, Some(failure.to_data()), Vec::new())
        }
        Ended::Released => (End::Released, None, Vec::new()),
    };
    let keeps_children = matches!(end, End::Value | End::Structure | End::Tail);
    let (codec, body) = match data {
        Some(data) => (data.codec, data.bytes),
        None => (Codec::Raw, bytes::Bytes::new()),
    };
    Finish {
        run: lease.run,
        node: lease.node,
        attempt: lease.attempt,
        token: lease.token,
        end,
        codec,
        ranges,
        body,
        children: if keeps_children { children } else { Vec::new() },
        digest: 0,
    }
}

/// The end of an attempt whose outcome the broker refused to take: it has failed, for that reason.
pub(super) fn failed_instead(finish: &Finish, why: &super::ClientError) -> Finish {
    let data = Failure::fatal(format!("the broker refused the outcome: {why}")).to_data();
    Finish {
        run: finish.run,
        node: finish.node,
        attempt: finish.attempt,
        token: finish.token,
        end: End::Failed,
        codec: data.codec,
        ranges: Vec::new(),
        body: data.bytes,
        children: Vec::new(),
        digest: 0,
    }
}

/// A FINISH frame that is being filled.
#[derive(Default)]
pub(super) struct Batch {
    frame: Vec<u8>,
    n: u32,
}

impl Batch {
    pub(super) fn add(&mut self, finish: &Finish) {
        if self.frame.is_empty() {
            let _ = frame::begin(&mut self.frame, Verb::Finish, false, 0);
            self.frame.extend_from_slice(&[0; 4]);
        }
        codec::put_finish(&mut self.frame, finish);
        self.n += 1;
    }

    pub(super) fn is_full(&self) -> bool {
        self.n >= FRAME_ITEMS || self.frame.len() >= FRAME_BYTES
    }

    /// Sends what there is; credit is topped up with it.
    pub(super) fn flush(&mut self, link: &Link, credit: &Credit) {
        if self.n == 0 {
            return;
        }
        let room = self.frame.len();
        let mut frame = std::mem::replace(&mut self.frame, Vec::with_capacity(room));
        frame::end(&mut frame, 0);
        frame[HEADER_BYTES..HEADER_BYTES + 4].copy_from_slice(&self.n.to_le_bytes());
        self.n = 0;
        link.finish(frame, credit.top_up());
    }
}

/// How many calls the worker has asked for, and how many it wants.
#[derive(Debug)]
pub(super) struct Credit {
    slots: u64,
    /// Run time of a call in nanoseconds, smoothed; 0: nothing was observed.
    run_ns: AtomicU64,
    inner: Mutex<Granted>,
}

#[derive(Debug, Default)]
struct Granted {
    outstanding: u64,
    /// No more calls are wanted.
    draining: bool,
}

impl Credit {
    pub(super) fn new(slots: usize) -> Self {
        Self {
            slots: slots.max(1) as u64,
            run_ns: AtomicU64::new(0),
            inner: Mutex::default(),
        }
    }

    fn granted(&self) -> MutexGuard<'_, Granted> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// `calls` took `ns` together.
    pub(super) fn observe(&self, calls: u64, ns: u64) {
        let each = (ns / calls.max(1)).max(1);
        let before = self.run_ns.load(Ordering::Relaxed);
        // Down slowly and up at once: one slow call must stop the prefetch before the next.
        let after = if before == 0 || each > before {
            each
        } else {
            before - (before - each) / 4
        };
        self.run_ns.store(after.max(1), Ordering::Relaxed);
    }

    fn target(&self) -> u64 {
        let ahead = match self.run_ns.load(Ordering::Relaxed) {
            0 => 0,
            ns => (AHEAD_NS / ns).saturating_mul(self.slots),
        };
        self.slots
            .saturating_add(ahead)
            .min(MAX_CREDIT.max(self.slots))
    }

    /// Calls have ended (a bundle is one).
    pub(super) fn ended(&self, calls: u64) {
        let mut granted = self.granted();
        granted.outstanding = granted.outstanding.saturating_sub(calls);
    }

    /// How much to ask for now: enough to be worth a frame, unless little is left.
    pub(super) fn top_up(&self) -> u32 {
        let target = self.target();
        let mut granted = self.granted();
        let missing = target.saturating_sub(granted.outstanding);
        if granted.draining || missing == 0 || (missing < target / 4 && granted.outstanding > 0) {
            return 0;
        }
        granted.outstanding += missing;
        missing as u32
    }

    /// A new connection: the broker has forgotten all credit, `held` calls still run.
    pub(super) fn begin_again(&self, held: u64) -> u32 {
        self.granted().outstanding = held;
        self.top_up()
    }

    /// Ask for no more.
    pub(super) fn drain(&self) {
        self.granted().draining = true;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn credit_is_what_runs_in_fifty_milliseconds() {
        for (name, slots, run_ms, expected) in [
            ("slow calls are not fetched ahead", 4, 60_000, 4),
            ("one call of 50 ms for each slot", 2, 50, 4),
            ("ten calls of 5 ms", 1, 5, 11),
        ] {
            let credit = Credit::new(slots);
            assert_eq!(
                credit.begin_again(0),
                slots as u32,
                "{name}: nothing is known"
            );
            credit.observe(1, run_ms * 1_000_000);
            credit.ended(slots as u64);
            assert_eq!(credit.top_up(), expected, "{name}");
            assert_eq!(credit.top_up(), 0, "{name}: asked for already");
        }
        let fast = Credit::new(1);
        fast.observe(256, 256_000);
        assert_eq!(u64::from(fast.begin_again(0)), MAX_CREDIT);
        assert_eq!(u64::from(fast.begin_again(96)), MAX_CREDIT - 96);
    }

    #[test]
    fn credit_is_asked_for_in_portions_and_not_while_draining() {
        let credit = Credit::new(100);
        assert_eq!(credit.begin_again(0), 100);
        credit.ended(10);
        assert_eq!(credit.top_up(), 0, "ten are not worth a frame");
        credit.ended(20);
        assert_eq!(credit.top_up(), 30);
        credit.drain();
        credit.ended(100);
        assert_eq!(credit.top_up(), 0);
    }

    #[test]
    fn one_slow_call_stops_the_prefetch_and_fast_ones_bring_it_back() {
        let credit = Credit::new(1);
        credit.observe(100, 100_000);
        assert_eq!(credit.target(), MAX_CREDIT);
        credit.observe(1, 1_000_000_000);
        assert_eq!(credit.target(), 1);
        for _ in 0..100 {
            credit.observe(1, 1_000);
        }
        assert!(credit.target() > 1_000);
    }
}
