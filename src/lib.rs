//! Dagorama.
pub mod broker;
pub mod storage;
