//! Deliveries as lines of a file, each written once, or of a stream.
//!
//! Before the bytes of a batch touch the file, the companion (`companion.rs`) holds them durably, with the place where they will begin.
//! Then they are appended and synced, then confirmed. Whatever the instant of a crash, the companion and the file's tail say together
//! what happened: nothing, a part (then the rest is added), or all (then what is delivered again is confirmed without being written).
//! Bytes that are neither the old file nor that batch are somebody else's: they are never cut or overwritten, the output is parked.

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use dagorama_bridge_api::{BoxFuture, BridgeError, Confirmation, Delivery, Sink, Unusable};
use xxhash_rust::xxh3::xxh3_64;

use crate::companion::{Companion, sync_directory};
use crate::error::{blocking, of_io};

const FAILED: &str = "OUTPUT_FAILED";

/// The outbound half: one file, one writer.
///
/// A foreign line that another program appends between two batches stays where it is, and a foreign line without an end gets one. A file that
/// was moved away (rotated) is followed by a new one, if nothing was half written.
pub struct FileSink {
    /// `None` after a call that was cut off: build again.
    state: Option<State>,
}

struct State {
    path: PathBuf,
    companion_path: PathBuf,
    /// Opened for appending.
    file: File,
    companion: Companion,
}

impl FileSink {
    /// Opens or makes the file, and finishes what a crash left half written.
    pub async fn open(path: PathBuf) -> Result<Self, BridgeError> {
        let state = blocking(move || State::open(path)).await?;
        Ok(Self { state: Some(state) })
    }

    async fn with_state<T: Send + 'static>(
        &mut self,
        work: impl FnOnce(&mut State) -> Result<T, BridgeError> + Send + 'static,
    ) -> Result<T, BridgeError> {
        let Some(mut state) = self.state.take() else {
            return Err(BridgeError::Retry(
                "the sink was cut off in the middle of a write".to_owned(),
            ));
        };
        let (state, result) = blocking(move || {
            let result = work(&mut state);
            Ok((state, result))
        })
        .await?;
        // After an error the file may be longer than we know: only `open` sorts that out.
        if result.is_ok() {
            self.state = Some(state);
        }
        result
    }
}

impl Sink for FileSink {
    fn deliver(
        &mut self,
        deliveries: Vec<Delivery>,
    ) -> BoxFuture<'_, Result<Vec<Confirmation>, BridgeError>> {
        Box::pin(self.with_state(move |state| state.deliver(&deliveries)))
    }

    fn drain(&mut self) -> BoxFuture<'_, Result<Vec<Confirmation>, BridgeError>> {
        Box::pin(self.with_state(|state| {
            state.mark_complete()?;
            Ok(Vec::new())
        }))
    }
}

impl State {
    fn open(path: PathBuf) -> Result<Self, BridgeError> {
        let failed = |what: &str, path: &Path, e: &io::Error| of_io(FAILED, what, path, e);
        let companion_path = Companion::path_of(&path);
        let companion =
            Companion::read(&companion_path).map_err(|e| failed("read", &companion_path, &e))?;
        if fs::metadata(&path).is_ok_and(|m| !m.is_file()) {
            return Err(BridgeError::Parked {
                code: FAILED,
                reason: format!(
                    "{} is not a regular file: use stdout = true, or name a file",
                    path.display()
                ),
            });
        }
        let file = OpenOptions::new()
            .append(true)
            .create(true)
            .open(&path)
            .map_err(|e| failed("open", &path, &e))?;
        sync_directory(&path).map_err(|e| failed("sync the directory of", &path, &e))?;
        let mut state = Self {
            path,
            companion_path,
            file,
            companion,
        };
        if let Some(pending) = state.companion.pending.clone() {
            state.finish(&pending)?;
            state.mark_complete()?;
        }
        Ok(state)
    }

    /// Brings the file to the state after the write of `pending`, of which any part may be there already.
    fn finish(&self, pending: &[u8]) -> Result<(), BridgeError> {
        let failed = |what: &str, e: &io::Error| of_io(FAILED, what, &self.path, e);
        // Not the appending handle: on that one the kernel ignores positions.
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(&self.path)
            .map_err(|e| failed("open", &e))?;
        let length = file.metadata().map_err(|e| failed("look at", &e))?.len();
        let offset = self.companion.offset;
        if length < offset {
            return Err(self.changed(&format!(
                "has {length} bytes, but a write began at byte {offset} of it"
            )));
        }
        let present = usize::try_from(length - offset)
            .unwrap_or(usize::MAX)
            .min(pending.len());
        let mut tail = vec![0; present];
        file.read_exact_at(&mut tail, offset)
            .map_err(|e| failed("read", &e))?;
        if tail != pending[..present] {
            // A power cut may leave zeros where the bytes had not reached the disk; anything else is not ours.
            let torn = tail
                .iter()
                .zip(pending)
                .all(|(is, wanted)| is == wanted || *is == 0);
            if !torn || length > offset + pending.len() as u64 {
                return Err(self.changed(&format!(
                    "has other bytes at {offset} than those that were being written there"
                )));
            }
        }
        file.write_all_at(pending, offset)
            .map_err(|e| failed("write", &e))?;
        file.sync_data().map_err(|e| failed("sync", &e))
    }

    fn changed(&self, what: &str) -> BridgeError {
        BridgeError::Parked {
            code: "OUTPUT_CHANGED",
            reason: format!(
                "{} {what}: somebody else changed it; look at both files, restore it or move it and {} away, and restart",
                self.path.display(),
                self.companion_path.display()
            ),
        }
    }

    /// From now on the file may be moved or cut: all of it was confirmed.
    fn mark_complete(&mut self) -> Result<(), BridgeError> {
        if self.companion.pending.take().is_some() {
            self.companion
                .write(&self.companion_path)
                .map_err(|e| of_io(FAILED, "write", &self.companion_path, &e))?;
        }
        Ok(())
    }

    fn deliver(&mut self, deliveries: &[Delivery]) -> Result<Vec<Confirmation>, BridgeError> {
        let failed = |what: &str, path: &Path, e: &io::Error| of_io(FAILED, what, path, e);
        if deliveries.is_empty() {
            return Ok(Vec::new());
        }
        let here = self
            .file
            .metadata()
            .map_err(|e| failed("look at", &self.path, &e))?;
        let same = fs::metadata(&self.path)
            .is_ok_and(|there| (there.dev(), there.ino()) == (here.dev(), here.ino()));
        if !same {
            self.mark_complete()?;
            return Err(BridgeError::Retry(format!(
                "{} was moved away: a new file is begun",
                self.path.display()
            )));
        }
        let known: BTreeSet<u64> = self.companion.ids.iter().copied().collect();
        let mut ids = Vec::with_capacity(deliveries.len());
        let mut bytes = Vec::new();
        let mut confirmations = Vec::with_capacity(deliveries.len());
        for delivery in deliveries {
            let refused = match line_of(delivery) {
                Err(unusable) => Some(unusable),
                Ok(line) => {
                    let id = xxh3_64(delivery.message_id.as_bytes());
                    ids.push(id);
                    if !known.contains(&id) {
                        bytes.extend_from_slice(&line);
                        bytes.push(b'\n');
                    }
                    None
                }
            };
            confirmations.push(Confirmation {
                seq: delivery.seq,
                refused,
            });
        }
        if bytes.is_empty() {
            return Ok(confirmations);
        }
        if here.len() > 0 && !self.ends_with_line_end(here.len())? {
            bytes.insert(0, b'\n');
        }
        self.companion = Companion {
            offset: here.len(),
            ids,
            pending: Some(bytes),
        };
        self.companion
            .write(&self.companion_path)
            .map_err(|e| failed("write", &self.companion_path, &e))?;
        let bytes = self.companion.pending.as_deref().unwrap_or_default();
        self.file
            .write_all(bytes)
            .map_err(|e| failed("write", &self.path, &e))?;
        self.file
            .sync_data()
            .map_err(|e| failed("sync", &self.path, &e))?;
        Ok(confirmations)
    }

    fn ends_with_line_end(&self, length: u64) -> Result<bool, BridgeError> {
        let mut last = [0u8];
        let read =
            File::open(&self.path).and_then(|file| file.read_exact_at(&mut last, length - 1));
        read.map_err(|e| of_io(FAILED, "read", &self.path, &e))?;
        Ok(last == [b'\n'])
    }
}

/// The line of a delivery, without its end. Line breaks between the tokens of JSON mean nothing and become spaces.
fn line_of(delivery: &Delivery) -> Result<Bytes, Unusable> {
    let Some(body) = &delivery.body else {
        return Ok(Bytes::from_static(b"null"));
    };
    let breaks = |b: &u8| matches!(b, b'\n' | b'\r');
    if !body.iter().any(breaks) {
        return Ok(body.clone());
    }
    if delivery.content_type == "application/json" {
        let flat = body.iter().map(|b| if breaks(b) { b' ' } else { *b });
        return Ok(flat.collect());
    }
    Err(Unusable {
        code: "LINE_BREAK",
        reason: "the bytes contain a line break, so they cannot be one line of a file: return JSON, or send the output elsewhere".to_owned(),
    })
}

/// The outbound half: a stream such as standard output. Lines are flushed before they are confirmed.
pub struct StreamSink {
    name: PathBuf,
    writer: Arc<Mutex<dyn Write + Send>>,
}

impl StreamSink {
    /// Writes to `writer`; `name` is what errors call it.
    #[must_use]
    pub fn new(name: &str, writer: Arc<Mutex<dyn Write + Send>>) -> Self {
        Self {
            name: PathBuf::from(name),
            writer,
        }
    }

    /// Writes to standard output.
    #[must_use]
    pub fn stdout() -> Self {
        Self::new("standard output", Arc::new(Mutex::new(io::stdout())))
    }
}

impl Sink for StreamSink {
    fn deliver(
        &mut self,
        deliveries: Vec<Delivery>,
    ) -> BoxFuture<'_, Result<Vec<Confirmation>, BridgeError>> {
        let (writer, name) = (Arc::clone(&self.writer), self.name.clone());
        Box::pin(blocking(move || {
            let mut bytes = Vec::new();
            let mut confirmations = Vec::with_capacity(deliveries.len());
            for delivery in &deliveries {
                let refused = match line_of(delivery) {
                    Err(unusable) => Some(unusable),
                    Ok(line) => {
                        bytes.extend_from_slice(&line);
                        bytes.push(b'\n');
                        None
                    }
                };
                confirmations.push(Confirmation {
                    seq: delivery.seq,
                    refused,
                });
            }
            let mut writer = writer.lock().unwrap_or_else(PoisonError::into_inner);
            let written = writer.write_all(&bytes).and_then(|()| writer.flush());
            written.map_err(|e| of_io(FAILED, "write to", &name, &e))?;
            Ok(confirmations)
        }))
    }

    fn drain(&mut self) -> BoxFuture<'_, Result<Vec<Confirmation>, BridgeError>> {
        Box::pin(async { Ok(Vec::new()) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn delivery(seq: u64, body: &str) -> Delivery {
        Delivery {
            seq,
            message_id: format!("1-00000000000000aa/{seq}/1/out"),
            key: None,
            body: Some(body.to_owned().into()),
            content_type: "application/json",
            headers: Vec::new(),
        }
    }

    fn seqs(confirmations: &[Confirmation]) -> Vec<u64> {
        confirmations
            .iter()
            .filter(|c| c.refused.is_none())
            .map(|c| c.seq)
            .collect()
    }

    async fn hand(path: &Path, deliveries: &[Delivery]) -> Result<Vec<u64>, BridgeError> {
        let mut sink = FileSink::open(path.to_owned()).await?;
        Ok(seqs(&sink.deliver(deliveries.to_vec()).await?))
    }

    fn parked(error: &BridgeError) -> (&'static str, &str) {
        match error {
            BridgeError::Parked { code, reason } => (code, reason),
            BridgeError::Retry(text) => panic!("not parked: {text}"),
        }
    }

    const WANTED: &str = "old\n{\"n\":1}\n{\"n\":2}\n";

    fn batch() -> Vec<Delivery> {
        vec![delivery(1, "{\"n\":1}"), delivery(2, "{\"n\":2}")]
    }

    /// A directory as a crash leaves it: the companion durable, `written` bytes of the batch in the file.
    async fn crashed(written: &[u8]) -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("out.ndjson");
        fs::write(&path, "old\n").unwrap();
        hand(&path, &batch()).await.unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), WANTED);
        fs::write(&path, [b"old\n", written].concat()).unwrap();
        (dir, path)
    }

    #[tokio::test]
    async fn a_batch_cut_anywhere_becomes_whole_and_is_written_once() {
        let whole = &WANTED.as_bytes()[4..];
        for cut in 0..=whole.len() {
            let (_dir, path) = crashed(&whole[..cut]).await;
            // All come again, in other company, and another time.
            assert_eq!(hand(&path, &batch()).await.unwrap(), [1, 2]);
            assert_eq!(fs::read_to_string(&path).unwrap(), WANTED, "cut at {cut}");
            let more = [batch(), vec![delivery(3, "3")]].concat();
            assert_eq!(hand(&path, &more).await.unwrap(), [1, 2, 3]);
            assert_eq!(hand(&path, &more).await.unwrap(), [1, 2, 3]);
            assert_eq!(fs::read_to_string(&path).unwrap(), format!("{WANTED}3\n"));
        }
    }

    #[tokio::test]
    async fn zeros_of_a_power_cut_are_filled_in() {
        let whole = &WANTED.as_bytes()[4..];
        for (from, to) in [(0, whole.len()), (3, 9), (whole.len() - 1, whole.len())] {
            let mut torn = whole.to_vec();
            torn[from..to].fill(0);
            for length in [whole.len(), whole.len() - 1] {
                let (_dir, path) = crashed(&torn[..length]).await;
                assert_eq!(hand(&path, &batch()).await.unwrap(), [1, 2]);
                assert_eq!(
                    fs::read_to_string(&path).unwrap(),
                    WANTED,
                    "zeros {from}..{to} of {length}"
                );
            }
        }
    }

    #[tokio::test]
    async fn a_crash_before_the_companion_was_replaced_writes_the_batch_then() {
        let (_dir, path) = crashed(b"").await;
        let companion = Companion::path_of(&path);
        fs::remove_file(&companion).unwrap();
        fs::write(companion.with_extension("dagorama.new"), "half a draft").unwrap();
        assert_eq!(hand(&path, &batch()).await.unwrap(), [1, 2]);
        assert_eq!(fs::read_to_string(&path).unwrap(), WANTED);
    }

    #[tokio::test]
    async fn foreign_lines_are_never_damaged() {
        // Appended behind a whole batch: they stay.
        let (_dir, path) = crashed(&WANTED.as_bytes()[4..]).await;
        fs::write(&path, format!("{WANTED}theirs")).unwrap();
        assert_eq!(
            hand(&path, &[batch(), vec![delivery(3, "3")]].concat())
                .await
                .unwrap(),
            [1, 2, 3]
        );
        assert_eq!(
            fs::read_to_string(&path).unwrap(),
            format!("{WANTED}theirs\n3\n")
        );

        // In the place of the batch, or after a part of it: parked, and not a byte changes.
        for foreign in [
            "theirs\n",
            "{\"n\":1}\ntheirs\n",
            "{\"n\":1}\n{\"n\":3}\n",
            "{\"n\":1}\n{\"n\":3}\nand more of theirs\n",
        ] {
            let (_dir, path) = crashed(foreign.as_bytes()).await;
            let error = hand(&path, &batch()).await.unwrap_err();
            let (code, reason) = parked(&error);
            assert_eq!(code, "OUTPUT_CHANGED", "{reason}");
            assert!(reason.contains(".dagorama"), "{reason}");
            assert_eq!(
                fs::read_to_string(&path).unwrap(),
                format!("old\n{foreign}")
            );
        }
        let (_dir, path) = crashed(b"").await;
        fs::write(&path, "o").unwrap();
        assert_eq!(
            parked(&hand(&path, &batch()).await.unwrap_err()).0,
            "OUTPUT_CHANGED"
        );
    }

    #[tokio::test]
    async fn after_a_drain_the_file_may_be_moved_away() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("out");
        let mut sink = FileSink::open(path.clone()).await.unwrap();
        assert_eq!(seqs(&sink.deliver(batch()).await.unwrap()), [1, 2]);
        assert_eq!(sink.drain().await.unwrap(), []);
        // While it runs: the sink asks to be built again, and begins a new file.
        fs::rename(&path, dir.path().join("out.1")).unwrap();
        let error = sink.deliver(vec![delivery(3, "3")]).await.unwrap_err();
        assert!(matches!(error, BridgeError::Retry(_)), "{error}");
        let error = sink.deliver(vec![delivery(3, "3")]).await.unwrap_err();
        assert!(error.to_string().contains("cut off"), "{error}");
        assert_eq!(hand(&path, &[delivery(3, "3")]).await.unwrap(), [3]);
        assert_eq!(fs::read_to_string(&path).unwrap(), "3\n");
        assert_eq!(
            fs::read_to_string(dir.path().join("out.1")).unwrap(),
            "{\"n\":1}\n{\"n\":2}\n"
        );
    }

    #[tokio::test]
    async fn what_cannot_be_a_line_is_refused_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("out");
        let raw = Delivery {
            content_type: "application/octet-stream",
            ..delivery(2, "a\nb")
        };
        let null = Delivery {
            body: None,
            ..delivery(4, "")
        };
        let mut sink = FileSink::open(path.clone()).await.unwrap();
        let all = sink
            .deliver(vec![
                delivery(1, "{\n\"a\": 1\r\n}"),
                raw,
                delivery(3, "3"),
                null,
            ])
            .await
            .unwrap();
        assert_eq!(all.len(), 4);
        assert_eq!(all[1].refused.as_ref().unwrap().code, "LINE_BREAK");
        assert_eq!(seqs(&all), [1, 3, 4]);
        assert_eq!(
            fs::read_to_string(&path).unwrap(),
            "{ \"a\": 1  }\n3\nnull\n"
        );
    }

    #[tokio::test]
    async fn what_cannot_be_opened_is_parked_with_the_path() {
        let dir = tempfile::tempdir().unwrap();
        let missing = dir.path().join("no/such/out");
        for path in [missing.as_path(), dir.path()] {
            let error = FileSink::open(path.to_owned()).await.err().unwrap();
            let (code, reason) = parked(&error);
            assert_eq!(code, "OUTPUT_FAILED");
            assert!(reason.contains(path.to_str().unwrap()), "{reason}");
        }
        let path = dir.path().join("out");
        fs::write(Companion::path_of(&path), "nonsense").unwrap();
        let error = FileSink::open(path).await.err().unwrap();
        assert!(parked(&error).1.contains("damaged"), "{error}");
    }

    #[tokio::test]
    async fn a_stream_gets_whole_lines() {
        #[derive(Default)]
        struct Pipe(Vec<u8>, bool);
        impl Write for Pipe {
            fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
                if self.1 {
                    return Err(io::ErrorKind::BrokenPipe.into());
                }
                self.0.extend_from_slice(bytes);
                Ok(bytes.len())
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let pipe = Arc::new(Mutex::new(Pipe::default()));
        let mut sink = StreamSink::new("pipe", Arc::clone(&pipe) as Arc<Mutex<dyn Write + Send>>);
        assert_eq!(seqs(&sink.deliver(batch()).await.unwrap()), [1, 2]);
        assert_eq!(pipe.lock().unwrap().0, b"{\"n\":1}\n{\"n\":2}\n");
        pipe.lock().unwrap().1 = true;
        assert_eq!(
            parked(&sink.deliver(batch()).await.unwrap_err()).0,
            "OUTPUT_FAILED"
        );
    }
}
