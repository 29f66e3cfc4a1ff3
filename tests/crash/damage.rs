//! Damage at rest: bits flipped, files cut or missing, in log, sled and payloads. It must be detected or harmless: never a wrong or a missing
//! answer, never a panic. `FLIPS=n` and `SEED=n` change count and seed.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use dagorama::engine::clock::Stopwatch;

use super::faults::driver::{Ack, Journal, Plan};
use super::faults::{self, Server, Setup};
use super::{SMALL_LOG, scratch, short_life};

/// A store that has been used and killed: `settle` long after the last acknowledgement.
fn used_store(dir: &Path, seed: u64, settle: Duration) -> (PathBuf, Arc<Journal>) {
    let data = dir.join("data");
    let journal = Arc::new(Journal::default());
    let server = Server::start(
        &data,
        &Setup {
            config: SMALL_LOG.into(),
            ..Setup::default()
        },
    )
    .unwrap_or_else(|ended| panic!("{ended:?}"));
    for life in 0..6 {
        short_life(&server, &journal, (seed << 32) + (life << 20));
    }
    // Something that stays open.
    faults::driver::submit(
        &server.url,
        &journal,
        (0..300u64).map(|i| Plan {
            seed: (seed << 32) + (99 << 20) + i,
            width: 0,
            large: false,
        }),
        50,
        86_400_000,
    )
    .unwrap();
    std::thread::sleep(settle);
    server.kill();
    (data, journal)
}

fn files(directory: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(directory).unwrap().flatten() {
        if entry.metadata().unwrap().is_dir() {
            files(&entry.path(), found);
        } else {
            found.push(entry.path());
        }
    }
    found.sort();
}

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap().flatten() {
        let target = to.join(entry.file_name());
        if entry.metadata().unwrap().is_dir() {
            copy(&entry.path(), &target);
        } else {
            std::fs::copy(entry.path(), target).unwrap();
        }
    }
}

fn next(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z ^ (z >> 29)
}

#[derive(Debug, Default)]
struct Tally {
    harmless: u64,
    detected: u64,
    bad: Vec<String>,
}

impl Tally {
    /// Opens a damaged copy and compares it with the acknowledgements.
    fn look(&mut self, what: &str, data: &Path, acks: &[Ack], journal: &Journal) {
        let sent = journal.sent.lock().unwrap().clone();
        let result = std::panic::catch_unwind(|| faults::check::store(data, acks, &sent));
        match result {
            Ok(Ok(_)) => self.harmless += 1,
            Ok(Err(error))
                if ["open:", "load:", "restore:", "unreadable:"]
                    .iter()
                    .any(|start| error.starts_with(start)) =>
            {
                self.detected += 1;
            }
            Ok(Err(error)) => self.bad.push(format!("{what}: {error}")),
            Err(_) => self.bad.push(format!("{what}: panic")),
        }
    }
}

#[test]
fn damage_is_detected_or_harmless() {
    let seed = faults::count("SEED", 1);
    let flips = faults::count("FLIPS", 520);
    let started = Stopwatch::start();
    let mut tally = Tally::default();
    let mut done = 0;
    // Once with everything in sled, once with much of it only in the log (sealed).
    for (settle, share) in [
        (Duration::from_millis(2_500), flips / 2),
        (Duration::from_millis(250), flips - flips / 2),
    ] {
        let dir = scratch(&format!("damage-{}", settle.as_millis()));
        let (data, journal) = used_store(&dir, seed + done, settle);
        let acks: Vec<Ack> = journal
            .acks
            .lock()
            .unwrap()
            .iter()
            .map(|(_, ack)| ack.clone())
            .collect();
        assert!(acks.len() > 300, "too little to lose: {}", acks.len());
        let mut all = Vec::new();
        files(&data, &mut all);
        let relative: Vec<PathBuf> = all
            .iter()
            .map(|path| path.strip_prefix(&data).unwrap().to_owned())
            .filter(|path| path != Path::new("LOCK"))
            .collect();
        let victim = dir.join("victim");
        let mut random = seed ^ 0xda_4a6e;
        let mut damaged = |what: String, change: &mut dyn FnMut(&Path)| {
            drop(std::fs::remove_dir_all(&victim));
            copy(&data, &victim);
            change(&victim);
            tally.look(&what, &victim, &acks, &journal);
        };
        for _ in 0..share {
            // Mostly where there are bytes: zeros at the end of a file are not yet used.
            let file = &relative[(next(&mut random) % relative.len() as u64) as usize];
            let mut bytes = std::fs::read(data.join(file)).unwrap();
            let used = bytes
                .iter()
                .rposition(|byte| *byte != 0)
                .map_or(0, |last| last + 1);
            if used == 0 {
                continue;
            }
            let (at, bit) = (
                (next(&mut random) % used as u64) as usize,
                next(&mut random) % 8,
            );
            bytes[at] ^= 1 << bit;
            damaged(
                format!("bit {bit} of byte {at} of {}", file.display()),
                &mut |victim| std::fs::write(victim.join(file), &bytes).unwrap(),
            );
            done += 1;
        }
        for file in &relative {
            damaged(format!("{} missing", file.display()), &mut |victim| {
                std::fs::remove_file(victim.join(file)).unwrap();
            });
            let length = std::fs::metadata(data.join(file)).unwrap().len();
            damaged(format!("{} cut in half", file.display()), &mut |victim| {
                std::fs::OpenOptions::new()
                    .write(true)
                    .open(victim.join(file))
                    .unwrap()
                    .set_len(length / 2)
                    .unwrap();
            });
            done += 2;
        }
        drop(std::fs::remove_dir_all(&dir));
    }
    println!(
        "{{\"suite\": \"corrupt_flip\", \"damages\": {done}, \"harmless\": {}, \"detected\": {}, \"undetected_damage\": {}, \"seconds\": {}, \"seed\": {seed}}}",
        tally.harmless,
        tally.detected,
        tally.bad.len(),
        started.elapsed().as_secs()
    );
    assert!(
        tally.bad.is_empty(),
        "{} of {done}:\n{}",
        tally.bad.len(),
        tally
            .bad
            .iter()
            .take(20)
            .cloned()
            .collect::<Vec<_>>()
            .join("\n")
    );
    assert!(
        done >= flips && tally.detected > 20,
        "{done} damages, {} detected",
        tally.detected
    );
}
