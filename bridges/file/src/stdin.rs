//! Lines of a stream that cannot be read twice, such as standard input.
//!
//! A thread reads, at most [`AHEAD`] lines ahead. Lines that were handed out and not settled are kept, so that a rebuilt source hands
//! them out again; only the end of the process loses them.

use std::collections::VecDeque;
use std::io::Read;
use std::sync::{Arc, OnceLock};

use dagorama_bridge_api::{BoxFuture, BridgeError, Message, Receipt, Source};
use tokio::sync::{Mutex, mpsc};

use crate::source::Lines;

/// Lines that are read before they are asked for.
const AHEAD: usize = 256;

/// A stream of lines that outlives the sources that read it.
#[derive(Clone)]
pub struct LineStream(Arc<Mutex<Shared>>);

struct Shared {
    incoming: mpsc::Receiver<Result<Message, String>>,
    /// Handed out, not settled; and how many of them the present source has handed out.
    unsettled: VecDeque<Message>,
    handed_out: usize,
    /// Reading has failed behind those.
    failed: Option<String>,
}

impl LineStream {
    /// Reads lines from `reader` on a thread of its own; `name` is what dead letters call it.
    #[must_use]
    pub fn read(name: &'static str, reader: impl Read + Send + 'static, max_line: usize) -> Self {
        let (sender, incoming) = mpsc::channel(AHEAD);
        let work = move || pump(name, reader, max_line, &sender);
        // Without a thread the channel is closed, and the source ends.
        let _ = std::thread::Builder::new()
            .name(format!("dagorama-{name}"))
            .spawn(work);
        Self(Arc::new(Mutex::new(Shared {
            incoming,
            unsettled: VecDeque::new(),
            handed_out: 0,
            failed: None,
        })))
    }

    /// Standard input: always the same stream, whoever asks. The limit of the first call counts.
    #[must_use]
    pub fn stdin(max_line: usize) -> Self {
        static STDIN: OnceLock<LineStream> = OnceLock::new();
        STDIN
            .get_or_init(|| Self::read("stdin", std::io::stdin(), max_line))
            .clone()
    }

    /// A source that goes on with what is not settled.
    pub async fn source(&self) -> StreamSource {
        self.0.lock().await.handed_out = 0;
        StreamSource {
            stream: self.clone(),
            paused: false,
        }
    }
}

fn pump(
    name: &'static str,
    mut reader: impl Read,
    max_line: usize,
    sender: &mpsc::Sender<Result<Message, String>>,
) {
    let mut lines = Lines::new(0, max_line);
    let mut number = 0u64;
    let mut bytes = vec![0; 64 << 10];
    let mut send = |message: Message| {
        number += 1;
        let coordinates = [
            ("path".to_owned(), name.to_owned()),
            ("line".to_owned(), number.to_string()),
        ];
        let message = Message {
            coordinates: coordinates.into(),
            ..message
        };
        sender.blocking_send(Ok(message)).is_ok()
    };
    loop {
        match reader.read(&mut bytes) {
            Ok(0) => {
                if let Some(line) = lines.finish() {
                    let _ = send(line.into_message());
                }
                return;
            }
            Ok(n) => lines.push(&bytes[..n]),
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(e) => {
                let _ = sender.blocking_send(Err(format!("cannot read {name}: {e}")));
                return;
            }
        }
        while let Some(line) = lines.next() {
            if !send(line.into_message()) {
                return;
            }
        }
    }
}

/// The inbound half: one stream.
pub struct StreamSource {
    stream: LineStream,
    paused: bool,
}

impl Source for StreamSource {
    fn receive(&mut self, max: usize) -> BoxFuture<'_, Result<Option<Vec<Message>>, BridgeError>> {
        Box::pin(async move {
            if self.paused {
                std::future::pending::<()>().await;
            }
            let mut shared = self.stream.0.lock().await;
            // What an earlier source had handed out, or this one has read in a call that was cancelled.
            let mut ready = shared.unsettled.len() - shared.handed_out;
            if ready == 0 {
                if let Some(reason) = shared.failed.clone() {
                    return Err(BridgeError::Parked {
                        code: "SOURCE_FAILED",
                        reason,
                    });
                }
                match shared.incoming.recv().await {
                    None => return Ok(None),
                    Some(Err(reason)) => {
                        shared.failed = Some(reason.clone());
                        return Err(BridgeError::Parked {
                            code: "SOURCE_FAILED",
                            reason,
                        });
                    }
                    Some(Ok(message)) => shared.unsettled.push_back(message),
                }
                ready = 1;
                while ready < max {
                    match shared.incoming.try_recv() {
                        Ok(Ok(message)) => shared.unsettled.push_back(message),
                        Ok(Err(reason)) => {
                            // Said when the lines before it have been taken: it is no end.
                            shared.failed = Some(reason);
                            break;
                        }
                        Err(_) => break,
                    }
                    ready += 1;
                }
            }
            let first = shared.handed_out;
            shared.handed_out += ready.min(max);
            Ok(Some(
                shared
                    .unsettled
                    .range(first..shared.handed_out)
                    .cloned()
                    .collect(),
            ))
        })
    }

    fn settle<'a>(&'a mut self, receipts: &'a [Receipt]) -> BoxFuture<'a, Result<(), BridgeError>> {
        Box::pin(async move {
            let mut shared = self.stream.0.lock().await;
            let n = receipts.len().min(shared.handed_out);
            shared.unsettled.drain(..n);
            shared.handed_out -= n;
            Ok(())
        })
    }

    fn pause(&mut self, paused: bool) -> BoxFuture<'_, Result<(), BridgeError>> {
        self.paused = paused;
        Box::pin(async { Ok(()) })
    }

    fn lag(&self) -> Option<u64> {
        None
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    struct Bad;
    impl Read for Bad {
        fn read(&mut self, _: &mut [u8]) -> std::io::Result<usize> {
            Err(std::io::Error::other("unplugged"))
        }
    }

    fn bodies(messages: &[Message]) -> Vec<&str> {
        messages
            .iter()
            .map(|m| std::str::from_utf8(m.body.as_ref().unwrap()).unwrap())
            .collect()
    }

    #[tokio::test]
    async fn lines_come_once_and_what_is_not_settled_comes_again() {
        let stream = LineStream::read("test", std::io::Cursor::new("a\nb\n\nc"), 100);
        let mut source = stream.source().await;
        let first = source.receive(1).await.unwrap().unwrap();
        assert_eq!(bodies(&first), ["a"]);
        assert_eq!(first[0].coordinates["line"], "1");
        source
            .settle(&[Receipt::Applied { duplicate: false }])
            .await
            .unwrap();
        let second = source.receive(1).await.unwrap().unwrap();
        assert_eq!(bodies(&second), ["b"]);
        drop(source);
        let mut source = stream.source().await;
        let mut seen = Vec::new();
        while let Some(messages) = source.receive(10).await.unwrap() {
            seen.extend(bodies(&messages).into_iter().map(str::to_owned));
        }
        assert_eq!(seen, ["b", "c"]);
    }

    #[tokio::test]
    async fn a_cancelled_receive_loses_nothing() {
        let (reader, mut writer) = std::io::pipe().unwrap();
        let stream = LineStream::read("test", reader, 100);
        let mut source = stream.source().await;
        let mut seen = 0;
        for i in 0..50u64 {
            writeln!(writer, "{i}").unwrap();
            let wait = std::time::Duration::from_micros(50 * (i % 4));
            if let Ok(messages) = tokio::time::timeout(wait, source.receive(3)).await {
                let messages = messages.unwrap().unwrap();
                for message in &messages {
                    assert_eq!(message.body.as_ref().unwrap(), &seen.to_string());
                    seen += 1;
                }
                source
                    .settle(&vec![Receipt::DeadLettered; messages.len()])
                    .await
                    .unwrap();
            }
        }
        drop(writer);
        while let Some(messages) = source.receive(7).await.unwrap() {
            seen += messages.len();
        }
        assert_eq!(seen, 50);
    }

    #[tokio::test]
    async fn a_paused_stream_waits_and_a_bad_one_parks() {
        let stream = LineStream::read("test", std::io::Cursor::new("a\n"), 100);
        let mut source = stream.source().await;
        source.pause(true).await.unwrap();
        let wait = std::time::Duration::from_millis(20);
        assert!(tokio::time::timeout(wait, source.receive(1)).await.is_err());
        source.pause(false).await.unwrap();
        assert_eq!(source.receive(1).await.unwrap().unwrap().len(), 1);

        let mut source = LineStream::read("test", Bad, 100).source().await;
        let error = source.receive(1).await.unwrap_err().to_string();
        assert!(
            error.contains("SOURCE_FAILED") && error.contains("unplugged"),
            "{error}"
        );
    }

    #[tokio::test]
    async fn a_failed_read_behind_lines_is_no_end_of_the_stream() {
        let stream = LineStream::read("test", std::io::Cursor::new("a\nb\n").chain(Bad), 100);
        // The thread has read all of it.
        while stream.0.lock().await.incoming.len() < 3 {
            tokio::task::yield_now().await;
        }
        let mut source = stream.source().await;
        let messages = source.receive(10).await.unwrap().unwrap();
        assert_eq!(bodies(&messages), ["a", "b"]);
        source
            .settle(&[Receipt::DeadLettered, Receipt::DeadLettered])
            .await
            .unwrap();
        for _ in 0..2 {
            let error = source.receive(10).await.unwrap_err().to_string();
            assert!(error.contains("unplugged"), "{error}");
        }
    }
}
