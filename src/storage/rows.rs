//! Reading rows, wherever they are: memory, or the state on disk with what is not there yet laid over it.

use bytes::Bytes;

use super::StorageError;
use super::row::{RowKey, Table};

/// Committed rows. Calls may block, except [`Rows::recent`].
pub trait Rows: Send + Sync {
    /// The value of a row.
    fn get(&self, key: RowKey) -> Result<Option<Bytes>, StorageError>;
    /// The value, if that is known without waiting: `Some(None)` is a row known to be deleted, `None` is unknown.
    fn recent(&self, key: RowKey) -> Option<Option<Bytes>>;
    /// Visits at most `limit` rows of a table from (major, minor) `from` on and before `to`, ascending, until `visit` says `false`.
    fn scan(
        &self,
        table: Table,
        from: (u64, u64),
        to: (u64, u64),
        limit: usize,
        visit: &mut dyn FnMut(RowKey, Bytes) -> bool,
    ) -> Result<(), StorageError>;
    /// At most `limit` rows of a table before (major, minor) `before`, descending.
    fn scan_back(
        &self,
        table: Table,
        before: (u64, u64),
        limit: usize,
    ) -> Result<Vec<(RowKey, Bytes)>, StorageError>;
}
