//! Rebuilding a broker from facts, and making an ended run resident again.
//!
//! Facts come in the order in which they were written, some of them twice: what sled has may be repeated by the log. Base state is
//! absorbed by the same functions that a live change uses; when all facts are there, [`derive`] computes the rest from inputs and
//! references. Resuming a run derives it by the same function, so the two cannot differ.

use std::collections::BTreeSet;
use std::collections::btree_map::Entry;

use super::cascade::{connect, delay, watch};
use super::node::child_likeness;
use super::outcome::Fact;
use super::run::{Body, Draft, EdgeKind, Flushed, NONE, Run, Stage};
use super::settings::Settings;
use super::types::{InputRange, NodeKey, NodeState, RunSeq, Timestamp};
use super::{Broker, World};

/// The facts of a store do not fit together.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{detail}")]
pub struct CorruptStore {
    /// Which record, and what is wrong with it.
    pub detail: String,
}

/// A broker that is being rebuilt.
#[derive(Debug)]
pub struct Restoring {
    broker: Broker,
    damage: Option<String>,
    /// Runs whose nodes came without the run: they end later in the log, or else something is missing.
    orphans: BTreeSet<RunSeq>,
    /// The newest run any fact was about: its number is not given again.
    newest: RunSeq,
}

impl Restoring {
    /// Begins with nothing.
    pub fn new(settings: Settings, lease_secret: [u8; 16]) -> Self {
        Self {
            broker: Broker::new(settings, lease_secret),
            damage: None,
            orphans: BTreeSet::new(),
            newest: RunSeq(0),
        }
    }

    /// Takes the next fact.
    pub fn absorb(&mut self, fact: Fact) {
        let runs = &mut self.broker.runs;
        match fact {
            Fact::Run { run, record } => {
                self.newest = self.newest.max(run);
                self.orphans.remove(&run);
                match runs.entry(run) {
                    Entry::Vacant(place) => {
                        let mut run = Run::new(run, record);
                        run.draft = Some(Box::default());
                        place.insert(Box::new(run));
                    }
                    Entry::Occupied(mut known) => known.get_mut().absorb_run(&record),
                }
            }
            Fact::RunDeleted { run } => {
                self.newest = self.newest.max(run);
                self.orphans.remove(&run);
                runs.remove(&run);
            }
            Fact::Nodes { run: seq, .. }
            | Fact::Node {
                node: NodeKey { run: seq, .. },
                ..
            }
            | Fact::Outcome {
                node: NodeKey { run: seq, .. },
                ..
            } => match runs.get_mut(&seq) {
                Some(run) => absorb_into(run, &fact),
                None => {
                    self.orphans.insert(seq);
                }
            },
            other => {
                if let Err(detail) = self.broker.world.absorb(&other) {
                    self.damage.get_or_insert(detail);
                }
            }
        }
    }

    /// Derives the rest. Every open lease gets a whole period from `now`.
    pub fn finish(mut self, now: Timestamp, next_run: u64) -> Result<Broker, CorruptStore> {
        if let Some(detail) = self.damage {
            return Err(CorruptStore { detail });
        }
        if let Some(run) = self.orphans.first() {
            return Err(CorruptStore {
                detail: format!("nodes of run {:x} are there, but not the run", run.0),
            });
        }
        let broker = &mut self.broker;
        broker.world.now = now;
        broker.world.next_run = next_run.max(self.newest.0.saturating_add(1));
        broker.runs.retain(|_, run| !run.has_ended());
        for run in broker.runs.values_mut() {
            check(run, &broker.world)?;
            derive(run, &mut broker.world);
            if run.n_open() == 0 {
                return Err(CorruptStore {
                    detail: format!(
                        "run {:x}: all its nodes have ended and it has not",
                        run.seq.0
                    ),
                });
            }
        }
        Ok(self.broker)
    }
}

impl Broker {
    /// Makes an ended run resident without writing, until the end of the next command (or [`Broker::release_adopted`]).
    pub fn adopt(&mut self, seq: RunSeq, facts: Vec<Fact>) -> Result<(), CorruptStore> {
        if self.runs.contains_key(&seq) {
            return Ok(());
        }
        let mut adopted: Option<Box<Run>> = None;
        for fact in facts {
            match (&fact, &mut adopted) {
                (Fact::Run { run, record }, None) if *run == seq => {
                    let mut run = Run::new(seq, record.clone());
                    run.draft = Some(Box::default());
                    adopted = Some(Box::new(run));
                }
                (Fact::Run { run, record }, Some(adopted)) if *run == seq => {
                    adopted.absorb_run(record);
                }
                (fact, Some(run)) => absorb_into(run, fact),
                (_, None) => {}
            }
        }
        let Some(mut run) = adopted else {
            return Ok(());
        };
        check(&mut run, &self.world)?;
        if !run.has_ended() {
            return Err(CorruptStore {
                detail: format!("run {:x} is open and was not loaded at start", seq.0),
            });
        }
        run.counts = run.counted();
        self.runs.insert(seq, run);
        self.adopted.push(seq);
        Ok(())
    }

    /// Lets adopted runs go, after a query.
    pub fn release_adopted(&mut self) {
        for seq in self.adopted.drain(..) {
            if self.runs.get(&seq).is_some_and(|run| run.has_ended()) {
                self.runs.remove(&seq);
            }
        }
    }
}

/// A fact about the nodes of a run.
fn absorb_into(run: &mut Run, fact: &Fact) {
    match fact {
        Fact::Nodes {
            run: seq,
            first,
            parent,
            round,
            event,
            nodes,
        } if *seq == run.seq => run.absorb_nodes(*first, *parent, *round, *event, nodes),
        Fact::Node {
            node,
            event,
            record,
        } if node.run == run.seq => run.absorb_node(node.node, *event, record),
        Fact::Outcome {
            node, references, ..
        } if node.run == run.seq => {
            if let Some(draft) = &mut run.draft {
                if references.is_empty() {
                    draft.references.remove(&node.node.0);
                } else {
                    draft.references.insert(node.node.0, references.clone());
                }
            }
        }
        _ => {}
    }
}

/// Whether the facts of a run fit together, so that nothing that follows can go astray (I9).
fn check(run: &mut Run, world: &World) -> Result<(), CorruptStore> {
    let seq = run.seq.0;
    let no = |what: String| {
        Err(CorruptStore {
            detail: format!("run {seq:x}: {what}"),
        })
    };
    let draft = run.draft.take().unwrap_or_default();
    if let Some(damage) = &draft.damage {
        return no(damage.clone());
    }
    let n = run.len();
    if run.record.root.0 >= n {
        return no(format!("its root {} does not exist", run.record.root.0));
    }
    let within = |ranges: &[InputRange], limit: u32| {
        ranges
            .iter()
            .all(|range| u64::from(range.first.0) + u64::from(range.count) <= u64::from(limit))
    };
    for node in 0..n {
        let core = run.core(node);
        if core.spec >= world.specs.len() {
            return no(format!(
                "node {node} names spec {}, which does not exist",
                core.spec
            ));
        }
        if core.parent != NONE && core.parent >= node {
            return no(format!("node {node} was created by a later one"));
        }
        if !within(draft.inputs(node), node) {
            return no(format!("node {node} waits for a later one"));
        }
        if core.stage.is_terminal() && run.cause(node).is_some_and(|cause| cause.0 >= n) {
            return no(format!("node {node} blames one that does not exist"));
        }
    }
    for node in (0..n).filter(|node| run.core(*node).stage == Stage::Settling) {
        let refers = draft.references.contains_key(&node);
        match run.core(node).body {
            Body::Structure if refers => {}
            Body::Tail => {}
            _ => return no(format!("node {node} settles and waits for nothing")),
        }
    }
    for (node, references) in &draft.references {
        if *node >= n || !within(references, n) {
            return no(format!("node {node} refers to one that does not exist"));
        }
    }
    if !run.chains_are_sound() {
        return no("its tail calls end nowhere".into());
    }
    let settled = |range: &InputRange| {
        (range.first.0..range.first.0 + range.count)
            .all(|node| run.state(node) == NodeState::Succeeded)
    };
    for (node, references) in &draft.references {
        if run.core(*node).stage == Stage::Settling && references.iter().all(settled) {
            return no(format!("node {node} settles and waits for nothing"));
        }
    }
    run.draft = Some(draft);
    Ok(())
}

/// Computes everything about an open run that facts do not say. Takes its draft.
pub(super) fn derive(run: &mut Run, world: &mut World) {
    let draft = run.draft.take().unwrap_or_default();
    run.forget_derived();
    derive_depths(run);
    for node in 0..run.len() {
        let core = *run.core(node);
        run.n_edges += count(draft.inputs(node));
        if core.is_follower() {
            let end = run.find(node);
            if run.core(end).is_open() {
                run.open_mut(end).followers += 1;
            }
        } else if core.stage == Stage::Open {
            for range in draft.inputs(node) {
                connect(run, world, node, *range, EdgeKind::of(range.mode));
            }
        } else if core.stage == Stage::Settling {
            for range in draft.references.get(&node).into_iter().flatten() {
                connect(run, world, node, *range, EdgeKind::Reference);
            }
        }
        derive_flushed(run, world, &draft, node);
    }
    for node in 0..run.len() {
        place(run, world, node);
    }
    run.counts = run.counted();
    world.open_nodes += u64::from(run.n_open());
}

fn count(ranges: &[InputRange]) -> u64 {
    ranges.iter().map(|range| u64::from(range.count)).sum()
}

fn derive_depths(run: &mut Run) {
    let mut depths: Vec<u32> = Vec::with_capacity(run.cores.len());
    for node in 0..run.len() {
        let parent = run.core(node).parent;
        let depth = if parent == NONE {
            0
        } else {
            depths[parent as usize] + 1
        };
        depths.push(depth);
        if run.core(node).is_open() {
            run.open_mut(node).depth = depth;
        }
    }
}

/// A child of a node whose body has not ended was flushed.
fn derive_flushed(run: &mut Run, world: &World, draft: &Draft, node: u32) {
    let parent = run.core(node).parent;
    if parent == NONE {
        return;
    }
    let above = run.core(parent);
    if above.body != Body::Plain || !above.is_open() {
        return;
    }
    let likeness = child_likeness(
        world.specs.likeness(run.core(node).spec),
        draft.inputs(node).iter().copied(),
    );
    let child = Flushed { node, likeness };
    run.flushed.entry(parent).or_default().push(child);
}

/// Puts a node where it is to be found: a lane, a timer, a session, a watch.
fn place(run: &mut Run, world: &mut World, node: u32) {
    let core = *run.core(node);
    if core.is_follower() {
        let end = run.find(node);
        if run.core(end).is_open() {
            watch(run, world, end, node);
        }
        return;
    }
    let key = run.key(node);
    match core.stage {
        Stage::Leased => {
            let session = run.open(node).session;
            world.open_lease(key, session);
            let timeout = world.resolved(core.spec).and_then(|spec| spec.timeout_ms);
            if let Some(ms) = timeout {
                let at = world.now.after_ms(ms).after_ms(world.settings.lease_ms);
                world.timers.set_timeout(key, at);
            }
        }
        Stage::Open | Stage::Backoff => {
            let open = run.open(node);
            if open.remaining == 0 && open.doom == NONE && !delay(run, world, node) {
                run.cores[node as usize].ready = true;
                world
                    .lanes
                    .insert(core.spec, run.seq, node, node + 1, world.now);
            }
        }
        _ => {}
    }
    debug_assert!(
        run.state(node) != NodeState::Settling || run.open(node).remaining > 0 || {
            run.open(node).doom != NONE
        },
        "I5 a structure that settles waits for something"
    );
}
