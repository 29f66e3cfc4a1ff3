//! Thousands of bad frames against one broker while good clients work.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use dagorama::client::{Client, Data, Returned, Submit, Waited, Worker, spec};
use dagorama::edge::native::frame::{self, MAX_BODY_BYTES, Verb};
use dagorama::engine::clock::Stopwatch;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::verbs::GOOD_BODIES;
use crate::world::{Raw, World, soon};

/// Connections with something bad on them.
const ROUNDS: usize = 5_200;
const SEED: u64 = 0x0bad_f00d;

struct Dice(u64);

impl Dice {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    fn bytes(&mut self, n: usize) -> Vec<u8> {
        (0..n).map(|_| self.next() as u8).collect()
    }

    fn verb(&mut self) -> Verb {
        Verb::ALL[self.below(Verb::ALL.len())]
    }
}

/// Bytes that are bad in one of many ways; most come after a good HELLO.
fn bad(dice: &mut Dice, kind: usize) -> (bool, Vec<u8>) {
    let mut out = Vec::new();
    let (verb, body) = GOOD_BODIES[dice.below(GOOD_BODIES.len())];
    match kind {
        // No HELLO at all.
        0 => {
            let n = 1 + dice.below(2_000);
            return (false, dice.bytes(n));
        }
        1 => {
            frame::put(&mut out, dice.verb(), false, 1, body);
            return (false, out);
        }
        2 => {
            let n = 1 + dice.below(20_000);
            out = dice.bytes(n);
        }
        // A good frame that ends too early.
        3 => {
            frame::put(&mut out, verb, false, 5, body);
            out.truncate(1 + dice.below(out.len() - 1));
        }
        // A length that nothing follows, or that no frame may have.
        4 => {
            frame::put(&mut out, verb, false, 5, body);
            let lengths = [
                MAX_BODY_BYTES as u32,
                MAX_BODY_BYTES as u32 + 1,
                u32::MAX,
                1 << 20,
                1 << 31,
            ];
            out[..4].copy_from_slice(&lengths[dice.below(lengths.len())].to_le_bytes());
        }
        // A header that breaks a rule.
        5 => {
            frame::put(&mut out, verb, false, 5, body);
            out[4 + dice.below(4)] = 1 + dice.below(255) as u8;
        }
        // A body with some bytes changed.
        6 | 7 => {
            let mut body = body.to_vec();
            for _ in 0..=dice.below(3) {
                if !body.is_empty() {
                    let at = dice.below(body.len());
                    body[at] = dice.next() as u8;
                }
            }
            frame::put(&mut out, verb, false, 5, &body);
        }
        // Counts and lengths that lie.
        8 => {
            let mut body = body.to_vec();
            body.resize(body.len().max(8), 0);
            let at = 4 * dice.below(body.len() / 4);
            body[at..at + 4].copy_from_slice(&[0xff, 0xff, 0xff, 0x7f]);
            frame::put(&mut out, verb, false, 5, &body);
        }
        // The body of one verb for another.
        9 => frame::put(&mut out, dice.verb(), false, 5, body),
        // JSON of the wrong kinds.
        10 => {
            let documents: [&[u8]; 8] = [
                b"null",
                b"[[[[]]]]",
                b"{\"run\": {\"run\": 1}}",
                b"{\"run\": \"\\ud800\"}",
                b"1e999",
                b"{\"limit\": -1, \"run\": []}",
                b"\"\"",
                b"[{\"id\": 1e3, \"action\": null}]",
            ];
            frame::put(
                &mut out,
                verb,
                false,
                5,
                documents[dice.below(documents.len())],
            );
        }
        // Very deep JSON.
        11 => {
            let deep = vec![b'['; 1 + dice.below(50_000)];
            frame::put(&mut out, verb, false, 5, &deep);
        }
        // A stream of good frames with garbage in the middle.
        12 => {
            for request in 0..dice.below(40) as u32 {
                frame::put(&mut out, Verb::Status, false, 1 + request, b"{}");
            }
            out.extend(dice.bytes(64));
            frame::put(&mut out, Verb::Status, false, 99, b"{}");
        }
        // Random binary bodies for the binary verbs.
        _ => {
            let binary = [
                Verb::Submit,
                Verb::Finish,
                Verb::Fetch,
                Verb::Wait,
                Verb::Create,
                Verb::Heartbeat,
                Verb::Credit,
            ];
            let n = dice.below(600);
            let body = dice.bytes(n);
            frame::put(&mut out, binary[dice.below(binary.len())], false, 5, &body);
        }
    }
    (true, out)
}

fn resident_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("Linux");
    let line = status
        .lines()
        .find(|line| line.starts_with("VmRSS:"))
        .expect("a line");
    let number = line.split_whitespace().nth(1).expect("a number");
    number.parse().expect("a number")
}

/// Starts runs and waits for them, one after the other; every one must come out right and soon.
async fn works_on(client: Client, stop: Arc<AtomicBool>, runs: Arc<AtomicU64>) -> Duration {
    let mut slowest = Duration::ZERO;
    let leaf = spec("leaf");
    let mut n: u64 = 0;
    while !stop.load(Ordering::Relaxed) {
        let began = Stopwatch::start();
        let run = soon(client.submit(Submit::call(&leaf, Data::json(&n)))).await;
        let waited = soon(client.wait(run.expect("taken"), None)).await;
        let Waited::Ended(outcome) = waited.expect("an answer") else {
            panic!("no timeout was given");
        };
        assert_eq!(outcome.data.to_json::<u64>().expect("a number"), n + 1);
        slowest = slowest.max(began.elapsed());
        runs.fetch_add(1, Ordering::Relaxed);
        n += 1;
    }
    slowest
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn five_thousand_bad_connections_while_others_work() {
    let world = World::start().await;
    let (stop_worker, stopped) = tokio::sync::oneshot::channel::<()>();
    let worker = tokio::spawn(
        Worker::builder(&world.url(), None)
            .plain(&spec("leaf"), |call| {
                let n: u64 = call.arguments().to_json()?;
                Ok(Returned::json(&(n + 1)))
            })
            .run(async {
                let _ = stopped.await;
            }),
    );
    let (stop, runs) = (Arc::new(AtomicBool::new(false)), Arc::default());
    let client = world.client().await;
    let working = tokio::spawn(works_on(client, Arc::clone(&stop), Arc::clone(&runs)));

    let mut dice = Dice(SEED);
    let before = resident_kib();
    let mut most = before;
    let (mut answers, mut errors, mut silent) = (0_u64, 0_u64, 0_u64);
    for round in 0..ROUNDS {
        let (greets, bytes) = bad(&mut dice, round % 14);
        let mut raw = Raw::open(world.socket()).await;
        if greets {
            if round % 3 == 0 {
                Raw::worker_hello(&mut raw).await;
            } else {
                raw.hello(r#"{"version": 1, "kind": "client"}"#).await;
            }
        }
        // The broker may close while this is being written.
        let _ = raw.stream.write_all(&bytes).await;
        let _ = raw.stream.shutdown().await;
        let mut rest = Vec::new();
        let reading =
            tokio::time::timeout(Duration::from_secs(5), raw.stream.read_to_end(&mut rest));
        let ended = reading.await;
        assert!(
            ended.is_ok(),
            "round {round} (seed {SEED:#x}): the connection hangs"
        );
        raw.buffer.extend_from_slice(&rest);
        let mut n = 0;
        while let Ok(Some(frame)) = frame::take(&mut raw.buffer) {
            n += 1;
            if frame.verb == Verb::Error {
                errors += 1;
            }
        }
        answers += n;
        silent += u64::from(n == 0);
        if round % 100 == 0 {
            most = most.max(resident_kib());
        }
    }
    stop.store(true, Ordering::Relaxed);
    let slowest = working.await.expect("every run came out right");
    let _ = stop_worker.send(());
    let report = soon(worker).await.expect("no panic").expect("it ran");
    let runs = runs.load(Ordering::Relaxed);
    println!(
        "{{\"suite\":\"hostile_native\",\"connections\":{ROUNDS},\"answers\":{answers},\"errors\":{errors},\"silent\":{silent},\
         \"good_runs\":{runs},\"slowest_ms\":{},\"grown_kib\":{},\"seed\":{SEED}}}",
        slowest.as_millis(),
        most - before
    );
    assert!(
        errors as usize > ROUNDS / 2,
        "most are told what is wrong: {errors}"
    );
    assert!(
        silent as usize > ROUNDS / 100,
        "some were cut in the middle: {silent}"
    );
    assert!(
        runs > 100 && report.calls >= runs,
        "others were served: {runs} runs"
    );
    assert!(
        slowest < Duration::from_secs(2),
        "the slowest took {slowest:?}"
    );
    assert!(
        most - before < 128 * 1024,
        "memory grew by {} KiB",
        most - before
    );
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_half_frames_at_once_take_no_memory() {
    let world = World::start().await;
    let before = resident_kib();
    let mut open = Vec::new();
    for _ in 0..200 {
        let mut raw = Raw::client(world.socket()).await;
        let mut header = Vec::new();
        frame::put(&mut header, Verb::Finish, false, 1, &[]);
        header[..4].copy_from_slice(&(1_u32 << 20).to_le_bytes());
        header.extend_from_slice(&[0; 100]);
        raw.stream.write_all(&header).await.expect("writable");
        open.push(raw);
    }
    tokio::time::sleep(Duration::from_millis(200)).await;
    let grown = resident_kib().saturating_sub(before);
    assert!(
        grown < 64 * 1024,
        "200 MiB were announced, {grown} KiB were taken"
    );
    // The announced bytes are over the budget, so new requests wait: but not those that others have begun before, and none for ever.
    drop(open);
    let mut raw = Raw::client(world.socket()).await;
    assert_eq!(raw.ask(Verb::Status, b"{}").await.verb, Verb::Reply);
    world.stop().await;
}

impl Raw {
    async fn worker_hello(raw: &mut Self) {
        let hello = r#"{"version": 1, "kind": "worker", "queues": ["nobody's"]}"#;
        raw.hello(hello).await;
    }
}
