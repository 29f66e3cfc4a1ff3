//! Dagorama.
pub mod broker;
pub mod config;
pub mod error;
pub mod storage;
