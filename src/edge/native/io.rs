//! Sockets for both ends: TCP or unix, and the queue of bytes on their way out.
//!
//! Frames are written into one buffer while the socket is busy, so that many leave in one system call. Knows nothing of what they
//! say. Invariant: whoever has much to send waits for [`Outgoing::room`] first, so that a peer that reads slowly holds up only itself.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::BytesMut;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::Notify;

/// A peer that takes nothing for this long is given up.
const STALL: Duration = Duration::from_secs(30);
/// Least room that a read has.
const READ_BYTES: usize = 64 * 1024;
/// A write buffer that grew beyond this is given back to the allocator.
const KEEP_BYTES: usize = 1024 * 1024;

/// The reading half of a connection.
pub type Reader = Box<dyn AsyncRead + Send + Unpin>;
/// The writing half of a connection.
pub type Writer = Box<dyn AsyncWrite + Send + Unpin>;

/// Reads what has arrived into `buffer`. Returns how many bytes came; 0: the peer has closed.
pub async fn read_some(reader: &mut Reader, buffer: &mut BytesMut) -> std::io::Result<usize> {
    // The room grows with what has arrived, not with what a header says will come.
    let room = READ_BYTES.max(buffer.len());
    if buffer.capacity() - buffer.len() < READ_BYTES / 4 {
        buffer.reserve(room);
    }
    reader.read_buf(buffer).await
}

/// Bytes on their way out of one connection. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Outgoing(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    state: Mutex<State>,
    /// There is something to write, or the queue was closed.
    filled: Notify,
    /// Something was written, or the connection broke.
    drained: Notify,
    limit: usize,
}

#[derive(Debug, Default)]
struct State {
    waiting: Vec<u8>,
    /// Taken by the writer and not yet written.
    writing: usize,
    /// Nothing more will come; what is waiting is still written.
    closed: bool,
    /// The connection is gone: what comes is dropped.
    broken: bool,
}

impl Outgoing {
    /// A queue that is full at `limit` bytes.
    #[must_use]
    pub fn new(limit: usize) -> Self {
        Self(Arc::new(Inner {
            state: Mutex::default(),
            filled: Notify::new(),
            drained: Notify::new(),
            limit,
        }))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Every state is sound, also after a panic of whoever wrote into the buffer.
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets `write` append whole frames. Does not wait for room.
    pub fn push(&self, write: impl FnOnce(&mut Vec<u8>)) {
        let mut state = self.state();
        if state.broken || state.closed {
            return;
        }
        write(&mut state.waiting);
        drop(state);
        self.0.filled.notify_one();
    }

    /// Waits until there is room. `false`: the connection is gone.
    pub async fn room(&self) -> bool {
        loop {
            let drained = self.0.drained.notified();
            {
                let state = self.state();
                if state.broken || state.closed {
                    return false;
                }
                if state.waiting.len() + state.writing < self.0.limit {
                    return true;
                }
            }
            drained.await;
        }
    }

    /// Waits for room, then lets `write` append whole frames.
    pub async fn send(&self, write: impl FnOnce(&mut Vec<u8>)) {
        if self.room().await {
            self.push(write);
        }
    }

    /// Nothing more will come: the writer ends when what is waiting has left.
    pub fn close(&self) {
        self.state().closed = true;
        self.0.filled.notify_one();
        self.0.drained.notify_waiters();
    }

    /// The connection is gone.
    fn break_off(&self) {
        let mut state = self.state();
        state.broken = true;
        state.waiting = Vec::new();
        drop(state);
        self.0.drained.notify_waiters();
        self.0.filled.notify_one();
    }

    /// Whether the connection is gone.
    #[must_use]
    pub fn is_broken(&self) -> bool {
        self.state().broken
    }

    /// Writes what comes until the queue is closed and empty, or the peer is gone. The one consumer of the queue.
    pub async fn run(self, mut writer: Writer) {
        let mut batch = Vec::new();
        loop {
            {
                let mut state = self.state();
                std::mem::swap(&mut state.waiting, &mut batch);
                state.writing = batch.len();
                if batch.is_empty() && (state.closed || state.broken) {
                    break;
                }
            }
            if batch.is_empty() {
                self.0.filled.notified().await;
                continue;
            }
            if !write_all(&mut writer, &batch).await {
                self.break_off();
                return;
            }
            batch.clear();
            if batch.capacity() > KEEP_BYTES {
                batch = Vec::new();
            }
            self.state().writing = 0;
            self.0.drained.notify_waiters();
        }
        let _ = tokio::time::timeout(STALL, writer.shutdown()).await;
        self.break_off();
    }
}

async fn write_all(writer: &mut Writer, mut bytes: &[u8]) -> bool {
    while !bytes.is_empty() {
        match tokio::time::timeout(STALL, writer.write(bytes)).await {
            Ok(Ok(n)) if n > 0 => bytes = &bytes[n..],
            _ => return false,
        }
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pipe(size: usize) -> (Reader, Writer) {
        let (one, two) = tokio::io::duplex(size);
        (Box::new(one), Box::new(two))
    }

    #[tokio::test]
    async fn what_is_pushed_leaves_in_order_and_the_rest_after_the_close() {
        let (mut reader, writer) = pipe(16);
        let outgoing = Outgoing::new(1_000);
        let task = tokio::spawn(outgoing.clone().run(writer));
        for byte in 0..200u8 {
            outgoing.push(|out| out.extend_from_slice(&[byte; 3]));
        }
        outgoing.close();
        outgoing.push(|out| out.push(255));
        let mut got = Vec::new();
        reader.read_to_end(&mut got).await.expect("readable");
        let expected: Vec<u8> = (0..200u8).flat_map(|byte| [byte; 3]).collect();
        assert_eq!(got, expected);
        task.await.expect("no panic");
        assert!(outgoing.is_broken());
    }

    #[tokio::test]
    async fn a_full_queue_makes_the_sender_wait_until_the_peer_reads() {
        let (mut reader, writer) = pipe(16);
        let outgoing = Outgoing::new(100);
        tokio::spawn(outgoing.clone().run(writer));
        outgoing.push(|out| out.resize(500, 1));
        let waiting = tokio::time::timeout(Duration::from_millis(50), outgoing.room());
        assert!(waiting.await.is_err(), "no room while nobody reads");
        let mut got = [0; 500];
        reader.read_exact(&mut got).await.expect("readable");
        assert!(outgoing.room().await);
        drop(reader);
        outgoing.push(|out| out.resize(500, 1));
        assert!(!outgoing.room().await, "the peer is gone");
    }
}
