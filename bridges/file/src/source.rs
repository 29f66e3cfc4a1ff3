//! Lines of a file, each with its place. Polling, no inotify: it works on every file system, and 20 looks a second cost nothing.

use std::fs::{File, Metadata};
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, UNIX_EPOCH};

use bytes::{Bytes, BytesMut};
use dagorama_bridge_api::{
    BoxFuture, BridgeError, Message, MessageIdentity, Positions, Receipt, Source, Unusable,
};

use crate::error::{blocking, of_io};

/// What is read and how.
#[derive(Debug, Clone)]
pub struct SourceOptions {
    /// The file.
    pub path: PathBuf,
    /// Go on as it grows, and wait for it while it does not exist. Without it the source ends at the end of the file.
    pub follow: bool,
    /// How often a followed file is looked at.
    pub poll: Duration,
    /// Longer lines, in bytes, are unusable.
    pub max_line: usize,
}

/// Bytes that are read at once.
const CHUNK: usize = 256 << 10;
/// Bytes that a dead letter keeps of a line that is too long.
const KEPT_OF_LONG_LINE: usize = 64 << 10;

/// The inbound half: one file.
pub struct FileSource {
    options: SourceOptions,
    positions: Arc<dyn Positions>,
    /// Opened by the first `receive`, which may have to wait for the file.
    open: Option<Open>,
    paused: bool,
}

struct Open {
    file: Arc<File>,
    shown_path: Arc<str>,
    partition: Arc<str>,
    lines: Lines,
    /// Length when it was last looked at.
    length: u64,
}

impl FileSource {
    /// A source that begins where `positions` say.
    #[must_use]
    pub fn new(options: SourceOptions, positions: Arc<dyn Positions>) -> Self {
        Self {
            options,
            positions,
            open: None,
            paused: false,
        }
    }

    async fn opened(&mut self) -> Result<&mut Open, BridgeError> {
        while self.open.is_none() {
            let options = self.options.clone();
            let found = blocking(move || try_open(&options)).await?;
            let Some((file, partition, length)) = found else {
                tokio::time::sleep(self.options.poll).await;
                continue;
            };
            let next = self.positions.next(&partition).await?;
            let file = Arc::new(file);
            let checked = Arc::clone(&file);
            let path = self.options.path.clone();
            blocking(move || check_position(&checked, &path, next, length)).await?;
            self.open = Some(Open {
                file,
                shown_path: self.options.path.display().to_string().into(),
                partition,
                lines: Lines::new(next, self.options.max_line),
                length,
            });
        }
        self.open
            .as_mut()
            .ok_or_else(|| BridgeError::Retry("the file was closed".to_owned()))
    }

    async fn receive(&mut self, max: usize) -> Result<Option<Vec<Message>>, BridgeError> {
        if self.paused {
            std::future::pending::<()>().await;
        }
        self.opened().await?;
        let options = &self.options;
        let Some(open) = &mut self.open else {
            return Err(BridgeError::Retry("the file was closed".to_owned()));
        };
        loop {
            let messages = open.take(max);
            if !messages.is_empty() {
                return Ok(Some(messages));
            }
            // Nothing changes before this has been awaited, so a cancelled call reads the same bytes again.
            let (file, at) = (Arc::clone(&open.file), open.lines.read_until);
            let path = options.path.clone();
            let (bytes, length) = blocking(move || {
                let mut bytes = vec![0; CHUNK];
                let n = file
                    .read_at(&mut bytes, at)
                    .map_err(|e| of_io("SOURCE_FAILED", "read", &path, &e))?;
                bytes.truncate(n);
                let length = file
                    .metadata()
                    .map_err(|e| of_io("SOURCE_FAILED", "look at", &path, &e))?
                    .len();
                Ok((bytes, length))
            })
            .await?;
            open.length = length;
            if !bytes.is_empty() {
                open.lines.push(&bytes);
                continue;
            }
            if length < at {
                return Err(truncated(&options.path, length, at));
            }
            if !options.follow {
                let last = open.lines.finish();
                return Ok(last.map(|line| vec![open.message(line)]));
            }
            let (file, path) = (Arc::clone(&open.file), options.path.clone());
            let pending = open.lines.pending();
            blocking(move || check_same(&file, &path, pending)).await?;
            tokio::time::sleep(options.poll).await;
        }
    }
}

impl Source for FileSource {
    fn receive(&mut self, max: usize) -> BoxFuture<'_, Result<Option<Vec<Message>>, BridgeError>> {
        Box::pin(Self::receive(self, max))
    }

    /// The position is in the broker's own store: there is nobody upstream to tell.
    fn settle<'a>(&'a mut self, _: &'a [Receipt]) -> BoxFuture<'a, Result<(), BridgeError>> {
        Box::pin(async { Ok(()) })
    }

    fn pause(&mut self, paused: bool) -> BoxFuture<'_, Result<(), BridgeError>> {
        self.paused = paused;
        Box::pin(async { Ok(()) })
    }

    fn lag(&self) -> Option<u64> {
        let open = self.open.as_ref()?;
        Some(open.length.saturating_sub(open.lines.start))
    }
}

impl Open {
    fn take(&mut self, max: usize) -> Vec<Message> {
        let mut messages = Vec::new();
        while messages.len() < max {
            let Some(line) = self.lines.next() else { break };
            messages.push(self.message(line));
        }
        messages
    }

    fn message(&self, line: Line) -> Message {
        Message {
            identity: MessageIdentity::Position {
                partition: Arc::clone(&self.partition),
                position: line.start,
                next: line.end,
            },
            coordinates: [
                ("path".to_owned(), self.shown_path.to_string()),
                ("offset".to_owned(), line.start.to_string()),
            ]
            .into(),
            ..line.into_message()
        }
    }
}

// ---- the file ---------------------------------------------------------------------------------------------------------

type Found = Option<(File, Arc<str>, u64)>;

/// Opens the file; `None`: it does not exist yet, and is waited for.
fn try_open(options: &SourceOptions) -> Result<Found, BridgeError> {
    let path = &options.path;
    let failed = |e: &std::io::Error| of_io("SOURCE_FAILED", "open", path, e);
    // Opening a pipe would wait for its writer, so look before.
    let metadata = match std::fs::metadata(path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound && options.follow => return Ok(None),
        other => other.map_err(|e| failed(&e))?,
    };
    if !metadata.is_file() {
        return Err(BridgeError::Parked {
            code: "SOURCE_FAILED",
            reason: format!(
                "{} is not a regular file: read a pipe through stdin = true",
                path.display()
            ),
        });
    }
    let file = File::open(path).map_err(|e| failed(&e))?;
    let metadata = file.metadata().map_err(|e| failed(&e))?;
    let full = std::fs::canonicalize(path).map_err(|e| failed(&e))?;
    Ok(Some((file, partition(&full, &metadata), metadata.len())))
}

/// The file itself, not its name: a re-created file often gets the inode of the old one, but never its time of birth. The device's number is
/// left out, because it may change with every boot.
fn partition(path: &Path, metadata: &Metadata) -> Arc<str> {
    let born = metadata
        .created()
        .ok()
        .and_then(|t| t.duration_since(UNIX_EPOCH).ok());
    let born = born.map_or(0, |t| t.as_nanos());
    format!("{}#{:x}-{born:x}", path.display(), metadata.ino()).into()
}

fn check_position(file: &File, path: &Path, next: u64, length: u64) -> Result<(), BridgeError> {
    if next > length {
        return Err(truncated(path, length, next));
    }
    if next == 0 || next == length {
        return Ok(());
    }
    // The byte before the position ends the line that was read last; or that line was the last one, had no end, and got one since.
    let mut around = [0u8; 2];
    file.read_exact_at(&mut around, next - 1)
        .map_err(|e| of_io("SOURCE_FAILED", "read", path, &e))?;
    if around.contains(&b'\n') {
        return Ok(());
    }
    Err(BridgeError::Parked {
        code: "SOURCE_CHANGED",
        reason: format!(
            "{} has no line that ends at byte {next}, which was read up to: it was overwritten in place; restore it, or replace it by a new file, which is read from its beginning",
            path.display()
        ),
    })
}

/// The followed file is still the one at its path.
fn check_same(file: &File, path: &Path, pending: usize) -> Result<(), BridgeError> {
    let here = file
        .metadata()
        .map_err(|e| of_io("SOURCE_FAILED", "look at", path, &e))?;
    if let Ok(there) = std::fs::metadata(path)
        && (there.dev(), there.ino()) == (here.dev(), here.ino())
    {
        return Ok(());
    }
    let rest = if pending == 0 {
        String::new()
    } else {
        format!(" but for {pending} bytes of an unfinished line")
    };
    Err(BridgeError::Parked {
        code: "SOURCE_REPLACED",
        reason: format!(
            "{} was moved away, removed or replaced; the old file was read to its end{rest}; a restart reads the new one from its beginning",
            path.display()
        ),
    })
}

fn truncated(path: &Path, length: u64, next: u64) -> BridgeError {
    BridgeError::Parked {
        code: "SOURCE_TRUNCATED",
        reason: format!(
            "{} has {length} bytes, but was read up to byte {next}: it was cut; restore it, or replace it by a new file, which is read from its beginning",
            path.display()
        ),
    }
}

// ---- lines ------------------------------------------------------------------------------------------------------------

/// Cuts bytes into lines, each with its place. Blank lines are passed over.
pub(crate) struct Lines {
    buffer: BytesMut,
    /// Place of the first byte of the buffer (of the line, when it is being passed over).
    start: u64,
    /// Place after the last byte that was pushed.
    pub(crate) read_until: u64,
    /// Bytes of the buffer that are known to hold no line end.
    scanned: usize,
    max_line: usize,
    /// What is kept of a line that is too long and whose end has not come yet.
    too_long: Option<Bytes>,
}

pub(crate) struct Line {
    start: u64,
    end: u64,
    body: Bytes,
    /// Its length, when it is too long: `body` is its beginning.
    too_long: Option<(u64, usize)>,
}

impl Line {
    /// A message without identity or coordinates.
    pub(crate) fn into_message(self) -> Message {
        let unusable = self.too_long.map(|(length, limit)| Unusable {
            code: "PAYLOAD_TOO_LARGE",
            reason: format!("the line has {length} bytes, more than max_payload ({limit}); its first {} are kept", self.body.len()),
        });
        Message {
            body: Some(self.body),
            key: None,
            headers: Vec::new(),
            identity: MessageIdentity::None,
            coordinates: std::collections::BTreeMap::new(),
            unusable,
        }
    }
}

impl Lines {
    pub(crate) fn new(start: u64, max_line: usize) -> Self {
        Self {
            buffer: BytesMut::new(),
            start,
            read_until: start,
            scanned: 0,
            max_line,
            too_long: None,
        }
    }

    pub(crate) fn push(&mut self, bytes: &[u8]) {
        self.read_until += bytes.len() as u64;
        self.buffer.extend_from_slice(bytes);
    }

    /// Bytes of a line whose end has not come yet.
    fn pending(&self) -> usize {
        usize::try_from(self.read_until - self.start).unwrap_or(usize::MAX)
    }

    /// The next whole line.
    pub(crate) fn next(&mut self) -> Option<Line> {
        loop {
            let Some(found) = self.buffer[self.scanned..].iter().position(|b| *b == b'\n') else {
                self.scanned = self.buffer.len();
                if self.buffer.len() > self.max_line && self.too_long.is_none() {
                    self.too_long = Some(self.beginning());
                }
                if self.too_long.is_some() {
                    self.buffer.clear();
                    self.scanned = 0;
                }
                return None;
            };
            let length = self.scanned + found;
            let line = self.buffer.split_to(length + 1).freeze().slice(..length);
            self.scanned = 0;
            let end = self.read_until - self.buffer.len() as u64;
            if let Some(line) = self.line(line, end, end - 1) {
                return Some(line);
            }
        }
    }

    /// The last line, which has no end; nothing may be pushed after it.
    pub(crate) fn finish(&mut self) -> Option<Line> {
        let rest = self.buffer.split().freeze();
        self.scanned = 0;
        self.line(rest, self.read_until, self.read_until)
    }

    fn beginning(&self) -> Bytes {
        Bytes::copy_from_slice(&self.buffer[..self.buffer.len().min(KEPT_OF_LONG_LINE)])
    }

    /// The line from `self.start` on; the next one begins at `end`.
    fn line(&mut self, body: Bytes, end: u64, text_end: u64) -> Option<Line> {
        let start = std::mem::replace(&mut self.start, end);
        let length = text_end - start;
        if let Some(beginning) = self.too_long.take() {
            let too_long = Some((length, self.max_line));
            return Some(Line {
                start,
                end,
                body: beginning,
                too_long,
            });
        }
        let body = match body.strip_suffix(b"\r") {
            Some(rest) => body.slice(..rest.len()),
            None => body,
        };
        if body.len() > self.max_line {
            let kept = Bytes::copy_from_slice(&body[..body.len().min(KEPT_OF_LONG_LINE)]);
            return Some(Line {
                start,
                end,
                body: kept,
                too_long: Some((length, self.max_line)),
            });
        }
        if body.iter().all(u8::is_ascii_whitespace) {
            return None;
        }
        Some(Line {
            start,
            end,
            body,
            too_long: None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// All lines of `text`, pushed in pieces of `piece` bytes, as `(start, end, body, too long)`.
    fn cut(text: &[u8], piece: usize, max_line: usize) -> Vec<(u64, u64, String, bool)> {
        let mut lines = Lines::new(100, max_line);
        let mut found = Vec::new();
        for piece in text.chunks(piece) {
            lines.push(piece);
            while let Some(line) = lines.next() {
                found.push(line);
            }
        }
        found.extend(lines.finish());
        let shown = |l: Line| {
            (
                l.start,
                l.end,
                String::from_utf8_lossy(&l.body).into_owned(),
                l.too_long.is_some(),
            )
        };
        found.into_iter().map(shown).collect()
    }

    #[test]
    fn lines_are_the_same_however_they_arrive() {
        let text = b"{\"a\":1}\n\n  \n[2]\r\nlast";
        let wanted = vec![
            (100, 108, "{\"a\":1}".to_owned(), false),
            (112, 117, "[2]".to_owned(), false),
            (117, 121, "last".to_owned(), false),
        ];
        for piece in 1..=text.len() {
            assert_eq!(cut(text, piece, 1000), wanted, "pieces of {piece}");
        }
        assert_eq!(cut(b"", 1, 1000), []);
        assert_eq!(cut(b"\n\n", 1, 1000), []);
    }

    #[test]
    fn a_line_that_is_too_long_is_kept_in_part_and_passed_over() {
        for piece in [1, 3, 7, 100] {
            let found = cut(b"ab\n0123456789\ncd\n", piece, 5);
            let places: Vec<_> = found
                .iter()
                .map(|(start, end, _, long)| (*start, *end, *long))
                .collect();
            assert_eq!(
                places,
                [(100, 103, false), (103, 114, true), (114, 117, false)],
                "pieces of {piece}"
            );
            assert!(
                "0123456789".starts_with(&found[1].2) && found[1].2.len() >= 5,
                "{}",
                found[1].2
            );
        }
        let mut lines = Lines::new(0, 5);
        lines.push(b"0123456789\n");
        let message = lines.next().unwrap().into_message();
        let unusable = message.unusable.unwrap();
        assert_eq!(unusable.code, "PAYLOAD_TOO_LARGE");
        assert!(
            unusable.reason.contains("10 bytes") && unusable.reason.contains("(5)"),
            "{}",
            unusable.reason
        );
    }

    #[test]
    fn a_huge_line_does_not_stay_in_memory() {
        let mut lines = Lines::new(0, 1 << 20);
        let piece = vec![b'x'; CHUNK];
        for _ in 0..100 {
            lines.push(&piece);
            assert!(lines.next().is_none());
            assert!(lines.buffer.len() <= (1 << 20) + CHUNK);
        }
        lines.push(b"\nok\n");
        let long = lines.next().unwrap();
        assert_eq!(long.too_long, Some((100 * CHUNK as u64, 1 << 20)));
        assert_eq!(long.body.len(), KEPT_OF_LONG_LINE);
        assert_eq!(lines.next().unwrap().body, "ok");
    }
}
