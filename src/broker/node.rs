//! Creating nodes: checking a list of new nodes, numbering it, and connecting it to what it waits for.
//!
//! An input may only be an earlier node of the same list, a child that the same node has created already, or a node that has
//! succeeded. So graphs are acyclic by construction (I9). Failed or skipped nodes of others are refused although they have ended:
//! resuming opens them again, and one that waits for the new node's parent would then close a cycle.

use std::sync::Arc;

use xxhash_rust::xxh3::Xxh3;

use super::World;
use super::cascade::{connect, delay};
use super::command::{Code, Delay, NewInput, NewNode, NodeRef, Rejection};
use super::outcome::{CreatedNode, Fact, Tx};
use super::run::{EdgeKind, NONE, Run};
use super::spec::{check_spec, likeness};
use super::types::{
    Body, InputRange, InputUse, NodeIndex, NodeState, Payload, Spec, SpecId, Timestamp, WallTime,
};

/// To whom new nodes are added.
#[derive(Clone, Copy)]
pub(super) struct Family<'a> {
    pub run: &'a Run,
    pub parent: u32,
}

/// Checks a list of new nodes before anything is written.
pub(super) fn check_nodes(
    world: &World,
    specs: &[Arc<Spec>],
    nodes: &[NewNode],
    family: Option<Family>,
) -> Result<(), Rejection> {
    if nodes.is_empty() {
        return Ok(());
    }
    let settings = &world.settings;
    let known = family.map_or(0, |family| u64::from(family.run.len()));
    let total = known + nodes.len() as u64;
    if total > u64::from(settings.max_nodes_per_run) {
        return Err(too_large(
            "nodes in the run",
            total,
            settings.max_nodes_per_run.into(),
        ));
    }
    if let Some(family) = family {
        let depth = u64::from(family.run.open(family.parent).depth) + 1;
        if depth > u64::from(settings.max_depth) {
            return Err(too_large(
                "generations of children",
                depth,
                settings.max_depth.into(),
            ));
        }
    }
    for spec in specs {
        check_spec(spec)?;
    }
    let mut edges = family.map_or(0, |family| family.run.n_edges);
    for (at, node) in nodes.iter().enumerate() {
        if node.spec as usize >= specs.len() {
            return Err(Rejection::new(
                Code::InvalidRequest,
                format!(
                    "node {at} names spec {} of {}: send it along",
                    node.spec,
                    specs.len()
                ),
            ));
        }
        check_payload(&node.arguments)?;
        edges += check_ranges(world, &node.inputs, family, at as u32, nodes.len() as u32)?;
        // Here and not at the end: looking at existing inputs takes time for each of them.
        if edges > settings.max_edges_per_run {
            return Err(too_large(
                "edges in the run",
                edges,
                settings.max_edges_per_run,
            ));
        }
    }
    Ok(())
}

/// Checks the inputs of one node (or the references of a structure): new ones must lie before position `before` of a list of
/// `listed`. Returns how many nodes they are.
pub(super) fn check_ranges(
    world: &World,
    ranges: &[NewInput],
    family: Option<Family>,
    before: u32,
    listed: u32,
) -> Result<u64, Rejection> {
    let mut n = 0;
    for range in ranges {
        n += u64::from(range.count);
        if n > u64::from(world.settings.max_inputs) {
            return Err(too_large(
                "inputs of a node",
                n,
                world.settings.max_inputs.into(),
            ));
        }
        check_range(range, family, before, listed)?;
    }
    Ok(n)
}

fn check_range(
    range: &NewInput,
    family: Option<Family>,
    before: u32,
    listed: u32,
) -> Result<(), Rejection> {
    if range.count == 0 {
        return Err(Rejection::new(
            Code::InvalidRequest,
            "an input range is empty: leave it out",
        ));
    }
    match range.first {
        NodeRef::New(first) => {
            let end = u64::from(first) + u64::from(range.count);
            if end > u64::from(listed) {
                return Err(Rejection::new(
                    Code::UnknownNode,
                    format!("new node {} of {listed} does not exist", end - 1),
                ));
            }
            if end > u64::from(before) {
                return Err(Rejection::new(
                    Code::GraphCycle,
                    format!(
                        "new node {before} waits for {}: inputs must come before their node",
                        end - 1
                    ),
                ));
            }
        }
        NodeRef::Existing(NodeIndex(first)) => {
            let end = u64::from(first) + u64::from(range.count);
            let Some(family) = family.filter(|family| end <= u64::from(family.run.len())) else {
                return Err(Rejection::new(
                    Code::UnknownNode,
                    format!("node {} of the run does not exist", end - 1),
                ));
            };
            let run = family.run;
            for node in first..first + range.count {
                let settled = run.state(node) == NodeState::Succeeded;
                if run.core(node).parent != family.parent && !settled {
                    return Err(Rejection::new(
                        Code::GraphCycle,
                        format!(
                            "node {node} has no value and is no child of node {}: wait for own children or for values",
                            family.parent
                        ),
                    ));
                }
            }
        }
    }
    Ok(())
}

/// What is larger must have been stored by the edge; a safety net.
pub(super) fn check_payload(payload: &Payload) -> Result<(), Rejection> {
    match &payload.body {
        Body::Inline(bytes) if bytes.len() > Body::INLINE_BYTES => Err(Rejection::new(
            Code::PayloadTooLarge,
            format!(
                "an inline payload has {} bytes, at most {} may be inline: store it first",
                bytes.len(),
                Body::INLINE_BYTES
            ),
        )),
        _ => Ok(()),
    }
}

pub(super) fn too_large(what: &str, asked: u64, limit: u64) -> Rejection {
    Rejection::new(
        Code::GraphTooLarge,
        format!("{what}: {asked}, the limit is {limit}: split the work or flush children earlier"),
    )
}

/// Numbers of a range, when the first node of the list gets number `base`. Of a list that is only compared with what exists, the
/// ranges may not have been checked: hence no overflow.
pub(super) fn resolve(range: &NewInput, base: u32) -> InputRange {
    InputRange {
        first: match range.first {
            NodeRef::New(first) => NodeIndex(base.wrapping_add(first)),
            NodeRef::Existing(first) => first,
        },
        count: range.count,
        mode: range.mode,
    }
}

/// Creates checked nodes; returns the number of the first.
pub(super) fn create_nodes(
    run: &mut Run,
    world: &mut World,
    tx: &mut Tx,
    parent: Option<u32>,
    specs: &[Arc<Spec>],
    nodes: Vec<NewNode>,
) -> u32 {
    let base = run.len();
    if nodes.is_empty() {
        return base;
    }
    let mut ids: Vec<Option<SpecId>> = vec![None; specs.len()];
    let mut created = Vec::with_capacity(nodes.len());
    for node in nodes {
        let at = node.spec as usize;
        let spec = match ids[at] {
            Some(id) => id,
            None => *ids[at].insert(world.intern(tx, &specs[at])),
        };
        let (not_before, not_before_wall) = match node.delay {
            Delay::For(ms) if ms > 0 => (world.now.after_ms(ms), WallTime(0)),
            Delay::Until(date) => (Timestamp(0), date),
            Delay::None | Delay::For(_) => (Timestamp(0), WallTime(0)),
        };
        created.push(CreatedNode {
            spec,
            arguments: node.arguments,
            inputs: node
                .inputs
                .iter()
                .map(|range| resolve(range, base))
                .collect(),
            not_before,
            not_before_wall,
        });
    }
    let depth = parent.map_or(0, |parent| run.open(parent).depth + 1);
    let event = run.n_events + 1;
    let round = run.record.round;
    let parent = parent.map(NodeIndex);
    run.absorb_nodes(NodeIndex(base), parent, round, event, &created);
    let n = created.len() as u32;
    run.counts[NodeState::Waiting as usize] += n;
    world.open_nodes += u64::from(n);

    // Neighbours of one spec that are ready at once enter their lane as one interval.
    let mut ready = Interval::default();
    for (node, new) in (base..).zip(&created) {
        run.open_mut(node).depth = depth;
        let edges: u64 = new.inputs.iter().map(|range| u64::from(range.count)).sum();
        run.n_edges += edges;
        run.reserve_edges(edges as usize);
        for range in &new.inputs {
            connect(run, world, node, *range, EdgeKind::of(range.mode));
        }
        let open = run.open(node);
        if open.remaining > 0 || open.doom != NONE || delay(run, world, node) {
            continue;
        }
        if ready.end != node || ready.spec != new.spec.0 {
            ready.enter(run, world);
            ready = Interval {
                spec: new.spec.0,
                start: node,
                end: node,
            };
        }
        ready.end = node + 1;
    }
    ready.enter(run, world);
    tx.facts.push(Fact::Nodes {
        run: run.seq,
        first: NodeIndex(base),
        parent,
        round,
        event,
        nodes: created,
    });
    base
}

#[derive(Default)]
struct Interval {
    spec: u32,
    start: u32,
    end: u32,
}

impl Interval {
    fn enter(&self, run: &mut Run, world: &mut World) {
        if self.start == self.end {
            return;
        }
        for node in self.start..self.end {
            run.cores[node as usize].ready = true;
        }
        run.recount(NodeState::Waiting, NodeState::Ready, self.end - self.start);
        world
            .lanes
            .insert(self.spec, run.seq, self.start, self.end, world.now);
    }
}

/// Hash by which a child that is created again is recognised: its spec (but for the code's fingerprint) and its inputs. Its
/// arguments are not in memory, so they are not compared.
pub(super) fn child_likeness(spec_likeness: u64, inputs: impl Iterator<Item = InputRange>) -> u64 {
    let mut hash = Xxh3::with_seed(spec_likeness);
    for range in inputs {
        hash.update(&range.first.0.to_le_bytes());
        hash.update(&range.count.to_le_bytes());
        hash.update(&[match range.mode {
            InputUse::Value => 0,
            InputUse::Outcome => 1,
            InputUse::After => 2,
        }]);
    }
    hash.digest()
}

/// The same for children that have no numbers yet.
pub(super) fn new_child_likeness(specs: &[Arc<Spec>], node: &NewNode, base: u32) -> u64 {
    child_likeness(
        likeness(&specs[node.spec as usize]),
        node.inputs.iter().map(|range| resolve(range, base)),
    )
}
