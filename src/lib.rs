//! Dagorama.
pub mod broker;
pub mod client;
pub mod edge;
pub mod engine;
pub mod storage;
