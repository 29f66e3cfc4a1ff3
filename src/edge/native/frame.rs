//! Frames: the 12-byte header, the verbs, and cutting a stream of bytes into frames (PROTOCOL §1, §2).
//!
//! Pure and free of panics: no sockets, no limits that depend on who is speaking, nothing about what a body means. A length is
//! checked before it is believed, and never makes anything be allocated: a buffer grows with what has arrived.

use bytes::{Buf, Bytes, BytesMut};

/// Bytes of the header.
pub const HEADER_BYTES: usize = 12;
/// The largest body of a frame.
pub const MAX_BODY_BYTES: usize = 64 * 1024 * 1024 + 1024 * 1024;
/// The largest body that is read as JSON: a parsed document takes many times its text.
pub const MAX_JSON_BYTES: usize = 1024 * 1024;
/// The version of the protocol.
pub const VERSION: u64 = 1;

/// Flag: another frame of the same reply follows.
const MORE: u8 = 1;

/// Why bytes were refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {problem}")]
pub struct Malformed {
    /// The field, in the words of PROTOCOL.md.
    pub field: &'static str,
    /// What is wrong with it.
    pub problem: Problem,
}

/// What is wrong with a field.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Problem {
    /// It says that more bytes follow than there are.
    #[error("{needed} bytes needed, {left} left")]
    Short {
        /// Bytes that it takes.
        needed: u64,
        /// Bytes that are left.
        left: usize,
    },
    /// More than the limit.
    #[error("is {found}, at most {limit} allowed")]
    TooLarge {
        /// What it says.
        found: u64,
        /// The limit.
        limit: u64,
    },
    /// Not one of the values that are known.
    #[error("has the unknown value {0}")]
    Unknown(u64),
    /// Bytes follow after the end.
    #[error("{0} bytes too many")]
    Trailing(usize),
    /// Not the text or the document it should be.
    #[error("{0}")]
    Text(String),
}

impl Malformed {
    /// A field with an unknown value.
    #[must_use]
    pub fn unknown(field: &'static str, value: u64) -> Self {
        Self {
            field,
            problem: Problem::Unknown(value),
        }
    }

    /// A field over its limit.
    #[must_use]
    pub fn too_large(field: &'static str, found: u64, limit: u64) -> Self {
        Self {
            field,
            problem: Problem::TooLarge { found, limit },
        }
    }

    /// A field that is not the text or the document it should be.
    #[must_use]
    pub fn text(field: &'static str, detail: impl Into<String>) -> Self {
        Self {
            field,
            problem: Problem::Text(detail.into()),
        }
    }

    /// Whether it is a size over a limit: the sender needs another code then.
    #[must_use]
    pub fn is_too_large(&self) -> bool {
        matches!(self.problem, Problem::TooLarge { .. })
    }
}

macro_rules! verbs {
    ($($(#[$doc:meta])* $name:ident = $number:literal,)*) => {
        /// What a frame asks or answers (closed list, numbers never reused).
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[repr(u8)]
        pub enum Verb { $($(#[$doc])* $name = $number,)* }
        impl Verb {
            /// All verbs, by number.
            pub const ALL: &'static [Self] = &[$(Self::$name,)*];
            /// The verb with that number.
            #[must_use]
            pub fn from_number(number: u8) -> Option<Self> {
                match number { $($number => Some(Self::$name),)* _ => None }
            }
        }
    };
}

verbs! {
    /// The first frame of a connection.
    Hello = 1,
    /// Specs that this connection uses.
    Define = 2,
    /// Start runs.
    Submit = 3,
    /// That many more calls.
    Credit = 4,
    /// Attempts have ended.
    Finish = 5,
    /// Sessions are alive.
    Heartbeat = 6,
    /// Read outcomes.
    Fetch = 7,
    /// Wait for the value of a run.
    Wait = 8,
    /// Create children of a running attempt.
    Create = 9,
    /// Stop a run.
    Cancel = 10,
    /// Begin the next round of a run.
    Resume = 11,
    /// The history of a run.
    Events = 12,
    /// Why nodes do not run.
    Explain = 13,
    /// Runs, newest first.
    Runs = 14,
    /// One run.
    Show = 15,
    /// Totals.
    Status = 16,
    /// The session ends for good.
    Goodbye = 17,
    /// Dead letters.
    Dlq = 18,
    /// Routes and outputs.
    Bridges = 19,
    /// An answer.
    Reply = 128,
    /// "No", or a failure.
    Error = 129,
    /// Specs with the broker's numbers.
    Specs = 130,
    /// Work.
    Leases = 131,
    /// Stop that work.
    Revoke = 132,
}

impl Verb {
    /// Whether a client or worker sends it.
    #[must_use]
    pub fn is_request(self) -> bool {
        (self as u8) < 128
    }

    /// Whether the broker answers it.
    #[must_use]
    pub fn has_reply(self) -> bool {
        self.is_request() && !matches!(self, Self::Define | Self::Credit | Self::Heartbeat)
    }

    /// Whether its body is JSON.
    #[must_use]
    pub fn is_json(self) -> bool {
        matches!(
            self,
            Self::Hello
                | Self::Define
                | Self::Cancel
                | Self::Resume
                | Self::Events
                | Self::Explain
                | Self::Runs
                | Self::Show
                | Self::Status
                | Self::Dlq
                | Self::Bridges
        )
    }
}

/// A header that keeps the rules of PROTOCOL §1.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Bytes of the body.
    pub length: usize,
    /// The verb.
    pub verb: Verb,
    /// Another frame of the same reply follows.
    pub more: bool,
    /// The request it is or answers.
    pub request: u32,
}

/// A whole frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    /// The verb.
    pub verb: Verb,
    /// Another frame of the same reply follows.
    pub more: bool,
    /// The request it is or answers.
    pub request: u32,
    /// The body; items decoded from it are slices of the same memory.
    pub body: Bytes,
}

/// Reads a header.
pub fn parse_header(bytes: &[u8; HEADER_BYTES]) -> Result<Header, Malformed> {
    let [l0, l1, l2, l3, verb, flags, r0, r1, q0, q1, q2, q3] = *bytes;
    let length = u32::from_le_bytes([l0, l1, l2, l3]) as usize;
    if length > MAX_BODY_BYTES {
        return Err(Malformed::too_large(
            "length",
            length as u64,
            MAX_BODY_BYTES as u64,
        ));
    }
    let verb =
        Verb::from_number(verb).ok_or_else(|| Malformed::unknown("verb", u64::from(verb)))?;
    let more = match flags {
        0 => false,
        MORE if !verb.is_request() => true,
        _ => return Err(Malformed::unknown("flags", u64::from(flags))),
    };
    let reserved = u16::from_le_bytes([r0, r1]);
    if reserved != 0 {
        return Err(Malformed::unknown("reserved", u64::from(reserved)));
    }
    Ok(Header {
        length,
        verb,
        more,
        request: u32::from_le_bytes([q0, q1, q2, q3]),
    })
}

/// The header of the frame that `buffer` begins with. `None`: it has not arrived.
pub fn peek(buffer: &[u8]) -> Result<Option<Header>, Malformed> {
    match buffer.first_chunk::<HEADER_BYTES>() {
        Some(bytes) => parse_header(bytes).map(Some),
        None => Ok(None),
    }
}

/// Cuts the first whole frame off `buffer`. `None`: it has not arrived.
pub fn take(buffer: &mut BytesMut) -> Result<Option<Frame>, Malformed> {
    let Some(header) = peek(buffer)? else {
        return Ok(None);
    };
    if buffer.len() - HEADER_BYTES < header.length {
        return Ok(None);
    }
    buffer.advance(HEADER_BYTES);
    Ok(Some(Frame {
        verb: header.verb,
        more: header.more,
        request: header.request,
        body: buffer.split_to(header.length).freeze(),
    }))
}

/// Begins a frame at the end of `out`; the body is appended next, then [`end`] is called with what this returned.
#[must_use = "the frame has no length until it is ended"]
pub fn begin(out: &mut Vec<u8>, verb: Verb, more: bool, request: u32) -> usize {
    let start = out.len();
    let mut header = [0; HEADER_BYTES];
    header[4] = verb as u8;
    header[5] = if more { MORE } else { 0 };
    header[8..].copy_from_slice(&request.to_le_bytes());
    out.extend_from_slice(&header);
    start
}

/// Ends the frame that began at `start`: fills in its length.
pub fn end(out: &mut [u8], start: usize) {
    let length = (out.len() - start - HEADER_BYTES) as u32;
    out[start..start + 4].copy_from_slice(&length.to_le_bytes());
}

/// A whole frame with that body, appended to `out`.
pub fn put(out: &mut Vec<u8>, verb: Verb, more: bool, request: u32, body: &[u8]) {
    let start = begin(out, verb, more, request);
    out.extend_from_slice(body);
    end(out, start);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn framed(verb: Verb, more: bool, request: u32, body: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        put(&mut out, verb, more, request, body);
        out
    }

    #[test]
    fn a_frame_comes_back_whole_and_in_pieces() {
        for (verb, more, request, body) in [
            (Verb::Hello, false, 1, &b"{}"[..]),
            (Verb::Credit, false, 0, &[1, 0, 0, 0]),
            (Verb::Reply, true, u32::MAX, &[]),
            (Verb::Reply, false, 7, &vec![9; 70_000][..]),
        ] {
            let bytes = framed(verb, more, request, body);
            let mut buffer = BytesMut::new();
            for (at, byte) in bytes.iter().enumerate() {
                assert_eq!(take(&mut buffer), Ok(None), "{verb:?} after {at} bytes");
                buffer.extend_from_slice(&[*byte]);
            }
            let frame = take(&mut buffer)
                .expect("well formed")
                .expect("all of it is there");
            assert_eq!(
                (frame.verb, frame.more, frame.request, &frame.body[..]),
                (verb, more, request, body)
            );
            assert!(buffer.is_empty());
        }
    }

    #[test]
    fn headers_that_break_a_rule_are_refused() {
        let good = framed(Verb::Submit, false, 3, &[]);
        for (at, value, field) in [
            (3, 0xff, "length"),
            (4, 0, "verb"),
            (4, 20, "verb"),
            (4, 127, "verb"),
            (4, 133, "verb"),
            (5, 1, "flags"),
            (5, 2, "flags"),
            (6, 1, "reserved"),
            (7, 1, "reserved"),
        ] {
            let mut bytes = BytesMut::from(&good[..]);
            bytes[at] = value;
            let error = take(&mut bytes).expect_err(field);
            assert_eq!(error.field, field, "byte {at} = {value}");
        }
    }

    #[test]
    fn the_largest_body_is_allowed_and_one_more_is_not() {
        let mut header = [0; HEADER_BYTES];
        header[4] = Verb::Finish as u8;
        header[..4].copy_from_slice(&(MAX_BODY_BYTES as u32).to_le_bytes());
        assert!(parse_header(&header).is_ok());
        header[..4].copy_from_slice(&(MAX_BODY_BYTES as u32 + 1).to_le_bytes());
        assert!(parse_header(&header).expect_err("too large").is_too_large());
    }

    #[test]
    fn verbs_know_their_numbers() {
        for verb in Verb::ALL {
            assert_eq!(Verb::from_number(*verb as u8), Some(*verb));
            assert!(!verb.has_reply() || verb.is_request());
        }
        assert_eq!(
            (0..=255).filter_map(Verb::from_number).count(),
            Verb::ALL.len()
        );
    }
}
