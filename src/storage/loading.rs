//! The start: rows of everything that must be resident, streamed as facts.
//!
//! The facts have the shape in which they were committed, but they are not the same ones: of a node only its creation and its
//! latest state are told. Arguments and results are left out; who needs them reads them.

use std::collections::{HashMap, HashSet};

use bytes::Bytes;

use super::StorageError;
use super::reader::{corrupt, corrupt_text, each_parted, each_row, take_ranges, whole_run};
use super::records::{HEADER_TAIL, PART_BITS, RANGES_PER_PART, REFERENCES, RowMaker, rows_in};
use super::row::{RowKey, Table};
use super::rows::Rows;
use crate::broker::outcome::{CreatedNode, Fact};
use crate::broker::types::{
    Body, BodyEnd, Codec, InputRange, NameId, NodeIndex, NodeKey, NodeRecord, Payload, RunRecord,
    RunSeq, SpecId,
};

/// Nodes in one `Nodes` fact at most: bounds the memory of the start, not what is loaded.
const GROUP: usize = 8_192;

const EVERYTHING: ((u64, u64), (u64, u64)) = ((0, 0), (u64::MAX, u64::MAX));

/// Streams all that must be resident, and reminds `maker` of its places. Gives the open runs with the number of their
/// nodes.
pub(super) fn state_facts(
    rows: &dyn Rows,
    maker: &mut RowMaker,
    absorb: &mut dyn FnMut(Fact),
) -> Result<HashMap<RunSeq, u64>, StorageError> {
    let (from, to) = EVERYTHING;
    let number = |key: RowKey| {
        u32::try_from(key.major).map_err(|_| corrupt_text(key, "a number over 32 bits"))
    };
    each_parted(rows, Table::Spec, from, to, &mut |key, whole| {
        let spec = rows_in::spec_record(&whole).map_err(|e| corrupt(key, &e))?;
        absorb(Fact::Spec {
            id: SpecId(number(key)?),
            spec: spec.into(),
        });
        Ok(true)
    })?;
    each_parted(rows, Table::Name, from, to, &mut |key, whole| {
        let name = rows_in::name_record(&whole).map_err(|e| corrupt(key, &e))?;
        absorb(Fact::Name {
            id: NameId(number(key)?),
            name: name.into(),
        });
        Ok(true)
    })?;
    each_parted(rows, Table::Announced, from, to, &mut |key, whole| {
        absorb(rows_in::announced_record(&whole).map_err(|e| corrupt(key, &e))?);
        Ok(true)
    })?;
    each_row(rows, Table::Key, from, to, &mut |key, value| {
        let fact = rows_in::key_row(key, &value).map_err(|e| corrupt(key, &e))?;
        if let Fact::Key { key, at, .. } = &fact {
            maker.restore_key(*key, *at);
        }
        absorb(fact);
        Ok(true)
    })?;
    each_parted(rows, Table::Position, from, to, &mut |key, whole| {
        let route = NameId(number(key)?);
        absorb(rows_in::position_record(route, &whole).map_err(|e| corrupt(key, &e))?);
        Ok(true)
    })?;
    each_row(rows, Table::Outbox, from, to, &mut |key, value| {
        let record = rows_in::outbox_row(key, &value).map_err(|e| corrupt(key, &e))?;
        absorb(Fact::Outbox {
            output: NameId(number(key)?),
            seq: record.seq,
            node: record.node,
            salt: record.salt,
            round: record.round,
            at: record.at,
        });
        Ok(true)
    })?;
    each_parted(rows, Table::OutboxCursor, from, to, &mut |key, whole| {
        let output = NameId(number(key)?);
        let (cursor, beyond) = rows_in::cursor_record(&whole).map_err(|e| corrupt(key, &e))?;
        maker.restore_outbox(output, cursor, &beyond);
        absorb(Fact::OutboxConfirmed {
            output,
            cursor,
            beyond,
        });
        Ok(true)
    })?;
    each_parted(rows, Table::DeadLetter, from, to, &mut |key, whole| {
        if key.minor == 0 {
            let last = rows_in::last_letter_record(&whole).map_err(|e| corrupt(key, &e))?;
            // If the letter is kept, its own row says so later.
            absorb(Fact::DeadLetterRemoved {
                route: NameId(number(key)?),
                seq: last,
            });
            return Ok(true);
        }
        let letter = rows_in::letter_record(&whole).map_err(|e| corrupt(key, &e))?;
        absorb(Fact::DeadLetter {
            route: NameId(number(key)?),
            seq: key.minor >> PART_BITS,
            letter: Box::new(letter),
        });
        Ok(true)
    })?;
    each_row(rows, Table::Payload, from, to, &mut |key, value| {
        let end = rows_in::payload_row(&value).map_err(|e| corrupt(key, &e))?;
        maker.restore_payload_use(number(key)?, key.minor, end);
        Ok(true)
    })?;

    let mut open = HashMap::new();
    each_row(rows, Table::OpenRun, from, to, &mut |key, value| {
        if let Some(record) = whole_run(rows, key, &value)? {
            let run = RunSeq(key.major);
            open.insert(run, run_facts(rows, run, record, absorb)?);
        }
        Ok(true)
    })?;
    Ok(open)
}

/// Follows the log behind the rows: which nodes it speaks of, and which ended runs it opens again.
pub(super) struct Replay {
    /// Runs that are resident, and how many of their nodes came from rows.
    open: HashMap<RunSeq, u64>,
    from_rows: u64,
    touched: HashSet<NodeKey>,
    /// The first run number that was never given.
    pub(super) next_run: u64,
}

impl Replay {
    pub(super) fn new(open: HashMap<RunSeq, u64>, next_run: u64) -> Self {
        Self {
            from_rows: open.values().sum(),
            open,
            touched: HashSet::new(),
            next_run,
        }
    }

    /// Goes before the facts of an entry are told; `rows` are those before it. A run that had ended and is opened again by it
    /// is not resident yet, so it is told from the rows.
    pub(super) fn entry(
        &mut self,
        rows: &dyn Rows,
        facts: &[Fact],
        absorb: &mut dyn FnMut(Fact),
    ) -> Result<(), StorageError> {
        for fact in facts {
            match fact {
                Fact::Run { run, record } => {
                    let known = run.0 < self.next_run;
                    if record.ended.is_none() && !self.open.contains_key(run) && known {
                        let key = RowKey {
                            table: Table::EndedRun,
                            major: run.0,
                            minor: 0,
                        };
                        if let Some(value) = rows.get(key)?
                            && let Some(record) = whole_run(rows, key, &value)?
                        {
                            let nodes = run_facts(rows, *run, record, absorb)?;
                            self.from_rows += nodes;
                            self.open.insert(*run, nodes);
                        }
                    }
                    self.open.entry(*run).or_insert(0);
                }
                Fact::Node { node, .. } => self.touch(*node),
                Fact::Nodes {
                    run, first, nodes, ..
                } => {
                    for n in (first.0..).take(nodes.len()) {
                        self.touch(NodeKey::new(*run, NodeIndex(n)));
                    }
                }
                _ => {}
            }
        }
        self.next_run = next_run(self.next_run, facts);
        Ok(())
    }

    fn touch(&mut self, node: NodeKey) {
        let in_rows = self.open.get(&node.run).copied().unwrap_or(0);
        if self.touched.insert(node) && u64::from(node.node.0) < in_rows {
            self.from_rows -= 1;
        }
    }

    /// Nodes whose newest fact came from rows, and from the log.
    pub(super) fn counts(&self) -> (u64, u64) {
        (self.from_rows, self.touched.len() as u64)
    }
}

/// The first run number that was never given, after these facts.
pub(super) fn next_run(before: u64, facts: &[Fact]) -> u64 {
    facts.iter().fold(before, |next, fact| match fact {
        Fact::Run { run, .. } => next.max(run.0 + 1),
        _ => next,
    })
}

/// Streams a run: its record, its nodes' creation, then references and states of those that something has happened to.
/// Gives the number of nodes.
pub(super) fn run_facts(
    rows: &dyn Rows,
    run: RunSeq,
    record: RunRecord,
    absorb: &mut dyn FnMut(Fact),
) -> Result<u64, StorageError> {
    absorb(Fact::Run { run, record });
    let mut group = Group::new(run);
    let mut inputs = Ranges::new(rows, run);
    let mut touched: Vec<(NodeIndex, u64, NodeRecord)> = Vec::new();
    let mut expected = 0u64;
    let from = (run.0, 0);
    let to = (run.0, u64::MAX);
    each_row(rows, Table::Node, from, to, &mut |key, value| {
        let row = rows_in::node_row(key, &value).map_err(|e| corrupt(key, &e))?;
        if key.minor != expected {
            let detail = format!("node {expected} before it is missing");
            return Err(corrupt_text(key, &detail));
        }
        expected += 1;
        let node = NodeIndex(key.minor as u32);
        group.add(node, &row, inputs.of(node)?, &mut touched, absorb);
        if !row.untouched {
            touched.push((node, row.event, row.record));
        }
        Ok(true)
    })?;
    group.close(absorb);

    let mut references = Ranges::new(rows, run);
    touched.sort_unstable_by_key(|(node, ..)| *node);
    for (node, event, record) in touched {
        if record.body == BodyEnd::Structure {
            absorb(Fact::Outcome {
                node: NodeKey::new(run, node),
                is_error: false,
                payload: nothing(),
                references: references.referred(node)?,
            });
        }
        absorb(Fact::Node {
            node: NodeKey::new(run, node),
            event,
            record,
        });
    }
    Ok(expected)
}

fn nothing() -> Payload {
    Payload {
        codec: Codec::Raw,
        body: Body::Inline(Bytes::new()),
    }
}

/// Neighbouring nodes that may have been created together.
struct Group {
    run: RunSeq,
    first: NodeIndex,
    parent: Option<NodeIndex>,
    /// Round and number of the first "created" event, as soon as an untouched node tells them.
    origin: Option<(u32, u64)>,
    round: u32,
    nodes: Vec<CreatedNode>,
}

impl Group {
    fn new(run: RunSeq) -> Self {
        Self {
            run,
            first: NodeIndex(0),
            parent: None,
            origin: None,
            round: 1,
            nodes: Vec::new(),
        }
    }

    /// Adds the next node, after closing the group if it belongs to another. An untouched node whose event does not fit its
    /// group's numbers is told as if touched, so that no event number is lost.
    fn add(
        &mut self,
        node: NodeIndex,
        row: &rows_in::NodeRow,
        inputs: Vec<InputRange>,
        touched: &mut Vec<(NodeIndex, u64, NodeRecord)>,
        absorb: &mut dyn FnMut(Fact),
    ) {
        let record = &row.record;
        if !self.nodes.is_empty() && (record.parent != self.parent || self.nodes.len() >= GROUP) {
            self.close(absorb);
        }
        if self.nodes.is_empty() {
            self.first = node;
            self.parent = record.parent;
            self.origin = None;
            self.round = record.round;
        }
        let offset = u64::from(node.0 - self.first.0);
        if row.untouched {
            match self.origin {
                None => self.origin = row.event.checked_sub(offset).map(|e| (record.round, e)),
                Some((round, event)) if round == record.round && event + offset == row.event => {}
                Some(_) => touched.push((node, row.event, record.clone())),
            }
        }
        self.round = self.round.min(record.round);
        self.nodes.push(CreatedNode {
            spec: record.spec,
            arguments: nothing(),
            inputs,
            not_before: record.not_before,
            not_before_wall: record.not_before_wall,
        });
    }

    fn close(&mut self, absorb: &mut dyn FnMut(Fact)) {
        if self.nodes.is_empty() {
            return;
        }
        // Every earlier node has had an event, so this number is never too high.
        let (round, event) = self
            .origin
            .unwrap_or((self.round, u64::from(self.first.0) + 1));
        absorb(Fact::Nodes {
            run: self.run,
            first: self.first,
            parent: self.parent,
            round,
            event,
            nodes: std::mem::take(&mut self.nodes),
        });
    }
}

/// Walks along the inputs of a run beside its nodes.
struct Ranges<'a> {
    rows: &'a dyn Rows,
    run: RunSeq,
    chunk: std::collections::VecDeque<(RowKey, Bytes)>,
    /// Where the next chunk begins; `None` after the last.
    from: Option<u64>,
}

impl<'a> Ranges<'a> {
    fn new(rows: &'a dyn Rows, run: RunSeq) -> Self {
        Self {
            rows,
            run,
            chunk: std::collections::VecDeque::new(),
            from: Some(0),
        }
    }

    /// The next row, if its number is below `end`; rows below `start` are passed over.
    fn next_within(
        &mut self,
        start: u64,
        end: u64,
    ) -> Result<Option<(RowKey, Bytes)>, StorageError> {
        loop {
            while let Some((key, _)) = self.chunk.front() {
                if key.minor >= end {
                    return Ok(None);
                }
                let row = self.chunk.pop_front();
                if row.as_ref().is_some_and(|(key, _)| key.minor >= start) {
                    return Ok(row);
                }
            }
            let Some(from) = self.from else {
                return Ok(None);
            };
            let chunk = &mut self.chunk;
            self.rows.scan(
                Table::Inputs,
                (self.run.0, from.max(start)),
                (self.run.0, HEADER_TAIL),
                super::reader::SCAN_ROWS,
                &mut |key, value| {
                    chunk.push_back((key, value));
                    true
                },
            )?;
            self.from = match self.chunk.back() {
                Some((key, _)) if self.chunk.len() == super::reader::SCAN_ROWS => {
                    Some(key.minor + 1)
                }
                _ => None,
            };
            if self.chunk.is_empty() {
                return Ok(None);
            }
        }
    }

    fn of(&mut self, node: NodeIndex) -> Result<Vec<InputRange>, StorageError> {
        let start = u64::from(node.0) << 32;
        self.collect(start, start + REFERENCES)
    }

    fn referred(&mut self, node: NodeIndex) -> Result<Vec<InputRange>, StorageError> {
        let start = u64::from(node.0) << 32 | REFERENCES;
        self.collect(start, start + REFERENCES)
    }

    fn collect(&mut self, start: u64, end: u64) -> Result<Vec<InputRange>, StorageError> {
        let mut all = Vec::new();
        let mut expected = None;
        while expected.is_none_or(|n| all.len() < n) {
            let Some((key, value)) = self.next_within(start, end)? else {
                break;
            };
            let part = (all.len() / RANGES_PER_PART) as u64;
            if part == 0 && start & REFERENCES != 0 && key.minor != start {
                // Left over from an earlier attempt that referred to more.
                continue;
            }
            if key.minor - start != part {
                return Err(corrupt_text(key, "a part before it is missing"));
            }
            let said = match expected {
                None => rows_in::ranges_row(&value).map_err(|e| corrupt(key, &e))?.0,
                Some(said) => said,
            };
            expected = Some(said);
            take_ranges(key, &value, said, &mut all)?;
        }
        match expected {
            Some(said) if all.len() < said => Err(StorageError::Corrupt {
                record: format!("inputs of node {:x}/{}", self.run.0, start >> 32),
                detail: "a part is missing".to_owned(),
            }),
            _ => Ok(all),
        }
    }
}
