//! Messages in, runs by name, outcomes out, over a real engine with a store in memory: each message once, whatever ends in between.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use dagorama_bridge_api::loopback::{Faults, Loopback, Recognition};
use dagorama_bridge_api::{Sink, Source};
use serde_json::{Value, json};

use super::*;
use crate::broker::Settings;
use crate::broker::command::{
    Answer, Attach, AttemptEnd, Command, Completion, Delay, NewInput, NewNode, NodeRef, Query,
    Reply,
};
use crate::broker::types::{Body, Codec, InputUse, Payload, Retry, SessionId, Spec};
use crate::engine::{EngineOptions, EngineThread, SessionEffect, spawn};
use crate::storage::Pressure;
use crate::storage::memory::MemoryStore;

// ---- a broker ---------------------------------------------------------------------------------------------------------

struct Room {
    store: MemoryStore,
    handle: Handle,
    thread: EngineThread,
    bridges: Bridges,
}

fn start(store: MemoryStore, config: &Config, bridges: impl FnOnce(&Handle) -> Bridges) -> Room {
    let settings = Settings {
        outputs: output_rules(config),
        ..Settings::default()
    };
    let options = EngineOptions {
        settings,
        ..EngineOptions::default()
    };
    let (handle, thread, _) = spawn(store.clone(), options).unwrap();
    let bridges = bridges(&handle);
    Room {
        store,
        handle,
        thread,
        bridges,
    }
}

impl Room {
    fn files(store: MemoryStore, config: &Config) -> Self {
        start(store, config, |handle| Bridges::start(handle, config))
    }

    fn loopback(config: &Config, queue: &Loopback) -> Self {
        Self::loopback_on(MemoryStore::new(), config, queue)
    }

    fn loopback_on(store: MemoryStore, config: &Config, queue: &Loopback) -> Self {
        start(store, config, |handle| {
            let source = |_: &Route| -> SourceFactory {
                let queue = queue.clone();
                Arc::new(move |positions| {
                    let source = queue.source(positions);
                    Box::pin(async move { Ok(Box::new(source?) as Box<dyn Source>) })
                })
            };
            let sink = |_: &Output| -> SinkFactory {
                let queue = queue.clone();
                Arc::new(move || {
                    let sink = queue.sink();
                    Box::pin(async move { Ok(Box::new(sink?) as Box<dyn Sink>) })
                })
            };
            Bridges::start_with(handle, config, source, sink)
        })
    }

    /// A worker that answers every call of `action` by a function of its arguments.
    async fn worker(&self, action: &str, answer: fn(&Value) -> AttemptEnd) {
        let session = SessionId(7);
        let handle = self.handle.clone();
        // What an earlier life held is given back.
        let _ = handle.control(Command::Close(session)).await;
        let mut effects = handle.session_effects(session);
        let spec = Spec {
            by_name: false,
            ..(*inbound::by_name(action)).clone()
        };
        let attach = Attach {
            session,
            name: "test".into(),
            queues: vec!["default".into()],
            tolerations: Vec::new(),
            actions: vec![Arc::new(spec)],
        };
        handle.control(Command::Attach(attach)).await.unwrap();
        handle
            .control(Command::Credit { session, calls: 8 })
            .await
            .unwrap();
        tokio::spawn(async move {
            while let Some(effect) = effects.recv().await {
                let SessionEffect::Leases(leases) = effect else {
                    continue;
                };
                for lease in leases {
                    let node = lease.node;
                    let arguments = handle
                        .read(move |r| r.arguments(node))
                        .await
                        .unwrap()
                        .unwrap();
                    let value = match (&arguments.payload.codec, &arguments.payload.body) {
                        (Codec::Json, Body::Inline(bytes)) => {
                            serde_json::from_slice(bytes).unwrap()
                        }
                        (_, Body::Inline(bytes)) => json!(String::from_utf8_lossy(bytes)),
                        (_, Body::Stored(at)) => json!({ "stored": at.length }),
                    };
                    let (children, mut end) = split(answer(&value));
                    if let AttemptEnd::Value(payload) = end {
                        end = AttemptEnd::Value(handle.persist(payload).await.unwrap());
                    }
                    let completion = Completion {
                        node,
                        attempt: lease.attempt,
                        token: lease.token,
                        digest: 1,
                        specs: vec![inbound::by_name("child")],
                        children,
                        end,
                    };
                    let done = handle.control(Command::Finish(vec![completion])).await;
                    let Ok(Reply::Done(done)) = done else { return };
                    assert!(done.iter().all(Result::is_ok), "{done:?}");
                    let _ = handle.control(Command::Credit { session, calls: 1 }).await;
                }
            }
        });
    }

    async fn stop(self) -> MemoryStore {
        self.bridges.shutdown().await;
        self.crash().await
    }

    /// Without a word to the bridges: they are cut off wherever they are, and what was committed by then is all that is left.
    async fn crash(self) -> MemoryStore {
        let tasks = std::mem::take(&mut *self.bridges.tasks.lock().unwrap());
        for task in tasks {
            task.abort();
            let _ = task.await;
        }
        // A write that had begun on another thread ends, as in a kernel whose process was killed in the middle of a call.
        tokio::time::sleep(Duration::from_millis(20)).await;
        let left = self.store.crash();
        self.thread.stop();
        left
    }

    async fn dlq(&self, request: Value) -> Result<Value, String> {
        self.bridges.dlq(request).await.map_err(|no| no.to_string())
    }

    async fn letters(&self) -> Vec<Value> {
        self.dlq(json!({"do": "list"})).await.unwrap()["letters"]
            .as_array()
            .unwrap()
            .clone()
    }

    fn listed(&self, kind: &str, field: &str) -> Value {
        self.bridges.list()[kind][0][field].clone()
    }

    async fn n_runs(&self) -> usize {
        self.handle
            .read(|r| r.runs(None, 100_000))
            .await
            .unwrap()
            .len()
    }
}

/// References of a structure are new children, in the tests.
fn split(end: AttemptEnd) -> (Vec<NewNode>, AttemptEnd) {
    let child = |n: u32| NewNode {
        spec: 0,
        arguments: json_payload(&json!({"args": [n], "kwargs": {}})),
        inputs: Vec::new(),
        delay: Delay::None,
    };
    let n = match &end {
        AttemptEnd::Structure { references, .. } => references.iter().map(|r| r.count).sum(),
        AttemptEnd::Tail(_) => 1,
        _ => 0,
    };
    ((0..n).map(child).collect(), end)
}

fn json_payload(value: &Value) -> Payload {
    Payload {
        codec: Codec::Json,
        body: Body::Inline(value.to_string().into()),
    }
}

async fn eventually(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    for _ in 0..1000 {
        if holds().await {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("{what} did not come true in ten seconds");
}

fn lines(path: &Path) -> Vec<String> {
    std::fs::read_to_string(path)
        .unwrap_or_default()
        .lines()
        .map(str::to_owned)
        .collect()
}

fn append(path: &Path, text: &str) {
    use std::io::Write as _;
    std::fs::OpenOptions::new()
        .append(true)
        .create(true)
        .open(path)
        .unwrap()
        .write_all(text.as_bytes())
        .unwrap();
}

fn file_config(dir: &Path, route: &str, output: &str) -> Config {
    let text = format!(
        "[connection.f]\ntype = \"file\"\ndirectory = \"{}\"\npoll = \"3ms\"\n\
         [[route]]\nname = \"in\"\naction = \"double\"\nfrom = {{ connection = \"f\", path = \"in\", follow = true }}\n{route}\n\
         [[output]]\nname = \"out\"\nmatch = {{ action = \"double\", state = \"any\" }}\nto = {{ connection = \"f\", path = \"out\" }}\n{output}\n",
        dir.display()
    );
    Config::parse("test", &text, [], &[]).unwrap()
}

/// Doubles `n`; 13 fails, 14 is a pickle, 15 a structure of two children, 16 a tail call; a child gives its number.
fn double(arguments: &Value) -> AttemptEnd {
    let argument = &arguments["args"][0];
    let Some(n) = argument["n"].as_u64() else {
        return AttemptEnd::Value(json_payload(&json!({ "child": argument })));
    };
    let references = |count| {
        vec![NewInput {
            first: NodeRef::New(0),
            count,
            mode: InputUse::Value,
        }]
    };
    match n {
        13 => AttemptEnd::Failed {
            error: json_payload(&json!({"type": "builtins.ValueError", "message": "13", "traceback": "…", "pickle": "gASV"})),
            retryable: false,
            timed_out: false,
        },
        14 => AttemptEnd::Value(Payload { codec: Codec::Pickle, body: Body::Inline("\u{80}".into()) }),
        15 => AttemptEnd::Structure {
            body: Payload { codec: Codec::Json, body: Body::Inline("[{\"$dagorama\": 1},\n {\"x\": {\"$dagorama\": 0}, \"s\": \"{\\\"$dagorama\\\": 0}\"}]".into()) },
            references: references(2),
        },
        16 => AttemptEnd::Tail(NodeRef::New(0)),
        n => AttemptEnd::Value(json_payload(&json!({ "n": 2 * n }))),
    }
}

impl Room {
    /// The worker has `child` too.
    async fn workers(&self) {
        self.worker("double", double).await;
        let child = Spec {
            by_name: false,
            ..(*inbound::by_name("child")).clone()
        };
        let session = SessionId(8);
        let _ = self.handle.control(Command::Close(session)).await;
        let mut effects = self.handle.session_effects(session);
        let attach = Attach {
            session,
            name: "child".into(),
            queues: vec!["default".into()],
            tolerations: Vec::new(),
            actions: vec![Arc::new(child)],
        };
        self.handle.control(Command::Attach(attach)).await.unwrap();
        self.handle
            .control(Command::Credit { session, calls: 8 })
            .await
            .unwrap();
        let handle = self.handle.clone();
        tokio::spawn(async move {
            while let Some(effect) = effects.recv().await {
                let SessionEffect::Leases(leases) = effect else {
                    continue;
                };
                for lease in leases {
                    let node = lease.node;
                    let arguments = handle
                        .read(move |r| r.arguments(node))
                        .await
                        .unwrap()
                        .unwrap();
                    let Body::Inline(bytes) = arguments.payload.body else {
                        panic!("stored")
                    };
                    let end = double(&serde_json::from_slice(&bytes).unwrap());
                    let completion = Completion {
                        node,
                        attempt: lease.attempt,
                        token: lease.token,
                        digest: 1,
                        specs: Vec::new(),
                        children: Vec::new(),
                        end,
                    };
                    let _ = handle.control(Command::Finish(vec![completion])).await;
                    let _ = handle.control(Command::Credit { session, calls: 1 }).await;
                }
            }
        });
    }
}

// ---- files ------------------------------------------------------------------------------------------------------------

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lines_in_runs_by_name_lines_out() {
    let dir = tempfile::tempdir().unwrap();
    let (input, output) = (dir.path().join("in"), dir.path().join("out"));
    let room = Room::files(MemoryStore::new(), &file_config(dir.path(), "", ""));
    room.workers().await;
    append(
        &input,
        "{\"n\":1}\nno json\n{\"n\":2}\n\n{\"$dagorama\":0}\n{\"n\":13}\n{\"n\":14}\n{\"n\":15}\n{\"n\":16}\n{\"n\":3}\n",
    );
    eventually("six lines", async || lines(&output).len() == 6).await;
    let mut seen = lines(&output);
    seen.sort();
    let mut wanted = vec![
        "{\"n\":2}".to_owned(),
        "{\"n\":4}".to_owned(),
        "{\"n\":6}".to_owned(),
        "{\"message\":\"13\",\"traceback\":\"…\",\"type\":\"builtins.ValueError\"}".to_owned(),
        "[{\"child\":1},  {\"x\": {\"child\":0}, \"s\": \"{\\\"$dagorama\\\": 0}\"}]".to_owned(),
        "{\"child\":0}".to_owned(),
    ];
    wanted.sort();
    assert_eq!(seen, wanted);
    eventually("three letters", async || room.letters().await.len() == 3).await;
    let letters = room.letters().await;
    let short: Vec<_> = letters
        .iter()
        .map(|l| {
            (
                l["route"].as_str().unwrap(),
                l["seq"].as_u64().unwrap(),
                l["code"].as_str().unwrap(),
            )
        })
        .collect();
    assert_eq!(
        short,
        [
            ("in", 1, "BODY_NOT_JSON"),
            ("in", 2, "BODY_RESERVED"),
            ("out", 1, "CODEC_REFUSED")
        ]
    );
    assert_eq!(letters[0]["coordinates"]["offset"], "8");
    assert_eq!(letters[0]["attempts"], 1);
    assert!(
        letters[2]["coordinates"]["message_id"]
            .as_str()
            .unwrap()
            .ends_with("/0/1/out")
    );
    eventually("all ended", async || room.listed("routes", "pending") == 0).await;
    assert_eq!(room.listed("routes", "messages"), 9);
    assert_eq!(room.listed("routes", "dead_letters"), 2);
    assert_eq!(room.listed("routes", "state"), "running");
    eventually("all confirmed", async || {
        room.listed("outputs", "messages") == 7
    })
    .await;
    assert_eq!(room.listed("routes", "lag"), 0);
    let outbox = room
        .handle
        .query(Query::Outbox {
            output: "out".into(),
        })
        .await
        .unwrap();
    assert_eq!(
        outbox,
        Answer::Outbox {
            cursor: 8,
            next: 8,
            confirmed: Vec::new()
        }
    );
    room.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restart_at_any_moment_starts_nothing_twice_and_loses_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (input, output) = (dir.path().join("in"), dir.path().join("out"));
    let config = file_config(dir.path(), "", "");
    let mut store = MemoryStore::with_log(5);
    let mut written = 0u64;
    for life in 0..8u64 {
        let room = Room::files(store, &config);
        // Some lives have no worker: their runs are done by later ones.
        if life % 3 != 1 {
            room.workers().await;
        }
        for _ in 0..5 {
            for _ in 0..20 {
                written += 1;
                append(&input, &format!("{{\"n\":{}}}\n", 100 + written));
            }
            append(&input, "poison\n");
            tokio::time::sleep(Duration::from_millis(life * 2)).await;
        }
        store = if life % 2 == 0 {
            room.crash().await
        } else {
            room.stop().await
        };
    }
    let room = Room::files(store, &config);
    room.workers().await;
    eventually("all lines", async || lines(&output).len() as u64 >= written).await;
    eventually("all letters", async || room.letters().await.len() >= 40).await;
    tokio::time::sleep(Duration::from_millis(50)).await;
    let mut seen: BTreeMap<String, u32> = BTreeMap::new();
    for line in lines(&output) {
        *seen.entry(line).or_default() += 1;
    }
    assert!(seen.values().all(|n| *n == 1), "a line came twice");
    let wanted: std::collections::BTreeSet<_> = (1..=written)
        .map(|n| format!("{{\"n\":{}}}", 2 * (100 + n)))
        .collect();
    assert!(
        seen.keys().eq(wanted.iter()),
        "{} lines, {} wanted",
        seen.len(),
        wanted.len()
    );
    assert_eq!(room.n_runs().await as u64, written);
    assert_eq!(room.letters().await.len(), 40);
    room.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn letters_are_listed_shown_replayed_and_dropped() {
    let dir = tempfile::tempdir().unwrap();
    let (input, output) = (dir.path().join("in"), dir.path().join("out"));
    append(&input, "{\"m\":1}\n{\"m\":2}\nnonsense\n{\"n\":5}\n");
    let strict = file_config(dir.path(), "arguments = [\"body\", \"body.n\"]", "");
    let room = Room::files(MemoryStore::new(), &strict);
    room.workers().await;
    eventually("three letters and a line", async || {
        room.letters().await.len() == 3 && lines(&output).len() == 1
    })
    .await;
    let shown = room
        .dlq(json!({"do": "show", "route": "in", "seq": 2}))
        .await
        .unwrap();
    assert_eq!(
        (shown["body"].as_str(), shown["code"].as_str()),
        (Some("{\"m\":2}"), Some("ARGUMENT_MISSING"))
    );
    let listed = room
        .dlq(json!({"do": "list", "route": "in", "limit": 2}))
        .await
        .unwrap();
    assert_eq!(listed["letters"].as_array().unwrap().len(), 2);

    // It still cannot be used as long as the route says the same.
    let no = room
        .dlq(json!({"do": "replay", "route": "in", "seq": 1}))
        .await
        .unwrap_err();
    assert!(
        no.contains("still cannot be used (ARGUMENT_MISSING)"),
        "{no}"
    );
    for (request, part) in [
        (json!({}), "one of list, show, replay, drop"),
        (json!({"do": "show"}), "route is missing"),
        (json!({"do": "show", "route": "in"}), "seq is missing"),
        (
            json!({"do": "show", "route": "in", "seq": 9}),
            "UNKNOWN_NAME: in has no dead letter 9",
        ),
        (
            json!({"do": "show", "route": "other", "seq": 1}),
            "UNKNOWN_NAME: there is no route",
        ),
        (
            json!({"do": "drop", "route": "in", "seq": 9}),
            "UNKNOWN_NAME",
        ),
        (
            json!({"do": "replay", "route": "out", "seq": 1}),
            "UNKNOWN_NAME",
        ),
    ] {
        let no = room.dlq(request.clone()).await.unwrap_err();
        assert!(no.contains(part), "{request}: {no}");
    }

    // With another route it can, once.
    let store = room.stop().await;
    let room = Room::files(
        store,
        &file_config(dir.path(), "arguments = [\"body\"]", ""),
    );
    room.workers().await;
    let replayed = room
        .dlq(json!({"do": "replay", "route": "in", "seq": 2}))
        .await
        .unwrap();
    assert!(
        replayed["run"].as_str().unwrap().contains('-'),
        "{replayed}"
    );
    assert!(
        room.dlq(json!({"do": "replay", "route": "in", "seq": 2}))
            .await
            .unwrap_err()
            .contains("UNKNOWN_NAME")
    );
    assert_eq!(
        room.dlq(json!({"do": "drop", "route": "in", "seq": 3}))
            .await
            .unwrap(),
        json!({})
    );
    assert_eq!(room.letters().await.len(), 1);
    eventually("the replayed run", async || lines(&output).len() == 2).await;
    assert_eq!(lines(&output)[1], "{\"child\":{\"m\":2}}");
    room.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_route_that_keeps_the_order_stops_before_the_bad_line() {
    let dir = tempfile::tempdir().unwrap();
    let input = dir.path().join("in");
    append(&input, "{\"n\":1}\nbad\n{\"n\":2}\n");
    let config = file_config(dir.path(), "on_error = \"stop\"", "");
    let room = Room::files(MemoryStore::new(), &config);
    eventually("parked", async || {
        room.listed("routes", "state") == "parked"
    })
    .await;
    assert_eq!(room.listed("routes", "code"), "BODY_NOT_JSON");
    assert!(
        room.listed("routes", "reason")
            .as_str()
            .unwrap()
            .contains("offset 8")
    );
    assert_eq!(
        (
            room.n_runs().await,
            room.letters().await.len(),
            room.bridges.n_parked()
        ),
        (1, 0, 1)
    );
    // Put right in place, it goes on.
    std::fs::write(&input, "{\"n\":1}\n777\n{\"n\":2}\n").unwrap();
    assert!(room.bridges.restart("in") && !room.bridges.restart("other"));
    eventually("the rest", async || room.n_runs().await == 3).await;
    room.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn large_messages_and_values_go_through_payload_segments() {
    let dir = tempfile::tempdir().unwrap();
    let (input, output) = (dir.path().join("in"), dir.path().join("out"));
    let config = file_config(dir.path(), "codec = \"raw\"", "");
    let room = Room::files(MemoryStore::new(), &config);
    room.worker("double", |value| AttemptEnd::Value(json_payload(value)))
        .await;
    append(&input, &format!("{}\nsmall\n", "x".repeat(100_000)));
    eventually("two lines", async || lines(&output).len() == 2).await;
    let mut seen = lines(&output);
    seen.sort();
    assert_eq!(seen, ["\"small\"", "{\"stored\":100000}"]);
    room.stop().await;
}

// ---- a queue with faults ----------------------------------------------------------------------------------------------

fn queue_config(route: &str) -> Config {
    file_config(Path::new("/nonexistent"), route, "")
}

fn produce(queue: &Loopback, numbers: std::ops::Range<u64>) {
    for n in numbers {
        queue.produce(format!("{{\"n\":{n}}}"));
    }
}

fn consumed(queue: &Loopback) -> BTreeMap<String, u32> {
    let mut by_id = BTreeMap::new();
    for delivery in queue.consumed() {
        *by_id.entry(delivery.message_id).or_default() += 1;
    }
    by_id
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_peer_that_fails_in_every_way_loses_nothing() {
    for recognition in [Recognition::Position, Recognition::Key] {
        let queue = Loopback::new("q", recognition);
        queue.set_faults(Faults {
            down: true,
            ..Faults::default()
        });
        let room = Room::loopback(&queue_config(""), &queue);
        room.workers().await;
        produce(&queue, 100..160);
        eventually("retrying", async || {
            room.listed("routes", "state") == "retrying"
        })
        .await;
        assert_eq!(room.listed("routes", "reason"), "q is down");
        queue.set_faults(Faults {
            lost_confirms: 3,
            failed_receives: 3,
            delay: Duration::from_millis(1),
            ..Faults::default()
        });
        eventually("all delivered", async || {
            consumed(&queue).len() == 60 && room.listed("outputs", "messages") == 60
        })
        .await;
        eventually("all settled", async || queue.acknowledged() == 60).await;
        assert_eq!(room.n_runs().await, 60);
        assert!(
            consumed(&queue).values().any(|n| *n > 1),
            "the lost confirmations were not noticed"
        );
        assert!(room.listed("outputs", "restarts").as_u64().unwrap() >= 3);
        room.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_route_reads_no_more_than_may_be_in_flight() {
    let queue = Loopback::new("q", Recognition::Position);
    let config = queue_config("max_inflight_runs = 3");
    let room = Room::loopback(&config, &queue);
    produce(&queue, 100..120);
    eventually("waiting", async || {
        room.listed("routes", "state") == "waiting"
    })
    .await;
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert_eq!((room.n_runs().await, queue.acknowledged()), (3, 3));
    // A restart counts what is open already.
    let room = Room::loopback_on(room.stop().await, &config, &queue);
    eventually("waiting again", async || {
        room.listed("routes", "state") == "waiting"
    })
    .await;
    assert_eq!(room.n_runs().await, 3);
    room.workers().await;
    eventually("all", async || consumed(&queue).len() == 20).await;
    eventually("running", async || {
        room.listed("routes", "state") == "running"
    })
    .await;
    room.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_broker_that_takes_nothing_pauses_the_route_and_loses_nothing() {
    let queue = Loopback::new("q", Recognition::Position);
    let store = MemoryStore::new();
    store.set_pressure(Pressure::DiskFull);
    let room = Room::loopback_on(store, &queue_config(""), &queue);
    produce(&queue, 100..110);
    queue.produce("poison");
    eventually("waiting", async || {
        room.listed("routes", "state") == "waiting"
    })
    .await;
    assert_eq!(room.listed("routes", "code"), "DISK_FULL");
    assert_eq!((room.n_runs().await, queue.acknowledged()), (0, 0));
    room.store.set_pressure(Pressure::None);
    eventually("all taken", async || {
        room.n_runs().await == 10 && queue.acknowledged() == 11
    })
    .await;
    assert_eq!(
        (
            room.letters().await.len(),
            room.listed("routes", "duplicates")
        ),
        (1, json!(0))
    );
    room.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn equal_messages_are_one_where_the_route_says_so() {
    for (dedup, runs) in [("", 4), ("dedup = \"hash\"", 3), ("dedup = \"body.n\"", 2)] {
        let queue = Loopback::new("q", Recognition::Position);
        let room = Room::loopback(&queue_config(dedup), &queue);
        for body in ["{\"n\":1}", "{\"n\":1}", "{\"n\":1,\"x\":0}", "{\"n\":2}"] {
            queue.produce(body);
        }
        eventually("settled", async || queue.acknowledged() == 4).await;
        assert_eq!(room.n_runs().await, runs, "{dedup}");
        assert_eq!(room.listed("routes", "duplicates"), 4 - runs);
        room.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_sink_refuses_is_a_letter_and_the_others_go_on() {
    let queue = Loopback::new("q", Recognition::Position);
    let room = Room::loopback(&queue_config(""), &queue);
    room.worker("double", |value| {
        let long = "x".repeat(dagorama_bridge_api::loopback::MAX_BODY);
        let is_long = value["args"][0]["n"] == 101;
        AttemptEnd::Value(json_payload(&if is_long { json!(long) } else { json!(1) }))
    })
    .await;
    produce(&queue, 100..103);
    eventually("all confirmed", async || {
        room.listed("outputs", "messages") == 3
    })
    .await;
    assert_eq!(consumed(&queue).len(), 2);
    let letters = room.letters().await;
    assert_eq!(
        (letters.len(), &letters[0]["route"], &letters[0]["code"]),
        (1, &json!("out"), &json!("PAYLOAD_TOO_LARGE"))
    );
    let no = room
        .dlq(json!({"do": "replay", "route": "out", "seq": 1}))
        .await
        .unwrap_err();
    assert!(
        no.contains("NOT_AVAILABLE") && no.contains("no route"),
        "{no}"
    );
    assert_eq!(
        room.dlq(json!({"do": "drop", "route": "out", "seq": 1}))
            .await
            .unwrap(),
        json!({})
    );
    assert!(room.letters().await.is_empty());
    room.stop().await;
}

/// A retry policy of its own, so that nobody thinks that by-name specs carry one.
#[test]
fn a_spec_by_name_says_only_the_action() {
    let spec = inbound::by_name("a.b");
    assert!(spec.by_name && &*spec.action == "a.b");
    assert_eq!(
        (spec.retry, spec.timeout_ms, spec.fingerprint.as_ref()),
        (Retry::default(), None, None)
    );
}
