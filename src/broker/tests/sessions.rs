//! Workers' sessions: they outlive their connection for five seconds, and their leases with them.

use super::script::scripts;

scripts! {
    a_session_that_comes_back_in_time_keeps_its_leases: "
        @0 attach w1 -> attached
        @0 credit w1 2 -> ok
        @0 submit r: a, b -> r new, a #1 to w1, b #1 to w1
        @1 detach w1 -> ok
        @1 nodes r -> a leased #1 (lease shortened), b leased #1 (lease shortened)
        @5 tick -> ok
        @5 attach w1 -> attached with a #1 b #1
        @5 nodes r -> a leased #1 (lease resumed), b leased #1 (lease resumed)
        @7 tick -> ok
        @14 tick -> ok
        @14 finish a #1 value | b #1 value -> ok, ok, r settled, r ended
    ";
    a_closed_connection_shortens_its_leases: "
        @0 attach w1 -> attached
        @0 credit w1 1 -> ok
        @0 submit r: a -> r new, a #1 to w1
        @1 attach w2 -> attached
        @1 credit w2 1 -> ok
        @2 detach w1 -> ok
        @6 tick -> ok
        @7 tick -> ok, a #2 to w2
        @8 attach w1 -> attached
        @8 finish a #1 value -> LEASE_EXPIRED
    ";
    a_detach_never_lengthens_a_lease: "
        @0 attach w1 -> attached
        @0 credit w1 1 -> ok
        @0 submit r: a -> r new, a #1 to w1
        @8 detach w1 -> ok
        @9 tick -> ok
        @10 tick -> ok
    ";
    a_late_completion_of_a_detached_session_is_accepted_before_the_sweep: "
        @0 attach w1 -> attached
        @0 credit w1 1 -> ok
        @0 submit r: a -> r new, a #1 to w1
        @1 detach w1 -> ok
        @9 finish a #1 value -> ok, r settled, r ended
        @9 tick -> ok
    ";
    credit_is_forgotten_when_the_connection_closes: "
        @0 attach w1 -> attached
        @0 credit w1 5 -> ok
        @1 detach w1 -> ok
        @2 attach w1 -> attached
        @2 submit r: a, b -> r new
        @3 credit w1 1 -> ok, a #1 to w1
    ";
    a_detached_session_is_given_nothing: "
        @0 attach w1 -> attached
        @0 credit w1 5 -> ok
        @0 submit r: a -> r new, a #1 to w1
        @1 detach w1 -> ok
        @2 submit s: b -> s new
        @2 credit w1 3 -> UNKNOWN_SESSION
    ";
    a_touch_does_not_bring_a_closed_connection_back: "
        @0 attach w1 -> attached
        @0 credit w1 1 -> ok
        @0 submit r: a -> r new, a #1 to w1
        @1 detach w1 -> ok
        @3 touch w1 -> ok
        @6 tick -> ok
    ";
    a_goodbye_releases_all_leases: "
        @0 attach w1 -> attached
        @0 credit w1 2 -> ok
        @0 submit r: a, b -> r new, a #1 to w1, b #1 to w1
        @1 attach w2 -> attached
        @1 credit w2 3 -> ok
        @2 close w1 -> ok, a #2 to w2, b #2 to w2
        @3 finish a #1 value -> LEASE_EXPIRED
        @3 explain r node a -> a leased w2
        @4 close w1 -> UNKNOWN_SESSION
        @4 credit w1 1 -> UNKNOWN_SESSION
        @4 detach w1 -> UNKNOWN_SESSION
    ";
    a_session_that_nobody_knows: "
        @0 credit w9 1 -> UNKNOWN_SESSION
        @0 detach w9 -> UNKNOWN_SESSION
        @0 close w9 -> UNKNOWN_SESSION
        @0 touch w9 -> UNKNOWN_SESSION
    ";
    attaching_again_replaces_what_the_session_can_do: "
        @0 attach w1 actions f -> attached
        @0 submit r: a:g -> r new
        @0 credit w1 1 -> ok
        @1 attach w1 actions g -> attached
        @1 credit w1 1 -> ok, a #1 to w1
        @2 attach w1 actions g -> attached with a #1
        @2 finish a #1 value -> ok, r settled, r ended
    ";
    a_detached_session_without_leases_is_gone_after_the_grace: "
        @0 attach w1 -> attached
        @1 detach w1 -> ok
        @2 totals -> runs 0 nodes 0 ready 0 leases 0 sessions 0 keys 0
        @2 detach w1 -> UNKNOWN_SESSION
    ";
    a_session_is_known_after_a_restart_by_its_leases: "
        @0 attach w1 -> attached
        @0 credit w1 1 -> ok
        @0 submit r: a -> r new, a #1 to w1
        @1 restart -> ok
        @2 attach w1 -> attached with a #1
        @2 attach w2 -> attached
        @3 tick -> ok
        @4 finish a #1 release -> ok
        @4 credit w2 1 -> ok, a #2 to w2
    ";
    a_shortened_lease_after_a_restart: "
        @0 attach w1 -> attached
        @0 credit w1 1 -> ok
        @0 submit r: a -> r new, a #1 to w1
        @1 detach w1 -> ok
        @2 restart -> ok
        @6 tick -> ok
        @11 tick -> ok
        @12 tick -> ok
    ";
    a_lease_is_offered_to_one_session_only: "
        @0 attach w1 -> attached
        @0 attach w2 -> attached
        @0 credit w1 1 -> ok
        @0 submit r: a -> r new, a #1 to w1
        @0 credit w2 1 -> ok
        @1 totals -> runs 1 nodes 1 ready 0 leases 1 sessions 2 keys 0
    ";
}
