//! The file bridge passes the suite of all bridges.

#![allow(clippy::unwrap_used, reason = "a test")]

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use dagorama_bridge_api::conformance::{Harness, exercise};
use dagorama_bridge_api::{BoxFuture, BridgeError, Positions, Sink, Source};
use dagorama_bridge_file::{FileSink, FileSource, SourceOptions};

struct Files {
    input: PathBuf,
    output: PathBuf,
}

const MAX_LINE: usize = 64 << 10;

impl Harness for Files {
    fn produce<'a>(&'a mut self, bodies: &'a [Vec<u8>]) -> BoxFuture<'a, ()> {
        use std::io::Write as _;
        let mut file = std::fs::OpenOptions::new()
            .append(true)
            .create(true)
            .open(&self.input)
            .unwrap();
        for body in bodies {
            // In two pieces, so that the source meets unfinished lines.
            let (a, b) = body.split_at(body.len() / 2);
            file.write_all(a).unwrap();
            file.write_all(b).unwrap();
            file.write_all(b"\n").unwrap();
        }
        Box::pin(async {})
    }

    fn source(
        &mut self,
        positions: Arc<dyn Positions>,
    ) -> BoxFuture<'_, Result<Box<dyn Source>, BridgeError>> {
        let options = SourceOptions {
            path: self.input.clone(),
            follow: true,
            poll: Duration::from_millis(2),
            max_line: MAX_LINE,
        };
        Box::pin(
            async move { Ok(Box::new(FileSource::new(options, positions)) as Box<dyn Source>) },
        )
    }

    fn sink(&mut self) -> BoxFuture<'_, Result<Box<dyn Sink>, BridgeError>> {
        let path = self.output.clone();
        Box::pin(async move { Ok(Box::new(FileSink::open(path).await?) as Box<dyn Sink>) })
    }

    fn consumed(&mut self) -> BoxFuture<'_, Vec<Vec<u8>>> {
        let text = std::fs::read(&self.output).unwrap();
        let mut lines: Vec<_> = text.split(|b| *b == b'\n').map(<[u8]>::to_vec).collect();
        assert_eq!(lines.pop(), Some(Vec::new()), "the last line has its end");
        Box::pin(async move { lines })
    }

    fn poison(&self) -> Vec<u8> {
        vec![b'x'; MAX_LINE + 1]
    }

    fn once(&self) -> bool {
        true
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_file_bridge_conforms() {
    let dir = tempfile::tempdir().unwrap();
    let mut files = Files {
        input: dir.path().join("in.ndjson"),
        output: dir.path().join("out.ndjson"),
    };
    let made = exercise(&mut files).await.unwrap();
    assert_eq!(made.len(), 13);
}
