//! The pure state machine that decides everything.
//!
//! No I/O, no clock, no randomness, no async: same state, time and command, same result. It is read, tested and fuzzed alone.
//! Memory holds the metadata of open runs; arguments, results and history are read from the store by whoever needs them.

pub mod command;
pub mod outcome;
pub mod types;
