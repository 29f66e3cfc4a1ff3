//! A resident run: its nodes, its edges and what is counted about them.
//!
//! Nodes are two dense vectors: 32 bytes for every node, and a slot of 56 bytes for those that are still open. Edges are linked
//! lists of 8 bytes from a node to those that wait for it. A node that ended with a tail call is a *follower*: it holds no slot,
//! its dependents have moved to the node it follows, and its state is that node's state (union-find, followed without recursion).
//!
//! Base state changes only through the `absorb_*` functions, which a restart uses as well, so that a fact and the memory cannot
//! differ. Everything else (remaining inputs, edges, counts, flags) is derived and kept up to date by the handlers.
//!
//! Knows nothing of lanes, sessions and timers: those are the [`World`](super::World)'s.

use std::collections::BTreeMap;

use super::outcome::{CreatedNode, Fact, Tx};
use super::types::{
    Attempt, BodyEnd, InputRange, InputUse, NodeIndex, NodeKey, NodeRecord, NodeState, Note,
    Progress, RunId, RunRecord, RunSeq, SessionId, SpecId, Timestamp, WallTime,
};

/// No node, no slot.
pub(super) const NONE: u32 = u32::MAX;
/// No edge (edges have 30 bits).
const END: u32 = (1 << 30) - 1;

/// [`Progress`] without what it holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Stage {
    Open,
    Leased,
    Backoff,
    Settling,
    Succeeded,
    Failed,
    Skipped,
}

/// [`BodyEnd`] without what it holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Body {
    Plain,
    Structure,
    Tail,
}

/// What every resident node has.
#[derive(Debug, Clone, Copy)]
pub(super) struct NodeCore {
    pub digest: u64,
    pub spec: u32,
    pub parent: u32,
    pub attempt: u32,
    pub round: u32,
    /// Open: its slot. Follower: the node it follows. Failed or skipped: the node to blame, if it is another one.
    link: u32,
    pub stage: Stage,
    pub body: Body,
    pub note: Note,
    /// It is in a lane.
    pub ready: bool,
}

/// What a node has beyond [`NodeCore`] while it is open.
#[derive(Debug, Clone, Copy)]
pub(super) struct OpenNode {
    pub not_before: Timestamp,
    pub not_before_wall: WallTime,
    /// Who holds it; only means something while it is leased.
    pub session: SessionId,
    /// Inputs (or references, while it settles) that are not terminal yet (I5).
    pub remaining: u32,
    /// Its dependents: first and last edge.
    head: u32,
    tail: u32,
    pub failures: u32,
    pub losses: u32,
    /// Generation: 0 for nodes of the submission.
    pub depth: u32,
    /// How many nodes follow it by tail calls.
    pub followers: u32,
    /// It is going to be skipped (or fail by reference) because of that node; `NONE` when it is not.
    pub doom: u32,
}

/// From a node to one that waits for it.
#[derive(Debug, Clone, Copy)]
struct Edge {
    to: u32,
    /// Next edge in the low 30 bits, [`EdgeKind`] above.
    next_kind: u32,
}

/// What an edge is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum EdgeKind {
    Value,
    Outcome,
    After,
    /// From a node to a structure that refers to it. Edges to followers only watch: the follower is a root or owes a delivery.
    Reference,
}

/// Inputs and references as the store has them: needed to derive a run, not kept while it runs.
#[derive(Debug, Default)]
pub(super) struct Draft {
    ranges: Vec<InputRange>,
    /// Per node: where its inputs lie in `ranges`.
    inputs: Vec<(u32, u32)>,
    pub references: BTreeMap<u32, Vec<InputRange>>,
    /// Why the facts do not fit together, if they do not.
    pub damage: Option<String>,
}

/// A child that was created before its parent's attempt ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Flushed {
    pub node: u32,
    /// Hash of its spec (but for the code's fingerprint) and inputs: a repetition must agree.
    pub likeness: u64,
}

/// A resident run.
#[derive(Debug)]
pub(super) struct Run {
    pub seq: RunSeq,
    pub record: RunRecord,
    pub cores: Vec<NodeCore>,
    slots: Vec<OpenNode>,
    /// First free slot; the next ones are linked through `head`.
    free_slot: u32,
    edges: Vec<Edge>,
    free_edge: u32,
    /// Number of the latest event (G8).
    pub n_events: u64,
    /// Inputs of all its nodes, ever.
    pub n_edges: u64,
    /// Nodes by [`NodeState`]; those of a cancelled run count as cancelled.
    pub counts: [u32; N_STATES],
    /// Per node whose body has not ended: the children it has already.
    pub flushed: BTreeMap<u32, Vec<Flushed>>,
    pub draft: Option<Box<Draft>>,
}

pub(super) const N_STATES: usize = 9;
pub(super) const STATES: [NodeState; N_STATES] = [
    NodeState::Waiting,
    NodeState::Ready,
    NodeState::Leased,
    NodeState::Backoff,
    NodeState::Settling,
    NodeState::Succeeded,
    NodeState::Failed,
    NodeState::Cancelled,
    NodeState::Skipped,
];

impl EdgeKind {
    fn from_bits(bits: u32) -> Self {
        match bits {
            0 => Self::Value,
            1 => Self::Outcome,
            2 => Self::After,
            _ => Self::Reference,
        }
    }

    pub(super) fn of(mode: InputUse) -> Self {
        match mode {
            InputUse::Value => Self::Value,
            InputUse::Outcome => Self::Outcome,
            InputUse::After => Self::After,
        }
    }

    /// Whether an input that did not succeed counts as satisfied.
    pub(super) fn accepts_failure(self) -> bool {
        self == Self::Outcome
    }
}

impl Stage {
    pub(super) fn is_terminal(self) -> bool {
        matches!(self, Self::Succeeded | Self::Failed | Self::Skipped)
    }
}

impl NodeCore {
    pub(super) fn is_follower(&self) -> bool {
        self.stage == Stage::Settling && self.body == Body::Tail
    }

    /// Whether it has a slot.
    pub(super) fn is_open(&self) -> bool {
        !self.stage.is_terminal() && !self.is_follower()
    }
}

fn index(node: Option<NodeIndex>) -> u32 {
    node.map_or(NONE, |node| node.0)
}

fn maybe(node: u32) -> Option<NodeIndex> {
    (node != NONE).then_some(NodeIndex(node))
}

impl Draft {
    fn add(&mut self, first: usize, nodes: &[CreatedNode]) {
        if self.inputs.len() < first + nodes.len() {
            self.inputs.resize(first + nodes.len(), (0, 0));
        }
        for (i, node) in nodes.iter().enumerate() {
            let start = self.ranges.len() as u32;
            self.ranges.extend_from_slice(&node.inputs);
            self.inputs[first + i] = (start, node.inputs.len() as u32);
        }
    }

    pub(super) fn inputs(&self, node: u32) -> &[InputRange] {
        let (start, n) = self.inputs[node as usize];
        &self.ranges[start as usize..(start + n) as usize]
    }
}

impl Run {
    pub(super) fn new(seq: RunSeq, record: RunRecord) -> Self {
        Self {
            seq,
            n_events: record.n_events,
            record,
            cores: Vec::new(),
            slots: Vec::new(),
            free_slot: NONE,
            edges: Vec::new(),
            free_edge: END,
            n_edges: 0,
            counts: [0; N_STATES],
            flushed: BTreeMap::new(),
            draft: None,
        }
    }

    pub(super) fn id(&self) -> RunId {
        RunId {
            seq: self.seq,
            salt: self.record.salt,
        }
    }

    pub(super) fn key(&self, node: u32) -> NodeKey {
        NodeKey::new(self.seq, NodeIndex(node))
    }

    pub(super) fn len(&self) -> u32 {
        self.cores.len() as u32
    }

    pub(super) fn core(&self, node: u32) -> &NodeCore {
        &self.cores[node as usize]
    }

    /// The slot of an open node.
    pub(super) fn open(&self, node: u32) -> &OpenNode {
        let core = &self.cores[node as usize];
        debug_assert!(core.is_open(), "only open nodes have a slot");
        &self.slots[core.link as usize]
    }

    /// The slot of an open node.
    pub(super) fn open_mut(&mut self, node: u32) -> &mut OpenNode {
        let core = &self.cores[node as usize];
        debug_assert!(core.is_open(), "only open nodes have a slot");
        &mut self.slots[core.link as usize]
    }

    pub(super) fn has_ended(&self) -> bool {
        self.record.ended.is_some()
    }

    /// Nodes that are not terminal.
    pub(super) fn n_open(&self) -> u32 {
        STATES
            .iter()
            .filter(|state| !state.is_terminal())
            .map(|state| self.counts[*state as usize])
            .sum()
    }

    // ---- base state: what facts say --------------------------------------------------------------------------------

    pub(super) fn absorb_run(&mut self, record: &RunRecord) {
        self.n_events = self.n_events.max(record.n_events);
        self.record = record.clone();
    }

    /// Creates the nodes of a fact (or creates them anew: facts may be repeated). A gap is damage of the store.
    pub(super) fn absorb_nodes(
        &mut self,
        first: NodeIndex,
        parent: Option<NodeIndex>,
        round: u32,
        event: u64,
        nodes: &[CreatedNode],
    ) {
        let base = first.0 as usize;
        if base > self.cores.len() {
            self.damage(|| format!("nodes from {} on follow no node", first.0));
            return;
        }
        self.n_events = self
            .n_events
            .max(event.saturating_add(nodes.len() as u64).saturating_sub(1));
        if nodes.len() > self.cores.len() / 4 {
            // A big list is most of the run: no room for growth, memory per node is what is promised.
            let extra = (base + nodes.len()).saturating_sub(self.cores.len());
            self.cores.reserve_exact(extra);
            self.slots.reserve_exact(extra);
        }
        for (i, node) in nodes.iter().enumerate() {
            let at = base + i;
            if at < self.cores.len() && self.cores[at].is_open() {
                let slot = self.cores[at].link;
                self.free(slot);
            }
            let slot = self.take_slot();
            let open = &mut self.slots[slot as usize];
            open.not_before = node.not_before;
            open.not_before_wall = node.not_before_wall;
            let core = NodeCore {
                digest: 0,
                spec: node.spec.0,
                parent: index(parent),
                attempt: 0,
                round,
                link: slot,
                stage: Stage::Open,
                body: Body::Plain,
                note: Note::None,
                ready: false,
            };
            if at < self.cores.len() {
                self.cores[at] = core;
            } else {
                self.cores.push(core);
            }
        }
        if let Some(draft) = &mut self.draft {
            draft.add(base, nodes);
        }
    }

    pub(super) fn absorb_node(&mut self, node: NodeIndex, event: u64, record: &NodeRecord) {
        self.n_events = self.n_events.max(event);
        let Some(core) = self.cores.get_mut(node.0 as usize) else {
            self.damage(|| format!("node {} was never created", node.0));
            return;
        };
        let slot = core.is_open().then_some(core.link);
        core.digest = record.digest;
        core.spec = record.spec.0;
        core.parent = index(record.parent);
        core.attempt = record.attempt.0;
        core.round = record.round;
        core.note = record.note;
        let mut session = SessionId(0);
        core.stage = match record.progress {
            Progress::Open => Stage::Open,
            Progress::Leased { session: holder } => {
                session = holder;
                Stage::Leased
            }
            Progress::Backoff => Stage::Backoff,
            Progress::Settling => Stage::Settling,
            Progress::Succeeded => Stage::Succeeded,
            Progress::Failed => Stage::Failed,
            Progress::Skipped => Stage::Skipped,
        };
        core.body = match record.body {
            BodyEnd::Plain => Body::Plain,
            BodyEnd::Structure => Body::Structure,
            BodyEnd::Tail(_) => Body::Tail,
        };
        if core.is_open() {
            let slot = slot.unwrap_or_else(|| self.take_slot());
            self.cores[node.0 as usize].link = slot;
            let open = &mut self.slots[slot as usize];
            open.not_before = record.not_before;
            open.not_before_wall = record.not_before_wall;
            open.failures = record.failures;
            open.losses = record.losses;
            open.session = session;
            return;
        }
        core.ready = false;
        core.link = match record.body {
            BodyEnd::Tail(target) if core.is_follower() => target.0,
            _ => index(record.cause),
        };
        if let Some(slot) = slot {
            self.free(slot);
        }
    }

    fn damage(&mut self, detail: impl FnOnce() -> String) {
        if let Some(draft) = &mut self.draft {
            draft.damage.get_or_insert_with(detail);
        } else {
            debug_assert!(false, "I9 every node was created: {}", detail());
        }
    }

    /// A node as facts say it. Not for followers: their target may have been shortened.
    pub(super) fn node_record(&self, node: u32) -> NodeRecord {
        let core = self.core(node);
        debug_assert!(
            !core.is_follower(),
            "the record of a follower never changes"
        );
        let open = core.is_open().then(|| self.open(node));
        NodeRecord {
            spec: SpecId(core.spec),
            parent: maybe(core.parent),
            round: core.round,
            progress: match core.stage {
                Stage::Open => Progress::Open,
                Stage::Leased => Progress::Leased {
                    session: open.map_or(SessionId(0), |open| open.session),
                },
                Stage::Backoff => Progress::Backoff,
                Stage::Settling => Progress::Settling,
                Stage::Succeeded => Progress::Succeeded,
                Stage::Failed => Progress::Failed,
                Stage::Skipped => Progress::Skipped,
            },
            body: match core.body {
                Body::Structure => BodyEnd::Structure,
                Body::Plain | Body::Tail => BodyEnd::Plain,
            },
            attempt: Attempt(core.attempt),
            failures: open.map_or(0, |open| open.failures),
            losses: open.map_or(0, |open| open.losses),
            not_before: open.map_or(Timestamp(0), |open| open.not_before),
            not_before_wall: open.map_or(WallTime(0), |open| open.not_before_wall),
            digest: core.digest,
            cause: self.cause(node),
            note: core.note,
        }
    }

    /// Changes a node: the fact, and by the same fact the memory.
    pub(super) fn write(&mut self, tx: &mut Tx, node: u32, record: NodeRecord) {
        let event = self.n_events + 1;
        self.absorb_node(NodeIndex(node), event, &record);
        tx.facts.push(Fact::Node {
            node: self.key(node),
            event,
            record,
        });
    }

    /// Changes the run: the fact, and by the same fact the memory.
    pub(super) fn write_run(&mut self, tx: &mut Tx, mut record: RunRecord) {
        record.n_nodes = self.len();
        record.n_events = self.n_events;
        self.absorb_run(&record);
        tx.facts.push(Fact::Run {
            run: self.seq,
            record,
        });
    }

    // ---- states ----------------------------------------------------------------------------------------------------

    /// The state as users see it.
    pub(super) fn state(&self, node: u32) -> NodeState {
        let core = self.core(self.representative(node));
        match core.stage {
            Stage::Succeeded => NodeState::Succeeded,
            Stage::Failed => NodeState::Failed,
            Stage::Skipped => NodeState::Skipped,
            _ if self.record.cancelled => NodeState::Cancelled,
            _ if self.core(node).is_follower() => NodeState::Settling,
            Stage::Leased => NodeState::Leased,
            Stage::Settling => NodeState::Settling,
            Stage::Open | Stage::Backoff if core.ready => NodeState::Ready,
            Stage::Backoff => NodeState::Backoff,
            Stage::Open => NodeState::Waiting,
        }
    }

    /// The node that has the value of `node`: the end of its chain of tail calls.
    pub(super) fn representative(&self, mut node: u32) -> u32 {
        while self.core(node).is_follower() {
            node = self.core(node).link;
        }
        node
    }

    /// The same, shortening the chain on the way.
    pub(super) fn find(&mut self, node: u32) -> u32 {
        let end = self.representative(node);
        let mut at = node;
        while at != end {
            let next = self.cores[at as usize].link;
            self.cores[at as usize].link = end;
            at = next;
        }
        end
    }

    /// Whether all chains of tail calls end at a node of the run. Shortens them.
    pub(super) fn chains_are_sound(&mut self) -> bool {
        for node in 0..self.len() {
            let mut at = node;
            let mut hops = 0;
            while self.core(at).is_follower() {
                at = self.core(at).link;
                hops += 1;
                if at >= self.len() || hops > self.len() {
                    return false;
                }
            }
            self.find(node);
        }
        true
    }

    /// The node to blame for a failed or skipped node, when it is another one.
    pub(super) fn cause(&self, node: u32) -> Option<NodeIndex> {
        let core = self.core(self.representative(node));
        if core.stage.is_terminal() {
            maybe(core.link)
        } else {
            None
        }
    }

    /// The node whose error explains why `node` did not succeed.
    pub(super) fn blame(&self, node: u32) -> u32 {
        let end = self.representative(node);
        self.cause(end).map_or(end, |cause| cause.0)
    }

    /// Counts `n` nodes over from one state to another; returns how many fewer are open.
    pub(super) fn recount(&mut self, from: NodeState, to: NodeState, n: u32) {
        self.counts[from as usize] -= n;
        self.counts[to as usize] += n;
    }

    /// Counts everything, from nothing.
    pub(super) fn counted(&self) -> [u32; N_STATES] {
        let mut counts = [0; N_STATES];
        for node in 0..self.len() {
            counts[self.state(node) as usize] += 1;
        }
        counts
    }

    // ---- slots and edges -------------------------------------------------------------------------------------------

    fn take_slot(&mut self) -> u32 {
        let fresh = OpenNode {
            not_before: Timestamp(0),
            not_before_wall: WallTime(0),
            session: SessionId(0),
            remaining: 0,
            head: END,
            tail: END,
            failures: 0,
            losses: 0,
            depth: 0,
            followers: 0,
            doom: NONE,
        };
        if self.free_slot == NONE {
            self.slots.push(fresh);
            return self.slots.len() as u32 - 1;
        }
        let slot = self.free_slot;
        self.free_slot = self.slots[slot as usize].head;
        self.slots[slot as usize] = fresh;
        slot
    }

    fn free(&mut self, slot: u32) {
        self.slots[slot as usize].head = self.free_slot;
        self.free_slot = slot;
    }

    /// Makes `to` a dependent of the open node `from`.
    pub(super) fn add_edge(&mut self, from: u32, to: u32, kind: EdgeKind) {
        let edge = Edge {
            to,
            next_kind: END | ((kind as u32) << 30),
        };
        let at = if self.free_edge == END {
            self.edges.push(edge);
            self.edges.len() as u32 - 1
        } else {
            let at = self.free_edge;
            self.free_edge = self.edges[at as usize].next_kind & END;
            self.edges[at as usize] = edge;
            at
        };
        self.append(from, at, at);
    }

    /// Room for that many more edges, without room for growth.
    pub(super) fn reserve_edges(&mut self, n: usize) {
        if n > self.edges.len() / 4 {
            self.edges.reserve_exact(n);
        }
    }

    /// Appends the list from `head` to `tail` to the dependents of the open node `from`, in O(1).
    pub(super) fn append(&mut self, from: u32, head: u32, tail: u32) {
        if head == END {
            return;
        }
        let open = self.open_mut(from);
        let last = open.tail;
        open.tail = tail;
        if last == END {
            open.head = head;
        } else {
            let edge = &mut self.edges[last as usize];
            edge.next_kind = (edge.next_kind & !END) | head;
        }
    }

    /// Takes the first edge off a list that belongs to no node any more: to whom, what for, and the rest of the list.
    pub(super) fn pop_edge(&mut self, head: u32) -> Option<(u32, EdgeKind, u32)> {
        if head == END {
            return None;
        }
        let edge = self.edges[head as usize];
        self.edges[head as usize].next_kind = self.free_edge;
        self.free_edge = head;
        Some((
            edge.to,
            EdgeKind::from_bits(edge.next_kind >> 30),
            edge.next_kind & END,
        ))
    }

    /// Visits the dependents of an open node.
    pub(super) fn visit_edges(&self, from: u32, mut visit: impl FnMut(u32, EdgeKind)) {
        let mut at = self.open(from).head;
        while at != END {
            let edge = self.edges[at as usize];
            visit(edge.to, EdgeKind::from_bits(edge.next_kind >> 30));
            at = edge.next_kind & END;
        }
    }

    /// Forgets everything that is derived, before it is derived anew.
    pub(super) fn forget_derived(&mut self) {
        self.edges.clear();
        self.free_edge = END;
        self.n_edges = 0;
        self.flushed.clear();
        for node in 0..self.cores.len() {
            self.cores[node].ready = false;
            if self.cores[node].is_open() {
                let open = &mut self.slots[self.cores[node].link as usize];
                (open.head, open.tail) = (END, END);
                (open.remaining, open.followers, open.doom) = (0, 0, NONE);
            }
        }
    }
}

impl OpenNode {
    /// Its dependents, as a list that can outlive the slot.
    pub(super) fn edges(&self) -> (u32, u32) {
        (self.head, self.tail)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What STATE §3 promises: at most 32 bytes finished, and at most 200 open with its edges and its place in a lane.
    #[test]
    fn nodes_are_small() {
        assert!(size_of::<NodeCore>() <= 32);
        assert!(size_of::<NodeCore>() + size_of::<OpenNode>() + 4 * size_of::<Edge>() <= 136);
        assert_eq!(size_of::<Edge>(), 8);
    }
}
