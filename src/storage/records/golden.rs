//! Bytes of every version of the format. They never change: what they say must be readable for as long as the format is.

use std::sync::Arc;

use super::{RowBatch, RowMaker, decode_facts, encode_facts};
use crate::broker::outcome::{CreatedNode, DeadLetterRecord, Fact};
use crate::broker::types::*;

fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::new(), |mut out, byte| {
        let _ = write!(out, "{byte:02x}");
        out
    })
}

fn payload(bytes: &'static [u8]) -> Payload {
    Payload {
        codec: Codec::Json,
        body: Body::Inline(bytes.into()),
    }
}

fn record() -> NodeRecord {
    NodeRecord {
        spec: SpecId(2),
        parent: Some(NodeIndex(0)),
        round: 1,
        progress: Progress::Leased {
            session: SessionId(0x1122_3344_5566_7788),
        },
        body: BodyEnd::Plain,
        attempt: Attempt(1),
        failures: 0,
        losses: 0,
        not_before: Timestamp(0),
        not_before_wall: WallTime(0),
        digest: 0,
        cause: None,
        note: Note::None,
    }
}

fn facts() -> Vec<Fact> {
    let run = RunSeq(300);
    let node = NodeKey::new(run, NodeIndex(1));
    let range = |first, count, mode| InputRange {
        first: NodeIndex(first),
        count,
        mode,
    };
    vec![
        Fact::Spec {
            id: SpecId(2),
            spec: Arc::new(Spec {
                action: "add".into(),
                queue: "default".into(),
                taint: Some("gpu".into()),
                priority: -3,
                retry: Retry::default(),
                timeout_ms: Some(60_000),
                fingerprint: None,
                pin_code: false,
                batch: Some(Batch {
                    max_size: 8,
                    max_wait_ms: 20,
                }),
                by_name: false,
            }),
        },
        Fact::Name {
            id: NameId(1),
            name: "orders".into(),
        },
        Fact::Announced {
            action: "add".into(),
            spec: SpecId(2),
        },
        Fact::Run {
            run,
            record: RunRecord {
                salt: 0xa1b2_c3d4_e5f6_0718,
                root: NodeIndex(0),
                round: 1,
                cancelled: false,
                cancel_reason: "".into(),
                tags: [("team".to_owned(), "red".to_owned())].into(),
                source: "native".into(),
                created: Timestamp(1_000),
                created_wall: WallTime(1_700_000_000_000),
                ended: None,
                state: RunState::Running,
                key: Some(KeyHash(7)),
                n_nodes: 2,
                n_events: 2,
            },
        },
        Fact::Nodes {
            run,
            first: NodeIndex(0),
            parent: None,
            round: 1,
            event: 1,
            nodes: vec![
                CreatedNode {
                    spec: SpecId(2),
                    arguments: payload(b"[1]"),
                    inputs: vec![],
                    not_before: Timestamp(0),
                    not_before_wall: WallTime(0),
                },
                CreatedNode {
                    spec: SpecId(2),
                    arguments: Payload {
                        codec: Codec::Pickle,
                        body: Body::Stored(PayloadRef {
                            segment: 1,
                            offset: 4_096,
                            length: 5_000,
                            checksum: 0xc0ff_ee00_c0ff_ee00,
                        }),
                    },
                    inputs: vec![range(0, 1, InputUse::Value)],
                    not_before: Timestamp(2_000),
                    not_before_wall: WallTime(0),
                },
            ],
        },
        Fact::Node {
            node,
            event: 3,
            record: record(),
        },
        Fact::Outcome {
            node,
            is_error: false,
            payload: payload(b"{}"),
            references: vec![range(2, 40, InputUse::Value), range(1, 1, InputUse::Value)],
        },
        Fact::Node {
            node,
            event: 4,
            record: NodeRecord {
                progress: Progress::Settling,
                body: BodyEnd::Structure,
                digest: 0xd1d2_d3d4_d5d6_d7d8,
                ..record()
            },
        },
        Fact::Key {
            key: KeyHash(0x0102_0304_0506_0708_090a_0b0c_0d0e_0f10),
            run: Some(RunId { seq: run, salt: 5 }),
            content: 6,
            at: Timestamp(1_000),
        },
        Fact::Position {
            route: NameId(1),
            partition: "c/t/0".into(),
            epoch: 1,
            next: 400,
        },
        Fact::Outbox {
            output: NameId(1),
            seq: 9,
            node,
            salt: 5,
            round: 1,
            at: Timestamp(1_000),
        },
        Fact::OutboxConfirmed {
            output: NameId(1),
            cursor: 4,
            beyond: vec![6, 7],
        },
        Fact::DeadLetter {
            route: NameId(1),
            seq: 3,
            letter: Box::new(DeadLetterRecord {
                code: "INVALID_REQUEST".into(),
                reason: "no".into(),
                attempts: 5,
                coordinates: [("topic".to_owned(), "t".to_owned())].into(),
                body: payload(b"?"),
                at: Timestamp(1_000),
            }),
        },
        Fact::DeadLetterRemoved {
            route: NameId(1),
            seq: 2,
        },
        Fact::KeysExpired {
            keys: vec![KeyHash(0x0102_0304_0506_0708_090a_0b0c_0d0e_0f10)],
        },
        Fact::RunDeleted { run: RunSeq(299) },
    ]
}

const BODY_V1: &str = "0101022a000000036164640764656661756c740103677075050103fbe803fbd007fce09304006401fb60ea00000108140002\
    01066f726465727303020361646404ac023e0000001807f6e5d4c3b2a10001000001047465616d03726564066e6174697665\
    fbe803fd0068e5cf8b01000000000107000000000000000000000000000000020205ac0200000101020002035b315d5e0100\
    00d00f018020882700eeffc000eeffc0060102da00887766554433221108300002049c015100027b7d060b82d6d8d7d6d5d4\
    d3d2d109100f0e0d0c0b0a09080706050403020101ac0205000000000000000600000000000000e8070b0101900305632f74\
    2f300c0109ac0201050000000000000001e8070d01040204020e0103200000000f494e56414c49445f52455155455354026e\
    6f050105746f7069630174fbe80300013f0f01020a01100f0e0d0c0b0a09080706050403020110ab02";

const ROWS_V1: &[&str] = &[
    "s 2 0 012a036164640764656661756c740103677075050103fbe803fbd007fce09304006401fb60ea000001081400",
    "t 1 0 01066f7264657273",
    "w ffb352e13fd28e80 0 01050203616464",
    "r 12c 0 -",
    "o 12c 0 013e1807f6e5d4c3b2a10001000001047465616d03726564066e6174697665fbe803fd0068e5cf8b010000000001070000000000000000000000000000000202",
    "n 12c 0 810000d402",
    "a 12c 0 010000035b315d",
    "n 12c 1 810020540202d00f",
    "a 12c 1 010601018020882700eeffc000eeffc0",
    "i 12c 100000000 0101010000",
    "g 1 12c 018847",
    "n 12c 1 010102580302008877665544332211",
    "v 12c 1 010002027b7d",
    "i 12c 180000000 010202049c015100",
    "n 12c 1 010b8258040200d8d7d6d5d4d3d2d1",
    "k 0 90a0b0c0d0e0f10 01080706050403020101ac0205000000000000000600000000000000e807",
    "b 1 56f5b415e4da0000 010901900305632f742f30",
    "f 1 9 01ac0201050000000000000001e807",
    "f 1 6 -",
    "f 1 7 -",
    "F 1 0 010404020402",
    "d 1 0 010103",
    "d 1 30000 0127200000000f494e56414c49445f52455155455354026e6f050105746f7069630174fbe80300013f",
    "k 0 90a0b0c0d0e0f10 -",
    "e 12c 1 01e8070f0002020001040001",
];

#[test]
fn the_body_of_a_log_entry_keeps_its_bytes() {
    let mut bytes = Vec::new();
    encode_facts(&facts(), &mut bytes);
    assert_eq!(hex(&bytes), BODY_V1);
    assert_eq!(decode_facts(&bytes).as_deref(), Ok(&facts()[..]));
}

#[test]
fn rows_keep_their_bytes() {
    let mut batch = RowBatch::default();
    RowMaker::default().rows_of(&facts(), Timestamp(1_000), &mut batch);
    let rows: Vec<_> = batch
        .rows
        .iter()
        .map(|row| {
            let value = row.value.as_ref().map_or("-".into(), |value| hex(value));
            let table = char::from(row.key.table as u8);
            format!("{table} {:x} {:x} {value}", row.key.major, row.key.minor)
        })
        .collect();
    assert_eq!(rows, ROWS_V1);
    let ranges: Vec<_> = batch
        .deleted_ranges
        .iter()
        .map(|(a, b)| (char::from(a.table as u8), a.major, a.minor, b.minor))
        .collect();
    assert_eq!(ranges, [('f', 1, 0, 4), ('d', 1, 2 << 16, 3 << 16)]);
    assert_eq!(batch.deleted_runs, [299]);
}
