//! Where a broker listens: the URL, and opening a connection there.

use std::path::PathBuf;

use tokio::net::{TcpStream, UnixStream};

use super::ClientError;
use crate::edge::native::io::{Reader, Writer};

/// A parsed URL.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Target {
    /// Host and port.
    Tcp(String),
    /// Path of a socket.
    Unix(PathBuf),
}

impl Target {
    pub(super) fn parse(url: &str) -> Result<Self, ClientError> {
        let bad = || ClientError::Url(url.to_owned());
        if let Some(path) = url.strip_prefix("dagorama+unix://") {
            return match path {
                "" => Err(bad()),
                path => Ok(Self::Unix(path.into())),
            };
        }
        let host = url.strip_prefix("dagorama://").ok_or_else(bad)?;
        let host = host.trim_end_matches('/');
        // The last colon of an IPv6 address in brackets is inside them when there is no port.
        let has_port = host
            .rsplit_once(':')
            .is_some_and(|(_, port)| port.parse::<u16>().is_ok());
        match host {
            "" => Err(bad()),
            host if host.contains(['/', '@', '?', '#']) => Err(bad()),
            host if has_port => Ok(Self::Tcp(host.to_owned())),
            host => Ok(Self::Tcp(format!("{host}:7373"))),
        }
    }

    pub(super) async fn open(&self) -> std::io::Result<(Reader, Writer)> {
        match self {
            Self::Tcp(address) => {
                let stream = TcpStream::connect(address).await?;
                stream.set_nodelay(true)?;
                let (reader, writer) = stream.into_split();
                Ok((Box::new(reader), Box::new(writer)))
            }
            Self::Unix(path) => {
                let (reader, writer) = UnixStream::connect(path).await?.into_split();
                Ok((Box::new(reader), Box::new(writer)))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls() {
        for (url, expected) in [
            ("dagorama://127.0.0.1:7373", Some("127.0.0.1:7373")),
            ("dagorama://broker.example", Some("broker.example:7373")),
            ("dagorama://broker.example:99/", Some("broker.example:99")),
            ("dagorama://[::1]:7373", Some("[::1]:7373")),
            ("dagorama://[::1]", Some("[::1]:7373")),
            ("dagorama://", None),
            ("dagorama://a/b", None),
            ("dagorama://user@host", None),
            ("http://127.0.0.1:7373", None),
            ("127.0.0.1:7373", None),
            ("dagorama+unix://", None),
        ] {
            let got = Target::parse(url).ok();
            assert_eq!(got, expected.map(|to| Target::Tcp(to.to_owned())), "{url}");
        }
        let path = Target::parse("dagorama+unix:///run/a.sock").expect("a path");
        assert_eq!(path, Target::Unix("/run/a.sock".into()));
    }
}
