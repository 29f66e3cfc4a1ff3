//! The configuration: every option with its unit and default, where it comes from, and what is refused.
//!
//! The command line overrides the environment (`DAGORAMA_SECTION_FIELD`), which overrides the file. An unknown key is an error, and an
//! option that is known but not built yet says so. Messages name the place, the key, the value and the way out. Nothing here opens
//! anything: [`Config`] is plain data, and `config/broker.toml` shows all of it.

mod effect;
mod expression;
mod routes;
mod token;
mod units;
mod validate;

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

pub use expression::{COORDINATES, Expression, Step, Term};
pub use routes::{
    ArgumentPaths, Connection, Dedup, OnError, Output, OutputCodec, OutputMatch, OutputState,
    OutputTo, Route, RouteCodec, RouteFrom,
};
pub use token::{
    new_token, read as read_token, read_or_create as token, state_dir, token_file,
    write as write_token,
};
pub use units::{Listen, Period, Size};

/// Everything that can be configured.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// `[server]`
    pub server: Server,
    /// `[leases]`
    pub leases: Leases,
    /// `[storage]`
    pub storage: Storage,
    /// `[limits]`
    pub limits: Limits,
    /// `[retention]`
    pub retention: Retention,
    /// `[defaults]` of every route.
    pub defaults: Defaults,
    /// `[connection.NAME]`
    pub connection: BTreeMap<String, Connection>,
    /// `[[route]]`
    pub route: Vec<Route>,
    /// `[[output]]`
    pub output: Vec<Output>,
}

/// `[server]`: where the broker lives.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Server {
    /// Address of the native protocol.
    pub listen: Listen,
    /// The store: one directory, made if it is missing.
    pub data_dir: PathBuf,
    /// The token's file; made at random if it is missing. Default: where the user's own clients look.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token_file: Option<PathBuf>,
    /// Listen on an address that other machines reach, although there is no TLS.
    pub insecure_listen: bool,
}

/// `[leases]`: how long a silent worker keeps its nodes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Leases {
    /// A worker that is silent for that long loses its leases. 1s to 1h.
    pub lease: Period,
    /// A worker whose connection has closed keeps its leases for that long.
    pub detach_grace: Period,
}

/// `[storage]`: how the store uses the disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Storage {
    /// Size of a segment of the commit log; the largest completion must fit into one. 64MiB to 1GiB.
    pub segment: Size,
    /// Facts stay in the log and in memory for about that long before the state store takes them.
    pub window: Period,
    /// Or until there are that many bytes of them.
    pub window_size: Size,
    /// Intake is refused (`DISK_FULL`) when less than this is free…
    pub min_free: Size,
    /// …or less than that many percent of the disk.
    pub min_free_percent: u8,
}

/// `[limits]`: what is refused before anything is stored.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Limits {
    /// One argument list or result. At most 64MiB.
    pub max_payload: Size,
    /// Nodes of one run.
    pub max_nodes_per_run: u32,
    /// Edges of one run.
    pub max_edges_per_run: u64,
    /// Inputs of one node.
    pub max_inputs: u32,
    /// Children of one attempt.
    pub max_children: u32,
    /// Depth of creation: a node of a submission has 0, its child 1.
    pub max_depth: u32,
    /// Nodes that have not ended, in all runs.
    pub max_open_nodes: u64,
    /// Leases that are open, in all sessions.
    pub max_leases: usize,
    /// Submission and dedup keys that are kept.
    pub max_keys: usize,
    /// Deliveries that no receiver has confirmed; intake waits at 80 % of it.
    pub max_outbox: u64,
    /// Connections.
    pub max_connections: usize,
    /// Connections from one address.
    pub max_connections_per_peer: usize,
    /// Requests that have no answer yet.
    pub max_inflight_requests: usize,
    /// Bytes of requests that have no answer yet.
    pub max_inflight_bytes: Size,
}

/// `[retention]`: how long things are kept after they have ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Retention {
    /// An ended run is deleted after that long.
    pub keep: Period,
    /// A submission key or dedup key is known for at least that long.
    pub dedup_window: Period,
}

/// `[defaults]`: what a route does unless it says otherwise.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Defaults {
    /// Reading stops while that many runs of a route have not ended.
    pub max_inflight_runs: u32,
    /// How often a message is tried before it becomes a dead letter.
    pub inbox_max_attempts: u32,
    /// What becomes of a message that cannot be used.
    pub on_error: OnError,
}

impl Default for Server {
    fn default() -> Self {
        Self {
            listen: Listen::Tcp(([127, 0, 0, 1], 7373).into()),
            data_dir: PathBuf::from("dagorama-data"),
            token_file: None,
            insecure_listen: false,
        }
    }
}

impl Default for Leases {
    fn default() -> Self {
        Self {
            lease: Period::from_ms(30_000),
            detach_grace: Period::from_ms(5_000),
        }
    }
}

impl Default for Storage {
    fn default() -> Self {
        Self {
            segment: Size(64 << 20),
            window: Period::from_ms(1_000),
            window_size: Size(16 << 20),
            min_free: Size(1 << 30),
            min_free_percent: 5,
        }
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_payload: Size(64 << 20),
            max_nodes_per_run: 1_000_000,
            max_edges_per_run: 4_000_000,
            max_inputs: 100_000,
            max_children: 100_000,
            max_depth: 100_000,
            max_open_nodes: 20_000_000,
            max_leases: 100_000,
            max_keys: 10_000_000,
            max_outbox: 1_000_000,
            max_connections: 1_000,
            max_connections_per_peer: 64,
            max_inflight_requests: 1_024,
            max_inflight_bytes: Size(256 << 20),
        }
    }
}

impl Default for Retention {
    fn default() -> Self {
        let week = Period::from_ms(7 * 24 * 3_600_000);
        Self {
            keep: week,
            dedup_window: week,
        }
    }
}

impl Default for Defaults {
    fn default() -> Self {
        Self {
            max_inflight_runs: 10_000,
            inbox_max_attempts: 5,
            on_error: OnError::Dlq,
        }
    }
}

// ---- what is wrong with it --------------------------------------------------------------------------------------------

/// One thing that is wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// `CONFIG_INVALID`, `NOT_AVAILABLE` or `INSECURE_LISTEN`.
    pub code: &'static str,
    /// Where: `broker.toml:12`, `DAGORAMA_LEASES_LEASE`, `--listen`; empty for defaults.
    pub place: String,
    /// What, and the way out.
    pub text: String,
}

/// A configuration that is refused, with everything that is wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigError {
    /// At least one.
    pub problems: Vec<Problem>,
}

impl ConfigError {
    /// The code of the first problem.
    #[must_use]
    pub fn code(&self) -> &'static str {
        self.problems.first().map_or("CONFIG_INVALID", |p| p.code)
    }

    fn one(place: impl Into<String>, text: impl Into<String>) -> Self {
        Self {
            problems: vec![Problem {
                code: "CONFIG_INVALID",
                place: place.into(),
                text: text.into(),
            }],
        }
    }
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, problem) in self.problems.iter().enumerate() {
            if i > 0 {
                f.write_str("\n")?;
            }
            if !problem.place.is_empty() {
                write!(f, "{}: ", problem.place)?;
            }
            f.write_str(&problem.text)?;
        }
        Ok(())
    }
}

impl std::error::Error for ConfigError {}

// ---- where it comes from ----------------------------------------------------------------------------------------------

/// A value that overrides the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Override {
    /// `section.field`.
    pub key: String,
    /// The value as text.
    pub value: String,
    /// What the user wrote: `--listen`, `DAGORAMA_SERVER_LISTEN`.
    pub origin: String,
}

impl Override {
    /// An option of the command line.
    #[must_use]
    pub fn new(key: &str, value: impl Into<String>, origin: &str) -> Self {
        Self {
            key: key.to_owned(),
            value: value.into(),
            origin: origin.to_owned(),
        }
    }
}

/// Sections whose fields may come from the environment and the command line.
const SECTIONS: [&str; 6] = [
    "server",
    "leases",
    "storage",
    "limits",
    "retention",
    "defaults",
];

impl Config {
    /// Reads the file (if any), then what the environment and the command line override, and checks all of it.
    pub fn load(
        file: Option<&Path>,
        environment: impl IntoIterator<Item = (String, String)>,
        command_line: &[Override],
    ) -> Result<Self, ConfigError> {
        let text = match file {
            None => String::new(),
            Some(path) => std::fs::read_to_string(path).map_err(|e| {
                ConfigError::one(
                    path.display().to_string(),
                    format!("cannot be read: {e}; name another file with --config"),
                )
            })?,
        };
        let name = file.map_or_else(String::new, |path| path.display().to_string());
        Self::parse(&name, &text, environment, command_line)
    }

    /// The same for a text that was read already; `name` is what messages call it.
    pub fn parse(
        name: &str,
        text: &str,
        environment: impl IntoIterator<Item = (String, String)>,
        command_line: &[Override],
    ) -> Result<Self, ConfigError> {
        let source = validate::Source::new(name, text);
        source.refuse_unbuilt()?;
        let mut config: Self = toml::from_str(text).map_err(|e| source.explain(&e))?;
        let mut overrides = from_environment(environment)?;
        overrides.extend_from_slice(command_line);
        let mut origins = BTreeMap::new();
        for change in &overrides {
            config.change(change)?;
            origins.insert(change.key.as_str(), change.origin.as_str());
        }
        validate::check(&config, &source, &origins)?;
        Ok(config)
    }

    /// The configuration in effect, as a file would say it.
    #[must_use]
    pub fn to_toml(&self) -> String {
        toml::to_string(self).unwrap_or_default()
    }

    /// The same for programs.
    #[must_use]
    pub fn to_json(&self) -> serde_json::Value {
        serde_json::to_value(self).unwrap_or_default()
    }

    /// Where the token lies.
    #[must_use]
    pub fn token_path(&self) -> PathBuf {
        let server = &self.server;
        server
            .token_file
            .clone()
            .unwrap_or_else(|| token_file(&server.listen))
    }

    fn change(&mut self, change: &Override) -> Result<(), ConfigError> {
        let refuse = |text: String| ConfigError::one(&change.origin, text);
        let (section, field) = change.key.split_once('.').unwrap_or((&change.key, ""));
        match section {
            "server" => set(&mut self.server, field, &change.value),
            "leases" => set(&mut self.leases, field, &change.value),
            "storage" => set(&mut self.storage, field, &change.value),
            "limits" => set(&mut self.limits, field, &change.value),
            "retention" => set(&mut self.retention, field, &change.value),
            "defaults" => set(&mut self.defaults, field, &change.value),
            _ => Err(format!(
                "there is no section {section}: one of {}",
                SECTIONS.join(", ")
            )),
        }
        .map_err(refuse)
    }
}

/// Replaces one field of a section by a text.
fn set<T: Serialize + for<'de> Deserialize<'de>>(
    section: &mut T,
    field: &str,
    text: &str,
) -> Result<(), String> {
    let mut table = toml::Table::try_from(&*section).map_err(|e| e.to_string())?;
    let is_text = |v: &toml::Value| !v.is_integer() && !v.is_bool();
    let value = match (table.get(field), text.parse::<i64>(), text.parse::<bool>()) {
        (Some(old), _, _) if is_text(old) => toml::Value::String(text.to_owned()),
        (Some(_), Ok(number), _) => toml::Value::Integer(number),
        (Some(_), _, Ok(flag)) => toml::Value::Boolean(flag),
        _ => toml::Value::String(text.to_owned()),
    };
    table.insert(field.to_owned(), value);
    *section = table
        .try_into()
        .map_err(|e: toml::de::Error| format!("{field} = {text}: {}", e.message()))?;
    Ok(())
}

fn from_environment(
    variables: impl IntoIterator<Item = (String, String)>,
) -> Result<Vec<Override>, ConfigError> {
    let mut found = Vec::new();
    for (name, value) in variables {
        let Some(rest) = name.strip_prefix("DAGORAMA_") else {
            continue;
        };
        let rest = rest.to_ascii_lowercase();
        let section = SECTIONS.iter().find_map(|section| {
            let field = rest.strip_prefix(section)?.strip_prefix('_')?;
            Some((*section, field.to_owned()))
        });
        let Some((section, field)) = section else {
            continue;
        };
        if field.is_empty() {
            return Err(ConfigError::one(
                name,
                format!("names no field of [{section}]"),
            ));
        }
        found.push(Override {
            key: format!("{section}.{field}"),
            value,
            origin: name,
        });
    }
    found.sort_by(|a, b| a.key.cmp(&b.key));
    Ok(found)
}

#[cfg(test)]
mod tests;
