//! Errors of the operating system as the supervisor wants them: what gets better by itself is tried again, the rest parks the route.

use std::io;
use std::path::Path;

use dagorama_bridge_api::BridgeError;

/// Parks when the error needs a person, else asks for another try.
pub(crate) fn of_io(code: &'static str, what: &str, path: &Path, error: &io::Error) -> BridgeError {
    use io::ErrorKind as Kind;
    let text = format!("cannot {what} {}: {error}", path.display());
    match error.kind() {
        Kind::NotFound
        | Kind::PermissionDenied
        | Kind::IsADirectory
        | Kind::NotADirectory
        | Kind::ReadOnlyFilesystem
        | Kind::BrokenPipe
        | Kind::InvalidInput => BridgeError::Parked { code, reason: text },
        _ => BridgeError::Retry(text),
    }
}

/// Runs what blocks on a thread that may wait.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, BridgeError> + Send + 'static,
) -> Result<T, BridgeError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => Err(BridgeError::Retry(format!(
            "a file operation was cut off: {error}"
        ))),
    }
}
