//! What follows when a node's value becomes known: dependents wake or are skipped, promises settle, the run ends.
//!
//! Success is followed to its end at once, because it writes nothing: a counter falls, a node enters its lane (G2, G4). Failure
//! writes a fact for each node it skips, so those nodes are only *doomed* at first, and [`Broker::continue_cascades`] skips a
//! bounded number of them a command. After a restart the same nodes are doomed again, because it derives from their inputs.
//!
//! Nothing here recurses: what is still to be visited is a list.

use super::outcome::{Effect, Fact, Tx};
use super::run::{EdgeKind, NONE, Run, Stage};
use super::types::{
    BodyEnd, InputRange, NodeIndex, NodeKey, NodeRecord, NodeState, Note, Progress, RunState,
};
use super::{Broker, World};

/// A node's inputs are satisfied and its time has come: it enters its lane (I6, I7).
pub(super) fn make_ready(run: &mut Run, world: &mut World, node: u32) {
    let from = run.state(node);
    run.cores[node as usize].ready = true;
    run.recount(from, NodeState::Ready, 1);
    world
        .lanes
        .insert(run.core(node).spec, run.seq, node, node + 1, world.now);
}

/// A node's inputs are satisfied: it is ready, or a timer will make it so.
pub(super) fn arm(run: &mut Run, world: &mut World, node: u32) {
    if !delay(run, world, node) {
        make_ready(run, world, node);
    }
}

/// Sets a timer if the node has to wait for its time.
pub(super) fn delay(run: &Run, world: &mut World, node: u32) -> bool {
    let open = run.open(node);
    debug_assert_eq!(open.remaining, 0, "I6 a ready node has its inputs");
    if open.not_before > world.now {
        world.timers.wake.insert((open.not_before, run.key(node)));
        return true;
    }
    if open.not_before_wall > world.wall {
        world
            .timers
            .wake_wall
            .insert((open.not_before_wall, run.key(node)));
        return true;
    }
    false
}

/// Makes the nodes of a range inputs (or references) of an open node.
pub(super) fn connect(
    run: &mut Run,
    world: &mut World,
    node: u32,
    range: InputRange,
    kind: EdgeKind,
) {
    for from in range.first.0..range.first.0 + range.count {
        let from = run.find(from);
        let core = run.core(from);
        if core.is_open() {
            run.add_edge(from, node, kind);
            run.open_mut(node).remaining += 1;
        } else if core.stage != Stage::Succeeded && !kind.accepts_failure() {
            let blame = run.blame(from);
            doom(run, world, node, blame);
        }
    }
}

/// The node will be skipped, or fail by reference, because of `blame`.
fn doom(run: &mut Run, world: &mut World, node: u32, blame: u32) {
    let open = run.open_mut(node);
    if open.doom == NONE {
        open.doom = blame;
        world.doomed.insert(run.key(node));
    }
}

/// A node's value (or error) becomes known: the terminal fact. [`follow`] then visits those who wait for it.
pub(super) fn end(run: &mut Run, world: &mut World, tx: &mut Tx, node: u32, record: NodeRecord) {
    let open = *run.open(node);
    let before = run.state(node);
    run.flushed.remove(&node);
    run.write(tx, node, record);
    let after = run.state(node);
    debug_assert!(after.is_terminal(), "I2 it has ended");
    run.recount(before, after, 1);
    run.recount(NodeState::Settling, after, open.followers);
    world.open_nodes -= u64::from(open.followers) + 1;
    settled(run, world, tx, node);
    world.unvisited.push((node, open.edges().0));
}

/// A body ended with the promise of `target`: whoever waited for `node` now waits for that, in O(1).
pub(super) fn forward(
    run: &mut Run,
    world: &mut World,
    tx: &mut Tx,
    node: u32,
    target: u32,
    mut record: NodeRecord,
) {
    let open = *run.open(node);
    let before = run.state(node);
    record.progress = Progress::Settling;
    record.body = BodyEnd::Tail(NodeIndex(target));
    run.flushed.remove(&node);
    run.write(tx, node, record);
    run.recount(before, NodeState::Settling, 1);
    let end = run.find(target);
    let (head, tail) = open.edges();
    if run.core(end).is_open() {
        run.append(end, head, tail);
        run.open_mut(end).followers += open.followers + 1;
        watch(run, world, end, node);
        return;
    }
    let after = run.state(end);
    run.recount(NodeState::Settling, after, open.followers + 1);
    world.open_nodes -= u64::from(open.followers) + 1;
    settled(run, world, tx, node);
    world.unvisited.push((end, head));
}

/// Somebody outside the graph waits for this follower: it is told when `end` settles.
pub(super) fn watch(run: &mut Run, world: &World, end: u32, follower: u32) {
    if run.record.root.0 == follower || !world.specs.deliveries(run.core(follower).spec).is_empty()
    {
        run.add_edge(end, follower, EdgeKind::Value);
    }
}

/// The value of a node is known: those outside the graph are told.
fn settled(run: &Run, world: &mut World, tx: &mut Tx, node: u32) {
    let succeeded = run.state(node) == NodeState::Succeeded;
    if run.record.root.0 == node {
        tx.effects.push(Effect::RootSettled { run: run.seq });
    }
    for i in 0..world.specs.deliveries(run.core(node).spec).len() {
        let delivery = &world.specs.deliveries(run.core(node).spec)[i];
        if (succeeded && delivery.succeeded) || (!succeeded && delivery.failed) {
            let output = std::sync::Arc::clone(&delivery.output);
            world.owe(tx, run, node, &output);
        }
    }
}

/// Visits everyone who waits for what has ended, until nobody is left.
pub(super) fn follow(run: &mut Run, world: &mut World, tx: &mut Tx) {
    while let Some((node, mut head)) = world.unvisited.pop() {
        let succeeded = run.core(node).stage == Stage::Succeeded;
        while let Some((to, kind, rest)) = run.pop_edge(head) {
            head = rest;
            let core = run.core(to);
            if core.is_follower() {
                settled(run, world, tx, to);
                continue;
            }
            if !core.is_open() {
                continue;
            }
            let stage = core.stage;
            let open = run.open_mut(to);
            open.remaining -= 1;
            if !succeeded && !kind.accepts_failure() {
                let blame = run.blame(node);
                doom(run, world, to, blame);
            } else if open.remaining == 0 && open.doom == NONE {
                if stage == Stage::Settling {
                    let mut record = run.node_record(to);
                    record.progress = Progress::Succeeded;
                    record.note = Note::None;
                    end(run, world, tx, to, record);
                } else {
                    arm(run, world, to);
                }
            }
        }
    }
    finish(run, world, tx);
}

/// Ends the run when all its nodes have (I10).
fn finish(run: &mut Run, world: &mut World, tx: &mut Tx) {
    if run.has_ended() || run.n_open() > 0 {
        return;
    }
    let mut record = run.record.clone();
    record.ended = Some(world.now);
    record.state = match run.state(record.root.0) {
        NodeState::Succeeded => RunState::Succeeded,
        _ => RunState::Failed,
    };
    run.write_run(tx, record);
    world.ended.push(run.seq);
    tx.effects.push(Effect::RunEnded { run: run.seq });
}

impl Broker {
    /// Skips doomed nodes, up to `budget` of them; the rest at the next tick, which is wanted at once.
    pub(super) fn continue_cascades(&mut self, tx: &mut Tx, mut budget: usize) {
        while budget > 0
            && let Some(key) = self.world.doomed.pop_first()
        {
            budget -= 1;
            self.skip(tx, key);
        }
    }

    fn skip(&mut self, tx: &mut Tx, key: NodeKey) {
        let node = key.node.0;
        let run = self
            .runs
            .get_mut(&key.run)
            .expect("I9 a doomed node's run is resident");
        let cause = NodeIndex(run.open(node).doom);
        let mut record = run.node_record(node);
        record.cause = Some(cause);
        (record.progress, record.note) = match run.core(node).stage {
            Stage::Settling => (Progress::Failed, Note::ReferenceFailed),
            _ => (Progress::Skipped, Note::None),
        };
        record.round = run.record.round;
        end(run, &mut self.world, tx, node, record);
        follow(run, &mut self.world, tx);
    }
}

/// The fact that a body left bytes.
pub(super) fn outcome(
    run: &Run,
    tx: &mut Tx,
    node: u32,
    is_error: bool,
    payload: super::types::Payload,
    references: Vec<InputRange>,
) {
    tx.facts.push(Fact::Outcome {
        node: run.key(node),
        is_error,
        payload,
        references,
    });
}
