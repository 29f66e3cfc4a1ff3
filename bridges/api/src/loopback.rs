//! A message queue in memory, for tests of whatever drives bridges: it keeps messages until they are acknowledged, hands out again what
//! was not, and confirms deliveries late, as a remote queue would.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::Notify;

use crate::{
    BoxFuture, BridgeError, Confirmation, Delivery, Message, MessageIdentity, Positions, Receipt,
    Sink, Source, Unusable,
};

/// By what its messages are recognised.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Recognition {
    /// By position, as in Kafka: reading starts where the broker's commit says.
    Position,
    /// By a key, as in RabbitMQ: reading starts at the first message that was not acknowledged.
    Key,
}

/// The queue. Clones are the same queue.
#[derive(Debug, Clone)]
pub struct Loopback {
    name: Arc<str>,
    recognition: Recognition,
    state: Arc<Mutex<State>>,
    grew: Arc<Notify>,
}

#[derive(Debug, Default)]
struct State {
    inbound: Vec<Bytes>,
    /// All before this one were acknowledged.
    acknowledged: usize,
    outbound: Vec<Delivery>,
    faults: Faults,
}

/// What goes wrong, on request.
#[derive(Debug, Clone, Copy, Default)]
pub struct Faults {
    /// Each delivery takes that long.
    pub delay: Duration,
    /// That many more calls of `deliver` take the deliveries, then fail before they are confirmed.
    pub lost_confirms: u32,
    /// That many more receives fail.
    pub failed_receives: u32,
    /// Nothing can be built.
    pub down: bool,
}

/// Bodies over this many bytes are unusable, inbound, and refused, outbound.
pub const MAX_BODY: usize = 64 << 10;

/// Deliveries that may be unconfirmed.
pub const WINDOW: usize = 64;

impl Loopback {
    /// An empty queue.
    #[must_use]
    pub fn new(name: &str, recognition: Recognition) -> Self {
        Self {
            name: name.into(),
            recognition,
            state: Arc::default(),
            grew: Arc::default(),
        }
    }

    /// Adds a message, as a producer would.
    pub fn produce(&self, body: impl Into<Bytes>) {
        self.state().inbound.push(body.into());
        self.grew.notify_waiters();
    }

    /// What was delivered, in order, repetitions included.
    #[must_use]
    pub fn consumed(&self) -> Vec<Delivery> {
        self.state().outbound.clone()
    }

    /// How many messages were acknowledged.
    #[must_use]
    pub fn acknowledged(&self) -> usize {
        self.state().acknowledged
    }

    /// Sets what goes wrong from now on.
    pub fn set_faults(&self, faults: Faults) {
        self.state().faults = faults;
    }

    /// The inbound half.
    pub fn source(&self, positions: Arc<dyn Positions>) -> Result<LoopbackSource, BridgeError> {
        self.check_up()?;
        Ok(LoopbackSource {
            queue: self.clone(),
            positions,
            next: None,
            unsettled: 0,
            paused: false,
        })
    }

    /// The outbound half.
    pub fn sink(&self) -> Result<LoopbackSink, BridgeError> {
        self.check_up()?;
        Ok(LoopbackSink {
            queue: self.clone(),
            unconfirmed: VecDeque::new(),
        })
    }

    fn check_up(&self) -> Result<(), BridgeError> {
        if self.state().faults.down {
            return Err(BridgeError::Retry(format!("{} is down", self.name)));
        }
        Ok(())
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn message(&self, index: usize, body: Bytes) -> Message {
        let unusable = (body.len() > MAX_BODY).then(|| Unusable {
            code: "PAYLOAD_TOO_LARGE",
            reason: format!("{} bytes are over the limit of {MAX_BODY}", body.len()),
        });
        Message {
            body: Some(body),
            key: None,
            headers: Vec::new(),
            identity: match self.recognition {
                Recognition::Position => MessageIdentity::Position {
                    partition: Arc::clone(&self.name),
                    position: index as u64,
                    next: index as u64 + 1,
                },
                Recognition::Key => {
                    MessageIdentity::Key(Bytes::from(format!("{}-{index}", self.name)))
                }
            },
            coordinates: [("offset".to_owned(), index.to_string())].into(),
            unusable,
        }
    }
}

/// The inbound half of a [`Loopback`].
pub struct LoopbackSource {
    queue: Loopback,
    positions: Arc<dyn Positions>,
    /// Index of the next message; asked for at the first receive.
    next: Option<usize>,
    unsettled: usize,
    paused: bool,
}

impl Source for LoopbackSource {
    fn receive(&mut self, max: usize) -> BoxFuture<'_, Result<Option<Vec<Message>>, BridgeError>> {
        Box::pin(async move {
            if self.paused {
                std::future::pending::<()>().await;
            }
            let next = match (self.next, self.queue.recognition) {
                (Some(next), _) => next,
                (None, Recognition::Key) => self.queue.state().acknowledged,
                (None, Recognition::Position) => {
                    let committed = self.positions.next(&self.queue.name).await?;
                    usize::try_from(committed).unwrap_or(usize::MAX)
                }
            };
            self.next = Some(next);
            loop {
                let grew = Arc::clone(&self.queue.grew);
                let grew = grew.notified();
                tokio::pin!(grew);
                grew.as_mut().enable();
                let found: Vec<Bytes> = {
                    let mut state = self.queue.state();
                    if state.faults.failed_receives > 0 {
                        state.faults.failed_receives -= 1;
                        return Err(BridgeError::Retry("the connection was cut".to_owned()));
                    }
                    state.inbound.iter().skip(next).take(max).cloned().collect()
                };
                if !found.is_empty() {
                    self.next = Some(next + found.len());
                    self.unsettled += found.len();
                    let numbered = found.into_iter().enumerate();
                    return Ok(Some(
                        numbered
                            .map(|(i, body)| self.queue.message(next + i, body))
                            .collect(),
                    ));
                }
                grew.await;
            }
        })
    }

    fn settle<'a>(&'a mut self, receipts: &'a [Receipt]) -> BoxFuture<'a, Result<(), BridgeError>> {
        Box::pin(async move {
            let first = self.next.unwrap_or(0) - self.unsettled;
            self.unsettled -= receipts.len();
            self.queue.state().acknowledged = first + receipts.len();
            Ok(())
        })
    }

    fn pause(&mut self, paused: bool) -> BoxFuture<'_, Result<(), BridgeError>> {
        self.paused = paused;
        Box::pin(async { Ok(()) })
    }

    fn lag(&self) -> Option<u64> {
        let state = self.queue.state();
        Some((state.inbound.len() - state.acknowledged.min(state.inbound.len())) as u64)
    }
}

/// The outbound half of a [`Loopback`]: each call confirms what the call before has delivered.
pub struct LoopbackSink {
    queue: Loopback,
    unconfirmed: VecDeque<Confirmation>,
}

impl Sink for LoopbackSink {
    fn deliver(
        &mut self,
        deliveries: Vec<Delivery>,
    ) -> BoxFuture<'_, Result<Vec<Confirmation>, BridgeError>> {
        Box::pin(async move {
            let mut confirmed: Vec<_> = self.unconfirmed.drain(..).collect();
            for delivery in deliveries {
                let delay = self.queue.state().faults.delay;
                if !delay.is_zero() {
                    tokio::time::sleep(delay).await;
                }
                let size = delivery.body.as_ref().map_or(0, Bytes::len);
                let refused = (size > MAX_BODY).then(|| Unusable {
                    code: "PAYLOAD_TOO_LARGE",
                    reason: format!("{size} bytes are over the limit of {MAX_BODY}"),
                });
                let seq = delivery.seq;
                if refused.is_none() {
                    self.queue.state().outbound.push(delivery);
                }
                self.unconfirmed.push_back(Confirmation { seq, refused });
                if self.unconfirmed.len() > WINDOW {
                    confirmed.extend(self.unconfirmed.pop_front());
                }
            }
            let mut state = self.queue.state();
            if state.faults.lost_confirms > 0 {
                state.faults.lost_confirms -= 1;
                return Err(BridgeError::Retry(
                    "the connection was cut before the confirmation".to_owned(),
                ));
            }
            Ok(confirmed)
        })
    }

    fn drain(&mut self) -> BoxFuture<'_, Result<Vec<Confirmation>, BridgeError>> {
        Box::pin(async move { Ok(self.unconfirmed.drain(..).collect()) })
    }
}
