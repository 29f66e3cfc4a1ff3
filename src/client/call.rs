//! What a handler sees of a call, and what it gives back.

use std::sync::{Arc, Mutex, PoisonError};

use super::ClientError;
use super::data::{Data, Input, NewNode, Outcome, Promise};
use super::link::Link;
use crate::broker::types::{InputUse, RunId, RunSeq, Spec};
use crate::edge::native::codec::{self, AttemptName, Range};
use crate::edge::native::frame::Verb;

/// How a body ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Returned {
    /// With a value.
    Value(Data),
    /// With a structure that refers to nodes.
    Structure {
        /// The structure.
        data: Data,
        /// The nodes it refers to, in order.
        references: Vec<Promise>,
    },
    /// With the promise of a node: its value is that node's value.
    Tail(Promise),
}

impl Returned {
    /// A value as JSON.
    pub fn json(value: &impl serde::Serialize) -> Self {
        Self::Value(Data::json(value))
    }
}

/// How a body failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// Name of the kind of error.
    pub kind: String,
    /// For people.
    pub message: String,
    /// The retry policy of the action covers it.
    pub retryable: bool,
}

impl Failure {
    /// A failure that the retry policy covers.
    pub fn retryable(message: impl Into<String>) -> Self {
        Self {
            kind: "Error".to_owned(),
            message: message.into(),
            retryable: true,
        }
    }

    /// A failure for good.
    pub fn fatal(message: impl Into<String>) -> Self {
        Self {
            retryable: false,
            ..Self::retryable(message)
        }
    }

    pub(super) fn to_data(&self) -> Data {
        Data::json(&serde_json::json!({
            "type": self.kind, "message": self.message, "traceback": "", "pickle": null,
        }))
    }
}

impl From<ClientError> for Failure {
    fn from(error: ClientError) -> Self {
        Self {
            kind: "dagorama.ClientError".to_owned(),
            ..Self::retryable(error.to_string())
        }
    }
}

/// Children that were recorded, shared with the worker when the handler runs on a task of its own.
#[derive(Debug, Clone, Default)]
pub(super) struct Recorded(Arc<Mutex<Vec<codec::Node>>>);

impl Recorded {
    pub(super) fn take(&self) -> Vec<codec::Node> {
        std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn push(&self, node: codec::Node) -> u32 {
        let mut nodes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        nodes.push(node);
        nodes.len() as u32 - 1
    }
}

/// A call to run.
pub struct Call {
    pub(super) link: Link,
    pub(super) lease: codec::Lease,
    pub(super) spec: Arc<Spec>,
    /// Made when the first child is recorded: leaves have none.
    pub(super) recorded: Option<Recorded>,
    created: u32,
    inputs: Option<Vec<Outcome>>,
}

impl std::fmt::Debug for Call {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Call")
            .field("action", &self.spec.action)
            .field("run", &self.run())
            .field("node", &self.node())
            .field("attempt", &self.attempt())
            .finish_non_exhaustive()
    }
}

impl Call {
    pub(super) fn new(link: Link, mut lease: codec::Lease, spec: Arc<Spec>) -> Self {
        let n_delivered = delivered(&lease.ranges)
            .map(|range| range.count)
            .sum::<u32>();
        let inline = std::mem::take(&mut lease.inline);
        let inputs = (inline.len() == n_delivered as usize)
            .then(|| inline.into_iter().map(Outcome::from_wire).collect());
        Self {
            link,
            lease,
            spec,
            recorded: None,
            created: 0,
            inputs,
        }
    }

    /// The run it belongs to.
    #[must_use]
    pub fn run(&self) -> RunId {
        RunId {
            seq: RunSeq(self.lease.run),
            salt: self.lease.salt,
        }
    }

    /// Its number in the run.
    #[must_use]
    pub fn node(&self) -> u32 {
        self.lease.node
    }

    /// Which attempt this is, from 1.
    #[must_use]
    pub fn attempt(&self) -> u32 {
        self.lease.attempt
    }

    /// What it was recorded with.
    #[must_use]
    pub fn spec(&self) -> &Arc<Spec> {
        &self.spec
    }

    /// The node was recorded with other code than this worker announced.
    #[must_use]
    pub fn is_other_code(&self) -> bool {
        self.lease.other_code
    }

    /// The same over all attempts of this call: for what it does outside.
    #[must_use]
    pub fn idempotency_key(&self) -> String {
        format!("{}/{}", self.run(), self.node())
    }

    /// What it is called with.
    #[must_use]
    pub fn arguments(&self) -> Data {
        Data {
            codec: self.lease.codec,
            bytes: self.lease.arguments.clone(),
        }
    }

    /// Its inputs, in the order in which the arguments refer to them. Plain and batch handlers always have them; others load them with
    /// [`Call::load_inputs`] first.
    #[must_use]
    pub fn inputs(&self) -> &[Outcome] {
        self.inputs.as_deref().unwrap_or_default()
    }

    pub(super) fn has_inputs(&self) -> bool {
        self.inputs.is_some()
    }

    /// Reads the inputs, unless they came with the call.
    pub async fn load_inputs(&mut self) -> Result<&[Outcome], ClientError> {
        if self.inputs.is_none() {
            let ranges: Vec<Range> = delivered(&self.lease.ranges).copied().collect();
            let items = super::requests::fetch(&self.link, self.lease.run, ranges).await?;
            self.inputs = Some(items.into_iter().map(Outcome::from_wire).collect());
        }
        Ok(self.inputs())
    }

    /// Records a child. It becomes real when this call returns; not if it fails.
    pub fn child(
        &mut self,
        spec: &Arc<Spec>,
        arguments: Data,
        inputs: impl IntoIterator<Item = Input>,
    ) -> Promise {
        self.record(&NewNode::new(spec, arguments, inputs))
    }

    /// Records a child, with everything that can be said of one.
    pub fn record(&mut self, child: &NewNode) -> Promise {
        let number = self.link.define(&child.spec);
        let recorded = self.recorded.get_or_insert_with(Recorded::default);
        Promise::New(recorded.push(child.to_wire(number)))
    }

    /// Creates children now, before this call returns. They stay if it fails, and an attempt that creates them again gets the same.
    pub async fn create(&mut self, children: &[NewNode]) -> Result<Vec<Promise>, ClientError> {
        let nodes: Vec<codec::Node> = children
            .iter()
            .map(|child| child.to_wire(self.link.define(&child.spec)))
            .collect();
        let n = nodes.len() as u32;
        let create = codec::Create {
            run: self.lease.run,
            node: self.lease.node,
            attempt: self.lease.attempt,
            token: self.lease.token,
            first_child: self.created,
            nodes,
        };
        let asked = self
            .link
            .ask(Verb::Create, true, |out| codec::put_create(out, &create));
        let first = codec::decode_created(asked.body().await?)?;
        self.created += n;
        Ok((first..first + n).map(Promise::Existing).collect())
    }

    pub(super) fn name(&self) -> AttemptName {
        name(&self.lease)
    }
}

pub(super) fn name(lease: &codec::Lease) -> AttemptName {
    AttemptName {
        run: lease.run,
        node: lease.node,
        attempt: lease.attempt,
    }
}

fn delivered(ranges: &[Range]) -> impl Iterator<Item = &Range> {
    ranges.iter().filter(|range| range.mode != InputUse::After)
}
