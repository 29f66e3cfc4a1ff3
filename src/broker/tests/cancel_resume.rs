//! Stopping a run, and opening it again.

use super::script::scripts;

scripts! {
    a_cancel_ends_every_open_node_at_once: "
        @0 attach w1 -> attached
        @0 credit w1 2 -> ok
        @1 submit r: a, b, c on a, d wait 50, z on a on b on c on d -> r new, a #1 to w1, b #1 to w1
        @2 finish a #1 value -> ok
        @3 cancel r -> ok, revoke b #1 from w1, r settled, r ended
        @4 nodes r -> a succeeded #1, b cancelled #1, c cancelled, d cancelled, z cancelled
        @4 run r -> cancelled round 1 root cancelled at z events 8 succeeded=1 cancelled=4
        @4 totals -> runs 0 nodes 0 ready 0 leases 0 sessions 1 keys 0
        @5 attach w2 -> attached
        @5 credit w2 5 -> ok
        @99 tick -> ok
    ";
    a_cancel_may_be_repeated: "
        @0 submit r: a -> r new
        @1 cancel r -> ok, r settled, r ended
        @2 cancel r -> ok
        @3 restart -> ok
        @4 cancel r -> ok
        @4 cancel ghost -> UNKNOWN_RUN
        @4 cancel r~ -> UNKNOWN_RUN
    ";
    a_cancel_of_an_ended_run_changes_nothing: "
        @0 attach w1 -> attached
        @0 credit w1 1 -> ok
        @1 submit r: a -> r new, a #1 to w1
        @2 finish a #1 value -> ok, r settled, r ended
        @3 cancel r -> ok
        @4 run r -> succeeded round 1 root succeeded at a events 3 succeeded=1
    ";
    the_root_may_have_settled_before_the_cancel: "
        @0 attach w1 -> attached
        @0 credit w1 2 -> ok
        @1 submit r root a: a, b -> r new, a #1 to w1, b #1 to w1
        @2 finish a #1 value -> ok, r settled
        @3 cancel r -> ok, revoke b #1 from w1, r ended
        @4 run r -> cancelled round 1 root succeeded at a events 5 succeeded=1 cancelled=1
    ";
    a_settling_node_reads_as_cancelled: "
        @0 attach w1 -> attached
        @0 credit w1 1 -> ok
        @1 submit r: a -> r new, a #1 to w1
        @2 finish a #1 tail b with b -> ok
        @3 cancel r -> ok, r settled, r ended
        @4 nodes r -> a cancelled #1, b cancelled
    ";
    a_cancelled_run_can_be_resumed: "
        @0 attach w1 -> attached
        @0 credit w1 9 -> ok
        @1 submit r: a, b on a -> r new, a #1 to w1
        @2 finish a #1 value -> ok, b #1 to w1
        @3 cancel r -> ok, revoke b #1 from w1, r settled, r ended
        @4 resume r -> ok, b #2 to w1
        @4 run r -> running round 2 root leased at b events 7 leased=1 succeeded=1
        @5 finish b #1 value -> LEASE_EXPIRED
        @5 finish b #2 value -> ok, r settled, r ended
        @6 run r -> succeeded round 2 root succeeded at b events 8 succeeded=2
    ";
    a_run_that_has_not_ended_cannot_be_resumed: "
        @0 submit r: a -> r new
        @1 resume r -> RUN_NOT_ENDED
        @1 resume ghost -> UNKNOWN_RUN
        @1 resume r~ -> UNKNOWN_RUN
        @2 cancel r -> ok, r settled, r ended
        @3 resume r -> ok
        @4 resume r -> RUN_NOT_ENDED
        @5 nodes r -> a ready
    ";
    resuming_opens_what_failed_and_what_was_skipped: "
        @0 attach w1 -> attached
        @0 credit w1 9 -> ok
        @1 submit r: a, b, c on a, d on c on b -> r new, a #1 to w1, b #1 to w1
        @2 finish a #1 fail | b #1 value -> ok, ok, r settled, r ended
        @3 nodes r -> a failed #1 (attempt failed), b succeeded #1, c skipped for a, d skipped for a
        @4 resume r -> ok, a #2 to w1
        @5 nodes r -> a leased #2, b succeeded #1, c waiting (reopened), d waiting (reopened)
        @6 finish a #2 value -> ok, c #1 to w1
        @7 finish c #1 value -> ok, d #1 to w1
        @8 finish d #1 value -> ok, r settled, r ended
        @9 run r -> succeeded round 2 root succeeded at d events 19 succeeded=4
    ";
    failures_and_losses_begin_again_in_a_new_round: "
        settings lease=1000
        spec f attempts=2
        @0 attach w1 -> attached
        @0 credit w1 9 -> ok
        @1 submit r: a -> r new, a #1 to w1
        @2 finish a #1 retryable -> ok
        @12 tick -> ok, a #2 to w1
        @13 finish a #2 retryable -> ok, r settled, r ended
        @14 resume r -> ok, a #3 to w1
        @15 finish a #3 retryable -> ok
        @15 explain r -> a backoff 25 failures 1 losses 0
        @25 tick -> ok, a #4 to w1
        @26 finish a #4 value -> ok, r settled, r ended
    ";
    a_run_is_resumed_after_a_restart: "
        @0 attach w1 -> attached
        @0 credit w1 1 -> ok
        @1 submit r: a, b on a -> r new, a #1 to w1
        @2 finish a #1 fail -> ok, r settled, r ended
        @3 restart -> ok
        @4 resume r -> ok
        @5 restart -> ok
        @6 nodes r -> a ready #1 (reopened), b waiting (reopened)
        @7 attach w1 -> attached
        @7 credit w1 9 -> ok, a #2 to w1
        @8 finish a #2 value -> ok, b #1 to w1
    ";
    a_node_that_failed_by_reference_waits_for_it_again: "
        @0 attach w1 -> attached
        @0 credit w1 9 -> ok
        @1 submit r: a, z on a -> r new, a #1 to w1
        @2 finish a #1 struct b0*2 with b*2 -> ok, b0 #1 to w1, b1 #1 to w1
        @3 finish b0 #1 value | b1 #1 fail -> ok, ok, r settled, r ended
        @4 nodes r -> a failed #1 for b1 (reference failed), z skipped for b1, b0 succeeded #1, b1 failed #1 (attempt failed)
        @5 resume r -> ok, b1 #2 to w1
        @6 nodes r -> a settling #1 (reopened), z waiting (reopened), b0 succeeded #1, b1 leased #2
        @7 finish b1 #2 value -> ok, z #1 to w1
    ";
    resuming_a_run_in_which_all_succeeded_ends_it_again: "
        @0 attach w1 -> attached
        @0 credit w1 9 -> ok
        @1 submit r: a -> r new, a #1 to w1
        @2 finish a #1 value -> ok, r settled, r ended
        @3 resume r -> ok
        @4 run r -> succeeded round 1 root succeeded at a events 3 succeeded=1
    ";
    a_delay_is_over_when_a_run_is_resumed_late: "
        @0 attach w1 -> attached
        @0 submit r: a wait 50 -> r new
        @1 cancel r -> ok, r settled, r ended
        @2 resume r -> ok
        @3 explain r -> a delayed 50
        @49 touch w1 -> ok
        @49 credit w1 1 -> ok
        @50 tick -> ok, a #1 to w1
    ";
    a_late_completion_of_an_earlier_round_is_refused: "
        @0 attach w1 -> attached
        @0 credit w1 1 -> ok
        @1 submit r: a -> r new, a #1 to w1
        @2 cancel r -> ok, revoke a #1 from w1, r settled, r ended
        @3 resume r -> ok
        @4 finish a #1 value -> LEASE_EXPIRED
        @5 nodes r -> a ready #1 (reopened)
    ";
    /// Else the resumed run would wait for ever: each of the two for the other.
    a_promise_of_a_node_that_a_resume_opens_again_is_refused: "
        @0 attach w1 -> attached
        @0 credit w1 9 -> ok
        @1 submit r: x, a, z on a on x -> r new, x #1 to w1, a #1 to w1
        @2 finish x #1 fail -> ok, r settled
        @3 finish a #1 tail z -> GRAPH_CYCLE
        @3 finish a #1 struct z -> GRAPH_CYCLE
        @3 finish a #1 struct c with c on z -> GRAPH_CYCLE
        @3 finish a #1 value with c any x -> GRAPH_CYCLE
        @3 create a #1 at 0: c on z -> GRAPH_CYCLE
        @4 finish a #1 value -> ok, r ended
    ";
    a_child_may_not_hand_over_to_its_failed_parent: "
        @0 attach w1 -> attached
        @0 credit w1 9 -> ok
        @1 submit r: a -> r new, a #1 to w1
        @2 create a #1 at 0: b -> created, b #1 to w1
        @3 finish a #1 fail -> ok, r settled
        @4 finish b #1 tail a -> GRAPH_CYCLE
        @4 finish b #1 struct a -> GRAPH_CYCLE
        @5 finish b #1 value -> ok, r ended
    ";
    an_own_child_that_failed_may_be_waited_for_and_is_opened_with_its_parent: "
        @0 attach w1 -> attached
        @0 credit w1 9 -> ok
        @1 submit r: a -> r new, a #1 to w1
        @2 create a #1 at 0: b -> created, b #1 to w1
        @3 finish b #1 fail -> ok
        @4 finish a #1 tail b -> ok, r settled, r ended
        @5 resume r -> ok, b #2 to w1
        @6 finish b #2 value -> ok, r settled, r ended
    ";
}
