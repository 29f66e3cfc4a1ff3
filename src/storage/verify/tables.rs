//! Tables without runs: specs, names, keys, positions, outboxes, dead letters, and who uses which payload segment.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::path::{Path, PathBuf};

use super::pages::Header;
use super::{Findings, I12, I14, I16, I17, I18};
use crate::broker::outcome::Fact;
use crate::broker::types::{Body, NameId, Payload, PayloadRef};
use crate::storage::StorageError;
use crate::storage::payloads::Payloads;
use crate::storage::reader::{PayloadSource, corrupt, each_parted, each_row};
use crate::storage::records::{PART_BITS, rows_in};
use crate::storage::row::Table;
use crate::storage::rows::Rows;

const EVERYTHING: ((u64, u64), (u64, u64)) = ((0, 0), (u64::MAX, u64::MAX));
/// Marks the owner of a payload that is a dead letter.
const LETTER: u64 = 1 << 63;

/// What runs are compared with.
#[derive(Debug, Default)]
pub(super) struct Known {
    /// Numbers of specs.
    pub(super) specs: HashSet<u64>,
    /// Keys and the runs they belong to, ascending.
    pub(super) keys: Vec<(u128, Option<u64>)>,
    /// Deliveries owed of each run: node, round, output.
    pub(super) owed: BTreeMap<u64, Vec<(u32, u32, u64)>>,
    /// Dead letters, as owners of payloads.
    letters: BTreeSet<u64>,
}

/// A record that does not decode is one violation, and the rest of the table is not looked at.
fn told(result: Result<(), StorageError>, table: Table, findings: &mut Findings) {
    if let Err(error) = result {
        findings.violation(I17, || format!("table {table:?}: {error}"));
    }
}

/// Checks all tables but those of runs.
pub(super) fn check(
    rows: &dyn Rows,
    next_run: u64,
    references: &mut References<'_>,
    findings: &mut Findings,
) -> Known {
    let (from, to) = EVERYTHING;
    let mut known = Known::default();
    let found = each_parted(rows, Table::Spec, from, to, &mut |key, whole| {
        rows_in::spec_record(&whole).map_err(|e| corrupt(key, &e))?;
        findings.checked(I17, 1);
        known.specs.insert(key.major);
        Ok(true)
    });
    told(found, Table::Spec, findings);
    let mut names = BTreeMap::new();
    let found = each_parted(rows, Table::Name, from, to, &mut |key, whole| {
        let name = rows_in::name_record(&whole).map_err(|e| corrupt(key, &e))?;
        findings.checked(I17, 1);
        if let Some(other) = names.insert(name.to_owned(), key.major) {
            findings.violation(I18, || {
                format!("names {other} and {} are the same", key.major)
            });
        }
        Ok(true)
    });
    told(found, Table::Name, findings);
    let found = each_parted(rows, Table::Announced, from, to, &mut |key, whole| {
        let fact = rows_in::announced_record(&whole).map_err(|e| corrupt(key, &e))?;
        if let Fact::Announced { action, spec } = fact {
            findings.check(I18, known.specs.contains(&u64::from(spec.0)), || {
                format!(
                    "action {action} was announced with spec {}, which is missing",
                    spec.0
                )
            });
        }
        Ok(true)
    });
    told(found, Table::Announced, findings);
    let found = each_row(rows, Table::Key, from, to, &mut |key, value| {
        let fact = rows_in::key_row(key, &value).map_err(|e| corrupt(key, &e))?;
        if let Fact::Key { key, run, .. } = fact {
            let run = run.map(|run| run.seq.0);
            findings.check(I14, run.is_none_or(|run| run < next_run), || {
                format!("key {:032x} belongs to a run that was not given yet", key.0)
            });
            known.keys.push((key.0, run));
        }
        Ok(true)
    });
    told(found, Table::Key, findings);
    known.keys.sort_unstable();
    for pair in known.keys.windows(2) {
        if pair[0].0 == pair[1].0 {
            findings.violation(I14, || format!("key {:032x} is there twice", pair[0].0));
        }
    }
    let mut partitions = BTreeSet::new();
    let found = each_parted(rows, Table::Position, from, to, &mut |key, whole| {
        let route = NameId(key.major as u32);
        let fact = rows_in::position_record(route, &whole).map_err(|e| corrupt(key, &e))?;
        if let Fact::Position { partition, .. } = fact {
            let is_new = partitions.insert((key.major, partition.clone()));
            findings.check(I14, is_new, || {
                format!(
                    "partition {partition} of route {} is there twice",
                    key.major
                )
            });
        }
        Ok(true)
    });
    told(found, Table::Position, findings);
    let mut given: BTreeMap<u64, u64> = BTreeMap::new();
    let found = each_parted(rows, Table::DeadLetter, from, to, &mut |key, whole| {
        if key.minor == 0 {
            let last = rows_in::last_letter_record(&whole).map_err(|e| corrupt(key, &e))?;
            given.insert(key.major, last);
            return Ok(true);
        }
        let letter = rows_in::letter_record(&whole).map_err(|e| corrupt(key, &e))?;
        findings.checked(I17, 1);
        let seq = key.minor >> PART_BITS;
        // Row 0 of a route comes first.
        findings.check(
            I18,
            given.get(&key.major).is_some_and(|&last| seq <= last),
            || format!("dead letter {seq} of route {} was not given yet", key.major),
        );
        let owner = LETTER | key.major << 40 | seq & ((1 << 40) - 1);
        known.letters.insert(owner);
        references.payload(&letter.body, owner, findings);
        Ok(true)
    });
    told(found, Table::DeadLetter, findings);
    check_outboxes(rows, &mut known, findings);
    known
}

/// Checks what is owed: once, and without a hole behind the cursor. Whether the nodes have settled is for their runs to say.
fn check_outboxes(rows: &dyn Rows, known: &mut Known, findings: &mut Findings) {
    let (from, to) = EVERYTHING;
    let mut confirmed: BTreeMap<u64, (u64, Vec<u64>)> = BTreeMap::new();
    let found = each_parted(rows, Table::OutboxCursor, from, to, &mut |key, whole| {
        let cursor = rows_in::cursor_record(&whole).map_err(|e| corrupt(key, &e))?;
        confirmed.insert(key.major, cursor);
        Ok(true)
    });
    told(found, Table::OutboxCursor, findings);
    let mut owed: HashSet<(u64, u64, u32, u32)> = HashSet::new();
    let mut numbers: BTreeMap<u64, BTreeSet<u64>> = BTreeMap::new();
    let found = each_row(rows, Table::Outbox, from, to, &mut |key, value| {
        let record = rows_in::outbox_row(key, &value).map_err(|e| corrupt(key, &e))?;
        let node = record.node;
        let once = owed.insert((key.major, node.run.0, node.node.0, record.round));
        findings.check(I12, once, || {
            format!(
                "outbox {} owes node {node} of round {} twice",
                key.major, record.round
            )
        });
        let (cursor, beyond) = confirmed.get(&key.major).cloned().unwrap_or_default();
        if key.minor < cursor || beyond.contains(&key.minor) {
            findings.violation(I12, || {
                format!(
                    "outbox {} owes {} although it is confirmed",
                    key.major, key.minor
                )
            });
        }
        known
            .owed
            .entry(node.run.0)
            .or_default()
            .push((node.node.0, record.round, key.major));
        numbers.entry(key.major).or_default().insert(key.minor);
        Ok(true)
    });
    told(found, Table::Outbox, findings);
    for (output, mut present) in numbers {
        let (cursor, beyond) = confirmed.get(&output).cloned().unwrap_or_default();
        present.extend(beyond);
        let first = cursor.max(1);
        let last = present.last().copied().unwrap_or(first);
        let wanted = (last + 1).saturating_sub(first);
        findings.check(I12, present.len() as u64 == wanted, || {
            format!(
                "outbox {output} has {} of {wanted} deliveries",
                present.len()
            )
        });
    }
}

/// References to large payloads, and what they refer to.
pub(super) struct References<'a> {
    payloads: &'a Payloads,
    dir: PathBuf,
    deep: bool,
    lengths: BTreeMap<u32, Option<u64>>,
    /// How far each owner uses each segment.
    used: BTreeMap<(u32, u64), u64>,
}

impl<'a> References<'a> {
    pub(super) fn new(payloads: &'a Payloads, dir: &Path, deep: bool) -> Self {
        Self {
            payloads,
            dir: dir.to_owned(),
            deep,
            lengths: BTreeMap::new(),
            used: BTreeMap::new(),
        }
    }

    /// Checks the payload that `owner` has, if it is a stored one.
    pub(super) fn payload(&mut self, payload: &Payload, owner: u64, findings: &mut Findings) {
        let Body::Stored(at) = &payload.body else {
            return;
        };
        findings.totals.payloads += 1;
        findings.totals.payload_bytes += u64::from(at.length);
        let end = at.offset.saturating_add(u64::from(at.length));
        let used = self.used.entry((at.segment, owner)).or_default();
        *used = end.max(*used);
        let wrong = if self.deep {
            self.payloads.read(*at).err().map(|e| e.to_string())
        } else {
            self.misplaced(at)
        };
        findings.check(I16, wrong.is_none(), || {
            format!("{}: {}", owner_name(owner), wrong.unwrap_or_default())
        });
    }

    fn misplaced(&mut self, at: &PayloadRef) -> Option<String> {
        let path = self.dir.join(format!("{:08x}.pay", at.segment));
        let length = self
            .lengths
            .entry(at.segment)
            .or_insert_with(|| std::fs::metadata(&path).ok().map(|data| data.len()));
        match length {
            None => Some(format!("payload segment {} is missing", path.display())),
            Some(length) if at.offset.saturating_add(u64::from(at.length)) > *length => {
                Some(format!(
                    "payload at byte {} lies behind the end of {}",
                    at.offset,
                    path.display()
                ))
            }
            Some(_) => None,
        }
    }

    /// Compares the uses with the table that says who uses which segment, both ways, and counts segments without a use.
    pub(super) fn finish(
        &mut self,
        rows: &dyn Rows,
        known: &Known,
        headers: &[Header],
        findings: &mut Findings,
    ) {
        let (from, to) = EVERYTHING;
        let mut stated: BTreeMap<(u32, u64), u64> = BTreeMap::new();
        let found = each_row(rows, Table::Payload, from, to, &mut |key, value| {
            let end = rows_in::payload_row(&value).map_err(|e| corrupt(key, &e))?;
            let owner = key.minor;
            let exists = if owner & LETTER == 0 {
                headers.binary_search_by_key(&owner, |h| h.run).is_ok()
            } else {
                known.letters.contains(&owner)
            };
            findings.check(I18, exists, || {
                format!(
                    "segment {:x} is used by {}, which is gone",
                    key.major,
                    owner_name(owner)
                )
            });
            stated.insert((key.major as u32, owner), end);
            Ok(true)
        });
        told(found, Table::Payload, findings);
        // A segment's end is stated by whoever wrote last into it.
        let mut ends: BTreeMap<u32, u64> = BTreeMap::new();
        for (&(segment, _), &end) in &stated {
            let known = ends.entry(segment).or_default();
            *known = end.max(*known);
        }
        for (&(segment, owner), &end) in &self.used {
            let is_stated = stated.contains_key(&(segment, owner));
            let reaches = ends.get(&segment).is_some_and(|&stated| stated >= end);
            findings.check(I18, is_stated && reaches, || {
                format!(
                    "the use of segment {segment:x} by {} is not noted",
                    owner_name(owner)
                )
            });
        }
        if let Ok(files) = std::fs::read_dir(&self.dir) {
            for file in files.flatten() {
                let name = file.file_name();
                let number = name
                    .to_str()
                    .and_then(|name| u32::from_str_radix(name.strip_suffix(".pay")?, 16).ok());
                let orphan = number.is_some_and(|number| !ends.contains_key(&number));
                findings.totals.orphan_segments += u64::from(orphan);
            }
        }
    }
}

fn owner_name(owner: u64) -> String {
    if owner & LETTER == 0 {
        format!("run {owner:x}")
    } else {
        let (route, seq) = (owner >> 40 & 0x7f_ffff, owner & ((1 << 40) - 1));
        format!("dead letter {seq} of route {route}")
    }
}
