//! Records: what facts look like as bytes of the log and as rows of the state.
//!
//! This module knows every fact and no file. Layouts are explicit and versioned (docs/FORMAT.md draws them); what comes from
//! a disk is hostile until its checksum *and* its decoding have succeeded.

mod batch;
mod cold;
mod facts;
#[cfg(test)]
mod golden;
mod node;
mod places;
pub mod rows_in;
mod rows_out;
#[cfg(test)]
mod tests;
mod wire;

pub use batch::RowBatch;
pub use facts::{decode_facts, decode_shared_facts, encode_facts};
pub use places::PayloadUse;
pub use rows_out::RowMaker;
pub use wire::DecodeError;

pub(crate) use rows_out::{HEADER_TAIL, PART_BITS, PART_MASK, RANGES_PER_PART, REFERENCES};
