//! Scenarios as text: what is asked at which time, and the whole of what comes back.
//!
//! A line is `@TIME words -> expected`, where the words are a command or a question (`parse.rs` has the grammar) and the expected text
//! is all replies, then all effects (`render.rs`): a line that forgets one fails, so there are no other effects than those written. After
//! each step the invariants are checked, the facts are audited, and a broker rebuilt from all facts so far must equal the one that
//! runs. `settings …` and `spec …` lines may come first. `UPDATE_EXPECT=1` writes what came back into the file; read it before you keep it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};

use super::audit::Audit;
use super::facts::{difference, is_due, learn_date, next_run, restore, run_facts};
use super::parse::{self, GHOST};
use super::prng::SplitMix64;
use super::render;
use crate::broker::command::{Command, Query, Reply};
use crate::broker::outcome::{Effect, Fact, Tx};
use crate::broker::types::{
    Attempt, Batch, LeaseToken, NodeIndex, NodeKey, Retry, RunId, RunSeq, SessionId, Spec,
    Timestamp, Turn, WallTime,
};
use crate::broker::{Broker, OutputRule, Settings};

/// The lease secret of all test brokers.
pub(super) const SECRET: [u8; 16] = *b"sixteen bytes!!!";

/// A broker, the facts it has written, and the names that a script gives to things.
pub(super) struct World {
    pub(super) broker: Broker,
    settings: Settings,
    pub(super) facts: Vec<Fact>,
    pub(super) audit: Audit,
    now: Timestamp,
    wall: WallTime,
    steps: u64,
    runs: BTreeMap<String, RunId>,
    nodes: BTreeMap<String, NodeKey>,
    specs: BTreeMap<String, Arc<Spec>>,
    tokens: BTreeMap<(NodeKey, Attempt), LeaseToken>,
    pub(super) run_names: BTreeMap<RunSeq, String>,
    pub(super) node_names: BTreeMap<NodeKey, String>,
    pub(super) session_names: BTreeMap<SessionId, String>,
    /// The run that the latest question was about.
    pub(super) asked: RunSeq,
    /// Whether each step ends with a check of the invariants and a rebuild; long loops switch it off.
    pub(super) thorough: bool,
    /// Kinds of commands, codes and reasons that were seen.
    pub(super) seen: BTreeSet<String>,
}

/// Small numbers, so that times in scripts are easy to follow.
pub(super) fn settings() -> Settings {
    Settings {
        lease_ms: 10,
        detach_grace_ms: 5,
        dedup_window_ms: 1_000,
        ..Settings::default()
    }
}

/// A spec with nothing special: one attempt, three losses, 10 ms, 20 ms, … of backoff without jitter.
pub(super) fn plain_spec(action: &str) -> Spec {
    Spec {
        action: Arc::from(action),
        queue: Arc::from("default"),
        taint: None,
        priority: 0,
        retry: Retry {
            delay_ms: 10,
            max_delay_ms: 1_000,
            jitter_milli: 0,
            ..Retry::default()
        },
        timeout_ms: None,
        fingerprint: None,
        pin_code: false,
        batch: None,
        by_name: false,
    }
}

impl World {
    pub(super) fn new(settings: Settings) -> Self {
        Self {
            broker: Broker::new(settings.clone(), SECRET),
            settings,
            facts: Vec::new(),
            audit: Audit::default(),
            now: Timestamp(0),
            wall: WallTime(0),
            steps: 0,
            runs: BTreeMap::from([("ghost".to_owned(), GHOST)]),
            nodes: BTreeMap::new(),
            specs: BTreeMap::new(),
            tokens: BTreeMap::new(),
            run_names: BTreeMap::new(),
            node_names: BTreeMap::new(),
            session_names: BTreeMap::new(),
            asked: RunSeq(0),
            thorough: true,
            seen: BTreeSet::new(),
        }
    }

    /// The run with that label; `ghost` is nobody's, and `r~` has the number of `r` with other random bits.
    pub(super) fn run(&self, label: &str) -> RunId {
        let name = label.trim_end_matches('~');
        let mut run = *self
            .runs
            .get(name)
            .unwrap_or_else(|| panic!("no run is called {name}"));
        run.salt ^= u64::from(name != label);
        run
    }

    /// The node with that label; `r/5` is node 5 of run `r`, whether it exists or not.
    pub(super) fn node(&self, label: &str) -> NodeKey {
        if let Some(node) = self.nodes.get(label) {
            return *node;
        }
        let (run, node) = label
            .split_once('/')
            .unwrap_or_else(|| panic!("no node is called {label}"));
        NodeKey::new(
            self.run(run).seq,
            NodeIndex(node.parse().expect("a number after /")),
        )
    }

    /// The token that came with a lease; zeros when there was none.
    pub(super) fn token(&self, node: NodeKey, attempt: Attempt) -> LeaseToken {
        self.tokens
            .get(&(node, attempt))
            .copied()
            .unwrap_or(LeaseToken([0; 16]))
    }

    /// The spec with that name: as defined, or a plain one for the action of that name.
    pub(super) fn spec(&self, name: &str) -> Arc<Spec> {
        self.specs
            .get(name)
            .cloned()
            .unwrap_or_else(|| Arc::new(plain_spec(name)))
    }

    /// `spec NAME [action=f] [queue=q] [taint=t] [priority=1] [attempts=3] [losses=2] [delay=10] [factor=2000] [max=99] [jitter=100]
    /// [timeout=5] [fp=h] [pin] [batch=3/20] [byname]`
    fn define(&mut self, line: &str) {
        let mut words = line.split_whitespace();
        let name = words.next().expect("a name");
        let mut spec = plain_spec(name);
        for word in words {
            let (key, value) = word.split_once('=').unwrap_or((word, ""));
            let number = || value.parse::<u32>().expect("a number");
            match key {
                "action" => spec.action = Arc::from(value),
                "queue" => spec.queue = Arc::from(value),
                "taint" => spec.taint = Some(Arc::from(value)),
                "priority" => spec.priority = value.parse().expect("a number"),
                "attempts" => spec.retry.max_attempts = number(),
                "losses" => spec.retry.max_losses = number(),
                "delay" => spec.retry.delay_ms = u64::from(number()),
                "factor" => spec.retry.factor_milli = number(),
                "max" => spec.retry.max_delay_ms = u64::from(number()),
                "jitter" => spec.retry.jitter_milli = number(),
                "timeout" => spec.timeout_ms = Some(u64::from(number())),
                "fp" => spec.fingerprint = Some(Arc::from(value)),
                "pin" => spec.pin_code = true,
                "batch" => {
                    let (size, wait) = value.split_once('/').expect("size/wait");
                    spec.batch = Some(Batch {
                        max_size: size.parse().expect("a number"),
                        max_wait_ms: wait.parse().expect("a number"),
                    });
                }
                "byname" => spec.by_name = true,
                other => panic!("{other:?} says nothing about a spec"),
            }
        }
        self.specs.insert(name.to_owned(), Arc::new(spec));
    }

    /// `settings lease=10 grace=5 window=1000 keys=… nodes=… edges=… inputs=… children=… depth=… open=… leases=… outbox=… slice=…
    /// output=NAME:GLOB:sf` (s: succeeded ones, f: failed ones).
    fn configure(line: &str) -> Settings {
        let mut settings = settings();
        for word in line.split_whitespace() {
            let (key, value) = word.split_once('=').expect("key=value");
            let number = || value.parse::<u64>().expect("a number");
            match key {
                "lease" => settings.lease_ms = number(),
                "grace" => settings.detach_grace_ms = number(),
                "window" => settings.dedup_window_ms = number(),
                "keys" => settings.max_keys = number() as usize,
                "nodes" => settings.max_nodes_per_run = number() as u32,
                "edges" => settings.max_edges_per_run = number(),
                "inputs" => settings.max_inputs = number() as u32,
                "children" => settings.max_children = number() as u32,
                "depth" => settings.max_depth = number() as u32,
                "open" => settings.max_open_nodes = number(),
                "leases" => settings.max_leases = number() as usize,
                "outbox" => settings.max_outbox = number(),
                "slice" => settings.slice = number() as usize,
                "output" => {
                    let parts: Vec<&str> = value.split(':').collect();
                    settings.outputs.push(OutputRule {
                        name: Arc::from(parts[0]),
                        action: parts[1].to_owned(),
                        succeeded: parts[2].contains('s'),
                        failed: parts[2].contains('f'),
                    });
                }
                other => panic!("{other:?} is no setting"),
            }
        }
        settings
    }

    /// One line without its expectation; returns all that came back.
    pub(super) fn step(&mut self, line: &str) -> String {
        let mut text = line.trim();
        if let Some(rest) = text.strip_prefix('@') {
            let (at, rest) = rest.split_once(' ').expect("@time words");
            self.now = Timestamp(at.parse().expect("a time"));
            text = rest.trim();
        }
        if let Some(rest) = text.strip_prefix("wall ") {
            let (at, rest) = rest.split_once(' ').expect("wall date words");
            self.wall = WallTime(at.parse().expect("a date"));
            text = rest.trim();
        }
        self.steps += 1;
        if text == "restart" {
            self.broker = self.rebuilt(self.steps);
            return "ok".to_owned();
        }
        let Some(parsed) = parse::command(self, text) else {
            return self.ask(text);
        };
        self.seen.insert(kind(&parsed.command).to_owned());
        if let Command::Attach(attach) = &parsed.command {
            self.session_names
                .insert(attach.session, attach.name.to_string());
        }
        let quiet = self.thorough && !is_due(&self.broker, self.now, self.wall);
        let before = quiet.then(|| without_now(&self.broker.fingerprint()));
        let (reply, tx) = self.apply(parsed.command);
        self.name(&parsed.labels, &reply, &tx.facts);
        self.audit
            .absorb(&tx.facts)
            .unwrap_or_else(|complaint| panic!("{line}: {complaint}"));
        self.audit
            .effects(&tx.effects)
            .unwrap_or_else(|complaint| panic!("{line}: {complaint}"));
        for effect in &tx.effects {
            if let Effect::Lease(lease) = effect {
                self.tokens.insert((lease.node, lease.attempt), lease.token);
            }
        }
        if let Some(before) = before.filter(|_| render::refused(&reply)) {
            let (facts, after) = (&tx.facts, without_now(&self.broker.fingerprint()));
            assert!(facts.is_empty(), "{line}: a refusal wrote {facts:?}");
            assert_eq!(before, after, "{line}: a refusal changed the state");
        }
        self.facts.extend(tx.facts);
        if self.thorough {
            self.broker.check_invariants();
            self.compare_with_rebuilt(line);
        }
        let text = render::outcome(self, &reply, &tx.effects);
        self.seen.extend(render::codes(&reply));
        text
    }

    /// Lets the broker adopt what it needs, then applies.
    fn apply(&mut self, command: Command) -> (Reply, Tx) {
        for run in self.broker.needs(&command) {
            self.adopt(run);
        }
        let turn = Turn {
            now: self.now,
            wall: self.wall,
            seed: SplitMix64(self.steps).next(),
        };
        let mut tx = Tx::default();
        let reply = self.broker.apply(&mut tx, turn, command);
        (reply, tx)
    }

    fn adopt(&mut self, run: RunSeq) {
        let facts = run_facts(&self.facts, run);
        if !facts.is_empty() {
            self.broker
                .adopt(run, facts)
                .expect("the facts of an ended run");
        }
    }

    fn ask(&mut self, text: &str) -> String {
        let query = parse::query(self, text);
        self.asked = match &query {
            Query::Run(run) | Query::Explain { run, .. } | Query::Nodes { run, .. } => run.seq,
            Query::Value(node) => node.run,
            _ => self.asked,
        };
        if let Some(run) = self.broker.needs_query(&query) {
            self.adopt(run);
        }
        let turn = Turn {
            now: self.now,
            wall: self.wall,
            seed: 0,
        };
        let answer = self.broker.query(turn, &query);
        self.broker.release_adopted();
        self.seen.extend(render::words_of(&answer));
        render::answer(self, &answer)
    }

    /// Remembers what the labels stand for.
    fn name(&mut self, labels: &[(String, Vec<String>)], reply: &Reply, facts: &[Fact]) {
        for (i, (owner, nodes)) in labels.iter().enumerate() {
            let (run, parent) = match reply {
                Reply::Submitted(items) => match &items[i] {
                    Ok(submitted) if !submitted.existing => {
                        self.runs.insert(owner.clone(), submitted.run);
                        self.run_names.insert(submitted.run.seq, owner.clone());
                        (submitted.run.seq, None)
                    }
                    _ => continue,
                },
                Reply::Done(items) if items[i].is_err() => continue,
                Reply::Created(Err(_)) | Reply::Attached(_) => continue,
                Reply::Done(_) | Reply::Created(Ok(_)) => {
                    let parent = self.node(owner);
                    (parent.run, Some(parent.node))
                }
            };
            let first = match reply {
                Reply::Created(Ok(first)) => Some(*first),
                _ => facts.iter().find_map(|fact| match fact {
                    Fact::Nodes {
                        run: r,
                        first,
                        parent: p,
                        ..
                    } if *r == run && *p == parent => Some(*first),
                    _ => None,
                }),
            };
            let Some(first) = first else { continue };
            for (i, label) in nodes.iter().enumerate() {
                let node = NodeKey::new(run, NodeIndex(first.0 + i as u32));
                self.nodes.insert(label.clone(), node);
                self.node_names.entry(node).or_insert_with(|| label.clone());
            }
        }
    }

    /// A broker restored from all facts so far: as the log has them, each one twice, or only the latest of each as sled would.
    fn rebuilt(&self, how: u64) -> Broker {
        restore(
            &self.settings,
            &self.facts,
            how,
            self.now,
            next_run(&self.facts),
        )
    }

    fn compare_with_rebuilt(&self, line: &str) {
        if is_due(&self.broker, self.now, self.wall) {
            return;
        }
        let mut rebuilt = self.rebuilt(self.steps);
        rebuilt.check_invariants();
        learn_date(&mut rebuilt, self.now, self.wall);
        let (runs, restored) = (self.broker.fingerprint(), rebuilt.fingerprint());
        assert!(
            runs == restored,
            "{line}: the rebuilt broker differs ({})\n{}",
            ["log", "twice", "latest"][(self.steps % 3) as usize],
            difference(&runs, &restored)
        );
    }
}

/// The first line of a fingerprint says which time it is.
fn without_now(fingerprint: &str) -> String {
    fingerprint.lines().skip(1).collect::<Vec<_>>().join("\n")
}

/// The kind of a command. Without a wildcard, so that a new one is noticed.
pub(super) fn kind(command: &Command) -> &'static str {
    match command {
        Command::Submit(_) => "Submit",
        Command::DeadLetter(_) => "DeadLetter",
        Command::Attach(_) => "Attach",
        Command::Detach(_) => "Detach",
        Command::Close(_) => "Close",
        Command::Credit { .. } => "Credit",
        Command::Touch(_) => "Touch",
        Command::Finish(_) => "Finish",
        Command::CreateChildren(_) => "CreateChildren",
        Command::Cancel { .. } => "Cancel",
        Command::Resume(_) => "Resume",
        Command::ConfirmOutbox { .. } => "ConfirmOutbox",
        Command::DropDeadLetter { .. } => "DropDeadLetter",
        Command::SeekInbox { .. } => "SeekInbox",
        Command::Expire(_) => "Expire",
        Command::Tick => "Tick",
    }
}

/// A world as the first lines of a script set it up, and the lines that follow.
pub(super) fn world(script: &str) -> (World, Vec<&str>) {
    let lines: Vec<&str> = script.lines().map(str::trim).collect();
    let configured = lines.iter().find_map(|line| line.strip_prefix("settings "));
    let mut world = World::new(configured.map_or_else(settings, World::configure));
    for line in &lines {
        if let Some(definition) = line.strip_prefix("spec ") {
            world.define(definition);
        }
    }
    (world, lines)
}

/// Plays a scenario; panics with all lines that came out differently. Returns what it has seen.
#[track_caller]
pub(super) fn check(name: &str, script: &str) -> BTreeSet<String> {
    let (mut world, lines) = world(script);
    let mut wrong = Vec::new();
    for line in lines {
        if !line.starts_with('@') {
            let known = ["", "settings", "spec", "--"];
            assert!(
                known.contains(&line.split(' ').next().unwrap_or_default()),
                "{line:?}"
            );
            continue;
        }
        let (words, expected) = line
            .split_once(" ->")
            .unwrap_or_else(|| panic!("{line}: no ->"));
        println!("{words}");
        let actual = world.step(words);
        println!("    -> {actual}");
        if expected.split_whitespace().collect::<Vec<_>>().join(" ") != actual {
            wrong.push((line.to_owned(), format!("{} -> {actual}", words.trim_end())));
        }
    }
    if !wrong.is_empty() && std::env::var_os("UPDATE_EXPECT").is_some() {
        update(std::panic::Location::caller().file(), script, &wrong);
    }
    let one = |(line, actual): &(String, String)| format!("expected {line}\n  actual {actual}\n");
    let report = wrong.iter().map(one).collect::<Vec<_>>().concat();
    assert!(wrong.is_empty(), "{name}:\n{report}");
    world.seen
}

/// Replaces the lines of a script in its file.
fn update(file: &str, script: &str, wrong: &[(String, String)]) {
    static FILES: Mutex<()> = Mutex::new(());
    let _one_at_a_time = FILES.lock().expect("no update panics");
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join(file);
    let text = std::fs::read_to_string(&path).expect("the file of the script");
    let new = wrong.iter().fold(script.to_owned(), |new, (line, actual)| {
        new.replacen(line, actual, 1)
    });
    std::fs::write(&path, text.replacen(script, &new, 1)).expect("the file can be written");
}

/// Declares scenarios: a test each, and a list of all for the test of coverage.
macro_rules! scripts {
    ($($(#[$doc:meta])* $name:ident: $script:literal;)*) => {
        pub(super) const SCRIPTS: &[(&str, &str)] = &[$((stringify!($name), $script)),*];
        $($(#[$doc])* #[test] fn $name() { crate::broker::tests::script::check(stringify!($name), $script); })*
    };
}
pub(super) use scripts;
