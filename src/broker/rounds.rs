//! Cancelling, resuming and deleting runs.
//!
//! Cancelling is one fact: the run's flag, from which the states of its open nodes derive (G9), so it costs the same for a million
//! nodes. Resuming begins the next round: failed, skipped and cancelled nodes open again, with the newest code; succeeded ones keep
//! their outcome. A body that has ended with a promise is not run again: it waits for what it refers to.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::command::{Code, Rejection};
use super::outcome::{Effect, Fact, Tx};
use super::restore::derive;
use super::retry::revoke;
use super::run::{Body, NONE, Run, STATES, Stage};
use super::types::{
    Attempt, BodyEnd, NodeIndex, NodeKey, NodeRecord, NodeState, Note, Progress, RunId, RunSeq,
    RunState, Spec, SpecId, Timestamp,
};
use super::{Broker, World};

impl Broker {
    pub(super) fn on_cancel(
        &mut self,
        tx: &mut Tx,
        id: RunId,
        reason: Arc<str>,
    ) -> Result<(), Rejection> {
        let world = &mut self.world;
        let run = find(&mut self.runs, id)?;
        if run.has_ended() {
            return Ok(());
        }
        let root_was_open = !run.state(run.record.root.0).is_terminal();
        for node in 0..run.len() {
            leave(run, world, tx, node);
        }
        world.lanes.remove_run(run.seq, world.now);
        let mut record = run.record.clone();
        record.cancelled = true;
        record.cancel_reason = reason;
        record.ended = Some(world.now);
        record.state = RunState::Cancelled;
        run.write_run(tx, record);
        for state in STATES.into_iter().filter(|state| !state.is_terminal()) {
            let n = run.counts[state as usize];
            run.recount(state, NodeState::Cancelled, n);
            world.open_nodes -= u64::from(n);
        }
        world.ended.push(run.seq);
        if root_was_open {
            tx.effects.push(Effect::RootSettled { run: run.seq });
        }
        tx.effects.push(Effect::RunEnded { run: run.seq });
        Ok(())
    }

    pub(super) fn on_resume(&mut self, tx: &mut Tx, id: RunId) -> Result<(), Rejection> {
        let world = &mut self.world;
        let run = find(&mut self.runs, id)?;
        if !run.has_ended() {
            return Err(Rejection::new(
                Code::RunNotEnded,
                format!("run {id} still runs: cancel it first, or wait"),
            ));
        }
        let stays = |node| run.state(node) == NodeState::Succeeded;
        if (0..run.len()).all(stays) {
            return Ok(());
        }
        let mut record = run.record.clone();
        record.round += 1;
        record.cancelled = false;
        record.cancel_reason = Arc::clone(&world.nothing);
        record.ended = None;
        record.state = RunState::Running;
        run.write_run(tx, record);
        let mut newest = BTreeMap::new();
        for node in 0..run.len() {
            if let Some(record) = reopened(run, world, tx, &mut newest, node) {
                run.write(tx, node, record);
            }
        }
        derive(run, world);
        world.forget_revoked(id.seq);
        Ok(())
    }

    pub(super) fn on_expire(&mut self, tx: &mut Tx, seq: RunSeq) -> Result<(), Rejection> {
        let world = &mut self.world;
        let no = |code, what: &str| Err(Rejection::new(code, format!("run {:x} {what}", seq.0)));
        if seq.0 == 0 || seq.0 >= world.next_run {
            return no(Code::UnknownRun, "does not exist");
        }
        // Every open run is resident, so any other has ended. Deleting one twice changes nothing.
        if self.runs.get(&seq).is_some_and(|run| !run.has_ended()) {
            return no(Code::RunNotEnded, "still runs");
        }
        if world.outboxes.owes(seq) {
            return no(Code::RunNotEnded, "still owes a delivery");
        }
        self.runs.remove(&seq);
        world.forget_revoked(seq);
        world.expire_keys_of(tx, seq);
        tx.facts.push(Fact::RunDeleted { run: seq });
        Ok(())
    }
}

fn find(runs: &mut BTreeMap<RunSeq, Box<Run>>, id: RunId) -> Result<&mut Run, Rejection> {
    runs.get_mut(&id.seq)
        .map(|run| &mut **run)
        .filter(|run| run.record.salt == id.salt)
        .ok_or_else(|| unknown_run(id))
}

pub(super) fn unknown_run(id: RunId) -> Rejection {
    Rejection::new(
        Code::UnknownRun,
        format!("run {id} does not exist, or retention has deleted it"),
    )
}

/// Takes a node of a cancelled run out of everything that would still act on it.
fn leave(run: &mut Run, world: &mut World, tx: &mut Tx, node: u32) {
    let core = *run.core(node);
    if !core.is_open() {
        return;
    }
    let open = *run.open(node);
    let key = run.key(node);
    match core.stage {
        Stage::Leased => {
            revoke(run, world, tx, node);
            world.close_lease(key, open.session);
            world.revoked.insert(key, Attempt(core.attempt));
            while world.revoked.len() > world.settings.max_leases {
                world.revoked.pop_first();
            }
        }
        _ if open.doom != NONE => {
            world.doomed.remove(&key);
        }
        Stage::Open | Stage::Backoff if !core.ready && open.remaining == 0 => {
            world.timers.wake.remove(&(open.not_before, key));
            world.timers.wake_wall.remove(&(open.not_before_wall, key));
        }
        _ => {}
    }
    run.cores[node as usize].ready = false;
}

/// What resuming changes about a node, if anything.
fn reopened(
    run: &Run,
    world: &mut World,
    tx: &mut Tx,
    newest: &mut BTreeMap<u32, SpecId>,
    node: u32,
) -> Option<NodeRecord> {
    let core = *run.core(node);
    if core.stage == Stage::Succeeded || core.is_follower() {
        return None;
    }
    let mut record = run.node_record(node);
    let settles = core.body == Body::Structure;
    record.progress = if settles {
        Progress::Settling
    } else {
        record.spec = *newest
            .entry(core.spec)
            .or_insert_with(|| world.newest(tx, core.spec));
        record.body = BodyEnd::Plain;
        Progress::Open
    };
    if core.stage != Stage::Open {
        record.not_before = Timestamp(0);
    }
    record.failures = 0;
    record.losses = 0;
    record.cause = None;
    if record == run.node_record(node) {
        return None;
    }
    record.round = run.record.round;
    record.note = Note::Reopened;
    Some(record)
}

impl World {
    fn forget_revoked(&mut self, run: RunSeq) {
        let (first, last) = (NodeIndex(0), NodeIndex(u32::MAX));
        let of_run = NodeKey::new(run, first)..=NodeKey::new(run, last);
        while let Some((key, _)) = self.revoked.range(of_run.clone()).next() {
            let key = *key;
            self.revoked.remove(&key);
        }
    }

    /// The same spec with the code that was announced last for its action.
    fn newest(&mut self, tx: &mut Tx, id: u32) -> SpecId {
        let spec = Arc::clone(self.specs.of(id));
        let announced = self.announced.get(&spec.action);
        let code = match announced {
            Some(announced) if !spec.by_name => self.specs.of(announced.0).fingerprint.clone(),
            _ => return SpecId(id),
        };
        if code == spec.fingerprint {
            return SpecId(id);
        }
        let spec = Arc::new(Spec {
            fingerprint: code,
            ..Spec::clone(&spec)
        });
        self.intern(tx, &spec)
    }
}
