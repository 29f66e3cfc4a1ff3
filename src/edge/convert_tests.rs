//! Conversions: round trips, and the content hash of a submission.

use super::*;
use crate::broker::types::{Codec, InputUse};

fn definitions(specs: &[(u32, &str)]) -> Definitions {
    let specs: Vec<json::Spec> = specs
        .iter()
        .map(|(id, action)| {
            let text = format!(r#"{{"id": {id}, "action": "{action}"}}"#);
            json::parse(text.as_bytes(), "spec").expect("a spec")
        })
        .collect();
    let mut definitions = Definitions::default();
    definitions.define(&specs).expect("good specs");
    definitions
}

fn node(spec: u32, arguments: &'static [u8]) -> codec::Node {
    codec::Node {
        spec,
        codec: Codec::Json,
        delay: codec::Delay::None,
        ranges: vec![],
        arguments: Bytes::from_static(arguments),
    }
}

fn submit(key: &'static [u8], nodes: Vec<codec::Node>) -> codec::Submit {
    codec::Submit {
        key: Bytes::from_static(key),
        tags: Bytes::new(),
        root: 0,
        nodes,
    }
}

#[test]
fn a_spec_comes_back() {
    let spec = Spec {
        action: "a".into(),
        queue: "q".into(),
        taint: Some("gpu".into()),
        priority: -3,
        retry: Retry {
            max_attempts: 9,
            ..Retry::default()
        },
        timeout_ms: Some(5),
        fingerprint: Some("f".into()),
        pin_code: true,
        batch: Some(Batch {
            max_size: 2,
            max_wait_ms: 3,
        }),
        by_name: false,
    };
    let document = json::write(&spec_json(Some(7), &spec));
    let read: json::Spec = json::parse(&document, "spec").expect("a spec");
    assert_eq!(read.id, Some(7));
    assert_eq!(super::spec(&read), Ok(spec));
}

#[test]
fn specs_that_make_no_sense_are_refused() {
    let long = "x".repeat(MAX_NAME_BYTES + 1);
    for (field, document) in [
        ("action", r#"{"id": 1, "action": ""}"#.to_owned()),
        ("action", format!(r#"{{"id": 1, "action": "{long}"}}"#)),
        (
            "queue",
            r#"{"id": 1, "action": "a", "queue": ""}"#.to_owned(),
        ),
        (
            "taint",
            r#"{"id": 1, "action": "a", "taint": ""}"#.to_owned(),
        ),
        ("id", r#"{"action": "a"}"#.to_owned()),
        (
            "max_attempts",
            r#"{"id": 1, "action": "a", "retry": {"max_attempts": 0}}"#.to_owned(),
        ),
        (
            "max_losses",
            r#"{"id": 1, "action": "a", "retry": {"max_losses": 0}}"#.to_owned(),
        ),
        (
            "max_size",
            r#"{"id": 1, "action": "a", "batch": {"max_size": 0}}"#.to_owned(),
        ),
    ] {
        let spec: json::Spec = json::parse(document.as_bytes(), "spec").expect("shape is right");
        let error = Definitions::default().define(&[spec]).expect_err(field);
        assert_eq!(error.field, field, "{document}");
    }
}

#[test]
fn specs_of_a_command_are_listed_once() {
    let definitions = definitions(&[(5, "a"), (6, "b")]);
    let nodes = vec![node(6, b"1"), node(5, b"2"), node(6, b"3"), node(6, b"4")];
    let got = submission(submit(b"", nodes), &definitions).expect("known specs");
    let actions: Vec<&str> = got.specs.iter().map(|spec| &*spec.action).collect();
    assert_eq!(actions, ["b", "a"]);
    let positions: Vec<u32> = got.nodes.iter().map(|node| node.spec).collect();
    assert_eq!(positions, [0, 1, 0, 0]);
    assert_eq!(got.key, None);

    let error = submission(submit(b"", vec![node(7, b"")]), &definitions).expect_err("undefined");
    assert_eq!(error.code, Code::InvalidRequest);
    assert!(error.message.contains("spec 7"), "{error}");
}

#[test]
fn the_same_call_with_other_numbers_is_the_same_content() {
    let content = |definitions: &Definitions, nodes| {
        let got = submission(submit(b"key", nodes), definitions).expect("known specs");
        got.key.expect("a key")
    };
    let first = content(
        &definitions(&[(1, "a"), (2, "b")]),
        vec![node(1, b"x"), node(2, b"y")],
    );
    let again = content(
        &definitions(&[(9, "a"), (3, "b")]),
        vec![node(9, b"x"), node(3, b"y")],
    );
    assert_eq!(first, again);
    for (name, nodes) in [
        ("other action", vec![node(2, b"x"), node(2, b"y")]),
        ("other arguments", vec![node(1, b"x"), node(2, b"z")]),
        ("moved border", vec![node(1, b"xy"), node(2, b"")]),
        ("fewer nodes", vec![node(1, b"x")]),
    ] {
        let other = content(&definitions(&[(1, "a"), (2, "b")]), nodes);
        assert_eq!(first.hash, other.hash, "{name}");
        assert_ne!(first.content, other.content, "{name}");
    }
}

#[test]
fn ends_mean_what_their_numbers_say() {
    let range = codec::Range {
        first: 4,
        count: 1,
        mode: InputUse::Value,
        new: true,
    };
    let finish = |end, ranges| codec::Finish {
        run: 1,
        node: 2,
        attempt: 3,
        token: [4; 16],
        end,
        codec: Codec::Raw,
        ranges,
        body: Bytes::from_static(b"b"),
        children: vec![],
        digest: 5,
    };
    let failed = |retryable, timed_out| AttemptEnd::Failed {
        error: inline(Codec::Raw, Bytes::from_static(b"b")),
        retryable,
        timed_out,
    };
    for (end, ranges, expected) in [
        (codec::End::Failed, vec![], failed(false, false)),
        (codec::End::FailedRetryable, vec![], failed(true, false)),
        (codec::End::TimedOutRetryable, vec![], failed(true, true)),
        (codec::End::TimedOut, vec![], failed(false, true)),
        (codec::End::Released, vec![], AttemptEnd::Released),
        (
            codec::End::Tail,
            vec![range],
            AttemptEnd::Tail(NodeRef::New(4)),
        ),
    ] {
        let got = completion(finish(end, ranges), &Definitions::default()).expect("well formed");
        assert_eq!((got.end, got.digest), (expected, 5), "{end:?}");
    }
    let two = finish(codec::End::Tail, vec![range, range]);
    assert!(completion(two, &Definitions::default()).is_err());
}

#[test]
fn ids_are_read_strictly() {
    let id = run_id("1f-0123456789abcdef").expect("an id");
    assert_eq!(id.to_string(), "1f-0123456789abcdef");
    for text in [
        "",
        "-",
        "1f",
        "1f-",
        "1f-0",
        "zz-0123456789abcdef",
        "1f-0123456789ABCDEF",
    ] {
        assert_eq!(run_id(text).expect_err(text).code, Code::InvalidRequest);
    }
    let session = SessionId(0xab);
    assert_eq!(session_id(&session_text(session)), Some(session));
    for text in ["", "ab", "+00000000000000a", "zz00000000000000"] {
        assert_eq!(session_id(text), None, "{text}");
    }
}

#[test]
fn a_long_message_still_fits() {
    let rejection = Rejection::new(Code::GraphTooLarge, "ü".repeat(100_000));
    let document = no(&rejection);
    assert!(document.len() < usize::from(u16::MAX));
    let read: json::No = json::parse(&document, "no").expect("JSON");
    assert_eq!(
        (read.code.as_str(), read.retryable),
        ("GRAPH_TOO_LARGE", false)
    );
}
