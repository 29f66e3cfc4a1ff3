//! `dagorama demo`: the whole story in one command, on real pages, with its proof.
//!
//! URLs come in through the file bridge, Python workers crawl and compare, the broker and one worker are killed with SIGKILL while leases are open
//! and acknowledgements are under way, the broker comes back, and the ranking leaves through the file bridge. The verdict is a separate process that
//! reads only what the workers wrote down and the output file (`examples/crawl/verdict.py`).

mod corpus;
mod processes;

use std::io::{self, IsTerminal};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

use crate::cli::{Demo, Tamper};
use crate::engine::clock::Stopwatch;
use processes::{Broker, WorkerPlace};

const CRAWL: &str = include_str!("../../examples/crawl/crawl.py");
const VERDICT: &str = include_str!("../../examples/crawl/verdict.py");
/// The actions in the order in which people think of them.
const ACTIONS: [&str; 5] = [
    "crawl.site",
    "crawl.fetch",
    "crawl.extract",
    "crawl.compare",
    "crawl.rank",
];

/// Plays the demo. The exit code is 0 only if the verdict is yes.
pub async fn run(options: Demo) -> ExitCode {
    let stage = match tempfile_directory() {
        Ok(stage) => stage,
        Err(error) => return fail(&options, &format!("no temporary directory: {error}")),
    };
    let outcome = tokio::select! {
        outcome = play(&options, &stage) => outcome,
        () = interrupted() => Err(io::Error::other("interrupted")),
    };
    if options.keep {
        eprintln!("kept: {}", stage.display());
    } else if let Err(error) = std::fs::remove_dir_all(&stage) {
        eprintln!("could not remove {}: {error}", stage.display());
    }
    match outcome {
        Ok(report) => {
            show(&options, &report);
            if report["ok"] == json!(true) {
                ExitCode::SUCCESS
            } else {
                ExitCode::FAILURE
            }
        }
        Err(error) => fail(&options, &error.to_string()),
    }
}

/// Ctrl-C, or a polite request to end: whatever was started ends with the demo.
async fn interrupted() {
    let terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate());
    let Ok(mut terminate) = terminate else {
        return std::future::pending().await;
    };
    tokio::select! {
        _ = tokio::signal::ctrl_c() => {}
        _ = terminate.recv() => {}
    }
}

fn fail(options: &Demo, reason: &str) -> ExitCode {
    if options.json {
        emit(&json!({"ok": false, "error": reason}).to_string());
    }
    eprintln!("dagorama demo: {reason}");
    ExitCode::FAILURE
}

#[expect(
    clippy::print_stdout,
    reason = "the report is the product of the command"
)]
fn emit(line: &str) {
    println!("{line}");
}

fn tempfile_directory() -> io::Result<PathBuf> {
    let mut bits = [0u8; 8];
    getrandom::fill(&mut bits).map_err(|error| io::Error::other(error.to_string()))?;
    let path =
        std::env::temp_dir().join(format!("dagorama-demo-{:016x}", u64::from_le_bytes(bits)));
    std::fs::create_dir(&path)?;
    Ok(path)
}

struct Stage {
    code: PathBuf,
    journal: PathBuf,
    input: PathBuf,
    output: PathBuf,
    config: PathBuf,
    broker_log: PathBuf,
    worker_log: PathBuf,
    token: String,
}

fn prepare(directory: &Path) -> io::Result<Stage> {
    let stage = Stage {
        code: directory.join("code"),
        journal: directory.join("journal"),
        input: directory.join("urls.jsonl"),
        output: directory.join("ranking.jsonl"),
        config: directory.join("broker.toml"),
        broker_log: directory.join("broker.log"),
        worker_log: directory.join("worker.log"),
        token: {
            let mut bits = [0u8; 16];
            getrandom::fill(&mut bits).map_err(|error| io::Error::other(error.to_string()))?;
            format!("{:032x}", u128::from_le_bytes(bits))
        },
    };
    for made in [&stage.code, &stage.journal, &directory.join("pydoc")] {
        std::fs::create_dir(made)?;
    }
    std::fs::write(stage.code.join("crawl.py"), CRAWL)?;
    std::fs::write(stage.code.join("verdict.py"), VERDICT)?;
    let quoted = |path: &Path| toml::Value::String(path.to_string_lossy().into_owned()).to_string();
    std::fs::write(
        &stage.config,
        format!(
            r#"# What `dagorama demo` runs: one file in, one file out.
[server]
data_dir = {data}

[leases]
lease = "3s"                     # a killed worker's nodes are given out again after this

[storage]
window = "200ms"                 # so that a demo of seconds has something in sled, too

[connection.files]
type = "file"

[[route]]
name = "urls"
from = {{ connection = "files", path = {input} }}
action = "crawl.site"            # each line starts a run of it

[[output]]
name = "ranking"
match = {{ action = "crawl.site" }}
to = {{ connection = "files", path = {output} }}
codec = "json"
"#,
            data = quoted(&directory.join("data")),
            input = quoted(&stage.input),
            output = quoted(&stage.output),
        ),
    )?;
    Ok(stage)
}

async fn play(options: &Demo, directory: &Path) -> io::Result<Value> {
    let watch = Stopwatch::start();
    let stage = prepare(directory)?;
    let corpus = corpus::find(
        options.pages as usize,
        options.seed,
        &options.python,
        &directory.join("pydoc"),
    )?;
    let (base, web) = corpus::serve(&corpus).await?;
    let urls: Vec<String> = corpus
        .pages
        .keys()
        .map(|name| format!("{base}/{name}"))
        .collect();
    std::fs::write(&stage.input, format!("{}\n", json!(urls)))?;
    let n = u64::from(options.pages);
    let expected = [1, n, n, n * (n - 1) / 2, 1];
    let total: u64 = expected.iter().sum();
    eprintln!(
        "{} pages of {}: {total} nodes, {} of them comparisons",
        options.pages, corpus.origin, expected[3]
    );

    let mut broker = processes::start_broker(
        &stage.config,
        "127.0.0.1:0",
        &stage.broker_log,
        &stage.token,
    )
    .await?;
    let place = WorkerPlace {
        python: &options.python,
        code: &stage.code,
        journal: &stage.journal,
        log: &stage.worker_log,
        token: &stage.token,
    };
    let mut workers = [
        processes::start_worker(&broker.url, &place)?,
        processes::start_worker(&broker.url, &place)?,
    ];
    eprintln!(
        "broker at {} (pid {}), two worker processes",
        broker.url, broker.ready["pid"]
    );

    let bars = Bars::new(options, &expected);
    let mut killed = Killed::default();
    let kill_at = total * (40 + options.seed % 21) / 100;
    loop {
        let journal = processes::read_journal(&stage.journal, &killed.processes)?;
        bars.update(&journal);
        if let Ok(Some(status)) = broker.child.try_wait() {
            return Err(io::Error::other(format!(
                "the broker ended by itself ({status}): see {}",
                log_tail(&stage.broker_log)
            )));
        }
        for worker in &mut workers {
            if let Ok(Some(status)) = worker.try_wait() {
                return Err(io::Error::other(format!(
                    "a worker ended by itself ({status}): {}",
                    log_tail(&stage.worker_log)
                )));
            }
        }
        let done: u64 = journal.accepted.values().sum();
        if !options.no_kill && killed.kills == 0 && done >= kill_at {
            killed = strike(&mut broker, &stage).await?;
            let address = broker.url.trim_start_matches("dagorama://");
            let again =
                processes::start_broker(&stage.config, address, &stage.broker_log, &stage.token)
                    .await?;
            bars.say(&format!(
                "killed the broker (pid {}) and a worker process after {done} nodes, with {} leases open and {} acknowledgements under way; back in {} s as pid {}",
                broker.ready["pid"], killed.leases_open, killed.acks_in_flight, again.ready["seconds"], again.ready["pid"]
            ));
            broker = again;
        }
        if std::fs::metadata(&stage.output).is_ok_and(|about| about.len() > 0)
            && journal.in_flight_alive == 0
            && journal.settled >= total
        {
            break;
        }
        if watch.elapsed_ms() > 300_000 {
            return Err(io::Error::other(format!(
                "not finished after five minutes: {} of {total} nodes; {}",
                journal.settled,
                log_tail(&stage.broker_log)
            )));
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    bars.finish();
    for worker in &mut workers {
        if let Some(pid) = worker.id() {
            kill(
                Pid::from_raw(i32::try_from(pid).map_err(io::Error::other)?),
                Signal::SIGTERM,
            )?;
        }
    }
    for worker in &mut workers {
        drop(tokio::time::timeout(Duration::from_secs(10), worker.wait()).await);
    }
    broker.child.start_kill()?;
    broker.child.wait().await?;
    if let Some(tamper) = options.tamper {
        falsify(tamper, &stage, &killed.processes)?;
    }
    let verdict = judge(options, &stage, &killed.processes).await?;
    web.abort();
    let kills_as_wanted = options.no_kill
        || (killed.kills == 2 && killed.leases_open > 0 && killed.acks_in_flight > 0);
    let ok = verdict["ok"] == json!(true) && verdict["nodes"] == json!(total) && kills_as_wanted;
    Ok(json!({
        "ok": ok, "nodes": verdict["nodes"], "lost": verdict["lost"], "applied_twice": verdict["applied_twice"], "attempts": verdict["attempts"],
        "kills": killed.kills, "leases_open_at_kill": killed.leases_open, "acks_in_flight_at_kill": killed.acks_in_flight,
        "from_sled": broker.ready["from_sled"], "from_log": broker.ready["from_log"], "recovery_seconds": broker.ready["seconds"],
        "output_equal": verdict["output_equal"], "pages": options.pages, "corpus": corpus.origin, "seed": options.seed,
        "tampered": options.tamper.map(|tamper| format!("{tamper:?}").to_lowercase()),
        "seconds": watch.elapsed_ms() as f64 / 1000.0,
    }))
}

#[derive(Debug, Default)]
struct Killed {
    kills: u64,
    leases_open: u64,
    acks_in_flight: u64,
    /// Worker processes.
    processes: Vec<i32>,
}

/// Stops the broker in the middle of something, sees to it that acknowledgements are under way, and kills it and a worker process.
async fn strike(broker: &mut Broker, stage: &Stage) -> io::Result<Killed> {
    let pid = Pid::from_raw(
        broker
            .child
            .id()
            .and_then(|pid| i32::try_from(pid).ok())
            .ok_or_else(|| io::Error::other("the broker has no pid"))?,
    );
    let mut journal = processes::Journal::default();
    // Stopped, it acknowledges nothing: what workers send now stays under way. When they happen to have nothing to send, go on a little.
    for _ in 0..100 {
        kill(pid, Signal::SIGSTOP)?;
        for _ in 0..10 {
            tokio::time::sleep(Duration::from_millis(5)).await;
            journal = processes::read_journal(&stage.journal, &[])?;
            if journal.in_flight > 0 {
                break;
            }
        }
        if journal.in_flight > 0 {
            break;
        }
        kill(pid, Signal::SIGCONT)?;
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    broker.child.start_kill()?;
    broker.child.wait().await?;
    let mut killed = Killed {
        kills: 1,
        leases_open: journal.open,
        acks_in_flight: journal.in_flight,
        processes: Vec::new(),
    };
    // The process with the most to lose.
    if let Some((child, _)) = journal.in_flight_by.iter().max_by_key(|(_, n)| **n) {
        kill(Pid::from_raw(*child), Signal::SIGKILL)?;
        killed.kills += 1;
        killed.processes.push(*child);
    }
    Ok(killed)
}

/// Changes one piece of evidence.
fn falsify(tamper: Tamper, stage: &Stage, killed: &[i32]) -> io::Result<()> {
    if tamper == Tamper::Alter {
        let text = std::fs::read_to_string(&stage.output)?;
        let mut value: Value = serde_json::from_str(text.lines().next().unwrap_or_default())
            .map_err(io::Error::other)?;
        value["most_alike"][0][2] = json!(0.123_456);
        return std::fs::write(&stage.output, format!("{value}\n"));
    }
    let mut files: Vec<PathBuf> = std::fs::read_dir(&stage.journal)?
        .flatten()
        .map(|entry| entry.path())
        .collect();
    files.sort();
    // Of a killed process it is not known what it heard.
    files.retain(|file| {
        let pid = file.file_stem().and_then(|name| name.to_str());
        pid.and_then(|name| name.parse().ok())
            .is_none_or(|pid| !killed.contains(&pid))
    });
    for file in files {
        let text = std::fs::read_to_string(&file)?;
        let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
        let Some(at) = lines
            .iter()
            .position(|line| line.contains("\"accepted\"") && line.contains("\"crawl.compare\""))
        else {
            continue;
        };
        if tamper == Tamper::Lose {
            lines.remove(at);
        } else {
            let mut twin: Value = serde_json::from_str(&lines[at]).map_err(io::Error::other)?;
            twin["attempt"] = json!(twin["attempt"].as_u64().unwrap_or_default() + 1);
            lines.insert(at + 1, twin.to_string());
        }
        return std::fs::write(&file, lines.join("\n") + "\n");
    }
    Err(io::Error::other("no acknowledged comparison to falsify"))
}

/// Runs the witness in a process of its own.
async fn judge(options: &Demo, stage: &Stage, killed: &[i32]) -> io::Result<Value> {
    let out = tokio::process::Command::new(&options.python)
        .arg(stage.code.join("verdict.py"))
        .args([&stage.journal, &stage.output, &stage.input])
        .args(killed.iter().map(ToString::to_string))
        .env("PYTHONPATH", processes::python_path(&stage.code))
        .output()
        .await?;
    let mut verdict: Value = serde_json::from_slice(&out.stdout).map_err(|error| {
        io::Error::other(format!(
            "the verdict is unreadable ({error}): {}",
            String::from_utf8_lossy(&out.stderr)
        ))
    })?;
    verdict["ok"] = json!(out.status.success());
    Ok(verdict)
}

fn log_tail(path: &Path) -> String {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    let lines: Vec<&str> = text.lines().rev().take(8).collect();
    format!(
        "{}: {}",
        path.display(),
        lines.into_iter().rev().collect::<Vec<_>>().join(" | ")
    )
}

/// Progress per action; plain lines when nobody watches.
struct Bars {
    each: Vec<(&'static str, ProgressBar)>,
    all: MultiProgress,
    /// Nobody watches: a line every two seconds instead.
    plain: bool,
    watch: Stopwatch,
    next_line_ms: std::cell::Cell<u64>,
}

impl Bars {
    fn new(options: &Demo, expected: &[u64; 5]) -> Self {
        let all = MultiProgress::with_draw_target(if options.json {
            ProgressDrawTarget::hidden()
        } else {
            ProgressDrawTarget::stderr()
        });
        let style = ProgressStyle::with_template("{prefix:>14} [{bar:40}] {pos:>5}/{len:5}")
            .unwrap_or_else(|_| ProgressStyle::default_bar())
            .progress_chars("=> ");
        let each = ACTIONS
            .iter()
            .zip(expected)
            .map(|(action, n)| {
                let bar = all.add(
                    ProgressBar::new(*n)
                        .with_style(style.clone())
                        .with_prefix(*action),
                );
                (*action, bar)
            })
            .collect();
        Self {
            each,
            all,
            plain: !options.json && !std::io::stderr().is_terminal(),
            watch: Stopwatch::start(),
            next_line_ms: std::cell::Cell::new(2_000),
        }
    }

    fn update(&self, journal: &processes::Journal) {
        for (action, bar) in &self.each {
            bar.set_position(journal.accepted.get(*action).copied().unwrap_or_default());
        }
        if self.plain && self.watch.elapsed_ms() >= self.next_line_ms.get() {
            self.next_line_ms.set(self.watch.elapsed_ms() + 2_000);
            let states: Vec<String> = self
                .each
                .iter()
                .map(|(action, bar)| {
                    format!(
                        "{action} {}/{}",
                        bar.position(),
                        bar.length().unwrap_or_default()
                    )
                })
                .collect();
            eprintln!("{}", states.join(", "));
        }
    }

    fn say(&self, line: &str) {
        self.all.suspend(|| eprintln!("{line}"));
    }

    fn finish(&self) {
        for (_, bar) in &self.each {
            bar.abandon();
        }
    }
}

fn show(options: &Demo, report: &Value) {
    if options.json {
        emit(&report.to_string());
        return;
    }
    let number = |name: &str| report[name].as_u64().unwrap_or_default();
    let mark = |good: bool| if good { "yes" } else { "NO" };
    emit(&format!(
        "{} nodes, {} attempts, in {:.1} s",
        number("nodes"),
        number("attempts"),
        report["seconds"].as_f64().unwrap_or_default()
    ));
    if number("kills") > 0 {
        emit(&format!(
            "{} kills with {} leases open and {} acknowledgements under way; the new broker knew {} nodes from sled and {} from the log",
            number("kills"),
            number("leases_open_at_kill"),
            number("acks_in_flight_at_kill"),
            number("from_sled"),
            number("from_log")
        ));
    }
    emit(&format!(
        "  nothing lost            {} ({} lost)",
        mark(number("lost") == 0),
        number("lost")
    ));
    emit(&format!(
        "  nothing applied twice   {} ({} twice)",
        mark(number("applied_twice") == 0),
        number("applied_twice")
    ));
    emit(&format!(
        "  the ranking is right    {}",
        mark(report["output_equal"] == json!(true))
    ));
    emit(if report["ok"] == json!(true) {
        "verdict: yes, by the workers' own journals and the output file"
    } else {
        "verdict: NO"
    });
}
