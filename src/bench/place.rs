//! Where a bench runs: the disk, the broker process, and what the system says about it.

use std::io;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use serde_json::Value;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};

use crate::engine::clock::Stopwatch;

/// What the disk alone can do.
#[derive(Debug, Clone)]
pub(super) struct Disk {
    pub directory: String,
    pub file_system: String,
    pub syncs_per_second: u64,
    pub sync_p50_us: u64,
}

/// Looks at the directory, refuses a tmpfs, and measures overwrites of 4 KiB with `fdatasync` for a second.
pub(super) fn disk(directory: &Path) -> io::Result<Disk> {
    std::fs::create_dir_all(directory)?;
    let about = nix::sys::statfs::statfs(directory)?;
    let file_system = match about.filesystem_type() {
        nix::sys::statfs::TMPFS_MAGIC => {
            return Err(io::Error::other(format!(
                "{} is a tmpfs, where a sync costs nothing: name a directory on a disk with --data-dir",
                directory.display()
            )));
        }
        nix::sys::statfs::EXT4_SUPER_MAGIC => "ext4".to_owned(),
        nix::sys::statfs::XFS_SUPER_MAGIC => "xfs".to_owned(),
        nix::sys::statfs::BTRFS_SUPER_MAGIC => "btrfs".to_owned(),
        nix::sys::statfs::OVERLAYFS_SUPER_MAGIC => "overlayfs".to_owned(),
        other => format!("{other:?}"),
    };
    let path = directory.join("disk-probe");
    let file = std::fs::File::create(&path)?;
    std::os::unix::fs::FileExt::write_all_at(&file, &vec![0; 4 << 20], 0)?;
    file.sync_all()?;
    let watch = Stopwatch::start();
    let mut micros = Vec::new();
    while watch.elapsed_ms() < 1_000 {
        let one = Stopwatch::start();
        std::os::unix::fs::FileExt::write_all_at(
            &file,
            &[1; 4096],
            (micros.len() as u64 % 1024) * 4096,
        )?;
        file.sync_data()?;
        micros.push(one.elapsed().as_micros() as u64);
    }
    std::fs::remove_file(&path)?;
    let n = micros.len() as u64;
    Ok(Disk {
        directory: directory.display().to_string(),
        file_system,
        syncs_per_second: n * 1_000 / watch.elapsed_ms().max(1),
        sync_p50_us: quantile(&mut micros, 0.5),
    })
}

/// The value below which that share lies.
pub(super) fn quantile(values: &mut [u64], share: f64) -> u64 {
    values.sort_unstable();
    let at = ((values.len().max(1) - 1) as f64 * share).round() as usize;
    values.get(at).copied().unwrap_or_default()
}

/// The broker under test.
#[derive(Debug)]
pub(super) struct Broker {
    pub url: String,
    pub token: String,
    pub ready: Value,
    child: Child,
    data: PathBuf,
}

impl Broker {
    /// Starts one on a fresh store.
    pub(super) async fn fresh(directory: &Path) -> io::Result<Self> {
        let data = directory.join("store");
        if data.exists() {
            std::fs::remove_dir_all(&data)?;
        }
        Self::on(data).await
    }

    async fn on(data: PathBuf) -> io::Result<Self> {
        let token = "bench".to_owned();
        let mut child = Command::new(std::env::current_exe()?)
            .args([
                "serve",
                "--ready-stdout",
                "--listen",
                "127.0.0.1:0",
                "--data-dir",
            ])
            .arg(&data)
            .env("DAGORAMA_TOKEN", &token)
            .env("RUST_LOG", "warn")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()?;
        let stdout = child
            .stdout
            .take()
            .ok_or_else(|| io::Error::other("no standard output"))?;
        let mut line = String::new();
        BufReader::new(stdout).read_line(&mut line).await?;
        let ready: Value = serde_json::from_str(&line).map_err(|error| {
            io::Error::other(format!("the broker did not start ({error}): {line:?}"))
        })?;
        let url = ready["native"].as_str().unwrap_or_default().to_owned();
        Ok(Self {
            url,
            token,
            ready,
            child,
            data,
        })
    }

    /// SIGKILL, and a new process on the same store.
    pub(super) async fn kill_and_restart(mut self) -> io::Result<Self> {
        self.child.start_kill()?;
        self.child.wait().await?;
        let data = self.data.clone();
        Self::on(data).await
    }

    /// Ends it and removes the store.
    pub(super) async fn finish(mut self) -> io::Result<()> {
        self.child.start_kill()?;
        self.child.wait().await?;
        std::fs::remove_dir_all(&self.data)
    }

    pub(super) fn pid(&self) -> u32 {
        self.child.id().unwrap_or_default()
    }

    /// Resident memory in bytes.
    pub(super) fn rss(&self) -> u64 {
        let status =
            std::fs::read_to_string(format!("/proc/{}/status", self.pid())).unwrap_or_default();
        let line = status
            .lines()
            .find(|line| line.starts_with("VmRSS:"))
            .unwrap_or_default();
        line.split_whitespace()
            .nth(1)
            .and_then(|text| text.parse::<u64>().ok())
            .unwrap_or_default()
            * 1024
    }

    /// Processor time used so far, in milliseconds.
    pub(super) fn cpu_ms(&self) -> u64 {
        let stat =
            std::fs::read_to_string(format!("/proc/{}/stat", self.pid())).unwrap_or_default();
        let after_name = stat.rsplit(')').next().unwrap_or_default();
        let fields: Vec<u64> = after_name
            .split_whitespace()
            .map(|field| field.parse().unwrap_or_default())
            .collect();
        // utime and stime, in ticks of 10 ms on every Linux there is.
        fields
            .get(11..13)
            .map_or(0, |ticks| ticks.iter().sum::<u64>() * 10)
    }
}

/// Python worker processes.
#[derive(Debug)]
pub(super) struct PythonWorkers(Child);

impl PythonWorkers {
    /// Starts a worker with that many processes on the module of the Python benches.
    pub(super) fn start(broker: &Broker, python: &Path, processes: u32) -> io::Result<Self> {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let path = std::env::join_paths([root.join("benches"), root.join("python/src")])
            .map_err(io::Error::other)?;
        let child = Command::new(std::env::current_exe()?)
            .args([
                "worker",
                "bench_actions",
                "--concurrency",
                &processes.to_string(),
                "--url",
                &broker.url,
                "--python",
            ])
            .arg(python)
            .env("PYTHONPATH", path)
            .env("DAGORAMA_TOKEN", &broker.token)
            .stdin(Stdio::null())
            .kill_on_drop(true)
            .spawn()?;
        Ok(Self(child))
    }

    /// Asks it to end and waits.
    pub(super) async fn stop(mut self) -> io::Result<()> {
        if let Some(pid) = self.0.id().and_then(|pid| i32::try_from(pid).ok()) {
            nix::sys::signal::kill(
                nix::unistd::Pid::from_raw(pid),
                nix::sys::signal::Signal::SIGTERM,
            )?;
        }
        drop(tokio::time::timeout(Duration::from_secs(15), self.0.wait()).await);
        Ok(())
    }
}
