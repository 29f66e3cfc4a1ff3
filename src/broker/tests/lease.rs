//! Leases: until when they hold, what ends them, who gets the node next.

use super::script::scripts;

scripts! {
    a_lapsed_lease_gives_the_node_to_the_next_claim: "
        @0 submit r: a, b after a -> r new
        @1 attach w1 -> attached
        @1 credit w1 1 -> ok, a #1 to w1
        @10 tick -> ok
        @11 tick -> ok, revoke a #1 from w1
        @11 nodes r -> a ready #1 (lease lost), b waiting
        @12 attach w2 -> attached
        @12 credit w2 2 -> ok, a #2 to w2
        @13 finish a #1 value -> LEASE_EXPIRED
        @13 finish a #2 value -> ok, b #1 to w2
    ";
    the_clock_alone_ends_no_lease: "
        @0 attach w1 -> attached
        @0 credit w1 1 -> ok
        @1 submit r: a -> r new, a #1 to w1
        @500 submit s: b -> s new
        @500 nodes r -> a leased #1
        @501 finish a #1 value -> ok, r settled, r ended
    ";
    a_touch_extends_all_leases_of_the_session: "
        @0 attach w1 -> attached
        @0 credit w1 2 -> ok
        @1 submit r: a, b -> r new, a #1 to w1, b #1 to w1
        @9 touch w1 -> ok
        @18 tick -> ok
        @19 tick -> ok, revoke a #1 from w1, revoke b #1 from w1
    ";
    a_touch_that_has_arrived_counts_before_the_sweep: "
        @0 attach w1 -> attached
        @0 credit w1 1 -> ok
        @1 submit r: a -> r new, a #1 to w1
        @99 touch w1 nobody -> ok, UNKNOWN_SESSION
        @99 tick -> ok
        @100 nodes r -> a leased #1
    ";
    a_silent_session_is_given_nothing: "
        @0 attach w1 -> attached
        @0 credit w1 5 -> ok
        @1 submit r: a, b -> r new, a #1 to w1, b #1 to w1
        @11 tick -> ok, revoke a #1 from w1, revoke b #1 from w1
        @11 nodes r -> a ready #1 (lease lost), b ready #1 (lease lost)
        @12 tick -> ok
        @13 submit s: c -> s new
    ";
    three_losses_quarantine_a_node: "
        @0 attach w1 -> attached
        @0 credit w1 1 -> ok
        @0 submit r: a, b on a -> r new, a #1 to w1
        @10 tick -> ok, revoke a #1 from w1
        @11 attach w2 -> attached
        @11 credit w2 1 -> ok, a #2 to w2
        @21 tick -> ok, revoke a #2 from w2
        @22 attach w3 -> attached
        @22 credit w3 1 -> ok, a #3 to w3
        @32 tick -> ok, revoke a #3 from w3, r settled, r ended
        @33 nodes r -> a failed #3 (quarantined), b skipped for a
        @34 finish a #3 value -> LEASE_EXPIRED
    ";
    losses_and_failures_are_counted_apart: "
        spec f attempts=2 losses=2
        @0 attach w1 -> attached
        @0 credit w1 1 -> ok
        @0 submit r: a -> r new, a #1 to w1
        @10 tick -> ok, revoke a #1 from w1
        @11 attach w1 -> attached
        @11 credit w1 1 -> ok, a #2 to w1
        @12 finish a #2 retryable -> ok
        @12 explain r node a -> a backoff 22 failures 1 losses 1
        @20 touch w1 -> ok
        @21 credit w1 1 -> ok
        @22 tick -> ok, a #3 to w1
        @23 finish a #3 value -> ok, r settled, r ended
    ";
    a_lost_node_keeps_its_place: "
        @0 attach w1 -> attached
        @0 credit w1 1 -> ok
        @0 submit r: a, b, c -> r new, a #1 to w1
        @10 tick -> ok, revoke a #1 from w1
        @11 attach w2 -> attached
        @11 credit w2 2 -> ok, a #2 to w2, b #1 to w2
    ";
    a_restart_gives_each_lease_a_whole_period: "
        @0 attach w1 -> attached
        @0 credit w1 1 -> ok
        @0 submit r: a -> r new, a #1 to w1
        @9 restart -> ok
        @18 tick -> ok
        @18 nodes r -> a leased #1
        @19 tick -> ok
        @19 nodes r -> a ready #1 (lease lost)
    ";
    a_token_still_holds_after_a_restart: "
        @0 attach w1 -> attached
        @0 credit w1 2 -> ok
        @0 submit r: a, b -> r new, a #1 to w1, b #1 to w1
        @1 restart -> ok
        @2 finish a #1 value -> ok
        @3 attach w1 -> attached with b #1
        @4 finish b #1 value -> ok, r settled, r ended
    ";
    a_lapsed_completion_with_children_leaves_none: "
        @0 attach w1 -> attached
        @0 credit w1 1 -> ok
        @0 submit r: a -> r new, a #1 to w1
        @10 tick -> ok, revoke a #1 from w1
        @11 finish a #1 value with b -> LEASE_EXPIRED
        @12 nodes r -> a ready #1 (lease lost)
    ";
    the_standing_clock_lapses_nothing: "
        @5 attach w1 -> attached
        @5 credit w1 1 -> ok
        @5 submit r: a -> r new, a #1 to w1
        @5 tick -> ok
        @5 tick -> ok
        @5 nodes r -> a leased #1
    ";
}
