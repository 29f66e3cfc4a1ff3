//! The verbs with JSON bodies: what people and tools ask.
//!
//! None of this is hot. Lists are limited, and what comes from the store is read on a thread that may block.

use std::collections::{BTreeMap, HashMap};
use std::fmt::Write as _;
use std::sync::Arc;

use bytes::Bytes;
use serde::Deserialize;
use serde_json::{Value, json};

use super::json;
use super::requests::{stopping, unexpected};
use super::server::Extensions;
use crate::broker::command::{
    Answer, Code, Command, NodeSummary, Query, Reason, Rejection, Reply, RunSummary,
};
use crate::broker::types::{NodeIndex, NodeKey, RunId, RunRecord, RunSeq, RunState, SpecId};
use crate::edge::convert;
use crate::engine::Handle;

const DEFAULT_LIMIT: usize = 100;
const MAX_RUNS: usize = 10_000;
const MAX_EVENTS: usize = 10_000;
const MAX_REASONS: usize = 1_000;
const MAX_NODES: usize = 100_000;
/// Nodes of one question to the engine: it answers nobody else meanwhile.
const PAGE: usize = 1_000;
/// Records of ended runs that one RUNS looks through.
const MAX_SCANNED: usize = 100_000;

/// An empty object; more fields are passed over.
#[derive(Debug, Deserialize)]
pub(super) struct Nothing {}

/// Any object.
pub(super) type Object = serde_json::Map<String, Value>;

/// BRIDGES.
#[derive(Debug, Deserialize)]
pub(super) struct Bridges {
    r#do: String,
}

async fn ask(handle: &Handle, query: Query) -> Result<Answer, Rejection> {
    match handle.query(query).await {
        Ok(Answer::No(rejection)) => Err(rejection),
        Ok(answer) => Ok(answer),
        Err(stopped) => Err(stopping(&stopped)),
    }
}

async fn read<T: Send + 'static>(
    handle: &Handle,
    f: impl FnOnce(&dyn crate::storage::Read) -> Result<T, crate::storage::StorageError>
    + Send
    + 'static,
) -> Result<T, Rejection> {
    handle
        .read(f)
        .await
        .map_err(|error| convert::storage(&error))
}

async fn done(handle: &Handle, command: Command) -> Result<Bytes, Rejection> {
    match handle.control(command).await {
        Ok(Reply::Done(list)) => match list.into_iter().next() {
            Some(Err(rejection)) => Err(rejection),
            _ => Ok(Bytes::from_static(b"{}")),
        },
        Ok(_) => Err(unexpected()),
        Err(stopped) => Err(stopping(&stopped)),
    }
}

/// CANCEL.
pub(super) async fn cancel(handle: Handle, asked: json::Cancel) -> Result<Bytes, Rejection> {
    let run = convert::run_id(&asked.run)?;
    let reason: String = asked.reason.chars().take(1_024).collect();
    let reason = Arc::from(reason);
    done(&handle, Command::Cancel { run, reason }).await
}

/// RESUME.
pub(super) async fn resume(handle: Handle, asked: json::Resume) -> Result<Bytes, Rejection> {
    let run = convert::run_id(&asked.run)?;
    done(&handle, Command::Resume(run)).await
}

async fn summary(handle: &Handle, run: RunId) -> Result<RunSummary, Rejection> {
    match ask(handle, Query::Run(run)).await? {
        Answer::Run(summary) => Ok(summary),
        _ => Err(unexpected()),
    }
}

async fn nodes(
    handle: &Handle,
    run: RunId,
    first: NodeIndex,
    limit: usize,
) -> Result<Vec<NodeSummary>, Rejection> {
    match ask(handle, Query::Nodes { run, first, limit }).await? {
        Answer::Nodes(nodes) => Ok(nodes),
        _ => Err(unexpected()),
    }
}

/// SHOW.
pub(super) async fn show(handle: Handle, asked: json::Show) -> Result<Bytes, Rejection> {
    let run = convert::run_id(&asked.run)?;
    let mut document = convert::run_json(&summary(&handle, run).await?);
    if asked.nodes {
        let mut list = Vec::new();
        while list.len() < MAX_NODES {
            let page = nodes(&handle, run, NodeIndex(list.len() as u32), PAGE).await?;
            let full = page.len() == PAGE;
            list.extend(page.iter().map(convert::node_json));
            if !full {
                break;
            }
        }
        document.nodes = Some(list);
    }
    Ok(json::write(&document))
}

/// EVENTS.
pub(super) async fn events(handle: Handle, asked: json::Events) -> Result<Bytes, Rejection> {
    let run = convert::run_id(&asked.run)?;
    let limit = asked.limit.unwrap_or(1_000).min(MAX_EVENTS);
    let after = asked.after;
    let found = read(&handle, move |reader| {
        let Some(record) = reader.run(run.seq)? else {
            return Ok(None);
        };
        let events = reader.events(run.seq, after, limit)?;
        let mut specs: HashMap<NodeIndex, SpecId> = HashMap::new();
        for event in &events {
            if !specs.contains_key(&event.node)
                && let Some(node) = reader.node(NodeKey::new(run.seq, event.node))?
            {
                specs.insert(event.node, node.spec);
            }
        }
        Ok(Some((record, events, specs)))
    })
    .await?;
    let (record, events, specs) = found
        .filter(|(record, ..)| record.salt == run.salt)
        .ok_or_else(|| Rejection::new(Code::UnknownRun, format!("there is no run {run}")))?;
    let reached = events.last().map_or(after, |event| event.seq);
    let ended = record.ended.is_some() && reached >= record.n_events;
    let events: Vec<json::Event> = events
        .into_iter()
        .map(|event| json::Event {
            seq: event.seq,
            // Broker time does not follow the calendar's jumps, so the date of a late event is an estimate from the run's creation.
            at: record.created_wall.0 + event.at.0.saturating_sub(record.created.0),
            node: event.node.0,
            action: specs
                .get(&event.node)
                .and_then(|spec| handle.spec(*spec))
                .map_or_else(String::new, |spec| spec.action.to_string()),
            state: event.state.to_owned(),
            attempt: event.attempt,
            note: convert::note_word(event.note).to_owned(),
        })
        .collect();
    Ok(json::write(&json!({"events": events, "ended": ended})))
}

async fn explained(
    handle: &Handle,
    run: RunId,
    node: Option<NodeIndex>,
    limit: usize,
) -> Result<Vec<(NodeIndex, Reason)>, Rejection> {
    match ask(handle, Query::Explain { run, node, limit }).await? {
        Answer::Explained(reasons) => Ok(reasons),
        _ => Err(unexpected()),
    }
}

/// EXPLAIN.
pub(super) async fn explain(handle: Handle, asked: json::Explain) -> Result<Bytes, Rejection> {
    let run = convert::run_id(&asked.run)?;
    let limit = asked.limit.unwrap_or(DEFAULT_LIMIT).min(MAX_REASONS);
    let reasons = explained(&handle, run, asked.node.map(NodeIndex), limit).await?;
    let mut actions: HashMap<NodeIndex, Arc<str>> = HashMap::new();
    for (node, _) in &reasons {
        if !actions.contains_key(node) {
            // Neighbours mostly are explained together.
            for node in nodes(&handle, run, *node, reasons.len().max(1)).await? {
                actions.insert(node.node, node.action);
            }
        }
    }
    let reasons: Vec<json::Reason> = reasons
        .into_iter()
        .map(|(node, reason)| {
            let (word, text) = convert::reason_words(&reason);
            let action = actions.get(&node).map_or("", |action| action);
            json::Reason {
                node: node.0,
                action: action.to_owned(),
                reason: word.to_owned(),
                text,
            }
        })
        .collect();
    Ok(json::write(&json!({"reasons": reasons})))
}

/// Why a run has not ended yet, in a line for people; empty when it simply runs.
pub(super) async fn hint(handle: &Handle, run: RunId) -> Result<String, Rejection> {
    let reasons = explained(handle, run, None, 256).await?;
    let mut missing: BTreeMap<&'static str, (String, usize)> = BTreeMap::new();
    for (_, reason) in &reasons {
        let (word, text) = convert::reason_words(reason);
        if word.starts_with("no_worker") || word == "never_announced" {
            missing.entry(word).or_insert((text, 0)).1 += 1;
        }
    }
    let mut hint = String::new();
    for (text, nodes) in missing.into_values() {
        if !hint.is_empty() {
            hint.push_str("; ");
        }
        let plural = if nodes == 1 { "" } else { "s" };
        let _ = write!(hint, "{text} ({nodes} node{plural} of this run)");
    }
    Ok(hint)
}

/// RUNS: open ones from memory, ended ones from the store, newest first.
pub(super) async fn runs(handle: Handle, asked: json::Runs) -> Result<Bytes, Rejection> {
    let limit = asked.limit.unwrap_or(DEFAULT_LIMIT).min(MAX_RUNS);
    let state = asked.state.as_deref().map(convert::run_state).transpose()?;
    let tag = asked.tag.map(|tag| match tag.split_once('=') {
        Some((key, value)) => (key.to_owned(), Some(value.to_owned())),
        None => (tag, None),
    });
    let wanted = move |of: RunState, tags: &BTreeMap<String, String>| {
        let has_tag = match &tag {
            None => true,
            Some((key, None)) => tags.contains_key(key),
            Some((key, Some(value))) => tags.get(key) == Some(value),
        };
        has_tag && state.is_none_or(|state| state == of)
    };
    let mut found: BTreeMap<RunSeq, json::Run> = BTreeMap::new();
    match ask(&handle, Query::OpenRuns { limit: MAX_RUNS }).await? {
        Answer::Runs(open) => {
            let open = open.iter().filter(|run| wanted(run.state, &run.tags));
            for run in open.take(limit) {
                found.insert(run.run.seq, convert::run_json(run));
            }
        }
        _ => return Err(unexpected()),
    }
    if state != Some(RunState::Running) {
        let ended = read(&handle, move |reader| ended_runs(reader, limit, &wanted)).await?;
        for (seq, record, root) in ended {
            let spec = root.and_then(|(spec, _)| handle.spec(spec));
            let action = spec.map_or_else(String::new, |spec| spec.action.to_string());
            let root_state = root.map_or("", |(_, state)| state);
            found
                .entry(seq)
                .or_insert_with(|| ended_json(seq, &record, action, root_state));
        }
    }
    let runs: Vec<json::Run> = found.into_values().rev().take(limit).collect();
    Ok(json::write(&json!({"runs": runs})))
}

type EndedRun = (RunSeq, RunRecord, Option<(SpecId, &'static str)>);

fn ended_runs(
    reader: &dyn crate::storage::Read,
    limit: usize,
    wanted: &dyn Fn(RunState, &BTreeMap<String, String>) -> bool,
) -> Result<Vec<EndedRun>, crate::storage::StorageError> {
    use crate::broker::types::Progress;

    let mut ended = Vec::new();
    let mut before = None;
    let mut scanned = 0;
    while ended.len() < limit && scanned < MAX_SCANNED {
        let page = reader.runs(before, PAGE)?;
        let Some((last, _)) = page.last() else { break };
        before = Some(*last);
        scanned += page.len();
        for (seq, record) in page {
            if record.ended.is_none() || !wanted(record.state, &record.tags) {
                continue;
            }
            let root = reader.node(NodeKey::new(seq, record.root))?;
            let root = root.map(|root| {
                let state = match root.progress {
                    Progress::Succeeded => "succeeded",
                    Progress::Failed => "failed",
                    Progress::Skipped => "skipped",
                    _ => record.state.as_str(),
                };
                (root.spec, state)
            });
            ended.push((seq, record, root));
            if ended.len() == limit {
                break;
            }
        }
    }
    Ok(ended)
}

fn ended_json(seq: RunSeq, record: &RunRecord, action: String, root_state: &str) -> json::Run {
    let salt = record.salt;
    json::Run {
        run: RunId { seq, salt }.to_string(),
        state: record.state.as_str().to_owned(),
        root_state: root_state.to_owned(),
        action,
        round: record.round,
        counts: BTreeMap::new(),
        n_nodes: record.n_nodes,
        n_events: record.n_events,
        created: record.created_wall.0,
        tags: record.tags.clone(),
        source: record.source.to_string(),
        cancel_reason: record.cancel_reason.to_string(),
        nodes: None,
    }
}

/// STATUS.
pub(super) async fn status(
    handle: Handle,
    extensions: Arc<dyn Extensions>,
) -> Result<Bytes, Rejection> {
    let Answer::Totals(totals) = ask(&handle, Query::Totals).await? else {
        return Err(unexpected());
    };
    let named = |map: &BTreeMap<Arc<str>, u64>| -> Object {
        map.iter()
            .map(|(name, n)| (name.to_string(), Value::from(*n)))
            .collect()
    };
    let info = handle.info();
    let mut document = json!({
        "open_runs": totals.open_runs,
        "open_nodes": totals.open_nodes,
        "ready_nodes": totals.ready_nodes,
        "leases": totals.leases,
        "sessions": totals.sessions,
        "stranded": named(&totals.stranded),
        "outbox": named(&totals.outbox),
        "keys": totals.keys,
        "pid": info.pid,
        "store": convert::store_text(info.store_id),
        "uptime_ms": info.started.elapsed_ms(),
        "log_position": null,
        "sled_position": null,
    });
    if let (Some(document), Value::Object(more)) = (document.as_object_mut(), extensions.status()) {
        document.extend(more);
    }
    Ok(json::write(&document))
}

/// DLQ.
pub(super) async fn dlq(
    asked: Object,
    extensions: Arc<dyn Extensions>,
) -> Result<Bytes, Rejection> {
    let verb = asked.get("do").and_then(Value::as_str);
    if !matches!(verb, Some("list" | "show" | "replay" | "drop")) {
        return Err(Rejection::new(
            Code::InvalidRequest,
            "DLQ: `do` is one of list, show, replay, drop",
        ));
    }
    let answer = extensions.dlq(Value::Object(asked)).await?;
    Ok(json::write(&answer))
}

/// BRIDGES.
pub(super) fn bridges(asked: &Bridges, extensions: &dyn Extensions) -> Result<Bytes, Rejection> {
    if asked.r#do != "list" {
        return Err(Rejection::new(
            Code::InvalidRequest,
            "BRIDGES: `do` can only be list",
        ));
    }
    Ok(json::write(&extensions.bridges()))
}
