//! The worker: takes calls, runs handlers, sends completions.
//!
//! Plain handlers run at once on the reading task, without a task or a lock of their own: for short computations. Async handlers
//! run on tasks, at most `slots` at a time. A call that is revoked is aborted, if it is a task. A handler that panics has failed.

use std::collections::{HashMap, HashSet};
use std::future::Future;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{Notify, Semaphore, oneshot};
use tokio::time::Instant;
use tracing::{debug, info, warn};

use super::ClientError;
use super::call::{Call, Failure, Recorded, Returned, name};
use super::completions::{Batch, Credit, Ended, completion, failed_instead};
use super::link::{Link, Push};
use crate::broker::types::Spec;
use crate::edge::convert;
use crate::edge::native::codec::{self, AttemptName, End, Lease};
use crate::edge::native::frame::{Frame, VERSION, Verb};
use crate::edge::native::json::{self, Hello, Kind, Welcome};

/// Refusals after which there is nothing left to end.
const LEASE_IS_OVER: [&str; 6] = [
    "LEASE_EXPIRED",
    "LEASE_REVOKED",
    "LEASE_UNKNOWN",
    "COMPLETION_CONFLICT",
    "UNKNOWN_RUN",
    "UNKNOWN_NODE",
];

type BoxFuture<T> = Pin<Box<dyn Future<Output = T> + Send>>;
type Plain = dyn Fn(&mut Call) -> Result<Returned, Failure> + Send + Sync;
type Async = dyn Fn(Call) -> BoxFuture<Result<Returned, Failure>> + Send + Sync;
type Bundle = dyn Fn(&mut [Call]) -> Vec<Result<Returned, Failure>> + Send + Sync;

#[derive(Clone)]
enum Handler {
    Plain(Arc<Plain>),
    Async(Arc<Async>),
    Bundle(Arc<Bundle>),
}

/// Calls that run on tasks, by attempt. Without a handle: one of a bundle, which is not aborted for one of its calls.
type Held = HashMap<AttemptName, Option<tokio::task::AbortHandle>>;

/// What a worker has done.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Report {
    /// Calls that ended.
    pub calls: u64,
    /// Of those, with a failure.
    pub failed: u64,
    /// Completions that the broker refused: their lease had ended.
    pub refused: u64,
}

#[derive(Debug, Default)]
struct Counters {
    calls: AtomicU64,
    failed: AtomicU64,
    refused: AtomicU64,
}

/// Runs nodes.
#[derive(Debug)]
pub struct Worker;

impl Worker {
    /// Describes a worker.
    pub fn builder(url: &str, token: Option<&str>) -> WorkerBuilder {
        WorkerBuilder {
            url: url.to_owned(),
            token: token.map(str::to_owned),
            name: format!("rust:{}", std::process::id()),
            queues: vec!["default".to_owned()],
            tolerate: Vec::new(),
            slots: 16,
            drain: Duration::from_secs(30),
            actions: Vec::new(),
        }
    }
}

/// A worker before it runs.
#[must_use = "a worker does nothing until it is run"]
pub struct WorkerBuilder {
    url: String,
    token: Option<String>,
    name: String,
    queues: Vec<String>,
    tolerate: Vec<String>,
    slots: usize,
    drain: Duration,
    actions: Vec<(Arc<Spec>, Handler)>,
}

impl std::fmt::Debug for WorkerBuilder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("WorkerBuilder")
            .field("url", &self.url)
            .field("queues", &self.queues)
            .finish_non_exhaustive()
    }
}

impl WorkerBuilder {
    /// For people.
    pub fn name(mut self, name: impl Into<String>) -> Self {
        self.name = name.into();
        self
    }

    /// The queues it serves; `default` if not said.
    pub fn queues(mut self, queues: impl IntoIterator<Item = impl Into<String>>) -> Self {
        self.queues = queues.into_iter().map(Into::into).collect();
        self
    }

    /// Taints it tolerates.
    pub fn tolerate(mut self, taints: impl IntoIterator<Item = impl Into<String>>) -> Self {
        self.tolerate = taints.into_iter().map(Into::into).collect();
        self
    }

    /// How many async handlers run at a time.
    pub fn slots(mut self, slots: usize) -> Self {
        self.slots = slots.max(1);
        self
    }

    /// How long running calls may take to end at the shutdown.
    pub fn drain(mut self, drain: Duration) -> Self {
        self.drain = drain;
        self
    }

    /// An action whose handler is async: it runs on a task of its own.
    pub fn action<F, O>(mut self, spec: &Arc<Spec>, handler: F) -> Self
    where
        F: Fn(Call) -> O + Send + Sync + 'static,
        O: Future<Output = Result<Returned, Failure>> + Send + 'static,
    {
        let handler: Arc<Async> = Arc::new(move |call| Box::pin(handler(call)));
        self.actions
            .push((Arc::clone(spec), Handler::Async(handler)));
        self
    }

    /// An action whose handler is a short computation: it runs at once, before the next call is looked at.
    pub fn plain(
        mut self,
        spec: &Arc<Spec>,
        handler: impl Fn(&mut Call) -> Result<Returned, Failure> + Send + Sync + 'static,
    ) -> Self {
        self.actions
            .push((Arc::clone(spec), Handler::Plain(Arc::new(handler))));
        self
    }

    /// An action whose calls come in bundles (its spec has `batch`): an entry a call.
    pub fn batch(
        mut self,
        spec: &Arc<Spec>,
        handler: impl Fn(&mut [Call]) -> Vec<Result<Returned, Failure>> + Send + Sync + 'static,
    ) -> Self {
        self.actions
            .push((Arc::clone(spec), Handler::Bundle(Arc::new(handler))));
        self
    }

    /// Runs until `shutdown` comes, then finishes what runs and says goodbye. A broker that is away is waited for. An error means that it
    /// will never take this worker.
    pub async fn run(self, shutdown: impl Future<Output = ()>) -> Result<Report, ClientError> {
        let hello = Hello {
            version: VERSION,
            kind: Kind::Worker,
            token: self.token,
            name: self.name,
            session: None,
            queues: self.queues,
            tolerate: self.tolerate,
            actions: self
                .actions
                .iter()
                .map(|(spec, _)| convert::spec_json(None, spec))
                .collect(),
        };
        let link = Link::new(&self.url, hello)?;
        let shared = Arc::new(Shared {
            credit: Credit::new(self.slots),
            slots: Arc::new(Semaphore::new(self.slots)),
            ready: Mutex::default(),
            dirty: Notify::new(),
            held: Mutex::default(),
            counters: Counters::default(),
        });
        let handlers = self
            .actions
            .into_iter()
            .map(|(spec, handler)| (Arc::clone(&spec.action), handler))
            .collect();
        let push = Running {
            shared: Arc::clone(&shared),
            handlers,
            specs: HashMap::new(),
            latest: None,
            batch: Batch::default(),
        };
        let (ready, _) = oneshot::channel();
        let mut driving = tokio::spawn(link.clone().drive(push, true, ready));
        let _flushing = Aborting(tokio::spawn(flush(Arc::clone(&shared), link.clone())));
        let _beating = Aborting(tokio::spawn(heartbeats(link.clone())));
        tokio::select! {
            error = &mut driving => {
                return Err(error.unwrap_or(ClientError::Closed));
            }
            () = shutdown => {}
        }
        shared.credit.drain();
        if tokio::time::timeout(self.drain, drained(&shared, &link))
            .await
            .is_err()
        {
            warn!("some calls did not end in time and are given back");
        }
        for (_, task) in shared.held().drain() {
            if let Some(task) = task {
                task.abort();
            }
        }
        let goodbye = link.ask(Verb::Goodbye, false, |_| ());
        let _ = tokio::time::timeout(Duration::from_secs(2), goodbye.parts()).await;
        link.close();
        let _ = driving.await;
        let counters = &shared.counters;
        Ok(Report {
            calls: counters.calls.load(Ordering::Relaxed),
            failed: counters.failed.load(Ordering::Relaxed),
            refused: counters.refused.load(Ordering::Relaxed),
        })
    }
}

/// A task that ends with its owner.
struct Aborting(tokio::task::JoinHandle<()>);

impl Drop for Aborting {
    fn drop(&mut self) {
        self.0.abort();
    }
}

async fn heartbeats(link: Link) {
    loop {
        tokio::time::sleep(link.heartbeat()).await;
        if let Some(session) = link.session() {
            let mut body = 1u32.to_le_bytes().to_vec();
            body.extend_from_slice(&session.to_le_bytes());
            link.tell(Verb::Heartbeat, &body);
        }
    }
}

/// Sends what tasks have completed, as soon as no other is about to.
async fn flush(shared: Arc<Shared>, link: Link) {
    loop {
        shared.dirty.notified().await;
        tokio::task::yield_now().await;
        shared.ready().flush(&link, &shared.credit);
    }
}

async fn drained(shared: &Shared, link: &Link) {
    loop {
        let idle = shared.held().is_empty();
        shared.ready().flush(link, &shared.credit);
        if idle && link.all_finished() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// What handlers on tasks share with the reading task.
struct Shared {
    credit: Credit,
    slots: Arc<Semaphore>,
    /// Completions of tasks.
    ready: Mutex<Batch>,
    dirty: Notify,
    /// Calls that run on tasks.
    held: Mutex<Held>,
    counters: Counters,
}

impl Shared {
    fn ready(&self) -> MutexGuard<'_, Batch> {
        self.ready.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn held(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn count(&self, ended: &Ended) {
        self.counters.calls.fetch_add(1, Ordering::Relaxed);
        if matches!(ended, Ended::Failed(_)) {
            self.counters.failed.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// A call on a task has ended.
    fn completed(&self, link: &Link, lease: &Lease, children: Vec<codec::Node>, ended: Ended) {
        if self.held().remove(&name(lease)).is_none() {
            // Revoked meanwhile: nobody wants to know.
            return;
        }
        self.count(&ended);
        let finish = completion(lease, children, ended);
        let mut ready = self.ready();
        ready.add(&finish);
        if ready.is_full() {
            ready.flush(link, &self.credit);
        } else {
            self.dirty.notify_one();
        }
    }
}

/// The reading task's part of a worker.
struct Running {
    shared: Arc<Shared>,
    handlers: HashMap<Arc<str>, Handler>,
    /// By the broker's numbers.
    specs: HashMap<u32, (Arc<Spec>, Option<Handler>)>,
    latest: Option<(u32, Arc<Spec>, Handler)>,
    /// Completions of plain handlers.
    batch: Batch,
}

impl Push for Running {
    fn connected(&mut self, link: &Link, welcome: &Welcome) {
        self.batch.flush(link, &self.shared.credit);
        self.shared.ready().flush(link, &self.shared.credit);
        // Specs are introduced anew on every connection.
        self.specs.clear();
        self.latest = None;
        let finishing = link.finishing();
        let mut lost = Batch::default();
        let n_held = {
            let mut held = self.shared.held();
            let kept: HashSet<AttemptName> = welcome
                .leases
                .iter()
                .map(|&(run, node, attempt)| AttemptName { run, node, attempt })
                .collect();
            held.retain(|name, task| {
                let is_kept = kept.contains(name);
                if let (false, Some(task)) = (is_kept, &task) {
                    // Its lease ended while the connection was broken: nobody wants to know its outcome.
                    task.abort();
                }
                is_kept || task.is_none()
            });
            for &(run, node, attempt) in &welcome.leases {
                let name = AttemptName { run, node, attempt };
                if !held.contains_key(&name) && !finishing.contains(&name) {
                    debug!(
                        run,
                        node, attempt, "a lease that never arrived is given back"
                    );
                    lost.add(&released(name));
                }
            }
            held.len()
        };
        let credit = self.shared.credit.begin_again(n_held as u64);
        lost.flush(link, &self.shared.credit);
        if credit > 0 {
            link.tell(Verb::Credit, &credit.to_le_bytes());
        }
        info!(session = welcome.session, "the worker is connected");
    }

    fn frame(&mut self, link: &Link, frame: Frame) -> Result<(), ClientError> {
        match frame.verb {
            Verb::Specs => {
                let specs: Vec<json::Spec> = json::parse(&frame.body, "SPECS")?;
                for spec in &specs {
                    let number = spec.id.unwrap_or_default();
                    let spec = Arc::new(convert::spec(spec)?);
                    let handler = self.handlers.get(&spec.action).cloned();
                    self.specs.insert(number, (spec, handler));
                }
                self.latest = None;
                Ok(())
            }
            Verb::Leases => {
                self.leases(link, codec::decode_leases(frame.body)?);
                Ok(())
            }
            Verb::Revoke => {
                let mut held = self.shared.held();
                for name in codec::decode_revoke(frame.body)? {
                    // A bundle runs on for its other calls; this one's result is dropped.
                    if let Some(Some(task)) = held.remove(&name) {
                        task.abort();
                        self.shared.credit.ended(1);
                    }
                }
                drop(held);
                self.offer(link);
                Ok(())
            }
            verb => Err(ClientError::Protocol(format!("{verb:?} to a worker"))),
        }
    }

    fn idle(&mut self, link: &Link) {
        self.batch.flush(link, &self.shared.credit);
    }

    /// A lease that has ended is no news. An outcome that the broker cannot take is a failure of its node: the lease is still held, and
    /// nobody else would ever end it.
    fn refused(&mut self, link: &Link, refused: Vec<(codec::Finish, ClientError)>) {
        let n = refused.len() as u64;
        self.shared.counters.refused.fetch_add(n, Ordering::Relaxed);
        for (finish, error) in refused {
            debug!(run = finish.run, node = finish.node, %error, "a completion was refused");
            let lease_is_over = error
                .code()
                .is_none_or(|code| LEASE_IS_OVER.contains(&code));
            if !lease_is_over && matches!(finish.end, End::Value | End::Structure | End::Tail) {
                self.batch.add(&failed_instead(&finish, &error));
            }
        }
        self.batch.flush(link, &self.shared.credit);
    }
}

impl Running {
    /// Credit that no FINISH carries.
    fn offer(&self, link: &Link) {
        let credit = self.shared.credit.top_up();
        if credit > 0 {
            link.tell(Verb::Credit, &credit.to_le_bytes());
        }
    }

    fn handler(&mut self, number: u32) -> Option<(Arc<Spec>, Handler)> {
        if let Some((latest, spec, handler)) = &self.latest
            && *latest == number
        {
            return Some((Arc::clone(spec), handler.clone()));
        }
        let (spec, handler) = self.specs.get(&number)?;
        let (spec, handler) = (Arc::clone(spec), handler.clone()?);
        self.latest = Some((number, Arc::clone(&spec), handler.clone()));
        Some((spec, handler))
    }

    fn leases(&mut self, link: &Link, leases: Vec<Lease>) {
        let began = Instant::now();
        let mut n_plain = 0;
        let mut leases = leases.into_iter().peekable();
        while let Some(lease) = leases.next() {
            let Some((spec, handler)) = self.handler(lease.spec) else {
                let failure = Failure::fatal("this worker has no such action");
                self.done(link, &lease, Vec::new(), Ended::Failed(failure));
                self.shared.credit.ended(1);
                continue;
            };
            match handler {
                Handler::Plain(handler) => {
                    let mut call = Call::new(link.clone(), lease, spec);
                    if call.has_inputs() {
                        let ended = run_plain(&*handler, &mut call);
                        let children = children(&call);
                        self.shared.credit.ended(1);
                        self.done(link, &call.lease, children, ended);
                        n_plain += 1;
                    } else {
                        self.spawn(link, call, move |mut call| {
                            let handler = Arc::clone(&handler);
                            Box::pin(async move {
                                call.load_inputs().await?;
                                let ended = catch_unwind(AssertUnwindSafe(|| handler(&mut call)));
                                ended.unwrap_or_else(|_| Err(panicked()))
                            })
                        });
                    }
                }
                Handler::Async(handler) => {
                    let call = Call::new(link.clone(), lease, spec);
                    self.spawn(link, call, move |call| handler(call));
                }
                Handler::Bundle(handler) => {
                    let batch = lease.batch;
                    let mut calls = vec![Call::new(link.clone(), lease, Arc::clone(&spec))];
                    while let Some(next) = leases.next_if(|next| batch != 0 && next.batch == batch)
                    {
                        calls.push(Call::new(link.clone(), next, Arc::clone(&spec)));
                    }
                    self.spawn_bundle(link, calls, handler);
                }
            }
        }
        if n_plain > 0 {
            let ns = u64::try_from(began.elapsed().as_nanos()).unwrap_or(u64::MAX);
            self.shared.credit.observe(n_plain, ns);
        }
    }

    /// A call on this task has ended.
    fn done(&mut self, link: &Link, lease: &Lease, children: Vec<codec::Node>, ended: Ended) {
        self.shared.count(&ended);
        self.batch.add(&completion(lease, children, ended));
        if self.batch.is_full() {
            self.batch.flush(link, &self.shared.credit);
        }
    }

    fn spawn(
        &self,
        link: &Link,
        mut call: Call,
        handler: impl FnOnce(Call) -> BoxFuture<Result<Returned, Failure>> + Send + 'static,
    ) {
        let name = call.name();
        let recorded = Recorded::default();
        call.recorded = Some(recorded.clone());
        let mut report = Reporting {
            shared: Arc::clone(&self.shared),
            link: link.clone(),
            leases: vec![(call.lease.clone(), recorded)],
        };
        let shared = Arc::clone(&self.shared);
        // Held before it can end.
        let mut held = self.shared.held();
        let task = tokio::spawn(async move {
            let Ok(_slot) = Arc::clone(&shared.slots).acquire_owned().await else {
                return;
            };
            let began = Instant::now();
            let result = handler(call).await;
            observe(&shared.credit, began);
            report.end(vec![result]);
        });
        held.insert(name, Some(task.abort_handle()));
    }

    fn spawn_bundle(&self, link: &Link, mut calls: Vec<Call>, handler: Arc<Bundle>) {
        let mut report = Reporting {
            shared: Arc::clone(&self.shared),
            link: link.clone(),
            leases: Vec::with_capacity(calls.len()),
        };
        for call in &mut calls {
            let recorded = Recorded::default();
            call.recorded = Some(recorded.clone());
            report.leases.push((call.lease.clone(), recorded));
        }
        let names: Vec<AttemptName> = calls.iter().map(Call::name).collect();
        let shared = Arc::clone(&self.shared);
        let mut held = self.shared.held();
        for name in names {
            held.insert(name, None);
        }
        tokio::spawn(async move {
            let Ok(_slot) = Arc::clone(&shared.slots).acquire_owned().await else {
                return;
            };
            let began = Instant::now();
            for call in &mut calls {
                if let Err(error) = call.load_inputs().await {
                    let n = report.leases.len();
                    report.end(vec![Err(error.into()); n]);
                    return;
                }
            }
            let results = handler(&mut calls);
            observe(&shared.credit, began);
            report.end(results);
        });
    }
}

fn observe(credit: &Credit, began: Instant) {
    credit.observe(
        1,
        u64::try_from(began.elapsed().as_nanos()).unwrap_or(u64::MAX),
    );
}

fn run_plain(handler: &Plain, call: &mut Call) -> Ended {
    match catch_unwind(AssertUnwindSafe(|| handler(call))) {
        Ok(result) => result.into(),
        Err(_) => Ended::Failed(panicked()),
    }
}

fn children(call: &Call) -> Vec<codec::Node> {
    call.recorded
        .as_ref()
        .map(Recorded::take)
        .unwrap_or_default()
}

fn panicked() -> Failure {
    Failure {
        kind: "panic".to_owned(),
        ..Failure::retryable("the handler panicked: its output has the place")
    }
}

fn released(name: AttemptName) -> codec::Finish {
    let lease = Lease {
        run: name.run,
        salt: 0,
        node: name.node,
        attempt: name.attempt,
        token: [0; 16],
        spec: 0,
        batch: 0,
        other_code: false,
        codec: crate::broker::types::Codec::Raw,
        ranges: Vec::new(),
        arguments: bytes::Bytes::new(),
        inline: Vec::new(),
    };
    completion(&lease, Vec::new(), Ended::Released)
}

/// Reports a call that runs on a task, however it ends: dropped without an end, its handler panicked or was aborted.
struct Reporting {
    shared: Arc<Shared>,
    link: Link,
    leases: Vec<(Lease, Recorded)>,
}

impl Reporting {
    fn end(&mut self, results: Vec<Result<Returned, Failure>>) {
        let mut results = results.into_iter();
        // One credit, however many calls the bundle has; before the completions, so that their frame carries it.
        if !self.leases.is_empty() {
            self.shared.credit.ended(1);
        }
        for (lease, recorded) in self.leases.drain(..) {
            let result = results.next().unwrap_or_else(|| {
                Err(Failure::fatal(
                    "the batch handler returned fewer results than it had calls",
                ))
            });
            self.shared
                .completed(&self.link, &lease, recorded.take(), result.into());
        }
    }
}

impl Drop for Reporting {
    fn drop(&mut self) {
        // An aborted call is no longer held, and nothing is sent for it.
        let n = self.leases.len();
        if n > 0 && std::thread::panicking() {
            self.end(vec![Err(panicked()); n]);
        }
    }
}
