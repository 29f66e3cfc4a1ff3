//! Recomputes everything that is derived and compares (INVARIANTS §4); and prints all state as text, so that tests can compare a
//! broker with its rebuild.
//!
//! Both are linear in everything resident: for tests and soaks.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;

use super::Broker;
use super::run::{Body, NONE, Run, Stage};
use super::types::{NodeKey, NodeState, Progress, RunSeq, SessionId, Timestamp, WallTime};

/// What the runs imply for the world.
#[derive(Default)]
struct Implied {
    ready: BTreeMap<u32, BTreeSet<(RunSeq, u32)>>,
    leases: BTreeSet<(SessionId, NodeKey)>,
    wake: BTreeSet<(Timestamp, NodeKey)>,
    wake_wall: BTreeSet<(WallTime, NodeKey)>,
    doomed: BTreeSet<NodeKey>,
    open_nodes: u64,
}

impl Broker {
    /// Panics if an invariant does not hold.
    pub fn check_invariants(&self) {
        let world = &self.world;
        let mut implied = Implied::default();
        for run in self.runs.values().filter(|run| !run.has_ended()) {
            check_run(run);
            imply(self, run, &mut implied);
        }
        assert!(
            world.unvisited.is_empty(),
            "cascades end with their handler"
        );
        assert!(world.ended.is_empty(), "ended runs are dropped");
        assert_eq!(implied.open_nodes, world.open_nodes, "I10 open nodes");
        assert_eq!(implied.doomed, world.doomed, "I18 doomed nodes");
        assert_eq!(implied.wake, world.timers.wake, "I18 timers");
        assert_eq!(
            implied.wake_wall, world.timers.wake_wall,
            "I18 timers by the calendar"
        );
        self.check_lanes(&implied);
        self.check_sessions(&implied);
        world.keys.check();
        world.outboxes.check();
    }

    fn check_lanes(&self, implied: &Implied) {
        let world = &self.world;
        let mut n_ready = 0;
        for (id, lane) in world.lanes.iter() {
            let held: BTreeSet<(RunSeq, u32)> = lane
                .intervals()
                .flat_map(|(run, start, end)| (start..end).map(move |node| (run, node)))
                .collect();
            let wanted = implied.ready.get(&id).cloned().unwrap_or_default();
            assert_eq!(
                held, wanted,
                "I7 lane {id} holds the ready nodes of its spec"
            );
            assert_eq!(held.len() as u64, lane.count, "I7 count of lane {id}");
            n_ready += lane.count;
            let spec = world.resolved(id);
            assert_eq!(
                lane.runs_by,
                world.resolve(id),
                "lane {id} runs by its spec"
            );
            let servers = world
                .workers
                .sessions
                .values()
                .filter(|session| {
                    let serves = spec.is_some_and(|spec| session.serves(spec));
                    assert_eq!(serves, session.serves_lane(id), "I18 served lanes");
                    serves
                })
                .count();
            assert_eq!(servers, lane.servers as usize, "I18 servers of lane {id}");
            assert_eq!(
                lane.count > 0 && lane.servers > 0,
                world.lanes.active.contains(&id),
                "I18 active lanes"
            );
            // I22: what is due and wanted by nobody has no timer, what is not yet due has one.
            let later = lane
                .due_at()
                .filter(|at| *at > world.now && !lane.is_due(world.now));
            if let Some(at) = later {
                let next = world.lanes.next_deadline();
                assert!(
                    next.is_some_and(|next| next <= at),
                    "I22 a bundle is woken for"
                );
            }
        }
        assert_eq!(n_ready, world.lanes.n_ready, "I7 ready nodes in all");
    }

    fn check_sessions(&self, implied: &Implied) {
        let world = &self.world;
        let mut held = BTreeSet::new();
        for (id, session) in &world.workers.sessions {
            held.extend(session.leases.iter().map(|key| (*id, *key)));
            assert!(
                session.attached || !session.leases.is_empty(),
                "a detached session that holds nothing is forgotten"
            );
            assert_eq!(
                session.attached && session.credit > 0,
                world.workers.idle.contains(id),
                "I18 idle sessions"
            );
        }
        assert_eq!(held, implied.leases, "I4 leased iff an open lease exists");
        assert_eq!(held.len(), world.workers.n_leases, "I4 leases in all");
        let leased: BTreeSet<NodeKey> = held.iter().map(|(_, key)| *key).collect();
        assert_eq!(leased.len(), held.len(), "I4 one open lease per node");
        for key in world.timers.timed() {
            assert!(leased.contains(&key), "I18 timeouts are of leased nodes");
        }
    }

    /// Canonical text of all durable and derived state except lease deadlines and connections: equal for a broker and its rebuild.
    pub fn fingerprint(&self) -> String {
        let world = &self.world;
        let mut out = String::new();
        let mut line = |text: std::fmt::Arguments| {
            // Writing to a String cannot fail.
            let _ = out.write_fmt(text);
            out.push('\n');
        };
        line(format_args!(
            "now {} next run {}",
            world.now.0, world.next_run
        ));
        for id in 0..world.specs.len() {
            line(format_args!("spec {id} {:?}", world.specs.of(id)));
        }
        for (id, name) in world.names.iter() {
            line(format_args!("name {} {name:?}", id.0));
        }
        for (action, spec) in &world.announced {
            line(format_args!("announced {action:?} {}", spec.0));
        }
        for run in self.runs.values().filter(|run| !run.has_ended()) {
            line(format_args!("run {:x} {:?}", run.seq.0, run.record));
            line(format_args!(
                "  events {} edges {} nodes {}",
                run.n_events,
                run.n_edges,
                run.len()
            ));
            for node in 0..run.len() {
                line(format_args!("  {}", node_text(run, node)));
            }
            line(format_args!("  flushed {:?}", run.flushed));
        }
        for (key, entry) in world.keys.iter() {
            line(format_args!("key {:x} {entry:?}", key.0));
        }
        line(format_args!("{:?}", world.inbox));
        for (id, outbox) in world.outboxes.iter() {
            line(format_args!("outbox {} {outbox:?}", id.0));
        }
        line(format_args!(
            "open {} leases {} doomed {:?}",
            world.open_nodes, world.workers.n_leases, world.doomed
        ));
        out
    }
}

fn node_text(run: &Run, node: u32) -> String {
    let core = run.core(node);
    if core.is_follower() {
        let end = run.representative(node);
        return format!(
            "{node} follows {end} {core:?}",
            core = (
                core.spec,
                core.parent,
                core.attempt,
                core.round,
                core.digest,
                core.note
            )
        );
    }
    let mut text = format!("{node} {:?} {:?}", run.state(node), run.node_record(node));
    if core.is_open() {
        let open = run.open(node);
        // Whether a date has come depends on the calendar, which is not stored.
        if open.not_before_wall != WallTime(0) {
            text = text.replacen("Ready", "Waiting", 1);
        }
        let mut edges = Vec::new();
        run.visit_edges(node, |to, kind| {
            // Edges to nodes that were skipped meanwhile lead nowhere; a rebuild does not make them.
            if !run.core(to).stage.is_terminal() {
                edges.push(format!("{to}{kind:?}"));
            }
        });
        edges.sort_unstable();
        let _ = write!(
            text,
            " remaining {} depth {} followers {} doomed {} dependents {}",
            open.remaining,
            open.depth,
            open.followers,
            open.doom != NONE,
            edges.join(" ")
        );
    }
    text
}

/// A run by itself.
fn check_run(run: &Run) {
    let mut remaining: BTreeMap<u32, u32> = BTreeMap::new();
    let mut followers: BTreeMap<u32, u32> = BTreeMap::new();
    for node in 0..run.len() {
        let core = run.core(node);
        assert!(
            core.parent == NONE || core.parent < node,
            "I9 parents exist"
        );
        assert!(
            core.stage != Stage::Leased || core.attempt > 0,
            "I3 attempts count leases"
        );
        if core.is_follower() {
            *followers.entry(run.representative(node)).or_default() += 1;
        }
        if core.is_open() {
            run.visit_edges(node, |to, _| {
                assert!(to < run.len(), "I9 every edge end exists");
                if run.core(to).is_open() {
                    *remaining.entry(to).or_default() += 1;
                }
            });
        }
        assert!(
            core.body != Body::Tail || core.is_follower(),
            "a tail call is followed"
        );
    }
    for node in (0..run.len()).filter(|node| run.core(*node).is_open()) {
        let open = run.open(node);
        let core = run.core(node);
        let counted = remaining.get(&node).copied().unwrap_or(0);
        assert_eq!(
            open.remaining, counted,
            "I5 inputs of node {node} recounted"
        );
        let follow = followers.get(&node).copied().unwrap_or(0);
        assert_eq!(open.followers, follow, "followers of node {node}");
        if core.stage == Stage::Leased {
            assert_eq!(
                open.remaining, 0,
                "G4 node {node} was leased with all its inputs"
            );
        }
        if core.stage == Stage::Settling {
            assert!(
                open.remaining > 0 || open.doom != NONE,
                "G7a node {node} settles as soon as it can"
            );
        }
    }
    assert_eq!(run.counts, run.counted(), "I10 counters equal a recount");
    assert!(
        run.n_open() > 0,
        "I10 a run is terminal iff all its nodes are"
    );
    assert!(
        run.n_events >= u64::from(run.len()),
        "I11 every node has an event"
    );
}

/// What an open run implies for the world (I6).
fn imply(broker: &Broker, run: &Run, implied: &mut Implied) {
    let world = &broker.world;
    implied.open_nodes += u64::from(run.n_open());
    for node in (0..run.len()).filter(|node| run.core(*node).is_open()) {
        let key = run.key(node);
        let open = run.open(node);
        let core = run.core(node);
        if let Progress::Leased { session } = run.node_record(node).progress {
            implied.leases.insert((session, key));
        }
        if open.doom != NONE {
            implied.doomed.insert(key);
            assert!(!core.ready, "I6 a doomed node is not ready");
            continue;
        }
        let waits = matches!(core.stage, Stage::Open | Stage::Backoff) && open.remaining == 0;
        if core.ready {
            assert!(waits, "I6 a ready node has its inputs and is not leased");
            assert_eq!(run.state(node), NodeState::Ready, "I6 it reads as ready");
            assert!(open.not_before <= world.now, "I6 its time has come");
            let lane = implied.ready.entry(core.spec).or_default();
            lane.insert((run.seq, node));
        } else if waits {
            if open.not_before > world.now {
                implied.wake.insert((open.not_before, key));
            } else {
                assert!(
                    open.not_before_wall > world.wall,
                    "I6 a node that may run is ready"
                );
                implied.wake_wall.insert((open.not_before_wall, key));
            }
        }
    }
}
