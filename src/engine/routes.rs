//! Where effects go once their turn is durable: to sessions, to those who wait for a run, to those who send an output's records.
//!
//! Also the names that effects use (specs, routes, outputs), readable from any thread. Knows nothing of turns: it is given what is
//! already durable. Whoever registers first and asks afterwards misses nothing.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use tokio::sync::{Notify, mpsc, oneshot};

use super::handle::SessionEffect;
use crate::broker::outcome::{Effect, Lease};
use crate::broker::types::{Attempt, NameId, NodeKey, RunSeq, SessionId, Spec, SpecId};

/// Who listens to what.
#[derive(Debug, Default)]
pub(super) struct Routes {
    sessions: Mutex<HashMap<SessionId, mpsc::UnboundedSender<SessionEffect>>>,
    settled: Mutex<Waiters>,
    ended: Mutex<Waiters>,
    outputs: Mutex<HashMap<Arc<str>, Arc<Notify>>>,
    specs: RwLock<Vec<Option<Arc<Spec>>>>,
    names: RwLock<HashMap<Arc<str>, NameId>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing in here panics while it holds a lock, and every state of the maps is a sound one.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Routes {
    /// The channel of a session; an earlier one is closed.
    pub(super) fn session(&self, session: SessionId) -> mpsc::UnboundedReceiver<SessionEffect> {
        let (sender, receiver) = mpsc::unbounded_channel();
        let mut sessions = lock(&self.sessions);
        if sessions.len() == sessions.capacity() {
            // Sessions whose connection has gone are dropped before the table grows.
            sessions.retain(|_, sender| !sender.is_closed());
        }
        sessions.insert(session, sender);
        receiver
    }

    pub(super) fn root_settled(&self, run: RunSeq) -> oneshot::Receiver<()> {
        lock(&self.settled).register(run)
    }

    pub(super) fn run_ended(&self, run: RunSeq) -> oneshot::Receiver<()> {
        lock(&self.ended).register(run)
    }

    pub(super) fn output(&self, output: &str) -> Arc<Notify> {
        let mut outputs = lock(&self.outputs);
        if let Some(notify) = outputs.get(output) {
            return Arc::clone(notify);
        }
        let notify = Arc::<Notify>::default();
        outputs.insert(Arc::from(output), Arc::clone(&notify));
        notify
    }

    pub(super) fn spec(&self, id: SpecId) -> Option<Arc<Spec>> {
        let specs = self.specs.read().unwrap_or_else(PoisonError::into_inner);
        specs.get(id.0 as usize).cloned().flatten()
    }

    pub(super) fn name_id(&self, name: &str) -> Option<NameId> {
        let names = self.names.read().unwrap_or_else(PoisonError::into_inner);
        names.get(name).copied()
    }

    /// Makes durable specs known, before an effect names them.
    pub(super) fn learn_specs(&self, new: Vec<(SpecId, Arc<Spec>)>) {
        if new.is_empty() {
            return;
        }
        let mut specs = self.specs.write().unwrap_or_else(PoisonError::into_inner);
        for (id, spec) in new {
            let at = id.0 as usize;
            if specs.len() <= at {
                specs.resize(at + 1, None);
            }
            specs[at] = Some(spec);
        }
    }

    /// Makes durable names known.
    pub(super) fn learn_names(&self, new: Vec<(NameId, Arc<str>)>) {
        if new.is_empty() {
            return;
        }
        let mut names = self.names.write().unwrap_or_else(PoisonError::into_inner);
        names.extend(new.into_iter().map(|(id, name)| (name, id)));
    }

    /// Sends the effects of a durable turn on their way: all leases of a session as one message, then what it must stop.
    pub(super) fn release(&self, effects: Vec<Effect>) {
        if effects.is_empty() {
            return;
        }
        let mut leases = Grouped::<Lease>::default();
        let mut revoked = Grouped::<(NodeKey, Attempt)>::default();
        let (mut settled, mut ended) = (Vec::new(), Vec::new());
        for effect in effects {
            match effect {
                Effect::Lease(lease) => leases.push(lease.session, lease),
                Effect::Revoke {
                    session,
                    node,
                    attempt,
                } => revoked.push(session, (node, attempt)),
                Effect::RootSettled { run } => settled.push(run),
                Effect::RunEnded { run } => ended.push(run),
                Effect::OutboxGrew { output } => self.output(&output).notify_one(),
            }
        }
        if !(leases.0.is_empty() && revoked.0.is_empty()) {
            let mut sessions = lock(&self.sessions);
            let leases = leases.0.into_iter();
            let revoked = revoked.0.into_iter();
            let messages = leases
                .map(|(session, list)| (session, SessionEffect::Leases(list)))
                .chain(revoked.map(|(session, list)| (session, SessionEffect::Revoked(list))));
            for (session, message) in messages {
                // Nobody listens: the connection has gone, and its leases end by the detach or by their deadline.
                if let Some(sender) = sessions.get(&session)
                    && sender.send(message).is_err()
                {
                    sessions.remove(&session);
                }
            }
        }
        wake(&self.settled, settled);
        wake(&self.ended, ended);
    }

    /// The engine has stopped: everybody who listens learns it from the end of their channel.
    pub(super) fn close(&self) {
        lock(&self.sessions).clear();
        lock(&self.settled).runs.clear();
        lock(&self.ended).runs.clear();
        for notify in lock(&self.outputs).values() {
            notify.notify_one();
        }
    }
}

fn wake(waiters: &Mutex<Waiters>, runs: Vec<RunSeq>) {
    if !runs.is_empty() {
        let mut waiters = lock(waiters);
        for run in runs {
            waiters.wake(run);
        }
    }
}

/// Lists by session, in order of first appearance. Turns name few sessions, mostly the one they named last.
#[derive(Debug)]
struct Grouped<T>(Vec<(SessionId, Vec<T>)>);

impl<T> Default for Grouped<T> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<T> Grouped<T> {
    fn push(&mut self, session: SessionId, item: T) {
        match self.0.iter_mut().rev().find(|(of, _)| *of == session) {
            Some((_, list)) => list.push(item),
            None => self.0.push((session, vec![item])),
        }
    }
}

/// Those who wait for a run. Who has gone away is swept out when the table has doubled, so that it stays within twice its use.
#[derive(Debug, Default)]
struct Waiters {
    runs: HashMap<RunSeq, Vec<oneshot::Sender<()>>>,
    /// Registrations since the last sweep.
    added: usize,
    /// Left by the last sweep.
    kept: usize,
}

impl Waiters {
    fn register(&mut self, run: RunSeq) -> oneshot::Receiver<()> {
        let (sender, receiver) = oneshot::channel();
        self.runs.entry(run).or_default().push(sender);
        self.added += 1;
        if self.added > self.kept.max(1_024) {
            self.sweep();
        }
        receiver
    }

    fn wake(&mut self, run: RunSeq) {
        for sender in self.runs.remove(&run).into_iter().flatten() {
            // Gone away meanwhile.
            let _ = sender.send(());
        }
    }

    fn sweep(&mut self) {
        self.kept = 0;
        self.added = 0;
        self.runs.retain(|_, senders| {
            senders.retain(|sender| !sender.is_closed());
            self.kept += senders.len();
            !senders.is_empty()
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::broker::types::{LeaseToken, NodeIndex, Note};

    fn lease(session: u64, node: u32) -> Lease {
        Lease {
            session: SessionId(session),
            node: NodeKey::new(RunSeq(1), NodeIndex(node)),
            salt: 0,
            attempt: Attempt(1),
            token: LeaseToken([0; 16]),
            spec: SpecId(0),
            batch: 0,
            note: Note::None,
        }
    }

    #[test]
    fn leases_of_a_turn_reach_each_session_as_one_message_in_order() {
        let routes = Routes::default();
        let (mut one, mut two) = (routes.session(SessionId(1)), routes.session(SessionId(2)));
        let revoked = (NodeKey::new(RunSeq(9), NodeIndex(0)), Attempt(3));
        routes.release(vec![
            Effect::Lease(lease(1, 10)),
            Effect::Revoke {
                session: SessionId(1),
                node: revoked.0,
                attempt: revoked.1,
            },
            Effect::Lease(lease(2, 20)),
            Effect::Lease(lease(1, 11)),
            Effect::Lease(lease(3, 30)),
        ]);
        let first = SessionEffect::Leases(vec![lease(1, 10), lease(1, 11)]);
        assert_eq!(one.try_recv(), Ok(first));
        assert_eq!(one.try_recv(), Ok(SessionEffect::Revoked(vec![revoked])));
        assert!(one.try_recv().is_err(), "nothing else");
        let only = SessionEffect::Leases(vec![lease(2, 20)]);
        assert_eq!(two.try_recv(), Ok(only));
        assert!(two.try_recv().is_err(), "nothing of others");
    }

    #[test]
    fn a_second_channel_of_a_session_closes_the_first() {
        let routes = Routes::default();
        let mut old = routes.session(SessionId(1));
        let mut new = routes.session(SessionId(1));
        routes.release(vec![Effect::Lease(lease(1, 0))]);
        assert_eq!(old.try_recv(), Err(mpsc::error::TryRecvError::Disconnected));
        assert!(new.try_recv().is_ok());
        drop(new);
        routes.release(vec![Effect::Lease(lease(1, 0))]);
        assert!(lock(&routes.sessions).is_empty(), "nobody listens: removed");
    }

    #[test]
    fn waiters_of_a_run_are_woken_once_and_others_are_not() {
        let routes = Routes::default();
        let mut first = routes.root_settled(RunSeq(1));
        let mut again = routes.root_settled(RunSeq(1));
        let mut other = routes.root_settled(RunSeq(2));
        let mut ended = routes.run_ended(RunSeq(1));
        routes.release(vec![Effect::RootSettled { run: RunSeq(1) }]);
        assert!(first.try_recv().is_ok() && again.try_recv().is_ok());
        assert!(other.try_recv().is_err() && ended.try_recv().is_err());
        routes.release(vec![Effect::RunEnded { run: RunSeq(1) }]);
        assert!(ended.try_recv().is_ok());
        routes.close();
        let closed = Err(oneshot::error::TryRecvError::Closed);
        assert_eq!(other.try_recv(), closed, "a stopped engine wakes all");
    }

    #[test]
    fn waiters_who_went_away_do_not_pile_up() {
        let routes = Routes::default();
        let stays = routes.run_ended(RunSeq(0));
        for run in 1..10_000 {
            drop(routes.run_ended(RunSeq(run)));
        }
        let n = lock(&routes.ended).runs.len();
        assert!(n <= 1_026, "{n} entries are left");
        routes.release(vec![Effect::RunEnded { run: RunSeq(0) }]);
        assert!(stays.blocking_recv().is_ok(), "who waits is kept");
    }

    #[test]
    fn names_are_known_once_learnt() {
        let routes = Routes::default();
        assert_eq!(routes.spec(SpecId(3)), None);
        assert_eq!(routes.name_id("clicks"), None);
        routes.learn_names(vec![(NameId(4), Arc::from("clicks"))]);
        assert_eq!(routes.name_id("clicks"), Some(NameId(4)));
        let grew = routes.output("clicks");
        assert!(Arc::ptr_eq(&grew, &routes.output("clicks")), "one each");
    }
}
