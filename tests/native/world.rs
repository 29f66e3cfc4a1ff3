//! A broker on a store in memory, served on a port of its own, and a connection that speaks in raw frames.

#![allow(
    dead_code,
    unreachable_pub,
    reason = "each test program uses its part of it"
)]

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use dagorama::broker::Settings;
use dagorama::broker::types::RunId;
use dagorama::client::Client;
use dagorama::edge::native::codec;
use dagorama::edge::native::frame::{self, Frame, Verb};
use dagorama::edge::native::{Address, Limits, NativeOptions, NativeServer, NoExtensions, serve};
use dagorama::engine::{EngineOptions, EngineThread, Handle, spawn};
use dagorama::storage::Store;
use dagorama::storage::memory::MemoryStore;
use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// Nothing here takes longer unless it hangs.
pub const SOON: Duration = Duration::from_secs(10);

/// How a broker is started.
#[derive(Clone)]
pub struct Setup {
    pub token: Option<&'static str>,
    pub limits: Limits,
    pub settings: Settings,
    pub store: MemoryStore,
    pub address: Address,
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            token: None,
            limits: Limits::default(),
            settings: Settings::default(),
            store: MemoryStore::new(),
            address: Address::Tcp(SocketAddr::from(([127, 0, 0, 1], 0))),
        }
    }
}

/// A broker that is running.
pub struct World {
    pub address: Address,
    pub handle: Handle,
    pub store: MemoryStore,
    server: NativeServer,
    engine: EngineThread,
}

impl World {
    pub async fn start() -> Self {
        Self::with(Setup::default()).await
    }

    pub async fn with(setup: Setup) -> Self {
        let store = setup.store.clone();
        Self::on(store, setup).await
    }

    /// On another store than the one of the setup, which stays empty then.
    pub async fn on(store: impl Store + 'static, setup: Setup) -> Self {
        let options = EngineOptions {
            settings: setup.settings,
            ..EngineOptions::default()
        };
        let (handle, engine, _) = spawn(store, options).expect("a sound store");
        let options = NativeOptions {
            address: setup.address,
            token: setup.token.map(Arc::from),
            limits: setup.limits,
            extensions: Arc::new(NoExtensions),
        };
        let server = serve(handle.clone(), options).await.expect("a free port");
        Self {
            address: server.local_address().clone(),
            handle,
            store: setup.store,
            server,
            engine,
        }
    }

    pub fn url(&self) -> String {
        self.address.to_string()
    }

    pub fn socket(&self) -> SocketAddr {
        match &self.address {
            Address::Tcp(address) => *address,
            Address::Unix(path) => panic!("{} is no TCP address", path.display()),
        }
    }

    pub async fn client(&self) -> Client {
        Client::connect(&self.url(), None).await.expect("reachable")
    }

    /// Stops in order. Returns what a power cut would have left at that moment.
    pub async fn stop(self) -> MemoryStore {
        soon(self.server.shutdown()).await;
        self.engine.stop();
        tokio::task::spawn_blocking(|| self.engine.join())
            .await
            .expect("no panic")
            .expect("no storage error");
        self.store.crash()
    }
}

/// Waits, but not for ever.
pub async fn soon<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(SOON, future)
        .await
        .expect("it took too long")
}

/// A connection in raw frames.
pub struct Raw {
    pub stream: TcpStream,
    pub buffer: BytesMut,
    next: u32,
    /// What was pushed while an answer was waited for.
    pushed: VecDeque<Frame>,
}

impl Raw {
    /// Connects without a word.
    pub async fn open(address: SocketAddr) -> Self {
        let stream = soon(TcpStream::connect(address)).await.expect("it listens");
        stream.set_nodelay(true).expect("a socket");
        Self {
            stream,
            buffer: BytesMut::new(),
            next: 1,
            pushed: VecDeque::new(),
        }
    }

    /// Connects as a client.
    pub async fn client(address: SocketAddr) -> Self {
        let mut raw = Self::open(address).await;
        raw.hello(r#"{"version": 1, "kind": "client"}"#).await;
        raw
    }

    /// Connects as a worker with the action `leaf` on queue `default`; with a session, comes back to it.
    pub async fn worker(address: SocketAddr, session: Option<&str>) -> (Self, Value) {
        let mut raw = Self::open(address).await;
        let hello = serde_json::json!({
            "version": 1, "kind": "worker", "name": "raw", "session": session,
            "queues": ["default"], "actions": [{"action": "leaf"}],
        });
        let welcome = raw.hello(&hello.to_string()).await;
        (raw, welcome)
    }

    pub async fn hello(&mut self, document: &str) -> Value {
        let frame = self.ask(Verb::Hello, document.as_bytes()).await;
        assert_eq!(frame.verb, Verb::Reply, "{:?}", frame.body);
        serde_json::from_slice(&frame.body).expect("JSON")
    }

    /// Sends a frame.
    pub async fn send(&mut self, verb: Verb, request: u32, body: &[u8]) {
        let mut out = Vec::new();
        frame::put(&mut out, verb, false, request, body);
        soon(self.stream.write_all(&out)).await.expect("writable");
    }

    /// The next frame. `None`: the broker has closed the connection.
    pub async fn receive(&mut self) -> Option<Frame> {
        match self.pushed.pop_front() {
            Some(frame) => Some(frame),
            None => self.read().await,
        }
    }

    async fn read(&mut self) -> Option<Frame> {
        loop {
            if let Some(frame) = frame::take(&mut self.buffer).expect("well formed") {
                return Some(frame);
            }
            match soon(self.stream.read_buf(&mut self.buffer)).await {
                Ok(n) if n > 0 => {}
                _ => return None,
            }
        }
    }

    /// Sends a request and waits for its answer; what is pushed meanwhile is received later.
    pub async fn ask(&mut self, verb: Verb, body: &[u8]) -> Frame {
        let request = self.next;
        self.next += 1;
        self.send(verb, request, body).await;
        loop {
            let frame = self.read().await.expect("an answer");
            if frame.request == request || (frame.request == 0 && frame.verb == Verb::Error) {
                return frame;
            }
            self.pushed.push_back(frame);
        }
    }

    /// The code of the refusal that a request gets.
    pub async fn refused(&mut self, verb: Verb, body: &[u8]) -> String {
        let frame = self.ask(verb, body).await;
        assert_eq!(
            frame.verb,
            Verb::Error,
            "{verb:?} was answered: {:?}",
            frame.body
        );
        code(&frame.body)
    }

    pub async fn credit(&mut self, calls: u32) {
        self.send(Verb::Credit, 0, &calls.to_le_bytes()).await;
    }

    /// The next leases; specs before them are dropped.
    pub async fn leases(&mut self) -> Vec<codec::Lease> {
        loop {
            let frame = self.receive().await.expect("leases");
            match frame.verb {
                Verb::Specs | Verb::Reply => {}
                Verb::Leases => return codec::decode_leases(frame.body).expect("well formed"),
                verb => panic!("{verb:?} instead of leases"),
            }
        }
    }

    /// Finishes, and returns the codes of refused items by position.
    pub async fn finish(&mut self, items: &[codec::Finish]) -> Vec<(u32, String)> {
        let mut body = Vec::new();
        codec::put_list(&mut body, items, codec::put_finish);
        let frame = self.ask(Verb::Finish, &body).await;
        assert_eq!(frame.verb, Verb::Reply, "{:?}", frame.body);
        let refused = codec::decode_refusals(frame.body).expect("well formed");
        refused
            .iter()
            .map(|one| (one.position, code(&one.reason)))
            .collect()
    }

    /// Starts a run of one node of action `leaf`.
    pub async fn submit(&mut self, arguments: &[u8]) -> RunId {
        self.send(Verb::Define, 0, br#"[{"id": 1, "action": "leaf"}]"#)
            .await;
        let submit = codec::Submit {
            key: Bytes::new(),
            tags: Bytes::new(),
            root: 0,
            nodes: vec![node(arguments)],
        };
        let mut body = Vec::new();
        codec::put_list(&mut body, &[submit], codec::put_submit);
        let frame = self.ask(Verb::Submit, &body).await;
        assert_eq!(frame.verb, Verb::Reply, "{:?}", frame.body);
        match &codec::decode_submitted(frame.body).expect("well formed")[..] {
            [codec::Submitted::Run { seq, salt, .. }] => RunId {
                seq: dagorama::broker::types::RunSeq(*seq),
                salt: *salt,
            },
            other => panic!("{other:?}"),
        }
    }

    pub async fn wait(&mut self, run: RunId, timeout_ms: u32) -> codec::Waited {
        let mut body = Vec::new();
        let wait = codec::Wait {
            seq: run.seq.0,
            salt: run.salt,
            timeout_ms,
        };
        codec::put_wait(&mut body, &wait);
        let frame = self.ask(Verb::Wait, &body).await;
        assert_eq!(frame.verb, Verb::Reply, "{:?}", frame.body);
        codec::decode_waited(frame.body).expect("well formed")
    }
}

/// A node of spec 1.
pub fn node(arguments: &[u8]) -> codec::Node {
    codec::Node {
        spec: 1,
        codec: dagorama::broker::types::Codec::Raw,
        delay: codec::Delay::None,
        ranges: vec![],
        arguments: Bytes::copy_from_slice(arguments),
    }
}

/// The completion of a lease with a value.
pub fn value(lease: &codec::Lease, body: &[u8]) -> codec::Finish {
    codec::Finish {
        run: lease.run,
        node: lease.node,
        attempt: lease.attempt,
        token: lease.token,
        end: codec::End::Value,
        codec: dagorama::broker::types::Codec::Raw,
        ranges: vec![],
        body: Bytes::copy_from_slice(body),
        children: vec![],
        digest: 0,
    }
}

pub fn code(document: &[u8]) -> String {
    let document: Value = serde_json::from_slice(document).expect("JSON");
    document["code"].as_str().expect("a code").to_owned()
}
