//! Who gets what, in which order.

use super::script::scripts;

scripts! {
    priority_then_the_older_run_then_the_order_of_creation: "
        spec low priority=-1
        spec high priority=7
        @0 submit r: a, b, c:low, d:high -> r new
        @0 submit s: e, f:high -> s new
        @1 attach w1 actions f low high -> attached
        @1 credit w1 1 -> ok, d #1 to w1
        @1 credit w1 1 -> ok, f #1 to w1
        @1 credit w1 9 -> ok, a #1 to w1, b #1 to w1, e #1 to w1, c #1 to w1
    ";
    a_woken_node_of_an_older_run_goes_first: "
        @0 attach w1 -> attached
        @0 credit w1 1 -> ok
        @0 submit r: a, b on a -> r new, a #1 to w1
        @0 submit s: c -> s new
        @1 finish a #1 value -> ok
        @1 credit w1 2 -> ok, b #1 to w1, c #1 to w1
    ";
    a_claim_merges_the_queues_of_its_session: "
        spec g queue=slow
        @0 submit r: a, b:g, c, d:g -> r new
        @1 attach w1 queues default slow actions f g -> attached
        @1 credit w1 4 -> ok, a #1 to w1, b #1 to w1, c #1 to w1, d #1 to w1
    ";
    a_queue_that_nobody_serves_waits: "
        spec g queue=slow
        @0 submit r: a, b:g -> r new
        @1 attach w1 actions f g -> attached
        @1 credit w1 4 -> ok, a #1 to w1
        @1 explain r node b -> b no_worker_on_queue slow
        @1 totals -> runs 1 nodes 2 ready 1 leases 1 sessions 1 keys 0 stranded slow=1
        @2 attach w2 queues slow actions g -> attached
        @2 credit w2 1 -> ok, b #1 to w2
    ";
    a_taint_must_be_tolerated: "
        spec g taint=gpu
        @0 submit r: a:g, b -> r new
        @1 attach w1 actions f g -> attached
        @1 credit w1 4 -> ok, b #1 to w1
        @1 explain r node a -> a no_worker_tolerates gpu
        @2 attach w2 tolerates gpu fpga actions f g -> attached
        @2 credit w2 1 -> ok, a #1 to w2
    ";
    a_tolerant_session_takes_untainted_work_too: "
        @0 attach w1 tolerates gpu -> attached
        @0 credit w1 1 -> ok
        @0 submit r: a -> r new, a #1 to w1
    ";
    a_session_is_given_only_actions_that_it_has: "
        @0 attach w1 actions f -> attached
        @0 credit w1 2 -> ok
        @0 submit r: a:g, b -> r new, b #1 to w1
        @1 explain r node a -> a no_worker_has_action g
        @1 attach w2 actions g -> attached
        @1 credit w2 2 -> ok, a #1 to w2
    ";
    other_code_runs_the_node_and_says_so: "
        spec old action=f fp=h1
        spec new action=f fp=h2
        @0 attach w1 actions new -> attached
        @0 credit w1 2 -> ok
        @0 submit r: a:old, b:new -> r new, a #1 to w1 other code, b #1 to w1
        @1 nodes r -> a leased #1 (other code), b leased #1
    ";
    pinned_code_waits_for_a_worker_that_has_it: "
        spec old action=f fp=h1 pin
        spec new action=f fp=h2
        @0 attach w1 actions new -> attached
        @0 credit w1 2 -> ok
        @0 submit r: a:old, b:new -> r new, b #1 to w1
        @1 explain r node a -> a no_worker_has_code h1
        @1 attach w2 actions old -> attached
        @1 credit w2 1 -> ok, a #1 to w2
    ";
    a_resumed_pinned_node_takes_the_newest_code: "
        spec old action=f fp=h1 pin
        spec new action=f fp=h2 pin
        @0 attach w1 actions old -> attached
        @0 credit w1 1 -> ok
        @0 submit r: a:old -> r new, a #1 to w1
        @1 finish a #1 fail -> ok, r settled, r ended
        @2 close w1 -> ok
        @3 attach w2 actions new -> attached
        @3 credit w2 1 -> ok
        @4 resume r -> ok, a #2 to w2
    ";
    a_run_started_by_name_waits_for_an_announcement: "
        spec named action=g byname
        spec g queue=slow priority=3
        @0 submit r: a:named -> r new
        @0 explain r -> a never_announced g
        @1 attach w1 queues slow actions g -> attached
        @1 credit w1 1 -> ok, a #1 to w1
    ";
    an_announcement_is_remembered: "
        spec named action=g byname
        spec g queue=slow
        @0 attach w1 queues slow actions g -> attached
        @0 close w1 -> ok
        @1 restart -> ok
        @2 submit r: a:named -> r new
        @2 explain r -> a no_worker_on_queue slow
        @3 attach w2 queues slow actions g -> attached
        @3 credit w2 1 -> ok, a #1 to w2
    ";
    what_is_announced_last_counts: "
        spec named action=g byname
        spec one action=g queue=one
        spec two action=g queue=two
        @0 attach w1 queues one actions one -> attached
        @0 attach w2 queues two actions two -> attached
        @1 submit r: a:named -> r new
        @2 credit w1 1 -> ok
        @2 credit w2 1 -> ok, a #1 to w2
    ";
    a_bundle_leaves_when_it_is_full: "
        spec e batch=3/20
        @0 attach w1 actions e -> attached
        @0 credit w1 1 -> ok
        @1 submit r: a:e, b:e -> r new
        @2 explain r node a -> a batch_filling 2 of 3 until 21
        @3 submit s: c:e, d:e -> s new, a #1 to w1 bundle 1, b #1 to w1 bundle 1, c #1 to w1 bundle 1
        @4 nodes s -> c leased #1, d ready
    ";
    a_bundle_leaves_when_its_oldest_call_has_waited: "
        settings lease=1000
        spec e batch=3/20
        @0 attach w1 actions e -> attached
        @0 credit w1 1 -> ok
        @1 submit r: a:e -> r new
        @9 submit s: b:e -> s new
        @20 tick -> ok
        @21 tick -> ok, a #1 to w1 bundle 1, b #1 to w1 bundle 1
    ";
    a_bundle_counts_as_one_call: "
        spec e batch=2/0
        @0 submit r: a:e*5 -> r new
        @1 attach w1 actions e -> attached
        @1 credit w1 2 -> ok, a0 #1 to w1 bundle 1, a1 #1 to w1 bundle 1, a2 #1 to w1 bundle 2, a3 #1 to w1 bundle 2
        @1 credit w1 1 -> ok, a4 #1 to w1 bundle 1
    ";
    each_call_of_a_bundle_ends_by_itself: "
        spec e batch=2/20 attempts=2
        @0 submit r: a:e, b:e -> r new
        @1 attach w1 actions e -> attached
        @1 credit w1 1 -> ok, a #1 to w1 bundle 1, b #1 to w1 bundle 1
        @2 finish a #1 value | b #1 retryable -> ok, ok
        @3 nodes r -> a succeeded #1, b backoff #1 (attempt failed)
    ";
    a_delay_is_waited_for: "
        settings lease=1000
        @0 attach w1 -> attached
        @0 credit w1 3 -> ok
        @1 submit r: a wait 50, b on a -> r new
        @2 nodes r -> a waiting, b waiting
        @2 explain r -> a delayed 51, b inputs 1
        @50 tick -> ok
        @51 tick -> ok, a #1 to w1
    ";
    a_delay_counts_from_creation_and_the_inputs_too: "
        settings lease=1000
        @0 attach w1 -> attached
        @0 credit w1 3 -> ok
        @1 submit r: a, b on a wait 50, c on a wait 5 -> r new, a #1 to w1
        @20 tick -> ok
        @21 finish a #1 value -> ok, c #1 to w1
        @22 explain r node b -> b delayed 51
        @51 tick -> ok, b #1 to w1
    ";
    a_date_is_compared_with_the_calendar: "
        settings lease=100000
        @0 attach w1 -> attached
        @0 credit w1 3 -> ok
        @1 wall 1000 submit r: a until 5000 -> r new
        @2 explain r -> a delayed_until 5000
        @9000 wall 4999 tick -> ok
        @9001 wall 5000 tick -> ok, a #1 to w1
    ";
    a_delay_survives_a_restart: "
        settings lease=1000
        @0 wall 10 submit r: a wait 50, b until 70 -> r new
        @1 restart -> ok
        @2 explain r -> a delayed 50, b delayed_until 70
        @3 attach w1 -> attached
        @3 credit w1 3 -> ok
        @50 wall 60 tick -> ok, a #1 to w1
        @60 wall 70 tick -> ok, b #1 to w1
    ";
    nothing_is_leased_without_credit: "
        @0 attach w1 -> attached
        @0 submit r: a, b, c -> r new
        @0 explain r node a -> a workers_busy
        @1 credit w1 0 -> ok
        @1 credit w1 1 -> ok, a #1 to w1
        @2 finish a #1 value -> ok
        @3 credit w1 1 -> ok, b #1 to w1
    ";
}
