//! Logs: constant text, data in fields, to standard error. `RUST_LOG` chooses what is seen.

use std::io::IsTerminal;

use tracing_subscriber::EnvFilter;

/// Starts logging. `default` is the filter when `RUST_LOG` says nothing.
pub fn start(default: &str) {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(default));
    let colour = std::io::stderr().is_terminal()
        && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
    let started = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(colour)
        .try_init();
    // A second start in one process (tests) keeps the first.
    drop(started);
}
