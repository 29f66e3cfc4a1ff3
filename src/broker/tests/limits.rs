//! Every limit: what is just allowed, what is just too much, and that nothing is stored then.

use super::script::scripts;

scripts! {
    nodes_of_a_run: "
        settings nodes=3
        @0 attach w1 -> attached
        @0 credit w1 9 -> ok
        @0 submit r: a*4 -> GRAPH_TOO_LARGE
        @0 submit r: a*2 -> r new, a0 #1 to w1, a1 #1 to w1
        @1 finish a0 #1 value with b, c -> GRAPH_TOO_LARGE
        @1 create a0 #1 at 0: b, c -> GRAPH_TOO_LARGE
        @1 create a0 #1 at 0: b -> created, b #1 to w1
        @1 create a0 #1 at 1: c -> GRAPH_TOO_LARGE
        @2 finish a0 #1 value with c -> GRAPH_TOO_LARGE
        @2 finish a0 #1 value -> ok
    ";
    edges_of_a_run: "
        settings edges=3
        @0 attach w1 -> attached
        @0 credit w1 9 -> ok
        @0 submit r: a, b*2 on a, c on b0*2 -> GRAPH_TOO_LARGE
        @0 submit r: a, b*2 on a -> r new, a #1 to w1
        @1 finish a #1 value with c, d on c on c -> GRAPH_TOO_LARGE
        @1 finish a #1 value with c, d on c -> ok, b0 #1 to w1, b1 #1 to w1, c #1 to w1
    ";
    inputs_of_a_node: "
        settings inputs=2
        @0 submit r: a*3, z on a0*3 -> GRAPH_TOO_LARGE
        @0 submit r: a*3, z on a0 on a1 after a2 -> GRAPH_TOO_LARGE
        @0 submit r: a*3, z on a0*2 -> r new
    ";
    children_of_a_completion: "
        settings children=2
        @0 attach w1 -> attached
        @0 credit w1 1 -> ok
        @0 submit r: a -> r new, a #1 to w1
        @1 finish a #1 value with b*3 -> GRAPH_TOO_LARGE
        @1 finish a #1 value with b*2 -> ok, r settled
    ";
    depth_of_creation: "
        settings depth=2
        @0 attach w1 -> attached
        @0 credit w1 9 -> ok
        @0 submit r: a -> r new, a #1 to w1
        @1 finish a #1 value with b -> ok, b #1 to w1, r settled
        @2 finish b #1 value with c -> ok, c #1 to w1
        @3 finish c #1 value with d -> GRAPH_TOO_LARGE
        @3 create c #1 at 0: d -> GRAPH_TOO_LARGE
        @4 finish c #1 value -> ok, r ended
    ";
    open_nodes_of_all_runs: "
        settings open=3
        @0 attach w1 -> attached
        @0 credit w1 9 -> ok
        @0 submit r: a*2 -> r new, a0 #1 to w1, a1 #1 to w1
        @0 submit s: b*2 -> QUOTA_PENDING
        @0 submit s: b -> s new, b #1 to w1
        @0 submit t: c -> QUOTA_PENDING
        @1 finish a0 #1 value -> ok
        @1 submit t: c -> t new, c #1 to w1
    ";
    open_leases: "
        settings leases=2
        @0 attach w1 -> attached
        @0 credit w1 9 -> ok
        @0 submit r: a*3 -> r new, a0 #1 to w1, a1 #1 to w1
        @1 finish a0 #1 value -> ok, a2 #1 to w1
    ";
    keys_that_are_remembered: "
        settings keys=2 window=100
        @0 submit r key k1: a -> r new
        @0 submit s from pages key k2: b -> s new
        @0 submit t key k3: c -> INBOX_WINDOW_FULL
        @0 submit t from pages key k3: c -> INBOX_WINDOW_FULL
        @0 deadletter pages key k3 -> INBOX_WINDOW_FULL
        @0 submit r key k1: a -> r existing
        @0 submit t from pages pos p 0..1: c -> t new
    ";
    a_limit_changes_nothing: "
        settings nodes=2
        @0 submit r key k from pages pos p 0..1: a*3 -> GRAPH_TOO_LARGE
        @0 position pages p -> position 0
        @0 submit r key k from pages pos p 0..1: a*2 -> r new
    ";
}
