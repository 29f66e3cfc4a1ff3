//! The ends of every range: numbers that overflow, times that never come, credit for more than there is, timeouts, and who is served first.

use super::script::{scripts, world};

scripts! {
    enormous_numbers_do_no_harm: "
        @0 attach w1 -> attached
        @0 credit w1 4294967295 -> ok
        @0 credit w1 4294967295 -> ok
        @0 submit r: a wait 18446744073709551615, b until 18446744073709551615, c -> r new, c #1 to w1
        @1 explain r -> a delayed 18446744073709551615, b delayed_until 18446744073709551615
        @2 finish c #4294967295 value -> LEASE_UNKNOWN
        @2 finish r/4294967295 #1 value -> LEASE_UNKNOWN
        @2 finish c #1 struct old:4294967295*4294967295 -> GRAPH_TOO_LARGE
        @2 finish c #1 struct old:4294967295*2 -> UNKNOWN_NODE
        @2 finish c #1 tail new:4294967295 -> UNKNOWN_NODE
        @2 create c #1 at 4294967295: d -> INVALID_REQUEST
        @3 submit s from pages pos p 18446744073709551614..18446744073709551615: e -> s new, e #1 to w1
        @3 submit s from pages pos p 18446744073709551614..18446744073709551615: e -> existing
        @4 seek pages p 0 -> ok
        @4 position pages p -> position 0
        @5 cancel r -> ok, revoke c #1 from w1, r settled, r ended
    ";
    an_extreme_policy_does_no_harm: "
        settings lease=1000
        spec f attempts=4294967295 delay=4294967295 factor=4294967295 max=4294967295 jitter=0
        @0 attach w1 -> attached
        @0 credit w1 9 -> ok
        @0 submit r: a -> r new, a #1 to w1
        @1 finish a #1 retryable -> ok
        @1 explain r -> a backoff 4294967296 failures 1 losses 0
    ";
    a_retry_without_delay_is_ready_at_once: "
        spec f attempts=3 delay=0
        @0 attach w1 -> attached
        @0 credit w1 9 -> ok
        @0 submit r: a -> r new, a #1 to w1
        @1 finish a #1 retryable -> ok, a #2 to w1
        @1 finish a #2 retryable -> ok, a #3 to w1
        @1 finish a #3 retryable -> ok, r settled, r ended
    ";
    a_delay_of_nothing_is_no_delay: "
        @0 attach w1 -> attached
        @0 credit w1 9 -> ok
        @7 wall 100 submit r: a wait 0, b until 0, c until 100 -> r new, a #1 to w1, b #1 to w1, c #1 to w1
    ";
    an_attempt_that_overruns_its_timeout_is_ended_by_the_broker: "
        settings lease=10
        spec f timeout=20 attempts=2
        @0 attach w1 -> attached
        @0 credit w1 1 -> ok
        @0 submit r: a -> r new, a #1 to w1
        @29 touch w1 -> ok
        @29 tick -> ok
        @30 tick -> ok, revoke a #1 from w1
        @30 nodes r -> a backoff #1 (timed out)
        @31 finish a #1 value -> LEASE_EXPIRED
        @31 explain r -> a backoff 40 failures 1 losses 0
    ";
    a_timeout_of_a_lease_that_has_ended_does_nothing: "
        settings lease=10
        spec f timeout=20
        @0 attach w1 -> attached
        @0 credit w1 1 -> ok
        @0 submit r: a, b on a -> r new, a #1 to w1
        @5 finish a #1 value -> ok
        @29 touch w1 -> ok
        @29 credit w1 1 -> ok, b #1 to w1
        @31 tick -> ok
        @31 nodes r -> a succeeded #1, b leased #1
    ";
    work_is_shared_between_idle_workers: "
        @0 attach w1 -> attached
        @0 attach w2 -> attached
        @0 credit w1 100 -> ok
        @0 credit w2 100 -> ok
        @0 submit r: a*4 -> r new, a0 #1 to w2, a1 #1 to w2, a2 #1 to w1, a3 #1 to w1
    ";
    a_session_that_attaches_twice_has_no_old_credit: "
        @0 attach w1 -> attached
        @0 credit w1 5 -> ok
        @1 attach w1 -> attached
        @1 submit r: a -> r new
        @2 detach w1 -> ok
        @2 detach w1 -> UNKNOWN_SESSION
    ";
    a_bundle_is_filled_from_several_runs_and_a_cancelled_one_leaves_it: "
        settings lease=1000
        spec e batch=3/20
        @0 attach w1 actions e -> attached
        @0 credit w1 1 -> ok
        @1 submit r: a:e -> r new
        @1 submit s: b:e -> s new
        @2 cancel r -> ok, r settled, r ended
        @3 submit t: c:e -> t new
        @3 explain t -> c batch_filling 2 of 3 until 21
        @4 submit u: d:e -> u new, b #1 to w1 bundle 1, c #1 to w1 bundle 1, d #1 to w1 bundle 1
    ";
    a_priority_of_a_bundle_counts: "
        spec e batch=2/0 priority=5
        @0 submit r: a, b:e, c:e, d -> r new
        @1 attach w1 actions e f -> attached
        @1 credit w1 2 -> ok, b #1 to w1 bundle 1, c #1 to w1 bundle 1, a #1 to w1
    ";
    a_lease_limit_leaves_the_rest_ready: "
        settings leases=1
        @0 attach w1 -> attached
        @0 attach w2 -> attached
        @0 credit w1 5 -> ok
        @0 credit w2 5 -> ok
        @0 submit r: a, b -> r new, a #1 to w2
        @1 finish a #1 value -> ok, b #1 to w2
    ";
    taking_an_action_away_from_a_worker_strands_its_nodes: "
        @0 attach w1 actions f g -> attached
        @0 submit r: a:g -> r new
        @1 attach w1 actions f -> attached
        @1 credit w1 1 -> ok
        @1 explain r -> a no_worker_has_action g
    ";
    repetition_of_every_control_command_is_harmless: "
        settings output=all:*:sf
        @0 attach w1 -> attached
        @0 attach w1 -> attached
        @0 credit w1 1 -> ok
        @0 submit r key k: a -> r new, a #1 to w1
        @0 submit r key k: a -> r existing
        @1 attach w1 -> attached with a #1
        @1 attach w1 -> attached with a #1
        @2 create a #1 at 0: b -> created
        @2 create a #1 at 0: b -> created
        @3 finish a #1 value -> ok, r settled, all owes
        @3 finish a #1 value -> ok
        @4 cancel r -> ok, r ended
        @4 cancel r -> ok
        @5 confirm all 1 -> ok
        @5 confirm all 1 -> ok
        @6 expire r -> ok
        @6 expire r -> ok
        @7 tick -> ok
        @7 tick -> ok
        @8 close w1 -> ok
        @8 close w1 -> UNKNOWN_SESSION
    ";
}

/// Whoever drives the broker sleeps until it says: each of these must be named before it is due.
#[test]
fn the_next_deadline_is_never_missed() {
    for (name, script, due) in [
        ("nothing", "", None),
        (
            "a lease",
            "@3 attach w1\n@3 credit w1 1\n@3 submit r: a",
            Some(13),
        ),
        (
            "a closed connection",
            "@3 attach w1\n@3 credit w1 1\n@3 submit r: a\n@4 detach w1",
            Some(9),
        ),
        ("a delay", "@3 submit r: a wait 50", Some(53)),
        (
            "a backoff",
            "spec f attempts=2 delay=4\n@3 attach w1\n@3 credit w1 1\n@3 submit r: a\n@5 finish a #1 retryable",
            Some(9),
        ),
        (
            "a bundle",
            "spec e batch=3/20\n@3 attach w1 actions e\n@3 credit w1 1\n@3 submit r: a:e",
            Some(23),
        ),
        (
            "a cascade",
            "settings slice=1\n@3 attach w1\n@3 credit w1 1\n@3 submit r: a, b*3 on a\n@5 finish a #1 fail",
            Some(5),
        ),
    ] {
        let (mut world, lines) = world(script);
        for line in lines.into_iter().filter(|line| line.starts_with('@')) {
            world.step(line);
        }
        let deadline = world.broker.next_deadline().map(|at| at.0);
        match due {
            None => assert_eq!(deadline, None, "{name}"),
            Some(due) => assert!(
                deadline.is_some_and(|at| at <= due),
                "{name}: {deadline:?} is after {due}"
            ),
        }
    }
    let (mut world, _) = world("");
    world.step("@3 wall 10 submit r: a until 99");
    assert_eq!(world.broker.next_wall_deadline().map(|at| at.0), Some(99));
}
