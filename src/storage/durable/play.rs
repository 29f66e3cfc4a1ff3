//! The real broker on the real stores: random commands, every commit kept, and at random moments a kill, a load and a comparison.
//! What a store gives back must make the broker it came from, and `verify` must find it sound.
//!
//! `SEED=7` runs one seed, `SEEDS=5000` that many.

use std::cell::Cell;
use std::path::PathBuf;
use std::rc::Rc;

use bytes::Bytes;

use super::*;
use crate::broker::self_check::{Live, Witness, play};
use crate::broker::types::{Body, Codec, Payload, RunSeq};
use crate::storage::dice::{one_in, random};
use crate::storage::memory::MemoryStore;
use crate::storage::verify::{VerifyOptions, verify};

fn body(text: &str) -> Payload {
    Payload {
        codec: Codec::Json,
        body: Body::Inline(Bytes::copy_from_slice(text.as_bytes())),
    }
}

fn run_facts(reader: &dyn Read, run: RunSeq) -> Vec<Fact> {
    let mut facts = Vec::new();
    reader
        .run_facts(run, &mut |fact| facts.push(fact))
        .expect("readable");
    facts
}

/// The store in memory; it is killed after every step.
struct InMemory {
    store: MemoryStore,
    /// Runs are adopted from what it has.
    gives_runs: bool,
}

impl InMemory {
    fn new(seed: u64) -> Self {
        let mut store = MemoryStore::with_log([0, 3, 50][(seed % 3) as usize]);
        store.load(&mut |_| {}).expect("an empty store");
        Self {
            store,
            gives_runs: seed.is_multiple_of(2),
        }
    }
}

impl Witness for InMemory {
    fn commit(&mut self, now: Timestamp, facts: &[Fact]) {
        let facts = facts.to_vec();
        self.store
            .commit(StorageBatch { now, facts })
            .expect("room in memory");
    }

    fn payload(&mut self, text: &str) -> Payload {
        body(text)
    }

    fn facts_of(&mut self, run: RunSeq) -> Option<Vec<Fact>> {
        self.gives_runs
            .then(|| run_facts(&*self.store.reader(), run))
    }

    fn compare(&mut self, live: &Live<'_>) {
        let mut store = self.store.crash();
        live.assert_equal("in memory", |absorb| {
            store.load(absorb).expect("readable").next_run
        });
        self.store = store;
    }
}

/// What all plays on disk came to: a figure of zero proves nothing.
#[derive(Debug, Default)]
struct Counts {
    kills: Cell<u64>,
    verified: Cell<u64>,
    from_sled: Cell<u64>,
    from_log: Cell<u64>,
    stored: Cell<u64>,
    shortened: Cell<u64>,
    /// The least that an invariant was looked at, over all stores verified.
    checked: Cell<u64>,
}

fn add(counter: &Cell<u64>, n: u64) {
    counter.set(counter.get() + n);
}

/// The store on disk.
struct OnDisk {
    dir: tempfile::TempDir,
    options: DurableOptions,
    store: Option<Durable>,
    chance: u64,
    gives_runs: bool,
    counts: Rc<Counts>,
}

impl OnDisk {
    fn new(seed: u64, counts: Rc<Counts>) -> Self {
        let mut chance = seed ^ 0xd15c;
        let options = DurableOptions {
            // From "all of it is in sled" to "sled has only what was there at the start".
            window_ms: [1, 20, 3_600_000][(random(&mut chance) % 3) as usize],
            segment_bytes: 8 << 10,
            payload_segment_bytes: 64 << 10,
            ..DurableOptions::small()
        };
        let mut new = Self {
            dir: tempfile::tempdir().expect("a directory"),
            options,
            store: None,
            chance,
            gives_runs: seed.is_multiple_of(2),
            counts,
        };
        let mut store = new.open();
        store.load(&mut |_| {}).expect("an empty store");
        new.store = Some(store);
        new
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("store")
    }

    fn open(&self) -> Durable {
        Durable::open(&self.path(), self.options).expect("open")
    }

    fn store(&mut self) -> &mut Durable {
        self.store.as_mut().expect("open between two kills")
    }

    /// The store as the last kill left it.
    fn verify(&self, here: &str) {
        let options = VerifyOptions {
            deep: true,
            scratch: Some(self.dir.path().to_owned()),
        };
        let report = verify(&self.path(), &options).expect("a report");
        assert!(report.is_sound(), "{here}: {report:#?}");
        add(&self.counts.verified, 1);
        let sum: u64 = report.invariants.iter().map(|i| i.checked).sum();
        add(&self.counts.checked, sum);
    }
}

impl Witness for OnDisk {
    fn commit(&mut self, now: Timestamp, facts: &[Fact]) {
        let facts = facts.to_vec();
        self.store()
            .commit(StorageBatch { now, facts })
            .expect("durable");
        if one_in(&mut self.chance, 40) {
            let store = self.store();
            store.flush().expect("the state is synced");
            store.tidied_ms = 0; // the next commit shortens the log
        }
    }

    fn payload(&mut self, text: &str) -> Payload {
        if !one_in(&mut self.chance, 8) {
            return body(text);
        }
        let length = 3_000 + (random(&mut self.chance) % 6_000) as usize;
        let bytes = Bytes::from(vec![b' '; length]);
        let at = self.store().payloads().write(bytes).expect("durable");
        add(&self.counts.stored, 1);
        Payload {
            codec: Codec::Json,
            body: Body::Stored(at),
        }
    }

    fn facts_of(&mut self, run: RunSeq) -> Option<Vec<Fact>> {
        let gives = self.gives_runs;
        gives.then(|| run_facts(&*self.store().reader(), run))
    }

    fn compare(&mut self, live: &Live<'_>) {
        if !live.is_last && !one_in(&mut self.chance, 6) {
            return;
        }
        let mut killed = self.store.take().expect("open between two kills");
        add(
            &self.counts.shortened,
            u64::from(
                killed
                    .log
                    .as_ref()
                    .is_some_and(|log| log.first_position() >= 2 * self.options.segment_bytes),
            ),
        );
        match random(&mut self.chance) % 4 {
            0 => Box::new(killed).close().expect("closed"),
            1 => {
                killed.idle(1_000_000).expect("sealed");
                drop(killed);
            }
            _ => drop(killed),
        }
        add(&self.counts.kills, 1);
        if live.is_last || one_in(&mut self.chance, 4) {
            self.verify(&format!("seed {}, command {}", live.seed, live.command));
        }
        let mut store = self.open();
        let mut loaded = Loaded::default();
        live.assert_equal("on disk", |absorb| {
            loaded = store.load(absorb).expect("readable");
            loaded.next_run
        });
        add(&self.counts.from_sled, loaded.from_sled);
        add(&self.counts.from_log, loaded.from_log);
        self.store = Some(store);
    }
}

#[test]
fn a_broker_comes_back_from_memory_as_it_was() {
    let tally = play(100, |seed| Some(Box::new(InMemory::new(seed))));
    println!("{tally:?}");
}

#[test]
fn a_broker_comes_back_from_disk_as_it_was_and_verify_agrees() {
    let counts = Rc::new(Counts::default());
    let tally = play(20, |seed| {
        Some(Box::new(OnDisk::new(seed, Rc::clone(&counts))))
    });
    println!("{tally:?} {counts:?}");
    let Counts {
        kills,
        verified,
        from_sled,
        from_log,
        stored,
        shortened,
        checked,
    } = &*counts;
    if std::env::var("SEED").is_ok() {
        return; // one seed need not meet everything
    }
    for (what, counter) in [
        ("kills", kills),
        ("verified", verified),
        ("from sled", from_sled),
        ("from the log", from_log),
        ("stored", stored),
        ("shortened", shortened),
        ("checked", checked),
    ] {
        assert!(counter.get() > 0, "{what}: 0 in {counts:?}");
    }
}
