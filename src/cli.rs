//! The command line: what can be typed, and nothing about how it is done.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

/// A durable broker for dynamic task graphs, beside the queues people already run.
#[derive(Debug, Parser)]
#[command(
    name = "dagorama",
    version,
    about,
    propagate_version = true,
    after_help = "\
Examples:
  dagorama demo                         see all of it in one command, with a SIGKILL half-way
  dagorama serve                        start the broker: data in ./dagorama-data, loopback only
  dagorama worker my_module             run the actions of a Python module
  dagorama submit my_module.site '[[\"https://…\"]]'
  dagorama explain 1f-9c2e…             why does it not run?"
)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// How to reach a broker.
#[derive(Debug, Clone, Args)]
pub struct Connection {
    /// Where the broker is: `dagorama://HOST:PORT` or `dagorama+unix:///PATH`.
    #[arg(
        long,
        global = true,
        env = "DAGORAMA_URL",
        default_value = "dagorama://127.0.0.1:7373"
    )]
    pub url: String,
    /// Its token; by default the one that `serve` left for this user.
    #[arg(long, global = true, env = "DAGORAMA_TOKEN", hide_env_values = true)]
    pub token: Option<String>,
    /// Print JSON instead of text for people.
    #[arg(long, global = true)]
    pub json: bool,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Start the broker. Without any option it just works: ./dagorama-data, loopback only.
    #[command(
        after_help = "Examples:\n  dagorama serve\n  dagorama serve --config config/sidecar-file.toml\n  dagorama serve --listen unix:/run/dagorama.sock --data-dir /var/lib/dagorama"
    )]
    Serve(Serve),
    /// Run the actions of Python modules (starts the Python package of this environment).
    #[command(
        after_help = "Examples:\n  dagorama worker my_module\n  dagorama worker shop.tasks --queue gpu --tolerate gpu --concurrency 2"
    )]
    Worker(Worker),
    /// Start a run by the name of its action.
    #[command(
        after_help = "Examples:\n  dagorama submit my_module.add '[1, 2]'\n  dagorama submit my_module.site '[[\"https://…\"]]' --key monday --wait"
    )]
    Submit(Submit),
    /// List runs, newest first.
    Runs {
        /// How to reach the broker.
        #[command(flatten)]
        connection: Connection,
        /// Only runs in this state.
        #[arg(long, value_parser = ["running", "succeeded", "failed", "cancelled"])]
        state: Option<String>,
        /// Only runs with this tag.
        #[arg(long)]
        tag: Option<String>,
        /// At most this many.
        #[arg(long, default_value_t = 20)]
        limit: usize,
    },
    /// Show a run and its nodes.
    Show {
        /// How to reach the broker.
        #[command(flatten)]
        connection: Connection,
        /// Its id.
        run: String,
        /// Also its history.
        #[arg(long)]
        events: bool,
    },
    /// Wait for a run and print its result.
    Result {
        /// How to reach the broker.
        #[command(flatten)]
        connection: Connection,
        /// Its id.
        run: String,
        /// Give up after this time ("30s").
        #[arg(long, value_parser = humantime::parse_duration)]
        timeout: Option<std::time::Duration>,
    },
    /// Stop a run.
    Cancel {
        /// How to reach the broker.
        #[command(flatten)]
        connection: Connection,
        /// Its id.
        run: String,
        /// Why, for people.
        #[arg(long, default_value = "")]
        reason: String,
    },
    /// Resume an ended run from its failed, skipped and cancelled nodes, with the code that workers have loaded.
    ///
    /// Restart the workers first when the code has changed: a running worker goes on with what it has loaded.
    Retry {
        /// How to reach the broker.
        #[command(flatten)]
        connection: Connection,
        /// Its id.
        run: String,
    },
    /// Say for every node that does not run why it does not.
    Explain {
        /// How to reach the broker.
        #[command(flatten)]
        connection: Connection,
        /// The run's id.
        run: String,
        /// Only this node.
        #[arg(long)]
        node: Option<u32>,
        /// At most this many.
        #[arg(long, default_value_t = 50)]
        limit: usize,
    },
    /// Check a store (a copy of it; the store itself is never changed). Exit 0 sound, 1 broken, 2 unreadable, 3 usage.
    Verify {
        /// The data directory.
        #[arg(default_value = "dagorama-data")]
        store: PathBuf,
        /// Print JSON.
        #[arg(long)]
        json: bool,
        /// Also read every payload.
        #[arg(long)]
        deep: bool,
    },
    /// Look at the configuration.
    Config {
        /// Print JSON.
        #[arg(long, global = true)]
        json: bool,
        /// What to do with it.
        #[command(subcommand)]
        what: ConfigCommand,
    },
    /// Measure this broker on this machine; one JSON line per workload with --json.
    Bench(Bench),
    /// The whole story in one command: crawl real pages, compare them all, kill the broker half-way, check the answer.
    #[command(
        after_help = "Examples:\n  dagorama demo\n  dagorama demo --json --seed 7\n  dagorama demo --tamper lose        the checker must say no"
    )]
    Demo(Demo),
    /// Look after messages that could not become runs.
    Dlq {
        /// How to reach the broker.
        #[command(flatten)]
        connection: Connection,
        /// What to do.
        #[command(subcommand)]
        what: DlqCommand,
    },
    /// Look at routes and outputs.
    Bridge {
        /// How to reach the broker.
        #[command(flatten)]
        connection: Connection,
        /// What to do.
        #[command(subcommand)]
        what: BridgeCommand,
    },
    /// Totals of the broker: what is open, what waits for a worker, how far the store is.
    Status {
        /// How to reach the broker.
        #[command(flatten)]
        connection: Connection,
    },
    /// Print the version, and what it was built with.
    Version {
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
}

impl Command {
    /// Whether the output is for programs, so that a "no" is too.
    pub fn wants_json(&self) -> bool {
        match self {
            Self::Submit(Submit { connection, .. })
            | Self::Runs { connection, .. }
            | Self::Show { connection, .. }
            | Self::Result { connection, .. }
            | Self::Cancel { connection, .. }
            | Self::Retry { connection, .. }
            | Self::Explain { connection, .. }
            | Self::Dlq { connection, .. }
            | Self::Bridge { connection, .. }
            | Self::Status { connection } => connection.json,
            Self::Verify { json, .. } | Self::Config { json, .. } | Self::Version { json } => *json,
            Self::Bench(options) => options.json,
            Self::Demo(options) => options.json,
            Self::Serve(_) | Self::Worker(_) => false,
        }
    }
}

/// Options of `serve`. They win over the environment, which wins over the file.
#[derive(Debug, Clone, Args)]
pub struct Serve {
    /// Configuration file (see config/broker.toml).
    #[arg(long, env = "DAGORAMA_CONFIG")]
    pub config: Option<PathBuf>,
    /// Where the data is kept.
    #[arg(long, env = "DAGORAMA_DATA_DIR")]
    pub data_dir: Option<PathBuf>,
    /// Where to listen: HOST:PORT (port 0 picks one) or unix:PATH.
    #[arg(long, env = "DAGORAMA_LISTEN")]
    pub listen: Option<String>,
    /// Allow an address other machines can reach, without TLS. Think twice.
    #[arg(long)]
    pub insecure_listen: bool,
    /// How long a silent worker keeps its nodes ("30s").
    #[arg(long, value_parser = humantime::parse_duration)]
    pub lease: Option<std::time::Duration>,
    /// Print one JSON line when ready to serve.
    #[arg(long)]
    pub ready_stdout: bool,
}

/// Options of `worker`.
#[derive(Debug, Clone, Args)]
pub struct Worker {
    /// Python modules with actions.
    #[arg(required = true)]
    pub modules: Vec<String>,
    /// Queues to serve (may be repeated).
    #[arg(long = "queue", short, default_value = "default")]
    pub queues: Vec<String>,
    /// Taints to tolerate (may be repeated).
    #[arg(long)]
    pub tolerate: Vec<String>,
    /// Worker processes; by default one per core.
    #[arg(long, short)]
    pub concurrency: Option<u32>,
    /// How nodes are kept apart.
    #[arg(long, value_enum, default_value_t = Isolation::Process)]
    pub isolation: Isolation,
    /// Where the broker is.
    #[arg(long, env = "DAGORAMA_URL")]
    pub url: Option<String>,
    /// End when nothing has been to do for a while.
    #[arg(long)]
    pub until_idle: bool,
    /// The Python to use.
    #[arg(long, env = "DAGORAMA_PYTHON", default_value = "python3")]
    pub python: PathBuf,
}

/// How a worker keeps nodes apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Isolation {
    /// A process per slot.
    Process,
    /// A thread per slot.
    Thread,
    /// In the worker itself.
    None,
}

/// Options of `submit`.
#[derive(Debug, Clone, Args)]
pub struct Submit {
    /// How to reach the broker.
    #[command(flatten)]
    pub connection: Connection,
    /// Name of the action.
    pub action: String,
    /// Arguments as a JSON list (or an object of keyword arguments).
    #[arg(default_value = "[]")]
    pub arguments: String,
    /// The same key gives the same run.
    #[arg(long)]
    pub key: Option<String>,
    /// Mark the run: NAME=VALUE (may be repeated).
    #[arg(long = "tag")]
    pub tags: Vec<String>,
    /// Wait and print the result.
    #[arg(long)]
    pub wait: bool,
}

/// What `config` can do.
#[derive(Debug, Clone, Subcommand)]
pub enum ConfigCommand {
    /// Say whether a file is valid, and where not.
    Check {
        /// The file.
        file: PathBuf,
    },
    /// Print every setting with its value, defaults and environment included.
    Show {
        /// The file.
        file: Option<PathBuf>,
        /// The same, as `serve` has it.
        #[arg(long, value_name = "FILE", env = "DAGORAMA_CONFIG")]
        config: Option<PathBuf>,
    },
}

/// What `dlq` can do.
#[derive(Debug, Clone, Subcommand)]
pub enum DlqCommand {
    /// List dead letters.
    List {
        /// Of this route.
        #[arg(long)]
        route: Option<String>,
        /// At most this many.
        #[arg(long, default_value_t = 20)]
        limit: usize,
    },
    /// Show one with its bytes.
    Show {
        /// Its route.
        #[arg(long)]
        route: String,
        /// Its number.
        seq: u64,
    },
    /// Try one again.
    Replay {
        /// Its route.
        #[arg(long)]
        route: String,
        /// Its number.
        seq: u64,
    },
    /// Throw one away.
    Drop {
        /// Its route.
        #[arg(long)]
        route: String,
        /// Its number.
        seq: u64,
    },
}

/// What `bridge` can do.
#[derive(Debug, Clone, Subcommand)]
pub enum BridgeCommand {
    /// Every route and output: state, lag, last error.
    List,
}

/// Options of `bench`.
#[derive(Debug, Clone, Args)]
pub struct Bench {
    /// Workloads (default: all).
    pub workloads: Vec<Workload>,
    /// One JSON line per workload.
    #[arg(long)]
    pub json: bool,
    /// Where the data goes; not a tmpfs.
    #[arg(long, default_value = "target/bench-data")]
    pub data_dir: PathBuf,
    /// Seconds of the sustained workloads.
    #[arg(long, default_value_t = 60)]
    pub seconds: u64,
    /// The Python to use.
    #[arg(long, env = "DAGORAMA_PYTHON", default_value = "python3")]
    pub python: PathBuf,
    /// Smaller sizes, to see that it works; figures of such a run are not to be quoted.
    #[arg(long)]
    pub quick: bool,
}

/// The workloads of `bench`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Workload {
    /// Fan-out of 10,000 and join, Rust workers.
    Fanout,
    /// The same again and again for --seconds.
    Sustained,
    /// Fan-out of 10,000 and join, two Python worker processes.
    FanoutPython,
    /// A chain of 500: time per hop.
    Chain,
    /// 1,000 diamonds of four nodes in flight.
    Diamonds,
    /// Submit to result on an idle broker.
    Idle,
    /// One-node runs.
    Submit,
    /// Bytes per waiting node.
    Memory,
    /// Restart with many open and many more finished nodes.
    Restart,
}

/// Options of `demo`.
#[derive(Debug, Clone, Args)]
pub struct Demo {
    /// One JSON object at the end, nothing else on standard output.
    #[arg(long)]
    pub json: bool,
    /// Decides which pages are crawled and when the kill comes.
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// Pages to crawl.
    #[arg(long, default_value_t = 48, value_parser = clap::value_parser!(u32).range(40..=120))]
    pub pages: u32,
    /// Do not kill anything.
    #[arg(long)]
    pub no_kill: bool,
    /// Keep the directory with data, logs and evidence.
    #[arg(long)]
    pub keep: bool,
    /// Falsify the evidence before it is checked: the verdict must be no.
    #[arg(long, value_enum)]
    pub tamper: Option<Tamper>,
    /// The Python to use.
    #[arg(long, env = "DAGORAMA_PYTHON", default_value = "python3")]
    pub python: PathBuf,
}

/// How the demo falsifies its evidence.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Tamper {
    /// An acknowledged outcome disappears.
    Lose,
    /// An outcome is acknowledged for two attempts.
    Twice,
    /// A number in the output changes.
    Alter,
}
