//! The bytes of a delivery: the value (or error) of a node, with references filled in, as one JSON value.
//!
//! Blocking reads of committed state; no engine involved. What cannot leave says why and becomes a dead letter of its output.

use dagorama_bridge_api::Unusable;

use bytes::Bytes;

use super::arguments::check_json;
use crate::broker::types::{
    Body, BodyEnd, Codec, InputRange, NodeIndex, NodeKey, NodeRecord, Payload, Progress, RunSeq,
};
use crate::config::OutputCodec;
use crate::storage::{Outcome, Read, StorageError};

/// How deep structures of promises are followed.
const MAX_DEPTH: u32 = 64;

/// What a node came to.
#[derive(Debug)]
pub(super) struct Found {
    /// Its own record, for headers.
    pub(super) record: NodeRecord,
    /// The bytes and their content type, or why they cannot leave.
    pub(super) body: Result<(Bytes, &'static str), Unusable>,
    /// What is kept with a dead letter.
    pub(super) kept: Option<Payload>,
}

/// Reads what is to be delivered of a node. `None`: there is no such node any more.
pub(super) fn find(
    reader: &dyn Read,
    node: NodeKey,
    codec: OutputCodec,
    limit: usize,
) -> Result<Option<Found>, StorageError> {
    let Some(record) = reader.node(node)? else {
        return Ok(None);
    };
    let mut maker = Maker {
        reader,
        run: node.run,
        codec,
        limit,
        out: Vec::new(),
        content_type: "application/json",
    };
    let (failed, outcome) = match settle(reader, node)? {
        Ok(found) => found,
        Err(unusable) => {
            return Ok(Some(Found {
                record,
                body: Err(unusable),
                kept: None,
            }));
        }
    };
    let Some(outcome) = outcome else {
        let body = if failed {
            Ok((CANCELLED, "application/json"))
        } else {
            Err(gone(node))
        };
        return Ok(Some(Found {
            record,
            body,
            kept: None,
        }));
    };
    let kept = matches!(outcome.payload.body, Body::Inline(_)).then(|| outcome.payload.clone());
    let made = if outcome.is_error {
        maker.error(&outcome)?
    } else {
        maker.value(&outcome, 0)?
    };
    let body = made.map(|()| {
        (
            Bytes::from(std::mem::take(&mut maker.out)),
            maker.content_type,
        )
    });
    Ok(Some(Found { record, body, kept }))
}

/// Of a node that failed because something it needed was cancelled.
const CANCELLED: Bytes = Bytes::from_static(
    br#"{"type":"dagorama.Cancelled","message":"the run was cancelled","traceback":""}"#,
);

type Made<T> = Result<Result<T, Unusable>, StorageError>;

/// Follows tail calls and blame to the node whose outcome counts; no recursion, a chain may be long.
fn settle(reader: &dyn Read, node: NodeKey) -> Made<(bool, Option<Outcome>)> {
    let mut at = node;
    for _ in 0..10_000_000u32 {
        let Some(record) = reader.node(at)? else {
            return Ok(Err(gone(at)));
        };
        let failed = matches!(record.progress, Progress::Failed | Progress::Skipped);
        let next = match (record.body, record.cause) {
            (BodyEnd::Tail(next), _) => next,
            (_, Some(cause)) if failed => cause,
            _ => {
                let ended = failed || record.progress == Progress::Succeeded;
                let outcome = if ended { reader.outcome(at)? } else { None };
                return Ok(Ok((record.progress != Progress::Succeeded, outcome)));
            }
        };
        at = NodeKey::new(at.run, next);
    }
    Ok(Err(unusable(
        "VALUE_TOO_DEEP",
        "the chain of tail calls does not end".to_owned(),
    )))
}

fn gone(node: NodeKey) -> Unusable {
    unusable(
        "VALUE_GONE",
        format!("node {node} has no value in the store"),
    )
}

fn unusable(code: &'static str, reason: String) -> Unusable {
    Unusable { code, reason }
}

struct Maker<'a> {
    reader: &'a dyn Read,
    run: RunSeq,
    codec: OutputCodec,
    limit: usize,
    out: Vec<u8>,
    content_type: &'static str,
}

impl Maker<'_> {
    fn bytes(&self, payload: &Payload) -> Made<Bytes> {
        let length = self.out.len() + payload.body.len();
        if length > self.limit {
            return Ok(Err(unusable(
                "PAYLOAD_TOO_LARGE",
                format!(
                    "the value has {length} bytes or more, over max_payload ({})",
                    self.limit
                ),
            )));
        }
        Ok(Ok(match &payload.body {
            Body::Inline(bytes) => bytes.clone(),
            Body::Stored(at) => self.reader.payload(*at)?,
        }))
    }

    fn value(&mut self, outcome: &Outcome, depth: u32) -> Made<()> {
        let codec = outcome.payload.codec;
        let raw = codec == Codec::Raw
            && self.codec == OutputCodec::Raw
            && depth == 0
            && outcome.references.is_empty();
        if codec != Codec::Json && !raw {
            let name = match codec {
                Codec::Json => "JSON",
                Codec::MessagePack => "MessagePack",
                Codec::Pickle => "a Python pickle",
                Codec::Raw => "raw bytes",
            };
            return Ok(Err(unusable(
                "CODEC_REFUSED",
                format!(
                    "the value is {name}, and this output takes JSON: return what JSON can hold without loss"
                ),
            )));
        }
        let bytes = match self.bytes(&outcome.payload)? {
            Ok(bytes) => bytes,
            Err(unusable) => return Ok(Err(unusable)),
        };
        if raw {
            self.content_type = "application/octet-stream";
            self.out.extend_from_slice(&bytes);
            return Ok(Ok(()));
        }
        let no_json = |why: String| {
            unusable(
                "BODY_NOT_JSON",
                format!("the value is marked as JSON and is none: {why}"),
            )
        };
        let text = match std::str::from_utf8(&bytes) {
            Ok(text) => text,
            Err(e) => return Ok(Err(no_json(e.to_string()))),
        };
        if let Err(why) = check_json(text) {
            return Ok(Err(no_json(why)));
        }
        if outcome.references.is_empty() {
            self.out.extend_from_slice(text.as_bytes());
            return Ok(Ok(()));
        }
        if depth >= MAX_DEPTH {
            return Ok(Err(unusable(
                "VALUE_TOO_DEEP",
                format!("structures of promises are nested more than {MAX_DEPTH} deep"),
            )));
        }
        self.filled(text, &outcome.references, depth)
    }

    /// Copies the text and puts the values of references in their places.
    fn filled(&mut self, text: &str, references: &[InputRange], depth: u32) -> Made<()> {
        let mut rest = text;
        while let Some(found) = next_reference(rest) {
            self.out.extend_from_slice(&rest.as_bytes()[..found.start]);
            rest = &rest[found.end..];
            let Some(node) = nth(references, found.number) else {
                return Ok(Err(unusable(
                    "VALUE_GONE",
                    format!(
                        "the value refers to its promise {}, which it does not have",
                        found.number
                    ),
                )));
            };
            let node = NodeKey::new(self.run, node);
            let outcome = match settle(self.reader, node)? {
                Ok((false, Some(outcome))) => outcome,
                Ok(_) => return Ok(Err(gone(node))),
                Err(unusable) => return Ok(Err(unusable)),
            };
            if let Err(unusable) = self.value(&outcome, depth + 1)? {
                return Ok(Err(unusable));
            }
        }
        self.out.extend_from_slice(rest.as_bytes());
        Ok(Ok(()))
    }

    /// An error as JSON, without the pickled exception.
    fn error(&mut self, outcome: &Outcome) -> Made<()> {
        let bytes = match self.bytes(&outcome.payload)? {
            Ok(bytes) => bytes,
            Err(unusable) => return Ok(Err(unusable)),
        };
        match serde_json::from_slice::<serde_json::Value>(&bytes) {
            Ok(mut error) => {
                if let Some(fields) = error.as_object_mut() {
                    fields.remove("pickle");
                }
                self.out.extend_from_slice(error.to_string().as_bytes());
                Ok(Ok(()))
            }
            Err(e) => Ok(Err(unusable(
                "BODY_NOT_JSON",
                format!("the error of the node is no JSON: {e}"),
            ))),
        }
    }
}

struct Reference {
    start: usize,
    end: usize,
    number: u64,
}

/// The first `{"$dagorama": number}` in valid JSON, outside strings.
fn next_reference(text: &str) -> Option<Reference> {
    let bytes = text.as_bytes();
    let mut at = 0;
    while at < bytes.len() {
        match bytes[at] {
            b'"' => at = string_end(bytes, at),
            b'{' => {
                if let Some((end, number)) = reference_at(&text[at..]) {
                    return Some(Reference {
                        start: at,
                        end: at + end,
                        number,
                    });
                }
                at += 1;
            }
            _ => at += 1,
        }
    }
    None
}

fn string_end(bytes: &[u8], start: usize) -> usize {
    let mut at = start + 1;
    while at < bytes.len() {
        match bytes[at] {
            b'\\' => at += 2,
            b'"' => return at + 1,
            _ => at += 1,
        }
    }
    at
}

/// Length and number, if a reference begins here.
fn reference_at(text: &str) -> Option<(usize, u64)> {
    let space = |text: &'_ str| text.len() - text.trim_start_matches([' ', '\t', '\n', '\r']).len();
    let mut at = 0;
    for part in ["{", "\"$dagorama\"", ":"] {
        at += space(&text[at..]);
        text[at..].starts_with(part).then_some(())?;
        at += part.len();
    }
    at += space(&text[at..]);
    let digits = text[at..].bytes().take_while(u8::is_ascii_digit).count();
    let number = text[at..at + digits].parse().ok()?;
    at += digits;
    at += space(&text[at..]);
    text[at..].starts_with('}').then_some((at + 1, number))
}

fn nth(references: &[InputRange], mut number: u64) -> Option<NodeIndex> {
    for range in references {
        if number < u64::from(range.count) {
            return Some(NodeIndex(range.first.0 + u32::try_from(number).ok()?));
        }
        number -= u64::from(range.count);
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::broker::types::InputUse;

    #[test]
    fn references_are_found_outside_strings_only() {
        for (text, wanted) in [
            ("{\"$dagorama\": 3}", Some((0, 16, 3))),
            ("[1, { \"$dagorama\" :0 } ]", Some((4, 22, 0))),
            (
                "[\"{\\\"$dagorama\\\": 3}\", {\"$dagorama\":12}]",
                Some((23, 39, 12)),
            ),
            ("[\"\\\\\", {\"$dagorama\":1}]", Some((7, 22, 1))),
            ("\"{\\\"$dagorama\\\": 3}\"", None),
            ("{\"a\": {\"b\": 1}}", None),
            ("{\"$dagorama\": \"3\"}", None),
            ("{\"$dagorama\": 3, \"x\": 1}", None),
            ("{\"$dagorama\": -1}", None),
            ("{\"$dagorama\": 99999999999999999999}", None),
            ("", None),
        ] {
            let found = next_reference(text).map(|r| (r.start, r.end, r.number));
            assert_eq!(found, wanted, "{text}");
        }
    }

    #[test]
    fn numbers_count_through_ranges() {
        let range = |first, count| InputRange {
            first: NodeIndex(first),
            count,
            mode: InputUse::Value,
        };
        let ranges = [range(5, 2), range(1, 1)];
        let found: Vec<_> = (0..4).map(|n| nth(&ranges, n).map(|n| n.0)).collect();
        assert_eq!(found, [Some(5), Some(6), Some(1), None]);
    }
}
