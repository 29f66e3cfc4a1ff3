//! The commands about runs: start, wait, look, stop, resume.

use std::collections::BTreeMap;
use std::process::ExitCode;
use std::time::Duration;

use serde_json::{Value, json};

use super::{Failed, Outcomes, connect, remark, run_id, say, text};
use crate::broker::types::{Codec, NodeState, RunId, Spec};
use crate::cli::{Connection, Submit};
use crate::client::{self, Client, Data, Outcome, Waited};

/// `submit`.
pub async fn submit(options: Submit) -> Outcomes {
    let arguments: Value = serde_json::from_str(&options.arguments)
        .map_err(|error| Failed::new("INVALID_REQUEST", format!("the arguments are no JSON ({error}): write a list like '[1, \"two\"]' or an object of keyword arguments")))?;
    let call = match arguments {
        Value::Array(list) => json!({"args": list, "kwargs": {}}),
        Value::Object(named) => json!({"args": [], "kwargs": named}),
        other => {
            return Err(Failed::new(
                "INVALID_REQUEST",
                format!(
                    "the arguments are {other}, but a call takes a list or an object: write '[{other}]'"
                ),
            ));
        }
    };
    let mut tags = BTreeMap::new();
    for tag in &options.tags {
        let (name, value) = tag.split_once('=').ok_or_else(|| {
            Failed::new(
                "INVALID_REQUEST",
                format!("--tag {tag:?} has no value: write NAME=VALUE"),
            )
        })?;
        tags.insert(name.to_owned(), value.to_owned());
    }
    let spec = std::sync::Arc::new(Spec {
        by_name: true,
        ..(*client::spec(&options.action)).clone()
    });
    let client = connect(&options.connection).await?;
    let run = client
        .submit(client::Submit {
            key: options.key.clone(),
            tags,
            ..client::Submit::call(&spec, Data::json(&call))
        })
        .await?;
    if options.wait {
        return wait_and_print(&client, run, None, options.connection.json).await;
    }
    say(if options.connection.json {
        json!({"run": run.to_string()}).to_string()
    } else {
        run.to_string()
    });
    Ok(ExitCode::SUCCESS)
}

/// `result`.
pub async fn result(connection: &Connection, run: &str, timeout: Option<Duration>) -> Outcomes {
    let run = run_id(run)?;
    let client = connect(connection).await?;
    wait_and_print(&client, run, timeout, connection.json).await
}

async fn wait_and_print(
    client: &Client,
    run: RunId,
    timeout: Option<Duration>,
    as_json: bool,
) -> Outcomes {
    // The first two seconds without a word; then say once what may be missing.
    let first = timeout.map_or(Duration::from_secs(2), |limit| {
        limit.min(Duration::from_secs(2))
    });
    let mut waited = client.wait(run, Some(first)).await?;
    if let Waited::Running { hint, .. } = &waited {
        if !hint.is_empty() {
            remark(format_args!("dagorama: still waiting: {hint}"));
        }
        let rest = timeout.map(|limit| limit.saturating_sub(first));
        if rest.is_none_or(|rest| !rest.is_zero()) {
            waited = client.wait(run, rest).await?;
        }
    }
    match waited {
        Waited::Running { state, .. } => Err(Failed::new(
            "WAIT_TIMED_OUT",
            format!(
                "run {run} has not ended yet, its root is {}: `dagorama explain {run}` says why",
                state.as_str()
            ),
        )),
        Waited::Ended(outcome) => print_outcome(client, run, &outcome, as_json).await,
    }
}

async fn print_outcome(client: &Client, run: RunId, outcome: &Outcome, as_json: bool) -> Outcomes {
    if outcome.is_success() {
        let value = match value(client, run, outcome).await {
            Ok(value) => value,
            Err(note) if as_json => json!({"note": note}),
            Err(note) => Value::String(note),
        };
        say(if as_json {
            json!({"run": run.to_string(), "state": "succeeded", "value": value}).to_string()
        } else {
            value.to_string()
        });
        return Ok(ExitCode::SUCCESS);
    }
    // A cancelled run may have a root that failed or was skipped: what people did to the run says more.
    let shown = client.show(run, false).await.unwrap_or_default();
    let cancelled = outcome.state == NodeState::Cancelled || shown["state"] == "cancelled";
    Err(if cancelled {
        was_cancelled(run, &shown, as_json)
    } else {
        has_failed(run, outcome, as_json)
    })
}

fn was_cancelled(run: RunId, shown: &Value, as_json: bool) -> Failed {
    let reason = shown["cancel_reason"].as_str().unwrap_or_default();
    let message = if reason.is_empty() {
        format!("run {run} was cancelled")
    } else {
        format!("run {run} was cancelled: {reason}")
    };
    if as_json {
        say(
            json!({"run": run.to_string(), "state": "cancelled", "error": null, "cancel_reason": reason, "code": "RUN_CANCELLED", "message": message}),
        );
    }
    Failed {
        answered: as_json,
        ..Failed::new("RUN_CANCELLED", message)
    }
}

fn has_failed(run: RunId, outcome: &Outcome, as_json: bool) -> Failed {
    let error: Value = serde_json::from_slice(&outcome.data.bytes).unwrap_or(Value::Null);
    let what: Vec<&str> = ["type", "message"]
        .iter()
        .filter_map(|field| error[field].as_str().filter(|text| !text.is_empty()))
        .collect();
    let message = if what.is_empty() {
        format!("run {run} failed")
    } else {
        format!("run {run} failed: {}", what.join(": "))
    };
    if as_json {
        say(
            json!({"run": run.to_string(), "state": "failed", "error": {"type": error["type"], "message": error["message"], "traceback": error["traceback"]}, "code": "RUN_FAILED", "message": message}),
        );
    } else if let Some(traceback) = error["traceback"].as_str().filter(|text| !text.is_empty()) {
        remark(traceback.trim_end());
    }
    Failed {
        answered: as_json,
        ..Failed::new("RUN_FAILED", message)
    }
}

/// The value as JSON, its references filled in; or a note why it cannot be shown.
async fn value(client: &Client, run: RunId, outcome: &Outcome) -> Result<Value, String> {
    match outcome.data.codec {
        Codec::Json => {
            let mut value: Value = serde_json::from_slice(&outcome.data.bytes)
                .map_err(|error| format!("unreadable JSON: {error}"))?;
            if !outcome.references.is_empty() {
                let mut parts = Vec::new();
                for node in &outcome.references {
                    let part = client
                        .fetch(run, *node, 1)
                        .await
                        .map_err(|error| error.to_string())?;
                    let part = part.first().ok_or("a reference that leads nowhere")?;
                    parts.push(Box::pin(self::value(client, run, part)).await?);
                }
                fill(&mut value, &parts);
            }
            Ok(value)
        }
        Codec::Raw => Ok(json!(String::from_utf8_lossy(&outcome.data.bytes))),
        Codec::Pickle => Err(format!(
            "a Python pickle of {} bytes: read it with Client().run(\"{run}\").result()",
            outcome.data.bytes.len()
        )),
        Codec::MessagePack => Err(format!(
            "MessagePack of {} bytes: read it with Client().run(\"{run}\").result()",
            outcome.data.bytes.len()
        )),
    }
}

fn fill(value: &mut Value, parts: &[Value]) {
    match value {
        Value::Object(map) if map.len() == 1 && map.contains_key("$dagorama") => {
            let at = map["$dagorama"]
                .as_u64()
                .and_then(|at| usize::try_from(at).ok());
            *value = at
                .and_then(|at| parts.get(at))
                .cloned()
                .unwrap_or(Value::Null);
        }
        Value::Object(map) => map.values_mut().for_each(|inner| fill(inner, parts)),
        Value::Array(list) => list.iter_mut().for_each(|inner| fill(inner, parts)),
        _ => {}
    }
}

/// `runs`.
pub async fn runs(
    connection: &Connection,
    state: Option<&str>,
    tag: Option<&str>,
    limit: usize,
) -> Outcomes {
    let answer = connect(connection).await?.runs(state, tag, limit).await?;
    if connection.json {
        say(&answer);
        return Ok(ExitCode::SUCCESS);
    }
    let runs = answer["runs"].as_array().cloned().unwrap_or_default();
    if runs.is_empty() {
        say("no runs");
    }
    for run in runs {
        say(run_line(&run));
    }
    Ok(ExitCode::SUCCESS)
}

fn run_line(run: &Value) -> String {
    let counts: Vec<String> = run["counts"]
        .as_object()
        .into_iter()
        .flatten()
        .filter(|(_, n)| n.as_u64() != Some(0))
        .map(|(state, n)| format!("{n} {state}"))
        .collect();
    // A list counts only the nodes of runs that are open.
    let counts = match (counts.is_empty(), run["n_nodes"].as_u64()) {
        (true, Some(1)) => "1 node".to_owned(),
        (true, Some(n)) => format!("{n} nodes"),
        _ => counts.join(", "),
    };
    let line = format!(
        "{}  {:<9}  {}  {}  {counts}",
        text(&run["run"]),
        text(&run["state"]),
        date(&run["created"]),
        text(&run["action"]),
    );
    line.trim_end().to_owned()
}

/// A time of the calendar, in seconds of UTC.
fn date(ms: &Value) -> String {
    ms.as_u64()
        .and_then(|ms| std::time::UNIX_EPOCH.checked_add(Duration::from_millis(ms)))
        .map_or_else(String::new, |time| {
            humantime::format_rfc3339_seconds(time).to_string()
        })
}

/// `show`.
pub async fn show(connection: &Connection, run: &str, events: bool) -> Outcomes {
    let run = run_id(run)?;
    let client = connect(connection).await?;
    let shown = client.show(run, true).await?;
    let history = if events {
        client.events(run, 0, 10_000).await?
    } else {
        Value::Null
    };
    if connection.json {
        let mut all = shown;
        if events {
            all["events"] = history["events"].clone();
        }
        say(&all);
        return Ok(ExitCode::SUCCESS);
    }
    say(run_line(&shown));
    if shown["state"] == "cancelled" {
        let reason = shown["cancel_reason"].as_str().unwrap_or_default();
        say(if reason.is_empty() {
            "  cancelled without a reason".to_owned()
        } else {
            format!("  cancelled: {reason}")
        });
    }
    for node in shown["nodes"].as_array().into_iter().flatten() {
        let parent = node["parent"]
            .as_u64()
            .map_or_else(String::new, |parent| format!(", child of {parent}"));
        let cause = node["cause"]
            .as_u64()
            .map_or_else(String::new, |cause| format!(", because of {cause}"));
        say(format!(
            "  {:>6}  {:<9}  {}  attempt {}{parent}{cause}",
            text(&node["node"]),
            text(&node["state"]),
            text(&node["action"]),
            text(&node["attempt"])
        ));
    }
    for event in history["events"].as_array().into_iter().flatten() {
        let line = format!(
            "  #{:<6} node {:<6} {:<9} attempt {} {}",
            text(&event["seq"]),
            text(&event["node"]),
            text(&event["state"]),
            text(&event["attempt"]),
            text(&event["note"])
        );
        say(line.trim_end());
    }
    Ok(ExitCode::SUCCESS)
}

/// `cancel`.
pub async fn cancel(connection: &Connection, run: &str, reason: &str) -> Outcomes {
    let run = run_id(run)?;
    let client = connect(connection).await?;
    let before = client.show(run, false).await?;
    let state = before["state"].as_str().unwrap_or_default();
    if state != "running" {
        already(connection, run, state, "cancel");
        return Ok(ExitCode::SUCCESS);
    }
    client.cancel(run, reason).await?;
    // It may have ended just before.
    let after = client.show(run, false).await?;
    match after["state"].as_str() {
        Some(state @ ("succeeded" | "failed")) => already(connection, run, state, "cancel"),
        _ => done(connection, run, "cancelled"),
    }
    Ok(ExitCode::SUCCESS)
}

/// `retry`.
pub async fn retry(connection: &Connection, run: &str) -> Outcomes {
    let run = run_id(run)?;
    let client = connect(connection).await?;
    let before = client.show(run, false).await?;
    let left = ["failed", "skipped", "cancelled"]
        .iter()
        .any(|state| before["counts"][state].as_u64().is_some_and(|n| n > 0));
    if before["state"] == "succeeded" && !left {
        already(connection, run, "succeeded", "resume");
        return Ok(ExitCode::SUCCESS);
    }
    client.resume(run).await?;
    done(connection, run, "resumed");
    Ok(ExitCode::SUCCESS)
}

fn already(connection: &Connection, run: RunId, state: &str, what: &str) {
    let state_in_words = match state {
        "cancelled" => "been cancelled",
        state => state,
    };
    say(if connection.json {
        json!({"run": run.to_string(), "done": "nothing", "state": state}).to_string()
    } else {
        format!("{run} has already {state_in_words}: nothing to {what}")
    });
}

fn done(connection: &Connection, run: RunId, what: &str) {
    say(if connection.json {
        json!({"run": run.to_string(), "done": what}).to_string()
    } else {
        format!("{run} {what}")
    });
}

/// `explain`.
pub async fn explain(
    connection: &Connection,
    run: &str,
    node: Option<u32>,
    limit: usize,
) -> Outcomes {
    let answer = connect(connection)
        .await?
        .explain(run_id(run)?, node, limit)
        .await?;
    if connection.json {
        say(&answer);
        return Ok(ExitCode::SUCCESS);
    }
    let reasons = answer["reasons"].as_array().cloned().unwrap_or_default();
    if reasons.is_empty() {
        say("nothing waits: every node runs or has ended");
    }
    for reason in reasons {
        say(format!(
            "{:>6}  {}  {}: {}",
            text(&reason["node"]),
            text(&reason["action"]),
            text(&reason["reason"]),
            text(&reason["text"])
        ));
    }
    Ok(ExitCode::SUCCESS)
}
