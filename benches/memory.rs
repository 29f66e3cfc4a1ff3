//! What a waiting node costs in the state machine's memory, by a counting allocator: `cargo bench --bench memory`.
//!
//! The broker alone, without log, overlay and sled; `dagorama bench memory` has the whole process. Bytes asked for, without the
//! allocator's own overhead.

#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    missing_docs,
    reason = "a bench that cannot go on has failed, and prints"
)]

use std::alloc::System;
use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use dagorama::broker::command::{Command, Delay, NewInput, NewNode, NodeRef, Reply, Submission};
use dagorama::broker::outcome::Tx;
use dagorama::broker::types::{Body, Codec, InputUse, Payload, Spec, Timestamp, Turn, WallTime};
use dagorama::broker::{Broker, Settings};
use stats_alloc::{INSTRUMENTED_SYSTEM, Region, StatsAlloc};

#[global_allocator]
static COUNTING: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

/// A run of one node that nobody serves and `width` nodes that wait for it.
fn waiting(spec: &Arc<Spec>, width: u32) -> Submission {
    let node = |inputs| NewNode {
        spec: 0,
        arguments: Payload {
            codec: Codec::Raw,
            body: Body::Inline(Bytes::from_static(b"12345678")),
        },
        inputs,
        delay: Delay::None,
    };
    let gate = NewInput {
        first: NodeRef::New(0),
        count: 1,
        mode: InputUse::Value,
    };
    let mut nodes = vec![node(Vec::new())];
    nodes.extend((0..width).map(|_| node(vec![gate])));
    Submission {
        key: None,
        specs: vec![Arc::clone(spec)],
        nodes,
        root: width,
        tags: BTreeMap::new(),
        origin: None,
    }
}

fn main() {
    for (runs, width) in [(10_000u32, 99u32), (1_000, 999), (10, 99_999)] {
        let spec = Arc::new(Spec::of("nobody"));
        let region = Region::new(COUNTING);
        let mut broker = Broker::new(Settings::default(), [1; 16]);
        for n in 0..runs {
            let turn = Turn {
                now: Timestamp(u64::from(n) + 1),
                wall: WallTime(1),
                seed: u64::from(n),
            };
            let mut tx = Tx::default();
            let command = Command::Submit(vec![waiting(&spec, width)]);
            match broker.apply(&mut tx, turn, command) {
                Reply::Submitted(list) => assert!(list[0].is_ok(), "{list:?}"),
                other => panic!("{other:?}"),
            }
        }
        let held = region.change();
        // What a reallocation adds or gives back is counted in both already.
        let bytes = held.bytes_allocated.saturating_sub(held.bytes_deallocated);
        let nodes = (runs * (width + 1)) as usize;
        println!(
            "{runs} runs of {} nodes: {} bytes a node",
            width + 1,
            bytes / nodes
        );
        drop(std::hint::black_box(broker));
    }
}
