//! Values as people write them: "30s", "8MiB", an address to listen on.
//!
//! A bare number is refused where a unit belongs, because nobody remembers whether a timeout was in seconds or milliseconds.

use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A length of time, written "250ms", "30s", "7d".
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Period(pub Duration);

/// A number of bytes, written "512KiB", "64MiB", "1GiB".
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Size(pub u64);

/// Where to listen: `127.0.0.1:7373` or `unix:/path/to.sock`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Listen {
    /// An IP address and port; port 0 lets the system choose.
    Tcp(SocketAddr),
    /// A unix socket.
    Unix(PathBuf),
}

impl Period {
    /// That many milliseconds.
    #[must_use]
    pub const fn from_ms(ms: u64) -> Self {
        Self(Duration::from_millis(ms))
    }

    /// In milliseconds.
    #[must_use]
    pub fn as_ms(self) -> u64 {
        u64::try_from(self.0.as_millis()).unwrap_or(u64::MAX)
    }
}

impl Listen {
    /// Whether only this machine can reach it.
    #[must_use]
    pub fn is_local(&self) -> bool {
        match self {
            Self::Tcp(address) => address.ip().is_loopback(),
            Self::Unix(_) => true,
        }
    }
}

impl FromStr for Period {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        humantime::parse_duration(text.trim())
            .map(Self)
            .map_err(|_| {
                format!(
                    "\"{text}\" is no length of time: write it like \"250ms\", \"30s\" or \"7d\""
                )
            })
    }
}

impl FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let refuse =
            || format!("\"{text}\" is no size: write it like \"512KiB\", \"64MiB\" or \"1GiB\"");
        if text.trim().bytes().all(|b| b.is_ascii_digit()) {
            return Err(refuse());
        }
        text.trim()
            .parse::<bytesize::ByteSize>()
            .map(|size| Self(size.as_u64()))
            .map_err(|_| refuse())
    }
}

impl FromStr for Listen {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Some(path) = text.strip_prefix("unix:") {
            let path = path.strip_prefix("//").unwrap_or(path);
            if path.is_empty() {
                return Err(
                    "\"unix:\" names no path: write it like \"unix:/run/dagorama.sock\"".to_owned(),
                );
            }
            return Ok(Self::Unix(PathBuf::from(path)));
        }
        text.parse().map(Self::Tcp).map_err(|_| {
            format!("\"{text}\" is no address: write it like \"127.0.0.1:7373\", \"[::1]:7373\" or \"unix:/run/dagorama.sock\"")
        })
    }
}

impl fmt::Display for Period {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = humantime::format_duration(self.0).to_string();
        f.write_str(&text.replace(' ', ""))
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (unit, name) in [(1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")] {
            if self.0 >= unit && self.0.is_multiple_of(unit) {
                return write!(f, "{}{name}", self.0 / unit);
            }
        }
        write!(f, "{}B", self.0)
    }
}

impl fmt::Display for Listen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => write!(f, "{address}"),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

/// Reads text through `FromStr`, and says what was wanted when it is a bare number.
struct FromText<T>(std::marker::PhantomData<T>, &'static str);

impl<T: FromStr<Err = String>> serde::de::Visitor<'_> for FromText<T> {
    type Value = T;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.1)
    }

    fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<T, E> {
        text.parse().map_err(E::custom)
    }

    fn visit_i64<E: serde::de::Error>(self, number: i64) -> Result<T, E> {
        Err(E::custom(format!(
            "{number} has no unit: {} is wanted",
            self.1
        )))
    }
}

macro_rules! as_text {
    ($($type:ty: $wanted:literal,)*) => {$(
        impl<'de> Deserialize<'de> for $type {
            fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
                d.deserialize_any(FromText(std::marker::PhantomData, $wanted))
            }
        }
        impl Serialize for $type {
            fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
                s.collect_str(self)
            }
        }
    )*};
}

as_text! {
    Period: "a length of time like \"30s\"",
    Size: "a size like \"8MiB\"",
    Listen: "an address like \"127.0.0.1:7373\" or \"unix:/path\"",
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_read_and_shown_as_people_write_them() {
        for (text, ms) in [
            ("250ms", 250),
            ("30s", 30_000),
            ("7d", 604_800_000),
            ("1m 30s", 90_000),
        ] {
            let period: Period = text.parse().unwrap();
            assert_eq!(period.as_ms(), ms);
            assert_eq!(period.to_string().parse::<Period>().unwrap(), period);
        }
        for (text, bytes) in [
            ("512KiB", 524_288),
            ("64MiB", 67_108_864),
            ("1GiB", 1 << 30),
            ("10B", 10),
            ("1MB", 1_000_000),
        ] {
            let size: Size = text.parse().unwrap();
            assert_eq!(size.0, bytes);
            assert_eq!(size.to_string().parse::<Size>().unwrap(), size);
        }
        for text in ["127.0.0.1:7373", "[::1]:0", "unix:/run/d.sock"] {
            assert_eq!(text.parse::<Listen>().unwrap().to_string(), text);
        }
        assert_eq!(
            "unix:///run/d.sock".parse::<Listen>().unwrap(),
            Listen::Unix("/run/d.sock".into())
        );
    }

    #[test]
    fn what_has_no_unit_or_no_sense_is_refused() {
        for text in ["", "30", "s", "-1s", "30 parsecs"] {
            assert!(
                text.parse::<Period>()
                    .unwrap_err()
                    .contains("no length of time"),
                "{text}"
            );
        }
        for text in ["", "30", "MiB", "-1MiB", "8 floppies"] {
            assert!(
                text.parse::<Size>().unwrap_err().contains("no size"),
                "{text}"
            );
        }
        for text in ["", "7373", "localhost", "unix:"] {
            assert!(text.parse::<Listen>().is_err(), "{text}");
        }
    }

    #[test]
    fn only_loopback_and_sockets_are_local() {
        for (text, local) in [
            ("127.0.0.1:1", true),
            ("[::1]:1", true),
            ("0.0.0.0:1", false),
            ("10.0.0.1:1", false),
            ("unix:/x", true),
        ] {
            assert_eq!(text.parse::<Listen>().unwrap().is_local(), local, "{text}");
        }
    }
}
