//! What a node costs in the state machine alone: `cargo bench --bench broker`. Printed, not asserted, because machines differ.
//!
//! The shapes are those of `dagorama bench`: a fan-out with a join, a recursion of tail calls, many runs of one node.

#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    missing_docs,
    reason = "a bench that cannot go on has failed, and prints"
)]

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use dagorama::broker::command::{
    Attach, AttemptEnd, Command, Completion, Delay, NewInput, NewNode, NodeRef, Reply, Submission,
};
use dagorama::broker::outcome::{Effect, Fact, Lease, Tx};
use dagorama::broker::types::{
    Body, Codec, InputUse, Payload, SessionId, Spec, Timestamp, Turn, WallTime,
};
use dagorama::broker::{Broker, Restoring, Settings};
use dagorama::engine::clock::Stopwatch;

const N: u32 = 10_000;

fn payload(text: &str) -> Payload {
    Payload {
        codec: Codec::Json,
        body: Body::Inline(Bytes::copy_from_slice(text.as_bytes())),
    }
}

fn spec(action: &str) -> Spec {
    Spec::of(action)
}

struct Bench {
    broker: Broker,
    now: u64,
    leases: Vec<Lease>,
    facts: Vec<Fact>,
}

impl Bench {
    fn new(credit: u32) -> Self {
        let mut bench = Self {
            broker: Broker::new(Settings::default(), [1; 16]),
            now: 1,
            leases: Vec::new(),
            facts: Vec::new(),
        };
        for session in [1, 2] {
            bench.apply(Command::Attach(Attach {
                session: SessionId(session),
                name: "w".into(),
                queues: vec!["default".into()],
                tolerations: vec![],
                actions: vec![Arc::new(spec("leaf")), Arc::new(spec("join"))],
            }));
            bench.apply(Command::Credit {
                session: SessionId(session),
                calls: credit,
            });
        }
        bench
    }

    fn apply(&mut self, command: Command) -> (Reply, f64) {
        self.now += 1;
        let turn = Turn {
            now: Timestamp(self.now),
            wall: WallTime(self.now),
            seed: self.now,
        };
        let mut tx = Tx::default();
        let begin = Stopwatch::start();
        let reply = self.broker.apply(&mut tx, turn, command);
        let ns = begin.elapsed().as_nanos() as f64;
        self.facts.append(&mut tx.facts);
        self.leases
            .extend(tx.effects.into_iter().filter_map(|effect| match effect {
                Effect::Lease(lease) => Some(lease),
                _ => None,
            }));
        (reply, ns)
    }

    fn submit(&mut self, n: usize) -> f64 {
        let leaf = Arc::new(spec("leaf"));
        let one = || Submission {
            key: None,
            specs: vec![Arc::clone(&leaf)],
            nodes: vec![node(0, vec![])],
            root: 0,
            tags: BTreeMap::new(),
            origin: None,
        };
        self.apply(Command::Submit((0..n).map(|_| one()).collect()))
            .1
    }
}

fn node(spec: u32, inputs: Vec<NewInput>) -> NewNode {
    NewNode {
        spec,
        arguments: payload("[1]"),
        inputs,
        delay: Delay::None,
    }
}

fn done(
    lease: &Lease,
    end: AttemptEnd,
    children: Vec<NewNode>,
    specs: Vec<Arc<Spec>>,
) -> Completion {
    Completion {
        node: lease.node,
        attempt: lease.attempt,
        token: lease.token,
        digest: 5,
        specs,
        children,
        end,
    }
}

fn fan_out_of_ten_thousand() {
    let mut bench = Bench::new(256);
    bench.submit(1);
    let specs = vec![Arc::new(spec("leaf")), Arc::new(spec("join"))];
    let root = bench.leases.pop().unwrap();
    let mut children: Vec<NewNode> = (0..N).map(|_| node(0, vec![])).collect();
    children.push(node(
        1,
        vec![NewInput {
            first: NodeRef::New(0),
            count: N,
            mode: InputUse::Value,
        }],
    ));
    let tail = AttemptEnd::Tail(NodeRef::New(N));
    let (_, create) = bench.apply(Command::Finish(vec![done(&root, tail, children, specs)]));
    let (mut settle, mut credit) = (0.0, 0.0);
    let mut steps = 0;
    while !bench.leases.is_empty() {
        let rest = bench.leases.split_off(bench.leases.len().min(256));
        let batch = std::mem::replace(&mut bench.leases, rest);
        steps += batch.len();
        let list: Vec<Completion> = batch
            .iter()
            .map(|lease| done(lease, AttemptEnd::Value(payload("1")), vec![], vec![]))
            .collect();
        settle += bench.apply(Command::Finish(list)).1;
        for session in [1, 2] {
            let calls = batch
                .iter()
                .filter(|lease| lease.session.0 == session)
                .count() as u32;
            let session = SessionId(session);
            credit += bench.apply(Command::Credit { session, calls }).1;
        }
    }
    assert_eq!(steps, N as usize + 1);
    let n = f64::from(N);
    println!(
        "fan-out: create {:.0} ns, settle {:.0} ns, lease {:.0} ns a node",
        create / n,
        settle / n,
        credit / n
    );
}

fn recursion_of_one_and_of_ten_thousand() {
    for depth in [N / 10, N] {
        let mut bench = Bench::new(1_000_000);
        bench.submit(1);
        let specs = vec![Arc::new(spec("leaf"))];
        let mut all = 0.0;
        for _ in 0..depth {
            let lease = bench.leases.pop().unwrap();
            let tail = AttemptEnd::Tail(NodeRef::New(0));
            let call = done(&lease, tail, vec![node(0, vec![])], specs.clone());
            all += bench.apply(Command::Finish(vec![call])).1;
        }
        bench.broker.check_invariants();
        let lease = bench.leases.pop().unwrap();
        let end = done(&lease, AttemptEnd::Value(payload("1")), vec![], vec![]);
        let (_, last) = bench.apply(Command::Finish(vec![end]));
        println!(
            "recursion of {depth}: {:.0} ns a hop, last {last:.0} ns",
            all / f64::from(depth)
        );
    }
}

fn runs_of_one_node_and_restart() {
    let mut bench = Bench::new(0);
    let mut all = 0.0;
    for _ in 0..400 {
        all += bench.submit(250);
    }
    println!("one-node runs: submit {:.0} ns", all / 100_000.0);
    let begin = Stopwatch::start();
    let mut restoring = Restoring::new(Settings::default(), [1; 16]);
    let facts = std::mem::take(&mut bench.facts);
    let n = facts.len();
    for fact in facts {
        restoring.absorb(fact);
    }
    let restored = restoring.finish(Timestamp(bench.now), 0).unwrap();
    println!(
        "restart: {} ms for {n} facts of 100000 runs",
        begin.elapsed().as_millis()
    );
    restored.check_invariants();
}

fn main() {
    fan_out_of_ten_thousand();
    recursion_of_one_and_of_ten_thousand();
    runs_of_one_node_and_restart();
}
