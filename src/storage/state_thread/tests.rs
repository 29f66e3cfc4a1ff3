//! The storage thread against a map: visible at once, the same after kills, and never an older page.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;

use super::super::dice::{one_in, random};
use super::super::digest::RUN_TABLES;
use super::super::overlay::TABLES_OF_RUNS;
use super::super::records::RowBatch;
use super::super::row::Row;
use super::super::row::RowKey;
use super::reading::row_key;
use super::*;
use crate::broker::types::{Timestamp, WallTime};

mod damage;
mod speed;

type Model = BTreeMap<(u8, Place), Bytes>;

fn empty_meta() -> StateMeta {
    StateMeta {
        position: 0,
        sequence: 0,
        now: Timestamp(0),
        wall: WallTime(0),
        next_run: 1,
        store_id: [7; 16],
        lease_secret: [8; 16],
        format: FORMAT,
    }
}

/// Windows only when told, so that tests decide when sled is written.
fn by_hand() -> StateOptions {
    StateOptions {
        window_ms: 3_600_000,
        window_bytes: usize::MAX,
        slice_pages: 16,
        ..StateOptions::default()
    }
}

fn entry(sequence: u64, batch: RowBatch) -> PushedEntry {
    PushedEntry {
        position_after: sequence * 100,
        sequence,
        now: Timestamp(sequence * 3),
        wall: WallTime(sequence * 5),
        next_run: sequence + 1,
        bytes: batch.rows.len() * 50,
        batch,
    }
}

fn row(table: Table, major: u64, minor: u64, value: Option<Vec<u8>>) -> Row {
    Row {
        key: RowKey {
            table,
            major,
            minor,
        },
        value: value.map(Bytes::from),
    }
}

fn created() -> (tempfile::TempDir, std::path::PathBuf) {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("state");
    StateThread::create(&path, &empty_meta()).expect("create");
    (dir, path)
}

/// What a kill leaves: a copy of the files while the store is open.
fn killed(path: &Path, to: &Path) {
    fs::create_dir_all(to).expect("a directory");
    for file in fs::read_dir(path).expect("the store") {
        let file = file.expect("an entry");
        let target = to.join(file.file_name());
        if file.file_type().expect("a type").is_dir() {
            killed(&file.path(), &target);
        } else {
            fs::copy(file.path(), target).expect("a copy");
        }
    }
}

fn apply(model: &mut Model, batch: &RowBatch) {
    for row in &batch.rows {
        let key = (row.key.table as u8, (row.key.major, row.key.minor));
        match &row.value {
            Some(value) => drop(model.insert(key, value.clone())),
            None => drop(model.remove(&key)),
        }
    }
    for (from, before) in &batch.deleted_ranges {
        model.retain(|(table, place), _| {
            *table != from.table as u8
                || *place < (from.major, from.minor)
                || *place >= (before.major, before.minor)
        });
    }
    for run in &batch.deleted_runs {
        model.retain(|(table, place), _| {
            place.0 != *run || !TABLES_OF_RUNS.iter().any(|t| *t as u8 == *table)
        });
    }
}

/// From run to run, as a start reads.
fn check_in_sequence(rows: &dyn Rows, model: &Model, table: Table) {
    for run in 0..80_u64 {
        let mut got = Vec::new();
        rows.scan(table, (run, 0), (run, u64::MAX), 100, &mut |key, value| {
            got.push((key.minor, value));
            true
        })
        .expect("scan");
        let byte = table as u8;
        let wanted: Vec<(u64, Bytes)> = model
            .range((byte, (run, 0))..(byte, (run, u64::MAX)))
            .map(|((_, place), value)| (place.1, value.clone()))
            .take(100)
            .collect();
        assert_eq!(got, wanted, "{table:?} of run {run}");
    }
}

/// A turn: runs that begin, grow, change, end and are deleted, and rows of tables without runs.
fn turn(
    seed: &mut u64,
    open: &mut BTreeSet<u64>,
    ended: &mut BTreeSet<u64>,
    next: &mut u64,
) -> RowBatch {
    let mut batch = RowBatch::default();
    for _ in 0..=random(seed) % 6 {
        let run = match random(seed) % 3 {
            0 => {
                *next += 1;
                open.insert(*next);
                *next
            }
            _ => match open.iter().nth((random(seed) % 8) as usize) {
                Some(&run) => run,
                None => continue,
            },
        };
        if one_in(seed, 2) || !open.contains(&(run - 1)) {
            batch
                .rows
                .push(row(Table::OpenRun, run, 0, Some(vec![run as u8; 20])));
        } else {
            batch
                .rows
                .push(row(Table::OpenRun, run, 0, Some(vec![1; 20])));
        }
        let nodes = if one_in(seed, 10) {
            400
        } else {
            random(seed) % 6
        };
        let first = random(seed) % 50;
        for node in first..first + nodes {
            let size = (random(seed) % 60) as usize;
            batch.rows.push(row(
                Table::Node,
                run,
                node,
                Some(vec![node as u8; 10 + size]),
            ));
            batch
                .rows
                .push(row(Table::Arguments, run, node, Some(vec![2; size])));
            if one_in(seed, 3) {
                let large = if one_in(seed, 50) { 3_500 } else { size };
                batch
                    .rows
                    .push(row(Table::Outcome, run, node, Some(vec![3; large])));
            }
            let event = random(seed) % 1_000;
            batch
                .rows
                .push(row(Table::Event, run, event, Some(vec![4; 9])));
            batch
                .rows
                .push(row(Table::Inputs, run, node << 32, Some(vec![5; 6])));
        }
        if one_in(seed, 4) {
            open.remove(&run);
            ended.insert(run);
            batch.rows.push(row(Table::OpenRun, run, 0, None));
            batch
                .rows
                .push(row(Table::EndedRun, run, 0, Some(vec![run as u8; 30])));
        }
        if one_in(seed, 6) {
            let at = Table::Inputs;
            let key = |minor| RowKey {
                table: at,
                major: run,
                minor,
            };
            batch
                .deleted_ranges
                .push((key(first << 32), key((first + 3) << 32)));
        }
    }
    if one_in(seed, 5)
        && let Some(run) = ended.pop_first()
    {
        batch.deleted_runs.push(run);
    }
    let hour = random(seed) % 4;
    for _ in 0..random(seed) % 5 {
        batch
            .rows
            .push(row(Table::Key, hour, random(seed), Some(vec![6; 40])));
    }
    batch
        .rows
        .push(row(Table::Spec, random(seed) % 30, 0, Some(vec![7; 100])));
    batch
        .rows
        .push(row(Table::Outbox, 1, random(seed) % 500, Some(vec![8; 25])));
    if one_in(seed, 7) {
        let key = |minor| RowKey {
            table: Table::Outbox,
            major: 1,
            minor,
        };
        batch.deleted_ranges.push((key(0), key(random(seed) % 500)));
    }
    batch
}

fn check(rows: &dyn Rows, model: &Model, seed: &mut u64, all: bool) {
    let tables = super::super::overlay::TABLES;
    for table in tables {
        if !all && !one_in(seed, 3) {
            continue;
        }
        let (from, to) = if all {
            ((0, 0), (u64::MAX, 0))
        } else {
            let major = random(seed) % 60;
            (
                (major, random(seed) % 40),
                (major + random(seed) % 9, random(seed) % 400),
            )
        };
        let limit = if all {
            usize::MAX
        } else {
            1 + (random(seed) % 300) as usize
        };
        let mut got = Vec::new();
        rows.scan(table, from, to, limit, &mut |key, value| {
            assert_eq!(key.table, table);
            got.push(((key.major, key.minor), value));
            true
        })
        .expect("scan");
        let byte = table as u8;
        let wanted: Vec<(Place, Bytes)> = model
            .range((byte, from)..)
            .take_while(|((t, place), _)| *t == byte && *place < to)
            .map(|((_, place), value)| (*place, value.clone()))
            .take(limit)
            .collect();
        assert_eq!(got.len(), wanted.len(), "{table:?} {from:?} {to:?} {limit}");
        assert_eq!(got, wanted, "{table:?} {from:?} {to:?} {limit}");
        let back: Vec<(Place, Bytes)> = rows
            .scan_back(table, to, limit)
            .expect("scan_back")
            .into_iter()
            .map(|(key, value)| ((key.major, key.minor), value))
            .collect();
        let wanted: Vec<(Place, Bytes)> = model
            .range((byte, (0, 0))..(byte, to))
            .rev()
            .map(|((_, place), value)| (*place, value.clone()))
            .take(limit)
            .collect();
        assert_eq!(back, wanted, "{table:?} back from {to:?} {limit}");
        for (place, value) in wanted.iter().take(5) {
            let key = row_key(table, *place);
            assert_eq!(rows.get(key).expect("get").as_ref(), Some(value));
        }
        let absent = (random(seed) % 60, random(seed));
        if !model.contains_key(&(byte, absent)) {
            assert_eq!(rows.get(row_key(table, absent)).expect("get"), None);
        }
    }
}

#[test]
fn what_is_pushed_is_read_before_between_and_after_windows_and_kills() {
    for round in 0..5_u64 {
        let mut seed = 77 * (round + 1);
        let (dir, mut path) = created();
        let (mut open, mut ended, mut next) = (BTreeSet::new(), BTreeSet::new(), 0);
        let mut model = Model::new();
        let mut log: Vec<RowBatch> = Vec::new();
        let (mut thread, _) = StateThread::open(&path, by_hand()).expect("open");
        let mut kills = 0;
        for step in 0..160_u64 {
            let batch = turn(&mut seed, &mut open, &mut ended, &mut next);
            apply(&mut model, &batch);
            log.push(batch.clone());
            thread.push(entry(log.len() as u64, batch));
            match random(&mut seed) % 12 {
                0 => {
                    thread.flush().expect("flush");
                    let n = log.len() as u64;
                    assert_eq!(thread.synced(), (n * 100, n));
                }
                1 => {
                    // Killed, perhaps with entries that sled does not have: they come again from the log.
                    kills += 1;
                    let copy = dir.path().join(format!("copy{step}"));
                    killed(&path, &copy);
                    drop(thread);
                    path = copy;
                    let (again, meta) = StateThread::open(&path, by_hand()).expect("reopen");
                    assert_eq!(meta.position, meta.sequence * 100);
                    thread = again;
                    for sequence in meta.sequence + 1..=log.len() as u64 {
                        thread.push(entry(sequence, log[sequence as usize - 1].clone()));
                    }
                }
                _ => {}
            }
            if step % 9 == 0 {
                check_in_sequence(&*thread.rows(), &model, Table::Node);
                check_in_sequence(&*thread.rows(), &model, Table::Inputs);
            }
            if step % 5 == 0 {
                check(&*thread.rows(), &model, &mut seed, false);
            }
        }
        assert!(kills > 3);
        check(&*thread.rows(), &model, &mut seed, true);
        thread.close().expect("close");
        let (thread, meta) = StateThread::open(&path, by_hand()).expect("open");
        assert_eq!(meta.sequence, 160);
        assert_eq!(meta.next_run, 161);
        assert_eq!(meta.now, Timestamp(480));
        check(&*thread.rows(), &model, &mut seed, true);
        thread.close().expect("close");
        let mut state = State::open(&path, CACHE_BYTES).expect("open");
        check_sums(&mut state, &model);
    }
}

/// Every run's digest is exactly its pages, and no digest is left without a header or rows.
fn check_sums(state: &mut State, model: &Model) {
    let runs: BTreeSet<u64> = model
        .keys()
        .filter(|(table, _)| RUN_TABLES.contains(table))
        .map(|(_, place)| place.0)
        .collect();
    let mut pages = 0;
    for &run in &runs {
        let digest = state.digest_of(run).expect("a digest");
        for (number, table) in RUN_TABLES.into_iter().enumerate() {
            let sum = state.sum(table, (run, 0), (run, u64::MAX)).expect("sum");
            assert_eq!(sum, digest.tables[number], "run {run} table {table}");
            pages += sum.pages;
        }
    }
    assert!(pages > 20, "{pages}");
}

#[test]
fn an_interrupted_window_is_applied_again_from_its_beginning() {
    let (dir, path) = created();
    let mut state = State::open(&path, CACHE_BYTES).expect("open");
    let mut overlay = Overlay::default();
    let mut model = Model::new();
    let mut seed = 5;
    let (mut open, mut ended, mut next) = (BTreeSet::new(), BTreeSet::new(), 0);
    let mut log = Vec::new();
    for sequence in 1..=120 {
        let batch = turn(&mut seed, &mut open, &mut ended, &mut next);
        apply(&mut model, &batch);
        log.push(batch.clone());
        overlay.push(entry(sequence, batch));
    }
    let generation = overlay.rotate().expect("a window");
    let mut window = Window::new(&generation);
    let mut slices = 0;
    while !state
        .apply_slice(&generation, &mut window, 4)
        .expect("a slice")
    {
        slices += 1;
        assert_eq!(
            state.meta().state.position,
            0,
            "only the last slice moves the position"
        );
        if slices % 7 == 0 {
            // Kill here, twice, with the log applied in pieces in between.
            state.sync().expect("sync");
            let copy = dir.path().join(format!("slice{slices}"));
            killed(&path, &copy);
            let (thread, meta) = StateThread::open(&copy, by_hand()).expect("open");
            assert_eq!(meta.position, 0);
            for sequence in 1..=60 {
                thread.push(entry(sequence, log[sequence as usize - 1].clone()));
            }
            thread.flush().expect("flush");
            drop(thread);
            let (thread, meta) = StateThread::open(&copy, by_hand()).expect("open");
            assert_eq!(meta.sequence, 60);
            for sequence in 61..=120 {
                thread.push(entry(sequence, log[sequence as usize - 1].clone()));
            }
            check(&*thread.rows(), &model, &mut seed, true);
            thread.close().expect("close");
            let (thread, _) = StateThread::open(&copy, by_hand()).expect("open");
            check(&*thread.rows(), &model, &mut seed, true);
        }
    }
    assert!(slices > 30, "{slices}");
}

#[test]
fn sled_keeps_nothing_in_blobs() {
    let (_dir, path) = created();
    let (thread, _) = StateThread::open(&path, by_hand()).expect("open");
    let mut model = Model::new();
    for sequence in 1..=40 {
        let mut batch = RowBatch::default();
        for node in 0..60 {
            let value = vec![sequence as u8; 3_584];
            batch
                .rows
                .push(row(Table::Outcome, sequence, node, Some(value)));
        }
        batch
            .rows
            .push(row(Table::OpenRun, sequence, 0, Some(vec![9; 3_584])));
        apply(&mut model, &batch);
        thread.push(entry(sequence, batch));
        if sequence % 10 == 0 {
            thread.flush().expect("flush");
        }
    }
    check(&*thread.rows(), &model, &mut 3, true);
    thread.close().expect("close");
    assert_eq!(fs::read_dir(path.join("blobs")).expect("blobs").count(), 0);
    fs::write(path.join("blobs/1"), b"x").expect("write");
    assert!(StateThread::open(&path, by_hand()).is_err());
}

#[test]
fn a_row_that_does_not_fit_stops_the_thread_and_says_why() {
    let (_dir, path) = created();
    let (thread, _) = StateThread::open(&path, by_hand()).expect("open");
    let rows = vec![row(Table::Node, 1, 1, Some(vec![0; 5_000]))];
    let batch = RowBatch {
        rows,
        ..RowBatch::default()
    };
    thread.push(entry(1, batch));
    assert!(thread.flush().is_err());
    assert!(
        thread
            .failed()
            .is_some_and(|why| why.contains("5000 bytes"))
    );
    assert!(thread.flush().is_err(), "it stays stopped");
    assert_eq!(thread.synced(), (0, 0));
}

#[test]
fn windows_come_by_age_and_by_size_and_reads_go_on() {
    let (_dir, path) = created();
    let options = StateOptions {
        window_ms: 50,
        window_bytes: 1 << 20,
        reopen_bytes: 1 << 20,
        ..StateOptions::default()
    };
    let (thread, _) = StateThread::open(&path, options).expect("open");
    let rows = thread.rows();
    let mut model = Model::new();
    for sequence in 1..=60 {
        let mut batch = RowBatch::default();
        for node in 0..1_000 {
            let value = Some(vec![sequence as u8; 60]);
            batch.rows.push(row(Table::Node, sequence, node, value));
        }
        batch
            .rows
            .push(row(Table::OpenRun, sequence, 0, Some(vec![1])));
        apply(&mut model, &batch);
        thread.push(entry(sequence, batch));
        check(&*rows, &model, &mut (sequence * 9), false);
    }
    for _ in 0..500 {
        if thread.synced() == (6_000, 60) {
            break;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    assert_eq!(thread.synced(), (6_000, 60), "without being told");
    check(&*rows, &model, &mut 1, true);
    thread.close().expect("close");
    assert!(rows.get(row_key(Table::Node, (1, 1))).is_err(), "closed");
}

/// sled shortens its file when its end is free, and can deadlock there: see `UNSYNCED_SLICES`.
#[test]
fn a_store_that_grows_and_shrinks_again_does_not_stop() {
    let (_dir, path) = created();
    let options = StateOptions {
        window_ms: 20,
        window_bytes: 2 << 20,
        ..StateOptions::default()
    };
    let (thread, _) = StateThread::open(&path, options).expect("open");
    let mut sequence = 0;
    let (mut before, mut shrunk) = (0, 0);
    for round in 0..12_u64 {
        for run in 0..8 {
            let mut batch = RowBatch::default();
            let run = round * 8 + run;
            for node in 0..1_500 {
                batch
                    .rows
                    .push(row(Table::Outcome, run, node, Some(vec![run as u8; 400])));
            }
            batch
                .rows
                .push(row(Table::EndedRun, run, 0, Some(vec![1; 30])));
            sequence += 1;
            thread.push(entry(sequence, batch));
        }
        thread.flush().expect("flush");
        let gone = RowBatch {
            deleted_runs: (round * 8..round * 8 + 8).collect(),
            ..RowBatch::default()
        };
        sequence += 1;
        thread.push(entry(sequence, gone));
        thread.flush().expect("flush");
        let now = fs::metadata(path.join("db")).expect("db").len();
        shrunk += u32::from(now < before);
        before = now;
    }
    println!("the file shrank in {shrunk} of 12 rounds");
    let mut rows = 0;
    let count = &mut |_, _| {
        rows += 1;
        true
    };
    thread
        .rows()
        .scan(Table::Outcome, (0, 0), (u64::MAX, 0), usize::MAX, count)
        .expect("scan");
    assert_eq!(rows, 0);
    thread.close().expect("close");
}
