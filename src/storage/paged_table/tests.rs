//! `PagedTable` against a `BTreeMap`.

use super::super::dice::{one_in, random};
use super::super::digest::PageSum;
use super::*;

type Model = BTreeMap<Place, Vec<u8>>;

fn tree(dir: &tempfile::TempDir) -> ::sled::Db {
    ::sled::Config::new()
        .path(dir.path().join("db"))
        .flush_every_ms(None)
        .open()
        .expect("a new sled")
}

/// A table, its model, and the sum that is kept by differences.
struct Bench {
    tree: ::sled::Db,
    _dir: tempfile::TempDir,
    model: Model,
    sum: PageSum,
    position: u64,
    firsts: BTreeMap<u8, Place>,
}

impl Bench {
    fn new() -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        Self {
            tree: tree(&dir),
            _dir: dir,
            model: Model::new(),
            sum: PageSum::default(),
            position: 0,
            firsts: BTreeMap::new(),
        }
    }

    fn finish(&mut self, change: Change<'_>) {
        for (_, old, new) in change.differences() {
            if let Some(checksum) = old {
                self.sum.remove(checksum);
            }
            if let Some(checksum) = new {
                self.sum.add(checksum);
            }
        }
        let (batch, firsts) = change.into_batch();
        self.firsts.extend(firsts);
        self.tree.apply_batch(batch).expect("a sled batch");
        // Not for durability: sled deadlocks when too many of its buffers are on their way.
        self.tree.flush().expect("a flush");
    }

    fn write(&mut self, rows: &BTreeMap<Place, Option<Vec<u8>>>, budget: usize) {
        let ops: Vec<Op<'_>> = rows
            .iter()
            .map(|(place, value)| Op {
                place: *place,
                value: value.as_deref(),
            })
            .collect();
        let mut at = 0;
        while at < ops.len() {
            self.position += 1;
            let (tree, firsts) = (self.tree.clone(), self.firsts.clone());
            let mut change = Change::new(&tree, self.position, &firsts);
            at += change.apply(b'n', &ops[at..], budget).expect("apply");
            // A second pass over the same change reads what the first one staged.
            if at < ops.len() {
                at += change.apply(b'n', &ops[at..], budget + 1).expect("apply");
            }
            self.finish(change);
        }
        for (place, value) in rows {
            match value {
                Some(value) => drop(self.model.insert(*place, value.clone())),
                None => drop(self.model.remove(place)),
            }
        }
    }

    fn delete(&mut self, first: Place, last: Place, budget: usize) {
        let mut from = first;
        loop {
            self.position += 1;
            let (tree, firsts) = (self.tree.clone(), self.firsts.clone());
            let mut change = Change::new(&tree, self.position, &firsts);
            let progress = change.delete(b'n', from, last, budget).expect("delete");
            assert!(change.touched() <= budget + 4, "bounded");
            self.finish(change);
            match progress {
                Progress::Done => break,
                Progress::At(place) => from = place,
            }
        }
        self.model
            .retain(|place, _| *place < first || *place > last);
    }

    /// Everything that must hold, and the number of pages.
    fn check(&self) -> usize {
        let table = PagedTable::new(&self.tree);
        let mut rows = Model::new();
        let mut sum = PageSum::default();
        let mut pages = 0;
        let mut last = None;
        let mut next = self.firsts.get(&b'n').copied().unwrap_or(NONE);
        for page in table.pages(b'n', (0, 0), LAST) {
            let (key, bytes) = page.expect("a page");
            assert!(bytes.len() <= PAGE_BYTES);
            let view = parse(&key, &bytes).expect("a whole page");
            assert_eq!(key_parts(&key).1, next, "each page names the next one");
            next = view.next();
            for entry in view.entries() {
                assert!(last < Some(entry.place), "pages do not overlap");
                last = Some(entry.place);
                rows.insert(entry.place, entry.value.to_vec());
            }
            sum.add(view.checksum());
            pages += 1;
        }
        assert_eq!(next, NONE, "and the last one none");
        assert_eq!(rows.len(), self.model.len());
        assert_eq!(rows, self.model);
        assert_eq!(sum, self.sum, "differences add up");
        pages
    }

    fn check_reads(&self, seed: &mut u64) {
        let table = PagedTable::new(&self.tree);
        let mut places: Vec<Place> = self.model.keys().copied().step_by(7).collect();
        places.extend((0..20).map(|_| (random(seed) % 40, random(seed) % 3_000)));
        places.sort_unstable();
        places.dedup();
        let many = table.get_many(b'n', &places).expect("get_many");
        for (place, got) in places.iter().zip(many) {
            assert_eq!(got.as_ref(), self.model.get(place), "{place:?}");
            let (_, one) = table.get(b'n', *place).expect("get");
            assert_eq!(one.as_ref(), self.model.get(place), "{place:?}");
        }
    }
}

#[test]
fn random_changes_give_what_a_map_gives() {
    let mut changes = 0;
    for seed in 0..6_u64 {
        let mut seed = seed * 1_000;
        let mut bench = Bench::new();
        for _ in 0..160 {
            let kind = random(&mut seed) % 10;
            if kind < 8 {
                let n = 1 + random(&mut seed) % 300;
                let majors = 1 + random(&mut seed) % 30;
                let base = random(&mut seed) % 3_000;
                let dense = one_in(&mut seed, 2);
                let size = [4, 50, 200, 3_500][(random(&mut seed) % 4) as usize];
                let deletes = one_in(&mut seed, 4);
                let rows = (0..n)
                    .map(|i| {
                        let minor = if dense {
                            base + i
                        } else {
                            random(&mut seed) % 3_000
                        };
                        let place = (random(&mut seed) % majors, minor);
                        let len = (random(&mut seed) % (size + 1)) as usize;
                        let value = (!(deletes && one_in(&mut seed, 2)))
                            .then(|| vec![random(&mut seed) as u8; len]);
                        (place, value)
                    })
                    .collect::<BTreeMap<_, _>>();
                changes += rows.len();
                bench.write(&rows, 1 + (random(&mut seed) % 64) as usize);
            } else {
                let first = (random(&mut seed) % 30, random(&mut seed) % 3_000);
                let last = if kind == 8 {
                    (first.0, u64::MAX)
                } else {
                    (first.0 + random(&mut seed) % 4, random(&mut seed) % 3_000)
                };
                if first <= last {
                    bench.delete(first, last, 1 + (random(&mut seed) % 20) as usize);
                }
            }
            if one_in(&mut seed, 8) {
                bench.check();
                bench.check_reads(&mut seed);
            }
        }
        bench.check();
        bench.delete((0, 0), LAST, 16);
        assert_eq!(bench.check(), 0, "an empty table has no page");
        assert_eq!(bench.sum, PageSum::default());
    }
    assert!(changes > 50_000, "{changes}");
}

#[test]
fn writing_the_same_again_touches_nothing() {
    let mut bench = Bench::new();
    let rows: BTreeMap<Place, Option<Vec<u8>>> = (0..5_000)
        .map(|i| ((1 + i / 900, i), Some(vec![3; 40])))
        .collect();
    bench.write(&rows, usize::MAX);
    let ops: Vec<Op<'_>> = rows
        .iter()
        .map(|(place, value)| Op {
            place: *place,
            value: value.as_deref(),
        })
        .collect();
    let mut change = Change::new(&bench.tree, 99, &bench.firsts);
    assert_eq!(
        change.apply(b'n', &ops, usize::MAX).expect("apply"),
        ops.len()
    );
    assert_eq!(change.touched(), 0);
}

#[test]
fn pages_are_well_filled_when_rows_come_in_order_and_dust_is_swept() {
    let mut bench = Bench::new();
    let mut bytes = 0;
    for window in 0..50_u64 {
        let rows = (0..200)
            .map(|i| ((9, window * 200 + i), Some(vec![5; 60])))
            .collect();
        bench.write(&rows, 64);
        bytes += 200 * 63;
    }
    let pages = bench.check();
    assert!(pages * 3_000 < bytes, "{pages} pages for {bytes} bytes");
    // All but every twentieth row go: what is left shares pages.
    let doomed = (0..10_000)
        .filter(|i| i % 20 != 0)
        .map(|i| ((9, i), None))
        .collect();
    bench.write(&doomed, 64);
    let left = bench.check();
    assert!(left * 4 < pages, "{left} of {pages} pages are left");
}

#[test]
fn a_row_that_is_too_long_is_an_error() {
    let bench = Bench::new();
    let mut change = Change::new(&bench.tree, 1, &bench.firsts);
    let value = vec![0; pages::ROW_BYTES + 1];
    let op = Op {
        place: (1, 1),
        value: Some(&value),
    };
    assert!(change.apply(b'n', &[op], 64).is_err());
}
