//! The owner's token: made at random by `serve`, readable by its owner only, found by the user's own clients (G18).

use std::fmt::Write as _;
use std::fs;
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::units::Listen;

/// Where the token of a broker at this address lies: `HOST-PORT.token` in the state directory (`$DAGORAMA_STATE_DIR`, else
/// `~/.local/state/dagorama`), or `SOCKET.token` beside a unix socket. The Python client looks in the same place.
#[must_use]
pub fn token_file(address: &Listen) -> PathBuf {
    match address {
        Listen::Unix(path) => {
            let mut name = path.clone().into_os_string();
            name.push(".token");
            PathBuf::from(name)
        }
        Listen::Tcp(address) => {
            let host = address.ip().to_string();
            state_dir().join(format!("{host}-{}.token", address.port()))
        }
    }
}

/// `$DAGORAMA_STATE_DIR`, else `~/.local/state/dagorama`.
#[must_use]
pub fn state_dir() -> PathBuf {
    if let Some(dir) = std::env::var_os("DAGORAMA_STATE_DIR").filter(|dir| !dir.is_empty()) {
        return PathBuf::from(dir);
    }
    let home = std::env::var_os("HOME").map_or_else(|| PathBuf::from("."), PathBuf::from);
    home.join(".local/state/dagorama")
}

/// 256 random bits in hex.
pub fn new_token() -> io::Result<Arc<str>> {
    let mut bytes = [0u8; 32];
    getrandom::fill(&mut bytes).map_err(|e| io::Error::other(format!("no random bits: {e}")))?;
    let mut text = String::with_capacity(64);
    for byte in bytes {
        let _ = write!(text, "{byte:02x}");
    }
    Ok(text.into())
}

/// The token in `path`; made if the file is missing. A file that others can read is refused, not repaired: its token may be known.
pub fn read_or_create(path: &Path) -> io::Result<Arc<str>> {
    match read(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        other => return other,
    }
    let token = new_token()?;
    let draft = write_draft(path, &token)?;
    // Complete under another name, then linked: a client never reads half a token, and of two starters one wins.
    let linked = fs::hard_link(&draft, path);
    fs::remove_file(&draft)?;
    match linked {
        Ok(()) => Ok(token),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => read(path),
        Err(error) => Err(error),
    }
}

/// Puts a token where clients look, in place of what was there: for a port that was only known once it was bound.
pub fn write(path: &Path, token: &str) -> io::Result<()> {
    let draft = write_draft(path, token)?;
    fs::rename(&draft, path)
}

/// The token in a file of its own beside `path`, readable by the owner only.
fn write_draft(path: &Path, token: &str) -> io::Result<PathBuf> {
    if let Some(dir) = path.parent().filter(|dir| !dir.as_os_str().is_empty()) {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(dir)?;
    }
    let draft = path.with_extension(format!("token.{}", std::process::id()));
    let _ = fs::remove_file(&draft);
    let mut file = fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&draft)?;
    file.write_all(token.as_bytes())?;
    file.write_all(b"\n")?;
    Ok(draft)
}

/// The token in `path`.
pub fn read(path: &Path) -> io::Result<Arc<str>> {
    let file = fs::File::open(path)?;
    let mode = file.metadata()?.permissions().mode();
    if mode & 0o077 != 0 {
        return Err(io::Error::new(
            io::ErrorKind::PermissionDenied,
            format!(
                "{} can be read by others (mode {:o}): remove it, a new one is made at the next start",
                path.display(),
                mode & 0o777
            ),
        ));
    }
    let mut text = String::new();
    file.take(4096).read_to_string(&mut text)?;
    let token = text.trim();
    if token.len() < 16 {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!(
                "{} holds no token of at least 16 characters: remove it, a new one is made at the next start",
                path.display()
            ),
        ));
    }
    Ok(token.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_made_once_and_only_its_owner_reads_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state/127.0.0.1-7373.token");
        let first = read_or_create(&path).unwrap();
        assert_eq!(first.len(), 64);
        assert_eq!(read_or_create(&path).unwrap(), first);
        assert_eq!(
            fs::metadata(&path).unwrap().permissions().mode() & 0o777,
            0o600
        );
        assert_eq!(
            fs::metadata(path.parent().unwrap())
                .unwrap()
                .permissions()
                .mode()
                & 0o777,
            0o700
        );
        assert_eq!(
            fs::read_dir(path.parent().unwrap()).unwrap().count(),
            1,
            "the draft is gone"
        );
        assert_ne!(new_token().unwrap(), first);
    }

    #[test]
    fn a_token_that_others_read_or_that_is_empty_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("t");
        fs::write(&path, "0123456789abcdef0123456789abcdef\n").unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
        assert_eq!(
            read_or_create(&path).unwrap_err().kind(),
            io::ErrorKind::PermissionDenied
        );
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        assert_eq!(&*read(&path).unwrap(), "0123456789abcdef0123456789abcdef");
        fs::write(&path, "\n").unwrap();
        assert_eq!(
            read_or_create(&path).unwrap_err().kind(),
            io::ErrorKind::InvalidData
        );
    }

    #[test]
    fn the_file_is_named_after_the_address() {
        let unix = token_file(&"unix:/run/d.sock".parse().unwrap());
        assert_eq!(unix, PathBuf::from("/run/d.sock.token"));
        let tcp = token_file(&"127.0.0.1:7373".parse().unwrap());
        assert_eq!(tcp.file_name().unwrap(), "127.0.0.1-7373.token");
    }
}
