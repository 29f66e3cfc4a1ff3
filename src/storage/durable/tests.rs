//! The store on disk: the common suite, and what only a disk can do.

use std::path::PathBuf;
use std::sync::Arc;

use super::*;
use crate::broker::types::NameId;
use crate::storage::conformance::{Reopen, exercise};

struct OnDisk {
    _dir: tempfile::TempDir,
    path: PathBuf,
    options: DurableOptions,
}

impl OnDisk {
    fn new(options: DurableOptions) -> Self {
        let dir = tempfile::tempdir().unwrap();
        Self {
            path: dir.path().join("store"),
            _dir: dir,
            options,
        }
    }

    fn open(&self) -> Durable {
        Durable::open(&self.path, self.options).unwrap()
    }

    fn loaded(&self) -> (Durable, Loaded, Vec<Fact>) {
        let mut store = self.open();
        let mut facts = Vec::new();
        let loaded = store.load(&mut |fact| facts.push(fact)).unwrap();
        (store, loaded, facts)
    }
}

impl Reopen for OnDisk {
    type Store = Durable;

    fn reopen(&mut self, killed: Option<Durable>) -> Durable {
        // Dropped without `close`: what was in memory only is lost.
        drop(killed);
        self.open()
    }

    fn pause(&mut self) {
        std::thread::sleep(std::time::Duration::from_millis(3));
    }
}

fn name(id: u32) -> Fact {
    Fact::Name {
        id: NameId(id),
        name: format!("name {id}").into(),
    }
}

fn commit(store: &mut Durable, id: u32) -> Result<(), StorageError> {
    store.commit(StorageBatch {
        now: Timestamp(u64::from(id)),
        facts: vec![name(id)],
    })
}

#[test]
fn the_store_on_disk_conforms() {
    for (seed, window_ms, segment_bytes) in [
        (11, 1_000, 1 << 20),
        (12, 1, 256 << 10),
        (13, 20, 128 << 10),
    ] {
        let options = DurableOptions {
            window_ms,
            segment_bytes,
            payload_segment_bytes: 64 << 10,
            ..DurableOptions::small()
        };
        exercise(seed, 300, &mut OnDisk::new(options));
    }
}

#[test]
fn a_second_process_is_refused_and_told() {
    let disk = OnDisk::new(DurableOptions::small());
    let store = disk.open();
    let again = Durable::open(&disk.path, disk.options);
    assert!(matches!(again, Err(StorageError::Locked { .. })));
    drop(store);
    disk.open();
}

#[test]
fn a_newer_format_is_refused_without_a_write() {
    let disk = OnDisk::new(DurableOptions::small());
    drop(disk.open());
    let format = disk.path.join("FORMAT");
    let text = std::fs::read_to_string(&format).unwrap();
    std::fs::write(&format, text.replace("format 1", "format 2")).unwrap();
    let before = listing(&disk.path);
    let refused = Durable::open(&disk.path, disk.options);
    assert!(matches!(
        refused,
        Err(StorageError::TooNew {
            found: 2,
            known: 1,
            ..
        })
    ));
    assert_eq!(listing(&disk.path), before);
    std::fs::write(&format, text.replace("segment-bytes ", "segment-bytes 1")).unwrap();
    let refused = Durable::open(&disk.path, disk.options);
    assert!(matches!(refused, Err(StorageError::Corrupt { .. })));
    std::fs::remove_file(&format).unwrap();
    let refused = Durable::open(&disk.path, disk.options);
    assert!(
        matches!(refused, Err(StorageError::Corrupt { .. })),
        "never made anew"
    );
    std::fs::write(&format, text).unwrap();
    disk.open();
}

/// Files with their lengths and times of change, but for the directories themselves.
fn listing(dir: &std::path::Path) -> Vec<(PathBuf, u64, std::time::SystemTime)> {
    let mut found = Vec::new();
    for file in std::fs::read_dir(dir).unwrap() {
        let path = file.unwrap().path();
        if path.is_dir() {
            found.extend(listing(&path));
        } else {
            let meta = path.metadata().unwrap();
            found.push((path, meta.len(), meta.modified().unwrap()));
        }
    }
    found.sort();
    found
}

#[test]
fn a_half_made_store_is_made_anew_and_a_foreign_directory_left_alone() {
    let disk = OnDisk::new(DurableOptions::small());
    drop(disk.open());
    // As if the power had gone just before FORMAT was moved to its place.
    let new = disk.path.join(".new");
    std::fs::create_dir(&new).unwrap();
    std::fs::rename(disk.path.join("FORMAT"), new.join("FORMAT")).unwrap();
    assert_eq!(read_format(&disk.path).unwrap(), None);
    let (mut store, loaded, facts) = disk.loaded();
    assert_eq!((loaded.next_run, facts.len()), (1, 0));
    commit(&mut store, 1).unwrap();
    drop(store);
    assert!(!new.exists());
    // And just after: then it is whole.
    std::fs::create_dir(&new).unwrap();
    assert_eq!(disk.loaded().2, [name(1)]);
    assert!(!new.exists());

    let other = tempfile::tempdir().unwrap();
    std::fs::write(other.path().join("thesis.tex"), b"years of work").unwrap();
    assert!(Durable::open(other.path(), disk.options).is_err());
    let left = std::fs::read(other.path().join("thesis.tex")).unwrap();
    assert_eq!(left, b"years of work");
}

#[test]
fn the_directory_is_private() {
    use std::os::unix::fs::PermissionsExt;
    let disk = OnDisk::new(DurableOptions::small());
    drop(disk.open());
    let mode = |path: &std::path::Path| path.metadata().unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&disk.path), 0o700);
    assert_eq!(mode(&disk.path.join("LOCK")), 0o600);
}

#[test]
fn secrets_and_ids_stay_and_time_is_remembered() {
    let options = DurableOptions {
        wall: || WallTime(1_234),
        ..DurableOptions::small()
    };
    let disk = OnDisk::new(options);
    let (mut store, first, _) = disk.loaded();
    assert_ne!(first.store_id, first.lease_secret);
    commit(&mut store, 55).unwrap();
    Box::new(store).close().unwrap();
    let (_, second, facts) = disk.loaded();
    assert_eq!(second.store_id, first.store_id);
    assert_eq!(second.lease_secret, first.lease_secret);
    assert_eq!(second.now, Timestamp(55));
    assert_eq!(second.last_wall, WallTime(1_234));
    assert_eq!(facts, [name(55)]);
    let other = OnDisk::new(options);
    assert_ne!(other.loaded().1.lease_secret, first.lease_secret);
}

#[test]
fn each_start_counts_where_nodes_came_from_and_the_log_stays_short() {
    let options = DurableOptions {
        segment_bytes: 64 << 10,
        window_ms: 1,
        ..DurableOptions::small()
    };
    let disk = OnDisk::new(options);
    let (mut store, ..) = disk.loaded();
    for n in 0..3_000 {
        commit(&mut store, n % 1_000).unwrap();
        if n % 100 == 0 {
            store.flush().unwrap();
            store.tidied_ms = 0;
            assert_eq!(store.pressure(), Pressure::None);
        }
    }
    let segments = std::fs::read_dir(disk.path.join("log")).unwrap().count();
    assert!(segments <= 6, "{segments} segments for 200 KB of log");
    assert_eq!(
        store.idle(0).unwrap(),
        Some(100),
        "the seal is still to come"
    );
    store.flush().unwrap();
    assert_eq!(store.idle(100).unwrap(), None, "nothing is left to be done");
    assert_eq!(store.idle(100_000).unwrap(), None);
}

#[test]
fn a_log_that_runs_ahead_makes_pressure() {
    let options = DurableOptions {
        window_ms: 3_600_000,
        slow_log_bytes: 10_000,
        stop_log_bytes: 20_000,
        ..DurableOptions::small()
    };
    let disk = OnDisk::new(options);
    let (mut store, ..) = disk.loaded();
    let mut seen = Vec::new();
    for n in 0..400 {
        commit(&mut store, n).unwrap();
        let pressure = store.pressure();
        if seen.last() != Some(&pressure) {
            seen.push(pressure);
        }
    }
    assert_eq!(seen, [Pressure::None, Pressure::Slow, Pressure::Stop]);
    store.flush().unwrap();
    assert_eq!(store.pressure(), Pressure::None);
    drop(store);
    let full = DurableOptions {
        min_free_bytes: u64::MAX,
        ..options
    };
    let mut store = Durable::open(&disk.path, full).unwrap();
    store.load(&mut |_| {}).unwrap();
    assert_eq!(store.pressure(), Pressure::DiskFull);
    commit(&mut store, 1).unwrap();
}

#[test]
fn a_flipped_bit_in_a_sealed_log_is_refused() {
    let options = DurableOptions {
        window_ms: 3_600_000,
        ..DurableOptions::small()
    };
    let disk = OnDisk::new(options);
    let (mut store, ..) = disk.loaded();
    for n in 0..10 {
        commit(&mut store, n).unwrap();
    }
    store.idle(100).unwrap();
    drop(store);
    let segment = disk.path.join("log/0000000000000001.log");
    let mut bytes = std::fs::read(&segment).unwrap();
    for at in [64, 64 + 40, 64 + 480] {
        bytes[at] ^= 4;
        std::fs::write(&segment, &bytes).unwrap();
        let mut store = disk.open();
        let result = store.load(&mut |_| {});
        assert!(
            matches!(result, Err(StorageError::Corrupt { .. })),
            "byte {at}"
        );
        assert!(
            commit(&mut store, 1).is_err(),
            "nothing is taken after that"
        );
        drop(store);
        bytes[at] ^= 4;
    }
    std::fs::write(&segment, &bytes).unwrap();
    assert_eq!(disk.loaded().2.len(), 10);
}

#[test]
fn payloads_of_deleted_runs_give_their_room_back() {
    use crate::broker::outcome::CreatedNode;
    use crate::broker::types::*;
    let options = DurableOptions {
        payload_segment_bytes: 16 << 10,
        payload_grace_ms: 0,
        window_ms: 1,
        ..DurableOptions::small()
    };
    let disk = OnDisk::new(options);
    let (mut store, ..) = disk.loaded();
    let mut refs = Vec::new();
    for run in 1..=6u64 {
        let at = store
            .payloads()
            .write(vec![run as u8; 10_000].into())
            .unwrap();
        refs.push(at);
        let node = CreatedNode {
            spec: SpecId(0),
            arguments: Payload {
                codec: Codec::Raw,
                body: Body::Stored(at),
            },
            inputs: vec![],
            not_before: Timestamp(0),
            not_before_wall: WallTime(0),
        };
        let facts = vec![Fact::Nodes {
            run: RunSeq(run),
            first: NodeIndex(0),
            parent: None,
            round: 1,
            event: 1,
            nodes: vec![node],
        }];
        store
            .commit(StorageBatch {
                now: Timestamp(run),
                facts,
            })
            .unwrap();
    }
    let count = || {
        std::fs::read_dir(disk.path.join("payloads"))
            .unwrap()
            .count()
    };
    let before = count();
    for run in 1..=3u64 {
        let facts = vec![Fact::RunDeleted { run: RunSeq(run) }];
        store
            .commit(StorageBatch {
                now: Timestamp(9),
                facts,
            })
            .unwrap();
    }
    store.tidied_ms = 0;
    store.idle(0).unwrap();
    assert!(
        count() < before,
        "{} of {before} segments are left",
        count()
    );
    let reader = store.reader();
    drop(store);
    drop(reader);
    let (store, ..) = disk.loaded();
    let reader = store.reader();
    for (at, run) in refs.iter().zip(1u8..) {
        let expected = (run > 3).then(|| bytes::Bytes::from(vec![run; 10_000]));
        assert_eq!(reader.payload(*at).ok(), expected, "run {run}");
    }
    let orphan = store.payloads().write(vec![9; 10_000].into()).unwrap();
    drop((store, reader));
    let (store, ..) = disk.loaded();
    assert!(store.reader().payload(orphan).is_err(), "nobody named it");
    assert!(Arc::strong_count(&store.payloads) == 1);
}
