//! The limits and periods the broker decides with. Plain data: where they come from is not known here.
//!
//! Limits are those of INVARIANTS §6; each is checked before anything is written.

use std::sync::Arc;

/// What the broker decides with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// A session that has not been heard from for this long loses its leases, in milliseconds.
    pub lease_ms: u64,
    /// A session whose connection closed loses its leases after this long, in milliseconds.
    pub detach_grace_ms: u64,
    /// How long a key is remembered at least, in milliseconds.
    pub dedup_window_ms: u64,
    /// Keys held at most.
    pub max_keys: usize,
    /// Nodes of one run at most.
    pub max_nodes_per_run: u32,
    /// Edges of one run at most (below 2^30).
    pub max_edges_per_run: u64,
    /// Inputs of one node at most.
    pub max_inputs: u32,
    /// Children in one completion at most.
    pub max_children: u32,
    /// Generations of nodes creating nodes at most.
    pub max_depth: u32,
    /// Nodes that are not terminal, over all runs, until intake is refused.
    pub max_open_nodes: u64,
    /// Open leases at most.
    pub max_leases: usize,
    /// Pending deliveries; intake is refused at 80 % of it.
    pub max_outbox: u64,
    /// Node operations of cascades, lapses and deletions in one command; the rest goes on at the next tick.
    pub slice: usize,
    /// Which outcomes owe a delivery to which output.
    pub outputs: Vec<OutputRule>,
}

/// Which outcomes owe a delivery to an output.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OutputRule {
    /// Name of the output.
    pub name: Arc<str>,
    /// Name of the action; `*` matches any text.
    pub action: String,
    /// Deliver values.
    pub succeeded: bool,
    /// Deliver errors; a skipped node counts as failed.
    pub failed: bool,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            lease_ms: 30_000,
            detach_grace_ms: 5_000,
            dedup_window_ms: 7 * 24 * 3_600_000,
            max_keys: 10_000_000,
            max_nodes_per_run: 1_000_000,
            max_edges_per_run: 4_000_000,
            max_inputs: 100_000,
            max_children: 100_000,
            max_depth: 100_000,
            max_open_nodes: 20_000_000,
            max_leases: 100_000,
            max_outbox: 1_000_000,
            slice: 4_096,
            outputs: Vec::new(),
        }
    }
}

impl OutputRule {
    /// Whether the rule is about that action.
    #[must_use]
    pub fn matches(&self, action: &str) -> bool {
        glob(self.action.as_bytes(), action.as_bytes())
    }
}

/// `*` matches any text, everything else itself. Greedy with one point of return, so linear for sane patterns.
fn glob(pattern: &[u8], text: &[u8]) -> bool {
    let (mut p, mut t) = (0, 0);
    let mut star: Option<(usize, usize)> = None;
    while t < text.len() {
        if p < pattern.len() && pattern[p] == b'*' {
            star = Some((p, t));
            p += 1;
        } else if p < pattern.len() && pattern[p] == text[t] {
            p += 1;
            t += 1;
        } else if let Some((at, from)) = star {
            star = Some((at, from + 1));
            p = at + 1;
            t = from + 1;
        } else {
            return false;
        }
    }
    pattern[p..].iter().all(|byte| *byte == b'*')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_star_matches_any_text_and_the_rest_itself() {
        for (pattern, text, yes) in [
            ("*", "", true),
            ("*", "crawler.fetch", true),
            ("crawler.*", "crawler.fetch", true),
            ("crawler.*", "crawler", false),
            ("*.fetch", "crawler.fetch", true),
            ("*.fetch", "crawler.fetched", false),
            ("a*b*c", "a-b-b-c", true),
            ("a*b*c", "a-c-b", false),
            ("plain", "plain", true),
            ("plain", "plainer", false),
            ("", "", true),
            ("", "x", false),
        ] {
            let rule = OutputRule {
                name: "o".into(),
                action: pattern.into(),
                succeeded: true,
                failed: true,
            };
            assert_eq!(rule.matches(text), yes, "{pattern:?} on {text:?}");
        }
    }
}
