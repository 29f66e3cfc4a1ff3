//! How fast it is, on this machine, in this profile.

use super::*;

/// Prints, and does not judge: machines differ. What a fan-out looks like: headers, nodes, arguments, events, outcomes.
#[test]
fn speed_of_windows_is_printed() {
    let (_dir, path) = created();
    let (thread, _) = StateThread::open(&path, StateOptions::default()).expect("open");
    let (runs, nodes) = (40_u64, 10_000_u64);
    let mut entries = Vec::new();
    for run in 1..=runs {
        let mut batch = RowBatch::default();
        batch
            .rows
            .push(row(Table::OpenRun, run, 0, Some(vec![1; 60])));
        for node in 0..nodes {
            batch
                .rows
                .push(row(Table::Node, run, node, Some(vec![2; 40])));
            batch
                .rows
                .push(row(Table::Arguments, run, node, Some(vec![3; 48])));
        }
        batch
            .rows
            .push(row(Table::Event, run, 1, Some(vec![4; 12])));
        entries.push(batch);
        for first in (0..nodes).step_by(128) {
            let mut batch = RowBatch::default();
            for node in first..(first + 128).min(nodes) {
                batch
                    .rows
                    .push(row(Table::Node, run, node, Some(vec![5; 44])));
                batch
                    .rows
                    .push(row(Table::Outcome, run, node, Some(vec![6; 20])));
                batch
                    .rows
                    .push(row(Table::Event, run, nodes + node, Some(vec![7; 12])));
            }
            entries.push(batch);
        }
    }
    let pushed: usize = entries.iter().map(|batch| batch.rows.len()).sum();
    let total = crate::storage::sync_shim::boot_clock_ms();
    let syncs = crate::storage::sync_shim::sled_syncs();
    let wrote = written_bytes();
    let mut pushing = 0;
    for (sequence, batch) in entries.into_iter().enumerate() {
        let entry = entry(sequence as u64 + 1, batch);
        let start = crate::storage::sync_shim::boot_clock_ms();
        thread.push(entry);
        pushing += crate::storage::sync_shim::boot_clock_ms() - start;
    }
    thread.flush().expect("flush");
    let total = (crate::storage::sync_shim::boot_clock_ms() - total).max(1);
    let bytes = fs::metadata(path.join("db")).expect("db").len();
    println!(
        "{} nodes, {pushed} rows: {} ns a row for push, {} nodes/s through sled, {} bytes of sled a node, {} syncs, {} bytes written a node",
        runs * nodes,
        pushing * 1_000_000 / pushed as u64,
        runs * nodes * 1_000 / total,
        bytes / (runs * nodes),
        crate::storage::sync_shim::sled_syncs() - syncs,
        (written_bytes() - wrote) / (runs * nodes),
    );
    thread.close().expect("close");
    let start = crate::storage::sync_shim::boot_clock_ms();
    let (thread, _) = StateThread::open(&path, StateOptions::default()).expect("open");
    let opened = crate::storage::sync_shim::boot_clock_ms();
    let mut n = 0;
    thread
        .rows()
        .scan(
            Table::Node,
            (0, 0),
            (u64::MAX, 0),
            usize::MAX,
            &mut |_, _| {
                n += 1;
                true
            },
        )
        .expect("scan");
    let scanned = crate::storage::sync_shim::boot_clock_ms();
    println!(
        "open {} ms, scan of {n} nodes {} ms",
        opened - start,
        scanned - opened
    );
    assert_eq!(n, runs * nodes);

    // One-node runs: a header that opens and ends within the window, a node, arguments, an outcome, two events.
    let singles = 60_000_u64;
    let start = crate::storage::sync_shim::boot_clock_ms();
    for chunk in 0..singles / 100 {
        let mut batch = RowBatch::default();
        for i in 0..100 {
            let run = 1_000 + chunk * 100 + i;
            batch.rows.push(row(Table::OpenRun, run, 0, None));
            batch
                .rows
                .push(row(Table::EndedRun, run, 0, Some(vec![1; 60])));
            batch.rows.push(row(Table::Node, run, 0, Some(vec![2; 40])));
            batch
                .rows
                .push(row(Table::Arguments, run, 0, Some(vec![3; 48])));
            batch
                .rows
                .push(row(Table::Outcome, run, 0, Some(vec![3; 20])));
            batch
                .rows
                .push(row(Table::Event, run, 1, Some(vec![4; 12])));
            batch
                .rows
                .push(row(Table::Event, run, 2, Some(vec![4; 12])));
        }
        thread.push(entry(100_000 + chunk, batch));
    }
    thread.flush().expect("flush");
    let took = crate::storage::sync_shim::boot_clock_ms() - start;
    println!("{} one-node runs/s", singles * 1_000 / took.max(1));
    let rows = thread.rows();
    let start = crate::storage::sync_shim::boot_clock_ms();
    for i in 0..10_000_u64 {
        let run = 1_000 + (i * 7_919) % singles;
        assert!(
            rows.get(row_key(Table::Outcome, (run, 0)))
                .expect("get")
                .is_some()
        );
    }
    let took = crate::storage::sync_shim::boot_clock_ms() - start;
    println!("{} us a cold read", took * 1_000 / 10_000);
    thread.close().expect("close");
}

/// What this process has written so far, as the kernel counts calls.
fn written_bytes() -> u64 {
    let io = fs::read_to_string("/proc/self/io").unwrap_or_default();
    io.lines()
        .find_map(|line| line.strip_prefix("wchar: "))
        .and_then(|bytes| bytes.parse().ok())
        .unwrap_or(0)
}
