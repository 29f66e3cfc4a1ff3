//! The reserve on disk: work is refused before the disk is full, because a full one stops the store for good.

use std::cell::Cell;
use std::path::PathBuf;

use super::sync_shim::{self, DiskSpace};

/// How often the file system is asked, in milliseconds.
const ASK_MS: u64 = 1_000;

/// How much room must be left for work to be taken in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reserve {
    /// Bytes.
    pub bytes: u64,
    /// Thousandths of the file system.
    pub permille: u64,
}

impl Default for Reserve {
    fn default() -> Self {
        Self {
            bytes: 1 << 30,
            permille: 50,
        }
    }
}

impl Reserve {
    /// Nothing need be left.
    pub const NONE: Self = Self {
        bytes: 0,
        permille: 0,
    };

    /// Whether so little is left that work must wait. A store that waits already goes on only with a little more than that,
    /// so that it does not flutter.
    pub fn is_used(&self, space: DiskSpace, waiting: bool) -> bool {
        let needed = self.bytes.max(space.total / 1_000 * self.permille);
        let needed = if waiting {
            needed.saturating_add(needed / 16)
        } else {
            needed
        };
        space.free < needed
    }
}

/// Asks the file system now and then.
#[derive(Debug)]
pub(super) struct DiskWatch {
    path: PathBuf,
    reserve: Reserve,
    asked_ms: Cell<Option<u64>>,
    is_low: Cell<bool>,
}

impl DiskWatch {
    pub(super) fn new(path: PathBuf, reserve: Reserve) -> Self {
        Self {
            path,
            reserve,
            asked_ms: Cell::new(None),
            is_low: Cell::new(false),
        }
    }

    /// Whether the reserve is being used.
    pub(super) fn is_low(&self) -> bool {
        let now = sync_shim::boot_clock_ms();
        let due = self
            .asked_ms
            .get()
            .is_none_or(|asked| now.saturating_sub(asked) >= ASK_MS);
        if due {
            self.asked_ms.set(Some(now));
            // A file system that does not answer is left to the next write to judge.
            if let Ok(space) = sync_shim::free_bytes(&self.path) {
                self.is_low
                    .set(self.reserve.is_used(space, self.is_low.get()));
            }
        }
        self.is_low.get()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_larger_reserve_counts_and_does_not_flutter() {
        const GIB: u64 = 1 << 30;
        let reserve = Reserve::default();
        let space = |free, total| DiskSpace { free, total };
        let cases = [
            (space(GIB, 10 * GIB), false, false),
            (space(GIB - 1, 10 * GIB), false, true),
            (space(GIB, 10 * GIB), true, true),
            (space(GIB + GIB / 16, 10 * GIB), true, false),
            (space(49 * GIB, 1_000 * GIB), false, true),
            (space(51 * GIB, 1_000 * GIB), false, false),
        ];
        for (space, waiting, expected) in cases {
            assert_eq!(
                reserve.is_used(space, waiting),
                expected,
                "{space:?} {waiting}"
            );
        }
        assert!(!Reserve::NONE.is_used(space(0, GIB), false));
    }

    #[test]
    fn a_watch_asks_the_real_file_system() {
        let all = Reserve {
            bytes: u64::MAX,
            permille: 0,
        };
        assert!(DiskWatch::new("/".into(), all).is_low());
        assert!(!DiskWatch::new("/".into(), Reserve::NONE).is_low());
        assert!(!DiskWatch::new("/no/such/place".into(), all).is_low());
    }
}
