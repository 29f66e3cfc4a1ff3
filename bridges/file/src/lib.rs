//! Newline-delimited files and standard streams as a message queue, so that the whole loop runs on a machine with nothing installed.
//!
//! What is promised, a sentence per direction:
//! - **In, file**: each line starts one run, also over crashes, because its position is stored in the commit that starts the run. The
//!   position belongs to the file itself (path, inode, time of birth): another file at the same path is read from its beginning.
//! - **In, standard input**: each line that was read starts one run; what lay unread in the pipe when the broker died is lost.
//! - **Out, file**: each delivery is one line, written once, also over SIGKILL and power cuts, and nobody else's line is damaged: see
//!   [`FileSink`].
//! - **Out, standard output**: each delivery is a line at least once; after a crash the last ones may be repeated.

mod companion;
mod error;
mod sink;
mod source;
mod stdin;

pub use sink::{FileSink, StreamSink};
pub use source::{FileSource, SourceOptions};
pub use stdin::{LineStream, StreamSource};
