//! Workers' sessions: what they serve, how much they can take, what they hold, and when they were last heard from.
//!
//! A session outlives its connection for a few seconds, and a restart of the broker for a lease period, so that a worker can come
//! back to its leases. Sessions are not stored: leases name them, and attaching says the rest again.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::command::{Attach, Attached, Code, Rejection};
use super::outcome::{Fact, Tx};
use super::run::Stage;
use super::spec::check_spec;
use super::types::{Attempt, NodeKey, Note, Progress, SessionId, Spec, Timestamp};
use super::{Broker, World};

/// All sessions.
#[derive(Debug, Default)]
pub(super) struct Workers {
    pub sessions: BTreeMap<SessionId, Session>,
    /// Attached sessions that have credit.
    pub idle: BTreeSet<SessionId>,
    /// Open leases of all sessions.
    pub n_leases: usize,
}

/// A worker's session.
#[derive(Debug)]
pub(super) struct Session {
    pub attached: bool,
    /// When it was last heard from.
    pub last_seen: Timestamp,
    /// When its connection closed, if it has.
    pub detached: Option<Timestamp>,
    /// Calls it can take.
    pub credit: u32,
    /// What it holds (I4).
    pub leases: BTreeSet<NodeKey>,
    queues: BTreeSet<Arc<str>>,
    tolerations: BTreeSet<Arc<str>>,
    /// Its actions, and the mark of the code it has for each.
    actions: BTreeMap<Arc<str>, Option<Arc<str>>>,
    /// A bit for each lane it serves.
    served: Vec<u64>,
}

impl Session {
    /// A session nobody has introduced: known from its leases after a restart.
    pub(super) fn unknown(now: Timestamp) -> Self {
        Self {
            attached: false,
            last_seen: now,
            detached: None,
            credit: 0,
            leases: BTreeSet::new(),
            queues: BTreeSet::new(),
            tolerations: BTreeSet::new(),
            actions: BTreeMap::new(),
            served: Vec::new(),
        }
    }

    pub(super) fn serves_queue(&self, spec: &Spec) -> bool {
        self.attached && self.queues.contains(&spec.queue)
    }

    pub(super) fn tolerates(&self, spec: &Spec) -> bool {
        spec.taint
            .as_ref()
            .is_none_or(|taint| self.tolerations.contains(taint))
    }

    pub(super) fn has_action(&self, spec: &Spec) -> bool {
        self.actions.contains_key(&spec.action)
    }

    pub(super) fn has_code(&self, spec: &Spec) -> bool {
        self.actions
            .get(&spec.action)
            .is_some_and(|code| *code == spec.fingerprint)
    }

    /// Whether it may run nodes of that spec.
    pub(super) fn serves(&self, spec: &Spec) -> bool {
        self.serves_queue(spec)
            && self.tolerates(spec)
            && self.has_action(spec)
            && (!spec.pin_code || self.has_code(spec))
    }

    /// Whether its code for that spec is another one than the node was recorded with.
    pub(super) fn has_other_code(&self, spec: &Spec) -> bool {
        spec.fingerprint.is_some()
            && self
                .actions
                .get(&spec.action)
                .is_some_and(|code| code.is_some() && *code != spec.fingerprint)
    }

    pub(super) fn mark_served(&mut self, lane: u32, serves: bool) {
        let (word, bit) = (lane as usize / 64, lane % 64);
        if word >= self.served.len() {
            if !serves {
                return;
            }
            self.served.resize(word + 1, 0);
        }
        if serves {
            self.served[word] |= 1 << bit;
        } else {
            self.served[word] &= !(1 << bit);
        }
    }

    pub(super) fn serves_lane(&self, lane: u32) -> bool {
        self.served
            .get(lane as usize / 64)
            .is_some_and(|word| word & (1 << (lane % 64)) != 0)
    }

    /// When its leases lapse.
    pub(super) fn deadline(&self, lease_ms: u64, grace_ms: u64) -> Timestamp {
        let silent = self.last_seen.after_ms(lease_ms);
        self.detached
            .map_or(silent, |at| silent.min(at.after_ms(grace_ms)))
    }
}

impl World {
    pub(super) fn session_deadline(&self, session: &Session) -> Timestamp {
        session.deadline(self.settings.lease_ms, self.settings.detach_grace_ms)
    }

    /// A lease has begun.
    pub(super) fn open_lease(&mut self, node: NodeKey, session: SessionId) {
        let now = self.now;
        let holder = self
            .workers
            .sessions
            .entry(session)
            .or_insert_with(|| Session::unknown(now));
        holder.leases.insert(node);
        self.workers.n_leases += 1;
    }

    /// A lease has ended. A detached session that holds nothing more is forgotten.
    pub(super) fn close_lease(&mut self, node: NodeKey, session: SessionId) {
        self.timers.drop_timeout(node);
        let Some(holder) = self.workers.sessions.get_mut(&session) else {
            debug_assert!(false, "I4 a leased node's session is known");
            return;
        };
        let held = holder.leases.remove(&node);
        debug_assert!(held, "I4 a leased node has a lease");
        self.workers.n_leases -= 1;
        if holder.leases.is_empty() && !holder.attached {
            self.workers.sessions.remove(&session);
        }
    }

    /// Asks anew which lanes a session serves; `attached` says whether it counts.
    fn refresh_served(&mut self, id: SessionId) {
        for lane in 0..self.specs.len() {
            let spec = self.resolved(lane).cloned();
            let Some(session) = self.workers.sessions.get_mut(&id) else {
                return;
            };
            let before = session.serves_lane(lane);
            let serves = spec.is_some_and(|spec| session.serves(&spec));
            if before != serves {
                session.mark_served(lane, serves);
                let n = self.lanes.get(lane).servers;
                let n = if serves { n + 1 } else { n - 1 };
                self.lanes.set_servers(lane, n, self.now);
            }
        }
    }
}

impl Broker {
    pub(super) fn on_attach(&mut self, tx: &mut Tx, attach: Attach) -> Attached {
        let world = &mut self.world;
        let now = world.now;
        let session = world
            .workers
            .sessions
            .entry(attach.session)
            .or_insert_with(|| Session::unknown(now));
        let was_detached = session.detached.take().is_some();
        session.attached = true;
        session.last_seen = now;
        session.credit = 0;
        session.queues = attach.queues.into_iter().collect();
        session.tolerations = attach.tolerations.into_iter().collect();
        session.actions = attach
            .actions
            .iter()
            .map(|spec| (Arc::clone(&spec.action), spec.fingerprint.clone()))
            .collect();
        let leases: Vec<NodeKey> = session.leases.iter().copied().collect();
        world.workers.idle.remove(&attach.session);
        world.refresh_served(attach.session);
        for spec in &attach.actions {
            world.announce(tx, spec);
        }
        let mut held = Vec::with_capacity(leases.len());
        for key in leases {
            let run = self
                .runs
                .get_mut(&key.run)
                .expect("I4 a lease's run is resident");
            held.push((key, Attempt(run.core(key.node.0).attempt)));
            if was_detached {
                let mut record = run.node_record(key.node.0);
                record.note = Note::LeaseResumed;
                run.write(tx, key.node.0, record);
            }
        }
        Attached { leases: held }
    }

    pub(super) fn on_detach(&mut self, tx: &mut Tx, id: SessionId) -> Result<(), Rejection> {
        let now = self.world.now;
        let session = self.world.session_mut(id)?;
        if !session.attached {
            return Ok(());
        }
        session.attached = false;
        session.detached = Some(now);
        session.credit = 0;
        let leases: Vec<NodeKey> = session.leases.iter().copied().collect();
        self.world.workers.idle.remove(&id);
        self.world.refresh_served(id);
        if leases.is_empty() {
            self.world.workers.sessions.remove(&id);
        }
        for key in leases {
            let run = self
                .runs
                .get_mut(&key.run)
                .expect("I4 a lease's run is resident");
            let mut record = run.node_record(key.node.0);
            record.note = Note::LeaseShortened;
            run.write(tx, key.node.0, record);
        }
        Ok(())
    }

    pub(super) fn on_close(&mut self, tx: &mut Tx, id: SessionId) -> Result<(), Rejection> {
        let session = self.world.session_mut(id)?;
        session.attached = false;
        session.credit = 0;
        let leases: Vec<NodeKey> = session.leases.iter().copied().collect();
        self.world.workers.idle.remove(&id);
        self.world.refresh_served(id);
        for key in leases {
            let run = self
                .runs
                .get_mut(&key.run)
                .expect("I4 a lease's run is resident");
            super::retry::release(run, &mut self.world, tx, key.node.0, 0);
        }
        self.world.workers.sessions.remove(&id);
        Ok(())
    }

    pub(super) fn on_credit(&mut self, id: SessionId, calls: u32) -> Result<(), Rejection> {
        let session = self.world.session_mut(id)?;
        if !session.attached {
            return Err(unknown_session(id));
        }
        session.credit = session.credit.saturating_add(calls);
        if session.credit > 0 {
            self.world.workers.idle.insert(id);
        }
        Ok(())
    }

    pub(super) fn on_touch(&mut self, id: SessionId) -> Result<(), Rejection> {
        let now = self.world.now;
        self.world.session_mut(id)?.last_seen = now;
        Ok(())
    }

    /// Takes the leases of silent sessions away, up to `budget` of them. Only ticks do this: what has arrived before was applied.
    pub(super) fn lapse_sessions(&mut self, tx: &mut Tx, budget: &mut usize) {
        let now = self.world.now;
        let silent: Vec<SessionId> = self
            .world
            .workers
            .sessions
            .iter()
            .filter(|(_, session)| {
                !session.leases.is_empty() && self.world.session_deadline(session) <= now
            })
            .map(|(id, _)| *id)
            .collect();
        for id in silent {
            let leases: Vec<NodeKey> = self
                .world
                .workers
                .sessions
                .get(&id)
                .map(|session| session.leases.iter().take(*budget).copied().collect())
                .unwrap_or_default();
            for key in leases {
                *budget -= 1;
                let run = self
                    .runs
                    .get_mut(&key.run)
                    .expect("I4 a lease's run is resident");
                debug_assert_eq!(
                    run.core(key.node.0).stage,
                    Stage::Leased,
                    "I4 leased iff a lease"
                );
                super::retry::lose(run, &mut self.world, tx, key.node.0);
            }
        }
    }
}

impl World {
    fn session_mut(&mut self, id: SessionId) -> Result<&mut Session, Rejection> {
        self.workers
            .sessions
            .get_mut(&id)
            .ok_or_else(|| unknown_session(id))
    }

    /// Runs started by name use what was announced last.
    fn announce(&mut self, tx: &mut Tx, spec: &Arc<Spec>) {
        if spec.by_name || check_spec(spec).is_err() {
            return;
        }
        let id = self.intern(tx, spec);
        if self.announced.get(&spec.action) != Some(&id) {
            self.put(
                tx,
                Fact::Announced {
                    action: Arc::clone(&spec.action),
                    spec: id,
                },
            );
        }
    }
}

fn unknown_session(id: SessionId) -> Rejection {
    Rejection::new(
        Code::UnknownSession,
        format!("session {:016x} is not attached: attach first", id.0),
    )
}

/// The holder of a leased node.
pub(super) fn holder(progress: Progress) -> Option<SessionId> {
    match progress {
        Progress::Leased { session } => Some(session),
        _ => None,
    }
}
