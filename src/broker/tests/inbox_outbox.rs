//! What came from other brokers, and what is owed to them.

use super::script::scripts;

scripts! {
    a_position_is_applied_once: "
        @0 submit r from pages pos p 0..1: a -> r new
        @1 submit r from pages pos p 0..1: a -> existing
        @1 position pages p -> position 1
        @1 position pages q -> position 0
        @1 position nowhere p -> position 0
        @2 submit s from pages pos q 0..1: b -> s new
        @3 open -> s running, r running
    ";
    positions_may_have_gaps_and_never_go_back: "
        @0 submit r from pages pos p 5..9: a -> r new
        @1 submit s from pages pos p 20..21: b -> s new
        @2 submit t from pages pos p 10..11: c -> existing
        @2 submit t from pages pos p 20..21: c -> existing
        @3 restart -> ok
        @4 submit t from pages pos p 20..21: c -> existing
        @4 position pages p -> position 21
        @5 submit t from pages pos p 21..22: c -> t new
    ";
    one_list_with_several_positions: "
        @0 submit r from pages pos p 0..1: a | s from pages pos p 1..2: b | t from pages pos p 1..2: c -> r new, s new, existing
    ";
    a_position_must_move_forward: "
        @0 submit r from pages pos p 5..5: a -> INVALID_REQUEST
        @0 submit r from pages pos p 5..4: a -> INVALID_REQUEST
        @0 position pages p -> position 0
    ";
    a_wanted_seek_begins_a_new_epoch: "
        @0 submit r from pages pos p 7..8: a -> r new
        @1 seek pages p 3 -> ok
        @1 position pages p -> position 3
        @2 submit s from pages pos p 3..4: b -> s new
        @2 submit s from pages pos p 3..4: b -> existing
        @3 seek pages p 3 -> ok
        @4 restart -> ok
        @5 position pages p -> position 3
    ";
    a_refused_message_does_not_move_the_position: "
        @0 submit r from pages pos p 0..1: a on a -> GRAPH_CYCLE
        @0 position pages p -> position 0
        @1 submit r from pages pos p 0..1: a -> r new
    ";
    a_message_key_is_applied_once_within_the_window: "
        settings window=100
        @0 attach w1 -> attached
        @0 credit w1 9 -> ok
        @0 submit r from pages key k: a -> r new, a #1 to w1
        @1 submit r from pages key k: a -> r existing
        @2 finish a #1 value -> ok, r settled, r ended
        @50 submit r from pages key k: a -> r existing
        @51 restart -> ok
        @52 submit r from pages key k: a -> r existing
    ";
    without_identity_each_message_is_applied: "
        @0 submit r from pages: a -> r new
        @0 submit s from pages: b -> s new
    ";
    a_dead_letter_consumes_its_position: "
        @0 deadletter pages pos p 0..1 -> ok
        @0 position pages p -> position 1
        @1 deadletter pages pos p 0..1 -> ok
        @1 submit r from pages pos p 0..1: a -> existing
        @2 submit r from pages pos p 1..2: a -> r new
    ";
    a_dead_letter_consumes_its_key: "
        @0 deadletter pages key k -> ok
        @1 deadletter pages key k -> ok
        @2 submit r from pages key k: a -> existing
        @3 totals -> runs 0 nodes 0 ready 0 leases 0 sessions 0 keys 1
    ";
    a_dead_letter_is_replayed_once: "
        @0 deadletter pages pos p 0..1 | pages pos p 1..2 -> ok, ok
        @1 submit r from pages dead 1: a -> r new
        @2 submit r from pages dead 1: a -> UNKNOWN_NAME
        @2 submit r from pages dead 9: a -> UNKNOWN_NAME
        @2 submit r from nowhere dead 1: a -> UNKNOWN_NAME
        @3 restart -> ok
        @4 submit r from pages dead 1: a -> UNKNOWN_NAME
        @4 submit s from pages dead 2: b on b -> GRAPH_CYCLE
        @4 submit s from pages dead 2: b -> s new
    ";
    a_dead_letter_is_dropped: "
        @0 deadletter pages pos p 0..1 -> ok
        @1 drop pages 1 -> ok
        @2 drop pages 1 -> UNKNOWN_NAME
        @2 drop pages 2 -> UNKNOWN_NAME
        @2 drop nowhere 1 -> UNKNOWN_NAME
        @3 restart -> ok
        @4 drop pages 1 -> UNKNOWN_NAME
        @4 deadletter pages pos p 1..2 -> ok
        @5 drop pages 1 -> UNKNOWN_NAME
        @5 drop pages 2 -> ok
    ";
    a_dead_letter_with_a_large_body_must_be_stored_first: "
        @0 deadletter pages pos p 0..1 bytes 4000 -> PAYLOAD_TOO_LARGE
        @0 position pages p -> position 0
    ";
    a_settled_node_is_owed_to_each_output_that_matches: "
        settings output=done:f*:s output=all:*:sf output=g:g:s
        @0 attach w1 actions f g fast -> attached
        @0 credit w1 9 -> ok
        @0 submit r: a, b:g on a, c:fast on b -> r new, a #1 to w1
        @1 finish a #1 value -> ok, b #1 to w1, done owes, all owes
        @2 finish b #1 fail -> ok, r settled, r ended, all owes
        @3 outbox done -> cursor 1 next 2
        @3 outbox all -> cursor 1 next 4
        @3 outbox g -> cursor 1 next 1
        @3 outbox nowhere -> UNKNOWN_NAME
        @3 totals -> runs 0 nodes 0 ready 0 leases 0 sessions 1 keys 0 outbox all=3 outbox done=1
    ";
    a_repeated_completion_owes_nothing_more: "
        settings output=all:*:sf
        @0 attach w1 -> attached
        @0 credit w1 9 -> ok
        @0 submit r: a, b -> r new, a #1 to w1, b #1 to w1
        @1 finish a #1 value -> ok, all owes
        @2 finish a #1 value -> ok
        @2 outbox all -> cursor 1 next 2
    ";
    a_retried_failure_is_not_owed_before_it_is_final: "
        settings output=bad:*:f
        spec f attempts=2 delay=1
        @0 attach w1 -> attached
        @0 credit w1 9 -> ok
        @0 submit r: a -> r new, a #1 to w1
        @1 finish a #1 retryable -> ok
        @2 tick -> ok, a #2 to w1
        @3 finish a #2 retryable -> ok, r settled, r ended, bad owes
    ";
    a_settling_node_is_owed_when_it_settles: "
        settings output=all:f:sf
        @0 attach w1 actions f g -> attached
        @0 credit w1 9 -> ok
        @0 submit r: a -> r new, a #1 to w1
        @1 finish a #1 tail b with b:g -> ok, b #1 to w1
        @2 finish b #1 value -> ok, r settled, r ended, all owes
        @3 outbox all -> cursor 1 next 2
    ";
    a_skipped_node_is_owed_as_a_failure_and_a_cancelled_one_is_not: "
        settings output=all:*:sf output=good:*:s
        @0 attach w1 -> attached
        @0 credit w1 1 -> ok
        @0 submit r: a, b on a -> r new, a #1 to w1
        @0 submit s: c -> s new
        @1 finish a #1 fail -> ok, r settled, r ended, all owes
        @2 cancel s -> ok, s settled, s ended
        @3 outbox all -> cursor 1 next 3
        @3 outbox good -> cursor 1 next 1
    ";
    a_resumed_node_is_owed_once_more: "
        settings output=all:*:sf
        @0 attach w1 -> attached
        @0 credit w1 9 -> ok
        @0 submit r: a -> r new, a #1 to w1
        @1 finish a #1 fail -> ok, r settled, r ended, all owes
        @2 resume r -> ok, a #2 to w1
        @3 finish a #2 value -> ok, r settled, r ended, all owes
        @4 outbox all -> cursor 1 next 3
    ";
    deliveries_are_confirmed_in_any_order: "
        settings output=all:*:sf
        @0 attach w1 -> attached
        @0 credit w1 9 -> ok
        @0 submit r: a*4 -> r new, a0 #1 to w1, a1 #1 to w1, a2 #1 to w1, a3 #1 to w1
        @1 finish a0 #1 value | a1 #1 value | a2 #1 value | a3 #1 value -> ok, ok, ok, ok, r settled, r ended, all owes
        @2 confirm all 2 4 -> ok
        @2 outbox all -> cursor 1 next 5 confirmed 2 4
        @3 confirm all 2 -> ok
        @3 restart -> ok
        @4 outbox all -> cursor 1 next 5 confirmed 2 4
        @5 confirm all 1 -> ok
        @5 outbox all -> cursor 3 next 5 confirmed 4
        @6 confirm all 1 3 -> ok
        @6 outbox all -> cursor 5 next 5
        @7 confirm all 4 -> ok
        @8 restart -> ok
        @8 outbox all -> cursor 5 next 5
    ";
    what_is_not_owed_cannot_be_confirmed: "
        settings output=all:*:sf
        @0 attach w1 -> attached
        @0 credit w1 9 -> ok
        @0 submit r: a -> r new, a #1 to w1
        @1 finish a #1 value -> ok, r settled, r ended, all owes
        @2 confirm all 2 -> INVALID_REQUEST
        @2 confirm all 0 -> INVALID_REQUEST
        @2 confirm all 1 7 -> INVALID_REQUEST
        @2 confirm nowhere 1 -> UNKNOWN_NAME
        @2 outbox all -> cursor 1 next 2
    ";
    a_full_outbox_stops_intake_and_never_completions: "
        settings output=all:*:sf outbox=5
        @0 attach w1 -> attached
        @0 credit w1 9 -> ok
        @0 submit r: a*7 -> r new, a0 #1 to w1, a1 #1 to w1, a2 #1 to w1, a3 #1 to w1, a4 #1 to w1, a5 #1 to w1, a6 #1 to w1
        @1 finish a0 #1 value | a1 #1 value | a2 #1 value -> ok, ok, ok, all owes
        @2 submit s: b -> s new, b #1 to w1
        @3 finish a3 #1 value -> ok, all owes
        @3 submit t: c -> OUTBOX_FULL
        @3 submit t from pages pos p 0..1: c -> OUTBOX_FULL
        @3 submit s key k: b -> OUTBOX_FULL
        @4 finish a4 #1 value | a5 #1 value -> ok, ok, all owes
        @5 confirm all 1 2 3 -> ok
        @5 submit t: c -> t new, c #1 to w1
    ";
}
