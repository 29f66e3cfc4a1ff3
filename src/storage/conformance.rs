//! What every store must do, whatever it is made of: one suite, run against each of them.
//!
//! Random turns go to the store and to a model of maps. Again and again the store is killed, twice before anybody looks, and
//! what it loads and what it reads is compared with the model.

mod model;

use std::sync::Arc;

use bytes::Bytes;

use super::{Read, StorageBatch, Store};
use crate::broker::outcome::Fact;
use crate::broker::types::*;
use model::{Model, Script};

/// Makes a store, or opens it again after a kill of the given one.
pub(crate) trait Reopen {
    /// The store.
    type Store: Store;
    /// A new store for `None`; else what a kill of that one leaves.
    fn reopen(&mut self, killed: Option<Self::Store>) -> Self::Store;
    /// A moment in which a store may work in the background.
    fn pause(&mut self) {}
}

/// Runs the suite.
pub(crate) fn exercise<R: Reopen>(seed: u64, turns: usize, harness: &mut R) {
    let mut store = harness.reopen(None);
    let loaded = store
        .load(&mut |fact| panic!("a new store has {fact:?}"))
        .unwrap();
    assert_eq!(loaded.next_run, 1);
    assert_eq!(loaded.last_wall, WallTime(0));
    let mut script = Script::new(seed);
    let mut model = Model::default();
    let mut kills = 0;
    for turn in 0..turns {
        let writer = store.payloads();
        let facts = script.turn(&mut model, &mut |bytes| writer.write(bytes).unwrap());
        model.apply(&facts);
        let batch = StorageBatch {
            now: script.now,
            facts,
        };
        store.commit(batch).unwrap();
        if script.dice(9) == 0 {
            store.idle(script.dice(200)).unwrap();
        }
        if script.dice(4) == 0 {
            harness.pause();
        }
        if script.dice(6) == 0 {
            check_some_reads(&*store.reader(), &model, &mut script);
        }
        if script.dice(30) == 0 || turn + 1 == turns {
            kills += 1;
            // A first start that is killed again at once must not lose what it replayed.
            for _ in 0..=script.dice(2) {
                store = harness.reopen(Some(store));
                store.load(&mut |_| {}).unwrap();
                harness.pause();
            }
            store = harness.reopen(Some(store));
            let mut found = Model::default();
            let loaded = store.load(&mut |fact| found.apply(&[fact])).unwrap();
            assert_eq!(loaded.now, script.now, "turn {turn}");
            assert_eq!(loaded.next_run, script.next_run, "turn {turn}");
            let open_nodes = model.open_nodes();
            assert!(loaded.from_sled + loaded.from_log >= open_nodes);
            model.assert_resident_equal(&found, turn);
            check_all_reads(&*store.reader(), &model);
        }
    }
    assert!(kills > 0);
    Box::new(store).close().unwrap();
}

/// What was committed is visible at once, also without waiting where that is promised.
fn check_some_reads(reader: &dyn Read, model: &Model, script: &mut Script) {
    let runs: Vec<_> = model.runs.iter().collect();
    if runs.is_empty() {
        return;
    }
    let (run, known) = runs[script.dice(runs.len() as u64) as usize];
    assert_eq!(reader.run(*run).unwrap().as_ref(), Some(&known.record));
    if known.nodes.is_empty() {
        return;
    }
    let index = script.dice(known.nodes.len() as u64) as u32;
    let key = NodeKey::new(*run, NodeIndex(index));
    let node = &known.nodes[index as usize];
    assert_eq!(
        reader.arguments(key).unwrap().as_ref(),
        Some(&node.arguments)
    );
    assert_eq!(reader.node(key).unwrap().as_ref(), Some(&node.record));
    assert_eq!(reader.outcome(key).unwrap(), node.outcome);
    if let Some(recent) = reader.recent_arguments(key) {
        assert_eq!(recent, node.arguments);
    }
    if let Some(recent) = reader.recent_outcome(key) {
        assert_eq!(Some(recent), node.outcome);
    }
    let after = script.dice(known.events.len() as u64 + 2);
    let limit = 1 + script.dice(7) as usize;
    let events = reader.events(*run, after, limit).unwrap();
    let expected: Vec<_> = known
        .events
        .iter()
        .filter(|e| e.seq > after)
        .take(limit)
        .cloned()
        .collect();
    assert_eq!(events, expected, "events of {run:?} after {after}");
}

fn check_all_reads(reader: &dyn Read, model: &Model) {
    for (run, known) in &model.runs {
        assert_eq!(reader.run(*run).unwrap().as_ref(), Some(&known.record));
        let mut after = 0;
        let mut events = Vec::new();
        loop {
            let page = reader.events(*run, after, 13).unwrap();
            let Some(last) = page.last() else { break };
            after = last.seq;
            events.extend(page);
        }
        assert_eq!(events, known.events, "events of {run:?}");
        let mut outcomes = Vec::new();
        for (node, index) in known.nodes.iter().zip(0..) {
            let key = NodeKey::new(*run, NodeIndex(index));
            assert_eq!(
                reader.arguments(key).unwrap().as_ref(),
                Some(&node.arguments)
            );
            assert_eq!(reader.node(key).unwrap().as_ref(), Some(&node.record));
            for payload in node.payloads() {
                if let Body::Stored(at) = &payload.body {
                    let expected = &model.stored[at];
                    assert_eq!(&reader.payload(*at).unwrap(), expected);
                }
            }
            if let Some(outcome) = &node.outcome {
                outcomes.push((NodeIndex(index), outcome.clone()));
            }
        }
        let count = known.nodes.len() as u32;
        let found = reader
            .outcomes(*run, NodeIndex(0), count, usize::MAX)
            .unwrap();
        assert_eq!(found, outcomes);
        let few = reader.outcomes(*run, NodeIndex(0), count, 1).unwrap();
        assert_eq!(few.len(), outcomes.len().min(1), "one is always given");
        // The facts of a run, open or ended, are the ones to adopt it.
        let mut told = Model::default();
        assert!(
            reader
                .run_facts(*run, &mut |fact| told.apply(&[fact]))
                .unwrap()
        );
        told.runs[run].assert_same_graph(known, *run);
    }
    let gone = RunSeq(u64::MAX - 1);
    assert!(!reader.run_facts(gone, &mut |_| {}).unwrap());
    assert_eq!(reader.run(gone).unwrap(), None);

    let mut listed = Vec::new();
    let mut before = None;
    loop {
        let page = reader.runs(before, 3).unwrap();
        let Some((last, _)) = page.last() else { break };
        before = Some(*last);
        listed.extend(page);
    }
    let known: Vec<_> = model
        .runs
        .iter()
        .rev()
        .map(|(run, known)| (*run, known.record.clone()))
        .collect();
    assert_eq!(listed, known);

    let limit = Timestamp(model.latest.0 / 2);
    let mut ended = Vec::new();
    let mut first = Some(RunSeq(0));
    while let Some(from) = first {
        let (page, next) = reader.ended_runs(from, limit, 2).unwrap();
        ended.extend(page);
        first = next;
    }
    let known: Vec<_> = model
        .runs
        .iter()
        .filter(|(_, known)| known.record.ended.is_some_and(|at| at < limit))
        .map(|(run, _)| *run)
        .collect();
    assert_eq!(ended, known);

    for output in [NameId(0), NameId(1)] {
        let found = reader.outbox(output, 0, usize::MAX).unwrap();
        let known: Vec<_> = model
            .outbox
            .range((output, 0)..=(output, u64::MAX))
            .map(|(_, record)| *record)
            .collect();
        assert_eq!(found, known);
        let letters = reader.dead_letters(output, 0, usize::MAX).unwrap();
        let known: Vec<_> = model
            .letters
            .range((output, 0)..=(output, u64::MAX))
            .map(|((_, seq), letter)| (*seq, letter.clone()))
            .collect();
        assert_eq!(letters, known);
    }
}

/// A store in memory, with and without a log.
struct InMemory(usize);

impl Reopen for InMemory {
    type Store = super::memory::MemoryStore;

    fn reopen(&mut self, killed: Option<Self::Store>) -> Self::Store {
        killed.map_or_else(
            || super::memory::MemoryStore::with_log(self.0),
            |store| store.crash(),
        )
    }
}

#[test]
fn the_store_in_memory_conforms() {
    for (seed, log) in [(1, 0), (2, 1), (3, 40)] {
        exercise(seed, 400, &mut InMemory(log));
    }
}

#[test]
fn a_lost_commit_is_lost_and_an_unseen_one_kept() {
    use super::memory::{Fault, MemoryStore};
    for fault in [Fault::Lost, Fault::KeptUnseen] {
        let mut store = MemoryStore::new();
        store.load(&mut |_| {}).unwrap();
        store.fail_commit(2, fault);
        let batch = |id| StorageBatch {
            now: Timestamp(1),
            facts: vec![Fact::Name {
                id: NameId(id),
                name: Arc::from("n"),
            }],
        };
        store.commit(batch(1)).unwrap();
        assert!(store.commit(batch(2)).is_err());
        assert!(store.commit(batch(3)).is_err(), "G17");
        let mut count = 0;
        store.crash().load(&mut |_| count += 1).unwrap();
        assert_eq!(count, if fault == Fault::Lost { 1 } else { 2 });
    }
}

/// Bytes of a length.
fn filled(n: u8, length: usize) -> Bytes {
    vec![n; length].into()
}
