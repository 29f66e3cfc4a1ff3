//! `dagorama verify`: checks a copy of a store and prints what was looked at, an invariant a line.

use std::fmt::Write as _;
use std::path::Path;
use std::process::ExitCode;

use serde_json::{Value, json};

use crate::commands::{remark, say};
use crate::storage::StorageError;
use crate::storage::verify::{VerifyOptions, VerifyReport, verify};

/// Exit codes of `verify` (INVARIANTS §4).
const BROKEN: u8 = 1;
const UNREADABLE: u8 = 2;
const USAGE: u8 = 3;

/// Runs the check. Exit 0 sound, 1 an invariant is broken, 2 unreadable, 3 usage.
pub fn run(store: &Path, as_json: bool, deep: bool) -> ExitCode {
    if !store.is_dir() {
        return tell(
            as_json,
            USAGE,
            "INVALID_REQUEST",
            &format!(
                "{} is no directory: name the data directory of a broker",
                store.display()
            ),
        );
    }
    // Without any of these it was never a store; a store that lost some is damaged, and the check says what it lacks.
    if !["FORMAT", "state", "log", "payloads"]
        .iter()
        .any(|part| store.join(part).exists())
    {
        return tell(
            as_json,
            USAGE,
            "INVALID_REQUEST",
            &format!(
                "{} is not a store: name the data directory of a broker",
                store.display()
            ),
        );
    }
    match verify(
        store,
        &VerifyOptions {
            deep,
            scratch: None,
        },
    ) {
        Ok(report) => {
            if as_json {
                say(document(&report));
            } else {
                print(&report);
            }
            ExitCode::from(if !report.unreadable.is_empty() {
                UNREADABLE
            } else if report.is_sound() {
                0
            } else {
                BROKEN
            })
        }
        Err(error @ StorageError::Locked { .. }) => {
            tell(as_json, USAGE, "STORE_LOCKED", &error.to_string())
        }
        Err(error) => {
            let message = match &error {
                // Its own text advises to run this command.
                StorageError::Corrupt { record, detail } => {
                    format!("{record} is damaged: {detail}; restore a backup")
                }
                other => other.to_string(),
            };
            let code = crate::error::code_of_storage(&error);
            tell(as_json, UNREADABLE, code, &message)
        }
    }
}

fn tell(as_json: bool, exit: u8, code: &str, message: &str) -> ExitCode {
    if as_json {
        say(json!({"sound": false, "code": code, "message": message}));
    }
    remark(format_args!("dagorama: {code}: {message}"));
    ExitCode::from(exit)
}

fn hex(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(2 * bytes.len());
    for byte in bytes {
        let _ = write!(text, "{byte:02x}");
    }
    text
}

fn document(report: &VerifyReport) -> Value {
    let invariants: Vec<Value> = report
        .invariants
        .iter()
        .map(|found| {
            json!({"id": found.id, "text": found.text, "checked": found.checked, "violations": found.violations, "first": found.first, "skipped": found.was_skipped()})
        })
        .collect();
    let totals = &report.totals;
    let tables: serde_json::Map<String, Value> = totals
        .tables
        .iter()
        .map(|(name, count)| {
            (
                name.clone(),
                json!({"pages": count.pages, "bytes": count.bytes, "rows": count.rows}),
            )
        })
        .collect();
    json!({
        "sound": report.is_sound(), "store": hex(&report.store_id), "format": report.format, "sequence": report.sequence, "violations": report.violations(),
        "unreadable": report.unreadable, "invariants": invariants,
        "totals": {
            "tables": tables, "log_entries": totals.log_entries, "log_facts": totals.log_facts, "open_runs": totals.open_runs, "ended_runs": totals.ended_runs,
            "nodes": totals.nodes, "inputs": totals.inputs, "events": totals.events, "payloads": totals.payloads, "payload_bytes": totals.payload_bytes,
            "orphan_segments": totals.orphan_segments, "copied_bytes": totals.copied_bytes,
        },
    })
}

fn print(report: &VerifyReport) {
    say(format!(
        "store {} (format {}), up to entry {}",
        hex(&report.store_id),
        report.format,
        report.sequence
    ));
    for found in &report.invariants {
        let verdict = match (found.violations, found.was_skipped()) {
            (0, false) => "holds".to_owned(),
            (0, true) => "NOT CHECKED although there is something to check".to_owned(),
            (n, _) => format!("BROKEN {n} times"),
        };
        say(format!(
            "{:>4}  {verdict:<8}  {:>9} checked  {}",
            found.id, found.checked, found.text
        ));
        for key in &found.first {
            say(format!("        {key}"));
        }
    }
    for what in &report.unreadable {
        say(format!("UNREADABLE {what}"));
    }
    let totals = &report.totals;
    say(format!(
        "{} open and {} ended runs, {} nodes, {} events, {} payloads of {} bytes; {} log entries; {} bytes were copied to look at",
        totals.open_runs,
        totals.ended_runs,
        totals.nodes,
        totals.events,
        totals.payloads,
        totals.payload_bytes,
        totals.log_entries,
        totals.copied_bytes
    ));
    say(if report.is_sound() {
        "sound"
    } else {
        "NOT SOUND: keep the directory as it is, and restore a backup or ask"
    });
}
