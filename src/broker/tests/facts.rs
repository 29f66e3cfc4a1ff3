//! Facts as a store gives them back: all of them, each twice, only the latest, or those of one run.

use std::collections::{BTreeMap, BTreeSet};

use super::script::SECRET;
use crate::broker::command::Command;
use crate::broker::outcome::{Fact, Tx};
use crate::broker::types::{RunSeq, Timestamp, Turn, WallTime};
use crate::broker::{Broker, Restoring, Settings};

/// The number of the first run of a new store.
pub(super) const FIRST_RUN: u64 = 1;

/// The first run number that was never given.
pub(super) fn next_run(facts: &[Fact]) -> u64 {
    let given = facts.iter().map(|fact| match fact {
        Fact::Run { run, .. } => run.0 + 1,
        _ => 0,
    });
    given.max().unwrap_or(0).max(FIRST_RUN)
}

/// Restores a broker from facts, in one of three ways (see [`World::rebuilt`]).
pub(super) fn restore(
    settings: &Settings,
    facts: &[Fact],
    how: u64,
    now: Timestamp,
    next_run: u64,
) -> Broker {
    let mut restoring = Restoring::new(settings.clone(), SECRET);
    match how % 3 {
        0 => facts.iter().for_each(|fact| restoring.absorb(fact.clone())),
        1 => facts.iter().for_each(|fact| {
            restoring.absorb(fact.clone());
            restoring.absorb(fact.clone());
        }),
        _ => latest(facts)
            .into_iter()
            .for_each(|fact| restoring.absorb(fact)),
    }
    restoring
        .finish(now, next_run)
        .expect("facts that the broker itself wrote")
}

/// What a store says of one run: its record, its nodes, their latest records, and the references of structures.
pub(super) fn run_facts(facts: &[Fact], run: RunSeq) -> Vec<Fact> {
    let mut record = None;
    let mut created = Vec::new();
    let mut nodes = BTreeMap::new();
    let mut references = BTreeMap::new();
    for fact in facts {
        match fact {
            Fact::Run { run: r, .. } if *r == run => record = Some(fact.clone()),
            Fact::Nodes { run: r, .. } if *r == run => created.push(fact.clone()),
            Fact::Node { node, .. } if node.run == run => {
                nodes.insert(*node, fact.clone());
            }
            Fact::Outcome {
                node,
                references: to,
                ..
            } if node.run == run => {
                references.insert(*node, (!to.is_empty()).then(|| fact.clone()));
            }
            Fact::RunDeleted { run: r } if *r == run => return Vec::new(),
            _ => {}
        }
    }
    let Some(record) = record else {
        return Vec::new();
    };
    let mut all = vec![record];
    all.extend(created);
    all.extend(references.into_values().flatten());
    all.extend(nodes.into_values());
    all
}

/// The facts as sled streams them: open runs only, the latest of each, no confirmed deliveries, no closed keys.
fn latest(facts: &[Fact]) -> Vec<Fact> {
    let mut all = Vec::new();
    let mut open: BTreeMap<RunSeq, bool> = BTreeMap::new();
    let mut announced = BTreeMap::new();
    let mut keys = BTreeMap::new();
    let mut positions = BTreeMap::new();
    let mut confirmed: BTreeMap<_, (u64, Vec<u64>)> = BTreeMap::new();
    for fact in facts {
        match fact {
            Fact::Spec { .. } | Fact::Name { .. } => all.push(fact.clone()),
            Fact::Announced { action, .. } => drop(announced.insert(action.clone(), fact.clone())),
            Fact::Run { run, record } => drop(open.insert(*run, record.ended.is_none())),
            Fact::RunDeleted { run } => drop(open.insert(*run, false)),
            Fact::Key { key, .. } => drop(keys.insert(*key, fact.clone())),
            Fact::KeysExpired { keys: gone } => gone.iter().for_each(|key| drop(keys.remove(key))),
            Fact::Position {
                route, partition, ..
            } => {
                positions.insert((*route, partition.clone()), fact.clone());
            }
            Fact::OutboxConfirmed {
                output,
                cursor,
                beyond,
            } => {
                confirmed.insert(*output, (*cursor, beyond.clone()));
            }
            _ => {}
        }
    }
    all.extend(announced.into_values());
    for (run, _) in open.into_iter().filter(|(_, open)| *open) {
        all.extend(run_facts(facts, run));
    }
    all.extend(keys.into_values());
    all.extend(positions.into_values());
    for fact in facts {
        match fact {
            Fact::Outbox { output, seq, .. } => {
                let owed = confirmed
                    .get(output)
                    .is_none_or(|(cursor, beyond)| seq >= cursor && !beyond.contains(seq));
                all.extend(owed.then(|| fact.clone()));
            }
            Fact::DeadLetter { .. } | Fact::DeadLetterRemoved { .. } => all.push(fact.clone()),
            _ => {}
        }
    }
    all.extend(
        confirmed
            .into_iter()
            .map(|(output, (cursor, beyond))| Fact::OutboxConfirmed {
                output,
                cursor,
                beyond,
            }),
    );
    all
}

/// Whether time has passed something that the next tick will see: a rebuilt broker sees it at once.
pub(super) fn is_due(broker: &Broker, now: Timestamp, wall: WallTime) -> bool {
    broker.next_deadline().is_some_and(|at| at <= now)
        || broker.next_wall_deadline().is_some_and(|at| at <= wall)
}

/// A rebuilt broker does not know the date before its first turn.
pub(super) fn learn_date(broker: &mut Broker, now: Timestamp, wall: WallTime) {
    if broker.next_wall_deadline().is_some_and(|at| at <= wall) {
        let mut tx = Tx::default();
        let turn = Turn { now, wall, seed: 0 };
        broker.apply(&mut tx, turn, Command::Tick);
        assert!(tx.facts.is_empty(), "waking writes nothing: {:?}", tx.facts);
    }
}

/// The lines in which two texts differ.
pub(super) fn difference(a: &str, b: &str) -> String {
    let (left, right): (BTreeSet<&str>, BTreeSet<&str>) =
        (a.lines().collect(), b.lines().collect());
    let only = |of: &BTreeSet<&str>, not: &BTreeSet<&str>, sign: &str| -> String {
        let lines: Vec<_> = of
            .difference(not)
            .map(|line| format!("{sign} {line}\n"))
            .collect();
        lines.concat()
    };
    let lines = only(&left, &right, "runs:    ") + &only(&right, &left, "restored:");
    if lines.is_empty() {
        format!("order or repetition of lines\n{a}\n----\n{b}")
    } else {
        lines
    }
}
