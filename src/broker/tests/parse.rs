//! From the words of a script to a [`Command`] or a [`Query`]. It knows the grammar; it does not know what the answers mean.
//!
//! ```text
//! attach w1 [queues q p] [tolerates t] [actions f g]      detach|close w1      touch w1 w2      credit w1 3
//! submit r [key k [content c]] [from ROUTE [pos P 5..6 | key k | dead 1]] [root a] [tag k=v]: NODES [| r2: NODES]
//! finish a #1 value|fail|retryable|timeout|timeout!|release|tail REF|struct REF… [digest d] [forged] [with NODES] [| …]
//! create a #1 at 0: NODES      cancel r      resume r      confirm OUTPUT 1 2      expire r…      tick
//! deadletter ROUTE pos P 5..6|key k      drop ROUTE 1      seek ROUTE P 5
//! run r | nodes r | explain r [node a] | value a | totals | open | position ROUTE P | outbox OUTPUT
//! NODES: a[:spec][*n] [on REF] [any REF] [after REF] [wait 5] [until 9] [bytes N] [pickle], …   REF: a[*n], new:0, old:3
//! ```

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;

use super::script::World;
use crate::broker::command::{
    Attach, AttemptEnd, Command, Completion, CreateChildren, DeadLetter, Delay, Identity, NewInput,
    NewNode, NodeRef, Origin, Query, Submission, SubmissionKey,
};
use crate::broker::types::{
    Attempt, Body, Codec, InputUse, KeyHash, LeaseToken, NodeIndex, NodeKey, Payload, PayloadRef,
    RunId, RunSeq, SessionId, Spec, WallTime,
};

/// A command and the labels under which what it creates is to be known.
pub(super) struct Parsed {
    pub(super) command: Command,
    /// An entry for each item: the label of the run, or of the parent, and those of the new nodes.
    pub(super) labels: Vec<(String, Vec<String>)>,
}

/// A small stable hash, for digests, keys and sessions.
pub(super) fn fnv(text: &str) -> u64 {
    text.bytes().fold(0xcbf2_9ce4_8422_2325, |h, b| {
        (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3)
    })
}

/// The session with that label.
pub(super) fn session(label: &str) -> SessionId {
    SessionId(fnv(label))
}

/// Inline bytes.
pub(super) fn payload(codec: Codec, bytes: &[u8]) -> Payload {
    Payload {
        codec,
        body: Body::Inline(Bytes::copy_from_slice(bytes)),
    }
}

struct Words<'a>(std::iter::Peekable<std::str::SplitWhitespace<'a>>);

impl<'a> Words<'a> {
    fn new(text: &'a str) -> Self {
        Self(text.split_whitespace().peekable())
    }
    fn word(&mut self) -> &'a str {
        self.0.next().expect("one more word")
    }
    fn number<T: std::str::FromStr>(&mut self) -> T {
        let word = self.word();
        word.parse()
            .unwrap_or_else(|_| panic!("{word:?} is not a number"))
    }
    fn maybe(&mut self, word: &str) -> bool {
        self.0.next_if(|next| *next == word).is_some()
    }
    fn until_keyword(&mut self, keywords: &[&str]) -> Vec<&'a str> {
        let mut words = Vec::new();
        while let Some(word) = self.0.next_if(|next| !keywords.contains(next)) {
            words.push(word);
        }
        words
    }
}

fn texts(words: &[&str]) -> Vec<Arc<str>> {
    words.iter().map(|word| Arc::from(*word)).collect()
}

/// A reference and how many neighbours: `a`, `a*3`, `new:0*2`, `old:7`.
fn reference(world: &World, text: &str, new: &[String]) -> (NodeRef, u32) {
    let (name, count) = text.split_once('*').unwrap_or((text, "1"));
    let count = count.parse().expect("a count after *");
    let at = if let Some(at) = name.strip_prefix("new:") {
        NodeRef::New(at.parse().expect("a position after new:"))
    } else if let Some(at) = name.strip_prefix("old:") {
        NodeRef::Existing(NodeIndex(at.parse().expect("a node after old:")))
    } else if let Some(at) = new.iter().position(|label| label == name) {
        NodeRef::New(at as u32)
    } else {
        NodeRef::Existing(world.node(name).node)
    };
    (at, count)
}

/// Nodes to create, their labels, and the specs they use.
fn nodes(world: &World, text: &str) -> (Vec<NewNode>, Vec<String>, Vec<Arc<Spec>>) {
    let mut labels: Vec<String> = Vec::new();
    let items: Vec<&str> = text
        .split(',')
        .map(str::trim)
        .filter(|item| !item.is_empty())
        .collect();
    for item in &items {
        let head = item.split_whitespace().next().expect("a label");
        let name = head.split([':', '*']).next().expect("a label");
        match head.split_once('*') {
            Some((_, n)) => {
                let n: u32 = n.parse().expect("a count after *");
                labels.extend((0..n).map(|i| format!("{name}{i}")));
            }
            None => labels.push(name.to_owned()),
        }
    }
    let mut specs: Vec<Arc<Spec>> = Vec::new();
    let mut nodes = Vec::new();
    for item in items {
        let mut words = Words::new(item);
        let head = words.word();
        let n: usize = head
            .split_once('*')
            .map_or(1, |(_, n)| n.parse().expect("a count"));
        let head = head.split('*').next().expect("a label");
        let name = head.split_once(':').map_or("f", |(_, spec)| spec);
        let mut node = NewNode {
            spec: if let Some(raw) = name.strip_prefix("spec=") {
                raw.parse().expect("a position of a spec")
            } else {
                let spec = world.spec(name);
                specs.iter().position(|s| *s == spec).unwrap_or_else(|| {
                    specs.push(spec);
                    specs.len() - 1
                }) as u32
            },
            arguments: payload(Codec::Json, b"[]"),
            inputs: Vec::new(),
            delay: Delay::None,
        };
        while words.0.peek().is_some() {
            match words.word() {
                "wait" => node.delay = Delay::For(words.number()),
                "until" => node.delay = Delay::Until(WallTime(words.number())),
                "bytes" => node.arguments = payload(Codec::Raw, &vec![7; words.number()]),
                "pickle" => node.arguments = payload(Codec::Pickle, b"P"),
                "stored" => node.arguments.body = Body::Stored(stored(words.number())),
                how => {
                    let mode = match how {
                        "on" => InputUse::Value,
                        "any" => InputUse::Outcome,
                        "after" => InputUse::After,
                        other => panic!("{other:?} says nothing about a node"),
                    };
                    let (first, count) = reference(world, words.word(), &labels);
                    node.inputs.push(NewInput { first, count, mode });
                }
            }
        }
        nodes.extend(std::iter::repeat_n(node, n));
    }
    (nodes, labels, specs)
}

fn stored(length: u32) -> PayloadRef {
    PayloadRef {
        segment: 1,
        offset: 4096,
        length,
        checksum: 9,
    }
}

/// `ROUTE [pos P 5..6 | key k | dead 1]`.
fn origin(words: &mut Words<'_>) -> Origin {
    let route = Arc::from(words.word());
    let identity = if words.maybe("pos") {
        let partition = Arc::from(words.word());
        let (position, next) = words.word().split_once("..").expect("from..next");
        Identity::Position {
            partition,
            position: position.parse().expect("a position"),
            next: next.parse().expect("a position"),
        }
    } else if words.maybe("key") {
        Identity::Key(KeyHash(u128::from(fnv(words.word()))))
    } else if words.maybe("dead") {
        Identity::DeadLetter {
            seq: words.number(),
        }
    } else {
        Identity::None
    };
    Origin { route, identity }
}

fn submission(world: &World, item: &str) -> (Submission, (String, Vec<String>)) {
    let (head, tail) = item
        .split_once(": ")
        .unwrap_or((item.trim_end_matches(':'), ""));
    let (nodes, labels, specs) = nodes(world, tail);
    let mut words = Words::new(head);
    let run = words.word().to_owned();
    let mut submission = Submission {
        key: None,
        specs,
        root: (nodes.len() as u32).saturating_sub(1),
        nodes,
        tags: BTreeMap::new(),
        origin: None,
    };
    while words.0.peek().is_some() {
        match words.word() {
            "key" => {
                let hash = KeyHash(u128::from(fnv(words.word())));
                submission.key = Some(SubmissionKey {
                    hash,
                    content: fnv(tail),
                });
            }
            "content" => {
                submission
                    .key
                    .as_mut()
                    .expect("content follows key")
                    .content = fnv(words.word());
            }
            "from" => submission.origin = Some(origin(&mut words)),
            "root" => {
                let name = words.word();
                submission.root = name.parse().unwrap_or_else(|_| {
                    labels
                        .iter()
                        .position(|label| label == name)
                        .expect("a label") as u32
                });
            }
            "tag" => {
                let (key, value) = words.word().split_once('=').expect("key=value");
                submission.tags.insert(key.to_owned(), value.to_owned());
            }
            other => panic!("{other:?} says nothing about a submission"),
        }
    }
    (submission, (run, labels))
}

/// `a #1 …`: node, attempt, token.
fn lease(world: &World, words: &mut Words<'_>) -> (String, NodeKey, Attempt, LeaseToken) {
    let label = words.word();
    let node = world.node(label);
    let attempt = Attempt(
        words
            .word()
            .trim_start_matches('#')
            .parse()
            .expect("#attempt"),
    );
    (label.to_owned(), node, attempt, world.token(node, attempt))
}

fn completion(world: &World, item: &str) -> (Completion, (String, Vec<String>)) {
    let (head, tail) = item.split_once(" with ").unwrap_or((item, ""));
    let (children, labels, specs) = nodes(world, tail);
    let mut words = Words::new(head);
    let (label, node, attempt, mut token) = lease(world, &mut words);
    let error = || payload(Codec::Json, b"{\"type\":\"E\"}");
    let failed = |retryable, timed_out| AttemptEnd::Failed {
        error: error(),
        retryable,
        timed_out,
    };
    let end = match words.word() {
        "value" => AttemptEnd::Value(if words.maybe("bytes") {
            payload(Codec::Raw, &vec![7; words.number()])
        } else {
            payload(Codec::Json, b"1")
        }),
        "fail" => failed(false, false),
        "retryable" => failed(true, false),
        "timeout" => failed(true, true),
        "timeout!" => failed(false, true),
        "release" => AttemptEnd::Released,
        "tail" => AttemptEnd::Tail(reference(world, words.word(), &labels).0),
        "struct" => AttemptEnd::Structure {
            body: payload(Codec::Json, b"[]"),
            references: words
                .until_keyword(&["digest", "forged"])
                .into_iter()
                .map(|word| {
                    let (first, count) = reference(world, word, &labels);
                    NewInput {
                        first,
                        count,
                        mode: InputUse::Value,
                    }
                })
                .collect(),
        },
        other => panic!("{other:?} is no end of an attempt"),
    };
    let mut digest = fnv(item);
    while words.0.peek().is_some() {
        match words.word() {
            "digest" => digest = fnv(words.word()),
            "forged" => token = LeaseToken([0xee; 16]),
            other => panic!("{other:?} says nothing about a completion"),
        }
    }
    (
        Completion {
            node,
            attempt,
            token,
            digest,
            specs,
            children,
            end,
        },
        (label, labels),
    )
}

/// Reads a command; `None` when the words are a question.
pub(super) fn command(world: &World, text: &str) -> Option<Parsed> {
    let (verb, rest) = text.split_once(' ').unwrap_or((text, ""));
    let mut words = Words::new(rest);
    let mut labels = Vec::new();
    let command = match verb {
        "submit" => {
            let (items, all) = rest
                .split(" | ")
                .map(|item| submission(world, item))
                .unzip();
            labels = all;
            Command::Submit(items)
        }
        "finish" => {
            let (items, all) = rest
                .split(" | ")
                .map(|item| completion(world, item))
                .unzip();
            labels = all;
            Command::Finish(items)
        }
        "create" => {
            let (head, tail) = rest
                .split_once(": ")
                .unwrap_or((rest.trim_end_matches(':'), ""));
            let (children, names, specs) = nodes(world, tail);
            let mut words = Words::new(head);
            let (label, node, attempt, mut token) = lease(world, &mut words);
            assert_eq!(words.word(), "at");
            let first_child = words.number();
            if words.maybe("forged") {
                token = LeaseToken([0xee; 16]);
            }
            labels.push((label, names));
            Command::CreateChildren(CreateChildren {
                node,
                attempt,
                token,
                first_child,
                specs,
                children,
            })
        }
        "attach" => {
            let name = words.word();
            let keywords = ["queues", "tolerates", "actions"];
            let mut attach = Attach {
                session: session(name),
                name: Arc::from(name),
                queues: vec![Arc::from("default")],
                tolerations: Vec::new(),
                actions: vec![world.spec("f")],
            };
            while words.0.peek().is_some() {
                let keyword = words.word();
                let list = words.until_keyword(&keywords);
                match keyword {
                    "queues" => attach.queues = texts(&list),
                    "tolerates" => attach.tolerations = texts(&list),
                    "actions" => {
                        attach.actions = list.iter().map(|name| world.spec(name)).collect();
                    }
                    other => panic!("{other:?} says nothing about a session"),
                }
            }
            Command::Attach(attach)
        }
        "detach" => Command::Detach(session(words.word())),
        "close" => Command::Close(session(words.word())),
        "touch" => Command::Touch(rest.split_whitespace().map(session).collect()),
        "credit" => Command::Credit {
            session: session(words.word()),
            calls: words.number(),
        },
        "cancel" => Command::Cancel {
            run: world.run(words.word()),
            reason: Arc::from("asked"),
        },
        "resume" => Command::Resume(world.run(words.word())),
        "confirm" => Command::ConfirmOutbox {
            output: Arc::from(words.word()),
            seqs: words.0.map(|seq| seq.parse().expect("a number")).collect(),
        },
        "deadletter" => Command::DeadLetter(
            rest.split(" | ")
                .map(|item| {
                    let mut words = Words::new(item);
                    let origin = origin(&mut words);
                    let body = if words.maybe("bytes") {
                        payload(Codec::Raw, &vec![7; words.number()])
                    } else {
                        payload(Codec::Raw, b"?")
                    };
                    DeadLetter {
                        origin,
                        code: Arc::from("UNDECODABLE"),
                        reason: Arc::from("not json"),
                        attempts: 5,
                        coordinates: BTreeMap::new(),
                        body,
                    }
                })
                .collect(),
        ),
        "drop" => Command::DropDeadLetter {
            route: Arc::from(words.word()),
            seq: words.number(),
        },
        "seek" => Command::SeekInbox {
            route: Arc::from(words.word()),
            partition: Arc::from(words.word()),
            next: words.number(),
        },
        "expire" => Command::Expire(
            rest.split_whitespace()
                .map(|label| world.run(label).seq)
                .collect(),
        ),
        "tick" => Command::Tick,
        _ => return None,
    };
    Some(Parsed { command, labels })
}

/// Reads a question.
pub(super) fn query(world: &World, text: &str) -> Query {
    let mut words = Words::new(text);
    match words.word() {
        "run" => Query::Run(world.run(words.word())),
        "nodes" => Query::Nodes {
            run: world.run(words.word()),
            first: if words.maybe("from") {
                world.node(words.word()).node
            } else {
                NodeIndex(0)
            },
            limit: if words.maybe("limit") {
                words.number()
            } else {
                1_000
            },
        },
        "explain" => Query::Explain {
            run: world.run(words.word()),
            node: words.maybe("node").then(|| world.node(words.word()).node),
            limit: if words.maybe("limit") {
                words.number()
            } else {
                1_000
            },
        },
        "value" => Query::Value(world.node(words.word())),
        "totals" => Query::Totals,
        "open" => Query::OpenRuns {
            limit: if words.maybe("limit") {
                words.number()
            } else {
                1_000
            },
        },
        "position" => Query::Position {
            route: Arc::from(words.word()),
            partition: Arc::from(words.word()),
        },
        "outbox" => Query::Outbox {
            output: Arc::from(words.word()),
        },
        other => panic!("no command and no question begins with {other:?}"),
    }
}

/// A run that nobody has.
pub(super) const GHOST: RunId = RunId {
    seq: RunSeq(0xffff),
    salt: 1,
};
