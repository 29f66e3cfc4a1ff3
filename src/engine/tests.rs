//! What a turn promises: order, budget, parking, pressure, fail-stop.

mod threaded;

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;

use super::load::read_run;
use super::*;
use crate::broker::command::{AttemptEnd, Completion, Delay, NewNode, Submission, Submitted};
use crate::broker::outcome::Lease;
use crate::broker::types::{Body, Codec, NodeIndex, NodeKey, Payload, Retry, RunId, RunState};
use crate::storage::memory::{Fault, MemoryStore};

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
    bench.submitted(9_001);
    let leases = bench.leases(9_001);
    let (silent, busy) = leases.split_at(1);
    bench.now += 10 * Settings::default().lease_ms;
    // Two arrive a turn and one fits: there is always control left over.
    let mut lapsed_after = None;
    for (n, two) in busy.chunks(6_000).enumerate() {
        let output = bench.turn(vec![
            finish(&two[..3_000], &value()),
            finish(&two[two.len() - 3_000..], &value()),
        ]);
        assert_eq!(
            codes(&output.replies[0].1)[0],
            None,
            "what had arrived is kept"
        );
        let record = bench.store.reader().node(silent[0].node).unwrap().unwrap();
        if record.losses == 1 {
            lapsed_after.get_or_insert(n);
        }
    }
    assert_eq!(
        lapsed_after,
        Some(1),
        "behind what was there when it fell due"
    );
    assert!(!bench.engine.is_drained());
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
    assert!(output.facts > 0);
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
fn credit_waits_while_the_log_is_as_far_ahead_as_it_may_be() {
    let mut bench = Bench::new();
    bench.submitted(3);
    let leases = bench.leases(1);
    bench.store.set_pressure(Pressure::Stop);
    let output = bench.turn(vec![credit(1), finish(&leases, &value())]);
    assert_eq!(codes(&output.replies[1].1), [None], "completions go on");
    assert_eq!(leases_of(&output), [], "nothing more is leased");
    assert_ne!(bench.due(), Some(0), "it does not spin meanwhile");
    bench.store.set_pressure(Pressure::None);
    assert_eq!(bench.due(), Some(0));
    assert_eq!(leases_of(&bench.turn(vec![])).len(), 1);

    bench.store.set_pressure(Pressure::Stop);
    bench.turn(vec![credit(1)]);
    bench.turn(vec![Command::Detach(WORKER), attach()]);
    bench.store.set_pressure(Pressure::None);
    let output = bench.turn(vec![]);
    assert_eq!(
        leases_of(&output),
        [],
        "the credit of a connection ends with it"
    );
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

#[test]
fn what_no_entry_of_the_log_could_hold_is_refused_and_two_large_ones_do_not_share_a_turn() {
    let mut bench = Bench::new();
    let large = |n_bytes: usize| {
        let mut command = submit(1);
        if let Command::Submit(list) = &mut command {
            let tags = [("note".to_owned(), "x".repeat(n_bytes))];
            list[0].tags = tags.into();
        }
        command
    };
    bench.submitted(1);
    let leases = bench.leases(1);
    // Children of 3 KiB each.
    let mut control = finish(&leases, &value());
    if let Command::Finish(list) = &mut control {
        let Command::Submit(mut graph) = submit(1) else {
            panic!("a submission");
        };
        list[0].specs = vec![spec()];
        graph[0].nodes[0].arguments = payload(&[7; Body::INLINE_BYTES]);
        list[0].children = vec![graph[0].nodes[0].clone(); 7_000];
    }
    let output = bench.turn(vec![large(LARGEST_COMMAND + 1), large(21 << 20), control]);
    let answered: Vec<u64> = output.replies.iter().map(|(ticket, _)| ticket.0).collect();
    let tickets = bench.tickets;
    assert_eq!(answered, [tickets, tickets - 2], "the other one waits");
    assert_eq!(codes(&output.replies[0].1), [None]);
    assert_eq!(codes(&output.replies[1].1), [Some(Code::GraphTooLarge)]);
    let output = bench.turn(vec![]);
    assert_eq!(output.replies[0].0, Ticket(tickets - 1));
    assert_eq!(codes(&output.replies[0].1), [None]);
}
