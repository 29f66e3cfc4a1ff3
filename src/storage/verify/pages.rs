//! Every page, sum and link (I17), and which runs have rows (I18, I19).

use std::collections::BTreeMap;

use super::{Findings, I17, I18, I19, TableCount};
use crate::storage::StorageError;
use crate::storage::digest::{
    CHUNKS, ENDED, GROUPS, HEADLESS, OPEN, PageSum, RUN_TABLES, RunDigest, chunk_of, run_table,
};
use crate::storage::meta::META_KEY;
use crate::storage::overlay::TABLES;
use crate::storage::paged_table::{LAST, parse};
use crate::storage::pages::{KEY_BYTES, NONE, PageKey, key_parts};
use crate::storage::sled::PROOF_KEY;
use crate::storage::state::State;

/// A run that has a header.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Header {
    /// Its number.
    pub(super) run: u64,
    /// It goes on.
    pub(super) open: bool,
}

/// Tables of pages beside those of rows.
const OWN: [u8; 2] = [HEADLESS, CHUNKS];

fn is_known(table: u8) -> bool {
    OWN.contains(&table) || TABLES.iter().any(|&t| t as u8 == table)
}

/// Checks each page as it lies there, each link, and each sum.
pub(super) fn check(state: &State, findings: &mut Findings) -> Result<(), StorageError> {
    let mut owners: BTreeMap<u64, RunDigest> = BTreeMap::new();
    let mut stated: BTreeMap<u64, RunDigest> = BTreeMap::new();
    let mut chunks: BTreeMap<u64, PageSum> = BTreeMap::new();
    let mut stated_chunks: BTreeMap<u64, PageSum> = BTreeMap::new();
    let mut groups: BTreeMap<u8, PageSum> = BTreeMap::new();
    let meta = state.meta();
    let mut expected = (0, NONE);
    for item in state.sled().tree.iter() {
        let (key, bytes) = item?;
        if key == META_KEY || key == PROOF_KEY {
            continue;
        }
        findings.checked(I17, 1);
        let Ok(key) = PageKey::try_from(&key[..]) else {
            findings.violation(I17, || {
                format!("key {key:?} has {} bytes instead of {KEY_BYTES}", key.len())
            });
            continue;
        };
        let (table, place) = key_parts(&key);
        if !is_known(table) {
            findings.violation(I17, || format!("table {table:#x} is unknown"));
            continue;
        }
        if table != expected.0 {
            end_of_table(expected, findings);
            expected = (table, meta.first(table));
        }
        if place != expected.1 {
            let (table, (major, minor)) = (char::from(table), place);
            findings.violation(I17, || {
                format!("page {table}/{major:x}/{minor:x} is not the one expected there")
            });
        }
        let view = match parse(&key, &bytes) {
            Ok(view) => view,
            Err(error) => {
                findings.violation(I17, || error.to_string());
                expected.1 = NONE;
                continue;
            }
        };
        expected.1 = view.next();
        if view.position() > meta.high {
            findings.violation(I17, || {
                format!(
                    "page {}/{:x}/{:x} reaches entry {}, the state {}",
                    char::from(table),
                    place.0,
                    place.1,
                    view.position(),
                    meta.high
                )
            });
        }
        if let Some(number) = run_table(table) {
            owners.entry(place.0).or_default().tables[number].add(view.checksum());
            continue;
        }
        if table == ENDED {
            chunks
                .entry(chunk_of(place.0))
                .or_default()
                .add(view.checksum());
        } else {
            groups.entry(table).or_default().add(view.checksum());
        }
        for entry in view.entries() {
            let run = entry.place.0;
            let read = match table {
                OPEN | ENDED | HEADLESS => RunDigest::read(entry.value)
                    .map(|(digest, _)| stated.entry(run).or_default().merge(&digest)),
                CHUNKS => PageSum::from_bytes(entry.value).map(|sum| {
                    stated_chunks.insert(run, sum);
                }),
                _ => Ok(()),
            };
            if let Err(error) = read {
                findings.violation(I17, || {
                    format!("header {}/{run:x}: {}", char::from(table), error.0)
                });
            }
        }
    }
    end_of_table(expected, findings);
    for table in GROUPS {
        let found = groups.get(&table).copied().unwrap_or_default();
        findings.check(I17, meta.groups.get(&table) == Some(&found), || {
            format!("the sum over table {} does not hold", char::from(table))
        });
    }
    compare(&chunks, &stated_chunks, |chunk, holds| {
        findings.check(I17, holds, || {
            format!("the sum over chunk {chunk:x} of ended runs does not hold")
        });
    });
    stated.retain(|_, digest| !digest.is_zero());
    compare(&owners, &stated, |run, holds| {
        findings.check(I17, holds, || {
            format!("the digest of run {run:x} does not hold")
        });
    });
    Ok(())
}

fn end_of_table((table, next): (u8, (u64, u64)), findings: &mut Findings) {
    if next != NONE {
        findings.violation(I17, || {
            format!(
                "page {}/{:x}/{:x} is missing",
                char::from(table),
                next.0,
                next.1
            )
        });
    }
}

/// Visits the keys of both, with whether both say the same.
fn compare<V: PartialEq>(
    found: &BTreeMap<u64, V>,
    stated: &BTreeMap<u64, V>,
    mut visit: impl FnMut(u64, bool),
) {
    for (&key, value) in found {
        visit(key, stated.get(&key) == Some(value));
    }
    for &key in stated.keys().filter(|key| !found.contains_key(key)) {
        visit(key, false);
    }
}

/// The runs that have a header, ascending; checks that each has one, and that no row belongs to a run without.
pub(super) fn check_owners(
    state: &State,
    findings: &mut Findings,
) -> Result<Vec<Header>, StorageError> {
    let mut headers = Vec::new();
    for (table, open) in [(OPEN, true), (ENDED, false)] {
        for page in state.pages().pages(table, (0, 0), LAST) {
            let (key, bytes) = page?;
            let Ok(view) = parse(&key, &bytes) else {
                continue; // told already
            };
            headers.extend(view.entries().map(|e| Header {
                run: e.place.0,
                open,
            }));
        }
    }
    headers.sort_unstable();
    for pair in headers.windows(2) {
        findings.check(I18, pair[0].run != pair[1].run, || {
            format!("run {:x} is both open and ended", pair[0].run)
        });
    }
    findings.checked(I18, headers.len().min(1) as u64);
    let next_run = state.meta().state.next_run;
    if let Some(last) = headers.last() {
        findings.check(I18, last.run < next_run, || {
            format!("run {:x} was not given yet", last.run)
        });
    }
    for table in RUN_TABLES {
        let mut last = None;
        for page in state.pages().pages(table, (0, 0), LAST) {
            let (key, bytes) = page?;
            let Ok(view) = parse(&key, &bytes) else {
                continue;
            };
            for entry in view.entries() {
                let run = entry.place.0;
                if last != Some(run) {
                    last = Some(run);
                    let known = headers.binary_search_by_key(&run, |header| header.run);
                    findings.check(I19, known.is_ok(), || {
                        format!(
                            "run {run:x} has rows in {} and no header",
                            char::from(table)
                        )
                    });
                }
            }
        }
    }
    for page in state.pages().pages(HEADLESS, (0, 0), LAST) {
        let (key, _) = page?;
        findings.violation(I19, || {
            format!("runs from {:x} on are half deleted", key_parts(&key).1.0)
        });
    }
    headers.dedup_by_key(|header| header.run);
    Ok(headers)
}

/// Counts pages, bytes and rows.
pub(super) fn count(state: &State, findings: &mut Findings) -> Result<(), StorageError> {
    for table in TABLES {
        let mut count = TableCount::default();
        for page in state.pages().pages(table as u8, (0, 0), LAST) {
            let (key, bytes) = page?;
            count.pages += 1;
            count.bytes += bytes.len() as u64;
            if let Ok(view) = parse(&key, &bytes) {
                count.rows += view.len() as u64;
            }
        }
        findings.totals.tables.push((format!("{table:?}"), count));
    }
    Ok(())
}
