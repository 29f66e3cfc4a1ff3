//! Where the log and the state behind it stand, for status and benches: readable from any thread, never waited for.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Positions of a running store, in bytes of log.
pub struct Gauges {
    log: AtomicU64,
    state: Arc<dyn Fn() -> u64 + Send + Sync>,
}

impl std::fmt::Debug for Gauges {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Gauges")
            .field("log_position", &self.log_position())
            .field("state_position", &self.state_position())
            .finish()
    }
}

impl Gauges {
    pub(super) fn new(position: u64, state: Arc<dyn Fn() -> u64 + Send + Sync>) -> Self {
        Self {
            log: AtomicU64::new(position),
            state,
        }
    }

    pub(super) fn committed(&self, position: u64) {
        self.log.store(position, Ordering::Relaxed);
    }

    /// Where the next log entry of facts begins; seals are not counted.
    #[must_use]
    pub fn log_position(&self) -> u64 {
        self.log.load(Ordering::Relaxed)
    }

    /// Up to where sled survives a power cut.
    #[must_use]
    pub fn state_position(&self) -> u64 {
        (self.state)()
    }
}
