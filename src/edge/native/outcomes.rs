//! Reading outcomes: what FETCH, WAIT and inline inputs deliver.
//!
//! An outcome row alone says everything about a plain value: only a success leaves one. Everything else needs the node's state too: an error
//! may be of an attempt that is tried again, a structure may not have settled, a tail call has no row of its own. That is asked of the
//! engine, a page at a time; plain values never trouble it.

use std::collections::HashMap;

use bytes::Bytes;

use super::codec::{Fetch, Item, Range, SUCCEEDED};
use super::requests::{stopping, unexpected};
use crate::broker::command::{Answer, Code, NodeSummary, Query, Rejection};
use crate::broker::types::{Body, Codec, NodeIndex, NodeKey, NodeState, Payload, RunId, RunSeq};
use crate::edge::convert;
use crate::engine::Handle;
use crate::storage::Outcome;

/// Nodes that are looked at together, at most.
const CHUNK: u32 = 1_024;
/// Bytes of outcomes after which no more are looked at together.
const CHUNK_BYTES: usize = 1024 * 1024;
/// A chain of blame is followed for this many steps.
const MAX_STEPS: usize = 64;

/// Whether the outcome row alone shows that its node has succeeded with it.
fn is_plain(outcome: &Outcome) -> bool {
    !outcome.is_error && outcome.references.is_empty()
}

/// An item with these bytes.
fn item(node: NodeIndex, state: u8, outcome: &Outcome, bytes: Bytes) -> Item {
    Item {
        node: node.0,
        state,
        codec: outcome.payload.codec,
        ranges: convert::ranges(&outcome.references),
        body: bytes,
    }
}

/// What an outcome takes in memory.
fn inline_bytes(outcome: &Outcome) -> usize {
    let body = match &outcome.payload.body {
        Body::Inline(bytes) => bytes.len(),
        Body::Stored(_) => 0,
    };
    64 + body + 12 * outcome.references.len()
}

fn empty(node: NodeIndex, state: u8) -> Item {
    Item {
        node: node.0,
        state,
        codec: Codec::Raw,
        ranges: Vec::new(),
        body: Bytes::new(),
    }
}

/// The inputs of a lease, if they are few, small, and in memory as plain values: then they travel with it.
pub(super) fn inline(handle: &Handle, run: RunSeq, ranges: &[Range]) -> Option<Vec<Item>> {
    const MAX_ITEMS: u32 = 16;
    const MAX_BYTES: usize = 16 * 1024;
    use crate::broker::types::InputUse;

    let delivered = || ranges.iter().filter(|range| range.mode != InputUse::After);
    let mut n: u32 = 0;
    for range in delivered() {
        n = n.saturating_add(range.count);
    }
    if n == 0 || n > MAX_ITEMS {
        return None;
    }
    let reader = handle.reader();
    let mut items = Vec::with_capacity(n as usize);
    let mut bytes = 0;
    for range in delivered() {
        for node in range.first..range.first + range.count {
            let node = NodeIndex(node);
            let outcome = reader.recent_outcome(NodeKey::new(run, node))?;
            // The lease shows that a structure has settled; an error may be left from an attempt before a tail call.
            let Body::Inline(body) = &outcome.payload.body else {
                return None;
            };
            bytes += body.len();
            if outcome.is_error || bytes > MAX_BYTES {
                return None;
            }
            items.push(item(node, SUCCEEDED, &outcome, body.clone()));
        }
    }
    Some(items)
}

/// The bytes of a payload, wherever they are.
pub(super) async fn bytes(handle: &Handle, payload: &Payload) -> Result<Bytes, Rejection> {
    match &payload.body {
        Body::Inline(bytes) => Ok(bytes.clone()),
        Body::Stored(at) => {
            let at = *at;
            handle
                .read(move |reader| reader.payload(at))
                .await
                .map_err(|error| convert::storage(&error))
        }
    }
}

/// The outcome of one node.
pub(super) async fn one(handle: &Handle, run: RunId, node: NodeKey) -> Result<Item, Rejection> {
    let asked = Fetch {
        run: run.seq.0,
        ranges: vec![Range {
            first: node.node.0,
            count: 1,
            mode: crate::broker::types::InputUse::Value,
            new: false,
        }],
    };
    let mut pages = Pages::new(handle, asked);
    pages.salt = Some(run.salt);
    let (mut items, _) = pages.next(usize::MAX).await?;
    items.pop().ok_or_else(unexpected)
}

/// Outcomes of ranges of nodes, a page at a time.
pub(super) struct Pages<'a> {
    handle: &'a Handle,
    run: RunSeq,
    salt: Option<u64>,
    ranges: std::vec::IntoIter<Range>,
    current: Option<Range>,
    /// Found, not yet sent: nodes in order, bytes of stored ones still in the store.
    found: std::vec::IntoIter<(NodeIndex, u8, Option<Outcome>)>,
}

impl<'a> Pages<'a> {
    pub(super) fn new(handle: &'a Handle, asked: Fetch) -> Self {
        Self {
            handle,
            run: RunSeq(asked.run),
            salt: None,
            ranges: asked.ranges.into_iter(),
            current: None,
            found: Vec::new().into_iter(),
        }
    }

    /// The next page of about `max_bytes`, and whether more follow.
    pub(super) async fn next(&mut self, max_bytes: usize) -> Result<(Vec<Item>, bool), Rejection> {
        let mut items = Vec::new();
        let mut size = 0;
        while size < max_bytes {
            let Some((node, state, outcome)) = self.found.next() else {
                if self.look_ahead().await? {
                    continue;
                }
                return Ok((items, false));
            };
            let item = match outcome {
                Some(outcome) => {
                    let bytes = bytes(self.handle, &outcome.payload).await?;
                    item(node, state, &outcome, bytes)
                }
                None => empty(node, state),
            };
            size += 16 + 12 * item.ranges.len() + item.body.len();
            items.push(item);
        }
        let more = self.found.len() > 0 || self.look_ahead().await?;
        Ok((items, more))
    }

    /// Finds the next nodes. `false`: there are no more.
    async fn look_ahead(&mut self) -> Result<bool, Rejection> {
        if self.current.is_none() {
            self.current = self.ranges.next();
        }
        let Some(range) = &self.current else {
            return Ok(false);
        };
        let (first, count) = (range.first, range.count.min(CHUNK));
        let found = self.chunk(first, count).await?;
        let n = found.len() as u32;
        if let Some(range) = &mut self.current {
            range.first += n;
            range.count -= n;
            if range.count == 0 {
                self.current = None;
            }
        }
        self.found = found.into_iter();
        Ok(true)
    }

    fn key(&self, node: NodeIndex) -> NodeKey {
        NodeKey::new(self.run, node)
    }

    /// What to send for the first of `count` nodes; at least one, all of them if they are small.
    async fn chunk(
        &mut self,
        first: u32,
        count: u32,
    ) -> Result<Vec<(NodeIndex, u8, Option<Outcome>)>, Rejection> {
        let (mut outcomes, count) = self.outcomes(first, count).await?;
        let all_plain = outcomes.len() == count as usize && outcomes.values().all(is_plain);
        let summaries = if all_plain {
            HashMap::new()
        } else {
            self.summaries(first, count).await?
        };
        let mut found = Vec::with_capacity(count as usize);
        for node in first..first + count {
            let node = NodeIndex(node);
            let outcome = outcomes.remove(&node);
            if outcome.as_ref().is_some_and(is_plain) {
                found.push((node, SUCCEEDED, outcome));
                continue;
            }
            let Some(summary) = summaries.get(&node) else {
                return Err(Rejection::new(
                    Code::UnknownNode,
                    format!("run {:x} has no node {}", self.run.0, node.0),
                ));
            };
            found.push(self.resolve(summary, outcome).await?);
        }
        Ok(found)
    }

    /// Outcome rows, from memory if they are there, and for how many of the nodes they were looked for.
    async fn outcomes(
        &self,
        first: u32,
        count: u32,
    ) -> Result<(HashMap<NodeIndex, Outcome>, u32), Rejection> {
        let reader = self.handle.reader();
        let mut found = HashMap::with_capacity(count as usize);
        let mut bytes = 0;
        for node in first..first + count {
            let node = NodeIndex(node);
            // Most likely all of the rest are on disk when one is.
            let Some(outcome) = reader.recent_outcome(self.key(node)) else {
                break;
            };
            bytes += inline_bytes(&outcome);
            found.insert(node, outcome);
            if bytes >= CHUNK_BYTES {
                break;
            }
        }
        let begun = found.len() as u32;
        if begun == count || bytes >= CHUNK_BYTES {
            return Ok((found, begun));
        }
        let (run, end) = (self.run, first + count);
        let (rest, next) = self
            .handle
            .read(move |reader| {
                let mut rest = Vec::new();
                let mut next = first + begun;
                while next < end && bytes < CHUNK_BYTES {
                    let page = reader.outcomes(run, NodeIndex(next), end - next, CHUNK_BYTES)?;
                    // Fewer than asked: the page was full, or the rest has no outcome. The latter shows when nothing comes.
                    let Some((last, _)) = page.last() else {
                        next = end;
                        break;
                    };
                    next = last.0 + 1;
                    bytes += page
                        .iter()
                        .map(|(_, outcome)| inline_bytes(outcome))
                        .sum::<usize>();
                    rest.extend(page);
                }
                Ok((rest, next))
            })
            .await
            .map_err(|error| convert::storage(&error))?;
        found.extend(rest);
        Ok((found, next - first))
    }

    async fn run_id(&mut self) -> Result<RunId, Rejection> {
        let seq = self.run;
        let salt = if let Some(salt) = self.salt {
            salt
        } else {
            let record = self
                .handle
                .read(move |reader| reader.run(seq))
                .await
                .map_err(|error| convert::storage(&error))?;
            let unknown =
                || Rejection::new(Code::UnknownRun, format!("there is no run {:x}", seq.0));
            record.ok_or_else(unknown)?.salt
        };
        self.salt = Some(salt);
        Ok(RunId { seq, salt })
    }

    async fn summaries(
        &mut self,
        first: u32,
        count: u32,
    ) -> Result<HashMap<NodeIndex, NodeSummary>, Rejection> {
        let run = self.run_id().await?;
        let query = Query::Nodes {
            run,
            first: NodeIndex(first),
            limit: count as usize,
        };
        match self.handle.query(query).await {
            Ok(Answer::Nodes(nodes)) => {
                Ok(nodes.into_iter().map(|node| (node.node, node)).collect())
            }
            Ok(Answer::No(rejection)) => Err(rejection),
            Ok(_) => Err(unexpected()),
            Err(stopped) => Err(stopping(&stopped)),
        }
    }

    async fn outcome(&self, node: NodeIndex) -> Result<Option<Outcome>, Rejection> {
        let key = self.key(node);
        if let Some(outcome) = self.handle.reader().recent_outcome(key) {
            return Ok(Some(outcome));
        }
        self.handle
            .read(move |reader| reader.outcome(key))
            .await
            .map_err(|error| convert::storage(&error))
    }

    /// What to send for a node whose outcome row does not say it all.
    async fn resolve(
        &mut self,
        summary: &NodeSummary,
        outcome: Option<Outcome>,
    ) -> Result<(NodeIndex, u8, Option<Outcome>), Rejection> {
        let node = summary.node;
        let state = convert::state_number(summary.state);
        let outcome = match summary.state {
            NodeState::Succeeded => match outcome {
                Some(structure) if !structure.is_error => Some(structure),
                // A tail call; an error is left from an attempt before.
                _ => self.behind_tail(node).await?,
            },
            NodeState::Failed | NodeState::Skipped => Some(self.blame(summary, outcome).await?),
            // Not ended, or cancelled: there are no bytes.
            _ => None,
        };
        Ok((node, state, outcome))
    }

    /// The value at the end of a chain of tail calls. `None`: the chain ends at the node itself.
    async fn behind_tail(&self, node: NodeIndex) -> Result<Option<Outcome>, Rejection> {
        match self.handle.query(Query::Value(self.key(node))).await {
            Ok(Answer::Value { node: end, .. }) if end != node => self.outcome(end).await,
            Ok(Answer::Value { .. }) => Ok(None),
            Ok(Answer::No(rejection)) => Err(rejection),
            Ok(_) => Err(unexpected()),
            Err(stopped) => Err(stopping(&stopped)),
        }
    }

    /// The error of a node that did not succeed: its own, or that of the node to blame.
    async fn blame(
        &mut self,
        summary: &NodeSummary,
        outcome: Option<Outcome>,
    ) -> Result<Outcome, Rejection> {
        let mut summary = summary.clone();
        let mut outcome = outcome;
        for _ in 0..MAX_STEPS {
            if summary.state == NodeState::Failed
                && let Some(error) = outcome.take_if(|outcome| outcome.is_error)
                && summary.cause.is_none()
            {
                return Ok(error);
            }
            let next = match summary.cause {
                Some(cause) => Some(cause),
                // A tail call to a node that failed.
                None => match self
                    .handle
                    .query(Query::Value(self.key(summary.node)))
                    .await
                {
                    Ok(Answer::Value { node, .. }) => Some(node),
                    _ => None,
                },
            };
            let Some(next) = next.filter(|next| *next != summary.node) else {
                break;
            };
            let Some(found) = self.summaries(next.0, 1).await?.remove(&next) else {
                break;
            };
            outcome = self.outcome(next).await?;
            summary = found;
        }
        Ok(synthetic(&summary))
    }
}

/// An error for a node whose body left none: it was lost with its workers, or cancelled.
fn synthetic(summary: &NodeSummary) -> Outcome {
    let note = convert::note_word(summary.note);
    let message = match (summary.state, note) {
        (NodeState::Cancelled, _) => "the run was cancelled".to_owned(),
        (state, "") => format!("node {} has {}", summary.node.0, state.as_str()),
        (_, "quarantined") => format!(
            "node {} ({}) was lost {} times with its workers: they died or fell silent while running it",
            summary.node.0, summary.action, summary.attempt.0
        ),
        (state, note) => format!("node {} has {}: {note}", summary.node.0, state.as_str()),
    };
    let kind = match note {
        "quarantined" => "dagorama.Quarantined",
        "timed_out" => "dagorama.TimedOut",
        _ if summary.state == NodeState::Cancelled => "dagorama.Cancelled",
        _ => "dagorama.Failed",
    };
    let document = serde_json::json!({
        "type": kind, "message": message, "traceback": "", "pickle": null,
    });
    Outcome {
        is_error: true,
        payload: convert::inline(Codec::Json, document.to_string().into()),
        references: Vec::new(),
    }
}
