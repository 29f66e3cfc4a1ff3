//! What happens to files while they are read: they grow, end, are cut, overwritten, replaced, and come back.

#![allow(clippy::unwrap_used, reason = "a test")]

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use dagorama_bridge_api::conformance::Ledger;
use dagorama_bridge_api::{BridgeError, Message, MessageIdentity, Source as _};
use dagorama_bridge_file::{FileSource, SourceOptions};

struct Room {
    dir: tempfile::TempDir,
    ledger: Ledger,
}

impl Room {
    fn new() -> Self {
        Self {
            dir: tempfile::tempdir().unwrap(),
            ledger: Ledger::default(),
        }
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("in")
    }

    fn source(&self, follow: bool) -> FileSource {
        let options = SourceOptions {
            path: self.path(),
            follow,
            poll: Duration::from_millis(2),
            max_line: 1000,
        };
        FileSource::new(options, Arc::new(self.ledger.clone()))
    }

    /// Receives and commits once.
    async fn step(&self, source: &mut FileSource) -> Result<Vec<String>, BridgeError> {
        let wait = Duration::from_secs(10);
        let received = tokio::time::timeout(wait, source.receive(100))
            .await
            .expect("in time")?;
        let messages = received.unwrap_or_default();
        let _ = self.ledger.apply(&messages);
        Ok(messages.iter().map(text).collect())
    }

    /// Everything until the end or the error.
    async fn all(&self, follow: bool) -> (Vec<String>, Option<String>) {
        let mut source = self.source(follow);
        let mut seen = Vec::new();
        loop {
            match self.step(&mut source).await {
                Ok(some) if some.is_empty() => return (seen, None),
                Ok(some) => seen.extend(some),
                Err(BridgeError::Parked { code, .. }) => return (seen, Some(code.to_owned())),
                Err(BridgeError::Retry(text)) => panic!("{text}"),
            }
        }
    }
}

fn text(message: &Message) -> String {
    String::from_utf8_lossy(message.body.as_ref().unwrap()).into_owned()
}

fn append(path: &Path, text: &str) {
    fs::OpenOptions::new()
        .append(true)
        .create(true)
        .open(path)
        .unwrap()
        .write_all(text.as_bytes())
        .unwrap();
}

#[tokio::test]
async fn a_file_is_read_to_its_end_once() {
    let room = Room::new();
    fs::write(room.path(), "a\nb\n\nc").unwrap();
    assert_eq!(
        room.all(false).await,
        (vec!["a".into(), "b".into(), "c".into()], None)
    );
    assert_eq!(
        room.all(false).await,
        (vec![], None),
        "a restart reads nothing twice"
    );
    append(&room.path(), "\nd\n");
    assert_eq!(
        room.all(false).await,
        (vec!["d".into()], None),
        "the last line got its end"
    );
    append(&room.path(), "e\n");
    assert_eq!(room.all(false).await, (vec!["e".into()], None));
}

#[tokio::test]
async fn a_followed_file_is_waited_for_and_read_as_it_grows() {
    let room = Room::new();
    let mut source = room.source(true);
    let short = Duration::from_millis(30);
    assert!(
        tokio::time::timeout(short, source.receive(10))
            .await
            .is_err(),
        "it does not exist yet"
    );
    append(&room.path(), "a\nb");
    assert_eq!(room.step(&mut source).await.unwrap(), ["a"]);
    assert!(
        tokio::time::timeout(short, source.receive(10))
            .await
            .is_err(),
        "the last line has no end yet"
    );
    append(&room.path(), "b\n");
    assert_eq!(room.step(&mut source).await.unwrap(), ["bb"]);
    assert_eq!(source.lag(), Some(0));
}

#[tokio::test]
async fn places_are_bytes_and_belong_to_the_file_itself() {
    let room = Room::new();
    fs::write(room.path(), "ä\nbc\n").unwrap();
    let identities = async || {
        let messages = room.source(false).receive(10).await.unwrap().unwrap();
        let places = messages.iter().map(|m| match &m.identity {
            MessageIdentity::Position {
                partition,
                position,
                next,
            } => (partition.to_string(), *position, *next),
            other => panic!("{other:?}"),
        });
        assert_eq!(messages[1].coordinates["offset"], "3");
        places.collect::<Vec<_>>()
    };
    let first = identities().await;
    assert_eq!(
        (first[0].1, first[0].2, first[1].1, first[1].2),
        (0, 3, 3, 6)
    );
    assert_eq!(identities().await, first);
    // Removed and made again: often the same inode, never the same file.
    fs::remove_file(room.path()).unwrap();
    std::thread::sleep(Duration::from_millis(20));
    fs::write(room.path(), "ä\nbc\n").unwrap();
    assert_ne!(identities().await[0].0, first[0].0);
}

#[tokio::test]
async fn a_replaced_file_is_read_to_its_end_then_the_route_parks_and_a_restart_reads_the_new_one() {
    for by_rename in [true, false] {
        let room = Room::new();
        append(&room.path(), "a\n");
        let mut source = room.source(true);
        assert_eq!(room.step(&mut source).await.unwrap(), ["a"]);
        append(&room.path(), "b\n");
        if by_rename {
            fs::rename(room.path(), room.dir.path().join("in.1")).unwrap();
        } else {
            fs::remove_file(room.path()).unwrap();
        }
        append(&room.path(), "new\n");
        assert_eq!(room.step(&mut source).await.unwrap(), ["b"]);
        let error = room.step(&mut source).await.unwrap_err().to_string();
        assert!(
            error.contains("SOURCE_REPLACED") && error.contains("restart"),
            "{error}"
        );
        assert_eq!(room.step(&mut room.source(true)).await.unwrap(), ["new"]);
    }
}

#[tokio::test]
async fn a_cut_or_overwritten_file_parks_at_once_and_after_a_restart() {
    let room = Room::new();
    fs::write(room.path(), "aaaa\nbbbb\n").unwrap();
    let mut source = room.source(true);
    assert_eq!(room.step(&mut source).await.unwrap().len(), 2);
    fs::OpenOptions::new()
        .write(true)
        .open(room.path())
        .unwrap()
        .set_len(3)
        .unwrap();
    let error = room.step(&mut source).await.unwrap_err().to_string();
    assert!(
        error.contains("SOURCE_TRUNCATED")
            && error.contains("3 bytes")
            && error.contains("byte 10"),
        "{error}"
    );
    assert_eq!(room.all(false).await.1.as_deref(), Some("SOURCE_TRUNCATED"));
    // As long as before, or longer, but other lines.
    let file = fs::OpenOptions::new()
        .write(true)
        .truncate(true)
        .open(room.path())
        .unwrap();
    (&file).write_all(b"cccccccccccccccc\n").unwrap();
    assert_eq!(room.all(false).await.1.as_deref(), Some("SOURCE_CHANGED"));
    // Put right again, it goes on.
    file.set_len(0).unwrap();
    append(&room.path(), "aaaa\nbbbb\ncccc\n");
    assert_eq!(room.all(false).await, (vec!["cccc".into()], None));
}

#[tokio::test]
async fn what_cannot_be_read_parks_with_the_path() {
    let room = Room::new();
    assert_eq!(
        room.all(false).await.1.as_deref(),
        Some("SOURCE_FAILED"),
        "missing, and not followed"
    );
    fs::create_dir(room.path()).unwrap();
    let error = room
        .step(&mut room.source(true))
        .await
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("SOURCE_FAILED") && error.contains(room.path().to_str().unwrap()),
        "{error}"
    );
}
