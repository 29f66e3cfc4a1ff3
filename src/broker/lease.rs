//! Leases: who may do what to which attempt, and which ready node goes to which session.
//!
//! A lease is (node, attempt, token); it is current while the node is leased in that attempt (G3). The token is a keyed hash of the
//! store's secret, run, node and attempt: nothing is stored, and nobody can guess it.
//!
//! ```text
//!            dispatch                 value, promise
//!   ready ───────────────▶ leased ─────────────────────▶ succeeded, settling
//!     ▲  released, lost       │
//!     ├───────────────────────┤
//!     │  backoff is over      │ failed, timed out        lost or failed too often
//!   backoff ◀─────────────────┴────────────────────────▶ failed
//! ```
//!
//! Dispatch gives ready nodes to sessions with credit at the end of every command. Sessions that hold the least come first, and
//! each gets at most its share of a pass, so that credit for thousands does not empty a queue others are waiting on.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::hash::Hasher;

use siphasher::sip128::{Hasher128, SipHasher24};

use super::command::{Code, Rejection};
use super::outcome::{Effect, Lease, Tx};
use super::run::{Run, Stage};
use super::types::{
    Attempt, LeaseToken, NodeKey, NodeState, Note, Progress, RunSeq, SessionId, SpecId, Timestamp,
    WallTime,
};
use super::{Broker, World};

const REVOKED: &str = "the run was cancelled: stop working on it";

/// What somebody says they hold.
pub(super) struct Claim {
    pub node: NodeKey,
    pub attempt: Attempt,
    pub token: LeaseToken,
    /// Digest of the completion, if it is one.
    pub digest: Option<u64>,
    /// The token is not asked for.
    pub without_token: bool,
}

/// What a claim turned out to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Standing {
    /// The current lease.
    Current,
    /// The completion that was accepted already.
    Repeated,
}

/// Judges a claim.
pub(super) fn standing(
    run: Option<&Run>,
    world: &World,
    claim: &Claim,
) -> Result<Standing, Rejection> {
    let no = |code, what: &str| {
        Err(Rejection::new(
            code,
            format!("attempt {} of node {}: {what}", claim.attempt.0, claim.node),
        ))
    };
    let node = claim.node.node.0;
    let proven = || claim.without_token || world.token(claim.node, claim.attempt) == claim.token;
    let forged = "the token is not the one it was given";
    if run.is_none() && world.revoked.get(&claim.node) == Some(&claim.attempt) {
        if proven() {
            return no(Code::LeaseRevoked, REVOKED);
        }
        return no(Code::LeaseUnknown, forged);
    }
    let Some(run) = run.filter(|run| node < run.len()) else {
        return no(Code::LeaseUnknown, "there is no such node");
    };
    let core = run.core(node);
    if claim.attempt.0 == 0 || claim.attempt.0 > core.attempt {
        return no(Code::LeaseUnknown, "it never began");
    }
    if !proven() {
        return no(Code::LeaseUnknown, forged);
    }
    let latest = claim.attempt.0 == core.attempt;
    if latest && core.stage == Stage::Leased && !run.record.cancelled {
        return Ok(Standing::Current);
    }
    if let Some(digest) = claim.digest
        && latest
        && core.digest != 0
    {
        if core.digest == digest {
            return Ok(Standing::Repeated);
        }
        return no(
            Code::CompletionConflict,
            "it has ended already, with another outcome: drop this one",
        );
    }
    if run.record.cancelled {
        return no(Code::LeaseRevoked, REVOKED);
    }
    no(
        Code::LeaseExpired,
        "the lease has ended, the node is or will be given to the next claim: drop the outcome",
    )
}

impl World {
    /// The proof of a lease.
    pub(super) fn token(&self, node: NodeKey, attempt: Attempt) -> LeaseToken {
        let mut hasher = SipHasher24::new_with_key(&self.secret);
        hasher.write_u64(node.run.0);
        hasher.write_u32(node.node.0);
        hasher.write_u32(attempt.0);
        LeaseToken(hasher.finish128().as_bytes())
    }
}

/// A session that can take something in this pass.
struct Taker {
    session: SessionId,
    leases: usize,
    ready: u64,
}

/// A lane's head in a claim: best first. Two lanes never hold the same node.
type Head = (i32, Reverse<(RunSeq, u32)>, Reverse<u32>);

impl Broker {
    /// Gives ready nodes to sessions with credit.
    pub(super) fn dispatch(&mut self, tx: &mut Tx) {
        while !self.world.lanes.active.is_empty() && !self.world.workers.idle.is_empty() {
            let takers = self.takers();
            let n = takers.len() as u64;
            let mut granted = 0;
            for taker in takers {
                granted += self.claim(tx, taker.session, taker.ready.div_ceil(n));
            }
            if granted == 0 {
                return;
            }
        }
    }

    /// Sessions that are heard from, have credit, and serve a lane from which something may leave; those that hold least first.
    fn takers(&self) -> Vec<Taker> {
        let world = &self.world;
        let mut takers = Vec::new();
        for id in &world.workers.idle {
            let session = &world.workers.sessions[id];
            if session.last_seen.after_ms(world.settings.lease_ms) <= world.now {
                continue;
            }
            let ready = world
                .lanes
                .active
                .iter()
                .filter(|lane| session.serves_lane(**lane))
                .map(|lane| world.lanes.get(*lane))
                .filter(|lane| lane.is_due(world.now))
                .map(|lane| lane.count)
                .sum();
            if ready > 0 {
                takers.push(Taker {
                    session: *id,
                    leases: session.leases.len(),
                    ready,
                });
            }
        }
        takers.sort_unstable_by_key(|taker| (taker.leases, taker.session));
        takers
    }

    /// Leases up to `share` nodes to a session: the heads of its lanes, merged by priority, run and node (G8). Returns how many.
    fn claim(&mut self, tx: &mut Tx, id: SessionId, share: u64) -> u64 {
        let world = &self.world;
        let session = &world.workers.sessions[&id];
        let mut credit = session.credit;
        let mut heads: BinaryHeap<Head> = world
            .lanes
            .active
            .iter()
            .filter(|lane| session.serves_lane(**lane))
            .filter_map(|lane| head(world, *lane))
            .collect();
        let mut taken = 0;
        while taken < share
            && credit > 0
            && let Some((priority, _, Reverse(lane))) = heads.pop()
        {
            let room = self
                .world
                .settings
                .max_leases
                .saturating_sub(self.world.workers.n_leases);
            if room == 0 {
                break;
            }
            let limit = (share - taken).min(room as u64);
            if let Some(batch) = self.world.lanes.get(lane).batch {
                taken += self.bundle(tx, id, lane, u64::from(batch.max_size).min(room as u64));
                credit -= 1;
            } else {
                let limit = limit.min(credit.into()) as u32;
                // Not past the next lane's head.
                let limit = match (heads.peek(), self.world.lanes.get(lane).head()) {
                    (Some((other, Reverse((run, node)), _)), Some((mine, start)))
                        if *other == priority && *run == mine =>
                    {
                        limit.min(node - start)
                    }
                    _ => limit,
                };
                let n = self.grant(tx, id, lane, limit, 0);
                credit -= n;
                taken += u64::from(n);
            }
            heads.extend(head(&self.world, lane));
        }
        let workers = &mut self.world.workers;
        if let Some(session) = workers.sessions.get_mut(&id) {
            session.credit = credit;
        }
        if credit == 0 {
            workers.idle.remove(&id);
        }
        taken
    }

    /// Leases one bundle: up to `limit` nodes from the front of a batch lane, of one or several runs.
    fn bundle(&mut self, tx: &mut Tx, id: SessionId, lane: u32, limit: u64) -> u64 {
        self.world.bundle = self.world.bundle.checked_add(1).unwrap_or(1);
        let number = self.world.bundle;
        let mut n = 0;
        while n < limit && self.world.lanes.get(lane).count > 0 {
            n += u64::from(self.grant(tx, id, lane, (limit - n) as u32, number));
        }
        n
    }

    /// Leases up to `limit` neighbours from the front of a lane.
    fn grant(&mut self, tx: &mut Tx, id: SessionId, lane: u32, limit: u32, batch: u32) -> u32 {
        let world = &mut self.world;
        let now = world.now;
        let Some(spec) = world.lanes.get(lane).runs_by else {
            return 0;
        };
        let Some((seq, start, n)) = world.lanes.take(lane, limit, now) else {
            return 0;
        };
        let run = self
            .runs
            .get_mut(&seq)
            .expect("I7 a lane names nodes of resident runs");
        let rules = world.specs.of(spec.0);
        let other_code = world.workers.sessions[&id].has_other_code(world.specs.of(lane));
        let note = if other_code {
            Note::OtherCode
        } else {
            Note::None
        };
        let timeout = rules
            .timeout_ms
            .map(|ms| now.after_ms(ms).after_ms(world.settings.lease_ms));
        let terms = Terms {
            session: id,
            spec,
            batch,
            note,
            timeout,
        };
        for node in start..start + n {
            lease(run, world, tx, node, terms);
        }
        n
    }
}

fn head(world: &World, lane: u32) -> Option<Head> {
    let held = world.lanes.get(lane);
    if !held.is_due(world.now) {
        return None;
    }
    Some((held.priority, Reverse(held.head()?), Reverse(lane)))
}

/// What all leases of a grant have in common.
#[derive(Clone, Copy)]
struct Terms {
    session: SessionId,
    spec: SpecId,
    batch: u32,
    note: Note,
    timeout: Option<Timestamp>,
}

fn lease(run: &mut Run, world: &mut World, tx: &mut Tx, node: u32, terms: Terms) {
    let key = run.key(node);
    let from = run.state(node);
    debug_assert_eq!(from, NodeState::Ready, "I7 a lane holds ready nodes");
    run.cores[node as usize].ready = false;
    let mut record = run.node_record(node);
    record.progress = Progress::Leased {
        session: terms.session,
    };
    record.attempt = Attempt(record.attempt.0.saturating_add(1));
    record.round = run.record.round;
    record.digest = 0;
    record.not_before = Timestamp(0);
    record.not_before_wall = WallTime(0);
    record.note = terms.note;
    let attempt = record.attempt;
    run.write(tx, node, record);
    run.recount(from, NodeState::Leased, 1);
    world.open_lease(key, terms.session);
    if let Some(at) = terms.timeout {
        world.timers.set_timeout(key, at);
    }
    tx.effects.push(Effect::Lease(Lease {
        session: terms.session,
        node: key,
        salt: run.record.salt,
        attempt,
        token: world.token(key, attempt),
        spec: terms.spec,
        batch: terms.batch,
        note: terms.note,
    }));
}
