//! The native protocol (`docs/PROTOCOL.md`): how clients and workers talk to the broker.

pub mod codec;
pub mod frame;
