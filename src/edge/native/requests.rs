//! The verbs: what each one asks of the engine, and how the answer is put into a frame.
//!
//! [`take`] is called by the reading task of a connection, one frame after the other. It hands commands over in that order and leaves
//! waiting to tasks of their own. A body that cannot be read gets an ERROR; where a verb has no reply the connection ends.

use std::future::Future;
use std::sync::Arc;

use bytes::Bytes;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinSet;

use super::codec::{self, Refusal, Submitted, Waited};
use super::connection::{End, Peer, error, reply, start};
use super::frame::{self, Frame, Malformed, Verb};
use super::io::Outgoing;
use super::{documents, json, outcomes};
use crate::broker::command::{
    Answer, AttemptEnd, Code, Command, Completion, CreateChildren, NewNode, Query, Rejection,
    Reply, Submission,
};
use crate::broker::types::{Body, LeaseToken, NodeKey, Payload, RunId, RunSeq, SessionId};
use crate::edge::convert;
use crate::engine::{Handle, Stopped};
use crate::storage::{Pressure, StorageError};

/// Bytes of bodies in one frame of a reply to FETCH.
const PAGE_BYTES: usize = 1024 * 1024;
/// Pause before a frame of submissions under [`Pressure::Slow`].
const SLOW: std::time::Duration = std::time::Duration::from_millis(20);

/// The engine has stopped.
pub(super) fn stopping(stopped: &Stopped) -> Rejection {
    Rejection::new(Code::Stopping, stopped.to_string())
}

/// The engine answered with something else than what was asked for: a bug of ours, said instead of hidden.
pub(super) fn unexpected() -> Rejection {
    Rejection::new(Code::Stopping, "the broker gave an answer of another kind")
}

/// Takes one frame.
pub(super) async fn take(
    peer: &mut Peer,
    frame: Frame,
    charge: Option<OwnedSemaphorePermit>,
) -> Result<(), End> {
    match frame.verb {
        Verb::Hello => {
            let again = Malformed::text("HELLO", "was sent before on this connection");
            return Err(again.into());
        }
        Verb::Define => {
            let specs: Vec<json::Spec> = json::parse(&frame.body, "DEFINE")?;
            peer.definitions.define(&specs)?;
            return Ok(());
        }
        Verb::Credit => return credit(peer, frame.body),
        Verb::Heartbeat => {
            for session in codec::decode_heartbeat(frame.body)? {
                peer.shared.handle.touch(SessionId(session));
            }
            return Ok(());
        }
        Verb::Wait => {
            drop(charge);
            wait(peer, frame.request, frame.body);
            return Ok(());
        }
        _ => {}
    }
    // A connection with too many unanswered requests is not read until some are answered.
    let slot = Arc::clone(&peer.requests)
        .acquire_owned()
        .await
        .map_err(|_| End::Closed)?;
    let request = Request {
        number: frame.request,
        outgoing: peer.outgoing.clone(),
        handle: peer.shared.handle.clone(),
        reads: Arc::clone(&peer.reads),
        _held: (charge, slot),
    };
    match frame.verb {
        Verb::Submit => submit(peer, request, frame.body).await,
        Verb::Finish => finish(peer, request, frame.body).await,
        Verb::Create => create(peer, request, frame.body).await,
        Verb::Fetch => fetch(request, frame.body),
        Verb::Goodbye => goodbye(peer, request, &frame.body),
        Verb::Cancel => request.document(&frame.body, "CANCEL", |handle, cancel| {
            documents::cancel(handle, cancel)
        }),
        Verb::Resume => request.document(&frame.body, "RESUME", |handle, resume| {
            documents::resume(handle, resume)
        }),
        Verb::Events => request.reading(&frame.body, "EVENTS", documents::events),
        Verb::Explain => request.reading(&frame.body, "EXPLAIN", documents::explain),
        Verb::Runs => request.reading(&frame.body, "RUNS", documents::runs),
        Verb::Show => request.reading(&frame.body, "SHOW", documents::show),
        Verb::Status => {
            let extensions = Arc::clone(&peer.shared.extensions);
            request.document(&frame.body, "STATUS", |handle, _: documents::Nothing| {
                documents::status(handle, extensions)
            });
        }
        Verb::Dlq => {
            let extensions = Arc::clone(&peer.shared.extensions);
            request.document(&frame.body, "DLQ", |_, asked: documents::Object| {
                documents::dlq(asked, extensions)
            });
        }
        Verb::Bridges => {
            let extensions = Arc::clone(&peer.shared.extensions);
            request.document(&frame.body, "BRIDGES", |_, asked: documents::Bridges| {
                std::future::ready(documents::bridges(&asked, &*extensions))
            });
        }
        // The verbs above, and those of the broker, which the reader refuses.
        _ => request.refuse(&Rejection::new(Code::InvalidRequest, "not a request")),
    }
    Ok(())
}

/// A request that has not been answered, with what it holds until then.
struct Request {
    number: u32,
    outgoing: Outgoing,
    handle: Handle,
    reads: Arc<Semaphore>,
    _held: (Option<OwnedSemaphorePermit>, OwnedSemaphorePermit),
}

impl Request {
    fn refuse(self, rejection: &Rejection) {
        error(&self.outgoing, self.number, rejection);
    }

    /// Queues the answer, once there is room for it.
    async fn answer(self, answer: Result<Bytes, Rejection>) {
        if self.outgoing.room().await {
            match answer {
                Ok(body) => reply(&self.outgoing, self.number, &body),
                Err(rejection) => error(&self.outgoing, self.number, &rejection),
            }
        }
    }

    /// A verb with a JSON body: parses it, starts the work in this order, and answers when it is done.
    fn document<T, F>(self, body: &[u8], field: &'static str, work: impl FnOnce(Handle, T) -> F)
    where
        T: serde::de::DeserializeOwned,
        F: Future<Output = Result<Bytes, Rejection>> + Send + 'static,
    {
        match json::parse(body, field) {
            Ok(document) => {
                let working = start(work(self.handle.clone(), document));
                tokio::spawn(async move {
                    let answer = working.await;
                    self.answer(answer).await;
                });
            }
            Err(error) => self.refuse(&convert::malformed(&error)),
        }
    }
}

impl Request {
    /// The same for answers that may be large: so many of a connection at a time, and only while it takes them.
    fn reading<T, F>(self, body: &[u8], field: &'static str, work: impl FnOnce(Handle, T) -> F)
    where
        T: serde::de::DeserializeOwned,
        F: Future<Output = Result<Bytes, Rejection>> + Send + 'static,
    {
        let (reads, outgoing) = (Arc::clone(&self.reads), self.outgoing.clone());
        self.document(body, field, |handle, document| {
            let working = work(handle, document);
            async move {
                let _turn = reads.acquire().await;
                outgoing.room().await;
                working.await
            }
        });
    }
}

// ---- worker verbs ---------------------------------------------------------------------------------------------------

fn no_session() -> Rejection {
    Rejection::new(
        Code::UnknownSession,
        "this connection has no session: say HELLO with kind worker",
    )
}

fn credit(peer: &Peer, body: Bytes) -> Result<(), End> {
    let calls = codec::decode_credit(body)?;
    let session = peer.session.ok_or_else(no_session)?;
    let handle = peer.shared.handle.clone();
    // Nobody waits for the reply: the leases are the answer.
    drop(start(async move {
        handle.control(Command::Credit { session, calls }).await
    }));
    Ok(())
}

fn goodbye(peer: &Peer, request: Request, body: &[u8]) {
    if !body.is_empty() {
        return request.refuse(&Rejection::new(Code::InvalidRequest, "GOODBYE has no body"));
    }
    let Some(session) = peer.session else {
        return request.refuse(&no_session());
    };
    let handle = request.handle.clone();
    let closing = start(async move { handle.control(Command::Close(session)).await });
    tokio::spawn(async move {
        let answer = match closing.await {
            Ok(Reply::Done(list)) => match list.into_iter().next() {
                Some(Err(rejection)) => Err(rejection),
                _ => Ok(Bytes::from_static(b"{}")),
            },
            Ok(_) => Err(unexpected()),
            Err(stopped) => Err(stopping(&stopped)),
        };
        request.answer(answer).await;
    });
}

async fn finish(peer: &Peer, request: Request, body: Bytes) {
    let items = match codec::decode_finish(body) {
        Ok(items) => items,
        Err(error) => return request.refuse(&convert::malformed(&error)),
    };
    let mut refused: Vec<(u32, Rejection)> = Vec::new();
    let mut completions = Vec::with_capacity(items.len());
    // Where each completion stood in the frame; empty while nothing is missing, which is always but for errors.
    let mut positions: Vec<u32> = Vec::new();
    for (position, item) in items.into_iter().enumerate() {
        let completion = convert::completion(item, &peer.definitions)
            .and_then(|completion| may_release(peer, completion));
        match completion {
            Ok(completion) => {
                if !refused.is_empty() {
                    positions.push(position as u32);
                }
                completions.push(completion);
            }
            Err(rejection) => {
                if refused.is_empty() {
                    positions.extend(0..position as u32);
                }
                refused.push((position as u32, rejection));
            }
        }
    }
    if completions.iter().any(completion_is_large) {
        let payloads = completions.iter_mut().flat_map(payloads_of_completion);
        if let Err(error) = persist(&request.handle, payloads).await {
            return request.refuse(&convert::storage(&error));
        }
    }
    let handle = request.handle.clone();
    let applied = start(async move { handle.control(Command::Finish(completions)).await });
    tokio::spawn(async move {
        let answer = match applied.await {
            Ok(Reply::Done(list)) => {
                for (at, item) in list.into_iter().enumerate() {
                    if let Err(rejection) = item {
                        let position = positions.get(at).copied().unwrap_or(at as u32);
                        refused.push((position, rejection));
                    }
                }
                refused.sort_by_key(|(position, _)| *position);
                let mut out = Vec::with_capacity(4);
                codec::put_list(&mut out, &refused, |out, (position, rejection)| {
                    let reason = convert::no(rejection);
                    codec::put_refusal(
                        out,
                        &Refusal {
                            position: *position,
                            reason,
                        },
                    );
                });
                Ok(Bytes::from(out))
            }
            Ok(_) => Err(unexpected()),
            Err(stopped) => Err(stopping(&stopped)),
        };
        request.answer(answer).await;
    });
}

/// A release without a token is only for a lease that the session held when it came back. The broker relies on this check.
fn may_release(peer: &Peer, completion: Completion) -> Result<Completion, Rejection> {
    let has_token = completion.token != LeaseToken([0; 16]);
    let name = (completion.node, completion.attempt);
    if has_token || completion.end != AttemptEnd::Released || peer.inherited.contains(&name) {
        return Ok(completion);
    }
    Err(Rejection::new(
        Code::LeaseUnknown,
        format!(
            "this session did not hold attempt {} of node {} when it came back: release it with its token",
            completion.attempt.0, completion.node
        ),
    ))
}

async fn create(peer: &Peer, request: Request, body: Bytes) {
    let children = codec::decode_create(body)
        .map_err(|error| convert::malformed(&error))
        .and_then(|create| convert::create(create, &peer.definitions));
    let mut children: CreateChildren = match children {
        Ok(children) => children,
        Err(rejection) => return request.refuse(&rejection),
    };
    if children.children.iter().any(node_is_large) {
        let payloads = children.children.iter_mut().map(|node| &mut node.arguments);
        if let Err(error) = persist(&request.handle, payloads).await {
            return request.refuse(&convert::storage(&error));
        }
    }
    let handle = request.handle.clone();
    let created = start(async move { handle.control(Command::CreateChildren(children)).await });
    tokio::spawn(async move {
        let answer = match created.await {
            Ok(Reply::Created(Ok(first))) => Ok(Bytes::copy_from_slice(&first.0.to_le_bytes())),
            Ok(Reply::Created(Err(rejection))) => Err(rejection),
            Ok(_) => Err(unexpected()),
            Err(stopped) => Err(stopping(&stopped)),
        };
        request.answer(answer).await;
    });
}

// ---- client verbs ---------------------------------------------------------------------------------------------------

async fn submit(peer: &Peer, request: Request, body: Bytes) {
    let items = match codec::decode_submit(body) {
        Ok(items) => items,
        Err(error) => return request.refuse(&convert::malformed(&error)),
    };
    let mut answers: Vec<Option<Rejection>> = Vec::with_capacity(items.len());
    let mut submissions: Vec<Submission> = Vec::with_capacity(items.len());
    for item in items {
        match convert::submission(item, &peer.definitions) {
            Ok(submission) => {
                submissions.push(submission);
                answers.push(None);
            }
            Err(rejection) => answers.push(Some(rejection)),
        }
    }
    let is_large = |submission: &Submission| submission.nodes.iter().any(node_is_large);
    if let Some(no) = crate::engine::handle::refusal(request.handle.pressure()) {
        // Before anything is written: payloads of submissions that are refused would use up what is left of a full disk.
        for answer in answers.iter_mut().filter(|answer| answer.is_none()) {
            *answer = Some(no.clone());
        }
        submissions.clear();
    } else if submissions.iter().any(is_large) {
        let nodes = submissions.iter_mut().flat_map(|one| one.nodes.iter_mut());
        let payloads = nodes.map(|node| &mut node.arguments);
        if let Err(error) = persist(&request.handle, payloads).await {
            return request.refuse(&convert::storage(&error));
        }
    }
    if request.handle.pressure() == Pressure::Slow {
        // The log runs away from the state store: whoever submits is slowed before anyone is refused.
        tokio::time::sleep(SLOW).await;
    }
    let handle = request.handle.clone();
    let applied = start(async move {
        if submissions.is_empty() {
            return Ok(Reply::Submitted(Vec::new()));
        }
        handle.intake(Command::Submit(submissions)).await
    });
    tokio::spawn(async move {
        let answer = match applied.await {
            Ok(Reply::Submitted(list)) => {
                let mut list = list.into_iter();
                let mut out = Vec::with_capacity(4 + 17 * answers.len());
                codec::put_list(&mut out, &answers, |out, refused| {
                    let result = match refused {
                        Some(rejection) => Err(rejection.clone()),
                        None => list.next().unwrap_or_else(|| Err(unexpected())),
                    };
                    let submitted = match result {
                        Ok(submitted) => Submitted::Run {
                            seq: submitted.run.seq.0,
                            salt: submitted.run.salt,
                            existing: submitted.existing,
                        },
                        Err(rejection) => Submitted::Refused(convert::no(&rejection)),
                    };
                    codec::put_submitted(out, &submitted);
                });
                Ok(Bytes::from(out))
            }
            Ok(_) => Err(unexpected()),
            Err(stopped) => Err(stopping(&stopped)),
        };
        request.answer(answer).await;
    });
}

fn fetch(request: Request, body: Bytes) {
    let asked = match codec::decode_fetch(body) {
        Ok(asked) => asked,
        Err(error) => return request.refuse(&convert::malformed(&error)),
    };
    tokio::spawn(async move {
        let reads = Arc::clone(&request.reads);
        let _turn = reads.acquire().await;
        let mut pages = outcomes::Pages::new(&request.handle, asked);
        loop {
            // Room first: what waits to be sent is what is held in memory.
            if !request.outgoing.room().await {
                return;
            }
            match pages.next(PAGE_BYTES).await {
                Ok((items, more)) => {
                    request.outgoing.push(|out| {
                        let start = frame::begin(out, Verb::Reply, more, request.number);
                        codec::put_list(out, &items, codec::put_item);
                        frame::end(out, start);
                    });
                    if !more {
                        return;
                    }
                }
                Err(rejection) => return request.refuse(&rejection),
            }
        }
    });
}

fn wait(peer: &mut Peer, number: u32, body: Bytes) {
    let outgoing = peer.outgoing.clone();
    let asked = match codec::decode_wait(body) {
        Ok(asked) => asked,
        Err(malformed) => {
            error(&outgoing, number, &convert::malformed(&malformed));
            return;
        }
    };
    let Ok(slot) = Arc::clone(&peer.waits).try_acquire_owned() else {
        let limit = peer.shared.limits.waits_per_connection;
        let rejection = Rejection::new(
            Code::Overloaded,
            format!("{limit} calls to WAIT are unanswered on this connection: that is the limit"),
        );
        error(&outgoing, number, &rejection);
        return;
    };
    let handle = peer.shared.handle.clone();
    while peer.waiting.try_join_next().is_some() {}
    peer.waiting.spawn(async move {
        let answer = waited(&handle, asked).await;
        if outgoing.room().await {
            match answer {
                Ok(waited) => outgoing.push(|out| {
                    let start = frame::begin(out, Verb::Reply, false, number);
                    codec::put_waited(out, &waited);
                    frame::end(out, start);
                }),
                Err(rejection) => error(&outgoing, number, &rejection),
            }
        }
        drop(slot);
    });
}

/// Tasks that end with the connection.
pub(super) type Waiting = JoinSet<()>;

async fn waited(handle: &Handle, asked: codec::Wait) -> Result<Waited, Rejection> {
    let run = RunId {
        seq: RunSeq(asked.seq),
        salt: asked.salt,
    };
    let over = async {
        match asked.timeout_ms {
            0 => std::future::pending().await,
            ms => tokio::time::sleep(std::time::Duration::from_millis(u64::from(ms))).await,
        }
    };
    tokio::pin!(over);
    loop {
        // Registered before the question, so that an end in between is not missed.
        let settled = handle.root_settled(run.seq);
        let summary = match handle.query(Query::Run(run)).await {
            Ok(Answer::Run(summary)) => summary,
            Ok(Answer::No(rejection)) => return Err(rejection),
            Ok(_) => return Err(unexpected()),
            Err(stopped) => return Err(stopping(&stopped)),
        };
        let state = convert::state_number(summary.root_state);
        if summary.root_state.is_terminal() {
            let node = NodeKey::new(run.seq, summary.value_node);
            let mut item = outcomes::one(handle, run, node).await?;
            // The state of the question: a resume may have begun another round since.
            item.state = state;
            return Ok(Waited {
                state,
                hint: String::new(),
                item: Some(item),
            });
        }
        tokio::select! {
            woken = settled => if woken.is_err() {
                return Err(Rejection::new(Code::Stopping, "the broker is stopping"));
            },
            () = &mut over => {
                let hint = documents::hint(handle, run).await?;
                return Ok(Waited { state, hint, item: None });
            }
        }
    }
}

// ---- large payloads -------------------------------------------------------------------------------------------------

fn is_large(payload: &Payload) -> bool {
    payload.body.len() > Body::INLINE_BYTES
}

fn node_is_large(node: &NewNode) -> bool {
    is_large(&node.arguments)
}

fn completion_is_large(completion: &Completion) -> bool {
    let body = match &completion.end {
        AttemptEnd::Value(body)
        | AttemptEnd::Structure { body, .. }
        | AttemptEnd::Failed { error: body, .. } => is_large(body),
        AttemptEnd::Tail(_) | AttemptEnd::Released => false,
    };
    body || completion.children.iter().any(node_is_large)
}

fn payloads_of_completion(completion: &mut Completion) -> impl Iterator<Item = &mut Payload> {
    let body = match &mut completion.end {
        AttemptEnd::Value(body)
        | AttemptEnd::Structure { body, .. }
        | AttemptEnd::Failed { error: body, .. } => Some(body),
        AttemptEnd::Tail(_) | AttemptEnd::Released => None,
    };
    let children = completion.children.iter_mut();
    body.into_iter()
        .chain(children.map(|node| &mut node.arguments))
}

/// Makes large payloads durable before the command that names them (S1). All of a frame at once: they share syncs.
async fn persist<'a>(
    handle: &Handle,
    payloads: impl Iterator<Item = &'a mut Payload>,
) -> Result<(), StorageError> {
    let mut large: Vec<&mut Payload> = payloads.filter(|payload| is_large(payload)).collect();
    for chunk in large.chunks_mut(64) {
        let mut writing = JoinSet::new();
        for (at, payload) in chunk.iter().enumerate() {
            let (handle, payload) = (handle.clone(), Payload::clone(payload));
            writing.spawn(async move { (at, handle.persist(payload).await) });
        }
        while let Some(written) = writing.join_next().await {
            let (at, payload) = written
                .map_err(|error| StorageError::Stopped(format!("a write ended: {error}")))?;
            *chunk[at] = payload?;
        }
    }
    Ok(())
}
