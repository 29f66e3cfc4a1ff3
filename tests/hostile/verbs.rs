//! Every verb with input that is wrong for it. A verb without a line here fails the last test.

use std::collections::BTreeSet;

use dagorama::edge::native::frame::Verb;

use crate::world::{Raw, World};

const RUN: &str = "1-0123456789abcdef";

/// A body for each verb that its decoder takes.
pub(crate) const GOOD_BODIES: &[(Verb, &[u8])] = &[
    (Verb::Hello, br#"{"version": 1, "kind": "client"}"#),
    (Verb::Define, br#"[{"id": 1, "action": "a"}]"#),
    (
        Verb::Submit,
        b"\x01\0\0\0\0\0\0\0\x01\0\0\0\0\0\0\0\x01\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0",
    ),
    (Verb::Credit, &[1, 0, 0, 0]),
    (Verb::Finish, &[0; 4]),
    (Verb::Heartbeat, &[0; 4]),
    (Verb::Fetch, &[0; 12]),
    (Verb::Wait, &[0; 20]),
    (Verb::Create, &[0; 40]),
    (Verb::Cancel, br#"{"run": "1-0123456789abcdef"}"#),
    (Verb::Resume, br#"{"run": "1-0123456789abcdef"}"#),
    (Verb::Events, br#"{"run": "1-0123456789abcdef"}"#),
    (Verb::Explain, br#"{"run": "1-0123456789abcdef"}"#),
    (Verb::Runs, b"{}"),
    (Verb::Show, br#"{"run": "1-0123456789abcdef"}"#),
    (Verb::Status, b"{}"),
    (Verb::Goodbye, b""),
    (Verb::Dlq, br#"{"do": "list"}"#),
    (Verb::Bridges, br#"{"do": "list"}"#),
];

/// What happens to the connection after the refusal.
#[derive(Clone, Copy, PartialEq, Debug)]
enum Then {
    /// The next request is answered.
    Open,
    /// It is closed: the verb has no reply, or the frame itself broke a rule.
    Closed,
}

struct Case {
    verb: Verb,
    what: &'static str,
    body: Vec<u8>,
    code: &'static str,
    then: Then,
}

fn cases() -> Vec<Case> {
    use Then::{Closed, Open};
    let mut cases = Vec::new();
    let mut add = |verb, then, code, list: &[(&'static str, &[u8])]| {
        for (what, body) in list {
            let body = body.to_vec();
            cases.push(Case {
                verb,
                what,
                body,
                code,
                then,
            });
        }
    };
    let invalid = "INVALID_REQUEST";
    let huge = [&[0xff; 4][..], &[0; 64]].concat();
    let none = b"{\"run\": \"1-0123456789abcdef\"}";
    add(
        Verb::Hello,
        Closed,
        invalid,
        &[("a second one", GOOD_BODIES[0].1)],
    );
    add(
        Verb::Define,
        Closed,
        invalid,
        &[
            ("empty", b""),
            ("no list", b"{}"),
            ("numbers", b"[1]"),
            ("no action", b"[{\"id\": 1}]"),
            ("no id", b"[{\"action\": \"a\"}]"),
            ("a negative id", b"[{\"id\": -1, \"action\": \"a\"}]"),
            ("an empty action", b"[{\"id\": 1, \"action\": \"\"}]"),
            ("no UTF-8", b"[{\"id\": 1, \"action\": \"\xff\"}]"),
            (
                "a retry that is text",
                b"[{\"id\": 1, \"action\": \"a\", \"retry\": \"x\"}]",
            ),
        ],
    );
    add(
        Verb::Submit,
        Open,
        invalid,
        &[
            ("empty", b""),
            ("a huge count", &huge),
            ("a cut node", b"\x01\0\0\0\0\0\0\0\x01\0\0\0\0\0\0\0\x01"),
            ("no nodes", b"\x01\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0"),
            ("bytes after the end", b"\0\0\0\0x"),
        ],
    );
    add(
        Verb::Credit,
        Closed,
        invalid,
        &[
            ("empty", b""),
            ("short", b"\x01\0\0"),
            ("long", b"\x01\0\0\0\0"),
        ],
    );
    add(
        Verb::Credit,
        Closed,
        "UNKNOWN_SESSION",
        &[("without a session", &[1, 0, 0, 0])],
    );
    add(
        Verb::Finish,
        Open,
        invalid,
        &[
            ("empty", b""),
            ("a huge count", &huge),
            ("a cut item", &[&[1, 0, 0, 0][..], &[0; 47]].concat()),
            (
                "an unknown end",
                &[&[1, 0, 0, 0][..], &[0; 32], &[9], &[0; 15]].concat(),
            ),
        ],
    );
    add(
        Verb::Heartbeat,
        Closed,
        invalid,
        &[
            ("empty", b""),
            ("a huge count", &huge),
            ("short", b"\x01\0\0\0\0"),
        ],
    );
    add(
        Verb::Fetch,
        Open,
        invalid,
        &[
            ("empty", b""),
            ("a huge count", &[0xff; 12]),
            (
                "an empty range",
                &[&[0; 8][..], &[1, 0, 0, 0], &[0; 12]].concat(),
            ),
            (
                "a range past the end",
                &[&[0; 8][..], &[1, 0, 0, 0], &[0xff; 8], &[0; 4]].concat(),
            ),
        ],
    );
    add(
        Verb::Fetch,
        Open,
        "UNKNOWN_RUN",
        &[(
            "no such run",
            &[&[9; 8][..], &[1, 0, 0, 0], &[0; 4], &[1, 0, 0, 0], &[0; 4]].concat(),
        )],
    );
    add(
        Verb::Wait,
        Open,
        invalid,
        &[("empty", b""), ("short", &[0; 19]), ("long", &[0; 21])],
    );
    add(
        Verb::Wait,
        Open,
        "UNKNOWN_RUN",
        &[("no such run", &[7; 20])],
    );
    add(
        Verb::Create,
        Open,
        invalid,
        &[
            ("empty", b""),
            ("a huge count", &[0xff; 40]),
            ("long", &[0; 41]),
        ],
    );
    add(
        Verb::Create,
        Open,
        invalid,
        &[(
            "a spec that was not defined",
            &[&[0; 36][..], &[1, 0, 0, 0], &[5], &[0; 23]].concat(),
        )],
    );
    for verb in [
        Verb::Cancel,
        Verb::Resume,
        Verb::Events,
        Verb::Explain,
        Verb::Show,
    ] {
        add(
            verb,
            Open,
            invalid,
            &[
                ("empty", b""),
                ("null", b"null"),
                ("no run", b"{}"),
                ("a run that is a number", b"{\"run\": 1}"),
                ("a run that is no id", b"{\"run\": \"../../etc\"}"),
                ("an id in capitals", b"{\"run\": \"1-0123456789ABCDEF\"}"),
                ("two documents", b"{\"run\": \"1-0123456789abcdef\"} {}"),
                ("no UTF-8", b"{\"run\": \"\xff\"}"),
            ],
        );
        add(verb, Open, "UNKNOWN_RUN", &[("no such run", none)]);
    }
    add(
        Verb::Cancel,
        Open,
        invalid,
        &[(
            "a reason that is a list",
            br#"{"run": "1-0123456789abcdef", "reason": []}"#,
        )],
    );
    add(
        Verb::Events,
        Open,
        invalid,
        &[
            (
                "a negative number",
                br#"{"run": "1-0123456789abcdef", "after": -1}"#,
            ),
            (
                "a huge limit",
                br#"{"run": "1-0123456789abcdef", "limit": 1e99}"#,
            ),
        ],
    );
    add(
        Verb::Explain,
        Open,
        invalid,
        &[(
            "a node beyond all",
            br#"{"run": "1-0123456789abcdef", "node": 4294967296}"#,
        )],
    );
    add(
        Verb::Show,
        Open,
        invalid,
        &[(
            "nodes that is text",
            br#"{"run": "1-0123456789abcdef", "nodes": "yes"}"#,
        )],
    );
    add(
        Verb::Runs,
        Open,
        invalid,
        &[
            ("empty", b""),
            ("a state that is none", br#"{"state": "asleep"}"#),
            ("a state that is a number", br#"{"state": 1}"#),
            ("a tag that is a map", br#"{"tag": {}}"#),
            ("a limit that is text", br#"{"limit": "all"}"#),
        ],
    );
    add(
        Verb::Status,
        Open,
        invalid,
        &[("empty", b""), ("text", b"\"status\""), ("cut", b"{")],
    );
    add(Verb::Goodbye, Open, invalid, &[("with a body", b"{}")]);
    add(
        Verb::Goodbye,
        Open,
        "UNKNOWN_SESSION",
        &[("without a session", b"")],
    );
    for verb in [Verb::Dlq, Verb::Bridges] {
        add(
            verb,
            Open,
            invalid,
            &[
                ("empty", b""),
                ("a list", b"[]"),
                ("nothing to do", b"{}"),
                ("something else to do", br#"{"do": "explode"}"#),
                ("a number to do", br#"{"do": 7}"#),
            ],
        );
    }
    cases
}

#[tokio::test]
async fn wrong_input_gets_its_code_and_harms_nothing() {
    let world = World::start().await;
    for Case {
        verb,
        what,
        body,
        code,
        then,
    } in cases()
    {
        let mut raw = Raw::client(world.socket()).await;
        // For the node of a good SUBMIT, so that only what the line says is wrong.
        raw.send(Verb::Define, 0, br#"[{"id": 1, "action": "a"}]"#)
            .await;
        assert_eq!(raw.refused(verb, &body).await, code, "{verb:?} {what}");
        match then {
            Then::Closed => assert_eq!(raw.receive().await, None, "{verb:?} {what}: stays open"),
            Then::Open => {
                let status = raw.ask(Verb::Status, b"{}").await;
                assert_eq!(status.verb, Verb::Reply, "{verb:?} {what}: does not go on");
            }
        }
    }
    let mut raw = Raw::client(world.socket()).await;
    let status = raw.ask(Verb::Status, b"{}").await;
    let status: serde_json::Value = serde_json::from_slice(&status.body).expect("JSON");
    assert_eq!(
        status["open_runs"], 0,
        "nothing was started by what was refused"
    );
    world.stop().await;
}

#[tokio::test]
async fn verbs_of_the_broker_are_not_for_clients() {
    let world = World::start().await;
    for verb in Verb::ALL.iter().filter(|verb| !verb.is_request()) {
        let mut raw = Raw::client(world.socket()).await;
        assert_eq!(
            raw.refused(*verb, b"{}").await,
            "INVALID_REQUEST",
            "{verb:?}"
        );
        assert_eq!(raw.receive().await, None, "{verb:?}");
    }
    world.stop().await;
}

#[tokio::test]
async fn the_good_bodies_are_good() {
    let world = World::start().await;
    for (verb, body) in GOOD_BODIES {
        let mut raw = Raw::client(world.socket()).await;
        raw.send(Verb::Define, 0, br#"[{"id": 1, "action": "a"}]"#)
            .await;
        if !verb.has_reply() || *verb == Verb::Hello {
            continue;
        }
        let frame = raw.ask(*verb, body).await;
        if frame.verb == Verb::Error {
            let code = crate::world::code(&frame.body);
            let known = [
                "UNKNOWN_RUN",
                "UNKNOWN_SESSION",
                "LEASE_UNKNOWN",
                "NOT_AVAILABLE",
            ];
            assert!(known.contains(&code.as_str()), "{verb:?}: {code}");
        }
    }
    world.stop().await;
}

#[test]
fn no_verb_is_forgotten() {
    let tested: BTreeSet<Verb> = cases().iter().map(|case| case.verb).collect();
    let good: BTreeSet<Verb> = GOOD_BODIES.iter().map(|(verb, _)| *verb).collect();
    for verb in Verb::ALL.iter().filter(|verb| verb.is_request()) {
        assert!(
            tested.contains(verb),
            "{verb:?} has no line with wrong input"
        );
        assert!(good.contains(verb), "{verb:?} has no good body");
    }
    assert!(RUN.parse::<dagorama::broker::types::RunId>().is_ok());
}
