//! A message becomes the arguments of a run, and something to recognise its repetition by. Pure; no I/O.
//!
//! JSON passes through as it came, byte for byte, so that numbers keep their digits; only a route that picks parts of a message builds new
//! JSON. What cannot be used says why, with a stable code, and becomes a dead letter.

use std::sync::Arc;

use bytes::{BufMut as _, Bytes, BytesMut};
use dagorama_bridge_api::{Message, MessageIdentity, Unusable};
use serde_json::Value;
use xxhash_rust::xxh3::Xxh3;

use crate::broker::command::{Identity, SubmissionKey};
use crate::broker::types::{Body, Codec, KeyHash, Payload};
use crate::config::{ArgumentPaths, Dedup, Expression, Route, RouteCodec, Step, Term};

/// What the arguments of stored calls use for references; a message may not say it.
const RESERVED: &str = "$dagorama";

/// A message that can be used.
#[derive(Debug)]
pub(super) struct Usable {
    /// The arguments, in memory.
    pub(super) arguments: Payload,
    /// How the source recognises it.
    pub(super) identity: Identity,
    /// How the route recognises it besides.
    pub(super) key: Option<SubmissionKey>,
}

/// Reads a message as its route says. `limit` is the largest payload in bytes.
pub(super) fn read(route: &Route, message: &Message, limit: usize) -> Result<Usable, Unusable> {
    if let Some(unusable) = &message.unusable {
        return Err(unusable.clone());
    }
    let body = Decoded::new(route, message)?;
    let (codec, bytes) = match (&route.arguments, route.codec) {
        (None, RouteCodec::Raw) => (Codec::Raw, message.body.clone().unwrap_or_default()),
        (None, RouteCodec::Json) => (Codec::Json, wrapped(body.text)),
        (Some(paths), _) => (Codec::Json, picked(paths, message, &body)?),
    };
    if bytes.len() > limit {
        return Err(unusable(
            "PAYLOAD_TOO_LARGE",
            format!(
                "the arguments have {} bytes, more than max_payload ({limit})",
                bytes.len()
            ),
        ));
    }
    let identity = identity(&route.name, &message.identity);
    let key = match &route.dedup {
        None | Some(Dedup::Offset | Dedup::MessageId) => None,
        Some(Dedup::Hash) => Some(hashed(
            &route.name,
            "hash",
            message.body.as_deref().unwrap_or_default(),
        )),
        Some(Dedup::Path(path)) => {
            let found = evaluate(path, message, &body)?;
            Some(hashed(&route.name, "path", text_of(&found).as_bytes()))
        }
    };
    // Without a place in the source the key is the message's identity; with one it comes on top, because a key is forgotten one day and
    // a position never.
    let (identity, key) = match (identity, key) {
        (identity @ Identity::Position { .. }, Some(hash)) => {
            (identity, Some(SubmissionKey { hash, content: 1 }))
        }
        (_, Some(hash)) => (Identity::Key(hash), None),
        (identity, None) => (identity, None),
    };
    Ok(Usable {
        arguments: Payload {
            codec,
            body: Body::Inline(bytes),
        },
        identity,
        key,
    })
}

/// How the source recognises a message, in the broker's words.
pub(super) fn identity(route: &str, identity: &MessageIdentity) -> Identity {
    match identity {
        MessageIdentity::Position {
            partition,
            position,
            next,
        } => Identity::Position {
            partition: Arc::clone(partition),
            position: *position,
            next: *next,
        },
        MessageIdentity::Key(key) => Identity::Key(hashed(route, "id", key)),
        MessageIdentity::None => Identity::None,
    }
}

/// A key within its scope: the same id on two routes is two keys.
pub(super) fn hashed(scope: &str, kind: &str, key: &[u8]) -> KeyHash {
    let mut hasher = Xxh3::new();
    for part in [scope.as_bytes(), kind.as_bytes(), key] {
        hasher.update(&(part.len() as u64).to_le_bytes());
        hasher.update(part);
    }
    KeyHash(hasher.digest128())
}

/// The body as text, decoded only if a path asks for it.
struct Decoded<'a> {
    /// Empty for raw bytes.
    text: &'a str,
    value: Option<Value>,
}

impl<'a> Decoded<'a> {
    fn new(route: &Route, message: &'a Message) -> Result<Self, Unusable> {
        if route.codec == RouteCodec::Raw {
            return Ok(Self {
                text: "",
                value: None,
            });
        }
        let no_json =
            |why: String| unusable("BODY_NOT_JSON", format!("the body is no JSON value: {why}"));
        let text = match &message.body {
            None => "null",
            Some(bytes) => std::str::from_utf8(bytes).map_err(|e| no_json(e.to_string()))?,
        };
        let reads = |path: &Expression| path.reads_body();
        let picks = match &route.arguments {
            None => false,
            Some(ArgumentPaths::Named(paths)) => paths.values().any(reads),
            Some(ArgumentPaths::Positional(paths)) => paths.iter().any(reads),
        };
        let picks = picks || matches!(&route.dedup, Some(Dedup::Path(path)) if path.reads_body());
        // An escape could spell the reserved word too; then look properly.
        let suspicious = text.contains(RESERVED) || text.contains("\\u");
        let value = if picks || suspicious {
            let value: Value = serde_json::from_str(text).map_err(|e| no_json(e.to_string()))?;
            if suspicious && is_reserved(&value) {
                return Err(unusable(
                    "BODY_RESERVED",
                    format!(
                        "the body has an object with the key {RESERVED}, which stands for references: rename it, or use codec = \"raw\""
                    ),
                ));
            }
            Some(value)
        } else {
            check_json(text).map_err(no_json)?;
            None
        };
        Ok(Self { text, value })
    }
}

/// Whether a text is one JSON value.
pub(super) fn check_json(text: &str) -> Result<(), String> {
    serde_json::from_str::<serde::de::IgnoredAny>(text)
        .map(|_| ())
        .map_err(|e| e.to_string())
}

fn is_reserved(value: &Value) -> bool {
    // As deep as serde_json reads, which is 128.
    match value {
        Value::Object(map) => map
            .iter()
            .any(|(key, value)| key == RESERVED || is_reserved(value)),
        Value::Array(items) => items.iter().any(is_reserved),
        _ => false,
    }
}

/// The whole message as the one positional argument.
fn wrapped(text: &str) -> Bytes {
    let (before, after) = ("{\"args\":[", "],\"kwargs\":{}}");
    let mut bytes = BytesMut::with_capacity(before.len() + text.len() + after.len());
    bytes.put_slice(before.as_bytes());
    bytes.put_slice(text.as_bytes());
    bytes.put_slice(after.as_bytes());
    bytes.freeze()
}

fn picked(paths: &ArgumentPaths, message: &Message, body: &Decoded<'_>) -> Result<Bytes, Unusable> {
    let find = |path: &Expression| evaluate(path, message, body);
    let value = match paths {
        ArgumentPaths::Positional(paths) => {
            let found: Result<Vec<Value>, Unusable> = paths.iter().map(find).collect();
            serde_json::json!({"args": found?, "kwargs": {}})
        }
        ArgumentPaths::Named(paths) => {
            let found: Result<serde_json::Map<String, Value>, Unusable> = paths
                .iter()
                .map(|(name, path)| Ok((name.clone(), find(path)?)))
                .collect();
            serde_json::json!({"args": [], "kwargs": found?})
        }
    };
    Ok(Bytes::from(value.to_string()))
}

fn evaluate(path: &Expression, message: &Message, body: &Decoded<'_>) -> Result<Value, Unusable> {
    let find = |term: &Term| {
        look(term, message, body).ok_or_else(|| {
            let shown = Expression {
                terms: vec![term.clone()],
            };
            unusable("ARGUMENT_MISSING", format!("the message has no {shown}"))
        })
    };
    match &path.terms[..] {
        [only] => find(only),
        terms => {
            let mut joined = String::new();
            for term in terms {
                joined.push_str(&text_of(&find(term)?));
            }
            Ok(Value::String(joined))
        }
    }
}

fn look(term: &Term, message: &Message, body: &Decoded<'_>) -> Option<Value> {
    let text = |bytes: &[u8]| Value::String(String::from_utf8_lossy(bytes).into_owned());
    match term {
        Term::Text(constant) => Some(Value::String(constant.clone())),
        Term::Key => message.key.as_deref().map(text),
        Term::Header(name) => {
            let found = message.headers.iter().find(|(header, _)| header == name);
            found.map(|(_, value)| text(value))
        }
        Term::Coordinate(name) => message
            .coordinates
            .get(name)
            .map(|c| Value::String(c.clone())),
        Term::Body(steps) => {
            let mut at = body.value.as_ref()?;
            for step in steps {
                at = match step {
                    Step::Field(name) => at.as_object()?.get(name)?,
                    Step::Index(index) => at.as_array()?.get(*index)?,
                };
            }
            Some(at.clone())
        }
    }
}

fn text_of(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

fn unusable(code: &'static str, reason: String) -> Unusable {
    Unusable { code, reason }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;

    fn route(extra: &str) -> Route {
        let text = format!(
            "[connection.f]\ntype = \"file\"\n[[route]]\nname = \"r\"\naction = \"a\"\nfrom = {{ connection = \"f\", path = \"x\" }}\n{extra}\n"
        );
        Config::parse("t", &text, [], &[]).unwrap().route.remove(0)
    }

    fn message(body: &str) -> Message {
        Message {
            body: Some(body.to_owned().into()),
            key: Some("k".into()),
            headers: vec![("h".into(), "v".into())],
            identity: MessageIdentity::Position {
                partition: "p".into(),
                position: 5,
                next: 9,
            },
            coordinates: [("path".into(), "in".into()), ("offset".into(), "5".into())].into(),
            unusable: None,
        }
    }

    fn arguments(route: &Route, message: &Message) -> Result<String, &'static str> {
        let usable = read(route, message, 1000).map_err(|u| u.code)?;
        let Body::Inline(bytes) = usable.arguments.body else {
            panic!("stored")
        };
        Ok(format!(
            "{:?} {}",
            usable.arguments.codec,
            String::from_utf8(bytes.to_vec()).unwrap()
        ))
    }

    #[test]
    fn messages_become_arguments() {
        for (extra, body, wanted) in [
            // The bytes pass as they came.
            (
                "",
                "{\"a\": 1.00, \"b\":12345678901234567890123}",
                "Json {\"args\":[{\"a\": 1.00, \"b\":12345678901234567890123}],\"kwargs\":{}}",
            ),
            ("", " null ", "Json {\"args\":[ null ],\"kwargs\":{}}"),
            (
                "",
                "\"\\u0041\"",
                "Json {\"args\":[\"\\u0041\"],\"kwargs\":{}}",
            ),
            ("codec = \"raw\"", "no json", "Raw no json"),
            (
                "arguments = { u = \"body.a[1].b\", w = \"body\" }",
                "{\"a\":[0,{\"b\":7}]}",
                "Json {\"args\":[],\"kwargs\":{\"u\":7,\"w\":{\"a\":[0,{\"b\":7}]}}}",
            ),
            (
                "arguments = [\"body.a\", \"key\", \"header.h\", \"'c'\"]",
                "{\"a\":null}",
                "Json {\"args\":[null,\"k\",\"v\",\"c\"],\"kwargs\":{}}",
            ),
            (
                "arguments = [\"path + ':' + offset + body.n\"]",
                "{\"n\":1}",
                "Json {\"args\":[\"in:51\"],\"kwargs\":{}}",
            ),
            (
                "codec = \"raw\"\narguments = [\"key\"]",
                "no json",
                "Json {\"args\":[\"k\"],\"kwargs\":{}}",
            ),
        ] {
            assert_eq!(
                arguments(&route(extra), &message(body)).as_deref(),
                Ok(wanted),
                "{extra}"
            );
        }
        let tombstone = Message {
            body: None,
            ..message("")
        };
        assert_eq!(
            arguments(&route(""), &tombstone).unwrap(),
            "Json {\"args\":[null],\"kwargs\":{}}"
        );
    }

    #[test]
    fn what_cannot_be_used_says_why() {
        for (extra, body, code) in [
            ("", "", "BODY_NOT_JSON"),
            ("", "{", "BODY_NOT_JSON"),
            ("", "1 2", "BODY_NOT_JSON"),
            ("", "NaN", "BODY_NOT_JSON"),
            ("", "{\"$dagorama\": 0}", "BODY_RESERVED"),
            ("", "[{\"x\":[{\"\\u0024dagorama\": 0}]}]", "BODY_RESERVED"),
            ("arguments = [\"body.a\"]", "{\"b\":1}", "ARGUMENT_MISSING"),
            ("arguments = [\"body.a\"]", "[1]", "ARGUMENT_MISSING"),
            ("arguments = [\"body[1]\"]", "[1]", "ARGUMENT_MISSING"),
            ("arguments = [\"header.x\"]", "1", "ARGUMENT_MISSING"),
            ("dedup = \"body.id\"", "{}", "ARGUMENT_MISSING"),
        ] {
            assert_eq!(
                arguments(&route(extra), &message(body)).unwrap_err(),
                code,
                "{extra} {body}"
            );
        }
        let long = format!("\"{}\"", "x".repeat(2000));
        assert_eq!(
            arguments(&route(""), &message(&long)).unwrap_err(),
            "PAYLOAD_TOO_LARGE"
        );
        let invalid = Message {
            body: Some(Bytes::from_static(b"\"\xff\"")),
            ..message("")
        };
        assert_eq!(
            arguments(&route(""), &invalid).unwrap_err(),
            "BODY_NOT_JSON"
        );
        let mentioned = message("\"the word $dagorama in a text\"");
        assert!(
            arguments(&route(""), &mentioned).is_ok(),
            "only a key is reserved"
        );
    }

    #[test]
    fn repetitions_are_recognised_by_what_the_route_says() {
        let place = Identity::Position {
            partition: "p".into(),
            position: 5,
            next: 9,
        };
        let of = |extra: &str, message: &Message| read(&route(extra), message, 1000).unwrap();
        let plain = of("", &message("1"));
        assert_eq!((plain.identity, plain.key), (place.clone(), None));

        // A path or a hash comes on top of the place…
        let by_path = of("dedup = \"body.id\"", &message("{\"id\":7}"));
        assert_eq!(by_path.identity, place);
        let same = of("dedup = \"body.id\"", &message("{\"id\":7, \"other\":1}"));
        assert_eq!(same.key, by_path.key);
        assert_ne!(
            of("dedup = \"body.id\"", &message("{\"id\":8}")).key,
            by_path.key
        );
        assert!(of("dedup = \"hash\"", &message("1")).key.is_some());

        // …and takes its place where there is none.
        let nowhere = Message {
            identity: MessageIdentity::None,
            ..message("{\"id\":7}")
        };
        assert_eq!(of("", &nowhere).identity, Identity::None);
        let key = of("dedup = \"body.id\"", &nowhere);
        assert!(matches!(key.identity, Identity::Key(_)) && key.key.is_none());

        // Keys of two routes differ.
        assert_ne!(hashed("a", "id", b"bc"), hashed("ab", "id", b"c"));
        let id = MessageIdentity::Key("m".into());
        assert_ne!(identity("a", &id), identity("b", &id));
    }
}
