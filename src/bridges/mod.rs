//! Routes bring messages in and start runs; outputs take outcomes out. Each has a task of its own, kept going by the supervisor.
//!
//! Members of the workspace under `bridges/` know the other systems and see only messages; this module knows what a message means to the
//! broker. It holds the registry from configuration to constructor, and nothing durable: positions, dead letters and what is owed are in
//! the store, changed by commands like everything else.
//!
//! Reading order: this file, `arguments`, `inbound`, `value`, `outbound`, `supervisor`, `dlq`.

mod arguments;
mod dlq;
mod inbound;
mod outbound;
mod supervisor;
#[cfg(test)]
mod tests;
mod value;

use std::path::PathBuf;
use std::sync::Arc;

use dagorama_bridge_api::{BoxFuture, BridgeError, Positions, Sink, Source};
use dagorama_bridge_file::{FileSink, FileSource, LineStream, SourceOptions, StreamSink};
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::broker::command::Rejection;
use crate::config::{Config, Connection, Output, Route};
use crate::engine::Handle;
use inbound::Inbound;
use outbound::Outbound;
use supervisor::{Status, Stop, supervise};

/// Builds a source, as often as its route needs one.
pub type SourceFactory = Arc<
    dyn Fn(Arc<dyn Positions>) -> BoxFuture<'static, Result<Box<dyn Source>, BridgeError>>
        + Send
        + Sync,
>;

/// Builds a sink, as often as its output needs one.
pub type SinkFactory =
    Arc<dyn Fn() -> BoxFuture<'static, Result<Box<dyn Sink>, BridgeError>> + Send + Sync>;

/// All routes and outputs of a running broker.
pub struct Bridges {
    handle: Handle,
    routes: Vec<Route>,
    max_payload: usize,
    inbound: Vec<(Arc<Status>, Value)>,
    outbound: Vec<(Arc<Status>, Value)>,
    stop: watch::Sender<bool>,
    tasks: std::sync::Mutex<Vec<JoinHandle<()>>>,
}

impl Bridges {
    /// Starts a task for each route and output of the configuration. Needs a runtime; trouble shows in [`Bridges::list`], it never stops
    /// the broker.
    #[must_use]
    pub fn start(handle: &Handle, config: &Config) -> Self {
        let max_line = usize::try_from(config.limits.max_payload.0).unwrap_or(usize::MAX);
        let sources = |route: &Route| {
            source_of(
                config.connection.get(&route.from.connection),
                route,
                max_line,
            )
        };
        let sinks = |output: &Output| sink_of(config.connection.get(&output.to.connection), output);
        Self::start_with(handle, config, sources, sinks)
    }

    /// The same with other constructors, for tests.
    #[must_use]
    pub fn start_with(
        handle: &Handle,
        config: &Config,
        sources: impl Fn(&Route) -> SourceFactory,
        sinks: impl Fn(&Output) -> SinkFactory,
    ) -> Self {
        let (stop, stopping) = watch::channel(false);
        let max_payload = usize::try_from(config.limits.max_payload.0).unwrap_or(usize::MAX);
        let mut bridges = Self {
            handle: handle.clone(),
            routes: config.route.clone(),
            max_payload,
            inbound: Vec::new(),
            outbound: Vec::new(),
            stop,
            tasks: std::sync::Mutex::default(),
        };
        let mut tasks = Vec::new();
        for route in &config.route {
            let status = Status::new(&route.name);
            let shown = json!({ "action": route.action, "from": serde_json::to_value(&route.from).unwrap_or_default() });
            bridges.inbound.push((Arc::clone(&status), shown));
            let inbound = Inbound {
                handle: handle.clone(),
                build: sources(route),
                status: Arc::clone(&status),
                stop: Stop(stopping.clone()),
                max_payload,
                max_attempts: route
                    .inbox_max_attempts
                    .unwrap_or(config.defaults.inbox_max_attempts),
                on_error: route.on_error.unwrap_or(config.defaults.on_error),
                max_inflight_runs: route
                    .max_inflight_runs
                    .unwrap_or(config.defaults.max_inflight_runs)
                    .into(),
                inflight: Arc::default(),
                route: route.clone(),
            };
            let stop = Stop(stopping.clone());
            tasks.push(tokio::spawn(async move {
                inbound.count_open_runs().await;
                supervise(status, stop, || inbound.run()).await;
            }));
        }
        for output in &config.output {
            let status = Status::new(&output.name);
            let shown = json!({ "match": serde_json::to_value(&output.matches).unwrap_or_default(), "to": serde_json::to_value(&output.to).unwrap_or_default() });
            bridges.outbound.push((Arc::clone(&status), shown));
            let outbound = Outbound {
                handle: handle.clone(),
                build: sinks(output),
                status: Arc::clone(&status),
                stop: Stop(stopping.clone()),
                max_payload,
                output: output.clone(),
            };
            let stop = Stop(stopping.clone());
            tasks.push(tokio::spawn(async move {
                supervise(status, stop, || outbound.run()).await;
            }));
        }
        bridges.tasks = std::sync::Mutex::new(tasks);
        bridges
    }

    /// `{"routes": […], "outputs": […]}`, the answer to BRIDGES.
    #[must_use]
    pub fn list(&self) -> Value {
        let all = |list: &[(Arc<Status>, Value)]| -> Vec<Value> {
            list.iter()
                .map(|(status, shown)| {
                    let mut value = status.to_json();
                    if let (Some(value), Some(shown)) = (value.as_object_mut(), shown.as_object()) {
                        value.extend(shown.clone());
                    }
                    value
                })
                .collect()
        };
        json!({ "routes": all(&self.inbound), "outputs": all(&self.outbound) })
    }

    /// Answers DLQ: `{"do": "list" | "show" | "replay" | "drop", "route", "seq", "limit"}`.
    pub async fn dlq(&self, request: Value) -> Result<Value, Rejection> {
        let names = dlq::Names {
            routes: &self.routes,
            outputs: self
                .outbound
                .iter()
                .map(|(status, _)| &*status.name)
                .collect(),
            max_payload: self.max_payload,
        };
        dlq::answer(&self.handle, &names, &request).await
    }

    /// Starts a parked route or output again, or does not wait for the next try. `false`: there is none of that name.
    pub fn restart(&self, name: &str) -> bool {
        let mut all = self.inbound.iter().chain(&self.outbound);
        let found = all.find(|(status, _)| &*status.name == name);
        found.inspect(|(status, _)| status.restart()).is_some()
    }

    /// How many are parked: for `status`.
    #[must_use]
    pub fn n_parked(&self) -> usize {
        let all = self.inbound.iter().chain(&self.outbound);
        all.filter(|(status, _)| status.word() == "parked").count()
    }

    /// Ends all of them: what is being committed or delivered is finished and settled, nothing new begins.
    pub async fn shutdown(&self) {
        let _ = self.stop.send(true);
        let tasks = std::mem::take(
            &mut *self
                .tasks
                .lock()
                .unwrap_or_else(std::sync::PoisonError::into_inner),
        );
        for task in tasks {
            let _ = task.await;
        }
    }
}

impl std::fmt::Debug for Bridges {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Bridges")
            .field("list", &self.list())
            .finish_non_exhaustive()
    }
}

// ---- registry ---------------------------------------------------------------------------------------------------------

fn placed(connection: Option<&Connection>, path: Option<&PathBuf>) -> PathBuf {
    let path = path.cloned().unwrap_or_default();
    match connection.and_then(|c| c.directory.as_ref()) {
        Some(directory) => directory.join(path),
        None => path,
    }
}

/// The constructor of a route's source. The configuration has been checked: there are only file connections.
fn source_of(connection: Option<&Connection>, route: &Route, max_line: usize) -> SourceFactory {
    if route.from.stdin {
        return Arc::new(move |_| {
            Box::pin(async move {
                Ok(Box::new(LineStream::stdin(max_line).source().await) as Box<dyn Source>)
            })
        });
    }
    let options = SourceOptions {
        path: placed(connection, route.from.path.as_ref()),
        follow: route.from.follow,
        poll: connection.map_or(std::time::Duration::from_millis(50), |c| c.poll.0),
        max_line,
    };
    Arc::new(move |positions| {
        let source = FileSource::new(options.clone(), positions);
        Box::pin(async move { Ok(Box::new(source) as Box<dyn Source>) })
    })
}

fn sink_of(connection: Option<&Connection>, output: &Output) -> SinkFactory {
    if output.to.stdout {
        return Arc::new(|| {
            Box::pin(async { Ok(Box::new(StreamSink::stdout()) as Box<dyn Sink>) })
        });
    }
    let path = placed(connection, output.to.path.as_ref());
    Arc::new(move || {
        let path = path.clone();
        Box::pin(async move { Ok(Box::new(FileSink::open(path).await?) as Box<dyn Sink>) })
    })
}
