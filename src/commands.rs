//! The commands that talk to a broker, or look at files: ask, print, choose the exit code.

use std::collections::BTreeMap;
use std::net::ToSocketAddrs;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use serde_json::{Value, json};

use crate::broker::types::{Codec, RunId, Spec};
use crate::cli::{BridgeCommand, ConfigCommand, Connection, DlqCommand, Isolation, Submit, Worker};
use crate::client::{self, Client, ClientError, Data, Outcome, Waited};
use crate::config::{self, Config, Listen};
use crate::error;

/// A command that failed: its stable code and what to say.
#[derive(Debug)]
pub struct Failed {
    /// Stable code.
    pub code: String,
    /// For people.
    pub message: String,
}

impl Failed {
    /// A failure with that code.
    pub fn new(code: &str, message: impl Into<String>) -> Self {
        Self {
            code: code.to_owned(),
            message: message.into(),
        }
    }

    /// Says so on standard error and gives the exit code that belongs to it.
    pub fn report(&self) -> ExitCode {
        eprintln!("dagorama: {}: {}", self.code, self.message);
        ExitCode::from(error::find(&self.code).map_or(error::exit::NO, |row| row.exit))
    }
}

impl From<ClientError> for Failed {
    fn from(error: ClientError) -> Self {
        let code = match &error {
            ClientError::Refused { code, message, .. } => return Self::new(code, message.clone()),
            ClientError::Unreachable { .. } | ClientError::Unanswered | ClientError::Closed => {
                "BROKER_UNAVAILABLE"
            }
            ClientError::Url(_) | ClientError::Protocol(_) | ClientError::Data(_) => {
                "INVALID_REQUEST"
            }
        };
        Self::new(code, error.to_string())
    }
}

/// What a command comes to.
pub type Outcomes = Result<ExitCode, Failed>;

/// Prints a line of the product: the only way to standard output.
#[expect(clippy::print_stdout, reason = "this is the program's output")]
pub fn say(line: impl std::fmt::Display) {
    println!("{line}");
}

async fn connect(connection: &Connection) -> Result<Client, Failed> {
    let token = connection
        .token
        .clone()
        .or_else(|| owners_token(&connection.url));
    Ok(Client::connect(&connection.url, token.as_deref()).await?)
}

/// The token that `serve` left for this user, if there is one for that address.
fn owners_token(url: &str) -> Option<String> {
    let listen = if let Some(path) = url.strip_prefix("dagorama+unix://") {
        Listen::Unix(path.into())
    } else {
        let host = url.strip_prefix("dagorama://")?.trim_end_matches('/');
        Listen::Tcp(host.to_socket_addrs().ok()?.next()?)
    };
    config::read_token(&config::token_file(&listen))
        .ok()
        .map(|token| token.to_string())
}

fn run_id(text: &str) -> Result<RunId, Failed> {
    text.parse().map_err(|()| Failed::new("INVALID_REQUEST", format!("{text:?} is no run id: it looks like 1f-9c2e01d2a4b6c8e0, as `dagorama runs` prints it")))
}

/// `submit`.
pub async fn submit(options: Submit) -> Outcomes {
    let arguments: Value = serde_json::from_str(&options.arguments)
        .map_err(|error| Failed::new("INVALID_REQUEST", format!("the arguments are no JSON ({error}): write a list like '[1, \"two\"]' or an object of keyword arguments")))?;
    let call = match arguments {
        Value::Array(list) => json!({"args": list, "kwargs": {}}),
        Value::Object(named) => json!({"args": [], "kwargs": named}),
        other => {
            return Err(Failed::new(
                "INVALID_REQUEST",
                format!(
                    "the arguments are {other}, but a call takes a list or an object: write '[{other}]'"
                ),
            ));
        }
    };
    let mut tags = BTreeMap::new();
    for tag in &options.tags {
        let (name, value) = tag.split_once('=').ok_or_else(|| {
            Failed::new(
                "INVALID_REQUEST",
                format!("--tag {tag:?} has no value: write NAME=VALUE"),
            )
        })?;
        tags.insert(name.to_owned(), value.to_owned());
    }
    let spec = std::sync::Arc::new(Spec {
        by_name: true,
        ..(*client::spec(&options.action)).clone()
    });
    let client = connect(&options.connection).await?;
    let run = client
        .submit(client::Submit {
            key: options.key.clone(),
            tags,
            ..client::Submit::call(&spec, Data::json(&call))
        })
        .await?;
    if options.wait {
        return wait_and_print(&client, run, None, options.connection.json).await;
    }
    say(if options.connection.json {
        json!({"run": run.to_string()}).to_string()
    } else {
        run.to_string()
    });
    Ok(ExitCode::SUCCESS)
}

/// `result`.
pub async fn result(connection: &Connection, run: &str, timeout: Option<Duration>) -> Outcomes {
    let run = run_id(run)?;
    let client = connect(connection).await?;
    wait_and_print(&client, run, timeout, connection.json).await
}

async fn wait_and_print(
    client: &Client,
    run: RunId,
    timeout: Option<Duration>,
    as_json: bool,
) -> Outcomes {
    // The first two seconds without a word; then say once what may be missing.
    let first = timeout.map_or(Duration::from_secs(2), |limit| {
        limit.min(Duration::from_secs(2))
    });
    let mut waited = client.wait(run, Some(first)).await?;
    if let Waited::Running { hint, .. } = &waited {
        if !hint.is_empty() {
            eprintln!("dagorama: still waiting: {hint}");
        }
        let rest = timeout.map(|limit| limit.saturating_sub(first));
        if rest.is_none_or(|rest| !rest.is_zero()) {
            waited = client.wait(run, rest).await?;
        }
    }
    match waited {
        Waited::Running { state, .. } => Err(Failed::new(
            "WAIT_TIMED_OUT",
            format!(
                "run {run} has not ended yet, its root is {}: `dagorama explain {run}` says why",
                state.as_str()
            ),
        )),
        Waited::Ended(outcome) => print_outcome(client, run, &outcome, as_json).await,
    }
}

async fn print_outcome(client: &Client, run: RunId, outcome: &Outcome, as_json: bool) -> Outcomes {
    if outcome.is_success() {
        let value = match value(client, run, outcome).await {
            Ok(value) => value,
            Err(note) if as_json => json!({"note": note}),
            Err(note) => Value::String(note),
        };
        say(if as_json {
            json!({"run": run.to_string(), "state": "succeeded", "value": value}).to_string()
        } else {
            value.to_string()
        });
        return Ok(ExitCode::SUCCESS);
    }
    let error: Value = serde_json::from_slice(&outcome.data.bytes).unwrap_or(Value::Null);
    if as_json {
        say(
            json!({"run": run.to_string(), "state": outcome.state.as_str(), "error": {"type": error["type"], "message": error["message"], "traceback": error["traceback"]}}),
        );
    } else if let Some(traceback) = error["traceback"].as_str().filter(|text| !text.is_empty()) {
        eprint!("{traceback}");
    }
    let code = if outcome.state == crate::broker::types::NodeState::Cancelled {
        "RUN_CANCELLED"
    } else {
        "RUN_FAILED"
    };
    let what = [&error["type"], &error["message"]]
        .map(|part| part.as_str().unwrap_or_default().to_owned())
        .join(": ");
    Err(Failed::new(
        code,
        format!(
            "run {run} has {}{}{what}",
            outcome.state.as_str(),
            if what == ": " { "" } else { ": " }
        )
        .trim_end_matches(": ")
        .to_owned(),
    ))
}

/// The value as JSON, its references filled in; or a note why it cannot be shown.
async fn value(client: &Client, run: RunId, outcome: &Outcome) -> Result<Value, String> {
    match outcome.data.codec {
        Codec::Json => {
            let mut value: Value = serde_json::from_slice(&outcome.data.bytes)
                .map_err(|error| format!("unreadable JSON: {error}"))?;
            if !outcome.references.is_empty() {
                let mut parts = Vec::new();
                for node in &outcome.references {
                    let part = client
                        .fetch(run, *node, 1)
                        .await
                        .map_err(|error| error.to_string())?;
                    let part = part.first().ok_or("a reference that leads nowhere")?;
                    parts.push(Box::pin(self::value(client, run, part)).await?);
                }
                fill(&mut value, &parts);
            }
            Ok(value)
        }
        Codec::Raw => Ok(json!(String::from_utf8_lossy(&outcome.data.bytes))),
        Codec::Pickle => Err(format!(
            "a Python pickle of {} bytes: read it with Client().run(\"{run}\").result()",
            outcome.data.bytes.len()
        )),
        Codec::MessagePack => Err(format!(
            "MessagePack of {} bytes: read it with Client().run(\"{run}\").result()",
            outcome.data.bytes.len()
        )),
    }
}

fn fill(value: &mut Value, parts: &[Value]) {
    match value {
        Value::Object(map) if map.len() == 1 && map.contains_key("$dagorama") => {
            let at = map["$dagorama"]
                .as_u64()
                .and_then(|at| usize::try_from(at).ok());
            *value = at
                .and_then(|at| parts.get(at))
                .cloned()
                .unwrap_or(Value::Null);
        }
        Value::Object(map) => map.values_mut().for_each(|inner| fill(inner, parts)),
        Value::Array(list) => list.iter_mut().for_each(|inner| fill(inner, parts)),
        _ => {}
    }
}

/// `runs`.
pub async fn runs(
    connection: &Connection,
    state: Option<&str>,
    tag: Option<&str>,
    limit: usize,
) -> Outcomes {
    let answer = connect(connection).await?.runs(state, tag, limit).await?;
    if connection.json {
        say(&answer);
        return Ok(ExitCode::SUCCESS);
    }
    let runs = answer["runs"].as_array().cloned().unwrap_or_default();
    if runs.is_empty() {
        say("no runs");
    }
    for run in runs {
        say(run_line(&run));
    }
    Ok(ExitCode::SUCCESS)
}

fn run_line(run: &Value) -> String {
    let counts: Vec<String> = run["counts"]
        .as_object()
        .into_iter()
        .flatten()
        .filter(|(_, n)| n.as_u64() != Some(0))
        .map(|(state, n)| format!("{n} {state}"))
        .collect();
    format!(
        "{}  {:<9}  {}  {}",
        text(&run["run"]),
        text(&run["state"]),
        text(&run["action"]),
        counts.join(", ")
    )
}

fn text(value: &Value) -> String {
    value
        .as_str()
        .map_or_else(|| value.to_string(), str::to_owned)
}

/// `show`.
pub async fn show(connection: &Connection, run: &str, events: bool) -> Outcomes {
    let run = run_id(run)?;
    let client = connect(connection).await?;
    let shown = client.show(run, true).await?;
    let history = if events {
        client.events(run, 0, 10_000).await?
    } else {
        Value::Null
    };
    if connection.json {
        let mut all = shown;
        if events {
            all["events"] = history["events"].clone();
        }
        say(&all);
        return Ok(ExitCode::SUCCESS);
    }
    say(run_line(&shown));
    for node in shown["nodes"].as_array().into_iter().flatten() {
        let parent = node["parent"]
            .as_u64()
            .map_or_else(String::new, |parent| format!(", child of {parent}"));
        let cause = node["cause"]
            .as_u64()
            .map_or_else(String::new, |cause| format!(", because of {cause}"));
        say(format!(
            "  {:>6}  {:<9}  {}  attempt {}{parent}{cause}",
            text(&node["node"]),
            text(&node["state"]),
            text(&node["action"]),
            text(&node["attempt"])
        ));
    }
    for event in history["events"].as_array().into_iter().flatten() {
        say(format!(
            "  #{:<6} node {:<6} {:<9} attempt {} {}",
            text(&event["seq"]),
            text(&event["node"]),
            text(&event["state"]),
            text(&event["attempt"]),
            text(&event["note"])
        ));
    }
    Ok(ExitCode::SUCCESS)
}

/// `cancel`.
pub async fn cancel(connection: &Connection, run: &str, reason: &str) -> Outcomes {
    let run = run_id(run)?;
    connect(connection).await?.cancel(run, reason).await?;
    done(connection, run, "cancelled");
    Ok(ExitCode::SUCCESS)
}

/// `retry`.
pub async fn retry(connection: &Connection, run: &str) -> Outcomes {
    let run = run_id(run)?;
    connect(connection).await?.resume(run).await?;
    done(connection, run, "resumed");
    Ok(ExitCode::SUCCESS)
}

fn done(connection: &Connection, run: RunId, what: &str) {
    say(if connection.json {
        json!({"run": run.to_string(), "done": what}).to_string()
    } else {
        format!("{run} {what}")
    });
}

/// `explain`.
pub async fn explain(
    connection: &Connection,
    run: &str,
    node: Option<u32>,
    limit: usize,
) -> Outcomes {
    let answer = connect(connection)
        .await?
        .explain(run_id(run)?, node, limit)
        .await?;
    if connection.json {
        say(&answer);
        return Ok(ExitCode::SUCCESS);
    }
    let reasons = answer["reasons"].as_array().cloned().unwrap_or_default();
    if reasons.is_empty() {
        say("nothing waits: every node runs or has ended");
    }
    for reason in reasons {
        say(format!(
            "{:>6}  {}  {}: {}",
            text(&reason["node"]),
            text(&reason["action"]),
            text(&reason["reason"]),
            text(&reason["text"])
        ));
    }
    Ok(ExitCode::SUCCESS)
}

/// `dlq`.
pub async fn dlq(connection: &Connection, what: &DlqCommand) -> Outcomes {
    let request = match what {
        DlqCommand::List { route, limit } => json!({"do": "list", "route": route, "limit": limit}),
        DlqCommand::Show { route, seq } => json!({"do": "show", "route": route, "seq": seq}),
        DlqCommand::Replay { route, seq } => json!({"do": "replay", "route": route, "seq": seq}),
        DlqCommand::Drop { route, seq } => json!({"do": "drop", "route": route, "seq": seq}),
    };
    let answer = connect(connection).await?.dlq(&request).await?;
    if connection.json || !matches!(what, DlqCommand::List { .. }) {
        say(&answer);
        return Ok(ExitCode::SUCCESS);
    }
    let letters = answer["letters"].as_array().cloned().unwrap_or_default();
    if letters.is_empty() {
        say("no dead letters");
    }
    for letter in letters {
        say(format!(
            "{} {:>6}  {}  {}",
            text(&letter["route"]),
            text(&letter["seq"]),
            text(&letter["code"]),
            text(&letter["reason"])
        ));
    }
    Ok(ExitCode::SUCCESS)
}

/// `bridge`.
pub async fn bridge(connection: &Connection, what: &BridgeCommand) -> Outcomes {
    let BridgeCommand::List = what;
    let answer = connect(connection).await?.bridges().await?;
    if connection.json {
        say(&answer);
        return Ok(ExitCode::SUCCESS);
    }
    for (kind, list) in [("route", &answer["routes"]), ("output", &answer["outputs"])] {
        for entry in list.as_array().into_iter().flatten() {
            say(format!(
                "{kind} {}  {}  {}",
                text(&entry["name"]),
                text(&entry["state"]),
                entry["reason"].as_str().unwrap_or_default()
            ));
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// `config`.
pub fn config(what: &ConfigCommand) -> Outcomes {
    let (file, show) = match what {
        ConfigCommand::Check { file } => (Some(file.as_path()), false),
        ConfigCommand::Show { file } => (file.as_deref(), true),
    };
    let config = Config::load(file, std::env::vars(), &[])
        .map_err(|error| Failed::new(error.code(), error.to_string()))?;
    say(if show {
        config.to_toml()
    } else {
        format!(
            "{} is valid",
            file.unwrap_or(Path::new("the configuration")).display()
        )
    });
    Ok(ExitCode::SUCCESS)
}

/// `version`.
pub fn version(as_json: bool) -> ExitCode {
    let profile = if cfg!(debug_assertions) {
        "with debug assertions"
    } else {
        "release"
    };
    if as_json {
        say(
            json!({"version": env!("CARGO_PKG_VERSION"), "protocol": 1, "format": 1, "profile": profile, "bridges": ["file"]}),
        );
    } else {
        say(format!(
            "dagorama {} (protocol 1, format 1, {profile}; bridges: file)",
            env!("CARGO_PKG_VERSION")
        ));
    }
    ExitCode::SUCCESS
}

/// `worker`: becomes the Python package's worker.
pub fn worker(options: &Worker) -> Failed {
    let mut command = std::process::Command::new(&options.python);
    command
        .args(["-m", "dagorama", "worker"])
        .args(&options.modules);
    for queue in &options.queues {
        command.args(["--queue", queue]);
    }
    for taint in &options.tolerate {
        command.args(["--tolerate", taint]);
    }
    if let Some(n) = options.concurrency {
        command.args(["--concurrency", &n.to_string()]);
    }
    command.args([
        "--isolation",
        match options.isolation {
            Isolation::Process => "process",
            Isolation::Thread => "thread",
            Isolation::None => "none",
        },
    ]);
    if let Some(url) = &options.url {
        command.args(["--url", url]);
    }
    if options.until_idle {
        command.arg("--until-idle");
    }
    if let Some(path) = python_path() {
        command.env("PYTHONPATH", path);
    }
    let error = command.exec();
    Failed::new(
        "IO_ERROR",
        format!(
            "cannot run {}: {error}; name a Python with --python or DAGORAMA_PYTHON",
            options.python.display()
        ),
    )
}

/// In a source tree the package is found without being installed; what the user set stays in front.
fn python_path() -> Option<std::ffi::OsString> {
    let package = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/python/src"));
    if !package.join("dagorama").is_dir() {
        return None;
    }
    let mut parts: Vec<std::path::PathBuf> = std::env::var_os("PYTHONPATH")
        .map(|paths| std::env::split_paths(&paths).collect())
        .unwrap_or_default();
    parts.push(package.to_owned());
    std::env::join_paths(parts).ok()
}
