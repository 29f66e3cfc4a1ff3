//! What a store says, as text: a line a fact, then what can be read of each run. The words are this file's own, so that the text
//! of an old store stays the same when names in the program change. Taking records apart without `..` makes a new field fail to
//! compile here.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use dagorama::broker::outcome::{CreatedNode, DeadLetterRecord, Fact};
use dagorama::broker::types::*;
use dagorama::storage::{Arguments, EventRecord, Loaded, OutboxRecord, Outcome, Read};
use xxhash_rust::xxh3::xxh3_64;

/// All that a loaded store says.
pub(crate) fn tell(loaded: &Loaded, facts: &[Fact], reader: &dyn Read) -> String {
    let mut out = String::new();
    let Loaded {
        now,
        last_wall,
        from_sled,
        from_log,
        lease_secret,
        store_id,
        next_run,
    } = loaded;
    writeln!(out, "store {} secret {}", hex(store_id), hex(lease_secret)).unwrap();
    writeln!(
        out,
        "now {} wall {} next run {next_run}",
        now.0, last_wall.0
    )
    .unwrap();
    writeln!(out, "nodes from sled {from_sled} from log {from_log}").unwrap();
    writeln!(out, "\nfacts in the order of loading").unwrap();
    for known in facts {
        writeln!(out, "{}", fact(known)).unwrap();
    }
    let mut runs = reader.runs(None, usize::MAX).unwrap();
    runs.reverse();
    for (seq, record) in runs {
        writeln!(out, "\nrun {} {}", seq.0, run(&record)).unwrap();
        for node in (0..record.n_nodes).map(NodeIndex) {
            tell_node(&mut out, reader, NodeKey::new(seq, node));
        }
        for event in reader.events(seq, 0, usize::MAX).unwrap() {
            let EventRecord {
                seq,
                at,
                node,
                state,
                attempt,
                note,
            } = event;
            let note = words(note);
            writeln!(
                out,
                "  event {seq} at {} node {} {state} attempt {attempt} {note}",
                at.0, node.0
            )
            .unwrap();
        }
    }
    for fact in facts {
        if let Fact::Name { id, name } = fact {
            writeln!(out, "\nname {name}").unwrap();
            for record in reader.outbox(*id, 0, usize::MAX).unwrap() {
                let OutboxRecord {
                    seq,
                    node,
                    salt,
                    round,
                    at,
                } = record;
                writeln!(
                    out,
                    "  owed {seq} {node} salt {salt:016x} round {round} at {}",
                    at.0
                )
                .unwrap();
            }
            for (seq, found) in reader.dead_letters(*id, 0, usize::MAX).unwrap() {
                writeln!(out, "  dead letter {seq} {}", letter(&found)).unwrap();
                tell_stored(&mut out, reader, &found.body);
            }
        }
    }
    out
}

fn tell_node(out: &mut String, reader: &dyn Read, key: NodeKey) {
    let node = key.node.0;
    // An ended run may have counted more nodes than it still has; then that is what the text says.
    let Some(found) = reader.node(key).unwrap() else {
        writeln!(out, "  node {node} is missing").unwrap();
        return;
    };
    writeln!(out, "  node {node} {}", record(&found)).unwrap();
    if let Some(Arguments { payload, inputs }) = reader.arguments(key).unwrap() {
        let (body, inputs) = (self::payload(&payload), ranges(&inputs));
        writeln!(out, "    called with {body} waits for {inputs}").unwrap();
        tell_stored(out, reader, &payload);
    }
    if let Some(Outcome {
        is_error,
        payload,
        references,
    }) = reader.outcome(key).unwrap()
    {
        let word = if is_error { "error" } else { "value" };
        let (body, references) = (self::payload(&payload), ranges(&references));
        writeln!(out, "    {word} {body} refers to {references}").unwrap();
        tell_stored(out, reader, &payload);
    }
}

fn tell_stored(out: &mut String, reader: &dyn Read, payload: &Payload) {
    if let Body::Stored(at) = payload.body {
        let bytes = reader.payload(at).unwrap();
        let start = String::from_utf8_lossy(&bytes[..16]).into_owned();
        let sum = xxh3_64(&bytes);
        writeln!(
            out,
            "    stored {} bytes {start:?} xxh3 {sum:016x}",
            bytes.len()
        )
        .unwrap();
    }
}

/// One fact in a line.
pub(crate) fn fact(fact: &Fact) -> String {
    match fact {
        Fact::Spec { id, spec } => format!("spec {} {}", id.0, self::spec(spec)),
        Fact::Name { id, name } => format!("name {} {name}", id.0),
        Fact::Announced { action, spec } => format!("announced {action} spec {}", spec.0),
        Fact::Run { run, record } => format!("run {} {}", run.0, self::run(record)),
        Fact::Nodes {
            run,
            first,
            parent,
            round,
            event,
            nodes,
        } => {
            let nodes: Vec<String> = nodes.iter().map(created).collect();
            format!(
                "nodes {}/{} parent {} round {round} event {event}: {}",
                run.0,
                first.0,
                index(*parent),
                nodes.join("; ")
            )
        }
        Fact::Node {
            node,
            event,
            record,
        } => format!("node {node} event {event} {}", self::record(record)),
        Fact::Outcome {
            node,
            is_error,
            payload,
            references,
        } => {
            let word = if *is_error { "error" } else { "value" };
            let (payload, references) = (self::payload(payload), ranges(references));
            format!("outcome {node} {word} {payload} refers to {references}")
        }
        Fact::Key {
            key,
            run,
            content,
            at,
        } => {
            let run = run.map_or("none".to_owned(), |run| run.to_string());
            format!(
                "key {:032x} run {run} content {content:x} at {}",
                key.0, at.0
            )
        }
        Fact::KeysExpired { keys } => {
            let keys: Vec<String> = keys.iter().map(|key| format!("{:032x}", key.0)).collect();
            format!("keys expired {}", keys.join(" "))
        }
        Fact::Position {
            route,
            partition,
            epoch,
            next,
        } => format!(
            "position route {} {partition} epoch {epoch} next {next}",
            route.0
        ),
        Fact::Outbox {
            output,
            seq,
            node,
            salt,
            round,
            at,
        } => format!(
            "owed output {} {seq} {node} salt {salt:016x} round {round} at {}",
            output.0, at.0
        ),
        Fact::OutboxConfirmed {
            output,
            cursor,
            beyond,
        } => format!(
            "confirmed output {} before {cursor} and {beyond:?}",
            output.0
        ),
        Fact::DeadLetter { route, seq, letter } => {
            format!(
                "dead letter route {} {seq} {}",
                route.0,
                self::letter(letter)
            )
        }
        Fact::DeadLetterRemoved { route, seq } => {
            format!("dead letter removed route {} {seq}", route.0)
        }
        Fact::RunDeleted { run } => format!("run deleted {}", run.0),
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut out, byte| {
        write!(out, "{byte:02x}").unwrap();
        out
    })
}

fn index(node: Option<NodeIndex>) -> String {
    node.map_or("none".to_owned(), |node| node.0.to_string())
}

fn option<T: std::fmt::Display>(value: Option<T>) -> String {
    value.map_or("none".to_owned(), |value| value.to_string())
}

fn payload(payload: &Payload) -> String {
    let Payload { codec, body } = payload;
    let codec = match codec {
        Codec::Json => "json",
        Codec::MessagePack => "messagepack",
        Codec::Pickle => "pickle",
        Codec::Raw => "raw",
    };
    match body {
        Body::Inline(bytes) => format!("{codec} {:?}", String::from_utf8_lossy(bytes)),
        Body::Stored(PayloadRef {
            segment,
            offset,
            length,
            checksum,
        }) => {
            format!("{codec} at {segment}+{offset} length {length} xxh3 {checksum:016x}")
        }
    }
}

fn ranges(ranges: &[InputRange]) -> String {
    let each = ranges.iter().map(|range| {
        let InputRange { first, count, mode } = range;
        let word = match mode {
            InputUse::Value => "value",
            InputUse::Outcome => "outcome",
            InputUse::After => "after",
        };
        format!("{word} {}+{count}", first.0)
    });
    format!("[{}]", each.collect::<Vec<_>>().join(", "))
}

fn created(node: &CreatedNode) -> String {
    let CreatedNode {
        spec,
        arguments,
        inputs,
        not_before,
        not_before_wall,
    } = node;
    let (arguments, inputs) = (payload(arguments), ranges(inputs));
    format!(
        "spec {} {arguments} waits for {inputs} until {} {}",
        spec.0, not_before.0, not_before_wall.0
    )
}

fn tags(tags: &BTreeMap<String, String>) -> String {
    let each = tags.iter().map(|(name, value)| format!("{name}={value}"));
    format!("[{}]", each.collect::<Vec<_>>().join(", "))
}

fn run(record: &RunRecord) -> String {
    let RunRecord {
        salt,
        root,
        round,
        cancelled,
        cancel_reason,
        tags,
        source,
        created,
        created_wall,
        ended,
        state,
        key,
        n_nodes,
        n_events,
    } = record;
    let state = state.as_str();
    let key = key.map_or("none".to_owned(), |key| format!("{:032x}", key.0));
    format!(
        "{state} salt {salt:016x} root {} round {round} cancelled {cancelled} {cancel_reason:?} tags {} source {source} \
         created {} wall {} ended {} key {key} nodes {n_nodes} events {n_events}",
        root.0,
        self::tags(tags),
        created.0,
        created_wall.0,
        option(ended.map(|at| at.0))
    )
}

fn words(note: Note) -> &'static str {
    match note {
        Note::None => "-",
        Note::OtherCode => "other-code",
        Note::AttemptFailed => "attempt-failed",
        Note::TimedOut => "timed-out",
        Note::LeaseLost => "lease-lost",
        Note::Released => "released",
        Note::Quarantined => "quarantined",
        Note::ReferenceFailed => "reference-failed",
        Note::Reopened => "reopened",
        Note::LeaseShortened => "lease-shortened",
        Note::LeaseResumed => "lease-resumed",
    }
}

/// Every note, so that a story can be asked whether it has them all.
pub(crate) const NOTES: [&str; 11] = [
    "-",
    "other-code",
    "attempt-failed",
    "timed-out",
    "lease-lost",
    "released",
    "quarantined",
    "reference-failed",
    "reopened",
    "lease-shortened",
    "lease-resumed",
];

/// How the line of each fact begins, likewise.
pub(crate) const FACTS: [&str; 15] = [
    "spec ",
    "name ",
    "announced ",
    "run ",
    "nodes ",
    "node ",
    "outcome ",
    "key ",
    "keys expired ",
    "position ",
    "owed ",
    "confirmed ",
    "dead letter route ",
    "dead letter removed ",
    "run deleted ",
];

fn record(record: &NodeRecord) -> String {
    let NodeRecord {
        spec,
        parent,
        round,
        progress,
        body,
        attempt,
        failures,
        losses,
        not_before,
        not_before_wall,
        digest,
        cause,
        note,
    } = record;
    let progress = match progress {
        Progress::Open => "open".to_owned(),
        Progress::Leased { session } => format!("leased to {:x}", session.0),
        Progress::Backoff => "backoff".to_owned(),
        Progress::Settling => "settling".to_owned(),
        Progress::Succeeded => "succeeded".to_owned(),
        Progress::Failed => "failed".to_owned(),
        Progress::Skipped => "skipped".to_owned(),
    };
    let body = match body {
        BodyEnd::Plain => "plain".to_owned(),
        BodyEnd::Structure => "structure".to_owned(),
        BodyEnd::Tail(node) => format!("tail {}", node.0),
    };
    format!(
        "{progress} {body} spec {} parent {} round {round} attempt {} failures {failures} losses {losses} \
         until {} {} digest {digest:x} cause {} {}",
        spec.0,
        index(*parent),
        attempt.0,
        not_before.0,
        not_before_wall.0,
        index(*cause),
        words(*note)
    )
}

fn spec(spec: &Spec) -> String {
    let Spec {
        action,
        queue,
        taint,
        priority,
        retry,
        timeout_ms,
        fingerprint,
        pin_code,
        batch,
        by_name,
    } = spec;
    let Retry {
        max_attempts,
        max_losses,
        delay_ms,
        factor_milli,
        max_delay_ms,
        jitter_milli,
    } = retry;
    let batch = batch.map(
        |Batch {
             max_size,
             max_wait_ms,
         }| format!("{max_size}/{max_wait_ms}"),
    );
    format!(
        "{action} queue {queue} taint {} priority {priority} \
         retry {max_attempts}/{max_losses}/{delay_ms}/{factor_milli}/{max_delay_ms}/{jitter_milli} \
         timeout {} fingerprint {} pinned {pin_code} batch {} by name {by_name}",
        option(taint.as_ref()),
        option(*timeout_ms),
        option(fingerprint.as_ref()),
        option(batch)
    )
}

fn letter(letter: &DeadLetterRecord) -> String {
    let DeadLetterRecord {
        code,
        reason,
        attempts,
        coordinates,
        body,
        at,
    } = letter;
    format!(
        "{code} {reason:?} attempts {attempts} at {} {} {}",
        at.0,
        tags(coordinates),
        payload(body)
    )
}
