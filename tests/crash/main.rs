//! SIGKILL and failing calls, on the real binary.
//!
//! Kill rounds: load, SIGKILL while acknowledgements are under way, restart, SIGKILL again at once, restart, finish, compare. Kill points: SIGKILL
//! at every 7th call that changes the directory, from the first one (the store is made) on. Fault points: the n-th write, sync, open and rename
//! and all later ones fail. Judged by the journal of an independent client and worker. `ROUNDS=n` and `SEED=n` change count and seed.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

#[path = "../faults/mod.rs"]
mod faults;

mod damage;

use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use dagorama::engine::clock::Stopwatch;
use faults::driver::{self, Ack, Journal, Plan};
use faults::{Server, Setup};

const SMALL_LOG: &str = "[leases]\nlease = \"1s\"\n[storage]\nsegment = \"1MiB\"\nwindow = \"100ms\"\nwindow_size = \"256KiB\"\nmin_free = \"1MiB\"\nmin_free_percent = 0\n";

fn scratch(name: &str) -> PathBuf {
    let path =
        Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("crash-{name}-{}", std::process::id()));
    drop(std::fs::remove_dir_all(&path));
    std::fs::create_dir_all(&path).unwrap();
    path
}

fn submitted(journal: &Journal) -> Vec<(u64, u64, Plan)> {
    let acks = journal.acks.lock().unwrap();
    acks.iter()
        .filter_map(|(_, ack)| {
            if let Ack::Submitted { seq, salt, plan } = ack {
                Some((*seq, *salt, *plan))
            } else {
                None
            }
        })
        .collect()
}

/// What must be true of a store and its journal when nothing runs.
fn compare(data: &Path, journal: &Journal) {
    let acks: Vec<Ack> = journal
        .acks
        .lock()
        .unwrap()
        .iter()
        .map(|(_, ack)| ack.clone())
        .collect();
    let sent = journal.sent.lock().unwrap().clone();
    let checked =
        faults::check::store(data, &acks, &sent).unwrap_or_else(|failure| panic!("{failure}"));
    assert!(checked.runs > 0 && checked.acks > 0, "nothing was compared");
}

#[test]
fn kill_rounds() {
    let rounds = faults::count("ROUNDS", 100);
    let seed = faults::count("SEED", 1);
    let dir = scratch("rounds");
    let data = dir.join("data");
    let setup = Setup {
        config: SMALL_LOG.into(),
        ..Setup::default()
    };
    let journal = Arc::new(Journal::default());
    let started = Stopwatch::start();

    let mut server = Server::start(&data, &setup).unwrap_or_else(|ended| panic!("{ended:?}"));
    // Something large that waits all the time: recovery must take it from sled, not from the log.
    driver::submit(
        &server.url,
        &journal,
        (0..20_000u64).map(|i| Plan {
            seed: (seed << 40) + i,
            width: 0,
            large: false,
        }),
        500,
        86_400_000,
    )
    .unwrap();
    let url = Arc::new(Mutex::new(server.url.clone()));
    let mut kills = 0u64;
    let (mut with_acks_in_flight, mut mostly_from_sled, mut shortened_before) = (0u64, 0u64, 0u64);
    let mut checked = 0u64;
    for round in 0..rounds {
        let journal_before = journal.acks.lock().unwrap().len();
        journal.stop.store(false, Ordering::Relaxed);
        let first = (seed << 40) + (1 << 32) + round * 10_000;
        let workers: Vec<_> = (0..2)
            .map(|_| driver::keep_working(Arc::clone(&url), Arc::clone(&journal), 32))
            .collect();
        let submitter = {
            let (url, journal) = (server.url.clone(), Arc::clone(&journal));
            std::thread::spawn(move || {
                driver::submit(
                    &url,
                    &journal,
                    (0..10_000u64).map(|i| Plan {
                        seed: first + i,
                        width: (i % 40) as u32 * u32::from(i % 9 == 0),
                        large: i % 5 == 0,
                    }),
                    10,
                    0,
                )
            })
        };
        let pause = 20 + (seed.wrapping_mul(round + 1).wrapping_mul(0x9e37_79b9) >> 7) % 180;
        std::thread::sleep(Duration::from_millis(pause));
        for _ in 0..200 {
            if journal.in_flight.load(Ordering::Relaxed) > 0 {
                break;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        with_acks_in_flight += u64::from(journal.in_flight.load(Ordering::Relaxed) > 0);
        shortened_before = shortened_before.max(log_start(&data));
        server.kill();
        kills += 1;
        drop(submitter.join().unwrap()); // its connection broke: that is what a kill is
        // The second kill, while it recovers or just after.
        match Server::start(&data, &setup) {
            Ok(second) => {
                let (from_sled, from_log) = (
                    second.ready["from_sled"].as_u64().unwrap(),
                    second.ready["from_log"].as_u64().unwrap(),
                );
                mostly_from_sled += u64::from(from_sled * 10 >= (from_sled + from_log) * 9);
                *url.lock().unwrap() = second.url.clone();
                std::thread::sleep(Duration::from_millis(round % 40));
                second.kill();
                kills += 1;
            }
            Err(ended) => panic!("round {round}: no restart after a kill: {ended:?}"),
        }
        server = Server::start(&data, &setup).unwrap_or_else(|ended| {
            panic!("round {round}: no restart after the second kill: {ended:?}")
        });
        *url.lock().unwrap() = server.url.clone();
        // Let what was acknowledged in this round finish, and compare each value with what it must be.
        let fresh: Vec<(u64, u64, Plan)> = journal.acks.lock().unwrap()[journal_before..]
            .iter()
            .filter_map(|(_, ack)| {
                if let Ack::Submitted { seq, salt, plan } = ack {
                    Some((*seq, *salt, *plan))
                } else {
                    None
                }
            })
            .collect();
        for (seq, salt, plan) in fresh.iter().step_by(7) {
            let (state, value) = driver::wait(&server.url, *seq, *salt, Duration::from_mins(1))
                .unwrap_or_else(|error| panic!("round {round}, run {seq:x}: {error}"));
            assert_eq!(
                (state, value),
                (5, plan.value()),
                "round {round}: run {seq:x}"
            );
            checked += 1;
        }
        journal.stop.store(true, Ordering::Relaxed);
        for worker in workers {
            worker.join().unwrap();
        }
    }
    server.kill();
    compare(&data, &journal);
    let acked = journal.acks.lock().unwrap().len();
    let (twice, wrong) = (
        journal.applied_twice(),
        journal.wrong_reads.load(Ordering::Relaxed),
    );
    println!(
        "{{\"suite\": \"crash_kill\", \"rounds\": {rounds}, \"kills\": {kills}, \"acked\": {acked}, \"runs\": {}, \"values_checked\": {checked}, \"lost\": 0, \"applied_twice\": {twice}, \"wrong_reads\": {wrong}, \"with_acks_in_flight\": {with_acks_in_flight}, \"mostly_from_sled\": {mostly_from_sled}, \"log_starts_at\": {shortened_before}, \"seconds\": {}, \"seed\": {seed}}}",
        submitted(&journal).len(),
        started.elapsed().as_secs()
    );
    assert_eq!((twice, wrong), (0, 0));
    assert!(
        with_acks_in_flight * 10 >= rounds * 8,
        "acknowledgements were under way in only {with_acks_in_flight} of {rounds} rounds"
    );
    assert!(
        mostly_from_sled * 10 >= rounds * 9,
        "sled held most of it in only {mostly_from_sled} of {rounds} rounds"
    );
    assert!(
        shortened_before >= 3,
        "the log was never shortened before a kill"
    );
    drop(std::fs::remove_dir_all(&dir));
}

/// Number of the first log segment that is still there: how often the log was shortened.
fn log_start(data: &Path) -> u64 {
    let names = std::fs::read_dir(data.join("log"))
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| {
            let name = entry.file_name().to_string_lossy().into_owned();
            let digits: String = name.chars().filter(char::is_ascii_hexdigit).collect();
            u64::from_str_radix(&digits, 16).ok()
        });
    names.min().unwrap_or_default()
}

/// A short life: some runs, some large payloads, a cancel and a resume. Ends early, without panic, when the broker dies.
fn short_life(server: &Server, journal: &Arc<Journal>, seed: u64) {
    let url = Arc::new(Mutex::new(server.url.clone()));
    journal.stop.store(false, Ordering::Relaxed);
    let worker = driver::keep_working(Arc::clone(&url), Arc::clone(journal), 16);
    let plans = (0..24).map(|i| Plan {
        seed: seed + i,
        width: if i % 6 == 0 { 12 } else { 0 },
        large: i % 2 == 0,
    });
    let before = journal.acks.lock().unwrap().len();
    if driver::submit(&server.url, journal, plans, 4, 0).is_ok() {
        let runs = submitted_since(journal, before);
        for (seq, salt) in runs.iter().rev().take(2) {
            drop(driver::turn(&server.url, journal, *seq, *salt, false));
            drop(driver::turn(&server.url, journal, *seq, *salt, true));
        }
        for (seq, salt) in runs {
            if driver::wait(&server.url, seq, salt, Duration::from_secs(5)).is_err() {
                break;
            }
        }
    }
    journal.stop.store(true, Ordering::Relaxed);
    worker.join().unwrap();
}

fn submitted_since(journal: &Journal, from: usize) -> Vec<(u64, u64)> {
    journal.acks.lock().unwrap()[from..]
        .iter()
        .filter_map(|(_, ack)| {
            if let Ack::Submitted { seq, salt, .. } = ack {
                Some((*seq, *salt))
            } else {
                None
            }
        })
        .collect()
}

#[test]
fn killed_at_every_seventh_call() {
    let step = faults::count("STEP", 7);
    let dir = scratch("calls");
    let setup = |faults| Setup {
        config: SMALL_LOG.into(),
        faults,
        ..Setup::default()
    };
    let (mut killed, mut compared, mut at) = (0u64, 0u64, 1u64);
    loop {
        let data = dir.join(format!("at-{at}"));
        let journal = Arc::new(Journal::default());
        let survived = match Server::start(&data, &setup(vec![("KILL", at.to_string())])) {
            Ok(server) => {
                for life in 0..4 {
                    short_life(&server, &journal, (at << 24) + (life << 20));
                    std::thread::sleep(Duration::from_millis(150)); // the state store's turn
                }
                server.ended(&data, Duration::from_millis(50)).is_none()
            }
            Err(_) => false, // killed while it started
        };
        if survived {
            break;
        }
        killed += 1;
        // It starts again, whatever was half done, and holds what was acknowledged.
        let server = Server::start(&data, &setup(Vec::new()))
            .unwrap_or_else(|ended| panic!("killed at call {at}, and then: {ended:?}"));
        server.kill();
        if !journal.acks.lock().unwrap().is_empty() {
            compare(&data, &journal);
            compared += 1;
        }
        assert_eq!(journal.applied_twice(), 0, "killed at call {at}");
        drop(std::fs::remove_dir_all(&data));
        at += step;
    }
    println!(
        "{{\"suite\": \"crash_calls\", \"killed\": {killed}, \"compared\": {compared}, \"last_call\": {at}, \"lost\": 0, \"applied_twice\": 0}}"
    );
    assert!(
        killed >= 20 && compared >= 10,
        "only {killed} kill points, {compared} with something to compare"
    );
    drop(std::fs::remove_dir_all(&dir));
}

const EIO: i32 = 5;
const ENOSPC: i32 = 28;

#[test]
fn failing_calls_stop_the_broker_and_lose_nothing() {
    let dir = scratch("errors");
    let points = faults::count("FAULTS", 200);
    let kinds = [
        ("write", EIO),
        ("write", ENOSPC),
        ("sync", EIO),
        ("sync", ENOSPC),
        ("open", EIO),
        ("rename", EIO),
    ];
    let (mut stopped, mut unharmed, mut compared, mut done) = (0u64, 0u64, 0u64, 0u64);
    for (kind, errno) in kinds {
        let mut at = 1u64;
        for _ in 0..=(points / kinds.len() as u64) {
            let data = dir.join(format!("{kind}-{errno}-{at}"));
            let journal = Arc::new(Journal::default());
            let faulty = Setup {
                config: SMALL_LOG.into(),
                faults: vec![("FAIL", format!("{kind}:{at}:{errno}"))],
                ..Setup::default()
            };
            match Server::start(&data, &faulty) {
                Ok(server) => {
                    short_life(&server, &journal, (at << 24) + errno as u64);
                    match server.ended(&data, Duration::from_millis(300)) {
                        Some(ended) => {
                            assert!(
                                !ended.status.success(),
                                "{kind} {at} failed with {errno}, and the exit code was 0"
                            );
                            assert!(
                                !ended.stderr.contains("panicked"),
                                "{kind} {at}: {}",
                                ended.stderr
                            );
                            stopped += 1;
                        }
                        None => unharmed += 1, // the call it would have been never came, or it was one that does not matter
                    }
                }
                Err(ended) => {
                    assert!(
                        !ended.status.success() && !ended.stderr.contains("panicked"),
                        "{kind} {at}: {ended:?}"
                    );
                    stopped += 1;
                }
            }
            done += 1;
            let healthy = Setup {
                config: SMALL_LOG.into(),
                ..Setup::default()
            };
            Server::start(&data, &healthy)
                .unwrap_or_else(|ended| {
                    panic!("{kind} {at} failed with {errno}, and then it did not start: {ended:?}")
                })
                .kill();
            if !journal.acks.lock().unwrap().is_empty() {
                compare(&data, &journal);
                compared += 1;
            }
            drop(std::fs::remove_dir_all(&data));
            at += 1 + at / 6;
        }
    }
    println!(
        "{{\"suite\": \"io_error_sweep\", \"faults\": {done}, \"stopped\": {stopped}, \"unharmed\": {unharmed}, \"compared\": {compared}, \"lost\": 0}}"
    );
    assert!(
        done >= points && stopped * 3 >= done && compared >= 20,
        "{done} faults, {stopped} stops, {compared} comparisons"
    );
    drop(std::fs::remove_dir_all(&dir));
}

#[test]
fn a_second_broker_on_the_same_store_is_refused() {
    let dir = scratch("second");
    let data = dir.join("data");
    let setup = Setup {
        config: SMALL_LOG.into(),
        ..Setup::default()
    };
    let first = Server::start(&data, &setup).unwrap_or_else(|ended| panic!("{ended:?}"));
    let ended = Server::start(&data, &setup).expect_err("two brokers on one store");
    assert_eq!(ended.status.code(), Some(2), "{ended:?}");
    assert!(
        ended.stderr.contains("STORE_LOCKED")
            && ended.stderr.contains(&first.child.id().to_string()),
        "{}",
        ended.stderr
    );
    let journal = Arc::new(Journal::default());
    short_life(&first, &journal, 77 << 20);
    assert!(
        !submitted(&journal).is_empty(),
        "the first one still serves"
    );
    first.kill();
    compare(&data, &journal);
    drop(std::fs::remove_dir_all(&dir));
}
