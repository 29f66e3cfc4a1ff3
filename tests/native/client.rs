//! The Rust client and worker: everything a program does with a broker.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use dagorama::broker::types::{Batch, NodeState, Retry, Spec};
use dagorama::client::{
    Client, ClientError, Data, Failure, NewNode, Outcome, Report, Returned, Submit, Waited, Worker,
    WorkerBuilder, spec,
};
use dagorama::edge::native::Address;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use crate::world::{Setup, World, soon};

/// A worker that runs in this process until it is stopped.
pub(crate) struct Running {
    stop: oneshot::Sender<()>,
    task: JoinHandle<Result<Report, ClientError>>,
}

impl Running {
    pub(crate) fn start(worker: WorkerBuilder) -> Self {
        let (stop, stopped) = oneshot::channel();
        let task = tokio::spawn(worker.run(async {
            let _ = stopped.await;
        }));
        Self { stop, task }
    }

    pub(crate) async fn stop(self) -> Report {
        let _ = self.stop.send(());
        soon(self.task).await.expect("no panic").expect("it ran")
    }
}

async fn outcome(client: &Client, submit: Submit) -> Outcome {
    let run = client.submit(submit).await.expect("taken");
    ended(client, run).await
}

pub(crate) async fn ended(client: &Client, run: dagorama::broker::types::RunId) -> Outcome {
    match soon(client.wait(run, None)).await.expect("an answer") {
        Waited::Ended(outcome) => outcome,
        Waited::Running { state, hint } => panic!("{state:?}: {hint}"),
    }
}

/// `spread(n)` makes n leaves and a join of their values, and its value is the join's.
fn spreading(world: &World) -> WorkerBuilder {
    let (leaf, join) = (spec("leaf"), spec("join"));
    Worker::builder(&world.url(), None)
        .plain(&leaf.clone(), |call| {
            let n: u64 = call.arguments().to_json()?;
            Ok(Returned::json(&(2 * n)))
        })
        .plain(&join.clone(), |call| {
            let mut sum = 0;
            for input in call.inputs() {
                sum += input.data.to_json::<u64>()?;
            }
            Ok(Returned::json(&sum))
        })
        .plain(&spec("spread"), move |call| {
            let n: u64 = call.arguments().to_json()?;
            let leaves: Vec<_> = (0..n)
                .map(|at| call.child(&leaf, Data::json(&at), []))
                .collect();
            let inputs = leaves.into_iter().map(dagorama::client::Promise::value);
            Ok(Returned::Tail(call.child(&join, Data::json(&()), inputs)))
        })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_fan_out_and_its_join() {
    let world = World::start().await;
    let worker = Running::start(spreading(&world));
    let client = world.client().await;
    for n in [0_u64, 1, 3, 16, 17, 10_000] {
        let got = outcome(&client, Submit::call(&spec("spread"), Data::json(&n))).await;
        assert!(got.is_success(), "{got:?}");
        let sum: u64 = got.data.to_json().expect("a number");
        assert_eq!(sum, n * n.saturating_sub(1), "the sum of 2·k for k < {n}");
    }
    let report = worker.stop().await;
    let leaves = 1 + 3 + 16 + 17 + 10_000;
    let expected = Report {
        calls: leaves + 2 * 6,
        failed: 0,
        refused: 0,
    };
    assert_eq!(report, expected, "each call ran once");
    world.stop().await;
}

/// The lease would be held, and its node open, for as long as the worker lives.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_outcome_that_the_broker_cannot_take_is_a_failure() {
    let world = World::start().await;
    let worker = Running::start(spreading(&world));
    let client = world.client().await;
    let too_many = Submit::call(&spec("spread"), Data::json(&100_000));
    let got = outcome(&client, too_many).await;
    assert_eq!(got.state, NodeState::Failed);
    let error: serde_json::Value = got.data.to_json().expect("JSON");
    let message = error["message"].as_str().unwrap_or_default();
    assert!(message.contains("GRAPH_TOO_LARGE"), "{message}");
    assert_eq!(worker.stop().await.refused, 1);
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_runs_of_two_workers_each_run_once() {
    let world = World::start().await;
    let seen = Arc::new(Mutex::new(BTreeSet::new()));
    let twice = Arc::new(AtomicU32::new(0));
    let workers: Vec<Running> = (0..2)
        .map(|_| {
            let (seen, twice) = (Arc::clone(&seen), Arc::clone(&twice));
            Running::start(
                Worker::builder(&world.url(), None).action(&spec("leaf"), move |call| {
                    let (seen, twice) = (Arc::clone(&seen), Arc::clone(&twice));
                    async move {
                        let n: u32 = call.arguments().to_json()?;
                        if !seen.lock().expect("no panic").insert(n) {
                            twice.fetch_add(1, Ordering::Relaxed);
                        }
                        Ok(Returned::json(&(n + 1)))
                    }
                }),
            )
        })
        .collect();
    let client = world.client().await;
    soon(async {
        while client.status().await.expect("a status")["sessions"] != 2 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    })
    .await;
    let leaf = spec("leaf");
    let submits = (0..3_000_u32).map(|n| Submit::call(&leaf, Data::json(&n)));
    let runs = client.submit_many(submits.collect()).await.expect("taken");
    for (n, run) in runs.into_iter().enumerate() {
        let outcome = ended(&client, run.expect("taken")).await;
        assert_eq!(outcome.data.to_json::<usize>().expect("a number"), n + 1);
    }
    let mut calls = 0;
    for worker in workers {
        let report = worker.stop().await;
        assert!(report.calls > 0, "both had work");
        calls += report.calls;
    }
    assert_eq!((calls, twice.load(Ordering::Relaxed)), (3_000, 0));
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn failures_retries_and_panics() {
    let world = World::start().await;
    let retrying = |action: &str, max_attempts| {
        let mut spec = Spec::clone(&spec(action));
        spec.retry = Retry {
            max_attempts,
            delay_ms: 1,
            ..Retry::default()
        };
        Arc::new(spec)
    };
    let flaky = retrying("flaky", 3);
    let hopeless = retrying("hopeless", 2);
    let panics = retrying("panics", 1);
    let (tried, n_tried) = (Arc::new(AtomicU32::new(0)), Arc::new(AtomicU32::new(0)));
    let worker = Running::start(
        Worker::builder(&world.url(), None)
            .action(&flaky, {
                let tried = Arc::clone(&tried);
                move |call| {
                    tried.fetch_add(1, Ordering::Relaxed);
                    async move {
                        match call.attempt() {
                            3 => Ok(Returned::json(&call.idempotency_key())),
                            n => Err(Failure::retryable(format!("attempt {n}"))),
                        }
                    }
                }
            })
            .plain(&hopeless, {
                let n_tried = Arc::clone(&n_tried);
                move |_| {
                    n_tried.fetch_add(1, Ordering::Relaxed);
                    Err(Failure::fatal("never"))
                }
            })
            .action(&panics, |_| async {
                panic!("a panic that is expected here")
            })
            .plain(&spec("after"), |_| Ok(Returned::json(&"ran"))),
    );
    let client = world.client().await;
    let run = client
        .submit(Submit::call(&flaky, Data::json(&())))
        .await
        .expect("taken");
    let got = ended(&client, run).await;
    assert_eq!(
        got.data.to_json::<String>().expect("text"),
        format!("{run}/0")
    );
    assert_eq!(tried.load(Ordering::Relaxed), 3);

    let got = outcome(&client, Submit::call(&hopeless, Data::json(&()))).await;
    let error: serde_json::Value = got.data.to_json().expect("an error");
    assert_eq!(
        (got.state, &error["message"]),
        (NodeState::Failed, &"never".into())
    );
    assert_eq!(
        n_tried.load(Ordering::Relaxed),
        1,
        "the policy does not cover it"
    );

    let got = outcome(&client, Submit::call(&panics, Data::json(&()))).await;
    let error: serde_json::Value = got.data.to_json().expect("an error");
    assert_eq!(
        (got.state, &error["type"]),
        (NodeState::Failed, &"panic".into())
    );

    // A node behind a failed one is skipped, and has the error of the one to blame.
    let first = NewNode::new(&hopeless, Data::json(&()), []);
    let promise = dagorama::client::Promise::New;
    let second = NewNode::new(&spec("after"), Data::json(&()), [promise(0).value()]);
    let third = NewNode::new(&spec("after"), Data::json(&()), [promise(1).after()]);
    let fourth = NewNode::new(&spec("after"), Data::json(&()), [promise(0).outcome()]);
    let submit = |root| Submit {
        nodes: vec![first.clone(), second.clone(), third.clone(), fourth.clone()],
        root,
        ..Submit::call(&hopeless, Data::json(&()))
    };
    for root in [1, 2] {
        let got = outcome(&client, submit(root)).await;
        let error: serde_json::Value = got.data.to_json().expect("an error");
        assert_eq!(
            (got.state, &error["message"]),
            (NodeState::Skipped, &"never".into())
        );
    }
    let got = outcome(&client, submit(3)).await;
    assert!(
        got.is_success(),
        "an outcome is delivered also when it is an error: {got:?}"
    );
    worker.stop().await;
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn large_arguments_values_and_structures() {
    let world = World::start().await;
    let part = spec("part");
    let worker = Running::start(
        Worker::builder(&world.url(), None)
            .plain(&spec("echo"), |call| Ok(Returned::Value(call.arguments())))
            .plain(&part.clone(), |call| Ok(Returned::Value(call.arguments())))
            .action(&spec("parts"), move |mut call| {
                let part = Arc::clone(&part);
                async move {
                    let sizes: Vec<usize> = call.arguments().to_json()?;
                    let references = sizes
                        .iter()
                        .map(|size| call.child(&part, Data::raw(vec![7; *size]), []))
                        .collect();
                    let data = Data::json(&"a list");
                    Ok(Returned::Structure { data, references })
                }
            }),
    );
    let client = world.client().await;
    for size in [0_u32, 1, 3_072, 3_073, 100_000, 5_000_000] {
        let body: Vec<u8> = (0..size).map(|at| (at % 251) as u8).collect();
        let got = outcome(
            &client,
            Submit::call(&spec("echo"), Data::raw(body.clone())),
        )
        .await;
        assert!(got.is_success() && got.data.bytes == body, "{size} bytes");
    }
    let sizes = [10_usize, 2_000_000, 3_000, 2_000_000];
    let run = client
        .submit(Submit::call(&spec("parts"), Data::json(&sizes)))
        .await
        .expect("taken");
    let got = ended(&client, run).await;
    assert_eq!(got.data.to_json::<String>().expect("text"), "a list");
    assert_eq!(got.references, [1, 2, 3, 4]);
    let parts = client.fetch(run, 1, 4).await.expect("all of them");
    let lengths: Vec<usize> = parts.iter().map(|part| part.data.bytes.len()).collect();
    assert_eq!(lengths, sizes);
    worker.stop().await;
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn calls_of_a_batch_action_come_together() {
    let world = World::start().await;
    let mut bundled = Spec::clone(&spec("bundled"));
    bundled.batch = Some(Batch {
        max_size: 10,
        max_wait_ms: 10_000,
    });
    let bundled = Arc::new(bundled);
    let sizes = Arc::new(Mutex::new(Vec::new()));
    let worker = Running::start(Worker::builder(&world.url(), None).batch(&bundled, {
        let sizes = Arc::clone(&sizes);
        move |calls| {
            sizes.lock().expect("no panic").push(calls.len());
            let echo = |call: &dagorama::client::Call| Ok(Returned::Value(call.arguments()));
            calls.iter().map(echo).collect()
        }
    }));
    let client = world.client().await;
    let submits = (0..30_u32).map(|n| Submit::call(&bundled, Data::json(&n)));
    let runs = client.submit_many(submits.collect()).await.expect("taken");
    for (n, run) in runs.into_iter().enumerate() {
        let outcome = ended(&client, run.expect("taken")).await;
        assert_eq!(outcome.data.to_json::<usize>().expect("a number"), n);
    }
    assert_eq!(*sizes.lock().expect("no panic"), [10, 10, 10]);
    worker.stop().await;
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn children_created_early_are_the_same_in_the_next_attempt() {
    let world = World::start().await;
    let leaf = spec("leaf");
    let mut parent = Spec::clone(&spec("parent"));
    parent.retry.max_attempts = 2;
    parent.retry.delay_ms = 1;
    let parent = Arc::new(parent);
    let ran = Arc::new(AtomicU32::new(0));
    let worker = Running::start(
        Worker::builder(&world.url(), None)
            .plain(&leaf.clone(), {
                let ran = Arc::clone(&ran);
                move |call| {
                    ran.fetch_add(1, Ordering::Relaxed);
                    Ok(Returned::Value(call.arguments()))
                }
            })
            .action(&parent, move |mut call| {
                let leaf = Arc::clone(&leaf);
                async move {
                    let child = |text: &str| NewNode::new(&leaf, Data::json(&text), []);
                    let first = call.create(&[child("a"), child("b")]).await?;
                    let second = call.create(&[child("c")]).await?;
                    if call.attempt() == 1 {
                        return Err(Failure::retryable("once"));
                    }
                    let references = first.into_iter().chain(second).collect();
                    let data = Data::json(&"abc");
                    Ok(Returned::Structure { data, references })
                }
            }),
    );
    let client = world.client().await;
    let run = client
        .submit(Submit::call(&parent, Data::json(&())))
        .await
        .expect("taken");
    let got = ended(&client, run).await;
    assert_eq!(
        (got.is_success(), &got.references[..]),
        (true, &[1, 2, 3][..])
    );
    assert_eq!(ran.load(Ordering::Relaxed), 3, "each child ran once");
    worker.stop().await;
    world.stop().await;
}

/// Counts its end.
struct OnDrop(Arc<AtomicU32>);

impl Drop for OnDrop {
    fn drop(&mut self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cancelled_call_is_aborted_and_a_resumed_run_goes_on() {
    let world = World::start().await;
    let client = world.client().await;
    let slow = spec("slow");
    let dropped = Arc::new(AtomicU32::new(0));
    let started = Arc::new(tokio::sync::Notify::new());
    let worker = Running::start(Worker::builder(&world.url(), None).action(&slow, {
        let (dropped, started) = (Arc::clone(&dropped), Arc::clone(&started));
        move |call| {
            let guard = OnDrop(Arc::clone(&dropped));
            let started = Arc::clone(&started);
            async move {
                let _guard = guard;
                if call.attempt() == 1 {
                    started.notify_one();
                    tokio::time::sleep(Duration::from_mins(10)).await;
                }
                Ok(Returned::json(&"done"))
            }
        }
    }));
    let run = client
        .submit(Submit::call(&slow, Data::json(&())))
        .await
        .expect("taken");
    soon(started.notified()).await;
    client.cancel(run, "enough").await.expect("cancelled");
    soon(async {
        while dropped.load(Ordering::Relaxed) == 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    })
    .await;
    assert_eq!(ended(&client, run).await.state, NodeState::Cancelled);
    let shown = client.show(run, true).await.expect("shown");
    assert_eq!(shown["state"], "cancelled");
    assert_eq!(shown["cancel_reason"], "enough");
    client.resume(run).await.expect("resumed");
    let got = ended(&client, run).await;
    assert_eq!(got.data.to_json::<String>().expect("text"), "done");
    let shown = client.show(run, true).await.expect("shown");
    assert_eq!(
        (&shown["round"], &shown["state"]),
        (&2.into(), &"succeeded".into())
    );
    assert_eq!(
        client
            .resume(run)
            .await
            .map_err(|e| e.code().map(str::to_owned)),
        Ok(())
    );
    worker.stop().await;
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_key_gives_the_same_run() {
    let world = World::start().await;
    let client = world.client().await;
    let leaf = spec("leaf");
    let submit = |n: u32| Submit::call(&leaf, Data::json(&n)).with_key("one");
    let first = client.submit(submit(1)).await.expect("taken");
    let other = world.client().await;
    other
        .submit(Submit::call(&spec("other"), Data::json(&1)))
        .await
        .expect("taken");
    assert_eq!(other.submit(submit(1)).await.expect("the same"), first);
    let error = other.submit(submit(2)).await.expect_err("other content");
    assert_eq!(error.code(), Some("SUBMISSION_CONFLICT"), "{error}");
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn everything_people_ask() {
    let world = World::start().await;
    let client = world.client().await;
    let leaf = spec("leaf");
    let open = client
        .submit(Submit::call(&leaf, Data::json(&1)).with_tag("team", "a"))
        .await
        .expect("taken");
    let explained = client.explain(open, None, 10).await.expect("explained");
    assert_eq!(explained["reasons"][0]["reason"], "no_worker_on_queue");
    assert_eq!(explained["reasons"][0]["action"], "leaf");
    let status = client.status().await.expect("a status");
    assert_eq!(status["open_runs"], 1);
    assert_eq!(status["stranded"], serde_json::json!({"default": 1}));
    assert_eq!(status["pid"], std::process::id());
    let listed = client.runs(Some("running"), None, 10).await.expect("runs");
    assert_eq!(listed["runs"][0]["run"], open.to_string());

    let worker = Running::start(
        Worker::builder(&world.url(), None).plain(&leaf, |_| Ok(Returned::json(&"ok"))),
    );
    ended(&client, open).await;
    let second = client
        .submit(Submit::call(&leaf, Data::json(&2)))
        .await
        .expect("taken");
    ended(&client, second).await;
    for (state, tag, expected) in [
        (None, None, vec![second, open]),
        (Some("succeeded"), None, vec![second, open]),
        (Some("running"), None, vec![]),
        (Some("failed"), None, vec![]),
        (None, Some("team"), vec![open]),
        (None, Some("team=a"), vec![open]),
        (None, Some("team=b"), vec![]),
    ] {
        let listed = client.runs(state, tag, 10).await.expect("runs");
        let ids: Vec<String> = listed["runs"]
            .as_array()
            .expect("a list")
            .iter()
            .map(|run| run["run"].as_str().expect("an id").to_owned())
            .collect();
        let expected: Vec<String> = expected.iter().map(ToString::to_string).collect();
        assert_eq!(ids, expected, "{state:?} {tag:?}");
    }
    let shown = client.show(open, true).await.expect("shown");
    assert_eq!(shown["counts"], serde_json::json!({"succeeded": 1}));
    assert_eq!(shown["nodes"][0]["state"], "succeeded");
    assert_eq!(shown["tags"], serde_json::json!({"team": "a"}));
    let events = client.events(open, 0, 100).await.expect("events");
    let words: Vec<&str> = events["events"]
        .as_array()
        .expect("a list")
        .iter()
        .map(|event| event["state"].as_str().expect("a word"))
        .collect();
    assert_eq!(words, ["created", "leased", "succeeded"]);
    assert_eq!(events["events"][0]["action"], "leaf");
    assert_eq!(events["ended"], true);
    let later = client.events(open, 2, 100).await.expect("events");
    assert_eq!(later["events"].as_array().map(Vec::len), Some(1));
    assert_eq!(
        client.bridges().await.expect("none")["routes"],
        serde_json::json!([])
    );
    let dlq = client.dlq(&serde_json::json!({"do": "list"})).await;
    assert_eq!(dlq.expect_err("no bridges").code(), Some("NOT_AVAILABLE"));
    worker.stop().await;
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn client_and_worker_survive_restarts_of_the_broker() {
    let mut world = World::start().await;
    let address = world.address.clone();
    let client = world.client().await;
    let calls = Arc::new(AtomicU64::new(0));
    let worker = Running::start(Worker::builder(&world.url(), None).action(&spec("leaf"), {
        let calls = Arc::clone(&calls);
        move |call| {
            calls.fetch_add(1, Ordering::Relaxed);
            async move {
                tokio::time::sleep(Duration::from_millis(2)).await;
                Ok(Returned::Value(call.arguments()))
            }
        }
    }));
    let asking = tokio::spawn({
        let client = client.clone();
        async move {
            let leaf = spec("leaf");
            for n in 0..400_u32 {
                let submit = Submit::call(&leaf, Data::json(&n)).with_key(format!("{n}"));
                let run = client
                    .submit(submit)
                    .await
                    .expect("repeated until it is taken");
                let outcome = client
                    .wait(run, None)
                    .await
                    .expect("repeated until it is known");
                let Waited::Ended(outcome) = outcome else {
                    panic!("no timeout was given")
                };
                assert_eq!(outcome.data.to_json::<u32>().expect("a number"), n);
            }
        }
    });
    for _ in 0..3 {
        tokio::time::sleep(Duration::from_millis(150)).await;
        let store = world.stop().await;
        world = World::with(Setup {
            store,
            address: address.clone(),
            ..Setup::default()
        })
        .await;
    }
    tokio::time::timeout(Duration::from_mins(1), asking)
        .await
        .expect("it ends")
        .expect("no failure");
    let report = worker.stop().await;
    assert!(report.calls >= 400 && calls.load(Ordering::Relaxed) >= 400);
    let status = client.status().await.expect("a status");
    assert_eq!(
        (&status["open_runs"], &status["leases"]),
        (&0.into(), &0.into())
    );
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_long_call_keeps_its_short_lease() {
    let settings = dagorama::broker::Settings {
        lease_ms: 300,
        ..Default::default()
    };
    let world = World::with(Setup {
        settings,
        ..Setup::default()
    })
    .await;
    let slow = spec("slow");
    let worker = Running::start(
        Worker::builder(&world.url(), None)
            .action(&slow, |call| async move {
                tokio::time::sleep(Duration::from_secs(1)).await;
                Ok(Returned::json(&call.attempt()))
            })
            .plain(&spec("blocks"), |call| {
                std::thread::sleep(Duration::from_secs(1));
                Ok(Returned::json(&call.attempt()))
            }),
    );
    let client = world.client().await;
    for action in ["slow", "blocks"] {
        let got = outcome(&client, Submit::call(&spec(action), Data::json(&()))).await;
        assert_eq!(got.data.to_json::<u32>().expect("a number"), 1, "{action}");
    }
    worker.stop().await;
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_unix_socket_and_a_token() {
    let dir = tempfile::tempdir().expect("a directory");
    let world = World::with(Setup {
        token: Some("secret"),
        address: Address::Unix(dir.path().join("broker.sock")),
        ..Setup::default()
    })
    .await;
    let client = Client::connect(&world.url(), Some("secret"))
        .await
        .expect("let in");
    client.status().await.expect("answered");
    for token in [None, Some("wrong"), Some("")] {
        let error = Client::connect(&world.url(), token)
            .await
            .expect_err("not let in");
        assert_eq!(error.code(), Some("UNAUTHENTICATED"), "{token:?}");
    }
    let error = Worker::builder(&world.url(), None)
        .run(std::future::pending())
        .await
        .expect_err("not let in");
    assert_eq!(error.code(), Some("UNAUTHENTICATED"));
    world.stop().await;
    let error = Client::connect("dagorama://127.0.0.1:1", None)
        .await
        .expect_err("nobody");
    assert!(matches!(error, ClientError::Unreachable { .. }), "{error}");
}
