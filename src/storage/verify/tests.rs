//! `verify` on whole stores, on broken stories, and on damaged files.

use std::collections::BTreeMap;
use std::fs;
use std::sync::Arc;

use xxhash_rust::xxh3::xxh3_64;

use super::*;
use crate::broker::outcome::{CreatedNode, DeadLetterRecord, Fact};
use crate::broker::types::{
    Attempt, Body, BodyEnd, Codec, InputRange, InputUse, KeyHash, NameId, NodeIndex, NodeKey,
    NodeRecord, Note, Payload, PayloadRef, Progress, RunId, RunRecord, RunSeq, RunState, SessionId,
    Spec, SpecId, Timestamp, WallTime,
};
use crate::storage::durable::{Durable, DurableOptions};
use crate::storage::sled::Sled;
use crate::storage::{StorageBatch, Store};

const KEY: KeyHash = KeyHash(77 << 64 | 5);

fn spec() -> Spec {
    Spec::of("add")
}

fn inline(bytes: &'static [u8]) -> Payload {
    Payload {
        codec: Codec::Raw,
        body: Body::Inline(Bytes::from_static(bytes)),
    }
}

fn record(ended: Option<u64>, state: RunState, n_events: u64, key: Option<KeyHash>) -> RunRecord {
    RunRecord {
        salt: 9,
        root: NodeIndex(2),
        round: 1,
        cancelled: false,
        cancel_reason: "".into(),
        tags: BTreeMap::new(),
        source: "native".into(),
        created: Timestamp(1),
        created_wall: WallTime(1),
        ended: ended.map(Timestamp),
        state,
        key,
        n_nodes: 3,
        n_events,
    }
}

fn node(run: u64, node: u32) -> NodeKey {
    NodeKey::new(RunSeq(run), NodeIndex(node))
}

fn became(run: u64, n: u32, event: u64, progress: Progress, attempt: u32) -> Fact {
    Fact::Node {
        node: node(run, n),
        event,
        record: NodeRecord {
            spec: SpecId(1),
            parent: None,
            round: 1,
            progress,
            body: BodyEnd::Plain,
            attempt: Attempt(attempt),
            failures: 0,
            losses: 0,
            not_before: Timestamp(0),
            not_before_wall: WallTime(0),
            digest: 0,
            cause: None,
            note: Note::None,
        },
    }
}

fn leased(run: u64, n: u32, event: u64, attempt: u32) -> Fact {
    let session = SessionId(4);
    became(run, n, event, Progress::Leased { session }, attempt)
}

fn outcome(run: u64, n: u32, payload: Payload) -> Fact {
    Fact::Outcome {
        node: node(run, n),
        is_error: false,
        payload,
        references: Vec::new(),
    }
}

fn created(inputs: Vec<InputRange>) -> CreatedNode {
    CreatedNode {
        spec: SpecId(1),
        arguments: inline(b"arguments"),
        inputs,
        not_before: Timestamp(0),
        not_before_wall: WallTime(0),
    }
}

/// Nodes 0 and 1, and node 2 that waits for both.
fn nodes(run: u64) -> Fact {
    Fact::Nodes {
        run: RunSeq(run),
        first: NodeIndex(0),
        parent: None,
        round: 1,
        event: 1,
        nodes: vec![
            created(Vec::new()),
            created(Vec::new()),
            created(vec![InputRange {
                first: NodeIndex(0),
                count: 2,
                mode: InputUse::Value,
            }]),
        ],
    }
}

/// A store's whole story: run 1 ends, run 2 goes on, and there is something in every table.
fn story(large: PayloadRef) -> Vec<Fact> {
    let stored = Payload {
        codec: Codec::Raw,
        body: Body::Stored(large),
    };
    let mut facts = vec![
        Fact::Spec {
            id: SpecId(1),
            spec: Arc::new(spec()),
        },
        Fact::Name {
            id: NameId(1),
            name: "results".into(),
        },
        Fact::Announced {
            action: "add".into(),
            spec: SpecId(1),
        },
        Fact::Position {
            route: NameId(1),
            partition: "topic/0".into(),
            epoch: 1,
            next: 12,
        },
        Fact::Key {
            key: KEY,
            run: Some(RunId {
                seq: RunSeq(1),
                salt: 9,
            }),
            content: 3,
            at: Timestamp(1),
        },
        Fact::Run {
            run: RunSeq(1),
            record: record(None, RunState::Running, 0, Some(KEY)),
        },
        nodes(1),
        leased(1, 0, 4, 1),
        leased(1, 1, 5, 1),
        outcome(1, 0, inline(b"one")),
        became(1, 0, 6, Progress::Succeeded, 1),
        became(1, 1, 7, Progress::Backoff, 1),
        leased(1, 1, 8, 2),
        outcome(1, 1, stored),
        became(1, 1, 9, Progress::Succeeded, 2),
        leased(1, 2, 10, 1),
        outcome(1, 2, inline(b"three")),
        became(1, 2, 11, Progress::Succeeded, 1),
        Fact::Run {
            run: RunSeq(1),
            record: record(Some(9), RunState::Succeeded, 11, Some(KEY)),
        },
    ];
    for seq in 1..=4 {
        facts.push(Fact::Outbox {
            output: NameId(1),
            seq,
            node: node(1, seq as u32 % 3),
            salt: 9,
            round: 1 + seq as u32 / 4,
            at: Timestamp(9),
        });
    }
    facts.extend([
        Fact::OutboxConfirmed {
            output: NameId(1),
            cursor: 2,
            beyond: vec![3],
        },
        Fact::Run {
            run: RunSeq(2),
            record: record(None, RunState::Running, 0, None),
        },
        nodes(2),
        leased(2, 0, 4, 1),
        Fact::DeadLetter {
            route: NameId(1),
            seq: 1,
            letter: Box::new(DeadLetterRecord {
                code: "X".into(),
                reason: "broken".into(),
                attempts: 5,
                coordinates: BTreeMap::new(),
                body: inline(b"letter"),
                at: Timestamp(5),
            }),
        },
    ]);
    // The fourth one was owed for a later settling of the same node; the first is confirmed and gone.
    for fact in &mut facts {
        if let Fact::Outbox { seq: 4, round, .. } = fact {
            *round = 1;
        }
    }
    facts
}

struct Stage {
    dir: tempfile::TempDir,
}

impl Stage {
    fn path(&self) -> PathBuf {
        self.dir.path().join("store")
    }

    /// Makes a store and tells it a story; `edit` may change it. `flush`: the state has all of it, else half is only in the log.
    fn tell(edit: impl FnOnce(&mut Vec<Fact>), flush: bool) -> Self {
        let stage = Self {
            dir: tempfile::tempdir().expect("a directory"),
        };
        let options = DurableOptions {
            window_ms: 3_600_000,
            ..DurableOptions::small()
        };
        let mut store = Durable::open(&stage.path(), options).expect("open");
        store.load(&mut |_| {}).expect("load");
        let large = store
            .payloads()
            .write(Bytes::from(vec![5; 10_000]))
            .expect("a payload");
        let mut facts = story(large);
        edit(&mut facts);
        let half = facts.len() / 2;
        for (at, facts) in [&facts[..half], &facts[half..]].into_iter().enumerate() {
            let batch = StorageBatch {
                now: Timestamp(10 + at as u64),
                facts: facts.to_vec(),
            };
            store.commit(batch).expect("commit");
            if at == 0 || flush {
                store.flush().expect("flush");
            }
        }
        drop(store); // as a kill leaves it
        stage
    }

    fn verify(&self) -> VerifyReport {
        let options = VerifyOptions {
            deep: true,
            scratch: Some(self.dir.path().to_owned()),
        };
        let report = verify(&self.path(), &options).expect("a report");
        let left = fs::read_dir(self.dir.path()).expect("list").count();
        assert_eq!(left, 1, "the copy is gone");
        report
    }

    /// Every file's name and content.
    fn hash(&self) -> Vec<(PathBuf, u64)> {
        let mut files = Vec::new();
        let mut dirs = vec![self.path()];
        while let Some(dir) = dirs.pop() {
            for entry in fs::read_dir(dir).expect("list") {
                let path = entry.expect("an entry").path();
                if path.is_dir() {
                    dirs.push(path);
                } else {
                    let sum = xxh3_64(&fs::read(&path).expect("read"));
                    files.push((path, sum));
                }
            }
        }
        files.sort();
        files
    }
}

#[test]
fn a_sound_store_is_sound_and_stays_as_it_is() {
    for flush in [true, false] {
        let stage = Stage::tell(|_| {}, flush);
        let before = stage.hash();
        let report = stage.verify();
        assert_eq!(stage.hash(), before, "nothing was written");
        assert!(report.is_sound(), "{report:#?}");
        let totals = &report.totals;
        assert_eq!((totals.open_runs, totals.ended_runs), (1, 1));
        assert_eq!((totals.nodes, totals.inputs, totals.events), (6, 4, 15));
        assert_eq!((totals.payloads, totals.payload_bytes), (1, 10_000));
        assert_eq!(totals.log_entries, u64::from(!flush));
        assert_eq!(report.sequence, 2);
        for invariant in &report.invariants {
            assert!(invariant.has_data, "the story speaks of {}", invariant.id);
            assert!(invariant.checked > 0, "{}", invariant.id);
        }
    }
}

#[test]
fn a_log_of_several_segments_is_sound() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("store");
    let options = DurableOptions {
        window_ms: 3_600_000,
        segment_bytes: 4_096,
        ..DurableOptions::small()
    };
    let mut store = Durable::open(&path, options).expect("open");
    store.load(&mut |_| {}).expect("load");
    for n in 1..200 {
        let name = Fact::Name {
            id: NameId(n),
            name: format!("a name of some length, {n}").into(),
        };
        let batch = StorageBatch {
            now: Timestamp(u64::from(n)),
            facts: vec![name],
        };
        store.commit(batch).expect("commit");
    }
    drop(store);
    let segments = fs::read_dir(path.join("log")).expect("list").count();
    assert!(segments > 3, "{segments}");
    let report = verify(&path, &VerifyOptions::default()).expect("a report");
    assert!(report.is_sound(), "{report:#?}");
    assert_eq!(report.totals.log_entries, 199);
    assert!(report.sequence > 199, "rolls have numbers too");
}

#[test]
fn a_store_in_use_is_refused_and_none_is_an_error() {
    let stage = Stage::tell(|_| {}, true);
    let store = Durable::open(&stage.path(), DurableOptions::small()).expect("open");
    let refused = verify(&stage.path(), &VerifyOptions::default());
    assert!(matches!(refused, Err(StorageError::Locked { .. })));
    drop(store);
    assert!(stage.verify().is_sound());
    let nothing = stage.dir.path().join("nothing");
    assert!(verify(&nothing, &VerifyOptions::default()).is_err());
    assert!(!nothing.exists());
}

/// Replaces the fact of a node's event.
fn replace(facts: &mut [Fact], run: u64, number: u64, with: Fact) {
    for fact in facts {
        if matches!(fact, Fact::Node { node, event, .. } if node.run.0 == run && *event == number) {
            *fact = with;
            return;
        }
    }
    panic!("no such event");
}

fn header(facts: &mut [Fact], run: u64, edit: impl Fn(&mut RunRecord)) {
    for fact in facts.iter_mut().rev() {
        if let Fact::Run { run: r, record } = fact
            && r.0 == run
        {
            edit(record);
            return;
        }
    }
}

#[test]
fn a_broken_story_is_told_by_its_invariant() {
    type Edit = fn(&mut Vec<Fact>);
    let cases: [(&str, Edit); 19] = [
        ("I2", |facts| {
            // Terminal, and then something else in the same round.
            facts.push(became(1, 0, 12, Progress::Open, 1));
        }),
        ("I3", |facts| replace(facts, 1, 8, leased(1, 1, 8, 3))),
        ("I4", |facts| facts.push(leased(2, 0, 5, 2))),
        ("I5", |facts| {
            // Skipped, and it waits for nothing.
            facts.push(became(2, 1, 5, Progress::Skipped, 0));
        }),
        ("I5", |facts| {
            // Settling, and it refers to nothing.
            facts.push(outcome(2, 0, inline(b"[]")));
            let mut settling = became(2, 0, 5, Progress::Settling, 1);
            if let Fact::Node { record, .. } = &mut settling {
                record.body = BodyEnd::Structure;
            }
            facts.push(settling);
        }),
        ("I6", |facts| facts.push(leased(2, 2, 5, 1))),
        ("I7", |facts| {
            facts.retain(|fact| !matches!(fact, Fact::Spec { .. }));
        }),
        ("I8", |facts| facts.push(leased(2, 2, 5, 1))),
        ("I9", |facts| {
            if let Some(Fact::Nodes { nodes, .. }) =
                facts.iter_mut().rfind(|f| matches!(f, Fact::Nodes { .. }))
            {
                nodes[1].inputs.push(InputRange {
                    first: NodeIndex(2),
                    count: 1,
                    mode: InputUse::After,
                });
            }
        }),
        ("I10", |facts| {
            header(facts, 2, |record| {
                record.ended = Some(Timestamp(3));
                record.state = RunState::Failed;
                record.n_events = 4;
            });
        }),
        ("I10", |facts| header(facts, 1, |record| record.n_nodes = 4)),
        ("I11", |facts| {
            facts.push(became(2, 0, 6, Progress::Backoff, 1));
        }),
        ("I11", |facts| {
            header(facts, 1, |record| record.n_events = 12);
        }),
        ("I12", |facts| {
            facts.push(Fact::Outbox {
                output: NameId(1),
                seq: 5,
                node: node(1, 1),
                salt: 9,
                round: 1,
                at: Timestamp(9),
            });
        }),
        ("I12", |facts| {
            facts.push(Fact::Outbox {
                output: NameId(1),
                seq: 7,
                node: node(2, 1),
                salt: 9,
                round: 1,
                at: Timestamp(9),
            });
        }),
        ("I14", |facts| {
            facts.push(Fact::Key {
                key: KEY,
                run: None,
                content: 3,
                at: Timestamp(99_999),
            });
        }),
        ("I18", |facts| {
            facts.retain(|fact| !matches!(fact, Fact::Key { .. }));
        }),
        ("I19", |facts| {
            facts.retain(|f| !matches!(f, Fact::Outcome { node, .. } if node.node.0 == 2));
        }),
        ("I19", |facts| {
            facts.push(became(9, 0, 1, Progress::Open, 0));
        }),
    ];
    let planted: Vec<&str> = cases.iter().map(|(id, _)| *id).collect();
    for (id, _) in TEXTS {
        // Damage has tests of its own, below.
        let is_damage = ["I16", "I17"].contains(&id);
        assert!(planted.contains(&id) != is_damage, "{id} is never broken");
    }
    for (number, (id, edit)) in cases.into_iter().enumerate() {
        let report = Stage::tell(edit, number % 2 == 0).verify();
        let found = report.invariant(id).expect("an invariant");
        assert!(found.violations > 0, "case {number}, {id}: {report:#?}");
        assert!(!found.first.is_empty() && !report.is_sound());
    }
}

#[test]
fn damaged_payloads_are_named() {
    let stage = Stage::tell(|_| {}, true);
    let segment = fs::read_dir(stage.path().join("payloads"))
        .expect("list")
        .map(|file| file.expect("a file").path())
        .next()
        .expect("a segment");
    let mut bytes = fs::read(&segment).expect("read");
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    fs::write(&segment, &bytes).expect("write");
    let report = stage.verify();
    assert_eq!(report.invariant("I16").map(|i| i.violations), Some(1));
    fs::remove_file(&segment).expect("remove");
    let report = verify(&stage.path(), &VerifyOptions::default()).expect("a report");
    assert_eq!(report.invariant("I16").map(|i| i.violations), Some(1));
    assert!(!report.is_sound());
}

#[test]
fn damaged_pages_are_named() {
    let stage = Stage::tell(|_| {}, true);
    let dir = stage.path().join("state");
    let sled = Sled::open(&dir, 1 << 20).expect("open");
    let pages: Vec<_> = sled
        .tree
        .iter()
        .map(|item| item.expect("an item"))
        .filter(|(key, _)| key.len() == 17)
        .collect();
    drop(sled);
    assert!(pages.len() >= 12, "{}", pages.len());
    for (key, page) in pages {
        for damage in [0, 1] {
            let sled = Sled::open(&dir, 1 << 20).expect("open");
            if damage == 0 {
                sled.tree.remove(&key).expect("remove");
            } else {
                let mut bad = page.to_vec();
                let middle = bad.len() / 2;
                bad[middle] ^= 8;
                sled.tree.insert(&key, bad).expect("insert");
            }
            sled.sync().expect("sync");
            drop(sled);
            let report = stage.verify();
            let broken = report.invariant("I17").map_or(0, |i| i.violations);
            assert!(broken > 0, "page {key:?}: {report:#?}");
            let sled = Sled::open(&dir, 1 << 20).expect("open");
            sled.tree.insert(&key, page.clone()).expect("insert");
            sled.sync().expect("sync");
        }
    }
    assert!(stage.verify().is_sound());
}
