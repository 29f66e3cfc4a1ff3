//! Ends of attempts: applied once, fenced, and with their children or not at all.

use super::script::scripts;

scripts! {
    a_repeated_completion_gets_the_first_answer: "
        @0 attach w1 -> attached
        @0 credit w1 9 -> ok
        @1 submit r: a, b on a -> r new, a #1 to w1
        @2 finish a #1 value -> ok, b #1 to w1
        @3 finish a #1 value -> ok
        @3 finish a #1 value digest other -> COMPLETION_CONFLICT
        @3 finish a #1 fail -> COMPLETION_CONFLICT
        @4 nodes r -> a succeeded #1, b leased #1
    ";
    a_completion_is_repeated_after_the_run_has_ended: "
        @0 attach w1 -> attached
        @0 credit w1 9 -> ok
        @1 submit r: a -> r new, a #1 to w1
        @2 finish a #1 value -> ok, r settled, r ended
        @3 finish a #1 value -> ok
        @3 finish a #1 value digest other -> COMPLETION_CONFLICT
        @4 restart -> ok
        @5 finish a #1 value -> ok
        @5 finish a #1 fail -> COMPLETION_CONFLICT
    ";
    twice_in_one_list_is_a_repetition_too: "
        @0 attach w1 -> attached
        @0 credit w1 9 -> ok
        @1 submit r: a, b -> r new, a #1 to w1, b #1 to w1
        @2 finish a #1 value | a #1 value | a #1 fail | b #1 fail -> ok, ok, COMPLETION_CONFLICT, ok, r settled, r ended
    ";
    what_was_never_leased_is_unknown: "
        @0 attach w1 -> attached
        @0 credit w1 1 -> ok
        @1 submit r: a, b -> r new, a #1 to w1
        @2 finish a #1 value forged -> LEASE_UNKNOWN
        @2 finish a #2 value -> LEASE_UNKNOWN
        @2 finish a #0 value -> LEASE_UNKNOWN
        @2 finish b #1 value -> LEASE_UNKNOWN
        @2 finish b #0 value -> LEASE_UNKNOWN
        @2 finish r/7 #1 value -> LEASE_UNKNOWN
        @2 finish ghost/0 #1 value -> LEASE_UNKNOWN
        @3 finish a #1 value -> ok
    ";
    a_forged_repetition_learns_nothing: "
        @0 attach w1 -> attached
        @0 credit w1 1 -> ok
        @1 submit r: a, b on a -> r new, a #1 to w1
        @2 finish a #1 value -> ok
        @3 finish a #1 value forged digest x -> LEASE_UNKNOWN
    ";
    a_late_completion_is_accepted_before_the_sweep_and_refused_after_it: "
        @0 attach w1 -> attached
        @0 credit w1 2 -> ok
        @1 submit r: a, b -> r new, a #1 to w1, b #1 to w1
        @50 finish a #1 value -> ok
        @51 tick -> ok, revoke b #1 from w1
        @52 finish b #1 value -> LEASE_EXPIRED
        @52 finish b #1 fail -> LEASE_EXPIRED
        @52 finish b #1 release -> LEASE_EXPIRED
        @53 nodes r -> a succeeded #1, b ready #1 (lease lost)
    ";
    a_completion_after_a_cancel_is_revoked: "
        @0 attach w1 -> attached
        @0 credit w1 1 -> ok
        @1 submit r: a -> r new, a #1 to w1
        @2 cancel r -> ok, revoke a #1 from w1, r settled, r ended
        @3 finish a #1 value -> LEASE_REVOKED
        @3 finish a #1 release -> LEASE_REVOKED
        @4 restart -> ok
        @4 finish a #1 value -> LEASE_REVOKED
    ";
    children_become_real_with_their_parent: "
        @0 attach w1 -> attached
        @0 credit w1 9 -> ok
        @1 submit r: a, z on a -> r new, a #1 to w1
        @2 finish a #1 value with b*2, c on b0*2 -> ok, z #1 to w1, b0 #1 to w1, b1 #1 to w1
        @2 nodes r -> a succeeded #1, z leased #1, b0 leased #1, b1 leased #1, c waiting
        @3 finish a #1 value with b*2, c on b0*2 -> ok
        @3 finish z #1 value -> ok, r settled
        @4 finish b0 #1 value | b1 #1 value -> ok, ok, c #1 to w1
        @5 finish c #1 value -> ok, r ended
    ";
    an_attempt_that_fails_or_is_released_leaves_no_children: "
        spec f attempts=3
        @0 attach w1 -> attached
        @0 credit w1 9 -> ok
        @1 submit r: a -> r new, a #1 to w1
        @2 finish a #1 release with b -> ok, a #2 to w1
        @3 finish a #2 retryable with b -> ok
        @12 touch w1 -> ok
        @13 tick -> ok, a #3 to w1
        @14 finish a #3 fail with b -> ok, r settled, r ended
        @15 nodes r -> a failed #3 (attempt failed)
    ";
    a_refused_completion_changes_nothing_and_may_be_put_right: "
        @0 attach w1 -> attached
        @0 credit w1 1 -> ok
        @1 submit r: a, q -> r new, a #1 to w1
        @2 finish a #1 value with b on b -> GRAPH_CYCLE
        @2 finish a #1 value with b on c, c -> GRAPH_CYCLE
        @2 finish a #1 value with b on new:9 -> UNKNOWN_NODE
        @2 finish a #1 value with b on old:99 -> UNKNOWN_NODE
        @2 finish a #1 value with b on b*0 -> INVALID_REQUEST
        @2 finish a #1 value with b:spec=9 -> INVALID_REQUEST
        @2 finish a #1 value with b bytes 4000 -> PAYLOAD_TOO_LARGE
        @2 finish a #1 value bytes 4000 -> PAYLOAD_TOO_LARGE
        @2 finish a #1 tail new:0 -> UNKNOWN_NODE
        @2 finish a #1 tail old:77 -> UNKNOWN_NODE
        @2 finish a #1 struct old:77 -> UNKNOWN_NODE
        @2 finish a #1 struct new:0*2 with b -> UNKNOWN_NODE
        @2 finish a #1 struct b*0 with b -> INVALID_REQUEST
        @3 nodes r -> a leased #1, q ready
        @4 finish a #1 value -> ok
    ";
    a_child_may_not_wait_for_a_node_that_could_wait_for_it: "
        @0 attach w1 -> attached
        @0 credit w1 2 -> ok
        @1 submit r: p, a, z on a -> r new, p #1 to w1, a #1 to w1
        @2 finish a #1 value with b on a -> GRAPH_CYCLE
        @2 finish a #1 value with b on z -> GRAPH_CYCLE
        @2 finish a #1 value with b on p -> GRAPH_CYCLE
        @2 finish a #1 tail z -> GRAPH_CYCLE
        @2 finish a #1 tail a -> GRAPH_CYCLE
        @2 finish a #1 struct p -> GRAPH_CYCLE
        @3 finish p #1 value -> ok
        @3 finish a #1 value with b on p -> ok
        @4 nodes r -> p succeeded #1, a succeeded #1, z ready, b ready
    ";
    a_failure_ends_the_node_and_skips_what_needs_it: "
        @0 attach w1 -> attached
        @0 credit w1 9 -> ok
        @1 submit r: a, b on a, c after b, d any b -> r new, a #1 to w1
        @2 finish a #1 fail -> ok, d #1 to w1
        @2 nodes r -> a failed #1 (attempt failed), b skipped for a, c skipped for a, d leased #1
        @3 finish a #1 fail -> ok
        @3 finish a #1 value -> COMPLETION_CONFLICT
        @4 finish d #1 value -> ok, r settled, r ended
        @4 run r -> succeeded round 1 root succeeded at d events 10 succeeded=1 failed=1 skipped=2
    ";
    a_release_is_neither_failure_nor_loss: "
        @0 attach w1 -> attached
        @0 credit w1 5 -> ok
        @1 submit r: a -> r new, a #1 to w1
        @2 finish a #1 release -> ok, a #2 to w1
        @2 finish a #1 release -> LEASE_EXPIRED
        @3 finish a #2 release -> ok, a #3 to w1
        @4 finish a #3 release -> ok, a #4 to w1
        @5 finish a #4 release -> ok, a #5 to w1
        @6 finish a #5 release -> ok
        @6 finish a #5 release -> ok
        @7 nodes r -> a ready #5 (released)
    ";
    flushed_children_exist_at_once_and_stay: "
        spec f attempts=2
        @0 attach w1 -> attached
        @0 credit w1 2 -> ok
        @1 submit r: a -> r new, a #1 to w1
        @2 create a #1 at 0: b, c on b -> created, b #1 to w1
        @2 create a #1 at 0: b, c on b -> created
        @2 create a #1 at 2: d after c -> created
        @3 nodes r -> a leased #1, b leased #1, c waiting, d waiting
        @4 finish a #1 retryable -> ok
        @13 touch w1 -> ok
        @13 credit w1 1 -> ok
        @14 tick -> ok, a #2 to w1
        @15 create a #2 at 0: b, c on b -> created
        @15 create a #2 at 1: c on b -> created
        @15 create a #2 at 1: c:g -> NODE_CONFLICT
        @15 create a #2 at 0: b bytes 5 -> created
        @16 finish a #2 value -> ok, r settled
    ";
    a_repetition_may_bring_more_children_than_before: "
        @0 attach w1 -> attached
        @0 credit w1 1 -> ok
        @1 submit r: a -> r new, a #1 to w1
        @2 create a #1 at 0: b, c -> created
        @3 create a #1 at 1: c, d after c -> created
        @4 nodes r -> a leased #1, b ready, c ready, d waiting
    ";
    a_gap_between_children_is_refused: "
        @0 attach w1 -> attached
        @0 credit w1 1 -> ok
        @1 submit r: a -> r new, a #1 to w1
        @2 create a #1 at 1: b -> INVALID_REQUEST
        @2 create a #1 at 0: -> INVALID_REQUEST
        @2 create a #1 at 0 forged: b -> LEASE_UNKNOWN
        @2 create a #2 at 0: b -> LEASE_UNKNOWN
        @2 create ghost/0 #1 at 0: b -> LEASE_UNKNOWN
        @2 create a #1 at 0: b on b -> GRAPH_CYCLE
        @2 create a #1 at 0: b on old:9 -> UNKNOWN_NODE
        @2 create a #1 at 0: b bytes 4000 -> PAYLOAD_TOO_LARGE
        @2 create a #1 at 0: b:spec=4 -> INVALID_REQUEST
        @3 nodes r -> a leased #1
    ";
    children_of_a_lease_that_has_ended_are_refused: "
        @0 attach w1 -> attached
        @0 credit w1 1 -> ok
        @1 submit r: a, q -> r new, a #1 to w1
        @10 tick -> ok, revoke a #1 from w1
        @11 create a #1 at 0: b -> LEASE_EXPIRED
        @12 attach w1 -> attached
        @12 credit w1 1 -> ok, a #2 to w1
        @13 create a #1 at 0: b -> LEASE_EXPIRED
        @13 create a #2 at 0: b -> created
        @14 cancel r -> ok, revoke a #2 from w1, r settled, r ended
        @15 create a #2 at 0: b -> LEASE_REVOKED
    ";
    children_after_the_end_of_the_attempt_are_refused: "
        @0 attach w1 -> attached
        @0 credit w1 1 -> ok
        @1 submit r: a, q -> r new, a #1 to w1
        @2 finish a #1 value -> ok
        @3 create a #1 at 0: b -> LEASE_EXPIRED
    ";
    a_completion_goes_on_after_flushed_children: "
        @0 attach w1 -> attached
        @0 credit w1 9 -> ok
        @1 submit r: a -> r new, a #1 to w1
        @2 create a #1 at 0: b -> created, b #1 to w1
        @3 finish a #1 struct b c with c on b -> ok
        @4 finish b #1 value -> ok, c #1 to w1
        @5 finish c #1 value -> ok, r settled, r ended
    ";
}
