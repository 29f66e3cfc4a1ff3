//! Dagorama.
pub mod broker;
pub mod edge;
pub mod storage;
