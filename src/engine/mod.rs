//! One turn after another: collect commands, apply each, commit once, release.
//!
//! [`Engine::turn`] is synchronous and reads no clock: the thread feeds it in the product, the simulator in tests. It knows the broker and
//! the store only by their interfaces. Invariants: *commit-then-act* (replies and effects leave a turn only when its facts are durable)
//! and fail-stop (after a failed commit memory is ahead of the disk, so nothing leaves any more, G17).
//!
//! Reading order: this file, `request`, `load`, `handle`, `inbox`, `routes`, `thread`, `clock`.

pub mod clock;
pub mod handle;
mod inbox;
pub mod load;
pub mod request;
mod routes;
pub mod thread;

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

pub use handle::{Handle, Info, SessionEffect, Stopped};
use load::{LoadTable, RunFacts};
use request::{Cost, cost, is_intake, refuse};
pub use request::{Request, Ticket};
pub use thread::{EngineOptions, EngineThread, spawn};

use crate::broker::command::{Answer, Attach, Code, Command, Query, Rejection, Reply};
use crate::broker::outcome::{Effect, Fact, Tx};
use crate::broker::types::{NameId, RunSeq, SessionId, Spec, SpecId, Timestamp, Turn, WallTime};
use crate::broker::{Broker, CorruptStore, Restoring, Settings};
use crate::storage::{Loaded, Pressure, StorageBatch, StorageError, Store};

/// The most that a turn takes, except that the first request of each queue always fits.
pub const TURN_BUDGET: Cost = Cost {
    nodes: 4_096,
    bytes: 4 << 20,
};

/// The largest command, in bytes of facts. An entry of the log holds a whole turn and never spans two of its segments, which have at least
/// 64 MiB: what does not fit would stop the store for good (G17), so it is refused before.
pub const LARGEST_COMMAND: usize = 32 << 20;

/// The most that a turn takes when it has to take a command that is larger than its budget.
const LARGEST_TURN: usize = 40 << 20;

/// What intake may take of a turn that control has used up, and of any turn while the log is too far ahead of the state store.
const SMALL_BUDGET: Cost = Cost {
    nodes: TURN_BUDGET.nodes / 8,
    bytes: TURN_BUDGET.bytes / 8,
};

/// Milliseconds between two pieces of intake while the log is too far ahead of the state store.
const SLOW_INTAKE_MS: u64 = 5;

/// How often the calendar is looked at while something waits for a date, in milliseconds: it may be set at any time.
const CALENDAR_MS: u64 = 30_000;

/// Why an engine did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The store could not be read.
    #[error(transparent)]
    Storage(#[from] StorageError),
    /// What the store holds contradicts itself. `STORE_CORRUPT`.
    #[error("the store contradicts itself: {0}; run `dagorama verify`, then restore a backup")]
    Corrupt(String),
    /// The operating system gave no thread.
    #[error("no thread for the engine: {0}")]
    Thread(#[source] std::io::Error),
}

/// What a turn lets go. All of it is durable.
#[derive(Debug, Default)]
pub struct TurnOutput {
    /// Names that later effects use; to be made known first.
    pub specs: Vec<(SpecId, Arc<Spec>)>,
    /// Routes and outputs that got a number.
    pub names: Vec<(NameId, Arc<str>)>,
    /// Replies, in the order in which the commands were applied.
    pub replies: Vec<(Ticket, Reply)>,
    /// Answers to queries that had waited for a run.
    pub answers: Vec<(Ticket, Answer)>,
    /// Effects, in order.
    pub effects: Vec<Effect>,
    /// Runs to be read ([`load::read_run`]) and handed to [`Engine::loaded`].
    pub loads: Vec<RunSeq>,
    /// How many facts were committed.
    pub facts: usize,
}

/// A command that waits for runs to be read.
#[derive(Debug)]
struct Parked {
    request: Request,
    runs: Vec<RunSeq>,
}

/// The broker, its store, and what no turn has taken yet.
pub struct Engine<S: Store> {
    broker: Broker,
    store: S,
    control: VecDeque<Request>,
    intake: VecDeque<Request>,
    parked: Vec<Parked>,
    /// Credit that came while the log was as far ahead of the state store as it may be: fewer leases until it has caught up (STATE §5).
    held_credit: BTreeMap<SessionId, u32>,
    questions: Vec<(Ticket, Query)>,
    loads: LoadTable,
    /// Something that was parked may go on.
    unparkable: bool,
    /// Time of the latest turn.
    now: Timestamp,
    /// No tick before this: what arrived while the process stood still is read first.
    hold_ticks: Timestamp,
    /// While a tick is due: how many control requests that were there before go first.
    tick_behind: Option<usize>,
    /// While the log is too far ahead: no intake before this.
    next_intake: Timestamp,
    pressure: Pressure,
    /// The first failed commit (G17).
    failed: Option<String>,
}

/// A turn while it is made.
#[derive(Default)]
struct Work {
    tx: Tx,
    out: TurnOutput,
    used: Cost,
}

impl<S: Store> Engine<S> {
    /// Loads the store and builds the broker from its facts. `wall` gives the downtime (G6).
    pub fn start(
        mut store: S,
        settings: Settings,
        wall: WallTime,
    ) -> Result<(Self, Started), StartError> {
        let mut restoring = Restoring::new(settings, [0; 16]);
        let (mut specs, mut names) = (Vec::new(), Vec::new());
        let loaded = store.load(&mut |fact| {
            learn(&fact, &mut specs, &mut names);
            restoring.absorb(fact);
        })?;
        restoring.set_lease_secret(loaded.lease_secret);
        let now = clock::time_at_start(loaded.now, loaded.last_wall, wall);
        let broker = restoring
            .finish(now, loaded.next_run)
            .map_err(|CorruptStore { detail }| StartError::Corrupt(detail))?;
        let engine = Self {
            broker,
            pressure: store.pressure(),
            store,
            control: VecDeque::new(),
            intake: VecDeque::new(),
            parked: Vec::new(),
            held_credit: BTreeMap::new(),
            questions: Vec::new(),
            loads: LoadTable::default(),
            unparkable: false,
            now,
            hold_ticks: Timestamp(0),
            tick_behind: None,
            next_intake: Timestamp(0),
            failed: None,
        };
        let started = Started {
            loaded,
            now,
            specs,
            names,
        };
        Ok((engine, started))
    }

    /// Takes what the turn's budget allows of everything that waits, commits its facts once, and returns what may leave. Heartbeats
    /// (`Touch`) go first, then control, then what time has brought, then intake. An error is final.
    pub fn turn(&mut self, turn: Turn, requests: Vec<Request>) -> Result<TurnOutput, StorageError> {
        if let Some(reason) = &self.failed {
            return Err(StorageError::Stopped(reason.clone()));
        }
        debug_assert!(turn.now >= self.now, "G6 the broker's time never goes back");
        self.now = turn.now;
        self.pressure = self.store.pressure();

        let mut work = Work::default();
        self.answer_parked(turn, &mut work.out);
        for request in requests {
            if matches!(request.command, Command::Touch(_)) {
                self.apply(turn, &mut work, request);
            } else if is_intake(&request.command) {
                self.intake.push_back(request);
            } else {
                self.control.push_back(request);
            }
        }
        self.take_parked(turn, &mut work);
        self.take_control(turn, &mut work);
        self.tick_if_due(turn, &mut work);
        self.take_intake(turn, &mut work);
        self.commit(work)
    }

    /// Asks a question between two turns. `None`: it needs a run that is not resident; its answer comes with a later turn.
    pub fn ask(&mut self, turn: Turn, ticket: Ticket, query: Query) -> Option<Answer> {
        match self.broker.needs_query(&query) {
            None => Some(self.broker.query(turn, &query)),
            Some(run) => {
                self.loads.want(run);
                self.unparkable |= self.loads.fresh(run).is_some();
                self.questions.push((ticket, query));
                None
            }
        }
    }

    /// Runs that queries need, to be read and handed to [`Engine::loaded`]. Between two turns everything is durable, so they may be read now.
    pub fn wanted(&mut self) -> Vec<RunSeq> {
        self.loads.begin()
    }

    /// A run that was asked for was read.
    pub fn loaded(&mut self, run: RunSeq, facts: RunFacts) {
        self.loads.arrived(run, facts);
        self.unparkable = true;
    }

    /// Milliseconds until the engine wants a turn although nothing arrives; `Some(0)`: at once, `None`: never.
    #[must_use]
    pub fn due_in(&self, now: Timestamp, wall: WallTime) -> Option<u64> {
        if !self.control.is_empty() || self.unparkable || self.loads.any_wanted() {
            return Some(0);
        }
        if !self.held_credit.is_empty() && self.store.pressure() != Pressure::Stop {
            return Some(0);
        }
        let intake = match self.pressure {
            _ if self.intake.is_empty() => None,
            Pressure::Slow => Some(self.next_intake.0.saturating_sub(now.0)),
            _ => Some(0),
        };
        let held = self.hold_ticks.0.saturating_sub(now.0);
        let deadline = self.broker.next_deadline();
        let deadline = deadline.map(|at| at.0.saturating_sub(now.0).max(held));
        let date = self.broker.next_wall_deadline();
        let date = date.map(|at| at.0.saturating_sub(wall.0).min(CALENDAR_MS).max(held));
        [intake, deadline, date].into_iter().flatten().min()
    }

    /// Whether no request waits for a turn. Those that wait for a run to be read do not count.
    #[must_use]
    pub fn is_drained(&self) -> bool {
        self.control.is_empty() && self.intake.is_empty()
    }

    /// Nothing lapses before this instant: the process stood still, and what had arrived is not read yet.
    pub fn hold_ticks(&mut self, until: Timestamp) {
        self.hold_ticks = self.hold_ticks.max(until);
    }

    /// Nothing is to be done for the moment: see [`Store::idle`]. An error is final.
    pub fn idle(&mut self, since_ms: u64) -> Result<Option<u64>, StorageError> {
        if let Some(reason) = &self.failed {
            return Err(StorageError::Stopped(reason.clone()));
        }
        let wish = self.store.idle(since_ms);
        self.note_failure(wish)
    }

    /// How much intake the store takes.
    #[must_use]
    pub fn pressure(&self) -> Pressure {
        self.store.pressure()
    }

    /// The broker, for reading.
    #[must_use]
    pub fn broker(&self) -> &Broker {
        &self.broker
    }

    /// The store, for reading.
    #[must_use]
    pub fn store(&self) -> &S {
        &self.store
    }

    /// Closes the store. After a failed commit this does nothing more than to say so again.
    pub fn close(self) -> Result<(), StorageError> {
        match self.failed {
            Some(reason) => Err(StorageError::Stopped(reason)),
            None => Box::new(self.store).close(),
        }
    }

    fn note_failure<T>(&mut self, result: Result<T, StorageError>) -> Result<T, StorageError> {
        if let Err(error) = &result {
            self.failed = Some(error.to_string());
        }
        result
    }

    /// Applies a command at once and notes what it changed about runs that are being read.
    fn apply(&mut self, turn: Turn, work: &mut Work, request: Request) {
        let before = work.tx.facts.len();
        let reply = self.broker.apply(&mut work.tx, turn, request.command);
        self.loads.changed(&work.tx.facts[before..]);
        if let Some(ticket) = request.ticket {
            work.out.replies.push((ticket, reply));
        }
    }

    /// Applies a command, or parks it if it needs a run that is not resident. One that no entry of the log could hold is refused.
    fn apply_or_park(&mut self, turn: Turn, work: &mut Work, request: Request, cost: Cost) {
        if cost.bytes > LARGEST_COMMAND {
            if let Some(ticket) = request.ticket {
                let reply = refuse(&request.command, &too_large(cost.bytes));
                work.out.replies.push((ticket, reply));
            }
            return;
        }
        let runs = self.broker.needs(&request.command);
        if runs.is_empty() {
            self.apply(turn, work, request);
            return;
        }
        for run in &runs {
            self.loads.want(*run);
            self.unparkable |= self.loads.fresh(*run).is_some();
        }
        self.parked.push(Parked { request, runs });
    }

    /// Answers the queries whose runs have been read. What is resident is durable at this point of a turn.
    fn answer_parked(&mut self, turn: Turn, out: &mut TurnOutput) {
        if self.questions.is_empty() || !self.unparkable {
            return;
        }
        let mut adopted = false;
        for (ticket, query) in std::mem::take(&mut self.questions) {
            let answer = match self.broker.needs_query(&query) {
                None => self.broker.query(turn, &query),
                Some(run) => {
                    if std::mem::take(&mut adopted) {
                        self.broker.release_adopted();
                    }
                    match self.adopt(run) {
                        // It stays for the queries that follow, as long as they are about the same run.
                        Some(Ok(resident)) => {
                            adopted = resident;
                            self.broker.query(turn, &query)
                        }
                        Some(Err(no)) => Answer::No(no),
                        None => {
                            self.loads.want(run);
                            self.questions.push((ticket, query));
                            continue;
                        }
                    }
                }
            };
            out.answers.push((ticket, answer));
        }
        if adopted {
            self.broker.release_adopted();
        }
    }

    /// Makes a run resident from what was read of it. `Ok(false)`: there is no such run, and whoever asked will say so. `None`: it has
    /// not been read, or not since it changed.
    fn adopt(&mut self, run: RunSeq) -> Option<Result<bool, Rejection>> {
        Some(match self.loads.fresh(run)? {
            Ok(None) => Ok(false),
            Ok(Some(facts)) => match self.broker.adopt(run, facts.clone()) {
                Ok(()) => Ok(true),
                Err(error) => Err(damaged(run, &error.detail)),
            },
            Err(detail) => Err(damaged(run, detail)),
        })
    }

    /// Applies the commands whose runs have been read and are still as they were read.
    fn take_parked(&mut self, turn: Turn, work: &mut Work) {
        if !std::mem::take(&mut self.unparkable) {
            return;
        }
        for mut parked in std::mem::take(&mut self.parked) {
            // Again: an earlier command may have brought the run back, or changed it.
            parked.runs = self.broker.needs(&parked.request.command);
            for run in &parked.runs {
                self.loads.want(*run);
            }
            let is_read = (parked.runs.iter()).all(|run| self.loads.fresh(*run).is_some());
            let used = work.used.plus(cost(&parked.request.command));
            let fits = work.used == Cost::default() || used.fits(TURN_BUDGET);
            if is_read && fits {
                work.used = used;
                self.adopt_and_apply(turn, work, parked);
            } else {
                // The next turn looks again.
                self.unparkable |= is_read;
                self.parked.push(parked);
            }
        }
        let (parked, questions, broker) = (&self.parked, &self.questions, &self.broker);
        self.loads.keep_only(|run| {
            parked.iter().any(|parked| parked.runs.contains(&run))
                || questions
                    .iter()
                    .any(|(_, query)| broker.needs_query(query) == Some(run))
        });
    }

    fn adopt_and_apply(&mut self, turn: Turn, work: &mut Work, parked: Parked) {
        for run in parked.runs {
            if let Some(Err(no)) = self.adopt(run) {
                self.broker.release_adopted();
                if let Some(ticket) = parked.request.ticket {
                    let reply = refuse(&parked.request.command, &no);
                    work.out.replies.push((ticket, reply));
                }
                return;
            }
        }
        self.apply(turn, work, parked.request);
    }

    fn take_control(&mut self, turn: Turn, work: &mut Work) {
        if self.pressure != Pressure::Stop {
            for (session, calls) in std::mem::take(&mut self.held_credit) {
                let command = Command::Credit { session, calls };
                self.control.push_front(Request {
                    ticket: None,
                    command,
                });
            }
        }
        while let Some(next) = self.control.front() {
            let cost = cost(&next.command);
            let used = work.used.plus(cost);
            if work.used != Cost::default() && !used.fits(TURN_BUDGET) {
                return;
            }
            if cost.bytes <= LARGEST_COMMAND {
                work.used = used;
            }
            if let Some(request) = self.control.pop_front() {
                self.tick_behind = self.tick_behind.map(|n| n.saturating_sub(1));
                match &request.command {
                    Command::Credit { session, calls } if self.pressure == Pressure::Stop => {
                        let held = self.held_credit.entry(*session).or_default();
                        *held = held.saturating_add(*calls);
                        let reply = Reply::Done(vec![Ok(())]);
                        work.out
                            .replies
                            .extend(request.ticket.map(|ticket| (ticket, reply)));
                        continue;
                    }
                    // What a session could take ends with its connection.
                    Command::Attach(Attach { session, .. })
                    | Command::Detach(session)
                    | Command::Close(session) => {
                        self.held_credit.remove(session);
                    }
                    _ => {}
                }
                self.apply_or_park(turn, work, request, cost);
            }
        }
    }

    /// Lets time pass, once the completions and heartbeats that had arrived before were applied (STATE §4).
    fn tick_if_due(&mut self, turn: Turn, work: &mut Work) {
        let due = self.broker.next_deadline().is_some_and(|at| at <= turn.now)
            || (self.broker.next_wall_deadline()).is_some_and(|at| at <= turn.wall);
        if !due || turn.now < self.hold_ticks {
            self.tick_behind = None;
            return;
        }
        let behind = self.tick_behind.unwrap_or(self.control.len());
        if behind > 0 {
            self.tick_behind = Some(behind);
            return;
        }
        self.tick_behind = None;
        let tick = Request {
            ticket: None,
            command: Command::Tick,
        };
        self.apply(turn, work, tick);
    }

    fn take_intake(&mut self, turn: Turn, work: &mut Work) {
        if self.intake.is_empty() {
            return;
        }
        if let Some(no) = handle::refusal(self.pressure) {
            for request in self.intake.drain(..) {
                if let Some(ticket) = request.ticket {
                    let reply = refuse(&request.command, &no);
                    work.out.replies.push((ticket, reply));
                }
            }
            return;
        }
        let budget = if self.pressure == Pressure::Slow {
            if turn.now < self.next_intake {
                return;
            }
            self.next_intake = turn.now.after_ms(SLOW_INTAKE_MS);
            SMALL_BUDGET
        } else {
            Cost {
                nodes: TURN_BUDGET
                    .nodes
                    .saturating_sub(work.used.nodes)
                    .max(SMALL_BUDGET.nodes),
                bytes: TURN_BUDGET
                    .bytes
                    .saturating_sub(work.used.bytes)
                    .max(SMALL_BUDGET.bytes),
            }
        };
        let mut used = Cost::default();
        while let Some(next) = self.intake.front() {
            let cost = cost(&next.command);
            let with_next = used.plus(cost);
            if used != Cost::default() && !with_next.fits(budget) {
                return;
            }
            if cost.bytes <= LARGEST_COMMAND {
                let in_all = work.used.plus(with_next).bytes;
                if in_all > LARGEST_TURN {
                    return;
                }
                used = with_next;
            }
            if let Some(request) = self.intake.pop_front() {
                self.apply_or_park(turn, work, request, cost);
            }
        }
    }

    /// Makes the turn durable, and only then lets anything go.
    fn commit(&mut self, work: Work) -> Result<TurnOutput, StorageError> {
        let Work { tx, mut out, .. } = work;
        out.facts = tx.facts.len();
        if !tx.facts.is_empty() {
            for fact in &tx.facts {
                learn(fact, &mut out.specs, &mut out.names);
            }
            let committed = self.store.commit(StorageBatch {
                now: self.now,
                facts: tx.facts,
            });
            self.note_failure(committed)?;
        }
        out.effects = tx.effects;
        // Read after this commit, so what this turn changed is seen.
        out.loads = self.loads.begin();
        Ok(out)
    }
}

/// How an engine came up.
#[derive(Debug)]
pub struct Started {
    /// What the store said.
    pub loaded: Loaded,
    /// The broker's time at the start.
    pub now: Timestamp,
    /// All specs.
    pub specs: Vec<(SpecId, Arc<Spec>)>,
    /// All routes and outputs.
    pub names: Vec<(NameId, Arc<str>)>,
}

fn learn(fact: &Fact, specs: &mut Vec<(SpecId, Arc<Spec>)>, names: &mut Vec<(NameId, Arc<str>)>) {
    match fact {
        Fact::Spec { id, spec } => specs.push((*id, Arc::clone(spec))),
        Fact::Name { id, name } => names.push((*id, Arc::clone(name))),
        _ => {}
    }
}

fn too_large(bytes: usize) -> Rejection {
    Rejection::new(
        Code::GraphTooLarge,
        format!(
            "{bytes} bytes at once, the limit is {LARGEST_COMMAND}: send less in one frame, or create children in several parts by flush()"
        ),
    )
}

fn damaged(run: RunSeq, detail: &str) -> Rejection {
    Rejection::new(
        Code::StoreCorrupt,
        format!("run {:x} cannot be read: {detail}", run.0),
    )
}

#[cfg(test)]
mod tests;
