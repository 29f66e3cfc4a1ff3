//! Promises that would wait in a circle when a run is resumed.
//!
//! Inputs always name earlier nodes, so they never form a circle. A body that ended with a promise may refer to any ended node, though,
//! also to one that was skipped *while it waited for that body*: harmless in its round, where both have ended, but in the next one
//! each would wait for the other, for ever (I22). Such a body is run again instead; all other promises are kept.
//!
//! Nothing here recurses, and each pass is linear in the nodes and edges that are opened again.

use std::collections::BTreeSet;

use super::run::{Body, Draft, Run};
use super::types::{InputRange, InputUse, NodeIndex, NodeState};

/// The nodes of an ended run whose bodies must run again although they had ended with a promise.
pub(super) fn to_run_again(run: &Run) -> BTreeSet<u32> {
    let mut again = BTreeSet::new();
    let Some(draft) = &run.draft else {
        return again;
    };
    let settles = |node: u32| run.core(node).body != Body::Plain;
    let open: Vec<bool> = (0..run.len())
        .map(|node| run.state(node) != NodeState::Succeeded)
        .collect();
    if !(0..run.len()).any(|node| open[node as usize] && settles(node)) {
        return again;
    }
    loop {
        let left = in_circles(&open, |node| waits_for(run, draft, &again, node));
        let before = again.len();
        again.extend(left.into_iter().filter(|node| settles(*node)));
        if again.len() == before {
            return again;
        }
    }
}

/// What a node will wait for in the next round.
fn waits_for(run: &Run, draft: &Draft, again: &BTreeSet<u32>, node: u32) -> Vec<InputRange> {
    let one = |to: u32| InputRange {
        first: NodeIndex(to),
        count: 1,
        mode: InputUse::Value,
    };
    match run.core(node).body {
        Body::Structure if !again.contains(&node) => {
            draft.references.get(&node).cloned().unwrap_or_default()
        }
        Body::Tail if !again.contains(&node) => {
            draft.tails.get(&node).map(|to| one(*to)).into_iter().collect()
        }
        _ => draft.inputs(node).to_vec(),
    }
}

/// The nodes that are on a circle or between two of them: what remains when all that wait for nobody, and all that nobody waits for,
/// have been taken away.
fn in_circles(open: &[bool], waits_for: impl Fn(u32) -> Vec<InputRange>) -> Vec<u32> {
    let mut edges: Vec<(u32, u32)> = Vec::new();
    for node in (0..open.len() as u32).filter(|node| open[*node as usize]) {
        for range in waits_for(node) {
            let inputs = range.first.0..range.first.0 + range.count;
            edges.extend(inputs.filter(|to| open[*to as usize]).map(|to| (node, to)));
        }
    }
    let mut left = open.to_vec();
    remove_ends(&mut left, &mut edges);
    for edge in &mut edges {
        *edge = (edge.1, edge.0);
    }
    remove_ends(&mut left, &mut edges);
    (0..).zip(left).filter(|(_, left)| *left).map(|(node, _)| node).collect()
}

/// Takes away nodes from which no edge leads to a node that is left, until there are none.
fn remove_ends(left: &mut [bool], edges: &mut [(u32, u32)]) {
    edges.sort_unstable_by_key(|(_, to)| *to);
    let mut out = vec![0_u32; left.len()];
    for (from, to) in edges.iter() {
        out[*from as usize] += u32::from(left[*from as usize] && left[*to as usize]);
    }
    let mut ends: Vec<u32> = (0..left.len() as u32)
        .filter(|node| left[*node as usize] && out[*node as usize] == 0)
        .collect();
    while let Some(end) = ends.pop() {
        left[end as usize] = false;
        let first = edges.partition_point(|(_, to)| *to < end);
        for (from, _) in edges[first..].iter().take_while(|(_, to)| *to == end) {
            let from = *from as usize;
            if left[from] {
                out[from] -= 1;
                if out[from] == 0 {
                    ends.push(from as u32);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn circles(edges: &[(u32, u32)], n: usize) -> Vec<u32> {
        in_circles(&vec![true; n], |node| {
            let mine = edges.iter().filter(|(from, _)| *from == node);
            mine.map(|(_, to)| InputRange {
                first: NodeIndex(*to),
                count: 1,
                mode: InputUse::Value,
            })
            .collect()
        })
    }

    #[test]
    fn what_is_on_a_circle_is_left() {
        for (edges, n, left) in [
            (&[][..], 3, &[][..]),
            (&[(1, 0), (2, 1), (2, 0)], 3, &[]),
            (&[(0, 1), (1, 0), (2, 0), (0, 3)], 4, &[0, 1]),
            (&[(0, 0)], 1, &[0]),
            (&[(0, 1), (1, 0), (1, 2), (2, 3), (3, 4), (4, 3)], 5, &[0, 1, 2, 3, 4]),
            (&[(1, 0), (1, 0), (0, 1)], 2, &[0, 1]),
        ] {
            assert_eq!(circles(edges, n), left, "{edges:?}");
        }
    }

    #[test]
    fn a_long_chain_has_no_circle() {
        let n = 20_000;
        let open = vec![true; n];
        let left = in_circles(&open, |node| {
            let to = NodeIndex(node.saturating_sub(1));
            let one = InputRange { first: to, count: 1, mode: InputUse::Value };
            if node == 0 { Vec::new() } else { vec![one] }
        });
        assert!(left.is_empty());
    }
}
