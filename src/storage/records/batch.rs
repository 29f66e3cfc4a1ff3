//! What one log entry changes in the state, as rows.

use crate::storage::row::{Row, RowKey};

/// Rows of one log entry, in the order in which they must be applied: later rows of the same key win, and the deletions of
/// `deleted_ranges` and `deleted_runs` come after all rows of the batch.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RowBatch {
    /// Rows to write or to delete.
    pub rows: Vec<Row>,
    /// Rows to delete: from a key on and before a key of the same table.
    pub deleted_ranges: Vec<(RowKey, RowKey)>,
    /// Runs to delete with everything that has them as `major` in the tables of runs (`OpenRun`, `EndedRun`, `Node`,
    /// `Arguments`, `Inputs`, `Outcome`, `Event`).
    pub deleted_runs: Vec<u64>,
}

impl RowBatch {
    /// Whether nothing changes.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty() && self.deleted_ranges.is_empty() && self.deleted_runs.is_empty()
    }

    /// Empties the batch and keeps its memory.
    pub fn clear(&mut self) {
        self.rows.clear();
        self.deleted_ranges.clear();
        self.deleted_runs.clear();
    }
}
