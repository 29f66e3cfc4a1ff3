//! Tests of the whole: the shape of the source tree, the documents, the command line, damaged stores.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod commands;
mod documents;
mod tidy;
