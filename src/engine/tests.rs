//! What a turn promises: order, budget, parking, pressure, fail-stop; and the same through the thread and the handle.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use bytes::Bytes;

use super::load::read_run;
use super::*;
use crate::broker::command::{
    Attach, AttemptEnd, Completion, Delay, NewNode, Reply, Submission, Submitted,
};
use crate::broker::outcome::Lease;
use crate::broker::types::{
    Body, Codec, NodeIndex, NodeKey, Payload, Retry, RunId, RunState, SessionId,
};
use crate::storage::memory::{Fault, MemoryStore};
use crate::storage::{PayloadWriter, Read};

const WORKER: SessionId = SessionId(7);

fn payload(bytes: &[u8]) -> Payload {
    Payload {
        codec: Codec::Raw,
        body: Body::Inline(Bytes::copy_from_slice(bytes)),
    }
}

fn spec() -> Arc<Spec> {
    Arc::new(Spec {
        action: Arc::from("act"),
        queue: Arc::from("default"),
        taint: None,
        priority: 0,
        retry: Retry::default(),
        timeout_ms: None,
        fingerprint: None,
        pin_code: false,
        batch: None,
        by_name: false,
    })
}

fn submit(n: usize) -> Command {
    let node = NewNode {
        spec: 0,
        arguments: payload(b"x"),
        inputs: Vec::new(),
        delay: Delay::None,
    };
    Command::Submit(vec![Submission {
        key: None,
        specs: vec![spec()],
        nodes: vec![node; n],
        root: 0,
        tags: BTreeMap::new(),
        origin: None,
    }])
}

fn attach() -> Command {
    Command::Attach(Attach {
        session: WORKER,
        name: Arc::from("w"),
        queues: vec![Arc::from("default")],
        tolerations: Vec::new(),
        actions: vec![spec()],
    })
}

fn credit(calls: u32) -> Command {
    Command::Credit {
        session: WORKER,
        calls,
    }
}

fn finish(leases: &[Lease], end: &AttemptEnd) -> Command {
    let completion = |lease: &Lease| Completion {
        node: lease.node,
        attempt: lease.attempt,
        token: lease.token,
        digest: 5,
        specs: Vec::new(),
        children: Vec::new(),
        end: end.clone(),
    };
    Command::Finish(leases.iter().map(completion).collect())
}

fn value() -> AttemptEnd {
    AttemptEnd::Value(payload(b"v"))
}

fn failed() -> AttemptEnd {
    AttemptEnd::Failed {
        error: payload(b"{}"),
        retryable: false,
        timed_out: false,
    }
}

/// An engine, driven by hand.
struct Bench {
    engine: Engine<MemoryStore>,
    store: MemoryStore,
    now: u64,
    tickets: u64,
}

impl Bench {
    fn new() -> Self {
        let store = MemoryStore::new();
        let wall = WallTime(1_000);
        let (engine, started) = Engine::start(store.clone(), Settings::default(), wall).unwrap();
        Self {
            engine,
            store,
            now: started.now.0,
            tickets: 0,
        }
    }

    fn at(&self) -> Turn {
        Turn {
            now: Timestamp(self.now),
            wall: WallTime(1_000 + self.now),
            seed: 1,
        }
    }

    fn try_turn(&mut self, commands: Vec<Command>) -> Result<TurnOutput, StorageError> {
        let turn = self.at();
        let requests = commands.into_iter().map(|command| {
            self.tickets += 1;
            Request {
                ticket: Some(Ticket(self.tickets)),
                command,
            }
        });
        let requests = requests.collect();
        self.engine.turn(turn, requests)
    }

    fn turn(&mut self, commands: Vec<Command>) -> TurnOutput {
        let output = self.try_turn(commands).unwrap();
        self.engine.broker().check_invariants();
        output
    }

    fn one(&mut self, command: Command) -> Reply {
        let mut replies = self.turn(vec![command]).replies;
        assert_eq!(replies.len(), 1, "{replies:?}");
        replies.remove(0).1
    }

    fn submitted(&mut self, n: usize) -> RunId {
        run_of(&self.one(submit(n)))
    }

    fn leases(&mut self, calls: u32) -> Vec<Lease> {
        leases_of(&self.turn(vec![attach(), credit(calls)]))
    }

    /// Reads what was asked for, now.
    fn read(&self, loads: &[RunSeq]) -> Vec<(RunSeq, RunFacts)> {
        let reader = self.store.reader();
        loads
            .iter()
            .map(|run| (*run, read_run(&*reader, *run)))
            .collect()
    }

    fn deliver(&mut self, reads: Vec<(RunSeq, RunFacts)>) {
        for (run, facts) in reads {
            self.engine.loaded(run, facts);
        }
    }

    fn due(&self) -> Option<u64> {
        self.engine.due_in(self.at().now, self.at().wall)
    }
}

fn run_of(reply: &Reply) -> RunId {
    match reply {
        Reply::Submitted(list) => list[0].as_ref().unwrap().run,
        other => panic!("{other:?}"),
    }
}

fn leases_of(output: &TurnOutput) -> Vec<Lease> {
    let leases = output.effects.iter().filter_map(|effect| match effect {
        Effect::Lease(lease) => Some(lease.clone()),
        _ => None,
    });
    leases.collect()
}

fn codes(reply: &Reply) -> Vec<Option<Code>> {
    match reply {
        Reply::Done(list) => list
            .iter()
            .map(|one| one.as_ref().err().map(|no| no.code))
            .collect(),
        Reply::Submitted(list) => list
            .iter()
            .map(|one| one.as_ref().err().map(|no| no.code))
            .collect(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn commands_that_arrived_together_share_one_commit_and_nothing_is_no_commit() {
    let mut bench = Bench::new();
    let before = bench.store.commits();
    let output = bench.turn(vec![submit(1), attach(), credit(2), submit(1)]);
    assert_eq!(bench.store.commits(), before + 1, "a turn is one commit");
    assert_eq!(output.replies.len(), 4);
    let leases = leases_of(&output);
    assert_eq!(leases.len(), 2, "submit and lease share it");
    let output = bench.turn(vec![Command::Touch(vec![WORKER])]);
    assert_eq!((output.facts, bench.store.commits()), (0, before + 1));
    // Completion, wake and answer: a hop is one commit.
    let output = bench.turn(vec![finish(&leases, &value())]);
    assert_eq!(bench.store.commits(), before + 2);
    assert_eq!(codes(&output.replies[0].1), [None, None]);
}

#[test]
fn control_goes_before_intake_and_heartbeats_before_both() {
    let mut bench = Bench::new();
    let output = bench.turn(vec![submit(1), attach(), Command::Touch(vec![])]);
    let order: Vec<u64> = output.replies.iter().map(|(ticket, _)| ticket.0).collect();
    assert_eq!(order, [3, 2, 1]);
}

#[test]
fn a_failed_commit_is_final_and_lets_nothing_go() {
    for fault in [Fault::Lost, Fault::KeptUnseen] {
        let mut bench = Bench::new();
        bench.submitted(1);
        bench.store.fail_commit(1, fault);
        assert!(bench.try_turn(vec![submit(1)]).is_err());
        let again = bench.try_turn(vec![Command::Touch(vec![])]).unwrap_err();
        assert!(matches!(again, StorageError::Stopped(_)), "{again}");
        assert!(bench.engine.idle(0).is_err());
        assert!(bench.engine.close().is_err());
        let expected = if fault == Fault::Lost { 1 } else { 2 };
        let mut runs = 0;
        let mut after = bench.store.crash();
        after
            .load(&mut |fact| runs += u64::from(matches!(fact, Fact::Run { .. })))
            .unwrap();
        assert_eq!(runs, expected);
    }
}

#[test]
fn completions_that_have_arrived_come_before_the_lapse_even_over_several_turns() {
    let mut bench = Bench::new();
    bench.submitted(5_000);
    let leases = bench.leases(5_000);
    assert_eq!(leases.len(), 5_000);
    // Long after every lease's deadline.
    bench.now += 10 * Settings::default().lease_ms;
    assert_eq!(bench.due(), Some(0));
    let output = bench.turn(vec![
        finish(&leases[..3_000], &value()),
        finish(&leases[3_000..], &value()),
    ]);
    assert_eq!(
        output.replies.len(),
        1,
        "the second is over the turn's budget"
    );
    assert!(!bench.engine.is_drained());
    assert_eq!(bench.due(), Some(0));
    let output = bench.turn(vec![]);
    let accepted = codes(&output.replies[0].1);
    assert_eq!(accepted, vec![None; 2_000], "none has lapsed meanwhile");
    assert!(bench.engine.is_drained());
}

#[test]
fn a_lapse_is_not_put_off_for_ever_by_control_that_comes_after_it() {
    let mut bench = Bench::new();
    bench.submitted(6_000);
    let leases = bench.leases(6_000);
    bench.now += 10 * Settings::default().lease_ms;
    // Each turn takes one of these; they keep coming.
    let mut kept = 0;
    for chunk in leases.chunks(2_500) {
        let more = chunk.to_vec();
        let output = bench.turn(vec![finish(&more, &value()), finish(&more, &value())]);
        kept += output.replies.len();
    }
    let mut turns = 0;
    while bench.due() == Some(0) {
        kept += bench.turn(vec![]).replies.len();
        turns += 1;
        assert!(turns < 20, "it comes to rest");
    }
    assert_eq!(kept, 6);
}

#[test]
fn nothing_lapses_while_what_arrived_during_a_standstill_is_read() {
    let mut bench = Bench::new();
    bench.submitted(1);
    let leases = bench.leases(1);
    bench.now += 10 * Settings::default().lease_ms;
    bench.engine.hold_ticks(Timestamp(bench.now + 1_000));
    assert_eq!(bench.due(), Some(1_000));
    assert_eq!(bench.turn(vec![]).facts, 0);
    bench.now += 10;
    assert_eq!(codes(&bench.one(finish(&leases, &value()))), [None]);
}

#[test]
fn a_silent_session_loses_its_lease_once_the_hold_is_over() {
    let mut bench = Bench::new();
    bench.submitted(1);
    let leases = bench.leases(1);
    bench.now += Settings::default().lease_ms + 1;
    assert!(bench.turn(vec![]).facts > 0, "the tick lapsed it");
    let late = bench.one(finish(&leases, &value()));
    assert_eq!(codes(&late), [Some(Code::LeaseExpired)]);
}

// ---- parking --------------------------------------------------------------------------------------------------------

#[test]
fn a_command_that_needs_an_ended_run_waits_for_it_and_others_do_not() {
    let mut bench = Bench::new();
    let run = bench.submitted(1);
    let leases = bench.leases(1);
    assert_eq!(codes(&bench.one(finish(&leases, &value()))), [None]);

    let output = bench.turn(vec![finish(&leases, &value()), submit(1)]);
    assert_eq!(output.replies.len(), 1, "only the submission is answered");
    assert_eq!(output.loads, [run.seq]);
    assert_eq!(output.facts > 0, true);
    assert!(bench.turn(vec![]).loads.is_empty(), "asked for once");
    let reads = bench.read(&output.loads);
    bench.deliver(reads);
    assert_eq!(bench.due(), Some(0));
    let output = bench.turn(vec![]);
    assert_eq!(
        codes(&output.replies[0].1),
        [None],
        "the first answer again"
    );
    assert_eq!(output.facts, 0, "and nothing new");
    assert!(output.loads.is_empty());
    assert_ne!(bench.due(), Some(0), "nothing is left to be done");
}

#[test]
fn of_two_resumes_that_wait_for_the_same_run_only_the_first_begins_a_round() {
    let mut bench = Bench::new();
    let run = bench.submitted(1);
    let leases = bench.leases(1);
    bench.one(finish(&leases, &failed()));
    let output = bench.turn(vec![Command::Resume(run), Command::Resume(run)]);
    assert_eq!(
        (output.replies.len(), &output.loads[..]),
        (0, &[run.seq][..])
    );
    let reads = bench.read(&output.loads);
    bench.deliver(reads);
    let output = bench.turn(vec![]);
    let replies: Vec<_> = output
        .replies
        .iter()
        .map(|(_, reply)| codes(reply))
        .collect();
    assert_eq!(replies, [[None], [Some(Code::RunNotEnded)]]);
    let record = bench.store.reader().run(run.seq).unwrap().unwrap();
    assert_eq!((record.round, record.ended), (2, None));
}

#[test]
fn what_was_read_before_a_turn_changed_the_run_is_read_again() {
    let mut bench = Bench::new();
    let run = bench.submitted(1);
    let leases = bench.leases(1);
    bench.one(finish(&leases, &failed()));
    let loads = bench.turn(vec![Command::Resume(run)]).loads;
    // Read while the run is ended in round 1…
    let old = bench.read(&loads);
    let fresh = bench.read(&loads);
    bench.deliver(fresh);
    bench.turn(vec![]);
    let again = bench.turn(vec![credit(1)]);
    bench.one(finish(&leases_of(&again), &failed()));
    // …and delivered when it has ended in round 2: a second resume must see that, not the past.
    let loads = bench.turn(vec![Command::Resume(run)]).loads;
    assert_eq!(loads, [run.seq]);
    bench
        .engine
        .loads
        .changed(&[Fact::RunDeleted { run: run.seq }]);
    bench.deliver(old);
    let output = bench.turn(vec![]);
    assert!(output.replies.is_empty(), "the old facts are not adopted");
    assert_eq!(output.loads, [run.seq], "it is read again");
    let reads = bench.read(&output.loads);
    bench.deliver(reads);
    assert_eq!(codes(&bench.turn(vec![]).replies[0].1), [None]);
    let record = bench.store.reader().run(run.seq).unwrap().unwrap();
    assert_eq!(record.round, 3);
}

#[test]
fn a_run_that_does_not_exist_or_cannot_be_read_is_a_reply() {
    let mut bench = Bench::new();
    let run = bench.submitted(1);
    let leases = bench.leases(1);
    bench.one(finish(&leases, &failed()));
    for (facts, code) in [
        (Ok(None), Code::UnknownRun),
        (Err("page 7 is damaged".to_owned()), Code::StoreCorrupt),
    ] {
        let loads = bench.turn(vec![Command::Resume(run)]).loads;
        assert_eq!(loads, [run.seq]);
        bench.deliver(vec![(run.seq, facts)]);
        let output = bench.turn(vec![]);
        assert_eq!(codes(&output.replies[0].1), [Some(code)]);
        assert_eq!(output.facts, 0);
    }
    let unknown = RunId {
        seq: RunSeq(900),
        salt: 0,
    };
    assert_eq!(
        codes(&bench.one(Command::Resume(unknown))),
        [Some(Code::UnknownRun)]
    );
}

#[test]
fn queries_about_an_ended_run_are_answered_from_one_read() {
    let mut bench = Bench::new();
    let run = bench.submitted(1);
    let leases = bench.leases(1);
    bench.one(finish(&leases, &value()));
    let turn = bench.at();
    let value = Query::Value(NodeKey::new(run.seq, NodeIndex(0)));
    assert_eq!(bench.engine.ask(turn, Ticket(1), Query::Run(run)), None);
    assert_eq!(bench.engine.ask(turn, Ticket(2), value), None);
    assert!(bench.engine.ask(turn, Ticket(3), Query::Totals).is_some());
    let loads = bench.engine.wanted();
    assert_eq!(loads, [run.seq]);
    let reads = bench.read(&loads);
    bench.deliver(reads);
    let output = bench.turn(vec![]);
    assert_eq!(output.answers.len(), 2);
    assert!(matches!(
        &output.answers[0],
        (Ticket(1), Answer::Run(summary)) if summary.state == RunState::Succeeded
    ));
    assert!(matches!(
        &output.answers[1],
        (Ticket(2), Answer::Value { .. })
    ));
    assert_eq!(
        bench.engine.ask(turn, Ticket(4), Query::Run(run)),
        None,
        "it left again"
    );
}

// ---- pressure -------------------------------------------------------------------------------------------------------

#[test]
fn a_store_under_pressure_refuses_intake_and_never_control() {
    let mut bench = Bench::new();
    bench.submitted(3);
    let leases = bench.leases(3);
    for (n, (pressure, code)) in [
        (Pressure::Stop, Some(Code::Overloaded)),
        (Pressure::DiskFull, Some(Code::DiskFull)),
        (Pressure::None, None),
    ]
    .into_iter()
    .enumerate()
    {
        bench.store.set_pressure(pressure);
        let output = bench.turn(vec![submit(1), finish(&leases[n..=n], &value())]);
        let replies: Vec<_> = output
            .replies
            .iter()
            .map(|(_, reply)| codes(reply))
            .collect();
        assert_eq!(replies, [[None], [code]], "{pressure:?}");
    }
}

#[test]
fn a_store_that_lags_gets_little_intake_at_a_time() {
    let mut bench = Bench::new();
    bench.store.set_pressure(Pressure::Slow);
    let many = || (0..8).map(|_| submit(200)).collect::<Vec<_>>();
    assert_eq!(
        bench.turn(many()).replies.len(),
        2,
        "402 of 512 node operations"
    );
    assert_eq!(bench.due(), Some(SLOW_INTAKE_MS));
    assert_eq!(bench.turn(vec![attach()]).replies.len(), 1, "control only");
    bench.now += SLOW_INTAKE_MS;
    assert_eq!(bench.turn(vec![]).replies.len(), 2);
    bench.store.set_pressure(Pressure::None);
    assert_eq!(bench.turn(vec![]).replies.len(), 4, "the rest at once");
}

#[test]
fn a_turn_takes_what_its_budget_allows_and_intake_gets_a_share_beside_control() {
    let mut bench = Bench::new();
    bench.submitted(4_500);
    let leases = bench.leases(4_500);
    let output = bench.turn(vec![submit(300), submit(300), finish(&leases, &value())]);
    assert_eq!(
        output.replies.len(),
        2,
        "one large completion, and one submission"
    );
    assert_eq!(bench.turn(vec![]).replies.len(), 1);
    let output = bench.turn(vec![submit(9_000), submit(1)]);
    assert_eq!(output.replies.len(), 1, "a large one goes alone");
}

// ---- through the thread ---------------------------------------------------------------------------------------------

/// A store whose commits wait at a gate, and whose calls are counted.
#[derive(Clone)]
struct Gated {
    memory: MemoryStore,
    gate: Arc<(Mutex<bool>, Condvar)>,
    waiting: Arc<AtomicU64>,
    idles: Arc<AtomicU64>,
}

impl Gated {
    fn new() -> Self {
        Self {
            memory: MemoryStore::new(),
            gate: Arc::new((Mutex::new(true), Condvar::new())),
            waiting: Arc::default(),
            idles: Arc::default(),
        }
    }

    fn open(&self, open: bool) {
        *self.gate.0.lock().unwrap() = open;
        self.gate.1.notify_all();
    }

    async fn until_waiting(&self) {
        while self.waiting.load(Ordering::SeqCst) == 0 {
            tokio::task::yield_now().await;
        }
    }
}

impl Store for Gated {
    fn load(&mut self, absorb: &mut dyn FnMut(Fact)) -> Result<Loaded, StorageError> {
        self.memory.load(absorb)
    }
    fn commit(&mut self, batch: StorageBatch) -> Result<(), StorageError> {
        self.waiting.fetch_add(1, Ordering::SeqCst);
        let open = self.gate.0.lock().unwrap();
        drop(self.gate.1.wait_while(open, |open| !*open).unwrap());
        self.waiting.fetch_sub(1, Ordering::SeqCst);
        self.memory.commit(batch)
    }
    fn idle(&mut self, since_ms: u64) -> Result<Option<u64>, StorageError> {
        self.idles.fetch_add(1, Ordering::SeqCst);
        self.memory.idle(since_ms)
    }
    fn pressure(&self) -> Pressure {
        self.memory.pressure()
    }
    fn reader(&self) -> Arc<dyn Read> {
        self.memory.reader()
    }
    fn payloads(&self) -> Arc<dyn PayloadWriter> {
        self.memory.payloads()
    }
    fn close(self: Box<Self>) -> Result<(), StorageError> {
        Ok(())
    }
}

fn small_queue() -> EngineOptions {
    EngineOptions {
        max_requests: 2,
        ..EngineOptions::default()
    }
}

#[tokio::test]
async fn a_run_goes_from_submission_to_its_end_through_the_handle() {
    let store = Gated::new();
    let (handle, engine, _) = spawn(store.clone(), EngineOptions::default()).unwrap();
    let mut effects = handle.session_effects(WORKER);
    handle.control(attach()).await.unwrap();
    handle.control(credit(8)).await.unwrap();
    let run = run_of(&handle.intake(submit(2)).await.unwrap());
    let settled = handle.root_settled(run.seq);
    let ended = handle.run_ended(run.seq);
    let Some(SessionEffect::Leases(leases)) = effects.recv().await else {
        panic!("no leases");
    };
    assert_eq!(leases.len(), 2, "one message for both");
    assert_eq!(handle.spec(leases[0].spec), Some(spec()));
    let reply = handle
        .control(finish(&leases[..1], &value()))
        .await
        .unwrap();
    assert_eq!(codes(&reply), [None]);
    settled.await.unwrap();
    let Answer::Run(summary) = handle.query(Query::Run(run)).await.unwrap() else {
        panic!("no run");
    };
    assert_eq!(summary.state, RunState::Running);
    handle
        .control(finish(&leases[1..], &value()))
        .await
        .unwrap();
    ended.await.unwrap();
    let Answer::Run(summary) = handle.query(Query::Run(run)).await.unwrap() else {
        panic!("an ended run is read");
    };
    assert_eq!(summary.state, RunState::Succeeded);
    let repeated = handle.control(finish(&leases, &value())).await.unwrap();
    assert_eq!(
        codes(&repeated),
        [None, None],
        "a repetition gets the first answer"
    );
    let key = leases[0].node;
    let outcome = handle
        .read(move |reader| reader.outcome(key))
        .await
        .unwrap();
    assert_eq!(outcome.unwrap().payload, payload(b"v"));

    engine.stop();
    tokio::task::spawn_blocking(|| engine.join())
        .await
        .unwrap()
        .unwrap();
    assert!(handle.control(credit(1)).await.is_err());
    assert!(handle.query(Query::Totals).await.is_err());
    assert_eq!(effects.recv().await, None);
}

#[tokio::test]
async fn intake_beyond_the_limit_is_refused_at_once_and_control_passes() {
    let store = Gated::new();
    let (handle, engine, _) = spawn(store.clone(), small_queue()).unwrap();
    store.open(false);
    let spawn_intake = || {
        let handle = handle.clone();
        tokio::spawn(async move { handle.intake(submit(1)).await })
    };
    let first = spawn_intake();
    store.until_waiting().await;
    let second = spawn_intake();
    while handle.0.inbox.admit(Cost::default()).is_ok() {
        tokio::task::yield_now().await;
    }
    let refused = handle.intake(submit(1)).await.unwrap();
    assert_eq!(codes(&refused), [Some(Code::Overloaded)], "without waiting");
    let control = tokio::spawn({
        let handle = handle.clone();
        async move { handle.control(attach()).await }
    });
    store.open(true);
    assert_eq!(codes(&first.await.unwrap().unwrap()), [None]);
    assert_eq!(codes(&second.await.unwrap().unwrap()), [None]);
    assert!(matches!(control.await.unwrap(), Ok(Reply::Attached(_))));
    let later = handle.intake(submit(1)).await.unwrap();
    assert_eq!(codes(&later), [None], "room came back");
    engine.stop();
    engine.join().unwrap();
}

#[tokio::test]
async fn a_failed_commit_stops_everything_and_everybody_learns_why() {
    let store = Gated::new();
    let (handle, engine, _) = spawn(store.clone(), EngineOptions::default()).unwrap();
    let mut effects = handle.session_effects(WORKER);
    let run = run_of(&handle.intake(submit(1)).await.unwrap());
    let settled = handle.root_settled(run.seq);
    store.memory.fail_commit(1, Fault::KeptUnseen);
    store.open(false);
    let in_commit = tokio::spawn({
        let handle = handle.clone();
        async move { handle.intake(submit(1)).await }
    });
    store.until_waiting().await;
    let behind = tokio::spawn({
        let handle = handle.clone();
        async move { handle.control(attach()).await }
    });
    let asked = tokio::spawn({
        let handle = handle.clone();
        async move { handle.query(Query::Totals).await }
    });
    tokio::task::yield_now().await;
    store.open(true);
    for reason in [
        in_commit.await.unwrap().unwrap_err().reason,
        behind.await.unwrap().unwrap_err().reason,
        asked.await.unwrap().unwrap_err().reason,
        handle.stopped().await.reason,
        handle.control(attach()).await.unwrap_err().reason,
    ] {
        assert!(reason.contains("injected fault"), "{reason}");
    }
    assert!(settled.await.is_err());
    assert_eq!(effects.recv().await, None);
    assert!(
        handle.root_settled(run.seq).await.is_err(),
        "also who comes later"
    );
    let error = engine.join().unwrap_err();
    assert!(error.to_string().contains("sync"), "{error}");
}

#[tokio::test]
async fn pressure_is_felt_at_the_handle_and_passes_by_itself() {
    let store = Gated::new();
    store.memory.set_pressure(Pressure::DiskFull);
    let (handle, engine, _) = spawn(store.clone(), EngineOptions::default()).unwrap();
    assert_eq!(handle.pressure(), Pressure::DiskFull);
    let refused = handle.intake(submit(1)).await.unwrap();
    assert_eq!(codes(&refused), [Some(Code::DiskFull)]);
    assert!(handle.control(attach()).await.is_ok());
    store.memory.set_pressure(Pressure::None);
    while handle.pressure() != Pressure::None {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert_eq!(codes(&handle.intake(submit(1)).await.unwrap()), [None]);
    engine.stop();
    engine.join().unwrap();
}

#[tokio::test]
async fn an_idle_engine_sleeps() {
    let store = Gated::new();
    let (handle, engine, _) = spawn(store.clone(), EngineOptions::default()).unwrap();
    handle.intake(submit(1)).await.unwrap();
    tokio::time::sleep(Duration::from_millis(50)).await;
    let before = store.idles.load(Ordering::SeqCst);
    tokio::time::sleep(Duration::from_millis(300)).await;
    let woken = store.idles.load(Ordering::SeqCst) - before;
    assert!(woken <= 2, "woken {woken} times for nothing");
    engine.stop();
    engine.join().unwrap();
}

#[tokio::test]
async fn old_runs_are_deleted_and_open_ones_are_not() {
    let store = Gated::new();
    let options = EngineOptions {
        retention_ms: 0,
        retention_every_ms: 30,
        ..EngineOptions::default()
    };
    let (handle, engine, _) = spawn(store.clone(), options).unwrap();
    let mut effects = handle.session_effects(WORKER);
    handle.control(attach()).await.unwrap();
    let open = run_of(&handle.intake(submit(1)).await.unwrap());
    let mut old = Vec::new();
    for _ in 0..3 {
        old.push(run_of(&handle.intake(submit(1)).await.unwrap()));
    }
    handle.control(credit(4)).await.unwrap();
    let Some(SessionEffect::Leases(leases)) = effects.recv().await else {
        panic!("no leases");
    };
    let (of_open, of_old): (Vec<_>, Vec<_>) = leases
        .into_iter()
        .partition(|lease| lease.node.run == open.seq);
    assert_eq!((of_open.len(), of_old.len()), (1, 3));
    handle.control(finish(&of_old, &value())).await.unwrap();
    let reader = handle.reader();
    while old.iter().any(|run| reader.run(run.seq).unwrap().is_some()) {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert!(reader.run(open.seq).unwrap().is_some());
    let gone = handle.query(Query::Run(old[0])).await.unwrap();
    assert!(matches!(gone, Answer::No(no) if no.code == Code::UnknownRun));
    engine.stop();
    engine.join().unwrap();
}

#[tokio::test]
async fn only_large_payloads_become_stored_and_read_back_the_same() {
    let store = Gated::new();
    let (handle, engine, _) = spawn(store, EngineOptions::default()).unwrap();
    let small = payload(&vec![1; Body::INLINE_BYTES]);
    assert_eq!(handle.persist(small.clone()).await.unwrap(), small);
    let bytes = vec![2; Body::INLINE_BYTES + 1];
    let large = handle.persist(payload(&bytes)).await.unwrap();
    let Body::Stored(at) = large.body else {
        panic!("{large:?}");
    };
    let read = handle.read(move |reader| reader.payload(at)).await.unwrap();
    assert_eq!(read, bytes);
    engine.stop();
    engine.join().unwrap();
}

#[test]
fn a_submission_before_the_stop_is_answered() {
    let store = Gated::new();
    let (handle, engine, _) = spawn(store.clone(), EngineOptions::default()).unwrap();
    store.open(false);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .unwrap();
    runtime.block_on(async {
        let first = handle.intake(submit(1));
        let second = handle.intake(submit(1));
        let later = async {
            store.until_waiting().await;
            engine.stop();
            store.open(true);
        };
        let (first, second, ()) = tokio::join!(first, second, later);
        for reply in [first, second] {
            let Reply::Submitted(list) = reply.unwrap() else {
                panic!("not submitted");
            };
            assert!(matches!(
                list[0],
                Ok(Submitted {
                    existing: false,
                    ..
                })
            ));
        }
    });
    engine.join().unwrap();
}
