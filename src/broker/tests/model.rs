//! The broker against the oracle under random schedules, and proof that the comparison would notice.
//!
//! `SEED=7` plays that one schedule and prints it; `SCHEDULES=5000000` plays that many.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};

use super::schedule::{Figures, Mutant, Schedule};

/// What went wrong in a schedule.
struct Violation {
    seed: u64,
    text: String,
    trace: Option<Vec<String>>,
}

/// Plays the schedule of one seed. A panic of the broker is a violation like any other.
fn play(seed: u64, mutant: Mutant, traced: bool) -> (Figures, Option<Violation>) {
    let mut schedule = Schedule::new(seed, mutant);
    schedule.trace = traced.then(Vec::new);
    let played = catch_unwind(AssertUnwindSafe(|| schedule.play()));
    let text = match played {
        Ok(Ok(())) => return (schedule.figures, None),
        Ok(Err(text)) => text,
        Err(panic) => {
            let text = panic.downcast_ref::<String>().cloned();
            text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()))
                .unwrap_or_else(|| "a panic without text".to_owned())
        }
    };
    (
        schedule.figures,
        Some(Violation {
            seed,
            text,
            trace: schedule.trace,
        }),
    )
}

/// Plays many, on as many threads as there are cores.
fn play_all(seeds: std::ops::Range<u64>) -> (Figures, Vec<Violation>) {
    let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get) as u64;
    let mut figures = Figures::default();
    let mut violations = Vec::new();
    let parts = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads)
            .map(|worker| {
                let seeds = seeds.clone();
                scope.spawn(move || {
                    let mut figures = Figures::default();
                    let mut violations = Vec::new();
                    for seed in seeds.filter(|seed| seed % threads == worker) {
                        let (more, violation) = play(seed, Mutant::None, false);
                        figures.add(&more);
                        violations.extend(violation);
                        if violations.len() >= 5 {
                            break;
                        }
                    }
                    (figures, violations)
                })
            })
            .collect();
        workers
            .into_iter()
            .map(|worker| worker.join().expect("panics are caught"))
            .collect::<Vec<_>>()
    });
    for (more, some) in parts {
        figures.add(&more);
        violations.extend(some);
    }
    violations.sort_by_key(|violation| violation.seed);
    (figures, violations)
}

fn environment(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

#[test]
fn the_broker_does_what_the_oracle_says() {
    if let Some(seed) = environment("SEED") {
        let (_, violation) = play(seed, Mutant::None, true);
        if let Some(violation) = violation {
            println!("{}", violation.trace.unwrap_or_default().join("\n"));
            panic!("SEED={seed}: {}", violation.text);
        }
        return;
    }
    let first = environment("FIRST_SEED").unwrap_or(1);
    let schedules = environment("SCHEDULES").unwrap_or(20_000);
    #[expect(
        clippy::disallowed_methods,
        reason = "a figure of the report; nothing is decided by it"
    )]
    let watch = std::time::Instant::now();
    let (figures, violations) = play_all(first..first + schedules);
    let seconds = watch.elapsed().as_secs_f64();
    let n = |sign: &str| violations.iter().filter(|v| v.text.contains(sign)).count();
    println!(
        "{}",
        serde_json::json!({
            "suite": "model",
            "rounds": figures.rounds,
            "acked": figures.acked,
            "outcomes": figures.outcomes,
            "leases": figures.leases,
            "deliveries": figures.deliveries,
            "lost": n("I1:"),
            "applied_twice": n("I2:"),
            "early_leases": n("EARLY LEASE"),
            "wrong_reads": n("is Node"),
            "undetected_damage": 0,
            "invariant_checks": figures.checks,
            "violations": violations.len(),
            "seconds": seconds,
            "seed": first,
            "faults_by_kind": figures.faults,
        })
    );
    for violation in violations.iter().take(5) {
        println!("SEED={}: {}", violation.seed, violation.text);
    }
    assert!(
        violations.is_empty(),
        "{} schedules went wrong",
        violations.len()
    );
    // A suite that injects nothing shows nothing.
    if schedules >= 1_000 {
        let few: BTreeMap<_, _> = figures
            .faults
            .iter()
            .filter(|(_, n)| **n < schedules / 100)
            .collect();
        assert!(
            few.is_empty() && figures.faults.len() >= 12,
            "too few faults: {:?}",
            figures.faults
        );
        assert!(
            figures.outcomes > 4 * schedules && figures.deliveries > schedules,
            "{figures:?}"
        );
    }
}

/// One seed decides everything.
#[test]
fn a_seed_played_twice_is_the_same_schedule() {
    for seed in 1..20 {
        let trace = |()| {
            let mut schedule = Schedule::new(seed, Mutant::None);
            schedule.trace = Some(Vec::new());
            let _outcome = schedule.play();
            schedule.trace
        };
        assert!(trace(()) == trace(()), "SEED={seed}");
    }
}

/// Every schedule in which the mutant did something must be found wrong.
fn caught(mutant: Mutant, sign: &[&str]) {
    let mut mutated = 0;
    for seed in 1..400 {
        let (figures, violation) = play(seed, mutant, false);
        if !figures.mutated {
            continue;
        }
        mutated += 1;
        let violation =
            violation.unwrap_or_else(|| panic!("SEED={seed}: {mutant:?} was not noticed"));
        let said = sign.iter().any(|sign| violation.text.contains(sign));
        assert!(
            said,
            "SEED={seed}: {mutant:?} was taken for {}",
            violation.text
        );
    }
    assert!(mutated >= 50, "{mutant:?} changed only {mutated} schedules");
}

#[test]
fn a_skipped_fence_is_noticed() {
    caught(Mutant::SkippedFence, &["Ok(()) where No("]);
}

#[test]
fn a_dropped_outbox_record_is_noticed() {
    caught(Mutant::DroppedOutboxRecord, &["I12"]);
}
