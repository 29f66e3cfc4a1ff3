//! What is not what was written is an error, never another answer (G16).

use super::super::super::meta::META_KEY;
use super::super::super::pages::page_key;
use super::super::super::sled::Sled;
use super::*;

#[test]
fn a_page_that_went_back_to_an_older_state_is_found() {
    let (_dir, path) = created();
    let write = |state: &mut State, sequence: u64, value: u8| {
        let mut overlay = Overlay::default();
        let mut batch = RowBatch::default();
        for run in [1, 2] {
            let header = if run == 1 {
                Table::OpenRun
            } else {
                Table::EndedRun
            };
            batch.rows.push(row(header, run, 0, Some(vec![value; 20])));
            for node in 0..300 {
                batch
                    .rows
                    .push(row(Table::Node, run, node, Some(vec![value; 40])));
                batch
                    .rows
                    .push(row(Table::Outcome, run, node, Some(vec![value; 40])));
            }
        }
        batch
            .rows
            .push(row(Table::Spec, 1, 0, Some(vec![value; 40])));
        overlay.push(entry(sequence, batch));
        let generation = overlay.rotate().expect("a window");
        let mut window = Window::new(&generation);
        while !state
            .apply_slice(&generation, &mut window, 64)
            .expect("slice")
        {}
        state.sync().expect("sync");
    };
    let mut state = State::open(&path, CACHE_BYTES).expect("open");
    write(&mut state, 1, 1);
    let old: Vec<_> = state
        .sled()
        .tree
        .iter()
        .map(|item| item.expect("an item"))
        .filter(|(key, _)| key.len() == 17)
        .collect();
    write(&mut state, 2, 2);
    drop(state);
    let (mut at_open, mut at_read) = (0, 0);
    for (key, old_page) in old {
        let sled = Sled::open(&path, CACHE_BYTES).expect("open");
        let new_page = sled.tree.insert(&key, &old_page).expect("insert");
        let new_page = new_page.expect("every page was rewritten");
        assert_ne!(new_page, old_page);
        sled.sync().expect("sync");
        drop(sled);
        match State::open(&path, CACHE_BYTES) {
            Err(StorageError::Corrupt { .. }) => at_open += 1,
            Err(other) => panic!("{other}"),
            Ok(mut state) => {
                // Not what start reads: the first read of any row of that run's table says so.
                at_read += 1;
                let place = (u64::from_be_bytes(key[1..9].try_into().expect("8")), 0);
                let table = match key[0] {
                    b'v' => Table::Outcome,
                    b'n' => Table::Node,
                    b'r' => Table::EndedRun,
                    other => panic!("table {other} is not checked at open"),
                };
                let error = state.get(table, place).expect_err("an older page");
                assert!(matches!(error, StorageError::Corrupt { .. }), "{error}");
                let error = state.scan(table, place, (place.0 + 1, 0), 10);
                assert!(error.is_err());
            }
        }
        let sled = Sled::open(&path, CACHE_BYTES).expect("open");
        sled.tree.insert(&key, new_page).expect("insert");
        sled.sync().expect("sync");
    }
    assert!(at_open >= 6 && at_read >= 6, "{at_open} {at_read}");
    let mut state = State::open(&path, CACHE_BYTES).expect("whole again");
    assert!(state.get(Table::Outcome, (2, 5)).expect("get").is_some());
    // A page that is gone is found as well.
    let key = page_key(b'v', (2, 0));
    state.sled().tree.remove(key).expect("remove");
    drop(state);
    let mut state = State::open(&path, CACHE_BYTES).expect("open");
    assert!(state.get(Table::Outcome, (2, 5)).is_err());
}

#[test]
fn a_page_that_is_gone_is_an_error_and_never_an_absent_row() {
    let (_dir, path) = created();
    let (thread, _) = StateThread::open(&path, by_hand()).expect("open");
    let mut batch = RowBatch::default();
    for run in 1..=600 {
        // Small runs: most of them own no page and lie in a neighbour's.
        batch
            .rows
            .push(row(Table::EndedRun, run, 0, Some(vec![1; 20])));
        for table in [Table::Node, Table::Outcome, Table::Event] {
            for minor in 0..3 {
                batch.rows.push(row(table, run, minor, Some(vec![2; 30])));
            }
        }
    }
    thread.push(entry(1, batch));
    thread.close().expect("close");
    let whole = Sled::open(&path, CACHE_BYTES).expect("open");
    let keys: Vec<_> = whole
        .tree
        .iter()
        .map(|item| item.expect("an item").0)
        .filter(|key| key.len() == 17)
        .collect();
    drop(whole);
    let (mut errors, mut at_open) = (0, 0);
    for key in keys {
        let sled = Sled::open(&path, CACHE_BYTES).expect("open");
        let page = sled.tree.remove(&key).expect("remove").expect("a page");
        sled.sync().expect("sync");
        drop(sled);
        match State::open(&path, CACHE_BYTES) {
            Err(_) => at_open += 1,
            Ok(mut state) => {
                let lost = parse_places(&key, &page);
                let table = match key[0] {
                    b'r' => Table::EndedRun,
                    b'n' => Table::Node,
                    b'v' => Table::Outcome,
                    b'e' => Table::Event,
                    other => panic!("table {other}"),
                };
                for place in lost {
                    assert!(state.get(table, place).is_err(), "{table:?} {place:?}");
                    assert!(state.scan(table, place, (place.0 + 1, 0), 9).is_err());
                    assert!(state.scan_back(table, (place.0, place.1 + 1), 1).is_err());
                    errors += 1;
                }
                assert!(
                    state
                        .scan(table, (0, 0), (u64::MAX, 0), usize::MAX)
                        .is_err()
                );
                assert!(state.scan_back(table, (u64::MAX, 0), usize::MAX).is_err());
                if key[0] != b'r' {
                    let other = state.get(Table::Arguments, (5, 5));
                    assert_eq!(other.expect("another table is whole"), None);
                }
            }
        }
        let sled = Sled::open(&path, CACHE_BYTES).expect("open");
        sled.tree.insert(&key, page).expect("insert");
        sled.sync().expect("sync");
    }
    assert!(errors > 5_000 && at_open == 1, "{errors} {at_open}");
    let mut state = State::open(&path, CACHE_BYTES).expect("whole again");
    assert!(state.get(Table::Outcome, (300, 1)).expect("get").is_some());
}

fn parse_places(key: &[u8], page: &[u8]) -> Vec<Place> {
    super::super::super::paged_table::parse(key, page)
        .expect("a page")
        .entries()
        .map(|e| e.place)
        .collect()
}

#[test]
fn a_damaged_snapshot_of_sled_costs_time_and_nothing_else() {
    let (_dir, path) = created();
    let (thread, _) = StateThread::open(&path, by_hand()).expect("open");
    let mut model = Model::new();
    for sequence in 1..=30 {
        let mut batch = RowBatch::default();
        for node in 0..500 {
            let value = Some(vec![sequence as u8; 50]);
            batch.rows.push(row(Table::Node, sequence, node, value));
        }
        batch
            .rows
            .push(row(Table::EndedRun, sequence, 0, Some(vec![9])));
        apply(&mut model, &batch);
        thread.push(entry(sequence, batch));
    }
    thread.close().expect("close");
    drop(StateThread::open(&path, by_hand()).expect("open")); // writes a snapshot
    let snapshot = fs::read_dir(&path)
        .expect("files")
        .map(|file| file.expect("a file").path())
        .find(|file| {
            file.file_name()
                .is_some_and(|name| name.to_string_lossy().starts_with("snap."))
        })
        .expect("a snapshot");
    let mut bytes = fs::read(&snapshot).expect("read");
    let middle = bytes.len() / 2;
    bytes[middle] ^= 4;
    fs::write(&snapshot, bytes).expect("write");
    let (thread, _) = StateThread::open(&path, by_hand()).expect("open without the snapshot");
    check(&*thread.rows(), &model, &mut 8, true);
    let name = format!(
        "damaged-{}",
        snapshot.file_name().expect("a name").to_string_lossy()
    );
    assert!(path.join(name).exists(), "it is kept, not deleted");
}

#[test]
fn a_store_is_not_made_over_another_and_its_meta_is_distrusted() {
    let (_dir, path) = created();
    assert!(StateThread::create(&path, &empty_meta()).is_err());
    let (thread, meta) = StateThread::open(&path, by_hand()).expect("open");
    assert_eq!(meta, empty_meta());
    drop(thread);
    let sled = Sled::open(&path, CACHE_BYTES).expect("open");
    sled.tree.remove(META_KEY).expect("remove");
    sled.sync().expect("sync");
    drop(sled);
    assert!(matches!(
        StateThread::open(&path, by_hand()),
        Err(StorageError::Corrupt { .. })
    ));
    let nothing = path.join("nothing");
    assert!(StateThread::open(&nothing, by_hand()).is_err());
    assert!(!nothing.exists(), "opening makes nothing");
}
