//! What edges and bridges hold: everything they can ask of the engine, from any thread or task.
//!
//! A call is one message and one reply, however long its list. Replies and effects come only after their commit. When the engine
//! has stopped (a failed commit, or a shutdown) every call ends with [`Stopped`], and so does every call that was waiting.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use tokio::sync::{Notify, mpsc, oneshot, watch};

use super::clock::Stopwatch;
use super::inbox::{Envelope, Inbox, Question};
use super::request::{cost, is_intake, refuse};
use super::routes::Routes;
use crate::broker::command::{Answer, Code, Command, Query, Rejection, Reply};
use crate::broker::outcome::Lease;
use crate::broker::types::{
    Attempt, Body, NameId, NodeKey, Payload, RunSeq, SessionId, Spec, SpecId,
};
use crate::storage::{PayloadWriter, Pressure, Read, StorageError};

/// What a worker's session is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SessionEffect {
    /// Calls to run: all that one turn gave this session.
    Leases(Vec<Lease>),
    /// Attempts to stop: their outcome would be refused.
    Revoked(Vec<(NodeKey, Attempt)>),
}

/// The engine has stopped: by a failed commit, after which nothing more is acked (G17), or by a shutdown.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the broker has stopped: {reason}")]
pub struct Stopped {
    /// Why.
    pub reason: String,
}

impl Stopped {
    pub(super) fn because(reason: &str) -> Self {
        Self {
            reason: reason.to_owned(),
        }
    }
}

/// What does not change while the engine runs.
#[derive(Debug, Clone, Copy)]
pub struct Info {
    /// Identity of the store.
    pub store_id: [u8; 16],
    /// A lease lapses when its session has been silent for this long, in milliseconds.
    pub lease_ms: u64,
    /// This process.
    pub pid: u32,
    /// Runs since the engine started.
    pub started: Stopwatch,
}

/// How much intake the store takes, as of its latest turn.
#[derive(Debug, Default)]
pub(super) struct PressureGauge(AtomicU8);

impl PressureGauge {
    pub(super) fn set(&self, pressure: Pressure) {
        let level = match pressure {
            Pressure::None => 0,
            Pressure::Slow => 1,
            Pressure::Stop => 2,
            Pressure::DiskFull => 3,
        };
        self.0.store(level, Ordering::Relaxed);
    }

    pub(super) fn get(&self) -> Pressure {
        match self.0.load(Ordering::Relaxed) {
            0 => Pressure::None,
            1 => Pressure::Slow,
            2 => Pressure::Stop,
            _ => Pressure::DiskFull,
        }
    }
}

/// Why intake is refused under that pressure, if it is.
#[must_use]
pub fn refusal(pressure: Pressure) -> Option<Rejection> {
    match pressure {
        Pressure::None | Pressure::Slow => None,
        Pressure::Stop => Some(Rejection::new(
            Code::Overloaded,
            "the commit log is 256 MiB ahead of the state store: send it again in a moment",
        )),
        Pressure::DiskFull => Some(Rejection::new(
            Code::DiskFull,
            "the disk is nearly full: free some space, or lower retention; running work goes on",
        )),
    }
}

/// Shared by all handles and the engine's thread.
pub(super) struct Shared {
    pub(super) inbox: Inbox,
    pub(super) routes: Routes,
    pub(super) pressure: PressureGauge,
    pub(super) reader: Arc<dyn Read>,
    pub(super) payloads: Arc<dyn PayloadWriter>,
    pub(super) info: Info,
    /// True once the engine has stopped.
    pub(super) stopped: watch::Sender<bool>,
}

/// The way to the engine. Cheap to clone.
#[derive(Clone)]
pub struct Handle(pub(super) Arc<Shared>);

impl std::fmt::Debug for Handle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Handle")
            .field("info", &self.0.info)
            .finish_non_exhaustive()
    }
}

impl Handle {
    /// Sends a command that is never refused for load. The reply means that it is durable.
    pub async fn control(&self, command: Command) -> Result<Reply, Stopped> {
        debug_assert!(!is_intake(&command), "intake can be refused: use `intake`");
        let (reply, receiver) = oneshot::channel();
        self.0.inbox.control(Envelope {
            command,
            reply,
            charge: None,
        })?;
        receiver.await.map_err(|_| self.why_stopped())
    }

    /// Sends a submission or a dead letter. When there is too much in flight, the log is too far ahead or the disk nearly full, every
    /// item is rejected at once; the call never waits for room.
    pub async fn intake(&self, command: Command) -> Result<Reply, Stopped> {
        debug_assert!(
            is_intake(&command),
            "control is never refused: use `control`"
        );
        if let Some(no) = refusal(self.0.pressure.get()) {
            return Ok(refuse(&command, &no));
        }
        let charge = match self.0.inbox.admit(cost(&command)) {
            Ok(charge) => charge,
            Err(no) => return Ok(refuse(&command, &no)),
        };
        let (reply, receiver) = oneshot::channel();
        self.0.inbox.intake(Envelope {
            command,
            reply,
            charge: Some(charge),
        })?;
        receiver.await.map_err(|_| self.why_stopped())
    }

    /// Asks a question. It is answered from what is durable; an ended run is read from the store first.
    pub async fn query(&self, query: Query) -> Result<Answer, Stopped> {
        let (answer, receiver) = oneshot::channel();
        self.0.inbox.ask(Question { query, answer })?;
        receiver.await.map_err(|_| self.why_stopped())
    }

    /// The session was heard from. No queue, no log: the next turn begins with it.
    pub fn touch(&self, session: SessionId) {
        self.0.inbox.touch(session);
    }

    /// Reads of committed state. They block: see [`Handle::read`].
    #[must_use]
    pub fn reader(&self) -> Arc<dyn Read> {
        Arc::clone(&self.0.reader)
    }

    /// Reads on a thread that may block.
    pub async fn read<T: Send + 'static>(
        &self,
        f: impl FnOnce(&dyn Read) -> Result<T, StorageError> + Send + 'static,
    ) -> Result<T, StorageError> {
        let reader = self.reader();
        blocking(move || f(&*reader)).await
    }

    /// Makes a payload fit for a command: what is too large to be kept inside records becomes durable in a payload segment first.
    pub async fn persist(&self, payload: Payload) -> Result<Payload, StorageError> {
        let bytes = match payload.body {
            Body::Inline(bytes) if bytes.len() > Body::INLINE_BYTES => bytes,
            _ => return Ok(payload),
        };
        let payloads = Arc::clone(&self.0.payloads);
        let at = blocking(move || payloads.write(bytes)).await?;
        Ok(Payload {
            codec: payload.codec,
            body: Body::Stored(at),
        })
    }

    /// Keeps payloads that were made durable and that no command has named yet, while the answer lives. Without it they are kept for
    /// some minutes: enough for a command that follows at once, not for one that is refused and offered again for long.
    #[must_use]
    pub fn keep_payloads(&self) -> Box<dyn Send + Sync> {
        Arc::clone(&self.0.payloads).keep()
    }

    /// What the session will be told. Register before [`Command::Attach`]. A second registration closes the first channel; the end of
    /// the channel means that, or that the engine has stopped.
    #[must_use]
    pub fn session_effects(&self, session: SessionId) -> mpsc::UnboundedReceiver<SessionEffect> {
        let receiver = self.0.routes.session(session);
        if self.0.inbox.closed().is_some() {
            // It stopped meanwhile and may have forgotten all channels before this one came.
            self.0.routes.close();
        }
        receiver
    }

    /// Comes when the value (or error) of the run's root is known. Register, then query, then await. An error means that the engine has
    /// stopped.
    #[must_use]
    pub fn root_settled(&self, run: RunSeq) -> oneshot::Receiver<()> {
        let receiver = self.0.routes.root_settled(run);
        if self.0.inbox.closed().is_some() {
            self.0.routes.close();
        }
        receiver
    }

    /// Comes when all nodes of the run are terminal. Register, then query, then await. An error means that the engine has stopped.
    #[must_use]
    pub fn run_ended(&self, run: RunSeq) -> oneshot::Receiver<()> {
        let receiver = self.0.routes.run_ended(run);
        if self.0.inbox.closed().is_some() {
            self.0.routes.close();
        }
        receiver
    }

    /// Notified when the output owes something new; one notification may stand for many. Also when the engine has stopped.
    #[must_use]
    pub fn output_grew(&self, output: &str) -> Arc<Notify> {
        self.0.routes.output(output)
    }

    /// An interned spec. Every spec named by a lease is known.
    #[must_use]
    pub fn spec(&self, id: SpecId) -> Option<Arc<Spec>> {
        self.0.routes.spec(id)
    }

    /// The number of a route or an output that was used at least once.
    #[must_use]
    pub fn name_id(&self, name: &str) -> Option<NameId> {
        self.0.routes.name_id(name)
    }

    /// How much intake the store takes.
    #[must_use]
    pub fn pressure(&self) -> Pressure {
        self.0.pressure.get()
    }

    /// What does not change while the engine runs.
    #[must_use]
    pub fn info(&self) -> &Info {
        &self.0.info
    }

    /// Returns when the engine has stopped, with the reason.
    pub async fn stopped(&self) -> Stopped {
        let mut stopped = self.0.stopped.subscribe();
        // An error means that the sender is gone, and it lives as long as this handle.
        let _ = stopped.wait_for(|stopped| *stopped).await;
        self.why_stopped()
    }

    fn why_stopped(&self) -> Stopped {
        let reason = self.0.inbox.closed();
        Stopped::because(reason.as_deref().unwrap_or("the engine thread ended"))
    }
}

async fn blocking<T: Send + 'static>(
    f: impl FnOnce() -> Result<T, StorageError> + Send + 'static,
) -> Result<T, StorageError> {
    match tokio::task::spawn_blocking(f).await {
        Ok(result) => result,
        Err(error) => Err(StorageError::Stopped(format!("a read ended: {error}"))),
    }
}
