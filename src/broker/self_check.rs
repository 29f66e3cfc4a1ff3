//! Random commands against the broker; after each one every invariant holds, the rebuild from its facts equals it, and event numbers
//! have no gap. At the end, with workers present and faults over, every run ends (I22).
//!
//! Faults: commands repeated, late, forged or for what is gone; sessions that fall silent, detach, close, come back; restarts at
//! any command. The seed decides everything and is in every message. `SEED=7` runs one, `SEEDS=5000` that many.
//!
//! What is kept, and how, is not known here: a [`Witness`] may go along, is given the same commits, and is compared.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::command::*;
use super::fixtures::{Chance, payload, refusals, run_of, specs};
use super::outcome::*;
use super::types::*;
use super::{Broker, OutputRule, Restoring, Settings};

/// A store that goes along: it is given every commit, and is asked what it remembers.
pub(crate) trait Witness {
    /// What a turn has decided; never nothing.
    fn commit(&mut self, now: Timestamp, facts: &[Fact]);
    /// A body that says this, kept in whatever way.
    fn payload(&mut self, text: &str) -> Payload;
    /// What it has of a run, for adopting it; `None`: the list in memory will do.
    fn facts_of(&mut self, run: RunSeq) -> Option<Vec<Fact>>;
    /// The end of a step: a moment to be killed, to load and to be compared.
    fn compare(&mut self, live: &Live<'_>);
}

/// The broker that a [`Witness`] is compared with.
pub(crate) struct Live<'a> {
    settings: &'a Settings,
    fingerprint: &'a str,
    now: Timestamp,
    next_run: u64,
    /// For messages.
    pub(crate) seed: u64,
    /// For messages.
    pub(crate) command: u64,
    /// Everything has ended: the last comparison.
    pub(crate) is_last: bool,
}

impl Live<'_> {
    /// Rebuilds a broker from what `load` gives, which returns the number of the next run. It must be this one.
    pub(crate) fn assert_equal(&self, what: &str, load: impl FnOnce(&mut dyn FnMut(Fact)) -> u64) {
        let mut restoring = Restoring::new(self.settings.clone(), SECRET);
        let next_run = load(&mut |fact| restoring.absorb(fact));
        let here = format!("{what}, seed {}, command {}", self.seed, self.command);
        assert_eq!(next_run, self.next_run, "no number is given twice: {here}");
        let broker = restoring.finish(self.now, next_run).expect(&here);
        broker.check_invariants();
        assert_same(self.fingerprint, &broker.fingerprint(), &here);
    }
}

/// Names the first line that differs.
fn assert_same(mine: &str, other: &str, here: &str) {
    if mine != other {
        for (a, b) in mine.lines().zip(other.lines()) {
            assert_eq!(a, b, "live and rebuilt differ: {here}");
        }
        panic!("live and rebuilt differ in length: {here}");
    }
}

struct Play {
    broker: Broker,
    /// Gets the same commands, but ended runs are adopted when nobody asked for it: that must change nothing.
    twin: Broker,
    settings: Settings,
    facts: Vec<Fact>,
    events: BTreeMap<RunSeq, u64>,
    chance: Chance,
    now: u64,
    leases: Vec<Lease>,
    runs: Vec<RunId>,
    done: Vec<Command>,
    specs: Vec<Arc<Spec>>,
    seed: u64,
    commands: u64,
    refused: BTreeMap<&'static str, u64>,
    witness: Option<Box<dyn Witness>>,
}

const SECRET: [u8; 16] = [7; 16];

/// A key as it is hashed: its bits are spread.
fn key_hash(number: u64) -> KeyHash {
    KeyHash(u128::from(number + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15_f39c_c060_5ced_c835))
}

impl Play {
    fn new(seed: u64, witness: Option<Box<dyn Witness>>) -> Self {
        let settings = Settings {
            lease_ms: 300,
            detach_grace_ms: 50,
            dedup_window_ms: 2_000,
            slice: [1, 2, 5, 4_096][(seed % 4) as usize],
            outputs: vec![
                OutputRule {
                    name: "all".into(),
                    action: "*".into(),
                    succeeded: true,
                    failed: true,
                },
                OutputRule {
                    name: "bad".into(),
                    action: "p*".into(),
                    succeeded: false,
                    failed: true,
                },
            ],
            ..Settings::default()
        };
        Self {
            broker: Broker::new(settings.clone(), SECRET),
            twin: Broker::new(settings.clone(), SECRET),
            settings,
            facts: Vec::new(),
            events: BTreeMap::new(),
            chance: Chance(seed),
            now: 0,
            leases: Vec::new(),
            runs: Vec::new(),
            done: Vec::new(),
            specs: specs(),
            seed,
            commands: 0,
            refused: BTreeMap::new(),
            witness,
        }
    }

    fn payload(&mut self, text: &str) -> Payload {
        match &mut self.witness {
            Some(witness) => witness.payload(text),
            None => payload(text),
        }
    }

    fn turn(&mut self) -> Turn {
        Turn {
            now: Timestamp(self.now),
            wall: WallTime(1_000_000 + self.now),
            seed: self.chance.next(),
        }
    }

    fn apply(&mut self, command: Command) -> Reply {
        self.commands += 1;
        for seq in self.broker.needs(&command) {
            let facts = self.facts_of(seq);
            self.broker.adopt(seq, facts.clone()).unwrap();
            self.twin.adopt(seq, facts).unwrap();
        }
        if self.chance.below(3) == 0 {
            let seq = RunSeq(1 + self.chance.below(self.broker.world.next_run));
            let facts = self.facts_of(seq);
            self.twin.adopt(seq, facts).unwrap();
        }
        let turn = self.turn();
        let mut tx = Tx::default();
        let mut twin_tx = Tx::default();
        let reply = self.broker.apply(&mut tx, turn, command.clone());
        let twin_reply = self.twin.apply(&mut twin_tx, turn, command);
        assert_eq!(
            reply, twin_reply,
            "adopting changes no reply, seed {}",
            self.seed
        );
        assert_eq!(tx.facts, twin_tx.facts, "nor a fact, seed {}", self.seed);
        assert_eq!(
            tx.effects, twin_tx.effects,
            "nor an effect, seed {}",
            self.seed
        );
        for fact in &tx.facts {
            let (run, event, n) = match fact {
                Fact::Nodes {
                    run, event, nodes, ..
                } => (*run, *event, nodes.len() as u64),
                Fact::Node { node, event, .. } => (node.run, *event, 1),
                _ => continue,
            };
            let last = self.events.entry(run).or_insert(0);
            assert_eq!(*last + 1, event, "I11 no gap, seed {}", self.seed);
            *last += n;
        }
        if let Some(witness) = &mut self.witness
            && !tx.facts.is_empty()
        {
            witness.commit(turn.now, &tx.facts);
        }
        self.facts.append(&mut tx.facts);
        for effect in tx.effects {
            if let Effect::Lease(lease) = effect {
                self.leases.push(lease);
            }
        }
        for no in refusals(&reply) {
            *self.refused.entry(no.code.as_str()).or_default() += 1;
        }
        self.broker.check_invariants();
        reply
    }

    /// What the store would load of a run; nothing of a deleted one.
    fn facts_of(&mut self, seq: RunSeq) -> Vec<Fact> {
        let witness = self.witness.as_mut();
        if let Some(facts) = witness.and_then(|witness| witness.facts_of(seq)) {
            return facts;
        }
        let facts: Vec<Fact> = self
            .facts
            .iter()
            .filter(|fact| run_of(fact) == Some(seq))
            .cloned()
            .collect();
        let deleted = |fact: &Fact| matches!(fact, Fact::RunDeleted { .. });
        if facts.iter().any(deleted) {
            return Vec::new();
        }
        facts
    }

    fn rebuilt(&self) -> Broker {
        let mut restoring = Restoring::new(self.settings.clone(), SECRET);
        for fact in &self.facts {
            restoring.absorb(fact.clone());
        }
        let broker = restoring
            .finish(self.broker.world.now, self.broker.world.next_run)
            .unwrap();
        broker.check_invariants();
        broker
    }

    /// What a start reads: what sled has of open runs and the world, then the end of the log, part of which sled has already.
    fn reloaded(&mut self) -> Broker {
        let open: BTreeSet<RunSeq> = self.broker.runs.keys().copied().collect();
        let mut restoring = Restoring::new(self.settings.clone(), SECRET);
        for fact in &self.facts {
            if run_of(fact).is_none_or(|run| open.contains(&run)) {
                restoring.absorb(fact.clone());
            }
        }
        let from = self.chance.below(self.facts.len() as u64 + 1) as usize;
        for fact in &self.facts[from..] {
            restoring.absorb(fact.clone());
        }
        let next_run = self.broker.world.next_run;
        restoring.finish(self.broker.world.now, next_run).unwrap()
    }

    fn compare(&mut self, is_last: bool) {
        let (mine, other) = (self.broker.fingerprint(), self.rebuilt().fingerprint());
        let here = format!("seed {}, command {}", self.seed, self.commands);
        assert_same(&mine, &other, &here);
        if let Some(witness) = &mut self.witness {
            witness.compare(&Live {
                settings: &self.settings,
                fingerprint: &mine,
                now: self.broker.world.now,
                next_run: self.broker.world.next_run,
                seed: self.seed,
                command: self.commands,
                is_last,
            });
        }
        if self.chance.below(4) == 0 {
            let reloaded = self.reloaded();
            reloaded.check_invariants();
            assert_eq!(
                mine,
                reloaded.fingerprint(),
                "facts may be repeated, seed {}",
                self.seed
            );
        }
    }

    fn new_nodes(&mut self, n: u64, own: &[NodeIndex]) -> Vec<NewNode> {
        (0..n)
            .map(|at| {
                let mut inputs = Vec::new();
                for _ in 0..self.chance.below(3) {
                    let mode = [InputUse::Value, InputUse::Outcome, InputUse::After]
                        [self.chance.below(3) as usize];
                    if at > 0 && self.chance.below(3) > 0 {
                        let first = self.chance.below(at);
                        let count = 1 + self.chance.below(at - first);
                        inputs.push(NewInput {
                            first: NodeRef::New(first as u32),
                            count: count as u32,
                            mode,
                        });
                    } else if let Some(node) = self.chance.pick(own) {
                        inputs.push(NewInput {
                            first: NodeRef::Existing(*node),
                            count: 1,
                            mode,
                        });
                    }
                }
                let delay = match self.chance.below(8) {
                    0 => Delay::For(self.chance.below(200)),
                    1 => Delay::Until(WallTime(1_000_000 + self.now + self.chance.below(200))),
                    _ => Delay::None,
                };
                NewNode {
                    spec: self.chance.below(self.specs.len() as u64) as u32,
                    arguments: self.payload("1"),
                    inputs,
                    delay,
                }
            })
            .collect()
    }

    fn submit(&mut self) {
        let n = 1 + self.chance.below(6);
        let nodes = self.new_nodes(n, &[]);
        let key = (self.chance.below(3) == 0).then(|| SubmissionKey {
            hash: key_hash(self.chance.below(6)),
            content: 1 + self.chance.below(2),
        });
        let route: Arc<str> = "in".into();
        let origin = match self.chance.below(6) {
            0 => {
                let position = self.chance.below(30);
                Some(Identity::Position {
                    partition: "p".into(),
                    position,
                    next: position + 1,
                })
            }
            1 => Some(Identity::Key(key_hash(100 + self.chance.below(5)))),
            2 => Some(Identity::DeadLetter {
                seq: self.chance.below(4),
            }),
            _ => None,
        }
        .map(|identity| Origin { route, identity });
        let submission = Submission {
            key,
            specs: self.specs.clone(),
            root: self.chance.below(n) as u32,
            nodes,
            tags: BTreeMap::new(),
            origin,
        };
        let Reply::Submitted(list) = self.apply(Command::Submit(vec![submission])) else {
            panic!()
        };
        for submitted in list.into_iter().flatten() {
            self.runs.push(submitted.run);
        }
    }

    fn children_of(&self, key: NodeKey) -> Vec<NodeIndex> {
        self.broker.runs.get(&key.run).map_or(Vec::new(), |run| {
            (0..run.len())
                .filter(|node| {
                    run.core(*node).parent == key.node.0 || run.state(*node).is_terminal()
                })
                .map(NodeIndex)
                .collect()
        })
    }

    fn completion(&mut self, lease: &Lease) -> Completion {
        let own = self.children_of(lease.node);
        let big = self
            .broker
            .runs
            .get(&lease.node.run)
            .is_some_and(|run| run.len() > 40);
        let n = if big { 0 } else { self.chance.below(4) };
        let children = self.new_nodes(n, &own);
        let some = |chance: &mut Chance| {
            if n > 0 && (own.is_empty() || chance.below(2) == 0) {
                Some(NodeRef::New(chance.below(n) as u32))
            } else {
                chance.pick(&own).map(|node| NodeRef::Existing(*node))
            }
        };
        let end = match self.chance.below(10) {
            0 => AttemptEnd::Released,
            1 | 2 => AttemptEnd::Failed {
                error: self.payload("{}"),
                retryable: self.chance.below(3) > 0,
                timed_out: self.chance.below(4) == 0,
            },
            3 | 4 => match some(&mut self.chance) {
                Some(node) => AttemptEnd::Tail(node),
                None => AttemptEnd::Value(self.payload("2")),
            },
            5 | 6 => {
                let references = (0..self.chance.below(3))
                    .filter_map(|_| some(&mut self.chance))
                    .map(|first| NewInput {
                        first,
                        count: 1,
                        mode: InputUse::Value,
                    })
                    .collect();
                AttemptEnd::Structure {
                    body: self.payload("[]"),
                    references,
                }
            }
            _ => AttemptEnd::Value(self.payload("3")),
        };
        Completion {
            node: lease.node,
            attempt: lease.attempt,
            token: lease.token,
            digest: self.chance.next(),
            specs: self.specs.clone(),
            children,
            end,
        }
    }

    fn finish(&mut self, n: u64) {
        let mut list = Vec::new();
        for _ in 0..n {
            if self.leases.is_empty() {
                break;
            }
            let at = self.chance.below(self.leases.len() as u64) as usize;
            let lease = self.leases.swap_remove(at);
            let mut completion = self.completion(&lease);
            match self.chance.below(20) {
                0 => completion.token.0[3] ^= 1,
                1 => completion.attempt.0 += 1,
                2 => completion.attempt.0 -= 1,
                3 => {
                    completion.token = LeaseToken([0; 16]);
                    completion.end = AttemptEnd::Released;
                }
                _ => {}
            }
            list.push(completion);
        }
        let command = Command::Finish(list);
        self.done.push(command.clone());
        self.apply(command);
        if self.chance.below(3) == 0
            && let Some(again) = self.chance.pick(&self.done).cloned()
        {
            self.repeat(again);
        }
    }

    /// A repetition gets the first answer; with another outcome it is a conflict, as long as nothing newer began.
    fn repeat(&mut self, command: Command) {
        let Command::Finish(mut list) = command else {
            return;
        };
        let outcomes = self.count_outcomes();
        self.apply(Command::Finish(list.clone()));
        assert_eq!(
            outcomes,
            self.count_outcomes(),
            "G2 applied once, seed {}",
            self.seed
        );
        for completion in &mut list {
            completion.digest ^= 0x10;
        }
        self.apply(Command::Finish(list));
        assert_eq!(
            outcomes,
            self.count_outcomes(),
            "G2 applied once, seed {}",
            self.seed
        );
    }

    fn count_outcomes(&self) -> usize {
        let is_outcome = |fact: &&Fact| matches!(fact, Fact::Outcome { .. });
        self.facts.iter().filter(is_outcome).count()
    }

    fn flush(&mut self) {
        let Some(lease) = self.chance.pick(&self.leases).cloned() else {
            return;
        };
        let own: Vec<NodeIndex> = self
            .broker
            .runs
            .get(&lease.node.run)
            .map_or(Vec::new(), |run| {
                (0..run.len())
                    .filter(|node| run.core(*node).parent == lease.node.node.0)
                    .map(NodeIndex)
                    .collect()
            });
        if own.len() > 8 {
            return;
        }
        let n = 1 + self.chance.below(3);
        let children = self.new_nodes(n, &own);
        let first_child = match self.chance.below(4) {
            0 => self.chance.below(own.len() as u64 + 2) as u32,
            _ => own.len() as u32,
        };
        let command = Command::CreateChildren(CreateChildren {
            node: lease.node,
            attempt: lease.attempt,
            token: lease.token,
            first_child,
            specs: self.specs.clone(),
            children,
        });
        let first = self.apply(command.clone());
        let nodes = self
            .facts
            .iter()
            .filter(|fact| matches!(fact, Fact::Nodes { .. }))
            .count();
        if let Reply::Created(Ok(_)) = first {
            // Another attempt may not have begun in the meantime: a repetition is the same child.
            let again = self.apply(command);
            if let Reply::Created(Ok(_)) = again {
                assert_eq!(first, again, "G7 the same child, seed {}", self.seed);
                let after = self
                    .facts
                    .iter()
                    .filter(|fact| matches!(fact, Fact::Nodes { .. }))
                    .count();
                assert_eq!(nodes, after, "G7 no second child, seed {}", self.seed);
            }
        }
    }

    fn attach(&mut self, session: u64) {
        let mut actions = self.specs.clone();
        actions.retain(|spec| !spec.by_name);
        if self.chance.below(3) == 0 {
            for spec in &mut actions {
                if spec.fingerprint.is_some() {
                    *spec = Arc::new(Spec {
                        fingerprint: Some("v2".into()),
                        ..Spec::clone(spec)
                    });
                }
            }
        }
        let tolerations = if self.chance.below(2) == 0 {
            vec!["gpu".into()]
        } else {
            vec![]
        };
        self.apply(Command::Attach(Attach {
            session: SessionId(session),
            name: "w".into(),
            queues: vec!["default".into()],
            tolerations,
            actions,
        }));
        let calls = 1 + self.chance.below(6) as u32;
        self.apply(Command::Credit {
            session: SessionId(session),
            calls,
        });
    }

    fn step(&mut self) {
        let session = 1 + self.chance.below(3);
        match self.chance.below(40) {
            0..=5 => self.submit(),
            6..=8 => self.attach(session),
            9 => {
                self.apply(Command::Detach(SessionId(session)));
            }
            10 => {
                self.apply(Command::Close(SessionId(session)));
            }
            11..=14 => {
                let calls = self.chance.below(5) as u32;
                self.apply(Command::Credit {
                    session: SessionId(session),
                    calls,
                });
            }
            15..=17 => {
                self.apply(Command::Touch((1..=session).map(SessionId).collect()));
            }
            18..=26 => {
                let n = 1 + self.chance.below(4);
                self.finish(n);
            }
            27 | 28 => self.flush(),
            29 => {
                if let Some(run) = self.chance.pick(&self.runs).copied() {
                    self.apply(Command::Cancel {
                        run,
                        reason: "no".into(),
                    });
                }
            }
            30 => {
                if let Some(run) = self.chance.pick(&self.runs).copied() {
                    self.apply(Command::Resume(run));
                }
            }
            31 => {
                let seqs = (0..self.chance.below(4))
                    .map(|_| 1 + self.chance.below(20))
                    .collect();
                self.apply(Command::ConfirmOutbox {
                    output: "all".into(),
                    seqs,
                });
            }
            32 => {
                let run = RunSeq(self.chance.below(12));
                self.apply(Command::Expire(vec![run]));
            }
            33 => {
                let key = key_hash(100 + self.chance.below(5));
                let identity =
                    [Identity::None, Identity::Key(key)][self.chance.below(2) as usize].clone();
                let body = self.payload("?");
                self.apply(Command::DeadLetter(vec![DeadLetter {
                    origin: Origin {
                        route: "in".into(),
                        identity,
                    },
                    code: "X".into(),
                    reason: "x".into(),
                    attempts: 5,
                    coordinates: BTreeMap::new(),
                    body,
                }]));
            }
            34 => {
                self.apply(Command::DropDeadLetter {
                    route: "in".into(),
                    seq: 1,
                });
            }
            35 => {
                self.broker = self.rebuilt();
                self.twin = self.rebuilt();
            }
            _ => {
                self.now += self.chance.below(120);
                if self.chance.below(12) == 0 {
                    self.now += self.settings.dedup_window_ms; // nobody was there
                }
                self.apply(Command::Tick);
            }
        }
        self.compare(false);
    }

    /// Faults are over: a worker that can do everything, and time goes on.
    fn end(&mut self) {
        let all: Vec<Arc<Spec>> = self
            .specs
            .iter()
            .filter(|spec| !spec.by_name)
            .cloned()
            .collect();
        let coded = |code: &'static str| {
            all.iter()
                .map(|spec| {
                    Arc::new(Spec {
                        fingerprint: spec.fingerprint.as_ref().map(|_| code.into()),
                        ..Spec::clone(spec)
                    })
                })
                .collect::<Vec<_>>()
        };
        for (session, code) in [(11, "v1"), (12, "v2")] {
            self.apply(Command::Attach(Attach {
                session: SessionId(session),
                name: "w".into(),
                queues: vec!["default".into()],
                tolerations: vec!["gpu".into()],
                actions: coded(code),
            }));
        }
        for _ in 0..10_000 {
            if self.broker.runs.is_empty() {
                break;
            }
            self.apply(Command::Touch(vec![SessionId(11), SessionId(12)]));
            for session in [11, 12] {
                self.apply(Command::Credit {
                    session: SessionId(session),
                    calls: 100,
                });
            }
            let list = std::mem::take(&mut self.leases)
                .into_iter()
                .map(|lease| Completion {
                    node: lease.node,
                    attempt: lease.attempt,
                    token: lease.token,
                    digest: 9,
                    specs: vec![],
                    children: vec![],
                    end: AttemptEnd::Value(payload("3")),
                })
                .collect();
            self.apply(Command::Finish(list));
            self.now += 20;
            self.apply(Command::Tick);
        }
        assert!(
            self.broker.runs.is_empty(),
            "I22 every run ends, seed {}\n{}",
            self.seed,
            self.broker.fingerprint()
        );
        assert_eq!(self.broker.world.open_nodes, 0);
        self.compare(true);
    }
}

/// What the plays of some seeds came to.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    pub(crate) commands: u64,
    refused: BTreeMap<&'static str, u64>,
}

/// A number from the environment.
pub(crate) fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().and_then(|text| text.parse().ok())
}

/// Plays the seed that `SEED` names, or as many as `SEEDS` says, or `count`; each with a witness of its own.
pub(crate) fn play(count: u64, witness: impl Fn(u64) -> Option<Box<dyn Witness>>) -> Tally {
    let seeds: Vec<u64> = match number("SEED") {
        Some(seed) => vec![seed],
        None => (0..number("SEEDS").unwrap_or(count)).collect(),
    };
    let mut tally = Tally::default();
    for seed in seeds {
        let mut play = Play::new(seed, witness(seed));
        for _ in 0..150 {
            play.step();
        }
        play.end();
        tally.commands += play.commands;
        for (code, n) in play.refused {
            *tally.refused.entry(code).or_default() += n;
        }
    }
    tally
}

#[test]
fn random_commands_keep_every_invariant_and_the_rebuild_equal() {
    let Tally { commands, refused } = play(200, |_| None);
    println!("{commands} commands; refused: {refused:?}");
}
