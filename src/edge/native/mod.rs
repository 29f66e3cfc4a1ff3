//! The native protocol (`docs/PROTOCOL.md`): how clients and workers talk to the broker.
//!
//! In reading order: [`frame`] cuts the stream, [`codec`] and [`json`] read and write bodies, [`io`] moves bytes. Those four are used by
//! both ends. Then the broker's end: the listener (`server.rs`), one connection (`connection.rs`), its requests
//! (`requests.rs`, `documents.rs`), reading outcomes (`outcomes.rs`), and handing work to a worker (`session.rs`).

pub mod codec;
pub mod frame;
pub mod io;
pub mod json;

mod connection;
mod documents;
mod outcomes;
mod requests;
mod server;
mod session;

pub use server::{Address, Extensions, Limits, NativeOptions, NativeServer, NoExtensions, serve};
