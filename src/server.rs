//! The composition root: who is started with what, in which order, and stopped in the reverse one. Only this module knows everyone.

use std::io;
use std::sync::Arc;

use serde_json::{Value, json};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tracing::{error, info, warn};

use crate::bridges::Bridges;
use crate::broker::command::Rejection;
use crate::cli;
use crate::commands::{remark, say};
use crate::config::{self, Config, ConfigError, Listen, Override};
use crate::edge::native::{self, Address, NativeOptions};
use crate::engine::clock::Stopwatch;
use crate::engine::{self, Handle, StartError};
use crate::storage::durable::{Durable, Gauges};
use crate::storage::{StorageError, sync_shim};

/// Why a broker did not start, or ended.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The configuration is wrong.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The store cannot be opened, or failed.
    #[error(transparent)]
    Storage(#[from] StorageError),
    /// What was stored does not make sense.
    #[error(transparent)]
    Start(#[from] StartError),
    /// Somebody else listens there.
    #[error("{address} is taken{by}: stop that process, or choose another address with --listen")]
    PortInUse {
        /// The address.
        address: String,
        /// Who has it, as far as that can be told.
        by: String,
    },
    /// Something with the operating system.
    #[error("{what}: {source}")]
    Io {
        /// What was tried.
        what: String,
        /// What went wrong.
        #[source]
        source: io::Error,
    },
}

impl ServeError {
    /// Its stable code.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::Config(error) => error.code(),
            Self::Storage(error) | Self::Start(StartError::Storage(error)) => {
                crate::error::code_of_storage(error)
            }
            Self::Start(_) => "STORE_CORRUPT",
            Self::PortInUse { .. } => "PORT_IN_USE",
            Self::Io { .. } => "IO_ERROR",
        }
    }
}

/// The configuration in effect: file, then environment, then command line.
pub fn configure(options: &cli::Serve) -> Result<Config, ConfigError> {
    let mut changes = Vec::new();
    if let Some(path) = &options.data_dir {
        changes.push(Override::new(
            "server.data_dir",
            path.to_string_lossy(),
            "--data-dir",
        ));
    }
    if let Some(listen) = &options.listen {
        changes.push(Override::new("server.listen", listen, "--listen"));
    }
    if options.insecure_listen {
        changes.push(Override::new(
            "server.insecure_listen",
            "true",
            "--insecure-listen",
        ));
    }
    if let Some(lease) = options.lease {
        changes.push(Override::new(
            "leases.lease",
            humantime::format_duration(lease)
                .to_string()
                .replace(' ', ""),
            "--lease",
        ));
    }
    Config::load(options.config.as_deref(), std::env::vars(), &changes)
}

/// A broker that is serving.
pub struct Serving {
    /// Where it listens.
    pub url: String,
    handle: Handle,
    thread: engine::EngineThread,
    native: native::NativeServer,
    bridges: Arc<Bridges>,
    signals: Signals,
}

/// The signals that ask for the end.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    fn listen() -> Result<Self, ServeError> {
        let listen = |kind| {
            signal(kind).map_err(|source| ServeError::Io {
                what: "cannot listen for signals".to_owned(),
                source,
            })
        };
        Ok(Self {
            terminate: listen(SignalKind::terminate())?,
            interrupt: listen(SignalKind::interrupt())?,
        })
    }
}

/// Starts everything. With `ready_stdout`, says so in one JSON line.
pub async fn start(config: Config, ready_stdout: bool) -> Result<Serving, ServeError> {
    let watch = Stopwatch::start();
    if !config.server.listen.is_local() {
        warn!(listen = %config.server.listen, "listening where other machines can reach it, without TLS: anybody on that network can read the token");
    }
    let (token, token_place) = token(&config)?;
    let data_dir = config.server.data_dir.clone();
    let options = config.engine_options();
    let durable = config.durable_options(engine::clock::wall_now);
    let opened = tokio::task::spawn_blocking(move || -> Result<_, ServeError> {
        let store = Durable::open(&data_dir, durable)?;
        let gauges = store.gauges();
        let (handle, thread, loaded) = engine::spawn(store, options)?;
        Ok((handle, thread, loaded, gauges))
    });
    let (handle, thread, loaded, gauges) = opened.await.map_err(|source| ServeError::Io {
        what: "opening the store".to_owned(),
        source: io::Error::other(source),
    })??;
    // From here on a signal ends in order: whoever reads the ready line may send one at once.
    let signals = Signals::listen()?;
    let bridges = Arc::new(Bridges::start(&handle, &config));
    let address = match &config.server.listen {
        Listen::Tcp(address) => Address::Tcp(*address),
        Listen::Unix(path) => Address::Unix(path.clone()),
    };
    let limits = native::Limits {
        connections: config.limits.max_connections,
        connections_per_peer: config.limits.max_connections_per_peer,
        ..native::Limits::default()
    };
    let extensions = Arc::new(Rest {
        bridges: Arc::clone(&bridges),
        gauges,
    });
    let started = native::serve(
        handle.clone(),
        NativeOptions {
            address: address.clone(),
            token: Some(Arc::clone(&token)),
            limits,
            extensions,
        },
    )
    .await;
    let native = match started {
        Ok(native) => native,
        Err(source) => {
            thread.stop();
            drop(tokio::task::spawn_blocking(move || thread.join()).await);
            return Err(if source.kind() == io::ErrorKind::AddrInUse {
                ServeError::PortInUse {
                    address: address.to_string(),
                    by: owner_of(&address),
                }
            } else {
                ServeError::Io {
                    what: format!("cannot listen on {address}"),
                    source,
                }
            });
        }
    };
    let url = native.local_address().to_string();
    if token_place == TokenPlace::AfterBinding {
        leave_token(native.local_address(), &token);
    }
    let seconds = watch.elapsed_ms() as f64 / 1000.0;
    info!(
        url,
        from_sled = loaded.from_sled,
        from_log = loaded.from_log,
        seconds,
        "serving"
    );
    if ready_stdout {
        say(
            json!({"native": url, "pid": std::process::id(), "from_sled": loaded.from_sled, "from_log": loaded.from_log, "seconds": seconds}),
        );
    } else {
        remark(format_args!(
            "dagorama {} serves {url} from {} ({} open nodes, ready in {seconds:.3} s)",
            env!("CARGO_PKG_VERSION"),
            config.server.data_dir.display(),
            loaded.from_sled + loaded.from_log
        ));
    }
    Ok(Serving {
        url,
        handle,
        thread,
        native,
        bridges,
        signals,
    })
}

impl Serving {
    /// Serves until a signal asks for the end or the engine stops by itself.
    pub async fn until_stopped(mut self) -> Result<(), ServeError> {
        tokio::select! {
            _ = self.signals.terminate.recv() => info!("asked to end (SIGTERM)"),
            _ = self.signals.interrupt.recv() => info!("asked to end (SIGINT)"),
            stopped = self.handle.stopped() => error!(reason = %stopped.reason, "the engine has stopped"),
        }
        self.stop().await
    }

    /// Stops everything in the reverse order: what has arrived is answered, the store is brought up to date.
    pub async fn stop(self) -> Result<(), ServeError> {
        self.bridges.shutdown().await;
        self.native.shutdown().await;
        self.thread.stop();
        match tokio::task::spawn_blocking(move || self.thread.join()).await {
            Ok(result) => Ok(result?),
            Err(source) => Err(ServeError::Io {
                what: "the engine".to_owned(),
                source: io::Error::other(source),
            }),
        }
    }
}

/// Whether clients have a file to read the token from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum TokenPlace {
    /// They were given it, or the file is there.
    Known,
    /// The file is named after a port that is not known yet.
    AfterBinding,
}

fn token(config: &Config) -> Result<(Arc<str>, TokenPlace), ServeError> {
    if let Some(token) = std::env::var("DAGORAMA_TOKEN")
        .ok()
        .filter(|token| !token.is_empty())
    {
        return Ok((token.into(), TokenPlace::Known));
    }
    let any_port = matches!(&config.server.listen, Listen::Tcp(address) if address.port() == 0);
    if any_port && config.server.token_file.is_none() {
        let token = config::new_token().map_err(|source| ServeError::Io {
            what: "cannot make a token".to_owned(),
            source,
        })?;
        return Ok((token, TokenPlace::AfterBinding));
    }
    let path = config.token_path();
    let token = config::token(&path).map_err(|source| ServeError::Io {
        what: format!("token file {}", path.display()),
        source,
    })?;
    Ok((token, TokenPlace::Known))
}

/// Leaves the token where this user's clients look, for a port that was not known before.
fn leave_token(address: &Address, token: &str) {
    let Address::Tcp(address) = address else {
        return;
    };
    let path = config::token_file(&Listen::Tcp(*address));
    if let Err(error) = config::write_token(&path, token) {
        warn!(path = %path.display(), %error, "could not leave the token for clients: give them DAGORAMA_TOKEN");
    }
}

/// What the native listener asks the rest of the server for.
struct Rest {
    bridges: Arc<Bridges>,
    gauges: Arc<Gauges>,
}

impl native::Extensions for Rest {
    fn bridges(&self) -> Value {
        self.bridges.list()
    }

    fn dlq(&self, request: Value) -> dagorama_bridge_api::BoxFuture<'_, Result<Value, Rejection>> {
        Box::pin(self.bridges.dlq(request))
    }

    fn status(&self) -> Value {
        json!({
            "log_position": self.gauges.log_position(), "sled_position": self.gauges.state_position(), "syncs": sync_shim::own_syncs(),
            "sled_syncs": sync_shim::sled_syncs(), "heap_bytes": sync_shim::heap_bytes(), "parked": self.bridges.n_parked(),
        })
    }
}

/// Which process listens on a TCP address of this machine, from /proc; empty when that cannot be told.
fn owner_of(address: &Address) -> String {
    let Address::Tcp(address) = address else {
        return String::new();
    };
    let port = format!(":{:04X} ", address.port());
    let tables = ["/proc/net/tcp", "/proc/net/tcp6"]
        .map(|path| std::fs::read_to_string(path).unwrap_or_default());
    let inode = tables
        .iter()
        .flat_map(|table| table.lines())
        .find_map(|line| {
            let fields: Vec<&str> = line.split_whitespace().collect();
            let listening =
                fields.get(3) == Some(&"0A") && format!("{} ", fields.get(1)?).ends_with(&port);
            listening
                .then(|| fields.get(9).map(|inode| format!("socket:[{inode}]")))
                .flatten()
        });
    let Some(inode) = inode else {
        return String::new();
    };
    let processes = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    for process in processes {
        let pid = process.file_name().to_string_lossy().into_owned();
        let descriptors = std::fs::read_dir(process.path().join("fd"))
            .into_iter()
            .flatten()
            .flatten();
        for descriptor in descriptors {
            if std::fs::read_link(descriptor.path())
                .is_ok_and(|target| target.to_string_lossy() == inode)
            {
                let name = std::fs::read_to_string(process.path().join("comm")).unwrap_or_default();
                return format!(" by process {pid} ({})", name.trim());
            }
        }
    }
    String::new()
}
