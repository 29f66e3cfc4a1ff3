//! The workloads. Each starts a broker on a fresh store, runs, and reports what it saw from outside.

use std::collections::BTreeMap;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::{Value, json};
use tokio::sync::oneshot;

use super::place::{Broker, PythonWorkers, quantile};
use crate::broker::types::{RunId, Spec};
use crate::cli::{Bench, Workload};
use crate::client::{Client, Data, NewNode, Promise, Returned, Submit, Waited, Worker, spec};
use crate::engine::clock::Stopwatch;

/// Leaves of a fan-out.
const WIDTH: u32 = 10_000;

/// Runs one workload.
pub(super) async fn measure(workload: Workload, options: &Bench) -> io::Result<Value> {
    let broker = Broker::fresh(&options.data_dir).await?;
    let client = Client::connect(&broker.url, Some(&broker.token))
        .await
        .map_err(io::Error::other)?;
    let bench = Run {
        broker,
        client,
        options,
    };
    let mut bench = bench;
    let before = bench.status().await?;
    let mut report = match workload {
        Workload::Fanout => bench.fanout().await?,
        Workload::Sustained => bench.sustained().await?,
        Workload::FanoutPython => bench.fanout_python().await?,
        Workload::Chain => bench.chain().await?,
        Workload::Diamonds => bench.diamonds().await?,
        Workload::Idle => bench.idle().await?,
        Workload::Submit => bench.submit().await?,
        Workload::Memory => bench.memory().await?,
        Workload::Restart => return bench.restart().await,
    };
    let after = bench.status().await?;
    for (name, field) in [("log_syncs", "syncs"), ("sled_syncs", "sled_syncs")] {
        report[name] = json!(
            after[field]
                .as_u64()
                .unwrap_or_default()
                .saturating_sub(before[field].as_u64().unwrap_or_default())
        );
    }
    report["broker_cpu_ms"] = json!(bench.broker.cpu_ms());
    report["broker_rss"] = json!(bench.broker.rss());
    bench.broker.finish().await?;
    Ok(report)
}

/// Rust workers in this process, until dropped.
struct RustWorker {
    stop: Option<oneshot::Sender<()>>,
    task: tokio::task::JoinHandle<()>,
}

impl RustWorker {
    async fn stop(mut self) {
        drop(self.stop.take());
        drop(self.task.await);
    }
}

fn specs() -> [Arc<Spec>; 5] {
    [
        "bench.fan",
        "bench.leaf",
        "bench.join",
        "bench.hop",
        "bench.gate",
    ]
    .map(spec)
}

/// Starts a worker that has every action of the benches. Times at which hops began go to `hops`.
fn rust_worker(broker: &Broker, hops: &Arc<Mutex<Vec<Duration>>>) -> RustWorker {
    let [fan, leaf, join, hop, _] = specs();
    let (stop, stopped) = oneshot::channel::<()>();
    let watch = Stopwatch::start();
    let hops = Arc::clone(hops);
    let fan_specs = specs();
    let hop_spec = Arc::clone(&hop);
    let worker = Worker::builder(&broker.url, Some(&broker.token))
        .plain(&fan, move |call| {
            let [_, leaf, join, ..] = &fan_specs;
            let width: u32 = call.arguments().to_json()?;
            let mut promises = Vec::with_capacity(width as usize);
            for i in 0..width {
                promises.push(
                    call.child(leaf, Data::raw(i.to_le_bytes().to_vec()), [])
                        .value(),
                );
            }
            Ok(Returned::Tail(call.child(
                join,
                Data::raw(&b""[..]),
                promises,
            )))
        })
        .plain(&leaf, |call| Ok(Returned::Value(call.arguments())))
        .action(&join, |mut call| async move {
            let n = call
                .load_inputs()
                .await?
                .iter()
                .filter(|input| input.is_success())
                .count();
            Ok(Returned::json(&n))
        })
        .plain(&hop, move |call| {
            let left: u32 = call.arguments().to_json()?;
            hops.lock()
                .unwrap_or_else(std::sync::PoisonError::into_inner)
                .push(watch.elapsed());
            if left == 0 {
                return Ok(Returned::json(&0));
            }
            Ok(Returned::Tail(call.child(
                &hop_spec,
                Data::json(&(left - 1)),
                [],
            )))
        });
    let task = tokio::spawn(async move {
        if let Err(error) = worker.run(async { drop(stopped.await) }).await {
            eprintln!("dagorama bench: the worker failed: {error}");
        }
    });
    RustWorker {
        stop: Some(stop),
        task,
    }
}

struct Run<'a> {
    broker: Broker,
    client: Client,
    options: &'a Bench,
}

impl Run<'_> {
    async fn status(&self) -> io::Result<Value> {
        self.client.status().await.map_err(io::Error::other)
    }

    fn scaled(&self, n: u64) -> u64 {
        if self.options.quick {
            (n / 20).max(1)
        } else {
            n
        }
    }

    async fn value(&self, run: RunId) -> io::Result<Data> {
        match self
            .client
            .wait(run, None)
            .await
            .map_err(io::Error::other)?
        {
            Waited::Ended(outcome) if outcome.is_success() => Ok(outcome.data),
            other => Err(io::Error::other(format!("run {run} came to {other:?}"))),
        }
    }

    /// One fan-out of `width` and its join; seconds.
    async fn one_fanout(&self, fan: &Arc<Spec>, arguments: Data, width: u32) -> io::Result<f64> {
        let watch = Stopwatch::start();
        let run = self
            .client
            .submit(Submit::call(fan, arguments))
            .await
            .map_err(io::Error::other)?;
        let joined: u32 = self.value(run).await?.to_json().map_err(io::Error::other)?;
        let seconds = watch.elapsed().as_secs_f64();
        if joined != width {
            return Err(io::Error::other(format!(
                "the join saw {joined} of {width} leaves"
            )));
        }
        Ok(seconds)
    }

    async fn fanout(&mut self) -> io::Result<Value> {
        let worker = rust_worker(&self.broker, &Arc::default());
        let [fan, ..] = specs();
        self.one_fanout(&fan, Data::json(&WIDTH), WIDTH).await?;
        let mut rates = Vec::new();
        for _ in 0..self.scaled(20).max(5) {
            rates.push(
                (f64::from(WIDTH) / self.one_fanout(&fan, Data::json(&WIDTH), WIDTH).await?) as u64,
            );
        }
        // Log bytes a leaf must not depend on the width.
        let mut bytes_a_leaf = Vec::new();
        // One completion takes at most 100,000 children, and the join is one of them.
        for (width, rounds) in [(1_000u32, 100u64), (99_999, 1)] {
            let before = self.status().await?["log_position"]
                .as_u64()
                .unwrap_or_default();
            for _ in 0..rounds {
                self.one_fanout(&fan, Data::json(&width), width).await?;
            }
            let after = self.status().await?["log_position"]
                .as_u64()
                .unwrap_or_default();
            bytes_a_leaf.push((after - before) as f64 / (f64::from(width) * rounds as f64));
        }
        worker.stop().await;
        Ok(json!({
            "workload": "fanout", "workers": "1 Rust worker in the bench process", "n": WIDTH, "leaves_per_second_p50": quantile(&mut rates, 0.5), "min": quantile(&mut rates, 0.0),
            "max": quantile(&mut rates, 1.0), "rounds": rates.len(), "log_bytes_per_leaf_1000": round(bytes_a_leaf[0]), "log_bytes_per_leaf_100000": round(bytes_a_leaf[1]),
        }))
    }

    async fn sustained(&mut self) -> io::Result<Value> {
        let worker = rust_worker(&self.broker, &Arc::default());
        let [fan, ..] = specs();
        let seconds = if self.options.quick {
            3
        } else {
            self.options.seconds
        };
        let watch = Stopwatch::start();
        let leaves = AtomicU64::new(0);
        let lane = || async {
            while watch.elapsed_ms() < seconds * 1_000 {
                self.one_fanout(&fan, Data::json(&WIDTH), WIDTH).await?;
                leaves.fetch_add(u64::from(WIDTH), Ordering::Relaxed);
            }
            io::Result::Ok(())
        };
        tokio::try_join!(lane(), lane(), lane())?;
        let elapsed = watch.elapsed().as_secs_f64();
        let done = leaves.load(Ordering::Relaxed);
        let cpu = self.broker.cpu_ms();
        let at_end = self.status().await?;
        let lag = at_end["log_position"]
            .as_u64()
            .unwrap_or_default()
            .saturating_sub(at_end["sled_position"].as_u64().unwrap_or_default());
        let drain = Stopwatch::start();
        while drain.elapsed_ms() < 120_000 {
            let now = self.status().await?;
            if now["sled_position"].as_u64() >= at_end["log_position"].as_u64() {
                break;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let drained = drain.elapsed().as_secs_f64();
        worker.stop().await;
        Ok(json!({
            "workload": "sustained", "workers": "1 Rust worker in the bench process, 3 fan-outs in flight", "n": WIDTH, "seconds": round(elapsed), "leaves": done,
            "leaves_per_second": (done as f64 / elapsed) as u64, "broker_cpu_us_per_leaf": round(cpu as f64 * 1_000.0 / done as f64), "sled_lag_bytes": lag, "sled_drain_seconds": round(drained),
        }))
    }

    async fn fanout_python(&mut self) -> io::Result<Value> {
        let workers = PythonWorkers::start(&self.broker, &self.options.python, 2)?;
        let fan = Arc::new(Spec {
            by_name: true,
            ..(*spec("bench_actions.fan")).clone()
        });
        let call = Data::json(&json!({"args": [WIDTH], "kwargs": {}}));
        self.one_fanout(&fan, call.clone(), WIDTH).await?;
        let mut rates = Vec::new();
        for _ in 0..self.scaled(20).max(5) {
            rates.push(
                (f64::from(WIDTH) / self.one_fanout(&fan, call.clone(), WIDTH).await?) as u64,
            );
        }
        let seconds = if self.options.quick {
            3
        } else {
            self.options.seconds
        };
        let watch = Stopwatch::start();
        let leaves = AtomicU64::new(0);
        let lane = || async {
            while watch.elapsed_ms() < seconds * 1_000 {
                self.one_fanout(&fan, call.clone(), WIDTH).await?;
                leaves.fetch_add(u64::from(WIDTH), Ordering::Relaxed);
            }
            io::Result::Ok(())
        };
        tokio::try_join!(lane(), lane(), lane())?;
        let sustained = leaves.load(Ordering::Relaxed) as f64 / watch.elapsed().as_secs_f64();
        workers.stop().await?;
        Ok(json!({
            "workload": "fanout-python", "workers": "2 Python worker processes", "n": WIDTH, "leaves_per_second_p50": quantile(&mut rates, 0.5), "min": quantile(&mut rates, 0.0),
            "max": quantile(&mut rates, 1.0), "rounds": rates.len(), "sustained_leaves_per_second": sustained as u64, "sustained_seconds": seconds,
        }))
    }

    async fn chain(&mut self) -> io::Result<Value> {
        let hops: Arc<Mutex<Vec<Duration>>> = Arc::default();
        let worker = rust_worker(&self.broker, &hops);
        let [_, _, _, hop, _] = specs();
        let mut micros = Vec::new();
        for round in 0..self.scaled(20).max(3) {
            hops.lock()
                .unwrap_or_else(std::sync::PoisonError::into_inner)
                .clear();
            let run = self
                .client
                .submit(Submit::call(&hop, Data::json(&500)))
                .await
                .map_err(io::Error::other)?;
            self.value(run).await?;
            let times = hops
                .lock()
                .unwrap_or_else(std::sync::PoisonError::into_inner)
                .clone();
            if round > 0 {
                micros.extend(
                    times
                        .windows(2)
                        .map(|pair| pair[1].saturating_sub(pair[0]).as_micros() as u64),
                );
            }
        }
        worker.stop().await;
        let mean = micros.iter().sum::<u64>() / micros.len().max(1) as u64;
        Ok(json!({
            "workload": "chain", "workers": "1 Rust worker in the bench process", "n": 500, "hops": micros.len(), "hop_us_p50": quantile(&mut micros, 0.5), "hop_us_p99": quantile(&mut micros, 0.99), "hop_us_mean": mean,
        }))
    }

    async fn diamonds(&mut self) -> io::Result<Value> {
        let worker = rust_worker(&self.broker, &Arc::default());
        let [_, leaf, ..] = specs();
        let n = 1_000usize;
        let diamond = || {
            let node = |inputs: &[u32]| {
                NewNode::new(
                    &leaf,
                    Data::raw(&b"x"[..]),
                    inputs.iter().map(|at| Promise::New(*at).value()),
                )
            };
            Submit {
                key: None,
                tags: BTreeMap::default(),
                nodes: vec![node(&[]), node(&[0]), node(&[0]), node(&[1, 2])],
                root: 3,
            }
        };
        let mut rates = Vec::new();
        for round in 0..self.scaled(20).max(4) {
            let watch = Stopwatch::start();
            let runs = self
                .client
                .submit_many((0..n).map(|_| diamond()).collect())
                .await
                .map_err(io::Error::other)?;
            let mut waits = tokio::task::JoinSet::new();
            for run in runs {
                let (client, run) = (self.client.clone(), run.map_err(io::Error::other)?);
                waits.spawn(async move { client.wait(run, None).await });
            }
            while let Some(waited) = waits.join_next().await {
                match waited
                    .map_err(io::Error::other)?
                    .map_err(io::Error::other)?
                {
                    Waited::Ended(outcome) if outcome.is_success() => {}
                    other => return Err(io::Error::other(format!("a diamond came to {other:?}"))),
                }
            }
            if round > 0 {
                rates.push((n as f64 / watch.elapsed().as_secs_f64()) as u64);
            }
        }
        worker.stop().await;
        Ok(
            json!({"workload": "diamonds", "workers": "1 Rust worker in the bench process", "in_flight": n, "dags_per_second_p50": quantile(&mut rates, 0.5), "min": quantile(&mut rates, 0.0), "max": quantile(&mut rates, 1.0), "rounds": rates.len()}),
        )
    }

    async fn idle(&mut self) -> io::Result<Value> {
        let worker = rust_worker(&self.broker, &Arc::default());
        let [_, leaf, ..] = specs();
        let mut micros = Vec::new();
        for round in 0..self.scaled(1_000).max(100) {
            tokio::time::sleep(Duration::from_millis(2)).await;
            let watch = Stopwatch::start();
            let run = self
                .client
                .submit(Submit::call(&leaf, Data::raw(&b"x"[..])))
                .await
                .map_err(io::Error::other)?;
            self.value(run).await?;
            if round >= 20 {
                micros.push(watch.elapsed().as_micros() as u64);
            }
        }
        let cpu_before = self.broker.cpu_ms();
        let rest = Duration::from_secs(if self.options.quick { 2 } else { 10 });
        tokio::time::sleep(rest).await;
        let idle_cpu =
            (self.broker.cpu_ms() - cpu_before) as f64 / (rest.as_millis() as f64) * 100.0;
        worker.stop().await;
        Ok(json!({
            "workload": "idle", "workers": "1 Rust worker in the bench process", "submit_to_result_us_p50": quantile(&mut micros, 0.5), "p99": quantile(&mut micros, 0.99), "rounds": micros.len(), "idle_cpu_percent": round(idle_cpu),
        }))
    }

    async fn submit(&mut self) -> io::Result<Value> {
        let worker = rust_worker(&self.broker, &Arc::default());
        let [_, leaf, ..] = specs();
        let n = self.scaled(300_000);
        let one = || Submit::call(&leaf, Data::raw(&b"x"[..]));
        let watch = Stopwatch::start();
        let runs = self
            .client
            .submit_many((0..n).map(|_| one()).collect())
            .await
            .map_err(io::Error::other)?;
        let accepted = watch.elapsed().as_secs_f64();
        let mut last = None;
        for run in runs {
            last = Some(run.map_err(io::Error::other)?);
        }
        if let Some(last) = last {
            self.value(last).await?;
        }
        while self.status().await?["open_runs"].as_u64() != Some(0) {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        let completed = watch.elapsed().as_secs_f64();
        worker.stop().await;
        Ok(
            json!({"workload": "submit", "workers": "1 Rust worker in the bench process", "n": n, "accepted_per_second": (n as f64 / accepted) as u64, "completed_per_second": (n as f64 / completed) as u64}),
        )
    }

    async fn memory(&mut self) -> io::Result<Value> {
        let n = self.scaled(1_000_000);
        let [_, leaf, .., gate] = specs();
        let before = self.settled_heap().await?;
        let rss_before = self.broker.rss();
        // Waiting nodes: each needs the one before its run's gate, which nobody serves.
        let width = 1_000u64;
        for _ in 0..n / width {
            let mut nodes = vec![NewNode::new(&gate, Data::raw(&b""[..]), [])];
            nodes.extend((1..=width).map(|_| {
                NewNode::new(
                    &leaf,
                    Data::raw(&b"12345678"[..]),
                    [Promise::New(0).value()],
                )
            }));
            let root = nodes.len() as u32 - 1;
            self.client
                .submit(Submit {
                    key: None,
                    tags: BTreeMap::default(),
                    nodes,
                    root,
                })
                .await
                .map_err(io::Error::other)?;
        }
        let after = self.settled_heap().await?;
        let made = n / width * (width + 1);
        Ok(json!({
            "workload": "memory", "n": made, "heap_bytes_per_waiting_node": round((after.saturating_sub(before)) as f64 / made as f64),
            "rss_bytes_per_waiting_node": round(self.broker.rss().saturating_sub(rss_before) as f64 / made as f64),
        }))
    }

    /// Heap in use once the state store has taken everything.
    async fn settled_heap(&self) -> io::Result<u64> {
        tokio::time::sleep(Duration::from_millis(1_500)).await;
        for _ in 0..600 {
            let now = self.status().await?;
            if now["sled_position"].as_u64() >= now["log_position"].as_u64() {
                break;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        tokio::time::sleep(Duration::from_millis(1_500)).await;
        Ok(self.status().await?["heap_bytes"]
            .as_u64()
            .unwrap_or_default())
    }

    async fn restart(self) -> io::Result<Value> {
        let (open, finished) = (self.scaled(1_000_000), self.scaled(10_000_000));
        let worker = rust_worker(&self.broker, &Arc::default());
        let [fan, leaf, .., gate] = specs();
        let width = 50_000u32;
        let watch = Stopwatch::start();
        for _ in 0..finished.div_ceil(u64::from(width)) {
            self.one_fanout(&fan, Data::json(&width), width).await?;
        }
        for _ in 0..open.div_ceil(1_000) {
            let mut nodes = vec![NewNode::new(&gate, Data::raw(&b""[..]), [])];
            nodes.extend((1..1_000).map(|_| {
                NewNode::new(
                    &leaf,
                    Data::raw(&b"12345678"[..]),
                    [Promise::New(0).value()],
                )
            }));
            self.client
                .submit(Submit {
                    key: None,
                    tags: BTreeMap::default(),
                    nodes,
                    root: 999,
                })
                .await
                .map_err(io::Error::other)?;
        }
        let made = watch.elapsed().as_secs_f64();
        worker.stop().await;
        self.settled_heap().await?;
        let Self {
            mut broker, client, ..
        } = self;
        drop(client);
        let mut rounds = Vec::new();
        for _ in 0..3 {
            broker = broker.kill_and_restart().await?;
            rounds.push((broker.ready["seconds"].as_f64().unwrap_or_default() * 1_000.0) as u64);
        }
        tokio::time::sleep(Duration::from_secs(2)).await;
        let rss = broker.rss();
        let (from_sled, from_log) = (
            broker.ready["from_sled"].clone(),
            broker.ready["from_log"].clone(),
        );
        broker.finish().await?;
        Ok(json!({
            "workload": "restart", "open": open, "finished": finished, "made_in_seconds": round(made), "first_restart_ms": rounds[0], "restart_ms_p50": quantile(&mut rounds, 0.5), "rounds": rounds.len(), "rss_after": rss,
            "from_sled": from_sled, "from_log": from_log,
        }))
    }
}

fn round(value: f64) -> f64 {
    (value * 100.0).round() / 100.0
}
