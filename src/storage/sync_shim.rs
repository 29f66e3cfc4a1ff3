//! The calls into the operating system that std does not offer, and the one that makes sled durable.
//!
//! sled's `flush()` calls `sync_file_range`, which flushes neither the drive's cache nor the file's metadata, so it promises
//! nothing after a power cut. sled calls the C symbol, and a symbol in our own binary wins: ours is an `fdatasync`. This is
//! always on. Whether the linker really took it is checked at every start: [`sled_syncs`] must grow with a `flush()`.
//!
//! This is the only module that may use `unsafe`: raw calls with plain integers and descriptors that are open for the call.

#![expect(
    unsafe_code,
    reason = "raw system calls with descriptors that the caller holds open; no memory is shared but one out-parameter"
)]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

/// Syncs that sled asked for.
static SLED_SYNCS: AtomicU64 = AtomicU64::new(0);
/// Syncs of our own files.
static OWN_SYNCS: AtomicU64 = AtomicU64::new(0);

/// Replaces the C library's `sync_file_range` in this process: a whole `fdatasync` instead of a hint to the page cache.
///
/// # Safety
/// Takes integers only; a descriptor that is not open gives -1 and `EBADF`, like the original.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sync_file_range(
    fd: libc::c_int,
    _offset: libc::off64_t,
    _count: libc::off64_t,
    _flags: libc::c_uint,
) -> libc::c_int {
    SLED_SYNCS.fetch_add(1, Ordering::Relaxed);
    // SAFETY: an integer argument; the kernel checks the descriptor.
    unsafe { libc::fdatasync(fd) }
}

/// How often sled has synced in this process.
pub fn sled_syncs() -> u64 {
    SLED_SYNCS.load(Ordering::Relaxed)
}

/// How often [`fdatasync`] was called in this process.
pub fn own_syncs() -> u64 {
    OWN_SYNCS.load(Ordering::Relaxed)
}

/// Makes the file's content durable. A failed one must never be repeated (G17): the kernel may have dropped the pages.
pub fn fdatasync(file: &File) -> io::Result<()> {
    OWN_SYNCS.fetch_add(1, Ordering::Relaxed);
    // SAFETY: the descriptor is open for as long as `file` is borrowed.
    if unsafe { libc::fdatasync(file.as_raw_fd()) } == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Milliseconds since the machine started, time asleep included.
pub fn boot_clock_ms() -> u64 {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: `time` lives through the call and is the out-parameter's type.
    let result = unsafe { libc::clock_gettime(libc::CLOCK_BOOTTIME, &raw mut time) };
    debug_assert_eq!(result, 0, "CLOCK_BOOTTIME exists since Linux 2.6.39");
    u64::try_from(time.tv_sec).unwrap_or(0) * 1_000
        + u64::try_from(time.tv_nsec).unwrap_or(0) / 1_000_000
}

/// Milliseconds since the Unix epoch, as the machine believes.
pub fn wall_clock_ms() -> u64 {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: `time` lives through the call and is the out-parameter's type.
    let result = unsafe { libc::clock_gettime(libc::CLOCK_REALTIME, &raw mut time) };
    debug_assert_eq!(result, 0, "CLOCK_REALTIME exists everywhere");
    u64::try_from(time.tv_sec).unwrap_or(0) * 1_000
        + u64::try_from(time.tv_nsec).unwrap_or(0) / 1_000_000
}

/// Gives memory that the allocator keeps for later back to the system.
pub fn malloc_trim() {
    #[cfg(target_env = "gnu")]
    // SAFETY: thread-safe, no pointers.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// Bytes of heap in use, by the allocator's own count over all its arenas; 0 where that cannot be told.
#[must_use]
pub fn heap_bytes() -> u64 {
    #[cfg(target_env = "gnu")]
    {
        // SAFETY: thread-safe, returns a plain structure.
        let info = unsafe { libc::mallinfo2() };
        (info.uordblks + info.hblkhd) as u64
    }
    #[cfg(not(target_env = "gnu"))]
    0
}

/// Room on the file system that holds `path`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DiskSpace {
    /// Bytes that this user may still write.
    pub free: u64,
    /// Size of the file system in bytes.
    pub total: u64,
}

/// Asks how much room is left where `path` lies.
pub fn free_bytes(path: &Path) -> io::Result<DiskSpace> {
    let path = std::ffi::CString::new(path.as_os_str().as_bytes())
        .map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
    let mut stat = std::mem::MaybeUninit::<libc::statvfs64>::zeroed();
    // SAFETY: `path` is a C string and `stat` is writable, both through the call.
    if unsafe { libc::statvfs64(path.as_ptr(), stat.as_mut_ptr()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: zeroed and then filled by a successful call; any bit pattern is a valid `statvfs64`.
    let stat = unsafe { stat.assume_init() };
    Ok(DiskSpace {
        free: stat.f_bavail.saturating_mul(stat.f_frsize),
        total: stat.f_blocks.saturating_mul(stat.f_frsize),
    })
}

/// Gives the blocks of a part of a file back to the file system; the part reads as zeros afterwards and the length stays.
/// `Ok(false)`: this file system cannot.
pub fn punch_hole(file: &File, offset: u64, length: u64) -> io::Result<bool> {
    let (Ok(offset), Ok(length)) = (i64::try_from(offset), i64::try_from(length)) else {
        return Err(io::Error::from(io::ErrorKind::InvalidInput));
    };
    // SAFETY: integers, and a descriptor that is open for as long as `file` is borrowed.
    let result = unsafe {
        libc::fallocate64(
            file.as_raw_fd(),
            libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE,
            offset,
            length,
        )
    };
    if result == 0 {
        return Ok(true);
    }
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        Some(libc::EOPNOTSUPP | libc::ENOSYS) => Ok(false),
        _ => Err(error),
    }
}

/// Allocates the blocks of a file up to a length, without writing them. `Ok(false)`: this file system cannot.
pub fn allocate(file: &File, length: u64) -> io::Result<bool> {
    let Ok(length) = i64::try_from(length) else {
        return Err(io::Error::from(io::ErrorKind::InvalidInput));
    };
    // SAFETY: integers, and a descriptor that is open for as long as `file` is borrowed.
    let result =
        unsafe { libc::fallocate64(file.as_raw_fd(), libc::FALLOC_FL_KEEP_SIZE, 0, length) };
    if result == 0 {
        return Ok(true);
    }
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        Some(libc::EOPNOTSUPP | libc::ENOSYS) => Ok(false),
        _ => Err(error),
    }
}

/// Where the next bytes begin that are not a hole; `from` itself if it is not in one, or this file system does not tell.
/// `None`: only holes follow. Moves the file's own offset.
pub fn next_data(file: &File, from: u64) -> io::Result<Option<u64>> {
    match seek(file, from, libc::SEEK_DATA) {
        Ok(data) => Ok(Some(data)),
        Err(error) if error.raw_os_error() == Some(libc::ENXIO) => Ok(None),
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(Some(from)),
        Err(error) => Err(error),
    }
}

/// Where the next hole begins: the end of the file if there is none, or this file system does not tell. Moves the file's own
/// offset.
pub fn next_hole(file: &File, from: u64) -> io::Result<u64> {
    match seek(file, from, libc::SEEK_HOLE) {
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(file.metadata()?.len()),
        other => other,
    }
}

/// Reads of this open file bring nothing into the page cache but what they ask for.
pub fn read_nothing_ahead(file: &File) -> io::Result<()> {
    // SAFETY: integers, and a descriptor that is open for as long as `file` is borrowed.
    match unsafe { libc::posix_fadvise64(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_RANDOM) } {
        0 => Ok(()),
        error => Err(io::Error::from_raw_os_error(error)),
    }
}

fn seek(file: &File, from: u64, whence: libc::c_int) -> io::Result<u64> {
    let Ok(from) = i64::try_from(from) else {
        return Err(io::Error::from(io::ErrorKind::InvalidInput));
    };
    // SAFETY: integers, and a descriptor that is open for as long as `file` is borrowed.
    let result = unsafe { libc::lseek64(file.as_raw_fd(), from, whence) };
    u64::try_from(result).map_err(|_| io::Error::last_os_error())
}

/// Takes the exclusive lock of an open file without waiting. `Ok(false)`: another process (or another open file) has it.
pub fn try_lock(file: &File) -> io::Result<bool> {
    // SAFETY: integers, and a descriptor that is open for as long as `file` is borrowed.
    if unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) } == 0 {
        return Ok(true);
    }
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        Some(libc::EWOULDBLOCK) => Ok(false),
        _ => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn sled_flush_reaches_our_sync() {
        let dir = tempfile::tempdir().unwrap();
        let db = sled::Config::new()
            .path(dir.path())
            .flush_every_ms(None)
            .open()
            .unwrap();
        let before = sled_syncs();
        db.insert(b"key", b"value").unwrap();
        db.flush().unwrap();
        assert!(sled_syncs() > before, "the linker ignored our symbol");
    }

    #[test]
    fn hole_reads_as_zeros_and_keeps_the_length() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[7u8; 16_384]).unwrap();
        if punch_hole(&file, 4_096, 8_192).unwrap() {
            let mut all = vec![1u8; 16_384];
            std::os::unix::fs::FileExt::read_exact_at(&file, &mut all, 0).unwrap();
            assert!(all[..4_096].iter().all(|b| *b == 7));
            assert!(all[4_096..12_288].iter().all(|b| *b == 0));
            assert!(all[12_288..].iter().all(|b| *b == 7));
        }
        assert_eq!(file.metadata().unwrap().len(), 16_384);
    }

    #[test]
    fn allocated_blocks_are_a_hole_until_they_are_written() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(65_536).unwrap();
        if !allocate(&file, 65_536).unwrap() {
            return;
        }
        assert_eq!(file.metadata().unwrap().len(), 65_536);
        assert_eq!(next_data(&file, 0).unwrap(), None);
        std::os::unix::fs::FileExt::write_all_at(&file, &[1; 4_096], 32_768).unwrap();
        assert_eq!(next_hole(&file, 0).unwrap(), 0);
        assert_eq!(next_data(&file, 0).unwrap(), Some(32_768));
        assert_eq!(next_data(&file, 32_776).unwrap(), Some(32_776));
        assert_eq!(next_hole(&file, 32_776).unwrap(), 36_864);
        assert_eq!(next_data(&file, 36_864).unwrap(), None);
        assert_eq!(next_data(&file, 65_536).unwrap(), None, "the end");
        file.set_len(0).unwrap();
        file.set_len(65_536).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&file, &vec![1; 65_536], 0).unwrap();
        assert_eq!(next_hole(&file, 5).unwrap(), 65_536);
    }

    #[test]
    fn lock_excludes_a_second_open_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("LOCK");
        let first = File::create(&path).unwrap();
        let second = File::open(&path).unwrap();
        assert!(try_lock(&first).unwrap());
        assert!(!try_lock(&second).unwrap());
        drop(first);
        assert!(try_lock(&second).unwrap());
    }

    #[test]
    fn disk_space_is_plausible() {
        let space = free_bytes(Path::new("/")).unwrap();
        assert!(space.total >= space.free && space.total > 0);
        assert!(free_bytes(Path::new("/no/such/place")).is_err());
        assert!(boot_clock_ms() > 0);
        malloc_trim();
    }
}
