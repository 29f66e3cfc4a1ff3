//! The one table of stable codes: code ↔ HTTP ↔ gRPC ↔ retryable ↔ exit code ↔ Python class.
//!
//! A code exists when a caller would act differently; detail goes into the message, which may change. `docs/ERRORS.md` has cause and
//! remedy of each, and a test compares both ways. This file knows no transport: edges look their status up here.

use crate::broker::command::Code;
use crate::storage::StorageError;

/// What the outside sees of one code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ErrorRow {
    /// The code as programs see it.
    pub code: &'static str,
    /// HTTP status; 0 where the code never travels over HTTP.
    pub http: u16,
    /// Name of the gRPC status; empty where it never travels over gRPC.
    pub grpc: &'static str,
    /// Whether the same request may succeed later.
    pub retryable: bool,
    /// Exit code of the command line.
    pub exit: u8,
    /// Class that the Python client raises.
    pub python: &'static str,
}

/// Exit codes of the command line.
pub mod exit {
    /// The answer was no, the run failed, or an invariant is broken.
    pub const NO: u8 = 1;
    /// The program could not start: the store, the configuration or the port.
    pub const NO_START: u8 = 2;
    /// The request itself is malformed.
    pub const USAGE: u8 = 3;
    /// No broker answers.
    pub const UNAVAILABLE: u8 = 4;
    /// The token is missing or wrong.
    pub const DENIED: u8 = 5;
    /// Try the same again later (`EX_TEMPFAIL` of sysexits).
    pub const LATER: u8 = 75;
}

const fn row(
    code: &'static str,
    http: u16,
    grpc: &'static str,
    retryable: bool,
    exit: u8,
    python: &'static str,
) -> ErrorRow {
    ErrorRow {
        code,
        http,
        grpc,
        retryable,
        exit,
        python,
    }
}

const PLAIN: &str = "DagoramaError";

/// Every code that the broker, its client or the command line can show. The first ones are those of [`Code::ALL`], in its order.
#[rustfmt::skip]
pub const TABLE: &[ErrorRow] = &[
    row("INVALID_REQUEST",      400, "INVALID_ARGUMENT",    false, exit::USAGE, PLAIN),
    row("UNKNOWN_RUN",          404, "NOT_FOUND",           false, exit::NO, PLAIN),
    row("UNKNOWN_NODE",         400, "INVALID_ARGUMENT",    false, exit::NO, PLAIN),
    row("UNKNOWN_SESSION",      404, "NOT_FOUND",           false, exit::NO, PLAIN),
    row("UNKNOWN_NAME",         404, "NOT_FOUND",           false, exit::NO, PLAIN),
    row("GRAPH_CYCLE",          400, "INVALID_ARGUMENT",    false, exit::USAGE, PLAIN),
    row("GRAPH_TOO_LARGE",      400, "INVALID_ARGUMENT",    false, exit::NO, PLAIN),
    row("PAYLOAD_TOO_LARGE",    413, "RESOURCE_EXHAUSTED",  false, exit::NO, PLAIN),
    row("QUOTA_PENDING",        429, "RESOURCE_EXHAUSTED",  true,  exit::LATER, PLAIN),
    row("OVERLOADED",           503, "UNAVAILABLE",         true,  exit::LATER, PLAIN),
    row("OUTBOX_FULL",          503, "RESOURCE_EXHAUSTED",  true,  exit::LATER, PLAIN),
    row("DISK_FULL",            507, "RESOURCE_EXHAUSTED",  true,  exit::LATER, PLAIN),
    row("INBOX_WINDOW_FULL",    503, "RESOURCE_EXHAUSTED",  true,  exit::LATER, PLAIN),
    row("RUN_EXPIRED",          410, "NOT_FOUND",           false, exit::NO, PLAIN),
    row("RUN_NOT_ENDED",        409, "FAILED_PRECONDITION", false, exit::NO, PLAIN),
    row("LEASE_EXPIRED",        409, "FAILED_PRECONDITION", false, exit::NO, PLAIN),
    row("LEASE_REVOKED",        409, "FAILED_PRECONDITION", false, exit::NO, "Cancelled"),
    row("LEASE_UNKNOWN",        409, "FAILED_PRECONDITION", false, exit::NO, PLAIN),
    row("COMPLETION_CONFLICT",  409, "ALREADY_EXISTS",      false, exit::NO, PLAIN),
    row("SUBMISSION_CONFLICT",  409, "ALREADY_EXISTS",      false, exit::NO, PLAIN),
    row("NODE_CONFLICT",        409, "ALREADY_EXISTS",      false, exit::NO, PLAIN),
    row("CODEC_REFUSED",        415, "INVALID_ARGUMENT",    false, exit::NO, PLAIN),
    row("UNAUTHENTICATED",      401, "UNAUTHENTICATED",     false, exit::DENIED, PLAIN),
    row("STOPPING",             503, "UNAVAILABLE",         true,  exit::LATER, "BrokerUnavailable"),
    row("NOT_AVAILABLE",        501, "UNIMPLEMENTED",       false, exit::NO_START, PLAIN),
    row("STORE_CORRUPT",        500, "DATA_LOSS",           false, exit::NO_START, PLAIN),
    // Codes that never leave as a rejection: starting up, connecting, and what a run itself came to.
    row("STORE_LOCKED",         0,   "",                    false, exit::NO_START, PLAIN),
    row("FORMAT_TOO_NEW",       0,   "",                    false, exit::NO_START, PLAIN),
    row("STORE_FAILED",         0,   "",                    false, exit::NO_START, PLAIN),
    row("CONFIG_INVALID",       0,   "",                    false, exit::NO_START, PLAIN),
    row("PORT_IN_USE",          0,   "",                    false, exit::NO_START, PLAIN),
    row("INSECURE_LISTEN",      0,   "",                    false, exit::NO_START, PLAIN),
    row("IO_ERROR",             0,   "",                    false, exit::NO_START, PLAIN),
    row("CONNECTIONS",          503, "UNAVAILABLE",         true,  exit::LATER, "BrokerUnavailable"),
    row("BROKER_UNAVAILABLE",   0,   "",                    true,  exit::UNAVAILABLE, "BrokerUnavailable"),
    row("RUN_FAILED",           0,   "",                    false, exit::NO, "ActionFailed"),
    row("RUN_CANCELLED",        0,   "",                    false, exit::NO, "Cancelled"),
    row("WAIT_TIMED_OUT",       0,   "",                    true,  exit::LATER, "TimeoutError"),
];

/// Codes that only bridges use: reasons of dead letters and of parked routes and outputs. They never answer a request.
pub const BRIDGE_CODES: &[&str] = &[
    "ARGUMENT_MISSING",
    "BODY_NOT_JSON",
    "BODY_RESERVED",
    "LINE_BREAK",
    "OUTPUT_CHANGED",
    "OUTPUT_FAILED",
    "SOURCE_CHANGED",
    "SOURCE_FAILED",
    "SOURCE_REPLACED",
    "SOURCE_TRUNCATED",
    "VALUE_GONE",
    "VALUE_TOO_DEEP",
];

/// The row of a code; `None` for a text that is no code.
#[must_use]
pub fn find(code: &str) -> Option<&'static ErrorRow> {
    TABLE.iter().find(|row| row.code == code)
}

/// The row of a rejection's code.
#[must_use]
pub fn of(code: Code) -> &'static ErrorRow {
    // `the_table_begins_with_every_rejection` holds the order.
    &TABLE[code as usize]
}

impl Code {
    /// Whether the same request may succeed later.
    #[must_use]
    pub fn retryable(self) -> bool {
        of(self).retryable
    }
}

/// The code that a failing store shows at start.
#[must_use]
pub fn code_of_storage(error: &StorageError) -> &'static str {
    match error {
        StorageError::Corrupt { .. } => "STORE_CORRUPT",
        StorageError::Locked { .. } => "STORE_LOCKED",
        StorageError::TooNew { .. } => "FORMAT_TOO_NEW",
        StorageError::Io { .. } | StorageError::State { .. } | StorageError::Stopped(_) => {
            "STORE_FAILED"
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    const DOCS: &str = include_str!("../docs/ERRORS.md");

    #[test]
    fn the_table_begins_with_every_rejection() {
        for (position, code) in Code::ALL.iter().enumerate() {
            assert_eq!(TABLE[position].code, code.as_str());
            assert_eq!(of(*code).code, code.as_str());
        }
        let distinct: BTreeSet<_> = TABLE.iter().map(|row| row.code).collect();
        assert_eq!(distinct.len(), TABLE.len(), "a code is listed twice");
    }

    #[test]
    fn every_row_makes_sense() {
        for row in TABLE {
            assert!(row.http == 0 || (400..600).contains(&row.http), "{row:?}");
            assert_eq!(row.http == 0, row.grpc.is_empty(), "{row:?}");
            assert!(row.exit != 0, "{row:?}");
            if row.exit == exit::LATER {
                assert!(row.retryable, "{row:?}");
            }
        }
        assert!(find("LEASE_EXPIRED").is_some());
        assert!(find("lease_expired").is_none());
    }

    /// The table of the page, as `(code, status, grpc, retry, exit, class)`.
    fn documented() -> Vec<[String; 6]> {
        DOCS.lines()
            .filter(|line| line.starts_with("| `"))
            .map(|line| {
                let cells: Vec<_> = line.trim_matches('|').split(" | ").map(str::trim).collect();
                assert!(cells.len() == 6, "six columns wanted: {line}");
                std::array::from_fn(|i| cells[i].replace('`', ""))
            })
            .collect()
    }

    #[test]
    fn the_page_and_the_table_agree_both_ways() {
        let page = documented();
        let table: Vec<[String; 6]> = TABLE
            .iter()
            .map(|row| {
                let dash = |text: String| {
                    if text.is_empty() {
                        "-".to_owned()
                    } else {
                        text
                    }
                };
                [
                    row.code.to_owned(),
                    dash(if row.http == 0 {
                        String::new()
                    } else {
                        row.http.to_string()
                    }),
                    dash(row.grpc.to_owned()),
                    if row.retryable { "yes" } else { "no" }.to_owned(),
                    row.exit.to_string(),
                    row.python.to_owned(),
                ]
            })
            .collect();
        assert_eq!(page, table);
    }

    #[test]
    fn every_code_has_cause_and_remedy() {
        let codes = TABLE
            .iter()
            .map(|row| row.code)
            .chain(BRIDGE_CODES.iter().copied());
        let mut titles: BTreeSet<&str> = DOCS
            .lines()
            .filter_map(|line| line.strip_prefix("### "))
            .collect();
        for code in codes {
            assert!(titles.remove(code), "docs/ERRORS.md has no section {code}");
            let body = DOCS.split(&format!("### {code}\n")).nth(1).unwrap_or("");
            let body = body.split("\n### ").next().unwrap_or("");
            assert!(body.contains("Cause: "), "{code} has no cause");
            assert!(body.contains("Remedy: "), "{code} has no remedy");
        }
        assert!(titles.is_empty(), "sections without a code: {titles:?}");
    }
}
