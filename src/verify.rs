//! `dagorama verify`: checks a copy of a store and prints what was looked at.

use std::path::Path;
use std::process::ExitCode;

/// Runs the check. Exit 0 sound, 1 an invariant is broken, 2 unreadable, 3 usage.
pub fn run(store: &Path, as_json: bool, deep: bool) -> ExitCode {
    let _ = (store, as_json, deep);
    ExitCode::from(3)
}
