//! Submissions: yes, each no, and again.

use super::script::scripts;

scripts! {
    a_run_is_created_leased_and_ends: "
        @0 attach w1 -> attached
        @0 credit w1 1 -> ok
        @1 submit r: a -> r new, a #1 to w1
        @2 finish a #1 value -> ok, r settled, r ended
        @3 run r -> succeeded round 1 root succeeded at a events 3 succeeded=1
        @3 nodes r -> a succeeded #1
    ";
    a_diamond_runs_in_the_order_of_its_edges: "
        @0 attach w1 -> attached
        @0 credit w1 9 -> ok
        @1 submit r: a, b on a, c on a, d on b on c -> r new, a #1 to w1
        @2 finish a #1 value -> ok, b #1 to w1, c #1 to w1
        @3 finish c #1 value -> ok
        @3 nodes r -> a succeeded #1, b leased #1, c succeeded #1, d waiting
        @4 finish b #1 value -> ok, d #1 to w1
        @5 finish d #1 value -> ok, r settled, r ended
        @6 run r -> succeeded round 1 root succeeded at d events 12 succeeded=4
    ";
    a_range_of_inputs_counts_each_of_them: "
        @0 attach w1 -> attached
        @0 credit w1 9 -> ok
        @1 submit r: a*3, z on a0*3 -> r new, a0 #1 to w1, a1 #1 to w1, a2 #1 to w1
        @1 explain r node z -> z inputs 3
        @2 finish a2 #1 value | a0 #1 value -> ok, ok
        @2 explain r node z -> z inputs 1
        @3 finish a1 #1 value -> ok, z #1 to w1
    ";
    an_input_named_twice_is_satisfied_once_for_each_time: "
        @0 attach w1 -> attached
        @0 credit w1 9 -> ok
        @1 submit r: a, z on a on a after a -> r new, a #1 to w1
        @2 finish a #1 value -> ok, z #1 to w1
        @3 finish z #1 value -> ok, r settled, r ended
    ";
    the_root_settles_before_the_rest_has_ended: "
        @0 attach w1 -> attached
        @0 credit w1 9 -> ok
        @1 submit r root a: a, b -> r new, a #1 to w1, b #1 to w1
        @2 finish a #1 value -> ok, r settled
        @2 run r -> running round 1 root succeeded at a events 5 leased=1 succeeded=1
        @3 finish b #1 value -> ok, r ended
    ";
    a_key_gives_the_first_run_again: "
        @0 submit r key k: a -> r new
        @1 submit r key k: a -> r existing
        @1 submit other key k2: b -> other new
        @1 submit x key k: a, b -> SUBMISSION_CONFLICT
        @2 totals -> runs 2 nodes 2 ready 2 leases 0 sessions 0 keys 2 stranded default=2
    ";
    a_key_gives_the_ended_run_again: "
        @0 attach w1 -> attached
        @0 credit w1 1 -> ok
        @0 submit r key k: a -> r new, a #1 to w1
        @1 finish a #1 value -> ok, r settled, r ended
        @2 submit r key k: a -> r existing
        @3 restart -> ok
        @4 submit r key k: a -> r existing
        @4 submit r key k content z: a -> SUBMISSION_CONFLICT
    ";
    a_key_holds_as_long_as_its_run_even_after_the_window: "
        settings window=100
        @0 attach w1 -> attached
        @0 submit r key k: a -> r new
        @5000 tick -> ok
        @5000 submit r key k: a -> r existing
        @5001 attach w2 -> attached
        @5001 credit w2 1 -> ok, a #1 to w2
        @5002 finish a #1 value -> ok, r settled, r ended
        @9000 tick -> ok
        @9001 submit r key k: a -> r existing
    ";
    each_submission_of_a_list_is_all_or_nothing_by_itself: "
        @0 submit r: a | bad: b on b | s: c -> r new, GRAPH_CYCLE, s new
        @1 open -> s running, r running
    ";
    the_same_key_twice_in_one_list: "
        @0 submit r key k: a | r key k: a | x key k content z: a -> r new, r existing, SUBMISSION_CONFLICT
    ";
    malformed_submissions: "
        @0 submit r: -> INVALID_REQUEST
        @0 submit r root 5: a -> INVALID_REQUEST
        @0 submit r: a:spec=3 -> INVALID_REQUEST
        @0 submit r: a, b on a*0 -> INVALID_REQUEST
        @0 totals -> runs 0 nodes 0 ready 0 leases 0 sessions 0 keys 0
    ";
    specs_with_impossible_numbers: "
        spec none attempts=0
        spec lossless losses=0
        spec empty batch=0/5
        @0 submit r: a:none -> INVALID_REQUEST
        @0 submit r: a:lossless -> INVALID_REQUEST
        @0 submit r: a:empty -> INVALID_REQUEST
    ";
    edges_of_a_submission_point_back_within_it: "
        @0 submit r: a on new:0 -> GRAPH_CYCLE
        @0 submit r: a on b, b -> GRAPH_CYCLE
        @0 submit r: a, b on a*2 -> GRAPH_CYCLE
        @0 submit r: a, b on new:7 -> UNKNOWN_NODE
        @0 submit r: a, b on old:0 -> UNKNOWN_NODE
        @0 submit r: a, b on new:0*4294967295 -> GRAPH_TOO_LARGE
        @0 submit r: a, b on new:4294967295*1 -> UNKNOWN_NODE
        @0 totals -> runs 0 nodes 0 ready 0 leases 0 sessions 0 keys 0
    ";
    a_large_body_must_be_stored_first: "
        @0 submit r: a bytes 3073 -> PAYLOAD_TOO_LARGE
        @0 submit r: a bytes 3072, b stored 5000000 -> r new
    ";
    a_pickle_may_come_from_a_client_and_not_from_a_bridge: "
        @0 submit r: a pickle -> r new
        @0 submit s from pages: b pickle -> CODEC_REFUSED
        @0 submit s from pages: b -> s new
    ";
    a_refused_submission_does_not_take_its_key: "
        @0 submit r key k: a on a -> GRAPH_CYCLE
        @0 submit r key k: a -> r new
    ";
    an_empty_list_is_answered_with_an_empty_list: "
        @0 expire -> nothing
        @0 touch -> nothing
    ";
    runs_get_ascending_numbers_across_a_restart: "
        @0 submit r: a -> r new
        @1 restart -> ok
        @1 submit s: b -> s new
        @2 open -> s running, r running
        @2 open limit 1 -> s running
    ";
    questions_about_what_nobody_has: "
        @0 submit r: a -> r new
        @1 run ghost -> UNKNOWN_RUN
        @1 run r~ -> UNKNOWN_RUN
        @1 nodes ghost -> UNKNOWN_RUN
        @1 explain ghost -> UNKNOWN_RUN
        @1 value ghost/0 -> UNKNOWN_NODE
        @1 value r/7 -> UNKNOWN_NODE
        @1 nodes r limit 1 -> a ready
    ";
}
