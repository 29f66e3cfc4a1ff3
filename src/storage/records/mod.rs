//! Records: what facts look like as bytes of the log and as rows of the state.
//!
//! This module knows every fact and no file. Layouts are explicit and versioned (docs/FORMAT.md draws them); what comes from
//! a disk is hostile until its checksum *and* its decoding have succeeded.

mod batch;

pub use batch::RowBatch;
