//! Limits in time, in number and in bytes.

use std::time::Duration;

use dagorama::edge::native::Limits;
use dagorama::edge::native::frame::{HEADER_BYTES, MAX_BODY_BYTES, Verb};
use dagorama::engine::clock::Stopwatch;
use tokio::io::AsyncWriteExt;

use crate::world::{Raw, Setup, World, code, soon};

async fn with(limits: Limits) -> World {
    World::with(Setup {
        limits,
        ..Setup::default()
    })
    .await
}

fn header(verb: Verb, length: u32) -> [u8; HEADER_BYTES] {
    let mut header = [0; HEADER_BYTES];
    header[..4].copy_from_slice(&length.to_le_bytes());
    header[4] = verb as u8;
    header[8] = 1;
    header
}

/// Until the broker closes, and the code that it gave.
async fn end(raw: &mut Raw) -> Option<String> {
    let mut last = None;
    while let Some(frame) = raw.receive().await {
        last = Some(code(&frame.body));
    }
    last
}

#[tokio::test]
async fn the_first_frame_must_come_in_time() {
    let world = with(Limits {
        hello_timeout: Duration::from_millis(200),
        ..Limits::default()
    })
    .await;
    let hello = header(Verb::Hello, 40);
    for (what, bytes) in [
        ("silence", &[][..]),
        ("half a header", &hello[..6]),
        ("a header", &hello[..]),
    ] {
        let began = Stopwatch::start();
        let mut raw = Raw::open(world.socket()).await;
        raw.stream.write_all(bytes).await.expect("writable");
        assert_eq!(
            end(&mut raw).await.as_deref(),
            Some("INVALID_REQUEST"),
            "{what}"
        );
        let took = began.elapsed();
        assert!(
            took >= Duration::from_millis(190) && took < Duration::from_secs(5),
            "{what}"
        );
    }
    // A byte now and then does not help.
    let mut raw = Raw::open(world.socket()).await;
    let began = Stopwatch::start();
    for byte in hello {
        if raw.stream.write_all(&[byte]).await.is_err() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(30)).await;
    }
    end(&mut raw).await;
    assert!(began.elapsed() < Duration::from_secs(5));
    world.stop().await;
}

#[tokio::test]
async fn a_begun_frame_must_go_on() {
    let world = with(Limits {
        idle_timeout: Duration::from_millis(100),
        ..Limits::default()
    })
    .await;
    let mut patient = Raw::client(world.socket()).await;
    let mut raw = Raw::client(world.socket()).await;
    raw.stream
        .write_all(&header(Verb::Finish, 1_000))
        .await
        .expect("writable");
    assert_eq!(end(&mut raw).await.as_deref(), Some("INVALID_REQUEST"));
    // Silence between frames is fine.
    assert_eq!(patient.ask(Verb::Status, b"{}").await.verb, Verb::Reply);
    world.stop().await;
}

#[tokio::test]
async fn lengths_over_the_limit_are_refused_by_their_header() {
    let world = World::start().await;
    for (verb, length, expected) in [
        (Verb::Finish, MAX_BODY_BYTES as u32 + 1, "PAYLOAD_TOO_LARGE"),
        (Verb::Submit, u32::MAX, "PAYLOAD_TOO_LARGE"),
        (Verb::Status, 2 * 1024 * 1024, "PAYLOAD_TOO_LARGE"),
        (Verb::Define, 64 * 1024 * 1024, "PAYLOAD_TOO_LARGE"),
    ] {
        let mut raw = Raw::client(world.socket()).await;
        raw.stream
            .write_all(&header(verb, length))
            .await
            .expect("writable");
        assert_eq!(
            end(&mut raw).await.as_deref(),
            Some(expected),
            "{verb:?} {length}"
        );
    }
    // Before the introduction, nothing large is read at all.
    let mut raw = Raw::open(world.socket()).await;
    raw.stream
        .write_all(&header(Verb::Hello, 8 * 1024 * 1024))
        .await
        .expect("writable");
    assert_eq!(end(&mut raw).await.as_deref(), Some("UNAUTHENTICATED"));
    world.stop().await;
}

#[tokio::test]
async fn connections_over_the_limit_are_closed_and_room_is_made_by_those_who_leave() {
    let world = with(Limits {
        connections: 4,
        ..Limits::default()
    })
    .await;
    let mut clients = Vec::new();
    for _ in 0..4 {
        clients.push(Raw::client(world.socket()).await);
    }
    let mut fifth = Raw::open(world.socket()).await;
    assert_eq!(fifth.receive().await, None);
    clients.pop();
    soon(async {
        loop {
            let mut raw = Raw::open(world.socket()).await;
            raw.send(Verb::Hello, 1, br#"{"version": 1, "kind": "client"}"#)
                .await;
            if raw.receive().await.is_some() {
                return;
            }
        }
    })
    .await;
    for client in &mut clients {
        assert_eq!(client.ask(Verb::Status, b"{}").await.verb, Verb::Reply);
    }
    world.stop().await;
}

#[tokio::test]
async fn bytes_in_flight_are_shared_and_given_back() {
    let world = with(Limits {
        bytes_in_flight: 4 * 1024 * 1024,
        idle_timeout: Duration::from_millis(300),
        ..Limits::default()
    })
    .await;
    // One connection takes most of the budget and stalls: others wait for it to be cut off, and then go on.
    let mut greedy = Raw::client(world.socket()).await;
    greedy
        .stream
        .write_all(&header(Verb::Finish, 700_000))
        .await
        .expect("writable");
    tokio::time::sleep(Duration::from_millis(50)).await;
    let mut other = Raw::client(world.socket()).await;
    // What asks or submits waits for no completion, and the other way round.
    let asked = tokio::time::timeout(Duration::from_millis(150), other.ask(Verb::Status, b"{}"));
    assert_eq!(asked.await.expect("at once").verb, Verb::Reply);
    let mut body = vec![0; 700_000];
    body[..4].copy_from_slice(&1_u32.to_le_bytes());
    let frame = other.ask(Verb::Finish, &body).await;
    assert_eq!(code(&frame.body), "INVALID_REQUEST");
    assert_eq!(end(&mut greedy).await.as_deref(), Some("INVALID_REQUEST"));
    world.stop().await;
}

#[tokio::test]
async fn waits_of_a_connection_are_limited_and_end_with_it() {
    let world = with(Limits {
        waits_per_connection: 10,
        ..Limits::default()
    })
    .await;
    let mut raw = Raw::client(world.socket()).await;
    let run = raw.submit(b"").await;
    let mut body = Vec::new();
    body.extend_from_slice(&run.seq.0.to_le_bytes());
    body.extend_from_slice(&run.salt.to_le_bytes());
    body.extend_from_slice(&0_u32.to_le_bytes());
    for request in 100..110 {
        raw.send(Verb::Wait, request, &body).await;
    }
    assert_eq!(raw.refused(Verb::Wait, &body).await, "OVERLOADED");
    assert_eq!(raw.ask(Verb::Status, b"{}").await.verb, Verb::Reply);
    world.stop().await;
}

#[tokio::test]
async fn who_does_not_read_is_not_written_to_for_ever() {
    let world = with(Limits {
        write_queue_bytes: 64 * 1024,
        requests_per_connection: 8,
        ..Limits::default()
    })
    .await;
    // Asks and asks and never reads: the broker stops reading from it, and nobody else notices.
    let mut deaf = Raw::client(world.socket()).await;
    let mut frames = Vec::new();
    // More than the buffers of both sockets hold.
    let padded = [&b"{}"[..], &[b' '; 1_000]].concat();
    for request in 1..50_000_u32 {
        dagorama::edge::native::frame::put(&mut frames, Verb::Status, false, request, &padded);
    }
    let writing = tokio::time::timeout(Duration::from_secs(2), deaf.stream.write_all(&frames));
    assert!(
        writing.await.is_err(),
        "50 MB of requests were taken without a reader"
    );
    let mut other = Raw::client(world.socket()).await;
    assert_eq!(other.ask(Verb::Status, b"{}").await.verb, Verb::Reply);
    drop(deaf);
    world.stop().await;
}
