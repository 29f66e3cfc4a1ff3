//! `dagorama verify` as it is typed: exit codes, what it prints, and that it never changes a store. The sound store is the golden
//! one, which has every kind of record; what is wrong with the others is planted in copies of it.

#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot read its own files has failed"
)]

#[path = "../golden/image.rs"]
#[expect(
    dead_code,
    reason = "golden stores are only written by the format suite"
)]
mod image;
mod planted;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use dagorama::storage::durable::FORMAT;
use serde_json::Value;

/// Every invariant that a store alone can show.
const ALL: [&str; 16] = [
    "I2", "I3", "I4", "I5", "I6", "I7", "I8", "I9", "I10", "I11", "I12", "I14", "I16", "I17",
    "I18", "I19",
];

/// A copy of the sound store.
fn sound() -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let store = dir.path().join("store");
    image::unpack(&image::golden(FORMAT).join("store.image"), &store);
    (dir, store)
}

/// What a verification came to.
struct Seen {
    exit: i32,
    out: String,
    err: String,
}

impl Seen {
    fn json(&self) -> Value {
        serde_json::from_str(&self.out)
            .unwrap_or_else(|error| panic!("{error}: {} {}", self.out, self.err))
    }

    /// One of its invariants.
    fn invariant(&self, id: &str) -> Value {
        let all = self.json()["invariants"].take();
        let found = all.as_array().unwrap().iter().find(|i| i["id"] == id);
        found.unwrap_or_else(|| panic!("no {id}: {all}")).clone()
    }
}

/// Runs the command, and asserts that it left the directory as it was.
fn verify(store: &Path, options: &[&str]) -> Seen {
    let before = store.is_dir().then(|| image::content(store));
    let output = Command::new(env!("CARGO_BIN_EXE_dagorama"))
        .arg("verify")
        .arg(store)
        .args(options)
        .env("NO_COLOR", "1")
        .output()
        .unwrap();
    let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
    let seen = Seen {
        exit: output.status.code().unwrap_or(-1),
        out: text(&output.stdout),
        err: text(&output.stderr),
    };
    let after = store.is_dir().then(|| image::content(store));
    assert!(before == after, "the store was changed: {}", seen.out);
    assert!(!seen.err.contains("panicked"), "{}", seen.err);
    seen
}

#[test]
fn a_sound_store_is_sound_and_everything_was_looked_at() {
    let (_dir, store) = sound();
    for options in [&["--json"][..], &["--json", "--deep"]] {
        let seen = verify(&store, options);
        assert_eq!(seen.exit, 0, "{}", seen.out);
        let document = seen.json();
        assert_eq!(document["sound"], true);
        assert_eq!(document["violations"], 0);
        let ids: Vec<&str> = document["invariants"]
            .as_array()
            .unwrap()
            .iter()
            .map(|i| i["id"].as_str().unwrap())
            .collect();
        assert_eq!(ids, ALL);
        for id in ALL {
            let found = seen.invariant(id);
            assert!(found["checked"].as_u64() > Some(0), "{found}");
            assert_eq!(found["violations"], 0, "{found}");
            assert_eq!(found["skipped"], false, "{found}");
        }
        let totals = &document["totals"];
        for total in [
            "open_runs",
            "ended_runs",
            "nodes",
            "inputs",
            "events",
            "payloads",
            "log_entries",
        ] {
            assert!(totals[total].as_u64() > Some(0), "{total}: {totals}");
        }
        for (table, count) in totals["tables"].as_object().unwrap() {
            assert!(count["rows"].as_u64() > Some(0), "{table}: {count}");
        }
    }
    let people = verify(&store, &[]);
    assert_eq!(people.exit, 0);
    for id in ALL {
        let line = people
            .out
            .lines()
            .find(|line| line.trim_start().starts_with(&format!("{id} ")));
        assert!(
            line.is_some_and(|line| line.contains("holds")),
            "{id}: {line:?}"
        );
    }
    assert!(people.out.ends_with("sound\n"), "{}", people.out);
}

/// A broker that has the store open.
struct Holder(Child);

impl Drop for Holder {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

#[test]
fn a_store_in_use_is_refused_and_sound_after_the_kill() {
    use std::io::{BufRead, BufReader};
    let (dir, store) = sound();
    // The broker of that store knows its output by another rule; what it owes stays owed.
    let mut broker = Command::new(env!("CARGO_BIN_EXE_dagorama"))
        .args([
            "serve",
            "--ready-stdout",
            "--listen",
            "127.0.0.1:0",
            "--data-dir",
        ])
        .arg(&store)
        .env("DAGORAMA_TOKEN", "verify")
        .stdout(Stdio::piped())
        .stderr(fs::File::create(dir.path().join("log")).unwrap())
        .spawn()
        .unwrap();
    let mut line = String::new();
    let out = broker.stdout.take().unwrap();
    let mut broker = Holder(broker);
    BufReader::new(out).read_line(&mut line).unwrap();
    let log = || fs::read_to_string(dir.path().join("log")).unwrap();
    assert!(line.contains("native"), "{line} {}", log());

    // A broker writes while it runs, so only the refusal is compared here.
    let output = Command::new(env!("CARGO_BIN_EXE_dagorama"))
        .args(["verify", "--json"])
        .arg(&store)
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(3));
    let document: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(document["code"], "STORE_LOCKED", "{document}");
    let pid = broker.0.id().to_string();
    let message = document["message"].as_str().unwrap();
    assert!(message.contains(&pid), "{message} names {pid}");

    broker.0.kill().unwrap();
    broker.0.wait().unwrap();
    let seen = verify(&store, &["--json", "--deep"]);
    assert_eq!(seen.exit, 0, "{}", seen.out);
}

#[test]
fn what_is_no_store_is_told_by_its_exit_code() {
    let dir = tempfile::tempdir().unwrap();
    let nothing = dir.path().join("nothing");
    let seen = verify(&nothing, &["--json"]);
    assert_eq!(
        (seen.exit, &seen.json()["code"]),
        (3, &"INVALID_REQUEST".into())
    );
    assert!(!nothing.exists());
    let file = dir.path().join("file");
    fs::write(&file, b"years of work").unwrap();
    assert_eq!(verify(&file, &[]).exit, 3);
    let empty = dir.path().join("empty");
    fs::create_dir(&empty).unwrap();
    let seen = verify(&empty, &["--json"]);
    assert_eq!(
        (seen.exit, &seen.json()["code"]),
        (3, &"INVALID_REQUEST".into())
    );
    fs::write(empty.join("thesis.tex"), b"years of work").unwrap();
    assert_eq!(verify(&empty, &[]).exit, 3);

    // One that has lost something was a store.
    let (_dir, store) = sound();
    fs::remove_file(store.join("FORMAT")).unwrap();
    let seen = verify(&store, &["--json"]);
    assert_eq!(
        (seen.exit, &seen.json()["code"]),
        (2, &"STORE_CORRUPT".into())
    );
    let (_dir, store) = sound();
    fs::write(store.join("FORMAT"), "dagorama store\nformat 99\n").unwrap();
    let seen = verify(&store, &["--json"]);
    assert_eq!(
        (seen.exit, &seen.json()["code"]),
        (2, &"FORMAT_TOO_NEW".into())
    );
    for part in ["log", "state"] {
        let (_dir, store) = sound();
        fs::remove_dir_all(store.join(part)).unwrap();
        let seen = verify(&store, &["--json"]);
        assert_eq!(seen.exit, 2, "without {part}: {}", seen.out);
    }
}
