//! Every body: round trip, refusal of what is wrong, and two million seeded mutations through every decoder.

use super::*;
use bytes::BytesMut;

use crate::edge::native::frame::{self, Malformed};

/// A small generator of its own: the same numbers on every machine.
struct Dice(u64);

impl Dice {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }
}

fn range(first: u32, count: u32, mode: InputUse, new: bool) -> Range {
    Range {
        first,
        count,
        mode,
        new,
    }
}

fn node(delay: Delay, ranges: Vec<Range>, arguments: &'static [u8]) -> Node {
    Node {
        spec: 9,
        codec: Codec::MessagePack,
        delay,
        ranges,
        arguments: Bytes::from_static(arguments),
    }
}

fn nodes() -> Vec<Node> {
    vec![
        node(Delay::None, vec![], b""),
        node(
            Delay::For(7),
            vec![
                range(0, 1, InputUse::Value, true),
                range(5, 2, InputUse::After, false),
            ],
            b"abc",
        ),
        node(
            Delay::Until(u64::MAX),
            vec![range(0, 2, InputUse::Outcome, true)],
            b"{}",
        ),
    ]
}

fn items() -> Vec<Item> {
    vec![
        Item {
            node: 3,
            state: SUCCEEDED,
            codec: Codec::Pickle,
            ranges: vec![],
            body: Bytes::from_static(b"value"),
        },
        Item {
            node: u32::MAX,
            state: 8,
            codec: Codec::Json,
            ranges: vec![range(1, 4, InputUse::Value, false)],
            body: Bytes::new(),
        },
    ]
}

fn finish(end: End, ranges: Vec<Range>, children: Vec<Node>) -> Finish {
    Finish {
        run: u64::MAX - 1,
        node: 2,
        attempt: 3,
        token: *b"0123456789abcdef",
        end,
        codec: Codec::Raw,
        ranges,
        body: Bytes::from_static(b"body"),
        children,
        digest: 0,
    }
}

fn finishes() -> Vec<Finish> {
    let one = range(1, 1, InputUse::Value, true);
    vec![
        finish(End::Value, vec![], vec![]),
        finish(
            End::Structure,
            vec![one, range(2, 9, InputUse::Value, false)],
            nodes(),
        ),
        finish(End::Tail, vec![one], nodes()),
        finish(End::Failed, vec![], vec![]),
        finish(End::FailedRetryable, vec![], vec![]),
        finish(End::Released, vec![], vec![]),
        finish(End::TimedOutRetryable, vec![], vec![]),
        finish(End::TimedOut, vec![], vec![]),
    ]
}

fn submits() -> Vec<Submit> {
    vec![
        Submit {
            key: Bytes::new(),
            tags: Bytes::new(),
            root: 2,
            nodes: nodes(),
        },
        Submit {
            key: Bytes::from_static(b"key"),
            tags: Bytes::from_static(b"{\"a\":\"b\"}"),
            root: 0,
            nodes: vec![node(Delay::None, vec![], b"x")],
        },
    ]
}

fn leases() -> Vec<Lease> {
    vec![
        Lease {
            run: 1,
            salt: 2,
            node: 3,
            attempt: 4,
            token: [5; 16],
            spec: 6,
            batch: 0,
            other_code: true,
            codec: Codec::Json,
            ranges: vec![range(0, 2, InputUse::Value, false)],
            arguments: Bytes::from_static(b"[1]"),
            inline: items(),
        },
        Lease {
            run: u64::MAX,
            salt: u64::MAX,
            node: u32::MAX,
            attempt: 1,
            token: [0; 16],
            spec: 0,
            batch: 8,
            other_code: false,
            codec: Codec::Raw,
            ranges: vec![],
            arguments: Bytes::new(),
            inline: vec![],
        },
    ]
}

fn create() -> Create {
    Create {
        run: 4,
        node: 5,
        attempt: 6,
        token: [7; 16],
        first_child: 8,
        nodes: nodes(),
    }
}

fn waited() -> Waited {
    Waited {
        state: 6,
        hint: "start `dagorama worker`".into(),
        item: Some(items().remove(0)),
    }
}

fn fetch() -> Fetch {
    Fetch {
        run: 9,
        ranges: vec![
            range(0, 10_000, InputUse::Value, false),
            range(4, 1, InputUse::Value, false),
        ],
    }
}

fn listed<T>(things: &[T], one: impl FnMut(&mut Vec<u8>, &T)) -> Bytes {
    let mut out = Vec::new();
    put_list(&mut out, things, one);
    out.into()
}

fn written<T>(thing: &T, one: impl FnOnce(&mut Vec<u8>, &T)) -> Bytes {
    let mut out = Vec::new();
    one(&mut out, thing);
    out.into()
}

fn submitted() -> Vec<Submitted> {
    vec![
        Submitted::Refused(Bytes::from_static(b"{}")),
        Submitted::Run {
            seq: 1,
            salt: 2,
            existing: false,
        },
        Submitted::Run {
            seq: 3,
            salt: 4,
            existing: true,
        },
    ]
}

fn refusals() -> Vec<Refusal> {
    vec![Refusal {
        position: 5,
        reason: Bytes::from_static(b"{\"code\":\"X\"}"),
    }]
}

fn attempts() -> Vec<AttemptName> {
    vec![AttemptName {
        run: 1,
        node: 2,
        attempt: 3,
    }]
}

/// A decoder by name, with the answer thrown away.
type Decoder = fn(Bytes) -> Result<(), Malformed>;

fn corpus() -> Vec<(&'static str, Bytes, Decoder)> {
    vec![
        ("submit", listed(&submits(), put_submit), |b| {
            decode_submit(b).map(drop)
        }),
        ("submitted", listed(&submitted(), put_submitted), |b| {
            decode_submitted(b).map(drop)
        }),
        ("credit", Bytes::from_static(&[1, 0, 0, 0]), |b| {
            decode_credit(b).map(drop)
        }),
        (
            "heartbeat",
            listed(&[1u64, 2], |out, x| out.extend_from_slice(&x.to_le_bytes())),
            |b| decode_heartbeat(b).map(drop),
        ),
        ("finish", listed(&finishes(), put_finish), |b| {
            decode_finish(b).map(drop)
        }),
        ("refusals", listed(&refusals(), put_refusal), |b| {
            decode_refusals(b).map(drop)
        }),
        ("create", written(&create(), put_create), |b| {
            decode_create(b).map(drop)
        }),
        ("fetch", written(&fetch(), put_fetch), |b| {
            decode_fetch(b).map(drop)
        }),
        ("items", listed(&items(), put_item), |b| {
            decode_items(b).map(drop)
        }),
        (
            "wait",
            written(
                &Wait {
                    seq: 1,
                    salt: 2,
                    timeout_ms: 3,
                },
                put_wait,
            ),
            |b| decode_wait(b).map(drop),
        ),
        ("waited", written(&waited(), put_waited), |b| {
            decode_waited(b).map(drop)
        }),
        ("leases", listed(&leases(), put_lease), |b| {
            decode_leases(b).map(drop)
        }),
        ("revoke", listed(&attempts(), put_attempt), |b| {
            decode_revoke(b).map(drop)
        }),
    ]
}

#[test]
fn every_body_comes_back() {
    assert_eq!(decode_submit(listed(&submits(), put_submit)), Ok(submits()));

    let mut got = decode_finish(listed(&finishes(), put_finish)).expect("finish");
    assert!(got.iter().all(|f| f.digest != 0));
    for finish in &mut got {
        finish.digest = 0;
    }
    assert_eq!(got, finishes());

    assert_eq!(
        decode_submitted(listed(&submitted(), put_submitted)),
        Ok(submitted())
    );
    assert_eq!(
        decode_refusals(listed(&refusals(), put_refusal)),
        Ok(refusals())
    );
    assert_eq!(decode_create(written(&create(), put_create)), Ok(create()));
    assert_eq!(decode_fetch(written(&fetch(), put_fetch)), Ok(fetch()));
    assert_eq!(decode_items(listed(&items(), put_item)), Ok(items()));
    assert_eq!(decode_waited(written(&waited(), put_waited)), Ok(waited()));
    assert_eq!(decode_leases(listed(&leases(), put_lease)), Ok(leases()));
    assert_eq!(
        decode_revoke(listed(&attempts(), put_attempt)),
        Ok(attempts())
    );
    assert_eq!(
        decode_credit(Bytes::from_static(&[4, 3, 2, 1])),
        Ok(0x0102_0304)
    );
    let unfinished = Waited {
        state: 4,
        hint: String::new(),
        item: None,
    };
    assert_eq!(
        decode_waited(written(&unfinished, put_waited)),
        Ok(unfinished)
    );
}

#[test]
fn arguments_are_slices_of_the_frame() {
    let body = listed(&submits(), put_submit);
    let frame = body.as_ptr_range();
    let got = decode_submit(body.clone()).expect("submit");
    assert!(frame.contains(&got[0].nodes[1].arguments.as_ptr()));
}

#[test]
fn a_digest_is_of_the_item_alone_and_of_all_of_it() {
    let alone = decode_finish(listed(&finishes()[1..2], put_finish)).expect("one");
    let among = decode_finish(listed(&finishes(), put_finish)).expect("all");
    assert_eq!(alone[0].digest, among[1].digest);
    let mut other = finishes()[1].clone();
    other.children[2].spec += 1;
    let other = decode_finish(listed(&[other], put_finish)).expect("other");
    assert_ne!(alone[0].digest, other[0].digest);
}

#[test]
fn every_cut_and_every_extra_byte_is_refused() {
    for (name, body, decode) in corpus() {
        decode(body.clone()).expect(name);
        for end in 0..body.len() {
            assert!(
                decode(body.slice(..end)).is_err(),
                "{name} cut to {end} bytes"
            );
        }
        let mut longer = body.to_vec();
        longer.push(0);
        assert!(
            decode(longer.into()).is_err(),
            "{name} with a byte too many"
        );
    }
}

#[test]
fn fields_that_are_wrong_are_named() {
    let submit = listed(&submits()[1..], put_submit); // n, key_length, key, tags_length, tags, n_nodes, root, node
    let finish = listed(&finishes()[..1], put_finish);
    let tail = listed(&finishes()[2..3], put_finish);
    let lease = listed(&leases()[..1], put_lease);
    let item = listed(&items()[1..], put_item);
    let at = 4 + 2 + 3 + 2 + 9; // n_nodes of `submit`
    let cases: &[(&str, &Bytes, usize, u8, &str, Decoder)] = &[
        ("no such root", &submit, at + 4, 1, "root", |b| {
            decode_submit(b).map(drop)
        }),
        ("no nodes", &submit, at, 0, "root", |b| {
            decode_submit(b).map(drop)
        }),
        ("many nodes", &submit, at + 3, 1, "n_nodes", |b| {
            decode_submit(b).map(drop)
        }),
        ("node codec", &submit, at + 8 + 4, 4, "codec", |b| {
            decode_submit(b).map(drop)
        }),
        ("node delay", &submit, at + 8 + 5, 3, "delay", |b| {
            decode_submit(b).map(drop)
        }),
        (
            "no delay but a value",
            &submit,
            at + 8 + 16,
            1,
            "delay",
            |b| decode_submit(b).map(drop),
        ),
        ("node reserved", &submit, at + 8 + 6, 1, "reserved", |b| {
            decode_submit(b).map(drop)
        }),
        ("many ranges", &submit, at + 8 + 11, 0xff, "n_ranges", |b| {
            decode_submit(b).map(drop)
        }),
        ("long arguments", &submit, at + 8 + 15, 1, "length", |b| {
            decode_submit(b).map(drop)
        }),
        ("end", &finish, 4 + 32, 8, "end", |b| {
            decode_finish(b).map(drop)
        }),
        ("codec", &finish, 4 + 33, 9, "codec", |b| {
            decode_finish(b).map(drop)
        }),
        ("reserved", &finish, 4 + 35, 1, "reserved", |b| {
            decode_finish(b).map(drop)
        }),
        ("children", &finish, 4 + 40, 1, "n_children", |b| {
            decode_finish(b).map(drop)
        }),
        ("n", &finish, 3, 0x7f, "n", |b| decode_finish(b).map(drop)),
        ("a value with a range", &tail, 4 + 32, 0, "n_ranges", |b| {
            decode_finish(b).map(drop)
        }),
        ("a tail of two", &tail, 4 + 48 + 4, 2, "n_ranges", |b| {
            decode_finish(b).map(drop)
        }),
        ("an empty range", &tail, 4 + 48 + 4, 0, "count", |b| {
            decode_finish(b).map(drop)
        }),
        ("mode", &tail, 4 + 48 + 8, 3, "mode", |b| {
            decode_finish(b).map(drop)
        }),
        ("mode bits", &tail, 4 + 48 + 9, 1, "mode", |b| {
            decode_finish(b).map(drop)
        }),
        ("lease flags", &lease, 4 + 49, 2, "flags", |b| {
            decode_leases(b).map(drop)
        }),
        ("lease inline", &lease, 4 + 63, 1, "n_inline", |b| {
            decode_leases(b).map(drop)
        }),
        ("item state", &item, 4 + 4, 9, "state", |b| {
            decode_items(b).map(drop)
        }),
        ("range past the end", &item, 4 + 16 + 7, 0xff, "", |b| {
            decode_items(b).map(drop)
        }),
    ];
    for (name, body, at, value, field, decode) in cases {
        let mut bytes = body.to_vec();
        bytes[*at] = *value;
        match decode(bytes.into()) {
            Ok(()) => assert!(field.is_empty(), "{name}: taken"),
            Err(error) if !field.is_empty() => {
                assert_eq!(error.field, *field, "{name}: {error}");
            }
            Err(error) => assert_eq!(error.field, "count", "{name}: {error}"),
        }
    }
}

#[test]
fn a_frame_carries_only_so_many_items() {
    let n = MAX_ITEMS as u32 + 1;
    let mut body = n.to_le_bytes().to_vec();
    body.resize(4 + 8 * n as usize, 0);
    let error = decode_heartbeat(body.into()).expect_err("one too many");
    assert!(error.is_too_large(), "{error}");
}

/// Flips, cuts, copies and overwrites bytes of `body`.
fn mutate(dice: &mut Dice, body: &[u8], other: &[u8], out: &mut Vec<u8>) {
    out.clear();
    out.extend_from_slice(body);
    for _ in 0..=dice.below(4) {
        let length = out.len();
        match dice.below(7) {
            0 if length > 0 => out[dice.below(length)] ^= 1 << dice.below(8),
            1 if length > 0 => out[dice.below(length)] = dice.next() as u8,
            2 if length >= 4 => {
                let at = dice.below(length - 3);
                let interesting = [0, 1, 2, 255, 65_536, 1 << 31, u32::MAX - 1, u32::MAX];
                let value = interesting[dice.below(interesting.len())];
                out[at..at + 4].copy_from_slice(&value.to_le_bytes());
            }
            3 if length > 0 => out.truncate(dice.below(length)),
            4 => out.extend_from_slice(&dice.next().to_le_bytes()[..=dice.below(8)]),
            5 if !other.is_empty() => {
                let from = dice.below(other.len());
                out.extend_from_slice(&other[from..]);
            }
            6 if length > 1 => {
                let at = dice.below(length);
                out.remove(at);
            }
            _ => {}
        }
    }
}

#[test]
fn two_million_mutations_panic_nowhere() {
    const ROUNDS: usize = 2_000_000;
    let corpus = corpus();
    let mut dice = Dice(0x5eed_0001);
    let mut bytes = Vec::new();
    let (mut taken, mut refused) = (0_usize, 0_usize);
    for round in 0..ROUNDS {
        let (_, body, decode) = &corpus[round % corpus.len()];
        let (_, other, _) = &corpus[dice.below(corpus.len())];
        mutate(&mut dice, body, other, &mut bytes);
        // Each mutated body meets its own decoder, and as a stream the one that cuts frames.
        match decode(Bytes::copy_from_slice(&bytes)) {
            Ok(()) => taken += 1,
            Err(_) => refused += 1,
        }
        if round % 8 == 0 {
            let mut stream = BytesMut::from(&bytes[..]);
            while let Ok(Some(_)) = frame::take(&mut stream) {}
        }
    }
    assert_eq!(taken + refused, ROUNDS);
    assert!(
        taken > ROUNDS / 100 && refused > ROUNDS / 4,
        "the mutations are neither all harmless nor all fatal: {taken} taken, {refused} refused"
    );
}
