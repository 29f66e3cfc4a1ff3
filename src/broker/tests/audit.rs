//! What must hold of any stream of facts, whoever wrote it: numbers without gaps, states that do not change any more,
//! deliveries that leave only after their confirmation. It knows the fact format and nothing of the broker.

use std::collections::{BTreeMap, BTreeSet};

use crate::broker::outcome::{Effect, Fact};
use crate::broker::types::{
    Attempt, BodyEnd, KeyHash, LeaseToken, NameId, NodeKey, NodeRecord, Progress, RunRecord,
    RunSeq, RunState,
};

/// Reads facts in the order of their commit and complains about the first that cannot be.
#[derive(Default)]
pub(super) struct Audit {
    runs: BTreeMap<RunSeq, AuditedRun>,
    nodes: BTreeMap<NodeKey, Option<NodeRecord>>,
    outboxes: BTreeMap<NameId, (u64, u64)>,
    owed: BTreeSet<(NameId, NodeKey, u32)>,
    positions: BTreeMap<(NameId, String), (u32, u64)>,
    letters: BTreeMap<NameId, u64>,
    names: BTreeSet<NameId>,
    specs: BTreeSet<u32>,
    keys: BTreeMap<KeyHash, (Option<RunSeq>, u64)>,
    tokens: BTreeMap<LeaseToken, (NodeKey, Attempt)>,
    /// Outcomes applied so far, for the figures that a suite prints.
    pub(super) outcomes: u64,
}

#[derive(Default)]
struct AuditedRun {
    record: Option<RunRecord>,
    n_nodes: u32,
    n_events: u64,
    deleted: bool,
}

impl Audit {
    /// Checks the facts of one batch.
    pub(super) fn absorb(&mut self, facts: &[Fact]) -> Result<(), String> {
        facts.iter().try_for_each(|fact| self.fact(fact))
    }

    fn fact(&mut self, fact: &Fact) -> Result<(), String> {
        match fact {
            Fact::Spec { id, .. } => ensure(self.specs.insert(id.0), || {
                format!("spec {} written twice", id.0)
            }),
            Fact::Name { id, .. } => ensure(self.names.insert(*id), || {
                format!("name {} written twice", id.0)
            }),
            Fact::Announced { spec, .. } => ensure(self.specs.contains(&spec.0), || {
                format!("announced spec {} does not exist", spec.0)
            }),
            Fact::Run { run, record } => self.run(*run, record),
            Fact::Nodes {
                run,
                first,
                parent,
                event,
                nodes,
                ..
            } => {
                let entry = self.runs.entry(*run).or_default();
                ensure(!entry.deleted, || {
                    format!("nodes of the deleted run {}", run.0)
                })?;
                ensure(first.0 == entry.n_nodes, || {
                    format!(
                        "I9: nodes of run {} begin at {}, not {}",
                        run.0, first.0, entry.n_nodes
                    )
                })?;
                ensure(*event == entry.n_events + 1, || {
                    format!(
                        "I11: event {event} of run {} follows {}",
                        run.0, entry.n_events
                    )
                })?;
                ensure(parent.is_none_or(|parent| parent.0 < entry.n_nodes), || {
                    format!(
                        "I9: the parent {parent:?} of nodes of run {} does not exist",
                        run.0
                    )
                })?;
                entry.n_events += nodes.len() as u64;
                for (i, node) in nodes.iter().enumerate() {
                    let at = first.0 + i as u32;
                    ensure(self.specs.contains(&node.spec.0), || {
                        format!("node {}/{at} has a spec that does not exist", run.0)
                    })?;
                    for range in &node.inputs {
                        ensure(
                            range.count >= 1 && range.first.0 + range.count <= at,
                            || format!("I9: node {}/{at} waits for {range:?}", run.0),
                        )?;
                    }
                    self.nodes.insert(
                        NodeKey::new(*run, crate::broker::types::NodeIndex(at)),
                        None,
                    );
                }
                entry.n_nodes += nodes.len() as u32;
                Ok(())
            }
            Fact::Node {
                node,
                event,
                record,
            } => self.node(*node, *event, record),
            Fact::Outcome { node, .. } => {
                self.outcomes += 1;
                ensure(self.nodes.contains_key(node), || {
                    format!("outcome of the unknown node {node}")
                })
            }
            Fact::Key { key, run, at, .. } => {
                // It may be written again to say that its run was deleted.
                let owner = (run.map(|run| run.seq), at.0);
                let before = self.keys.insert(*key, owner);
                ensure(
                    before.is_none_or(|before| before == owner && owner.0.is_some()),
                    || format!("G11: key {:x} was taken twice", key.0),
                )
            }
            Fact::KeysExpired { keys } => keys.iter().try_for_each(|key| {
                ensure(self.keys.remove(key).is_some(), || {
                    format!("key {:x} was never taken", key.0)
                })
            }),
            Fact::Position {
                route,
                partition,
                epoch,
                next,
            } => {
                let at = (*epoch, *next);
                let before = self.positions.insert((*route, partition.to_string()), at);
                ensure(self.names.contains(route), || {
                    "a position of an unknown route".to_owned()
                })?;
                ensure(before.is_none_or(|before| before <= at), || {
                    format!("I14: position {at:?} follows {before:?}")
                })
            }
            Fact::Outbox {
                output,
                seq,
                node,
                round,
                ..
            } => {
                let last = self.outboxes.entry(*output).or_insert((0, 1));
                ensure(*seq == last.0 + 1, || {
                    format!("I12: delivery {seq} follows {}", last.0)
                })?;
                last.0 = *seq;
                ensure(self.owed.insert((*output, *node, *round)), || {
                    format!("I12: {node} is owed twice in round {round}")
                })?;
                ensure(
                    matches!(self.nodes.get(node), Some(Some(record)) if terminal(record.progress)
                        || matches!(record.body, BodyEnd::Tail(_))),
                    || format!("I12: {node} is owed before it has ended"),
                )
            }
            Fact::OutboxConfirmed {
                output,
                cursor,
                beyond,
            } => {
                let last = self.outboxes.entry(*output).or_insert((0, 1));
                ensure(*cursor >= last.1 && *cursor <= last.0 + 1, || {
                    format!(
                        "I13: cursor {cursor} follows {} of {} deliveries",
                        last.1, last.0
                    )
                })?;
                last.1 = *cursor;
                ensure(
                    beyond.is_sorted() && beyond.iter().all(|seq| *seq > *cursor && *seq <= last.0),
                    || format!("I13: confirmed beyond {cursor}: {beyond:?}"),
                )
            }
            Fact::DeadLetter { route, seq, .. } => {
                let last = self.letters.entry(*route).or_default();
                ensure(*seq == *last + 1, || {
                    format!("dead letter {seq} follows {last}")
                })?;
                *last = *seq;
                Ok(())
            }
            Fact::DeadLetterRemoved { route, seq } => ensure(
                self.letters.get(route).is_some_and(|last| seq <= last),
                || format!("dead letter {seq} was removed but never written"),
            ),
            Fact::RunDeleted { run } => {
                let entry = self.runs.entry(*run).or_default();
                let ended = entry
                    .record
                    .as_ref()
                    .is_some_and(|record| record.ended.is_some());
                entry.deleted = true;
                ensure(ended, || {
                    format!("I19: run {} was deleted while open", run.0)
                })
            }
        }
    }

    fn run(&mut self, run: RunSeq, record: &RunRecord) -> Result<(), String> {
        let entry = self.runs.entry(run).or_default();
        ensure(!entry.deleted, || {
            format!("a record of the deleted run {}", run.0)
        })?;
        if let Some(before) = &entry.record {
            let round = record.round == before.round
                || (record.round == before.round + 1 && before.ended.is_some());
            ensure(round, || {
                format!(
                    "run {}: round {} follows {}",
                    run.0, record.round, before.round
                )
            })?;
            ensure(
                record.salt == before.salt && record.root == before.root,
                || format!("run {} changed its identity", run.0),
            )?;
            ensure(
                record.round > before.round || before.ended.is_none(),
                || format!("I2: run {} changed after its end", run.0),
            )?;
        }
        ensure(
            record.ended.is_some() != (record.state == RunState::Running),
            || {
                format!(
                    "I10: run {} is {:?} with end {:?}",
                    run.0, record.state, record.ended
                )
            },
        )?;
        if record.ended.is_some() {
            ensure(
                record.n_nodes == entry.n_nodes && record.n_events == entry.n_events,
                || {
                    format!(
                        "I10 I11: run {} ended with {} nodes and {} events, not {} and {}",
                        run.0, record.n_nodes, record.n_events, entry.n_nodes, entry.n_events
                    )
                },
            )?;
        }
        entry.record = Some(record.clone());
        Ok(())
    }

    fn node(&mut self, node: NodeKey, event: u64, record: &NodeRecord) -> Result<(), String> {
        let run = self.runs.entry(node.run).or_default();
        ensure(event == run.n_events + 1, || {
            format!("I11: event {event} of {node} follows {}", run.n_events)
        })?;
        run.n_events = event;
        let Some(before) = self.nodes.get_mut(&node) else {
            return Err(format!("I9: {node} changed but does not exist"));
        };
        let attempt = before.as_ref().map_or(0, |before| before.attempt.0);
        let round = before.as_ref().map_or(1, |before| before.round);
        let was = before
            .as_ref()
            .map_or(Progress::Open, |before| before.progress);
        ensure(record.round >= round, || {
            format!("{node} went back to round {}", record.round)
        })?;
        ensure(!terminal(was) || record.round > round, || {
            format!(
                "I2: {node} was {was:?} and became {:?} in the same round",
                record.progress
            )
        })?;
        let leased = matches!(record.progress, Progress::Leased { .. });
        let begins = leased && !matches!(was, Progress::Leased { .. });
        ensure(record.attempt.0 == attempt + u32::from(begins), || {
            format!(
                "I3: attempt {} of {node} follows {attempt}",
                record.attempt.0
            )
        })?;
        *before = Some(record.clone());
        Ok(())
    }

    /// Checks that every token is new, and that a lease was recorded before it was given away.
    pub(super) fn effects(&mut self, effects: &[Effect]) -> Result<(), String> {
        for effect in effects {
            if let Effect::Lease(lease) = effect {
                let at = (lease.node, lease.attempt);
                let before = self.tokens.insert(lease.token, at);
                ensure(before.is_none(), || {
                    format!("I3: the token of {at:?} was also {before:?}")
                })?;
                let recorded = matches!(self.nodes.get(&lease.node), Some(Some(record))
                    if record.attempt == lease.attempt
                    && record.progress == (Progress::Leased { session: lease.session }));
                ensure(recorded, || {
                    format!("I4: {} was given away without a record", lease.node)
                })?;
            }
        }
        Ok(())
    }

    /// How many deliveries were ever recorded.
    pub(super) fn n_owed(&self) -> usize {
        self.owed.len()
    }
}

fn terminal(progress: Progress) -> bool {
    matches!(
        progress,
        Progress::Succeeded | Progress::Failed | Progress::Skipped
    )
}

fn ensure(holds: bool, complaint: impl FnOnce() -> String) -> Result<(), String> {
    if holds { Ok(()) } else { Err(complaint()) }
}
