//! Dagorama: a durable broker for dynamic task graphs, beside the queues people already run.
//!
//! This is the map; `docs/ARCHITECTURE.md` has the picture. In reading order, inside out:
//!
//! - [`broker`]: the pure state machine that decides everything.
//! - [`storage`]: the checksummed commit log, and sled as the state behind it.
//! - [`engine`]: one thread that collects commands, applies them, commits once and releases the replies.
//! - [`edge`]: the native protocol. [`client`]: the Rust client and worker that speak it.
//! - [`bridges`]: routes from and to other message systems, supervised.
//! - [`config`], [`error`]: every option, every code.
//! - [`server`]: composition, start and shutdown. [`cli`], [`commands`], [`demo`], [`mod@bench`]: what can be typed.

pub mod bench;
pub mod bridges;
pub mod broker;
pub mod cli;
pub mod client;
pub mod commands;
pub mod config;
pub mod demo;
pub mod edge;
pub mod engine;
pub mod error;
pub mod server;
pub mod storage;
pub mod telemetry;
pub mod verify;
