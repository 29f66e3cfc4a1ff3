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
        // What cannot be written has no reader; saying so in the same place would panic.
        .log_internal_errors(false)
        .try_init();
    // A second start in one process (tests) keeps the first.
    drop(started);
}

/// Panics inside sled are its way to report a failed call; the storage thread catches them and stops the store with an error (G17). They are
/// logged in a line instead of a backtrace. All other panics are bugs of ours and are shown as such.
pub fn tell_panics_of_sled() {
    let default = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        let inside_sled = info
            .location()
            .is_some_and(|place| place.file().contains("/sled-0."));
        if inside_sled {
            let said = info.payload_as_str().unwrap_or("no reason given");
            tracing::error!(said, "the state store failed inside sled");
        } else {
            default(info);
        }
    }));
}
