//! Power cuts: the real broker under a recorder, and images of what a cut at any moment could have left.
//!
//! Four workloads run against the real binary; every change it makes to its directory is recorded. Then the trace is replayed, and at many points an
//! image is made in which unsynced writes are dropped, kept, torn or reordered over log, sled and payloads together. Each image is opened as a store
//! and compared with what had been acknowledged *by then* to an independent client. `IMAGES=n` changes the count, `SEED=n` the seed.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

#[path = "../faults/mod.rs"]
mod faults;
mod replay;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use dagorama::engine::clock::Stopwatch;
use faults::driver::{self, Ack, Journal, Plan};
use faults::{Server, Setup};
use replay::{Blind, Op, Random, Replay};

const SMALL_LOG: &str = "[storage]\nsegment = \"1MiB\"\nwindow = \"100ms\"\nwindow_size = \"128KiB\"\nmin_free = \"1MiB\"\nmin_free_percent = 0\n";

/// A recorded workload.
struct Recording {
    ops: Vec<Op>,
    acks: Vec<(u64, Ack)>,
    sent: BTreeMap<u64, Plan>,
    name: &'static str,
}

fn scratch(name: &str) -> PathBuf {
    let path =
        Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("power-{name}-{}", std::process::id()));
    drop(std::fs::remove_dir_all(&path));
    std::fs::create_dir_all(&path).unwrap();
    path
}

/// Runs a workload under the recorder. `config` is added to the small-log configuration, `plans` is what is submitted, `turns` whether runs are
/// cancelled and resumed as well.
fn record(
    name: &'static str,
    config: &str,
    plans: Vec<Plan>,
    batch: usize,
    turns: bool,
) -> Recording {
    let dir = scratch(name);
    let (data, trace) = (dir.join("data"), dir.join("trace"));
    let setup = Setup {
        config: format!("{SMALL_LOG}{config}"),
        faults: vec![("TRACE", trace.display().to_string())],
        ..Setup::default()
    };
    let server = Server::start(&data, &setup).unwrap_or_else(|ended| panic!("{name}: {ended:?}"));
    let journal = Arc::new(Journal {
        trace: Some(trace.clone()),
        ..Journal::default()
    });
    let url = Arc::new(Mutex::new(server.url.clone()));
    let workers: Vec<_> = (0..2)
        .map(|_| driver::keep_working(Arc::clone(&url), Arc::clone(&journal), 64))
        .collect();
    driver::submit(&server.url, &journal, plans.into_iter(), batch, 0).unwrap();
    let submitted: Vec<(u64, u64, Plan)> = journal
        .acks
        .lock()
        .unwrap()
        .iter()
        .filter_map(|(_, ack)| {
            if let Ack::Submitted { seq, salt, plan } = ack {
                Some((*seq, *salt, *plan))
            } else {
                None
            }
        })
        .collect();
    if turns {
        for (seq, salt, _) in submitted.iter().rev().take(40) {
            // Refused when it has ended already: that is no acknowledgement.
            if driver::turn(&server.url, &journal, *seq, *salt, false).is_ok() {
                drop(driver::turn(&server.url, &journal, *seq, *salt, true));
            }
        }
    }
    for (seq, salt, plan) in &submitted {
        let (state, value) =
            driver::wait(&server.url, *seq, *salt, Duration::from_mins(1)).unwrap();
        assert!(
            turns || state == 5 && value == plan.value(),
            "{name}: run {seq:x} ended in state {state}"
        );
    }
    std::thread::sleep(Duration::from_millis(400)); // seals, and the state store takes the rest
    journal.stop.store(true, Ordering::Relaxed);
    server.kill();
    for worker in workers {
        worker.join().unwrap();
    }
    let ops = replay::read_trace(&trace).unwrap();
    let acks = std::mem::take(&mut *journal.acks.lock().unwrap());
    let sent = std::mem::take(&mut *journal.sent.lock().unwrap());
    assert_eq!(
        journal.wrong_reads.load(Ordering::Relaxed),
        0,
        "{name}: a join read a wrong value"
    );
    drop(std::fs::remove_dir_all(&dir));
    Recording {
        ops,
        acks,
        sent,
        name,
    }
}

fn plan(seed: u64, width: u32, large: bool) -> Plan {
    Plan { seed, width, large }
}

fn recordings(seed: u64) -> Vec<Recording> {
    let base = seed << 32;
    vec![
        record(
            "small-runs",
            "",
            (0..600).map(|i| plan(base + i, 0, false)).collect(),
            4,
            false,
        ),
        record(
            "fans-and-payloads",
            "",
            (0..24)
                .map(|i| plan(base + 10_000 + i, 20 + (i as u32 * 7) % 60, true))
                .collect(),
            2,
            false,
        ),
        record(
            "cancel-and-resume",
            "",
            (0..160)
                .map(|i| plan(base + 20_000 + i, 1 + i as u32 % 5, i % 3 == 0))
                .collect(),
            2,
            true,
        ),
        // Enough churn, with deletion behind it, that the log is shortened again and again and sled reuses its segments.
        record(
            "churn",
            "",
            (0..16_000)
                .map(|i| plan(base + 30_000 + i, u32::from(i % 100 == 0) * 30, false))
                .collect(),
            50,
            false,
        ),
    ]
}

/// What a pass over a recording found.
#[derive(Debug, Default)]
struct Found {
    images: u64,
    distinct: BTreeSet<u64>,
    acks: u64,
    failures: Vec<String>,
    shortened: u64,
    /// Writes of sled into a part of its file that it had left behind: segments used again.
    reused: u64,
}

/// Makes and checks about `n` images of a recording.
fn images(recording: &Recording, n: u64, blind: Blind, seed: u64) -> Found {
    let mut random = Random(seed ^ 0x5eed);
    let mut found = Found::default();
    let dir = if Path::new("/dev/shm").is_dir() {
        PathBuf::from("/dev/shm")
    } else {
        std::env::temp_dir()
    }
    .join(format!(
        "dagorama-power-{}-{}",
        recording.name,
        std::process::id()
    ));
    let total = recording.ops.len() as u64;
    let mut points: Vec<u64> = (0..n).map(|_| random.below(total + 1)).collect();
    points.sort_unstable();
    let mut replay = Replay::new(blind);
    let (mut at, mut state_end) = (0u64, 0u64);
    for point in points {
        while at < point {
            let op = &recording.ops[at as usize];
            found.shortened += u64::from(
                op.kind == b'R' && op.path.contains("/log/")
                    || op.kind == b'U' && op.path.contains("/log/"),
            );
            if op.kind == b'W' && op.path.contains("/state/") {
                found.reused += u64::from(op.offset + (4 << 20) < state_end);
                state_end = state_end.max(op.offset);
            }
            replay.step(op);
            at += 1;
        }
        // An image that was looked at already is made anew with other luck, a few times.
        let Some(image) = (0..6).find_map(|_| {
            let image = replay.image(&mut random);
            let mut hash = xxhash_rust::xxh3::Xxh3::new();
            for (name, content) in &image {
                hash.update(name.as_bytes());
                hash.update(content.as_deref().unwrap_or_default());
            }
            found.distinct.insert(hash.digest()).then_some(image)
        }) else {
            continue;
        };
        found.images += 1;
        drop(std::fs::remove_dir_all(&dir));
        std::fs::create_dir_all(&dir).unwrap();
        let data = dir.join("data");
        replay::write_image(&image, &data).unwrap();
        let reached = if at == 0 {
            0
        } else {
            recording.ops[at as usize - 1].trace_end
        };
        // All of the latest, which are most at risk, and of the older ones another share in every image: reading each costs a change of threads.
        let acks: Vec<&Ack> = recording
            .acks
            .iter()
            .filter(|(position, _)| *position <= reached)
            .map(|(_, ack)| ack)
            .collect();
        let latest = acks.len().saturating_sub(500);
        let share = random.below(8) as usize;
        let owed: Vec<Ack> = acks
            .iter()
            .enumerate()
            .filter(|(at, _)| *at >= latest || at % 8 == share)
            .map(|(_, ack)| (*ack).clone())
            .collect();
        match faults::check::store(&data, &owed, &recording.sent) {
            Ok(checked) => found.acks += checked.acks,
            Err(failure) => found.failures.push(format!(
                "{}, cut after operation {at} of {total}: {failure}",
                recording.name
            )),
        }
    }
    drop(std::fs::remove_dir_all(&dir));
    found
}

/// One test, so that the recordings are made once: the real images, and then the same checker with its eyes closed to some syncs.
#[test]
fn power_cuts_lose_nothing_and_the_checker_would_see_it() {
    let started = Stopwatch::start();
    let seed = faults::count("SEED", 1);
    let n = faults::count("IMAGES", 1_160);
    let recordings = recordings(seed);
    let (mut total, mut distinct, mut acks, mut shortened) = (0, 0, 0, 0);
    let mut failures = Vec::new();
    for recording in &recordings {
        let found = images(recording, n / recordings.len() as u64, Blind::No, seed);
        println!(
            "{}: {} operations, {} images ({} distinct), log segments recycled or removed {} times, {} writes of sled into used segments, {} failures",
            recording.name,
            recording.ops.len(),
            found.images,
            found.distinct.len(),
            found.shortened,
            found.reused,
            found.failures.len()
        );
        total += found.images;
        distinct += found.distinct.len() as u64;
        acks += found.acks;
        shortened = shortened.max(found.shortened);
        failures.extend(found.failures);
    }
    // The mutants: each sync that is not believed must show as a lost acknowledgement in some image.
    let mut caught = BTreeMap::new();
    for (blind, recording) in [(Blind::Log, 0), (Blind::Payloads, 1), (Blind::State, 3)] {
        let found = images(&recordings[recording], 60, blind, seed + 1);
        caught.insert(format!("{blind:?}"), found.failures.len());
    }
    let seconds = started.elapsed().as_secs();
    println!(
        "{{\"suite\": \"crash_power\", \"rounds\": {total}, \"distinct\": {distinct}, \"acked\": {acks}, \"lost\": {}, \"mutants_caught\": {caught:?}, \"log_shortened\": {shortened}, \"seconds\": {seconds}, \"seed\": {seed}}}",
        failures.len()
    );
    assert!(
        failures.is_empty(),
        "{} of {total} images failed:\n{}",
        failures.len(),
        failures
            .iter()
            .take(10)
            .cloned()
            .collect::<Vec<_>>()
            .join("\n")
    );
    assert!(
        caught.values().all(|failures| *failures > 0),
        "a missing sync was not noticed: {caught:?}"
    );
    assert!(
        distinct >= n * 9 / 10 && (n < 1_100 || distinct >= 1_000),
        "only {distinct} of {total} images differ"
    );
    assert!(
        shortened >= 3,
        "the log was shortened only {shortened} times"
    );
}

#[test]
fn replay_keeps_what_was_synced_and_may_lose_the_rest() {
    let op = |kind: u8, offset: u64, data: &[u8]| Op {
        kind,
        path: "/a".into(),
        second: String::new(),
        offset,
        data: data.to_vec(),
        trace_end: 0,
    };
    let mut replay = Replay::new(Blind::No);
    replay.step(&op(b'C', 0, b""));
    replay.step(&op(b'W', 0, b"one"));
    replay.step(&op(b'S', 0, b""));
    replay.step(&Op {
        path: String::new(),
        ..op(b'D', 0, b"")
    });
    replay.step(&op(b'W', 3, b"two"));
    let (mut with, mut without) = (0, 0);
    let mut random = Random(1);
    for _ in 0..200 {
        match replay.image(&mut random).get("/a") {
            Some(Some(content)) if content == b"one" => without += 1,
            Some(Some(content)) if content == b"onetwo" => with += 1,
            other => panic!("{other:?}"),
        }
    }
    assert!(
        with > 20 && without > 20,
        "{with} with, {without} without the unsynced write"
    );
}
