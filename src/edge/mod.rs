//! Edges: where the outside world is translated into commands and queries, and answers back into bytes.
//!
//! An edge is async and thin: it decodes, checks the shape, converts wire types to domain types, and hands over. It decides nothing.

pub mod convert;
pub mod native;
