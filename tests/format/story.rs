//! The story that a golden store tells: the real broker, and one command after the other until every kind of record was written.
//!
//! It is told twice, in two chapters with other names: the first one is in the state, the second only in the log behind it.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use dagorama::broker::command::*;
use dagorama::broker::outcome::{Effect, Lease, Tx};
use dagorama::broker::settings::{OutputRule, Settings};
use dagorama::broker::types::*;
use dagorama::broker::{Broker, Restoring};
use dagorama::storage::durable::{Durable, DurableOptions};
use dagorama::storage::{StorageBatch, Store};
use xxhash_rust::xxh3::xxh3_128;

/// How a golden store is made, and opened.
pub(crate) fn options() -> DurableOptions {
    DurableOptions {
        segment_bytes: 8 << 10,
        payload_segment_bytes: 64 << 10,
        window_ms: 3_600_000,
        window_bytes: 64 << 20,
        wall: || WallTime(1_700_000_000_123),
        ..DurableOptions::small()
    }
}

/// What the broker decides with: fixed, because a rebuilt broker is part of what is compared.
pub(crate) fn settings() -> Settings {
    Settings {
        lease_ms: 1_000,
        detach_grace_ms: 100,
        dedup_window_ms: 10_000,
        outputs: vec![OutputRule {
            name: "results".into(),
            action: "*.site".into(),
            succeeded: true,
            failed: true,
        }],
        ..Settings::default()
    }
}

struct Teller {
    broker: Broker,
    store: Durable,
    chapter: &'static str,
    now: u64,
    seed: u64,
    leases: BTreeMap<NodeKey, Lease>,
    worker: SessionId,
}

/// Positions in [`Teller::specs`].
const ADD: u32 = 0;
const SITE: u32 = 1;
const BY_NAME: u32 = 2;
const LONE: u32 = 3;

fn text(text: &str) -> Payload {
    Payload {
        codec: Codec::Json,
        body: Body::Inline(Bytes::copy_from_slice(text.as_bytes())),
    }
}

fn input(first: NodeRef, count: u32, mode: InputUse) -> NewInput {
    NewInput { first, count, mode }
}

fn node(spec: u32, arguments: Payload, inputs: Vec<NewInput>) -> NewNode {
    NewNode {
        spec,
        arguments,
        inputs,
        delay: Delay::None,
    }
}

/// A key of a chapter, hashed as real ones are.
fn key(chapter: u64, number: u64) -> KeyHash {
    KeyHash(xxh3_128(&[chapter as u8, number as u8]))
}

fn value(result: &str) -> AttemptEnd {
    AttemptEnd::Value(text(result))
}

impl Teller {
    /// What nodes of this chapter share.
    fn specs(&self) -> Vec<Arc<Spec>> {
        let plain = |action: &str| Spec {
            action: format!("{}.{action}", self.chapter).into(),
            queue: "default".into(),
            taint: None,
            priority: 0,
            retry: Retry {
                max_attempts: 2,
                max_losses: 2,
                delay_ms: 50,
                jitter_milli: 0,
                ..Retry::default()
            },
            timeout_ms: None,
            fingerprint: None,
            pin_code: false,
            batch: None,
            by_name: false,
        };
        let site = Spec {
            taint: Some("gpu".into()),
            priority: 5,
            timeout_ms: Some(60_000),
            fingerprint: Some("v1".into()),
            batch: Some(Batch {
                max_size: 2,
                max_wait_ms: 20,
            }),
            ..plain("site")
        };
        let by_name = Spec {
            by_name: true,
            ..plain("add")
        };
        let lone = Spec {
            retry: Retry {
                max_losses: 1,
                ..Retry::default()
            },
            pin_code: true,
            fingerprint: Some("v1".into()),
            ..plain("lone")
        };
        [plain("add"), site, by_name, lone].map(Arc::new).to_vec()
    }

    /// One turn, and its commit.
    fn apply(&mut self, command: Command) -> Reply {
        let reader = self.store.reader();
        for run in self.broker.needs(&command) {
            let mut facts = Vec::new();
            reader.run_facts(run, &mut |fact| facts.push(fact)).unwrap();
            self.broker.adopt(run, facts).unwrap();
        }
        self.seed += 1;
        let turn = Turn {
            now: Timestamp(self.now),
            wall: WallTime(1_700_000_000_000 + self.now),
            seed: self.seed,
        };
        let mut tx = Tx::default();
        let reply = self.broker.apply(&mut tx, turn, command);
        self.broker.check_invariants();
        for effect in tx.effects {
            if let Effect::Lease(lease) = effect {
                self.leases.insert(lease.node, lease);
            }
        }
        if !tx.facts.is_empty() {
            let batch = StorageBatch {
                now: turn.now,
                facts: tx.facts,
            };
            self.store.commit(batch).unwrap();
        }
        reply
    }

    /// A command that must be accepted.
    fn must(&mut self, command: Command) {
        match self.apply(command) {
            Reply::Done(results) => assert!(results.iter().all(Result::is_ok), "{results:?}"),
            Reply::Attached(_) | Reply::Created(Ok(_)) => {}
            other => panic!("{other:?}"),
        }
    }

    fn wait(&mut self, ms: u64) {
        self.now += ms;
        self.must(Command::Touch(vec![self.worker]));
        self.must(Command::Tick);
    }

    fn attach(&mut self, session: SessionId) {
        let mut actions = self.specs();
        actions.retain(|spec| !spec.by_name);
        for spec in &mut actions {
            // The code of the site has changed since it was recorded.
            if spec.fingerprint.is_some() && !spec.pin_code {
                let mut changed = Spec::clone(spec);
                changed.fingerprint = Some("v2".into());
                *spec = Arc::new(changed);
            }
        }
        self.must(Command::Attach(Attach {
            session,
            name: "worker".into(),
            queues: vec!["default".into()],
            tolerations: vec!["gpu".into()],
            actions,
        }));
    }

    fn credit(&mut self, session: SessionId, calls: u32) {
        self.must(Command::Credit { session, calls });
    }

    fn large(&self, letter: u8) -> Payload {
        let bytes = Bytes::from(vec![letter; 5_000]);
        Payload {
            codec: Codec::Pickle,
            body: Body::Stored(self.store.payloads().write(bytes).unwrap()),
        }
    }

    fn submit(&mut self, nodes: Vec<NewNode>, root: u32) -> RunId {
        self.submit_from(nodes, root, None, None)
    }

    fn submit_from(
        &mut self,
        nodes: Vec<NewNode>,
        root: u32,
        key: Option<KeyHash>,
        identity: Option<Identity>,
    ) -> RunId {
        let key = key.map(|hash| SubmissionKey {
            hash,
            content: 0xc0_ffee,
        });
        let origin = identity.map(|identity| Origin {
            route: self.route(),
            identity,
        });
        let mut tags = BTreeMap::new();
        if key.is_some() {
            tags.insert("who".to_owned(), "someone".to_owned());
            tags.insert("why".to_owned(), "ünïcode".to_owned());
        }
        let submission = Submission {
            key,
            specs: self.specs(),
            nodes,
            root,
            tags,
            origin,
        };
        let reply = self.apply(Command::Submit(vec![submission]));
        match reply {
            Reply::Submitted(list) => list[0].as_ref().expect("accepted").run,
            other => panic!("{other:?}"),
        }
    }

    fn route(&self) -> Arc<str> {
        format!("{}-orders", self.chapter).into()
    }

    fn lease(&self, run: RunId, node: u32) -> Lease {
        let key = NodeKey::new(run.seq, NodeIndex(node));
        let lease = self.leases.get(&key);
        lease
            .unwrap_or_else(|| panic!("{key} is not leased"))
            .clone()
    }

    fn end_with(&mut self, run: RunId, node: u32, end: AttemptEnd, children: Vec<NewNode>) {
        let lease = self.lease(run, node);
        // The same turn may lease it again.
        self.leases.remove(&lease.node);
        self.must(Command::Finish(vec![Completion {
            node: lease.node,
            attempt: lease.attempt,
            token: lease.token,
            digest: 0x1_0000 + self.seed,
            specs: self.specs(),
            children,
            end,
        }]));
        self.credit(self.worker, 1);
    }

    fn end(&mut self, run: RunId, node: u32, end: AttemptEnd) {
        self.end_with(run, node, end, Vec::new());
    }

    fn fail(&mut self, run: RunId, node: u32, retryable: bool, timed_out: bool) {
        let error = text(r#"{"type":"ValueError","message":"no"}"#);
        self.end(
            run,
            node,
            AttemptEnd::Failed {
                error,
                retryable,
                timed_out,
            },
        );
    }

    /// Everything that a broker writes.
    fn chapter(&mut self, number: u64) {
        self.attach(self.worker);
        self.credit(self.worker, 50);
        self.grows(key(number, 1));
        self.fails();
        self.loses();
        self.reads_messages(number);
        self.forgets(number);
        self.stays_open();
    }

    /// Inputs of each kind, large bodies, children of both kinds, a structure, a tail call, a retry, delays, a delivery.
    fn grows(&mut self, key: KeyHash) {
        let new = NodeRef::New;
        let delayed = |delay, inputs| NewNode {
            delay,
            ..node(ADD, text("[]"), inputs)
        };
        let graph = vec![
            node(ADD, text("[1, 2]"), vec![]),
            node(ADD, self.large(b'a'), vec![]),
            node(SITE, text("[]"), vec![input(new(0), 2, InputUse::Value)]),
            delayed(
                Delay::For(100),
                vec![
                    input(new(0), 1, InputUse::Outcome),
                    input(new(1), 1, InputUse::After),
                ],
            ),
            delayed(
                Delay::Until(WallTime(1_700_000_000_000 + self.now + 400)),
                vec![],
            ),
        ];
        let run = self.submit_from(graph, 2, Some(key), None);
        self.fail(run, 0, true, true);
        self.wait(60);
        self.end(run, 0, value("3"));
        let lease = self.lease(run, 1);
        self.must(Command::CreateChildren(CreateChildren {
            node: lease.node,
            attempt: lease.attempt,
            token: lease.token,
            first_child: 0,
            specs: self.specs(),
            children: vec![node(ADD, text("[5]"), vec![])],
        }));
        let structure = AttemptEnd::Structure {
            body: text("[{}, {}]"),
            references: vec![
                input(NodeRef::Existing(NodeIndex(5)), 1, InputUse::Value),
                input(new(0), 1, InputUse::Value),
            ],
        };
        self.end_with(run, 1, structure, vec![node(ADD, text("[6]"), vec![])]);
        let last = self.large(b'b');
        self.end(run, 5, AttemptEnd::Value(last));
        let child = vec![node(ADD, text("[7]"), vec![])];
        self.end_with(run, 6, AttemptEnd::Tail(new(0)), child);
        self.end(run, 7, value("7"));
        self.wait(30);
        self.end(run, 2, value("\"site\""));
        self.wait(200);
        self.end(run, 3, AttemptEnd::Released);
        self.end(run, 3, value("4"));
        self.wait(200);
        self.end(run, 4, value("5"));
    }

    /// Failures, what follows from them, and a second round.
    fn fails(&mut self) {
        let after = |mode| vec![input(NodeRef::New(0), 1, mode)];
        let run = self.submit(
            vec![
                node(ADD, text("[0]"), vec![]),
                node(ADD, text("[1]"), after(InputUse::Value)),
                node(SITE, text("[2]"), after(InputUse::Outcome)),
            ],
            1,
        );
        self.fail(run, 0, false, false);
        self.wait(30);
        self.end(run, 2, value("null"));
        self.must(Command::Resume(run));
        self.end(run, 0, value("1"));
        self.fail(run, 1, false, false);
        let run = self.submit(vec![node(SITE, text("[]"), vec![])], 0);
        self.wait(30);
        let structure = AttemptEnd::Structure {
            body: text("[{}]"),
            references: vec![input(NodeRef::New(0), 1, InputUse::Value)],
        };
        self.end_with(run, 0, structure, vec![node(ADD, text("[]"), vec![])]);
        self.fail(run, 1, true, false);
        self.wait(60);
        self.fail(run, 1, true, false);
        let run = self.submit(vec![node(SITE, text("[]"), vec![])], 0);
        self.wait(30);
        self.end(run, 0, value("true"));
        let run = self.submit(vec![node(ADD, text("[]"), vec![])], 0);
        self.must(Command::Cancel {
            run,
            reason: "it was a test".into(),
        });
    }

    /// Leases that are shortened, resumed and lost, and a node that is lost too often.
    fn loses(&mut self) {
        let other = SessionId(self.worker.0 + 1);
        let run = self.submit(vec![node(ADD, text("[\"lost\"]"), vec![])], 0);
        self.must(Command::Detach(self.worker));
        self.attach(self.worker);
        self.credit(self.worker, 50);
        self.must(Command::Detach(self.worker));
        self.now += 200;
        self.must(Command::Tick);
        self.attach(self.worker);
        self.credit(self.worker, 50);
        // The last one for it runs on a worker that goes away.
        self.wait(1_000);
        self.end(run, 0, value("\"found\""));
        self.must(Command::Close(self.worker));
        self.attach(other);
        self.credit(other, 1);
        self.submit(vec![node(LONE, text("[]"), vec![])], 0);
        self.now += 5_000;
        self.must(Command::Tick);
        self.must(Command::Close(other));
        self.attach(self.worker);
        self.credit(self.worker, 50);
    }

    /// Positions, keys and dead letters of a route.
    fn reads_messages(&mut self, number: u64) {
        let position = |position| Identity::Position {
            partition: "topic/0".into(),
            position,
            next: position + 1,
        };
        let graph = || vec![node(ADD, text("[\"message\"]"), vec![])];
        let run = self.submit_from(graph(), 0, None, Some(position(10)));
        self.end(run, 0, value("0"));
        let route = self.route();
        self.must(Command::SeekInbox {
            route: Arc::clone(&route),
            partition: "topic/0".into(),
            next: 3,
        });
        let run = self.submit_from(graph(), 0, None, Some(Identity::Key(key(number, 2))));
        self.end(run, 0, value("0"));
        let letter = |identity, body| DeadLetter {
            origin: Origin {
                route: Arc::clone(&route),
                identity,
            },
            code: "UNDECODABLE".into(),
            reason: "expected a list".into(),
            attempts: 5,
            coordinates: BTreeMap::from([("line".to_owned(), number.to_string())]),
            body,
        };
        let letters = vec![
            letter(position(3), text("{")),
            letter(Identity::Key(key(number, 3)), self.large(b'c')),
            letter(Identity::None, text("}")),
            letter(Identity::None, text("?")),
        ];
        self.must(Command::DeadLetter(letters));
        self.must(Command::DropDeadLetter { route, seq: 3 });
        let run = self.submit_from(graph(), 0, None, Some(Identity::DeadLetter { seq: 1 }));
        self.end(run, 0, value("0"));
        // Four sites owe a delivery in each chapter; the second of them arrives first, the third not at all.
        let first = 1 + (number - 1) * 4;
        for seqs in [vec![first + 1], vec![first]] {
            self.must(Command::ConfirmOutbox {
                output: "results".into(),
                seqs,
            });
        }
        self.must(Command::ConfirmOutbox {
            output: "results".into(),
            seqs: vec![first + 3],
        });
    }

    /// A run that is deleted, and keys whose window is over.
    fn forgets(&mut self, number: u64) {
        let graph = vec![node(ADD, text("[\"short\"]"), vec![])];
        let run = self.submit_from(graph, 0, Some(key(number, 4)), None);
        self.end(run, 0, value("0"));
        self.must(Command::Expire(vec![run.seq]));
        self.wait(900);
        for _ in 0..13 {
            self.wait(900);
        }
        let graph = vec![node(ADD, text("[\"kept\"]"), vec![])];
        let identity = Identity::Key(key(number, 5));
        let run = self.submit_from(graph, 0, None, Some(identity));
        self.end(run, 0, value("0"));
    }

    /// What is under way at the end: leased, in backoff, settling, waiting, by name.
    fn stays_open(&mut self) {
        let run = self.submit(
            vec![
                node(ADD, text("[\"leased\"]"), vec![]),
                node(ADD, self.large(b'd'), vec![]),
                node(ADD, text("[\"backoff\"]"), vec![]),
                node(BY_NAME, text("[\"by name\"]"), vec![]),
                node(
                    SITE,
                    text("[\"waits\"]"),
                    vec![input(NodeRef::New(0), 3, InputUse::Value)],
                ),
            ],
            4,
        );
        let structure = AttemptEnd::Structure {
            body: text("[{}, {}]"),
            references: vec![input(NodeRef::New(0), 2, InputUse::Value)],
        };
        let children = (0..2).map(|_| node(ADD, text("[]"), vec![])).collect();
        self.end_with(run, 1, structure, children);
        self.end_with(
            run,
            5,
            AttemptEnd::Tail(NodeRef::New(0)),
            vec![node(ADD, text("[]"), vec![])],
        );
        self.fail(run, 2, true, false);
    }
}

/// Makes a store and leaves it as a kill would: one chapter in the state, the other in the log.
pub(crate) fn make(dir: &Path) {
    let mut store = Durable::open(dir, options()).unwrap();
    let loaded = store.load(&mut |_| {}).unwrap();
    let restoring = Restoring::new(settings(), loaded.lease_secret);
    let broker = restoring.finish(loaded.now, loaded.next_run).unwrap();
    let mut teller = Teller {
        broker,
        store,
        chapter: "one",
        now: 1_000,
        seed: 0,
        leases: BTreeMap::new(),
        worker: SessionId(0xabc0),
    };
    teller.chapter(1);
    teller.store.flush().unwrap();
    teller.chapter = "two";
    teller.worker = SessionId(0xdef0);
    teller.must(Command::Close(SessionId(0xabc0)));
    teller.chapter(2);
    // The end of a burst is sealed.
    teller.store.idle(1_000_000).unwrap();
}
