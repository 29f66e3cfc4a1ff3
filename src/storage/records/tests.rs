//! Facts survive the log, rows say what the facts said, and hostile bytes are errors.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;

use super::{RowBatch, RowMaker, decode_facts, encode_facts, rows_in};
use crate::broker::outcome::{CreatedNode, DeadLetterRecord, Fact};
use crate::broker::types::*;
use crate::storage::row::{RowKey, Table};

/// A generator of numbers, so that tests repeat.
struct Dice(u64);

impl Dice {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    /// Small and large numbers alike.
    fn any(&mut self) -> u64 {
        let bits = self.below(65) as u32;
        self.next().checked_shr(bits).unwrap_or(0)
    }

    fn pick<T: Clone>(&mut self, of: &[T]) -> T {
        of[self.below(of.len() as u64) as usize].clone()
    }

    fn text(&mut self) -> String {
        let length = self.pick(&[0, 1, 7, 40]);
        (0..length)
            .map(|_| self.pick(&['a', 'ß', '漢', ' ', '\n']))
            .collect()
    }

    fn payload(&mut self) -> Payload {
        let body = if self.below(5) == 0 {
            Body::Stored(PayloadRef {
                segment: self.any() as u32,
                offset: self.any() & !0xfff,
                length: self.any() as u32,
                checksum: self.next(),
            })
        } else {
            let length = self.pick(&[0usize, 1, 48, 127, 128, 3_072]);
            Body::Inline((0..length).map(|_| self.next() as u8).collect())
        };
        let codec = self.pick(&[Codec::Json, Codec::MessagePack, Codec::Pickle, Codec::Raw]);
        Payload { codec, body }
    }

    fn ranges(&mut self) -> Vec<InputRange> {
        let count = self.pick(&[0, 0, 0, 1, 3, 255, 256, 257, 600]);
        (0..count)
            .map(|_| InputRange {
                first: NodeIndex(self.any() as u32),
                count: (self.any() as u32).max(1),
                mode: self.pick(&[InputUse::Value, InputUse::Outcome, InputUse::After]),
            })
            .collect()
    }

    fn record(&mut self) -> NodeRecord {
        let session = SessionId(self.pick(&[7, 7, u64::MAX]));
        NodeRecord {
            spec: SpecId(self.pick(&[0, 1, u32::MAX])),
            parent: self.pick(&[None, Some(NodeIndex(0)), Some(NodeIndex(u32::MAX))]),
            round: self.pick(&[1, 1, 2, u32::MAX]),
            progress: self.pick(&[
                Progress::Open,
                Progress::Leased { session },
                Progress::Backoff,
                Progress::Settling,
                Progress::Succeeded,
                Progress::Failed,
                Progress::Skipped,
            ]),
            body: self.pick(&[
                BodyEnd::Plain,
                BodyEnd::Structure,
                BodyEnd::Tail(NodeIndex(9)),
            ]),
            attempt: Attempt(self.pick(&[0, 1, 2, 300])),
            failures: self.pick(&[0, 0, 1, u32::MAX]),
            losses: self.pick(&[0, 0, 2]),
            not_before: Timestamp(self.pick(&[0, 0, 1, u64::MAX])),
            not_before_wall: WallTime(self.pick(&[0, 0, u64::MAX])),
            digest: self.pick(&[0, 1, u64::MAX]),
            cause: self.pick(&[None, Some(NodeIndex(4))]),
            note: self.pick(&[
                Note::None,
                Note::OtherCode,
                Note::AttemptFailed,
                Note::TimedOut,
                Note::LeaseLost,
                Note::Released,
                Note::Quarantined,
                Note::ReferenceFailed,
                Note::Reopened,
                Note::LeaseShortened,
                Note::LeaseResumed,
            ]),
        }
    }

    fn node(&mut self) -> NodeKey {
        NodeKey::new(
            RunSeq(self.pick(&[0, 1, 1, 1, u64::MAX])),
            NodeIndex(self.pick(&[0, 1, 2, 3, u32::MAX])),
        )
    }

    fn tags(&mut self) -> BTreeMap<String, String> {
        (0..self.below(4))
            .map(|n| (format!("{n}{}", self.text()), self.text()))
            .collect()
    }

    fn fact(&mut self) -> Fact {
        let name = NameId(self.any() as u32);
        match self.below(15) {
            0 => Fact::Spec {
                id: SpecId(self.any() as u32),
                spec: Arc::new(Spec {
                    action: self.text().into(),
                    queue: self.text().into(),
                    taint: self.pick(&[None, Some("gpu".into())]),
                    priority: self.pick(&[0, i32::MIN, i32::MAX]),
                    retry: Retry {
                        max_attempts: self.any() as u32,
                        ..Retry::default()
                    },
                    timeout_ms: self.pick(&[None, Some(u64::MAX)]),
                    fingerprint: self.pick(&[None, Some("f".into())]),
                    pin_code: self.below(2) == 0,
                    batch: self.pick(&[
                        None,
                        Some(Batch {
                            max_size: 3,
                            max_wait_ms: 4,
                        }),
                    ]),
                    by_name: self.below(2) == 0,
                }),
            },
            1 => Fact::Name {
                id: name,
                name: self.text().into(),
            },
            2 => Fact::Announced {
                action: self.text().into(),
                spec: SpecId(self.any() as u32),
            },
            3 => Fact::Run {
                run: self.node().run,
                record: RunRecord {
                    salt: self.next(),
                    root: NodeIndex(self.any() as u32),
                    round: self.any() as u32,
                    cancelled: self.below(2) == 0,
                    cancel_reason: self.text().into(),
                    tags: self.tags(),
                    source: self.text().into(),
                    created: Timestamp(self.any()),
                    created_wall: WallTime(self.any()),
                    ended: self.pick(&[None, Some(Timestamp(5))]),
                    state: self.pick(&[
                        RunState::Running,
                        RunState::Succeeded,
                        RunState::Failed,
                        RunState::Cancelled,
                    ]),
                    key: self.pick(&[None, Some(KeyHash(u128::MAX - 5))]),
                    n_nodes: self.any() as u32,
                    n_events: self.any(),
                },
            },
            4 | 5 => Fact::Nodes {
                run: self.node().run,
                first: NodeIndex(self.below(100) as u32),
                parent: self.pick(&[None, Some(NodeIndex(3))]),
                round: self.pick(&[1, 2]),
                event: self.any() >> 1,
                nodes: (0..=self.below(5))
                    .map(|_| CreatedNode {
                        spec: SpecId(self.pick(&[0, 1, 1, 1])),
                        arguments: self.payload(),
                        inputs: self.ranges(),
                        not_before: Timestamp(self.pick(&[0, 0, 77])),
                        not_before_wall: WallTime(self.pick(&[0, 0, 77])),
                    })
                    .collect(),
            },
            6 => Fact::Outcome {
                node: self.node(),
                is_error: self.below(2) == 0,
                payload: self.payload(),
                references: self.ranges(),
            },
            7 => Fact::Key {
                key: KeyHash(u128::from(self.next()) << 64 | u128::from(self.next())),
                run: self.pick(&[
                    None,
                    Some(RunId {
                        seq: RunSeq(5),
                        salt: u64::MAX,
                    }),
                ]),
                content: self.next(),
                at: Timestamp(self.any()),
            },
            8 => Fact::KeysExpired {
                keys: (0..self.below(4))
                    .map(|_| KeyHash(self.next().into()))
                    .collect(),
            },
            9 => Fact::Position {
                route: name,
                partition: self.text().into(),
                epoch: self.any() as u32,
                next: self.any(),
            },
            10 => Fact::Outbox {
                output: name,
                seq: self.any(),
                node: self.node(),
                salt: self.next(),
                round: self.any() as u32,
                at: Timestamp(self.any()),
            },
            11 => Fact::OutboxConfirmed {
                output: name,
                cursor: self.any(),
                beyond: (0..self.below(4)).map(|_| self.next()).collect(),
            },
            12 => Fact::DeadLetter {
                route: name,
                seq: self.any() >> 17,
                letter: Box::new(DeadLetterRecord {
                    code: self.text().into(),
                    reason: self.text().into(),
                    attempts: self.any() as u32,
                    coordinates: self.tags(),
                    body: self.payload(),
                    at: Timestamp(self.any()),
                }),
            },
            13 => self.pick(&[
                Fact::DeadLetterRemoved {
                    route: name,
                    seq: 5,
                },
                Fact::RunDeleted { run: RunSeq(3) },
            ]),
            _ => Fact::Node {
                node: self.node(),
                event: self.any(),
                record: self.record(),
            },
        }
    }
}

fn encoded(facts: &[Fact]) -> Vec<u8> {
    let mut out = Vec::new();
    encode_facts(facts, &mut out);
    out
}

#[test]
fn every_fact_comes_back_from_the_log() {
    let mut dice = Dice(0x5eed);
    for _ in 0..400 {
        let facts: Vec<_> = (0..dice.below(30)).map(|_| dice.fact()).collect();
        let bytes = encoded(&facts);
        assert_eq!(decode_facts(&bytes).as_deref(), Ok(&facts[..]));
    }
}

#[test]
fn cut_or_lengthened_bodies_are_errors_or_whole_facts() {
    let mut dice = Dice(3);
    for _ in 0..60 {
        let facts: Vec<_> = (0..3).map(|_| dice.fact()).collect();
        let bytes = encoded(&facts);
        for end in 0..bytes.len() {
            // A cut between two facts is not seen here: the entry's length and checksum are there for that.
            if let Ok(fewer) = decode_facts(&bytes[..end]) {
                assert!(fewer.len() < facts.len() && facts.starts_with(&fewer));
            }
        }
        let mut longer = bytes.clone();
        longer.push(0);
        assert!(decode_facts(&longer).is_err(), "no fact has the number 0");
    }
    assert!(decode_facts(&[]).is_err());
    assert!(decode_facts(&[2]).is_err(), "an unknown version");
}

#[test]
fn mutated_bodies_never_panic() {
    let mut dice = Dice(99);
    let mut errors = 0;
    for _ in 0..2_000 {
        let facts: Vec<_> = (0..4).map(|_| dice.fact()).collect();
        let bytes = encoded(&facts);
        for _ in 0..50 {
            let mut hostile = bytes.clone();
            for _ in 0..=dice.below(4) {
                let at = dice.below(hostile.len() as u64) as usize;
                match dice.below(3) {
                    0 => hostile[at] ^= 1 << dice.below(8),
                    1 => hostile[at] = dice.pick(&[0, 0x7f, 0x80, 0xff]),
                    _ => hostile.truncate(at.max(1)),
                }
            }
            errors += usize::from(decode_facts(&hostile).is_err());
        }
    }
    assert!(errors > 50_000, "only {errors} of 100000 were noticed");
}

#[test]
fn mutated_rows_never_panic() {
    let mut dice = Dice(7);
    let mut maker = RowMaker::default();
    for _ in 0..500 {
        let mut batch = RowBatch::default();
        let facts = [dice.fact(), dice.fact()];
        maker.rows_of(&facts, Timestamp(9), &mut batch);
        for row in batch.rows {
            let Some(value) = row.value else { continue };
            for _ in 0..20 {
                let mut hostile = value.to_vec();
                let at = dice.below(hostile.len() as u64) as usize;
                hostile[at] = dice.next() as u8;
                if dice.below(4) == 0 {
                    hostile.truncate(at);
                }
                read_any(row.key, &Bytes::from(hostile));
            }
        }
    }
}

fn read_any(key: RowKey, value: &Bytes) {
    let _ = rows_in::node_row(key, value);
    let _ = rows_in::arguments_row(value);
    let _ = rows_in::outcome_row(value);
    let _ = rows_in::ranges_row(value);
    let mut events = 0;
    let _ = rows_in::event_row(key, value, &mut |_| {
        events += 1;
        events < 1_000
    });
    let _ = rows_in::key_row(key, value);
    let _ = rows_in::outbox_row(key, value);
    let _ = rows_in::payload_row(value);
    let _ = rows_in::Parts::first(value);
    let _ = rows_in::run_record(value);
    let _ = rows_in::spec_record(value);
    let _ = rows_in::announced_record(value);
    let _ = rows_in::position_record(NameId(0), value);
    let _ = rows_in::cursor_record(value);
    let _ = rows_in::letter_record(value);
}

#[test]
fn rows_stay_within_a_page_and_repeat() {
    let mut dice = Dice(11);
    for _ in 0..300 {
        let facts: Vec<_> = (0..20).map(|_| dice.fact()).collect();
        let (mut once, mut again) = (RowBatch::default(), RowBatch::default());
        RowMaker::default().rows_of(&facts, Timestamp(u64::MAX), &mut once);
        RowMaker::default().rows_of(&facts, Timestamp(u64::MAX), &mut again);
        assert_eq!(once, again);
        for row in &once.rows {
            let length = row.value.as_ref().map_or(0, Bytes::len);
            assert!(length <= 3_584, "{:?}: {length}", row.key);
        }
    }
}

#[test]
fn a_record_over_a_row_goes_on_in_parts() {
    let record = RunRecord {
        salt: 1,
        root: NodeIndex(0),
        round: 1,
        cancelled: true,
        cancel_reason: "because ".repeat(2_000).into(),
        tags: BTreeMap::new(),
        source: "native".into(),
        created: Timestamp(1),
        created_wall: WallTime(2),
        ended: None,
        state: RunState::Running,
        key: None,
        n_nodes: 1,
        n_events: 1,
    };
    let fact = Fact::Run {
        run: RunSeq(8),
        record: record.clone(),
    };
    let mut batch = RowBatch::default();
    RowMaker::default().rows_of(&[fact], Timestamp(1), &mut batch);
    let mut rows = batch.rows.into_iter();
    let first = rows.next().unwrap();
    assert_eq!((first.key.table, first.value), (Table::EndedRun, None));
    let first = rows.next().unwrap();
    assert_eq!(first.key.table, Table::OpenRun);
    let mut parts = rows_in::Parts::first(&first.value.unwrap()).unwrap();
    for row in rows {
        assert!(parts.is_open());
        assert_eq!(row.key.table, Table::Inputs);
        parts = parts.next(&row.value.unwrap()).unwrap();
    }
    assert!(!parts.is_open());
    assert_eq!(rows_in::run_record(&parts.finish()), Ok(record));
}

#[test]
fn events_of_neighbours_share_a_row() {
    let node = |n| NodeKey::new(RunSeq(1), NodeIndex(n));
    let mut dice = Dice(5);
    let mut record = dice.record();
    record.progress = Progress::Succeeded;
    let facts: Vec<_> = (0..64u32)
        .map(|n| Fact::Node {
            node: node(n),
            event: 10 + u64::from(n),
            record: record.clone(),
        })
        .collect();
    let mut batch = RowBatch::default();
    RowMaker::default().rows_of(&facts, Timestamp(3), &mut batch);
    let events: Vec<_> = batch
        .rows
        .iter()
        .filter(|row| row.key.table == Table::Event)
        .collect();
    assert_eq!(events.len(), 1);
    let mut seen = Vec::new();
    rows_in::event_row(events[0].key, events[0].value.as_ref().unwrap(), &mut |e| {
        seen.push((e.seq, e.node.0, e.state));
        true
    })
    .unwrap();
    let expected: Vec<_> = (0..64u32)
        .map(|n| (10 + u64::from(n), n, "succeeded"))
        .collect();
    assert_eq!(seen, expected);
}

#[test]
fn a_leaf_costs_little_log() {
    let run = RunSeq(1_000);
    let leaves = 1_000u32;
    let session = SessionId(u64::MAX / 3);
    let payload = |n: usize| Payload {
        codec: Codec::MessagePack,
        body: Body::Inline(vec![1; n].into()),
    };
    let mut record = NodeRecord {
        spec: SpecId(3),
        parent: Some(NodeIndex(0)),
        round: 1,
        progress: Progress::Leased { session },
        body: BodyEnd::Plain,
        attempt: Attempt(1),
        failures: 0,
        losses: 0,
        not_before: Timestamp(0),
        not_before_wall: WallTime(0),
        digest: 0,
        cause: None,
        note: Note::None,
    };
    let created = vec![
        CreatedNode {
            spec: SpecId(3),
            arguments: payload(48),
            inputs: vec![],
            not_before: Timestamp(0),
            not_before_wall: WallTime(0),
        };
        leaves as usize
    ];
    let mut bytes = encoded(&[Fact::Nodes {
        run,
        first: NodeIndex(1),
        parent: Some(NodeIndex(0)),
        round: 1,
        event: 3,
        nodes: created,
    }])
    .len();
    let leased: Vec<_> = (1..=leaves)
        .map(|n| Fact::Node {
            node: NodeKey::new(run, NodeIndex(n)),
            event: 2_000 + u64::from(n),
            record: record.clone(),
        })
        .collect();
    bytes += encoded(&leased).len();
    record.progress = Progress::Succeeded;
    let ended: Vec<_> = (1..=leaves)
        .flat_map(|n| {
            record.digest = u64::from(n) << 40;
            let node = NodeKey::new(run, NodeIndex(n));
            [
                Fact::Outcome {
                    node,
                    is_error: false,
                    payload: payload(20),
                    references: vec![],
                },
                Fact::Node {
                    node,
                    event: 4_000 + u64::from(n),
                    record: record.clone(),
                },
            ]
        })
        .collect();
    bytes += encoded(&ended).len();
    let each = bytes / leaves as usize;
    assert!(each <= 120, "{each} bytes a leaf");
}
