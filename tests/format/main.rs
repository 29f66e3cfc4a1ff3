//! The format of a store: what an older version wrote is read for ever, what a newer one wrote is left alone, and so is what no
//! version wrote.
//!
//! `UPDATE_GOLDEN=1` writes the golden store of the current version if there is none, and its text again. A golden store is never
//! written a second time: what it holds is what users have. When the format changes, its number does, and a new store joins.

#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot read its own files has failed"
)]

#[path = "../golden/image.rs"]
mod image;
mod refusals;
mod story;
mod tell;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Once;

use dagorama::broker::Restoring;
use dagorama::broker::outcome::Fact;
use dagorama::storage::durable::{Durable, FORMAT};
use dagorama::storage::verify::{VerifyOptions, verify};
use dagorama::storage::{Loaded, Store};

fn image_of(version: u32) -> PathBuf {
    image::golden(version).join("store.image")
}

fn text_of(version: u32) -> PathBuf {
    image::golden(version).join("content.txt")
}

/// Writes what is to be written, once, before anything is read.
fn update() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        if std::env::var_os("UPDATE_GOLDEN").is_none() {
            return;
        }
        if !image_of(FORMAT).exists() {
            let dir = tempfile::tempdir().unwrap();
            let store = dir.path().join("store");
            story::make(&store);
            fs::create_dir_all(image::golden(FORMAT)).unwrap();
            image::pack(&store, &image_of(FORMAT));
        }
        for version in 1..=FORMAT {
            let dir = tempfile::tempdir().unwrap();
            let store = dir.path().join("store");
            image::unpack(&image_of(version), &store);
            fs::write(text_of(version), told(&store)).unwrap();
        }
    });
}

/// What the golden store of a version is expected to say.
fn expected(version: u32) -> String {
    update();
    fs::read_to_string(text_of(version)).unwrap()
}

/// The golden store of a version, unpacked.
fn unpacked(version: u32) -> (tempfile::TempDir, PathBuf) {
    update();
    let dir = tempfile::tempdir().unwrap();
    let store = dir.path().join("store");
    image::unpack(&image_of(version), &store);
    (dir, store)
}

fn load(dir: &Path) -> (Durable, Loaded, Vec<Fact>) {
    let mut store = Durable::open(dir, story::options()).unwrap();
    let mut facts = Vec::new();
    let loaded = store.load(&mut |fact| facts.push(fact)).unwrap();
    (store, loaded, facts)
}

fn told(dir: &Path) -> String {
    let (store, loaded, facts) = load(dir);
    tell::tell(&loaded, &facts, &*store.reader())
}

fn assert_same_text(found: &str, expected: &str, what: &str) {
    for (number, (a, b)) in (1..).zip(found.lines().zip(expected.lines())) {
        assert_eq!(a, b, "{what}, line {number}");
    }
    let (a, b) = (found.lines().count(), expected.lines().count());
    assert_eq!(a, b, "{what}: lines");
}

#[test]
fn every_version_is_read_as_it_was_written() {
    for version in 1..=FORMAT {
        let (_dir, store) = unpacked(version);
        let found = told(&store);
        assert_same_text(&found, &expected(version), &format!("version {version}"));
    }
}

#[test]
fn a_golden_store_has_every_kind_of_record() {
    let text = expected(FORMAT);
    let (_, facts) = text.split_once("facts in the order of loading\n").unwrap();
    // The second chapter is in the log only.
    let logged = facts.find(" two.add ").unwrap();
    let logged = facts[..logged].rfind('\n').unwrap() + 1;
    let logged = facts[logged..].split("\n\n").next().unwrap();
    for begin in tell::FACTS {
        let found = logged.lines().any(|line| line.starts_with(begin));
        assert!(found, "the log has no {begin:?}");
    }
    for note in tell::NOTES {
        let end = format!(" {note}");
        let events = text.lines().filter(|line| line.starts_with("  event "));
        let found = events.filter(|line| line.ends_with(&end)).count();
        assert!(found >= 2, "{found} events with the note {note:?}");
    }
    for state in [
        "created",
        "waiting",
        "leased",
        "backoff",
        "settling",
        "succeeded",
        "failed",
        "skipped",
    ] {
        let found = text.contains(&format!(" {state} attempt "));
        assert!(found, "no event {state:?}");
    }
    let (dir, store) = unpacked(FORMAT);
    let options = VerifyOptions {
        deep: true,
        scratch: Some(dir.path().to_owned()),
    };
    let report = verify(&store, &options).unwrap();
    assert!(report.is_sound(), "{report:#?}");
    assert!(report.totals.log_entries > 50, "{:?}", report.totals);
    for (table, count) in &report.totals.tables {
        assert!(count.rows > 0, "the table {table} is empty");
    }
    let segments = fs::read_dir(store.join("log")).unwrap().count();
    assert!(segments >= 3, "the log goes over {segments} segments");
}

/// Bytes, records and a broker: what is read is good enough to go on with.
#[test]
fn every_version_goes_on_and_stays_sound() {
    for version in 1..=FORMAT {
        let (dir, path) = unpacked(version);
        let mut before = None;
        for _ in 0..3 {
            let (store, loaded, facts) = load(&path);
            let mut restoring = Restoring::new(story::settings(), loaded.lease_secret);
            for fact in facts {
                restoring.absorb(fact);
            }
            let broker = restoring.finish(loaded.now, loaded.next_run).unwrap();
            broker.check_invariants();
            let now = broker.fingerprint();
            let before = before.get_or_insert_with(|| now.clone());
            assert_same_text(&now, before, &format!("version {version}"));
            Box::new(store).close().unwrap();
        }
        let options = VerifyOptions {
            deep: true,
            scratch: Some(dir.path().to_owned()),
        };
        let report = verify(&path, &options).unwrap();
        assert!(report.is_sound(), "{report:#?}");
        assert_eq!(report.totals.log_facts, 0, "all of it is in the state");
    }
}

#[test]
fn an_image_is_the_directory() {
    let dir = tempfile::tempdir().unwrap();
    let (from, to) = (dir.path().join("from"), dir.path().join("to"));
    fs::create_dir_all(from.join("empty/deep")).unwrap();
    let mut sparse = vec![0; 10_000];
    sparse[64] = 1;
    sparse[9_999] = b'\n';
    for (name, bytes) in [
        ("nothing", vec![]),
        ("zeros", vec![0; 500]),
        ("sparse", sparse),
        ("empty/full", b"at 3 4\nfile x 1\n".repeat(20)),
    ] {
        fs::write(from.join(name), bytes).unwrap();
    }
    let file = dir.path().join("image");
    image::pack(&from, &file);
    image::unpack(&file, &to);
    assert_eq!(image::content(&to), image::content(&from));
    assert!(fs::metadata(&file).unwrap().len() < 1_500);
}
