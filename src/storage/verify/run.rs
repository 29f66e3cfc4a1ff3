//! One run: its header, nodes, inputs, outcomes and history, and whether they tell the same story.
//!
//! The history is played from its first event to its last, with the inputs of each node at hand; where it ends, the records
//! must stand.

use std::collections::BTreeMap;

use super::pages::Header;
use super::tables::{Known, References};
use super::{Findings, I2, I3, I4, I5, I6, I7, I8, I9, I10, I11, I12, I17, I18, I19};
use crate::broker::types::{
    BodyEnd, InputRange, InputUse, NodeRecord, Note, Progress, RunRecord, RunState,
};
use crate::storage::reader::{corrupt, each_row, whole_run};
use crate::storage::records::rows_in::{self, NodeRow};
use crate::storage::records::{HEADER_TAIL, REFERENCES};
use crate::storage::row::{RowKey, Table};
use crate::storage::rows::Rows;
use crate::storage::{EventRecord, StorageError};

/// What the rows of a run say.
struct Run {
    seq: u64,
    record: RunRecord,
    nodes: Vec<NodeRow>,
    inputs: Vec<Vec<InputRange>>,
    references: BTreeMap<u32, Vec<InputRange>>,
    /// Nodes with an outcome, and whether that is an error.
    outcomes: BTreeMap<u32, bool>,
    /// Where each node's chain of tail calls ends: a node that went on in another one is never written again, it is what that
    /// one is.
    ends: Vec<u32>,
}

impl Run {
    /// The record that says what a node is.
    fn end(&self, node: u32) -> Option<&NodeRecord> {
        let end = self.ends.get(node as usize)?;
        self.nodes.get(*end as usize).map(|row| &row.record)
    }
}

/// The node that this one went on in and whose value it waits for or has.
fn follows(record: &NodeRecord) -> Option<u32> {
    match record.body {
        BodyEnd::Tail(next) if record.progress == Progress::Settling => Some(next.0),
        _ => None,
    }
}

/// Ends of all chains, each walked once.
fn ends_of(run: u64, nodes: &[NodeRow], findings: &mut Findings) -> Vec<u32> {
    const UNKNOWN: u32 = u32::MAX;
    const WALKING: u32 = u32::MAX - 1;
    let mut ends = vec![UNKNOWN; nodes.len()];
    let mut chain = Vec::new();
    for start in 0..nodes.len() as u32 {
        let mut at = start;
        let end = loop {
            match ends.get(at as usize).copied() {
                None => break start, // told with the edges
                Some(WALKING) => {
                    findings.violation(I9, || {
                        format!("the tail calls of node {run:x}/{start} go round")
                    });
                    break start;
                }
                Some(UNKNOWN) => {}
                Some(end) => break end,
            }
            ends[at as usize] = WALKING;
            chain.push(at);
            match follows(&nodes[at as usize].record) {
                None => break at,
                Some(next) => at = next,
            }
        };
        for node in chain.drain(..) {
            ends[node as usize] = end;
        }
    }
    ends
}

/// What the history says of a node so far.
#[derive(Debug, Clone, Copy, Default)]
struct Told {
    state: &'static str,
    leases: u32,
    last_event: u64,
    /// Its body ended in an earlier round and does not run again, whatever its inputs do in this one.
    body_kept: bool,
}

/// Checks a run. An error: a row of it cannot be read or decoded.
pub(super) fn check(
    rows: &dyn Rows,
    header: Header,
    known: &Known,
    references: &mut References<'_>,
    findings: &mut Findings,
) -> Result<(), StorageError> {
    let table = if header.open {
        Table::OpenRun
    } else {
        Table::EndedRun
    };
    let key = RowKey {
        table,
        major: header.run,
        minor: 0,
    };
    let Some(value) = rows.get(key)? else {
        return Ok(()); // told by the pages
    };
    let Some(record) = whole_run(rows, key, &value)? else {
        return Ok(());
    };
    if header.open {
        findings.totals.open_runs += 1;
    } else {
        findings.totals.ended_runs += 1;
    }
    findings.check(I18, record.ended.is_none() == header.open, || {
        format!("run {:x} lies in the wrong table", header.run)
    });
    if let Some(key) = record.key {
        // The key is kept for as long as the run is.
        let at = known.keys.partition_point(|(hash, _)| *hash < key.0);
        let owner = known.keys.get(at).filter(|(hash, _)| *hash == key.0);
        findings.check(
            I18,
            owner.is_some_and(|(_, run)| *run == Some(header.run)),
            || format!("the key of run {:x} is missing or another's", header.run),
        );
    }
    let run = load(rows, header.run, record, references, findings)?;
    findings.totals.nodes += run.nodes.len() as u64;
    check_edges(&run, known, findings);
    let told = play(rows, &run, findings)?;
    check_nodes(&run, &told, findings);
    check_end(&run, findings);
    check_owed(&run, known, findings);
    Ok(())
}

fn span(run: u64) -> ((u64, u64), (u64, u64)) {
    ((run, 0), (run, u64::MAX))
}

fn load(
    rows: &dyn Rows,
    run: u64,
    record: RunRecord,
    references: &mut References<'_>,
    findings: &mut Findings,
) -> Result<Run, StorageError> {
    let (from, to) = span(run);
    let mut nodes: Vec<NodeRow> = Vec::new();
    each_row(rows, Table::Node, from, to, &mut |key, value| {
        let row = rows_in::node_row(key, &value).map_err(|e| corrupt(key, &e))?;
        findings.check(I19, key.minor == nodes.len() as u64, || {
            format!("node {run:x}/{} follows node {}", key.minor, nodes.len())
        });
        nodes.push(row);
        Ok(true)
    })?;
    findings.checked(I17, nodes.len() as u64);

    let mut parts: BTreeMap<u64, (usize, Vec<InputRange>)> = BTreeMap::new();
    each_row(
        rows,
        Table::Inputs,
        from,
        (run, HEADER_TAIL),
        &mut |key, value| {
            let part = rows_in::ranges_row(&value).map_err(|e| corrupt(key, &e))?;
            parts.insert(key.minor, part);
            Ok(true)
        },
    )?;
    findings.checked(I17, parts.len() as u64);
    let mut collect = |node: u32, first: u64, expected: usize, findings: &mut Findings| {
        let mut all: Vec<InputRange> = Vec::new();
        let mut at = u64::from(node) << 32 | first;
        while all.len() < expected {
            match parts.remove(&at) {
                Some((said, ranges)) if said == expected && !ranges.is_empty() => {
                    all.extend(ranges);
                }
                _ => {
                    findings.violation(I19, || {
                        format!("node {run:x}/{node} has {} of {expected} ranges", all.len())
                    });
                    break;
                }
            }
            at += 1;
        }
        all
    };

    let mut inputs = vec![Vec::new(); nodes.len()];
    let mut n_arguments = 0_usize;
    each_row(rows, Table::Arguments, from, to, &mut |key, value| {
        let (payload, expected) = rows_in::arguments_row(&value).map_err(|e| corrupt(key, &e))?;
        n_arguments += 1;
        references.payload(&payload, run, findings);
        let ranges = collect(key.minor as u32, 0, expected, findings);
        match inputs.get_mut(key.minor as usize) {
            Some(slot) => *slot = ranges,
            None => findings.violation(I9, || {
                format!("arguments of node {run:x}/{}, which is missing", key.minor)
            }),
        }
        Ok(true)
    })?;
    findings.check(I19, n_arguments == nodes.len(), || {
        format!(
            "run {run:x} has {} nodes and {n_arguments} arguments",
            nodes.len()
        )
    });
    let mut outcomes = BTreeMap::new();
    let mut referred = BTreeMap::new();
    each_row(rows, Table::Outcome, from, to, &mut |key, value| {
        let (is_error, payload, expected) =
            rows_in::outcome_row(&value).map_err(|e| corrupt(key, &e))?;
        references.payload(&payload, run, findings);
        let node = key.minor as u32;
        if expected > 0 {
            referred.insert(node, collect(node, REFERENCES, expected, findings));
        }
        outcomes.insert(node, is_error);
        Ok(true)
    })?;
    findings.checked(I17, (n_arguments + outcomes.len()) as u64);
    let ends = ends_of(run, &nodes, findings);
    Ok(Run {
        ends,
        seq: run,
        record,
        nodes,
        inputs,
        references: referred,
        outcomes,
    })
}

/// I9, I7: ends, parents and specs exist, and inputs come before those who wait for them, so there is no cycle.
fn check_edges(run: &Run, known: &Known, findings: &mut Findings) {
    let n = run.nodes.len() as u64;
    let id = run.seq;
    for (node, row) in (0_u64..).zip(&run.nodes) {
        let record = &row.record;
        let before = run.inputs[node as usize]
            .iter()
            .all(|r| r.count > 0 && u64::from(r.first.0) + u64::from(r.count) <= node);
        findings.check(I9, before, || {
            format!("node {id:x}/{node} waits for a node that does not come before it")
        });
        if record
            .parent
            .is_some_and(|parent| u64::from(parent.0) >= node)
        {
            findings.violation(I9, || {
                format!("the parent of node {id:x}/{node} comes after it")
            });
        }
        if record.cause.is_some_and(|cause| u64::from(cause.0) >= n) {
            findings.violation(I9, || format!("the cause of node {id:x}/{node} is missing"));
        }
        if let BodyEnd::Tail(next) = record.body {
            findings.check(
                I9,
                u64::from(next.0) < n && u64::from(next.0) != node,
                || format!("node {id:x}/{node} goes on in {}, which is missing", next.0),
            );
        }
        findings.check(I7, known.specs.contains(&u64::from(record.spec.0)), || {
            format!("spec {} of node {id:x}/{node} is missing", record.spec.0)
        });
        findings.totals.inputs += run.inputs[node as usize]
            .iter()
            .map(|r| u64::from(r.count))
            .sum::<u64>();
    }
    for (node, ranges) in &run.references {
        let exist = ranges
            .iter()
            .all(|r| u64::from(r.first.0) + u64::from(r.count) <= n);
        findings.check(I9, exist, || {
            format!("the outcome of node {id:x}/{node} refers to a missing node")
        });
    }
    findings.check(I9, u64::from(run.record.root.0) < n, || {
        format!("the root of run {id:x} is missing")
    });
}

/// Plays the history: I2, I3, I4, I8, I11.
fn play(rows: &dyn Rows, run: &Run, findings: &mut Findings) -> Result<Vec<Told>, StorageError> {
    let (from, to) = span(run.seq);
    let mut told = vec![Told::default(); run.nodes.len()];
    let mut last = 0_u64;
    let mut events = 0_u64;
    each_row(rows, Table::Event, from, to, &mut |key, value| {
        findings.check(I11, key.minor == last + 1, || {
            format!(
                "event {} of run {:x} follows event {last}",
                key.minor, run.seq
            )
        });
        rows_in::event_row(key, &value, &mut |event| {
            last = event.seq;
            events += 1;
            play_event(run, &mut told, &event, findings);
            true
        })
        .map_err(|e| corrupt(key, &e))?;
        Ok(true)
    })?;
    findings.checked(I17, events);
    findings.totals.events += events;
    if run.record.ended.is_some() {
        findings.check(I11, last == run.record.n_events, || {
            format!(
                "run {:x} has {last} events, its header says {}",
                run.seq, run.record.n_events
            )
        });
    }
    Ok(told)
}

fn is_terminal(state: &str) -> bool {
    matches!(state, "succeeded" | "failed" | "skipped")
}

fn play_event(run: &Run, told: &mut [Told], event: &EventRecord, findings: &mut Findings) {
    let id = run.seq;
    let node = event.node.0;
    let Some(before) = told.get(node as usize).copied() else {
        findings.violation(I11, || {
            format!(
                "event {} of run {id:x} is about node {node}, which is missing",
                event.seq
            )
        });
        return;
    };
    let here = || {
        format!(
            "event {} of node {id:x}/{node} ({})",
            event.seq, event.state
        )
    };
    if (event.state == "created") != before.state.is_empty() {
        findings.violation(I11, || format!("{} follows {:?}", here(), before.state));
    }
    // A body that has ended does not run again: then it is settling once more.
    let reopened = event.note == Note::Reopened && matches!(event.state, "waiting" | "settling");
    findings.check(I2, !is_terminal(before.state) || reopened, || {
        format!("{} follows {:?}", here(), before.state)
    });
    if reopened && before.state == "succeeded" {
        findings.violation(I2, || format!("{} opens what had succeeded", here()));
    }
    let mut after = Told {
        state: event.state,
        last_event: event.seq,
        body_kept: before.body_kept || (reopened && event.state == "settling"),
        ..before
    };
    let is_same_lease = matches!(event.note, Note::LeaseShortened | Note::LeaseResumed);
    if event.state == "leased" && !is_same_lease {
        after.leases += 1;
        after.body_kept = false;
        findings.check(I3, event.attempt == after.leases, || {
            format!(
                "{} is attempt {} and lease {}",
                here(),
                event.attempt,
                after.leases
            )
        });
        findings.check(I4, before.state != "leased", || {
            format!("{} while another lease is open", here())
        });
        let missing = run.inputs[node as usize].iter().find_map(|range| {
            let first = range.first.0;
            (first..first.saturating_add(range.count)).find(|&input| {
                let state = told.get(input as usize).map_or("", |told| told.state);
                // It may have gone on in another node, and is what that one is.
                let end = run.ends.get(input as usize).copied().unwrap_or(input);
                let (state, is_certain) = if state == "settling" {
                    let state = told.get(end as usize).map_or("", |told| told.state);
                    (state, run.record.round == 1) // a later round may have gone on elsewhere
                } else {
                    (state, true)
                };
                let satisfied = match range.mode {
                    InputUse::Outcome => is_terminal(state),
                    InputUse::Value | InputUse::After => state == "succeeded",
                };
                is_certain && !satisfied
            })
        });
        findings.check(I8, missing.is_none(), || {
            format!("{} before input {}", here(), missing.unwrap_or_default())
        });
    }
    told[node as usize] = after;
}

/// The word of the history for what a record says.
fn agrees(record: &NodeRecord, told: &Told) -> bool {
    match record.progress {
        Progress::Open => matches!(told.state, "created" | "waiting" | "ready"),
        Progress::Leased { .. } => told.state == "leased",
        Progress::Backoff => told.state == "backoff",
        Progress::Settling => told.state == "settling",
        Progress::Succeeded => told.state == "succeeded",
        Progress::Failed => told.state == "failed",
        Progress::Skipped => told.state == "skipped",
    }
}

/// Where the history ends, the records stand: I2 to I6, I19.
fn check_nodes(run: &Run, told: &[Told], findings: &mut Findings) {
    let id = run.seq;
    for ((node, row), told) in (0_u32..).zip(&run.nodes).zip(told) {
        let record = &row.record;
        findings.check(I4, agrees(record, told), || {
            format!(
                "node {id:x}/{node} is {:?}, its history ends with {:?}",
                record.progress, told.state
            )
        });
        findings.check(I3, record.attempt.0 == told.leases, || {
            format!(
                "node {id:x}/{node} counts {} attempts, its history {}",
                record.attempt.0, told.leases
            )
        });
        findings.check(I11, row.event == told.last_event, || {
            format!(
                "node {id:x}/{node} names event {}, its last one is {}",
                row.event, told.last_event
            )
        });
        if record.round > run.record.round {
            findings.violation(I2, || {
                format!("node {id:x}/{node} is in a later round than its run")
            });
        }
        let remaining = run.inputs[node as usize]
            .iter()
            .map(|range| unsatisfied(run, record.round, range))
            .sum::<u64>();
        check_remaining(run, node, remaining, findings);
        findings.checked(I8, u64::from(told.leases == 0)); // nothing to compare
        let is_held_back = matches!(record.progress, Progress::Open | Progress::Skipped);
        // What ran had its inputs; what never ran, or not in this round, says nothing about them.
        let not_for_these = told.leases == 0 || told.body_kept;
        findings.check(I6, is_held_back || not_for_these || remaining == 0, || {
            format!(
                "node {id:x}/{node} is {:?} with {remaining} missing inputs",
                record.progress
            )
        });
        let needs_outcome =
            record.progress == Progress::Succeeded && !matches!(record.body, BodyEnd::Tail(_));
        if needs_outcome {
            let outcome = run.outcomes.get(&node);
            findings.check(I19, outcome.is_some(), || {
                format!("node {id:x}/{node} has succeeded and its outcome is missing")
            });
            findings.check(I2, outcome != Some(&true), || {
                format!("node {id:x}/{node} has succeeded with an error")
            });
        }
    }
}

/// I5: the number of inputs that a node misses is not stored; what a node does that counts them right is. One that was skipped
/// misses at least one, and a structure that still settles refers to at least one that has not succeeded.
fn check_remaining(run: &Run, node: u32, missing: u64, findings: &mut Findings) {
    let id = run.seq;
    let record = &run.nodes[node as usize].record;
    let expects_some = match (record.progress, record.body) {
        (Progress::Skipped, _) => Some(missing),
        (Progress::Settling, BodyEnd::Structure) => {
            let ranges = run.references.get(&node).map_or(&[][..], Vec::as_slice);
            let open = ranges.iter().map(|range| unsatisfied(run, u32::MAX, range));
            Some(open.sum())
        }
        _ => None,
    };
    findings.check(I5, expects_some != Some(0), || {
        format!(
            "node {id:x}/{node} is {:?} and misses nothing",
            record.progress
        )
    });
}

/// Inputs that do not satisfy a node now. Those that a later round has opened again satisfied it in its own.
fn unsatisfied(run: &Run, round: u32, range: &InputRange) -> u64 {
    let first = range.first.0;
    (first..first.saturating_add(range.count))
        .filter_map(|node| run.end(node))
        .filter(|input| {
            let satisfied = match range.mode {
                InputUse::Outcome => has_ended(input.progress),
                InputUse::Value | InputUse::After => input.progress == Progress::Succeeded,
            };
            !satisfied && input.round <= round
        })
        .count() as u64
}

fn has_ended(progress: Progress) -> bool {
    matches!(
        progress,
        Progress::Succeeded | Progress::Failed | Progress::Skipped
    )
}

/// I10: the run has ended iff its nodes have, and says how.
fn check_end(run: &Run, findings: &mut Findings) {
    let id = run.seq;
    let record = &run.record;
    let open = (0..run.nodes.len() as u32)
        .filter_map(|node| run.end(node))
        .filter(|end| !has_ended(end.progress))
        .count();
    if record.ended.is_none() {
        findings.check(I10, open > 0 && record.state == RunState::Running, || {
            format!(
                "run {id:x} goes on with {open} open nodes as {:?}",
                record.state
            )
        });
        return;
    }
    findings.check(I10, record.n_nodes as usize == run.nodes.len(), || {
        format!(
            "run {id:x} has {} nodes, its header says {}",
            run.nodes.len(),
            record.n_nodes
        )
    });
    findings.check(I10, open == 0 || record.cancelled, || {
        format!("run {id:x} has ended with {open} open nodes")
    });
    let root = run.end(record.root.0);
    let expected = match root.map(|end| end.progress) {
        _ if record.cancelled => RunState::Cancelled,
        Some(Progress::Succeeded) => RunState::Succeeded,
        _ => RunState::Failed,
    };
    findings.check(I10, record.state == expected, || {
        format!(
            "run {id:x} is {:?} and should be {expected:?}",
            record.state
        )
    });
}

/// I12: what is owed of this run has settled.
fn check_owed(run: &Run, known: &Known, findings: &mut Findings) {
    for &(node, round, output) in known.owed.get(&run.seq).into_iter().flatten() {
        // In a later round it may be open again; in a cancelled run it has settled by that.
        let settled = run.end(node).is_some_and(|end| {
            has_ended(end.progress) || run.record.cancelled || run.record.round > round
        });
        findings.check(I12, settled, || {
            format!(
                "outbox {output} owes node {:x}/{node}, which has not settled",
                run.seq
            )
        });
    }
}
