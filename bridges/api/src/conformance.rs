//! What every bridge must do, as a suite over a [`Harness`] that its tests implement.
//!
//! A check that fails says which and why; [`exercise`] returns the names of those that were made, so that a test can see that none was
//! left out. [`Ledger`] stands for the broker: it applies messages, recognises repetitions, and answers for positions.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;

use crate::{
    BoxFuture, BridgeError, Confirmation, Delivery, Message, MessageIdentity, Positions, Receipt,
    Sink, Source,
};

/// The other side, as a test sees it.
pub trait Harness: Send {
    /// Makes messages available to the source, in order, as a producer would.
    fn produce<'a>(&'a mut self, bodies: &'a [Vec<u8>]) -> BoxFuture<'a, ()>;
    /// Builds a source that starts where the positions say, or where it has acknowledged.
    fn source(
        &mut self,
        positions: Arc<dyn Positions>,
    ) -> BoxFuture<'_, Result<Box<dyn Source>, BridgeError>>;
    /// Builds a sink.
    fn sink(&mut self) -> BoxFuture<'_, Result<Box<dyn Sink>, BridgeError>>;
    /// Everything that a consumer has seen, in order, repetitions included.
    fn consumed(&mut self) -> BoxFuture<'_, Vec<Vec<u8>>>;
    /// What the source itself must find unusable.
    fn poison(&self) -> Vec<u8>;
    /// A consumer sees each delivery once, even when it is delivered again after a crash.
    fn once(&self) -> bool;
    /// How long a check may take before it counts as hung.
    fn patience(&self) -> Duration {
        Duration::from_mins(1)
    }
    /// Makes the other side slow, or quick again. `false`: that cannot be done.
    fn slow(&mut self, slow: bool) -> bool {
        let _ = slow;
        false
    }
}

/// What the broker would have committed.
#[derive(Debug, Clone, Default)]
pub struct Ledger(Arc<Mutex<Book>>);

#[derive(Debug, Default)]
struct Book {
    positions: BTreeMap<String, u64>,
    keys: BTreeSet<Bytes>,
    applied: Vec<Vec<u8>>,
    dead: Vec<&'static str>,
}

impl Ledger {
    /// Applies messages as one commit does, and says what became of each.
    #[must_use]
    pub fn apply(&self, messages: &[Message]) -> Vec<Receipt> {
        let mut book = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        messages.iter().map(|message| book.apply(message)).collect()
    }

    /// The bodies that were applied, in order.
    #[must_use]
    pub fn applied(&self) -> Vec<Vec<u8>> {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .applied
            .clone()
    }

    /// The codes of the dead letters, in order.
    #[must_use]
    pub fn dead(&self) -> Vec<&'static str> {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .dead
            .clone()
    }
}

impl Book {
    fn apply(&mut self, message: &Message) -> Receipt {
        let duplicate = match &message.identity {
            MessageIdentity::Position {
                partition,
                position,
                next,
            } => {
                let stored = self.positions.entry(partition.to_string()).or_default();
                let old = position < stored;
                *stored = (*stored).max(*next);
                old
            }
            MessageIdentity::Key(key) => !self.keys.insert(key.clone()),
            MessageIdentity::None => false,
        };
        if let Some(unusable) = &message.unusable {
            if !duplicate {
                self.dead.push(unusable.code);
            }
            return Receipt::DeadLettered;
        }
        if !duplicate {
            self.applied
                .push(message.body.as_deref().unwrap_or_default().to_vec());
        }
        Receipt::Applied { duplicate }
    }
}

impl Positions for Ledger {
    fn next(&self, partition: &str) -> BoxFuture<'_, Result<u64, BridgeError>> {
        let book = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let next = book.positions.get(partition).copied().unwrap_or(0);
        Box::pin(async move { Ok(next) })
    }
}

type Outcome = Result<(), String>;

/// Runs every check; the error names the one that failed. The harness must start empty.
pub async fn exercise(harness: &mut dyn Harness) -> Result<Vec<&'static str>, String> {
    let patience = harness.patience();
    let mut suite = Suite {
        harness,
        ledger: Ledger::default(),
        expected: Vec::new(),
        seq: 0,
        sent: Vec::new(),
    };
    let mut made = Vec::new();
    macro_rules! check {
        ($($name:ident),* $(,)?) => {$(
            let check = tokio::time::timeout(patience, suite.$name()).await;
            check.unwrap_or_else(|_| Err(format!("took longer than {patience:?}"))).map_err(|why| format!("{}: {why}", stringify!($name)))?;
            made.push(stringify!($name));
        )*};
    }
    check! {
        messages_come_in_order_and_never_more_than_asked_for,
        what_was_not_settled_comes_again,
        what_was_committed_but_not_settled_is_applied_once,
        a_cancelled_receive_loses_nothing,
        a_paused_source_waits,
        several_receives_are_settled_in_order,
        poison_does_not_block_those_behind_it,
        a_closed_source_goes_on_where_it_stood,
        every_delivery_is_confirmed_once_and_in_order,
        a_lost_confirmation_loses_nothing,
        a_shutdown_with_deliveries_in_flight_loses_nothing,
        a_new_sink_goes_on,
        a_slow_peer_loses_nothing,
    }
    Ok(made)
}

struct Suite<'a> {
    harness: &'a mut dyn Harness,
    ledger: Ledger,
    /// What the ledger must hold.
    expected: Vec<Vec<u8>>,
    seq: u64,
    /// What a consumer must have seen, in order.
    sent: Vec<Vec<u8>>,
}

const SHORT: Duration = Duration::from_millis(150);

fn ensure(holds: bool, why: impl FnOnce() -> String) -> Outcome {
    if holds { Ok(()) } else { Err(why()) }
}

#[expect(clippy::needless_pass_by_value, reason = "handed to map_err")]
fn text(error: BridgeError) -> String {
    format!("the bridge failed: {error}")
}

async fn receive(source: &mut Box<dyn Source>, max: usize) -> Result<Vec<Message>, String> {
    let messages = source.receive(max).await.map_err(text)?;
    let messages = messages.ok_or("the source has ended")?;
    ensure(!messages.is_empty() && messages.len() <= max, || {
        format!("{} messages, {max} were asked for", messages.len())
    })?;
    Ok(messages)
}

async fn receive_all(source: &mut Box<dyn Source>, count: usize) -> Result<Vec<Message>, String> {
    let mut all = Vec::new();
    while all.len() < count {
        all.extend(receive(source, count - all.len()).await?);
    }
    Ok(all)
}

fn bodies(messages: &[Message]) -> Vec<Vec<u8>> {
    messages
        .iter()
        .map(|m| m.body.as_deref().unwrap_or_default().to_vec())
        .collect()
}

fn shown(bodies: &[Vec<u8>]) -> Vec<String> {
    bodies
        .iter()
        .map(|b| String::from_utf8_lossy(&b[..b.len().min(60)]).into_owned())
        .collect()
}

impl Suite<'_> {
    async fn source(&mut self) -> Result<Box<dyn Source>, String> {
        let positions = Arc::new(self.ledger.clone());
        self.harness.source(positions).await.map_err(text)
    }

    async fn sink(&mut self) -> Result<Box<dyn Sink>, String> {
        self.harness.sink().await.map_err(text)
    }

    async fn produce(&mut self, name: &str, count: usize) -> Vec<Vec<u8>> {
        let new: Vec<Vec<u8>> = (0..count)
            .map(|i| format!("{{\"{name}\":{i}}}").into_bytes())
            .collect();
        self.harness.produce(&new).await;
        self.expected.extend(new.iter().cloned());
        new
    }

    /// Commits and settles.
    async fn take(&mut self, source: &mut Box<dyn Source>, messages: &[Message]) -> Outcome {
        let receipts = self.ledger.apply(messages);
        source.settle(&receipts).await.map_err(text)
    }

    fn check_applied(&self) -> Outcome {
        let applied = self.ledger.applied();
        ensure(applied == self.expected, || {
            format!(
                "applied {:?}, wanted {:?}",
                shown(&applied),
                shown(&self.expected)
            )
        })
    }

    async fn messages_come_in_order_and_never_more_than_asked_for(&mut self) -> Outcome {
        let mut source = self.source().await?;
        let wanted = self.produce("order", 7).await;
        let mut found = Vec::new();
        while found.len() < wanted.len() {
            let messages = receive(&mut source, 2).await?;
            self.take(&mut source, &messages).await?;
            found.extend(bodies(&messages));
        }
        ensure(found == wanted, || format!("received {:?}", shown(&found)))?;
        self.check_applied()
    }

    async fn what_was_not_settled_comes_again(&mut self) -> Outcome {
        let wanted = self.produce("again", 3).await;
        let mut source = self.source().await?;
        let first = receive_all(&mut source, 3).await?;
        drop(source);
        let mut source = self.source().await?;
        let second = receive_all(&mut source, 3).await?;
        ensure(bodies(&second) == wanted, || {
            format!("received {:?}", shown(&bodies(&second)))
        })?;
        let same = first
            .iter()
            .map(|m| &m.identity)
            .eq(second.iter().map(|m| &m.identity));
        ensure(same, || {
            "the same message has another identity when it comes again".to_owned()
        })?;
        self.take(&mut source, &second).await?;
        self.check_applied()
    }

    async fn what_was_committed_but_not_settled_is_applied_once(&mut self) -> Outcome {
        self.produce("committed", 3).await;
        let mut source = self.source().await?;
        let messages = receive_all(&mut source, 3).await?;
        let _ = self.ledger.apply(&messages);
        drop(source);
        let last = self.produce("then", 1).await;
        let mut source = self.source().await?;
        loop {
            let messages = receive(&mut source, 10).await?;
            self.take(&mut source, &messages).await?;
            if bodies(&messages).ends_with(&last) {
                break;
            }
        }
        self.check_applied()
    }

    async fn a_cancelled_receive_loses_nothing(&mut self) -> Outcome {
        let mut source = self.source().await?;
        let mut found = 0;
        for round in 0..20u64 {
            self.produce(&format!("cancel{round}"), 2).await;
            let wait = Duration::from_micros(300 * (round % 5));
            if let Ok(received) = tokio::time::timeout(wait, source.receive(3)).await {
                let messages = received.map_err(text)?.ok_or("the source has ended")?;
                found += messages.len();
                self.take(&mut source, &messages).await?;
            }
        }
        let rest = receive_all(&mut source, 40 - found).await?;
        self.take(&mut source, &rest).await?;
        self.check_applied()
    }

    async fn a_paused_source_waits(&mut self) -> Outcome {
        let mut source = self.source().await?;
        source.pause(true).await.map_err(text)?;
        self.produce("paused", 2).await;
        let early = tokio::time::timeout(SHORT, source.receive(10)).await;
        ensure(early.is_err(), || {
            "a paused source returned messages".to_owned()
        })?;
        source.pause(false).await.map_err(text)?;
        let messages = receive_all(&mut source, 2).await?;
        self.take(&mut source, &messages).await?;
        self.check_applied()
    }

    async fn several_receives_are_settled_in_order(&mut self) -> Outcome {
        let mut source = self.source().await?;
        self.produce("several", 6).await;
        let mut all = Vec::new();
        while all.len() < 6 {
            all.extend(receive(&mut source, 2).await?);
        }
        let receipts = self.ledger.apply(&all);
        source.settle(&receipts[..1]).await.map_err(text)?;
        source.settle(&receipts[1..4]).await.map_err(text)?;
        // The last two are committed and not settled: a new source must not make the ledger apply them twice.
        drop(source);
        self.produce("after several", 1).await;
        let mut source = self.source().await?;
        while self.ledger.applied().len() < self.expected.len() {
            let messages = receive(&mut source, 10).await?;
            self.take(&mut source, &messages).await?;
        }
        self.check_applied()
    }

    async fn poison_does_not_block_those_behind_it(&mut self) -> Outcome {
        let mut source = self.source().await?;
        self.produce("before", 1).await;
        let poison = self.harness.poison();
        self.harness.produce(&[poison]).await;
        self.produce("behind", 1).await;
        let messages = receive_all(&mut source, 3).await?;
        let unusable: Vec<_> = messages.iter().map(|m| m.unusable.is_some()).collect();
        ensure(unusable == [false, true, false], || {
            format!("unusable: {unusable:?}")
        })?;
        self.take(&mut source, &messages).await?;
        ensure(self.ledger.dead().len() == 1, || {
            format!("dead letters: {:?}", self.ledger.dead())
        })?;
        self.check_applied()
    }

    async fn a_closed_source_goes_on_where_it_stood(&mut self) -> Outcome {
        let mut source = self.source().await?;
        self.produce("closed", 2).await;
        let messages = receive_all(&mut source, 2).await?;
        self.take(&mut source, &messages).await?;
        source.close().await.map_err(text)?;
        drop(source);
        let mut source = self.source().await?;
        let early = tokio::time::timeout(SHORT, source.receive(10)).await;
        ensure(early.is_err(), || "what was settled came again".to_owned())?;
        self.produce("reopened", 1).await;
        let messages = receive_all(&mut source, 1).await?;
        self.take(&mut source, &messages).await?;
        self.check_applied()
    }

    fn deliveries(&mut self, name: &str, count: usize) -> Vec<Delivery> {
        (0..count)
            .map(|i| {
                self.seq += 1;
                let body = format!("{{\"{name}\":{i}}}");
                self.sent.push(body.clone().into_bytes());
                Delivery {
                    seq: self.seq,
                    message_id: format!("1-00000000000000aa/{}/1/out", self.seq),
                    key: None,
                    body: Some(body.into()),
                    content_type: "application/json",
                    headers: Vec::new(),
                }
            })
            .collect()
    }

    /// Hands everything over and waits for all confirmations.
    async fn hand_over(sink: &mut Box<dyn Sink>, deliveries: Vec<Delivery>) -> Outcome {
        let wanted: BTreeSet<u64> = deliveries.iter().map(|d| d.seq).collect();
        let mut confirmed = sink.deliver(deliveries).await.map_err(text)?;
        confirmed.extend(sink.drain().await.map_err(text)?);
        Self::confirmed_are(&confirmed, &wanted)
    }

    fn confirmed_are(confirmed: &[Confirmation], wanted: &BTreeSet<u64>) -> Outcome {
        let refused: Vec<_> = confirmed
            .iter()
            .filter_map(|c| c.refused.as_ref())
            .collect();
        ensure(refused.is_empty(), || format!("refused: {refused:?}"))?;
        let seqs: BTreeSet<u64> = confirmed.iter().map(|c| c.seq).collect();
        ensure(seqs == *wanted && confirmed.len() == wanted.len(), || {
            format!("confirmed {confirmed:?}, wanted {wanted:?}")
        })
    }

    /// Everything arrived; exactly once where that is promised, and first appearances are in order.
    async fn check_consumed(&mut self) -> Outcome {
        let seen = self.harness.consumed().await;
        let wanted = &self.sent;
        if self.harness.once() {
            return ensure(seen == *wanted, || {
                format!(
                    "a consumer sees {:?}, wanted {:?}",
                    shown(&seen),
                    shown(wanted)
                )
            });
        }
        let mut known = BTreeSet::new();
        let first: Vec<_> = seen
            .into_iter()
            .filter(|body| known.insert(body.clone()))
            .collect();
        ensure(first == *wanted, || {
            format!(
                "a consumer sees {:?}, wanted {:?}",
                shown(&first),
                shown(wanted)
            )
        })
    }

    async fn every_delivery_is_confirmed_once_and_in_order(&mut self) -> Outcome {
        let mut sink = self.sink().await?;
        let none = sink.deliver(Vec::new()).await.map_err(text)?;
        ensure(none.is_empty(), || format!("confirmed {none:?} of nothing"))?;
        let (first, second) = (self.deliveries("first", 2), self.deliveries("second", 150));
        let wanted = first.iter().chain(&second).map(|d| d.seq).collect();
        let mut confirmed = sink.deliver(first).await.map_err(text)?;
        confirmed.extend(sink.deliver(second).await.map_err(text)?);
        confirmed.extend(sink.drain().await.map_err(text)?);
        Self::confirmed_are(&confirmed, &wanted)?;
        let none = sink.drain().await.map_err(text)?;
        ensure(none.is_empty(), || format!("confirmed {none:?} twice"))?;
        self.check_consumed().await
    }

    async fn a_lost_confirmation_loses_nothing(&mut self) -> Outcome {
        let mut sink = self.sink().await?;
        let deliveries = self.deliveries("lost", 3);
        // The sink has confirmed, the broker dies before it has committed that: all come again, with others behind them.
        let _ = sink.deliver(deliveries.clone()).await.map_err(text)?;
        let _ = sink.drain().await.map_err(text)?;
        drop(sink);
        let mut sink = self.sink().await?;
        let mut again = deliveries;
        again.extend(self.deliveries("behind the lost", 2));
        Self::hand_over(&mut sink, again.clone()).await?;
        self.check_consumed().await?;
        drop(sink);
        let mut sink = self.sink().await?;
        Self::hand_over(&mut sink, again).await?;
        self.check_consumed().await
    }

    async fn a_shutdown_with_deliveries_in_flight_loses_nothing(&mut self) -> Outcome {
        let mut sink = self.sink().await?;
        let deliveries = self.deliveries("in flight", 5);
        let early = sink.deliver(deliveries.clone()).await.map_err(text)?;
        drop(sink);
        let rest = deliveries
            .into_iter()
            .filter(|d| early.iter().all(|c| c.seq != d.seq))
            .collect();
        let mut sink = self.sink().await?;
        Self::hand_over(&mut sink, rest).await?;
        self.check_consumed().await
    }

    async fn a_new_sink_goes_on(&mut self) -> Outcome {
        for round in 0..3 {
            let mut sink = self.sink().await?;
            let deliveries = self.deliveries(&format!("round{round}"), 2);
            Self::hand_over(&mut sink, deliveries).await?;
        }
        self.check_consumed().await
    }

    async fn a_slow_peer_loses_nothing(&mut self) -> Outcome {
        let _ = self.harness.slow(true);
        let mut sink = self.sink().await?;
        for round in 0..4 {
            let deliveries = self.deliveries(&format!("slow{round}"), 3);
            Self::hand_over(&mut sink, deliveries).await?;
        }
        let _ = self.harness.slow(false);
        self.check_consumed().await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::loopback::{Faults, Loopback, MAX_BODY, Recognition};

    struct InMemory {
        queue: Loopback,
        /// A mutant for the suite to catch.
        broken: Option<Broken>,
    }

    #[derive(Clone, Copy, PartialEq)]
    enum Broken {
        SkipsFirst,
        ConfirmsNothing,
        LosesDeliveries,
    }

    impl Harness for InMemory {
        fn produce<'a>(&'a mut self, bodies: &'a [Vec<u8>]) -> BoxFuture<'a, ()> {
            for body in bodies {
                self.queue.produce(body.clone());
            }
            Box::pin(async {})
        }

        fn source(
            &mut self,
            positions: Arc<dyn Positions>,
        ) -> BoxFuture<'_, Result<Box<dyn Source>, BridgeError>> {
            let broken = self.broken;
            Box::pin(async move {
                let mut source = self.queue.source(positions)?;
                if broken == Some(Broken::SkipsFirst) {
                    let _ = tokio::time::timeout(Duration::from_millis(1), source.receive(1)).await;
                }
                Ok(Box::new(source) as Box<dyn Source>)
            })
        }

        fn sink(&mut self) -> BoxFuture<'_, Result<Box<dyn Sink>, BridgeError>> {
            let broken = self.broken;
            Box::pin(async move {
                let sink = self.queue.sink()?;
                Ok(match broken {
                    Some(kind) if kind != Broken::SkipsFirst => {
                        Box::new(Mutant(sink, kind)) as Box<dyn Sink>
                    }
                    _ => Box::new(sink),
                })
            })
        }

        fn consumed(&mut self) -> BoxFuture<'_, Vec<Vec<u8>>> {
            let bodies = self
                .queue
                .consumed()
                .into_iter()
                .map(|d| d.body.unwrap_or_default().to_vec());
            let bodies = bodies.collect();
            Box::pin(async move { bodies })
        }

        fn poison(&self) -> Vec<u8> {
            vec![b'x'; MAX_BODY + 1]
        }

        fn once(&self) -> bool {
            false
        }

        fn patience(&self) -> Duration {
            Duration::from_secs(2)
        }

        fn slow(&mut self, slow: bool) -> bool {
            let delay = Duration::from_millis(if slow { 5 } else { 0 });
            self.queue.set_faults(Faults {
                delay,
                ..Faults::default()
            });
            true
        }
    }

    struct Mutant(crate::loopback::LoopbackSink, Broken);

    impl Sink for Mutant {
        fn deliver(
            &mut self,
            mut deliveries: Vec<Delivery>,
        ) -> BoxFuture<'_, Result<Vec<Confirmation>, BridgeError>> {
            Box::pin(async move {
                let seqs: Vec<_> = deliveries
                    .iter()
                    .map(|d| Confirmation::confirmed(d.seq))
                    .collect();
                if self.1 == Broken::LosesDeliveries {
                    deliveries.pop();
                    self.0.deliver(deliveries).await?;
                    return Ok(seqs);
                }
                self.0.deliver(deliveries).await
            })
        }

        fn drain(&mut self) -> BoxFuture<'_, Result<Vec<Confirmation>, BridgeError>> {
            Box::pin(async move {
                self.0.drain().await?;
                Ok(Vec::new())
            })
        }
    }

    async fn run(
        recognition: Recognition,
        broken: Option<Broken>,
    ) -> Result<Vec<&'static str>, String> {
        let queue = Loopback::new("loop", recognition);
        exercise(&mut InMemory { queue, broken }).await
    }

    #[tokio::test]
    async fn the_loopback_bridge_conforms() {
        for recognition in [Recognition::Position, Recognition::Key] {
            assert_eq!(run(recognition, None).await.unwrap().len(), 13);
        }
    }

    #[tokio::test]
    async fn the_suite_catches_broken_bridges() {
        for (broken, part) in [
            (Broken::SkipsFirst, "longer than"),
            (Broken::ConfirmsNothing, "confirmed"),
            (Broken::LosesDeliveries, "consumer sees"),
        ] {
            let why = run(Recognition::Position, Some(broken)).await.unwrap_err();
            assert!(why.contains(part), "{why}");
        }
    }
}
