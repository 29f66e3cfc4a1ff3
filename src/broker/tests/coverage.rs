//! The scripts together must have used every kind of command, seen every code that the broker can say, and every reason.

use std::collections::BTreeSet;

use super::render::REASONS;
use super::script::check;
use crate::broker::command::Code;

/// Kinds of commands, as `script::kind` names them.
const KINDS: [&str; 16] = [
    "Submit",
    "DeadLetter",
    "Attach",
    "Detach",
    "Close",
    "Credit",
    "Touch",
    "Finish",
    "CreateChildren",
    "Cancel",
    "Resume",
    "ConfirmOutbox",
    "DropDeadLetter",
    "SeekInbox",
    "Expire",
    "Tick",
];

/// What is said by the engine, the listeners or the store, and never by the broker.
const OTHERS: [Code; 6] = [
    Code::Overloaded,
    Code::DiskFull,
    Code::Unauthenticated,
    Code::Stopping,
    Code::NotAvailable,
    Code::StoreCorrupt,
];

#[test]
fn every_command_code_and_reason_appears_in_a_script() {
    let files = [
        super::submit::SCRIPTS,
        super::finish::SCRIPTS,
        super::lease::SCRIPTS,
        super::retry::SCRIPTS,
        super::cancel_resume::SCRIPTS,
        super::lanes::SCRIPTS,
        super::promises::SCRIPTS,
        super::inbox_outbox::SCRIPTS,
        super::sessions::SCRIPTS,
        super::explain::SCRIPTS,
        super::retention::SCRIPTS,
        super::limits::SCRIPTS,
        super::edges::SCRIPTS,
    ];
    let mut seen = BTreeSet::new();
    for (name, script) in files.concat() {
        seen.extend(check(name, script));
    }
    let codes = Code::ALL
        .iter()
        .filter(|code| !OTHERS.contains(code))
        .map(|code| code.as_str());
    let missing: Vec<&str> = KINDS
        .into_iter()
        .chain(REASONS)
        .chain(codes)
        .filter(|word| !seen.contains(*word))
        .collect();
    assert!(missing.is_empty(), "no script shows {missing:?}");
}
