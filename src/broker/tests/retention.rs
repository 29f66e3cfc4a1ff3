//! What is deleted, when, and what outlives it.

use super::script::scripts;

scripts! {
    an_ended_run_is_deleted_and_its_key_outlives_it: "
        settings window=100
        @0 attach w1 -> attached
        @0 credit w1 9 -> ok
        @0 submit r key k: a -> r new, a #1 to w1
        @1 finish a #1 value -> ok, r settled, r ended
        @50 expire r -> ok
        @51 run r -> UNKNOWN_RUN
        @51 submit r key k: a -> RUN_EXPIRED
        @52 restart -> ok
        @53 submit r key k: a -> RUN_EXPIRED
        @60 submit x key k content z: a -> RUN_EXPIRED
        @99 tick -> ok
        @99 submit r key k: a -> RUN_EXPIRED
        @101 tick -> ok
        @102 submit r2 key k: a2 -> r2 new
    ";
    what_is_open_or_unknown_is_passed_over: "
        @0 submit r: a -> r new
        @1 expire r ghost -> RUN_NOT_ENDED, UNKNOWN_RUN
        @2 nodes r -> a ready
    ";
    a_deleted_run_is_unknown: "
        @0 submit r: a -> r new
        @1 cancel r -> ok, r settled, r ended
        @2 expire r -> ok
        @3 expire r -> ok
        @3 resume r -> UNKNOWN_RUN
        @3 cancel r -> UNKNOWN_RUN
        @3 nodes r -> UNKNOWN_RUN
        @4 restart -> ok
        @5 resume r -> UNKNOWN_RUN
        @5 submit s: b -> s new
    ";
    a_completion_for_a_deleted_run_is_refused: "
        @0 attach w1 -> attached
        @0 credit w1 9 -> ok
        @0 submit r: a -> r new, a #1 to w1
        @1 finish a #1 value -> ok, r settled, r ended
        @2 expire r -> ok
        @3 finish a #1 value -> LEASE_UNKNOWN
    ";
    a_run_that_owes_a_delivery_is_kept: "
        settings output=all:*:sf
        @0 attach w1 -> attached
        @0 credit w1 9 -> ok
        @0 submit r: a, b -> r new, a #1 to w1, b #1 to w1
        @1 finish a #1 value | b #1 value -> ok, ok, r settled, r ended, all owes
        @2 expire r -> RUN_NOT_ENDED
        @3 confirm all 2 -> ok
        @3 restart -> ok
        @4 expire r -> RUN_NOT_ENDED
        @5 confirm all 1 -> ok
        @6 expire r -> ok
    ";
    a_message_key_outlives_its_run_too: "
        settings window=100
        @0 attach w1 -> attached
        @0 credit w1 9 -> ok
        @0 submit r from pages key k: a -> r new, a #1 to w1
        @1 finish a #1 value -> ok, r settled, r ended
        @2 expire r -> ok
        @3 submit x from pages key k: a -> r existing
        @100 tick -> ok
        @101 submit x from pages key k: a -> x new
    ";
    a_key_of_a_kept_run_does_not_expire: "
        settings window=100
        @0 attach w1 -> attached
        @0 credit w1 9 -> ok
        @0 submit r key k: a -> r new, a #1 to w1
        @1 finish a #1 value -> ok, r settled, r ended
        @500 tick -> ok
        @500 submit r key k: a -> r existing
        @501 expire r -> ok
        @502 tick -> ok
        @503 submit r2 key k: b -> r2 new
    ";
    keys_of_dead_letters_close_with_their_window: "
        settings window=100
        @0 deadletter pages key k -> ok
        @99 tick -> ok
        @99 submit r from pages key k: a -> existing
        @100 tick -> ok
        @101 submit r from pages key k: a -> r new
    ";
}
