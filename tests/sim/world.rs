//! The simulated world: clients, workers, their connections, one engine and its disk, and the faults between them.

mod checks;
mod clients;
mod events;
mod workers;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::{Arc, Mutex};

use dagorama::broker::command::{
    Answer, AttemptEnd, Code, Command, Completion, Query, Reply, Submission, SubmissionKey,
};
use dagorama::broker::outcome::{Effect, Lease};
use dagorama::broker::types::{
    Attempt, KeyHash, LeaseToken, NodeKey, RunId, RunSeq, RunState, SessionId, Timestamp, Turn,
    WallTime,
};
use dagorama::broker::{Broker, Restoring, Settings};
use dagorama::engine::load::{RunFacts, read_run};
use dagorama::engine::{Engine, Request, Ticket};
use dagorama::storage::memory::MemoryStore;
use dagorama::storage::{Pressure, Read, Store};

use crate::disk::{Disk, Fate, SimStore};
use crate::program::Program;
use crate::rng::{Rng, fold, mix};
use crate::worker::{self, Held, Ran, Worker};

/// Simulated milliseconds during which faults happen.
const FAULTS_MS: u64 = 15_000;
/// After that, everything must end within this (I22).
const BOUND_MS: u64 = 600_000;
const LEASE_MS: u64 = 3_000;

#[derive(Debug, Clone)]
pub struct Options {
    pub seed: u64,
    pub jobs: usize,
    pub faults: bool,
    /// The mutant: commits are acked before they are durable.
    pub early_ack: bool,
    /// Every turn is printed.
    pub print: bool,
}

/// What a run of the simulation showed.
#[derive(Debug, Default, Clone)]
pub struct Report {
    pub acked: u64,
    pub nodes: u64,
    pub turns: u64,
    pub commits: u64,
    pub resumed: u64,
    /// Runs that were read for a command or a query.
    pub loads: u64,
    pub lost: u64,
    pub applied_twice: u64,
    pub early_leases: u64,
    pub wrong_reads: u64,
    pub invariant_checks: u64,
    pub violations: Vec<String>,
    pub faults: BTreeMap<&'static str, u64>,
    pub trace: u64,
}

#[derive(Debug)]
struct Job {
    program: usize,
    key: SubmissionKey,
    done: Option<RunId>,
    ended: Option<RunState>,
    wants_cancel: bool,
    cancel_sent: bool,
    wants_resume: bool,
}

#[derive(Debug, Clone)]
enum Who {
    Submit(Vec<usize>),
    Cancel(usize),
    Resume(usize),
    Attach {
        worker: usize,
        link: u64,
    },
    Finish {
        worker: usize,
        link: u64,
        /// Which attempts, and whether each of them ends its node.
        items: Vec<(Held, bool)>,
    },
    Create {
        worker: usize,
        link: u64,
        held: Held,
    },
    Nobody,
}

#[derive(Debug)]
enum Event {
    Client(usize),
    Arrives {
        epoch: u64,
        link: Option<(usize, u64)>,
        who: Who,
        command: Command,
    },
    Question {
        epoch: u64,
        job: usize,
        query: Query,
    },
    Reply {
        epoch: u64,
        who: Who,
        reply: Reply,
    },
    Answer {
        epoch: u64,
        job: usize,
        answer: Answer,
    },
    Leases {
        epoch: u64,
        worker: usize,
        link: u64,
        leases: Vec<Lease>,
    },
    Revoked {
        epoch: u64,
        worker: usize,
        link: u64,
        held: Held,
    },
    Connect(usize),
    Beat(usize),
    Ends {
        worker: usize,
        life: u64,
        bundle: u64,
    },
    Read {
        epoch: u64,
        run: RunSeq,
    },
    Loaded {
        epoch: u64,
        run: RunSeq,
        facts: RunFacts,
    },
    Fault,
    Start,
    Wake,
}

pub struct World {
    options: Options,
    rng: Rng,
    now: u64,
    /// Added to `now`, the calendar of the simulated machine.
    calendar: u64,
    events: BTreeMap<(u64, u64), Event>,
    counter: u64,
    engine: Option<Engine<SimStore>>,
    reader: Arc<dyn Read>,
    disk: Arc<Mutex<Disk>>,
    /// What the disk holds while the process is dead.
    wreck: Option<SimStore>,
    /// Number of the process: what was under way with an earlier one is gone.
    epoch: u64,
    /// Broker time and simulated time at its start.
    started: (Timestamp, u64),
    latest: Timestamp,
    /// Broker time of the latest commit: no later one is before it (G6), whatever the calendar does.
    logged: Timestamp,
    busy_until: u64,
    next_wake: u64,
    arrived: Vec<Request>,
    touched: BTreeSet<SessionId>,
    waiting: BTreeMap<Ticket, Who>,
    questions: BTreeMap<Ticket, usize>,
    asked: VecDeque<(usize, Query)>,
    programs: Vec<Program>,
    jobs: Vec<Job>,
    workers: Vec<Worker>,
    raised: BTreeMap<NodeKey, u32>,
    /// Journal: who was told that the attempt which ended this node counts, by round.
    applied: BTreeMap<(NodeKey, u32), Attempt>,
    /// Ends whose commit may have become durable without anybody being told.
    maybe: BTreeSet<Held>,
    accepted: BTreeSet<Held>,
    cancelled: BTreeSet<(RunSeq, u32)>,
    report: Report,
}

/// Makes a world from a seed and lets it run to its end.
pub fn run(options: Options) -> Report {
    let mut world = World::new(options);
    world.live();
    world.check_all();
    world.expire_all();
    world.report.trace = mix(world.report.trace);
    world.report
}

fn settings() -> Settings {
    Settings {
        lease_ms: LEASE_MS,
        detach_grace_ms: 500,
        slice: 16,
        ..Settings::default()
    }
}

impl World {
    fn new(options: Options) -> Self {
        let mut rng = Rng::new(options.seed);
        // Half of them load from state alone, half from state and a log behind it.
        let log = if rng.percent(50) { 0 } else { rng.range(1, 40) };
        let memory = MemoryStore::with_log(log as usize);
        let store = SimStore::new(memory, options.early_ack);
        let programs: Vec<Program> = (0..options.jobs)
            .map(|_| Program::random(&mut rng))
            .collect();
        let jobs = (0..options.jobs).map(|program| Job {
            program,
            key: SubmissionKey {
                hash: KeyHash(u128::from(rng.next()) << 64 | program as u128),
                content: program as u64 + 1,
            },
            done: None,
            ended: None,
            wants_cancel: rng.percent(15),
            cancel_sent: false,
            wants_resume: rng.percent(70),
        });
        let jobs = jobs.collect();
        let mut workers = vec![Worker::new(rng.next(), true, 4)];
        for _ in 0..rng.range(1, 3) {
            let (session, slots) = (rng.next(), rng.range(1, 6) as usize);
            workers.push(Worker::new(session, rng.percent(40), slots));
        }
        let mut world = Self {
            calendar: 1_700_000_000_000,
            reader: store.reader(),
            disk: store.disk(),
            wreck: Some(store),
            options,
            rng,
            now: 0,
            events: BTreeMap::new(),
            counter: 0,
            engine: None,
            epoch: 0,
            started: (Timestamp(0), 0),
            latest: Timestamp(0),
            logged: Timestamp(0),
            busy_until: 0,
            next_wake: u64::MAX,
            arrived: Vec::new(),
            touched: BTreeSet::new(),
            waiting: BTreeMap::new(),
            questions: BTreeMap::new(),
            asked: VecDeque::new(),
            programs,
            jobs,
            workers,
            raised: BTreeMap::new(),
            applied: BTreeMap::new(),
            maybe: BTreeSet::new(),
            accepted: BTreeSet::new(),
            cancelled: BTreeSet::new(),
            report: Report::default(),
        };
        world.start();
        for job in 0..world.jobs.len() {
            let at = world.rng.below(FAULTS_MS / 2);
            world.after(at, Event::Client(job));
        }
        for worker in 0..world.workers.len() {
            world.after(LEASE_MS / 3, Event::Beat(worker));
        }
        if world.options.faults {
            world.after(500, Event::Fault);
        }
        world
    }

    fn after(&mut self, ms: u64, event: Event) {
        self.counter += 1;
        self.events.insert((self.now + ms, self.counter), event);
    }

    fn violation(&mut self, text: String) {
        if self.report.violations.len() < 20 {
            self.report.violations.push(format!("@{} {text}", self.now));
        }
    }

    fn note(&mut self, what: &dyn std::fmt::Debug) {
        let text = format!("{what:?}");
        if self.options.print {
            println!("@{} {text}", self.now);
        }
        let hash = text.bytes().fold(self.now, |sum, byte| {
            (sum ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        });
        self.report.trace = fold([self.report.trace, hash]);
    }

    fn live(&mut self) {
        while let Some(((at, _), event)) = self.events.pop_first() {
            self.now = self.now.max(at);
            self.handle(event);
            self.turn_if_due();
            if self.report.violations.len() >= 20 || self.jobs.iter().all(|job| self.finished(job))
            {
                return;
            }
            if self.now > FAULTS_MS + BOUND_MS {
                let open: Vec<_> = (self.jobs.iter())
                    .filter(|job| !self.finished(job))
                    .map(|job| (job.program, job.done, job.ended))
                    .collect();
                self.violation(format!("I22 these did not end: {open:?}"));
                self.explain_open();
                return;
            }
        }
        self.violation("I22 nothing is under way and not all has ended".to_owned());
    }

    fn explain_open(&mut self) {
        let runs: Vec<RunId> = (self.jobs.iter())
            .filter(|job| !self.finished(job))
            .filter_map(|job| job.done)
            .collect();
        let turn = self.turn();
        if let Some(engine) = &mut self.engine {
            let answers: Vec<_> = runs
                .into_iter()
                .filter_map(|run| {
                    let query = Query::Explain {
                        run,
                        node: None,
                        limit: 10,
                    };
                    engine.ask(turn, Ticket(u64::MAX), query)
                })
                .collect();
            self.violation(format!("I22 they wait: {answers:?}"));
        }
    }

    fn finished(&self, job: &Job) -> bool {
        match job.ended {
            None => false,
            Some(RunState::Cancelled) => !job.wants_resume,
            Some(_) => true,
        }
    }

    // ---- the process ------------------------------------------------------------------------------------------------

    fn start(&mut self) {
        let Some(store) = self.wreck.take() else {
            return;
        };
        self.disk = store.disk();
        self.reader = store.reader();
        let wall = WallTime(self.calendar + self.now);
        let (engine, started) =
            Engine::start(store, settings(), wall).expect("a start after a crash");
        let logged = self.logged;
        if started.now < logged && !self.options.early_ack {
            self.violation(format!("G6 {:?} after {logged:?}", started.now));
        }
        self.latest = self.latest.max(started.now);
        self.started = (started.now, self.now);
        self.engine = Some(engine);
        self.check_engine();
        for worker in 0..self.workers.len() {
            let ms = self.rng.range(1, 400);
            self.after(ms, Event::Connect(worker));
        }
    }

    fn crash(&mut self, kind: &'static str) {
        let Some(engine) = self.engine.take() else {
            return;
        };
        *self.report.faults.entry(kind).or_default() += 1;
        self.note(&kind);
        self.report.commits += self.disk.lock().unwrap().commits;
        self.wreck = Some(engine.store().crash());
        self.epoch += 1;
        self.arrived.clear();
        self.touched.clear();
        self.waiting.clear();
        self.questions.clear();
        self.asked.clear();
        for worker in &mut self.workers {
            worker.link += 1;
            worker.connected = false;
        }
        self.busy_until = 0;
        self.next_wake = u64::MAX;
        let down = match self.rng.below(10) {
            0 => self.rng.range(1, 20_000),
            _ => self.rng.range(1, 500),
        };
        self.after(down, Event::Start);
    }

    fn turn(&mut self) -> Turn {
        Turn {
            now: self.started.0.after_ms(self.now - self.started.1),
            wall: WallTime(self.calendar + self.now),
            seed: self.rng.next(),
        }
    }

    fn turn_if_due(&mut self) {
        if self.now < self.busy_until || self.engine.is_none() {
            return;
        }
        let turn = self.turn();
        self.latest = self.latest.max(turn.now);
        while let Some((job, query)) = self.asked.pop_front() {
            self.counter += 1;
            let ticket = Ticket(self.counter);
            let Some(engine) = &mut self.engine else {
                return;
            };
            match engine.ask(turn, ticket, query) {
                Some(answer) => self.answered(job, answer),
                None => drop(self.questions.insert(ticket, job)),
            }
        }
        let Some(engine) = &mut self.engine else {
            return;
        };
        let due = engine.due_in(turn.now, turn.wall);
        if self.arrived.is_empty() && due != Some(0) {
            self.wake_in(due);
            return;
        }
        let mut requests = Vec::new();
        if !self.touched.is_empty() {
            let touched = std::mem::take(&mut self.touched);
            requests.push(Request {
                ticket: None,
                command: Command::Touch(touched.into_iter().collect()),
            });
        }
        requests.append(&mut self.arrived);
        let finishes = finishes_of(&requests);
        self.disk.lock().unwrap().wall = turn.wall;
        let output = match engine.turn(turn, requests) {
            Ok(output) => output,
            Err(_) => {
                assert!(
                    engine.turn(turn, Vec::new()).is_err(),
                    "G17 a failed commit is final"
                );
                // It may be durable. Nobody was told.
                self.maybe.extend(finishes);
                self.crash("commit");
                return;
            }
        };
        self.report.turns += 1;
        if output.facts > 0 {
            self.logged = turn.now;
        }
        let sync = match self.rng.below(100) {
            0 if self.options.faults => self.rng.range(100, 2_000),
            n => n % 3,
        };
        self.busy_until = self.now + if output.facts > 0 { sync } else { 0 };
        let due = engine.due_in(turn.now, turn.wall);
        self.note(&(&output.replies, &output.effects, &output.answers));
        self.report.loads += output.loads.len() as u64;
        for run in output.loads {
            let ms = self.busy_until - self.now + self.rng.below(5);
            self.after(
                ms,
                Event::Read {
                    epoch: self.epoch,
                    run,
                },
            );
        }
        for (ticket, answer) in output.answers {
            if let Some(job) = self.questions.remove(&ticket) {
                self.answered(job, answer);
            }
        }
        for (ticket, reply) in output.replies {
            let who = self.waiting.remove(&ticket).unwrap_or(Who::Nobody);
            self.judge(&who, &reply);
            self.send_reply(who, reply);
        }
        self.send_effects(output.effects);
        self.wake_in(due);
        if self.report.turns % 1_000 == 0 {
            self.check_engine();
        }
    }

    fn wake_in(&mut self, due: Option<u64>) {
        let Some(ms) = due else {
            return;
        };
        let at = self
            .busy_until
            .max(self.now + ms.max(u64::from(self.busy_until <= self.now)));
        if self.next_wake <= self.now || at < self.next_wake {
            self.next_wake = at;
            self.after(at - self.now, Event::Wake);
        }
    }

    /// The omniscient observer: what a durable reply says must fit what earlier ones said.
    fn judge(&mut self, who: &Who, reply: &Reply) {
        match (who, reply) {
            (Who::Finish { items, .. }, Reply::Done(results)) => {
                assert_eq!(items.len(), results.len(), "an entry an item");
                for ((held, ends), result) in items.iter().zip(results) {
                    if result.is_ok() {
                        self.accept(*held, *ends);
                    }
                }
            }
            (Who::Cancel(job), Reply::Done(results)) if results[0].is_ok() => {
                if let Some(run) = self.jobs[*job].done
                    && let Some(record) = self.reader.run(run.seq).unwrap()
                    && record.cancelled
                {
                    self.cancelled.insert((run.seq, record.round));
                }
            }
            _ => {}
        }
    }

    fn accept(&mut self, held: Held, ends: bool) {
        let again = !self.accepted.insert(held) || self.maybe.contains(&held);
        if again {
            return;
        }
        self.report.acked += 1;
        let (node, attempt) = held;
        let record = self.reader.run(node.run).unwrap();
        let round = record.map_or(0, |record| record.round);
        if self.cancelled.contains(&(node.run, round)) {
            self.violation(format!(
                "G9 {node} #{} was applied after a cancel",
                attempt.0
            ));
        }
        if ends && let Some(before) = self.applied.insert((node, round), attempt) {
            self.report.applied_twice += 1;
            let (before, attempt) = (before.0, attempt.0);
            self.violation(format!(
                "G2 {node} was ended by #{before} and by #{attempt}"
            ));
        }
    }

    fn send_reply(&mut self, who: Who, reply: Reply) {
        let link = match &who {
            Who::Attach { worker, link }
            | Who::Finish { worker, link, .. }
            | Who::Create { worker, link, .. } => Some((*worker, *link)),
            Who::Nobody => return,
            _ => None,
        };
        let epoch = self.epoch;
        let event = Event::Reply { epoch, who, reply };
        match link {
            Some((worker, _)) => self.down(worker, event),
            None if self.options.faults && self.rng.percent(3) && self.now < FAULTS_MS => {
                *self.report.faults.entry("reply lost").or_default() += 1;
            }
            None => {
                let ms = self.busy_until - self.now + self.rng.range(0, 20);
                self.after(ms, event);
            }
        }
    }

    fn send_effects(&mut self, effects: Vec<Effect>) {
        let epoch = self.epoch;
        let mut leases: BTreeMap<SessionId, Vec<Lease>> = BTreeMap::new();
        for effect in effects {
            match effect {
                Effect::Lease(lease) => {
                    if !worker::inputs_are_there(&*self.reader, lease.node) {
                        self.report.early_leases += 1;
                        self.violation(format!("G4 {} was leased before its inputs", lease.node));
                    }
                    leases.entry(lease.session).or_default().push(lease);
                }
                Effect::Revoke {
                    session,
                    node,
                    attempt,
                } => {
                    if let Some(worker) = self.worker_of(session) {
                        let link = self.workers[worker].link;
                        let held = (node, attempt);
                        let event = Event::Revoked {
                            epoch,
                            worker,
                            link,
                            held,
                        };
                        self.down(worker, event);
                    }
                }
                _ => {}
            }
        }
        for (session, leases) in leases {
            if let Some(worker) = self.worker_of(session) {
                let link = self.workers[worker].link;
                let event = Event::Leases {
                    epoch,
                    worker,
                    link,
                    leases,
                };
                self.down(worker, event);
            }
        }
    }

    fn worker_of(&self, session: SessionId) -> Option<usize> {
        (self.workers.iter()).position(|worker| worker.session == session)
    }

    /// From the engine to a worker: its connection keeps the order.
    fn down(&mut self, worker: usize, event: Event) {
        let at = self.now.max(self.busy_until) + self.rng.range(0, 15);
        let at = at.max(self.workers[worker].last_down);
        self.workers[worker].last_down = at;
        self.after(at - self.now, event);
    }

    /// From a worker to the engine.
    fn up(&mut self, worker: usize, who: Who, command: Command) {
        let at = (self.now + self.rng.range(0, 15)).max(self.workers[worker].last_up);
        self.workers[worker].last_up = at;
        let event = Event::Arrives {
            epoch: self.epoch,
            link: Some((worker, self.workers[worker].link)),
            who,
            command,
        };
        self.after(at - self.now, event);
    }
}

fn counts(end: &AttemptEnd) -> bool {
    !matches!(end, AttemptEnd::Released | AttemptEnd::Failed { .. })
}

fn finishes_of(requests: &[Request]) -> Vec<Held> {
    let finishes = requests
        .iter()
        .filter_map(|request| match &request.command {
            Command::Finish(items) => Some(items),
            _ => None,
        });
    finishes.flatten().map(|c| (c.node, c.attempt)).collect()
}

fn rebuild(store: &mut SimStore, now: Timestamp) -> Broker {
    let mut restoring = Restoring::new(settings(), [0; 16]);
    let loaded = store
        .load(&mut |fact| restoring.absorb(fact))
        .expect("a load");
    restoring.set_lease_secret(loaded.lease_secret);
    restoring
        .finish(now, loaded.next_run)
        .map_err(|corrupt| corrupt.detail)
        .expect("a rebuild")
}
