//! One connection of the broker's end: the introduction, then frame after frame until it closes.
//!
//! The reading task never waits for the engine: it hands a command over, in the order of arrival, and another task waits for the reply.
//! Invariants: before a HELLO with the right token nothing reaches a handler and nothing is told (G18, I21); what one connection can
//! make this process hold is bounded in bytes and in requests (I20); a session is detached once, by the connection that has it.

use std::collections::HashSet;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use bytes::{Bytes, BytesMut};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tracing::{debug, trace};

use super::frame::{self, Frame, HEADER_BYTES, Header, MAX_JSON_BYTES, Malformed, VERSION, Verb};
use super::io::{Outgoing, Reader, Writer, read_some};
use super::json::{self, Kind};
use super::server::Shared;
use super::{requests, session};
use crate::broker::command::{Attach, Code, Command, Rejection, Reply};
use crate::broker::types::{Attempt, NodeKey, SessionId};
use crate::edge::convert::{self, Definitions};

/// What requests of a connection need.
pub(super) struct Peer {
    pub(super) shared: Arc<Shared>,
    pub(super) outgoing: Outgoing,
    /// The worker's session.
    pub(super) session: Option<SessionId>,
    pub(super) definitions: Definitions,
    /// Leases that the session held when it came back: those it may release without their tokens, which it may never have received.
    pub(super) inherited: HashSet<(NodeKey, Attempt)>,
    /// Requests without a reply.
    pub(super) requests: Arc<Semaphore>,
    /// Answers that are being read from the store: each may take some memory.
    pub(super) reads: Arc<Semaphore>,
    /// WAITs without a reply.
    pub(super) waits: Arc<Semaphore>,
    /// The tasks of those: nobody waits any more when the connection has closed.
    pub(super) waiting: requests::Waiting,
}

/// Why a connection ends.
pub(super) enum End {
    /// The peer closed it, it broke, or the broker stops.
    Closed,
    /// The peer broke the rules: it is told, then cut off.
    Refused(Rejection),
}

impl From<Malformed> for End {
    fn from(error: Malformed) -> Self {
        Self::Refused(convert::malformed(&error))
    }
}

impl From<Rejection> for End {
    fn from(rejection: Rejection) -> Self {
        Self::Refused(rejection)
    }
}

/// Serves a connection until it ends.
pub(super) async fn run(shared: &Arc<Shared>, reader: Reader, writer: Writer) {
    let outgoing = Outgoing::new(shared.limits.write_queue_bytes);
    let writing = tokio::spawn(outgoing.clone().run(writer));
    let requests = Arc::new(Semaphore::new(shared.limits.requests_per_connection));
    let mut incoming = Incoming {
        reader,
        buffer: BytesMut::new(),
        shared: Arc::clone(shared),
    };
    if let Err(End::Refused(rejection)) = serve(&mut incoming, &outgoing, &requests).await {
        debug!(code = rejection.code.as_str(), "a connection was refused");
        error(&outgoing, 0, &rejection);
    }
    // Replies to what was taken still leave; a peer that is gone takes none.
    let all = shared.limits.requests_per_connection as u32;
    tokio::select! {
        _ = requests.acquire_many(all) => {}
        () = broken(&outgoing) => {}
    }
    outgoing.close();
    let _ = writing.await;
}

async fn broken(outgoing: &Outgoing) {
    while !outgoing.is_broken() {
        tokio::time::sleep(std::time::Duration::from_millis(200)).await;
    }
}

async fn serve(
    incoming: &mut Incoming,
    outgoing: &Outgoing,
    requests: &Arc<Semaphore>,
) -> Result<(), End> {
    let shared = Arc::clone(&incoming.shared);
    let hello_timeout = shared.limits.hello_timeout;
    let (request, hello) = tokio::time::timeout(hello_timeout, incoming.hello())
        .await
        .unwrap_or_else(|_| {
            Err(incoming.untold(Rejection::new(
                Code::InvalidRequest,
                "the first frame did not arrive in time",
            )))
        })?;
    let connection = shared.connection_number();
    let mut peer = Peer {
        shared: Arc::clone(&shared),
        outgoing: outgoing.clone(),
        session: None,
        definitions: Definitions::default(),
        inherited: HashSet::new(),
        requests: Arc::clone(requests),
        reads: Arc::new(Semaphore::new(shared.limits.reads_per_connection)),
        waits: Arc::new(Semaphore::new(shared.limits.waits_per_connection)),
        waiting: requests::Waiting::new(),
    };
    match hello.kind {
        Kind::Client => {
            welcome(&peer, request, Vec::new());
            frames(incoming, &mut peer).await
        }
        Kind::Worker => {
            let attach = attach(&hello)?;
            let session = attach.session;
            let handle = shared.handle.clone();
            // All of it in one step: of two connections that say HELLO for a session at once, one has it whole.
            let (effects, attached) = shared.sessions.take(session, connection, || {
                (
                    shared.handle.session_effects(session),
                    start(async move { handle.control(Command::Attach(attach)).await }),
                )
            });
            peer.session = Some(session);
            let pushing = match attached.await {
                Ok(Reply::Attached(attached)) => {
                    peer.inherited = attached.leases.iter().copied().collect();
                    let leases = attached.leases.iter();
                    let leases = leases
                        .map(|(node, attempt)| (node.run.0, node.node.0, attempt.0))
                        .collect();
                    welcome(&peer, request, leases);
                    tokio::spawn(session::push(
                        shared.handle.clone(),
                        effects,
                        outgoing.clone(),
                    ))
                }
                answer => {
                    shared.sessions.leave(session, connection, || ());
                    let rejection = match answer {
                        Err(stopped) => requests::stopping(&stopped),
                        Ok(_) => requests::unexpected(),
                    };
                    return Err(rejection.into());
                }
            };
            let ended = tokio::select! {
                ended = frames(incoming, &mut peer) => ended,
                // Another connection has taken the session, or the engine has stopped.
                () = outlived(pushing) => Err(End::Closed),
            };
            let stopping = *shared.stop.borrow();
            shared.sessions.leave(session, connection, || {
                // At a shutdown the leases are left alone: they get a whole period again at the next start.
                if !stopping {
                    let handle = shared.handle.clone();
                    drop(start(async move {
                        handle.control(Command::Detach(session)).await
                    }));
                }
            });
            ended
        }
    }
}

/// Waits for the end of a task, and ends it when not waited for any more.
async fn outlived(task: tokio::task::JoinHandle<()>) {
    struct Guard(tokio::task::AbortHandle);
    impl Drop for Guard {
        fn drop(&mut self) {
            self.0.abort();
        }
    }
    let _guard = Guard(task.abort_handle());
    let _ = task.await;
}

async fn frames(incoming: &mut Incoming, peer: &mut Peer) -> Result<(), End> {
    let mut stop = incoming.shared.stop.clone();
    loop {
        let next = tokio::select! {
            biased;
            // First, so that a peer that never stops sending does not hold up a shutdown.
            _ = stop.wait_for(|stop| *stop) => return Err(End::Closed),
            next = incoming.next(peer.session) => next,
        };
        let Some((frame, charge)) = next? else {
            return Ok(());
        };
        trace!(verb = ?frame.verb, request = frame.request, "frame");
        requests::take(peer, frame, charge).await?;
    }
}

fn welcome(peer: &Peer, request: u32, leases: Vec<(u64, u32, u32)>) {
    let info = peer.shared.handle.info();
    let document = json::Welcome {
        version: VERSION,
        broker: concat!("dagorama ", env!("CARGO_PKG_VERSION")).to_owned(),
        store: convert::store_text(info.store_id),
        session: peer.session.map(convert::session_text),
        lease_ms: info.lease_ms,
        heartbeat_ms: (info.lease_ms / 3).max(1),
        max_payload: convert::MAX_PAYLOAD_BYTES as u64,
        leases,
    };
    reply(&peer.outgoing, request, &json::write(&document));
}

fn attach(hello: &json::Hello) -> Result<Attach, End> {
    let session = match &hello.session {
        Some(text) => convert::session_id(text)
            .ok_or_else(|| Malformed::text("session", "is not 16 hex digits"))?,
        None => SessionId(random()?),
    };
    let names = |field, names: &[String]| -> Result<Vec<Arc<str>>, Malformed> {
        if names.len() > 1_024 {
            return Err(Malformed::too_large(field, names.len() as u64, 1_024));
        }
        names
            .iter()
            .map(|name| match name.len() {
                1..=1_024 => Ok(Arc::from(name.as_str())),
                n => Err(Malformed::text(field, format!("has a name of {n} bytes"))),
            })
            .collect()
    };
    let actions: Result<Vec<_>, Malformed> = hello
        .actions
        .iter()
        .map(|spec| convert::spec(spec).map(Arc::new))
        .collect();
    Ok(Attach {
        session,
        name: hello.name.chars().take(256).collect::<String>().into(),
        queues: names("queues", &hello.queues)?,
        tolerations: names("tolerate", &hello.tolerate)?,
        actions: actions?,
    })
}

/// 64 random bits.
fn random() -> Result<u64, Rejection> {
    let mut bytes = [0; 8];
    getrandom::fill(&mut bytes).map_err(|error| {
        Rejection::new(
            Code::Stopping,
            format!("the system gives no random bits: {error}"),
        )
    })?;
    Ok(u64::from_le_bytes(bytes))
}

// ---- reading --------------------------------------------------------------------------------------------------------

struct Incoming {
    reader: Reader,
    buffer: BytesMut,
    shared: Arc<Shared>,
}

impl Incoming {
    /// What someone is told who has not shown the token: where one is asked for, one word (G18).
    fn untold(&self, rejection: Rejection) -> End {
        End::Refused(match self.shared.token {
            Some(_) => unauthenticated(),
            None => rejection,
        })
    }

    /// Reads the first frame and checks who it is. Until this returns, nothing else is answered.
    async fn hello(&mut self) -> Result<(u32, json::Hello), End> {
        let header = match self.header().await {
            Ok(header) => header.ok_or(End::Closed)?,
            Err(End::Refused(rejection)) => return Err(self.untold(rejection)),
            Err(End::Closed) => return Err(End::Closed),
        };
        // Whoever does not begin with HELLO is told no more than whoever brings a wrong token.
        if header.verb != Verb::Hello || header.length > MAX_JSON_BYTES {
            return Err(unauthenticated().into());
        }
        let _charge = Arc::clone(&self.shared.hello_budget)
            .try_acquire_many_owned(charge(header.length))
            .map_err(|_| {
                Rejection::new(
                    Code::Overloaded,
                    "too many connections begin at once: try again in a moment",
                )
            })?;
        let frame = match self.body(header).await {
            Ok(frame) => frame.ok_or(End::Closed)?,
            Err(End::Refused(rejection)) => return Err(self.untold(rejection)),
            Err(End::Closed) => return Err(End::Closed),
        };
        let hello: Result<json::Hello, Malformed> = json::parse(&frame.body, "HELLO");
        if let Some(expected) = &self.shared.token {
            let given = hello.as_ref().ok().and_then(|hello| hello.token.as_deref());
            if !given.is_some_and(|given| same(expected.as_bytes(), given.as_bytes())) {
                return Err(unauthenticated().into());
            }
        }
        let hello = hello?;
        if hello.version != VERSION {
            return Err(Malformed::unknown("version", hello.version).into());
        }
        Ok((frame.request, hello))
    }

    /// The next frame, with its share of the bytes in flight. `None`: the peer has closed the connection between frames.
    async fn next(
        &mut self,
        session: Option<SessionId>,
    ) -> Result<Option<(Frame, Option<OwnedSemaphorePermit>)>, End> {
        // A select may drop this at any await: whatever was read stays in the buffer, and the header is looked at again.
        if self.buffer.len() < HEADER_BYTES {
            while self.buffer.len() < HEADER_BYTES {
                if !self.read(session, !self.buffer.is_empty()).await? {
                    return Ok(None);
                }
            }
        }
        let Some(header) = frame::peek(&self.buffer)? else {
            return Ok(None);
        };
        if !header.verb.is_request() {
            return Err(Malformed::unknown("verb", header.verb as u64).into());
        }
        if header.verb.is_json() && header.length > MAX_JSON_BYTES {
            let limit = MAX_JSON_BYTES as u64;
            return Err(Malformed::too_large("length", header.length as u64, limit).into());
        }
        // A connection over the budget stops reading until others are done.
        let charge = match self.shared.budget_of(&header) {
            Some(budget) => {
                let charge = Arc::clone(budget).acquire_many_owned(charge(header.length));
                Some(charge.await.map_err(|_| End::Closed)?)
            }
            None => None,
        };
        while self.buffer.len() < HEADER_BYTES + header.length {
            if !self.read(session, true).await? {
                return Ok(None);
            }
        }
        Ok(frame::take(&mut self.buffer)?.map(|frame| (frame, charge)))
    }

    async fn header(&mut self) -> Result<Option<Header>, End> {
        loop {
            if let Some(header) = frame::peek(&self.buffer)? {
                return Ok(Some(header));
            }
            if !self.read(None, true).await? {
                return Ok(None);
            }
        }
    }

    async fn body(&mut self, header: Header) -> Result<Option<Frame>, End> {
        while self.buffer.len() < HEADER_BYTES + header.length {
            if !self.read(None, true).await? {
                return Ok(None);
            }
        }
        Ok(frame::take(&mut self.buffer)?)
    }

    /// Reads what has arrived. `false`: the peer has closed. Within a frame the peer may not pause for long.
    async fn read(&mut self, session: Option<SessionId>, within: bool) -> Result<bool, End> {
        let reading = read_some(&mut self.reader, &mut self.buffer);
        let n = if within {
            let idle = self.shared.limits.idle_timeout;
            tokio::time::timeout(idle, reading).await.map_err(|_| {
                Rejection::new(Code::InvalidRequest, "a frame was begun and not ended")
            })?
        } else {
            reading.await
        };
        if let Some(session) = session {
            // Any frame counts as a heartbeat, so does a part of one.
            self.shared.handle.touch(session);
        }
        match n {
            Ok(0) | Err(_) => Ok(false),
            Ok(_) => Ok(true),
        }
    }
}

fn unauthenticated() -> Rejection {
    Rejection::new(Code::Unauthenticated, "unauthenticated")
}

/// What a request of that many bytes costs, in KiB: its bytes, and what decoding makes of small items.
pub(super) fn charge(length: usize) -> u32 {
    let decoded = (4 * length).min(32 * 1024 * 1024);
    ((length + decoded) / 1024 + 1) as u32
}

/// Whether two secrets are the same, in a time that does not depend on where they differ.
fn same(expected: &[u8], given: &[u8]) -> bool {
    let mut differ = u8::from(expected.len() != given.len());
    for (at, byte) in given.iter().enumerate() {
        let other = if expected.is_empty() {
            0
        } else {
            expected[at % expected.len()]
        };
        differ |= std::hint::black_box(byte ^ other);
    }
    std::hint::black_box(differ) == 0
}

// ---- writing --------------------------------------------------------------------------------------------------------

/// Queues a reply in one frame.
pub(super) fn reply(outgoing: &Outgoing, request: u32, body: &[u8]) {
    outgoing.push(|out| frame::put(out, Verb::Reply, false, request, body));
}

/// Queues a "no".
pub(super) fn error(outgoing: &Outgoing, request: u32, rejection: &Rejection) {
    let document: Bytes = convert::no(rejection);
    outgoing.push(|out| frame::put(out, Verb::Error, false, request, &document));
}

// ---- handing over ---------------------------------------------------------------------------------------------------

/// A future that has been started.
pub(super) enum Started<T> {
    /// It had ended at once.
    Done(Option<T>),
    /// It goes on.
    Running(Pin<Box<dyn Future<Output = T> + Send>>),
}

/// Polls a future once, so that what it hands to the engine is in the engine's queue before anything else of this connection is looked at.
/// The waker of whoever awaits the rest takes over at the next poll.
pub(super) fn start<T>(future: impl Future<Output = T> + Send + 'static) -> Started<T> {
    // Unconstrained: the runtime's fairness must not make this poll return before the command was handed over.
    let mut future: Pin<Box<dyn Future<Output = T> + Send>> =
        Box::pin(tokio::task::unconstrained(future));
    match future
        .as_mut()
        .poll(&mut Context::from_waker(Waker::noop()))
    {
        Poll::Ready(value) => Started::Done(Some(value)),
        Poll::Pending => Started::Running(future),
    }
}

impl<T: Unpin> Future for Started<T> {
    type Output = T;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<T> {
        match &mut *self {
            Self::Done(value) => Poll::Ready(value.take().expect("a future is not polled again")),
            Self::Running(future) => future.as_mut().poll(context),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_are_compared_whole() {
        for (expected, given, equal) in [
            ("secret", "secret", true),
            ("secret", "secreT", false),
            ("secret", "Secret", false),
            ("secret", "secre", false),
            ("secret", "secretsecret", false),
            ("secret", "", false),
            ("", "", true),
            ("", "x", false),
        ] {
            assert_eq!(
                same(expected.as_bytes(), given.as_bytes()),
                equal,
                "{expected:?} {given:?}"
            );
        }
    }

    #[tokio::test]
    async fn a_started_future_has_run_to_its_first_wait() {
        let (sender, receiver) = tokio::sync::oneshot::channel::<u8>();
        let (began, mut has_begun) = tokio::sync::oneshot::channel();
        let started = start(async move {
            began.send(()).expect("someone looks");
            receiver.await.expect("a value")
        });
        assert!(has_begun.try_recv().is_ok());
        let task = tokio::spawn(started);
        tokio::task::yield_now().await;
        sender.send(7).expect("waits");
        assert_eq!(task.await.expect("no panic"), 7);
        assert_eq!(start(async { 8 }).await, 8);
    }
}
