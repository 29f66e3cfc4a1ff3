//! The queues into the engine: what has arrived and no turn has taken yet.
//!
//! Knows requests, not what they mean. Control is bounded by the open leases and never refused; intake is bounded in requests and
//! in bytes, from its arrival until its reply. Invariant: once closed, nothing is accepted, and the first reason given stays.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::oneshot;

use super::clock::Stopwatch;
use super::handle::Stopped;
use super::load::Loads;
use super::request::{Cost, overloaded};
use crate::broker::command::{Answer, Command, Query, Rejection, Reply};
use crate::broker::types::{RunSeq, SessionId};

/// Heartbeats alone wake the engine this often at most.
const TOUCH_WAKES_EVERY_MS: u64 = 1_000;

/// A command and whoever waits for its reply.
#[derive(Debug)]
pub(super) struct Envelope {
    pub(super) command: Command,
    pub(super) reply: oneshot::Sender<Reply>,
    /// Held until the reply has left.
    pub(super) charge: Option<Charge>,
}

/// A query and whoever waits for its answer.
#[derive(Debug)]
pub(super) struct Question {
    pub(super) query: Query,
    pub(super) answer: oneshot::Sender<Answer>,
}

/// Everything that has arrived since the engine last looked.
#[derive(Debug, Default)]
pub(super) struct Arrived {
    pub(super) control: Vec<Envelope>,
    pub(super) intake: Vec<Envelope>,
    pub(super) questions: Vec<Question>,
    pub(super) touched: Vec<SessionId>,
    pub(super) loads: Loads,
    /// Ended runs that are old enough to be deleted, and where to look on.
    pub(super) old_runs: Vec<(Vec<RunSeq>, Option<RunSeq>)>,
    /// Somebody asked the engine to end after this.
    pub(super) stopping: bool,
}

#[derive(Debug, Default)]
struct State {
    arrived: Arrived,
    touched: BTreeSet<SessionId>,
    sleeping: bool,
    woken_by_touch: Option<Stopwatch>,
    closed: Option<Arc<str>>,
}

/// See the head of the file.
#[derive(Debug)]
pub(super) struct Inbox {
    state: Mutex<State>,
    wake: Condvar,
    in_flight: Arc<InFlight>,
}

impl Inbox {
    pub(super) fn new(max_requests: usize, max_bytes: usize) -> Self {
        Self {
            state: Mutex::default(),
            wake: Condvar::new(),
            in_flight: Arc::new(InFlight {
                requests: AtomicUsize::new(0),
                bytes: AtomicUsize::new(0),
                max_requests,
                max_bytes,
            }),
        }
    }

    // A poisoned lock means that the engine thread panicked while it held it: it is then closed, which every caller checks.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn put(&self, change: impl FnOnce(&mut State)) -> Result<(), Stopped> {
        let mut state = self.lock();
        if let Some(reason) = &state.closed {
            return Err(Stopped::because(reason));
        }
        change(&mut state);
        let sleeping = std::mem::take(&mut state.sleeping);
        drop(state);
        if sleeping {
            self.wake.notify_one();
        }
        Ok(())
    }

    pub(super) fn control(&self, envelope: Envelope) -> Result<(), Stopped> {
        self.put(|state| state.arrived.control.push(envelope))
    }

    pub(super) fn intake(&self, envelope: Envelope) -> Result<(), Stopped> {
        self.put(|state| state.arrived.intake.push(envelope))
    }

    pub(super) fn ask(&self, question: Question) -> Result<(), Stopped> {
        self.put(|state| state.arrived.questions.push(question))
    }

    /// Room for a piece of intake, or "no" at once: nobody waits in a line that grows.
    pub(super) fn admit(&self, cost: Cost) -> Result<Charge, Rejection> {
        InFlight::admit(&self.in_flight, cost.bytes)
    }

    /// A heartbeat. It wakes a sleeping engine at most once a second: mostly a command comes with it or soon after, and before anything
    /// lapses the engine wakes anyway and looks here first. After the engine has stopped it is nobody's.
    pub(super) fn touch(&self, session: SessionId) {
        let mut state = self.lock();
        if state.closed.is_some() || !state.touched.insert(session) || !state.sleeping {
            return;
        }
        let rested = |woken: &Stopwatch| woken.elapsed_ms() >= TOUCH_WAKES_EVERY_MS;
        if state.woken_by_touch.as_ref().is_none_or(rested) {
            state.woken_by_touch = Some(Stopwatch::start());
            state.sleeping = false;
            drop(state);
            self.wake.notify_one();
        }
    }

    /// Runs that were read for parked requests.
    pub(super) fn loaded(&self, loads: Loads) {
        // Closed meanwhile: whoever waited has been told.
        let _ = self.put(|state| state.arrived.loads.extend(loads));
    }

    /// Runs that retention found.
    pub(super) fn old_runs(&self, runs: Vec<RunSeq>, next: Option<RunSeq>) {
        let _ = self.put(|state| state.arrived.old_runs.push((runs, next)));
    }

    /// Asks the engine to end after what has arrived.
    pub(super) fn stop(&self) {
        let _ = self.put(|state| state.arrived.stopping = true);
    }

    /// Takes everything that has arrived; if that is nothing, waits for something, at most `wait` (`None`: as long as it takes).
    pub(super) fn take(&self, wait: Option<Duration>) -> Arrived {
        let mut state = self.lock();
        if state.is_empty() && wait != Some(Duration::ZERO) {
            state.sleeping = true;
            let idle = |state: &mut State| state.sleeping;
            state = match wait {
                None => self
                    .wake
                    .wait_while(state, idle)
                    .unwrap_or_else(PoisonError::into_inner),
                Some(wait) => {
                    self.wake
                        .wait_timeout_while(state, wait, idle)
                        .unwrap_or_else(PoisonError::into_inner)
                        .0
                }
            };
            state.sleeping = false;
        }
        let mut arrived = std::mem::take(&mut state.arrived);
        arrived.touched = std::mem::take(&mut state.touched).into_iter().collect();
        arrived
    }

    /// Accepts nothing more. What had arrived is returned, so that its senders learn of it by the drop.
    pub(super) fn close(&self, reason: &str) -> Arrived {
        let mut state = self.lock();
        state.closed.get_or_insert_with(|| Arc::from(reason));
        std::mem::take(&mut state.arrived)
    }

    /// Why it is closed.
    pub(super) fn closed(&self) -> Option<Arc<str>> {
        self.lock().closed.clone()
    }
}

impl State {
    fn is_empty(&self) -> bool {
        let Arrived {
            control,
            intake,
            questions,
            touched: _,
            loads,
            old_runs,
            stopping,
        } = &self.arrived;
        control.is_empty()
            && intake.is_empty()
            && questions.is_empty()
            && self.touched.is_empty()
            && loads.is_empty()
            && old_runs.is_empty()
            && !stopping
    }
}

#[derive(Debug)]
struct InFlight {
    requests: AtomicUsize,
    bytes: AtomicUsize,
    max_requests: usize,
    max_bytes: usize,
}

/// A place among the intake in flight, given back when dropped.
#[derive(Debug)]
pub(super) struct Charge {
    of: Arc<InFlight>,
    bytes: usize,
}

impl InFlight {
    fn admit(self: &Arc<Self>, bytes: usize) -> Result<Charge, Rejection> {
        // Relaxed is enough: these are counters that guard no other memory.
        let requests = self.requests.fetch_add(1, Ordering::Relaxed) + 1;
        let total = self.bytes.fetch_add(bytes, Ordering::Relaxed) + bytes;
        // From here on the drop gives back what was taken.
        let charge = Charge {
            of: Arc::clone(self),
            bytes,
        };
        if requests > self.max_requests {
            let limit = self.max_requests;
            return Err(overloaded("requests in flight", limit, requests));
        }
        // One request over the limit passes alone: it could never pass otherwise.
        if total > self.max_bytes && total != bytes {
            return Err(overloaded("bytes in flight", self.max_bytes, total));
        }
        Ok(charge)
    }
}

impl Drop for Charge {
    fn drop(&mut self) {
        self.of.requests.fetch_sub(1, Ordering::Relaxed);
        self.of.bytes.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::broker::command::Code;

    fn bytes(bytes: usize) -> Cost {
        Cost { nodes: 1, bytes }
    }

    fn envelope() -> (Envelope, oneshot::Receiver<Reply>) {
        let (reply, receiver) = oneshot::channel();
        let envelope = Envelope {
            command: Command::Tick,
            reply,
            charge: None,
        };
        (envelope, receiver)
    }

    #[test]
    fn intake_is_bounded_in_requests_and_bytes_and_room_comes_back() {
        let inbox = Inbox::new(2, 100);
        let alone = inbox.admit(bytes(1_000)).unwrap();
        let no = inbox.admit(bytes(1)).unwrap_err();
        assert_eq!(no.code, Code::Overloaded);
        assert!(no.message.contains("100"), "names the limit: {no}");
        drop(alone);

        let first = inbox.admit(bytes(40)).unwrap();
        let second = inbox.admit(bytes(60)).unwrap();
        let no = inbox.admit(bytes(0)).unwrap_err();
        assert!(no.message.contains("limit is 2"), "{no}");
        drop(first);
        assert!(inbox.admit(bytes(41)).is_err(), "a refusal took no room");
        let third = inbox.admit(bytes(40)).unwrap();
        drop((second, third));
        assert_eq!(inbox.in_flight.requests.load(Ordering::Relaxed), 0);
        assert_eq!(inbox.in_flight.bytes.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn take_returns_all_that_arrived_in_order_and_heartbeats_once() {
        let inbox = Inbox::new(8, 100);
        let (first, _first) = envelope();
        let mut second = envelope().0;
        second.command = Command::Detach(SessionId(4));
        inbox.control(first).unwrap();
        inbox.control(second).unwrap();
        for session in [3, 1, 3] {
            inbox.touch(SessionId(session));
        }
        let arrived = inbox.take(None);
        assert_eq!(arrived.control[0].command, Command::Tick);
        assert_eq!(arrived.control[1].command, Command::Detach(SessionId(4)));
        assert_eq!(arrived.touched, [SessionId(1), SessionId(3)]);
        assert!(!arrived.stopping);
        let nothing = inbox.take(Some(Duration::from_millis(1)));
        assert!(nothing.control.is_empty() && nothing.touched.is_empty());
    }

    #[test]
    fn a_sleeping_engine_is_woken_by_each_kind_of_arrival() {
        type Wake = fn(&Inbox);
        let wakes: [(&str, Wake); 4] = [
            ("control", |inbox| inbox.control(envelope().0).unwrap()),
            ("touch", |inbox| inbox.touch(SessionId(1))),
            ("stop", Inbox::stop),
            ("old runs", |inbox| inbox.old_runs(vec![RunSeq(1)], None)),
        ];
        for (name, wake) in wakes {
            let inbox = Arc::new(Inbox::new(8, 100));
            let sleeper = {
                let inbox = Arc::clone(&inbox);
                std::thread::spawn(move || inbox.take(None))
            };
            while !inbox.lock().sleeping {
                std::thread::yield_now();
            }
            wake(&inbox);
            let arrived = sleeper.join().unwrap();
            let n = arrived.control.len() + arrived.touched.len() + arrived.old_runs.len();
            assert!(n == 1 || arrived.stopping, "{name}");
        }
    }

    #[test]
    fn a_closed_inbox_accepts_nothing_and_keeps_its_first_reason() {
        let inbox = Inbox::new(8, 100);
        let (first, mut receiver) = envelope();
        inbox.control(first).unwrap();
        drop(inbox.close("the disk broke"));
        assert!(receiver.try_recv().is_err(), "its sender was dropped");
        drop(inbox.close("later"));
        let no = inbox.control(envelope().0).unwrap_err();
        assert_eq!(no.reason, "the disk broke");
        assert_eq!(inbox.closed().as_deref(), Some("the disk broke"));
        inbox.touch(SessionId(1));
        assert!(inbox.take(Some(Duration::ZERO)).touched.is_empty());
    }
}
