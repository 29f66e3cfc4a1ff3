//! In raw frames: what a worker and a client in any language see.

use std::time::Duration;

use bytes::Bytes;
use dagorama::broker::Settings;
use dagorama::edge::native::codec::{self, End};
use dagorama::edge::native::frame::Verb;

use crate::world::{Raw, Setup, World, code, node, soon, value};

#[tokio::test]
async fn submit_lease_finish_wait() {
    let world = World::start().await;
    let mut client = Raw::client(world.socket()).await;
    let run = client.submit(b"arguments").await;
    let (mut worker, welcome) = Raw::worker(world.socket(), None).await;
    assert_eq!(welcome["lease_ms"], 30_000);
    assert_eq!(welcome["leases"], serde_json::json!([]));
    worker.credit(1).await;
    let leases = worker.leases().await;
    let lease = &leases[0];
    assert_eq!(leases.len(), 1);
    assert_eq!((lease.run, lease.salt), (run.seq.0, run.salt));
    assert_eq!((lease.node, lease.attempt), (0, 1));
    assert_eq!(&lease.arguments[..], b"arguments");
    assert_ne!(lease.token, [0; 16]);

    let before = client.wait(run, 1).await;
    assert_eq!((before.state, before.item), (2, None), "it is leased");
    assert_eq!(worker.finish(&[value(lease, b"result")]).await, []);
    let waited = client.wait(run, 0).await;
    let item = waited.item.expect("an outcome");
    assert_eq!((waited.state, &item.body[..]), (5, &b"result"[..]));

    // The same again is the same answer; another outcome is a conflict; a wrong token never was a lease.
    assert_eq!(worker.finish(&[value(lease, b"result")]).await, []);
    let other = value(lease, b"other");
    let mut forged = value(lease, b"result");
    forged.token[0] ^= 1;
    let refused = worker
        .finish(&[value(lease, b"result"), other, forged])
        .await;
    let expected = [(1, "COMPLETION_CONFLICT"), (2, "LEASE_UNKNOWN")];
    assert_eq!(refused, expected.map(|(at, code)| (at, code.to_owned())));
    assert_eq!(
        &client.wait(run, 0).await.item.expect("ended").body[..],
        b"result"
    );
    world.stop().await;
}

#[tokio::test]
async fn a_wait_that_is_too_long_says_which_worker_is_missing() {
    let world = World::start().await;
    let mut client = Raw::client(world.socket()).await;
    let run = client.submit(b"").await;
    let waited = client.wait(run, 30).await;
    assert_eq!((waited.state, waited.item), (1, None));
    for word in ["default", "dagorama worker <module>"] {
        assert!(waited.hint.contains(word), "{:?}", waited.hint);
    }
    world.stop().await;
}

#[tokio::test]
async fn a_session_that_comes_back_keeps_its_leases() {
    let world = World::start().await;
    let mut client = Raw::client(world.socket()).await;
    let runs = [client.submit(b"a").await, client.submit(b"b").await];
    let (mut worker, welcome) = Raw::worker(world.socket(), None).await;
    let session = welcome["session"].as_str().expect("a session").to_owned();
    worker.credit(2).await;
    let mut leases = worker.leases().await;
    while leases.len() < 2 {
        leases.extend(worker.leases().await);
    }
    drop(worker);
    let (mut worker, welcome) = Raw::worker(world.socket(), Some(&session)).await;
    assert_eq!(welcome["session"], session.as_str());
    let mut held: Vec<u64> = welcome["leases"]
        .as_array()
        .expect("a list")
        .iter()
        .map(|lease| lease[0].as_u64().expect("a run"))
        .collect();
    held.sort_unstable();
    assert_eq!(held, runs.map(|run| run.seq.0));

    // One is finished with its token, the other given back without.
    let mut released = value(&leases[1], b"");
    released.end = End::Released;
    released.token = [0; 16];
    let mut wrong = released.clone();
    wrong.attempt = 2;
    let refused = worker
        .finish(&[value(&leases[0], b"done"), released, wrong])
        .await;
    assert_eq!(refused, [(2, "LEASE_UNKNOWN".to_owned())]);
    worker.credit(1).await;
    let again = worker.leases().await;
    assert_eq!((again[0].run, again[0].attempt), (leases[1].run, 2));
    world.stop().await;
}

#[tokio::test]
async fn a_release_needs_the_token_or_the_session() {
    let world = World::start().await;
    let mut client = Raw::client(world.socket()).await;
    client.submit(b"a").await;
    let (mut worker, _) = Raw::worker(world.socket(), None).await;
    worker.credit(1).await;
    let leases = worker.leases().await;
    let mut released = value(&leases[0], b"");
    released.end = End::Released;
    released.token = [0; 16];
    let refused = [(0, "LEASE_UNKNOWN".to_owned())];
    let (mut other, _) = Raw::worker(world.socket(), None).await;
    assert_eq!(other.finish(&[released.clone()]).await, refused);
    assert_eq!(client.finish(&[released.clone()]).await, refused);
    released.token = leases[0].token;
    assert_eq!(worker.finish(&[released]).await, []);
    world.stop().await;
}

#[tokio::test]
async fn a_late_completion_is_refused() {
    let settings = Settings {
        detach_grace_ms: 50,
        ..Settings::default()
    };
    let world = World::with(Setup {
        settings,
        ..Setup::default()
    })
    .await;
    let mut client = Raw::client(world.socket()).await;
    let run = client.submit(b"a").await;
    let (mut zombie, _) = Raw::worker(world.socket(), None).await;
    zombie.credit(1).await;
    let late = zombie.leases().await.remove(0);
    drop(zombie);
    let (mut worker, _) = Raw::worker(world.socket(), None).await;
    worker.credit(1).await;
    let lease = worker.leases().await.remove(0);
    assert_eq!((lease.run, lease.attempt), (run.seq.0, 2));
    assert_ne!(lease.token, late.token);
    let refused = worker.finish(&[value(&late, b"late")]).await;
    assert_eq!(refused, [(0, "LEASE_EXPIRED".to_owned())]);
    assert_eq!(worker.finish(&[value(&lease, b"in time")]).await, []);
    let waited = client.wait(run, 0).await;
    assert_eq!(&waited.item.expect("ended").body[..], b"in time");
    world.stop().await;
}

#[tokio::test]
async fn a_second_connection_takes_the_session_over() {
    let world = World::start().await;
    let (mut first, welcome) = Raw::worker(world.socket(), None).await;
    let session = welcome["session"].as_str().expect("a session");
    first.credit(1).await;
    let (mut second, _) = Raw::worker(world.socket(), Some(session)).await;
    assert_eq!(first.receive().await, None, "the first is closed");
    second.credit(1).await;
    let mut client = Raw::client(world.socket()).await;
    client.submit(b"a").await;
    let lease = second.leases().await.remove(0);
    // The end of the first connection did not detach the session.
    assert_eq!(second.finish(&[value(&lease, b"")]).await, []);
    world.stop().await;
}

#[tokio::test]
async fn goodbye_gives_the_leases_back_at_once() {
    let world = World::start().await;
    let mut client = Raw::client(world.socket()).await;
    client.submit(b"a").await;
    let (mut first, _) = Raw::worker(world.socket(), None).await;
    first.credit(1).await;
    first.leases().await;
    assert_eq!(first.ask(Verb::Goodbye, b"").await.verb, Verb::Reply);
    let (mut second, _) = Raw::worker(world.socket(), None).await;
    second.credit(1).await;
    let lease = second.leases().await.remove(0);
    assert_eq!(lease.attempt, 2);
    world.stop().await;
}

#[tokio::test]
async fn few_small_inputs_travel_with_the_lease() {
    let world = World::start().await;
    let mut client = Raw::client(world.socket()).await;
    let run = client.submit(b"root").await;
    let (mut worker, _) = Raw::worker(world.socket(), None).await;
    worker
        .send(Verb::Define, 0, br#"[{"id": 1, "action": "leaf"}]"#)
        .await;
    worker.credit(10).await;
    let root = worker.leases().await.remove(0);
    let range = |first, count, new| codec::Range {
        first,
        count,
        mode: dagorama::broker::types::InputUse::Value,
        new,
    };
    let mut finish = value(&root, b"");
    let mut join = node(b"join");
    join.ranges = vec![range(0, 3, true)];
    finish.children = vec![node(b"0"), node(b"1"), node(b"2"), join];
    finish.end = End::Tail;
    finish.ranges = vec![range(3, 1, true)];
    assert_eq!(worker.finish(&[finish]).await, []);
    let mut leases = Vec::new();
    while leases.len() < 3 {
        leases.extend(worker.leases().await);
    }
    let done: Vec<_> = leases
        .iter()
        .map(|lease| value(lease, &lease.arguments))
        .collect();
    assert_eq!(worker.finish(&done).await, []);
    let join = worker.leases().await.remove(0);
    let inline: Vec<&[u8]> = join.inline.iter().map(|item| &item.body[..]).collect();
    assert_eq!(inline, [b"0", b"1", b"2"]);
    assert_eq!(worker.finish(&[value(&join, b"sum")]).await, []);
    let waited = client.wait(run, 0).await;
    assert_eq!(
        &waited.item.expect("ended").body[..],
        b"sum",
        "a tail call is followed"
    );

    // FETCH follows it too, says what has no value, and names a node that is not there.
    let mut body = Vec::new();
    let ranges = vec![range(0, 5, false)];
    codec::put_fetch(
        &mut body,
        &codec::Fetch {
            run: run.seq.0,
            ranges,
        },
    );
    let items = codec::decode_items(client.ask(Verb::Fetch, &body).await.body).expect("items");
    let bodies: Vec<&[u8]> = items.iter().map(|item| &item.body[..]).collect();
    assert_eq!(bodies, [&b"sum"[..], b"0", b"1", b"2", b"sum"]);
    body.clear();
    let ranges = vec![range(4, 2, false)];
    codec::put_fetch(
        &mut body,
        &codec::Fetch {
            run: run.seq.0,
            ranges,
        },
    );
    assert_eq!(client.refused(Verb::Fetch, &body).await, "UNKNOWN_NODE");
    world.stop().await;
}

#[tokio::test]
async fn one_bad_item_does_not_harm_its_neighbours() {
    let world = World::start().await;
    let mut client = Raw::client(world.socket()).await;
    client
        .send(Verb::Define, 0, br#"[{"id": 1, "action": "leaf"}]"#)
        .await;
    let submit = |tags: &'static [u8], spec| codec::Submit {
        key: Bytes::new(),
        tags: Bytes::from_static(tags),
        root: 0,
        nodes: vec![codec::Node { spec, ..node(b"") }],
    };
    let list = [
        submit(b"", 1),
        submit(b"", 9),
        submit(b"[]", 1),
        submit(b"{}", 1),
    ];
    let mut body = Vec::new();
    codec::put_list(&mut body, &list, codec::put_submit);
    let answer = client.ask(Verb::Submit, &body).await.body;
    let got: Vec<String> = codec::decode_submitted(answer)
        .expect("well formed")
        .iter()
        .map(|one| match one {
            codec::Submitted::Run { .. } => "run".to_owned(),
            codec::Submitted::Refused(reason) => code(reason),
        })
        .collect();
    assert_eq!(got, ["run", "INVALID_REQUEST", "INVALID_REQUEST", "run"]);

    let (mut worker, _) = Raw::worker(world.socket(), None).await;
    worker.credit(2).await;
    let mut leases = worker.leases().await;
    while leases.len() < 2 {
        leases.extend(worker.leases().await);
    }
    let mut bad = value(&leases[0], b"");
    bad.children = vec![codec::Node {
        spec: 77,
        ..node(b"")
    }];
    let items = [
        bad.clone(),
        value(&leases[0], b""),
        bad,
        value(&leases[1], b""),
    ];
    let refused = worker.finish(&items).await;
    let expected = [0, 2].map(|at| (at, "INVALID_REQUEST".to_owned()));
    assert_eq!(refused, expected);
    world.stop().await;
}

#[tokio::test]
async fn a_stopping_broker_answers_what_it_has_taken_and_closes() {
    let world = World::start().await;
    let mut client = Raw::client(world.socket()).await;
    let run = client.submit(b"a").await;
    let mut body = Vec::new();
    let wait = codec::Wait {
        seq: run.seq.0,
        salt: run.salt,
        timeout_ms: 0,
    };
    codec::put_wait(&mut body, &wait);
    client.send(Verb::Wait, 50, &body).await;
    client.send(Verb::Status, 51, b"{}").await;
    assert_eq!(client.receive().await.expect("an answer").request, 51);
    soon(world.stop()).await;
    while let Some(frame) = client.receive().await {
        assert_ne!(frame.verb, Verb::Reply, "nothing was waited for");
    }
    tokio::time::sleep(Duration::from_millis(1)).await;
}
