//! Results that refer to other nodes: tail calls, structures, outcomes, and what happens when one of them does not succeed.

use super::script::{scripts, world};

scripts! {
    a_tail_call_hands_over_to_its_child: "
        @0 attach w1 -> attached
        @0 credit w1 9 -> ok
        @1 submit r: a, z on a -> r new, a #1 to w1
        @2 finish a #1 tail b with b -> ok, b #1 to w1
        @2 nodes r -> a settling #1, z waiting, b leased #1
        @2 explain r -> a settling 1, z inputs 1
        @2 value a -> b leased
        @3 finish b #1 value -> ok, z #1 to w1
        @3 nodes r -> a succeeded #1, z leased #1, b succeeded #1
        @3 value a -> b succeeded
        @4 finish z #1 value -> ok, r settled, r ended
        @5 value a -> b succeeded
    ";
    the_value_of_a_run_is_read_at_the_end_of_the_chain: "
        @0 attach w1 -> attached
        @0 credit w1 9 -> ok
        @1 submit r: a -> r new, a #1 to w1
        @2 finish a #1 tail b with b -> ok, b #1 to w1
        @3 finish b #1 tail c with c -> ok, c #1 to w1
        @3 run r -> running round 1 root leased at c events 8 leased=1 settling=2
        @4 finish c #1 value -> ok, r settled, r ended
        @5 run r -> succeeded round 1 root succeeded at c events 9 succeeded=3
        @5 value a -> c succeeded
    ";
    a_repeated_tail_call_is_answered_again: "
        @0 attach w1 -> attached
        @0 credit w1 9 -> ok
        @1 submit r: a -> r new, a #1 to w1
        @2 finish a #1 tail b with b -> ok, b #1 to w1
        @3 finish a #1 tail b with b -> ok
        @3 finish a #1 value -> COMPLETION_CONFLICT
    ";
    a_tail_call_to_a_failure_fails: "
        @0 attach w1 -> attached
        @0 credit w1 9 -> ok
        @1 submit r: a, z on a -> r new, a #1 to w1
        @2 finish a #1 tail b with b -> ok, b #1 to w1
        @3 finish b #1 fail -> ok, r settled, r ended
        @4 nodes r -> a failed #1 for b, z skipped for b, b failed #1 (attempt failed)
        @4 value a -> b failed
    ";
    a_tail_call_to_a_flushed_child_that_has_ended: "
        @0 attach w1 -> attached
        @0 credit w1 9 -> ok
        @1 submit r: a, z on a -> r new, a #1 to w1
        @2 create a #1 at 0: b -> created, b #1 to w1
        @3 finish b #1 value -> ok
        @4 finish a #1 tail b -> ok, z #1 to w1
        @4 value a -> b succeeded
    ";
    a_tail_call_to_an_own_child_that_has_failed: "
        @0 attach w1 -> attached
        @0 credit w1 9 -> ok
        @1 submit r: a, z on a -> r new, a #1 to w1
        @2 create a #1 at 0: p -> created, p #1 to w1
        @3 finish p #1 fail -> ok
        @4 finish a #1 tail p -> ok, r settled, r ended
        @5 nodes r -> a failed #1 for p, z skipped for p, p failed #1 (attempt failed)
    ";
    a_structure_settles_when_all_its_references_have: "
        @0 attach w1 -> attached
        @0 credit w1 9 -> ok
        @1 submit r: a, z on a -> r new, a #1 to w1
        @2 finish a #1 struct b0*2 c with b*2, c after b0 -> ok, b0 #1 to w1, b1 #1 to w1
        @2 explain r node a -> a settling 3
        @3 finish b0 #1 value -> ok, c #1 to w1
        @3 finish b1 #1 value -> ok
        @3 explain r node a -> a settling 1
        @4 finish c #1 value -> ok, z #1 to w1
        @4 value a -> a succeeded
    ";
    a_structure_of_what_has_ended_settles_at_once: "
        @0 attach w1 -> attached
        @0 credit w1 9 -> ok
        @1 submit r: p, a on p -> r new, p #1 to w1
        @2 finish p #1 value -> ok, a #1 to w1
        @3 finish a #1 struct p -> ok, r settled, r ended
    ";
    a_structure_of_nothing_is_a_value: "
        @0 attach w1 -> attached
        @0 credit w1 9 -> ok
        @1 submit r: a -> r new, a #1 to w1
        @2 finish a #1 struct -> ok, r settled, r ended
    ";
    a_structure_fails_with_the_first_reference_that_does: "
        @0 attach w1 -> attached
        @0 credit w1 9 -> ok
        @1 submit r: a, z on a -> r new, a #1 to w1
        @2 finish a #1 struct b0*2 with b*2 -> ok, b0 #1 to w1, b1 #1 to w1
        @3 finish b1 #1 fail -> ok, r settled
        @3 nodes r -> a failed #1 for b1 (reference failed), z skipped for b1, b0 leased #1, b1 failed #1 (attempt failed)
        @4 finish b0 #1 value -> ok, r ended
    ";
    structures_and_tail_calls_nest: "
        @0 attach w1 -> attached
        @0 credit w1 9 -> ok
        @1 submit r: a -> r new, a #1 to w1
        @2 finish a #1 struct b with b -> ok, b #1 to w1
        @3 finish b #1 tail c with c -> ok, c #1 to w1
        @4 finish c #1 struct d with d -> ok, d #1 to w1
        @5 finish d #1 value -> ok, r settled, r ended
        @6 nodes r -> a succeeded #1, b succeeded #1, c succeeded #1, d succeeded #1
        @6 value a -> a succeeded
        @6 value b -> c succeeded
    ";
    an_outcome_is_taken_whatever_it_is: "
        @0 attach w1 -> attached
        @0 credit w1 9 -> ok
        @1 submit r: a, b on a, c any a any b, d after c -> r new, a #1 to w1
        @2 finish a #1 fail -> ok, c #1 to w1
        @3 finish c #1 value -> ok, d #1 to w1
        @4 finish d #1 value -> ok, r settled, r ended
        @5 run r -> succeeded round 1 root succeeded at d events 11 succeeded=2 failed=1 skipped=1
    ";
    one_missing_input_skips_although_others_still_run: "
        @0 attach w1 -> attached
        @0 credit w1 9 -> ok
        @1 submit r: a, b, z on a on b -> r new, a #1 to w1, b #1 to w1
        @2 finish b #1 fail -> ok, r settled
        @2 nodes r -> a leased #1, b failed #1 (attempt failed), z skipped for b
        @3 finish a #1 value -> ok, r ended
        @3 run r -> failed round 1 root skipped at z events 8 succeeded=1 failed=1 skipped=1
    ";
    a_child_of_a_failed_child_is_skipped_at_birth: "
        @0 attach w1 -> attached
        @0 credit w1 9 -> ok
        @1 submit r: a -> r new, a #1 to w1
        @2 create a #1 at 0: p -> created, p #1 to w1
        @3 finish p #1 fail -> ok
        @4 finish a #1 value with b on p, c any p -> ok, c #1 to w1, r settled
        @5 nodes r -> a succeeded #1, p failed #1 (attempt failed), b skipped for p, c leased #1
    ";
    a_child_of_a_succeeded_node_is_ready_at_birth: "
        @0 attach w1 -> attached
        @0 credit w1 9 -> ok
        @1 submit r: p, a on p -> r new, p #1 to w1
        @2 finish p #1 value -> ok, a #1 to w1
        @3 finish a #1 tail b with b on p -> ok, b #1 to w1
    ";
    a_cascade_goes_on_in_slices: "
        settings slice=3 lease=1000
        @0 attach w1 -> attached
        @0 credit w1 9 -> ok
        @1 submit r: a, b*4 on a, c on b0*4, d any c -> r new, a #1 to w1
        @2 finish a #1 fail -> ok
        @3 tick -> ok, d #1 to w1
        @4 nodes r -> a failed #1 (attempt failed), b0 skipped for a, b1 skipped for a, b2 skipped for a, b3 skipped for a, c skipped for a, d leased #1
        @5 finish d #1 value -> ok, r settled, r ended
    ";
    a_cascade_is_derived_again_after_a_restart: "
        settings slice=2 lease=1000
        @0 attach w1 -> attached
        @0 credit w1 1 -> ok
        @1 submit r: a, b*6 on a -> r new, a #1 to w1
        @2 finish a #1 fail -> ok
        @3 restart -> ok
        @4 tick -> ok
        @5 tick -> ok, r settled, r ended
        @6 tick -> ok
        @7 run r -> failed round 1 root skipped at b5 events 15 failed=1 skipped=6
    ";
}

/// A chain of any length is followed without recursion (G7a).
#[test]
fn ten_thousand_tail_calls_settle_together() {
    let (mut world, _) = world("");
    world.thorough = false;
    world.step("@0 attach w1");
    world.step("@0 credit w1 100000");
    assert_eq!(world.step("@0 submit r: t0, z on t0"), "r new, t0 #1 to w1");
    for i in 0..10_000 {
        let (now, next) = (i / 2_000, i + 1);
        let actual = world.step(&format!("@{now} finish t{i} #1 tail t{next} with t{next}"));
        assert_eq!(actual, format!("ok, t{next} #1 to w1"));
        if i % 1_000 == 0 {
            world.step(&format!("@{now} touch w1"));
        }
    }
    assert_eq!(world.step("value t0"), "t10000 leased");
    world.thorough = true;
    assert_eq!(world.step("@6 finish t10000 #1 value"), "ok, z #1 to w1");
    assert_eq!(world.step("value t0"), "t10000 succeeded");
    assert_eq!(world.step("@6 finish z #1 value"), "ok, r settled, r ended");
    let run = world.step("run r");
    assert!(
        run.starts_with("succeeded round 1 root succeeded at z events "),
        "{run}"
    );
    assert!(run.ends_with(" succeeded=10002"), "{run}");
}

/// The same when the end of the chain fails.
#[test]
fn ten_thousand_tail_calls_fail_together() {
    let (mut world, _) = world("");
    world.thorough = false;
    world.step("@0 attach w1");
    world.step("@0 credit w1 100000");
    world.step("@0 submit r: t0");
    for i in 0..10_000 {
        let next = i + 1;
        world.step(&format!("@0 finish t{i} #1 tail t{next} with t{next}"));
    }
    let mut settled = world.step("@1 finish t10000 #1 fail");
    for now in 2..20 {
        if settled.ends_with("r settled, r ended") {
            break;
        }
        settled = world.step(&format!("@{now} tick"));
    }
    assert_eq!(settled, "ok, r settled, r ended");
    world.thorough = true;
    assert_eq!(world.step("@30 tick"), "ok");
    let run = world.step("run r");
    assert!(
        run.starts_with("failed round 1 root failed at t10000 events "),
        "{run}"
    );
    assert!(run.ends_with(" failed=10001"), "{run}");
}

/// One failure skips a chain of 10,000 dependents, a bounded slice at a time.
#[test]
fn a_long_chain_of_dependents_is_skipped() {
    let (mut world, _) = world("");
    world.thorough = false;
    let chain: Vec<_> = (1..10_000)
        .map(|i| format!(", n{i} on n{}", i - 1))
        .collect();
    let chain = chain.concat();
    world.step("@0 attach w1");
    world.step("@0 credit w1 1");
    assert_eq!(
        world.step(&format!("@0 submit r: n0{chain}")),
        "r new, n0 #1 to w1"
    );
    let mut ended = world.step("@1 finish n0 #1 fail");
    for now in 2..20 {
        if ended.ends_with("r ended") {
            break;
        }
        ended = world.step(&format!("@{now} tick"));
    }
    assert_eq!(ended, "ok, r settled, r ended");
    world.thorough = true;
    assert_eq!(world.step("@30 tick"), "ok");
    assert_eq!(
        world.step("run r"),
        "failed round 1 root skipped at n9999 events 20001 failed=1 skipped=9999"
    );
}
