//! The simulated disk: a memory store whose next commit can fail, before or after it has become durable, and a store that lies.

use std::sync::{Arc, Mutex};

use dagorama::broker::outcome::Fact;
use dagorama::broker::types::WallTime;
use dagorama::storage::memory::MemoryStore;
use dagorama::storage::{Loaded, PayloadWriter, Pressure, Read, StorageBatch, StorageError, Store};

/// What becomes of the next commit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    Works,
    /// The process dies before anything is durable.
    Lost,
    /// It is durable, and the process dies before it can say so.
    Unsaid,
}

/// What survives a crash, and the knobs.
pub struct Disk {
    pub fate: Fate,
    pub wall: WallTime,
    pub last_wall: WallTime,
    pub pressure: Pressure,
    pub commits: u64,
    /// The mutant: a commit is acked before it is written; it reaches the disk with the one that follows.
    lagging: Option<Lagging>,
}

struct Lagging {
    durable: MemoryStore,
    held: Option<StorageBatch>,
}

/// The store that the engine holds.
pub struct SimStore {
    memory: MemoryStore,
    disk: Arc<Mutex<Disk>>,
}

impl SimStore {
    pub fn new(memory: MemoryStore, early_ack: bool) -> Self {
        let lagging = early_ack.then(|| {
            let mut durable = memory.crash();
            durable.load(&mut |_| {}).expect("a store in memory loads");
            Lagging {
                durable,
                held: None,
            }
        });
        let disk = Disk {
            fate: Fate::Works,
            wall: WallTime(0),
            last_wall: WallTime(0),
            pressure: Pressure::None,
            commits: 0,
            lagging,
        };
        Self {
            memory,
            disk: Arc::new(Mutex::new(disk)),
        }
    }

    pub fn disk(&self) -> Arc<Mutex<Disk>> {
        Arc::clone(&self.disk)
    }

    /// What a crash at this moment leaves.
    pub fn crash(&self) -> Self {
        let mut disk = self.disk.lock().unwrap();
        let lagging = disk.lagging.take();
        let memory = match &lagging {
            Some(lagging) => lagging.durable.crash(),
            None => self.memory.crash(),
        };
        let after = Self::new(memory, lagging.is_some());
        // A look at what would be left changes nothing.
        disk.lagging = lagging;
        after.disk.lock().unwrap().last_wall = disk.last_wall;
        drop(disk);
        after
    }
}

fn died() -> StorageError {
    StorageError::Stopped("the simulated disk failed".to_owned())
}

impl Store for SimStore {
    fn load(&mut self, absorb: &mut dyn FnMut(Fact)) -> Result<Loaded, StorageError> {
        let mut loaded = self.memory.load(absorb)?;
        loaded.last_wall = self.disk.lock().unwrap().last_wall;
        Ok(loaded)
    }

    fn commit(&mut self, batch: StorageBatch) -> Result<(), StorageError> {
        let mut disk = self.disk.lock().unwrap();
        let fate = std::mem::replace(&mut disk.fate, Fate::Works);
        if fate == Fate::Lost {
            return Err(died());
        }
        disk.commits += 1;
        disk.last_wall = disk.wall;
        if let Some(lagging) = &mut disk.lagging
            && let Some(before) = lagging.held.replace(batch.clone())
        {
            lagging.durable.commit(before)?;
        }
        self.memory.commit(batch)?;
        if fate == Fate::Unsaid {
            Err(died())
        } else {
            Ok(())
        }
    }

    fn idle(&mut self, since_ms: u64) -> Result<Option<u64>, StorageError> {
        self.memory.idle(since_ms)
    }

    fn pressure(&self) -> Pressure {
        self.disk.lock().unwrap().pressure
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
