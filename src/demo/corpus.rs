//! Real HTML pages that this machine has anyway, and a small web server that serves them on loopback.
//!
//! Looked for in this order: the books that come with the Rust toolchain, HTML documentation of installed Debian packages, and the pages that
//! Python's own `pydoc` writes about its standard library. None is made by hand.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};

/// Smallest and largest page that is taken, in bytes: stubs tell nothing, giants only slow the demo down.
const PAGE_BYTES: std::ops::RangeInclusive<u64> = 4_000..=200_000;

/// Modules of the standard library that `pydoc` is asked about when nothing else is found.
const PYDOC: &[&str] = &[
    "argparse",
    "array",
    "ast",
    "asyncio",
    "base64",
    "bisect",
    "bz2",
    "calendar",
    "cmd",
    "code",
    "codecs",
    "collections",
    "configparser",
    "contextlib",
    "copy",
    "csv",
    "ctypes",
    "datetime",
    "decimal",
    "difflib",
    "dis",
    "email",
    "enum",
    "fileinput",
    "fractions",
    "ftplib",
    "functools",
    "gettext",
    "glob",
    "gzip",
    "hashlib",
    "heapq",
    "hmac",
    "html",
    "http",
    "imaplib",
    "inspect",
    "io",
    "ipaddress",
    "itertools",
    "json",
    "keyword",
    "logging",
    "lzma",
    "mailbox",
    "math",
    "mimetypes",
    "multiprocessing",
    "netrc",
    "numbers",
    "operator",
    "os",
    "pathlib",
    "pickle",
    "platform",
    "pprint",
    "queue",
    "random",
    "re",
    "sched",
    "secrets",
    "select",
    "shelve",
    "shlex",
    "shutil",
    "signal",
    "smtplib",
    "socket",
    "sqlite3",
    "ssl",
    "statistics",
    "string",
    "struct",
    "subprocess",
    "tarfile",
    "tempfile",
    "textwrap",
    "threading",
    "timeit",
    "token",
    "trace",
    "traceback",
    "types",
    "typing",
    "unittest",
    "urllib",
    "uuid",
    "venv",
    "warnings",
    "wave",
    "weakref",
    "xml",
    "zipfile",
    "zlib",
];

/// Pages with the names under which they are served.
#[derive(Debug, Clone)]
pub(super) struct Corpus {
    /// Where they come from, for people.
    pub(super) origin: String,
    /// Files by name.
    pub(super) pages: BTreeMap<String, PathBuf>,
}

/// Finds `n` pages; `seed` decides which. `scratch` is a directory for pages that have to be generated first.
pub(super) fn find(n: usize, seed: u64, python: &Path, scratch: &Path) -> io::Result<Corpus> {
    let mut tried = Vec::new();
    for (origin, root) in roots() {
        let mut files = Vec::new();
        collect(&root, 3, &mut files);
        if files.len() >= n {
            return Ok(pick(origin, &root, files, n, seed));
        }
        tried.push(format!("{} ({} pages)", root.display(), files.len()));
    }
    let status = Command::new(python)
        .current_dir(scratch)
        .args(["-m", "pydoc", "-w"])
        .args(PYDOC)
        .stdout(std::process::Stdio::null())
        .status();
    let mut files = Vec::new();
    collect(scratch, 1, &mut files);
    if files.len() >= n {
        return Ok(pick(
            "pydoc's pages about Python's standard library".to_owned(),
            scratch,
            files,
            n,
            seed,
        ));
    }
    Err(io::Error::other(format!(
        "no {n} HTML pages on this machine: looked in {} and asked {} -m pydoc ({status:?}); install rust-docs or a -doc package",
        tried.join(", "),
        python.display()
    )))
}

fn roots() -> Vec<(String, PathBuf)> {
    let mut roots = Vec::new();
    let sysroot = Command::new("rustc")
        .args(["--print", "sysroot"])
        .output()
        .ok()
        .filter(|out| out.status.success());
    if let Some(sysroot) = sysroot {
        let html = PathBuf::from(String::from_utf8_lossy(&sysroot.stdout).trim())
            .join("share/doc/rust/html");
        for book in ["book", "reference", "rust-by-example", "cargo"] {
            roots.push((format!("the Rust documentation ({book})"), html.join(book)));
        }
    }
    roots.push((
        "the documentation of installed Debian packages".to_owned(),
        PathBuf::from("/usr/share/doc"),
    ));
    roots
}

fn collect(directory: &Path, depth: u32, files: &mut Vec<PathBuf>) {
    let Ok(entries) = std::fs::read_dir(directory) else {
        return;
    };
    for entry in entries.flatten() {
        let path = entry.path();
        let Ok(about) = entry.metadata() else {
            continue;
        };
        if about.is_dir() && depth > 0 {
            collect(&path, depth - 1, files);
        } else if about.is_file()
            && PAGE_BYTES.contains(&about.len())
            && path.extension().is_some_and(|end| end == "html")
        {
            files.push(path);
        }
    }
}

fn pick(origin: String, root: &Path, mut files: Vec<PathBuf>, n: usize, seed: u64) -> Corpus {
    // A seeded order that does not depend on the order of the directory.
    files.sort_by_key(|path| {
        xxhash_rust::xxh3::xxh3_64_with_seed(
            path.strip_prefix(root)
                .unwrap_or(path)
                .as_os_str()
                .as_encoded_bytes(),
            seed,
        )
    });
    let pages = files
        .into_iter()
        .take(n)
        .map(|path| {
            (
                path.strip_prefix(root)
                    .unwrap_or(&path)
                    .to_string_lossy()
                    .into_owned(),
                path,
            )
        })
        .collect();
    Corpus { origin, pages }
}

/// Serves the pages until the returned task is aborted. Gives the base URL, without a final slash.
pub(super) async fn serve(corpus: &Corpus) -> io::Result<(String, tokio::task::JoinHandle<()>)> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let base = format!("http://{}", listener.local_addr()?);
    let pages = Arc::new(corpus.pages.clone());
    let task = tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let pages = Arc::clone(&pages);
            tokio::spawn(async move { drop(answer(stream, &pages).await) });
        }
    });
    Ok((base, task))
}

async fn answer(stream: TcpStream, pages: &BTreeMap<String, PathBuf>) -> io::Result<()> {
    let mut stream = BufReader::new(stream);
    let mut request = String::new();
    (&mut stream).take(16_384).read_line(&mut request).await?;
    let path = request
        .split(' ')
        .nth(1)
        .unwrap_or_default()
        .trim_start_matches('/');
    let page = match pages.get(path) {
        Some(file) => tokio::fs::read(file).await.ok(),
        None => None,
    };
    let (status, body) = page.map_or_else(
        || ("404 Not Found", b"no such page".to_vec()),
        |body| ("200 OK", body),
    );
    let head = format!(
        "HTTP/1.0 {status}\r\nContent-Type: text/html; charset=utf-8\r\nContent-Length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).await?;
    stream.write_all(&body).await?;
    stream.shutdown().await
}
