//! Connections, routes and outputs: what comes in from where, starts what, and what goes out to where.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;

use serde::de::value::{MapAccessDeserializer, SeqAccessDeserializer};
use serde::de::{Deserializer, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Serialize};

use super::expression::Expression;
use super::units::Period;

/// `[connection.NAME]`: how another system is reached.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Connection {
    /// Which bridge: `file`.
    #[serde(rename = "type")]
    pub kind: String,
    /// Directory that relative paths of routes and outputs start from. Default: the working directory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub directory: Option<PathBuf>,
    /// How often a followed file is looked at.
    #[serde(default = "default_poll")]
    pub poll: Period,
}

fn default_poll() -> Period {
    Period::from_ms(50)
}

/// `[[route]]`: messages that start runs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Route {
    /// Names its position, its dead letters and the source of its runs: keep it when the rest changes.
    pub name: String,
    /// Where messages come from.
    pub from: RouteFrom,
    /// How a body is read.
    #[serde(default)]
    pub codec: RouteCodec,
    /// The action that each message starts.
    pub action: String,
    /// Paths into the message that become arguments. Default: the whole message as the one positional argument.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub arguments: Option<ArgumentPaths>,
    /// How a repeated message is recognised: `offset`, `message_id`, `hash`, or a path such as `body.id`. Default: `offset` where
    /// the source has positions, else not at all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dedup: Option<Dedup>,
    /// How often a message is tried before it becomes a dead letter. Default: `[defaults]`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub inbox_max_attempts: Option<u32>,
    /// What becomes of a message that cannot be used. Default: `[defaults]`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub on_error: Option<OnError>,
    /// Reading stops while that many of its runs have not ended. Default: `[defaults]`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_inflight_runs: Option<u32>,
}

/// `from = { … }` of a route.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RouteFrom {
    /// Name of a `[connection.NAME]`.
    pub connection: String,
    /// File to read, a message a line.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<PathBuf>,
    /// Read standard input instead of a file.
    #[serde(default)]
    pub stdin: bool,
    /// Go on reading as the file grows. Without it the route ends at the end of the file.
    #[serde(default)]
    pub follow: bool,
}

/// How the body of an inbound message is read.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RouteCodec {
    /// One JSON value.
    #[default]
    Json,
    /// Bytes without further meaning.
    Raw,
}

/// `arguments = { name = "path" }` or `arguments = ["path", …]`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum ArgumentPaths {
    /// By name.
    Named(BTreeMap<String, Expression>),
    /// By position.
    Positional(Vec<Expression>),
}

/// By hand, so that a path that is none is complained about, not the table around it.
impl<'de> Deserialize<'de> for ArgumentPaths {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        struct Paths;
        impl<'de> Visitor<'de> for Paths {
            type Value = ArgumentPaths;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a table of names and paths, or a list of paths such as [\"body.url\"]")
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<ArgumentPaths, A::Error> {
                Deserialize::deserialize(MapAccessDeserializer::new(map)).map(ArgumentPaths::Named)
            }

            fn visit_seq<A: SeqAccess<'de>>(self, seq: A) -> Result<ArgumentPaths, A::Error> {
                Deserialize::deserialize(SeqAccessDeserializer::new(seq))
                    .map(ArgumentPaths::Positional)
            }
        }
        d.deserialize_any(Paths)
    }
}

/// How a repeated message is recognised.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Dedup {
    /// By its place in the source.
    Offset,
    /// By the id that its producer gave it.
    MessageId,
    /// By a hash of its body: two equal messages are one.
    Hash,
    /// By what a path finds in it.
    Path(Expression),
}

/// What becomes of a message that cannot be used.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnError {
    /// It becomes a dead letter, and those behind it go on.
    #[default]
    Dlq,
    /// The route stops before it, so that the order is kept.
    Stop,
}

/// `[[output]]`: outcomes that leave.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Output {
    /// Names its outbox and its dead letters: keep it when the rest changes.
    pub name: String,
    /// Which outcomes.
    #[serde(rename = "match")]
    pub matches: OutputMatch,
    /// Where to.
    pub to: OutputTo,
    /// How a body is written.
    #[serde(default)]
    pub codec: OutputCodec,
}

/// `match = { … }` of an output.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OutputMatch {
    /// Name of the action; `*` stands for any text.
    pub action: String,
    /// Which ends.
    #[serde(default)]
    pub state: OutputState,
}

/// Which ends of a node an output takes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OutputState {
    /// Values.
    #[default]
    Succeeded,
    /// Errors.
    Failed,
    /// Both.
    Any,
}

/// `to = { … }` of an output.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OutputTo {
    /// Name of a `[connection.NAME]`.
    pub connection: String,
    /// File to append to, a line a delivery.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<PathBuf>,
    /// Write to standard output instead of a file.
    #[serde(default)]
    pub stdout: bool,
}

/// How the body of a delivery is written.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OutputCodec {
    /// The bare JSON value; other codecs are refused.
    #[default]
    Json,
    /// The bytes of the value as they are, raw or JSON.
    Raw,
}

impl OutputState {
    /// Whether values are taken.
    #[must_use]
    pub fn succeeded(self) -> bool {
        matches!(self, Self::Succeeded | Self::Any)
    }

    /// Whether errors are taken.
    #[must_use]
    pub fn failed(self) -> bool {
        matches!(self, Self::Failed | Self::Any)
    }
}

impl std::str::FromStr for Dedup {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Ok(match text {
            "offset" => Self::Offset,
            "message_id" => Self::MessageId,
            "hash" => Self::Hash,
            path => Self::Path(
                path.parse()
                    .map_err(|cause| format!("{cause}; or write offset, message_id or hash"))?,
            ),
        })
    }
}

impl std::fmt::Display for Dedup {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Offset => f.write_str("offset"),
            Self::MessageId => f.write_str("message_id"),
            Self::Hash => f.write_str("hash"),
            Self::Path(path) => path.fmt(f),
        }
    }
}

impl<'de> Deserialize<'de> for Dedup {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        String::deserialize(d)?
            .parse()
            .map_err(serde::de::Error::custom)
    }
}

impl Serialize for Dedup {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}
