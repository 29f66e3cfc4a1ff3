//! What is refused, where it stands in the file, and which features are known but not built yet.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use toml::de::{DeTable, DeValue};

use super::{ArgumentPaths, Config, ConfigError, Connection, Dedup, Problem, Route, RouteCodec};

/// The file, for finding the line of a key.
pub(super) struct Source<'a> {
    name: &'a str,
    text: &'a str,
    /// `None` when it is no TOML: then reading it says so.
    table: Option<toml::Spanned<DeTable<'a>>>,
}

impl<'a> Source<'a> {
    pub(super) fn new(name: &'a str, text: &'a str) -> Self {
        let table = DeTable::parse(text).ok();
        Self { name, text, table }
    }

    fn line_of(&self, offset: usize) -> usize {
        let before = self.text.get(..offset).unwrap_or(self.text);
        before.matches('\n').count() + 1
    }

    /// `broker.toml:12` of the longest part of `path` that is in the file; empty if nothing of it is.
    fn place(&self, path: &[&str]) -> String {
        let Some(table) = &self.table else {
            return String::new();
        };
        let mut at = None;
        let mut table = Some(table.get_ref());
        let mut list = None;
        for step in path {
            let value = if let Some(inner) = table {
                let Some((key, value)) = inner.iter().find(|(key, _)| key.get_ref() == step) else {
                    break;
                };
                at = Some(key.span().start);
                value
            } else {
                let inner: Option<&toml::de::DeArray> = list;
                let Some(value) = step.parse().ok().and_then(|i: usize| inner?.get(i)) else {
                    break;
                };
                // An element of `[[route]]` has the span of its header.
                at = Some(value.span().start);
                value
            };
            table = value.get_ref().as_table();
            list = value.get_ref().as_array();
            if table.is_none() && list.is_none() {
                break;
            }
        }
        at.map_or_else(String::new, |offset| {
            format!("{}:{}", self.name, self.line_of(offset))
        })
    }

    /// An error of the TOML reader, with its line.
    pub(super) fn explain(&self, error: &toml::de::Error) -> ConfigError {
        let Some(span) = error.span() else {
            return ConfigError::one(self.name, error.message());
        };
        let line = self.line_of(span.start);
        let shown = self.text.lines().nth(line - 1).unwrap_or("").trim();
        let message = error.message().replace('\n', " ");
        ConfigError::one(
            format!("{}:{line}", self.name),
            format!("{shown}: {message}"),
        )
    }

    /// Refuses what is known but not built, before unknown keys are complained about.
    pub(super) fn refuse_unbuilt(&self) -> Result<(), ConfigError> {
        let Some(table) = &self.table else {
            return Ok(());
        };
        let root = table.get_ref();
        let mut problems = Vec::new();
        let mut refuse = |path: &[&str], shown: String, feature: &str| {
            problems.push(Problem {
                code: "NOT_AVAILABLE",
                place: self.place(path),
                text: format!("{shown}: {feature} not yet available, remove it"),
            });
        };
        for (key, feature) in [
            ("executor", "running nodes on existing Celery workers is"),
            (
                "batch",
                "batches made by a route are (use @dagorama.batch_action in the worker),",
            ),
        ] {
            if get(root, key).is_some() {
                refuse(&[key], format!("[{key}]"), feature);
            }
        }
        if let Some(connections) = get(root, "connection").and_then(DeValue::as_table) {
            for (name, connection) in connections {
                let kind = connection.get_ref().as_table().and_then(|t| get(t, "type"));
                let kind = kind.and_then(DeValue::as_str).unwrap_or("");
                let feature = match kind {
                    "kafka" => "the Kafka bridge is",
                    "amqp" | "rabbitmq" => "the RabbitMQ bridge is",
                    "redis" => "the Redis bridge is",
                    _ => continue,
                };
                let name: &str = name.get_ref();
                refuse(
                    &["connection", name, "type"],
                    format!("connection.{name}.type = \"{kind}\""),
                    feature,
                );
            }
        }
        for (list, keys) in [("route", ROUTE_UNBUILT), ("output", OUTPUT_UNBUILT)] {
            let items = get(root, list).and_then(DeValue::as_array);
            for (i, item) in items.into_iter().flatten().enumerate() {
                let Some(item) = item.get_ref().as_table() else {
                    continue;
                };
                let at = i.to_string();
                for (key, values, feature) in keys {
                    let Some(value) = get(item, key) else {
                        continue;
                    };
                    let text = value.as_str().unwrap_or("");
                    if values.is_empty() || values.contains(&text) {
                        let shown = if values.is_empty() {
                            (*key).to_owned()
                        } else {
                            format!("{key} = \"{text}\"")
                        };
                        refuse(
                            &[list, &at, key],
                            format!("{list} {}: {shown}", i + 1),
                            feature,
                        );
                    }
                }
            }
        }
        if let Some(defaults) = get(root, "defaults").and_then(DeValue::as_table)
            && get(defaults, "dlq").is_some()
        {
            refuse(
                &["defaults", "dlq"],
                "defaults.dlq".to_owned(),
                "sending dead letters elsewhere is",
            );
        }
        if problems.is_empty() {
            Ok(())
        } else {
            Err(ConfigError { problems })
        }
    }
}

type Unbuilt = (&'static str, &'static [&'static str], &'static str);

const ROUTE_UNBUILT: &[Unbuilt] = &[
    (
        "codec",
        &["celery", "msgpack", "cloudevents", "avro"],
        "this codec is",
    ),
    ("join", &[], "correlation joins are"),
    (
        "ordering",
        &["key", "partition"],
        "keeping the order of runs is",
    ),
    ("group_by", &[], "batches made by a route are"),
    ("max_bytes", &[], "batches made by a route are"),
    ("batch", &[], "batches made by a route are"),
    ("tasks", &[], "Celery routes are"),
    ("results", &[], "Celery routes are"),
    ("control", &[], "Celery routes are"),
    ("delayed_topology", &[], "Celery routes are"),
    ("allow_content", &[], "Celery routes are"),
    (
        "dedup_window",
        &[],
        "a dedup window of a single route is (there is one in [retention])",
    ),
    ("dlq", &[], "sending dead letters elsewhere is"),
];

const OUTPUT_UNBUILT: &[Unbuilt] = &[
    (
        "codec",
        &["msgpack", "cloudevents", "avro", "celery"],
        "this codec is",
    ),
    ("delivery", &["exactly-once"], "exactly-once delivery is"),
    ("headers", &[], "setting headers is"),
    ("tombstone_on_null", &[], "tombstones are"),
];

fn get<'t, 'i>(table: &'t DeTable<'i>, key: &str) -> Option<&'t DeValue<'i>> {
    table
        .iter()
        .find(|(k, _)| k.get_ref() == key)
        .map(|(_, v)| v.get_ref())
}

// ---- values -----------------------------------------------------------------------------------------------------------

struct Checker<'a> {
    source: &'a Source<'a>,
    origins: &'a BTreeMap<&'a str, &'a str>,
    problems: Vec<Problem>,
}

/// Checks everything that types alone do not say.
pub(super) fn check(
    config: &Config,
    source: &Source<'_>,
    origins: &BTreeMap<&str, &str>,
) -> Result<(), ConfigError> {
    let mut checker = Checker {
        source,
        origins,
        problems: Vec::new(),
    };
    checker.sections(config);
    checker.routes(config);
    if checker.problems.is_empty() {
        Ok(())
    } else {
        Err(ConfigError {
            problems: checker.problems,
        })
    }
}

impl Checker<'_> {
    fn refuse(&mut self, path: &[&str], text: impl Into<String>) {
        self.refuse_as("CONFIG_INVALID", path, text);
    }

    fn refuse_as(&mut self, code: &'static str, path: &[&str], text: impl Into<String>) {
        let origin = self.origins.get(path.join(".").as_str());
        let place = origin.map_or_else(|| self.source.place(path), |o| (*o).to_owned());
        self.problems.push(Problem {
            code,
            place,
            text: text.into(),
        });
    }

    fn within<T: PartialOrd + std::fmt::Display + Copy>(
        &mut self,
        section: &str,
        field: &str,
        value: T,
        from: T,
        to: T,
    ) {
        if value < from || value > to {
            self.refuse(
                &[section, field],
                format!(
                    "{field} is {value}, must be from {from} to {to}: change it in [{section}]"
                ),
            );
        }
    }

    fn sections(&mut self, config: &Config) {
        use super::{Period, Size};
        let Config {
            server,
            leases,
            storage,
            limits,
            retention,
            defaults,
            ..
        } = config;
        if !server.listen.is_local() && !server.insecure_listen {
            self.refuse_as(
                "INSECURE_LISTEN",
                &["server", "listen"],
                format!(
                    "listen is {}, which other machines reach, and there is no TLS yet: listen on 127.0.0.1, or allow it with insecure_listen = true",
                    server.listen
                ),
            );
        }
        if server.data_dir.as_os_str().is_empty() {
            self.refuse(
                &["server", "data_dir"],
                "data_dir is empty: name a directory",
            );
        }
        let (second, hour) = (Period::from_ms(1_000), Period::from_ms(3_600_000));
        self.within("leases", "lease", leases.lease, second, hour);
        self.within(
            "leases",
            "detach_grace",
            leases.detach_grace,
            Period::from_ms(100),
            hour,
        );
        self.within(
            "storage",
            "segment",
            storage.segment,
            // The largest entry must fit. Tests, which have debug assertions on, want a log that is shortened often.
            Size(if cfg!(debug_assertions) {
                1 << 20
            } else {
                64 << 20
            }),
            Size(1 << 30),
        );
        self.within(
            "storage",
            "window",
            storage.window,
            Period::from_ms(10),
            Period::from_ms(60_000),
        );
        self.within(
            "storage",
            "window_size",
            storage.window_size,
            Size(64 << 10),
            Size(256 << 20),
        );
        self.within(
            "storage",
            "min_free",
            storage.min_free,
            Size(0),
            Size(1 << 50),
        );
        self.within(
            "storage",
            "min_free_percent",
            storage.min_free_percent,
            0,
            50,
        );
        self.within(
            "limits",
            "max_payload",
            limits.max_payload,
            Size(4 << 10),
            Size(64 << 20),
        );
        self.within(
            "limits",
            "max_nodes_per_run",
            limits.max_nodes_per_run,
            1,
            100_000_000,
        );
        self.within(
            "limits",
            "max_edges_per_run",
            limits.max_edges_per_run,
            1,
            1_000_000_000,
        );
        self.within("limits", "max_inputs", limits.max_inputs, 1, 10_000_000);
        self.within("limits", "max_children", limits.max_children, 1, 10_000_000);
        self.within("limits", "max_depth", limits.max_depth, 1, 10_000_000);
        self.within(
            "limits",
            "max_open_nodes",
            limits.max_open_nodes,
            1,
            1_000_000_000,
        );
        self.within("limits", "max_leases", limits.max_leases, 1, 10_000_000);
        self.within("limits", "max_keys", limits.max_keys, 1, 1_000_000_000);
        self.within("limits", "max_outbox", limits.max_outbox, 10, 1_000_000_000);
        self.within(
            "limits",
            "max_connections",
            limits.max_connections,
            1,
            100_000,
        );
        self.within(
            "limits",
            "max_connections_per_peer",
            limits.max_connections_per_peer,
            1,
            100_000,
        );
        self.within(
            "limits",
            "max_inflight_requests",
            limits.max_inflight_requests,
            1,
            1_000_000,
        );
        self.within(
            "limits",
            "max_inflight_bytes",
            limits.max_inflight_bytes,
            Size(1 << 20),
            Size(1 << 40),
        );
        if limits.max_inflight_bytes < limits.max_payload {
            self.refuse(
                &["limits", "max_inflight_bytes"],
                format!(
                    "max_inflight_bytes is {}, less than max_payload ({}): raise it in [limits]",
                    limits.max_inflight_bytes, limits.max_payload
                ),
            );
        }
        let year = Period::from_ms(10 * 365 * 24 * 3_600_000);
        self.within(
            "retention",
            "keep",
            retention.keep,
            Period::from_ms(1_000),
            year,
        );
        self.within(
            "retention",
            "dedup_window",
            retention.dedup_window,
            Period::from_ms(60_000),
            year,
        );
        self.within(
            "defaults",
            "max_inflight_runs",
            defaults.max_inflight_runs,
            1,
            10_000_000,
        );
        self.within(
            "defaults",
            "inbox_max_attempts",
            defaults.inbox_max_attempts,
            1,
            100,
        );
    }

    fn routes(&mut self, config: &Config) {
        for (name, connection) in &config.connection {
            if connection.kind != "file" {
                self.refuse(
                    &["connection", name, "type"],
                    format!(
                        "connection.{name}.type is \"{}\", there is only \"file\" yet",
                        connection.kind
                    ),
                );
            }
            let poll = connection.poll.as_ms();
            if poll == 0 || poll > 60_000 {
                self.refuse(
                    &["connection", name, "poll"],
                    format!(
                        "poll is {}, must be from 1ms to 1m: change it in [connection.{name}]",
                        connection.poll
                    ),
                );
            }
        }
        let mut names = BTreeSet::new();
        let mut read = BTreeSet::new();
        let mut written = BTreeSet::new();
        let mut stdin_taken = false;
        for (i, route) in config.route.iter().enumerate() {
            let at = i.to_string();
            self.name(&["route", &at, "name"], &route.name, &mut names);
            let connection =
                self.connection(config, &["route", &at, "from"], &route.from.connection);
            let from: &[&str] = &["route", &at, "from"];
            let stdin_already = stdin_taken;
            stdin_taken |= route.from.stdin;
            match (&route.from.path, route.from.stdin) {
                (Some(_), true) | (None, false) => {
                    self.refuse(
                        from,
                        format!(
                            "route {} needs exactly one of path and stdin = true in from",
                            route.name
                        ),
                    );
                }
                (None, true) if stdin_already => {
                    self.refuse(
                        from,
                        format!(
                            "route {} reads standard input, which another route reads already",
                            route.name
                        ),
                    );
                }
                (None, true) if route.from.follow => {
                    self.refuse(
                        from,
                        format!(
                            "route {} follows standard input: follow is for files, remove it",
                            route.name
                        ),
                    );
                }
                (None, true) => {}
                (Some(path), false) => {
                    if !read.insert(resolve(connection, path)) {
                        self.refuse(
                            from,
                            format!(
                                "route {} reads {}, which another route reads already",
                                route.name,
                                path.display()
                            ),
                        );
                    }
                }
            }
            self.route(&at, route);
        }
        let mut stdout_taken = false;
        for (i, output) in config.output.iter().enumerate() {
            let at = i.to_string();
            let to: &[&str] = &["output", &at, "to"];
            self.name(&["output", &at, "name"], &output.name, &mut names);
            let connection = self.connection(config, to, &output.to.connection);
            if output.matches.action.is_empty() {
                self.refuse(
                    &["output", &at, "match"],
                    format!(
                        "output {} matches no action: name one, * stands for any text",
                        output.name
                    ),
                );
            }
            let stdout_already = stdout_taken;
            stdout_taken |= output.to.stdout;
            match (&output.to.path, output.to.stdout) {
                (Some(_), true) | (None, false) => {
                    self.refuse(
                        to,
                        format!(
                            "output {} needs exactly one of path and stdout = true in to",
                            output.name
                        ),
                    );
                }
                (None, true) if stdout_already => {
                    self.refuse(
                        to,
                        format!(
                            "output {} writes to standard output, as another one does already",
                            output.name
                        ),
                    );
                }
                (None, true) => {}
                (Some(path), false) => {
                    let path = resolve(connection, path);
                    if read.contains(&path) {
                        self.refuse(
                            to,
                            format!(
                                "output {} writes to {}, which a route reads: name another file",
                                output.name,
                                path.display()
                            ),
                        );
                    }
                    if !written.insert(path.clone()) {
                        self.refuse(to, format!("output {} writes to {}, as another one does already: name another file", output.name, path.display()));
                    }
                }
            }
        }
    }

    fn route(&mut self, at: &str, route: &Route) {
        let name = &route.name;
        if route.action.is_empty() || route.action.len() > 255 {
            self.refuse(
                &["route", at, "action"],
                format!("route {name}: action must have 1 to 255 bytes"),
            );
        }
        let raw = route.codec == RouteCodec::Raw;
        let paths = match &route.arguments {
            None => Vec::new(),
            Some(ArgumentPaths::Named(paths)) => paths.values().collect(),
            Some(ArgumentPaths::Positional(paths)) => paths.iter().collect(),
        };
        if raw && let Some(path) = paths.iter().find(|path| path.reads_body()) {
            self.refuse(
                &["route", at, "arguments"],
                format!("route {name}: {path} looks into the body, which codec = \"raw\" does not read: use codec = \"json\""),
            );
        }
        match &route.dedup {
            Some(Dedup::Offset) if route.from.stdin => self.refuse(
                &["route", at, "dedup"],
                format!("route {name}: standard input has no offsets: use a path such as \"body.id\", or \"hash\""),
            ),
            Some(Dedup::MessageId) => self.refuse(
                &["route", at, "dedup"],
                format!("route {name}: lines of a file have no message id: use \"offset\" or a path such as \"body.id\""),
            ),
            Some(Dedup::Path(path)) if raw && path.reads_body() => self.refuse(
                &["route", at, "dedup"],
                format!("route {name}: {path} looks into the body, which codec = \"raw\" does not read: use \"hash\""),
            ),
            _ => {}
        }
        if route.inbox_max_attempts.is_some_and(|n| n == 0 || n > 100) {
            self.refuse(
                &["route", at, "inbox_max_attempts"],
                format!("route {name}: inbox_max_attempts must be from 1 to 100"),
            );
        }
        if route.max_inflight_runs == Some(0) {
            self.refuse(
                &["route", at, "max_inflight_runs"],
                format!("route {name}: max_inflight_runs must be at least 1"),
            );
        }
    }

    fn name<'n>(&mut self, path: &[&str], name: &'n str, names: &mut BTreeSet<&'n str>) {
        let fine = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        if name.is_empty() || name.len() > 64 || !name.chars().all(fine) {
            self.refuse(
                path,
                format!(
                    "name \"{name}\" must have 1 to 64 letters, digits, dashes, dots or underscores"
                ),
            );
        }
        if !names.insert(name) {
            self.refuse(path, format!("name \"{name}\" is taken: routes and outputs share their names, because both have dead letters"));
        }
    }

    fn connection<'c>(
        &mut self,
        config: &'c Config,
        path: &[&str],
        name: &str,
    ) -> Option<&'c Connection> {
        let found = config.connection.get(name);
        if found.is_none() {
            let known: Vec<_> = config.connection.keys().map(String::as_str).collect();
            let hint = if known.is_empty() {
                format!("add [connection.{name}] with type = \"file\"")
            } else {
                format!("there are {}", known.join(", "))
            };
            self.refuse(
                path,
                format!("connection \"{name}\" is not defined: {hint}"),
            );
        }
        found
    }
}

/// Where a path of a route or an output lies.
pub(super) fn resolve(connection: Option<&Connection>, path: &Path) -> PathBuf {
    match connection.and_then(|c| c.directory.as_deref()) {
        Some(directory) => directory.join(path),
        None => path.to_owned(),
    }
}
