//! Completions: the outcome of an attempt, and the children that become real with it.
//!
//! A completion is accepted while its lease is the current one, however late it is by the clock (G3). A repetition of the accepted
//! one gets the first answer. Everything is checked before anything is written; then children, outcome and successors are one
//! commit (G2, G7).
//!
//! Children may also be created before the attempt ends (a flush). They are known by (parent, position among its children), stay
//! if the attempt fails, and a later attempt that creates them again gets the same ones. A later attempt that brings them with its
//! completion instead gets new ones.

use super::cascade::{connect, end, follow, forward, outcome};
use super::command::{AttemptEnd, Code, Completion, CreateChildren, NewInput, NodeRef, Rejection};
use super::lease::{Claim, Standing, standing};
use super::node::{
    Family, check_nodes, check_payload, check_ranges, create_nodes, new_child_likeness, resolve,
    too_large,
};
use super::outcome::Tx;
use super::retry::{Failure, close, fail, release};
use super::run::{EdgeKind, Flushed, Run, Stage};
use super::types::{
    BodyEnd, InputRange, InputUse, LeaseToken, NodeIndex, NodeRecord, NodeState, Note, Payload,
    Progress,
};
use super::{Broker, World};

impl Broker {
    pub(super) fn on_finish(
        &mut self,
        tx: &mut Tx,
        completion: Completion,
    ) -> Result<(), Rejection> {
        // Digest 0 means "none", so a hash that happens to be 0 becomes 1.
        let digest = completion.digest.max(1);
        let claim = Claim {
            node: completion.node,
            attempt: completion.attempt,
            token: completion.token,
            digest: Some(digest),
            // A session that came back knows its leases but not their tokens; the edge lets it release only those it holds.
            without_token: completion.token == LeaseToken([0; 16])
                && completion.end == AttemptEnd::Released,
        };
        let world = &mut self.world;
        let run = self.runs.get_mut(&claim.node.run).map(|run| &mut **run);
        if standing(run.as_deref(), world, &claim)? == Standing::Repeated {
            return Ok(());
        }
        let run = run.expect("a current lease's run is resident");
        check_end(run, world, &completion)?;
        let node = claim.node.node.0;
        match completion.end {
            AttemptEnd::Released => release(run, world, tx, node, digest),
            AttemptEnd::Failed {
                error,
                retryable,
                timed_out,
            } => {
                let failure = Failure {
                    error,
                    retryable,
                    timed_out,
                    digest,
                };
                fail(run, world, tx, node, failure);
            }
            returned => {
                let base = create_nodes(
                    run,
                    world,
                    tx,
                    Some(node),
                    &completion.specs,
                    completion.children,
                );
                let mut record = close(run, world, node);
                record.note = Note::None;
                record.digest = digest;
                settle(run, world, tx, node, record, returned, base);
            }
        }
        Ok(())
    }

    pub(super) fn on_create_children(
        &mut self,
        tx: &mut Tx,
        request: CreateChildren,
    ) -> Result<NodeIndex, Rejection> {
        let claim = Claim {
            node: request.node,
            attempt: request.attempt,
            token: request.token,
            digest: None,
            without_token: false,
        };
        let world = &mut self.world;
        let run = self.runs.get_mut(&claim.node.run).map(|run| &mut **run);
        standing(run.as_deref(), world, &claim)?;
        let run = run.expect("a current lease's run is resident");
        let parent = claim.node.node.0;
        if request.children.is_empty() {
            return Err(Rejection::new(
                Code::InvalidRequest,
                "no children were sent",
            ));
        }
        check_n_children(world, request.children.len())?;
        let n_repeated = check_repeated(run, parent, &request)?;
        let base = first_of(run, parent, request.first_child as usize);
        if n_repeated == request.children.len() {
            return Ok(NodeIndex(base));
        }
        check_nodes(
            world,
            &request.specs,
            &request.children,
            Some(Family { run, parent }),
        )?;
        let likenesses: Vec<u64> = request.children[n_repeated..]
            .iter()
            .map(|child| new_child_likeness(&request.specs, child, base))
            .collect();
        let mut children = request.children;
        let mut fresh = children.split_off(n_repeated);
        // Positions count from the part that exists already, which lies right before the part that is new.
        for range in fresh.iter_mut().flat_map(|child| &mut child.inputs) {
            if let NodeRef::New(at) = range.first {
                range.first = NodeRef::Existing(NodeIndex(base + at));
            }
        }
        let first = create_nodes(run, world, tx, Some(parent), &request.specs, fresh);
        run.flushed.entry(parent).or_default().extend(
            (first..)
                .zip(likenesses)
                .map(|(node, likeness)| Flushed { node, likeness }),
        );
        follow(run, world, tx);
        Ok(NodeIndex(base))
    }
}

/// A body has ended with a value, or the promise of one.
fn settle(
    run: &mut Run,
    world: &mut World,
    tx: &mut Tx,
    node: u32,
    mut record: NodeRecord,
    returned: AttemptEnd,
    base: u32,
) {
    match returned {
        AttemptEnd::Tail(target) => {
            let target = resolve(&one(target), base).first.0;
            forward(run, world, tx, node, target, record);
        }
        AttemptEnd::Structure { body, references } => {
            let references: Vec<InputRange> = references
                .iter()
                .map(|range| resolve(range, base))
                .collect();
            record.body = BodyEnd::Structure;
            structure(run, world, tx, node, record, body, references);
        }
        AttemptEnd::Value(value) => {
            record.progress = Progress::Succeeded;
            outcome(run, tx, node, false, value, Vec::new());
            end(run, world, tx, node, record);
        }
        AttemptEnd::Failed { .. } | AttemptEnd::Released => {
            debug_assert!(false, "those leave no value");
        }
    }
    follow(run, world, tx);
}

/// A structure settles when everything it refers to has.
fn structure(
    run: &mut Run,
    world: &mut World,
    tx: &mut Tx,
    node: u32,
    mut record: NodeRecord,
    body: Payload,
    references: Vec<InputRange>,
) {
    let all_there = references.iter().all(|range| {
        (range.first.0..range.first.0 + range.count).all(|to| {
            let to = run.representative(to);
            run.core(to).stage == Stage::Succeeded
        })
    });
    outcome(run, tx, node, false, body, references.clone());
    if all_there {
        record.progress = Progress::Succeeded;
        end(run, world, tx, node, record);
        return;
    }
    record.progress = Progress::Settling;
    run.flushed.remove(&node);
    run.write(tx, node, record);
    run.recount(NodeState::Leased, NodeState::Settling, 1);
    for range in references {
        connect(run, world, node, range, EdgeKind::Reference);
    }
}

fn one(node: NodeRef) -> NewInput {
    NewInput {
        first: node,
        count: 1,
        mode: InputUse::Value,
    }
}

/// Checks what a completion brings.
fn check_end(run: &Run, world: &World, completion: &Completion) -> Result<(), Rejection> {
    let node = completion.node.node.0;
    let family = Some(Family { run, parent: node });
    let listed = completion.children.len() as u32;
    match &completion.end {
        AttemptEnd::Released => return Ok(()),
        AttemptEnd::Failed { error, .. } => return check_payload(error),
        AttemptEnd::Value(value) => check_payload(value)?,
        AttemptEnd::Structure { body, references } => {
            check_payload(body)?;
            check_ranges(world, references, family, listed, listed)?;
        }
        AttemptEnd::Tail(target) => {
            check_ranges(world, &[one(*target)], family, listed, listed)?;
        }
    }
    check_n_children(world, completion.children.len())?;
    check_nodes(world, &completion.specs, &completion.children, family)
}

fn check_n_children(world: &World, n: usize) -> Result<(), Rejection> {
    let limit = world.settings.max_children;
    if n as u64 > u64::from(limit) {
        return Err(too_large("children at once", n as u64, limit.into()));
    }
    Ok(())
}

/// Number of the `at`-th child of a node; of the next one to be created, if it does not exist yet.
fn first_of(run: &Run, parent: u32, at: usize) -> u32 {
    run.flushed
        .get(&parent)
        .and_then(|children| children.get(at))
        .map_or(run.len(), |child| child.node)
}

/// How many of the children exist already. They must be the same, and neighbours of those that do not: the reply has one number.
fn check_repeated(run: &Run, parent: u32, request: &CreateChildren) -> Result<usize, Rejection> {
    let existing = run.flushed.get(&parent).map_or(&[][..], Vec::as_slice);
    let at = request.first_child as usize;
    let Some(repeated) = existing.get(at..) else {
        return Err(Rejection::new(
            Code::InvalidRequest,
            format!(
                "child {at} would follow child {}: send those between first",
                existing.len()
            ),
        ));
    };
    if let Some(child) = request
        .children
        .iter()
        .find(|child| child.spec as usize >= request.specs.len())
    {
        return Err(Rejection::new(
            Code::InvalidRequest,
            format!("a child names spec {} that was not sent", child.spec),
        ));
    }
    let conflict = |at: usize, what: &str| {
        Rejection::new(
            Code::NodeConflict,
            format!("child {at} of node {parent} exists already {what}"),
        )
    };
    let base = first_of(run, parent, at);
    let n = repeated.len().min(request.children.len());
    for (i, (old, new)) in repeated.iter().zip(&request.children).enumerate() {
        if old.node != base + i as u32 {
            return Err(conflict(
                at + i,
                "apart from those before it: flush at the same places",
            ));
        }
        if old.likeness != new_child_likeness(&request.specs, new, base) {
            return Err(conflict(
                at + i,
                "with another specification: an action must create the same children each time",
            ));
        }
    }
    if n > 0 && n < request.children.len() && base + n as u32 != run.len() {
        return Err(conflict(
            at + n - 1,
            "apart from those after it: flush at the same places",
        ));
    }
    Ok(n)
}
