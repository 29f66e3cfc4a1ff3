//! The configuration as the modules want it: the only place that knows both.

use crate::broker::types::WallTime;
use crate::broker::{OutputRule, Settings};
use crate::engine::EngineOptions;
use crate::storage::durable::DurableOptions;

use super::{Config, Output};

/// What the broker must know of an output: it decides what is owed to which.
fn rule(output: &Output) -> OutputRule {
    OutputRule {
        name: output.name.as_str().into(),
        action: output.matches.action.clone(),
        succeeded: output.matches.state.succeeded(),
        failed: output.matches.state.failed(),
    }
}

impl Config {
    /// What the broker decides with.
    #[must_use]
    pub fn settings(&self) -> Settings {
        let limits = &self.limits;
        Settings {
            lease_ms: self.leases.lease.as_ms(),
            detach_grace_ms: self.leases.detach_grace.as_ms(),
            dedup_window_ms: self.retention.dedup_window.as_ms(),
            max_keys: limits.max_keys,
            max_nodes_per_run: limits.max_nodes_per_run,
            max_edges_per_run: limits.max_edges_per_run,
            max_inputs: limits.max_inputs,
            max_children: limits.max_children,
            max_depth: limits.max_depth,
            max_open_nodes: limits.max_open_nodes,
            max_leases: limits.max_leases,
            max_outbox: limits.max_outbox,
            outputs: self.output.iter().map(rule).collect(),
            ..Settings::default()
        }
    }

    /// How the engine runs.
    #[must_use]
    pub fn engine_options(&self) -> EngineOptions {
        EngineOptions {
            settings: self.settings(),
            retention_ms: self.retention.keep.as_ms(),
            max_requests: self.limits.max_inflight_requests,
            max_bytes: usize::try_from(self.limits.max_inflight_bytes.0).unwrap_or(usize::MAX),
            ..EngineOptions::default()
        }
    }

    /// How the store uses the disk; `wall` reads the calendar.
    #[must_use]
    pub fn durable_options(&self, wall: fn() -> WallTime) -> DurableOptions {
        let storage = &self.storage;
        DurableOptions {
            segment_bytes: storage.segment.0,
            window_ms: storage.window.as_ms(),
            window_bytes: usize::try_from(storage.window_size.0).unwrap_or(usize::MAX),
            min_free_bytes: storage.min_free.0,
            min_free_permille: u64::from(storage.min_free_percent) * 10,
            wall,
            ..DurableOptions::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the documentation calls a default is one: the modules' own defaults and those of the configuration are the same.
    #[test]
    fn the_defaults_are_those_of_the_modules() {
        let config = Config::default();
        assert_eq!(config.settings(), Settings::default());
        let (ours, theirs) = (config.engine_options(), EngineOptions::default());
        assert_eq!(
            (ours.retention_ms, ours.max_requests, ours.max_bytes),
            (theirs.retention_ms, theirs.max_requests, theirs.max_bytes)
        );
        let wall = || WallTime(0);
        let (ours, theirs) = (config.durable_options(wall), DurableOptions::default());
        assert_eq!(
            (
                ours.segment_bytes,
                ours.window_ms,
                ours.window_bytes,
                ours.min_free_bytes,
                ours.min_free_permille
            ),
            (
                theirs.segment_bytes,
                theirs.window_ms,
                theirs.window_bytes,
                theirs.min_free_bytes,
                theirs.min_free_permille
            )
        );
    }
}
