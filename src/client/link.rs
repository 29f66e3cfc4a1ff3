//! A connection that comes back by itself: introduces itself again, defines its specs again, and repeats what was not answered.
//!
//! One task owns the reading half; requests may come from any task. Whatever the broker pushes goes to a [`Push`], on that task. Invariant:
//! a request is in `pending` until it is answered, so a broken connection loses none; one that is not safe to repeat is failed instead.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tokio::sync::{oneshot, watch};
use tracing::{debug, info};

use super::ClientError;
use super::target::Target;
use crate::broker::types::Spec;
use crate::edge::convert;
use crate::edge::native::codec;
use crate::edge::native::frame::{self, Frame, MAX_JSON_BYTES, Verb};
use crate::edge::native::io::{Outgoing, Reader, read_some};
use crate::edge::native::json::{self, Hello, No, Welcome};

const WRITE_QUEUE_BYTES: usize = 8 * 1024 * 1024;
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);
/// Until the broker has said how often it wants to hear.
const FIRST_HEARTBEAT: Duration = Duration::from_millis(100);
const HELLO_TIMEOUT: Duration = Duration::from_secs(10);

/// What gets what the broker pushes. Called on the reading task, one call after the other.
pub(super) trait Push: Send + 'static {
    /// The connection stands (again). Credit was forgotten, everything unanswered has been repeated.
    fn connected(&mut self, link: &Link, welcome: &Welcome);
    /// SPECS, LEASES or REVOKE.
    fn frame(&mut self, link: &Link, frame: Frame) -> Result<(), ClientError>;
    /// Everything that had arrived was handled.
    fn idle(&mut self, link: &Link);
    /// Completions were refused, each with the reason.
    fn refused(&mut self, link: &Link, refused: Vec<(codec::Finish, ClientError)>);
}

/// For clients: the broker pushes nothing to them.
pub(super) struct Nothing;

impl Push for Nothing {
    fn connected(&mut self, _: &Link, _: &Welcome) {}
    fn frame(&mut self, _: &Link, frame: Frame) -> Result<(), ClientError> {
        Err(ClientError::Protocol(format!(
            "{:?} to a client",
            frame.verb
        )))
    }
    fn idle(&mut self, _: &Link) {}
    fn refused(&mut self, _: &Link, _: Vec<(codec::Finish, ClientError)>) {}
}

/// Bodies of the frames of a reply.
type Parts = Vec<Bytes>;

enum Pending {
    /// Someone waits for the answer.
    Asked {
        frame: Bytes,
        /// Doing it twice is the same as doing it once.
        repeatable: bool,
        parts: Parts,
        answer: oneshot::Sender<Result<Parts, ClientError>>,
    },
    /// A FINISH: only refusals are interesting.
    Finish(Bytes),
}

struct State {
    pending: BTreeMap<u32, Pending>,
    next: u32,
    numbers: BTreeMap<Arc<Spec>, u32>,
    specs: Vec<Arc<Spec>>,
    outgoing: Option<Outgoing>,
    session: Option<String>,
    heartbeat: Duration,
    /// Why there will be no connection any more.
    over: Option<ClientError>,
}

/// The way to the broker. Cheap to clone.
#[derive(Clone)]
pub(super) struct Link(Arc<Inner>);

struct Inner {
    url: String,
    target: Target,
    hello: Hello,
    state: Mutex<State>,
    close: watch::Sender<bool>,
}

/// Why a connection attempt failed.
enum Attempt {
    /// Another attempt may succeed.
    Again(ClientError),
    /// None will.
    Never(ClientError),
}

impl Link {
    /// Prepares a connection; [`Link::drive`] opens it.
    pub(super) fn new(url: &str, hello: Hello) -> Result<Self, ClientError> {
        Ok(Self(Arc::new(Inner {
            url: url.to_owned(),
            target: Target::parse(url)?,
            hello,
            state: Mutex::new(State {
                pending: BTreeMap::new(),
                next: 1,
                numbers: BTreeMap::new(),
                specs: Vec::new(),
                outgoing: None,
                session: None,
                heartbeat: FIRST_HEARTBEAT,
                over: None,
            }),
            close: watch::Sender::new(false),
        })))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends the connection for good; what is unanswered fails.
    pub(super) fn close(&self) {
        self.0.close.send_replace(true);
    }

    /// The worker's session, once the broker has given one.
    pub(super) fn session(&self) -> Option<u64> {
        let state = self.state();
        let session = state.session.as_deref()?;
        convert::session_id(session).map(|session| session.0)
    }

    /// How often a worker must be heard from.
    pub(super) fn heartbeat(&self) -> Duration {
        self.state().heartbeat
    }

    /// The connection's number of a spec; it is defined before it is first used.
    pub(super) fn define(&self, spec: &Arc<Spec>) -> u32 {
        let mut state = self.state();
        if let Some(number) = state.numbers.get(spec) {
            return *number;
        }
        let number = state.specs.len() as u32;
        state.specs.push(Arc::clone(spec));
        state.numbers.insert(Arc::clone(spec), number);
        if let Some(outgoing) = &state.outgoing {
            let document = json::write(&[convert::spec_json(Some(number), spec)]);
            outgoing.push(|out| frame::put(out, Verb::Define, false, 0, &document));
        }
        number
    }

    /// Sends a frame that has no reply. It is dropped when there is no connection: everything of that kind is said again after one.
    pub(super) fn tell(&self, verb: Verb, body: &[u8]) {
        if let Some(outgoing) = &self.state().outgoing {
            outgoing.push(|out| frame::put(out, verb, false, 0, body));
        }
    }

    /// Waits until what was said so far leaves without filling memory.
    pub(super) async fn room(&self) {
        let outgoing = self.state().outgoing.clone();
        if let Some(outgoing) = outgoing {
            outgoing.room().await;
        }
    }

    /// Sends a request. `body` writes its body. It is sent before this returns; await the answer with [`Asked::parts`].
    pub(super) fn ask(
        &self,
        verb: Verb,
        repeatable: bool,
        body: impl FnOnce(&mut Vec<u8>),
    ) -> Asked {
        let mut out = Vec::new();
        let start = frame::begin(&mut out, verb, false, 0);
        body(&mut out);
        frame::end(&mut out, start);
        let (answer, receiver) = oneshot::channel();
        let mut state = self.state();
        if let Some(error) = &state.over {
            let _ = answer.send(Err(error.clone()));
            return Asked(receiver);
        }
        let number = state.number();
        out[8..12].copy_from_slice(&number.to_le_bytes());
        let frame = Bytes::from(out);
        if let Some(outgoing) = &state.outgoing {
            outgoing.push(|out| out.extend_from_slice(&frame));
        }
        state.pending.insert(
            number,
            Pending::Asked {
                frame,
                repeatable,
                parts: Vec::new(),
                answer,
            },
        );
        Asked(receiver)
    }

    /// Sends a FINISH: `frame` is a whole frame whose request number is filled in here. `credit` goes with it.
    pub(super) fn finish(&self, mut frame: Vec<u8>, credit: u32) {
        let mut state = self.state();
        let number = state.number();
        frame[8..12].copy_from_slice(&number.to_le_bytes());
        let frame = Bytes::from(frame);
        if let Some(outgoing) = &state.outgoing {
            outgoing.push(|out| {
                out.extend_from_slice(&frame);
                if credit > 0 {
                    frame::put(out, Verb::Credit, false, 0, &credit.to_le_bytes());
                }
            });
        }
        state.pending.insert(number, Pending::Finish(frame));
    }

    /// The attempts whose FINISH is unanswered.
    pub(super) fn finishing(&self) -> Vec<codec::AttemptName> {
        let state = self.state();
        let mut names = Vec::new();
        for pending in state.pending.values() {
            if let Pending::Finish(frame) = pending
                && let Ok(items) = codec::decode_finish(frame.slice(frame::HEADER_BYTES..))
            {
                names.extend(items.iter().map(|item| codec::AttemptName {
                    run: item.run,
                    node: item.node,
                    attempt: item.attempt,
                }));
            }
        }
        names
    }

    /// Whether every FINISH was answered.
    pub(super) fn all_finished(&self) -> bool {
        let state = self.state();
        let mut pending = state.pending.values();
        !pending.any(|pending| matches!(pending, Pending::Finish(_)))
    }

    // ---- the reading task -------------------------------------------------------------------------------------------

    /// Connects, reads, and comes back until closed or refused. `ready` hears of the first attempt; with `patient`, of the first that
    /// is decided.
    pub(super) async fn drive(
        self,
        mut push: impl Push,
        patient: bool,
        ready: oneshot::Sender<Result<(), ClientError>>,
    ) -> ClientError {
        let mut ready = Some(ready);
        let mut pause = FIRST_PAUSE;
        let mut closed = self.0.close.subscribe();
        let error = loop {
            let connecting = tokio::select! {
                connecting = self.connect() => connecting,
                _ = closed.wait_for(|closed| *closed) => break ClientError::Closed,
            };
            match connecting {
                Ok((reader, buffer, outgoing, welcome)) => {
                    pause = FIRST_PAUSE;
                    self.resume(&outgoing, &welcome);
                    push.connected(&self, &welcome);
                    if let Some(ready) = ready.take() {
                        let _ = ready.send(Ok(()));
                    }
                    let ended = tokio::select! {
                        ended = self.read(reader, buffer, &mut push) => ended,
                        _ = closed.wait_for(|closed| *closed) => Err(ClientError::Closed),
                    };
                    outgoing.close();
                    self.disconnected();
                    match ended {
                        Ok(()) => info!(url = self.0.url, "the connection to the broker closed"),
                        Err(error @ ClientError::Closed) => break error,
                        Err(error) => info!(url = self.0.url, %error, "the connection broke"),
                    }
                }
                Err(Attempt::Never(error)) => break error,
                Err(Attempt::Again(error)) => {
                    if !patient && ready.is_some() {
                        break error;
                    }
                    debug!(url = self.0.url, %error, "no connection yet");
                }
            }
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                _ = closed.wait_for(|closed| *closed) => break ClientError::Closed,
            }
            pause = (pause * 2).min(LONGEST_PAUSE);
        };
        let pending = {
            let mut state = self.state();
            state.over = Some(error.clone());
            state.outgoing = None;
            std::mem::take(&mut state.pending)
        };
        for pending in pending.into_values() {
            if let Pending::Asked { answer, .. } = pending {
                let _ = answer.send(Err(error.clone()));
            }
        }
        if let Some(ready) = ready {
            let _ = ready.send(Err(error.clone()));
        }
        error
    }

    /// Opens a connection and introduces itself.
    async fn connect(&self) -> Result<(Reader, BytesMut, Outgoing, Welcome), Attempt> {
        let unreachable = |detail: String| {
            Attempt::Again(ClientError::Unreachable {
                url: self.0.url.clone(),
                detail,
            })
        };
        let opening = async {
            let (mut reader, writer) = self
                .0
                .target
                .open()
                .await
                .map_err(|error| unreachable(error.to_string()))?;
            let outgoing = Outgoing::new(WRITE_QUEUE_BYTES);
            tokio::spawn(outgoing.clone().run(writer));
            let mut hello = self.0.hello.clone();
            hello.session.clone_from(&self.state().session);
            let document = json::write(&hello);
            outgoing.push(|out| frame::put(out, Verb::Hello, false, 1, &document));
            let mut buffer = BytesMut::new();
            loop {
                let protocol = |error: frame::Malformed| Attempt::Never(error.into());
                if let Some(frame) = frame::take(&mut buffer).map_err(protocol)? {
                    let welcome = welcome(&frame)?;
                    return Ok((reader, buffer, outgoing, welcome));
                }
                match read_some(&mut reader, &mut buffer).await {
                    Ok(n) if n > 0 => {}
                    Ok(_) => return Err(unreachable("it closed the connection".to_owned())),
                    Err(error) => return Err(unreachable(error.to_string())),
                }
            }
        };
        match tokio::time::timeout(HELLO_TIMEOUT, opening).await {
            Ok(result) => result,
            Err(_) => Err(unreachable("it does not answer".to_owned())),
        }
    }

    /// Defines all specs and repeats what is unanswered, then opens the connection for others.
    fn resume(&self, outgoing: &Outgoing, welcome: &Welcome) {
        let mut state = self.state();
        state.heartbeat = Duration::from_millis(welcome.heartbeat_ms.max(1));
        state.session.clone_from(&welcome.session);
        let specs: Vec<json::Spec> = state
            .specs
            .iter()
            .enumerate()
            .map(|(number, spec)| convert::spec_json(Some(number as u32), spec))
            .collect();
        for chunk in specs.chunks(1_000) {
            let document = json::write(&chunk);
            debug_assert!(document.len() <= MAX_JSON_BYTES);
            outgoing.push(|out| frame::put(out, Verb::Define, false, 0, &document));
        }
        for pending in state.pending.values_mut() {
            let frame = match pending {
                Pending::Finish(frame) => frame,
                Pending::Asked { frame, parts, .. } => {
                    parts.clear();
                    frame
                }
            };
            outgoing.push(|out| out.extend_from_slice(frame));
        }
        state.outgoing = Some(outgoing.clone());
    }

    fn disconnected(&self) {
        let mut failed = Vec::new();
        {
            let mut state = self.state();
            state.outgoing = None;
            let lost: Vec<u32> = state
                .pending
                .iter()
                .filter(|(_, pending)| {
                    matches!(
                        pending,
                        Pending::Asked {
                            repeatable: false,
                            ..
                        }
                    )
                })
                .map(|(number, _)| *number)
                .collect();
            for number in lost {
                failed.extend(state.pending.remove(&number));
            }
        }
        for pending in failed {
            if let Pending::Asked { answer, .. } = pending {
                let _ = answer.send(Err(ClientError::Unanswered));
            }
        }
    }

    async fn read(
        &self,
        mut reader: Reader,
        mut buffer: BytesMut,
        push: &mut impl Push,
    ) -> Result<(), ClientError> {
        loop {
            while let Some(frame) = frame::take(&mut buffer)? {
                match frame.verb {
                    Verb::Reply | Verb::Error if frame.request != 0 => {
                        self.answered(frame, push)?;
                    }
                    Verb::Error => return Err(no(&frame.body)),
                    _ => push.frame(self, frame)?,
                }
            }
            push.idle(self);
            match read_some(&mut reader, &mut buffer).await {
                Ok(n) if n > 0 => {}
                _ => return Ok(()),
            }
        }
    }

    fn answered(&self, frame: Frame, push: &mut impl Push) -> Result<(), ClientError> {
        use std::collections::btree_map::Entry;
        let mut state = self.state();
        let Entry::Occupied(mut entry) = state.pending.entry(frame.request) else {
            // Asked before the connection broke, and given up by then.
            return Ok(());
        };
        if frame.verb == Verb::Error {
            let error = no(&frame.body);
            let again = match entry.get() {
                Pending::Finish(_) => true,
                Pending::Asked { repeatable, .. } => *repeatable,
            };
            if again && error.code() == Some("STOPPING") {
                // Not an answer: it is repeated once the broker is back.
                return Ok(());
            }
            match entry.remove() {
                Pending::Asked { answer, .. } => drop(answer.send(Err(error))),
                Pending::Finish(sent) => {
                    drop(state);
                    info!(%error, "a FINISH was refused as a whole");
                    let items = codec::decode_finish(sent.slice(frame::HEADER_BYTES..))?;
                    push.refused(
                        self,
                        items
                            .into_iter()
                            .map(|item| (item, error.clone()))
                            .collect(),
                    );
                }
            }
            return Ok(());
        }
        if frame.more {
            if let Pending::Asked { parts, .. } = entry.get_mut() {
                parts.push(frame.body);
            }
            return Ok(());
        }
        match entry.remove() {
            Pending::Asked {
                mut parts, answer, ..
            } => {
                parts.push(frame.body);
                drop(state);
                drop(answer.send(Ok(parts)));
            }
            Pending::Finish(sent) => {
                drop(state);
                // Four bytes of zero are what nearly every answer says.
                if frame.body[..] != [0; 4] {
                    let items = codec::decode_finish(sent.slice(frame::HEADER_BYTES..))?;
                    let refused =
                        codec::decode_refusals(frame.body)?
                            .into_iter()
                            .filter_map(|refusal| {
                                let item = items.get(refusal.position as usize)?;
                                Some((item.clone(), no(&refusal.reason)))
                            });
                    push.refused(self, refused.collect());
                }
            }
        }
        Ok(())
    }
}

impl State {
    /// A number that no unanswered request has; never 0.
    fn number(&mut self) -> u32 {
        loop {
            let number = self.next;
            self.next = self.next.checked_add(1).unwrap_or(1);
            if !self.pending.contains_key(&number) {
                return number;
            }
        }
    }
}

/// An answer that is to come.
pub(super) struct Asked(oneshot::Receiver<Result<Parts, ClientError>>);

impl Asked {
    /// The bodies of its frames; at least one.
    pub(super) async fn parts(self) -> Result<Parts, ClientError> {
        self.0.await.unwrap_or(Err(ClientError::Closed))
    }

    /// The body of an answer in one frame.
    pub(super) async fn body(self) -> Result<Bytes, ClientError> {
        let mut parts = self.parts().await?;
        match (parts.pop(), parts.is_empty()) {
            (Some(body), true) => Ok(body),
            _ => Err(ClientError::Protocol("an answer in parts".to_owned())),
        }
    }
}

/// An ERROR, or a refused item.
pub(super) fn no(body: &[u8]) -> ClientError {
    match json::parse::<No>(body, "ERROR") {
        Ok(no) => ClientError::Refused {
            code: no.code,
            message: no.message,
            retryable: no.retryable,
        },
        Err(error) => error.into(),
    }
}

fn welcome(frame: &Frame) -> Result<Welcome, Attempt> {
    match frame.verb {
        Verb::Reply => json::parse(&frame.body, "HELLO")
            .map_err(|error| Attempt::Never(ClientError::from(error))),
        Verb::Error => match no(&frame.body) {
            error @ ClientError::Refused {
                retryable: true, ..
            } => Err(Attempt::Again(error)),
            error => Err(Attempt::Never(error)),
        },
        verb => Err(Attempt::Never(ClientError::Protocol(format!(
            "{verb:?} instead of a welcome"
        )))),
    }
}
