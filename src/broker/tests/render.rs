//! From replies, effects and answers to the words of a script.

use super::script::World;
use crate::broker::command::{Answer, Reason, Rejection, Reply};
use crate::broker::outcome::Effect;
use crate::broker::types::{NodeIndex, NodeKey, Note, RunSeq, SessionId};

fn run(world: &World, run: RunSeq) -> String {
    world
        .run_names
        .get(&run)
        .cloned()
        .unwrap_or_else(|| format!("run {}", run.0))
}

fn node(world: &World, node: NodeKey) -> String {
    world
        .node_names
        .get(&node)
        .cloned()
        .unwrap_or_else(|| format!("{}/{}", run(world, node.run), node.node.0))
}

fn session(world: &World, session: SessionId) -> String {
    world
        .session_names
        .get(&session)
        .cloned()
        .unwrap_or_else(|| format!("session {}", session.0))
}

fn code(rejection: &Rejection) -> String {
    assert!(
        !rejection.message.is_empty(),
        "{} says nothing to people",
        rejection.code.as_str()
    );
    rejection.code.as_str().to_owned()
}

/// Rejections within a reply.
fn rejections(reply: &Reply) -> Vec<&Rejection> {
    match reply {
        Reply::Submitted(items) => items
            .iter()
            .filter_map(|item| item.as_ref().err())
            .collect(),
        Reply::Done(items) => items
            .iter()
            .filter_map(|item| item.as_ref().err())
            .collect(),
        Reply::Created(item) => item.as_ref().err().into_iter().collect(),
        Reply::Attached(_) => Vec::new(),
    }
}

/// The codes within a reply.
pub(super) fn codes(reply: &Reply) -> Vec<String> {
    rejections(reply).into_iter().map(code).collect()
}

/// Whether every item was refused, so that nothing may have changed.
pub(super) fn refused(reply: &Reply) -> bool {
    let n = match reply {
        Reply::Submitted(items) => items.len(),
        Reply::Done(items) => items.len(),
        Reply::Created(_) | Reply::Attached(_) => 1,
    };
    n > 0 && rejections(reply).len() == n
}

/// All replies, then all effects: leases, revocations, roots, ends, outboxes; each kind in its order.
pub(super) fn outcome(world: &World, reply: &Reply, effects: &[Effect]) -> String {
    let mut items: Vec<String> = match reply {
        Reply::Submitted(items) => items
            .iter()
            .map(|item| match item {
                Ok(submitted) if submitted.existing => {
                    match world.run_names.get(&submitted.run.seq) {
                        Some(name) if world.run(name) == submitted.run => {
                            format!("{name} existing")
                        }
                        _ => "existing".to_owned(),
                    }
                }
                Ok(submitted) => format!("{} new", run(world, submitted.run.seq)),
                Err(rejection) => code(rejection),
            })
            .collect(),
        Reply::Done(items) => items
            .iter()
            .map(|item| item.as_ref().map_or_else(code, |()| "ok".to_owned()))
            .collect(),
        Reply::Attached(attached) => {
            let held = attached.leases.iter();
            let held: Vec<_> = held
                .map(|(key, attempt)| format!(" {} #{}", node(world, *key), attempt.0))
                .collect();
            let with = if held.is_empty() { "" } else { " with" };
            vec![format!("attached{with}{}", held.concat())]
        }
        Reply::Created(Ok(_)) => vec!["created".to_owned()],
        Reply::Created(Err(rejection)) => vec![code(rejection)],
    };
    let mut bundles: Vec<u32> = vec![0];
    for effect in effects {
        if let Effect::Lease(lease) = effect
            && !bundles.contains(&lease.batch)
        {
            bundles.push(lease.batch);
        }
    }
    let mut sorted: Vec<(u8, String)> = effects
        .iter()
        .map(|effect| one_effect(world, effect, &bundles))
        .collect();
    sorted.sort_by_key(|(kind, _)| *kind);
    sorted.dedup_by(|a, b| a.0 == 4 && a == b);
    items.extend(sorted.into_iter().map(|(_, text)| text));
    if items.is_empty() {
        "nothing".to_owned()
    } else {
        items.join(", ")
    }
}

/// `bundles` has the numbers of this step's bundles: the script counts them from 1.
fn one_effect(world: &World, effect: &Effect, bundles: &[u32]) -> (u8, String) {
    match effect {
        Effect::Lease(lease) => {
            let bundle = match bundles.iter().position(|number| *number == lease.batch) {
                Some(0) | None => String::new(),
                Some(at) => format!(" bundle {at}"),
            };
            let other = if lease.note == Note::OtherCode {
                " other code"
            } else {
                ""
            };
            let (node, session) = (node(world, lease.node), session(world, lease.session));
            (
                0,
                format!("{node} #{} to {session}{bundle}{other}", lease.attempt.0),
            )
        }
        Effect::Revoke {
            session: s,
            node: n,
            attempt,
        } => (
            1,
            format!(
                "revoke {} #{} from {}",
                node(world, *n),
                attempt.0,
                session(world, *s)
            ),
        ),
        Effect::RootSettled { run: r } => (2, format!("{} settled", run(world, *r))),
        Effect::RunEnded { run: r } => (3, format!("{} ended", run(world, *r))),
        Effect::OutboxGrew { output } => (4, format!("{output} owes")),
    }
}

fn note(note: Note) -> &'static str {
    match note {
        Note::None => "",
        Note::OtherCode => " (other code)",
        Note::AttemptFailed => " (attempt failed)",
        Note::TimedOut => " (timed out)",
        Note::LeaseLost => " (lease lost)",
        Note::Released => " (released)",
        Note::Quarantined => " (quarantined)",
        Note::ReferenceFailed => " (reference failed)",
        Note::Reopened => " (reopened)",
        Note::LeaseShortened => " (lease shortened)",
        Note::LeaseResumed => " (lease resumed)",
    }
}

/// The first word of a reason, as PROTOCOL §11 spells it, and the rest. Without a wildcard, so that a new one is noticed.
fn reason(world: &World, reason: &Reason) -> (&'static str, String) {
    match reason {
        Reason::Inputs { remaining } => ("inputs", remaining.to_string()),
        Reason::Delayed(until) => ("delayed", until.0.to_string()),
        Reason::DelayedUntil(until) => ("delayed_until", until.0.to_string()),
        Reason::Backoff {
            until,
            failures,
            losses,
        } => (
            "backoff",
            format!("{} failures {failures} losses {losses}", until.0),
        ),
        Reason::NoWorkerOnQueue(queue) => ("no_worker_on_queue", queue.to_string()),
        Reason::NoWorkerTolerates(taint) => ("no_worker_tolerates", taint.to_string()),
        Reason::NoWorkerHasAction(action) => ("no_worker_has_action", action.to_string()),
        Reason::NoWorkerHasCode(code) => ("no_worker_has_code", code.to_string()),
        Reason::NeverAnnounced(action) => ("never_announced", action.to_string()),
        Reason::BatchFilling {
            ready,
            batch,
            until,
        } => (
            "batch_filling",
            format!("{ready} of {} until {}", batch.max_size, until.0),
        ),
        Reason::WorkersBusy => ("workers_busy", String::new()),
        Reason::Leased(by) => ("leased", session(world, *by)),
        Reason::Settling { remaining } => ("settling", remaining.to_string()),
        Reason::Ended(state) => ("ended", state.as_str().to_owned()),
    }
}

/// All words that a reason may begin with.
pub(super) const REASONS: [&str; 14] = [
    "inputs",
    "delayed",
    "delayed_until",
    "backoff",
    "no_worker_on_queue",
    "no_worker_tolerates",
    "no_worker_has_action",
    "no_worker_has_code",
    "never_announced",
    "batch_filling",
    "workers_busy",
    "leased",
    "settling",
    "ended",
];

/// Codes and reasons within an answer.
pub(super) fn words_of(answer: &Answer) -> Vec<String> {
    match answer {
        Answer::No(rejection) => vec![code(rejection)],
        Answer::Explained(reasons) => {
            let world = World::new(super::script::settings());
            reasons
                .iter()
                .map(|(_, why)| reason(&world, why).0.to_owned())
                .collect()
        }
        _ => Vec::new(),
    }
}

/// An answer in words.
pub(super) fn answer(world: &World, answer: &Answer) -> String {
    let text = match answer {
        Answer::No(rejection) => code(rejection),
        Answer::Run(summary) => {
            let seq = summary.run.seq;
            let counts = summary.counts.iter().filter(|(_, n)| **n > 0);
            let counts: Vec<_> = counts
                .map(|(state, n)| format!(" {}={n}", state.as_str()))
                .collect();
            let counts = counts.concat();
            format!(
                "{} round {} root {} at {} events {}{counts}",
                summary.state.as_str(),
                summary.round,
                summary.root_state.as_str(),
                node(world, NodeKey::new(seq, summary.value_node)),
                summary.n_events
            )
        }
        Answer::Explained(reasons) => {
            let one = |(at, why): &(NodeIndex, Reason)| {
                let (because, rest) = reason(world, why);
                format!("{} {because} {rest}", in_asked_run(world, *at))
                    .trim_end()
                    .to_owned()
            };
            reasons.iter().map(one).collect::<Vec<_>>().join(", ")
        }
        Answer::Nodes(list) => {
            let one = |summary: &crate::broker::command::NodeSummary| {
                let attempt = match summary.attempt.0 {
                    0 => String::new(),
                    n => format!(" #{n}"),
                };
                let cause = summary.cause.map_or_else(String::new, |cause| {
                    format!(" for {}", in_asked_run(world, cause))
                });
                let label = in_asked_run(world, summary.node);
                format!(
                    "{label} {}{attempt}{cause}{}",
                    summary.state.as_str(),
                    note(summary.note)
                )
            };
            list.iter().map(one).collect::<Vec<_>>().join(", ")
        }
        Answer::Runs(list) => {
            let one = |summary: &crate::broker::command::RunSummary| {
                format!("{} {}", run(world, summary.run.seq), summary.state.as_str())
            };
            list.iter().map(one).collect::<Vec<_>>().join(", ")
        }
        Answer::Value { node: at, state } => {
            format!("{} {}", in_asked_run(world, *at), state.as_str())
        }
        Answer::Totals(totals) => {
            let list = |name: &str, of: &std::collections::BTreeMap<std::sync::Arc<str>, u64>| {
                of.iter()
                    .filter(|(_, n)| **n > 0)
                    .map(|(key, n)| format!(" {name} {key}={n}"))
                    .collect::<Vec<_>>()
                    .concat()
            };
            format!(
                "runs {} nodes {} ready {} leases {} sessions {} keys {}{}{}",
                totals.open_runs,
                totals.open_nodes,
                totals.ready_nodes,
                totals.leases,
                totals.sessions,
                totals.keys,
                list("stranded", &totals.stranded),
                list("outbox", &totals.outbox)
            )
        }
        Answer::Position(next) => format!("position {next}"),
        Answer::Outbox {
            cursor,
            next,
            confirmed,
        } => {
            let seqs: Vec<_> = confirmed.iter().map(|seq| format!(" {seq}")).collect();
            let intro = if seqs.is_empty() { "" } else { " confirmed" };
            format!("cursor {cursor} next {next}{intro}{}", seqs.concat())
        }
    };
    if text.is_empty() {
        "nothing".to_owned()
    } else {
        text
    }
}

/// The label of a node of the run that the question was about.
fn in_asked_run(world: &World, at: NodeIndex) -> String {
    node(world, NodeKey::new(world.asked, at))
}
