//! Why a node does not run: each reason, and the most useful one when there are several.

use super::script::scripts;

scripts! {
    each_reason_before_a_worker_has_it: "
        settings lease=1000
        spec gpu taint=gpu
        spec slow queue=slow
        spec old action=f fp=h1 pin
        spec named action=x byname
        spec e batch=3/20
        @0 submit r: a:gpu, b:slow, c:old, d:named, g:h, w wait 30, u until 99, i on a -> r new
        @0 explain r -> a no_worker_on_queue default, b no_worker_on_queue slow, c no_worker_on_queue default, d never_announced x, g no_worker_on_queue default, w delayed 30, u delayed_until 99, i inputs 1
        @1 attach w1 actions f e gpu -> attached
        @1 submit s: k:e, l -> s new
        @1 explain r -> a no_worker_tolerates gpu, b no_worker_on_queue slow, c no_worker_has_code h1, d never_announced x, g no_worker_has_action h, w delayed 30, u delayed_until 99, i inputs 1
        @1 explain s -> k batch_filling 1 of 3 until 21, l workers_busy
        @1 explain r limit 2 -> a no_worker_tolerates gpu, b no_worker_on_queue slow
    ";
    a_node_that_runs_has_ended_or_settles: "
        @0 attach w1 -> attached
        @0 credit w1 9 -> ok
        @0 submit r: a, b, c on a -> r new, a #1 to w1, b #1 to w1
        @0 explain r node a -> a leased w1
        @1 finish a #1 tail d with d -> ok, d #1 to w1
        @1 explain r node a -> a settling 1
        @1 explain r -> a settling 1, c inputs 1
        @2 finish d #1 fail -> ok, r settled
        @2 explain r node a -> a ended failed
        @2 explain r node c -> c ended skipped
        @2 explain r node d -> d ended failed
        @3 finish b #1 value -> ok, r ended
        @3 explain r node b -> b ended succeeded
        @3 explain r -> nothing
        @3 explain r node r/9 -> UNKNOWN_NODE
    ";
    a_cancelled_node_has_ended: "
        @0 submit r: a -> r new
        @1 cancel r -> ok, r settled, r ended
        @1 explain r node a -> a ended cancelled
        @1 explain r -> nothing
    ";
    backoff_says_until_when_and_why: "
        settings lease=1000
        spec f attempts=2
        @0 attach w1 -> attached
        @0 credit w1 9 -> ok
        @0 submit r: a -> r new, a #1 to w1
        @1 finish a #1 retryable -> ok
        @2 explain r -> a backoff 11 failures 1 losses 0
    ";
    a_detached_worker_is_no_worker: "
        @0 attach w1 -> attached
        @0 submit r: a -> r new
        @0 explain r -> a workers_busy
        @1 detach w1 -> ok
        @1 explain r -> a no_worker_on_queue default
        @1 totals -> runs 1 nodes 1 ready 1 leases 0 sessions 0 keys 0 stranded default=1
    ";
}
