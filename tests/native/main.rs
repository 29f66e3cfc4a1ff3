//! The native protocol from end to end: raw frames and the Rust client against a broker on a store in memory.

mod client;
mod disk;
mod frames;
mod world;
