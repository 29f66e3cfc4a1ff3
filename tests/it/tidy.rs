//! Reads the source tree and explains what is not where it should be, so that the picture in `docs/ARCHITECTURE.md` stays true.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// What each room of `src/` may name in `crate::…`. A new arrow needs a page in `docs/decisions/` first.
const ARROWS: &[(&str, &[&str])] = &[
    ("broker", &["broker"]),
    ("storage", &["broker", "storage"]),
    ("engine", &["broker", "storage", "engine"]),
    ("error", &["broker", "storage", "error"]),
    (
        "config",
        &["broker", "storage", "engine", "error", "config"],
    ),
    ("edge", &["broker", "storage", "engine", "error", "edge"]),
    ("client", &["broker", "edge", "error", "client"]),
    (
        "bridges",
        &["broker", "storage", "engine", "error", "config", "bridges"],
    ),
];

/// Crates that only one room may know.
const GUARDED: &[(&str, &str)] = &[
    ("sled", "storage"),
    ("bincode", "storage"),
    ("clap", "cli main"),
    ("libc", "storage"),
];

/// Crates the broker may use beside the standard library: it is read, tested and fuzzed alone.
const BROKER_MAY_USE: &[&str] = &["bytes", "thiserror", "siphasher", "xxhash_rust"];

const LONGEST_FILE: usize = 800;

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn files(directory: &Path, end: &str, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        if path.is_dir()
            && !["target", "node_modules", "__pycache__", "pb"].contains(&name.as_str())
            && !name.starts_with('.')
        {
            files(&path, end, found);
        } else if name.ends_with(end) {
            found.push(path);
        }
    }
}

fn sources(below: &str, end: &str) -> BTreeMap<String, String> {
    let mut found = Vec::new();
    files(&root().join(below), end, &mut found);
    found
        .into_iter()
        .map(|path| {
            (
                path.strip_prefix(root())
                    .unwrap()
                    .to_string_lossy()
                    .into_owned(),
                std::fs::read_to_string(&path).unwrap(),
            )
        })
        .collect()
}

/// Code without comments; strings stay.
fn code(text: &str) -> String {
    let lines: Vec<&str> = text
        .lines()
        .filter(|line| !line.trim_start().starts_with("//"))
        .collect();
    lines.join("\n")
}

fn room(path: &str) -> String {
    path.trim_start_matches("src/")
        .split('/')
        .next()
        .unwrap()
        .trim_end_matches(".rs")
        .to_owned()
}

fn words_after<'a>(text: &'a str, prefix: &'a str) -> impl Iterator<Item = &'a str> {
    text.match_indices(prefix)
        .filter(|(at, _)| {
            !text[..*at]
                .ends_with(|c: char| c.is_alphanumeric() || c == '_' || c == ':' || c == '$')
        })
        .map(move |(at, _)| {
            let rest = &text[at + prefix.len()..];
            &rest[..rest
                .find(|c: char| !c.is_alphanumeric() && c != '_')
                .unwrap_or(rest.len())]
        })
}

fn problems(path: &str, text: &str) -> Vec<String> {
    let code = code(text);
    let room = room(path);
    let mut problems = Vec::new();
    if let Some((_, may)) = ARROWS.iter().find(|(name, _)| *name == room) {
        for target in words_after(&code, "crate::") {
            if !may.contains(&target) && target != "test_support" {
                problems.push(format!("{path}: names crate::{target}; the room `{room}` may only name {may:?} (docs/ARCHITECTURE.md §1)"));
            }
        }
    }
    for (name, owner) in GUARDED {
        if !owner.split(' ').any(|name| name == room)
            && words_after(&code, &format!("{name}::")).next().is_some()
        {
            problems.push(format!(
                "{path}: uses the crate {name}, which only src/{owner} may know"
            ));
        }
    }
    if room == "broker" && !path.contains("/tests/") {
        for name in [
            "tokio",
            "serde",
            "serde_json",
            "tracing",
            "std::time::SystemTime",
            "std::time::Instant",
            "std::thread",
            "std::fs",
            "std::net",
        ] {
            if code.contains(&format!("{name}::")) || code.contains(&format!("{name};")) {
                problems.push(format!("{path}: the broker is pure and may not use {name}; beside std it has {BROKER_MAY_USE:?}"));
            }
        }
        for map in ["HashMap", "HashSet"] {
            if code.contains(map) {
                problems.push(format!("{path}: {map} iterates in another order each run; the broker uses BTreeMap and Vec"));
            }
        }
    }
    if code.contains("unsafe") && path != "src/storage/sync_shim.rs" {
        problems.push(format!(
            "{path}: `unsafe` lives in src/storage/sync_shim.rs only"
        ));
    }
    if !text.starts_with("//!") {
        problems.push(format!(
            "{path}: a file opens with //! and says what it is for"
        ));
    }
    let lines = text.lines().count();
    if lines > LONGEST_FILE {
        problems.push(format!("{path}: {lines} lines; which room inside wants a file of its own? (at most {LONGEST_FILE})"));
    }
    problems
}

#[test]
fn the_source_tree_is_tidy() {
    let mut all = Vec::new();
    for (path, text) in sources("src", ".rs") {
        all.extend(problems(&path, &text));
    }
    assert!(all.is_empty(), "{}", all.join("\n"));
}

#[test]
fn tidy_says_no() {
    for (path, text, expected) in [
        (
            "src/broker/run.rs",
            "//! x\nuse crate::engine::Handle;",
            "may only name",
        ),
        (
            "src/engine/mod.rs",
            "//! x\nuse sled::Db;",
            "only src/storage",
        ),
        (
            "src/broker/run.rs",
            "//! x\nuse std::collections::HashMap;",
            "iterates in another order",
        ),
        (
            "src/broker/run.rs",
            "//! x\nuse std::time::Instant;",
            "is pure",
        ),
        ("src/edge/mod.rs", "//! x\nunsafe fn f() {}", "sync_shim"),
        ("src/edge/mod.rs", "fn f() {}", "opens with //!"),
    ] {
        let found = problems(path, text);
        assert!(
            found.iter().any(|problem| problem.contains(expected)),
            "{path} {text}: {found:?}"
        );
    }
    assert!(
        problems(
            "src/engine/mod.rs",
            "//! x\n// crate::server is not named here\nuse crate::broker::Broker;"
        )
        .is_empty()
    );
}

#[test]
fn nothing_is_left_open() {
    let mut left = Vec::new();
    for (below, end) in [
        ("src", ".rs"),
        ("bridges", ".rs"),
        ("tests", ".rs"),
        ("python", ".py"),
        ("examples", ".py"),
    ] {
        for (path, text) in sources(below, end) {
            if path == "tests/it/tidy.rs" {
                continue;
            }
            for mark in [
                "todo!(",
                "unimplemented!(",
                "#[ignore",
                "FIXME",
                "XXX",
                "pytest.mark.skip",
                "pytest.mark.xfail",
            ] {
                if text.contains(mark) {
                    left.push(format!("{path}: {mark}"));
                }
            }
        }
    }
    assert!(left.is_empty(), "{}", left.join("\n"));
}
