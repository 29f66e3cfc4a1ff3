//! The documents say what is true: links lead somewhere, commands exist, every code has a page, every option a line.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn documents() -> Vec<PathBuf> {
    let mut found = vec![root().join("README.md"), root().join("CHANGELOG.md")];
    let mut directories = vec![
        root().join("docs"),
        root().join("examples"),
        root().join("benches"),
    ];
    while let Some(directory) = directories.pop() {
        for entry in std::fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                directories.push(path);
            } else if path.extension().is_some_and(|end| end == "md") {
                found.push(path);
            }
        }
    }
    found
}

/// Paths in backquotes that look like files of the project, and targets of links.
fn named_files(text: &str) -> Vec<String> {
    let mut names: Vec<String> = Vec::new();
    for part in text.split('`').skip(1).step_by(2) {
        let known = [
            "src/",
            "docs/",
            "tests/",
            "benches/",
            "bridges/",
            "config/",
            "examples/",
            "python/",
        ]
        .iter()
        .any(|start| part.starts_with(start));
        if known && !part.contains([' ', '*', '{', '…', '<', '\n']) {
            names.push(part.trim_end_matches([':', ',']).to_owned());
        }
    }
    for part in text.split("](").skip(1) {
        let target = part.split(')').next().unwrap_or_default();
        if !target.starts_with("http") && !target.starts_with('#') && !target.is_empty() {
            names.push(target.split('#').next().unwrap_or_default().to_owned());
        }
    }
    names
}

#[test]
fn every_file_the_documents_name_exists() {
    let mut missing = Vec::new();
    for document in documents() {
        let text = std::fs::read_to_string(&document).unwrap();
        for name in named_files(&text) {
            let beside = document.parent().unwrap_or(Path::new("")).join(&name);
            if !root().join(&name).exists() && !beside.exists() {
                missing.push(format!(
                    "{}: {name}",
                    document.strip_prefix(root()).unwrap().display()
                ));
            }
        }
    }
    assert!(missing.is_empty(), "{}", missing.join("\n"));
}

#[test]
fn named_files_finds_what_is_named() {
    assert_eq!(
        named_files(
            "see `src/nothing.rs` and [that](docs/x.md#y) but not `cargo test` or [web](https://a.b)"
        ),
        ["src/nothing.rs", "docs/x.md"]
    );
}

/// Every `dagorama …` command in a code block or in backquotes is one that the program has.
#[test]
fn every_command_in_the_documents_exists() {
    let help = String::from_utf8(
        Command::new(env!("CARGO_BIN_EXE_dagorama"))
            .arg("--help")
            .output()
            .unwrap()
            .stdout,
    )
    .unwrap();
    let known: BTreeSet<&str> = help
        .lines()
        .skip_while(|line| !line.starts_with("Commands:"))
        .skip(1)
        .take_while(|line| line.starts_with("  "))
        .filter_map(|line| line.split_whitespace().next())
        .collect();
    assert!(
        known.contains("serve") && known.contains("demo"),
        "{known:?}"
    );
    let mut wrong = Vec::new();
    // FORMAT.md shows the bytes of the store, which begin with the program's name.
    for document in documents()
        .into_iter()
        .filter(|path| !path.ends_with("FORMAT.md"))
    {
        let text = std::fs::read_to_string(&document).unwrap();
        for line in text.lines() {
            let Some(rest) = line
                .trim_start_matches(['$', ' ', '`'])
                .strip_prefix("dagorama ")
            else {
                continue;
            };
            let word = rest.split([' ', '`']).next().unwrap_or_default();
            if word.chars().all(|c| c.is_ascii_lowercase())
                && !word.is_empty()
                && !known.contains(word)
            {
                wrong.push(format!(
                    "{}: dagorama {word}",
                    document.strip_prefix(root()).unwrap().display()
                ));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
