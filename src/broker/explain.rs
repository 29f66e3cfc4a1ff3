//! Answers to questions: runs, nodes, totals, and for every node that does not run the one reason why.
//!
//! Changes nothing. What is asked about an ended run is answered after it was adopted.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::command::{Answer, Code, NodeSummary, Query, Reason, Rejection, RunSummary, Totals};
use super::rounds::unknown_run;
use super::run::{NONE, Run, STATES};
use super::types::{Attempt, NodeIndex, NodeKey, NodeState, RunId, RunSeq, SpecId, Turn};
use super::worker::Session;
use super::{Broker, World};

impl Broker {
    /// Answers a question from what is resident. Changes nothing.
    pub fn query(&self, turn: Turn, query: &Query) -> Answer {
        match query {
            Query::Run(id) => self.about(*id, |run| Answer::Run(self.summary(run))),
            Query::Explain { run, node, limit } => {
                self.about(*run, |run| self.explain(run, *node, *limit, turn))
            }
            Query::Nodes { run, first, limit } => self.about(*run, |run| {
                let nodes = (first.0..run.len()).take(*limit);
                Answer::Nodes(nodes.map(|node| self.node_summary(run, node)).collect())
            }),
            Query::OpenRuns { limit } => Answer::Runs(
                self.runs
                    .values()
                    .rev()
                    .filter(|run| !run.has_ended())
                    .take(*limit)
                    .map(|run| self.summary(run))
                    .collect(),
            ),
            Query::Value(key) => self.value(*key),
            Query::Totals => Answer::Totals(self.totals()),
            Query::Position { route, partition } => {
                Answer::Position(self.world.next_position(route, partition))
            }
            Query::Outbox { output } => self.outbox(output),
        }
    }

    /// The run that a question is about, if it is not resident but may exist.
    pub fn needs_query(&self, query: &Query) -> Option<RunSeq> {
        let seq = match query {
            Query::Run(run) | Query::Explain { run, .. } | Query::Nodes { run, .. } => run.seq,
            Query::Value(node) => node.run,
            Query::OpenRuns { .. }
            | Query::Totals
            | Query::Position { .. }
            | Query::Outbox { .. } => return None,
        };
        self.may_exist(seq).then_some(seq)
    }

    fn about(&self, id: RunId, answer: impl FnOnce(&Run) -> Answer) -> Answer {
        self.runs
            .get(&id.seq)
            .filter(|run| run.record.salt == id.salt)
            .map_or_else(|| Answer::No(unknown_run(id)), |run| answer(run))
    }

    fn summary(&self, run: &Run) -> RunSummary {
        let root = run.record.root.0;
        RunSummary {
            run: run.id(),
            state: run.record.state,
            root_state: run.state(run.representative(root)),
            value_node: NodeIndex(run.representative(root)),
            action: Arc::clone(&self.world.specs.of(run.core(root).spec).action),
            round: run.record.round,
            counts: STATES
                .into_iter()
                .map(|state| (state, run.counts[state as usize]))
                .filter(|(_, n)| *n > 0)
                .collect(),
            n_events: run.n_events,
            created_wall: run.record.created_wall,
            tags: run.record.tags.clone(),
            source: Arc::clone(&run.record.source),
            cancel_reason: Arc::clone(&run.record.cancel_reason),
        }
    }

    fn node_summary(&self, run: &Run, node: u32) -> NodeSummary {
        let core = run.core(node);
        let state = run.state(node);
        NodeSummary {
            node: NodeIndex(node),
            action: Arc::clone(&self.world.specs.of(core.spec).action),
            state,
            attempt: Attempt(core.attempt),
            parent: (core.parent != NONE).then_some(NodeIndex(core.parent)),
            cause: blamed(run, node),
            note: core.note,
        }
    }

    fn value(&self, key: NodeKey) -> Answer {
        let run = self.runs.get(&key.run).filter(|run| key.node.0 < run.len());
        let Some(run) = run else {
            return Answer::No(Rejection::new(
                Code::UnknownNode,
                format!("node {key} does not exist"),
            ));
        };
        let node = run.representative(key.node.0);
        Answer::Value {
            node: NodeIndex(node),
            state: run.state(node),
        }
    }

    fn totals(&self) -> Totals {
        let world = &self.world;
        let mut stranded: BTreeMap<Arc<str>, u64> = BTreeMap::new();
        for (id, lane) in world.lanes.iter().filter(|(_, lane)| lane.count > 0) {
            let spec = world.resolved(id).unwrap_or_else(|| world.specs.of(id));
            let sessions = &world.workers.sessions;
            if !sessions.values().any(|session| session.serves_queue(spec)) {
                *stranded.entry(Arc::clone(&spec.queue)).or_default() += lane.count;
            }
        }
        let attached = |session: &&Session| session.attached;
        Totals {
            open_runs: self.runs.values().filter(|run| !run.has_ended()).count() as u64,
            open_nodes: world.open_nodes,
            ready_nodes: world.lanes.n_ready,
            leases: world.workers.n_leases as u64,
            sessions: world.workers.sessions.values().filter(attached).count() as u64,
            stranded,
            outbox: world
                .outboxes
                .iter()
                .filter_map(|(id, outbox)| {
                    let name = Arc::clone(world.names.get(id)?);
                    Some((name, outbox.pending.len() as u64))
                })
                .collect(),
            keys: world.keys.len() as u64,
        }
    }

    fn outbox(&self, output: &Arc<str>) -> Answer {
        let world = &self.world;
        let outbox = world
            .names
            .find(output)
            .and_then(|id| world.outboxes.get(id));
        if let Some(outbox) = outbox {
            return Answer::Outbox {
                cursor: outbox.cursor,
                next: outbox.next,
                confirmed: outbox.confirmed.iter().copied().collect(),
            };
        }
        if world
            .settings
            .outputs
            .iter()
            .any(|rule| rule.name == *output)
        {
            return Answer::Outbox {
                cursor: 1,
                next: 1,
                confirmed: Vec::new(),
            };
        }
        Answer::No(Rejection::new(
            Code::UnknownName,
            format!("no output is called {output:?}"),
        ))
    }

    fn explain(&self, run: &Run, node: Option<NodeIndex>, limit: usize, turn: Turn) -> Answer {
        if let Some(node) = node {
            if node.0 >= run.len() {
                return Answer::No(Rejection::new(
                    Code::UnknownNode,
                    format!("run {} has no node {}", run.id(), node.0),
                ));
            }
            return Answer::Explained(vec![(node, self.world.reason(run, node.0, turn))]);
        }
        let stuck = |node: &u32| {
            let state = run.state(*node);
            state != NodeState::Leased && !state.is_terminal()
        };
        Answer::Explained(
            (0..run.len())
                .filter(stuck)
                .take(limit)
                .map(|node| (NodeIndex(node), self.world.reason(run, node, turn)))
                .collect(),
        )
    }
}

/// The node to blame: for one that handed over by a tail call, where that led.
fn blamed(run: &Run, node: u32) -> Option<NodeIndex> {
    let failed = matches!(run.state(node), NodeState::Failed | NodeState::Skipped);
    if run.core(node).is_follower() && failed {
        return Some(NodeIndex(run.blame(node)));
    }
    run.cause(node)
}

impl World {
    /// Why a node does not run (or that it does).
    fn reason(&self, run: &Run, node: u32, turn: Turn) -> Reason {
        let state = run.state(node);
        if state.is_terminal() {
            return Reason::Ended(state);
        }
        let end = run.representative(node);
        let open = run.open(end);
        match state {
            NodeState::Leased => Reason::Leased(open.session),
            NodeState::Settling => Reason::Settling {
                // A tail call waits for one value.
                remaining: if end == node {
                    open.remaining.max(1)
                } else {
                    1
                },
            },
            NodeState::Backoff => Reason::Backoff {
                until: open.not_before,
                failures: open.failures,
                losses: open.losses,
            },
            NodeState::Ready => self.reason_in_lane(run.core(node).spec),
            // Nodes about to be skipped wait for the input that failed.
            _ if open.remaining > 0 || open.doom != NONE => Reason::Inputs {
                remaining: open.remaining.max(1),
            },
            _ if open.not_before > turn.now => Reason::Delayed(open.not_before),
            _ => Reason::DelayedUntil(open.not_before_wall),
        }
    }

    fn reason_in_lane(&self, lane: u32) -> Reason {
        let held = self.lanes.get(lane);
        let Some(SpecId(id)) = held.runs_by else {
            return Reason::NeverAnnounced(Arc::clone(&self.specs.of(lane).action));
        };
        let spec = self.specs.of(id);
        let mut sessions: Vec<&Session> = self.workers.sessions.values().collect();
        sessions.retain(|session| session.serves_queue(spec));
        if sessions.is_empty() {
            return Reason::NoWorkerOnQueue(Arc::clone(&spec.queue));
        }
        sessions.retain(|session| session.tolerates(spec));
        if let (true, Some(taint)) = (sessions.is_empty(), &spec.taint) {
            return Reason::NoWorkerTolerates(Arc::clone(taint));
        }
        sessions.retain(|session| session.has_action(spec));
        if sessions.is_empty() {
            return Reason::NoWorkerHasAction(Arc::clone(&spec.action));
        }
        if spec.pin_code && !sessions.iter().any(|session| session.has_code(spec)) {
            let code = spec.fingerprint.as_deref().unwrap_or("none");
            return Reason::NoWorkerHasCode(Arc::from(code));
        }
        match (held.batch, held.due_at()) {
            (Some(batch), Some(until)) if !held.is_due(self.now) => Reason::BatchFilling {
                ready: held.count.min(u64::from(u32::MAX)) as u32,
                batch,
                until,
            },
            _ => Reason::WorkersBusy,
        }
    }
}
