//! Tests of the whole: the shape of the source tree, the documents, the command line, damaged stores.

mod documents;
mod tidy;
