//! One thread, one turn after another.
pub mod clock;
pub mod handle;
mod inbox;
pub mod load;
pub mod request;
mod routes;
pub use handle::{Handle, Info, SessionEffect, Stopped};
