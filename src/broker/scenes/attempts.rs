//! Attempts and leases: who may end one, and what follows.

use super::*;

#[test]
fn a_completion_counts_once_and_only_for_the_current_lease() {
    let mut scene = Scene::new();
    let run = scene
        .submit(graph(&[spec("a")], vec![node(0, &[]), node(0, &[])], 0))
        .unwrap()
        .run;
    scene.worker(W1, &[spec("a")], 1);
    let lease = scene.lease();
    let other = Lease {
        attempt: Attempt(2),
        ..lease.clone()
    };
    assert_eq!(
        scene.finish(&other, value()),
        ["LEASE_UNKNOWN"],
        "never began"
    );
    let forged = Lease {
        token: LeaseToken([9; 16]),
        ..lease.clone()
    };
    assert_eq!(scene.finish(&forged, value()), ["LEASE_UNKNOWN"], "forged");
    let blank = Lease {
        token: LeaseToken([0; 16]),
        ..lease.clone()
    };
    assert_eq!(
        scene.finish(&blank, value()),
        ["LEASE_UNKNOWN"],
        "only a release goes without"
    );
    assert_eq!(scene.finish(&lease, value()), ["ok"]);
    assert_eq!(scene.finish(&lease, value()), ["ok"], "repetition");
    let changed = Scene::completion(&lease, 8, value());
    assert_eq!(
        scene.done(Command::Finish(vec![changed])),
        ["COMPLETION_CONFLICT"]
    );
    assert_eq!(scene.states(run), "succeeded ready");

    scene.apply(Command::Credit {
        session: W1,
        calls: 1,
    });
    let second = scene.lease();
    scene.tick(30_000);
    assert_eq!(
        scene.states(run),
        "succeeded ready",
        "a silent session lost its lease"
    );
    assert_eq!(scene.finish(&second, value()), ["LEASE_EXPIRED"]);
    scene.apply(Command::Touch(vec![W1]));
    scene.apply(Command::Credit {
        session: W1,
        calls: 1,
    });
    let third = scene.lease();
    assert_eq!(third.attempt, Attempt(2));
    assert_eq!(
        scene.finish(&second, value()),
        ["LEASE_EXPIRED"],
        "older attempt"
    );
    let release = Lease {
        token: LeaseToken([0; 16]),
        ..third.clone()
    };
    assert_eq!(scene.finish(&release, AttemptEnd::Released), ["ok"]);
    scene.apply(Command::Credit {
        session: W1,
        calls: 1,
    });
    let fourth = scene.lease();
    scene.done(Command::Cancel {
        run,
        reason: "enough".into(),
    });
    assert_eq!(scene.states(run), "succeeded cancelled");
    assert_eq!(scene.finish(&fourth, value()), ["LEASE_REVOKED"]);
    assert_eq!(
        scene.finish(&lease, value()),
        ["ok"],
        "repetition, after the run has ended"
    );
}

#[test]
fn a_late_completion_counts_until_the_sweep() {
    let mut scene = Scene::new();
    let run = scene.submit(single(spec("a"))).unwrap().run;
    scene.worker(W1, &[spec("a")], 1);
    let lease = scene.lease();
    scene.now += 40_000;
    assert_eq!(scene.finish(&lease, value()), ["ok"]);
    assert_eq!(scene.states(run), "succeeded");
}

#[test]
fn losses_quarantine_failures_exhaust_releases_do_neither() {
    let mut scene = Scene::new();
    let retry = Retry {
        max_attempts: 2,
        max_losses: 2,
        delay_ms: 100,
        jitter_milli: 0,
        ..Retry::default()
    };
    let a = Spec { retry, ..spec("a") };
    let one = scene.submit(single(a.clone())).unwrap().run;
    scene.worker(W1, std::slice::from_ref(&a), 1);
    for _ in 0..5 {
        let lease = scene.lease();
        scene.done(Command::Finish(vec![Scene::completion(
            &lease,
            3,
            AttemptEnd::Released,
        )]));
        scene.apply(Command::Credit {
            session: W1,
            calls: 1,
        });
    }
    scene.tick(30_000);
    assert_eq!(scene.states(one), "ready", "one loss");
    scene.apply(Command::Touch(vec![W1]));
    scene.apply(Command::Credit {
        session: W1,
        calls: 1,
    });
    scene.lease();
    scene.tick(30_000);
    assert_eq!(scene.states(one), "failed");
    let record = scene.facts.iter().rev().find_map(|fact| match fact {
        Fact::Node { record, .. } => Some(record.clone()),
        _ => None,
    });
    assert_eq!(
        record.map(|record| (record.note, record.losses)),
        Some((Note::Quarantined, 2))
    );

    let two = scene.submit(single(a)).unwrap().run;
    scene.apply(Command::Touch(vec![W1]));
    scene.apply(Command::Credit {
        session: W1,
        calls: 2,
    });
    let first = scene.lease();
    scene.finish(&first, failed(true));
    assert_eq!(scene.states(two), "backoff");
    assert_eq!(
        scene.reason(two, 0),
        Reason::Backoff {
            until: Timestamp(scene.now + 100),
            failures: 1,
            losses: 0
        }
    );
    assert_eq!(
        scene.broker.next_deadline(),
        Some(Timestamp(scene.now + 100))
    );
    scene.tick(99);
    assert_eq!(scene.states(two), "backoff");
    scene.tick(1);
    let second = scene.lease();
    scene.finish(&second, failed(true));
    assert_eq!(scene.states(two), "failed", "the second of two attempts");

    let three = scene
        .submit(single(Spec { retry, ..spec("a") }))
        .unwrap()
        .run;
    scene.apply(Command::Credit {
        session: W1,
        calls: 1,
    });
    let lease = scene
        .leased()
        .pop()
        .or_else(|| scene.broker_lease())
        .unwrap();
    scene.finish(&lease, failed(false));
    assert_eq!(
        scene.states(three),
        "failed",
        "the policy does not cover it"
    );
}

#[test]
fn the_backstop_ends_an_attempt_its_worker_did_not() {
    let mut scene = Scene::new();
    let a = Spec {
        timeout_ms: Some(1_000),
        ..spec("a")
    };
    let run = scene.submit(single(a.clone())).unwrap().run;
    scene.worker(W1, &[a], 1);
    let lease = scene.lease();
    for _ in 0..3 {
        scene.apply(Command::Touch(vec![W1]));
        scene.tick(10_000);
    }
    assert_eq!(
        scene.states(run),
        "leased",
        "timeout and a lease period are not over"
    );
    scene.apply(Command::Touch(vec![W1]));
    scene.tick(1_000);
    assert_eq!(scene.states(run), "failed");
    assert!(matches!(
        scene.effects[0],
        Effect::Revoke { session: W1, .. }
    ));
    assert_eq!(scene.finish(&lease, value()), ["LEASE_EXPIRED"]);
}

#[test]
fn a_session_keeps_its_leases_for_five_seconds() {
    for (away, kept) in [(4_999, 1), (5_000, 0)] {
        let mut scene = Scene::new();
        let run = scene.submit(single(spec("a"))).unwrap().run;
        scene.worker(W1, &[spec("a")], 5);
        let lease = scene.lease();
        assert_eq!(scene.done(Command::Detach(W1)), ["ok"]);
        assert_eq!(
            scene.broker.next_deadline(),
            Some(Timestamp(scene.now + 5_000))
        );
        scene.submit(single(spec("a"))).unwrap();
        assert!(scene.leased().is_empty(), "credit is forgotten");
        scene.tick(away);
        let leases = scene.worker(W1, &[spec("a")], 0);
        assert_eq!(leases.len(), kept);
        let answer = scene.finish(&lease, value());
        assert_eq!(answer, [if kept == 1 { "ok" } else { "LEASE_EXPIRED" }]);
        assert_eq!(
            scene.states(run),
            if kept == 1 { "succeeded" } else { "ready" }
        );
        assert_eq!(scene.done(Command::Detach(W2)), ["UNKNOWN_SESSION"]);
    }
}
