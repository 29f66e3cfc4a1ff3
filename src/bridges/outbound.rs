//! One output: read what is owed, make its bytes, deliver, and confirm to the broker what the other side has confirmed (G14).
//!
//! After a rebuild it begins at the first unconfirmed delivery. What can never leave becomes a dead letter of the output, durable before its
//! delivery counts as confirmed, so that those behind it go on. Invariant: what one call of the sink has confirmed is committed before
//! the next call.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use dagorama_bridge_api::{BridgeError, Confirmation, Delivery, Unusable};

use super::SinkFactory;
use super::arguments::hashed;
use super::supervisor::{End, Status, Stop, add};
use super::value;
use crate::broker::command::{Answer, Command, DeadLetter, Identity, Origin, Query, Reply};
use crate::broker::types::{Body, Codec, NodeRecord, Payload, RunId};
use crate::config::Output;
use crate::engine::{Handle, Stopped};
use crate::storage::{OutboxRecord, Read, StorageError};

/// Deliveries that are read at once, and about how many bytes of them.
const BATCH: usize = 256;
const BATCH_BYTES: usize = 8 << 20;
/// Wait before a refused dead letter is offered again.
const OFFER_AGAIN: Duration = Duration::from_millis(100);

/// An output and what it needs.
pub(super) struct Outbound {
    pub(super) handle: Handle,
    pub(super) output: Output,
    pub(super) build: SinkFactory,
    pub(super) status: Arc<Status>,
    pub(super) stop: Stop,
    pub(super) max_payload: usize,
}

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

/// A delivery that was read, and whether it can leave.
struct Ready {
    record: OutboxRecord,
    body: Result<(Bytes, &'static str), Unusable>,
    kept: Option<Payload>,
    node: Option<NodeRecord>,
}

impl Outbound {
    /// Until the sink fails or the broker stops.
    pub(super) async fn run(&self) -> End {
        match self.pump().await {
            Err(Halt::Bridge(error)) if !self.stop.is_set() => End::Failed(error),
            Ok(()) | Err(_) => End::Stopping,
        }
    }

    async fn pump(&self) -> Result<(), Halt> {
        let mut sink = (self.build)().await?;
        self.status.set("running");
        let grew = self.handle.output_grew(&self.output.name);
        let (mut next, mut confirmed) = self.owed().await?;
        let mut drained = true;
        loop {
            let grown = grew.notified();
            tokio::pin!(grown);
            grown.as_mut().enable();
            if self.stop.is_set() {
                let late = sink.drain().await?;
                self.confirm(late).await?;
                return Err(Halt::Stopping);
            }
            let ready = self.read(next).await?;
            let Some(last) = ready.last() else {
                if !drained {
                    drained = true;
                    let late = sink.drain().await?;
                    self.confirm(late).await?;
                    continue;
                }
                self.status.counts.pending.store(0, Ordering::Relaxed);
                tokio::select! {
                    () = grown => {}
                    () = async { self.stop.clone().wait().await } => {}
                }
                continue;
            };
            next = last.record.seq + 1;
            self.status
                .counts
                .pending
                .store(ready.len() as u64, Ordering::Relaxed);
            let mut deliveries = Vec::with_capacity(ready.len());
            for item in ready {
                if confirmed.remove(&item.record.seq) {
                    continue;
                }
                match item.body {
                    Ok((body, content_type)) => deliveries.push(self.delivery(
                        &item.record,
                        item.node.as_ref(),
                        body,
                        content_type,
                    )),
                    Err(unusable) => {
                        let seq = item.record.seq;
                        self.bury(&item.record, &unusable, item.kept).await?;
                        self.commit(vec![seq]).await?;
                    }
                }
            }
            drained = false;
            let confirmations = sink.deliver(deliveries).await?;
            self.confirm(confirmations).await?;
        }
    }

    /// The first delivery that is owed, and those after it that are confirmed.
    async fn owed(&self) -> Result<(u64, BTreeSet<u64>), Halt> {
        let output = self.output.name.as_str().into();
        match self.handle.query(Query::Outbox { output }).await? {
            Answer::Outbox {
                cursor, confirmed, ..
            } => Ok((cursor, confirmed.into_iter().collect())),
            // Nothing was ever owed.
            _ => Ok((0, BTreeSet::new())),
        }
    }

    /// Reads what is owed from `from` on, with its bytes.
    async fn read(&self, from: u64) -> Result<Vec<Ready>, Halt> {
        let Some(id) = self.handle.name_id(&self.output.name) else {
            return Ok(Vec::new());
        };
        let (codec, limit) = (self.output.codec, self.max_payload);
        let read = move |reader: &dyn Read| {
            let mut ready = Vec::new();
            let mut bytes = 0;
            for record in reader.outbox(id, from, BATCH)? {
                let found = value::find(reader, record.node, codec, limit)?;
                let found = match found {
                    Some(found) => Ready {
                        record,
                        body: found.body,
                        kept: found.kept,
                        node: Some(found.record),
                    },
                    None => Ready {
                        record,
                        body: Err(Unusable {
                            code: "VALUE_GONE",
                            reason: format!("node {} is not in the store", record.node),
                        }),
                        kept: None,
                        node: None,
                    },
                };
                bytes += found.body.as_ref().map_or(0, |(body, _)| body.len());
                ready.push(found);
                if bytes > BATCH_BYTES {
                    break;
                }
            }
            Ok(ready)
        };
        self.handle
            .read(read)
            .await
            .map_err(|e| Halt::Bridge(unreadable(&e)))
    }

    fn message_id(&self, record: &OutboxRecord) -> String {
        let run = RunId {
            seq: record.node.run,
            salt: record.salt,
        };
        format!(
            "{run}/{}/{}/{}",
            record.node.node.0, record.round, self.output.name
        )
    }

    fn delivery(
        &self,
        record: &OutboxRecord,
        node: Option<&NodeRecord>,
        body: Bytes,
        content_type: &'static str,
    ) -> Delivery {
        let run = RunId {
            seq: record.node.run,
            salt: record.salt,
        };
        let mut headers = vec![
            ("run".to_owned(), run.to_string()),
            ("node".to_owned(), record.node.node.0.to_string()),
        ];
        if let Some(spec) = node.and_then(|node| self.handle.spec(node.spec)) {
            headers.push(("action".to_owned(), spec.action.to_string()));
        }
        Delivery {
            seq: record.seq,
            message_id: self.message_id(record),
            key: None,
            body: Some(body),
            content_type,
            headers,
        }
    }

    /// Commits what the other side has confirmed; what it refused for good becomes a dead letter first.
    async fn confirm(&self, confirmations: Vec<Confirmation>) -> Result<(), Halt> {
        let mut seqs = Vec::with_capacity(confirmations.len());
        for confirmation in confirmations {
            if let Some(unusable) = confirmation.refused
                && let Some(item) = self
                    .read(confirmation.seq)
                    .await?
                    .into_iter()
                    .find(|item| item.record.seq == confirmation.seq)
            {
                self.bury(&item.record, &unusable, item.kept).await?;
            }
            seqs.push(confirmation.seq);
        }
        self.commit(seqs).await
    }

    async fn commit(&self, seqs: Vec<u64>) -> Result<(), Halt> {
        if seqs.is_empty() {
            return Ok(());
        }
        let n = seqs.len() as u64;
        let output = self.output.name.as_str().into();
        let reply = self
            .handle
            .control(Command::ConfirmOutbox { output, seqs })
            .await?;
        if let Reply::Done(results) = reply
            && let Some(Err(no)) = results.into_iter().next()
        {
            return Err(BridgeError::Retry(format!("a confirmation was refused: {no}")).into());
        }
        add(&self.status.counts.messages, n);
        Ok(())
    }

    /// A delivery that can never leave. Its message id is the key, so that a crash in between does not make two letters of it.
    async fn bury(
        &self,
        record: &OutboxRecord,
        unusable: &Unusable,
        kept: Option<Payload>,
    ) -> Result<(), Halt> {
        let id = self.message_id(record);
        let nothing = || Payload {
            codec: Codec::Raw,
            body: Body::Inline(Bytes::new()),
        };
        let letter = DeadLetter {
            origin: Origin {
                route: self.output.name.as_str().into(),
                identity: Identity::Key(hashed(&self.output.name, "delivery", id.as_bytes())),
            },
            code: unusable.code.into(),
            reason: unusable.reason.as_str().into(),
            attempts: 1,
            coordinates: [
                (
                    "run".to_owned(),
                    RunId {
                        seq: record.node.run,
                        salt: record.salt,
                    }
                    .to_string(),
                ),
                ("node".to_owned(), record.node.node.0.to_string()),
                ("round".to_owned(), record.round.to_string()),
                ("message_id".to_owned(), id),
            ]
            .into(),
            body: kept.unwrap_or_else(nothing),
        };
        loop {
            let reply = self
                .handle
                .intake(Command::DeadLetter(vec![letter.clone()]))
                .await?;
            let refused = match reply {
                Reply::Done(results) => results.into_iter().find_map(Result::err),
                _ => None,
            };
            match refused {
                None => {
                    add(&self.status.counts.dead, 1);
                    return Ok(());
                }
                Some(no) if no.code.retryable() => {
                    self.status.hold("waiting", no.code.as_str(), &no.message);
                    tokio::select! {
                        () = tokio::time::sleep(OFFER_AGAIN) => self.status.set("running"),
                        () = async { self.stop.clone().wait().await } => return Err(Halt::Stopping),
                    }
                }
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

fn unreadable(error: &StorageError) -> BridgeError {
    match error {
        StorageError::Corrupt { .. } => BridgeError::Parked {
            code: "STORE_CORRUPT",
            reason: error.to_string(),
        },
        other => BridgeError::Retry(other.to_string()),
    }
}
