//! A broker with bridges, and workers that answer by a function: what the tests of bridges stand on.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use dagorama_bridge_api::loopback::Loopback;
use dagorama_bridge_api::{Sink, Source};
use serde_json::{Value, json};

use crate::bridges::*;
use crate::broker::Settings;
use crate::broker::command::{
    Attach, AttemptEnd, Command, Completion, Delay, NewInput, NewNode, NodeRef, Reply,
};
use crate::broker::types::{Body, Codec, InputUse, Payload, SessionId, Spec};
use crate::engine::{EngineOptions, EngineThread, SessionEffect, spawn};
use crate::storage::memory::MemoryStore;

pub(super) struct Room {
    pub(super) store: MemoryStore,
    pub(super) handle: Handle,
    thread: EngineThread,
    pub(super) bridges: Bridges,
}

pub(super) fn start(
    store: MemoryStore,
    config: &Config,
    bridges: impl FnOnce(&Handle) -> Bridges,
) -> Room {
    let settings = Settings {
        outputs: config.settings().outputs,
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
    pub(super) fn files(store: MemoryStore, config: &Config) -> Self {
        start(store, config, |handle| Bridges::start(handle, config))
    }

    pub(super) fn loopback(config: &Config, queue: &Loopback) -> Self {
        Self::loopback_on(MemoryStore::new(), config, queue)
    }

    pub(super) fn loopback_on(store: MemoryStore, config: &Config, queue: &Loopback) -> Self {
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
    pub(super) async fn worker(&self, action: &str, answer: fn(&Value) -> AttemptEnd) {
        worker(self.handle.clone(), action, answer).await;
    }

    pub(super) async fn stop(self) -> MemoryStore {
        self.bridges.shutdown().await;
        self.crash().await
    }

    /// Without a word to the bridges: they are cut off wherever they are, and what was committed by then is all that is left.
    pub(super) async fn crash(self) -> MemoryStore {
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

    pub(super) async fn dlq(&self, request: Value) -> Result<Value, String> {
        self.bridges.dlq(request).await.map_err(|no| no.to_string())
    }

    pub(super) async fn letters(&self) -> Vec<Value> {
        self.dlq(json!({"do": "list"})).await.unwrap()["letters"]
            .as_array()
            .unwrap()
            .clone()
    }

    pub(super) fn listed(&self, kind: &str, field: &str) -> Value {
        self.bridges.list()[kind][0][field].clone()
    }

    pub(super) async fn n_runs(&self) -> usize {
        self.handle
            .read(|r| r.runs(None, 100_000))
            .await
            .unwrap()
            .len()
    }
}

/// References of a structure are new children, in the tests.
pub(super) fn split(end: AttemptEnd) -> (Vec<NewNode>, AttemptEnd) {
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

pub(super) fn json_payload(value: &Value) -> Payload {
    Payload {
        codec: Codec::Json,
        body: Body::Inline(value.to_string().into()),
    }
}

pub(super) async fn eventually(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    for _ in 0..1000 {
        if holds().await {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("{what} did not come true in ten seconds");
}

pub(super) fn lines(path: &Path) -> Vec<String> {
    std::fs::read_to_string(path)
        .unwrap_or_default()
        .lines()
        .map(str::to_owned)
        .collect()
}

pub(super) fn append(path: &Path, text: &str) {
    use std::io::Write as _;
    std::fs::OpenOptions::new()
        .append(true)
        .create(true)
        .open(path)
        .unwrap()
        .write_all(text.as_bytes())
        .unwrap();
}

pub(super) fn file_config(dir: &Path, route: &str, output: &str) -> Config {
    let text = format!(
        "[connection.f]\ntype = \"file\"\ndirectory = \"{}\"\npoll = \"3ms\"\n\
         [[route]]\nname = \"in\"\naction = \"double\"\nfrom = {{ connection = \"f\", path = \"in\", follow = true }}\n{route}\n\
         [[output]]\nname = \"out\"\nmatch = {{ action = \"double\", state = \"any\" }}\nto = {{ connection = \"f\", path = \"out\" }}\n{output}\n",
        dir.display()
    );
    Config::parse("test", &text, [], &[]).unwrap()
}

/// Doubles `n`; 13 fails, 14 is a pickle, 15 a structure of two children, 16 a tail call; a child gives its number.
pub(super) fn double(arguments: &Value) -> AttemptEnd {
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
    pub(super) async fn workers(&self) {
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

/// A worker that answers every call of `action` by a function of its arguments.
pub(super) async fn worker(handle: Handle, action: &str, answer: fn(&Value) -> AttemptEnd) {
    let session = SessionId(7);
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
                    (Codec::Json, Body::Inline(bytes)) => serde_json::from_slice(bytes).unwrap(),
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
