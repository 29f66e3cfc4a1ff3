//! The client: starts runs, waits for them, reads outcomes, and asks about everything.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use serde::Serialize;
use serde_json::Value;
use tokio::sync::oneshot;

use super::ClientError;
use super::data::{Outcome, Submit, Waited, id, state};
use super::link::{Asked, Link, Nothing, no};
use crate::broker::types::{InputUse, RunId, RunSeq};
use crate::edge::native::codec::{self, Range, Submitted};
use crate::edge::native::frame::Verb;
use crate::edge::native::json::{self, Hello, Kind};

/// Submissions of one frame.
const FRAME_ITEMS: usize = 1_024;
/// Frames of submissions that are sent before the first is answered.
const FRAMES_AT_ONCE: usize = 64;
/// Bytes after which a frame of submissions is sent.
const FRAME_BYTES: usize = 1024 * 1024;

/// A connection to a broker that comes back by itself. Cheap to clone; it closes with the last clone.
#[derive(Clone)]
pub struct Client(Arc<Closing>);

struct Closing(Link);

impl Drop for Closing {
    fn drop(&mut self) {
        self.0.close();
    }
}

impl std::fmt::Debug for Client {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Client")
    }
}

impl Client {
    /// Connects; an error when nobody answers. Later breaks are mended without notice.
    pub async fn connect(url: &str, token: Option<&str>) -> Result<Self, ClientError> {
        let hello = Hello {
            version: crate::edge::native::frame::VERSION,
            kind: Kind::Client,
            token: token.map(str::to_owned),
            name: format!("rust:{}", std::process::id()),
            session: None,
            queues: Vec::new(),
            tolerate: Vec::new(),
            actions: Vec::new(),
        };
        let link = Link::new(url, hello)?;
        let (ready, is_ready) = oneshot::channel();
        tokio::spawn(link.clone().drive(Nothing, false, ready));
        let client = Self(Arc::new(Closing(link)));
        is_ready.await.unwrap_or(Err(ClientError::Closed))?;
        Ok(client)
    }

    fn link(&self) -> &Link {
        &self.0.0
    }

    /// Starts a run. It is durable when this returns.
    pub async fn submit(&self, submit: Submit) -> Result<RunId, ClientError> {
        let mut answers = self.submit_many(vec![submit]).await?;
        answers
            .pop()
            .unwrap_or_else(|| Err(ClientError::Protocol("an answer without items".to_owned())))
    }

    /// Starts runs, many in a frame and many frames at once. An entry a submission.
    pub async fn submit_many(
        &self,
        submits: Vec<Submit>,
    ) -> Result<Vec<Result<RunId, ClientError>>, ClientError> {
        let total = submits.len();
        let mut asked: VecDeque<Asked> = VecDeque::new();
        let mut runs = Vec::with_capacity(total);
        let mut batch = Batch::default();
        for submit in submits {
            // A key makes a repetition safe; one submission without makes its frame unsafe to repeat.
            batch.repeatable &= submit.key.is_some();
            batch.add(self.link(), &submit)?;
            if batch.n as usize >= FRAME_ITEMS || batch.bytes.len() >= FRAME_BYTES {
                asked.push_back(std::mem::take(&mut batch).send(self.link()));
                self.link().room().await;
            }
            // The broker refuses what is too much at once.
            if asked.len() >= FRAMES_AT_ONCE
                && let Some(first) = asked.pop_front()
            {
                submitted(first, &mut runs).await?;
            }
        }
        if batch.n > 0 {
            asked.push_back(batch.send(self.link()));
        }
        for asked in asked {
            submitted(asked, &mut runs).await?;
        }
        Ok(runs)
    }

    /// Waits for the value of a run; without a timeout, until it is known.
    pub async fn wait(&self, run: RunId, timeout: Option<Duration>) -> Result<Waited, ClientError> {
        let timeout_ms = match timeout {
            None => 0,
            Some(timeout) => u32::try_from(timeout.as_millis())
                .unwrap_or(u32::MAX)
                .max(1),
        };
        let wait = codec::Wait {
            seq: run.seq.0,
            salt: run.salt,
            timeout_ms,
        };
        let asked = self
            .link()
            .ask(Verb::Wait, true, |out| codec::put_wait(out, &wait));
        let waited = codec::decode_waited(asked.body().await?)?;
        Ok(match waited.item {
            Some(item) => Waited::Ended(Outcome::from_wire(item)),
            None => Waited::Running {
                state: state(waited.state),
                hint: waited.hint,
            },
        })
    }

    /// Reads the outcomes of neighbouring nodes of a run, in order.
    pub async fn fetch(
        &self,
        run: RunId,
        first: u32,
        count: u32,
    ) -> Result<Vec<Outcome>, ClientError> {
        let range = Range {
            first,
            count,
            mode: InputUse::Value,
            new: false,
        };
        let items = fetch(self.link(), run.seq.0, vec![range]).await?;
        Ok(items.into_iter().map(Outcome::from_wire).collect())
    }

    async fn document(
        &self,
        verb: Verb,
        repeatable: bool,
        asked: &impl Serialize,
    ) -> Result<Value, ClientError> {
        let body: Bytes = json::write(asked);
        let asked = self
            .link()
            .ask(verb, repeatable, |out| out.extend_from_slice(&body));
        let answer = asked.body().await?;
        serde_json::from_slice(&answer).map_err(|error| ClientError::Protocol(error.to_string()))
    }

    /// Stops a run.
    pub async fn cancel(&self, run: RunId, reason: &str) -> Result<(), ClientError> {
        let asked = json::Cancel {
            run: id(run),
            reason: reason.to_owned(),
        };
        self.document(Verb::Cancel, true, &asked).await.map(drop)
    }

    /// Begins the next round of an ended run.
    pub async fn resume(&self, run: RunId) -> Result<(), ClientError> {
        let asked = json::Resume { run: id(run) };
        self.document(Verb::Resume, false, &asked).await.map(drop)
    }

    /// The history of a run after an event number.
    pub async fn events(&self, run: RunId, after: u64, limit: usize) -> Result<Value, ClientError> {
        let asked = json::Events {
            run: id(run),
            after,
            limit: Some(limit),
        };
        self.document(Verb::Events, true, &asked).await
    }

    /// Why the nodes of a run do not run.
    pub async fn explain(
        &self,
        run: RunId,
        node: Option<u32>,
        limit: usize,
    ) -> Result<Value, ClientError> {
        let asked = json::Explain {
            run: id(run),
            node,
            limit: Some(limit),
        };
        self.document(Verb::Explain, true, &asked).await
    }

    /// Runs, newest first.
    pub async fn runs(
        &self,
        state: Option<&str>,
        tag: Option<&str>,
        limit: usize,
    ) -> Result<Value, ClientError> {
        let asked = json::Runs {
            state: state.map(str::to_owned),
            tag: tag.map(str::to_owned),
            limit: Some(limit),
        };
        self.document(Verb::Runs, true, &asked).await
    }

    /// One run, with its nodes if wanted.
    pub async fn show(&self, run: RunId, nodes: bool) -> Result<Value, ClientError> {
        let run = id(run);
        self.document(Verb::Show, true, &json::Show { run, nodes })
            .await
    }

    /// Totals.
    pub async fn status(&self) -> Result<Value, ClientError> {
        self.document(Verb::Status, true, &serde_json::json!({}))
            .await
    }

    /// Dead letters: the request as PROTOCOL §2 has it.
    pub async fn dlq(&self, request: &Value) -> Result<Value, ClientError> {
        let repeatable = matches!(request["do"].as_str(), Some("list" | "show"));
        self.document(Verb::Dlq, repeatable, request).await
    }

    /// Routes and outputs.
    pub async fn bridges(&self) -> Result<Value, ClientError> {
        self.document(Verb::Bridges, true, &serde_json::json!({"do": "list"}))
            .await
    }
}

/// Waits for the answer to a frame of submissions.
async fn submitted(
    asked: Asked,
    runs: &mut Vec<Result<RunId, ClientError>>,
) -> Result<(), ClientError> {
    for item in codec::decode_submitted(asked.body().await?)? {
        runs.push(match item {
            Submitted::Run { seq, salt, .. } => Ok(RunId {
                seq: RunSeq(seq),
                salt,
            }),
            Submitted::Refused(reason) => Err(no(&reason)),
        });
    }
    Ok(())
}

/// Reads outcomes; all frames of the answer.
pub(super) async fn fetch(
    link: &Link,
    run: u64,
    ranges: Vec<Range>,
) -> Result<Vec<codec::Item>, ClientError> {
    let fetch = codec::Fetch { run, ranges };
    let asked = link.ask(Verb::Fetch, true, |out| codec::put_fetch(out, &fetch));
    let mut items = Vec::new();
    for part in asked.parts().await? {
        items.append(&mut codec::decode_items(part)?);
    }
    Ok(items)
}

/// Submissions of one frame.
struct Batch {
    n: u32,
    bytes: Vec<u8>,
    repeatable: bool,
}

impl Default for Batch {
    fn default() -> Self {
        Self {
            n: 0,
            bytes: Vec::new(),
            repeatable: true,
        }
    }
}

impl Batch {
    fn add(&mut self, link: &Link, submit: &Submit) -> Result<(), ClientError> {
        let nodes = submit
            .nodes
            .iter()
            .map(|node| node.to_wire(link.define(&node.spec)))
            .collect();
        let key = Bytes::from(submit.key.clone().unwrap_or_default());
        let tags = if submit.tags.is_empty() {
            Bytes::new()
        } else {
            json::write(&submit.tags)
        };
        if key.len() > usize::from(u16::MAX) || tags.len() > usize::from(u16::MAX) {
            return Err(ClientError::Data(
                "a key or tags of more than 65,535 bytes".to_owned(),
            ));
        }
        let submit = codec::Submit {
            key,
            tags,
            root: submit.root,
            nodes,
        };
        codec::put_submit(&mut self.bytes, &submit);
        self.n += 1;
        Ok(())
    }

    fn send(self, link: &Link) -> Asked {
        link.ask(Verb::Submit, self.repeatable, |out| {
            out.extend_from_slice(&self.n.to_le_bytes());
            out.extend_from_slice(&self.bytes);
        })
    }
}
