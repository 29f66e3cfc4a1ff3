//! Messages in, runs by name, outcomes out, over a real engine with a store in memory: each message once, whatever ends in between.

mod room;

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use dagorama_bridge_api::loopback::{Faults, Loopback, Recognition};
use serde_json::json;

use super::*;
use crate::broker::command::{Answer, AttemptEnd, Query};
use crate::broker::types::WallTime;
use crate::storage::Pressure;
use crate::storage::durable::Durable;
use crate::storage::memory::MemoryStore;

use room::*;

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

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn positions_dead_letters_and_what_is_owed_survive_in_the_real_store() {
    let dir = tempfile::tempdir().unwrap();
    let (input, output) = (dir.path().join("in"), dir.path().join("out"));
    let config = file_config(dir.path(), "", "");
    for life in 0..4u64 {
        let mut options = config.durable_options(|| WallTime(1_000));
        options.min_free_bytes = 0;
        options.min_free_permille = 0;
        let store = Durable::open(&dir.path().join("data"), options).unwrap();
        let (handle, thread, _) = crate::engine::spawn(store, config.engine_options()).unwrap();
        let bridges = Bridges::start(&handle, &config);
        append(&input, &format!("{{\"n\":{}}}\nbad\n", 100 + life));
        let letters = async || {
            bridges.dlq(json!({"do": "list"})).await.unwrap()["letters"]
                .as_array()
                .unwrap()
                .len() as u64
        };
        eventually("a letter", async || letters().await == life + 1).await;
        // Every other life has nobody who works: what is owed then is delivered by the next.
        if life % 2 == 1 {
            worker(handle.clone(), "double", double).await;
            eventually("the lines", async || {
                lines(&output).len() as u64 == life + 1
            })
            .await;
        }
        bridges.shutdown().await;
        assert_eq!(
            handle.read(|r| r.runs(None, 100)).await.unwrap().len() as u64,
            life + 1
        );
        thread.stop();
        thread.join().unwrap();
    }
    let mut seen = lines(&output);
    seen.sort();
    assert_eq!(
        seen,
        ["{\"n\":200}", "{\"n\":202}", "{\"n\":204}", "{\"n\":206}"]
    );
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
