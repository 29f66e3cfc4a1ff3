//! Dependents, promises, children, rounds, limits.

use super::*;

#[test]
fn an_edge_decides_what_a_failure_does_to_its_dependent() {
    for (mode, fails, wanted) in [
        (InputUse::Value, false, "succeeded ready"),
        (InputUse::After, false, "succeeded ready"),
        (InputUse::Outcome, false, "succeeded ready"),
        (InputUse::Value, true, "failed skipped"),
        (InputUse::After, true, "failed skipped"),
        (InputUse::Outcome, true, "failed ready"),
    ] {
        let mut scene = Scene::new();
        let nodes = vec![node(0, &[]), node(0, &[after(0, mode)])];
        let run = scene.submit(graph(&[spec("a")], nodes, 1)).unwrap().run;
        scene.worker(W1, &[spec("a")], 1);
        let lease = scene.lease();
        assert_eq!(scene.states(run), "leased waiting");
        assert_eq!(scene.reason(run, 1), Reason::Inputs { remaining: 1 });
        scene.finish(&lease, if fails { failed(false) } else { value() });
        assert_eq!(scene.states(run), wanted, "{mode:?}");
        assert_eq!(scene.root_settled(), wanted.ends_with("skipped"));
    }
}

#[test]
fn skipping_is_sliced_and_blames_the_first_failure() {
    let mut scene = Scene::with(Settings {
        slice: 3,
        ..Settings::default()
    });
    // A chain of 8 behind one failure.
    let nodes = (0..9)
        .map(|at| {
            if at == 0 {
                node(0, &[])
            } else {
                node(0, &[after(at - 1, InputUse::Value)])
            }
        })
        .collect();
    let run = scene.submit(graph(&[spec("a")], nodes, 8)).unwrap().run;
    scene.worker(W1, &[spec("a")], 1);
    let lease = scene.lease();
    scene.finish(&lease, failed(false));
    assert_eq!(
        scene.states(run),
        "failed skipped skipped skipped waiting waiting waiting waiting waiting"
    );
    assert_eq!(
        scene.broker.next_deadline(),
        Some(Timestamp(scene.now)),
        "wants to go on at once"
    );
    scene.tick(0);
    scene.tick(0);
    assert!(scene.root_settled());
    let Answer::Nodes(nodes) = scene.query(&Query::Nodes {
        run,
        first: NodeIndex(1),
        limit: 9,
    }) else {
        panic!()
    };
    assert!(
        nodes.iter().all(|node| node.cause == Some(NodeIndex(0))),
        "{nodes:?}"
    );
}

#[test]
fn a_tail_call_is_followed_by_dependents_root_and_outputs() {
    let rule = OutputRule {
        name: "out".into(),
        action: "a".into(),
        succeeded: true,
        failed: true,
    };
    let mut scene = Scene::with(Settings {
        outputs: vec![rule],
        ..Settings::default()
    });
    let nodes = vec![node(0, &[]), node(1, &[after(0, InputUse::Value)])];
    let specs = [spec("a"), spec("b")];
    let run = scene.submit(graph(&specs, nodes, 0)).unwrap().run;
    scene.worker(W1, &specs, 9);
    let lease = scene.lease();
    let tail = AttemptEnd::Tail(NodeRef::New(0));
    scene.with_children(&lease, tail.clone(), &[spec("b")], vec![node(0, &[])]);
    assert_eq!(scene.states(run), "settling waiting leased");
    assert_eq!(scene.reason(run, 0), Reason::Settling { remaining: 1 });
    let lease = scene.lease();
    scene.with_children(&lease, tail, &[spec("b")], vec![node(0, &[])]);
    assert_eq!(scene.states(run), "settling waiting settling leased");
    assert!(!scene.root_settled() && scene.owed().is_empty());
    let lease = scene.lease();
    scene.finish(&lease, value());
    assert_eq!(scene.states(run), "succeeded leased succeeded succeeded");
    assert!(scene.root_settled());
    assert_eq!(scene.owed(), [(1, NodeIndex(0), 1)]);
    let value_of = Query::Value(NodeKey::new(run.seq, NodeIndex(0)));
    assert_eq!(
        scene.query(&value_of),
        Answer::Value {
            node: NodeIndex(3),
            state: NodeState::Succeeded
        }
    );
    assert_eq!(
        scene.done(Command::ConfirmOutbox {
            output: "out".into(),
            seqs: vec![2]
        }),
        ["INVALID_REQUEST"]
    );
    assert_eq!(
        scene.done(Command::ConfirmOutbox {
            output: "no".into(),
            seqs: vec![1]
        }),
        ["UNKNOWN_NAME"]
    );
    let last = scene.broker_lease().unwrap();
    scene.finish(&last, value());
    assert_eq!(
        scene.done(Command::Expire(vec![run.seq])),
        ["RUN_NOT_ENDED"],
        "owes a delivery"
    );
    assert_eq!(
        scene.done(Command::ConfirmOutbox {
            output: "out".into(),
            seqs: vec![1, 1]
        }),
        ["ok"]
    );
    assert_eq!(
        scene.done(Command::ConfirmOutbox {
            output: "out".into(),
            seqs: vec![1]
        }),
        ["ok"],
        "repetition"
    );
    assert_eq!(
        scene.done(Command::Expire(vec![run.seq, RunSeq(99)])),
        ["ok", "UNKNOWN_RUN"]
    );
}

#[test]
fn a_structure_settles_when_its_references_have() {
    for fails in [false, true] {
        let mut scene = Scene::new();
        let run = scene.submit(single(spec("a"))).unwrap().run;
        scene.worker(W1, &[spec("a")], 3);
        let lease = scene.lease();
        let references = vec![NewInput {
            first: NodeRef::New(0),
            count: 2,
            mode: InputUse::Value,
        }];
        let end = AttemptEnd::Structure {
            body: payload("[]"),
            references,
        };
        scene.with_children(&lease, end, &[spec("a")], vec![node(0, &[]), node(0, &[])]);
        assert_eq!(scene.states(run), "settling leased leased");
        let (one, two) = (scene.leased()[0].clone(), scene.leased()[1].clone());
        scene.finish(&one, value());
        assert_eq!(scene.states(run), "settling succeeded leased");
        scene.finish(&two, if fails { failed(false) } else { value() });
        assert_eq!(
            scene.states(run),
            if fails {
                "failed succeeded failed"
            } else {
                "succeeded succeeded succeeded"
            }
        );
        if fails {
            assert_eq!(scene.done(Command::Resume(run)), ["ok"]);
            assert_eq!(
                scene.states(run),
                "settling succeeded ready",
                "the body is not run again"
            );
            scene.apply(Command::Credit {
                session: W1,
                calls: 1,
            });
            let again = scene.lease();
            assert_eq!(again.attempt, Attempt(2));
            scene.finish(&again, value());
            assert_eq!(scene.states(run), "succeeded succeeded succeeded");
            assert_eq!(scene.done(Command::Resume(run)), ["ok"], "nothing to do");
        }
    }
}

#[test]
fn cancel_and_resume_change_what_is_open_and_nothing_else() {
    let mut scene = Scene::new();
    let nodes = vec![
        node(0, &[]),
        node(0, &[]),
        node(0, &[after(1, InputUse::Value)]),
    ];
    let run = scene.submit(graph(&[spec("a")], nodes, 2)).unwrap().run;
    assert_eq!(scene.done(Command::Resume(run)), ["RUN_NOT_ENDED"]);
    scene.worker(W1, &[spec("a")], 2);
    let leases = scene.leased();
    scene.finish(&leases[0], value());
    assert_eq!(
        scene.done(Command::Cancel {
            run,
            reason: "r".into()
        }),
        ["ok"]
    );
    assert!(scene.root_settled());
    let stop = Effect::Revoke {
        session: W1,
        node: leases[1].node,
        attempt: Attempt(1),
    };
    assert!(scene.effects.contains(&stop));
    assert_eq!(scene.states(run), "succeeded cancelled cancelled");
    assert_eq!(
        scene.done(Command::Cancel {
            run,
            reason: "again".into()
        }),
        ["ok"],
        "repetition"
    );
    let stranger = RunId { salt: 1, ..run };
    assert_eq!(
        scene.done(Command::Cancel {
            run: stranger,
            reason: "".into()
        }),
        ["UNKNOWN_RUN"]
    );
    assert_eq!(scene.done(Command::Resume(run)), ["ok"]);
    assert_eq!(scene.states(run), "succeeded ready waiting");
    assert_eq!(
        scene.finish(&leases[1], value()),
        ["LEASE_EXPIRED"],
        "of the round before"
    );
    let Answer::Run(summary) = scene.query(&Query::Run(run)) else {
        panic!()
    };
    assert_eq!((summary.round, summary.state), (2, RunState::Running));
}

#[test]
fn flushed_children_are_the_same_for_every_attempt() {
    let mut scene = Scene::new();
    let retry = Retry {
        max_attempts: 2,
        delay_ms: 0,
        ..Retry::default()
    };
    let a = Spec { retry, ..spec("a") };
    let run = scene.submit(single(a.clone())).unwrap().run;
    scene.worker(W1, &[a], 1);
    let flush = |lease: &Lease, first_child, children: Vec<NewNode>, action: &str| {
        Command::CreateChildren(CreateChildren {
            node: lease.node,
            attempt: lease.attempt,
            token: lease.token,
            first_child,
            specs: vec![Arc::new(spec(action))],
            children,
        })
    };
    let created = |reply| match reply {
        Reply::Created(result) => result.map_err(|no| no.code),
        other => panic!("{other:?}"),
    };
    let lease = scene.lease();
    let two = || vec![node(0, &[]), node(0, &[after(0, InputUse::Value)])];
    let own = |first| {
        vec![node(
            0,
            &[(NodeRef::Existing(NodeIndex(first)), 1, InputUse::Value)],
        )]
    };
    assert_eq!(
        created(scene.apply(flush(&lease, 0, two(), "b"))),
        Ok(NodeIndex(1))
    );
    assert_eq!(
        created(scene.apply(flush(&lease, 0, two(), "b"))),
        Ok(NodeIndex(1)),
        "repetition"
    );
    assert_eq!(
        created(scene.apply(flush(&lease, 2, own(2), "b"))),
        Ok(NodeIndex(3))
    );
    assert_eq!(
        created(scene.apply(flush(&lease, 5, own(2), "b"))),
        Err(Code::InvalidRequest),
        "a gap"
    );
    assert_eq!(
        created(scene.apply(flush(&lease, 3, own(0), "b"))),
        Err(Code::GraphCycle),
        "its parent"
    );
    assert_eq!(
        created(scene.apply(flush(&lease, 3, own(9), "b"))),
        Err(Code::UnknownNode)
    );
    assert_eq!(
        created(scene.apply(flush(&lease, 3, vec![], "b"))),
        Err(Code::InvalidRequest)
    );
    scene.finish(&lease, failed(true));
    scene.apply(Command::Credit {
        session: W1,
        calls: 1,
    });
    let again = scene.lease();
    assert_eq!(again.attempt, Attempt(2));
    assert_eq!(
        created(scene.apply(flush(&lease, 0, two(), "b"))),
        Err(Code::LeaseExpired)
    );
    assert_eq!(
        created(scene.apply(flush(&again, 0, two(), "c"))),
        Err(Code::NodeConflict)
    );
    // Flushed at another place: two that exist, one that exists apart, one that is new.
    let mut four = two();
    four.push(node(0, &[after(1, InputUse::Value)]));
    four.push(node(
        0,
        &[after(0, InputUse::Value), after(2, InputUse::Outcome)],
    ));
    assert_eq!(
        created(scene.apply(flush(&again, 0, four, "b"))),
        Ok(NodeIndex(1))
    );
    assert_eq!(scene.states(run), "leased ready waiting waiting waiting");
}

#[test]
fn graphs_that_break_a_rule_or_a_limit_leave_nothing() {
    let settings = Settings {
        max_nodes_per_run: 4,
        max_edges_per_run: 3,
        max_inputs: 2,
        max_children: 2,
        max_depth: 1,
        max_open_nodes: 6,
        ..Settings::default()
    };
    let mut scene = Scene::with(settings);
    let a = [spec("a")];
    let many = |n| (0..n).map(|_| node(0, &[])).collect::<Vec<_>>();
    let range = |first, count| (NodeRef::New(first), count, InputUse::Value);
    let with = |n: u32, inputs: &[(NodeRef, u32, InputUse)]| {
        let mut nodes = many(n);
        nodes.push(node(0, inputs));
        nodes
    };
    let big = NewNode {
        arguments: payload(&"x".repeat(3_073)),
        ..node(0, &[])
    };
    for (nodes, root, code) in [
        (many(0), 0, "INVALID_REQUEST"),
        (many(1), 1, "INVALID_REQUEST"),
        (vec![node(1, &[])], 0, "INVALID_REQUEST"),
        (many(5), 0, "GRAPH_TOO_LARGE"),
        (with(2, &[range(0, 2), range(0, 1)]), 0, "GRAPH_TOO_LARGE"),
        (with(2, &[range(1, 2)]), 0, "GRAPH_CYCLE"),
        (with(2, &[range(2, 1)]), 0, "GRAPH_CYCLE"),
        (with(2, &[range(3, 1)]), 0, "UNKNOWN_NODE"),
        (with(2, &[range(u32::MAX, u32::MAX)]), 0, "GRAPH_TOO_LARGE"),
        (with(1, &[range(0, 0)]), 0, "INVALID_REQUEST"),
        (
            with(1, &[(NodeRef::Existing(NodeIndex(0)), 1, InputUse::After)]),
            0,
            "UNKNOWN_NODE",
        ),
        (vec![big], 0, "PAYLOAD_TOO_LARGE"),
    ] {
        let no = scene.submit(graph(&a, nodes, root)).unwrap_err();
        assert_eq!(no.code.as_str(), code, "{no}");
        assert!(scene.facts.is_empty());
    }
    let unnamed = scene.submit(single(spec(""))).unwrap_err();
    assert_eq!(unnamed.code, Code::InvalidRequest);
    let run = scene.submit(graph(&a, many(1), 0)).unwrap().run;
    scene.submit(graph(&a, many(4), 0)).unwrap();
    assert_eq!(
        scene.submit(graph(&a, many(2), 0)).unwrap_err().code,
        Code::QuotaPending
    );
    scene.worker(W1, &a, 1);
    let lease = scene.lease();
    assert_eq!(
        scene.with_children(&lease, value(), &a, many(3)),
        ["GRAPH_TOO_LARGE"]
    );
    let tail = |at| AttemptEnd::Tail(NodeRef::New(at));
    assert_eq!(
        scene.with_children(&lease, tail(1), &a, many(1)),
        ["UNKNOWN_NODE"]
    );
    assert_eq!(
        scene.with_children(
            &lease,
            AttemptEnd::Tail(NodeRef::Existing(NodeIndex(0))),
            &a,
            vec![]
        ),
        ["GRAPH_CYCLE"]
    );
    assert_eq!(
        scene.with_children(&lease, tail(0), &a, many(1)),
        ["ok"],
        "refused ones left the lease as it was"
    );
    scene.apply(Command::Credit {
        session: W1,
        calls: 1,
    });
    let child = scene.lease();
    assert_eq!(child.node.run, run.seq);
    assert_eq!(
        scene.with_children(&child, tail(0), &a, many(1)),
        ["GRAPH_TOO_LARGE"],
        "too deep"
    );
    assert_eq!(scene.finish(&child, value()), ["ok"]);
}

#[test]
fn damaged_facts_are_an_error_and_never_a_panic() {
    let mut scene = Scene::new();
    let nodes = vec![node(0, &[]), node(0, &[after(0, InputUse::Value)])];
    let run = scene.submit(graph(&[spec("a")], nodes, 1)).unwrap().run;
    scene.worker(W1, &[spec("a")], 1);
    let lease = scene.lease();
    scene.with_children(
        &lease,
        AttemptEnd::Tail(NodeRef::New(0)),
        &[spec("a")],
        vec![node(0, &[])],
    );
    let restore = |facts: &[Fact]| {
        let mut restoring = Restoring::new(Settings::default(), [3; 16]);
        for fact in facts {
            restoring.absorb(fact.clone());
        }
        restoring.finish(Timestamp(1), 0)
    };
    assert!(restore(&scene.facts).is_ok());
    let mut refused = 0;
    for missing in 0..scene.facts.len() {
        let mut facts = scene.facts.clone();
        facts.remove(missing);
        refused += u32::from(restore(&facts).is_err());
    }
    assert!(refused >= 3, "spec, run and nodes are missed: {refused}");
    let bent = |bend: &dyn Fn(&mut Fact)| {
        let mut facts = scene.facts.clone();
        facts.iter_mut().for_each(bend);
        restore(&facts).map(|_| ()).map_err(|error| error.detail)
    };
    let cycle = bent(&|fact| {
        if let Fact::Node { record, .. } = fact
            && let BodyEnd::Tail(target) = &mut record.body
        {
            *target = NodeIndex(0);
        }
    });
    assert!(cycle.unwrap_err().contains("tail calls"));
    let far = bent(&|fact| {
        if let Fact::Nodes { nodes, .. } = fact {
            for node in nodes {
                node.spec = SpecId(77);
            }
        }
    });
    assert!(far.unwrap_err().contains("spec"));
    let ahead = bent(&|fact| {
        if let Fact::Nodes { nodes, .. } = fact {
            for range in nodes.iter_mut().flat_map(|node| &mut node.inputs) {
                range.count = u32::MAX;
            }
        }
    });
    assert!(ahead.unwrap_err().contains("later"));
    let open = scene.facts_of(run.seq);
    let mut other = Broker::new(Settings::default(), [3; 16]);
    assert!(
        other.adopt(run.seq, open).is_err(),
        "an open run is not adopted"
    );
}

/// Found by chance (seed 861): a structure referred to a skipped node that waited for the structure; resuming closed the cycle.
#[test]
fn only_values_and_own_children_may_be_referred_to() {
    let mut scene = Scene::new();
    let nodes = vec![node(0, &[]), node(0, &[]), node(0, &[])];
    let run = scene.submit(graph(&[spec("a")], nodes, 0)).unwrap().run;
    scene.worker(W1, &[spec("a")], 3);
    let leases = scene.leased();
    scene.finish(&leases[1], failed(false));
    scene.finish(&leases[2], value());
    let tail = |at| AttemptEnd::Tail(NodeRef::Existing(NodeIndex(at)));
    assert_eq!(scene.finish(&leases[0], tail(1)), ["GRAPH_CYCLE"]);
    assert_eq!(scene.finish(&leases[0], tail(0)), ["GRAPH_CYCLE"]);
    assert_eq!(scene.finish(&leases[0], tail(9)), ["UNKNOWN_NODE"]);
    assert_eq!(scene.finish(&leases[0], tail(2)), ["ok"]);
    assert_eq!(scene.states(run), "succeeded failed succeeded");
    assert!(scene.root_settled(), "at once: the value is there");
}
