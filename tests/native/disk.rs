//! On a real store, after its window has passed: what is no longer in memory is read from the state and from payload segments.

use std::path::Path;
use std::time::Duration;

use dagorama::broker::types::NodeState;
use dagorama::client::{Data, Failure, NewNode, Promise, Returned, Submit, Worker, spec};
use dagorama::storage::durable::{Durable, DurableOptions};

use crate::client::{Running, ended};
use crate::world::{Setup, World};

/// Committed facts leave memory after this long.
const WINDOW: Duration = Duration::from_millis(20);

async fn world(dir: &Path) -> World {
    let options = DurableOptions {
        window_ms: WINDOW.as_millis() as u64,
        ..DurableOptions::default()
    };
    let store = Durable::open(&dir.join("store"), options).expect("a new store");
    World::on(store, Setup::default()).await
}

/// Long enough for the window and the state behind it.
async fn settle() {
    tokio::time::sleep(WINDOW * 20).await;
}

/// Bytes that differ from node to node; some are kept outside of records.
fn body(n: usize) -> Vec<u8> {
    let size = if n.is_multiple_of(50) { 10_000 } else { n % 40 };
    (0..size).map(|at| ((at + n) % 251) as u8).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn calls_and_results_that_are_no_longer_in_memory() {
    let dir = tempfile::tempdir().expect("a directory");
    let world = world(dir.path()).await;
    let client = world.client().await;
    let (echo, fails, after) = (spec("echo"), spec("fails"), spec("after"));

    // Arguments go to disk before there is a worker.
    let runs = client
        .submit_many(
            (0..300)
                .map(|n| Submit::call(&echo, Data::raw(body(n))))
                .collect(),
        )
        .await
        .expect("taken");
    let spread = client
        .submit(Submit::call(&spec("spread"), Data::json(&1_500)))
        .await
        .expect("taken");
    let blamed = client
        .submit(Submit {
            nodes: vec![
                NewNode::new(&fails, Data::json(&()), []),
                NewNode::new(&after, Data::json(&()), [Promise::New(0).value()]),
            ],
            root: 1,
            ..Submit::call(&fails, Data::json(&()))
        })
        .await
        .expect("taken");
    settle().await;
    let worker = Running::start(
        Worker::builder(&world.url(), None)
            .plain(&echo.clone(), |call| Ok(Returned::Value(call.arguments())))
            .plain(&fails, |_| Err(Failure::fatal("as it should")))
            .plain(&after, |_| Ok(Returned::json(&"never")))
            .action(&spec("join"), |mut call| async move {
                // By now the inputs are on disk too.
                settle().await;
                let inputs = call.load_inputs().await?;
                let right = inputs
                    .iter()
                    .enumerate()
                    .all(|(n, input)| input.data.bytes == body(n));
                Ok(Returned::json(&(right, inputs.len())))
            })
            .plain(&spec("spread"), move |call| {
                let n: usize = call.arguments().to_json()?;
                let leaves: Vec<Promise> = (0..n)
                    .map(|at| call.child(&echo, Data::raw(body(at)), []))
                    .collect();
                let inputs = leaves.into_iter().map(Promise::value);
                Ok(Returned::Tail(call.child(
                    &spec("join"),
                    Data::json(&()),
                    inputs,
                )))
            }),
    );
    let joined = ended(&client, spread).await;
    assert_eq!(
        joined.data.to_json::<(bool, usize)>().expect("a pair"),
        (true, 1_500)
    );
    assert_eq!(ended(&client, blamed).await.state, NodeState::Skipped);
    for (n, run) in runs.iter().enumerate() {
        let outcome = ended(&client, *run.as_ref().expect("taken")).await;
        assert_eq!(outcome.data.bytes, body(n), "run {n}");
    }

    // And once more when everything has left memory, ended runs included.
    settle().await;
    for (n, run) in runs.iter().enumerate().step_by(7) {
        let outcome = ended(&client, *run.as_ref().expect("taken")).await;
        assert_eq!(outcome.data.bytes, body(n), "run {n} from disk");
    }
    let all = client.fetch(spread, 0, 1_502).await.expect("all of them");
    assert_eq!(all.len(), 1_502);
    assert_eq!(all[0].data, joined.data, "a tail call is followed on disk");
    for (n, outcome) in all[1..=1_500].iter().enumerate() {
        assert_eq!(
            (outcome.node as usize, &outcome.data.bytes[..]),
            (n + 1, &body(n)[..])
        );
    }
    let skipped = ended(&client, blamed).await;
    let error: serde_json::Value = skipped.data.to_json().expect("an error");
    assert_eq!(
        (skipped.state, &error["message"]),
        (NodeState::Skipped, &"as it should".into())
    );
    let shown = client.show(spread, false).await.expect("shown");
    assert_eq!(shown["counts"], serde_json::json!({"succeeded": 1_502}));
    let events = client.events(spread, 0, 10_000).await.expect("events");
    let events = events["events"].as_array().expect("a list");
    assert!(
        events
            .iter()
            .enumerate()
            .all(|(at, event)| event["seq"] == at + 1),
        "no gap"
    );
    assert!(
        events.len() >= 3 * 1_502,
        "created, leased, succeeded: {}",
        events.len()
    );
    let listed = client.runs(None, None, 1_000).await.expect("runs");
    assert_eq!(listed["runs"].as_array().map(Vec::len), Some(302));
    worker.stop().await;
    world.stop().await;
}
