//! What calls carry: payloads, nodes to create, results.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::ClientError;
use crate::broker::types::{Codec, InputUse, NodeState, RunId, Spec};
use crate::edge::native::codec::{self, Delay, Range};

/// Bytes, and how to read them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Data {
    /// How to read them.
    pub codec: Codec,
    /// The bytes.
    pub bytes: Bytes,
}

impl Data {
    /// Bytes without further meaning.
    pub fn raw(bytes: impl Into<Bytes>) -> Self {
        Self {
            codec: Codec::Raw,
            bytes: bytes.into(),
        }
    }

    /// A value as JSON. What JSON cannot say (a map with keys that are no texts) becomes `null`.
    pub fn json(value: &impl Serialize) -> Self {
        Self {
            codec: Codec::Json,
            bytes: serde_json::to_vec(value)
                .unwrap_or_else(|_| b"null".to_vec())
                .into(),
        }
    }

    /// Reads JSON.
    pub fn to_json<T: DeserializeOwned>(&self) -> Result<T, ClientError> {
        if self.codec != Codec::Json {
            return Err(ClientError::Data(format!(
                "it is {:?}, not JSON",
                self.codec
            )));
        }
        serde_json::from_slice(&self.bytes).map_err(|error| ClientError::Data(error.to_string()))
    }
}

/// The spec of an action with all defaults, on queue `default`.
#[must_use]
pub fn spec(action: &str) -> Arc<Spec> {
    Arc::new(Spec::of(action))
}

/// A node whose value is to come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Promise {
    /// Position in the list that is being created.
    New(u32),
    /// Number in the run.
    Existing(u32),
}

impl Promise {
    /// Used for its value.
    #[must_use]
    pub fn value(self) -> Input {
        Input {
            node: self,
            mode: InputUse::Value,
        }
    }

    /// Used for its outcome, also when it failed.
    #[must_use]
    pub fn outcome(self) -> Input {
        Input {
            node: self,
            mode: InputUse::Outcome,
        }
    }

    /// Waited for, without receiving anything.
    #[must_use]
    pub fn after(self) -> Input {
        Input {
            node: self,
            mode: InputUse::After,
        }
    }
}

/// What a node waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Input {
    /// The node.
    pub node: Promise,
    /// What for.
    pub mode: InputUse,
}

/// Inputs as ranges: neighbours become one.
pub(super) fn ranges(inputs: impl IntoIterator<Item = Input>) -> Vec<Range> {
    let mut ranges: Vec<Range> = Vec::new();
    for input in inputs {
        let (first, new) = match input.node {
            Promise::New(at) => (at, true),
            Promise::Existing(node) => (node, false),
        };
        match ranges.last_mut() {
            Some(last)
                if last.new == new
                    && last.mode == input.mode
                    && last.first.checked_add(last.count) == Some(first) =>
            {
                last.count += 1;
            }
            _ => ranges.push(Range {
                first,
                count: 1,
                mode: input.mode,
                new,
            }),
        }
    }
    ranges
}

/// A node to create.
#[derive(Debug, Clone)]
pub struct NewNode {
    /// What to run, where and how.
    pub spec: Arc<Spec>,
    /// What it is called with.
    pub arguments: Data,
    /// What it waits for, in the order in which the arguments refer to them.
    pub inputs: Vec<Input>,
    /// When it may start.
    pub delay: Delay,
}

impl NewNode {
    /// A node that may start when its inputs are there.
    pub fn new(spec: &Arc<Spec>, arguments: Data, inputs: impl IntoIterator<Item = Input>) -> Self {
        Self {
            spec: Arc::clone(spec),
            arguments,
            inputs: inputs.into_iter().collect(),
            delay: Delay::None,
        }
    }

    /// As it is sent; `number` is the connection's for its spec.
    pub(super) fn to_wire(&self, number: u32) -> codec::Node {
        codec::Node {
            spec: number,
            codec: self.arguments.codec,
            delay: self.delay,
            ranges: ranges(self.inputs.iter().copied()),
            arguments: self.arguments.bytes.clone(),
        }
    }
}

/// A run to start.
#[derive(Debug, Clone)]
pub struct Submit {
    /// Makes it idempotent: the same key gives the same run.
    pub key: Option<String>,
    /// For people.
    pub tags: BTreeMap<String, String>,
    /// Its first nodes: inputs name earlier ones.
    pub nodes: Vec<NewNode>,
    /// Which of them is the run's value.
    pub root: u32,
}

impl Submit {
    /// A run that begins with one call.
    pub fn call(spec: &Arc<Spec>, arguments: Data) -> Self {
        Self {
            key: None,
            tags: BTreeMap::new(),
            nodes: vec![NewNode::new(spec, arguments, [])],
            root: 0,
        }
    }

    /// The same with a key: the same key gives the same run.
    #[must_use]
    pub fn with_key(mut self, key: impl Into<String>) -> Self {
        self.key = Some(key.into());
        self
    }

    /// The same with a tag.
    #[must_use]
    pub fn with_tag(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.tags.insert(name.into(), value.into());
        self
    }
}

/// How a node ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outcome {
    /// The node that was asked for.
    pub node: u32,
    /// Its state.
    pub state: NodeState,
    /// Value, structure or error; empty when there is none.
    pub data: Data,
    /// The nodes that a structure refers to, in order: fetch them in the same way.
    pub references: Vec<u32>,
}

impl Outcome {
    pub(super) fn from_wire(item: codec::Item) -> Self {
        let references = item
            .ranges
            .iter()
            .flat_map(|range| range.first..range.first.saturating_add(range.count))
            .collect();
        Self {
            node: item.node,
            state: state(item.state),
            data: Data {
                codec: item.codec,
                bytes: item.body,
            },
            references,
        }
    }

    /// Whether it has a value.
    #[must_use]
    pub fn is_success(&self) -> bool {
        self.state == NodeState::Succeeded
    }
}

pub(super) fn state(number: u8) -> NodeState {
    match number {
        0 => NodeState::Waiting,
        1 => NodeState::Ready,
        2 => NodeState::Leased,
        3 => NodeState::Backoff,
        4 => NodeState::Settling,
        5 => NodeState::Succeeded,
        6 => NodeState::Failed,
        7 => NodeState::Cancelled,
        _ => NodeState::Skipped,
    }
}

/// What became of a run that was waited for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Waited {
    /// Its value, or its error, is known.
    Ended(Outcome),
    /// The time was over first.
    Running {
        /// State of its root.
        state: NodeState,
        /// What might be missing, for people; may be empty.
        hint: String,
    },
}

/// The text of a run id, as the JSON verbs take it.
pub(super) fn id(run: RunId) -> String {
    run.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbouring_inputs_become_one_range() {
        let range = |first, count, mode, new| Range {
            first,
            count,
            mode,
            new,
        };
        let new = |at| Promise::New(at);
        let old = |node| Promise::Existing(node);
        for (name, inputs, expected) in [
            ("none", vec![], vec![]),
            (
                "three in a row",
                vec![new(4).value(), new(5).value(), new(6).value()],
                vec![range(4, 3, InputUse::Value, true)],
            ),
            (
                "another use",
                vec![new(4).value(), new(5).outcome(), new(6).after()],
                vec![
                    range(4, 1, InputUse::Value, true),
                    range(5, 1, InputUse::Outcome, true),
                    range(6, 1, InputUse::After, true),
                ],
            ),
            (
                "backwards, twice and in another list",
                vec![
                    new(1).value(),
                    new(0).value(),
                    new(0).value(),
                    old(1).value(),
                ],
                vec![
                    range(1, 1, InputUse::Value, true),
                    range(0, 1, InputUse::Value, true),
                    range(0, 1, InputUse::Value, true),
                    range(1, 1, InputUse::Value, false),
                ],
            ),
        ] {
            assert_eq!(ranges(inputs), expected, "{name}");
        }
    }

    #[test]
    fn data_says_what_it_is() {
        assert_eq!(
            Data::json(&[1, 2]).to_json::<Vec<u8>>().expect("a list"),
            [1, 2]
        );
        assert!(Data::json(&"text").to_json::<u8>().is_err());
        assert!(Data::raw("1").to_json::<u8>().is_err());
    }
}
