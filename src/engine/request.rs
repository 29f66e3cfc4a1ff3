//! What goes into a turn: a command with the number its reply goes by, what it costs, and how it is refused as a whole.
//!
//! Knows the shapes of commands and replies, and nothing of what commands mean.

use crate::broker::command::{
    AttemptEnd, Code, Command, Completion, NewNode, Rejection, Reply, Submission,
};
use crate::broker::types::{Body, Payload, Spec};

/// The number by which the driver of the engine finds whom a reply belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ticket(pub u64);

/// A command on its way into a turn.
#[derive(Debug, Clone, PartialEq)]
pub struct Request {
    /// Where the reply goes; `None`: nobody waits for it.
    pub ticket: Option<Ticket>,
    /// What is asked.
    pub command: Command,
}

/// What a command costs a turn.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Cost {
    /// Node operations: nodes created or changed, keys and positions taken.
    pub nodes: usize,
    /// Bytes that its facts will about have.
    pub bytes: usize,
}

impl Cost {
    /// Both together.
    #[must_use]
    pub fn plus(self, other: Self) -> Self {
        Self {
            nodes: self.nodes.saturating_add(other.nodes),
            bytes: self.bytes.saturating_add(other.bytes),
        }
    }

    /// Whether neither is over the limit.
    #[must_use]
    pub fn fits(self, limit: Self) -> bool {
        self.nodes <= limit.nodes && self.bytes <= limit.bytes
    }
}

/// Bytes of bookkeeping that a node's fact has beside its payload.
const NODE_BYTES: usize = 32;

/// Whether the command may be refused for load. Everything else is control and never waits for intake.
#[must_use]
pub fn is_intake(command: &Command) -> bool {
    matches!(command, Command::Submit(_) | Command::DeadLetter(_))
}

/// What a command costs. Linear in its nodes, not in its bytes.
#[must_use]
pub fn cost(command: &Command) -> Cost {
    match command {
        Command::Submit(submissions) => sum(submissions.iter().map(submission_cost)),
        Command::Finish(completions) => sum(completions.iter().map(completion_cost)),
        Command::CreateChildren(create) => {
            nodes_cost(&create.children).plus(specs_cost(create.specs.len()))
        }
        Command::DeadLetter(letters) => sum(letters.iter().map(|letter| Cost {
            nodes: 1,
            bytes: NODE_BYTES + inline_bytes(&letter.body),
        })),
        Command::ConfirmOutbox { seqs, .. } => Cost {
            nodes: 1 + seqs.len() / 64,
            bytes: 8 * seqs.len(),
        },
        Command::Expire(runs) => Cost {
            nodes: runs.len(),
            bytes: NODE_BYTES * runs.len(),
        },
        Command::Attach(attach) => specs_cost(attach.actions.len()),
        Command::Touch(_) | Command::Tick => Cost::default(),
        // Credit may lead to that many leases; the broker bounds them itself, so it counts as one.
        Command::Detach(_)
        | Command::Close(_)
        | Command::Credit { .. }
        | Command::Cancel { .. }
        | Command::Resume(_)
        | Command::DropDeadLetter { .. }
        | Command::SeekInbox { .. } => Cost {
            nodes: 1,
            bytes: NODE_BYTES,
        },
    }
}

fn sum(costs: impl Iterator<Item = Cost>) -> Cost {
    costs.fold(Cost::default(), Cost::plus)
}

fn specs_cost(n: usize) -> Cost {
    Cost {
        nodes: 0,
        bytes: n * size_of::<Spec>(),
    }
}

fn submission_cost(submission: &Submission) -> Cost {
    nodes_cost(&submission.nodes)
        .plus(specs_cost(submission.specs.len()))
        .plus(Cost {
            nodes: 1,
            bytes: submission
                .tags
                .iter()
                .map(|(key, value)| key.len() + value.len())
                .sum(),
        })
}

fn completion_cost(completion: &Completion) -> Cost {
    let (payload, references) = match &completion.end {
        AttemptEnd::Value(payload) | AttemptEnd::Failed { error: payload, .. } => {
            (inline_bytes(payload), 0)
        }
        AttemptEnd::Structure { body, references } => (inline_bytes(body), references.len()),
        AttemptEnd::Tail(_) | AttemptEnd::Released => (0, 0),
    };
    nodes_cost(&completion.children)
        .plus(specs_cost(completion.specs.len()))
        .plus(Cost {
            nodes: 1,
            bytes: NODE_BYTES + payload + 8 * references,
        })
}

fn nodes_cost(nodes: &[NewNode]) -> Cost {
    sum(nodes.iter().map(|node| Cost {
        nodes: 1,
        bytes: NODE_BYTES + inline_bytes(&node.arguments) + 8 * node.inputs.len(),
    }))
}

fn inline_bytes(payload: &Payload) -> usize {
    match &payload.body {
        Body::Inline(bytes) => bytes.len(),
        Body::Stored(_) => size_of::<crate::broker::types::PayloadRef>(),
    }
}

/// The reply that refuses every item of a command for the same reason.
#[must_use]
pub fn refuse(command: &Command, rejection: &Rejection) -> Reply {
    let done = |n: usize| Reply::Done(vec![Err(rejection.clone()); n]);
    match command {
        Command::Submit(items) => Reply::Submitted(vec![Err(rejection.clone()); items.len()]),
        Command::CreateChildren(_) => Reply::Created(Err(rejection.clone())),
        Command::DeadLetter(items) => done(items.len()),
        Command::Finish(items) => done(items.len()),
        Command::Expire(items) => done(items.len()),
        _ => done(1),
    }
}

/// "Too much in flight", naming the limit and what was asked.
#[must_use]
pub fn overloaded(what: &str, limit: usize, value: usize) -> Rejection {
    Rejection::new(
        Code::Overloaded,
        format!("{what} would be {value}, the limit is {limit}: send it again in a moment"),
    )
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use bytes::Bytes;

    use super::*;
    use crate::broker::command::{Delay, NewInput, NodeRef};
    use crate::broker::types::{Codec, InputUse, PayloadRef, RunSeq};

    fn inline(n: usize) -> Payload {
        Payload {
            codec: Codec::Raw,
            body: Body::Inline(Bytes::from(vec![0; n])),
        }
    }

    fn node(payload: Payload, inputs: usize) -> NewNode {
        let input = NewInput {
            first: NodeRef::New(0),
            count: 1,
            mode: InputUse::Value,
        };
        NewNode {
            spec: 0,
            arguments: payload,
            inputs: vec![input; inputs],
            delay: Delay::None,
        }
    }

    fn submission(nodes: Vec<NewNode>) -> Submission {
        Submission {
            key: None,
            specs: Vec::new(),
            nodes,
            root: 0,
            tags: BTreeMap::new(),
            origin: None,
        }
    }

    #[test]
    fn cost_counts_nodes_and_inline_bytes_but_not_stored_ones() {
        let stored = Payload {
            codec: Codec::Raw,
            body: Body::Stored(PayloadRef {
                segment: 1,
                offset: 0,
                length: 64 << 20,
                checksum: 0,
            }),
        };
        let small = cost(&Command::Submit(vec![submission(vec![node(inline(0), 0)])]));
        let large = cost(&Command::Submit(vec![submission(vec![
            node(inline(1_000), 2),
            node(stored, 0),
        ])]));
        assert_eq!(small.nodes, 2);
        assert_eq!(large.nodes, 3);
        assert!(large.bytes >= small.bytes + 1_000 && large.bytes < 2_000);
        assert_eq!(cost(&Command::Tick), Cost::default());
    }

    #[test]
    fn a_refusal_has_an_entry_for_every_item() {
        let no = Rejection::new(Code::Overloaded, "no");
        let commands = [
            (
                Command::Submit(vec![submission(vec![]), submission(vec![])]),
                Reply::Submitted(vec![Err(no.clone()), Err(no.clone())]),
            ),
            (Command::Finish(vec![]), Reply::Done(vec![])),
            (
                Command::Expire(vec![RunSeq(1), RunSeq(2), RunSeq(3)]),
                Reply::Done(vec![Err(no.clone()); 3]),
            ),
            (Command::Tick, Reply::Done(vec![Err(no.clone())])),
        ];
        for (command, reply) in commands {
            assert_eq!(refuse(&command, &no), reply);
        }
    }
}
