//! One random schedule: a broker and the oracle are asked the same things, at the same times, with the same faults.
//!
//! Fault model. May happen: an outcome is sent again, late, forged, or with other content; a session falls silent, loses its connection,
//! comes back, says goodbye; a run is cancelled, resumed or deleted at any time; the broker restarts from its facts after any command;
//! an ended run is adopted though nobody asked; time stands still or jumps by more than a lease; ticks come late or twice. Does not
//! happen: time goes back, facts are lost or changed (the crash suites do that), a payload is large.

mod compare;
mod generate;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::audit::Audit;
use super::facts;
use super::oracle::{Expect, Oracle};
use super::parse::{payload, session};
use super::prng::SplitMix64;
use super::script::{self, SECRET, plain_spec};
use crate::broker::command::{
    Answer, Attach, AttemptEnd, Code, Command, Completion, CreateChildren, DeadLetter, Delay,
    Identity, NewInput, NewNode, NodeRef, Origin, Query, Reply, Submission, SubmissionKey,
};
use crate::broker::outcome::{Effect, Fact, Tx};
use crate::broker::types::{
    Attempt, Batch, Codec, InputUse, KeyHash, LeaseToken, NodeIndex, NodeKey, RunId, RunSeq, Spec,
    Timestamp, Turn, WallTime,
};
use crate::broker::{Broker, OutputRule, Settings};

/// A token that no lease has.
pub(in crate::broker::tests) const FORGED: LeaseToken = LeaseToken([0xee; 16]);

/// What the checker must notice.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::broker::tests) enum Mutant {
    /// None: the broker as it is.
    None,
    /// The broker says yes to a completion whose lease has ended.
    SkippedFence,
    /// One delivery is not written.
    DroppedOutboxRecord,
}

/// Figures of one or more schedules.
#[derive(Debug, Default, Clone)]
pub(in crate::broker::tests) struct Figures {
    pub(in crate::broker::tests) rounds: u64,
    pub(in crate::broker::tests) acked: u64,
    pub(in crate::broker::tests) outcomes: u64,
    pub(in crate::broker::tests) leases: u64,
    pub(in crate::broker::tests) deliveries: u64,
    pub(in crate::broker::tests) checks: u64,
    pub(in crate::broker::tests) faults: BTreeMap<&'static str, u64>,
    /// Whether the mutant had something to change.
    pub(in crate::broker::tests) mutated: bool,
}

impl Figures {
    pub(in crate::broker::tests) fn add(&mut self, other: &Self) {
        self.rounds += other.rounds;
        self.acked += other.acked;
        self.outcomes += other.outcomes;
        self.leases += other.leases;
        self.deliveries += other.deliveries;
        self.checks += other.checks;
        self.mutated |= other.mutated;
        for (fault, n) in &other.faults {
            *self.faults.entry(fault).or_default() += n;
        }
    }
}

/// Everything one schedule needs.
pub(in crate::broker::tests) struct Schedule {
    rng: SplitMix64,
    broker: Broker,
    oracle: Oracle,
    audit: Audit,
    settings: Settings,
    facts: Vec<Fact>,
    now: u64,
    wall: u64,
    specs: Vec<Arc<Spec>>,
    /// Every lease that was ever given: what its worker knows.
    leases: Vec<(NodeKey, Attempt, LeaseToken)>,
    /// Completions that were sent, to send them again.
    sent: Vec<Completion>,
    /// Creations that were accepted, to send them again.
    created: Vec<CreateChildren>,
    submitted: Vec<Submission>,
    mutant: Mutant,
    /// Few operations a command: the rest goes on with the next ticks.
    sliced: bool,
    /// The faults are over.
    draining: bool,
    /// Few faults, so that runs get far.
    calm: bool,
    pub(in crate::broker::tests) figures: Figures,
    /// What was asked and answered, when somebody will read it.
    pub(in crate::broker::tests) trace: Option<Vec<String>>,
}

fn specs() -> Vec<Arc<Spec>> {
    let plain = plain_spec("f");
    let mut retried = plain.clone();
    retried.retry.max_attempts = 3;
    retried.retry.delay_ms = 5;
    let mut slow = Spec {
        queue: "slow".into(),
        priority: 1,
        ..plain_spec("g")
    };
    slow.retry.max_losses = 2;
    let tainted = Spec {
        taint: Some("gpu".into()),
        ..plain_spec("h")
    };
    let bundled = Spec {
        batch: Some(Batch {
            max_size: 2,
            max_wait_ms: 4,
        }),
        ..plain_spec("e")
    };
    let named = Spec {
        by_name: true,
        ..plain_spec("g")
    };
    let marked = Spec {
        fingerprint: Some("h1".into()),
        ..plain.clone()
    };
    let pinned = Spec {
        pin_code: true,
        ..marked.clone()
    };
    [
        plain, retried, slow, tainted, bundled, named, marked, pinned,
    ]
    .into_iter()
    .map(Arc::new)
    .collect()
}

impl Schedule {
    pub(in crate::broker::tests) fn new(seed: u64, mutant: Mutant) -> Self {
        let rule = |name: &str, action: &str, failed| OutputRule {
            name: name.into(),
            action: action.to_owned(),
            succeeded: true,
            failed,
        };
        let mut rng = SplitMix64(seed);
        let sliced = rng.chance(30);
        let settings = Settings {
            slice: if sliced { 1 + rng.index(3) } else { 4_096 },
            outputs: vec![rule("all", "*", true), rule("good", "f*", false)],
            dedup_window_ms: 1_000_000,
            ..script::settings()
        };
        Self {
            rng,
            broker: Broker::new(settings.clone(), SECRET),
            oracle: Oracle::new(settings.clone()),
            audit: Audit::default(),
            settings,
            facts: Vec::new(),
            now: 1,
            wall: 1_000,
            specs: specs(),
            leases: Vec::new(),
            sent: Vec::new(),
            created: Vec::new(),
            submitted: Vec::new(),
            mutant,
            calm: false,
            draining: false,
            sliced,
            figures: Figures {
                rounds: 1,
                ..Figures::default()
            },
            trace: None,
        }
    }

    /// Plays it; the first thing that is not as it must be.
    pub(in crate::broker::tests) fn play(&mut self) -> Result<(), String> {
        let steps = 30 + self.rng.below(31);
        self.calm = self.rng.chance(60);
        for _ in 0..3 {
            let attach = self.attach();
            let Command::Attach(attached) = &attach else {
                unreachable!("that is what it makes")
            };
            let session = attached.session;
            self.step(attach)?;
            self.step(Command::Credit { session, calls: 3 })?;
        }
        for _ in 0..steps {
            self.pass_time();
            if self.rng.chance(if self.calm { 1 } else { 4 }) {
                self.restart()?;
            }
            if self.rng.chance(3) {
                self.adopt_something();
            }
            let command = self.command();
            self.step(command)?;
            if self.rng.chance(12) {
                self.compare_with_rebuilt()?;
            }
        }
        self.compare_with_rebuilt()?;
        self.compare_everything()?;
        if self.rng.chance(25) {
            self.drain()?;
        }
        self.figures.outcomes = self.audit.outcomes;
        self.figures.deliveries = self.audit.n_owed() as u64;
        Ok(())
    }

    fn fault(&mut self, name: &'static str) {
        *self.figures.faults.entry(name).or_default() += 1;
    }

    fn pass_time(&mut self) {
        let wild = if self.calm { 12 } else { 10 };
        let (now, wall) = match self.rng.below(wild) {
            0..=4 | 10.. => (0, 0),
            5..=7 => (1 + self.rng.below(3), 1),
            8 if self.calm => (1, 20),
            8 => (self.rng.below(12), 20),
            _ if self.calm => (2, 0),
            _ => {
                self.fault("jump");
                (5 + self.rng.below(20), 0)
            }
        };
        self.now += now;
        self.wall += wall;
    }

    /// Asks both, and compares all that can be seen.
    #[expect(
        clippy::needless_pass_by_value,
        reason = "called with what was just made"
    )]
    fn step(&mut self, command: Command) -> Result<(), String> {
        if let Some(trace) = &mut self.trace {
            trace.push(format!("@{} wall {} {command:?}", self.now, self.wall));
        }
        for run in self.broker.needs(&command) {
            let facts = facts::run_facts(&self.facts, run);
            if !facts.is_empty() {
                self.broker
                    .adopt(run, facts)
                    .map_err(|error| error.detail)?;
            }
        }
        let (now, wall) = (Timestamp(self.now), WallTime(self.wall));
        let turn = Turn {
            now,
            wall,
            seed: self.rng.next(),
        };
        let mut tx = Tx::default();
        let mut reply = self.broker.apply(&mut tx, turn, command.clone());
        self.mutate(&command, &mut reply, &mut tx.facts);
        if let Some(trace) = &mut self.trace {
            trace.push(format!("    {reply:?}\n    {:?}", tx.effects));
        }
        if matches!(command, Command::Touch(_)) && tx.effects.is_empty() && !tx.facts.is_empty() {
            return Err(format!("a heartbeat wrote {:?}", tx.facts));
        }
        if let (Command::CreateChildren(request), Reply::Created(Ok(_))) = (&command, &reply) {
            self.created.push(request.clone());
        }
        self.written(&tx)?;
        self.oracle.turn(turn);
        self.replies(&command, &reply)?;
        self.oracle.leases(&tx.effects, !self.sliced)?;
        if self.sliced {
            let may_crash = command != Command::Tick && !self.draining;
            self.go_on(turn, &mut tx, may_crash)?;
        } else if command == Command::Tick && facts::is_due(&self.broker, now, wall) {
            return Err("I22: a tick wants another one at once".to_owned());
        }
        self.oracle.all_served()?;
        self.effects(&tx)?;
        for effect in &tx.effects {
            if let Effect::Lease(lease) = effect {
                self.figures.leases += 1;
                self.leases.push((lease.node, lease.attempt, lease.token));
            }
        }
        let touched: BTreeSet<RunSeq> = self.oracle.deeds.ended.clone();
        self.compare_runs(&|run| !run.ended || touched.contains(&run.id.seq))
    }

    /// What a command has written, before anything is made of it.
    fn written(&mut self, tx: &Tx) -> Result<(), String> {
        self.broker.check_invariants();
        self.audit.absorb(&tx.facts)?;
        self.audit.effects(&tx.effects)?;
        self.facts.extend(tx.facts.iter().cloned());
        self.figures.checks += 1;
        Ok(())
    }

    /// Cascades and lapses go on, a slice a tick, until all is as if they had been done at once. A crash may come between; not between
    /// two slices of lapses, because it would give the other leases a whole period again.
    fn go_on(&mut self, turn: Turn, tx: &mut Tx, may_crash: bool) -> Result<(), String> {
        if may_crash && facts::is_due(&self.broker, turn.now, turn.wall) && self.rng.chance(10) {
            self.fault("restart between slices");
            self.broker = self.rebuilt();
            self.oracle.restart();
        }
        let mut n = 0;
        while facts::is_due(&self.broker, turn.now, turn.wall) {
            n += 1;
            if n > 500 {
                return Err("I22: a tick is wanted for ever".to_owned());
            }
            let mut more = Tx::default();
            self.broker.apply(&mut more, turn, Command::Tick);
            self.written(&more)?;
            if n == 1 {
                self.oracle.command(&Command::Tick);
            }
            self.oracle.leases(&more.effects, false)?;
            tx.facts.extend(more.facts);
            tx.effects.extend(more.effects);
        }
        Ok(())
    }

    fn restart(&mut self) -> Result<(), String> {
        self.fault("restart");
        if let Some(trace) = &mut self.trace {
            trace.push(format!("@{} restart", self.now));
        }
        self.broker = self.rebuilt();
        facts::learn_date(&mut self.broker, Timestamp(self.now), WallTime(self.wall));
        self.oracle.turn(self.turn());
        self.oracle.restart();
        self.compare_everything()
    }

    /// Adopting an ended run although nobody needs it changes no reply.
    fn adopt_something(&mut self) {
        let ended = self
            .oracle
            .runs
            .iter()
            .filter(|run| run.ended && !run.deleted);
        let ended: Vec<RunSeq> = ended.map(|run| run.id.seq).collect();
        if !ended.is_empty() {
            self.fault("early adoption");
            let run = *self.rng.pick(&ended);
            if let Some(trace) = &mut self.trace {
                trace.push(format!("adopt {}", run.0));
            }
            let facts = facts::run_facts(&self.facts, run);
            self.broker
                .adopt(run, facts)
                .expect("the facts of an ended run");
        }
    }

    /// I22: with workers and without faults, every run ends. Both versions of the code are there: nodes may be pinned to either.
    fn drain(&mut self) -> Result<(), String> {
        self.draining = true;
        let workers = [("w8", "h2"), ("w9", "h1")];
        for (name, code) in workers {
            let code = Arc::new(Spec {
                fingerprint: Some(code.into()),
                ..plain_spec("f")
            });
            let mut actions: Vec<Arc<Spec>> =
                [2, 3, 4].map(|i| Arc::clone(&self.specs[i])).to_vec();
            actions.push(code);
            self.step(Command::Attach(Attach {
                session: session(name),
                name: name.into(),
                queues: vec!["default".into(), "slow".into()],
                tolerations: vec!["gpu".into()],
                actions,
            }))?;
        }
        for _ in 0..400 {
            if self.oracle.runs.iter().all(|run| run.ended) {
                return Ok(());
            }
            self.now += 1;
            self.wall += 5;
            let sessions = workers.map(|(name, _)| session(name));
            self.step(Command::Touch(sessions.to_vec()))?;
            for session in sessions {
                self.step(Command::Credit { session, calls: 5 })?;
            }
            self.step(Command::Tick)?;
            let held = |lease: &&(NodeKey, Attempt, LeaseToken)| {
                sessions
                    .iter()
                    .any(|session| self.oracle.held_by(lease.0, lease.1, *session))
            };
            let open: Vec<_> = self.leases.iter().filter(held).copied().collect();
            let items = open.into_iter().map(|(node, attempt, token)| Completion {
                node,
                attempt,
                token,
                digest: 7,
                specs: Vec::new(),
                children: Vec::new(),
                end: AttemptEnd::Value(payload(Codec::Json, b"1")),
            });
            let items: Vec<Completion> = items.collect();
            if !items.is_empty() {
                self.step(Command::Finish(items))?;
            }
        }
        Err("I22: a run does not end".to_owned())
    }
}

#[expect(
    clippy::needless_pass_by_value,
    reason = "called with what was just made"
)]
fn same<T: PartialEq + std::fmt::Debug>(is: T, expected: T, what: &str) -> Result<(), String> {
    if is == expected {
        Ok(())
    } else {
        Err(format!("{what}: {is:?}, not {expected:?}"))
    }
}
