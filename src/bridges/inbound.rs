//! One route: receive, make runs, wait for the commit, settle upstream (G12, G13).
//!
//! What cannot be used becomes a dead letter in its turn, so that nothing behind it waits and nothing is lost; what the broker refuses for
//! load is offered again until it is taken, with the source paused meanwhile. Invariant: a message is settled only when it is durable as a
//! run or as a dead letter, and messages of one source are made durable in their order.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use dagorama_bridge_api::{
    BoxFuture, BridgeError, Message, MessageIdentity, Positions, Receipt, Source, Unusable,
};
use tokio::sync::Notify;

use super::SourceFactory;
use super::arguments::{self, Usable};
use super::supervisor::{End, Status, Stop, add};
use crate::broker::command::{
    Answer, Code, Command, DeadLetter, Delay, Identity, NewNode, Origin, Query, Rejection, Reply,
    Submission,
};
use crate::broker::types::{Body, Codec, Payload, RunId, RunState, Spec};
use crate::config::{OnError, Route};
use crate::engine::{Handle, Stopped};

/// Messages that are received, committed and settled together.
const BATCH: usize = 256;
/// First and longest wait before refused messages are offered again.
const OFFER_AGAIN: (Duration, Duration) = (Duration::from_millis(20), Duration::from_secs(1));
/// How long a run may seem open before somebody asks whether it is: its end may have come before anybody listened.
const ASK_AGAIN: (Duration, Duration) = (Duration::from_secs(2), Duration::from_mins(1));

/// A route and what it needs.
pub(super) struct Inbound {
    pub(super) handle: Handle,
    pub(super) route: Route,
    pub(super) build: SourceFactory,
    pub(super) status: Arc<Status>,
    pub(super) stop: Stop,
    pub(super) max_payload: usize,
    pub(super) max_attempts: u32,
    pub(super) on_error: OnError,
    pub(super) max_inflight_runs: u64,
    pub(super) inflight: Arc<Inflight>,
}

/// Runs of a route that have not ended.
#[derive(Debug, Default)]
pub(super) struct Inflight {
    count: AtomicU64,
    fell: Notify,
}

/// Why a step did not go on.
enum Halt {
    Stopping,
    Bridge(BridgeError),
}

impl From<Stopped> for Halt {
    fn from(_: Stopped) -> Self {
        Self::Stopping
    }
}

impl From<BridgeError> for Halt {
    fn from(error: BridgeError) -> Self {
        Self::Bridge(error)
    }
}

/// A spec of which only the action counts: everything else is what a worker announced for it.
pub(super) fn by_name(action: &str) -> Arc<Spec> {
    Arc::new(Spec {
        by_name: true,
        ..Spec::of(action)
    })
}

/// A run of one node.
pub(super) fn submission(
    spec: Arc<Spec>,
    arguments: Payload,
    route: &str,
    usable: (Identity, Option<crate::broker::command::SubmissionKey>),
) -> Submission {
    Submission {
        key: usable.1,
        specs: vec![spec],
        nodes: vec![NewNode {
            spec: 0,
            arguments,
            inputs: Vec::new(),
            delay: Delay::None,
        }],
        root: 0,
        tags: std::collections::BTreeMap::new(),
        origin: Some(Origin {
            route: route.into(),
            identity: usable.0,
        }),
    }
}

/// Positions as the engine knows them.
struct Committed {
    handle: Handle,
    route: Arc<str>,
}

impl Positions for Committed {
    fn next(&self, partition: &str) -> BoxFuture<'_, Result<u64, BridgeError>> {
        let partition: Arc<str> = partition.into();
        Box::pin(async move {
            let route = Arc::clone(&self.route);
            match self
                .handle
                .query(Query::Position { route, partition })
                .await
            {
                Ok(Answer::Position(next)) => Ok(next),
                Ok(other) => Err(BridgeError::Retry(format!("no position: {other:?}"))),
                Err(stopped) => Err(BridgeError::Retry(stopped.to_string())),
            }
        })
    }
}

impl Inbound {
    /// Counts the runs that an earlier life of the broker left open.
    pub(super) async fn count_open_runs(&self) {
        let limit = usize::try_from(self.max_inflight_runs).unwrap_or(usize::MAX);
        if let Ok(Answer::Runs(runs)) = self.handle.query(Query::OpenRuns { limit }).await {
            for run in runs.iter().filter(|run| *run.source == *self.route.name) {
                self.watch(run.run);
            }
        }
    }

    /// Until the source ends or fails.
    pub(super) async fn run(&self) -> End {
        match self.pump().await {
            Ok(()) => End::Finished,
            Err(Halt::Stopping) => End::Stopping,
            Err(Halt::Bridge(_)) if self.stop.is_set() => End::Stopping,
            Err(Halt::Bridge(error)) => End::Failed(error),
        }
    }

    async fn pump(&self) -> Result<(), Halt> {
        let positions = Committed {
            handle: self.handle.clone(),
            route: self.route.name.as_str().into(),
        };
        let mut source = (self.build)(Arc::new(positions)).await?;
        self.status.set("running");
        loop {
            let room = self.room(&mut *source).await?;
            let received = tokio::select! {
                received = source.receive(room) => received?,
                () = self.stopping() => {
                    source.close().await?;
                    return Err(Halt::Stopping);
                }
            };
            let Some(messages) = received else {
                return Ok(source.close().await?);
            };
            add(&self.status.counts.messages, messages.len() as u64);
            self.take(&mut *source, messages).await?;
            let lag = source.lag().map_or(0, |lag| lag.saturating_add(1));
            self.status.counts.lag.store(lag, Ordering::Relaxed);
        }
    }

    async fn stopping(&self) {
        self.stop.clone().wait().await;
    }

    // ---- back-pressure --------------------------------------------------------------------------------------------------

    /// Waits until another run may be started, with the source paused; says how many.
    async fn room(&self, source: &mut dyn Source) -> Result<usize, Halt> {
        let mut paused = false;
        loop {
            let fell = self.inflight.fell.notified();
            let open = self.inflight.count.load(Ordering::Acquire);
            if open < self.max_inflight_runs {
                if paused {
                    source.pause(false).await?;
                    self.status.set("running");
                }
                let room = usize::try_from(self.max_inflight_runs - open).unwrap_or(BATCH);
                return Ok(room.min(BATCH));
            }
            if !paused {
                source.pause(true).await?;
                let reason = format!(
                    "{open} runs have not ended, max_inflight_runs is {}",
                    self.max_inflight_runs
                );
                self.status.hold("waiting", "", &reason);
                paused = true;
            }
            tokio::select! {
                () = fell => {}
                () = self.stopping() => return Err(Halt::Stopping),
            }
        }
    }

    /// Counts a run until it has ended.
    fn watch(&self, run: RunId) {
        let ended = self.handle.run_ended(run.seq);
        let (handle, inflight, status) = (
            self.handle.clone(),
            Arc::clone(&self.inflight),
            Arc::clone(&self.status),
        );
        inflight.count.fetch_add(1, Ordering::AcqRel);
        add(&status.counts.pending, 1);
        tokio::spawn(async move {
            let mut ended = ended;
            let mut wait = ASK_AGAIN.0;
            while tokio::time::timeout(wait, &mut ended).await.is_err() {
                let answer = handle.query(Query::Run(run)).await;
                if !matches!(answer, Ok(Answer::Run(summary)) if summary.state == RunState::Running)
                {
                    break;
                }
                wait = (wait * 2).min(ASK_AGAIN.1);
            }
            inflight.count.fetch_sub(1, Ordering::AcqRel);
            status.counts.pending.fetch_sub(1, Ordering::Relaxed);
            inflight.fell.notify_one();
        });
    }

    // ---- messages -------------------------------------------------------------------------------------------------------

    /// Makes messages durable, in order, and settles them.
    async fn take(&self, source: &mut dyn Source, messages: Vec<Message>) -> Result<(), Halt> {
        let spec = by_name(&self.route.action);
        let mut items: Vec<(Message, Result<Submission, Unusable>)> =
            Vec::with_capacity(messages.len());
        let mut stopped_by = None;
        for message in messages {
            let read = match arguments::read(&self.route, &message, self.max_payload) {
                Ok(Usable {
                    arguments,
                    identity,
                    key,
                }) => Ok(submission(
                    Arc::clone(&spec),
                    arguments,
                    &self.route.name,
                    (identity, key),
                )),
                Err(unusable) if self.on_error == OnError::Stop => {
                    stopped_by = Some(BridgeError::Parked {
                        code: unusable.code,
                        reason: format!(
                            "{} (on_error = \"stop\": {})",
                            unusable.reason,
                            place(&message)
                        ),
                    });
                    break;
                }
                Err(unusable) => Err(unusable),
            };
            items.push((message, read));
        }
        self.persist(&mut items).await?;
        let mut rest = &items[..];
        while let Some((_, first)) = rest.first() {
            let alike = rest
                .iter()
                .take_while(|(_, read)| read.is_ok() == first.is_ok())
                .count();
            let (now, later) = rest.split_at(alike);
            self.check_held(source, now)?;
            let receipts = if first.is_ok() {
                self.submit(source, now).await?
            } else {
                self.bury(source, now).await?
            };
            source.settle(&receipts).await?;
            rest = later;
        }
        stopped_by.map_or(Ok(()), |error| Err(Halt::Bridge(error)))
    }

    /// What a source has lost to another reader meanwhile is the other one's to apply.
    fn check_held(
        &self,
        source: &dyn Source,
        items: &[(Message, Result<Submission, Unusable>)],
    ) -> Result<(), Halt> {
        for (message, _) in items {
            if let MessageIdentity::Position { partition, .. } = &message.identity
                && !source.holds(partition)
            {
                return Err(BridgeError::Retry(format!(
                    "route {}: partition {partition} was lost to another reader",
                    self.route.name
                ))
                .into());
            }
        }
        Ok(())
    }

    /// Makes large arguments durable before the command that names them; those of one batch share their syncs.
    async fn persist(
        &self,
        items: &mut [(Message, Result<Submission, Unusable>)],
    ) -> Result<(), Halt> {
        let mut writes = Vec::new();
        for (i, (_, read)) in items.iter().enumerate() {
            if let Ok(submission) = read
                && submission.nodes[0].arguments.body.len() > Body::INLINE_BYTES
            {
                let (handle, payload) =
                    (self.handle.clone(), submission.nodes[0].arguments.clone());
                writes.push((
                    i,
                    tokio::spawn(async move { handle.persist(payload).await }),
                ));
            }
        }
        for (i, write) in writes {
            let stored = write.await.map_err(|e| BridgeError::Retry(e.to_string()))?;
            let stored = stored.map_err(|e| BridgeError::Retry(e.to_string()))?;
            if let Ok(submission) = &mut items[i].1 {
                submission.nodes[0].arguments = stored;
            }
        }
        Ok(())
    }

    /// Starts a run for each message; returns when each is durable, as a run or as a dead letter.
    async fn submit(
        &self,
        source: &mut dyn Source,
        items: &[(Message, Result<Submission, Unusable>)],
    ) -> Result<Vec<Receipt>, Halt> {
        let mut receipts: Vec<Option<Receipt>> = vec![None; items.len()];
        let mut attempts = vec![0u32; items.len()];
        let mut offered: Vec<usize> = (0..items.len()).collect();
        let mut pause = Pause::default();
        while !offered.is_empty() {
            let submissions = offered.iter().filter_map(|i| {
                let mut submission = items[*i].1.as_ref().ok()?.clone();
                self.unplace_if_passed_over(&mut submission, *i, items, &receipts);
                Some(submission)
            });
            let reply = self
                .handle
                .intake(Command::Submit(submissions.collect()))
                .await?;
            let Reply::Submitted(results) = reply else {
                return Err(
                    BridgeError::Retry("the broker answered something else".to_owned()).into(),
                );
            };
            let mut again = Vec::new();
            let mut refused: Option<Rejection> = None;
            for (i, result) in offered.into_iter().zip(results) {
                match result {
                    Ok(submitted) => {
                        receipts[i] = Some(Receipt::Applied {
                            duplicate: submitted.existing,
                        });
                        if submitted.existing {
                            add(&self.status.counts.duplicates, 1);
                        } else {
                            self.watch(submitted.run);
                        }
                        let nameless = matches!(&items[i].1, Ok(s) if s.key.is_none() && s.origin.as_ref().is_some_and(|o| o.identity == Identity::None));
                        add(&self.status.counts.unidentified, u64::from(nameless));
                    }
                    // Its run is so old that it is gone: a repetition all the same.
                    Err(no) if no.code == Code::RunExpired => {
                        receipts[i] = Some(Receipt::Applied { duplicate: true });
                        add(&self.status.counts.duplicates, 1);
                    }
                    Err(no) => {
                        if !no.code.retryable() {
                            attempts[i] += 1;
                        }
                        if attempts[i] >= self.max_attempts {
                            self.refused_for_good(
                                source,
                                &items[i],
                                i,
                                attempts[i],
                                &no,
                                items,
                                &receipts,
                            )
                            .await?;
                            receipts[i] = Some(Receipt::DeadLettered);
                        } else {
                            again.push(i);
                            // The first one is the reason: those behind it in its partition wait for it.
                            refused.get_or_insert(no);
                        }
                    }
                }
            }
            if let Some(no) = refused {
                pause
                    .begin(self, source, no.code.as_str(), &no.message)
                    .await?;
            }
            offered = again;
        }
        pause.end(self, source).await?;
        Ok(receipts.into_iter().flatten().collect())
    }

    /// Should the broker ever refuse a message and take a later one of the same partition, the place of the first counts as applied: it
    /// goes on without one, or it would be taken for a repetition and lost.
    fn unplace_if_passed_over(
        &self,
        submission: &mut Submission,
        i: usize,
        items: &[(Message, Result<Submission, Unusable>)],
        receipts: &[Option<Receipt>],
    ) {
        let Some(origin) = &mut submission.origin else {
            return;
        };
        if is_passed_over(&items[i].0, i, items, receipts) {
            tracing::error!(
                route = self.route.name,
                place = place(&items[i].0),
                "a later message was taken first"
            );
            origin.identity = Identity::None;
        }
    }

    #[expect(
        clippy::too_many_arguments,
        reason = "one caller, which has all of it at hand"
    )]
    async fn refused_for_good(
        &self,
        source: &mut dyn Source,
        item: &(Message, Result<Submission, Unusable>),
        i: usize,
        attempts: u32,
        no: &Rejection,
        items: &[(Message, Result<Submission, Unusable>)],
        receipts: &[Option<Receipt>],
    ) -> Result<(), Halt> {
        let mut letter = self
            .letter(&item.0, no.code.as_str(), &no.message, attempts)
            .await?;
        if is_passed_over(&item.0, i, items, receipts) {
            letter.origin.identity = Identity::None;
        }
        self.send_letters(source, vec![letter]).await
    }

    // ---- dead letters ---------------------------------------------------------------------------------------------------

    async fn bury(
        &self,
        source: &mut dyn Source,
        items: &[(Message, Result<Submission, Unusable>)],
    ) -> Result<Vec<Receipt>, Halt> {
        let mut letters = Vec::with_capacity(items.len());
        for (message, read) in items {
            if let Err(unusable) = read {
                letters.push(
                    self.letter(message, unusable.code, &unusable.reason, 1)
                        .await?,
                );
            }
        }
        self.send_letters(source, letters).await?;
        Ok(vec![Receipt::DeadLettered; items.len()])
    }

    async fn letter(
        &self,
        message: &Message,
        code: &str,
        reason: &str,
        attempts: u32,
    ) -> Result<DeadLetter, Halt> {
        let body = message.body.clone().unwrap_or_default();
        let body = Payload {
            codec: Codec::Raw,
            body: Body::Inline(body),
        };
        let body = self
            .handle
            .persist(body)
            .await
            .map_err(|e| BridgeError::Retry(e.to_string()))?;
        let mut coordinates = message.coordinates.clone();
        let text = |bytes: &Bytes| String::from_utf8_lossy(bytes).into_owned();
        if let Some(key) = &message.key {
            coordinates.insert("key".to_owned(), text(key));
        }
        for (name, value) in &message.headers {
            coordinates.insert(format!("header.{name}"), text(value));
        }
        if message.unusable.is_some() {
            coordinates.insert("cut".to_owned(), "true".to_owned());
        }
        Ok(DeadLetter {
            origin: Origin {
                route: self.route.name.as_str().into(),
                identity: arguments::identity(&self.route.name, &message.identity),
            },
            code: code.into(),
            reason: reason.into(),
            attempts,
            coordinates,
            body,
        })
    }

    async fn send_letters(
        &self,
        source: &mut dyn Source,
        mut letters: Vec<DeadLetter>,
    ) -> Result<(), Halt> {
        let mut pause = Pause::default();
        loop {
            let reply = self
                .handle
                .intake(Command::DeadLetter(letters.clone()))
                .await?;
            let Reply::Done(results) = reply else {
                return Err(
                    BridgeError::Retry("the broker answered something else".to_owned()).into(),
                );
            };
            let mut refused = None;
            let mut results = results.into_iter();
            let mut durable = 0;
            letters.retain(|_| match results.next() {
                Some(Ok(())) => {
                    durable += 1;
                    false
                }
                Some(Err(no)) => {
                    refused = Some(no);
                    true
                }
                None => true,
            });
            add(&self.status.counts.dead, durable);
            match refused {
                None if letters.is_empty() => return pause.end(self, source).await,
                None => {
                    return Err(BridgeError::Retry(
                        "the broker answered for fewer letters".to_owned(),
                    )
                    .into());
                }
                Some(no) if no.code.retryable() => {
                    pause
                        .begin(self, source, no.code.as_str(), &no.message)
                        .await?;
                }
                // Nothing is dropped without a record: the route waits for a person.
                Some(no) => {
                    return Err(BridgeError::Parked {
                        code: no.code.as_str(),
                        reason: format!("a dead letter was refused: {}", no.message),
                    }
                    .into());
                }
            }
        }
    }
}

/// Whether a later message of the same partition is durable already.
fn is_passed_over(
    message: &Message,
    i: usize,
    items: &[(Message, Result<Submission, Unusable>)],
    receipts: &[Option<Receipt>],
) -> bool {
    let MessageIdentity::Position { partition, .. } = &message.identity else {
        return false;
    };
    let later = items.iter().zip(receipts).skip(i + 1);
    later.filter(|(_, receipt)| receipt.is_some()).any(
        |((other, _), _)| matches!(&other.identity, MessageIdentity::Position { partition: theirs, .. } if theirs == partition),
    )
}

fn place(message: &Message) -> String {
    let parts: Vec<_> = message
        .coordinates
        .iter()
        .map(|(name, value)| format!("{name} {value}"))
        .collect();
    parts.join(", ")
}

/// The source stands still while the broker refuses.
#[derive(Default)]
struct Pause {
    wait: Option<Duration>,
    /// What was made durable for messages that are refused must be there when they are taken at last.
    kept: Option<Box<dyn Send + Sync>>,
}

impl Pause {
    /// Waits a little, longer each time.
    async fn begin(
        &mut self,
        inbound: &Inbound,
        source: &mut dyn Source,
        code: &'static str,
        reason: &str,
    ) -> Result<(), Halt> {
        if self.wait.is_none() {
            self.kept = Some(inbound.handle.keep_payloads());
            source.pause(true).await?;
        }
        inbound.status.hold("waiting", code, reason);
        let wait = self.wait.unwrap_or(OFFER_AGAIN.0);
        self.wait = Some((wait * 2).min(OFFER_AGAIN.1));
        tokio::select! {
            () = tokio::time::sleep(wait) => Ok(()),
            () = inbound.stopping() => Err(Halt::Stopping),
        }
    }

    async fn end(&mut self, inbound: &Inbound, source: &mut dyn Source) -> Result<(), Halt> {
        self.kept = None;
        if self.wait.take().is_some() {
            source.pause(false).await?;
            inbound.status.set("running");
        }
        Ok(())
    }
}
