//! Dagorama.
pub mod bridges;
pub mod broker;
pub mod config;
pub mod engine;
pub mod error;
pub mod storage;
