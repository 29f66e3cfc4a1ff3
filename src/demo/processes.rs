//! The processes of the demo: the broker, the workers, and what they wrote down.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use serde_json::Value;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};

/// A running broker.
#[derive(Debug)]
pub(super) struct Broker {
    /// The process.
    pub(super) child: Child,
    /// What it printed when it was ready.
    pub(super) ready: Value,
    /// Where it listens.
    pub(super) url: String,
}

/// Starts `serve` with that configuration and waits until it is ready.
pub(super) async fn start_broker(
    config: &Path,
    listen: &str,
    log: &Path,
    token: &str,
) -> io::Result<Broker> {
    let mut child = Command::new(std::env::current_exe()?)
        .args(["serve", "--ready-stdout", "--listen", listen, "--config"])
        .arg(config)
        .env("DAGORAMA_TOKEN", token)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(append(log)?)
        .kill_on_drop(true)
        .spawn()?;
    let stdout = child
        .stdout
        .take()
        .ok_or_else(|| io::Error::other("the broker has no standard output"))?;
    let mut line = String::new();
    let read = tokio::time::timeout(
        Duration::from_mins(1),
        BufReader::new(stdout).read_line(&mut line),
    )
    .await;
    let ready: Value = match read {
        Ok(Ok(n)) if n > 0 => serde_json::from_str(&line).map_err(io::Error::other)?,
        _ => {
            return Err(io::Error::other(format!(
                "the broker did not start: see {}",
                log.display()
            )));
        }
    };
    let url = ready["native"].as_str().unwrap_or_default().to_owned();
    Ok(Broker { child, ready, url })
}

/// What a worker needs to find its way.
#[derive(Debug, Clone)]
pub(super) struct WorkerPlace<'a> {
    /// The Python to use.
    pub(super) python: &'a Path,
    /// Directory of the module.
    pub(super) code: &'a Path,
    /// Directory for the journals.
    pub(super) journal: &'a Path,
    /// Log file.
    pub(super) log: &'a Path,
    /// Token of the broker.
    pub(super) token: &'a str,
}

/// Starts a worker with one process for nodes.
pub(super) fn start_worker(url: &str, place: &WorkerPlace<'_>) -> io::Result<Child> {
    Command::new(std::env::current_exe()?)
        .args([
            "worker",
            "crawl",
            "--concurrency",
            "1",
            "--url",
            url,
            "--python",
        ])
        .arg(place.python)
        .env("PYTHONPATH", python_path(place.code))
        .env("DAGORAMA_TOKEN", place.token)
        .env("DAGORAMA_JOURNAL", place.journal)
        .stdin(Stdio::null())
        .stdout(append(place.log)?)
        .stderr(append(place.log)?)
        .kill_on_drop(true)
        .spawn()
}

/// Where Python finds the program and, in a source tree, the package.
pub(super) fn python_path(code: &Path) -> std::ffi::OsString {
    let mut parts = vec![code.to_owned()];
    parts.extend(package());
    parts.extend(std::env::var_os("PYTHONPATH").map(PathBuf::from));
    std::env::join_paths(parts).unwrap_or_default()
}

/// The Python package in the source tree this binary was built in, if it is still there.
pub(super) fn package() -> Option<PathBuf> {
    let path = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/python/src"));
    path.join("dagorama").is_dir().then_some(path)
}

fn append(path: &Path) -> io::Result<Stdio> {
    Ok(std::fs::OpenOptions::new()
        .create(true)
        .append(true)
        .open(path)?
        .into())
}

/// What stands in the workers' journals at one moment.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(super) struct Journal {
    /// Attempts that have started and were not acknowledged.
    pub(super) open: u64,
    /// Outcomes that were sent and not acknowledged.
    pub(super) in_flight: u64,
    /// The same by the process that sent them.
    pub(super) in_flight_by: BTreeMap<i32, u64>,
    /// Acknowledged outcomes by action.
    pub(super) accepted: BTreeMap<String, u64>,
    /// Nodes with an acknowledged outcome, or with one that a process sent which was killed before it heard the answer.
    pub(super) settled: u64,
    /// Outcomes that living processes have sent and not heard of.
    pub(super) in_flight_alive: u64,
}

/// Reads all journals of a directory. `dead` are the processes that were killed.
pub(super) fn read_journal(directory: &Path, dead: &[i32]) -> io::Result<Journal> {
    let mut journal = Journal::default();
    let mut state: BTreeMap<(String, String, u64), &'static str> = BTreeMap::new();
    let mut actions: BTreeMap<(String, String, u64), String> = BTreeMap::new();
    let mut senders: BTreeMap<(String, String, u64), i32> = BTreeMap::new();
    for entry in std::fs::read_dir(directory)? {
        let path = entry?.path();
        let pid: i32 = path
            .file_stem()
            .and_then(|name| name.to_str())
            .and_then(|name| name.parse().ok())
            .unwrap_or_default();
        let text = std::fs::read_to_string(path)?;
        for line in text.lines() {
            // A line that is being written is read next time.
            let Ok(line) = serde_json::from_str::<Value>(line) else {
                continue;
            };
            let key = (
                text_of(&line["run"]),
                text_of(&line["node"]),
                line["attempt"].as_u64().unwrap_or_default(),
            );
            match line["what"].as_str() {
                Some("started") => {
                    actions.insert(key.clone(), text_of(&line["action"]));
                    state.insert(key, "started");
                }
                Some("sent") => {
                    senders.insert(key.clone(), pid);
                    state.insert(key, "sent");
                }
                // An end beyond 2 is a failure that may be tried again, or a lease that was given back.
                Some("accepted") if line["end"].as_u64().is_some_and(|end| end <= 2) => {
                    state.insert(key, "accepted");
                }
                Some("accepted" | "refused") => {
                    state.insert(key, "refused");
                }
                _ => {}
            }
        }
    }
    let mut settled = BTreeSet::new();
    for (key, state) in state {
        let node = (key.0.clone(), key.1.clone());
        match state {
            "started" => journal.open += 1,
            "sent" => {
                let sender = senders.get(&key).copied().unwrap_or_default();
                if dead.contains(&sender) {
                    settled.insert(node);
                } else {
                    journal.in_flight_alive += 1;
                }
                journal.open += 1;
                journal.in_flight += 1;
                *journal.in_flight_by.entry(sender).or_default() += 1;
            }
            "accepted" => {
                settled.insert(node);
                let action = actions.get(&key).cloned().unwrap_or_default();
                *journal.accepted.entry(action).or_default() += 1;
            }
            _ => {}
        }
    }
    journal.settled = settled.len() as u64;
    Ok(journal)
}

fn text_of(value: &Value) -> String {
    value
        .as_str()
        .map_or_else(|| value.to_string(), str::to_owned)
}
