//! Lanes: the ready nodes of each spec, in the order in which they are offered.
//!
//! A spec fixes queue, taint, action, code and priority, so a lane is ordered by (run, node) alone; a claim merges the heads of the
//! lanes its session serves by priority. Nodes are kept as intervals: a fan-out of 10,000 is one entry. A lane of a batch action
//! remembers since when its nodes have been ready, and is *due* when a bundle is full or its oldest call has waited long enough.
//! A lane that no session serves is where parked nodes wait; `explain` says so.
//!
//! I7: every ready node is in exactly one lane, and a lane holds nothing else.

use std::collections::{BTreeMap, BTreeSet};

use super::World;
use super::types::{Batch, RunSeq, SpecId, Timestamp};

/// The lanes, by number of their spec.
#[derive(Debug, Default)]
pub(super) struct Lanes {
    list: Vec<Lane>,
    /// Lanes that hold something and are served by an attached session.
    pub active: BTreeSet<u32>,
    /// When bundles of batch lanes become due.
    timers: BTreeSet<(Timestamp, u32)>,
    /// Ready nodes in all lanes.
    pub n_ready: u64,
}

/// The ready nodes of one spec.
#[derive(Debug, Default)]
pub(super) struct Lane {
    /// First node of an interval → one past its last, and since when they have been ready (0 where nobody asks).
    ready: BTreeMap<(RunSeq, u32), (u32, Timestamp)>,
    /// The intervals by age; only kept for batch lanes.
    ages: BTreeSet<(Timestamp, RunSeq, u32)>,
    pub count: u64,
    timer: Option<Timestamp>,
    /// What its nodes run by; `None` while nothing was announced for a by-name spec.
    pub runs_by: Option<SpecId>,
    pub priority: i32,
    pub batch: Option<Batch>,
    /// Attached sessions that serve it.
    pub servers: u32,
}

impl Lane {
    /// The next node to be offered.
    pub(super) fn head(&self) -> Option<(RunSeq, u32)> {
        self.ready.first_key_value().map(|(key, _)| *key)
    }

    /// Since when the oldest of a batch lane has been ready.
    pub(super) fn oldest(&self) -> Option<Timestamp> {
        self.ages.first().map(|(since, _, _)| *since)
    }

    /// When its next bundle may leave at the latest.
    pub(super) fn due_at(&self) -> Option<Timestamp> {
        let batch = self.batch?;
        Some(self.oldest()?.after_ms(batch.max_wait_ms))
    }

    /// Whether something may leave now.
    pub(super) fn is_due(&self, now: Timestamp) -> bool {
        match self.batch {
            _ if self.count == 0 => false,
            None => true,
            Some(batch) => {
                self.count >= u64::from(batch.max_size) || self.due_at().is_some_and(|at| at <= now)
            }
        }
    }

    /// The intervals, in order.
    pub(super) fn intervals(&self) -> impl Iterator<Item = (RunSeq, u32, u32)> {
        self.ready
            .iter()
            .map(|((run, start), (end, _))| (*run, *start, *end))
    }

    fn insert(&mut self, run: RunSeq, start: u32, end: u32, since: Timestamp) {
        let since = if self.batch.is_some() {
            since
        } else {
            Timestamp(0)
        };
        self.count += u64::from(end - start);
        let (mut first, mut last) = (start, end);
        if let Some((&(before, at), &(to, age))) = self.ready.range(..(run, start)).next_back()
            && before == run
            && to == start
            && age == since
        {
            first = at;
        }
        if let Some(&(to, age)) = self.ready.get(&(run, end))
            && age == since
        {
            last = to;
            self.remove((run, end));
        }
        self.ready.insert((run, first), (last, since));
        if self.batch.is_some() {
            self.ages.insert((since, run, first));
        }
    }

    fn remove(&mut self, key: (RunSeq, u32)) {
        if let Some((_, since)) = self.ready.remove(&key)
            && self.batch.is_some()
        {
            self.ages.remove(&(since, key.0, key.1));
        }
    }

    /// Takes up to `limit` nodes off the front, all of one run: the first of them and how many.
    fn take(&mut self, limit: u32) -> Option<(RunSeq, u32, u32)> {
        let (&(run, start), &(end, since)) = self.ready.first_key_value()?;
        let n = limit.min(end - start);
        self.remove((run, start));
        if start + n < end {
            self.ready.insert((run, start + n), (end, since));
            if self.batch.is_some() {
                self.ages.insert((since, run, start + n));
            }
        }
        self.count -= u64::from(n);
        Some((run, start, n))
    }
}

impl Lanes {
    /// The lane of the next spec.
    pub(super) fn add(&mut self) {
        self.list.push(Lane::default());
    }

    pub(super) fn get(&self, lane: u32) -> &Lane {
        &self.list[lane as usize]
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (u32, &Lane)> {
        (0..).zip(&self.list)
    }

    /// Nodes `start..end` of a run have become ready.
    pub(super) fn insert(&mut self, spec: u32, run: RunSeq, start: u32, end: u32, now: Timestamp) {
        self.n_ready += u64::from(end - start);
        self.list[spec as usize].insert(run, start, end, now);
        self.refresh(spec, now);
    }

    /// Takes up to `limit` nodes off the front of a lane.
    pub(super) fn take(
        &mut self,
        spec: u32,
        limit: u32,
        now: Timestamp,
    ) -> Option<(RunSeq, u32, u32)> {
        let taken = self.list[spec as usize].take(limit)?;
        self.n_ready -= u64::from(taken.2);
        self.refresh(spec, now);
        Some(taken)
    }

    /// Takes everything of a run out: it was cancelled.
    pub(super) fn remove_run(&mut self, run: RunSeq, now: Timestamp) {
        for spec in 0..self.list.len() as u32 {
            let lane = &mut self.list[spec as usize];
            let mine: Vec<(u32, u32)> = lane
                .ready
                .range((run, 0)..=(run, u32::MAX))
                .map(|((_, start), (end, _))| (*start, *end))
                .collect();
            if mine.is_empty() {
                continue;
            }
            for (start, end) in mine {
                lane.remove((run, start));
                lane.count -= u64::from(end - start);
                self.n_ready -= u64::from(end - start);
            }
            self.refresh(spec, now);
        }
    }

    /// Brings what is derived from a lane up to date: whether it is active, and when its next bundle is due.
    fn refresh(&mut self, spec: u32, now: Timestamp) {
        let lane = &mut self.list[spec as usize];
        if lane.count > 0 && lane.servers > 0 {
            self.active.insert(spec);
        } else {
            self.active.remove(&spec);
        }
        if lane.batch.is_none() && lane.timer.is_none() {
            return;
        }
        // Once due, no timer is needed: whoever gets credit takes it.
        let wanted = match lane.due_at() {
            Some(at) if at > now && !lane.is_due(now) => Some(at),
            _ => None,
        };
        if wanted != lane.timer {
            if let Some(at) = lane.timer.take() {
                self.timers.remove(&(at, spec));
            }
            if let Some(at) = wanted {
                self.timers.insert((at, spec));
            }
            lane.timer = wanted;
        }
    }

    /// When the next bundle becomes due.
    pub(super) fn next_deadline(&self) -> Option<Timestamp> {
        self.timers.first().map(|(at, _)| *at)
    }

    /// Drops timers that have done their work.
    pub(super) fn advance(&mut self, now: Timestamp) {
        while let Some(&(at, spec)) = self.timers.first()
            && at <= now
        {
            self.timers.pop_first();
            self.list[spec as usize].timer = None;
        }
    }

    pub(super) fn set_servers(&mut self, spec: u32, servers: u32, now: Timestamp) {
        self.list[spec as usize].servers = servers;
        self.refresh(spec, now);
    }

    /// Changes what the nodes of a lane run by.
    fn set_rules(
        &mut self,
        spec: u32,
        runs_by: Option<SpecId>,
        priority: i32,
        batch: Option<Batch>,
        now: Timestamp,
    ) {
        let lane = &mut self.list[spec as usize];
        lane.runs_by = runs_by;
        lane.priority = priority;
        if lane.batch != batch {
            // A node's age begins anew with the rules it is bundled by.
            let all: Vec<_> = lane.intervals().collect();
            lane.ready.clear();
            lane.ages.clear();
            lane.count = 0;
            lane.batch = batch;
            for (run, start, end) in all {
                lane.insert(run, start, end, now);
            }
        }
        self.refresh(spec, now);
    }
}

impl World {
    /// Derives a lane's rules and servers from its spec, what was announced and who is attached.
    pub(super) fn refresh_lane(&mut self, lane: u32) {
        let runs_by = self.resolve(lane);
        let (priority, batch) = self
            .resolved(lane)
            .map_or((0, None), |spec| (spec.priority, spec.batch));
        self.lanes
            .set_rules(lane, runs_by, priority, batch, self.now);
        let mut n_servers = 0;
        let spec = self.resolved(lane).cloned();
        for session in self.workers.sessions.values_mut() {
            let may = spec.as_ref().is_some_and(|spec| session.serves(spec));
            session.mark_served(lane, may);
            n_servers += u32::from(may);
        }
        self.lanes.set_servers(lane, n_servers, self.now);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lane(batch: Option<Batch>) -> Lane {
        Lane {
            batch,
            ..Lane::default()
        }
    }

    #[test]
    fn neighbours_are_one_interval_and_leave_in_order() {
        let mut lane = lane(None);
        for node in [5, 3, 4, 9, 1] {
            lane.insert(RunSeq(2), node, node + 1, Timestamp(node.into()));
        }
        lane.insert(RunSeq(1), 7, 8, Timestamp(0));
        assert_eq!(
            lane.intervals().collect::<Vec<_>>(),
            [
                (RunSeq(1), 7, 8),
                (RunSeq(2), 1, 2),
                (RunSeq(2), 3, 6),
                (RunSeq(2), 9, 10)
            ]
        );
        assert_eq!(lane.take(10), Some((RunSeq(1), 7, 1)));
        assert_eq!(lane.take(10), Some((RunSeq(2), 1, 1)));
        assert_eq!(lane.take(2), Some((RunSeq(2), 3, 2)));
        assert_eq!(lane.head(), Some((RunSeq(2), 5)));
        assert_eq!(lane.count, 2);
        assert_eq!(lane.take(1), Some((RunSeq(2), 5, 1)));
        assert_eq!(lane.take(1), Some((RunSeq(2), 9, 1)));
        assert_eq!(lane.take(1), None);
    }

    #[test]
    fn a_bundle_is_due_when_full_or_old() {
        let mut lane = lane(Some(Batch {
            max_size: 3,
            max_wait_ms: 10,
        }));
        assert!(!lane.is_due(Timestamp(1_000)));
        lane.insert(RunSeq(1), 5, 6, Timestamp(100));
        lane.insert(RunSeq(1), 4, 5, Timestamp(105));
        assert_eq!(lane.due_at(), Some(Timestamp(110)));
        assert!(!lane.is_due(Timestamp(109)));
        assert!(lane.is_due(Timestamp(110)));
        lane.insert(RunSeq(1), 0, 1, Timestamp(106));
        assert!(lane.is_due(Timestamp(106)), "full");
        assert_eq!(lane.take(1), Some((RunSeq(1), 0, 1)));
        assert_eq!(lane.take(1), Some((RunSeq(1), 4, 1)));
        assert_eq!(lane.oldest(), Some(Timestamp(100)));
    }
}
