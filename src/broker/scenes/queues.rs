//! Order, fairness, bundles, reasons, code; and what comes in: keys, messages.

use super::*;

#[test]
fn ready_nodes_leave_by_priority_then_run_then_node() {
    let mut scene = Scene::new();
    let specs = [
        spec("a"),
        Spec {
            priority: 1,
            ..spec("a")
        },
        spec("b"),
    ];
    let first = graph(&specs, vec![node(0, &[]), node(2, &[]), node(0, &[])], 0);
    let second = graph(&specs, vec![node(0, &[]), node(1, &[])], 0);
    let (first, second) = (
        scene.submit(first).unwrap().run,
        scene.submit(second).unwrap().run,
    );
    scene.worker(W1, &[spec("a"), spec("b")], 9);
    let order: Vec<_> = scene
        .leased()
        .iter()
        .map(|lease| (lease.node.run, lease.node.node.0))
        .collect();
    let wanted = [
        (second.seq, 1),
        (first.seq, 0),
        (first.seq, 1),
        (first.seq, 2),
        (second.seq, 0),
    ];
    assert_eq!(order, wanted);
}

#[test]
fn credit_of_one_does_not_starve_the_others() {
    let mut scene = Scene::new();
    scene.worker(W1, &[spec("a")], 1_000);
    scene.worker(W2, &[spec("a")], 1_000);
    let nodes = (0..10).map(|_| node(0, &[])).collect();
    scene.submit(graph(&[spec("a")], nodes, 0)).unwrap();
    let of = |scene: &Scene, id| {
        scene
            .leased()
            .iter()
            .filter(|lease| lease.session == id)
            .count()
    };
    assert_eq!((of(&scene, W1), of(&scene, W2)), (5, 5));
    scene.done(Command::Close(W1));
    assert_eq!(
        (of(&scene, W1), of(&scene, W2)),
        (0, 5),
        "what it held goes to the other"
    );
}

#[test]
fn bundles_leave_full_or_in_time_for_one_credit() {
    let mut scene = Scene::new();
    let batch = Batch {
        max_size: 3,
        max_wait_ms: 50,
    };
    let a = Spec {
        batch: Some(batch),
        ..spec("a")
    };
    scene.worker(W1, std::slice::from_ref(&a), 2);
    let one = scene
        .submit(graph(
            std::slice::from_ref(&a),
            vec![node(0, &[]), node(0, &[])],
            0,
        ))
        .unwrap()
        .run;
    assert!(scene.leased().is_empty());
    let until = Timestamp(scene.now + 50);
    assert_eq!(
        scene.reason(one, 1),
        Reason::BatchFilling {
            ready: 2,
            batch,
            until
        }
    );
    assert_eq!(scene.broker.next_deadline(), Some(until));
    scene.submit(single(a.clone())).unwrap();
    let full = scene.leased();
    assert_eq!(full.len(), 3);
    assert!(
        full.iter()
            .all(|lease| lease.batch == full[0].batch && lease.batch != 0)
    );
    scene.submit(single(a)).unwrap();
    scene.tick(49);
    assert!(scene.leased().is_empty());
    scene.tick(1);
    let due = scene.lease();
    assert!(due.batch != 0 && due.batch != full[0].batch);
    assert_eq!(
        scene.finish(&full[1], failed(false)),
        ["ok"],
        "each element has its own lease"
    );
    assert_eq!(scene.states(one), "leased failed");
}

#[test]
fn every_node_that_does_not_run_has_its_reason() {
    let mut scene = Scene::new();
    let tainted = Spec {
        taint: Some("gpu".into()),
        ..spec("t")
    };
    let pinned = Spec {
        fingerprint: Some("v1".into()),
        pin_code: true,
        ..spec("p")
    };
    let named = Spec {
        by_name: true,
        ..spec("n")
    };
    let elsewhere = Spec {
        queue: "q".into(),
        ..spec("e")
    };
    let later = |delay| NewNode {
        delay,
        ..node(5, &[])
    };
    let nodes = vec![
        node(0, &[]),
        node(1, &[]),
        node(2, &[]),
        node(3, &[]),
        node(4, &[]),
        later(Delay::For(70)),
        later(Delay::Until(WallTime(60_000))),
        node(5, &[]),
        node(5, &[]),
    ];
    let specs = [
        tainted,
        pinned.clone(),
        named,
        elsewhere,
        spec("absent"),
        spec("a"),
    ];
    let run = scene.submit(graph(&specs, nodes, 0)).unwrap().run;
    scene.worker(
        W1,
        &[
            spec("t"),
            Spec {
                fingerprint: Some("v2".into()),
                ..spec("p")
            },
            spec("a"),
        ],
        1,
    );
    let due = Timestamp(scene.now + 70);
    for (node, reason) in [
        (0, Reason::NoWorkerTolerates("gpu".into())),
        (1, Reason::NoWorkerHasCode("v1".into())),
        (2, Reason::NeverAnnounced("n".into())),
        (3, Reason::NoWorkerOnQueue("q".into())),
        (4, Reason::NoWorkerHasAction("absent".into())),
        (5, Reason::Delayed(due)),
        (6, Reason::DelayedUntil(WallTime(60_000))),
        (7, Reason::Leased(W1)),
        (8, Reason::WorkersBusy),
    ] {
        assert_eq!(scene.reason(run, node), reason, "node {node}");
    }
    let Answer::Explained(all) = scene.query(&Query::Explain {
        run,
        node: None,
        limit: 99,
    }) else {
        panic!()
    };
    assert_eq!(all.len(), 8, "all but the one that runs");
    assert_eq!(scene.broker.next_wall_deadline(), Some(WallTime(60_000)));
    // Each obstacle goes, and the node with it.
    scene.worker(W2, &[pinned.clone(), spec("n")], 9);
    let leased = scene.leased();
    let nodes: Vec<u32> = leased.iter().map(|lease| lease.node.node.0).collect();
    assert_eq!(nodes, [1, 2]);
    assert_eq!(
        scene.broker.spec(leased[1].spec).map(|spec| spec.by_name),
        Some(false)
    );
    scene.worker(W1, &[spec("a")], 9);
    scene.wall = 60_000;
    scene.tick(70);
    let mut nodes: Vec<u32> = scene
        .leased()
        .iter()
        .map(|lease| lease.node.node.0)
        .collect();
    nodes.sort_unstable();
    assert_eq!(nodes, [5, 6]);
}

#[test]
fn other_code_runs_unless_it_is_pinned_and_resuming_takes_the_newest() {
    let mut scene = Scene::new();
    let code = |mark: &str, pin_code| Spec {
        fingerprint: Some(mark.into()),
        pin_code,
        ..spec("a")
    };
    let nodes = vec![node(0, &[]), node(1, &[])];
    let run = scene
        .submit(graph(&[code("v1", false), code("v1", true)], nodes, 0))
        .unwrap()
        .run;
    scene.worker(W1, &[code("v2", true)], 9);
    let lease = scene.lease();
    assert_eq!(
        (lease.node.node, lease.note),
        (NodeIndex(0), Note::OtherCode)
    );
    scene.done(Command::Cancel {
        run,
        reason: "".into(),
    });
    scene.done(Command::Resume(run));
    let mut seen: Vec<_> = scene
        .leased()
        .iter()
        .map(|lease| (lease.node.node.0, lease.note))
        .collect();
    seen.sort_unstable();
    assert_eq!(seen, [(0, Note::None), (1, Note::None)], "both take v2 now");
}

#[test]
fn keys_name_the_first_run_for_their_window_and_as_long_as_it_is_kept() {
    let mut scene = Scene::with(Settings {
        dedup_window_ms: 1_000,
        ..Settings::default()
    });
    let key = SubmissionKey {
        hash: KeyHash(5),
        content: 9,
    };
    let keyed = |content| Submission {
        key: Some(SubmissionKey { content, ..key }),
        ..single(spec("a"))
    };
    let first = scene.submit(keyed(9)).unwrap();
    assert!(!first.existing);
    assert_eq!(
        scene.submit(keyed(9)).unwrap(),
        Submitted {
            existing: true,
            ..first
        }
    );
    assert_eq!(
        scene.submit(keyed(8)).unwrap_err().code,
        Code::SubmissionConflict
    );
    scene.done(Command::Cancel {
        run: first.run,
        reason: "".into(),
    });
    scene.tick(5_000);
    assert!(
        scene.submit(keyed(9)).unwrap().existing,
        "long after the window: the run is kept"
    );
    assert_eq!(scene.done(Command::Expire(vec![first.run.seq])), ["ok"]);
    let second = scene.submit(keyed(9)).unwrap();
    assert!(!second.existing, "window and run are gone");
    scene.done(Command::Cancel {
        run: second.run,
        reason: "".into(),
    });
    scene.done(Command::Expire(vec![second.run.seq]));
    let no = scene.submit(keyed(9)).unwrap_err();
    assert_eq!(no.code, Code::RunExpired);
    assert!(no.message.contains(&second.run.to_string()), "{no}");
    scene.tick(1_000);
    assert!(!scene.submit(keyed(9)).unwrap().existing);
}

#[test]
fn a_message_behind_a_refused_one_of_its_partition_is_not_taken() {
    let mut scene = Scene::new();
    let message = |partition: &str, position, key: u128, content| Submission {
        key: Some(SubmissionKey {
            hash: KeyHash(key),
            content,
        }),
        origin: Some(Origin {
            route: "in".into(),
            identity: Identity::Position {
                partition: partition.into(),
                position,
                next: position + 1,
            },
        }),
        ..single(spec("a"))
    };
    scene.submit(message("p", 0, 7, 1)).unwrap();
    let Reply::Submitted(replies) = scene.apply(Command::Submit(vec![
        message("p", 1, 7, 2),
        message("p", 2, 8, 1),
        message("q", 0, 9, 1),
    ])) else {
        panic!("submissions");
    };
    let codes: Vec<Option<Code>> = replies
        .iter()
        .map(|reply| reply.as_ref().err().map(|no| no.code))
        .collect();
    assert_eq!(
        codes,
        [Some(Code::SubmissionConflict), Some(Code::Overloaded), None]
    );
    // The refused one still has its place, so whoever begins anew after a crash finds it.
    assert!(!scene.submit(message("p", 1, 10, 1)).unwrap().existing);
    assert!(!scene.submit(message("p", 2, 8, 1)).unwrap().existing);
}

#[test]
fn messages_apply_once_and_die_once() {
    let mut scene = Scene::with(Settings {
        max_keys: 2,
        ..Settings::default()
    });
    let from = |identity| Origin {
        route: "in".into(),
        identity,
    };
    let at = |position| Identity::Position {
        partition: "p".into(),
        position,
        next: position + 10,
    };
    let message = |identity| Submission {
        origin: Some(from(identity)),
        ..single(spec("a"))
    };
    assert!(!scene.submit(message(at(0))).unwrap().existing);
    assert!(scene.submit(message(at(0))).unwrap().existing);
    assert!(
        scene.submit(message(at(9))).unwrap().existing,
        "before the next one"
    );
    assert!(!scene.submit(message(at(10))).unwrap().existing);
    scene.done(Command::SeekInbox {
        route: "in".into(),
        partition: "p".into(),
        next: 0,
    });
    assert!(
        !scene.submit(message(at(0))).unwrap().existing,
        "a wanted seek"
    );
    let position = Query::Position {
        route: "in".into(),
        partition: "p".into(),
    };
    assert_eq!(scene.query(&position), Answer::Position(10));

    let letter = |identity| {
        Command::DeadLetter(vec![DeadLetter {
            origin: from(identity),
            code: "X".into(),
            reason: "x".into(),
            attempts: 5,
            coordinates: BTreeMap::new(),
            body: payload("?"),
        }])
    };
    let letters = |scene: &Scene| {
        scene
            .facts
            .iter()
            .filter(|fact| matches!(fact, Fact::DeadLetter { .. }))
            .count()
    };
    let key = |n| Identity::Key(KeyHash(n));
    assert_eq!(scene.done(letter(key(1))), ["ok"]);
    assert_eq!(scene.done(letter(key(1))), ["ok"], "repetition");
    assert_eq!(letters(&scene), 1);
    assert!(scene.submit(message(key(1))).unwrap().existing, "it died");
    assert!(!scene.submit(message(key(2))).unwrap().existing);
    assert_eq!(
        scene.submit(message(key(3))).unwrap_err().code,
        Code::InboxWindowFull
    );
    let replay = Identity::DeadLetter { seq: 1 };
    let pickle = Submission {
        nodes: vec![NewNode {
            arguments: Payload {
                codec: Codec::Pickle,
                ..payload("x")
            },
            ..node(0, &[])
        }],
        ..message(replay.clone())
    };
    assert_eq!(scene.submit(pickle).unwrap_err().code, Code::CodecRefused);
    assert!(!scene.submit(message(replay.clone())).unwrap().existing);
    assert_eq!(
        scene.submit(message(replay)).unwrap_err().code,
        Code::UnknownName,
        "replayed already"
    );
    assert_eq!(
        scene.done(Command::DropDeadLetter {
            route: "in".into(),
            seq: 1
        }),
        ["UNKNOWN_NAME"]
    );
}
