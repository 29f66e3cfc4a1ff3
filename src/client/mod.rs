//! The Rust client and worker: used by the command line, the benches and the tests, and a model for clients in other languages.
//!
//! In reading order: [`data`](Data) what calls carry, `link.rs` the connection that comes back by itself, [`Client`] starts runs and reads
//! results, [`Worker`] runs nodes, [`Call`] is what a handler sees. Everything knows the protocol and nothing of the broker's inside.
//!
//! ```no_run
//! # async fn example() -> Result<(), dagorama::client::ClientError> {
//! use dagorama::client::{Client, Data, Submit, Waited, spec};
//!
//! let client = Client::connect("dagorama://127.0.0.1:7373", None).await?;
//! let run = client.submit(Submit::call(&spec("double"), Data::json(&21))).await?;
//! if let Waited::Ended(outcome) = client.wait(run, None).await? {
//!     assert_eq!(outcome.data.to_json::<u32>()?, 42);
//! }
//! # Ok(())
//! # }
//! ```

mod call;
mod completions;
mod data;
mod link;
mod requests;
mod target;
mod worker;

pub use call::{Call, Failure, Returned};
pub use data::{Data, Input, NewNode, Outcome, Promise, Submit, Waited, spec};
pub use requests::Client;
pub use worker::{Report, Worker, WorkerBuilder};

/// Why a request failed.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ClientError {
    /// The URL is not one.
    #[error(
        "{0:?} is no address of a broker: it looks like dagorama://127.0.0.1:7373 or dagorama+unix:///path"
    )]
    Url(String),
    /// Nobody answers there.
    #[error("no broker answers at {url}: {detail}; start one with `dagorama serve`")]
    Unreachable {
        /// Where.
        url: String,
        /// The system's words.
        detail: String,
    },
    /// The broker said no.
    #[error("{code}: {message}")]
    Refused {
        /// Stable, for programs.
        code: String,
        /// For people.
        message: String,
        /// The same request may succeed later.
        retryable: bool,
    },
    /// The connection broke before the answer, and repeating the request might do it twice: it may or may not have been done.
    #[error(
        "the connection broke before the answer: the request may have been done or not (give it a key to make repeating safe)"
    )]
    Unanswered,
    /// The client was closed.
    #[error("the client was closed")]
    Closed,
    /// The other side does not speak this protocol.
    #[error("the broker sent something that cannot be read: {0}")]
    Protocol(String),
    /// A value is not what the caller takes it for.
    #[error("the data cannot be read as what was asked for: {0}")]
    Data(String),
}

impl ClientError {
    /// The stable code, if the broker said no.
    #[must_use]
    pub fn code(&self) -> Option<&str> {
        match self {
            Self::Refused { code, .. } => Some(code),
            _ => None,
        }
    }
}

impl From<crate::edge::native::frame::Malformed> for ClientError {
    fn from(error: crate::edge::native::frame::Malformed) -> Self {
        Self::Protocol(error.to_string())
    }
}
