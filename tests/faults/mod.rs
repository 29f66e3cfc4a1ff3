//! What the crash and power suites share: the real broker as a process, with and without the preloaded recorder.

#![allow(dead_code, reason = "shared: each suite uses its part")]

use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::OnceLock;
use std::time::Duration;

pub(crate) mod check;
pub(crate) mod driver;

/// The token all test brokers use.
pub(crate) const TOKEN: &str = "faults";

/// Compiles the preloaded library once per test process.
pub(crate) fn preload() -> &'static Path {
    static LIBRARY: OnceLock<PathBuf> = OnceLock::new();
    LIBRARY.get_or_init(|| {
        let library = Path::new(env!("CARGO_TARGET_TMPDIR"))
            .join(format!("preload-{}.so", std::process::id()));
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/faults/preload.c");
        let status = Command::new("cc")
            .args(["-shared", "-fPIC", "-O2", "-Wall", "-Werror", "-o"])
            .arg(&library)
            .arg(&source)
            .args(["-ldl", "-lpthread"])
            .status()
            .expect("a C compiler: tests/run.sh installs one");
        assert!(status.success(), "tests/faults/preload.c does not compile");
        library
    })
}

/// How a broker is started.
#[derive(Debug, Clone, Default)]
pub(crate) struct Setup {
    /// Lines of its configuration beside the data directory.
    pub config: String,
    /// `DAGORAMA_FAULT_…` without the prefix: given, the library is preloaded.
    pub faults: Vec<(&'static str, String)>,
    /// More environment.
    pub environment: Vec<(&'static str, String)>,
}

/// A running broker.
#[derive(Debug)]
pub(crate) struct Server {
    /// The process.
    pub child: Child,
    /// Its address.
    pub url: String,
    /// What it said when it was ready.
    pub ready: serde_json::Value,
}

/// A broker that did not start, or has ended.
#[derive(Debug)]
pub(crate) struct Ended {
    /// How.
    pub status: ExitStatus,
    /// What it said.
    pub stderr: String,
}

impl Server {
    /// Starts the real binary on a data directory. Its standard error goes to `<dir>.log`.
    pub(crate) fn start(data: &Path, setup: &Setup) -> Result<Self, Ended> {
        let config = data.with_extension("toml");
        std::fs::write(
            &config,
            format!(
                "[server]\ndata_dir = {:?}\nlisten = \"127.0.0.1:0\"\n{}",
                data.display().to_string(),
                setup.config
            ),
        )
        .expect("a writable test directory");
        let log = data.with_extension("log");
        let stderr = std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(&log)
            .expect("a writable test directory");
        let before = std::fs::metadata(&log).map_or(0, |about| about.len());
        let mut command = Command::new(env!("CARGO_BIN_EXE_dagorama"));
        command
            .args(["serve", "--ready-stdout", "--config"])
            .arg(&config)
            .env("DAGORAMA_TOKEN", TOKEN)
            .env("RUST_BACKTRACE", "1");
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(stderr);
        if !setup.faults.is_empty() {
            command
                .env("LD_PRELOAD", preload())
                .env("DAGORAMA_FAULT_DIR", data);
            for (name, value) in &setup.faults {
                command.env(format!("DAGORAMA_FAULT_{name}"), value);
            }
        }
        command.envs(
            setup
                .environment
                .iter()
                .map(|(name, value)| (*name, value.as_str())),
        );
        let mut child = command.spawn().expect("the binary under test");
        let mut line = String::new();
        let read = BufReader::new(child.stdout.take().expect("piped")).read_line(&mut line);
        match read {
            Ok(n) if n > 0 => {
                let ready: serde_json::Value = serde_json::from_str(&line)
                    .unwrap_or_else(|error| panic!("ready line {line:?}: {error}"));
                Ok(Self {
                    child,
                    url: ready["native"].as_str().expect("a URL").to_owned(),
                    ready,
                })
            }
            _ => {
                let status = child.wait().expect("waiting for a child");
                Err(Ended {
                    status,
                    stderr: tail(&log, before),
                })
            }
        }
    }

    /// SIGKILL.
    pub(crate) fn kill(mut self) {
        self.child.kill().expect("killing a child");
        self.child.wait().expect("waiting for a child");
    }

    /// Waits until it has ended by itself, at most that long.
    pub(crate) fn ended(mut self, data: &Path, patience: Duration) -> Option<Ended> {
        for _ in 0..patience.as_millis() / 10 {
            if let Some(status) = self.child.try_wait().expect("waiting for a child") {
                return Some(Ended {
                    status,
                    stderr: tail(&data.with_extension("log"), 0),
                });
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        self.kill();
        None
    }
}

fn tail(log: &Path, from: u64) -> String {
    let mut text = Vec::new();
    if let Ok(mut file) = std::fs::File::open(log) {
        use std::io::Seek;
        drop(file.seek(std::io::SeekFrom::Start(from)));
        drop(file.read_to_end(&mut text));
    }
    String::from_utf8_lossy(&text).into_owned()
}

/// A count from the environment, or the one that runs with each change.
pub(crate) fn count(name: &str, each_change: u64) -> u64 {
    std::env::var(name)
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(each_change)
}
