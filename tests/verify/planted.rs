//! One violation of each invariant, planted in a copy of the sound store, and found by name through the command.
//!
//! Most are facts that the store keeps without a question, since only the broker knows which facts may follow which; the others are
//! bytes changed in files.

use std::fs;
use std::path::Path;

use bytes::Bytes;
use dagorama::broker::outcome::{CreatedNode, Fact};
use dagorama::broker::types::*;
use dagorama::storage::durable::{Durable, DurableOptions};
use dagorama::storage::{Loaded, StorageBatch, Store};

use crate::{ALL, sound, verify};

/// The run that goes on in the second chapter of the golden store, and some others, found by what they are.
struct Found {
    loaded: Loaded,
    facts: Vec<Fact>,
    /// Each run's latest record.
    runs: Vec<(RunSeq, RunRecord)>,
}

impl Found {
    /// The newest open run: node 0 is leased, 1 settles as a structure, 4 waits for 0 to 2.
    fn open(&self) -> RunSeq {
        let open = self.runs.iter().filter(|(_, r)| r.ended.is_none());
        open.map(|(run, _)| *run).max().expect("an open run")
    }

    /// The newest run that has succeeded.
    fn ended(&self) -> (RunSeq, RunRecord) {
        let mut ended = self.runs.iter().rev();
        ended
            .find(|(_, r)| r.state == RunState::Succeeded)
            .expect("an ended run")
            .clone()
    }

    /// What happened last to a node.
    fn node(&self, run: RunSeq, node: u32) -> NodeRecord {
        let wanted = NodeKey::new(run, NodeIndex(node));
        let mut facts = self.facts.iter().rev();
        let found = facts.find_map(|fact| match fact {
            Fact::Node { node, record, .. } if *node == wanted => Some(record.clone()),
            _ => None,
        });
        found.expect("something happened to it")
    }

    /// The number of a run's next event.
    fn next_event(&self, run: RunSeq) -> u64 {
        let numbers = self.facts.iter().filter_map(|fact| match fact {
            Fact::Node { node, event, .. } if node.run == run => Some(*event),
            Fact::Nodes {
                run: r,
                event,
                nodes,
                ..
            } if *r == run => Some(event + nodes.len() as u64 - 1),
            _ => None,
        });
        numbers.max().expect("events") + 1
    }

    /// A node of a run changes, and its next event says so.
    fn change(&self, run: RunSeq, node: u32, edit: impl FnOnce(&mut NodeRecord)) -> Fact {
        let mut record = self.node(run, node);
        record.note = Note::None;
        edit(&mut record);
        Fact::Node {
            node: NodeKey::new(run, NodeIndex(node)),
            event: self.next_event(run),
            record,
        }
    }
}

/// Opens a store, commits what `plan` makes of its content, and leaves it as a kill would.
fn plant(store: &Path, plan: impl FnOnce(&Found) -> Vec<Fact>) {
    let options = DurableOptions {
        window_ms: 3_600_000,
        ..DurableOptions::small()
    };
    let mut durable = Durable::open(store, options).unwrap();
    let mut facts = Vec::new();
    let loaded = durable.load(&mut |fact| facts.push(fact)).unwrap();
    let mut runs = durable.reader().runs(None, usize::MAX).unwrap();
    runs.reverse();
    let found = Found {
        loaded,
        facts,
        runs,
    };
    let planted = plan(&found);
    let batch = StorageBatch {
        now: Timestamp(found.loaded.now.0 + 1),
        facts: planted,
    };
    durable.commit(batch).unwrap();
}

fn value(bytes: &'static [u8]) -> Payload {
    Payload {
        codec: Codec::Json,
        body: Body::Inline(Bytes::from_static(bytes)),
    }
}

type Plan = fn(&Found) -> Vec<Fact>;

/// Violations that are facts.
const PLANS: [(&str, Plan); 14] = [
    ("I2", |found| {
        // The site of an ended run opens again, without a new round.
        let (run, record) = found.ended();
        vec![found.change(run, record.root.0, |node| node.progress = Progress::Open)]
    }),
    ("I3", |found| {
        let run = found.open();
        vec![found.change(run, 2, |node| {
            node.progress = Progress::Leased {
                session: SessionId(7),
            };
            node.attempt.0 += 2;
        })]
    }),
    ("I4", |found| {
        // Leased a second time while it is leased.
        vec![found.change(found.open(), 0, |node| {
            node.progress = Progress::Leased {
                session: SessionId(7),
            };
            node.attempt.0 += 1;
        })]
    }),
    ("I5", |found| {
        // Skipped, although nothing that it needs has failed.
        vec![found.change(found.open(), 3, |node| node.progress = Progress::Skipped)]
    }),
    ("I6", |found| {
        let run = found.open();
        let mut leased = found.node(run, 0);
        leased.spec = SpecId(0);
        vec![Fact::Node {
            node: NodeKey::new(run, NodeIndex(4)),
            event: found.next_event(run),
            record: leased,
        }]
    }),
    ("I7", |found| {
        // Ready, in a lane of a spec that does not exist.
        vec![found.change(found.open(), 2, |node| node.spec = SpecId(999))]
    }),
    ("I8", |found| {
        let run = found.open();
        let leased = found.node(run, 0);
        vec![Fact::Node {
            node: NodeKey::new(run, NodeIndex(4)),
            event: found.next_event(run),
            record: leased,
        }]
    }),
    ("I9", |found| {
        let run = found.open();
        let n = found.facts.iter().filter_map(|fact| match fact {
            Fact::Nodes {
                run: r,
                first,
                nodes,
                ..
            } if *r == run => Some(first.0 + nodes.len() as u32),
            _ => None,
        });
        let first = n.max().unwrap();
        let created = CreatedNode {
            spec: SpecId(0),
            arguments: value(b"[]"),
            // It waits for itself.
            inputs: vec![InputRange {
                first: NodeIndex(first),
                count: 1,
                mode: InputUse::Value,
            }],
            not_before: Timestamp(0),
            not_before_wall: WallTime(0),
        };
        vec![Fact::Nodes {
            run,
            first: NodeIndex(first),
            parent: None,
            round: 1,
            event: found.next_event(run),
            nodes: vec![created],
        }]
    }),
    ("I10", |found| {
        let (run, mut record) = found.ended();
        record.state = RunState::Failed;
        vec![Fact::Run { run, record }]
    }),
    ("I11", |found| {
        let run = found.open();
        let mut gap = found.change(run, 2, |node| node.progress = Progress::Open);
        if let Fact::Node { event, .. } = &mut gap {
            *event += 1;
        }
        vec![gap]
    }),
    ("I12", |found| {
        // Owed although it runs.
        let run = found.open();
        let owed = found.facts.iter().filter_map(|fact| match fact {
            Fact::Outbox { output, seq, .. } => Some((*output, *seq)),
            _ => None,
        });
        let (output, last) = owed.max_by_key(|(_, seq)| *seq).unwrap();
        vec![Fact::Outbox {
            output,
            seq: last + 2,
            node: NodeKey::new(run, NodeIndex(0)),
            salt: 1,
            round: 1,
            at: found.loaded.now,
        }]
    }),
    ("I14", |found| {
        // A key of a run that does not exist yet.
        vec![Fact::Key {
            key: KeyHash(0x1234_5678 << 96),
            run: Some(RunId {
                seq: RunSeq(found.loaded.next_run + 1_000),
                salt: 1,
            }),
            content: 1,
            at: found.loaded.now,
        }]
    }),
    ("I18", |found| {
        // The key of a run that is kept is forgotten.
        let keys = found.runs.iter().filter_map(|(_, record)| record.key);
        vec![Fact::KeysExpired {
            keys: keys.collect(),
        }]
    }),
    ("I19", |found| {
        // It has succeeded, and left no value.
        let run = found.open();
        vec![found.change(run, 0, |node| node.progress = Progress::Succeeded)]
    }),
];

/// The first payload segment: its last byte is part of a body.
fn damage_payload(store: &Path) {
    let mut files: Vec<_> = fs::read_dir(store.join("payloads"))
        .unwrap()
        .map(|file| file.unwrap().path())
        .collect();
    files.sort();
    let mut bytes = fs::read(&files[0]).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&files[0], bytes).unwrap();
}

/// A byte of the log behind the state, in the middle of what is sealed.
fn damage_log(store: &Path) {
    let mut files: Vec<_> = fs::read_dir(store.join("log"))
        .unwrap()
        .map(|file| file.unwrap().path())
        .collect();
    files.sort();
    let middle = &files[files.len() / 2];
    let mut bytes = fs::read(middle).unwrap();
    bytes[64 + 50] ^= 1;
    fs::write(middle, bytes).unwrap();
}

#[test]
fn one_violation_of_each_invariant_is_found_by_its_name() {
    let mut planted: Vec<&str> = PLANS.iter().map(|(id, _)| *id).collect();
    planted.extend(["I16", "I17"]);
    for id in ALL {
        assert!(planted.contains(&id), "{id} is never broken");
    }
    for (id, plan) in PLANS {
        let (_dir, store) = sound();
        plant(&store, plan);
        assert_found(&store, id);
    }
    let (_dir, store) = sound();
    damage_payload(&store);
    assert_found(&store, "I16");
    let (_dir, store) = sound();
    damage_log(&store);
    assert_found(&store, "I17");
}

fn assert_found(store: &Path, id: &str) {
    let seen = verify(store, &["--json", "--deep"]);
    assert_eq!(seen.exit, 1, "{id}: {} {}", seen.out, seen.err);
    let document = seen.json();
    assert_eq!(document["sound"], false, "{id}");
    let found = seen.invariant(id);
    assert!(found["violations"].as_u64() > Some(0), "{id}: {document}");
    let first = found["first"].as_array().unwrap();
    assert!(!first.is_empty() && first[0] != "", "{id}: {found}");

    let people = verify(store, &["--deep"]);
    assert_eq!(people.exit, 1, "{id}");
    let begin = format!("{id} ");
    let mut lines = people.out.lines().map(str::trim_start);
    let line = lines.find(|line| line.starts_with(&begin));
    assert!(
        line.is_some_and(|line| line.contains("BROKEN")),
        "{id}: {line:?}"
    );
    assert!(people.out.contains(first[0].as_str().unwrap()), "{id}");
}

/// Without a plant, opening and committing something harmless leaves a sound store: the plants are found, not the opening.
#[test]
fn a_harmless_fact_is_no_violation() {
    let (_dir, store) = sound();
    plant(&store, |_| {
        vec![Fact::Name {
            id: NameId(500),
            name: "harmless".into(),
        }]
    });
    let seen = verify(&store, &["--json", "--deep"]);
    assert_eq!(seen.exit, 0, "{}", seen.out);
}
