//! The listener: accepts connections within the limits, and ends them in order at a shutdown.
//!
//! Knows sockets and counts; what is said on a connection is `connection.rs`'s business.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use dagorama_bridge_api::BoxFuture;
use tokio::net::{TcpListener, UnixListener, UnixStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::task::{JoinHandle, JoinSet};
use tracing::{debug, info, warn};

use super::connection;
use super::frame::{Header, Verb};
use super::io::{Reader, Writer};
use crate::broker::command::{Code, Rejection};
use crate::broker::types::SessionId;
use crate::engine::Handle;

/// Where to listen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Address {
    /// A TCP address; port 0 takes any free one.
    Tcp(SocketAddr),
    /// The path of a unix socket.
    Unix(PathBuf),
}

impl std::fmt::Display for Address {
    /// The address as a URL.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Tcp(address) => write!(f, "dagorama://{address}"),
            Self::Unix(path) => write!(f, "dagorama+unix://{}", path.display()),
        }
    }
}

/// What a listener takes (INVARIANTS §6).
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Connections at the same time.
    pub connections: usize,
    /// Connections of one peer that is not this machine.
    pub connections_per_peer: usize,
    /// How long the first frame may take.
    pub hello_timeout: Duration,
    /// How long a begun frame may pause.
    pub idle_timeout: Duration,
    /// Bytes of requests that have no reply yet, of all connections together: so many that ask or submit, and as many that end something.
    pub bytes_in_flight: usize,
    /// Bytes of first frames that are being read, of all connections together.
    pub hello_bytes_in_flight: usize,
    /// Requests of one connection that have no reply yet.
    pub requests_per_connection: usize,
    /// Requests of one connection that are being answered from the store at the same time; others wait their turn.
    pub reads_per_connection: usize,
    /// Calls to WAIT of one connection that have no reply yet.
    pub waits_per_connection: usize,
    /// Bytes waiting to leave on one connection.
    pub write_queue_bytes: usize,
    /// How long replies may take to leave at a shutdown.
    pub drain_timeout: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 1_000,
            connections_per_peer: 64,
            hello_timeout: Duration::from_secs(10),
            idle_timeout: Duration::from_secs(30),
            bytes_in_flight: 256 * 1024 * 1024,
            hello_bytes_in_flight: 32 * 1024 * 1024,
            requests_per_connection: 1_024,
            reads_per_connection: 4,
            waits_per_connection: 65_536,
            write_queue_bytes: 8 * 1024 * 1024,
            drain_timeout: Duration::from_secs(10),
        }
    }
}

/// What the server adds to the verbs that the engine does not answer alone.
pub trait Extensions: Send + Sync {
    /// Routes and outputs, for BRIDGES.
    fn bridges(&self) -> serde_json::Value;
    /// Dead letters, for DLQ: the request as it came.
    fn dlq(
        &self,
        request: serde_json::Value,
    ) -> BoxFuture<'_, Result<serde_json::Value, Rejection>>;
    /// More fields for STATUS: an object.
    fn status(&self) -> serde_json::Value;
}

/// A server without bridges.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoExtensions;

impl Extensions for NoExtensions {
    fn bridges(&self) -> serde_json::Value {
        serde_json::json!({"routes": [], "outputs": []})
    }

    fn dlq(
        &self,
        _request: serde_json::Value,
    ) -> BoxFuture<'_, Result<serde_json::Value, Rejection>> {
        Box::pin(async {
            Err(Rejection::new(
                Code::NotAvailable,
                "this broker has no bridges, so it has no dead letters",
            ))
        })
    }

    fn status(&self) -> serde_json::Value {
        serde_json::json!({})
    }
}

/// How to serve.
#[derive(Clone)]
pub struct NativeOptions {
    /// Where.
    pub address: Address,
    /// The shared secret; `None` asks for none.
    pub token: Option<Arc<str>>,
    /// What is taken.
    pub limits: Limits,
    /// The rest of the server.
    pub extensions: Arc<dyn Extensions>,
}

/// A listener that is running.
#[derive(Debug)]
pub struct NativeServer {
    address: Address,
    stop: watch::Sender<bool>,
    task: JoinHandle<()>,
}

impl NativeServer {
    /// Where it listens: the port that was taken, when any was asked for.
    #[must_use]
    pub fn local_address(&self) -> &Address {
        &self.address
    }

    /// Accepts nothing more, lets the replies to what has arrived leave, and closes all connections. Shut the engine down afterwards.
    pub async fn shutdown(self) {
        self.stop.send_replace(true);
        if let Err(error) = self.task.await {
            warn!(%error, "the native listener ended badly");
        }
    }
}

/// What all connections of a listener share.
pub(super) struct Shared {
    pub(super) handle: Handle,
    pub(super) token: Option<Arc<str>>,
    pub(super) limits: Limits,
    pub(super) extensions: Arc<dyn Extensions>,
    /// In KiB: see [`connection::charge`].
    budget: Arc<Semaphore>,
    /// For completions and the like, which wait for no submission.
    control_budget: Arc<Semaphore>,
    pub(super) hello_budget: Arc<Semaphore>,
    pub(super) sessions: Sessions,
    pub(super) stop: watch::Receiver<bool>,
    peers: Mutex<HashMap<IpAddr, usize>>,
    next_connection: AtomicU64,
}

/// What is done with at once, and no larger than this, waits for no budget.
const FREE_BYTES: usize = 64 * 1024;

impl Shared {
    /// The budget that a frame is charged to. A heartbeat must come through whatever others send: a session that is not heard loses
    /// its leases.
    pub(super) fn budget_of(&self, header: &Header) -> Option<&Arc<Semaphore>> {
        match header.verb {
            Verb::Heartbeat | Verb::Credit | Verb::Wait | Verb::Define
                if header.length <= FREE_BYTES =>
            {
                None
            }
            Verb::Heartbeat
            | Verb::Credit
            | Verb::Finish
            | Verb::Create
            | Verb::Goodbye
            | Verb::Cancel => Some(&self.control_budget),
            _ => Some(&self.budget),
        }
    }

    pub(super) fn connection_number(&self) -> u64 {
        self.next_connection.fetch_add(1, Ordering::Relaxed)
    }
}

/// Which connection speaks for a session now. A later one takes it over, and the end of the earlier one then says nothing to the broker.
#[derive(Debug, Default)]
pub(super) struct Sessions(Mutex<HashMap<SessionId, u64>>);

impl Sessions {
    fn lock(&self) -> MutexGuard<'_, HashMap<SessionId, u64>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The connection takes the session. `attach` runs under the same lock as `detach` below: the engine sees them in this order.
    pub(super) fn take<T>(
        &self,
        session: SessionId,
        connection: u64,
        attach: impl FnOnce() -> T,
    ) -> T {
        let mut sessions = self.lock();
        sessions.insert(session, connection);
        attach()
    }

    /// The connection has closed. `detach` runs only if no other connection has taken the session.
    pub(super) fn leave(&self, session: SessionId, connection: u64, detach: impl FnOnce()) {
        let mut sessions = self.lock();
        if sessions.get(&session) == Some(&connection) {
            sessions.remove(&session);
            detach();
        }
    }
}

/// A connection of a peer, counted until it is dropped.
struct Counted {
    shared: Arc<Shared>,
    peer: Option<IpAddr>,
    _permit: OwnedSemaphorePermit,
}

impl Drop for Counted {
    fn drop(&mut self) {
        let Some(peer) = self.peer else { return };
        let mut peers = self
            .shared
            .peers
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(n) = peers.get_mut(&peer) {
            *n -= 1;
            if *n == 0 {
                peers.remove(&peer);
            }
        }
    }
}

enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener, PathBuf),
}

impl Listener {
    async fn bind(address: &Address) -> io::Result<(Self, Address)> {
        match address {
            Address::Tcp(address) => {
                let listener = TcpListener::bind(address).await?;
                let local = Address::Tcp(listener.local_addr()?);
                Ok((Self::Tcp(listener), local))
            }
            Address::Unix(path) => {
                remove_stale(path).await?;
                let listener = UnixListener::bind(path)?;
                // Only the owner may connect (G18).
                std::fs::set_permissions(
                    path,
                    std::os::unix::fs::PermissionsExt::from_mode(0o600),
                )?;
                Ok((
                    Self::Unix(listener, path.clone()),
                    Address::Unix(path.clone()),
                ))
            }
        }
    }

    async fn accept(&self) -> io::Result<(Reader, Writer, Option<IpAddr>)> {
        match self {
            Self::Tcp(listener) => {
                let (stream, peer) = listener.accept().await?;
                stream.set_nodelay(true)?;
                let (reader, writer) = stream.into_split();
                let ip = peer.ip();
                let counted = (!ip.is_loopback()).then_some(ip);
                Ok((Box::new(reader), Box::new(writer), counted))
            }
            Self::Unix(listener, _) => {
                let (stream, _) = listener.accept().await?;
                let (reader, writer) = stream.into_split();
                Ok((Box::new(reader), Box::new(writer), None))
            }
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Self::Unix(_, path) = self {
            // The next start removes it otherwise.
            let _ = std::fs::remove_file(path);
        }
    }
}

/// Removes the socket of a process that has ended. A socket that somebody answers on is not ours to take.
async fn remove_stale(path: &Path) -> io::Result<()> {
    use std::os::unix::fs::FileTypeExt;
    if let Ok(metadata) = std::fs::symlink_metadata(path)
        && !metadata.file_type().is_socket()
    {
        return Err(io::Error::new(
            io::ErrorKind::AlreadyExists,
            format!("{} is there and is no socket", path.display()),
        ));
    }
    match UnixStream::connect(path).await {
        Ok(_) => Err(io::Error::new(
            io::ErrorKind::AddrInUse,
            format!("{} is in use by another process", path.display()),
        )),
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            std::fs::remove_file(path)
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    }
}

/// Listens, and serves until the shutdown.
pub async fn serve(handle: Handle, options: NativeOptions) -> io::Result<NativeServer> {
    let (listener, address) = Listener::bind(&options.address).await?;
    let (stop, stopped) = watch::channel(false);
    let limits = options.limits;
    let shared = Arc::new(Shared {
        handle,
        token: options.token,
        limits,
        extensions: options.extensions,
        budget: Arc::new(Semaphore::new(limits.bytes_in_flight / 1024)),
        control_budget: Arc::new(Semaphore::new(limits.bytes_in_flight / 1024)),
        hello_budget: Arc::new(Semaphore::new(limits.hello_bytes_in_flight / 1024)),
        sessions: Sessions::default(),
        stop: stopped,
        peers: Mutex::default(),
        next_connection: AtomicU64::new(1),
    });
    info!(%address, "the native protocol is served");
    let task = tokio::spawn(accept(listener, shared));
    Ok(NativeServer {
        address,
        stop,
        task,
    })
}

async fn accept(listener: Listener, shared: Arc<Shared>) {
    let slots = Arc::new(Semaphore::new(shared.limits.connections));
    let mut stop = shared.stop.clone();
    let mut connections = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            Some(ended) = connections.join_next() => {
                if let Err(error) = ended {
                    warn!(%error, "a connection ended badly");
                }
                continue;
            }
            _ = stop.wait_for(|stop| *stop) => break,
        };
        match accepted {
            Ok((reader, writer, peer)) => {
                // Beyond the limit the connection is closed without a word: a reply would cost what the limit saves.
                let Some(counted) = count(&shared, &slots, peer) else {
                    debug!(?peer, "a connection over the limit was closed");
                    continue;
                };
                let shared = Arc::clone(&shared);
                connections.spawn(async move {
                    connection::run(&shared, reader, writer).await;
                    drop(counted);
                });
            }
            Err(error) => {
                // Most likely out of file descriptors: wait for some to be closed.
                warn!(%error, "a connection was not accepted");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
    drop(listener);
    let drained = async { while connections.join_next().await.is_some() {} };
    if tokio::time::timeout(shared.limits.drain_timeout, drained)
        .await
        .is_err()
    {
        warn!("some connections did not take their replies and were cut off");
    }
    connections.shutdown().await;
}

fn count(shared: &Arc<Shared>, slots: &Arc<Semaphore>, peer: Option<IpAddr>) -> Option<Counted> {
    let permit = Arc::clone(slots).try_acquire_owned().ok()?;
    if let Some(peer) = peer {
        let mut peers = shared.peers.lock().unwrap_or_else(PoisonError::into_inner);
        let n = peers.entry(peer).or_default();
        if *n >= shared.limits.connections_per_peer {
            return None;
        }
        *n += 1;
    }
    Some(Counted {
        shared: Arc::clone(shared),
        peer,
        _permit: permit,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;

    #[test]
    fn only_the_connection_that_has_the_session_detaches_it() {
        let sessions = Sessions::default();
        let session = SessionId(7);
        let detached = Cell::new(0);
        let leave = |connection| {
            sessions.leave(session, connection, || detached.set(detached.get() + 1));
        };
        sessions.take(session, 1, || ());
        sessions.take(session, 2, || ());
        leave(1);
        assert_eq!(detached.get(), 0, "the second connection has it");
        leave(2);
        assert_eq!(detached.get(), 1);
        leave(2);
        assert_eq!(detached.get(), 1, "once");
    }

    #[tokio::test]
    async fn a_socket_in_use_is_refused_and_a_stale_one_replaced() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("a.sock");
        let address = Address::Unix(path.clone());
        let (first, local) = Listener::bind(&address).await.expect("free");
        assert_eq!(local, address);
        let mode = std::os::unix::fs::PermissionsExt::mode(
            &std::fs::metadata(&path).expect("exists").permissions(),
        );
        assert_eq!(mode & 0o777, 0o600);
        let Err(error) = Listener::bind(&address).await else {
            panic!("bound twice");
        };
        assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
        drop(first);
        assert!(!path.exists(), "removed at the end");
        drop(std::os::unix::net::UnixListener::bind(&path).expect("a stale one"));
        assert!(path.exists());
        assert!(Listener::bind(&address).await.is_ok());
        std::fs::write(&path, "a file of somebody").expect("writable");
        let Err(error) = Listener::bind(&address).await else {
            panic!("bound over a file");
        };
        assert_eq!(error.kind(), io::ErrorKind::AlreadyExists);
        assert!(path.exists(), "it is left alone");
    }
}
