//! The commands that talk to a broker, or look at files: ask, print, choose the exit code.
//!
//! Standard output has what was asked for and nothing else; with `--json`, one JSON object a command, also when the answer is no. A reader
//! that has gone away (`dagorama runs | head -1`) is no error.

mod bridges;
mod runs;

use std::io::{self, Write as _};
use std::net::ToSocketAddrs as _;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::{Value, json};

pub use self::bridges::{bridge, dlq};
pub use self::runs::{cancel, explain, result, retry, runs, show, submit};
use crate::broker::types::RunId;
use crate::cli::{ConfigCommand, Connection, Isolation, Worker};
use crate::client::{Client, ClientError};
use crate::config::{self, Config, Listen};
use crate::error;

/// A command that failed: its stable code and what to say.
#[derive(Debug)]
pub struct Failed {
    /// Stable code.
    pub code: String,
    /// For people.
    pub message: String,
    /// Standard output has the answer already, with the code in it.
    pub answered: bool,
}

impl Failed {
    /// A failure with that code.
    pub fn new(code: &str, message: impl Into<String>) -> Self {
        Self {
            code: code.to_owned(),
            message: message.into(),
            answered: false,
        }
    }

    /// Says so on standard error, for programs on standard output too, and gives the exit code that belongs to it.
    pub fn report(&self, as_json: bool) -> ExitCode {
        if as_json && !self.answered {
            say(json!({"code": self.code, "message": self.message}));
        }
        remark(format_args!("dagorama: {}: {}", self.code, self.message));
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

/// Whether something could not be written although somebody was there to read it.
static LOST_OUTPUT: AtomicBool = AtomicBool::new(false);

/// Prints a line of the product: the only way to standard output. When the reader has gone, the rest is for nobody and the command goes on
/// to its end, so that its exit code and what it cleans up stay the same.
pub fn say(line: impl std::fmt::Display) {
    let mut out = io::stdout().lock();
    let written = writeln!(out, "{line}").and_then(|()| out.flush());
    if written.is_err_and(|error| error.kind() != io::ErrorKind::BrokenPipe) {
        LOST_OUTPUT.store(true, Ordering::Relaxed);
    }
}

/// Whether a line of [`say`] was lost: a full disk behind `>`, say.
pub fn lost_output() -> bool {
    LOST_OUTPUT.load(Ordering::Relaxed)
}

/// Prints a line for people on standard error, whoever reads it or does not.
pub fn remark(line: impl std::fmt::Display) {
    drop(writeln!(io::stderr().lock(), "{line}"));
}

async fn connect(connection: &Connection) -> Result<Client, Failed> {
    let token = Token::find(connection);
    let client = Client::connect(&connection.url, token.text()).await;
    client.map_err(|error| match error {
        ClientError::Refused { ref code, .. } if code == "UNAUTHENTICATED" => {
            Failed::new("UNAUTHENTICATED", token.remedy(&connection.url))
        }
        error => error.into(),
    })
}

/// The token of a connection and where it is from, to say what to do when it is refused.
enum Token {
    /// By `--token` or the environment.
    Given(String),
    /// From the file that `serve` left for this user.
    File(PathBuf, String),
    /// There is none, and why each file that was looked for is of no use.
    Missing(Vec<String>),
}

impl Token {
    fn find(connection: &Connection) -> Self {
        if let Some(token) = connection.token.as_ref().filter(|token| !token.is_empty()) {
            return Self::Given(token.clone());
        }
        let mut missing = Vec::new();
        for path in token_files(&connection.url) {
            match config::read_token(&path) {
                Ok(token) => return Self::File(path, token.to_string()),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    missing.push(format!("there is no {}", path.display()));
                }
                Err(error) => missing.push(format!("{}: {error}", path.display())),
            }
        }
        Self::Missing(missing)
    }

    fn text(&self) -> Option<&str> {
        match self {
            Self::Given(token) | Self::File(_, token) => Some(token),
            Self::Missing(_) => None,
        }
    }

    fn remedy(&self, url: &str) -> String {
        match self {
            Self::Given(_) => {
                let files: Vec<String> = token_files(url)
                    .iter()
                    .map(|path| path.display().to_string())
                    .collect();
                format!(
                    "the broker at {url} refuses the token of --token or DAGORAMA_TOKEN: give it the token that the broker was started with; \
                     the user who started it can leave both out, as clients look into {}",
                    files.join(" and ")
                )
            }
            Self::File(path, _) => format!(
                "the broker at {url} refuses the token in {}: set DAGORAMA_TOKEN to the token that the broker was started with (its \
                 DAGORAMA_TOKEN or server.token_file)",
                path.display()
            ),
            Self::Missing(why) => format!(
                "the broker at {url} wants a token, and none was found ({}): run this as the user who started the broker, with the same \
                 DAGORAMA_STATE_DIR, or set DAGORAMA_TOKEN",
                why.join(", ")
            ),
        }
    }
}

/// Where `serve` leaves the token for this user; a name may stand for several addresses.
fn token_files(url: &str) -> Vec<PathBuf> {
    if let Some(path) = url.strip_prefix("dagorama+unix://") {
        return vec![config::token_file(&Listen::Unix(path.into()))];
    }
    let host = url
        .strip_prefix("dagorama://")
        .unwrap_or_default()
        .trim_end_matches('/');
    let has_port = host
        .rsplit_once(':')
        .is_some_and(|(_, port)| port.parse::<u16>().is_ok());
    let host = if has_port {
        host.to_owned()
    } else {
        format!("{host}:7373")
    };
    host.to_socket_addrs()
        .into_iter()
        .flatten()
        .map(|address| config::token_file(&Listen::Tcp(address)))
        .collect()
}

fn run_id(text: &str) -> Result<RunId, Failed> {
    text.parse().map_err(|()| Failed::new("INVALID_REQUEST", format!("{text:?} is no run id: it looks like 1f-9c2e01d2a4b6c8e0, as `dagorama runs` prints it")))
}

fn text(value: &Value) -> String {
    value
        .as_str()
        .map_or_else(|| value.to_string(), str::to_owned)
}

/// `config`.
pub fn config(what: &ConfigCommand, as_json: bool) -> Outcomes {
    let (file, show) = match what {
        ConfigCommand::Check { file } => (Some(file.as_path()), false),
        ConfigCommand::Show { file, config } => (file.as_deref().or(config.as_deref()), true),
    };
    let config = Config::load(file, std::env::vars(), &[])
        .map_err(|error| Failed::new(error.code(), error.to_string()))?;
    let name = file.unwrap_or(Path::new("the configuration")).display();
    match (show, as_json) {
        (true, true) => say(config.to_json()),
        (true, false) => say(config.to_toml().trim_end()),
        (false, true) => say(json!({"file": name.to_string(), "valid": true})),
        (false, false) => say(format_args!("{name} is valid")),
    }
    Ok(ExitCode::SUCCESS)
}

/// `status`.
pub async fn status(connection: &Connection) -> Outcomes {
    let answer = connect(connection).await?.status().await?;
    if connection.json {
        say(&answer);
        return Ok(ExitCode::SUCCESS);
    }
    for (name, value) in answer.as_object().into_iter().flatten() {
        let shown = match value.as_object() {
            Some(parts) if parts.is_empty() => "none".to_owned(),
            Some(parts) => {
                let parts: Vec<String> = parts
                    .iter()
                    .map(|(name, value)| format!("{name}: {}", text(value)))
                    .collect();
                parts.join(", ")
            }
            None => text(value),
        };
        say(format_args!("{name:<14}  {shown}"));
    }
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
