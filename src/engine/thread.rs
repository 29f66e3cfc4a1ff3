//! The engine's thread: feeds what has arrived to turns, and carries what they release to whoever waits.
//!
//! It sleeps until something arrives or a deadline comes; nothing is ever held back to make a batch larger, yet all that has arrived while a
//! commit was being synced shares the next one. Invariant: when it ends, for whatever reason, everybody who waits is told (G17).

use std::collections::HashMap;
use std::sync::{Arc, mpsc};
use std::time::Duration;

use tokio::sync::{oneshot, watch};

use super::clock::{BootClock, Stopwatch, wall_now};
use super::handle::{Handle, Info, PressureGauge, Shared};
use super::inbox::{Arrived, Charge, Envelope, Inbox};
use super::load::read_run;
use super::routes::Routes;
use super::{Engine, Request, StartError, Ticket, TurnOutput};
use crate::broker::Settings;
use crate::broker::command::{Answer, Command, Reply};
use crate::broker::types::{RunSeq, Timestamp, Turn};
use crate::storage::{Loaded, Pressure, StorageError, Store};

/// Ended runs that retention reads, and deletes, at a time.
const RETENTION_SLICE: usize = 256;
/// Slices in a row without an old run after which a pass of retention ends: runs are kept in order of creation, so old ones come first.
const RETENTION_FRUITLESS: u32 = 16;
/// How often the store is asked again while it wants less or no intake, in milliseconds.
const PRESSURE_EVERY_MS: u64 = 100;
/// When the thread wakes this much late, in milliseconds, the process stood still (stopped, suspended, starved).
const STOOD_STILL_MS: u64 = 1_000;
/// How long nothing lapses after that: what had arrived meanwhile is read first.
const CATCH_UP_MS: u64 = 1_000;

/// How the engine runs.
#[derive(Debug, Clone)]
pub struct EngineOptions {
    /// Of the broker.
    pub settings: Settings,
    /// Ended runs are deleted after this long, in milliseconds of the broker's time.
    pub retention_ms: u64,
    /// How often retention looks for runs that are old enough, in milliseconds of the broker's time.
    pub retention_every_ms: u64,
    /// Most pieces of intake in flight.
    pub max_requests: usize,
    /// Most bytes of intake in flight.
    pub max_bytes: usize,
}

impl Default for EngineOptions {
    fn default() -> Self {
        Self {
            settings: Settings::default(),
            retention_ms: 7 * 24 * 60 * 60 * 1_000,
            retention_every_ms: 60_000,
            max_requests: 1_024,
            max_bytes: 256 << 20,
        }
    }
}

/// The running engine. Dropping it does not stop the engine; a handle does not keep it running.
#[derive(Debug)]
pub struct EngineThread {
    handle: Handle,
    thread: std::thread::JoinHandle<Result<(), StorageError>>,
}

impl EngineThread {
    /// Asks the engine to end: what has arrived is still applied and answered, later calls get [`Stopped`](super::Stopped), the store is closed.
    pub fn stop(&self) {
        self.handle.0.inbox.stop();
    }

    /// Waits for the end. An error means that a commit failed (G17) or that the engine panicked: the process must exit and say so.
    pub fn join(self) -> Result<(), StorageError> {
        match self.thread.join() {
            Ok(result) => result,
            Err(_) => Err(StorageError::Stopped("the engine panicked".to_owned())),
        }
    }

    /// Whether it has ended.
    #[must_use]
    pub fn is_finished(&self) -> bool {
        self.thread.is_finished()
    }
}

/// Loads the store, starts the engine's thread and its two helpers. Blocking.
pub fn spawn<S: Store + 'static>(
    store: S,
    options: EngineOptions,
) -> Result<(Handle, EngineThread, Loaded), StartError> {
    let lease_ms = options.settings.lease_ms;
    let (engine, started) = Engine::start(store, options.settings, wall_now())?;
    let shared = Arc::new(Shared {
        inbox: Inbox::new(options.max_requests, options.max_bytes),
        routes: Routes::default(),
        pressure: PressureGauge::default(),
        reader: engine.store().reader(),
        payloads: engine.store().payloads(),
        info: Info {
            store_id: started.loaded.store_id,
            lease_ms,
            pid: std::process::id(),
            started: Stopwatch::start(),
        },
        stopped: watch::Sender::new(false),
    });
    shared.pressure.set(engine.pressure());
    shared.routes.learn_specs(started.specs);
    shared.routes.learn_names(started.names);

    let driver = Driver {
        engine,
        clock: BootClock::starting_at(started.now),
        tickets: 0,
        replies: HashMap::new(),
        answers: HashMap::new(),
        reads: helper("dagorama-load", &shared, |shared, run| {
            let facts = read_run(&*shared.reader, run);
            shared.inbox.loaded(vec![(run, facts)]);
        })?,
        retention: Retention {
            keep_ms: options.retention_ms,
            every_ms: options.retention_every_ms,
            next_pass: started.now.after_ms(options.retention_every_ms),
            fruitless: 0,
            running: false,
            slices: helper("dagorama-old", &shared, find_old_runs)?,
        },
        last_commit: Stopwatch::start(),
        shared: Arc::clone(&shared),
    };
    let handle = Handle(shared);
    let thread = std::thread::Builder::new()
        .name("dagorama-engine".to_owned())
        .spawn(move || driver.run())
        .map_err(StartError::Thread)?;
    let engine_thread = EngineThread {
        handle: handle.clone(),
        thread,
    };
    Ok((handle, engine_thread, started.loaded))
}

/// A thread that does one kind of blocking job after another until its sender is dropped.
fn helper<J: Send + 'static>(
    name: &str,
    shared: &Arc<Shared>,
    work: fn(&Shared, J),
) -> Result<mpsc::Sender<J>, StartError> {
    let (sender, jobs) = mpsc::channel();
    let shared = Arc::clone(shared);
    std::thread::Builder::new()
        .name(name.to_owned())
        .spawn(move || {
            for job in jobs {
                work(&shared, job);
            }
        })
        .map_err(StartError::Thread)?;
    Ok(sender)
}

/// A slice of ended runs to look at.
#[derive(Debug, Clone, Copy)]
struct OldRuns {
    first: RunSeq,
    ended_before: Timestamp,
}

fn find_old_runs(shared: &Shared, job: OldRuns) {
    let found = (shared.reader).ended_runs(job.first, job.ended_before, RETENTION_SLICE);
    let (runs, next) = found.unwrap_or_else(|error| {
        // Deleting can wait, and a damaged record is reported to whoever reads it; a broken store stops the engine by itself.
        tracing::error!(%error, "retention could not read the ended runs");
        (Vec::new(), None)
    });
    shared.inbox.old_runs(runs, next);
}

/// Deletion of old runs: slice after slice, each read beside the turns and deleted by one.
struct Retention {
    keep_ms: u64,
    every_ms: u64,
    next_pass: Timestamp,
    fruitless: u32,
    running: bool,
    slices: mpsc::Sender<OldRuns>,
}

impl Retention {
    /// Milliseconds until the next pass; `None` while one is under way.
    fn due_in(&self, now: Timestamp) -> Option<u64> {
        (!self.running).then(|| self.next_pass.0.saturating_sub(now.0))
    }

    fn begin_if_due(&mut self, now: Timestamp) {
        if self.due_in(now) == Some(0) {
            self.next_pass = now.after_ms(self.every_ms);
            self.fruitless = 0;
            self.read(RunSeq(0), now);
        }
    }

    fn read(&mut self, first: RunSeq, now: Timestamp) {
        let ended_before = Timestamp(now.0.saturating_sub(self.keep_ms));
        // If the helper is gone, nothing is deleted any more until the next start.
        self.running = self
            .slices
            .send(OldRuns {
                first,
                ended_before,
            })
            .is_ok();
    }

    /// A slice was read: what is to be deleted.
    fn found(&mut self, runs: Vec<RunSeq>, next: Option<RunSeq>, now: Timestamp) -> Vec<RunSeq> {
        self.running = false;
        self.fruitless = if runs.is_empty() {
            self.fruitless + 1
        } else {
            0
        };
        if let Some(next) = next
            && self.fruitless < RETENTION_FRUITLESS
        {
            self.read(next, now);
        }
        runs
    }
}

/// Tells everybody who waits that the engine has ended, also when it panics.
struct LastWords {
    shared: Arc<Shared>,
    reason: String,
}

impl Drop for LastWords {
    fn drop(&mut self) {
        drop(self.shared.inbox.close(&self.reason));
        self.shared.routes.close();
        self.shared.stopped.send_replace(true);
    }
}

struct Driver<S: Store> {
    engine: Engine<S>,
    clock: BootClock,
    tickets: u64,
    replies: HashMap<Ticket, (oneshot::Sender<Reply>, Option<Charge>)>,
    answers: HashMap<Ticket, oneshot::Sender<Answer>>,
    reads: mpsc::Sender<RunSeq>,
    retention: Retention,
    last_commit: Stopwatch,
    shared: Arc<Shared>,
}

impl<S: Store> Driver<S> {
    fn run(mut self) -> Result<(), StorageError> {
        let mut last_words = LastWords {
            shared: Arc::clone(&self.shared),
            reason: "the engine panicked".to_owned(),
        };
        let ended = self.turns();
        last_words.reason = match &ended {
            Ok(()) => "the broker is shutting down".to_owned(),
            Err(error) => with_causes(error),
        };
        // First the reason, then the drop of all senders, so that whoever waits finds it.
        drop(last_words);
        self.replies.clear();
        self.answers.clear();
        match ended {
            Ok(()) => self.engine.close(),
            Err(error) => Err(error),
        }
    }

    fn turns(&mut self) -> Result<(), StorageError> {
        let mut stopping = false;
        // The process may stand still at any instant, within a commit too.
        let mut round = Stopwatch::start();
        let mut was_late = false;
        loop {
            let wait = if stopping { Some(0) } else { self.wait()? };
            let arrived = self.shared.inbox.take(wait.map(Duration::from_millis));
            let late = wait.map_or(0, |wait| round.elapsed_ms().saturating_sub(wait));
            round = Stopwatch::start();
            // Not twice in a row: on a slow disk every round is late, and time has to pass there too.
            was_late = late > STOOD_STILL_MS && !was_late;
            if was_late {
                let until = self.clock.now().after_ms(CATCH_UP_MS);
                self.engine.hold_ticks(until);
            }
            stopping |= arrived.stopping;
            self.step(arrived)?;
            if stopping && self.engine.is_drained() {
                return Ok(());
            }
        }
    }

    /// How long to sleep if nothing arrives.
    fn wait(&mut self) -> Result<Option<u64>, StorageError> {
        let now = self.clock.now();
        let due = self.engine.due_in(now, wall_now());
        if due == Some(0) {
            return Ok(due);
        }
        let idle = self.engine.idle(self.last_commit.elapsed_ms())?;
        let pressure = self.engine.pressure();
        self.shared.pressure.set(pressure);
        let pressed = (pressure != Pressure::None).then_some(PRESSURE_EVERY_MS);
        let retention = self.retention.due_in(now);
        Ok([due, idle, pressed, retention].into_iter().flatten().min())
    }

    fn step(&mut self, arrived: Arrived) -> Result<(), StorageError> {
        let turn = Turn {
            now: self.clock.now(),
            wall: wall_now(),
            seed: seed()?,
        };
        for (run, facts) in arrived.loads {
            self.engine.loaded(run, facts);
        }
        let mut requests = Vec::with_capacity(arrived.control.len() + arrived.intake.len() + 2);
        let unanswered = |command| Request {
            ticket: None,
            command,
        };
        if !arrived.touched.is_empty() {
            requests.push(unanswered(Command::Touch(arrived.touched)));
        }
        for (runs, next) in arrived.old_runs {
            let old = self.retention.found(runs, next, turn.now);
            if !old.is_empty() {
                requests.push(unanswered(Command::Expire(old)));
            }
        }
        self.retention.begin_if_due(turn.now);
        for envelope in arrived.control.into_iter().chain(arrived.intake) {
            requests.push(self.receive(envelope));
        }
        if !requests.is_empty() || self.engine.due_in(turn.now, turn.wall) == Some(0) {
            let output = self.engine.turn(turn, requests)?;
            self.release(output);
        }
        for question in arrived.questions {
            let ticket = self.ticket();
            match self.engine.ask(turn, ticket, question.query) {
                // Whoever asked may have gone away.
                Some(answer) => drop(question.answer.send(answer)),
                None => drop(self.answers.insert(ticket, question.answer)),
            }
        }
        let wanted = self.engine.wanted();
        self.read_runs(wanted);
        Ok(())
    }

    fn ticket(&mut self) -> Ticket {
        self.tickets += 1;
        Ticket(self.tickets)
    }

    fn receive(&mut self, envelope: Envelope) -> Request {
        let ticket = self.ticket();
        self.replies
            .insert(ticket, (envelope.reply, envelope.charge));
        Request {
            ticket: Some(ticket),
            command: envelope.command,
        }
    }

    /// Carries what a durable turn released: names, replies, effects, in this order.
    fn release(&mut self, output: TurnOutput) {
        if output.facts > 0 {
            self.last_commit = Stopwatch::start();
        }
        self.shared.pressure.set(self.engine.pressure());
        self.shared.routes.learn_specs(output.specs);
        self.shared.routes.learn_names(output.names);
        for (ticket, reply) in output.replies {
            if let Some((sender, _charge)) = self.replies.remove(&ticket) {
                // Whoever asked may have gone away.
                let _ = sender.send(reply);
            }
        }
        for (ticket, answer) in output.answers {
            if let Some(sender) = self.answers.remove(&ticket) {
                let _ = sender.send(answer);
            }
        }
        self.shared.routes.release(output.effects);
        self.read_runs(output.loads);
    }

    fn read_runs(&self, runs: Vec<RunSeq>) {
        for run in runs {
            // The helper lives as long as this sender.
            let _ = self.reads.send(run);
        }
    }
}

/// Random bits for a turn.
fn seed() -> Result<u64, StorageError> {
    getrandom::u64().map_err(|error| {
        StorageError::Stopped(format!(
            "the operating system gives no random bits: {error}"
        ))
    })
}

fn with_causes(error: &StorageError) -> String {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn retention() -> (Retention, mpsc::Receiver<OldRuns>) {
        let (slices, jobs) = mpsc::channel();
        let retention = Retention {
            keep_ms: 1_000,
            every_ms: 60_000,
            next_pass: Timestamp(60_000),
            fruitless: 0,
            running: false,
            slices,
        };
        (retention, jobs)
    }

    #[test]
    fn a_pass_of_retention_reads_slice_after_slice_and_ends_when_nothing_old_comes_any_more() {
        let (mut retention, jobs) = retention();
        retention.begin_if_due(Timestamp(59_999));
        assert!(jobs.try_recv().is_err(), "not yet");
        retention.begin_if_due(Timestamp(60_000));
        let job = jobs.try_recv().unwrap();
        assert_eq!(
            (job.first, job.ended_before),
            (RunSeq(0), Timestamp(59_000))
        );
        assert_eq!(
            retention.due_in(Timestamp(60_000)),
            None,
            "one pass at a time"
        );

        let now = Timestamp(60_100);
        let old = retention.found(vec![RunSeq(1)], Some(RunSeq(2)), now);
        assert_eq!(old, [RunSeq(1)]);
        let mut slices = 0;
        while let Ok(job) = jobs.try_recv() {
            assert_eq!(job.first, RunSeq(2 + slices));
            slices += 1;
            assert!(
                retention
                    .found(Vec::new(), Some(RunSeq(2 + slices)), now)
                    .is_empty()
            );
        }
        assert_eq!(slices, u64::from(RETENTION_FRUITLESS));
        assert_eq!(retention.due_in(Timestamp(60_100)), Some(59_900));

        retention.begin_if_due(Timestamp(120_000));
        assert_eq!(
            jobs.try_recv().unwrap().first,
            RunSeq(0),
            "again from the oldest"
        );
        retention.found(vec![RunSeq(9)], None, now);
        assert!(jobs.try_recv().is_err(), "at the end of the table");
        assert!(retention.due_in(Timestamp(130_000)).is_some());
    }

    #[test]
    fn an_error_is_told_with_its_causes() {
        let error = StorageError::Io {
            what: "fdatasync",
            path: "/x".to_owned(),
            source: std::io::Error::other("no space"),
        };
        assert_eq!(with_causes(&error), "fdatasync failed on /x: no space");
    }
}
