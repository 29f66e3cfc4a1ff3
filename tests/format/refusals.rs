//! What is refused, through the real binary, and left as it is to the last byte.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use crate::image::content;
use crate::unpacked;
use dagorama::storage::durable::FORMAT;
use xxhash_rust::xxh3::xxh3_64;

/// Starts a broker on a directory, which must refuse.
fn serve(data: &Path) -> (i32, String) {
    let Output { status, stderr, .. } = Command::new(env!("CARGO_BIN_EXE_dagorama"))
        .args(["serve", "--listen", "127.0.0.1:0", "--data-dir"])
        .arg(data)
        .env("DAGORAMA_TOKEN", "format")
        .env("NO_COLOR", "1")
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&stderr).into_owned();
    (status.code().unwrap_or(-1), text)
}

fn refused(data: &Path, code: &str, words: &str) {
    let before = content(data);
    let (exit, text) = serve(data);
    let here = format!("{}: exit {exit}, {text}", data.display());
    assert_eq!(exit, 2, "{here}");
    assert!(text.contains(code) && text.contains(words), "{here}");
    assert!(!text.contains("panicked"), "{here}");
    let mut after = content(data);
    // Taking the lock makes its file, in a directory that was already a store or empty.
    after.remove(Path::new("LOCK"));
    let mut before = before;
    before.remove(Path::new("LOCK"));
    assert!(after == before, "the directory was changed: {here}");
}

/// `FORMAT` with another line, and the sum that goes with it.
fn edit_format(store: &Path, from: &str, to: &str) {
    let path = store.join("FORMAT");
    let text = fs::read_to_string(&path).unwrap();
    assert!(text.contains(from));
    let text = text.replace(from, to);
    let (lines, _) = text.split_once("sum ").unwrap();
    let sum = xxh3_64(lines.as_bytes());
    fs::write(&path, format!("{lines}sum {sum:016x}\n")).unwrap();
}

#[test]
fn a_newer_format_is_refused_without_a_write() {
    let (_dir, store) = unpacked(FORMAT);
    let newer = FORMAT + 1;
    edit_format(
        &store,
        &format!("format {FORMAT}"),
        &format!("format {newer}"),
    );
    refused(&store, "FORMAT_TOO_NEW", &format!("format {newer}"));
    // A newer one may say other things after its number.
    fs::write(
        store.join("FORMAT"),
        "dagorama store\nformat 77\nwhatever\n",
    )
    .unwrap();
    refused(&store, "FORMAT_TOO_NEW", "format 77");
}

#[test]
fn a_damaged_format_file_is_refused_without_a_write() {
    for (bytes, words) in [
        (&b""[..], "FORMAT"),
        (b"\0\0\0\0", "FORMAT"),
        (b"\xff\xfe\xfd", "FORMAT"),
        (b"dagorama store\n", "format"),
        (b"dagorama store\nformat one\n", "version"),
        (
            b"dagorama store\nformat 1\nid 00\nsegment-bytes 4096\nsum 0\n",
            "FORMAT",
        ),
        (b"another program's file\n", "FORMAT"),
    ] {
        let (_dir, store) = unpacked(FORMAT);
        fs::write(store.join("FORMAT"), bytes).unwrap();
        refused(&store, "", words);
    }
    // One byte, and the sum is still the old one.
    let (_dir, store) = unpacked(FORMAT);
    let text = fs::read_to_string(store.join("FORMAT")).unwrap();
    let edited = text.replace("segment-bytes 8192", "segment-bytes 8193");
    assert_ne!(edited, text);
    fs::write(store.join("FORMAT"), edited).unwrap();
    refused(&store, "STORE_CORRUPT", "FORMAT");
    let (_dir, store) = unpacked(FORMAT);
    fs::remove_file(store.join("FORMAT")).unwrap();
    refused(&store, "STORE_CORRUPT", "FORMAT");
}

#[test]
fn what_is_no_store_is_left_alone() {
    let files: [(&str, &[u8]); 5] = [
        ("thesis.tex", b"years of work"),
        ("src/main.rs", b"fn main() {}"),
        ("db", b"\0\0another store"),
        ("log/0000000000000001.log", b"another program's log"),
        ("state/db", b"another program's sled"),
    ];
    for (name, bytes) in files {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, bytes).unwrap();
        refused(dir.path(), "", "");
    }
    // A file is no directory.
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    fs::write(&file, b"years of work").unwrap();
    let (exit, text) = serve(&file);
    assert_eq!(exit, 2, "{text}");
    assert_eq!(fs::read(&file).unwrap(), b"years of work");
}
