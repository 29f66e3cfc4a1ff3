//! Without the token nothing is answered, changed or told (G18, I21).

use dagorama::edge::native::frame::Verb;

use crate::verbs::GOOD_BODIES;
use crate::world::{Raw, Setup, World, code};

const TOKEN: &str = "a-long-secret-token";

async fn world() -> World {
    World::with(Setup {
        token: Some(TOKEN),
        ..Setup::default()
    })
    .await
}

/// Sends one first frame and checks that the answer is the one word and the end.
async fn is_unauthenticated(world: &World, what: &str, verb: Verb, body: &[u8]) {
    let mut raw = Raw::open(world.socket()).await;
    raw.send(verb, 7, body).await;
    let frame = raw
        .receive()
        .await
        .unwrap_or_else(|| panic!("{what}: no answer"));
    assert_eq!((frame.verb, frame.request), (Verb::Error, 0), "{what}");
    assert_eq!(code(&frame.body), "UNAUTHENTICATED", "{what}");
    let expected = br#"{"code":"UNAUTHENTICATED","message":"unauthenticated","retryable":false}"#;
    assert_eq!(&frame.body[..], expected, "{what}: nothing else is told");
    assert_eq!(raw.receive().await, None, "{what}: and it is closed");
}

#[tokio::test]
async fn every_verb_needs_a_hello_first() {
    let world = world().await;
    for verb in Verb::ALL {
        if *verb == Verb::Hello {
            continue;
        }
        let good = GOOD_BODIES.iter().find(|(of, _)| of == verb);
        let body = good.map_or(&b"{}"[..], |(_, body)| body);
        is_unauthenticated(&world, &format!("{verb:?}"), *verb, body).await;
    }
    world.stop().await;
}

#[tokio::test]
async fn every_verb_behind_a_wrong_token_is_not_looked_at() {
    let world = world().await;
    for verb in Verb::ALL {
        let good = GOOD_BODIES.iter().find(|(of, _)| of == verb);
        let body = good.map_or(&b"{}"[..], |(_, body)| body);
        let mut raw = Raw::open(world.socket()).await;
        let hello = br#"{"version": 1, "kind": "client", "token": "a-long-secret-tokem"}"#;
        raw.send(Verb::Hello, 1, hello).await;
        // The broker may have closed before this arrives.
        let mut out = Vec::new();
        dagorama::edge::native::frame::put(&mut out, *verb, false, 2, body);
        let _ = tokio::io::AsyncWriteExt::write_all(&mut raw.stream, &out).await;
        let mut answers = 0;
        while let Some(frame) = raw.receive().await {
            assert_eq!(code(&frame.body), "UNAUTHENTICATED", "{verb:?}");
            answers += 1;
        }
        assert!(answers <= 1, "{verb:?}: one answer to the HELLO at most");
    }
    world.stop().await;
}

#[tokio::test]
async fn tokens_that_are_not_the_token() {
    let world = world().await;
    let hello = |token: &str| format!(r#"{{"version": 1, "kind": "worker", "token": {token}}}"#);
    let long = format!("\"{}\"", "x".repeat(100_000));
    for (what, document) in [
        ("none", r#"{"version": 1, "kind": "client"}"#.to_owned()),
        ("null", hello("null")),
        ("empty", hello("\"\"")),
        ("wrong", hello("\"wrong\"")),
        ("cut", hello(&format!("\"{}\"", &TOKEN[..TOKEN.len() - 1]))),
        ("longer", hello(&format!("\"{TOKEN}x\""))),
        ("twice", hello(&format!("\"{TOKEN}{TOKEN}\""))),
        ("long", hello(&long)),
        ("a number", hello("1")),
        ("a list", hello(&format!("[\"{TOKEN}\"]"))),
        ("not JSON", "\u{0}".to_owned()),
        (
            "a wrong version without a token",
            r#"{"version": 2, "kind": "client"}"#.to_owned(),
        ),
        (
            "a wrong kind without a token",
            r#"{"version": 1, "kind": "boss"}"#.to_owned(),
        ),
    ] {
        is_unauthenticated(&world, what, Verb::Hello, document.as_bytes()).await;
    }
    // Nor does garbage before the token learn more.
    for (what, bytes) in [
        ("a length over the limit", [0xff; 12]),
        ("an unknown verb", [0, 0, 0, 0, 99, 0, 0, 0, 1, 0, 0, 0]),
        ("flags", [0, 0, 0, 0, 1, 9, 0, 0, 1, 0, 0, 0]),
    ] {
        let mut raw = Raw::open(world.socket()).await;
        tokio::io::AsyncWriteExt::write_all(&mut raw.stream, &bytes)
            .await
            .expect("writable");
        let frame = raw.receive().await.expect("an answer");
        assert_eq!(code(&frame.body), "UNAUTHENTICATED", "{what}");
    }
    // The right one opens the door, and only then is anything else told.
    let mut raw = Raw::open(world.socket()).await;
    raw.hello(&hello(&format!("\"{TOKEN}\""))).await;
    for document in [
        format!(r#"{{"version": 2, "kind": "client", "token": "{TOKEN}"}}"#),
        format!(r#"{{"version": 1, "kind": "worker", "token": "{TOKEN}", "session": "xyz"}}"#),
    ] {
        let mut raw = Raw::open(world.socket()).await;
        assert_eq!(
            raw.refused(Verb::Hello, document.as_bytes()).await,
            "INVALID_REQUEST"
        );
        assert_eq!(raw.receive().await, None);
    }
    let mut client = Raw::open(world.socket()).await;
    client
        .hello(&format!(
            r#"{{"version": 1, "kind": "client", "token": "{TOKEN}"}}"#
        ))
        .await;
    let status = client.ask(Verb::Status, b"{}").await;
    let status: serde_json::Value = serde_json::from_slice(&status.body).expect("JSON");
    assert_eq!(status["open_runs"], 0, "nothing was started meanwhile");
    world.stop().await;
}
