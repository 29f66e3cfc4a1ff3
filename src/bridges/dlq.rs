//! Dead letters, for people: list, show, replay, drop (the DLQ verb). A letter stays until it is replayed or dropped.

use bytes::Bytes;
use dagorama_bridge_api::{Message, MessageIdentity};
use serde_json::{Value, json};

use super::arguments;
use super::inbound::{by_name, submission};
use crate::broker::command::{Code, Command, Identity, Rejection, Reply};
use crate::broker::outcome::DeadLetterRecord;
use crate::broker::types::{Body, NameId};
use crate::config::Route;
use crate::engine::{Handle, Stopped};
use crate::storage::StorageError;

const LIMIT: usize = 100;
const MAX_LIMIT: usize = 10_000;

/// What is known to have dead letters.
pub(super) struct Names<'a> {
    pub(super) routes: &'a [Route],
    pub(super) outputs: Vec<&'a str>,
    pub(super) max_payload: usize,
}

/// Answers a request of the DLQ verb.
pub(super) async fn answer(
    handle: &Handle,
    names: &Names<'_>,
    request: &Value,
) -> Result<Value, Rejection> {
    let text = |field: &str| request.get(field).and_then(Value::as_str);
    let seq = || {
        request.get("seq").and_then(Value::as_u64).ok_or_else(|| {
            Rejection::new(
                Code::InvalidRequest,
                "seq is missing: name the number that `dagorama dlq list` shows",
            )
        })
    };
    let route = || {
        text("route").ok_or_else(|| {
            Rejection::new(
                Code::InvalidRequest,
                "route is missing: name a route or an output",
            )
        })
    };
    match text("do") {
        Some("list") => {
            let limit = request
                .get("limit")
                .and_then(Value::as_u64)
                .map_or(LIMIT, |n| usize::try_from(n).unwrap_or(MAX_LIMIT));
            list(handle, names, text("route"), limit.clamp(1, MAX_LIMIT)).await
        }
        Some("show") => show(handle, names, route()?, seq()?).await,
        Some("replay") => replay(handle, names, route()?, seq()?).await,
        Some("drop") => drop_letter(handle, names, route()?, seq()?).await,
        other => Err(Rejection::new(
            Code::InvalidRequest,
            format!(
                "do is {:?}: one of list, show, replay, drop",
                other.unwrap_or("missing")
            ),
        )),
    }
}

/// The number of a name; `None` when it is configured but nothing of it was ever stored.
fn find(handle: &Handle, names: &Names<'_>, name: &str) -> Result<Option<NameId>, Rejection> {
    let known =
        names.routes.iter().any(|route| route.name == name) || names.outputs.contains(&name);
    match handle.name_id(name) {
        None if !known => Err(Rejection::new(
            Code::UnknownName,
            format!("there is no route or output {name:?}: see `dagorama dlq list`"),
        )),
        id => Ok(id),
    }
}

async fn list(
    handle: &Handle,
    names: &Names<'_>,
    only: Option<&str>,
    limit: usize,
) -> Result<Value, Rejection> {
    let all: Vec<&str> = match only {
        Some(name) => vec![name],
        None => names
            .routes
            .iter()
            .map(|route| route.name.as_str())
            .chain(names.outputs.iter().copied())
            .collect(),
    };
    let mut letters = Vec::new();
    for name in all {
        let Some(id) = find(handle, names, name)? else {
            continue;
        };
        let room = limit - letters.len();
        if room == 0 {
            break;
        }
        let found = handle
            .read(move |reader| reader.dead_letters(id, 0, room))
            .await
            .map_err(|e| unreadable(&e))?;
        letters.extend(found.iter().map(|(seq, letter)| shown(name, *seq, letter)));
    }
    Ok(json!({ "letters": letters }))
}

async fn show(
    handle: &Handle,
    names: &Names<'_>,
    route: &str,
    seq: u64,
) -> Result<Value, Rejection> {
    let (letter, body) = read(handle, names, route, seq).await?;
    let mut answer = shown(route, seq, &letter);
    answer["body"] = match std::str::from_utf8(&body) {
        Ok(text) => json!(text),
        Err(_) => json!({ "hex": hex(&body) }),
    };
    Ok(answer)
}

/// Reads the message again, as the route says now, and starts its run; the letter goes in the same commit.
async fn replay(
    handle: &Handle,
    names: &Names<'_>,
    name: &str,
    seq: u64,
) -> Result<Value, Rejection> {
    let (letter, body) = read(handle, names, name, seq).await?;
    let Some(route) = names.routes.iter().find(|route| route.name == name) else {
        return Err(Rejection::new(
            Code::NotAvailable,
            format!(
                "{name} is no route of this configuration, and only messages of routes can be replayed: `dagorama dlq show {name} {seq}` has the bytes"
            ),
        ));
    };
    if letter.coordinates.contains_key("cut") {
        return Err(Rejection::new(
            Code::PayloadTooLarge,
            format!(
                "letter {seq} keeps only the beginning of a message that was too long: send it again in another way, then drop the letter"
            ),
        ));
    }
    let message = message_of(&letter, body);
    let usable = arguments::read(route, &message, names.max_payload).map_err(|unusable| {
        let code = Code::ALL
            .iter()
            .find(|code| code.as_str() == unusable.code)
            .copied();
        Rejection::new(
            code.unwrap_or(Code::InvalidRequest),
            format!(
                "letter {seq} still cannot be used ({}): {}",
                unusable.code, unusable.reason
            ),
        )
    })?;
    let arguments = handle
        .persist(usable.arguments)
        .await
        .map_err(|e| unreadable(&e))?;
    // The position or key was consumed when it died. A key of the route is taken now, so that a repetition is recognised later.
    let submission = submission(
        by_name(&route.action),
        arguments,
        name,
        (Identity::DeadLetter { seq }, usable.key),
    );
    match handle
        .intake(Command::Submit(vec![submission]))
        .await
        .map_err(|s| stopping(&s))?
    {
        Reply::Submitted(results) => match results.into_iter().next() {
            Some(Ok(submitted)) => {
                Ok(json!({ "run": submitted.run.to_string(), "existing": submitted.existing }))
            }
            Some(Err(no)) => Err(no),
            None => Err(Rejection::new(
                Code::InvalidRequest,
                "the broker gave no answer",
            )),
        },
        _ => Err(Rejection::new(
            Code::InvalidRequest,
            "the broker answered something else",
        )),
    }
}

async fn drop_letter(
    handle: &Handle,
    names: &Names<'_>,
    route: &str,
    seq: u64,
) -> Result<Value, Rejection> {
    find(handle, names, route)?;
    let command = Command::DropDeadLetter {
        route: route.into(),
        seq,
    };
    match handle.control(command).await.map_err(|s| stopping(&s))? {
        Reply::Done(results) => results
            .into_iter()
            .next()
            .unwrap_or(Ok(()))
            .map(|()| json!({})),
        _ => Err(Rejection::new(
            Code::InvalidRequest,
            "the broker answered something else",
        )),
    }
}

async fn read(
    handle: &Handle,
    names: &Names<'_>,
    route: &str,
    seq: u64,
) -> Result<(DeadLetterRecord, Bytes), Rejection> {
    let unknown = || {
        Rejection::new(
            Code::UnknownName,
            format!("{route} has no dead letter {seq}: see `dagorama dlq list --route {route}`"),
        )
    };
    let id = find(handle, names, route)?.ok_or_else(unknown)?;
    let found = handle.read(move |reader| {
        let first = reader.dead_letters(id, seq, 1)?.into_iter().next();
        let Some((_, letter)) = first.filter(|(found, _)| *found == seq) else {
            return Ok(None);
        };
        let body = match &letter.body.body {
            Body::Inline(bytes) => bytes.clone(),
            Body::Stored(at) => reader.payload(*at)?,
        };
        Ok(Some((letter, body)))
    });
    found.await.map_err(|e| unreadable(&e))?.ok_or_else(unknown)
}

/// The message as it was, as far as a letter keeps it.
fn message_of(letter: &DeadLetterRecord, body: Bytes) -> Message {
    let headers = letter.coordinates.iter().filter_map(|(name, value)| {
        Some((
            name.strip_prefix("header.")?.to_owned(),
            Bytes::from(value.clone()),
        ))
    });
    Message {
        body: Some(body),
        key: letter
            .coordinates
            .get("key")
            .map(|key| Bytes::from(key.clone())),
        headers: headers.collect(),
        identity: MessageIdentity::None,
        coordinates: letter.coordinates.clone(),
        unusable: None,
    }
}

fn shown(route: &str, seq: u64, letter: &DeadLetterRecord) -> Value {
    json!({
        "route": route,
        "seq": seq,
        "code": &*letter.code,
        "reason": &*letter.reason,
        "attempts": letter.attempts,
        "at_ms": letter.at.0,
        "coordinates": letter.coordinates,
        "body_bytes": letter.body.body.len(),
    })
}

fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    let mut text = String::with_capacity(bytes.len() * 2);
    for byte in bytes {
        let _ = write!(text, "{byte:02x}");
    }
    text
}

fn unreadable(error: &StorageError) -> Rejection {
    let code = match error {
        StorageError::Corrupt { .. } => Code::StoreCorrupt,
        _ => Code::Stopping,
    };
    Rejection::new(code, error.to_string())
}

fn stopping(stopped: &Stopped) -> Rejection {
    Rejection::new(Code::Stopping, stopped.to_string())
}
