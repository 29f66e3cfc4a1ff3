//! Failures of user code: how often, how long between, and what does not count.

use super::script::{scripts, world};

scripts! {
    one_attempt_by_default: "
        @0 attach w1 -> attached
        @0 credit w1 1 -> ok
        @0 submit r: a -> r new, a #1 to w1
        @1 finish a #1 retryable -> ok, r settled, r ended
        @2 nodes r -> a failed #1 (attempt failed)
        @3 run r -> failed round 1 root failed at a events 3 failed=1
    ";
    the_delay_grows_up_to_its_limit: "
        settings lease=1000
        spec f attempts=5 delay=10 factor=3000 max=50
        @0 attach w1 -> attached
        @0 credit w1 9 -> ok
        @0 submit r: a -> r new, a #1 to w1
        @1 finish a #1 retryable -> ok
        @1 explain r -> a backoff 11 failures 1 losses 0
        @10 tick -> ok
        @11 tick -> ok, a #2 to w1
        @12 finish a #2 retryable -> ok
        @12 explain r -> a backoff 42 failures 2 losses 0
        @42 tick -> ok, a #3 to w1
        @43 finish a #3 retryable -> ok
        @43 explain r -> a backoff 93 failures 3 losses 0
        @93 tick -> ok, a #4 to w1
        @94 finish a #4 retryable -> ok
        @94 explain r -> a backoff 144 failures 4 losses 0
        @144 tick -> ok, a #5 to w1
        @145 finish a #5 retryable -> ok, r settled, r ended
        @146 nodes r -> a failed #5 (attempt failed)
    ";
    an_error_that_the_policy_does_not_cover_is_final: "
        spec f attempts=5
        @0 attach w1 -> attached
        @0 credit w1 1 -> ok
        @0 submit r: a -> r new, a #1 to w1
        @1 finish a #1 fail -> ok, r settled, r ended
    ";
    a_timeout_is_a_failure_of_the_attempt: "
        spec f attempts=2
        @0 attach w1 -> attached
        @0 credit w1 2 -> ok
        @0 submit r: a -> r new, a #1 to w1
        @1 finish a #1 timeout -> ok
        @1 nodes r -> a backoff #1 (timed out)
        @8 touch w1 -> ok
        @11 tick -> ok, a #2 to w1
        @12 finish a #2 timeout -> ok, r settled, r ended
        @13 nodes r -> a failed #2 (timed out)
    ";
    a_timeout_that_is_not_covered_is_final: "
        spec f attempts=2
        @0 attach w1 -> attached
        @0 credit w1 2 -> ok
        @0 submit r: a -> r new, a #1 to w1
        @1 finish a #1 timeout! -> ok, r settled, r ended
    ";
    a_repeated_failure_counts_once: "
        spec f attempts=3
        @0 attach w1 -> attached
        @0 credit w1 2 -> ok
        @0 submit r: a -> r new, a #1 to w1
        @1 finish a #1 retryable -> ok
        @2 finish a #1 retryable -> ok
        @2 finish a #1 value -> COMPLETION_CONFLICT
        @2 explain r -> a backoff 11 failures 1 losses 0
        @8 touch w1 -> ok
        @11 tick -> ok, a #2 to w1
        @12 finish a #1 retryable -> LEASE_EXPIRED
        @12 finish a #2 value -> ok, r settled, r ended
    ";
    backoff_survives_a_restart: "
        spec f attempts=2
        @0 attach w1 -> attached
        @0 credit w1 1 -> ok
        @0 submit r: a -> r new, a #1 to w1
        @1 finish a #1 retryable -> ok
        @2 restart -> ok
        @3 explain r -> a backoff 11 failures 1 losses 0
        @5 attach w1 -> attached
        @5 credit w1 1 -> ok
        @10 tick -> ok
        @11 tick -> ok, a #2 to w1
    ";
    a_retried_node_keeps_its_place: "
        settings lease=1000
        spec f attempts=2
        @0 attach w1 -> attached
        @0 credit w1 1 -> ok
        @0 submit r: a, b, c -> r new, a #1 to w1
        @1 finish a #1 retryable -> ok
        @2 credit w1 1 -> ok, b #1 to w1
        @11 tick -> ok
        @12 credit w1 2 -> ok, a #2 to w1, c #1 to w1
    ";
    a_node_in_backoff_can_be_cancelled: "
        spec f attempts=2
        @0 attach w1 -> attached
        @0 credit w1 1 -> ok
        @0 submit r: a -> r new, a #1 to w1
        @1 finish a #1 retryable -> ok
        @2 cancel r -> ok, r settled, r ended
        @11 tick -> ok
        @12 nodes r -> a cancelled #1 (attempt failed)
    ";
    dependents_wait_while_there_is_hope: "
        spec f attempts=2
        @0 attach w1 -> attached
        @0 credit w1 2 -> ok
        @0 submit r: a, b on a -> r new, a #1 to w1
        @1 finish a #1 retryable -> ok
        @1 nodes r -> a backoff #1 (attempt failed), b waiting
        @8 touch w1 -> ok
        @11 tick -> ok, a #2 to w1
        @12 finish a #2 fail -> ok, r settled, r ended
        @12 nodes r -> a failed #2 (attempt failed), b skipped for a
    ";
}

/// The spread of the delay stays within what the policy says, and is used.
#[test]
fn jitter_stays_within_its_bounds() {
    let mut seen = std::collections::BTreeSet::new();
    for i in 0..40 {
        let (mut world, _) =
            world("settings lease=100000\nspec f attempts=2 delay=1000 max=9999 jitter=100");
        world.step("@0 attach w1");
        world.step("@0 credit w1 1");
        for _ in 0..i {
            world.step("@0 tick");
        }
        assert_eq!(world.step("@0 submit r: a"), "r new, a #1 to w1");
        world.step("@0 finish a #1 retryable");
        let why = world.step("explain r");
        let until: u64 = why
            .split(' ')
            .nth(2)
            .expect("a time")
            .parse()
            .expect("a number");
        assert!((900..=1_100).contains(&until), "{why}");
        seen.insert(until);
    }
    assert!(seen.len() > 10, "jitter hardly spreads: {seen:?}");
}
