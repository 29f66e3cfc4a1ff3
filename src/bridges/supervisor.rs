//! Keeps a route or an output going: build, run, and after any error drop it, wait a little longer each time, build again.
//!
//! Trouble of one route touches no other. What needs a person parks it, with the reason in sight, until it is restarted.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use dagorama_bridge_api::BridgeError;
use serde_json::{Value, json};
use tokio::sync::{Notify, watch};

/// First and longest wait between two tries.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));

/// How a piece of work came to its end.
#[derive(Debug)]
pub(super) enum End {
    /// No more messages will come.
    Finished,
    /// The broker is stopping.
    Stopping,
    /// The bridge failed.
    Failed(BridgeError),
}

/// What everybody may see of a route or an output.
#[derive(Debug, Default)]
pub(super) struct Status {
    pub(super) name: Arc<str>,
    state: Mutex<State>,
    /// Set by the loops.
    pub(super) counts: Counts,
    restart: Notify,
}

#[derive(Debug, Default, Clone)]
struct State {
    word: &'static str,
    code: &'static str,
    reason: String,
    last_error: String,
}

/// Numbers since the broker started.
#[derive(Debug, Default)]
pub(super) struct Counts {
    /// Messages that came in; deliveries that went out.
    pub(super) messages: AtomicU64,
    /// Repetitions among them.
    pub(super) duplicates: AtomicU64,
    /// Messages that nothing recognises: they are applied at least once.
    pub(super) unidentified: AtomicU64,
    /// Dead letters.
    pub(super) dead: AtomicU64,
    /// Runs that have not ended; deliveries that are owed.
    pub(super) pending: AtomicU64,
    /// How far behind the source is, plus one; 0: not known.
    pub(super) lag: AtomicU64,
    /// How often it was built again.
    pub(super) restarts: AtomicU64,
}

pub(super) fn add(counter: &AtomicU64, n: u64) {
    counter.fetch_add(n, Ordering::Relaxed);
}

impl Status {
    pub(super) fn new(name: &str) -> Arc<Self> {
        let status = Self {
            name: name.into(),
            ..Self::default()
        };
        status.set("starting");
        Arc::new(status)
    }

    /// Goes on: running, ended, stopped.
    pub(super) fn set(&self, word: &'static str) {
        let mut state = self.lock();
        state.word = word;
        state.code = "";
        state.reason.clear();
    }

    /// Does not go on for the moment, for that reason.
    pub(super) fn hold(&self, word: &'static str, code: &'static str, reason: &str) {
        let mut state = self.lock();
        state.word = word;
        state.code = code;
        reason.clone_into(&mut state.reason);
    }

    fn failed(&self, error: &str) {
        error.clone_into(&mut self.lock().last_error);
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The present word: `running`, `parked`…
    pub(super) fn word(&self) -> &'static str {
        self.lock().word
    }

    /// Goes on after it was parked.
    pub(super) fn restart(&self) {
        self.restart.notify_one();
    }

    /// The common fields of `bridge list`.
    pub(super) fn to_json(&self) -> Value {
        let state = self.lock().clone();
        let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        json!({
            "name": &*self.name,
            "state": state.word,
            "code": state.code,
            "reason": state.reason,
            "last_error": state.last_error,
            "messages": count(&self.counts.messages),
            "duplicates": count(&self.counts.duplicates),
            "unidentified": count(&self.counts.unidentified),
            "dead_letters": count(&self.counts.dead),
            "pending": count(&self.counts.pending),
            "lag": count(&self.counts.lag).checked_sub(1),
            "restarts": count(&self.counts.restarts),
        })
    }
}

/// Whether the broker is stopping; waits for it.
#[derive(Debug, Clone)]
pub(super) struct Stop(pub(super) watch::Receiver<bool>);

impl Stop {
    pub(super) async fn wait(&mut self) {
        // An error means that whoever could say so is gone.
        let _ = self.0.wait_for(|stopping| *stopping).await;
    }

    pub(super) fn is_set(&self) -> bool {
        *self.0.borrow()
    }
}

/// Runs `work` until it has finished or the broker stops.
pub(super) async fn supervise<F>(status: Arc<Status>, mut stop: Stop, mut work: impl FnMut() -> F)
where
    F: Future<Output = End>,
{
    let mut wait = BACKOFF.0;
    loop {
        if stop.is_set() {
            return status.set("stopped");
        }
        let before = status.counts.messages.load(Ordering::Relaxed);
        match work().await {
            End::Finished => return status.set("ended"),
            End::Stopping => return status.set("stopped"),
            End::Failed(BridgeError::Parked { code, reason }) => {
                tracing::warn!(bridge = &*status.name, code, reason, "parked");
                status.failed(&format!("{code}: {reason}"));
                status.hold("parked", code, &reason);
                tokio::select! {
                    () = status.restart.notified() => {}
                    () = stop.wait() => {}
                }
                wait = BACKOFF.0;
            }
            End::Failed(BridgeError::Retry(reason)) => {
                tracing::info!(bridge = &*status.name, reason, "will be built again");
                status.failed(&reason);
                status.hold("retrying", "", &reason);
                if status.counts.messages.load(Ordering::Relaxed) != before {
                    wait = BACKOFF.0;
                }
                tokio::select! {
                    () = tokio::time::sleep(jittered(wait)) => {}
                    () = status.restart.notified() => {}
                    () = stop.wait() => {}
                }
                wait = (wait * 2).min(BACKOFF.1);
            }
        }
        add(&status.counts.restarts, 1);
    }
}

/// Between half and all of it, so that many routes do not knock at the same time.
fn jittered(wait: Duration) -> Duration {
    let random = getrandom::u32().unwrap_or(u32::MAX / 2);
    wait / 2 + wait.mul_f64(0.5 * f64::from(random) / f64::from(u32::MAX))
}
