//! The real program as people and scripts meet it: exit codes, what is printed, and what is said when the answer is no.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::Duration;

use dagorama::client::{Data, Failure, Returned, Worker, spec};
use serde_json::Value;

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// The program in a place of its own: no token, no broker, no configuration of whoever runs the tests.
fn program(home: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_dagorama"));
    for name in [
        "DAGORAMA_TOKEN",
        "DAGORAMA_URL",
        "DAGORAMA_CONFIG",
        "RUST_LOG",
    ] {
        command.env_remove(name);
    }
    command
        .env("DAGORAMA_STATE_DIR", home.join("state"))
        .current_dir(home)
        .stdin(Stdio::null());
    command
}

/// What a command came to.
#[derive(Debug)]
struct Ended {
    exit: i32,
    out: String,
    err: String,
}

impl Ended {
    fn json(&self) -> Value {
        serde_json::from_str(&self.out).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    #[track_caller]
    fn is(&self, exit: i32, out: &str, err: &str) -> &Self {
        assert_eq!(self.exit, exit, "{self:?}");
        assert!(self.out.contains(out), "{out:?} wanted: {self:?}");
        assert!(self.err.contains(err), "{err:?} wanted: {self:?}");
        for line in self.out.lines() {
            assert_eq!(line, line.trim_end(), "blanks at the end");
        }
        self
    }
}

fn run(command: &mut Command) -> Ended {
    let output = command.output().unwrap();
    Ended {
        exit: output.status.code().unwrap_or(-1),
        out: String::from_utf8(output.stdout).unwrap(),
        err: String::from_utf8(output.stderr).unwrap(),
    }
}

/// A broker on a port of its own.
struct Broker {
    home: tempfile::TempDir,
    child: Child,
    url: String,
}

impl Broker {
    fn start(config: Option<&str>) -> Self {
        Self::start_with(config, Stdio::null()).0
    }

    /// The same with a standard input, and what follows the ready line on its standard output.
    fn start_with(config: Option<&str>, stdin: Stdio) -> (Self, BufReader<ChildStdout>) {
        let home = tempfile::tempdir().unwrap();
        let mut command = program(home.path());
        command.args(["serve", "--ready-stdout", "--listen", "127.0.0.1:0"]);
        if let Some(config) = config {
            std::fs::write(home.path().join("broker.toml"), config).unwrap();
            command.args(["--config", "broker.toml"]);
        }
        let mut child = command
            .stdin(stdin)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        let mut stdout = BufReader::new(child.stdout.take().unwrap());
        stdout.read_line(&mut line).unwrap();
        let ready: Value = serde_json::from_str(&line).unwrap();
        let url = ready["native"].as_str().unwrap().to_owned();
        (Self { home, child, url }, stdout)
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = program(self.home.path());
        command.args(arguments).args(["--url", &self.url]);
        command
    }

    #[track_caller]
    fn ask(&self, arguments: &[&str]) -> Ended {
        run(&mut self.command(arguments))
    }

    fn submit(&self, action: &str) -> String {
        let ended = self.ask(&["submit", action]);
        ended.is(0, "-", "").out.trim().to_owned()
    }

    fn token(&self) -> String {
        let port = self.url.rsplit(':').next().unwrap();
        let file = self
            .home
            .path()
            .join(format!("state/127.0.0.1-{port}.token"));
        std::fs::read_to_string(file).unwrap().trim().to_owned()
    }

    fn interrupt(&self) {
        let sent = Command::new("sh")
            .args(["-c", &format!("kill -INT {}", self.child.id())])
            .status();
        assert!(sent.unwrap().success());
    }

    /// Runs `then` while a worker has `app.good`, `app.bad` and `app.echo`.
    fn with_worker(&self, then: impl FnOnce()) {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
        let worker = Worker::builder(&self.url, Some(&self.token()))
            .plain(&spec("app.good"), |_| Ok(Returned::Value(Data::json(&7))))
            .plain(&spec("app.bad"), |_| Err(Failure::fatal("no luck")))
            .plain(&spec("app.echo"), |call| {
                let call: Value = call.arguments().to_json()?;
                Ok(Returned::Value(Data::json(&call["args"][0])))
            });
        let running = runtime.spawn(worker.run(async {
            drop(stopped.await);
        }));
        then();
        drop(stop);
        runtime.block_on(running).unwrap().unwrap();
    }
}

impl Drop for Broker {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

#[test]
fn commands_tell_the_truth_about_runs() {
    let broker = Broker::start(None);
    let stopped = broker.submit("app.nobody");
    broker
        .ask(&["result", &stopped, "--timeout", "10ms"])
        .is(75, "", "WAIT_TIMED_OUT");
    broker.ask(&["retry", &stopped]).is(1, "", "RUN_NOT_ENDED");
    broker
        .ask(&["cancel", &stopped, "--reason", "a mistake"])
        .is(0, " cancelled\n", "");
    broker
        .ask(&["cancel", &stopped])
        .is(0, "has already been cancelled: nothing to cancel", "");
    broker
        .ask(&["result", &stopped])
        .is(1, "", "was cancelled: a mistake");
    let result = broker.ask(&["result", &stopped, "--json"]);
    let document = result.is(1, "", "RUN_CANCELLED").json();
    assert_eq!(document["state"], "cancelled");
    assert_eq!(document["error"], Value::Null);
    assert_eq!(document["cancel_reason"], "a mistake");
    assert_eq!(document["code"], "RUN_CANCELLED");
    broker
        .ask(&["show", &stopped, "--events"])
        .is(0, "  cancelled: a mistake\n", "");

    broker.with_worker(|| {
        broker
            .ask(&["submit", "app.good", "--wait"])
            .is(0, "7\n", "");
        broker
            .ask(&["submit", "app.bad", "--wait"])
            .is(1, "", "failed: Error: no luck");
        let good = broker.submit("app.good");
        broker.ask(&["result", &good]).is(0, "7\n", "");
        broker
            .ask(&["cancel", &good])
            .is(0, "has already succeeded: nothing to cancel", "");
        broker
            .ask(&["retry", &good])
            .is(0, "has already succeeded: nothing to resume", "");
        let shown = broker.ask(&["show", &good]);
        shown.is(0, "1 succeeded", "");
        let bad = broker.submit("app.bad");
        let result = broker.ask(&["result", &bad, "--json"]);
        let document = result.is(1, "", "RUN_FAILED").json();
        assert_eq!(document["state"], "failed");
        assert_eq!(document["error"]["message"], "no luck");
        broker
            .ask(&["cancel", &bad])
            .is(0, "has already failed: nothing to cancel", "");
        broker.ask(&["retry", &bad]).is(0, " resumed\n", "");
        broker.ask(&["result", &bad]).is(1, "", "no luck");
    });
    let list = broker.ask(&["runs"]);
    list.is(0, "Z  app.good  1 node\n", "");
    let status = broker.ask(&["status", "--json"]).json();
    assert_eq!(status["open_runs"], 0, "{status}");
    broker.ask(&["status"]).is(0, "open_runs ", "");
}

#[test]
fn a_refused_token_names_the_remedy() {
    let broker = Broker::start(None);
    let token = broker.token();
    let mut wrong = broker.command(&["runs", "--json"]);
    let ended = run(wrong.env("DAGORAMA_TOKEN", "wrong"));
    let answer = ended
        .is(
            5,
            "UNAUTHENTICATED",
            "refuses the token of --token or DAGORAMA_TOKEN",
        )
        .json();
    assert_eq!(answer["code"], "UNAUTHENTICATED");
    assert!(answer["message"].as_str().unwrap().contains(".token"));

    let mut without = broker.command(&["runs"]);
    let nowhere = broker.home.path().join("nowhere");
    let ended = run(without.env("DAGORAMA_STATE_DIR", &nowhere));
    ended.is(5, "", &format!("there is no {}", nowhere.display()));
    ended.is(5, "", "set DAGORAMA_TOKEN");

    let mut given = broker.command(&["runs", "--token", &token]);
    run(given.env("DAGORAMA_STATE_DIR", &nowhere)).is(0, "no runs", "");
}

#[test]
fn dead_letters_say_what_to_do() {
    let sidecar = std::fs::read_to_string(root().join("config/sidecar-file.toml")).unwrap();
    let broker = Broker::start(Some(&sidecar));
    let inbox = broker.home.path().join("inbox.ndjson");
    std::fs::write(inbox, "{\"url\": \"u\", \"depth\": 1}\nno json\n{}\n").unwrap();
    let mut letters = Vec::new();
    for _ in 0..100 {
        let answer = broker.ask(&["dlq", "list", "--json"]).json();
        letters = answer["letters"].as_array().unwrap().clone();
        if letters.len() == 2 {
            break;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    assert_eq!(letters.len(), 2, "{letters:?}");
    let seq = letters[0]["seq"].to_string();
    // What a module app announces as `crawl`.
    broker.ask(&["runs"]).is(0, "app.crawl", "");
    let list = broker.ask(&["dlq", "list"]);
    list.is(0, &format!("inbox/{seq}  BODY_NOT_JSON"), "");
    list.is(0, "offset ", "");
    list.is(0, &format!("dagorama dlq show --route inbox {seq}"), "");
    broker
        .ask(&["dlq", "show", "--route", "inbox", &seq])
        .is(0, "no json\n", "");
    broker
        .ask(&["dlq", "replay", "--route", "inbox", &seq])
        .is(3, "", "still cannot be used");
    broker.ask(&["dlq", "drop", "--route", "inbox", &seq]).is(
        0,
        &format!("dropped inbox/{seq}\n"),
        "",
    );
    let again = broker.ask(&["dlq", "drop", "--route", "inbox", &seq, "--json"]);
    assert_ne!(again.exit, 0, "{again:?}");
    assert_eq!(again.json()["code"], "UNKNOWN_NAME");
    broker
        .ask(&["bridge", "list"])
        .is(0, "route inbox  running  3 messages", "");
    let bridges = broker.ask(&["bridge", "list", "--json"]).json();
    assert_eq!(bridges["outputs"].as_array().unwrap().len(), 2);
}

#[test]
fn a_reader_that_goes_away_is_no_error() {
    let broker = Broker::start(None);
    for _ in 0..3 {
        broker.submit("app.nobody");
    }
    for arguments in [vec!["runs"], vec!["status"], vec!["--help"]] {
        // Closed before the first byte: every write fails.
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let ended = run(broker.command(&arguments).stdout(writer));
        assert_eq!(ended.exit, 0, "{arguments:?}: {ended:?}");
        assert_eq!(ended.err, "", "{arguments:?}");
    }
    // A full disk is one.
    let full = std::fs::OpenOptions::new()
        .write(true)
        .open("/dev/full")
        .unwrap();
    run(broker.command(&["runs"]).stdout(full)).is(2, "", "IO_ERROR");
}

#[test]
fn a_signal_right_after_the_ready_line_ends_in_order() {
    for _ in 0..3 {
        let mut broker = Broker::start(None);
        broker.interrupt();
        let status = broker.child.wait().unwrap();
        assert_eq!(status.code(), Some(0), "{status:?}");
        let mut err = String::new();
        let mut stderr = broker.child.stderr.take().unwrap();
        std::io::Read::read_to_string(&mut stderr, &mut err).unwrap();
        assert_eq!(err, "", "nothing to say beside the ready line");
    }
}

#[test]
fn every_no_is_json_when_asked() {
    let home = tempfile::tempdir().unwrap();
    let empty = home.path().join("empty");
    std::fs::create_dir(&empty).unwrap();
    let empty = empty.to_str().unwrap();
    std::fs::write(home.path().join("bad.toml"), "[server]\nlisen = 1\n").unwrap();
    std::fs::write(home.path().join("good.toml"), "[leases]\nlease = \"10s\"\n").unwrap();
    let nobody = "dagorama://127.0.0.1:1";
    let cases: &[(&[&str], i32, &str)] = &[
        (
            &["runs", "--url", nobody, "--json"],
            4,
            "BROKER_UNAVAILABLE",
        ),
        (
            &["dlq", "list", "--url", nobody, "--json"],
            4,
            "BROKER_UNAVAILABLE",
        ),
        (&["show", "nonsense", "--json"], 3, "INVALID_REQUEST"),
        (&["runs", "--state", "odd", "--json"], 3, "INVALID_REQUEST"),
        (
            &["config", "check", "bad.toml", "--json"],
            2,
            "CONFIG_INVALID",
        ),
        (
            &["config", "--json", "show", "gone.toml"],
            2,
            "CONFIG_INVALID",
        ),
        (&["verify", empty, "--json"], 3, "INVALID_REQUEST"),
        (&["verify", "gone", "--json"], 3, "INVALID_REQUEST"),
    ];
    for (arguments, exit, code) in cases {
        let ended = run(program(home.path()).args(*arguments));
        assert_eq!(ended.exit, *exit, "{arguments:?}: {ended:?}");
        let answer = ended.json();
        assert_eq!(answer["code"], *code, "{arguments:?}: {answer}");
        let message = answer["message"].as_str().unwrap();
        assert!(!message.is_empty() && !ended.err.is_empty(), "{ended:?}");
    }
    let ended = run(program(home.path()).args(["verify", empty]));
    ended.is(3, "", "is not a store");
    assert!(!ended.err.contains("dagorama verify"), "{ended:?}");

    let ended = run(program(home.path()).args(["config", "check", "good.toml", "--json"]));
    assert_eq!(ended.is(0, "", "").json()["valid"], true);
    for arguments in [
        ["config", "show", "good.toml"].as_slice(),
        &["config", "show", "--config", "good.toml"],
    ] {
        run(program(home.path()).args(arguments)).is(0, "lease = \"10s\"", "");
        let ended = run(program(home.path()).args(arguments).arg("--json"));
        assert_eq!(ended.is(0, "", "").json()["leases"]["lease"], "10s");
    }
    let ended = run(program(home.path()).args(["version", "--json"]));
    assert_eq!(ended.is(0, "", "").json()["protocol"], 1);
}

/// A pipe in, a pipe out: each good line comes back once, the bad one is kept as a dead letter, and the broker serves on after the end of its input.
#[test]
fn standard_input_and_output_are_a_route_and_an_output() {
    let config = r#"
[connection.pipe]
type = "file"
[[route]]
name = "in"
from = { connection = "pipe", stdin = true }
action = "app.echo"
[[output]]
name = "out"
match = { action = "app.echo" }
to = { connection = "pipe", stdout = true }
"#;
    let (mut broker, mut stdout) = Broker::start_with(Some(config), Stdio::piped());
    let mut stdin = broker.child.stdin.take().unwrap();
    stdin
        .write_all(b"{\"n\": 1}\nno json\n[2]\n\"three\"\n")
        .unwrap();
    drop(stdin);
    let mut lines = Vec::new();
    broker.with_worker(|| {
        for _ in 0..3 {
            let mut line = String::new();
            stdout.read_line(&mut line).unwrap();
            lines.push(line.trim_end().to_owned());
        }
    });
    lines.sort();
    assert_eq!(lines, ["\"three\"", "[2]", "{\"n\":1}"]);
    let letters = broker.ask(&["dlq", "list", "--json"]).json();
    assert_eq!(letters["letters"].as_array().unwrap().len(), 1, "{letters}");
    let runs = broker.ask(&["runs", "--json"]).json();
    assert_eq!(runs["runs"].as_array().unwrap().len(), 3, "{runs}");
}
