//! The same through the thread and the handle: who waits, who is refused, and who learns of an end.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Condvar, Mutex};
use std::time::Duration;

use super::*;
use crate::storage::{PayloadWriter, Read};

/// A store whose commits wait at a gate, and whose calls are counted.
#[derive(Clone)]
struct Gated {
    memory: MemoryStore,
    gate: Arc<(Mutex<bool>, Condvar)>,
    waiting: Arc<AtomicU64>,
    idles: Arc<AtomicU64>,
}

impl Gated {
    fn new() -> Self {
        Self {
            memory: MemoryStore::new(),
            gate: Arc::new((Mutex::new(true), Condvar::new())),
            waiting: Arc::default(),
            idles: Arc::default(),
        }
    }

    fn open(&self, open: bool) {
        *self.gate.0.lock().unwrap() = open;
        self.gate.1.notify_all();
    }

    async fn until_waiting(&self) {
        while self.waiting.load(Ordering::SeqCst) == 0 {
            tokio::task::yield_now().await;
        }
    }
}

impl Store for Gated {
    fn load(&mut self, absorb: &mut dyn FnMut(Fact)) -> Result<Loaded, StorageError> {
        self.memory.load(absorb)
    }
    fn commit(&mut self, batch: StorageBatch) -> Result<(), StorageError> {
        self.waiting.fetch_add(1, Ordering::SeqCst);
        let open = self.gate.0.lock().unwrap();
        drop(self.gate.1.wait_while(open, |open| !*open).unwrap());
        self.waiting.fetch_sub(1, Ordering::SeqCst);
        self.memory.commit(batch)
    }
    fn idle(&mut self, since_ms: u64) -> Result<Option<u64>, StorageError> {
        self.idles.fetch_add(1, Ordering::SeqCst);
        self.memory.idle(since_ms)
    }
    fn pressure(&self) -> Pressure {
        self.memory.pressure()
    }
    fn reader(&self) -> Arc<dyn Read> {
        self.memory.reader()
    }
    fn payloads(&self) -> Arc<dyn PayloadWriter> {
        self.memory.payloads()
    }
    fn close(self: Box<Self>) -> Result<(), StorageError> {
        Ok(())
    }
}

fn small_queue() -> EngineOptions {
    EngineOptions {
        max_requests: 2,
        ..EngineOptions::default()
    }
}

#[tokio::test]
async fn a_run_goes_from_submission_to_its_end_through_the_handle() {
    let store = Gated::new();
    let (handle, engine, _) = spawn(store.clone(), EngineOptions::default()).unwrap();
    let mut effects = handle.session_effects(WORKER);
    handle.control(attach()).await.unwrap();
    handle.control(credit(8)).await.unwrap();
    let run = run_of(&handle.intake(submit(2)).await.unwrap());
    let settled = handle.root_settled(run.seq);
    let ended = handle.run_ended(run.seq);
    let Some(SessionEffect::Leases(leases)) = effects.recv().await else {
        panic!("no leases");
    };
    assert_eq!(leases.len(), 2, "one message for both");
    assert_eq!(handle.spec(leases[0].spec), Some(spec()));
    let reply = handle
        .control(finish(&leases[..1], &value()))
        .await
        .unwrap();
    assert_eq!(codes(&reply), [None]);
    settled.await.unwrap();
    let Answer::Run(summary) = handle.query(Query::Run(run)).await.unwrap() else {
        panic!("no run");
    };
    assert_eq!(summary.state, RunState::Running);
    handle
        .control(finish(&leases[1..], &value()))
        .await
        .unwrap();
    ended.await.unwrap();
    let Answer::Run(summary) = handle.query(Query::Run(run)).await.unwrap() else {
        panic!("an ended run is read");
    };
    assert_eq!(summary.state, RunState::Succeeded);
    let repeated = handle.control(finish(&leases, &value())).await.unwrap();
    assert_eq!(
        codes(&repeated),
        [None, None],
        "a repetition gets the first answer"
    );
    let key = leases[0].node;
    let outcome = handle
        .read(move |reader| reader.outcome(key))
        .await
        .unwrap();
    assert_eq!(outcome.unwrap().payload, payload(b"v"));

    engine.stop();
    tokio::task::spawn_blocking(|| engine.join())
        .await
        .unwrap()
        .unwrap();
    assert!(handle.control(credit(1)).await.is_err());
    assert!(handle.query(Query::Totals).await.is_err());
    assert_eq!(effects.recv().await, None);
}

#[tokio::test]
async fn intake_beyond_the_limit_is_refused_at_once_and_control_passes() {
    let store = Gated::new();
    let (handle, engine, _) = spawn(store.clone(), small_queue()).unwrap();
    store.open(false);
    let spawn_intake = || {
        let handle = handle.clone();
        tokio::spawn(async move { handle.intake(submit(1)).await })
    };
    let first = spawn_intake();
    store.until_waiting().await;
    let second = spawn_intake();
    while handle.0.inbox.admit(Cost::default()).is_ok() {
        tokio::task::yield_now().await;
    }
    let refused = handle.intake(submit(1)).await.unwrap();
    assert_eq!(codes(&refused), [Some(Code::Overloaded)], "without waiting");
    let control = tokio::spawn({
        let handle = handle.clone();
        async move { handle.control(attach()).await }
    });
    store.open(true);
    assert_eq!(codes(&first.await.unwrap().unwrap()), [None]);
    assert_eq!(codes(&second.await.unwrap().unwrap()), [None]);
    assert!(matches!(control.await.unwrap(), Ok(Reply::Attached(_))));
    let later = handle.intake(submit(1)).await.unwrap();
    assert_eq!(codes(&later), [None], "room came back");
    engine.stop();
    engine.join().unwrap();
}

#[tokio::test]
async fn a_failed_commit_stops_everything_and_everybody_learns_why() {
    let store = Gated::new();
    let (handle, engine, _) = spawn(store.clone(), EngineOptions::default()).unwrap();
    let mut effects = handle.session_effects(WORKER);
    let run = run_of(&handle.intake(submit(1)).await.unwrap());
    let settled = handle.root_settled(run.seq);
    store.memory.fail_commit(1, Fault::KeptUnseen);
    store.open(false);
    let in_commit = tokio::spawn({
        let handle = handle.clone();
        async move { handle.intake(submit(1)).await }
    });
    store.until_waiting().await;
    let behind = tokio::spawn({
        let handle = handle.clone();
        async move { handle.control(attach()).await }
    });
    let asked = tokio::spawn({
        let handle = handle.clone();
        async move { handle.query(Query::Totals).await }
    });
    tokio::task::yield_now().await;
    store.open(true);
    for reason in [
        in_commit.await.unwrap().unwrap_err().reason,
        behind.await.unwrap().unwrap_err().reason,
        asked.await.unwrap().unwrap_err().reason,
        handle.stopped().await.reason,
        handle.control(attach()).await.unwrap_err().reason,
    ] {
        assert!(reason.contains("injected fault"), "{reason}");
    }
    assert!(settled.await.is_err());
    assert_eq!(effects.recv().await, None);
    assert!(
        handle.root_settled(run.seq).await.is_err(),
        "also who comes later"
    );
    let error = engine.join().unwrap_err();
    assert!(error.to_string().contains("sync"), "{error}");
}

#[tokio::test]
async fn pressure_is_felt_at_the_handle_and_passes_by_itself() {
    let store = Gated::new();
    store.memory.set_pressure(Pressure::DiskFull);
    let (handle, engine, _) = spawn(store.clone(), EngineOptions::default()).unwrap();
    assert_eq!(handle.pressure(), Pressure::DiskFull);
    let refused = handle.intake(submit(1)).await.unwrap();
    assert_eq!(codes(&refused), [Some(Code::DiskFull)]);
    assert!(handle.control(attach()).await.is_ok());
    store.memory.set_pressure(Pressure::None);
    while handle.pressure() != Pressure::None {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert_eq!(codes(&handle.intake(submit(1)).await.unwrap()), [None]);
    engine.stop();
    engine.join().unwrap();
}

#[tokio::test]
async fn an_idle_engine_sleeps() {
    let store = Gated::new();
    let (handle, engine, _) = spawn(store.clone(), EngineOptions::default()).unwrap();
    handle.intake(submit(1)).await.unwrap();
    tokio::time::sleep(Duration::from_millis(50)).await;
    let before = store.idles.load(Ordering::SeqCst);
    tokio::time::sleep(Duration::from_millis(300)).await;
    let woken = store.idles.load(Ordering::SeqCst) - before;
    assert!(woken <= 2, "woken {woken} times for nothing");
    engine.stop();
    engine.join().unwrap();
}

#[tokio::test]
async fn old_runs_are_deleted_and_open_ones_are_not() {
    let store = Gated::new();
    let options = EngineOptions {
        retention_ms: 0,
        retention_every_ms: 30,
        ..EngineOptions::default()
    };
    let (handle, engine, _) = spawn(store.clone(), options).unwrap();
    let mut effects = handle.session_effects(WORKER);
    handle.control(attach()).await.unwrap();
    let open = run_of(&handle.intake(submit(1)).await.unwrap());
    let mut old = Vec::new();
    for _ in 0..3 {
        old.push(run_of(&handle.intake(submit(1)).await.unwrap()));
    }
    handle.control(credit(4)).await.unwrap();
    let Some(SessionEffect::Leases(leases)) = effects.recv().await else {
        panic!("no leases");
    };
    let (of_open, of_old): (Vec<_>, Vec<_>) = leases
        .into_iter()
        .partition(|lease| lease.node.run == open.seq);
    assert_eq!((of_open.len(), of_old.len()), (1, 3));
    handle.control(finish(&of_old, &value())).await.unwrap();
    let reader = handle.reader();
    while old.iter().any(|run| reader.run(run.seq).unwrap().is_some()) {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert!(reader.run(open.seq).unwrap().is_some());
    let gone = handle.query(Query::Run(old[0])).await.unwrap();
    assert!(matches!(gone, Answer::No(no) if no.code == Code::UnknownRun));
    engine.stop();
    engine.join().unwrap();
}

#[tokio::test]
async fn only_large_payloads_become_stored_and_read_back_the_same() {
    let store = Gated::new();
    let (handle, engine, _) = spawn(store, EngineOptions::default()).unwrap();
    let small = payload(&vec![1; Body::INLINE_BYTES]);
    assert_eq!(handle.persist(small.clone()).await.unwrap(), small);
    let bytes = vec![2; Body::INLINE_BYTES + 1];
    let large = handle.persist(payload(&bytes)).await.unwrap();
    let Body::Stored(at) = large.body else {
        panic!("{large:?}");
    };
    let read = handle.read(move |reader| reader.payload(at)).await.unwrap();
    assert_eq!(read, bytes);
    engine.stop();
    engine.join().unwrap();
}

#[test]
fn a_submission_before_the_stop_is_answered() {
    let store = Gated::new();
    let (handle, engine, _) = spawn(store.clone(), EngineOptions::default()).unwrap();
    store.open(false);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .unwrap();
    runtime.block_on(async {
        let first = handle.intake(submit(1));
        let second = handle.intake(submit(1));
        let later = async {
            store.until_waiting().await;
            engine.stop();
            store.open(true);
        };
        let (first, second, ()) = tokio::join!(first, second, later);
        for reply in [first, second] {
            let Reply::Submitted(list) = reply.unwrap() else {
                panic!("not submitted");
            };
            assert!(matches!(
                list[0],
                Ok(Submitted {
                    existing: false,
                    ..
                })
            ));
        }
    });
    engine.join().unwrap();
}
