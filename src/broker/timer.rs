//! What becomes due at a time: delayed nodes, backoffs, dates, timeouts of attempts.
//!
//! The broker's own time and calendar time are kept apart (G6). Timers of delays wake in every command, because a node whose time
//! has come *is* ready; leases and attempts only end in ticks, after what has arrived was applied (STATE §4).

use std::collections::{BTreeMap, BTreeSet};

use super::Broker;
use super::run::{NONE, Stage};
use super::types::{NodeKey, Timestamp, Turn, WallTime};

/// All timers of nodes.
#[derive(Debug, Default)]
pub(super) struct Timers {
    /// Nodes that are delayed or back off, inputs satisfied.
    pub wake: BTreeSet<(Timestamp, NodeKey)>,
    /// The same, at a date.
    pub wake_wall: BTreeSet<(WallTime, NodeKey)>,
    /// Attempts that must have ended by then.
    timeouts: BTreeSet<(Timestamp, NodeKey)>,
    timeout_of: BTreeMap<NodeKey, Timestamp>,
}

impl Timers {
    pub(super) fn set_timeout(&mut self, node: NodeKey, at: Timestamp) {
        self.drop_timeout(node);
        self.timeouts.insert((at, node));
        self.timeout_of.insert(node, at);
    }

    pub(super) fn drop_timeout(&mut self, node: NodeKey) {
        if self.timeout_of.is_empty() {
            return;
        }
        if let Some(at) = self.timeout_of.remove(&node) {
            self.timeouts.remove(&(at, node));
        }
    }

    /// Nodes whose attempt is bounded, for checking.
    pub(super) fn timed(&self) -> impl Iterator<Item = NodeKey> {
        self.timeout_of.keys().copied()
    }
}

impl Broker {
    /// Begins a command: time moves on, and what is due wakes.
    pub(super) fn advance(&mut self, turn: Turn) {
        let world = &mut self.world;
        world.now = world.now.max(turn.now);
        world.wall = turn.wall;
        world.seed = turn.seed;
        world.lanes.advance(world.now);
        while let Some(&(at, key)) = self.world.timers.wake.first()
            && at <= self.world.now
        {
            self.world.timers.wake.pop_first();
            self.wake(key);
        }
        while let Some(&(at, key)) = self.world.timers.wake_wall.first()
            && at <= self.world.wall
        {
            self.world.timers.wake_wall.pop_first();
            self.wake(key);
        }
    }

    fn wake(&mut self, key: NodeKey) {
        let Some(run) = self.runs.get_mut(&key.run) else {
            debug_assert!(false, "timers name resident runs");
            return;
        };
        let core = run.core(key.node.0);
        debug_assert!(
            matches!(core.stage, Stage::Open | Stage::Backoff) && run.open(key.node.0).doom == NONE,
            "timers name delayed nodes"
        );
        super::cascade::make_ready(run, &mut self.world, key.node.0);
    }

    /// Ends attempts that took far longer than they may: their worker should have done it.
    pub(super) fn end_overdue(&mut self, tx: &mut super::Tx, budget: &mut usize) {
        while *budget > 0
            && let Some(&(at, key)) = self.world.timers.timeouts.first()
            && at <= self.world.now
        {
            *budget -= 1;
            let run = self
                .runs
                .get_mut(&key.run)
                .expect("I4 a lease's run is resident");
            super::retry::overrun(run, &mut self.world, tx, key.node.0);
        }
    }

    /// When the broker wants a tick, in its own time.
    pub fn next_deadline(&self) -> Option<Timestamp> {
        let world = &self.world;
        if !world.doomed.is_empty() {
            return Some(world.now);
        }
        let sessions = world
            .workers
            .sessions
            .values()
            .filter(|session| !session.leases.is_empty())
            .map(|session| world.session_deadline(session))
            .min();
        [
            world.timers.wake.first().map(|(at, _)| *at),
            world.timers.timeouts.first().map(|(at, _)| *at),
            world.lanes.next_deadline(),
            world.keys.next_deadline(world.settings.dedup_window_ms),
            sessions,
        ]
        .into_iter()
        .flatten()
        .min()
    }

    /// When the broker wants a tick, by the calendar.
    pub fn next_wall_deadline(&self) -> Option<WallTime> {
        self.world.timers.wake_wall.first().map(|(at, _)| *at)
    }
}
