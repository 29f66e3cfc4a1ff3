//! The command `verify`.
